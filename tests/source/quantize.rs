//! Models written as GGUF by our own writer and read back; the same types when weights are encoded as they are read.

use std::{path::Path, sync::Arc};

use candle_core::{DType, Device, quantized::GgmlDType};
use insta::assert_snapshot;
use serde_json::json;
use upcycle::{
    engine::tokenizer::{Specials, Tokenizer},
    inspect::perplexity::Window,
    quantize::{Importance, Mix, Quantised, Scheme, gather},
    source::Source,
    write::{
        Silent,
        gguf::{self, GgufError, Model, Written},
    },
};
use upcycle_architectures::{
    Dtype, View,
    decoder::{Decoder, Logits, NoProbe, Step},
};

use super::{
    gguf::{Fixture, Stacking, fixture, sparse},
    open,
};
use crate::support::models::{self, LAYERS};

const PLAIN: Scheme = Scheme { mix: Mix::Bf16, experts_only: false };

fn write_with(source: &Source, out: &Path, scheme: Scheme, importance: Option<&Importance>) -> Result<Written, GgufError> {
    let Source { family, config, weights, sidecars, .. } = source;
    gguf::write(&Model { name: "tiny", family, config, weights: &**weights, sidecars }, out, scheme, importance, &Silent)
}

fn write(source: &Source, out: &Path, scheme: Scheme) -> Source {
    write_with(source, out, scheme, None).unwrap();
    open(out).unwrap()
}

/// The tensors of `a` are those of `b`, byte for byte.
fn assert_same(a: &Source, b: &Source) {
    let mut names = a.weights.names();
    names.sort();
    for name in names {
        let (a, b) = (a.weights.read(&name).unwrap(), b.weights.read(&name).unwrap());
        assert_eq!((a.info, a.data), (b.info, b.data), "{name}");
    }
}

fn sidecar(source: &Source, name: &str) -> serde_json::Value {
    serde_json::from_slice(&source.sidecars[name].read().unwrap()).unwrap()
}

const FAMILIES: [(&str, &str); 6] = [
    ("llama", "llama"),
    ("qwen2", "qwen2"),
    ("qwen3", "qwen3"),
    ("mixtral", "llama"),
    ("qwen2_moe", "qwen2moe"),
    ("qwen3_moe", "qwen3moe"),
];

#[test]
fn what_is_written_is_what_is_read() {
    for (family, architecture) in FAMILIES {
        let fixture = fixture(family, architecture, GgmlDType::BF16, Stacking::Stacked);
        let given = open(fixture.gguf()).unwrap();
        let back = write(&given, &fixture.dir.path().join("again.gguf"), PLAIN);
        assert_eq!(back.config, given.config, "{family}");
        assert_same(&given, &back);
        assert_eq!(back.weights.names().len(), given.weights.names().len());
        for name in ["tokenizer.json", "tokenizer_config.json", "generation_config.json"] {
            let mut expected = sidecar(&given, name);
            if name == "tokenizer.json" {
                // `<|user|>`: as in llama.cpp's converter, what looks like a mark is one.
                expected["added_tokens"][2]["special"] = json!(true);
            }
            assert_eq!(sidecar(&back, name), expected, "{family}: {name}");
        }
        // Blocks of 32 fit rows of 32 and 64; those of 48 fall back, and what is in blocks already is copied.
        let q8_0 = write(&back, &fixture.dir.path().join("q8_0.gguf"), Scheme { mix: Mix::Q8_0, ..PLAIN });
        let dtype = |name: &str| q8_0.weights.info(name).unwrap().dtype;
        assert_eq!(dtype("model.layers.0.self_attn.q_proj.weight"), Dtype::Q8_0);
        assert_eq!(dtype("model.norm.weight"), Dtype::F32);
        if family == "llama" {
            assert_eq!(dtype("model.layers.1.mlp.down_proj.weight"), Dtype::F16);
        }
        assert_same(&q8_0, &write(&q8_0, &fixture.dir.path().join("copy.gguf"), Scheme { mix: Mix::Q8_0, ..PLAIN }));
    }
}

/// A tiny Hugging Face model of the family, its config and tokenizer changed.
fn changed(family: &str, change: impl FnOnce(&mut serde_json::Value)) -> Fixture {
    let fixture = fixture("llama", "llama", GgmlDType::F16, Stacking::Stacked);
    let tokenizer = open(fixture.gguf()).unwrap().sidecars["tokenizer.json"].read().unwrap();
    let (mut config, tensors) = sparse(family).unwrap_or_else(|| (models::config(family), models::tensors(family)));
    change(&mut config);
    models::write_with(&fixture.hf(), &config, &tensors, 1);
    fs_err::write(fixture.hf().join("tokenizer.json"), tokenizer).unwrap();
    fixture
}

fn logits(source: &Source) -> Vec<Vec<f32>> {
    let decoder = Decoder::load(source.family, &source.config, &*source.weights, DType::F32, &Device::Cpu).unwrap();
    let mut cache = decoder.cache();
    let mut step = [Step { tokens: &[3, 9, 27, 5, 40, 8], cache: &mut cache, logits: Logits::All }];
    decoder.forward(&mut step, &mut NoProbe).unwrap().to_vec2().unwrap()
}

fn assert_close(a: &[Vec<f32>], b: &[Vec<f32>]) {
    let furthest = a.iter().flatten().zip(b.iter().flatten()).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
    assert!(furthest < 1e-4, "{furthest}");
}

#[test]
fn qwen2_experts_without_a_shared_one_become_a_llama_that_normalises() {
    let fixture = changed("qwen2_moe", |config| config["norm_topk_prob"] = json!(true));
    // The shared expert adds nothing.
    let shared = |name: &str| name.contains("shared_expert.down_proj");
    models::rewrite_tensors(&fixture.hf(), |name, bytes| {
        if shared(name) {
            bytes.fill(0);
        }
    });
    let hf = open(fixture.hf()).unwrap();
    let out = fixture.dir.path().join("out.gguf");
    let back = write(&hf, &out, PLAIN);
    assert_eq!(back.config.model_type, "qwen2_moe");
    assert_eq!(back.config.moe.as_ref().map(|moe| (moe.normalise, moe.shared_ffn)), Some((true, None)));
    assert_close(&logits(&hf), &logits(&back));
    assert!(fs_err::read(&out).unwrap()[..400].windows(20).any(|text| text == b"general.architecture"));
}

#[test]
fn ropes_and_windows_come_back() {
    let scalings = [
        json!({"rope_type": "linear", "factor": 2.0}),
        json!({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, "beta_fast": 16.0, "attention_factor": 1.25}),
        json!({"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}),
    ];
    for scaling in scalings {
        let fixture = changed("mistral", |config| {
            config["rope_scaling"] = scaling.clone();
            config["sliding_window"] = json!(4);
        });
        let hf = open(fixture.hf()).unwrap();
        let back = write(&hf, &fixture.dir.path().join("out.gguf"), PLAIN);
        assert_eq!(back.config.windows, hf.config.windows);
        assert_close(&logits(&hf), &logits(&back));
    }
}

#[test]
fn weights_encoded_as_they_are_read_are_those_of_the_file() {
    for family in ["llama", "qwen3_moe"] {
        let fixture = changed(family, |_| {});
        let hf = open(fixture.hf()).unwrap();
        for mix in [Mix::Q8_0, Mix::Q4_0, Mix::F16] {
            let scheme = Scheme { mix, experts_only: false };
            let file = write(&hf, &fixture.dir.path().join("out.gguf"), scheme);
            let read = Quantised::new(hf.weights.clone(), hf.family, &hf.config, scheme);
            let read = Source { weights: Arc::new(read), ..open(fixture.hf()).unwrap() };
            for name in hf.weights.names().iter().filter(|name| !name.contains("norm") && !name.contains("mlp.gate.")) {
                let (a, b) = (read.weights.read(name).unwrap(), file.weights.read(name).unwrap());
                assert_eq!((&a.info, &a.data), (&b.info, &b.data), "{name}");
                assert_eq!(read.weights.info(name), Some(a.info));
            }
            assert_eq!(read.weights.info("model.norm.weight").unwrap().dtype, Dtype::Bf16, "norms stay what they are");
        }
    }
}

#[test]
fn experts_alone() {
    let fixture = changed("qwen3_moe", |_| {});
    let hf = open(fixture.hf()).unwrap();
    let back = write(&hf, &fixture.dir.path().join("out.gguf"), Scheme { mix: Mix::Q8_0, experts_only: true });
    let dtype = |name: &str| back.weights.info(name).unwrap().dtype;
    assert_eq!(dtype("model.layers.0.mlp.experts.1.up_proj.weight"), Dtype::Q8_0);
    assert_eq!(dtype("model.layers.0.self_attn.o_proj.weight"), Dtype::Bf16);
    assert_eq!(dtype("model.layers.0.mlp.gate.weight"), Dtype::F32);
}

#[test]
fn importance_is_gathered_kept_and_used() {
    let fixture = changed("mixtral", |_| {});
    let hf = open(fixture.hf()).unwrap();
    let decoder = Decoder::load(hf.family, &hf.config, &*hf.weights, DType::F32, &Device::Cpu).unwrap();
    let windows: Vec<_> = (0..4).map(|w| Window { tokens: (0..16).map(|i| (7 * w + 5 * i) % 64).collect(), prefix: 0 }).collect();
    let mut read = 0;
    let importance = gather(&decoder, &windows, &mut || read += 1).unwrap();
    assert_eq!(read, 4);
    let file = fixture.dir.path().join("imatrix.gguf");
    importance.write(&file, &["text".into()], 4, 16).unwrap();
    let kept = Importance::read(&file).unwrap();
    let path = |name: &str| fixture.dir.path().join(name);
    // Each layer has q, k, v, o and three stacks; the embedding and the head are quantised by their values alone.
    let scheme = Scheme { mix: Mix::Q4_0, experts_only: false };
    let written = write_with(&hf, &path("with.gguf"), scheme, Some(&kept)).unwrap();
    assert_eq!(written.unknown, 0);
    write_with(&hf, &path("direct.gguf"), scheme, Some(&importance)).unwrap();
    let plain = write_with(&hf, &path("without.gguf"), scheme, Some(&Importance::default())).unwrap();
    assert_eq!(plain.unknown, LAYERS * 6, "the down projections' rows of 48 fit no blocks");
    let bytes = |name: &str| fs_err::read(path(name)).unwrap();
    assert!(bytes("with.gguf") != bytes("without.gguf"));
    // Kept in f32, the sums round; what that changes in the blocks is next to nothing.
    let changed = bytes("with.gguf").iter().zip(bytes("direct.gguf")).filter(|(a, b)| *a != b).count();
    assert!(changed < 50, "{changed}");
    assert!(Importance::read(&path("with.gguf")).unwrap_err().to_string().contains("it holds no `in_sum2`"));
}

#[test]
fn what_cannot_be_written() {
    let say = |fixture: &Fixture| {
        let out = fixture.dir.path().join("out.gguf");
        let error = write_with(&open(fixture.hf()).unwrap(), &out, PLAIN, None).unwrap_err().to_string();
        let names: Vec<_> = fs_err::read_dir(fixture.dir.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        assert!(!names.iter().any(|name| name.to_string_lossy().contains("out.gguf")), "{names:?}");
        error
    };
    assert_snapshot!(say(&changed("llama", |config| config["hidden_act"] = json!("gelu"))), @"this model cannot be written to GGUF: its MLPs use Gelu; llama.cpp has SiLU for this family");
    assert_snapshot!(say(&changed("llama", |config| config["rope_scaling"] = json!({"rope_type": "dynamic", "factor": 2.0}))), @"this model cannot be written to GGUF: its rope is stretched with the text's length (`dynamic`), which llama.cpp does not do");
    let damaged = changed("llama", |_| {});
    models::rewrite_tensors(&damaged.hf(), |name, bytes| {
        if name.contains("1.mlp.up") {
            bytes[..2].copy_from_slice(&[0xc0, 0x7f]);
        }
    });
    assert_snapshot!(say(&damaged), @"tensor `blk.1.ffn_up.weight` has NaN or infinite values; the model is damaged: fetch it or compose it again");
    let words = changed("llama", |_| {});
    models::write(&words.hf(), "llama", 1);
    assert_snapshot!(say(&words), @"this model cannot be written to GGUF: its tokenizer is neither byte-level BPE nor SentencePiece's BPE, which are all that GGUF files hold here");
    let out = damaged.dir.path().join("there.gguf");
    fs_err::write(&out, "").unwrap();
    assert!(matches!(gguf::check(&out, false), Err(GgufError::Occupied(_))) && gguf::check(&out, true).is_ok());
}

#[test]
fn tokenizers_come_back() {
    let fixture = changed("llama", |_| {});
    let byte_level = sidecar(&open(fixture.hf()).unwrap(), "tokenizer.json");
    let pieces = json!({
        "version": "1.0", "added_tokens": [
            {"id": 0, "content": "<unk>", "special": true, "single_word": false, "lstrip": false, "rstrip": false, "normalized": false},
            {"id": 1, "content": "<s>", "special": true, "single_word": false, "lstrip": false, "rstrip": false, "normalized": false}],
        "normalizer": {"type": "Sequence", "normalizers": [
            {"type": "Prepend", "prepend": "▁"}, {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}]},
        "pre_tokenizer": null, "post_processor": null,
        "decoder": {"type": "Sequence", "decoders": [
            {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}, {"type": "ByteFallback"}, {"type": "Fuse"},
            {"type": "Strip", "content": " ", "start": 1, "stop": 0}]},
        "model": {
            "type": "BPE", "unk_token": "<unk>", "byte_fallback": true, "fuse_unk": true,
            "vocab": {"<unk>": 0, "<s>": 1, "<0xC3>": 2, "<0xA4>": 3, "▁": 4, "h": 5, "e": 6, "l": 7, "o": 8, "lo": 9, "el": 10, "▁h": 11, "▁hel": 12, "▁hello": 13},
            "merges": ["▁ h", "l o", "e l", "▁h el", "▁hel lo"],
        },
    });
    let mut llama3 = byte_level.clone();
    llama3["pre_tokenizer"]["pretokenizers"] = json!([
        {"type": "Split", "behavior": "Isolated", "invert": false, "pattern": {"Regex":
            "(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}{1,3}| ?[^\\s\\p{L}\\p{N}]+[\\r\\n]*|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+"}},
        {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": false}]);
    llama3["model"]["ignore_merges"] = json!(true);
    llama3["post_processor"] = json!({
        "type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
        "special_tokens": {"<s>": {"id": "<s>", "ids": [0], "tokens": ["<s>"]}}});
    for tokenizer in [byte_level, pieces, llama3] {
        fs_err::write(fixture.hf().join("tokenizer.json"), tokenizer.to_string()).unwrap();
        let hf = open(fixture.hf()).unwrap();
        let back = write(&hf, &fixture.dir.path().join("out.gguf"), PLAIN);
        let encode =
            |source: &Source, text: &str| Tokenizer::open(&source.sidecars, &source.config).unwrap().encode(text, Specials::Add).unwrap();
        for text in ["hello hel 1234 ä", "  hello\n", "<s>hello"] {
            assert_eq!(encode(&back, text), encode(&hf, text), "{text:?}");
        }
        assert_eq!(Tokenizer::open(&back.sidecars, &back.config).unwrap().eos(), Tokenizer::open(&hf.sidecars, &hf.config).unwrap().eos());
    }
    let mut odd = sidecar(&open(fixture.hf()).unwrap(), "tokenizer.json");
    odd["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = json!("[a-z]+");
    fs_err::write(fixture.hf().join("tokenizer.json"), odd.to_string()).unwrap();
    let error = write_with(&open(fixture.hf()).unwrap(), &fixture.dir.path().join("odd.gguf"), PLAIN, None).unwrap_err();
    assert_snapshot!(error, @"this model cannot be written to GGUF: its tokenizer splits texts by a pattern for which no name of llama.cpp's is known here: [a-z]+");
}

#[test]
fn views_encode_and_refuse() {
    let view = View::from_f32(&[0.5; 64], Dtype::Bf16, vec![2, 32]).unwrap();
    let blocks = view.cast(Dtype::Q8_0).unwrap();
    assert_eq!((blocks.info.bytes(), blocks.data.len()), (68, 68));
    assert!(blocks.to_f32().iter().all(|value| (value - 0.5).abs() < 1e-3));
    assert!(view.cast(Dtype::Q4K).is_err());
}
