//! Tiny random models, written as a Hugging Face directory, and ways to take such a directory apart.

use std::{collections::BTreeMap, path::Path};

use half::bf16;
use rand::{Rng as _, SeedableRng as _};
use rand_chacha::ChaCha8Rng;
use safetensors::{Dtype, SafeTensors, tensor::TensorView};
use serde_json::{Map, Value, json};

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
    let mut vocab = Map::new();
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

/// Splits `model.safetensors` into two shards with an index; gives the shards' names.
pub fn shard(dir: &Path) -> [String; 2] {
    let bytes = fs_err::read(dir.join("model.safetensors")).unwrap();
    let tensors = SafeTensors::deserialize(&bytes).unwrap();
    let mut names = tensors.names();
    names.sort_unstable();
    let (first, second) = names.split_at(names.len() / 2);
    let mut weight_map = Map::new();
    let shards = [1, 2].map(|i| format!("model-0000{i}-of-00002.safetensors"));
    for (shard, names) in shards.iter().zip([first, second]) {
        let views = names.iter().map(|name| (*name, tensors.tensor(name).unwrap()));
        safetensors::serialize_to_file(views, None, &dir.join(shard)).unwrap();
        weight_map.extend(names.iter().map(|name| ((*name).to_owned(), shard.as_str().into())));
    }
    let index = json!({"metadata": {}, "weight_map": weight_map});
    fs_err::write(dir.join("model.safetensors.index.json"), index.to_string()).unwrap();
    fs_err::remove_file(dir.join("model.safetensors")).unwrap();
    shards
}

/// Rewrites `model.safetensors`.
pub fn rewrite(dir: &Path, change: impl FnOnce(&mut Vec<u8>)) {
    let file = dir.join("model.safetensors");
    let mut bytes = fs_err::read(&file).unwrap();
    change(&mut bytes);
    fs_err::write(file, bytes).unwrap();
}

/// Changes tensors of `model.safetensors` where they lie.
pub fn rewrite_tensors(dir: &Path, change: impl Fn(&str, &mut [u8])) {
    rewrite(dir, |bytes| {
        let start = 8 + usize::try_from(u64::from_le_bytes(*bytes.first_chunk().unwrap())).unwrap();
        let header: Value = serde_json::from_slice(&bytes[8..start]).unwrap();
        for (name, info) in header.as_object().unwrap().iter().filter(|(name, _)| *name != "__metadata__") {
            let offset = |at: usize| start + usize::try_from(info["data_offsets"][at].as_u64().unwrap()).unwrap();
            change(name, &mut bytes[offset(0)..offset(1)]);
        }
    });
}

/// Replaces the header of `model.safetensors`.
pub fn rewrite_header(dir: &Path, change: impl FnOnce(&mut Value)) {
    rewrite(dir, |bytes| {
        let length = usize::try_from(u64::from_le_bytes(*bytes.first_chunk().unwrap())).unwrap();
        let mut header = serde_json::from_slice(&bytes[8..8 + length]).unwrap();
        change(&mut header);
        let header = header.to_string();
        bytes.splice(..8 + length, (header.len() as u64).to_le_bytes().into_iter().chain(header.into_bytes()));
    });
}

/// Rewrites the index of shards.
pub fn rewrite_index(dir: &Path, change: impl FnOnce(&mut Value)) {
    let file = dir.join("model.safetensors.index.json");
    let mut index = serde_json::from_slice(&fs_err::read(&file).unwrap()).unwrap();
    change(&mut index);
    fs_err::write(file, index.to_string()).unwrap();
}
