//! Gates as mergekit-moe makes them, from the bundled base, and what is said of bad prompts.

use std::{collections::BTreeMap, path::Path};

use candle_core::{DType, Device};
use safetensors::SafeTensors;
use upcycle::{
    calibrate::{CalibrateError, Calibrated, gates},
    recipe::{self, Recipe},
    source::{self, OpenOptions, Source},
};
use upcycle_architectures::{
    Dtype, TensorInfo, View,
    decoder::{Decoder, DecoderError},
};

use crate::support::models;

fn parse(text: &str) -> Recipe {
    recipe::parse(text, Path::new("recipe.yml"), &[]).unwrap().0
}

fn open(recipe: &Recipe) -> Source {
    source::open(&recipe.base_model, &OpenOptions::default()).unwrap()
}

fn load(base: &Source) -> Result<Decoder, DecoderError> {
    Decoder::load(base.family, &base.config, &*base.weights, DType::F32, &Device::Cpu)
}

fn run(recipe: &Recipe) -> Result<Calibrated, CalibrateError> {
    let base = open(recipe);
    gates(recipe, &base, || load(&base))
}

/// A row's cosine with mergekit's, and the greatest difference of an element.
struct Deviation {
    layer: usize,
    cosine: f32,
    most: f32,
}

/// Compares all rows with `tests/golden/gates/CASE.safetensors`, which `scripts/gates.py` made.
fn compare(case: &str) -> Vec<Deviation> {
    let path = format!("tests/golden/gates/{case}");
    let mut recipe = recipe::read(Path::new(&format!("{path}.yml")), &[]).unwrap().0;
    recipe.seed = Some(42);
    let gates = run(&recipe).unwrap().gates;
    let bytes = fs_err::read(format!("{path}.safetensors")).unwrap();
    let golden = SafeTensors::deserialize(&bytes).unwrap();
    let mut ours = BTreeMap::new();
    for (kind, gates) in [("gate", &gates.routed), ("shared_gate", &gates.shared)] {
        ours.extend(gates.iter().enumerate().map(|(layer, gate)| (format!("{kind}.{layer}"), (layer, &gate.weight))));
    }
    assert_eq!(ours.keys().map(String::as_str).collect::<Vec<_>>(), sorted(golden.names()));
    let mut deviations = Vec::new();
    for (name, (layer, ours)) in ours {
        let tensor = golden.tensor(&name).unwrap();
        let dtype = Dtype::parse(&format!("{:?}", tensor.dtype())).unwrap();
        let info = TensorInfo { dtype, shape: tensor.shape().to_vec() };
        let theirs = View { info, data: tensor.data().to_vec().into() }.to_f32();
        // what would be written
        let ours = View::from_f32(ours, dtype, tensor.shape().to_vec()).unwrap().to_f32();
        assert_eq!(ours.len(), theirs.len());
        for (a, b) in ours.chunks(tensor.shape()[1]).zip(theirs.chunks(tensor.shape()[1])) {
            let dot = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f32>();
            let most = a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
            deviations.push(Deviation { layer, cosine: dot(a, b) / (dot(a, a) * dot(b, b)).sqrt(), most });
        }
    }
    deviations
}

fn sorted(mut names: Vec<&str>) -> Vec<&str> {
    names.sort_unstable();
    names
}

#[track_caller]
fn assert_states_agree(case: &str) {
    for Deviation { layer, cosine, most } in compare(case) {
        // What enters layer 0 are embeddings, so nothing was computed that could round differently.
        let (least, bound) = if layer == 0 { (0.999_999, 0.0) } else { (0.9999, 0.004) };
        assert!(cosine >= least && most <= bound, "{case}: layer {layer}: cosine {cosine}, greatest difference {most}");
    }
}

#[test]
fn hidden_agrees_with_mergekit() {
    assert_states_agree("hidden");
}

#[test]
fn hidden_with_negative_prompts_and_a_shared_expert_agrees_with_mergekit() {
    assert_states_agree("hidden_negative_shared");
}

#[test]
fn hidden_avg_agrees_with_mergekit_padding_included() {
    assert_states_agree("hidden_avg_negative");
}

#[test]
fn cheap_embed_agrees_with_mergekit() {
    assert!(compare("cheap_embed_negative_shared").iter().all(|deviation| deviation.most <= 1e-7));
}

#[test]
fn drawn_gates_agree_with_mergekit() {
    assert!(compare("random").iter().all(|deviation| deviation.most <= 2e-6));
    assert!(compare("uniform_random").iter().all(|deviation| deviation.most <= 1e-8));
}

/// Two experts of the bundled base with one prompt each.
fn two(head: &str, first: &str, second: &str) -> Recipe {
    let expert = |name, prompt| format!("  - source_model: demo/{name}\n    positive_prompts: [{prompt:?}]\n");
    let head = with_mode(head);
    parse(&format!("base_model: demo/base\n{head}\nexperts:\n{}{}", expert("code", first), expert("math", second)))
}

#[test]
fn only_states_need_a_decoder() {
    for mode in ["cheap_embed", "random", "uniform_random"] {
        let recipe = two(&format!("gate_mode: {mode}"), "one", "two");
        let none = || panic!("{mode} needs no decoder");
        let gates = gates(&recipe, &open(&recipe), none).unwrap().gates;
        assert_eq!((gates.routed.len(), gates.routed[0].weight.len(), gates.shared.len()), (4, 2 * 256, 0), "{mode}");
    }
}

#[test]
fn permuting_the_experts_permutes_the_gates() {
    let (a, b) = ("import os", "Problem: Compute 17 * 24.");
    let (straight, turned) = (run(&two("", a, b)).unwrap().gates, run(&two("", b, a)).unwrap().gates);
    for (straight, turned) in straight.routed.iter().zip(&turned.routed) {
        let swapped = [turned.row(1), turned.row(0)].concat();
        let most = straight.weight.iter().zip(&swapped).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
        assert!(most <= 0.004, "{most}");
    }
}

#[test]
fn gates_that_coincide_are_named() {
    let calibrated = run(&two("", "Compute 1 + 2.", "Compute 1 + 3.")).unwrap();
    assert!(calibrated.diagnosis[0].condition > 1e6);
    let [line, ..] = &calibrated.warnings[..] else { panic!("no warning") };
    assert!(line.contains("gates of experts `code` and `math` nearly coincide"), "{line}");
    assert_eq!(run(&two("", "import os", "And the LORD spake")).unwrap().warnings, Vec::<String>::new());
}

#[test]
fn prompts_beyond_the_context_are_cut_with_a_warning() {
    let long = "one two three ".repeat(500);
    let calibrated = run(&two("gate_mode: cheap_embed", &long, "import os")).unwrap();
    assert!(calibrated.warnings[0].starts_with("expert `code`: prompt \"one two three"), "{:?}", calibrated.warnings);
    assert!(calibrated.warnings[0].ends_with("is cut to the base's context of 512"), "{:?}", calibrated.warnings);
}

#[test]
fn a_chat_template_is_used_if_asked_for() {
    let gates = |head| run(&two(head, "import os", "Compute 1 + 2.")).unwrap().gates.routed;
    let (plain, wrapped) = (gates("chat_template: false"), gates("chat_template: true"));
    assert_ne!(plain, wrapped);
    // Both prompts end where the assistant begins to speak: the same token, and layer 0 sees nothing else.
    assert_eq!(wrapped[0].row(0), wrapped[0].row(1));
    assert_ne!(wrapped[1].row(0), wrapped[1].row(1));
}

/// mergekit's default, unless another gate mode is given.
fn with_mode(keys: &str) -> String {
    if keys.contains("gate_mode") { keys.to_owned() } else { format!("gate_mode: hidden\n{keys}") }
}

/// A tiny random base in `dir`, with a file changed, and a recipe over it.
fn tiny(dir: &Path, file: &str, change: impl FnOnce(Vec<u8>) -> Vec<u8>, keys: &str) -> Recipe {
    models::write(dir, "llama", 1);
    let path = dir.join(file);
    fs_err::write(&path, change(fs_err::read(&path).unwrap())).unwrap();
    let base = dir.display();
    let keys = with_mode(keys);
    parse(&format!(
        "base_model: {base}\n{keys}\nexperts:\n  - {{source_model: {base}/a, positive_prompts: [\"w3 w4\"]}}\n  - {{source_model: {base}/b, \
         positive_prompts: [\"w5\", \"\"]}}\n"
    ))
}

#[test]
fn what_prompts_and_bases_can_get_wrong_is_said() {
    let dir = tempfile::tempdir().unwrap();
    let message = |file: &str, change: fn(Vec<u8>) -> Vec<u8>, keys: &str| {
        let error = run(&tiny(dir.path(), file, change, keys)).unwrap_err().to_string();
        error.replace(&dir.path().display().to_string(), "BASE")
    };
    let no_special_tokens = |_| b"{}".to_vec();
    assert_eq!(message("tokenizer_config.json", no_special_tokens, ""), "expert `b`: prompt \"\" has no tokens in the base's tokenizer");
    assert_eq!(
        message("tokenizer_config.json", no_special_tokens, "chat_template: true"),
        "the recipe says `chat_template: true`, but base model `BASE` has no chat template (leave it out, or use an instruct model as base)"
    );
    let w5_beyond_the_embedding = |tokenizer: Vec<u8>| String::from_utf8(tokenizer).unwrap().replace("\"w5\":5", "\"w5\":99").into_bytes();
    assert_eq!(
        message("tokenizer.json", w5_beyond_the_embedding, "gate_mode: cheap_embed"),
        "expert `b`: token 99 of a prompt is not in the base's vocabulary of 64: its tokenizer and its weights do not match"
    );
    let not_numbers = |mut weights: Vec<u8>| {
        let start = 8 + u64::from_le_bytes(weights[..8].try_into().unwrap()) as usize;
        weights[start..].chunks_exact_mut(2).for_each(|bytes| bytes.copy_from_slice(&[0xc0, 0x7f]));
        weights
    };
    assert_eq!(
        message("model.safetensors", not_numbers, "gate_mode: cheap_embed"),
        "expert `a`: the base's states for its prompts are not finite in layer 0: the base's weights are damaged"
    );
}
