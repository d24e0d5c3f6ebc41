//! `hidden`: an expert's gate points to the mean state of its prompts' last tokens.
//!
//! The states are those that *enter* a layer, where mergekit-moe takes them; the router later sees the normed state after attention.

use super::{How, Method, Needs, PromptState, Shape, Statistics, gate, round_bf16};
use crate::gate::Gate;

/// The method.
pub const METHOD: Method = Method {
    name: "hidden",
    aliases: &["hidden_last"],
    about: "mean state of the prompts' last tokens in each layer, minus that of the negative prompts",
    all_experts: false,
    how: How::Prompts { needs: Needs::LastState, init },
};

pub(super) fn init(shape: Shape, statistics: &Statistics) -> Vec<Gate> {
    statistics.layers.iter().map(|states| gate(states, shape.hidden, row)).collect()
}

/// unit(mean(positive) - mean(negative)), [D], every intermediate result in bf16.
fn row(state: &PromptState) -> Vec<f32> {
    let mut difference = state.positive.mean_bf16();
    if let Some(negative) = &state.negative {
        difference.iter_mut().zip(negative.mean_bf16()).for_each(|(p, n)| *p = round_bf16(*p - n));
    }
    let norm = round_bf16(difference.iter().map(|v| v * v).sum::<f32>().sqrt()).max(1e-8);
    difference.into_iter().map(|v| round_bf16(v / norm)).collect()
}
