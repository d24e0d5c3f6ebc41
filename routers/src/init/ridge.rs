//! `ridge`: regression of the right expert's indicator on the router's input, in closed form.
//!
//! Domains count equally and there is no bias, so that the gate is an ordinary one (DUME, arXiv 2603.29765, counts
//! tokens, has a bias, and scales rows). The regulariser is relative to the inputs' mean square.

use super::{Candidate, How, Method};
use crate::{
    linalg::{Singular, add_ridge, solve_spd},
    statistics::Training,
};

/// The method.
pub const METHOD: Method = Method {
    name: "ridge",
    aliases: &[],
    about: "regression of the right expert on what the router sees: closed form",
    all_experts: false,
    how: How::Fitted(&[with(0.1)]),
};

pub(super) const fn with(lambda: f64) -> Candidate {
    Candidate { name: "ridge", lambda, solve }
}

/// (Xᵀ X + λ)⁻¹ Xᵀ Y with Y = one-hot - 1/E, as [E, D].
fn solve(training: &Training<'_>, lambda: f64) -> Result<Vec<f64>, Singular> {
    let (hidden, experts) = (training.hidden, training.experts);
    let mut gram = training.gram.clone();
    add_ridge(&mut gram, hidden, lambda);
    let mut gate = transpose(&training.centred(), experts);
    solve_spd(&mut gram, hidden, &mut gate, experts)?;
    Ok(transpose(&gate, hidden).iter().map(|v| v / experts as f64).collect())
}

/// [rows, columns] to [columns, rows].
pub(super) fn transpose(matrix: &[f64], rows: usize) -> Vec<f64> {
    let columns = matrix.len() / rows.max(1);
    (0..matrix.len()).map(|i| matrix[i % rows * columns + i / rows]).collect()
}
