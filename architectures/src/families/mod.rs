//! The list of families: a new one costs its file and a line here.

mod llama;
mod mistral;
pub mod mixtral;
mod qwen2;
pub mod qwen2_moe;
mod qwen3;
pub mod qwen3_moe;
mod read;

use crate::{
    config::{Config, ConfigError},
    family::Family,
};

/// Every family that can be read.
pub const FAMILIES: &[&Family] =
    &[&llama::LLAMA, &mistral::MISTRAL, &qwen2::QWEN2, &qwen3::QWEN3, &mixtral::MIXTRAL, &qwen2_moe::QWEN2_MOE, &qwen3_moe::QWEN3_MOE];

/// The family and config of a parsed `config.json`.
pub fn detect(config: &serde_json::Value) -> Result<(&'static Family, Config), ConfigError> {
    let model_type =
        config.get("model_type").and_then(|v| v.as_str()).ok_or_else(|| ConfigError::Missing { key: "model_type".to_owned() })?;
    let family = FAMILIES.iter().find(|family| family.model_type == model_type).ok_or_else(|| ConfigError::Unsupported {
        model_type: model_type.to_owned(),
        supported: FAMILIES.iter().map(|family| family.model_type).collect::<Vec<_>>().join(", "),
    })?;
    Ok((family, (family.read)(config)?))
}
