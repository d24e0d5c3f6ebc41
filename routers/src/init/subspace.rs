//! `subspace`: a token goes to the experts whose fine-tuning reads most of it. Needs neither prompts nor text, only weights.
//!
//! What fine-tuning added to the gate and up projections of an expert, Δ [2F, D], answers to inputs x along its leading right singular vectors
//! V [R, D]. The logit is [`SCALE`] · ‖V x‖² / ‖x‖², the share of x that lies in their span. SMILE (arXiv 2408.10174) takes ‖V x‖ of each linear
//! layer's own Δ, Arrow (arXiv 2405.11157) |v · x| of the first one alone. No gate of a checkpoint is quadratic in x.
//!
//! R rows of V per expert, E experts, D hidden, F ffn, N tokens.

use super::{How, Method, Runtime};
use crate::linalg;

/// The method.
pub const METHOD: Method = Method {
    name: "subspace",
    aliases: &[],
    about: "tokens go where fine-tuning looks: from the experts' weights alone, without prompts or text; served, never written",
    all_experts: false,
    how: How::Runtime(Runtime::Subspace),
};

/// R
pub const DIRECTIONS: usize = 8;

/// Shares are small numbers: the mean over inputs without a direction is R / D.
pub const SCALE: f64 = 20.0;

/// The R leading right singular vectors of the change of an expert's gate and up projections, `change` [2F, D]: row-major [R, D], rows of zeros
/// beyond its rank.
pub fn directions(change: &[f32], hidden: usize) -> Vec<f32> {
    linalg::right_singular_vectors(change, hidden, DIRECTIONS)
}
