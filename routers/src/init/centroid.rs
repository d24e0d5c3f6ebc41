//! `centroid`: an expert's gate points to the mean of what the router sees in its domain, as `hidden` means to, but at the router's own input.
//!
//! What all domains have in common says nothing about the expert, and there is no bias to take it off the logits: the common mean is
//! subtracted, and its direction taken out.

use super::{Candidate, How, Method};
use crate::{linalg::Singular, statistics::Training};

/// The method.
pub const METHOD: Method = Method {
    name: "centroid",
    aliases: &[],
    about: "mean of what the router sees in each domain, less what they have in common",
    all_experts: false,
    how: How::Fitted(&[CANDIDATE]),
};

pub(super) const CANDIDATE: Candidate = Candidate { name: "centroid", lambda: 0.0, solve };

#[expect(clippy::unnecessary_wraps, reason = "the other methods' systems can have no solution")]
fn solve(training: &Training<'_>, _: f64) -> Result<Vec<f64>, Singular> {
    let common = training.common_mean();
    let mut gate = training.centred();
    for row in gate.chunks_exact_mut(training.hidden) {
        let along = dot(row, &common) / dot(&common, &common).max(f64::MIN_POSITIVE);
        row.iter_mut().zip(&common).for_each(|(v, common)| *v -= along * common);
        let norm = dot(row, row).sqrt().max(f64::MIN_POSITIVE);
        row.iter_mut().for_each(|v| *v /= norm);
    }
    Ok(gate)
}

pub(super) fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}
