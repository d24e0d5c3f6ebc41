//! What the routers of one layer see: first and second moments and a sample of rows, for each domain and fold.
//!
//! A *domain* is the text that one expert is right for, so its number is the expert's. A *fold* is a part of every domain's text, so that a gate
//! can be judged by rows that it was not fitted to. Memory does not depend on the number of rows, and parts add up to the whole.
//! Dimensions: D hidden, E domains, N rows.

use std::collections::BinaryHeap;

use faer::{MatMut, MatRef};
use rayon::prelude::*;

use crate::linalg::product;

/// Rows whose products are summed in f32 before they are added up in f64.
const CHUNK: usize = 256;
/// Rows of a second moment that one task computes.
const STRIPE: usize = 128;

/// Why rows were not added, or why those that were are not enough.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum StatisticsError {
    /// A row that would spoil every sum.
    #[error("row {row} of domain {domain} is not finite: the model's states overflow, or its weights are damaged")]
    NotFinite {
        /// the domain
        domain: usize,
        /// its index among the rows that were to be added
        row: usize,
    },
    /// Values that are no rows.
    #[error("rows of width {hidden} were expected, found {values} values")]
    Width {
        /// D
        hidden: usize,
        /// how many there are
        values: usize,
    },
    /// A domain or fold that there is not.
    #[error("there is no domain {domain} with fold {fold} in statistics of {domains} domains and {folds} folds")]
    Part {
        /// what was asked for
        domain: usize,
        /// what was asked for
        fold: usize,
        /// E
        domains: usize,
        /// folds of each
        folds: usize,
    },
    /// Statistics of something else.
    #[error("statistics differ in shape: {ours:?} and {theirs:?}")]
    Shape {
        /// those merged into
        ours: Shape,
        /// those merged
        theirs: Shape,
    },
    /// Nothing is known of a domain.
    #[error("there are no rows of domain {domain}: give its expert prompts or text")]
    Empty {
        /// the domain
        domain: usize,
    },
}

/// First and second moments of rows.
#[derive(Debug, Clone, PartialEq)]
pub struct Moments {
    /// how many rows
    pub count: u64,
    /// [D], their sum
    pub sum: Vec<f64>,
    /// sum of x xᵀ: the lower triangle, row after row
    pub gram: Vec<f64>,
}

impl Moments {
    /// Of no rows of width D.
    pub fn new(hidden: usize) -> Self {
        Self { count: 0, sum: vec![0.0; hidden], gram: vec![0.0; hidden * (hidden + 1) / 2] }
    }

    /// Adds rows, [N, D]. Cost: N D²/2 multiplications, on all threads; their number does not change the sums.
    pub fn add(&mut self, rows: &[f32]) {
        let hidden = self.sum.len();
        self.count += (rows.len() / hidden.max(1)) as u64;
        for rows in rows.chunks(CHUNK * hidden.max(1)) {
            for row in rows.chunks_exact(hidden) {
                self.sum.iter_mut().zip(row).for_each(|(sum, &v)| *sum += f64::from(v));
            }
            let x = MatRef::from_row_major_slice(rows, rows.len() / hidden, hidden);
            stripes(&mut self.gram, hidden).into_par_iter().for_each(|(start, stripe)| {
                let end = (start + STRIPE).min(hidden);
                let mut sums = vec![0.0; (end - start) * end];
                let columns = x.subcols(start, end - start).transpose();
                product(MatMut::from_row_major_slice_mut(&mut sums, end - start, end), columns, x.subcols(0, end));
                let mut stripe = stripe.iter_mut();
                for (i, sums) in sums.chunks_exact(end).enumerate() {
                    stripe.by_ref().zip(&sums[..=start + i]).for_each(|(sum, &v)| *sum += f64::from(v));
                }
            });
        }
    }

    /// Adds the moments of other rows.
    pub fn merge(&mut self, other: &Self) {
        self.count += other.count;
        self.sum.iter_mut().zip(&other.sum).for_each(|(a, b)| *a += b);
        self.gram.iter_mut().zip(&other.gram).for_each(|(a, b)| *a += b);
    }

    /// The same as if each row had been seen `factor` times.
    fn scale(&mut self, factor: f64) {
        self.count = (self.count as f64 * factor).round() as u64;
        self.sum.iter_mut().chain(&mut self.gram).for_each(|v| *v *= factor);
    }

    /// Adds the mean of x xᵀ, `weight` times, to a full matrix, [D, D].
    pub fn add_mean_gram(&self, weight: f64, matrix: &mut [f64]) {
        let (hidden, weight) = (self.sum.len(), weight / self.count.max(1) as f64);
        let mut gram = self.gram.iter();
        for i in 0..hidden {
            for (j, v) in gram.by_ref().take(i + 1).enumerate() {
                matrix[i * hidden + j] += weight * v;
                if i != j {
                    matrix[j * hidden + i] += weight * v;
                }
            }
        }
    }
}

/// The triangle cut into runs of [`STRIPE`] rows, each with its first row.
fn stripes(mut triangle: &mut [f64], hidden: usize) -> Vec<(usize, &mut [f64])> {
    let mut stripes = Vec::new();
    for start in (0..hidden).step_by(STRIPE) {
        let rows = start..(start + STRIPE).min(hidden);
        let (stripe, rest) = triangle.split_at_mut(rows.map(|row| row + 1).sum());
        stripes.push((start, stripe));
        triangle = rest;
    }
    stripes
}

/// At most so many rows of a stream, each as likely to be kept as any other: those with the smallest hash of their number.
#[derive(Debug, Clone, Default)]
struct Sample {
    seen: u64,
    /// hash and place of every row that is kept, the largest hash on top
    kept: BinaryHeap<(u64, usize)>,
    /// [kept, D]
    rows: Vec<f32>,
}

impl Sample {
    fn add(&mut self, row: &[f32], limit: usize) {
        let key = hash(self.seen);
        self.seen += 1;
        self.offer(key, row, limit);
    }

    fn offer(&mut self, key: u64, row: &[f32], limit: usize) {
        if self.kept.len() < limit {
            self.kept.push((key, self.kept.len()));
            self.rows.extend_from_slice(row);
        } else if let Some(mut largest) = self.kept.peek_mut()
            && key < largest.0
        {
            let place = largest.1;
            *largest = (key, place);
            self.rows[place * row.len()..][..row.len()].copy_from_slice(row);
        }
    }

    fn merge(&mut self, other: &Self, hidden: usize, limit: usize) {
        self.seen += other.seen;
        let mut kept: Vec<_> = other.kept.iter().collect();
        kept.sort_unstable_by_key(|(_, place)| place);
        for (&(key, _), row) in kept.into_iter().zip(other.rows.chunks_exact(hidden)) {
            self.offer(key, row, limit);
        }
    }
}

/// `SplitMix64`: neighbouring numbers come out unrelated. Of rows numbered as they come, those with the smallest hashes are a fair sample.
pub fn hash(number: u64) -> u64 {
    let mut z = number.wrapping_add(1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// The size of statistics.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Shape {
    /// D
    pub hidden: usize,
    /// E
    pub domains: usize,
    /// Folds of each domain. Gates are judged by rows they have not seen if there are at least two.
    pub folds: usize,
    /// Rows of each domain that are kept as they are, at most.
    pub rows: usize,
}

impl Shape {
    /// Rows kept of each domain and fold.
    fn limit(self) -> usize {
        self.rows.div_ceil(self.folds.max(1))
    }
}

/// What one layer's router sees.
#[derive(Debug, Clone)]
pub struct LayerStatistics {
    shape: Shape,
    /// [domain][fold]
    cells: Vec<Vec<(Moments, Sample)>>,
}

/// Rows of one domain.
#[derive(Debug, Clone, Copy)]
pub struct Rows<'a> {
    /// the expert that is right for them
    pub domain: usize,
    /// [N, D]
    pub x: &'a [f32],
    /// of each of them; over all rows of a [`Training`] or [`LayerStatistics::fold`] they sum to one, and so that domains count equally
    pub weight: f64,
}

/// What a gate is fitted to: all statistics, or those without one fold. Domains count equally, however many rows they have.
#[derive(Debug)]
pub struct Training<'a> {
    /// D
    pub hidden: usize,
    /// E
    pub experts: usize,
    /// [D, D], the mean over domains of the mean of x xᵀ
    pub gram: Vec<f64>,
    /// [E, D], each domain's mean row
    pub means: Vec<f64>,
    /// the sample
    pub rows: Vec<Rows<'a>>,
}

impl Training<'_> {
    /// The mean of the domains' means, [D].
    pub fn common_mean(&self) -> Vec<f64> {
        let mut mean = vec![0.0; self.hidden];
        for of_domain in self.means.chunks_exact(self.hidden) {
            mean.iter_mut().zip(of_domain).for_each(|(sum, v)| *sum += v / self.experts as f64);
        }
        mean
    }

    /// The domains' means less the common mean, [E, D].
    pub fn centred(&self) -> Vec<f64> {
        let common = self.common_mean();
        self.means.iter().zip(common.iter().cycle()).map(|(v, common)| v - common).collect()
    }
}

impl LayerStatistics {
    /// Of no rows.
    pub fn new(shape: Shape) -> Self {
        let cell = (Moments::new(shape.hidden), Sample::default());
        Self { shape, cells: vec![vec![cell; shape.folds]; shape.domains] }
    }

    /// The size.
    pub fn shape(&self) -> Shape {
        self.shape
    }

    /// Moments of a domain, over all folds.
    pub fn moments(&self, domain: usize) -> Moments {
        self.sum(domain, None)
    }

    /// Adds what the router saw in tokens of a domain: `x`, [N, D]. Rows of one text belong in one fold, or folds know of each other.
    pub fn add(&mut self, domain: usize, fold: usize, x: &[f32]) -> Result<(), StatisticsError> {
        let Shape { hidden, domains, folds, .. } = self.shape;
        if !x.len().is_multiple_of(hidden.max(1)) {
            return Err(StatisticsError::Width { hidden, values: x.len() });
        }
        if let Some(at) = x.iter().position(|v| !v.is_finite()) {
            return Err(StatisticsError::NotFinite { domain, row: at / hidden });
        }
        let limit = self.shape.limit();
        let cell = self.cells.get_mut(domain).and_then(|cells| cells.get_mut(fold));
        let (moments, sample) = cell.ok_or(StatisticsError::Part { domain, fold, domains, folds })?;
        moments.add(x);
        x.chunks_exact(hidden).for_each(|row| sample.add(row, limit));
        Ok(())
    }

    /// Adds rows, [N, D], that are a fair sample of `seen` rows and stand for all of them: the only ones of their domain and fold.
    pub fn add_sample(&mut self, domain: usize, fold: usize, x: &[f32], seen: u64) -> Result<(), StatisticsError> {
        self.add(domain, fold, x)?;
        let (moments, sample) = &mut self.cells[domain][fold];
        if seen > sample.seen && sample.seen > 0 {
            moments.scale(seen as f64 / sample.seen as f64);
            sample.seen = seen;
        }
        Ok(())
    }

    /// Adds statistics of other texts.
    pub fn merge(&mut self, other: &Self) -> Result<(), StatisticsError> {
        if self.shape != other.shape {
            return Err(StatisticsError::Shape { ours: self.shape, theirs: other.shape });
        }
        let (hidden, limit) = (self.shape.hidden, self.shape.limit());
        for (ours, theirs) in self.cells.iter_mut().flatten().zip(other.cells.iter().flatten()) {
            ours.0.merge(&theirs.0);
            ours.1.merge(&theirs.1, hidden, limit);
        }
        Ok(())
    }

    /// Whether every domain has rows in at least two folds, so that each fold can be left out in turn.
    pub fn can_hold_out(&self) -> bool {
        self.cells.iter().all(|folds| folds.iter().filter(|(moments, _)| moments.count > 0).count() > 1)
    }

    /// All of it, or all but one fold.
    pub fn training(&self, without: Option<usize>) -> Result<Training<'_>, StatisticsError> {
        let Shape { hidden, domains, .. } = self.shape;
        let kept = |fold| Some(fold) != without;
        let mut gram = vec![0.0; hidden * hidden];
        let mut means = Vec::with_capacity(domains * hidden);
        for domain in 0..domains {
            let moments = self.sum(domain, without);
            if moments.count == 0 {
                return Err(StatisticsError::Empty { domain });
            }
            moments.add_mean_gram(1.0 / domains as f64, &mut gram);
            means.extend(moments.sum.iter().map(|sum| sum / moments.count as f64));
        }
        Ok(Training { hidden, experts: domains, gram, means, rows: self.rows(kept, kept) })
    }

    /// The sample of one fold.
    pub fn fold(&self, fold: usize) -> Vec<Rows<'_>> {
        self.rows(|one| one == fold, |_| true)
    }

    fn sum(&self, domain: usize, without: Option<usize>) -> Moments {
        let mut sum = Moments::new(self.shape.hidden);
        let folds = self.cells[domain].iter().enumerate().filter(|(fold, _)| Some(*fold) != without);
        folds.for_each(|(_, (moments, _))| sum.merge(moments));
        sum
    }

    /// The samples of some folds, weighted so that those of `whole` sum to one.
    fn rows(&self, of: impl Fn(usize) -> bool, whole: impl Fn(usize) -> bool) -> Vec<Rows<'_>> {
        let mut rows = Vec::new();
        for (domain, cells) in self.cells.iter().enumerate() {
            let seen: u64 = cells.iter().enumerate().filter(|(fold, _)| whole(*fold)).map(|(_, (_, sample))| sample.seen).sum();
            for (_, (_, sample)) in cells.iter().enumerate().filter(|(fold, (_, sample))| of(*fold) && !sample.rows.is_empty()) {
                // A row stands for all that were seen where it was kept.
                let weight = sample.seen as f64 / (seen * sample.kept.len() as u64 * self.shape.domains as u64) as f64;
                rows.push(Rows { domain, x: &sample.rows, weight });
            }
        }
        rows
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// Rows that look drawn: E overlapping clusters around a common mean, drawn anew for each seed.
    pub(crate) fn rows(seed: u64, domain: usize, n: usize, hidden: usize) -> Vec<f32> {
        let noise = |seed: u64, i: usize| hash(seed ^ hash(i as u64)) as f64 / u64::MAX as f64 - 0.5;
        let center = |d: usize| 1.0 + noise(u64::MAX, domain * hidden + d);
        (0..n * hidden).map(|i| (center(i % hidden) + 2.5 * noise(seed, i + (domain << 32))) as f32).collect()
    }

    const SHAPE: Shape = Shape { hidden: 150, domains: 3, folds: 2, rows: 100 };

    #[test]
    fn moments_are_the_sums_of_products() {
        let (hidden, n) = (150, 1100);
        let x = rows(0, 0, n, hidden);
        let mut moments = Moments::new(hidden);
        moments.add(&x);
        assert_eq!(moments.count, n as u64);
        let mut full = vec![0.0; hidden * hidden];
        moments.add_mean_gram(n as f64, &mut full);
        for i in 0..hidden {
            let sum: f64 = x.chunks(hidden).map(|row| f64::from(row[i])).sum();
            assert!((moments.sum[i] - sum).abs() < 1e-9);
            for j in 0..hidden {
                let product: f64 = x.chunks(hidden).map(|row| f64::from(row[i]) * f64::from(row[j])).sum();
                assert!((full[i * hidden + j] - product).abs() < 2e-6 * n as f64, "{i} {j}");
            }
        }
    }

    #[test]
    fn threads_do_not_change_the_moments() {
        let add = |threads| {
            let mut moments = Moments::new(300);
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            pool.install(|| moments.add(&rows(0, 0, 200, 300)));
            moments
        };
        assert_eq!(add(1), add(3));
    }

    #[test]
    fn merged_parts_are_the_whole() {
        let (mut whole, mut left, mut right) = (LayerStatistics::new(SHAPE), LayerStatistics::new(SHAPE), LayerStatistics::new(SHAPE));
        for (domain, fold) in [(0, 0), (0, 1), (1, 0), (1, 1), (2, 1)] {
            let (a, b) = (rows(fold as u64, domain, 20, 150), rows(9 + fold as u64, domain, 30, 150));
            left.add(domain, fold, &a).unwrap();
            right.add(domain, fold, &b).unwrap();
            whole.add(domain, fold, &[a, b].concat()).unwrap();
        }
        left.merge(&right).unwrap();
        let (whole, parts) = (whole.training(None).unwrap(), left.training(None).unwrap());
        let close = |a: &[f64], b: &[f64]| a.iter().zip(b).all(|(a, b)| (a - b).abs() < 1e-6);
        assert!(close(&whole.gram, &parts.gram) && close(&whole.means, &parts.means));
        for (a, b) in whole.rows.iter().zip(&parts.rows) {
            assert_eq!((a.domain, a.x, a.weight), (b.domain, b.x, b.weight));
        }
    }

    #[test]
    fn the_sample_is_bounded_spread_out_and_stands_for_all() {
        let shape = Shape { hidden: 1, domains: 2, folds: 2, rows: 200 };
        let mut statistics = LayerStatistics::new(shape);
        let numbers: Vec<f32> = (0..1000).map(|i| i as f32).collect();
        numbers.chunks(7).for_each(|some| statistics.add(0, 0, some).unwrap());
        statistics.add(0, 1, &numbers[..500]).unwrap();
        statistics.add(1, 0, &numbers[..50]).unwrap();
        let training = statistics.training(None).unwrap();
        let counts: Vec<usize> = training.rows.iter().map(|rows| rows.x.len()).collect();
        assert_eq!(counts, [100, 100, 50]);
        let total: f64 = training.rows.iter().map(|rows| rows.weight * rows.x.len() as f64).sum();
        assert!((total - 1.0).abs() < 1e-12);
        // two thirds of domain 0 are in fold 0
        assert!((training.rows[0].weight * 100.0 - 1.0 / 3.0).abs() < 1e-12);
        let mean = training.rows[0].x.iter().sum::<f32>() / 100.0;
        assert!((400.0..600.0).contains(&mean), "{mean}");
        // the same rows, however they arrive
        let mut at_once = LayerStatistics::new(shape);
        at_once.add(0, 0, &numbers).unwrap();
        assert_eq!(at_once.fold(0)[0].x, statistics.fold(0)[0].x);
        // a merged sample is as bounded, and takes from both
        let mut other = LayerStatistics::new(shape);
        other.add(0, 0, &numbers.iter().map(|v| -v).collect::<Vec<_>>()).unwrap();
        at_once.merge(&other).unwrap();
        let merged = at_once.fold(0)[0].x;
        let negative = merged.iter().filter(|v| **v < 0.0).count();
        assert!(merged.len() == 100 && (30..70).contains(&negative), "{negative}");
    }

    #[test]
    fn a_sample_stands_for_all() {
        let shape = Shape { hidden: 24, domains: 2, folds: 2, rows: 1000 };
        let (mut whole, mut sampled) = (LayerStatistics::new(shape), LayerStatistics::new(shape));
        for (domain, fold, n, times) in [(0, 0, 20, 3), (0, 1, 20, 1), (1, 0, 10, 2)] {
            let x = rows(fold as u64, domain, n, 24);
            (0..times).for_each(|_| whole.add(domain, fold, &x).unwrap());
            sampled.add_sample(domain, fold, &x, (n * times) as u64).unwrap();
        }
        let (whole, sampled) = (whole.training(None).unwrap(), sampled.training(None).unwrap());
        let close = |a: &[f64], b: &[f64]| a.iter().zip(b).all(|(a, b)| (a - b).abs() < 1e-6);
        assert!(close(&whole.gram, &sampled.gram) && close(&whole.means, &sampled.means));
        for (whole, sampled) in whole.rows.iter().zip(&sampled.rows) {
            assert!(sampled.weight > 0.0 && (whole.weight * whole.x.len() as f64 - sampled.weight * sampled.x.len() as f64).abs() < 1e-12);
        }
    }

    #[test]
    fn a_fold_is_left_out() {
        let mut statistics = LayerStatistics::new(SHAPE);
        for domain in 0..3 {
            for fold in 0..2 {
                statistics.add(domain, fold, &rows(fold as u64, domain, 10 + 30 * fold, 150)).unwrap();
            }
        }
        assert!(statistics.can_hold_out());
        let mut alone = LayerStatistics::new(SHAPE);
        (0..3).for_each(|domain| alone.add(domain, 0, &rows(0, domain, 10, 150)).unwrap());
        let (left, alone) = (statistics.training(Some(1)).unwrap(), alone.training(None).unwrap());
        assert_eq!((left.gram, left.means), (alone.gram, alone.means));
        assert!(left.rows.iter().zip(&alone.rows).all(|(a, b)| (a.x, a.weight) == (b.x, b.weight)));
        let weight: f64 = (0..2).flat_map(|fold| statistics.fold(fold)).map(|rows| rows.weight * (rows.x.len() / 150) as f64).sum();
        assert!((weight - 1.0).abs() < 1e-12);
    }

    #[test]
    fn what_cannot_be_added_is_refused() {
        let mut statistics = LayerStatistics::new(SHAPE);
        let mut x = vec![0.0; 300];
        assert_eq!(statistics.add(0, 0, &x[1..]), Err(StatisticsError::Width { hidden: 150, values: 299 }));
        assert!(matches!(statistics.add(3, 0, &x), Err(StatisticsError::Part { domain: 3, .. })));
        assert!(matches!(statistics.add(0, 2, &x), Err(StatisticsError::Part { fold: 2, .. })));
        x[151] = f32::NAN;
        assert_eq!(statistics.add(2, 0, &x), Err(StatisticsError::NotFinite { domain: 2, row: 1 }));
        x[151] = 1.0;
        statistics.add(0, 0, &x).unwrap();
        assert_eq!(statistics.training(None).err(), Some(StatisticsError::Empty { domain: 1 }));
        assert!(!statistics.can_hold_out());
        let other = LayerStatistics::new(Shape { hidden: 2, ..SHAPE });
        assert!(matches!(statistics.merge(&other), Err(StatisticsError::Shape { .. })));
    }
}
