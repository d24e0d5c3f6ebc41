//! `random`: standard normal gates. Prompts are not looked at; a baseline, or a start for training.

use super::{How, Method, Needs, Shape, Statistics, split, torch_rng::TorchRng};
use crate::gate::Gate;

/// The method.
pub const METHOD: Method = Method {
    name: "random",
    aliases: &[],
    about: "standard normal numbers: needs no prompts, routes at random",
    all_experts: false,
    how: How::Prompts { needs: Needs::Nothing, init },
};

fn init(shape: Shape, _: &Statistics) -> Vec<Gate> {
    split(&TorchRng::new(shape.seed).randn(shape.layers * shape.experts * shape.hidden), shape)
}
