//! Llama 1, 2, 3.x and everything that calls itself `llama`.

use serde_json::Value;

use super::read::{Defaults, Keys};
use crate::{
    config::{Config, ConfigError},
    family::{Family, LLAMA_NAMES},
};

/// The family.
pub const LLAMA: Family = Family { model_type: "llama", architecture: "LlamaForCausalLM", names: LLAMA_NAMES, read };

const DEFAULTS: Defaults =
    Defaults { kv_heads: None, head_dim: None, norm_eps: 1e-6, max_positions: 2048, theta: 1e4, bos: Some(1), eos: Some(2) };

fn read(json: &Value) -> Result<Config, ConfigError> {
    let keys = Keys::new(json)?;
    let attention_bias = keys.flag("attention_bias", false)?;
    Ok(Config { qkv_bias: attention_bias, o_bias: attention_bias, mlp_bias: keys.flag("mlp_bias", false)?, ..keys.dense(&DEFAULTS)? })
}
