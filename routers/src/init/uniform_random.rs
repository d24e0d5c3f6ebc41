//! `uniform_random`: gates uniform in ±√(1/D), the usual start of a linear layer. Prompts are not looked at.

use super::{How, Method, Needs, Shape, Statistics, split, torch_rng::TorchRng};
use crate::gate::Gate;

/// The method.
pub const METHOD: Method = Method {
    name: "uniform_random",
    aliases: &[],
    about: "uniform numbers in ±√(1/D), a linear layer's usual start: needs no prompts, routes at random",
    all_experts: false,
    how: How::Prompts { needs: Needs::Nothing, init },
};

fn init(shape: Shape, _: &Statistics) -> Vec<Gate> {
    let bound = (1.0 / shape.hidden as f64).sqrt() as f32;
    let mut values = TorchRng::new(shape.seed).rand(shape.layers * shape.experts * shape.hidden);
    for v in &mut values {
        *v = *v * 2.0 * bound - bound;
    }
    split(&values, shape)
}
