//! Mixtral: Mistral whose every MLP is a set of experts; the chosen experts' weights sum to one.

use serde_json::Value;

use super::read::{Defaults, Keys};
use crate::{
    config::{Config, ConfigError, Moe},
    family::{Family, LLAMA_NAMES, MoeNames, Names},
};

/// The family.
pub const MIXTRAL: Family = Family {
    model_type: "mixtral",
    architecture: "MixtralForCausalLM",
    names: Names {
        moe: Some(MoeNames {
            router: "block_sparse_moe.gate.weight",
            expert: [
                "block_sparse_moe.experts.{e}.w1.weight",
                "block_sparse_moe.experts.{e}.w3.weight",
                "block_sparse_moe.experts.{e}.w2.weight",
            ],
            fused: ["mlp.gate.weight", "mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
            shared: None,
        }),
        ..LLAMA_NAMES
    },
    read,
};

const DEFAULTS: Defaults =
    Defaults { kv_heads: Some(8), head_dim: None, norm_eps: 1e-5, max_positions: 131_072, theta: 1e6, bos: Some(1), eos: Some(2) };

fn read(json: &Value) -> Result<Config, ConfigError> {
    let keys = Keys::new(json)?;
    let config = keys.dense(&DEFAULTS)?;
    let experts = keys.experts(config.layers)?;
    let moe = Moe {
        experts,
        top_k: keys.top_k(experts, 2)?,
        normalise: true,
        ffn: config.ffn,
        shared_ffn: None,
        sparse: vec![true; config.layers],
        directions: None,
    };
    Ok(Config { windows: keys.one_window(config.layers, None)?, moe: Some(moe), ..config })
}
