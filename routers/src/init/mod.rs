//! The ways to set a gate: a new one costs its file and a line in [`METHODS`].
//!
//! A method says what it needs to know of the experts' prompts ([`Needs`]); whoever runs the model gathers that as [`Statistics`].
//! The rounding of every step is part of a method: a recipe gives the gates that mergekit-moe gives it.

mod cheap_embed;
mod hidden;
mod hidden_avg;
mod random;
mod torch_rng;
mod uniform_random;

use crate::gate::Gate;

/// What a method must be given.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Needs {
    /// nothing: prompts are not looked at
    Nothing,
    /// sums of token embeddings
    Embeddings,
    /// the residual stream entering each layer, at the last token of each prompt
    LastState,
    /// the residual stream entering each layer, averaged over all positions of the padded batch
    MeanState,
}

/// What was gathered from the prompts: for each layer and expert one vector for the positive and, if there are any, one for the negative prompts.
#[derive(Debug, Clone, Default)]
pub struct Statistics {
    /// [layer][expert]; a single layer if the method needs embeddings, which are the same for all
    pub layers: Vec<Vec<PromptState>>,
}

/// Pooled states of one expert's prompts in one layer.
#[derive(Debug, Clone, Default)]
pub struct PromptState {
    /// over the positive prompts
    pub positive: Pooled,
    /// over the negative prompts, if there are any
    pub negative: Option<Pooled>,
}

/// States summed up.
#[derive(Debug, Clone, Default)]
pub struct Pooled {
    /// [D]
    pub sum: Vec<f32>,
    /// how many
    pub count: usize,
}

/// The size of what is asked for.
#[derive(Debug, Clone, Copy)]
pub struct Shape {
    /// L
    pub layers: usize,
    /// E, routed experts plus the gated shared expert if that one has a row too
    pub experts: usize,
    /// D
    pub hidden: usize,
    /// for methods that draw; [`DEFAULT_SEED`] if the user gave none
    pub seed: u64,
}

/// Without a seed mergekit-moe draws anew in each run; here the same recipe always gives the same gates.
pub const DEFAULT_SEED: u64 = 0;

/// A way to set gates.
#[derive(Debug)]
pub struct Method {
    /// `gate_mode` in a recipe
    pub name: &'static str,
    /// other spellings
    pub aliases: &'static [&'static str],
    /// one line for help texts
    pub about: &'static str,
    /// what it must be given
    pub needs: Needs,
    /// computes one gate per layer
    pub init: fn(Shape, &Statistics) -> Vec<Gate>,
}

/// Every method.
pub const METHODS: &[&Method] = &[&hidden::METHOD, &hidden_avg::METHOD, &cheap_embed::METHOD, &random::METHOD, &uniform_random::METHOD];

/// The method of that name or alias.
pub fn find(name: &str) -> Option<&'static Method> {
    METHODS.iter().copied().find(|method| method.name == name || method.aliases.contains(&name))
}

/// The gate whose row e is `row(states[e])`, [D] each.
fn gate(states: &[PromptState], hidden: usize, row: fn(&PromptState) -> Vec<f32>) -> Gate {
    Gate { experts: states.len(), hidden, weight: states.iter().flat_map(row).collect() }
}

/// Cuts L * E * D values into one gate per layer.
fn split(values: &[f32], shape: Shape) -> Vec<Gate> {
    let size = (shape.experts * shape.hidden).max(1);
    values.chunks_exact(size).map(|weight| Gate { experts: shape.experts, hidden: shape.hidden, weight: weight.to_vec() }).collect()
}
