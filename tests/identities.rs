//! What every gate method and every way to share weights leaves as it is: copies of one model, and the order of the experts.

use std::{path::Path, sync::Arc};

use candle_core::{DType, Device, Tensor};
use tempfile::TempDir;
use upcycle::{
    calibrate::{self, text},
    plan::{self, Composite, Gates, Sources},
    recipe::{self, LINTS, Recipe},
    source::{self, OpenOptions, Source},
};
use upcycle_architectures::decoder::{Decoder, Logits, NoProbe, Step};
use upcycle_routers::init::{How, METHODS, Method};

use crate::support::models;

/// Three experts, each with prompts and a text of words of its own.
const EXPERTS: [(&str, usize); 3] = [("a", 3), ("b", 20), ("c", 40)];

fn recipe(dir: &Path, method: &Method, shared: &str, order: [usize; 3]) -> Recipe {
    let top_k = if method.all_experts { 3 } else { 2 };
    let mut text = format!(
        "base_model: {}\ngate_mode: {}\nshared: {shared}\nrepair: false\ndtype: float32\nexperts_per_token: {top_k}\nexperts:\n",
        dir.join("base").display(),
        method.name
    );
    for (name, from) in order.map(|e| EXPERTS[e]) {
        let word = |i: usize| format!("w{}", from + (i * i + 3 * i) % 12);
        let file = dir.join(format!("{name}.txt"));
        fs_err::write(&file, (0..600).map(word).collect::<Vec<_>>().join(" ")).unwrap();
        let model = dir.join(name).display().to_string();
        text += &format!("  - source_model: {model}\n    text_file: {}\n    positive_prompts:\n", file.display());
        text += &(0..8).map(|i| format!("      - {} {} {}\n", word(3 * i), word(i + 1), word(i + 2))).collect::<String>();
    }
    let allow: Vec<String> = LINTS.iter().map(|lint| lint.name.to_owned()).collect();
    recipe::parse(&text, &dir.join("recipe.yml"), &allow).unwrap().0
}

fn compose(dir: &Path, recipe: &Recipe) -> Composite {
    let sources = Sources::open(recipe, |reference, _| source::open(reference, &OpenOptions::default())).unwrap();
    let plan = plan::plan(recipe, &sources, &[]).unwrap();
    if !recipe.fitted() {
        let gates = calibrate::gates(recipe, sources.base(), || load(sources.base())).unwrap().gates;
        return plan::composite(plan, sources, gates, None);
    }
    let options = text::TextOptions { short: 0, window: 64, ..text::TextOptions::default() };
    let none = |_: &Source| panic!("every expert has a text");
    let corpus = text::corpus(recipe, &sources, &options, &none, &|_| ()).unwrap();
    let store = calibrate::fit(recipe, &plan, &sources, &corpus, &Device::Cpu, &dir.join("cache"), &|_, _| ()).unwrap();
    let gates = Gates { routed: store.found.gates.clone(), shared: Vec::new() };
    plan::composite(plan, sources, gates, Some(Arc::new(store)))
}

fn load(source: &Source) -> Result<Decoder, upcycle_architectures::decoder::DecoderError> {
    Decoder::load(source.family, &source.config, &*source.weights, DType::F32, &Device::Cpu)
}

fn logits(decoder: &Decoder) -> Tensor {
    let tokens: Vec<u32> = (3..40).collect();
    let mut cache = decoder.cache();
    decoder.forward(&mut [Step { tokens: &tokens, cache: &mut cache, logits: Logits::All }], &mut NoProbe).unwrap()
}

/// Every method that sets gates with every way to share weights that goes with it.
fn combinations() -> impl Iterator<Item = (&'static Method, &'static str)> {
    let gates = METHODS.iter().filter(|method| matches!(method.how, How::Prompts { .. } | How::Fitted(_)));
    let all = gates.flat_map(|method| ["base", "average", "fit"].map(|shared| (*method, shared)));
    all.filter(|(method, shared)| *shared != "fit" || method.needs().is_none())
}

#[test]
fn copies_of_one_model_stay_that_model() {
    let dir = TempDir::new().unwrap();
    for name in ["base", "a", "b", "c"] {
        models::write(&dir.path().join(name), "llama", 1);
    }
    let base = source::open(&dir.path().join("base").display().to_string().parse().unwrap(), &OpenOptions::default()).unwrap();
    let dense = logits(&load(&base).unwrap());
    for (method, shared) in combinations() {
        let mut recipe = recipe(dir.path(), method, shared, [0, 1, 2]);
        for repair in [Some(false), Some(true)] {
            recipe.repair = repair;
            let composite = compose(dir.path(), &recipe);
            let plan = &composite.plan;
            let decoder = Decoder::load(plan.family(), &plan.config, &composite, DType::F32, &Device::Cpu).unwrap();
            let most = (logits(&decoder) - &dense).unwrap().abs().unwrap().max_all().unwrap().to_scalar::<f32>().unwrap();
            assert!(most < 2e-3, "{}, shared: {shared}, repair: {repair:?}: {most}", method.name);
        }
    }
}

#[test]
fn permuting_the_experts_permutes_the_gates() {
    let dir = TempDir::new().unwrap();
    for (seed, name) in ["base", "a", "b", "c"].into_iter().enumerate() {
        models::write(&dir.path().join(name), "llama", seed as u64);
    }
    // Gates that are drawn belong to places, not to experts.
    for (method, shared) in combinations().filter(|(method, _)| !method.name.contains("random")) {
        let gates = |order| compose(dir.path(), &recipe(dir.path(), method, shared, order)).gates().routed.clone();
        for (l, (a, b)) in gates([0, 1, 2]).iter().zip(&gates([2, 0, 1])).enumerate() {
            let back = [b.row(1), b.row(2), b.row(0)].concat();
            let most = a.weight.iter().zip(&back).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
            let size = a.weight.iter().fold(0f32, |most, v| most.max(v.abs()));
            // Behind a fitted layer, rounding may send a token elsewhere.
            let bound = if method.needs().is_some() { 0.0 } else { [0.05, 0.1][l] };
            assert!(most <= bound * size, "{}, shared: {shared}, layer {l}: {most} of {size}", method.name);
        }
    }
}
