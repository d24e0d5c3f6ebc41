//! `hidden_avg`: as `hidden`, but over all positions of the prompts, not only the last.

use super::{How, Method, Needs, hidden};

/// The method.
pub const METHOD: Method = Method {
    name: "hidden_avg",
    aliases: &[],
    about: "mean state of all the prompts' tokens in each layer, minus that of the negative prompts",
    all_experts: false,
    how: How::Prompts { needs: Needs::MeanState, init: hidden::init },
};
