//! Reading `config.json`: both spellings, every default that bites, and no panic whatever the file says.

use std::path::Path;

use proptest::prelude::*;
use serde_json::{Value, json};
use upcycle_architectures::{
    Config,
    config::{Activation, RopeScaling},
    detect,
};

fn golden() -> std::path::PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/golden/decoder")
}

fn parse(path: &Path) -> Value {
    serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
}

fn read(json: &Value) -> Config {
    detect(json).unwrap().1
}

fn error(json: &Value) -> String {
    detect(json).unwrap_err().to_string()
}

/// A small config of the family, with `more` laid over it; a null in `more` stays a null.
fn config(model_type: &str, more: &Value) -> Value {
    let mut json = json!({
        "model_type": model_type, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4,
        "num_key_value_heads": 2, "vocab_size": 64, "num_experts": 4, "moe_intermediate_size": 24, "shared_expert_intermediate_size": 40,
        "num_experts_per_tok": 2, "head_dim": 8,
    });
    for (key, value) in more.as_object().unwrap() {
        json[key] = value.clone();
    }
    json
}

#[test]
fn all_spellings_say_the_same() {
    let mut cases = 0;
    for case in std::fs::read_dir(golden()).unwrap().map(|entry| entry.unwrap().path()).filter(|path| path.is_dir()) {
        let [both, old, new] = ["config.json", "config.old.json", "config.new.json"].map(|name| read(&parse(&case.join(name))));
        assert_eq!(both, old, "{}", case.display());
        assert_eq!(both, new, "{}", case.display());
        cases += 1;
    }
    assert!(cases >= 30, "only {cases} cases");
}

#[test]
fn real_llama_3_1() {
    let config = read(&json!({
        "architectures": ["LlamaForCausalLM"], "attention_bias": false, "attention_dropout": 0.0, "bos_token_id": 128_000,
        "eos_token_id": [128_001, 128_008, 128_009], "hidden_act": "silu", "hidden_size": 4096, "initializer_range": 0.02,
        "intermediate_size": 14336, "max_position_embeddings": 131_072, "mlp_bias": false, "model_type": "llama",
        "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 8, "pretraining_tp": 1, "rms_norm_eps": 1e-05,
        "rope_scaling": {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192, "rope_type": "llama3"},
        "rope_theta": 500_000.0, "tie_word_embeddings": false, "torch_dtype": "bfloat16", "use_cache": true, "vocab_size": 128_256,
    }));
    assert_eq!((config.head_dim, config.kv_heads, config.bos), (128, 8, Some(128_000)));
    assert_eq!(config.eos, [128_001, 128_008, 128_009]);
    assert_eq!(config.rope.scaling, RopeScaling::Llama3 { factor: 8.0, low: 1.0, high: 4.0, original: 8192 });
}

#[test]
fn defaults_are_those_of_transformers() {
    let llama = read(
        &json!({"model_type": "llama", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 64}),
    );
    assert_eq!((llama.kv_heads, llama.head_dim, llama.max_positions), (4, 8, 2048));
    assert_eq!((llama.bos, llama.eos.as_slice(), llama.activation), (Some(1), &[2][..], Activation::Silu));
    assert!(!llama.tied && !llama.qkv_bias && !llama.o_bias && !llama.mlp_bias);

    assert_eq!(read(&config("mistral", &json!({}))).windows, [Some(4096); 4], "mistral 0.1 does not state its window");
    assert_eq!(read(&config("mistral", &json!({"sliding_window": null}))).windows, [None; 4]);
    assert_eq!(read(&config("mixtral", &json!({}))).windows, [None; 4]);
    assert_eq!(read(&config("mixtral", &json!({}))).rope.theta.to_bits(), 1e6f64.to_bits());

    let qwen2 = read(&config("qwen2", &json!({"sliding_window": 16, "max_window_layers": 1})));
    assert!(qwen2.qkv_bias && !qwen2.o_bias && qwen2.eos.is_empty());
    assert_eq!(qwen2.windows, [None; 4], "a window that is not in use");
    let slides = json!({"use_sliding_window": true, "sliding_window": 16, "max_window_layers": 1});
    assert_eq!(read(&config("qwen2", &slides)).windows, [None, Some(16), Some(16), Some(16)]);
    assert_eq!(read(&config("qwen2_moe", &slides)).windows, [Some(16), None, None, None]);
    assert_eq!(read(&config("qwen3_moe", &slides)).windows, [Some(16); 4]);

    let mut bare = config("qwen3", &json!({}));
    bare.as_object_mut().unwrap().remove("head_dim");
    assert_eq!(read(&bare).head_dim, 128);
    bare["head_dim"] = Value::Null;
    bare["model_type"] = json!("qwen2");
    assert_eq!(read(&bare).head_dim, 8);

    let sparse = read(&config("qwen3_moe", &json!({"decoder_sparse_step": 2, "mlp_only_layers": [3]}))).moe.unwrap();
    assert_eq!(sparse.sparse, [false, true, false, false]);
    assert!(!sparse.normalise && sparse.shared_ffn.is_none());
    assert_eq!(read(&config("qwen2_moe", &json!({"shared_expert_intermediate_size": 0}))).moe.unwrap().shared_ffn, None);
}

#[test]
fn rope_is_found_wherever_it_stands() {
    let su = json!({"rope_scaling": {"type": "su", "short_factor": [1, 1, 1, 1], "long_factor": [1, 2, 3, 4.5]},
        "original_max_position_embeddings": 64, "max_position_embeddings": 256});
    let RopeScaling::LongRope { long, original, attention_factor, .. } = read(&config("llama", &su)).rope.scaling else {
        panic!("not longrope")
    };
    assert_eq!((long, original), (vec![1.0, 2.0, 3.0, 4.5], 64));
    assert!((attention_factor - (1.0 + 4f64.ln() / 64f64.ln()).sqrt()).abs() < 1e-12);
    let theta = |more| read(&config("llama", &more)).rope.theta;
    assert!((theta(json!({"rope_theta": 5e5, "rope_scaling": null})) - 5e5).abs() < 1e-9);
    assert!((theta(json!({"rope_parameters": {"rope_type": "default", "rope_theta": 7e5}})) - 7e5).abs() < 1e-9);
}

#[test]
fn errors_name_key_found_and_expected() {
    let cases = [
        ("llama", json!({"hidden_size": null}), "`hidden_size` is missing"),
        ("llama", json!({"hidden_size": 0}), "`hidden_size` is 0, expected a whole number from 1 to 1048576"),
        ("llama", json!({"num_key_value_heads": 3}), "`num_key_value_heads` is 3, expected a divisor of num_attention_heads (4), not 3"),
        ("llama", json!({"hidden_act": "xielu"}), "`hidden_act` is \"xielu\", expected silu"),
        ("llama", json!({"torch_dtype": "int4"}), "`torch_dtype` is \"int4\""),
        ("llama", json!({"head_dim": 7}), "`head_dim` is 7 with partial_rotary_factor 1, expected an even number"),
        ("llama", json!({"rope_scaling": {"type": "mrope"}}), "`rope_scaling.type` is \"mrope\", expected default, linear"),
        ("llama", json!({"rope_scaling": {"type": "linear"}}), "`rope_scaling.factor` is missing"),
        ("llama", json!({"rope_parameters": {"full_attention": {}}}), "`rope_parameters.full_attention` is {}, expected absent"),
        ("llama", json!({"quantization_config": {"quant_method": "gptq"}}), "`quantization_config` is \"gptq\", expected none"),
        ("mixtral", json!({"num_experts_per_tok": 5}), "`num_experts_per_tok` is 5, expected at most the number of experts, 4"),
        ("mixtral", json!({"num_local_experts": 8}), "`num_experts` is 4, expected as num_local_experts says, 8"),
        (
            "qwen2",
            json!({"layer_types": ["full_attention"]}),
            "`layer_types` is [\"full_attention\"], expected one entry for each of 4 layers",
        ),
        ("qwen2", json!({"eos_token_id": -1}), "`eos_token_id` is -1, expected a token id"),
        ("gpt2", json!({}), "model type `gpt2` is not supported (supported: llama, mistral, "),
    ];
    for (family, more, expected) in cases {
        let message = error(&config(family, &more));
        assert!(message.contains(expected), "{message}\n  should contain {expected}");
    }
}

fn any_json() -> impl Strategy<Value = Value> {
    let leaf = prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        any::<u64>().prop_map(Value::from),
        any::<i64>().prop_map(Value::from),
        (0u64..70).prop_map(Value::from),
        any::<f64>().prop_map(Value::from),
        prop_oneof!["yarn", "longrope", "llama3", "dynamic", "linear", "sliding_attention", "gelu", ".{0,5}"].prop_map(Value::from),
    ];
    leaf.prop_recursive(2, 12, 6, |inner| {
        prop_oneof![
            prop::collection::vec(inner.clone(), 0..6).prop_map(Value::from),
            prop::collection::vec((prop::sample::select(KEYS), inner), 0..6)
                .prop_map(|pairs| pairs.into_iter().map(|(k, v)| (k.to_owned(), v)).collect()),
        ]
    })
}

const KEYS: &[&str] = &[
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "vocab_size",
    "max_position_embeddings",
    "rms_norm_eps",
    "hidden_act",
    "rope_theta",
    "rope_scaling",
    "rope_parameters",
    "rope_type",
    "type",
    "factor",
    "original_max_position_embeddings",
    "attention_factor",
    "beta_fast",
    "beta_slow",
    "mscale",
    "mscale_all_dim",
    "truncate",
    "short_factor",
    "long_factor",
    "low_freq_factor",
    "high_freq_factor",
    "partial_rotary_factor",
    "sliding_window",
    "use_sliding_window",
    "max_window_layers",
    "layer_types",
    "num_experts",
    "num_local_experts",
    "num_experts_per_tok",
    "decoder_sparse_step",
    "mlp_only_layers",
    "moe_intermediate_size",
    "shared_expert_intermediate_size",
    "norm_topk_prob",
    "attention_bias",
    "qkv_bias",
    "mlp_bias",
    "tie_word_embeddings",
    "eos_token_id",
    "bos_token_id",
    "dtype",
    "torch_dtype",
    "quantization_config",
];

proptest! {
    #[test]
    fn no_config_panics(family in prop::sample::select(&["llama", "mistral", "qwen2", "qwen3", "mixtral", "qwen2_moe", "qwen3_moe"][..]),
                        edits in prop::collection::vec((prop::sample::select(KEYS), any_json()), 0..5)) {
        let mut json = config(family, &json!({}));
        for (key, value) in edits {
            json[key] = value;
        }
        if let Ok((family, config)) = detect(&json) {
            // What was accepted can be counted.
            let parts = [config.layers, config.hidden, config.ffn, config.vocab, config.heads * config.head_dim];
            prop_assert!(parts.iter().all(|n| (1..=1 << 20).contains(n)));
            if config.layers <= 64 && config.moe.as_ref().is_none_or(|moe| moe.experts <= 64) {
                let bytes = family.tensors(&config).iter().try_fold(0usize, |sum, (role, shape)| {
                    prop_assert!(family.name(*role).is_some(), "{role:?} has no name");
                    let size = shape.iter().try_fold(4usize, |product, n| product.checked_mul(*n));
                    Ok(size.and_then(|size| sum.checked_add(size)).expect("overflow"))
                })?;
                prop_assert!(bytes > 0);
            }
        }
    }
}
