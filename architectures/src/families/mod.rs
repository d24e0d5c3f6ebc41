//! The list of families: a new one costs its file and a line here.

mod llama;

use crate::{
    config::{Config, ConfigError},
    family::Family,
};

/// Every family that can be read.
pub const FAMILIES: &[&Family] = &[&llama::LLAMA];

/// The family and config of a parsed `config.json`.
pub fn detect(config: &serde_json::Value) -> Result<(&'static Family, Config), ConfigError> {
    let model_type = config.get("model_type").and_then(|v| v.as_str()).ok_or(ConfigError::Missing { key: "model_type" })?;
    let family = FAMILIES.iter().find(|family| family.model_type == model_type).ok_or_else(|| ConfigError::Unsupported {
        model_type: model_type.to_owned(),
        supported: FAMILIES.iter().map(|family| family.model_type).collect::<Vec<_>>().join(", "),
    })?;
    Ok((family, (family.read)(config)?))
}
