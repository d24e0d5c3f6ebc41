//! Qwen2 and Qwen2.5: Llama with biases on q, k and v.

use serde_json::Value;

use super::read::{Defaults, Keys};
use crate::{
    config::{Config, ConfigError},
    family::{Family, LLAMA_NAMES},
};

/// The family.
pub const QWEN2: Family = Family { model_type: "qwen2", architecture: "Qwen2ForCausalLM", names: LLAMA_NAMES, read };

const DEFAULTS: Defaults =
    Defaults { kv_heads: Some(32), head_dim: None, norm_eps: 1e-6, max_positions: 32768, theta: 1e4, bos: None, eos: None };

fn read(json: &Value) -> Result<Config, ConfigError> {
    let keys = Keys::new(json)?;
    let config = keys.dense(&DEFAULTS)?;
    Ok(Config { qkv_bias: true, windows: keys.windows(config.layers, |layer, from| layer >= from)?, ..config })
}
