//! Tiny random models, written as a Hugging Face directory.

use std::{collections::BTreeMap, path::Path};

use half::bf16;
use rand::{Rng as _, SeedableRng as _};
use rand_chacha::ChaCha8Rng;
use safetensors::{Dtype, tensor::TensorView};
use serde_json::{Value, json};

/// Sizes of the tiny models: L 2, D 32, F 48, H 4 over 2 key/value heads, V 64.
pub const LAYERS: usize = 2;
/// D
pub const HIDDEN: usize = 32;
/// F
pub const FFN: usize = 48;
/// V
pub const VOCAB: usize = 64;

/// `config.json` of a tiny dense model of the family (`llama`, `mistral`, `qwen2`, `qwen3`).
pub fn config(model_type: &str) -> Value {
    let architecture = match model_type {
        "mistral" => "MistralForCausalLM",
        "qwen2" => "Qwen2ForCausalLM",
        "qwen3" => "Qwen3ForCausalLM",
        _ => "LlamaForCausalLM",
    };
    json!({
        "architectures": [architecture], "model_type": model_type, "hidden_size": HIDDEN, "intermediate_size": FFN,
        "num_hidden_layers": LAYERS, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "hidden_act": "silu",
        "max_position_embeddings": 128, "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "vocab_size": VOCAB,
        "tie_word_embeddings": false, "bos_token_id": 0, "eos_token_id": 1, "torch_dtype": "bfloat16",
    })
}

/// Names and shapes of that model's tensors.
pub fn tensors(model_type: &str) -> Vec<(String, Vec<usize>)> {
    let mut all = vec![("model.embed_tokens.weight".into(), vec![VOCAB, HIDDEN])];
    for l in 0..LAYERS {
        let mut add = |name: &str, shape: &[usize]| all.push((format!("model.layers.{l}.{name}"), shape.to_vec()));
        add("input_layernorm.weight", &[HIDDEN]);
        for (name, out) in [("q", 32), ("k", 16), ("v", 16)] {
            add(&format!("self_attn.{name}_proj.weight"), &[out, HIDDEN]);
            if model_type == "qwen2" {
                add(&format!("self_attn.{name}_proj.bias"), &[out]);
            }
        }
        if model_type == "qwen3" {
            add("self_attn.q_norm.weight", &[8]);
            add("self_attn.k_norm.weight", &[8]);
        }
        add("self_attn.o_proj.weight", &[HIDDEN, 32]);
        add("post_attention_layernorm.weight", &[HIDDEN]);
        add("mlp.gate_proj.weight", &[FFN, HIDDEN]);
        add("mlp.up_proj.weight", &[FFN, HIDDEN]);
        add("mlp.down_proj.weight", &[HIDDEN, FFN]);
    }
    all.push(("model.norm.weight".into(), vec![HIDDEN]));
    all.push(("lm_head.weight".into(), vec![VOCAB, HIDDEN]));
    all
}

/// Writes a random bf16 model of the family into `dir` (created): config, one safetensors file, tokenizer, generation config.
pub fn write(dir: &Path, model_type: &str, seed: u64) {
    write_with(dir, &config(model_type), &tensors(model_type), seed);
}

/// The same from an edited config and tensor list.
pub fn write_with(dir: &Path, config: &Value, tensors: &[(String, Vec<usize>)], seed: u64) {
    fs_err::create_dir_all(dir).unwrap();
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let data: BTreeMap<&str, (Vec<u8>, &[usize])> = tensors
        .iter()
        .map(|(name, shape)| {
            let center = if name.contains("norm") { 1.0 } else { 0.0 };
            let bytes = (0..shape.iter().product()).flat_map(|_| bf16::from_f32(center + rng.random_range(-0.3..0.3)).to_le_bytes());
            (name.as_str(), (bytes.collect(), shape.as_slice()))
        })
        .collect();
    let views = data.iter().map(|(name, (bytes, shape))| (*name, TensorView::new(Dtype::BF16, shape.to_vec(), bytes).unwrap()));
    let metadata = Some(std::collections::HashMap::from([("format".to_owned(), "pt".to_owned())]));
    safetensors::serialize_to_file(views, metadata, &dir.join("model.safetensors")).unwrap();
    fs_err::write(dir.join("config.json"), serde_json::to_vec_pretty(config).unwrap()).unwrap();
    fs_err::write(dir.join("generation_config.json"), r#"{"bos_token_id": 0, "eos_token_id": [1, 2]}"#).unwrap();
    fs_err::write(dir.join("tokenizer.json"), tokenizer().to_string()).unwrap();
    let tokenizer_config = json!({
        "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>", "model_max_length": 128,
        "chat_template": "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}",
    });
    fs_err::write(dir.join("tokenizer_config.json"), tokenizer_config.to_string()).unwrap();
}

/// A word-level tokenizer of V entries: `<s>`, `</s>`, `<unk>`, then `w3` to `w63`, split at white space.
fn tokenizer() -> Value {
    let mut vocab = serde_json::Map::new();
    for (id, token) in ["<s>", "</s>", "<unk>"].into_iter().map(str::to_owned).chain((3..VOCAB).map(|i| format!("w{i}"))).enumerate() {
        vocab.insert(token, id.into());
    }
    let special = |id: usize, content: &str| json!({"id": id, "content": content, "single_word": false, "lstrip": false, "rstrip": false, "normalized": false, "special": true});
    json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": [special(0, "<s>"), special(1, "</s>"), special(2, "<unk>")],
        "normalizer": null, "pre_tokenizer": {"type": "WhitespaceSplit"}, "post_processor": null, "decoder": null,
        "model": {"type": "WordLevel", "vocab": vocab, "unk_token": "<unk>"},
    })
}
