//! Gates fitted to what the routers see: every candidate is judged by rows that it was not fitted to, the best one is scaled and kept.
//!
//! Routing chooses by the order of logits and weighs by their size. A fit gets the order right; how large logits should be is found by the
//! likelihood of the right expert in rows that were left out, as one factor, which becomes part of the gate.
//! Dimensions: D hidden, E experts, N rows.

use faer::{MatMut, MatRef};
use rayon::prelude::*;
use serde::Serialize;

use super::line;
use crate::{
    gate::Gate,
    linalg::{Singular, product},
    statistics::{LayerStatistics, Rows, StatisticsError, Training},
};

/// Rows that one task works on.
pub(super) const CHUNK: usize = 512;
/// How far logits may be scaled from a root mean square of one: beyond, routing is as good as even, or as good as hard.
const SCALES: [f64; 2] = [1e-2, 1e2];

/// Likelihood, in nats, that is not worth leaving the first candidate for. Rows left out come from the same texts as the others and are kind to
/// weakly regularised fits: gains below this made composites worse on new text, not better.
const MARGIN: f64 = 0.05;

/// A way to fit a gate, with its regulariser.
#[derive(Debug, Clone, Copy)]
pub struct Candidate {
    /// what to call it
    pub name: &'static str,
    /// its regulariser, relative to the mean square of a router input's element
    pub lambda: f64,
    /// computes the gate, [E, D]
    pub solve: fn(&Training<'_>, f64) -> Result<Vec<f64>, Singular>,
}

/// A gate, and how good it is.
#[derive(Debug, Clone)]
pub struct Fitted {
    /// fitted to everything
    pub gate: Gate,
    /// \[fold\]: fitted to everything else, to route that fold as rows are routed that were never seen; empty if some domain has rows in one
    /// fold only
    pub without: Vec<Gate>,
    /// what was chosen, and why
    pub report: FitReport,
}

/// How a gate came about.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct FitReport {
    /// the candidate that was chosen
    pub method: &'static str,
    /// its regulariser
    pub lambda: f64,
    /// the factor that is folded into the gate
    pub scale: f64,
    /// whether it was judged by rows that it was not fitted to
    pub held_out: bool,
    /// mean of -log p(right expert) over the rows it was judged by, in nats; p is the softmax of all E logits
    pub nll: f64,
    /// [E], how often the right expert is among the K with the largest logits, for K from 1
    pub accuracy: Vec<f64>,
    /// a line for the user
    pub why: String,
}

/// Why there is no gate.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum FitError {
    /// The statistics do not suffice.
    #[error(transparent)]
    Statistics(#[from] StatisticsError),
    /// A method finds no gate.
    #[error("`{method}` with regulariser {lambda} finds no gate: {cause}")]
    Singular {
        /// its name
        method: &'static str,
        /// its regulariser
        lambda: f64,
        /// what went wrong
        cause: Singular,
    },
    /// Only sums were kept.
    #[error("the statistics of domain {domain} hold no sample of rows to judge a gate by: gather them again and keep some rows")]
    NoRows {
        /// the domain
        domain: usize,
    },
    /// There is nothing to choose from.
    #[error("there is no method to fit a gate with")]
    NoCandidate,
}

/// Fits the candidates and keeps the first that makes the right experts of unseen rows as likely as any, up to a small margin.
pub fn fit(candidates: &[Candidate], statistics: &LayerStatistics) -> Result<Fitted, FitError> {
    let shape = statistics.shape();
    let solve = |candidate: &Candidate, training: &Training<'_>| {
        let gate = (candidate.solve)(training, candidate.lambda);
        gate.map_err(|cause| FitError::Singular { method: candidate.name, lambda: candidate.lambda, cause })
    };
    let held_out = statistics.can_hold_out();
    let left_out: Vec<Option<usize>> = if held_out { (0..shape.folds).map(Some).collect() } else { vec![None] };
    // [candidate][fold]
    let mut gates = vec![Vec::new(); candidates.len()];
    let mut logits = vec![Vec::new(); candidates.len()];
    for fold in left_out {
        let training = statistics.training(fold)?;
        let unseen = fold.map(|fold| statistics.fold(fold));
        for ((candidate, gates), logits) in candidates.iter().zip(&mut gates).zip(&mut logits) {
            let gate = solve(candidate, &training)?;
            logits.extend(unseen.as_ref().unwrap_or(&training.rows).iter().map(|rows| Logits::new(*rows, &gate, shape.hidden)));
            gates.push(gate);
        }
    }
    if let Some(domain) = (0..shape.domains).find(|&domain| !logits.iter().flatten().any(|rows| rows.domain == domain)) {
        return Err(if candidates.is_empty() { FitError::NoCandidate } else { FitError::NoRows { domain } });
    }
    let judged = candidates.iter().zip(&logits).map(|(candidate, logits)| judge(candidate, logits, shape.domains, held_out));
    let mut reports: Vec<FitReport> = judged.collect();
    let least = reports.iter().map(|report| report.nll).fold(f64::INFINITY, f64::min);
    let best = reports.iter().position(|report| report.nll <= least + MARGIN).ok_or(FitError::NoCandidate)?;
    let mut report = reports.remove(best);
    if let Some(other) = reports.iter().min_by(|a, b| a.nll.total_cmp(&b.nll)) {
        report.why = format!("{}; the best of the others is {}", report.why, other.why);
    }
    let scaled = |gate: Vec<f64>| {
        let weight = gate.iter().map(|v| (v * report.scale) as f32).collect();
        Gate { experts: shape.domains, hidden: shape.hidden, weight }
    };
    let mut without = gates.swap_remove(best);
    let gate = if held_out { solve(&candidates[best], &statistics.training(None)?)? } else { without.swap_remove(0) };
    Ok(Fitted { gate: scaled(gate), without: without.into_iter().map(scaled).collect(), report })
}

/// What a gate makes of rows.
#[derive(Debug, Clone)]
struct Logits {
    domain: usize,
    weight: f64,
    /// [N, E]
    values: Vec<f32>,
}

impl Logits {
    fn new(rows: Rows<'_>, gate: &[f64], hidden: usize) -> Self {
        Self { domain: rows.domain, weight: rows.weight, values: logits(rows.x, gate, hidden) }
    }
}

/// x · gateᵀ, [N, E], for `x`, [N, D], and `gate`, [E, D].
pub(super) fn logits(x: &[f32], gate: &[f64], hidden: usize) -> Vec<f32> {
    let experts = gate.len() / hidden;
    let gate: Vec<f32> = gate.iter().map(|&v| v as f32).collect();
    let gate = MatRef::from_row_major_slice(&gate, experts, hidden);
    let mut logits = vec![0.0; x.len() / hidden * experts];
    logits.par_chunks_mut(CHUNK * experts).zip(x.par_chunks(CHUNK * hidden)).for_each(|(logits, x)| {
        let n = x.len() / hidden;
        product(MatMut::from_row_major_slice_mut(logits, n, experts), MatRef::from_row_major_slice(x, n, hidden), gate.transpose());
    });
    logits
}

fn judge(candidate: &Candidate, logits: &[Logits], experts: usize, held_out: bool) -> FitReport {
    let scale = scale(logits, experts);
    // In order of the rows, so that the sums do not depend on threads.
    let rows = logits.par_iter().map(|rows| {
        let mut ranks = vec![0.0; experts];
        for z in rows.values.chunks_exact(experts) {
            let right = z[rows.domain];
            let ahead = z.iter().enumerate().filter(|&(e, &v)| if e < rows.domain { v >= right } else { v > right }).count();
            ranks[ahead] += rows.weight;
        }
        (rows.weight * line::loss(None, &rows.values, experts, rows.domain, scale).value, ranks)
    });
    let (mut nll, mut accuracy) = (0.0, vec![0.0; experts]);
    for (of_rows, ranks) in rows.collect::<Vec<_>>() {
        nll += of_rows;
        accuracy.iter_mut().zip(ranks).for_each(|(sum, share)| *sum += share);
    }
    for k in 1..experts {
        accuracy[k] += accuracy[k - 1];
    }
    let Candidate { name: method, lambda, .. } = *candidate;
    let first = 100.0 * accuracy.first().copied().unwrap_or(1.0);
    let why = format!("{method} (regulariser {lambda}): {nll:.3} nats, {first:.1} % right");
    FitReport { method, lambda, scale, held_out, nll, accuracy, why }
}

/// The factor under which the right experts are likeliest; 1 if all logits are equal.
fn scale(logits: &[Logits], experts: usize) -> f64 {
    let square = |z: &[f32]| {
        let mean = z.iter().sum::<f32>() / experts as f32;
        f64::from(z.iter().map(|v| (v - mean) * (v - mean)).sum::<f32>()) / experts as f64
    };
    let squares = logits.par_iter().map(|rows| rows.weight * rows.values.chunks_exact(experts).map(square).sum::<f64>());
    let size = squares.collect::<Vec<_>>().iter().sum::<f64>().sqrt();
    if size == 0.0 || !size.is_finite() {
        return 1.0;
    }
    // -log p is convex in the factor.
    let slope = |factor: f64| {
        let slopes = logits.par_iter().map(|rows| {
            let loss = line::loss(None, &rows.values, experts, rows.domain, factor / size);
            (rows.weight * loss.slope / size, rows.weight * loss.curvature / (size * size))
        });
        slopes.collect::<Vec<_>>().into_iter().fold((0.0, 0.0), |(a, b), (c, d)| (a + c, b + d))
    };
    root(slope, SCALES, 1e-7) / size
}

/// Where an increasing function, given with its derivative, is zero up to `tolerance`, or the nearer end of the range, which is positive.
/// Newton's method, which starts at one, and bisects where it would leave what is left of the range.
pub(super) fn root(function: impl Fn(f64) -> (f64, f64), range: [f64; 2], tolerance: f64) -> f64 {
    let ([mut low, mut high], mut at) = (range, 1.0f64);
    while high / low > 1.0 + 1e-9 {
        let (value, derivative) = function(at);
        if value.abs() <= tolerance {
            break;
        }
        (low, high) = if value < 0.0 { (at, high) } else { (low, at) };
        let newton = at - value / derivative;
        at = if newton > low && newton < high { newton } else { (low * high).sqrt() };
    }
    at
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        init::{How, METHODS, ridge, softmax},
        statistics::{self, Shape},
    };

    const HIDDEN: usize = 24;
    const EXPERTS: usize = 3;

    fn fitted() -> impl Iterator<Item = (&'static str, &'static [Candidate])> {
        METHODS.iter().filter_map(|method| match method.how {
            How::Fitted(candidates) => Some((method.name, candidates)),
            How::Prompts { .. } | How::Runtime(_) => None,
        })
    }

    fn candidates(name: &str) -> &'static [Candidate] {
        fitted().find(|(method, _)| *method == name).unwrap().1
    }

    /// Overlapping clusters, of different sizes; expert e stands at `order[e]`, inputs are `factor` times as large.
    fn gathered(order: [usize; EXPERTS], factor: f32) -> LayerStatistics {
        let mut statistics = LayerStatistics::new(Shape { hidden: HIDDEN, domains: EXPERTS, folds: 4, rows: 10_000 });
        for (e, place) in order.into_iter().enumerate() {
            for fold in 0..4 {
                let rows = statistics::tests::rows(fold as u64, e, 40 + 30 * e, HIDDEN);
                let rows: Vec<f32> = rows.iter().map(|v| factor * v).collect();
                statistics.add(place, fold, &rows).unwrap();
            }
        }
        statistics
    }

    fn row(fitted: &Fitted, e: usize) -> &[f32] {
        fitted.gate.row(e)
    }

    fn close(a: &[f32], b: &[f32], tolerance: f32) -> bool {
        let size = a.iter().map(|v| v.abs()).fold(0.0, f32::max);
        a.len() == b.len() && a.iter().zip(b).all(|(a, b)| (a - b).abs() <= tolerance * size)
    }

    /// Gaussian elimination with pivots, plainly.
    fn dense_solve(mut a: Vec<Vec<f64>>, mut b: Vec<f64>) -> Vec<f64> {
        let n = b.len();
        for k in 0..n {
            let pivot = (k..n).max_by(|&i, &j| a[i][k].abs().total_cmp(&a[j][k].abs())).unwrap();
            a.swap(k, pivot);
            b.swap(k, pivot);
            for i in k + 1..n {
                let factor = a[i][k] / a[k][k];
                let pivot = a[k].clone();
                a[i].iter_mut().zip(pivot).for_each(|(v, p)| *v -= factor * p);
                b[i] -= factor * b[k];
            }
        }
        for k in (0..n).rev() {
            let rest: f64 = (k + 1..n).map(|j| a[k][j] * b[j]).sum();
            b[k] = (b[k] - rest) / a[k][k];
        }
        b
    }

    /// Every row with its label and weight.
    fn flat<'a>(blocks: &[Rows<'a>]) -> Vec<(&'a [f32], usize, f64)> {
        blocks.iter().flat_map(|rows| rows.x.chunks(HIDDEN).map(|x| (x, rows.domain, rows.weight))).collect()
    }

    #[test]
    fn ridge_is_the_regularised_least_squares_solution() {
        let statistics = gathered([0, 1, 2], 1.0);
        let fitted = fit(&[ridge::with(0.03)], &statistics).unwrap();
        let rows = flat(&statistics.training(None).unwrap().rows);
        let mut a = vec![vec![0.0; HIDDEN]; HIDDEN];
        for (x, _, weight) in &rows {
            for (i, row) in a.iter_mut().enumerate() {
                row.iter_mut().zip(*x).for_each(|(v, xj)| *v += weight * f64::from(x[i]) * f64::from(*xj));
            }
        }
        let ridge = 0.03 * (0..HIDDEN).map(|i| a[i][i]).sum::<f64>() / HIDDEN as f64;
        (0..HIDDEN).for_each(|i| a[i][i] += ridge);
        for e in 0..EXPERTS {
            let target = |label: usize| f64::from(u8::from(label == e)) - 1.0 / EXPERTS as f64;
            let b = (0..HIDDEN).map(|i| rows.iter().map(|(x, label, weight)| weight * f64::from(x[i]) * target(*label)).sum()).collect();
            let expected: Vec<f32> = dense_solve(a.clone(), b).iter().map(|v| (v * fitted.report.scale) as f32).collect();
            assert!(close(fitted.gate.row(e), &expected, 1e-4), "{:?}\n{expected:?}", fitted.gate.row(e));
        }
    }

    /// Mean of -log p and its gradient with the penalty's, plainly.
    fn likelihood(blocks: &[Rows<'_>], gate: &[f64], penalty: f64) -> (f64, Vec<f64>) {
        let mut nll = 0.0;
        let mut gradient: Vec<f64> = gate.iter().map(|v| penalty * v).collect();
        for (x, label, weight) in flat(blocks) {
            let z: Vec<f64> = gate.chunks(HIDDEN).map(|g| g.iter().zip(x).map(|(g, x)| g * f64::from(*x)).sum()).collect();
            let total: f64 = z.iter().map(|z| z.exp()).sum();
            nll += weight * (total.ln() - z[label]);
            for (e, gradient) in gradient.chunks_mut(HIDDEN).enumerate() {
                let excess = z[e].exp() / total - f64::from(u8::from(e == label));
                gradient.iter_mut().zip(x).for_each(|(v, x)| *v += weight * excess * f64::from(*x));
            }
        }
        (nll, gradient)
    }

    #[test]
    fn softmax_is_the_likeliest_gate() {
        let statistics = gathered([0, 1, 2], 1.0);
        let training = statistics.training(None).unwrap();
        let norm = |v: &[f64]| v.iter().map(|v| v * v).sum::<f64>().sqrt();
        for lambda in [1e-4, 1e-2, 1.0] {
            let penalty = lambda * crate::linalg::mean_diagonal(&training.gram, HIDDEN);
            let gate = (softmax::with(lambda).solve)(&training, lambda).unwrap();
            let (nll, gradient) = likelihood(&training.rows, &gate, penalty);
            let (_, at_zero) = likelihood(&training.rows, &vec![0.0; gate.len()], penalty);
            assert!(norm(&gradient) < 1e-3 * norm(&at_zero), "{lambda}: {} of {}", norm(&gradient), norm(&at_zero));
            let ridge = (ridge::with(0.1).solve)(&training, 0.1).unwrap();
            let objective = |gate: &[f64], nll: f64| nll + penalty / 2.0 * norm(gate).powi(2);
            for scale in [0.5, 1.0, 2.0, 4.0, 8.0, 16.0] {
                let ridge: Vec<f64> = ridge.iter().map(|v| scale * v).collect();
                let (of_ridge, _) = likelihood(&training.rows, &ridge, penalty);
                assert!(objective(&gate, nll) < objective(&ridge, of_ridge));
                assert!(lambda > 1e-3 || nll < of_ridge, "{lambda} {scale}: {nll} {of_ridge}");
            }
        }
    }

    #[test]
    fn gates_find_the_right_expert() {
        let statistics = gathered([0, 1, 2], 1.0);
        for (name, candidates) in fitted() {
            let Fitted { gate, without, report } = fit(candidates, &statistics).unwrap();
            assert!(report.held_out && without.len() == 4);
            assert!(gate.weight.iter().all(|v| v.is_finite()));
            assert!(report.accuracy[0] > 0.75 && report.nll < 0.6, "{name}: {report:?}");
            assert!(report.accuracy.is_sorted() && (report.accuracy[2] - 1.0).abs() < 1e-9, "{name}: {report:?}");
        }
    }

    #[test]
    fn a_fold_is_judged_by_the_gate_that_has_not_seen_it() {
        let statistics = gathered([0, 1, 2], 1.0);
        let Fitted { without, report, .. } = fit(candidates("ridge"), &statistics).unwrap();
        let (mut nll, mut right) = (0.0, 0.0);
        for (fold, gate) in without.iter().enumerate() {
            let weight: Vec<f64> = gate.weight.iter().map(|v| f64::from(*v)).collect();
            nll += likelihood(&statistics.fold(fold), &weight, 0.0).0;
            for (x, label, weight) in flat(&statistics.fold(fold)) {
                let z: Vec<f32> = (0..EXPERTS).map(|e| gate.row(e).iter().zip(x).map(|(g, x)| g * x).sum()).collect();
                right += if z.iter().all(|v| *v <= z[label]) { weight } else { 0.0 };
            }
        }
        assert!((report.nll - nll).abs() < 1e-4 && (report.accuracy[0] - right).abs() < 1e-9, "{report:?} {nll} {right}");
        let seen = fit(candidates("ridge"), &statistics).unwrap().gate;
        assert!(without.iter().all(|gate| *gate != seen));
    }

    #[test]
    fn the_scale_is_the_best_of_a_scan() {
        let statistics = gathered([0, 1, 2], 1.0);
        for (name, candidates) in fitted() {
            let Fitted { without, report, .. } = fit(candidates, &statistics).unwrap();
            let nll = |factor: f64| -> f64 {
                let of_fold = |(fold, gate): (usize, &Gate)| {
                    let gate: Vec<f64> = gate.weight.iter().map(|v| factor * f64::from(*v)).collect();
                    likelihood(&statistics.fold(fold), &gate, 0.0).0
                };
                without.iter().enumerate().map(of_fold).sum()
            };
            let best = (-40..=40).map(|i| 2f64.powf(f64::from(i) / 20.0)).min_by(|a, b| nll(*a).total_cmp(&nll(*b))).unwrap();
            assert!((best - 1.0).abs() < 1e-9, "{name}: {best} times {} is better", report.scale);
        }
    }

    #[test]
    fn permuting_the_experts_permutes_the_gates() {
        let (straight, order) = (gathered([0, 1, 2], 1.0), [2, 0, 1]);
        let permuted = gathered(order, 1.0);
        for (name, candidates) in fitted() {
            let (a, b) = (fit(candidates, &straight).unwrap(), fit(candidates, &permuted).unwrap());
            for (e, place) in order.into_iter().enumerate() {
                assert!(close(row(&a, e), row(&b, place), 1e-3), "{name}");
            }
        }
    }

    #[test]
    fn larger_inputs_give_smaller_gates_and_the_same_logits() {
        let (small, large) = (gathered([0, 1, 2], 1.0), gathered([0, 1, 2], 64.0));
        for (name, candidates) in fitted() {
            let (a, b) = (fit(candidates, &small).unwrap(), fit(candidates, &large).unwrap());
            let back: Vec<f32> = b.gate.weight.iter().map(|v| 64.0 * v).collect();
            assert!(close(&a.gate.weight, &back, 1e-3), "{name}");
            assert!((a.report.nll - b.report.nll).abs() < 1e-4);
        }
    }

    #[test]
    fn the_first_is_kept_unless_another_is_clearly_better() {
        let statistics = gathered([0, 1, 2], 1.0);
        let blind = Candidate { name: "blind", lambda: 0.0, solve: |training, _| Ok(vec![0.0; training.experts * training.hidden]) };
        let alone = |one| fit(&[one], &statistics).unwrap().report;
        let (good, near) = (alone(ridge::with(0.1)), alone(ridge::with(0.11)));
        assert!((good.nll - near.nll).abs() < MARGIN && (alone(blind).nll - 3f64.ln()).abs() < 1e-9);
        for (first, second) in [(0.1, 0.11), (0.11, 0.1)] {
            let candidates = [blind, ridge::with(first), ridge::with(second)];
            let report = fit(&candidates, &statistics).unwrap().report;
            assert_eq!(report, FitReport { why: report.why.clone(), ..alone(candidates[1]) });
            let expected = format!("ridge (regulariser {first}): ");
            assert!(report.why.starts_with(&expected), "{}", report.why);
            assert!(report.why.contains(&format!("; the best of the others is ridge (regulariser {second}): ")), "{}", report.why);
        }
    }

    #[test]
    fn threads_do_not_change_the_gates() {
        let gate = |threads| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            pool.install(|| fit(candidates("auto"), &gathered([0, 1, 2], 1.0)).unwrap().gate)
        };
        assert_eq!(gate(1), gate(3));
    }

    #[test]
    fn few_rows_are_enough_for_a_gate() {
        let mut statistics = LayerStatistics::new(Shape { hidden: HIDDEN, domains: 2, folds: 2, rows: 100 });
        for domain in 0..2 {
            statistics.add(domain, 0, &statistics::tests::rows(0, domain, 2, HIDDEN)).unwrap();
        }
        for (name, candidates) in fitted() {
            let Fitted { gate, without, report } = fit(candidates, &statistics).unwrap();
            assert!(without.is_empty() && !report.held_out && gate.weight.iter().all(|v| v.is_finite()), "{name}");
            assert_eq!(report.accuracy, [1.0, 1.0], "{name}");
        }
    }

    #[test]
    fn what_gives_no_gate_is_an_error() {
        let shape = Shape { hidden: HIDDEN, domains: 2, folds: 1, rows: 100 };
        let mut statistics = LayerStatistics::new(shape);
        statistics.add(0, 0, &statistics::tests::rows(0, 0, 5, HIDDEN)).unwrap();
        for (_, candidates) in fitted() {
            assert_eq!(fit(candidates, &statistics).unwrap_err(), FitError::Statistics(StatisticsError::Empty { domain: 1 }));
        }
        let mut zeros = LayerStatistics::new(shape);
        (0..2).for_each(|domain| zeros.add(domain, 0, &[0.0; 5 * HIDDEN]).unwrap());
        let error = fit(candidates("ridge"), &zeros).unwrap_err();
        assert!(matches!(error, FitError::Singular { method: "ridge", .. }), "{error}");
        let flat = fit(candidates("centroid"), &zeros).unwrap();
        assert!(flat.gate.weight.iter().all(|v| *v == 0.0) && (flat.report.nll - 2f64.ln()).abs() < 1e-9);
        let mut sums = LayerStatistics::new(Shape { rows: 0, ..shape });
        (0..2).for_each(|domain| sums.add(domain, 0, &statistics::tests::rows(0, domain, 5, HIDDEN)).unwrap());
        assert_eq!(fit(candidates("ridge"), &sums).unwrap_err(), FitError::NoRows { domain: 0 });
        assert_eq!(fit(&[], &sums).unwrap_err(), FitError::NoCandidate);
    }
}
