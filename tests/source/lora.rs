//! Adapters, against the formula in f64.

use std::{collections::BTreeMap, path::Path};

use half::bf16;
use insta::assert_snapshot;
use rand::{Rng as _, SeedableRng as _};
use rand_chacha::ChaCha8Rng;
use safetensors::{Dtype, tensor::TensorView};
use serde_json::{Value, json};
use tempfile::TempDir;
use upcycle::{
    recipe::ModelRef,
    source::{self, OpenOptions, Source, SourceError},
};

use super::{model, open, reference};
use crate::support::models;

const DOWN: &str = "model.layers.1.mlp.down_proj";

type Tensors = BTreeMap<String, (Vec<usize>, Vec<f32>)>;

/// An adapter directory of these tensors, stored as f32.
fn write(config: &Value, tensors: &Tensors) -> TempDir {
    let dir = tempfile::tempdir().unwrap();
    let bytes: BTreeMap<_, Vec<u8>> =
        tensors.iter().map(|(name, (_, values))| (name, values.iter().flat_map(|v| v.to_le_bytes()).collect())).collect();
    let views = tensors.iter().map(|(name, (shape, _))| (name, TensorView::new(Dtype::F32, shape.clone(), &bytes[name]).unwrap()));
    safetensors::serialize_to_file(views, None, &dir.path().join("adapter_model.safetensors")).unwrap();
    fs_err::write(dir.path().join("adapter_config.json"), config.to_string()).unwrap();
    dir
}

fn random(shape: &[usize], seed: u64) -> (Vec<usize>, Vec<f32>) {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    (shape.to_vec(), (0..shape.iter().product()).map(|_| rng.random_range(-0.5..0.5)).collect())
}

/// A and B of rank `r` for one linear layer `[out, in]`.
fn pair(module: &str, r: usize, [out, inner]: [usize; 2]) -> Tensors {
    Tensors::from([
        (format!("base_model.model.{module}.lora_A.weight"), random(&[r, inner], 1)),
        (format!("base_model.model.{module}.lora_B.weight"), random(&[out, r], 2)),
    ])
}

fn down(r: usize) -> Tensors {
    pair(DOWN, r, [models::HIDDEN, models::FFN])
}

fn lora(r: usize, alpha: u32) -> Value {
    json!({"peft_type": "LORA", "r": r, "lora_alpha": alpha, "rank_pattern": {}, "alpha_pattern": {}, "fan_in_fan_out": false})
}

fn with(mut config: Value, key: &str, value: Value) -> Value {
    config[key] = value;
    config
}

fn merged(base: &Path, adapter: &TempDir) -> Result<Source, SourceError> {
    let reference = ModelRef { lora: Some(Box::new(reference(adapter))), ..reference(base) };
    source::open(&reference, &OpenOptions::default())
}

fn values(source: &Source, name: &str) -> Vec<f32> {
    source.weights.read(name).unwrap().to_f32()
}

/// Each element is the bf16 nearest to W + s B A computed in f64, or its neighbour where that lies between two.
fn assert_merged(base: &Source, merged: &Source, name: &str, tensors: &Tensors, scale: f64) {
    let (a, b) = (&tensors.values().next().unwrap(), &tensors.values().nth(1).unwrap());
    let (r, inner) = (a.0[0], a.0[1]);
    let (w, found) = (values(base, name), values(merged, name));
    assert_eq!(w.len(), found.len());
    for (i, (w, found)) in w.iter().zip(&found).enumerate() {
        let (row, column) = (i / inner, i % inner);
        let delta: f64 = (0..r).map(|k| f64::from(b.1[row * r + k]) * f64::from(a.1[k * inner + column])).sum();
        let expected = f64::from(*w) + scale * delta;
        assert!(
            (f64::from(*found) - expected).abs() <= expected.abs() / 256.0 + 1e-6,
            "{name}[{row}, {column}] is {found}, not {expected}"
        );
    }
}

fn check_scale(config: &Value, r: usize, scale: f64) {
    let base = model("llama");
    let tensors = down(r);
    let adapter = write(config, &tensors);
    let merged = merged(base.path(), &adapter).unwrap();
    assert_merged(&open(base.path()).unwrap(), &merged, &format!("{DOWN}.weight"), &tensors, scale);
}

#[test]
fn the_scale_is_alpha_over_rank() {
    check_scale(&lora(4, 12), 4, 3.0);
    check_scale(&with(lora(4, 12), "use_rslora", json!(true)), 4, 6.0);
    // PEFT ignores it for linear layers.
    check_scale(&with(lora(4, 12), "fan_in_fan_out", json!(true)), 4, 3.0);
}

#[test]
fn patterns_choose_rank_and_alpha_as_in_peft() {
    let patterns = |ranks: Value, alphas: Value| with(with(lora(4, 12), "rank_pattern", ranks), "alpha_pattern", alphas);
    check_scale(&patterns(json!({"down_proj": 2}), json!({})), 2, 6.0);
    check_scale(&patterns(json!({}), json!({"layers.1.mlp.down_proj": 2})), 4, 0.5);
    check_scale(&patterns(json!({r"^model\.layers\.\d+\.mlp\.down_proj": 3}), json!({"down_proj": 3})), 3, 1.0);
    // The first that fits; a part of a name does not.
    check_scale(&patterns(json!({"proj": 9, "layers.0.mlp.down_proj": 9, "mlp.down_proj": 2, "down_proj": 9}), json!({})), 2, 6.0);
}

#[test]
fn what_is_not_adapted_passes_through() {
    let base_dir = model("llama");
    let adapter = write(&lora(4, 4), &down(4));
    let (base, merged) = (open(base_dir.path()).unwrap(), merged(base_dir.path(), &adapter).unwrap());
    assert_eq!(merged.reference.to_string(), format!("{}+{}", base_dir.path().display(), adapter.path().display()));
    for name in base.weights.names() {
        let same = base.weights.read(&name).unwrap().data == merged.weights.read(&name).unwrap().data;
        assert_eq!(same, name != format!("{DOWN}.weight"), "{name}");
        assert_eq!(base.weights.info(&name), merged.weights.info(&name));
    }
}

#[test]
fn an_adapter_alone_is_merged_into_the_base_it_names_or_the_one_given() {
    let (base, other) = (model("llama"), tempfile::tempdir().unwrap());
    models::write(other.path(), "llama", 2);
    let tensors = down(4);
    let adapter = write(&with(lora(4, 4), "base_model_name_or_path", json!(base.path())), &tensors);
    let name = format!("{DOWN}.weight");
    assert_merged(&open(base.path()).unwrap(), &open(adapter.path()).unwrap(), &name, &tensors, 1.0);
    let options = OpenOptions { base: Some(reference(other.path())), ..OpenOptions::default() };
    let onto_other = source::open(&reference(adapter.path()), &options).unwrap();
    assert_merged(&open(other.path()).unwrap(), &onto_other, &name, &tensors, 1.0);
}

#[test]
fn names_with_the_adapters_name_are_understood() {
    let base = model("llama");
    let plain = down(4);
    let named = plain.iter().map(|(name, tensor)| (name.replace(".weight", ".default.weight"), tensor.clone())).collect();
    let adapter = write(&lora(4, 4), &named);
    assert_merged(&open(base.path()).unwrap(), &merged(base.path(), &adapter).unwrap(), &format!("{DOWN}.weight"), &plain, 1.0);
}

#[test]
fn saved_modules_and_biases_replace() {
    let base = model("qwen2");
    let (q_bias, norm, head) = (random(&[32], 3), random(&[models::HIDDEN], 4), random(&[models::VOCAB, models::HIDDEN], 5));
    let tensors = Tensors::from([
        ("base_model.model.model.layers.0.self_attn.q_proj.bias".into(), q_bias.clone()),
        ("base_model.model.model.layers.1.self_attn.q_proj.base_layer.bias".into(), q_bias.clone()),
        ("base_model.model.model.norm.modules_to_save.default.weight".into(), norm.clone()),
        ("base_model.model.lm_head.weight".into(), head.clone()),
    ]);
    let merged = merged(base.path(), &write(&with(lora(4, 4), "bias", json!("all")), &tensors)).unwrap();
    let rounded = |values: &[f32]| values.iter().map(|v| bf16::from_f32(*v).to_f32()).collect::<Vec<_>>();
    assert_eq!(values(&merged, "model.layers.0.self_attn.q_proj.bias"), rounded(&q_bias.1));
    assert_eq!(values(&merged, "model.layers.1.self_attn.q_proj.bias"), rounded(&q_bias.1));
    assert_eq!(values(&merged, "model.norm.weight"), rounded(&norm.1));
    assert_eq!(values(&merged, "lm_head.weight"), rounded(&head.1));
}

#[test]
fn an_embedding_is_adapted_with_its_factors_swapped() {
    let base = model("llama");
    let module = "base_model.model.model.embed_tokens";
    // A [r, V], B [D, r]: the change of W [V, D] is A^T B^T.
    let (a, b) = (random(&[2, models::VOCAB], 1), random(&[models::HIDDEN, 2], 2));
    let tensors = Tensors::from([(format!("{module}.lora_embedding_A"), a.clone()), (format!("{module}.lora_embedding_B"), b.clone())]);
    let merged = merged(base.path(), &write(&lora(2, 4), &tensors)).unwrap();
    let w = values(&open(base.path()).unwrap(), "model.embed_tokens.weight");
    for (i, found) in values(&merged, "model.embed_tokens.weight").into_iter().enumerate() {
        let (token, d) = (i / models::HIDDEN, i % models::HIDDEN);
        let delta: f32 = (0..2).map(|k| a.1[k * models::VOCAB + token] * b.1[d * 2 + k]).sum();
        let expected = w[i] + 2.0 * delta;
        assert!((found - expected).abs() <= expected.abs() / 256.0 + 1e-6);
    }
}

#[test]
fn a_layer_saved_below_its_lora_is_where_the_lora_starts() {
    let base = model("llama");
    let mut tensors = down(4);
    let own = random(&[models::HIDDEN, models::FFN], 9);
    tensors.insert(format!("base_model.model.{DOWN}.base_layer.weight"), own.clone());
    let merged = merged(base.path(), &write(&lora(4, 4), &tensors)).unwrap();
    tensors.remove(&format!("base_model.model.{DOWN}.base_layer.weight"));
    // The same LoRA on a base whose weight is the saved one.
    let plain = self::merged(base.path(), &write(&lora(4, 4), &tensors)).unwrap();
    let name = format!("{DOWN}.weight");
    let (w, merged, plain) = (values(&open(base.path()).unwrap(), &name), values(&merged, &name), values(&plain, &name));
    for i in 0..w.len() {
        let expected = own.1[i] + plain[i] - w[i];
        assert!((merged[i] - expected).abs() < 0.02, "{} is not {expected}", merged[i]);
    }
}

#[test]
fn dora_scales_rows_to_their_magnitude() {
    let base = model("llama");
    let mut tensors = down(4);
    let magnitude: Vec<f32> = (0..models::HIDDEN).map(|i| 1.0 + i as f32 / 8.0).collect();
    tensors.insert(format!("base_model.model.{DOWN}.lora_magnitude_vector"), (vec![models::HIDDEN], magnitude.clone()));
    let merged = merged(base.path(), &write(&with(lora(4, 4), "use_dora", json!(true)), &tensors)).unwrap();
    for (row, m) in values(&merged, &format!("{DOWN}.weight")).chunks_exact(models::FFN).zip(magnitude) {
        let norm = row.iter().map(|w| w * w).sum::<f32>().sqrt();
        assert!((norm / m - 1.0).abs() < 0.004, "{norm} is not {m}");
    }
}

#[test]
fn a_tied_head_is_untied_by_what_changes_it() {
    let base = tempfile::tempdir().unwrap();
    let config = with(models::config("llama"), "tie_word_embeddings", json!(true));
    let mut names = models::tensors("llama");
    names.retain(|(name, _)| name != "lm_head.weight");
    models::write_with(base.path(), &config, &names, 1);
    let tensors = pair("lm_head", 2, [models::VOCAB, models::HIDDEN]);
    let merged = merged(base.path(), &write(&lora(2, 2), &tensors)).unwrap();
    assert!(!merged.config.tied);
    assert_eq!(merged.config_json["tie_word_embeddings"], json!(false));
    assert!(merged.weights.names().contains(&"lm_head.weight".to_owned()));
    let untouched = open(base.path()).unwrap();
    assert_eq!(values(&untouched, "model.embed_tokens.weight"), values(&merged, "model.embed_tokens.weight"));
    let delta = merged.weights.read("lm_head.weight").unwrap().data != untouched.weights.read("model.embed_tokens.weight").unwrap().data;
    assert!(delta);
}

#[test]
fn a_tokenizer_beside_the_adapter_is_its_own() {
    let base = model("llama");
    let adapter = write(&lora(4, 4), &down(4));
    fs_err::write(adapter.path().join("tokenizer.json"), "{}").unwrap();
    let source = merged(base.path(), &adapter).unwrap();
    assert_eq!(source.sidecars.keys().collect::<Vec<_>>(), ["generation_config.json", "tokenizer.json"]);
    assert_eq!(source.sidecars["tokenizer.json"].read().unwrap(), b"{}");
}

#[test]
fn adapters_that_do_not_fit() {
    let say = |config: &Value, tensors: &Tensors| {
        let (base, adapter) = (model("llama"), write(config, tensors));
        let message = merged(base.path(), &adapter).err().expect("it opens").to_string();
        message.replace(adapter.path().to_str().unwrap(), "[LORA]").replace(base.path().to_str().unwrap(), "[BASE]")
    };
    let good = lora(4, 4);
    let half = |part: &str| down(4).into_iter().filter(|(name, _)| name.contains(part)).collect::<Tensors>();
    let one = |name: &str, shape: &[usize]| Tensors::from([(name.to_owned(), random(shape, 1))]);
    assert_snapshot!(say(&with(good.clone(), "peft_type", json!("IA3")), &down(4)), @"[LORA]/adapter_config.json: `peft_type` is IA3, only LORA adapters are merged; merge it with PEFT first");
    assert_snapshot!(say(&with(good.clone(), "init_lora_weights", json!("pissa_niter_4")), &down(4)), @"[LORA]/adapter_config.json: `init_lora_weights` is pissa_niter_4, which changed the base it was trained on; save it with `path_initial_model_for_weight_conversion`, or merge it with PEFT first");
    assert_snapshot!(say(&with(good.clone(), "rank_pattern", json!({"(down": 4})), &down(4)), @"`[LORA]/adapter_model.safetensors`: tensor `base_model.model.model.layers.1.mlp.down_proj.lora_A.weight`: `rank_pattern` has the key `(down`, which is no regular expression");
    assert_snapshot!(say(&with(good.clone(), "r", json!("many")), &down(4)), @r#"[LORA]/adapter_config.json: invalid type: string "many", expected usize"#);
    assert_snapshot!(say(&good, &down(8)), @"`[LORA]/adapter_model.safetensors`: tensor `base_model.model.model.layers.1.mlp.down_proj.lora_A.weight`: its A has shape [8, 48], expected [4, 48] (base tensor `model.layers.1.mlp.down_proj.weight` [32, 48]); is it for another base?");
    assert_snapshot!(say(&good, &pair(DOWN, 4, [models::FFN, models::HIDDEN])), @"`[LORA]/adapter_model.safetensors`: tensor `base_model.model.model.layers.1.mlp.down_proj.lora_A.weight`: its A has shape [4, 32], expected [4, 48] (base tensor `model.layers.1.mlp.down_proj.weight` [32, 48]); is it for another base?");
    assert_snapshot!(say(&good, &pair("model.layers.7.mlp.down_proj", 4, [32, 48])), @"`[LORA]/adapter_model.safetensors`: tensor `base_model.model.model.layers.7.mlp.down_proj.lora_A.weight`: the base has no tensor `model.layers.7.mlp.down_proj.weight`; is it for another model?");
    assert_snapshot!(say(&good, &half("lora_A")), @"`[LORA]/adapter_model.safetensors`: tensor `base_model.model.model.layers.1.mlp.down_proj.lora_A.weight`: its counterpart `lora_B` is missing");
    assert_snapshot!(say(&good, &half("lora_B")), @"`[LORA]/adapter_model.safetensors`: tensor `base_model.model.model.layers.1.mlp.down_proj.lora_B.weight`: its counterpart `lora_A` is missing");
    assert_snapshot!(say(&good, &one("base_model.model.model.norm.lora_C.weight", &[32])), @"`[LORA]/adapter_model.safetensors`: tensor `base_model.model.model.norm.lora_C.weight`: its name is none that PEFT gives to a LoRA");
    assert_snapshot!(say(&good, &one("base_model.model.model.embed_tokens.weight", &[65, 32])), @"`[LORA]/adapter_model.safetensors`: tensor `base_model.model.model.embed_tokens.weight`: it has shape [65, 32], expected [64, 32] (base tensor `model.embed_tokens.weight` [64, 32]); is it for another base?");
}

#[test]
fn references_of_the_wrong_kind() {
    let (base, adapter) = (model("llama"), write(&lora(4, 4), &down(4)));
    let say = |error: Option<SourceError>| {
        let message = error.expect("it opens").to_string();
        message.replace(adapter.path().to_str().unwrap(), "[LORA]").replace(base.path().to_str().unwrap(), "[BASE]")
    };
    assert_snapshot!(say(open(adapter.path()).err()), @"`[LORA]` is an adapter and does not say for which base; write BASE+[LORA]");
    let lora_is_model = ModelRef { lora: Some(Box::new(reference(base.path()))), ..reference(base.path()) };
    assert_snapshot!(say(source::open(&lora_is_model, &OpenOptions::default()).err()), @"`[BASE]` is a whole model, where an adapter (what stands behind `+`) is needed");
    let base_is_adapter = OpenOptions { base: Some(reference(adapter.path())), ..OpenOptions::default() };
    assert_snapshot!(say(source::open(&reference(adapter.path()), &base_is_adapter).err()), @"`[LORA]` is an adapter, where its base model is needed");
}
