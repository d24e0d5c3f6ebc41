//! `uniform`: gates of zeros, for composites in which every token runs through all experts, each with the same weight.

use super::{Gate, How, Method, Needs, Shape, Statistics, split};

/// The method.
pub const METHOD: Method = Method {
    name: "uniform",
    aliases: &[],
    about: "every token runs through all experts, equally: needs no prompts, the mean of the experts' outputs",
    all_experts: true,
    how: How::Prompts { needs: Needs::Nothing, init },
};

fn init(shape: Shape, _: &Statistics) -> Vec<Gate> {
    split(&vec![0.0; shape.layers * shape.experts * shape.hidden], shape)
}
