//! Mistral: Llama with a sliding window over every layer (version 0.1) or none (later ones).

use serde_json::Value;

use super::read::{Defaults, Keys};
use crate::{
    config::{Config, ConfigError},
    family::{Family, LLAMA_NAMES},
};

/// The family.
pub const MISTRAL: Family = Family { model_type: "mistral", architecture: "MistralForCausalLM", names: LLAMA_NAMES, read };

const DEFAULTS: Defaults =
    Defaults { kv_heads: Some(8), head_dim: None, norm_eps: 1e-6, max_positions: 131_072, theta: 1e4, bos: Some(1), eos: Some(2) };

fn read(json: &Value) -> Result<Config, ConfigError> {
    let keys = Keys::new(json)?;
    let config = keys.dense(&DEFAULTS)?;
    Ok(Config { windows: keys.one_window(config.layers, Some(4096))?, ..config })
}
