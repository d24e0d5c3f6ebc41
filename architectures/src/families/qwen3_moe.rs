//! Qwen3-MoE: Qwen3 with experts. A layer may keep a dense MLP; a sliding window, if used, is over every layer.

use serde_json::Value;

use super::{
    qwen2_moe::QWEN_MOE_NAMES,
    read::{Defaults, Keys},
};
use crate::{
    config::{Config, ConfigError},
    family::{Family, LLAMA_NAMES, Names},
};

/// The family.
pub const QWEN3_MOE: Family = Family {
    model_type: "qwen3_moe",
    architecture: "Qwen3MoeForCausalLM",
    names: Names { moe: Some(QWEN_MOE_NAMES), ..LLAMA_NAMES },
    read,
};

const DEFAULTS: Defaults =
    Defaults { kv_heads: Some(4), head_dim: None, norm_eps: 1e-6, max_positions: 32768, theta: 1e4, bos: None, eos: None };

fn read(json: &Value) -> Result<Config, ConfigError> {
    let keys = Keys::new(json)?;
    let config = keys.dense(&DEFAULTS)?;
    let attention_bias = keys.flag("attention_bias", false)?;
    let windows = if keys.uses_windows()? { keys.one_window(config.layers, Some(4096))? } else { config.windows };
    let moe = Some(keys.qwen_moe(config.layers, 8)?);
    Ok(Config { qkv_bias: attention_bias, o_bias: attention_bias, qk_norm: true, windows, moe, ..config })
}
