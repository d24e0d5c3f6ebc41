//! Qwen3: Llama with a norm over each head of q and k, and a head size that the hidden size does not give.

use serde_json::Value;

use super::read::{Defaults, Keys};
use crate::{
    config::{Config, ConfigError},
    family::{Family, LLAMA_NAMES},
};

/// The family.
pub const QWEN3: Family = Family { model_type: "qwen3", architecture: "Qwen3ForCausalLM", names: LLAMA_NAMES, read };

const DEFAULTS: Defaults =
    Defaults { kv_heads: Some(32), head_dim: Some(128), norm_eps: 1e-6, max_positions: 32768, theta: 1e4, bos: None, eos: None };

fn read(json: &Value) -> Result<Config, ConfigError> {
    let keys = Keys::new(json)?;
    let config = keys.dense(&DEFAULTS)?;
    let attention_bias = keys.flag("attention_bias", false)?;
    Ok(Config {
        qkv_bias: attention_bias,
        o_bias: attention_bias,
        qk_norm: true,
        windows: keys.windows(config.layers, |layer, from| layer >= from)?,
        ..config
    })
}
