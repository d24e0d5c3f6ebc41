//! `cheap_embed`: an expert's gate points to the sum of its prompts' token embeddings, in every layer alike. No forward pass is needed.

use super::{How, Method, Needs, PromptState, Shape, Statistics, gate};
use crate::gate::Gate;

/// The method.
pub const METHOD: Method = Method {
    name: "cheap_embed",
    aliases: &[],
    about: "sum of the prompts' token embeddings, the same in every layer: runs no model",
    all_experts: false,
    how: How::Prompts { needs: Needs::Embeddings, init },
};

fn init(shape: Shape, statistics: &Statistics) -> Vec<Gate> {
    let gate = statistics.layers.first().map(|states| gate(states, shape.hidden, row));
    gate.map(|gate| vec![gate; shape.layers]).unwrap_or_default()
}

/// unit(unit(positive) - unit(negative)), [D]. Sums are not divided: long prompts weigh more.
fn row(state: &PromptState) -> Vec<f32> {
    let positive = unit(&state.positive.sum);
    match &state.negative {
        None => positive,
        Some(negative) => unit(&positive.iter().zip(unit(&negative.sum)).map(|(p, n)| p - n).collect::<Vec<_>>()),
    }
}

fn unit(v: &[f32]) -> Vec<f32> {
    let norm = v.iter().map(|v| v * v).sum::<f32>().sqrt().max(1e-8);
    v.iter().map(|v| v / norm).collect()
}
