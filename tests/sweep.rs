//! Fitted composites: what stays as it is, what follows the order of the experts, and what is gained.

use std::path::Path;

use candle_core::{DType, Device, Tensor};
use tempfile::TempDir;
use upcycle::{
    calibrate::{self, text},
    plan::{self, Composite, Gates, Sources},
    recipe::{self, Recipe, Shared},
    source::{self, OpenOptions},
};
use upcycle_architectures::{
    Weights as _,
    decoder::{Decoder, Logits, NoProbe, Step},
};

use crate::support::models;

/// Writes a text of words `from..from + 12` and gives its path.
fn words(dir: &Path, name: &str, from: usize) -> String {
    let text: Vec<String> = (0..600).map(|i| format!("w{}", from + (i * i + 3 * i) % 12)).collect();
    let path = dir.join(format!("{name}.txt"));
    fs_err::write(&path, text.join(" ")).unwrap();
    path.display().to_string()
}

/// A recipe over `experts`, each a model of `dir` with the number of its first word.
fn recipe(dir: &Path, keys: &str, experts: &[(&str, usize)]) -> Recipe {
    let mut text = format!("base_model: {}\ngate_mode: auto\ndtype: float32\n{keys}\nexperts:\n", dir.join("base").display());
    for (name, from) in experts {
        text += &format!("  - source_model: {}\n    text_file: {}\n", dir.join(name).display(), words(dir, name, *from));
    }
    recipe::parse(&text, &dir.join("recipe.yml"), &["same-model-experts".to_owned()]).unwrap().0
}

fn fitted(dir: &Path, recipe: &mut Recipe) -> Composite {
    fit(dir, recipe).0
}

/// The composite, and how often its routers are right with K experts.
fn fit(dir: &Path, recipe: &mut Recipe) -> (Composite, Vec<f64>) {
    let options = text::TextOptions { short: 0, window: 64, ..text::TextOptions::default() };
    fit_to(dir, recipe, &options)
}

fn fit_to(dir: &Path, recipe: &mut Recipe, options: &text::TextOptions) -> (Composite, Vec<f64>) {
    let sources = Sources::open(recipe, |reference, _| source::open(reference, &OpenOptions::default())).unwrap();
    recipe.shared = calibrate::settle(recipe, &calibrate::drift(recipe, &sources).unwrap());
    let plan = plan::plan(recipe, &sources, &[]).unwrap();
    let none = |_: &source::Source| panic!("every expert has a text");
    let corpus = text::corpus(recipe, &sources, options, &none, &|_| ()).unwrap();
    let store = calibrate::fit(recipe, &plan, &sources, &corpus, &Device::Cpu, &dir.join("cache"), &|_, _| ()).unwrap();
    let (gates, right) = (Gates { routed: store.found.gates.clone(), shared: Vec::new() }, store.found.right.clone());
    (plan::composite(plan, sources, gates, Some(std::sync::Arc::new(store))), right)
}

fn logits(decoder: &Decoder) -> Tensor {
    let tokens: Vec<u32> = (3..40).collect();
    let mut cache = decoder.cache();
    decoder.forward(&mut [Step { tokens: &tokens, cache: &mut cache, logits: Logits::All }], &mut NoProbe).unwrap()
}

fn composite_logits(composite: &Composite) -> Tensor {
    let plan = &composite.plan;
    logits(&Decoder::load(plan.family(), &plan.config, composite, DType::F32, &Device::Cpu).unwrap())
}

fn largest(a: &Tensor, b: &Tensor) -> f32 {
    (a - b).unwrap().abs().unwrap().max_all().unwrap().to_scalar::<f32>().unwrap()
}

#[test]
fn copies_of_one_model_stay_that_model() {
    for family in ["llama", "qwen2", "qwen3"] {
        let dir = TempDir::new().unwrap();
        for name in ["base", "a", "b"] {
            models::write(&dir.path().join(name), family, 1);
        }
        let source = source::open(&dir.path().join("base").display().to_string().parse().unwrap(), &OpenOptions::default()).unwrap();
        let dense = logits(&Decoder::load(source.family, &source.config, &*source.weights, DType::F32, &Device::Cpu).unwrap());
        for shared in ["auto", "fit"] {
            let mut recipe = recipe(dir.path(), &format!("shared: {shared}"), &[("a", 3), ("b", 20)]);
            let composite = fitted(dir.path(), &mut recipe);
            assert_eq!(recipe.shared, if shared == "auto" { Shared::Base } else { Shared::Fit }, "{family}");
            let most = largest(&composite_logits(&composite), &dense);
            assert!(most < 2e-3, "{family}, shared: {shared}: {most}");
        }
    }
}

#[test]
fn where_routers_are_sure_one_expert_per_token_does() {
    let found = |right: f64| calibrate::Found { right: vec![right, 1.0], ..Default::default() };
    assert_eq!((found(0.995).top_k(2), found(0.97).top_k(2), calibrate::Found::default().top_k(2)), (1, 2, 2));
    let dir = TempDir::new().unwrap();
    for (seed, name) in ["base", "a", "b"].into_iter().enumerate() {
        models::write(&dir.path().join(name), "llama", seed as u64);
    }
    let left = recipe(dir.path(), "", &[("a", 3), ("b", 20)]);
    let set = recipe(dir.path(), "experts_per_token: 2", &[("a", 3), ("b", 20)]);
    assert_eq!((left.choose_experts_per_token, left.experts_per_token), (true, 2));
    assert!(!set.choose_experts_per_token);
    // Texts of different words, so that the experts are easily told apart.
    let (_, right) = fit(dir.path(), &mut recipe(dir.path(), "", &[("a", 3), ("b", 20)]));
    assert!(right.len() == 2 && right[0] > 0.5 && right[1] > 0.999, "{right:?}");
}

#[test]
fn openings_are_for_gates_alone() {
    let dir = TempDir::new().unwrap();
    for (seed, name) in ["base", "a", "b"].into_iter().enumerate() {
        models::write(&dir.path().join(name), "llama", seed as u64);
    }
    let fitted = |opening| {
        let options = text::TextOptions { short: 0, window: 64, opening, ..text::TextOptions::default() };
        let mut recipe = recipe(dir.path(), "shared: fit\nrepair: false", &[("a", 3), ("b", 20)]);
        fit_to(dir.path(), &mut recipe, &options).0
    };
    let (without, with) = (fitted(0), fitted(8));
    let read = |composite: &Composite, name: &str| composite.read(name).unwrap().to_f32();
    let mut gates = 0;
    for name in without.names() {
        // What is behind a router follows its choices.
        let (a, b) = (read(&without, &name), read(&with, &name));
        let most = a.iter().zip(&b).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
        if name.contains("gate.weight") {
            gates += usize::from(most > 1e-3);
        } else if name.contains("layers.0.self_attn") || name.contains("embed") {
            assert!(most < 1e-4, "{name}: {most}");
        }
    }
    assert!(gates > 0, "gates see the openings");
}

#[test]
fn permuting_the_experts_permutes_the_composite() {
    let dir = TempDir::new().unwrap();
    for (seed, name) in ["base", "a", "b", "c"].into_iter().enumerate() {
        models::write(&dir.path().join(name), "llama", seed as u64);
    }
    // Repair mends one expert after the other, so that their order has a small say.
    let mut straight = recipe(dir.path(), "repair: false", &[("a", 3), ("b", 20), ("c", 40)]);
    let mut turned = recipe(dir.path(), "repair: false", &[("c", 40), ("a", 3), ("b", 20)]);
    let (straight, turned) = (fitted(dir.path(), &mut straight), fitted(dir.path(), &mut turned));
    for (l, (a, b)) in straight.gates().routed.iter().zip(&turned.gates().routed).enumerate() {
        let back = [b.row(1), b.row(2), b.row(0)].concat();
        let most = a.weight.iter().zip(&back).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
        let size = a.weight.iter().fold(0f32, |most, v| most.max(v.abs()));
        // Behind the first layer, rounding may send a token elsewhere.
        let bound = if l == 0 { 0.05 } else { 0.1 };
        assert!(most < bound * size, "layer {l}: {most} of {size}");
    }
}

#[test]
fn a_fit_is_kept_and_damage_to_it_is_noticed() {
    let dir = TempDir::new().unwrap();
    for (seed, name) in ["base", "a", "b"].into_iter().enumerate() {
        models::write(&dir.path().join(name), "llama", seed as u64);
    }
    let make = || {
        let composite = fitted(dir.path(), &mut recipe(dir.path(), "", &[("a", 3), ("b", 20)]));
        let names = composite.names();
        names.iter().map(|name| composite.read(name).unwrap().data.to_vec()).collect::<Vec<_>>()
    };
    let first = make();
    let kept = || {
        fs_err::read_dir(dir.path().join("cache"))
            .unwrap()
            .map(|entry| entry.unwrap().path())
            .find(|p| p.extension().is_some_and(|e| e == "bin"))
    };
    let file = kept().unwrap();
    let written = fs_err::metadata(&file).unwrap().modified().unwrap();
    assert_eq!(make(), first);
    assert_eq!(fs_err::metadata(&file).unwrap().modified().unwrap(), written, "nothing was fitted again");
    fs_err::write(&file, b"short").unwrap();
    assert_eq!(make(), first, "the same fit was made anew");
}
