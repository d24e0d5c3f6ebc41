//! Qwen2-MoE: Qwen2 with experts and, beside them, one shared expert behind a sigmoid gate. A layer may keep a dense MLP.

use serde_json::Value;

use super::read::{Defaults, Keys};
use crate::{
    config::{Config, ConfigError, Moe},
    family::{Family, LLAMA_NAMES, MoeNames, Names},
};

/// The family.
pub const QWEN2_MOE: Family = Family {
    model_type: "qwen2_moe",
    architecture: "Qwen2MoeForCausalLM",
    names: Names {
        moe: Some(MoeNames {
            shared: Some((
                ["mlp.shared_expert.gate_proj.weight", "mlp.shared_expert.up_proj.weight", "mlp.shared_expert.down_proj.weight"],
                "mlp.shared_expert_gate.weight",
            )),
            ..QWEN_MOE_NAMES
        }),
        ..LLAMA_NAMES
    },
    read,
};

/// Names that both sparse Qwen families use.
pub(super) const QWEN_MOE_NAMES: MoeNames = MoeNames {
    router: "mlp.gate.weight",
    expert: ["mlp.experts.{e}.gate_proj.weight", "mlp.experts.{e}.up_proj.weight", "mlp.experts.{e}.down_proj.weight"],
    fused: ["mlp.gate.weight", "mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
    shared: None,
};

const DEFAULTS: Defaults =
    Defaults { kv_heads: Some(16), head_dim: None, norm_eps: 1e-6, max_positions: 32768, theta: 1e4, bos: None, eos: None };

fn read(json: &Value) -> Result<Config, ConfigError> {
    let keys = Keys::new(json)?;
    let config = keys.dense(&DEFAULTS)?;
    // Zero is vLLM's way to say that there is none.
    let shared = keys.count("shared_expert_intermediate_size")?;
    let shared_ffn = shared.ok_or(ConfigError::Missing { key: "shared_expert_intermediate_size".to_owned() })?;
    let moe = Moe { shared_ffn: Some(shared_ffn).filter(|ffn| *ffn > 0), ..keys.qwen_moe(config.layers, 4)? };
    Ok(Config {
        qkv_bias: keys.flag("qkv_bias", true)?,
        // Every other layer below the limit, as transformers 5 has it (4 had its attention kernels disagree on this).
        windows: keys.windows(config.layers, |layer, limit| layer % 2 == 0 && layer < limit)?,
        moe: Some(moe),
        ..config
    })
}
