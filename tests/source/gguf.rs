//! GGUF files written by candle from tiny models, read back as the model that they came from.

use std::path::{Path, PathBuf};

use candle_core::{
    DType, Device, Tensor,
    quantized::{
        GgmlDType, QTensor,
        gguf_file::{self, Value},
    },
};
use insta::assert_snapshot;
use proptest::prelude::*;
use serde_json::json;
use tempfile::TempDir;
use tokenizers::Tokenizer;
use upcycle::source::Source;
use upcycle_architectures::Dtype;

use super::{open, reference};
use crate::support::models::{self, FFN, HIDDEN, LAYERS, VOCAB};

/// llama.cpp's name of a Hugging Face tensor outside the experts.
fn gguf_name(name: &str) -> String {
    [
        ("model.embed_tokens.", "token_embd."),
        ("model.norm.", "output_norm."),
        ("lm_head.", "output."),
        ("model.layers.", "blk."),
        ("input_layernorm", "attn_norm"),
        ("post_attention_layernorm", "ffn_norm"),
        ("self_attn.q_proj", "attn_q"),
        ("self_attn.k_proj", "attn_k"),
        ("self_attn.v_proj", "attn_v"),
        ("self_attn.o_proj", "attn_output"),
        ("self_attn.q_norm", "attn_q_norm"),
        ("self_attn.k_norm", "attn_k_norm"),
        ("block_sparse_moe.gate.", "ffn_gate_inp."),
        ("mlp.gate.", "ffn_gate_inp."),
        ("mlp.shared_expert_gate.", "ffn_gate_inp_shexp."),
        ("mlp.shared_expert.gate_proj", "ffn_gate_shexp"),
        ("mlp.shared_expert.up_proj", "ffn_up_shexp"),
        ("mlp.shared_expert.down_proj", "ffn_down_shexp"),
        ("mlp.gate_proj", "ffn_gate"),
        ("mlp.up_proj", "ffn_up"),
        ("mlp.down_proj", "ffn_down"),
    ]
    .iter()
    .fold(name.to_owned(), |name, (from, to)| name.replace(from, to))
}

/// The rows of q and k as `convert_hf_to_gguf.py` puts them: `reshape(heads, 2, hd / 2, in).swapaxes(1, 2)`.
fn permute(w: &Tensor, heads: usize) -> Tensor {
    let rows = w.dim(0).unwrap();
    let columns = w.elem_count() / rows;
    let split = w.reshape((heads, 2, rows / heads / 2, columns)).unwrap().transpose(1, 2).unwrap();
    split.contiguous().unwrap().reshape(w.shape()).unwrap()
}

pub(super) struct Fixture {
    pub(super) dir: TempDir,
}

impl Fixture {
    pub(super) fn hf(&self) -> PathBuf {
        self.dir.path().join("hf")
    }

    pub(super) fn gguf(&self) -> PathBuf {
        self.dir.path().join("model.gguf")
    }
}

/// A tiny model of the family as a directory, and as a GGUF of that architecture with matrices in `dtype`.
pub(super) fn fixture(family: &str, architecture: &str, dtype: GgmlDType, stacked: Stacking) -> Fixture {
    let fixture = Fixture { dir: tempfile::tempdir().unwrap() };
    let (config, tensors) = sparse(family).unwrap_or_else(|| (models::config(family), models::tensors(family)));
    models::write_with(&fixture.hf(), &config, &tensors, 1);
    let hf = open(fixture.hf()).unwrap();
    write(&fixture.gguf(), &hf, architecture, dtype, stacked, &[]);
    fixture
}

/// Good files: one of floats, one quantised and sparse.
pub fn examples() -> Vec<Vec<u8>> {
    let dense = fixture("llama", "llama", GgmlDType::F16, Stacking::PerExpert);
    let sparse = fixture("qwen3_moe", "qwen3moe", GgmlDType::Q8_0, Stacking::Stacked);
    [dense, sparse].map(|fixture| fs_err::read(fixture.gguf()).unwrap()).to_vec()
}

#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Stacking {
    /// One tensor per projection and layer.
    Stacked,
    /// Until April 2024.
    PerExpert,
}

const EXPERTS: usize = 3;
const EXPERT_FFN: usize = 64;

type Tensors = Vec<(String, Vec<usize>)>;

/// Config and tensors of a sparse family; `None` for a dense one.
pub(super) fn sparse(family: &str) -> Option<(serde_json::Value, Tensors)> {
    let (dense, block, names) = match family {
        "mixtral" => ("llama", "block_sparse_moe", ["w1", "w3", "w2"]),
        "qwen2_moe" => ("qwen2", "mlp", ["gate_proj", "up_proj", "down_proj"]),
        "qwen3_moe" => ("qwen3", "mlp", ["gate_proj", "up_proj", "down_proj"]),
        _ => return None,
    };
    let ffn = if family == "mixtral" { FFN } else { EXPERT_FFN };
    let mut config = models::config(dense);
    for (key, value) in [
        ("model_type", json!(family)),
        ("num_local_experts", json!(EXPERTS)),
        ("num_experts", json!(EXPERTS)),
        ("num_experts_per_tok", json!(2)),
        ("moe_intermediate_size", json!(ffn)),
        ("norm_topk_prob", json!(family == "qwen3_moe")),
    ] {
        config[key] = value;
    }
    let mut tensors = models::tensors(dense);
    tensors.retain(|(name, _)| !name.contains(".mlp."));
    for l in 0..LAYERS {
        let mut add = |name: &str, shape: &[usize]| tensors.push((format!("model.layers.{l}.{block}.{name}"), shape.to_vec()));
        add("gate.weight", &[EXPERTS, HIDDEN]);
        for e in 0..EXPERTS {
            for (name, shape) in names.iter().zip([[ffn, HIDDEN], [ffn, HIDDEN], [HIDDEN, ffn]]) {
                add(&format!("experts.{e}.{name}.weight"), &shape);
            }
        }
        if family == "qwen2_moe" {
            for (name, shape) in names.iter().zip([[32, HIDDEN], [32, HIDDEN], [HIDDEN, 32]]) {
                add(&format!("shared_expert.{name}.weight"), &shape);
            }
            add("shared_expert_gate.weight", &[1, HIDDEN]);
        }
    }
    if family == "qwen2_moe" {
        config["shared_expert_intermediate_size"] = json!(32);
    }
    Some((config, tensors))
}

/// Writes a GGUF of the model; `more` is added to the metadata, or replaces it.
fn write(file: &Path, hf: &Source, architecture: &str, dtype: GgmlDType, stacking: Stacking, more: &[(&str, Value)]) {
    let mut tensors: Vec<(String, Tensor)> = Vec::new();
    let mut names = hf.weights.names();
    names.sort();
    let read = |name: &str| hf.weights.read(name).unwrap().to_tensor(DType::F32, &Device::Cpu).unwrap();
    for name in names.iter().filter(|name| !name.contains(".experts.")) {
        let mut tensor = read(name);
        if architecture == "llama" {
            for (part, heads) in [("q_proj", hf.config.heads), ("k_proj", hf.config.kv_heads)] {
                if name.contains(part) {
                    tensor = permute(&tensor, heads);
                }
            }
        }
        if name.contains("shared_expert_gate") {
            tensor = tensor.flatten_all().unwrap();
        }
        tensors.push((gguf_name(name), tensor));
    }
    if hf.config.moe.is_some() {
        for l in 0..LAYERS {
            for (target, sources) in [("ffn_gate", ["w1", "gate_proj"]), ("ffn_up", ["w3", "up_proj"]), ("ffn_down", ["w2", "down_proj"])] {
                let is_expert = |name: &&String, e: usize| {
                    name.starts_with(&format!("model.layers.{l}."))
                        && sources.iter().any(|source| name.ends_with(&format!("experts.{e}.{source}.weight")))
                };
                let experts: Vec<_> = (0..EXPERTS).map(|e| read(names.iter().find(|name| is_expert(name, e)).unwrap())).collect();
                if stacking == Stacking::Stacked {
                    tensors.push((format!("blk.{l}.{target}_exps.weight"), Tensor::stack(&experts, 0).unwrap()));
                } else {
                    tensors.extend(experts.into_iter().enumerate().map(|(e, tensor)| (format!("blk.{l}.{target}.{e}.weight"), tensor)));
                }
            }
        }
    }
    let quantized: Vec<_> = tensors
        .iter()
        .map(|(name, tensor)| {
            let dtype = if tensor.rank() > 1 && !name.contains("ffn_gate_inp") { dtype } else { GgmlDType::F32 };
            (name.as_str(), QTensor::quantize(tensor, dtype).unwrap())
        })
        .collect();
    let config = &hf.config;
    let size = |n: usize| Value::U32(u32::try_from(n).unwrap());
    let mut metadata: Vec<(String, Value)> = [
        ("block_count", size(LAYERS)),
        ("context_length", size(config.max_positions)),
        ("embedding_length", size(HIDDEN)),
        ("feed_forward_length", size(config.ffn)),
        ("attention.head_count", size(config.heads)),
        ("attention.head_count_kv", size(config.kv_heads)),
        ("attention.key_length", size(config.head_dim)),
        ("attention.layer_norm_rms_epsilon", Value::F32(config.norm_eps as f32)),
        ("rope.freq_base", Value::F32(config.rope.theta as f32)),
    ]
    .map(|(key, value)| (format!("{architecture}.{key}"), value))
    .into();
    metadata.push(("general.architecture".into(), Value::String(architecture.into())));
    if let Some(moe) = &config.moe {
        metadata.push((format!("{architecture}.expert_count"), size(moe.experts)));
        metadata.push((format!("{architecture}.expert_used_count"), size(moe.top_k)));
    }
    metadata.extend(byte_level().map(|(key, value)| (format!("tokenizer.{key}"), value)));
    for (key, value) in more {
        metadata.retain(|(present, _)| present != key);
        metadata.push(((*key).to_owned(), value.clone()));
    }
    let metadata: Vec<_> = metadata.iter().map(|(key, value)| (key.as_str(), value)).collect();
    let tensors: Vec<_> = quantized.iter().map(|(name, tensor)| (*name, tensor)).collect();
    let mut out = std::io::BufWriter::new(fs_err::File::create(file).unwrap());
    gguf_file::write(&mut out, &metadata, &tensors).unwrap();
}

fn strings<S: AsRef<str>>(strings: &[S]) -> Value {
    Value::Array(strings.iter().map(|s| Value::String(s.as_ref().to_owned())).collect())
}

/// V tokens: three special ones, letters, and a few words made by merges.
fn byte_level() -> [(&'static str, Value); 8] {
    let mut tokens: Vec<String> = ["<s>", "</s>", "<|user|>", "Ġ", "Ċ"].map(str::to_owned).into();
    tokens.extend(('a'..='z').map(String::from));
    tokens.extend(('0'..='9').map(String::from));
    tokens.extend(["he", "ll", "hell", "hello", "Ġw", "12", "Ġhe"].map(str::to_owned));
    tokens.extend((tokens.len()..VOCAB).map(|i| format!("<unused{i}>")));
    let kind = |i| [3, 3, 4].get(i).copied().unwrap_or(1);
    let kinds = (0..VOCAB).map(|i| Value::I32(kind(i))).collect();
    [
        ("ggml.model", Value::String("gpt2".into())),
        ("ggml.pre", Value::String("smollm".into())),
        ("ggml.tokens", strings(&tokens)),
        ("ggml.token_type", Value::Array(kinds)),
        ("ggml.merges", strings(&["h e", "l l", "he ll", "hell o", "Ġ w", "1 2", "Ġ he"])),
        ("ggml.bos_token_id", Value::U32(0)),
        ("ggml.eos_token_id", Value::U32(1)),
        ("chat_template", Value::String("{{ messages }}".into())),
    ]
}

/// Every tensor has the same values.
fn assert_same_values(gguf: &Source, hf: &Source, tolerance: f32) {
    assert_eq!(gguf.weights.names().len(), hf.weights.names().len());
    for name in hf.weights.names() {
        let (a, b) = (gguf.weights.read(&name).unwrap(), hf.weights.read(&name).unwrap());
        assert_eq!(a.info.shape, b.info.shape, "{name}");
        assert_eq!(a.info.bytes(), a.data.len());
        for (a, b) in a.to_f32().iter().zip(b.to_f32()) {
            assert!((a - b).abs() <= tolerance, "{name}: {a} is not {b}");
        }
    }
}

#[test]
fn every_architecture_is_the_model_it_came_from() {
    for (family, architecture) in [
        ("llama", "llama"),
        ("mixtral", "llama"),
        ("qwen2", "qwen2"),
        ("qwen2_moe", "qwen2moe"),
        ("qwen3", "qwen3"),
        ("qwen3_moe", "qwen3moe"),
    ] {
        let fixture = fixture(family, architecture, GgmlDType::F32, Stacking::Stacked);
        let (gguf, hf) = (open(fixture.gguf()).unwrap(), open(fixture.hf()).unwrap());
        assert_eq!(gguf.family.model_type, family);
        assert_same_values(&gguf, &hf, 0.0);
        let mut config = gguf.config.clone();
        config.dtype = hf.config.dtype;
        config.eos.clone_from(&hf.config.eos);
        assert_eq!(config, hf.config, "{family}");
    }
}

#[test]
fn experts_with_tensors_of_their_own() {
    let fixture = fixture("mixtral", "llama", GgmlDType::F16, Stacking::PerExpert);
    assert_same_values(&open(fixture.gguf()).unwrap(), &open(fixture.hf()).unwrap(), 1e-3);
}

#[test]
fn floats_and_known_blocks_are_kept_and_others_decoded() {
    for (dtype, tolerance, reported) in [
        (GgmlDType::F16, 1e-3, Dtype::F16),
        (GgmlDType::BF16, 0.0, Dtype::Bf16),
        (GgmlDType::Q8_0, 0.002, Dtype::Q8_0),
        (GgmlDType::Q5_0, 0.03, Dtype::Q5_0),
        (GgmlDType::Q5_1, 0.02, Dtype::F32),
        (GgmlDType::Q4_0, 0.05, Dtype::Q4_0),
    ] {
        // Rows of F must be whole blocks of 32.
        let fixture = Fixture { dir: tempfile::tempdir().unwrap() };
        let mut config = models::config("llama");
        config["intermediate_size"] = json!(64);
        let mut tensors = models::tensors("llama");
        tensors.iter_mut().flat_map(|(_, shape)| shape).filter(|dim| **dim == FFN).for_each(|dim| *dim = 64);
        models::write_with(&fixture.hf(), &config, &tensors, 1);
        let hf = open(fixture.hf()).unwrap();
        write(&fixture.gguf(), &hf, "llama", dtype, Stacking::Stacked, &[]);
        let gguf = open(fixture.gguf()).unwrap();
        assert_same_values(&gguf, &hf, tolerance);
        assert_eq!(gguf.weights.info("model.layers.0.mlp.up_proj.weight").unwrap().dtype, reported);
        assert_eq!(gguf.weights.info("model.norm.weight").unwrap().dtype, Dtype::F32);
        assert_eq!(gguf.config.dtype, Some(reported.decoded()));
    }
}

#[test]
fn a_directory_with_one_gguf_is_that_model() {
    let fixture = fixture("llama", "llama", GgmlDType::F16, Stacking::Stacked);
    fs_err::remove_dir_all(fixture.hf()).unwrap();
    let source = open(fixture.dir.path()).unwrap();
    assert_eq!(source.location, fixture.gguf());
    assert_eq!(source.reference, reference(fixture.dir.path()));
}

fn tokenizer(source: &Source) -> Tokenizer {
    Tokenizer::from_bytes(source.sidecars["tokenizer.json"].read().unwrap()).unwrap()
}

fn pieces(tokenizer: &Tokenizer, text: &str) -> String {
    tokenizer.encode(text, true).unwrap().get_tokens().join(" ")
}

#[test]
fn a_byte_level_tokenizer_is_made() {
    let fixture = fixture("llama", "llama", GgmlDType::F16, Stacking::Stacked);
    let source = open(fixture.gguf()).unwrap();
    let made = tokenizer(&source);
    assert_snapshot!(pieces(&made, "hello world 12\n<|user|>hell</s>"), @"hello Ġw o r l d Ġ 1 2 Ċ <|user|> hell </s>");
    assert_eq!(made.decode(made.encode("hello world", true).unwrap().get_ids(), true).unwrap(), "hello world");
    // A pattern that keeps digits together, and one that begins with BOS by itself.
    let hf = open(fixture.hf()).unwrap();
    for (pre, expected) in [("qwen2", "1 2 hello"), ("llama-bpe", "<s> 12 hello"), ("gpt-2", "12 hello"), ("default", "12 hello")] {
        write(&fixture.gguf(), &hf, "llama", GgmlDType::F16, Stacking::Stacked, &[("tokenizer.ggml.pre", Value::String(pre.into()))]);
        assert_eq!(pieces(&tokenizer(&open(fixture.gguf()).unwrap()), "12hello"), expected, "{pre}");
    }
    let settings: serde_json::Value = serde_json::from_slice(&source.sidecars["tokenizer_config.json"].read().unwrap()).unwrap();
    assert_snapshot!(settings, @r#"{"tokenizer_class":"PreTrainedTokenizerFast","add_bos_token":false,"add_eos_token":false,"bos_token":"<s>","eos_token":"</s>","pad_token":null,"unk_token":null,"clean_up_tokenization_spaces":false,"model_max_length":128,"chat_template":"{{ messages }}"}"#);
}

#[test]
fn a_sentence_piece_tokenizer_is_made() {
    let fixture = fixture("llama", "llama", GgmlDType::F16, Stacking::Stacked);
    let hf = open(fixture.hf()).unwrap();
    let mut tokens: Vec<String> = ["<unk>", "<s>", "</s>", "<0xC3>", "<0xA4>"].map(str::to_owned).into();
    // Scores are minus the rank: `lo` is joined before `el`.
    tokens.extend(["▁h", "lo", "el", "▁hel", "▁hello", "▁", "h", "e", "l", "o"].map(str::to_owned));
    tokens.extend((tokens.len()..VOCAB).map(|i| format!("<unused{i}>")));
    let scores = (0..VOCAB).map(|i| Value::F32(if i < 5 { 0.0 } else { -(i as f32) })).collect();
    let kinds = (0..VOCAB)
        .map(|i| {
            Value::I32(match i {
                0 => 2,
                1 | 2 => 3,
                3 | 4 => 6,
                _ => 1,
            })
        })
        .collect();
    let more = [
        ("tokenizer.ggml.model", Value::String("llama".into())),
        ("tokenizer.ggml.tokens", strings(&tokens)),
        ("tokenizer.ggml.scores", Value::Array(scores)),
        ("tokenizer.ggml.token_type", Value::Array(kinds)),
        ("tokenizer.ggml.bos_token_id", Value::U32(1)),
        ("tokenizer.ggml.eos_token_id", Value::U32(2)),
        ("tokenizer.ggml.unknown_token_id", Value::U32(0)),
    ];
    write(&fixture.gguf(), &hf, "llama", GgmlDType::F16, Stacking::Stacked, &more);
    let made = tokenizer(&open(fixture.gguf()).unwrap());
    assert_snapshot!(pieces(&made, "hello hel ä</s>"), @"<s> ▁hello ▁hel ▁ <0xC3> <0xA4> </s>");
    assert_eq!(made.decode(made.encode("hello ä", true).unwrap().get_ids(), true).unwrap(), "hello ä");
}

#[test]
fn llama3_rope_is_recognised() {
    let fixture = fixture("llama", "llama", GgmlDType::F16, Stacking::Stacked);
    let mut config = models::config("llama");
    config["rope_scaling"] = json!({
        "rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192,
    });
    config["rope_theta"] = json!(500_000.0);
    fs_err::write(fixture.hf().join("config.json"), config.to_string()).unwrap();
    let hf = open(fixture.hf()).unwrap();
    // As `convert_hf_to_gguf.py` has them for theta 500000 and hd 8: wavelengths 6.28, 167, 4443, 118143.
    let smooth = (8192.0 / 4442.883 - 1.0) / 3.0;
    for (divisors, expected) in [([1.0, 1.0, 1.0 / ((1.0 - smooth) / 32.0 + smooth), 32.0], true), ([1.0, 2.0, 3.0, 4.0], false)] {
        let result = open_with_rope(&fixture, &hf, &divisors);
        assert_eq!(result.is_ok(), expected);
        match result {
            Ok(source) => assert_eq!(source.config.rope, hf.config.rope),
            Err(message) => {
                assert_snapshot!(message, @"`[GGUF]`: `rope_freqs.weight` is not that of Llama 3.1 to 3.3, and its parameters are not stored; use the original checkpoint");
            }
        }
    }
}

/// Opens the model with a `rope_freqs.weight`, which candle's writer takes as one tensor more.
fn open_with_rope(fixture: &Fixture, hf: &Source, divisors: &[f32]) -> Result<Source, String> {
    let file = fixture.gguf();
    write(&file, hf, "llama", GgmlDType::F16, Stacking::Stacked, &[]);
    let mut reader = std::io::BufReader::new(fs_err::File::open(&file).unwrap());
    let content = gguf_file::Content::read(&mut reader).unwrap();
    let mut tensors: Vec<_> =
        content.tensor_infos.keys().map(|name| (name.as_str(), content.tensor(&mut reader, name, &Device::Cpu).unwrap())).collect();
    let divisors = Tensor::new(divisors, &Device::Cpu).unwrap();
    tensors.push(("rope_freqs.weight", QTensor::quantize(&divisors, GgmlDType::F32).unwrap()));
    let metadata: Vec<_> = content.metadata.iter().map(|(key, value)| (key.as_str(), value)).collect();
    let tensors: Vec<_> = tensors.iter().map(|(name, tensor)| (*name, tensor)).collect();
    gguf_file::write(&mut fs_err::File::create(&file).unwrap(), &metadata, &tensors).unwrap();
    open(&file).map_err(|error| error.to_string().replace(file.to_str().unwrap(), "[GGUF]"))
}

#[test]
fn files_that_cannot_be_opened() {
    let fixture = fixture("llama", "llama", GgmlDType::F16, Stacking::Stacked);
    let file = fixture.gguf();
    let hf = open(fixture.hf()).unwrap();
    let good = fs_err::read(&file).unwrap();
    let say = || open(&file).err().expect("it opens").to_string().replace(file.to_str().unwrap(), "[GGUF]");
    let bytes = |change: &dyn Fn(&mut Vec<u8>)| {
        let mut bytes = good.clone();
        change(&mut bytes);
        fs_err::write(&file, bytes).unwrap();
        say()
    };
    let metadata = |key: &str, value: Value| {
        write(&file, &hf, "llama", GgmlDType::F16, Stacking::Stacked, &[(key, value)]);
        say()
    };
    assert_snapshot!(bytes(&|bytes| bytes.truncate(bytes.len() - 64)), @"`[GGUF]`: tensor `output_norm.weight`: it ends after the file's 42624 bytes; the file was cut short: fetch it again");
    assert_snapshot!(bytes(&|bytes| bytes.truncate(300)), @"`[GGUF]`: metadata `llama.attention.key_length`: its header claims 4 bytes at 297, but the file has 300; it was cut short: fetch it again");
    assert_snapshot!(bytes(&|bytes| bytes[4] = 1), @"`[GGUF]`: GGUF version 1 is not read, only 2 and 3; convert it anew with llama.cpp");
    assert_snapshot!(bytes(&|bytes| bytes[4..8].reverse()), @"`[GGUF]`: it is for big-endian machines; convert it for little-endian ones");
    assert_snapshot!(metadata("general.architecture", Value::String("gemma3".into())), @"`[GGUF]`: architecture `gemma3` is not supported in GGUF (supported: llama, qwen2, qwen2moe, qwen3, qwen3moe)");
    assert_snapshot!(metadata("llama.block_count", Value::U32(3)), @"`[GGUF]`: tensor `blk.2.attn_norm.weight` is missing");
    assert_snapshot!(metadata("llama.block_count", Value::U32(1)), @"`[GGUF]`: tensor `blk.1.attn_k.weight` has no place in a llama model");
    assert_snapshot!(metadata("llama.feed_forward_length", Value::U32(50)), @"`[GGUF]`: tensor `blk.0.ffn_gate.weight` has shape [48, 32], but the metadata makes it [50, 32]");
    assert_snapshot!(metadata("llama.embedding_length", Value::String("big".into())), @"`[GGUF]`: metadata `llama.embedding_length` is a string, not an integer");
    assert_snapshot!(metadata("tokenizer.ggml.pre", Value::String("klingon".into())), @"`[GGUF]`: `tokenizer.ggml.pre` is `klingon`, whose splitting pattern is not known here; use the model's Hugging Face directory");
    assert_snapshot!(metadata("tokenizer.ggml.model", Value::String("bert".into())), @"`[GGUF]`: tokenizer `bert` is not supported in GGUF (supported: gpt2, llama)");
    assert_snapshot!(metadata("tokenizer.ggml.merges", strings(&["a nothing"])), @"`[GGUF]`: metadata `tokenizer.ggml.merges` has `a nothing`, which joins no two tokens to a third");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(128))]

    #[test]
    fn mutated_files_never_panic(changes in prop::collection::vec((0usize..3000, any::<u8>()), 1..6)) {
        let fixture = fixture("llama", "llama", GgmlDType::F16, Stacking::Stacked);
        let mut bytes = fs_err::read(fixture.gguf()).unwrap();
        for (at, byte) in changes {
            bytes[at] = byte;
        }
        fs_err::write(fixture.gguf(), bytes).unwrap();
        if let Ok(source) = open(fixture.gguf()) {
            for name in source.weights.names() {
                let view = source.weights.read(&name).unwrap();
                prop_assert_eq!(view.info.bytes(), view.data.len());
            }
        }
    }
}
