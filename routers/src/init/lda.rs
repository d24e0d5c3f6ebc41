//! `lda`: linear discriminant analysis with a shrunk covariance, its bias folded into the gate.
//!
//! Fisher's discriminant for domains of equal covariance: g = S⁻¹ m with bias -mᵀ S⁻¹ m / 2. A gate has no bias; instead the direction c whose
//! product with inputs is nearest to one carries it: g + bias · c.

use super::{Candidate, How, Method, centroid::dot, ridge::transpose};
use crate::{
    linalg::{Singular, add_ridge, solve_spd},
    statistics::Training,
};

/// The method.
pub const METHOD: Method = Method {
    name: "lda",
    aliases: &[],
    about: "linear discriminant analysis of what the router sees, with a shrunk covariance",
    all_experts: false,
    how: How::Fitted(&[with(0.1)]),
};

pub(super) const fn with(lambda: f64) -> Candidate {
    Candidate { name: "lda", lambda, solve }
}

fn solve(training: &Training<'_>, lambda: f64) -> Result<Vec<f64>, Singular> {
    let (hidden, experts) = (training.hidden, training.experts);
    let mut within = training.gram.clone();
    for mean in training.means.chunks_exact(hidden) {
        for (row, &a) in within.chunks_exact_mut(hidden).zip(mean) {
            row.iter_mut().zip(mean).for_each(|(v, b)| *v -= a * b / experts as f64);
        }
    }
    add_ridge(&mut within, hidden, lambda);
    let mut gate = transpose(&training.means, experts);
    solve_spd(&mut within, hidden, &mut gate, experts)?;
    let mut gate = transpose(&gate, hidden);
    let mut gram = training.gram.clone();
    add_ridge(&mut gram, hidden, lambda);
    let mut one = training.common_mean();
    solve_spd(&mut gram, hidden, &mut one, 1)?;
    for (row, mean) in gate.chunks_exact_mut(hidden).zip(training.means.chunks_exact(hidden)) {
        let bias = -dot(row, mean) / 2.0;
        row.iter_mut().zip(&one).for_each(|(v, one)| *v += bias * one);
    }
    Ok(gate)
}
