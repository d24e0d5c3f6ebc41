//! Llama 1, 2, 3.x and everything that calls itself `llama`.

use crate::{
    config::{Config, ConfigError},
    family::{Family, LLAMA_NAMES},
};

/// The family.
pub const LLAMA: Family = Family { model_type: "llama", architecture: "LlamaForCausalLM", names: LLAMA_NAMES, read };

fn read(_config: &serde_json::Value) -> Result<Config, ConfigError> {
    Err(ConfigError::Missing { key: "skeleton" })
}
