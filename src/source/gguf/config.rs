//! A `config.json` made from GGUF metadata, in the spelling of transformers 4, which everyone reads.

use serde_json::{Value, json};

use super::read::Gguf;

type Result<T> = std::result::Result<T, String>;

/// Architectures in GGUF, their dense and sparse `model_type`s, and whether a sparse one normalises its K weights.
const ARCHITECTURES: [(&str, &str, &str, bool); 5] = [
    ("llama", "llama", "mixtral", true),
    ("qwen2", "qwen2", "qwen2_moe", false),
    ("qwen2moe", "qwen2", "qwen2_moe", false),
    ("qwen3", "qwen3", "qwen3_moe", true),
    ("qwen3moe", "qwen3", "qwen3_moe", true),
];

fn missing(key: &str) -> String {
    format!("metadata `{key}` is missing; the file is incomplete: fetch it again, or use the original checkpoint")
}

/// The config.
pub(super) fn make(gguf: &Gguf) -> Result<Value> {
    let architecture = gguf.text("general.architecture")?.ok_or("metadata `general.architecture` is missing")?;
    let known = || ARCHITECTURES.map(|(name, ..)| name).join(", ");
    let (_, dense, sparse, normalise) = *ARCHITECTURES
        .iter()
        .find(|(name, ..)| *name == architecture)
        .ok_or_else(|| format!("architecture `{architecture}` is not supported in GGUF (supported: {})", known()))?;
    let key = |name: &str| format!("{architecture}.{name}");
    let optional = |name: &str| gguf.integer(&key(name));
    let needed = |name: &str| optional(name)?.ok_or_else(|| missing(&key(name)));

    let experts = optional("expert_count")?.unwrap_or(0);
    let has = |name: &str| gguf.tensors.contains_key(name);
    let window = optional("attention.sliding_window")?;
    let model_type = match (dense, experts) {
        // Experts behind attention with biases: Qwen2, which `qwen2moe` cannot hold where weights are normalised.
        ("llama", 1..) if has("blk.0.attn_q.bias") => "qwen2_moe",
        ("llama", 0) if window.is_some() => "mistral",
        (dense, 0) => dense,
        _ => sparse,
    };
    let family = upcycle_architectures::FAMILIES.iter().find(|family| family.model_type == model_type);
    let (hidden, heads) = (needed("embedding_length")?, needed("attention.head_count")?);
    let head_dim = match optional("attention.key_length")? {
        Some(size) => size,
        None => hidden.checked_div(heads).ok_or_else(|| format!("metadata `{}` is 0", key("attention.head_count")))?,
    };
    if optional("attention.value_length")?.is_some_and(|size| size != head_dim) {
        return Err(format!("metadata `{}` differs from the size of keys, which is not supported", key("attention.value_length")));
    }
    let embedding = gguf.tensors.get("token_embd.weight").ok_or("tensor `token_embd.weight` is missing")?;
    let shape = |name: &str, axis: usize| gguf.tensors.get(name).and_then(|tensor| tensor.shape.get(axis)).copied();
    // A sparse Qwen may state no size for a dense MLP, for it has none.
    let expert_ffn = optional("expert_feed_forward_length")?.or_else(|| shape("blk.0.ffn_gate_exps.weight", 1));
    let ffn = optional("feed_forward_length")?.or(expert_ffn).ok_or_else(|| missing(&key("feed_forward_length")))?;

    let mut config = json!({
        "architectures": [family.map_or("", |family| family.architecture)],
        "model_type": model_type,
        "hidden_size": hidden,
        "intermediate_size": ffn,
        "num_hidden_layers": needed("block_count")?,
        "num_attention_heads": heads,
        "num_key_value_heads": optional("attention.head_count_kv")?.unwrap_or(heads),
        "head_dim": head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": needed("context_length")?,
        "rms_norm_eps": gguf.float(&key("attention.layer_norm_rms_epsilon"))?.unwrap_or(1e-5),
        "rope_theta": gguf.float(&key("rope.freq_base"))?.unwrap_or(10000.0),
        "vocab_size": embedding.shape.first(),
        "tie_word_embeddings": !has("output.weight"),
        "attention_bias": has("blk.0.attn_q.bias") && model_type != "qwen2",
        "torch_dtype": super::tensors::dtype(embedding).map_or("float32", |dtype| dtype.decoded().torch_name()),
        "use_cache": true,
    });
    if let Some(dimensions) = optional("rope.dimension_count")?.filter(|dimensions| *dimensions != head_dim) {
        config["partial_rotary_factor"] = json!(dimensions as f64 / head_dim as f64);
    }
    if let Some(scaling) = rope_scaling(gguf, architecture, head_dim)? {
        config["rope_scaling"] = scaling;
    }
    if let Some(window) = window.filter(|_| matches!(model_type, "mistral" | "mixtral")) {
        config["sliding_window"] = json!(window);
    }
    if experts > 0 {
        config["num_experts_per_tok"] = json!(needed("expert_used_count")?);
        if model_type == "mixtral" {
            config["num_local_experts"] = json!(experts);
        } else {
            config["num_experts"] = json!(experts);
            config["moe_intermediate_size"] =
                json!(expert_ffn.ok_or_else(|| format!("metadata `{}` is missing", key("expert_feed_forward_length")))?);
            config["norm_topk_prob"] = json!(gguf.flag(&key("expert_weights_norm"))?.unwrap_or(normalise));
            config["decoder_sparse_step"] = json!(1);
            config["mlp_only_layers"] = json!([]);
        }
        if model_type == "qwen2_moe" {
            let shared = optional("expert_shared_feed_forward_length")?.or_else(|| shape("blk.0.ffn_gate_shexp.weight", 0));
            config["shared_expert_intermediate_size"] = json!(shared.unwrap_or(0));
        }
    }
    for (name, ids) in special_ids(gguf)? {
        config[name] = match ids.as_slice() {
            [] => Value::Null,
            [one] => json!(one),
            many => json!(many),
        };
    }
    Ok(config)
}

/// Ids of `bos_token_id`, `eos_token_id` (the ends of text, turn and message) and `pad_token_id`.
pub(super) fn special_ids(gguf: &Gguf) -> Result<[(&'static str, Vec<usize>); 3]> {
    let ids = |names: &[&str]| {
        let mut ids = Vec::new();
        for name in names {
            if let Some(id) = gguf.integer(&format!("tokenizer.ggml.{name}_token_id"))?
                && !ids.contains(&id)
            {
                ids.push(id);
            }
        }
        Ok::<_, String>(ids)
    };
    Ok([("bos_token_id", ids(&["bos"])?), ("eos_token_id", ids(&["eos", "eot", "eom"])?), ("pad_token_id", ids(&["padding"])?)])
}

/// `rope_scaling` from the metadata, or from the divisors that llama.cpp stores for Llama 3.1.
fn rope_scaling(gguf: &Gguf, architecture: &str, head_dim: usize) -> Result<Option<Value>> {
    let key = |name: &str| format!("{architecture}.rope.{name}");
    if gguf.tensors.contains_key("rope_freqs.weight") {
        return llama3_scaling(gguf, &key, head_dim);
    }
    if gguf.tensors.keys().any(|name| name.starts_with("rope_factors_")) {
        return Err("LongRoPE is not supported in GGUF; use the original checkpoint".into());
    }
    let factor = gguf.float(&key("scaling.factor"))?.or(gguf.float(&key("scale_linear"))?);
    let original = gguf.integer(&key("scaling.original_context_length"))?;
    match (gguf.text(&key("scaling.type"))?, factor) {
        (Some("none"), _) | (_, Some(1.0) | None) => Ok(None),
        (Some("linear") | None, Some(factor)) => Ok(Some(json!({"type": "linear", "rope_type": "linear", "factor": factor}))),
        (Some("yarn"), Some(factor)) => {
            let mut scaling = json!({"type": "yarn", "rope_type": "yarn", "factor": factor});
            for (name, stored) in [("beta_fast", "yarn_beta_fast"), ("beta_slow", "yarn_beta_slow")] {
                if let Some(beta) = gguf.float(&key(&format!("scaling.{stored}")))? {
                    scaling[name] = json!(beta);
                }
            }
            if let Some(times) = gguf.float(&key("scaling.attn_factor"))? {
                let usual = if factor <= 1.0 { 1.0 } else { 0.1 * factor.ln() + 1.0 };
                scaling["attention_factor"] = json!(usual * times);
            }
            if let Some(original) = original {
                scaling["original_max_position_embeddings"] = json!(original);
            }
            Ok(Some(scaling))
        }
        (Some(other), _) => Err(format!("rope scaling `{other}` is not supported in GGUF; use the original checkpoint")),
    }
}

/// llama.cpp keeps one divisor for each pair of dimensions and forgets the parameters, which our own files state. Those of every Llama 3.1 to
/// 3.3 differ in the factor alone, which is the largest divisor. That they give these divisors is checked.
fn llama3_scaling(gguf: &Gguf, key: &dyn Fn(&str) -> String, head_dim: usize) -> Result<Option<Value>> {
    let stored = super::tensors::floats(gguf, "rope_freqs.weight")?;
    let theta = gguf.float(&key("freq_base"))?.unwrap_or(10000.0);
    let low = gguf.float(&key("scaling.low_freq_factor"))?.unwrap_or(1.0);
    let high = gguf.float(&key("scaling.high_freq_factor"))?.unwrap_or(4.0);
    let original = gguf.float(&key("scaling.original_context_length"))?.unwrap_or(8192.0);
    let factor = stored.iter().copied().fold(1.0, f32::max);
    if factor <= 1.0 {
        return Ok(None);
    }
    let divisor = |pair: usize| {
        let wavelength = std::f64::consts::TAU * theta.powf(2.0 * pair as f64 / head_dim as f64);
        let smooth = ((original / wavelength - low) / (high - low)).clamp(0.0, 1.0);
        1.0 / ((1.0 - smooth) / f64::from(factor) + smooth)
    };
    let fits = stored.iter().enumerate().all(|(pair, stored)| (f64::from(*stored) / divisor(pair) - 1.0).abs() < 1e-3);
    if !fits || stored.len() != head_dim / 2 {
        return Err(
            "`rope_freqs.weight` is not that of Llama 3.1 to 3.3, and its parameters are not stored; use the original checkpoint".into()
        );
    }
    Ok(Some(json!({
        "type": "llama3", "rope_type": "llama3", "factor": factor, "low_freq_factor": low, "high_freq_factor": high,
        "original_max_position_embeddings": original as usize,
    })))
}
