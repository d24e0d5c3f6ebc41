//! The ways to set a gate: a new one costs its file and a line in [`METHODS`].
//!
//! Some methods look at the experts' prompts in the base ([`How::Prompts`]): they say what they need to know ([`Needs`]), and whoever runs the
//! model gathers that as [`Statistics`]. The rounding of every step is part of such a method: a recipe gives the gates that mergekit-moe gives
//! it. The others are fitted to what the routers of the composite itself see ([`How::Fitted`]), layer after layer.

mod auto;
mod centroid;
mod cheap_embed;
mod fit;
mod hidden;
mod hidden_avg;
mod lda;
mod line;
mod random;
mod ridge;
pub mod sequence;
mod softmax;
pub mod subspace;
mod torch_rng;
mod uniform;
mod uniform_random;

use half::bf16;

pub use self::fit::{Candidate, FitError, FitReport, Fitted, fit};
use crate::gate::Gate;

/// What a method must be given.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Needs {
    /// nothing: prompts are not looked at
    Nothing,
    /// the embedding of every token of each prompt
    Embeddings,
    /// the residual stream entering each layer, at the last token of each prompt
    LastState,
    /// the residual stream entering each layer, for each prompt its mean over all positions of the padded batch
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

impl Pooled {
    /// Adds a state, [D], `times` times.
    pub fn add(&mut self, state: &[f32], times: usize) {
        self.sum.resize(state.len(), 0.0);
        self.sum.iter_mut().zip(state).for_each(|(sum, v)| *sum += v * times as f32);
        self.count += times;
    }

    /// The mean, [D], as torch computes it in bf16: summed in f32, rounded, divided, rounded.
    pub fn mean_bf16(&self) -> Vec<f32> {
        self.sum.iter().map(|&sum| round_bf16(round_bf16(sum) / self.count as f32)).collect()
    }
}

/// The nearest bf16.
fn round_bf16(v: f32) -> f32 {
    bf16::from_f32(v).to_f32()
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
    /// whether it means anything only where every token runs through all experts
    pub all_experts: bool,
    /// from what
    pub how: How,
}

/// From what gates are made.
#[derive(Debug)]
pub enum How {
    /// From the experts' prompts in the base, if anything: all layers at once.
    Prompts {
        /// what it must be given
        needs: Needs,
        /// computes one gate per layer
        init: fn(Shape, &Statistics) -> Vec<Gate>,
    },
    /// From what the composite's routers see in text of each expert's domain: by [`fit`], for each layer.
    Fitted(&'static [Candidate]),
    /// There are no gates, but another rule, which holds only here.
    Runtime(Runtime),
}

/// A rule that no engine's file format can express.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Runtime {
    /// whole experts, chosen for whole sequences: [`sequence`]
    Sequence,
    /// a router that is quadratic in its input: [`subspace`]
    Subspace,
}

impl Runtime {
    /// Why it cannot be written.
    pub fn reason(self) -> &'static str {
        match self {
            Self::Sequence => {
                "its experts are whole models, each of which answers whole sequences, and files of Mixture-of-Experts models share all but the MLPs"
            }
            Self::Subspace => "its router is quadratic in what it sees, and files of Mixture-of-Experts models have linear gates",
        }
    }
}

impl Method {
    /// What it must know of the prompts in the base; `None` if it is fitted.
    pub fn needs(&self) -> Option<Needs> {
        match self.how {
            How::Prompts { needs, .. } => Some(needs),
            How::Runtime(_) => Some(Needs::Nothing),
            How::Fitted(_) => None,
        }
    }

    /// What it is if no checkpoint can hold it.
    pub fn runtime(&self) -> Option<Runtime> {
        match self.how {
            How::Runtime(runtime) => Some(runtime),
            How::Prompts { .. } | How::Fitted(_) => None,
        }
    }

    /// What it fits; nothing if it is not fitted.
    pub fn candidates(&self) -> &'static [Candidate] {
        match self.how {
            How::Prompts { .. } | How::Runtime(_) => &[],
            How::Fitted(candidates) => candidates,
        }
    }
}

/// Every method.
pub const METHODS: &[&Method] = &[
    &auto::METHOD,
    &softmax::METHOD,
    &ridge::METHOD,
    &lda::METHOD,
    &centroid::METHOD,
    &hidden::METHOD,
    &hidden_avg::METHOD,
    &cheap_embed::METHOD,
    &uniform::METHOD,
    &sequence::METHOD,
    &subspace::METHOD,
    &random::METHOD,
    &uniform_random::METHOD,
];

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

#[cfg(test)]
mod tests {
    use super::*;

    fn init_of(method: &Method) -> fn(Shape, &Statistics) -> Vec<Gate> {
        match method.how {
            How::Prompts { init, .. } => init,
            How::Fitted(_) | How::Runtime(_) => panic!("{} is not made from prompts", method.name),
        }
    }

    #[test]
    fn names_and_aliases_are_unique_and_found() {
        let names: Vec<&str> = METHODS.iter().flat_map(|m| m.aliases.iter().copied().chain([m.name])).collect();
        for (i, name) in names.iter().enumerate() {
            assert!(!names[..i].contains(name), "{name} twice");
            assert!(find(name).is_some_and(|m| m.name == *name || m.aliases.contains(name)));
        }
        assert_eq!(find("hidden_last").map(|m| m.name), Some("hidden"));
        assert!(find("Hidden").is_none());
    }

    #[test]
    fn drawn_gates_have_the_asked_shape_and_depend_on_the_seed_alone() {
        let shape = Shape { layers: 3, experts: 5, hidden: 7, seed: 1 };
        for method in [&random::METHOD, &uniform_random::METHOD] {
            let draw = |seed| init_of(method)(Shape { seed, ..shape }, &Statistics::default());
            let gates = draw(1);
            assert_eq!(gates.len(), 3);
            assert!(gates.iter().all(|g| g.experts == 5 && g.hidden == 7 && g.weight.len() == 35));
            assert_eq!(gates, draw(1));
            assert_ne!(gates, draw(2));
            assert_ne!(gates[0], gates[1]);
        }
        let uniform = init_of(&uniform_random::METHOD)(shape, &Statistics::default());
        assert!(uniform.iter().flat_map(|g| &g.weight).all(|v| v.abs() <= 1.0 / 7f32.sqrt()));
    }

    /// Two layers, three experts; the second has negative prompts.
    fn statistics() -> Statistics {
        let pooled = |values: [f32; 3], count| Pooled { sum: values.to_vec(), count };
        let state = |x, negative| PromptState { positive: pooled([x, 2.0, -1.0], 3), negative };
        let layer = |x| vec![state(x, None), state(2.0 * x, Some(pooled([0.5, 0.25, 9.0], 2))), state(-x, None)];
        Statistics { layers: vec![layer(1.0), layer(4.0)] }
    }

    const SHAPE: Shape = Shape { layers: 2, experts: 3, hidden: 3, seed: 0 };

    #[test]
    fn hidden_is_the_unit_difference_of_means_in_bf16() {
        let gates = init_of(&hidden::METHOD)(SHAPE, &statistics());
        // computed with torch in bf16 from the same sums and counts
        let expected = [[0.40820, 0.81641, -0.40820], [0.08496, 0.11084, -0.98828], [-0.40820, 0.81641, -0.40820]];
        for (e, row) in expected.iter().enumerate() {
            let close = gates[0].row(e).iter().zip(row).all(|(a, b)| (a - b).abs() < 1e-5);
            assert!(close, "expert {e}: {:?}, expected {row:?}", gates[0].row(e));
        }
        assert!(gates.iter().flat_map(|g| &g.weight).all(|v| v.to_bits().trailing_zeros() >= 16));
        assert_ne!(gates[0], gates[1]);
    }

    #[test]
    fn cheap_embed_subtracts_unit_vectors_and_is_the_same_in_every_layer() {
        let gates = init_of(&cheap_embed::METHOD)(SHAPE, &statistics());
        assert_eq!(gates.len(), 2);
        assert_eq!(gates[0], gates[1]);
        // (2, 2, -1) / 3 minus (0.5, 0.25, 9) / |.|, unit
        let difference = [0.61122, 0.63894, -1.33141];
        let norm = difference.iter().map(|v| v * v).sum::<f32>().sqrt();
        assert!(gates[0].row(1).iter().zip(difference).all(|(a, b)| (a - b / norm).abs() < 1e-4));
    }

    #[test]
    fn prompts_that_cancel_give_zeros_not_nan() {
        let pooled = Pooled { sum: vec![1.0, -2.0], count: 1 };
        let layers = vec![vec![PromptState { positive: pooled.clone(), negative: Some(pooled) }]];
        let shape = Shape { layers: 1, experts: 1, hidden: 2, seed: 0 };
        for method in [&hidden::METHOD, &hidden_avg::METHOD, &cheap_embed::METHOD] {
            assert_eq!(init_of(method)(shape, &Statistics { layers: layers.clone() })[0].weight, [0.0, 0.0], "{}", method.name);
        }
    }

    #[test]
    fn permuting_the_experts_permutes_the_gates() {
        let (straight, mut turned) = (statistics(), statistics());
        turned.layers.iter_mut().for_each(|states| states.rotate_left(1));
        for method in [&hidden::METHOD, &cheap_embed::METHOD] {
            let (a, b) = (init_of(method)(SHAPE, &straight), init_of(method)(SHAPE, &turned));
            for (a, b) in a.iter().zip(&b) {
                assert!((0..3).all(|e| a.row((e + 1) % 3) == b.row(e)), "{}", method.name);
            }
        }
    }
}
