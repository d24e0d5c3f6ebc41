//! Dense family to sparse family: which outputs exist, what they can hold exactly, and their `config.json`.
//!
//! Keys are written in both spellings (transformers 4 and 5, `num_experts` and `num_local_experts`), because each engine reads its own.

use serde_json::{Map, Value, json};

use crate::{
    config::{Config, RopeScaling},
    families,
    family::Family,
    weights::Dtype,
};

/// A sparse family that composites are written in.
#[derive(Debug)]
pub struct Target {
    /// mergekit's name, which a recipe's `architecture` may abbreviate
    pub name: &'static str,
    /// the family written
    pub family: &'static Family,
    /// dense model types it takes, the ones it is made for first
    pub from: &'static [&'static str],
    /// whether it has a gated shared expert beside the routed ones
    pub shared_expert: bool,
}

/// Every target, in the order in which they are tried.
pub const TARGETS: &[Target] = &[
    Target { name: "Mixtral", family: &families::mixtral::MIXTRAL, from: &["llama", "mistral"], shared_expert: false },
    Target { name: "Qwen MoE", family: &families::qwen2_moe::QWEN2_MOE, from: &["qwen2", "llama", "mistral"], shared_expert: true },
    Target { name: "Qwen3 MoE", family: &families::qwen3_moe::QWEN3_MOE, from: &["qwen3"], shared_expert: false },
];

/// Width of the shared expert where the family must have one and the recipe has none: its weights are zero, so it adds exactly nothing.
/// 256 keeps k-quants and eight-way tensor parallelism possible.
pub const NULL_SHARED_FFN: usize = 256;

/// What is asked of a target.
#[derive(Debug, Clone, Copy)]
pub struct Request {
    /// E
    pub experts: usize,
    /// K
    pub top_k: usize,
    /// F of the shared expert that the recipe names
    pub shared_ffn: Option<usize>,
    /// type of the output
    pub dtype: Dtype,
    /// whether the head is the embedding
    pub tied: bool,
}

impl Target {
    /// Why this target cannot hold experts of this dense config exactly; `None` if it can.
    pub fn refuses(&self, dense: &Config, shared_expert: bool) -> Option<String> {
        if dense.moe.is_some() {
            return Some(format!("`{}` is a Mixture-of-Experts already", dense.model_type));
        }
        if !self.from.contains(&dense.model_type.as_str()) {
            return Some(format!("it takes {}, not {}", self.from.join(" or "), dense.model_type));
        }
        if shared_expert && !self.shared_expert {
            return Some("it has no shared expert".into());
        }
        let (qkv, o) = match self.family.model_type {
            "qwen2_moe" => (true, false),
            "qwen3_moe" => (true, true),
            _ => (false, false),
        };
        if dense.qkv_bias && !qkv {
            return Some("it has no biases on q, k and v".into());
        }
        if dense.o_bias && !o {
            return Some("it has no bias on the attention output".into());
        }
        if dense.mlp_bias {
            return Some("its experts have no biases".into());
        }
        None
    }

    /// The composite's `config.json`: the base's with the target's keys, both spellings.
    /// `dense` is the base's config, `base` its JSON.
    pub fn config_json(&self, base: &Value, dense: &Config, request: Request) -> Value {
        let mut out = base.as_object().cloned().unwrap_or_default();
        for stale in
            ["quantization_config", "auto_map", "_name_or_path", "transformers_version", "attention_bias", "mlp_bias", "pretraining_tp"]
        {
            out.remove(stale);
        }
        let mut set = |key: &str, value: Value| out.insert(key.to_owned(), value);
        set("architectures", json!([self.family.architecture]));
        set("model_type", json!(self.family.model_type));
        set("hidden_size", json!(dense.hidden));
        set("intermediate_size", json!(dense.ffn));
        set("num_hidden_layers", json!(dense.layers));
        set("num_attention_heads", json!(dense.heads));
        set("num_key_value_heads", json!(dense.kv_heads));
        set("head_dim", json!(dense.head_dim));
        set("vocab_size", json!(dense.vocab));
        set("max_position_embeddings", json!(dense.max_positions));
        set("rms_norm_eps", json!(dense.norm_eps));
        set("tie_word_embeddings", json!(request.tied));
        set("num_local_experts", json!(request.experts));
        set("num_experts", json!(request.experts));
        set("num_experts_per_tok", json!(request.top_k));
        set("output_router_logits", json!(false));
        set("router_aux_loss_coef", json!(0.001));
        set("torch_dtype", json!(request.dtype.torch_name()));
        set("dtype", json!(request.dtype.torch_name()));
        let window = dense.windows.iter().flatten().next().copied();
        match self.family.model_type {
            "mixtral" => {
                set("router_jitter_noise", json!(0.0));
                set("sliding_window", json!(window));
            }
            model_type => {
                set("moe_intermediate_size", json!(dense.ffn));
                set("decoder_sparse_step", json!(1));
                set("mlp_only_layers", json!([]));
                set("norm_topk_prob", json!(true));
                if model_type == "qwen2_moe" {
                    set("qkv_bias", json!(true));
                    set("shared_expert_intermediate_size", json!(request.shared_ffn.unwrap_or(NULL_SHARED_FFN)));
                } else {
                    set("attention_bias", json!(dense.qkv_bias));
                }
                set("use_sliding_window", json!(window.is_some()));
                set("sliding_window", json!(window));
                let first_windowed = dense.windows.iter().position(Option::is_some).unwrap_or(dense.layers);
                set("max_window_layers", json!(first_windowed));
            }
        }
        rope_keys(&mut out, dense);
        Value::Object(out)
    }
}

/// `rope_theta` and `rope_scaling` for transformers 4 and everything that reads its configs, `rope_parameters` for transformers 5.
fn rope_keys(out: &mut Map<String, Value>, dense: &Config) {
    let scaling = ["rope_scaling", "rope_parameters"].iter().find_map(|key| out.get(*key)?.as_object().cloned());
    let mut scaling = scaling.unwrap_or_default();
    let kind = scaling.get("rope_type").or_else(|| scaling.get("type")).cloned().unwrap_or_else(|| json!("default"));
    scaling.remove("type");
    scaling.insert("rope_type".into(), kind);
    scaling.remove("rope_theta");
    let old = if dense.rope.scaling == RopeScaling::Default { Value::Null } else { Value::Object(scaling.clone()) };
    scaling.insert("rope_theta".into(), json!(dense.rope.theta));
    out.insert("rope_theta".into(), json!(dense.rope.theta));
    out.insert("rope_scaling".into(), old);
    out.insert("rope_parameters".into(), Value::Object(scaling));
    if let RopeScaling::Llama3 { original, .. } = dense.rope.scaling {
        // llama.cpp's converter looks for it here and takes 8192 if it is not.
        out.insert("original_max_position_embeddings".into(), json!(original));
    }
}
