//! `softmax`: multinomial logistic regression of the right expert on what the router sees: what a router is trained to, found directly.
//!
//! The likelihood is convex. L-BFGS (Nocedal 1980) with the Hessian at zero, which is the inputs' second moments, as its first guess, and an
//! exact search along each direction, for which logits need not be computed anew. Dimensions: D hidden, E experts, N rows.

use faer::{MatMut, MatRef};
use rayon::prelude::*;

use super::{
    Candidate, How, Method,
    centroid::dot,
    fit::{CHUNK, logits, root},
    line,
    ridge::transpose,
};
use crate::{
    linalg::{Cholesky, Singular, mean_diagonal, product},
    statistics::{Rows, Training},
};

/// The method.
pub const METHOD: Method = Method {
    name: "softmax",
    aliases: &[],
    about: "logistic regression of the right expert on what the router sees",
    all_experts: false,
    how: How::Fitted(&[with(1e-3)]),
};

/// Pairs of steps and gradients that are remembered.
const MEMORY: usize = 10;
/// More steps than a fit takes; without them rounding could make it turn in circles.
const STEPS: usize = 200;
/// An expected gain of likelihood, in nats, that is not worth a step.
const GAIN: f64 = 1e-7;

pub(super) const fn with(lambda: f64) -> Candidate {
    Candidate { name: "softmax", lambda, solve }
}

/// argmin of the mean over rows of -log p(right expert), domains counting equally, plus λ/2 |gate|²; [E, D].
fn solve(training: &Training<'_>, lambda: f64) -> Result<Vec<f64>, Singular> {
    let (hidden, experts) = (training.hidden, training.experts);
    let penalty = lambda * mean_diagonal(&training.gram, hidden);
    let curvature = Curvature::new(training, penalty)?;
    let mut gate = vec![0.0; experts * hidden];
    // [N, E] of each block of rows
    let mut at: Vec<Vec<f32>> = training.rows.iter().map(|rows| vec![0.0; rows.x.len() / hidden * experts]).collect();
    let mut gradient = slope(training, &at, &gate, penalty);
    let mut memory: Vec<Pair> = Vec::new();
    for _ in 0..STEPS {
        let direction = direction(&gradient, &memory, &curvature);
        let gain = -dot(&gradient, &direction);
        if gain.is_nan() || gain < GAIN {
            break;
        }
        let along: Vec<Vec<f32>> = training.rows.iter().map(|rows| logits(rows.x, &direction, hidden)).collect();
        let (linear, square) = (penalty * dot(&gate, &direction), penalty * dot(&direction, &direction));
        let slope_at = |step: f64| {
            let (slope, curvature) = slope_along(&training.rows, &at, &along, experts, step);
            (slope + linear + step * square, curvature + square)
        };
        let step = root(slope_at, [1e-6, 1e6], 0.01 * gain);
        gate.iter_mut().zip(&direction).for_each(|(v, d)| *v += step * d);
        at.iter_mut().flatten().zip(along.iter().flatten()).for_each(|(v, d)| *v += (step * f64::from(*d)) as f32);
        let next = slope(training, &at, &gate, penalty);
        let pair = Pair::new(direction.iter().map(|v| step * v).collect(), &gradient, &next);
        gradient = next;
        // The function is convex: what says otherwise is rounding.
        if pair.product > 0.0 {
            memory.truncate(MEMORY - 1);
            memory.insert(0, pair);
        }
    }
    Ok(gate)
}

/// A step, and by how much the gradient changed.
struct Pair {
    step: Vec<f64>,
    change: Vec<f64>,
    product: f64,
}

impl Pair {
    fn new(step: Vec<f64>, before: &[f64], after: &[f64]) -> Self {
        let change: Vec<f64> = after.iter().zip(before).map(|(a, b)| a - b).collect();
        let product = dot(&step, &change);
        Self { step, change, product }
    }
}

/// -H⁻¹ · gradient, with what the pairs, latest first, say of the Hessian H.
fn direction(gradient: &[f64], memory: &[Pair], curvature: &Curvature) -> Vec<f64> {
    let mut q: Vec<f64> = gradient.iter().map(|v| -v).collect();
    let mut weights = Vec::new();
    for pair in memory {
        let weight = dot(&pair.step, &q) / pair.product;
        q.iter_mut().zip(&pair.change).for_each(|(q, change)| *q -= weight * change);
        weights.push(weight);
    }
    let scale = memory.first().map_or(1.0, |last| last.product / dot(&last.change, &curvature.divide(&last.change)));
    let mut q = curvature.divide(&q);
    q.iter_mut().for_each(|v| *v *= scale);
    for (pair, weight) in memory.iter().zip(weights).rev() {
        let rest = weight - dot(&pair.change, &q) / pair.product;
        q.iter_mut().zip(&pair.step).for_each(|(q, step)| *q += rest * step);
    }
    q
}

/// The Hessian at a gate of zeros: the same for every expert if what all experts share is left out.
struct Curvature {
    experts: usize,
    hidden: usize,
    factor: Cholesky,
}

impl Curvature {
    fn new(training: &Training<'_>, penalty: f64) -> Result<Self, Singular> {
        let (hidden, experts) = (training.hidden, training.experts);
        let mut hessian: Vec<f64> = training.gram.iter().map(|v| v / experts as f64).collect();
        hessian.iter_mut().step_by(hidden + 1).for_each(|v| *v += penalty);
        Ok(Self { experts, hidden, factor: Cholesky::new(hessian, hidden)? })
    }

    /// Hessian⁻¹ · v, [E, D].
    fn divide(&self, v: &[f64]) -> Vec<f64> {
        let mut v = transpose(v, self.experts);
        self.factor.solve(&mut v, self.experts);
        transpose(&v, self.hidden)
    }
}

/// The gradient, [E, D], where rows have the logits `at`. Summed in an order that does not depend on threads.
fn slope(training: &Training<'_>, at: &[Vec<f32>], gate: &[f64], penalty: f64) -> Vec<f64> {
    let (hidden, experts) = (training.hidden, training.experts);
    let mut gradient: Vec<f64> = gate.iter().map(|v| penalty * v).collect();
    for (rows, at) in training.rows.iter().zip(at) {
        let chunks = rows.x.par_chunks(CHUNK * hidden).zip(at.par_chunks(CHUNK * experts)).map(|(x, at)| {
            let n = x.len() / hidden;
            let excess = line::excess(at, experts, rows.domain);
            let mut sum = vec![0.0; experts * hidden];
            let excess = MatRef::from_row_major_slice(&excess, n, experts);
            let x = MatRef::from_row_major_slice(x, n, hidden);
            product(MatMut::from_row_major_slice_mut(&mut sum, experts, hidden), excess.transpose(), x);
            sum
        });
        for sum in chunks.collect::<Vec<_>>() {
            gradient.iter_mut().zip(sum).for_each(|(v, sum)| *v += rows.weight * f64::from(sum));
        }
    }
    gradient
}

/// First and second derivative of the rows' mean -log p(right expert) `step` along a direction.
fn slope_along(rows: &[Rows<'_>], at: &[Vec<f32>], along: &[Vec<f32>], experts: usize, step: f64) -> (f64, f64) {
    let mut sums = (0.0, 0.0);
    for ((rows, at), along) in rows.iter().zip(at).zip(along) {
        let chunks = at.par_chunks(CHUNK * experts).zip(along.par_chunks(CHUNK * experts)).map(|(at, along)| {
            let loss = line::loss(Some(at), along, experts, rows.domain, step);
            (loss.slope, loss.curvature)
        });
        for (slope, curvature) in chunks.collect::<Vec<_>>() {
            sums = (sums.0 + rows.weight * slope, sums.1 + rows.weight * curvature);
        }
    }
    sums
}
