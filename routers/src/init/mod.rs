//! The ways to set a gate: a new one costs its file and a line in [`METHODS`].
//!
//! A method says what it needs to know of the experts' prompts ([`Needs`]); whoever runs the model gathers that as [`Statistics`].

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
    /// [layer][expert]
    pub layers: Vec<Vec<PromptState>>,
}

/// Pooled state of one expert's prompts in one layer.
#[derive(Debug, Clone, Default)]
pub struct PromptState {
    /// [D]
    pub positive: Vec<f32>,
    /// [D]
    pub negative: Option<Vec<f32>>,
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
    /// for methods that draw
    pub seed: u64,
}

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
pub const METHODS: &[&Method] = &[];

/// The method of that name or alias.
pub fn find(name: &str) -> Option<&'static Method> {
    METHODS.iter().copied().find(|method| method.name == name || method.aliases.contains(&name))
}
