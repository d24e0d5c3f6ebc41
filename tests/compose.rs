//! From recipe to checkpoint: every tensor's bytes, the config, shards, interruption, layouts.

use std::{
    collections::BTreeMap,
    panic::AssertUnwindSafe,
    path::{Path, PathBuf},
};

use half::bf16;
use safetensors::SafeTensors;
use serde_json::Value;
use tempfile::TempDir;
use upcycle::{
    plan::{self, Composite, Gates, Plan, PlanError, Sources},
    recipe::{self, Recipe},
    source::{self, OpenOptions},
    write::{self, Options, Silent, WriteError},
};
use upcycle_architectures::Weights as _;
use upcycle_routers::gate::Gate;

use crate::support::models;

/// Base and three experts of a family in a temporary directory.
pub struct Models {
    dir: TempDir,
}

impl Models {
    pub fn new(family: &str) -> Self {
        let dir = TempDir::new().unwrap();
        for (seed, name) in ["base", "a", "b", "c"].iter().enumerate() {
            models::write(&dir.path().join(name), family, seed as u64);
        }
        Self { dir }
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// A recipe over the models; `head` goes in front, `expert` after each expert's source.
    pub fn recipe(&self, head: &str, expert: &str) -> Recipe {
        let mut text = format!("base_model: {}\n{head}\nexperts:\n", self.path("base").display());
        for name in ["a", "b", "c"] {
            text += &format!("  - source_model: {}\n    positive_prompts: [w5 w{}]\n", self.path(name).display(), name.len());
            text += expert;
        }
        recipe::parse(&text, &self.path("recipe.yml"), &["identical-prompts".parse().unwrap()]).unwrap().0
    }
}

pub fn plan(recipe: &Recipe) -> Result<(Plan, Sources), PlanError> {
    let sources = Sources::open(recipe, |reference, _| source::open(reference, &OpenOptions::default())).unwrap();
    Ok((plan::plan(recipe, &sources, &[])?, sources))
}

pub fn composite(recipe: &Recipe) -> Composite {
    let (plan, sources) = plan(recipe).unwrap();
    let rows = recipe.experts.len() * models::HIDDEN;
    let weight = |l: usize| (0..rows).map(|i| (l * rows + i) as f32 / 64.0).collect();
    let gate = |l| Gate { experts: recipe.experts.len(), hidden: models::HIDDEN, weight: weight(l) };
    let routed = (0..models::LAYERS).map(gate).collect();
    plan::composite(plan, sources, Gates { routed, shared: Vec::new() }, None)
}

type Tensors = BTreeMap<String, (Vec<usize>, Vec<u8>)>;

/// Every tensor of every shard of a directory.
fn tensors(dir: &Path) -> Tensors {
    let mut all = Tensors::new();
    for entry in fs_err::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        if path.extension().is_some_and(|e| e == "safetensors") {
            let bytes = fs_err::read(&path).unwrap();
            for (name, view) in SafeTensors::deserialize(&bytes).unwrap().tensors() {
                let earlier = all.insert(name, (view.shape().to_vec(), view.data().to_vec()));
                assert!(earlier.is_none());
            }
        }
    }
    all
}

pub fn files(dir: &Path) -> BTreeMap<String, Vec<u8>> {
    let entries = fs_err::read_dir(dir).unwrap().map(|entry| entry.unwrap());
    entries.map(|entry| (entry.file_name().to_string_lossy().into_owned(), fs_err::read(entry.path()).unwrap())).collect()
}

fn written(composite: &Composite, recipe: &Recipe, out: &Path) -> Tensors {
    write::write(composite, recipe, out, &Options::default(), &Silent).unwrap();
    tensors(out)
}

/// (family, router, expert template with gate/up/down)
const LAYOUTS: [(&str, &str, &str, [&str; 3]); 4] = [
    ("llama", "block_sparse_moe.gate.weight", "block_sparse_moe.experts", ["w1", "w3", "w2"]),
    ("mistral", "block_sparse_moe.gate.weight", "block_sparse_moe.experts", ["w1", "w3", "w2"]),
    ("qwen2", "mlp.gate.weight", "mlp.experts", ["gate_proj", "up_proj", "down_proj"]),
    ("qwen3", "mlp.gate.weight", "mlp.experts", ["gate_proj", "up_proj", "down_proj"]),
];

#[test]
fn every_tensor_has_its_source_s_bytes() {
    for (family, router, expert, projections) in LAYOUTS {
        let models = Models::new(family);
        let recipe = models.recipe("gate_mode: random", "");
        let composite = composite(&recipe);
        let out = models.path("out");
        let mut written = written(&composite, &recipe, &out);
        let base = tensors(&models.path("base"));
        let experts: Vec<Tensors> = ["a", "b", "c"].iter().map(|name| tensors(&models.path(name))).collect();
        for l in 0..models::LAYERS {
            for (e, source) in experts.iter().enumerate() {
                for (theirs, ours) in ["gate_proj", "up_proj", "down_proj"].iter().zip(projections) {
                    let tensor = written.remove(&format!("model.layers.{l}.{expert}.{e}.{ours}.weight")).unwrap();
                    assert_eq!(tensor, source[&format!("model.layers.{l}.mlp.{theirs}.weight")], "{family} layer {l} expert {e} {ours}");
                }
            }
            let (shape, bytes) = written.remove(&format!("model.layers.{l}.{router}")).unwrap();
            assert_eq!(shape, [3, models::HIDDEN]);
            let expected: Vec<u8> = composite.gates().routed[l].weight.iter().flat_map(|v| bf16::from_f32(*v).to_le_bytes()).collect();
            assert_eq!(bytes, expected, "{family} gate {l}");
            if family == "qwen2" {
                for (name, shape) in [("gate_proj", [256, 32]), ("up_proj", [256, 32]), ("down_proj", [32, 256])] {
                    let null = written.remove(&format!("model.layers.{l}.mlp.shared_expert.{name}.weight")).unwrap();
                    assert_eq!(null, (shape.to_vec(), vec![0; 256 * 32 * 2]));
                }
                let null = written.remove(&format!("model.layers.{l}.mlp.shared_expert_gate.weight")).unwrap();
                assert_eq!(null, (vec![1, 32], vec![0; 64]));
            }
        }
        let shared: Tensors = base.into_iter().filter(|(name, _)| !name.contains(".mlp.")).collect();
        assert_eq!(written, shared, "{family}: what is left is the base's, and all of it");
        for name in ["tokenizer.json", "tokenizer_config.json", "generation_config.json"] {
            assert_eq!(fs_err::read(out.join(name)).unwrap(), fs_err::read(models.path("base").join(name)).unwrap());
        }
    }
}

#[test]
fn the_config_has_both_spellings_and_every_eos() {
    let models = Models::new("llama");
    let recipe = models.recipe("gate_mode: random", "");
    let (plan, _) = plan(&recipe).unwrap();
    let config = &plan.config_json;
    for (old, new) in [("num_local_experts", "num_experts"), ("torch_dtype", "dtype")] {
        assert_eq!(config[old], config[new], "{old}");
        assert!(!config[old].is_null(), "{old}");
    }
    assert_eq!(config["rope_theta"], config["rope_parameters"]["rope_theta"]);
    assert_eq!(config["rope_parameters"]["rope_type"], "default");
    assert_eq!(config["architectures"][0], "MixtralForCausalLM");
    assert_eq!(config["sliding_window"], Value::Null);
    assert_eq!(config["head_dim"], 8);
    assert_eq!(config["eos_token_id"], serde_json::json!([1, 2]), "config.json has 1, generation_config.json has 1 and 2");
}

#[test]
fn shards_are_cut_in_order_and_indexed() {
    let models = Models::new("llama");
    let recipe = models.recipe("gate_mode: random", "");
    let composite = composite(&recipe);
    let (whole, cut) = (models.path("whole"), models.path("cut"));
    let options = Options { shard_size: 20_000, ..Options::default() };
    let written_shards = write::write(&composite, &recipe, &cut, &options, &Silent).unwrap().shards;
    assert!(written_shards.len() > 2);
    assert_eq!(tensors(&cut), written(&composite, &recipe, &whole));
    let index: Value = serde_json::from_slice(&fs_err::read(cut.join("model.safetensors.index.json")).unwrap()).unwrap();
    assert_eq!(index["metadata"]["total_size"], composite.plan.bytes());
    for (name, file) in index["weight_map"].as_object().unwrap() {
        let bytes = fs_err::read(cut.join(file.as_str().unwrap())).unwrap();
        assert!(SafeTensors::deserialize(&bytes).unwrap().tensor(name).is_ok(), "{name} is in {file}");
    }
    for (file, bytes) in &written_shards[..written_shards.len() - 1] {
        // A header, and what pads it to a place within a block.
        assert!(*bytes < 20_000 + 2_000 + 4096, "{file} has {bytes} bytes");
    }
}

#[test]
fn an_interrupted_write_goes_on_and_ends_with_the_same_bytes() {
    let models = Models::new("llama");
    let recipe = models.recipe("gate_mode: random", "");
    let composite = composite(&recipe);
    let options = Options { shard_size: 20_000, ..Options::default() };
    let (whole, broken) = (models.path("whole"), models.path("broken"));
    let shards = write::write(&composite, &recipe, &whole, &options, &Silent).unwrap().shards;
    // Stops after the first shard, as a kill would.
    struct Stop;
    impl write::Progress for Stop {
        fn shard(&self, _: &str, _: u64) {
            panic!("killed");
        }
    }
    let killed = std::panic::catch_unwind(AssertUnwindSafe(|| write::write(&composite, &recipe, &broken, &options, &Stop)));
    assert!(killed.is_err());
    assert!(!broken.join("config.json").exists(), "an unfinished directory is no model");
    assert!(shards.iter().all(|(file, _)| !broken.join(file).exists()), "nothing unfinished has a final name");
    let resumed = write::write(&composite, &recipe, &broken, &options, &Silent).unwrap();
    assert!(resumed.found > 0);
    assert_eq!(files(&broken), files(&whole));
}

#[test]
fn a_changed_recipe_starts_over() {
    let models = Models::new("llama");
    let options = Options { shard_size: 20_000, ..Options::default() };
    let recipe = models.recipe("gate_mode: random", "");
    let (out, whole) = (models.path("out"), models.path("whole"));
    struct Stop;
    impl write::Progress for Stop {
        fn shard(&self, _: &str, _: u64) {
            panic!("killed");
        }
    }
    assert!(std::panic::catch_unwind(AssertUnwindSafe(|| write::write(&composite(&recipe), &recipe, &out, &options, &Stop))).is_err());
    let other = models.recipe("gate_mode: random\ndtype: float32", "");
    let resumed = write::write(&composite(&other), &other, &out, &options, &Silent).unwrap();
    assert_eq!(resumed.found, 0);
    write::write(&composite(&other), &other, &whole, &options, &Silent).unwrap();
    assert_eq!(files(&out), files(&whole));
}

#[test]
fn a_directory_with_something_else_in_it_is_refused() {
    let models = Models::new("llama");
    let recipe = models.recipe("gate_mode: random", "");
    let composite = composite(&recipe);
    let other = models.path("other");
    models::write(&other, "llama", 9);
    let before = files(&other);
    assert!(matches!(write::write(&composite, &recipe, &other, &Options::default(), &Silent), Err(WriteError::Occupied(_))));
    assert!(matches!(write::check_directory(&other, &Options::default()), Err(WriteError::Occupied(_))));
    assert_eq!(files(&other), before);
    let base = models.path("base");
    let before = files(&base);
    let overwrite = Options { overwrite: true, ..Options::default() };
    assert!(matches!(write::write(&composite, &recipe, &base, &overwrite, &Silent), Err(WriteError::Source(_))));
    assert_eq!(files(&base), before);
}

#[test]
fn the_same_bytes_on_any_number_of_threads() {
    let models = Models::new("qwen3");
    let recipe = models.recipe("gate_mode: random\nseed: 7", "    noise_scale: 0.1\n    residual_scale: 0.5\n");
    let outputs = [1, 2, 8].map(|threads| {
        let out = models.path(&format!("out{threads}"));
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        pool.install(|| write::write(&composite(&recipe), &recipe, &out, &Options::default(), &Silent)).unwrap();
        files(&out)
    });
    assert_eq!(outputs[0], outputs[1]);
    assert_eq!(outputs[0], outputs[2]);
    let unsynced = models.path("unsynced");
    write::write(&composite(&recipe), &recipe, &unsynced, &Options { sync: false, ..Options::default() }, &Silent).unwrap();
    assert_eq!(outputs[0], files(&unsynced));
}

#[test]
fn residual_scale_scales_the_down_projection_alone() {
    let models = Models::new("llama");
    let recipe = models.recipe("gate_mode: random", "    residual_scale: 0.3\n");
    let written = written(&composite(&recipe), &recipe, &models.path("out"));
    let source = tensors(&models.path("b"));
    let expert = |w: &str| &written[&format!("model.layers.1.block_sparse_moe.experts.1.{w}.weight")].1;
    assert_eq!(expert("w1"), &source["model.layers.1.mlp.gate_proj.weight"].1);
    let scaled: Vec<u8> = source["model.layers.1.mlp.down_proj.weight"]
        .1
        .chunks(2)
        .flat_map(|b| bf16::from_f32(bf16::from_le_bytes([b[0], b[1]]).to_f32() * 0.3).to_le_bytes())
        .collect();
    assert_eq!(expert("w2"), &scaled);
}

#[test]
fn noise_has_its_scale_and_follows_the_seed() {
    let models = Models::new("llama");
    let name = "model.layers.0.block_sparse_moe.experts.0.w1.weight";
    let read = |head: &str| {
        let recipe = models.recipe(head, "    noise_scale: 0.5\n");
        composite(&recipe).read(name).unwrap().to_f32()
    };
    let source = source::open(&models.recipe("gate_mode: random", "").experts[0].source_model, &OpenOptions::default()).unwrap();
    let clean = source.weights.read("model.layers.0.mlp.gate_proj.weight").unwrap().to_f32();
    let noisy = read("gate_mode: random\nseed: 1");
    let n = clean.len() as f64;
    let noise: Vec<f64> = noisy.iter().zip(&clean).map(|(a, b)| f64::from(a - b)).collect();
    let mean = noise.iter().sum::<f64>() / n;
    let deviation = (noise.iter().map(|z| (z - mean).powi(2)).sum::<f64>() / n).sqrt();
    assert!(mean.abs() < 0.06 && (deviation - 0.5).abs() < 0.05, "mean {mean}, deviation {deviation}");
    assert_eq!(noisy, read("gate_mode: random\nseed: 1"));
    assert_ne!(noisy, read("gate_mode: random\nseed: 2"));
}

#[test]
fn averaged_shared_weights_are_the_mean_of_the_experts() {
    let models = Models::new("llama");
    let recipe = models.recipe("gate_mode: random\nshared: average\ndtype: float32", "");
    let composite = composite(&recipe);
    for name in ["model.layers.1.self_attn.k_proj.weight", "model.norm.weight", "model.embed_tokens.weight", "lm_head.weight"] {
        let experts = ["a", "b", "c"].map(|e| {
            let bytes = &tensors(&models.path(e))[name].1;
            bytes.chunks(2).map(|b| bf16::from_le_bytes([b[0], b[1]]).to_f64()).collect::<Vec<_>>()
        });
        let mean = (0..experts[0].len()).map(|i| ((experts[0][i] + experts[1][i] + experts[2][i]) / 3.0) as f32);
        assert_eq!(composite.read(name).unwrap().to_f32(), mean.collect::<Vec<_>>(), "{name}");
    }
}

#[test]
fn the_fused_layout_stacks_the_classic_one() {
    for (family, _, expert, [gate, up, down]) in LAYOUTS {
        let models = Models::new(family);
        let classic_recipe = models.recipe("gate_mode: random", "");
        let fused_recipe = models.recipe("gate_mode: random\nlayout: fused", "");
        let classic = written(&composite(&classic_recipe), &classic_recipe, &models.path("classic"));
        let fused = written(&composite(&fused_recipe), &fused_recipe, &models.path("fused"));
        for l in 0..models::LAYERS {
            let one = |e: usize, w: &str| classic[&format!("model.layers.{l}.{expert}.{e}.{w}.weight")].1.clone();
            let gate_up: Vec<u8> = (0..3).flat_map(|e| [one(e, gate), one(e, up)].concat()).collect();
            let downs: Vec<u8> = (0..3).flat_map(|e| one(e, down)).collect();
            assert_eq!(fused[&format!("model.layers.{l}.mlp.experts.gate_up_proj")], (vec![3, 96, 32], gate_up));
            assert_eq!(fused[&format!("model.layers.{l}.mlp.experts.down_proj")], (vec![3, 32, 48], downs));
            assert!(fused.contains_key(&format!("model.layers.{l}.mlp.gate.weight")));
        }
        assert!(!fused.keys().any(|name| name.contains(".experts.0.")));
    }
}

#[test]
fn differences_that_cannot_be_composed_are_named() {
    let cases: [(&str, fn(&mut Value)); 5] = [
        ("`rope_theta` differs: 10000 in the base", |c| c["rope_theta"] = 500_000.0.into()),
        ("`rms_norm_eps` differs", |c| c["rms_norm_eps"] = 1e-6.into()),
        ("`hidden_act` differs", |c| c["hidden_act"] = "gelu".into()),
        ("`num_key_value_heads` differs: 2 in the base", |c| c["num_key_value_heads"] = 4.into()),
        ("model type differs: llama in the base", |c| c["model_type"] = "mistral".into()),
    ];
    for (message, change) in cases {
        let models = Models::new("llama");
        let mut config = models::config("llama");
        change(&mut config);
        fs_err::write(models.path("b").join("config.json"), config.to_string()).unwrap();
        let error = plan(&models.recipe("gate_mode: random", "")).map(|_| ()).unwrap_err().to_string();
        assert!(error.contains(message), "{error}");
        assert!(error.contains(&models.path("b").display().to_string()), "{error} names the expert");
    }
}

#[test]
fn two_vocabularies_are_refused_and_extra_tokens_are_not() {
    let models = Models::new("llama");
    let path = models.path("c").join("tokenizer.json");
    let text = fs_err::read_to_string(&path).unwrap();
    fs_err::write(&path, text.replace("\"w5\"", "\"x\"").replace("\"w6\"", "\"w5\"").replace("\"x\"", "\"w6\"")).unwrap();
    let error = plan(&models.recipe("gate_mode: random", "")).map(|_| ()).unwrap_err().to_string();
    assert!(error.contains("2 of 64 tokens") && error.contains("--allow vocabulary-mismatch"), "{error}");

    let mut json: Value = serde_json::from_str(&text).unwrap();
    json["added_tokens"].as_array_mut().unwrap().push(serde_json::json!({"id": 64, "content": "<extra>", "special": true}));
    fs_err::write(&path, json.to_string()).unwrap();
    let (plan, _) = plan(&models.recipe("gate_mode: random", "")).unwrap();
    assert!(plan.warnings.iter().any(|w| w.contains("`<extra>`")), "{:?}", plan.warnings);
}

#[test]
fn weights_that_are_not_finite_are_found() {
    let models = Models::new("llama");
    let path = models.path("b").join("model.safetensors");
    let mut bytes = fs_err::read(&path).unwrap();
    let end = bytes.len();
    bytes[end - 2..].copy_from_slice(&bf16::NAN.to_le_bytes());
    fs_err::write(&path, bytes).unwrap();
    // The last bytes of the file belong to an MLP or a norm, depending on names; average reads them all.
    let recipe = models.recipe("gate_mode: random\nshared: average", "");
    let composite = composite(&recipe);
    let error = write::write(&composite, &recipe, &models.path("out"), &Options::default(), &Silent).unwrap_err();
    assert!(matches!(&error, WriteError::NonFinite { origin, .. } if origin.contains(&models.path("b").display().to_string())), "{error}");
    let options = Options { allow_non_finite: true, ..Options::default() };
    write::write(&composite, &recipe, &models.path("out"), &options, &Silent).unwrap();
}
