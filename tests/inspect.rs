//! `inspect`: how experts compare, what texts show, the page, and what the command prints.

use std::{fmt::Write as _, path::Path};

use candle_core::{DType, Device, Tensor};
use insta::assert_snapshot;
use regex::Regex;
use serde_json::Value;
use upcycle::{
    inspect::{self, evaluate::Text, perplexity},
    plan::{self, Composite, Gates, Sources},
    recipe,
    source::{self, OpenOptions, Source},
};
use upcycle_architectures::decoder::{Decoder, Logits, Probe, Site, Step};
use upcycle_routers::{gate::Gate, route::Routing};

use crate::support::{cli::transcript, engines::demo, models};

fn open(name: &str) -> Source {
    source::open(&demo(name).to_string_lossy().parse().unwrap(), &OpenOptions::default()).unwrap()
}

/// A composite of bundled models, with gates that choose by chance.
fn composite(experts: &[&str]) -> Composite {
    let mut text = format!("base_model: {}\ngate_mode: random\nexperts:\n", demo("base").display());
    for name in experts {
        writeln!(text, "  - source_model: {}", demo(name).display()).unwrap();
    }
    let recipe = recipe::parse(&text, Path::new("recipe.yml"), &["same-model-experts".to_owned()]).unwrap().0;
    let sources = Sources::open(&recipe, |reference, _| source::open(reference, &OpenOptions::default())).unwrap();
    let plan = plan::plan(&recipe, &sources, &[]).unwrap();
    let (hidden, layers) = (plan.config.hidden, plan.config.layers);
    let weight = |l: usize| (0..experts.len() * hidden).map(|i| ((l * 4099 + i) as f32 * 12.9898).sin()).collect();
    let gate = |l| Gate { experts: experts.len(), hidden, weight: weight(l) };
    plan::composite(plan, sources, Gates { routed: (0..layers).map(gate).collect(), shared: Vec::new() }, None)
}

fn decoder(composite: &Composite) -> Decoder {
    Decoder::load(composite.plan.family(), &composite.plan.config, composite, DType::F32, &Device::Cpu).unwrap()
}

fn text(tokens: usize) -> Text {
    let tokens: Vec<u32> = (0..tokens as u32).map(|i| 300 + i * 37 % 1500).collect();
    Text { name: "some".into(), windows: perplexity::windows(&tokens, &[], 16, 9), expert: Some(1) }
}

/// Forces one expert and keeps what the first layer's MLP adds.
struct Forced {
    expert: u32,
    before: Option<Tensor>,
    added: Option<Tensor>,
}

impl Probe for Forced {
    fn wants(&self, site: Site) -> bool {
        matches!(site, Site::AfterAttention | Site::LayerOutput)
    }

    fn observe(&mut self, site: Site, layer: usize, x: &Tensor) -> candle_core::Result<()> {
        match (site, layer) {
            (Site::AfterAttention, 0) => self.before = Some(x.clone()),
            (Site::LayerOutput, 0) => self.added = Some((x - self.before.as_ref().unwrap())?),
            _ => {}
        }
        Ok(())
    }

    fn route(&mut self, _: usize, logits: &[f32], routing: &mut Routing) {
        let tokens = logits.len() / 3;
        *routing = Routing { top_k: 1, experts: vec![self.expert; tokens], weights: vec![1.0; tokens] };
    }
}

#[test]
fn head_room_is_the_relative_variance_of_the_experts_outputs() {
    let decoder = decoder(&composite(&["code", "bible", "german"]));
    let text = text(16);
    let seen = inspect::traffic(&decoder, std::slice::from_ref(&text), &mut || {}).unwrap();
    let outputs: Vec<Vec<Vec<f32>>> = (0..3)
        .map(|expert| {
            let mut probe = Forced { expert, before: None, added: None };
            let mut cache = decoder.cache();
            let step = Step { tokens: &text.windows[0].tokens, cache: &mut cache, logits: Logits::None };
            decoder.forward(&mut [step], &mut probe).unwrap();
            probe.added.unwrap().to_vec2().unwrap()
        })
        .collect();
    let ratio = |t: usize| {
        let mean: Vec<f32> = (0..256).map(|d| outputs.iter().map(|f| f[t][d]).sum::<f32>() / 3.0).collect();
        let variance: f32 = outputs.iter().map(|f| f[t].iter().zip(&mean).map(|(a, b)| (a - b).powi(2)).sum::<f32>()).sum::<f32>() / 3.0;
        f64::from(variance / mean.iter().map(|v| v * v).sum::<f32>())
    };
    let expected = (0..16).map(ratio).sum::<f64>() / 16.0;
    let found = seen.head_room[0].unwrap();
    assert!((found / expected - 1.0).abs() < 1e-3, "{found}, not {expected}");
    assert_eq!(seen.head_room.len(), 4);
}

#[test]
fn copies_of_one_expert_have_no_head_room() {
    let decoder = decoder(&composite(&["code", "code", "code"]));
    let seen = inspect::traffic(&decoder, &[text(48)], &mut || {}).unwrap();
    assert!(seen.head_room.iter().all(|h| h.unwrap() < 1e-9), "{:?}", seen.head_room);
}

#[test]
fn samples_are_the_first_window_s_choices() {
    let decoder = decoder(&composite(&["code", "bible", "german"]));
    let text = text(64);
    let mut windows = 0;
    let seen = inspect::traffic(&decoder, std::slice::from_ref(&text), &mut || windows += 1).unwrap();
    assert_eq!(windows, 4);
    let sample = &seen.samples[0];
    assert_eq!(sample.tokens, text.windows[0].tokens);
    let alone = inspect::load(&decoder, &sample.tokens).unwrap();
    for (choices, load) in sample.choices.iter().zip(alone) {
        assert_eq!(choices.len(), 16);
        let mut counts = vec![0; 3];
        for token in choices {
            assert!(token[0].1 >= token[1].1 && (token[0].1 + token[1].1 - 1.0).abs() < 1e-5);
            token.iter().for_each(|(e, _)| counts[*e as usize] += 1);
        }
        assert_eq!(counts, load.counts);
    }
    assert!(seen.choices[0].iter().all(|layer| layer.tokens == 64));
}

#[test]
fn experts_are_compared_by_what_was_added_to_the_base() {
    let (base, experts) = (open("base"), [open("code"), open("bible"), open("base")]);
    let mut seen = Vec::new();
    let steps = std::cell::RefCell::new(&mut seen);
    let similarity =
        inspect::similarity(&base, &experts.iter().collect::<Vec<_>>(), &|done, all| steps.borrow_mut().push((done, all))).unwrap();
    assert_eq!(seen.last(), Some(&(seen.len(), seen.len())));
    // The same by the names of the tensors.
    let all = |source: &Source, pick: &dyn Fn(&str) -> bool| -> Vec<f64> {
        let mut names: Vec<String> = base.weights.names().into_iter().filter(|name| pick(name)).collect();
        names.sort();
        names.iter().flat_map(|name| source.weights.read(name).unwrap().to_f32()).map(f64::from).collect()
    };
    let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f64>();
    let compare = |pick: &dyn Fn(&str) -> bool| {
        let origin = all(&base, pick);
        let added = |e: usize| all(&experts[e], pick).iter().zip(&origin).map(|(v, w)| v - w).collect::<Vec<_>>();
        let (a, b) = (added(0), added(1));
        (dot(&a, &b) / (dot(&a, &a) * dot(&b, &b)).sqrt(), (dot(&a, &a) / dot(&origin, &origin)).sqrt())
    };
    let close = |a: f64, b: f64| assert!((a - b).abs() < 1e-5, "{a}, not {b}");
    close(similarity.mlp[0][1], compare(&|name| name.contains(".mlp.")).0);
    close(similarity.mlp_by_layer[2][1][0], compare(&|name| name.contains(".2.mlp.")).0);
    close(similarity.shared[0][1], compare(&|name| !name.contains(".mlp.")).0);
    let modules = ["embed_tokens", "q_proj", "k_proj", "v_proj", "o_proj", "norm", ".mlp.", "lm_head"];
    assert_eq!(similarity.drift.len(), modules.len());
    for (drift, module) in similarity.drift.iter().zip(modules) {
        close(drift.experts[0], compare(&|name| name.contains(module)).1);
        assert!(drift.experts[2].abs() < f64::EPSILON, "the base has not moved");
    }
    close(similarity.mlp[0][0], 1.0);
    assert!(similarity.mlp[0][2].is_nan() && similarity.mlp[2][2].is_nan(), "what has not moved has no direction");
}

/// Two experts over a tiny random base, and a text in their words.
fn directory() -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    for (seed, name) in ["base", "odd", "<b>even"].iter().enumerate() {
        models::write(&dir.path().join(name), "llama", seed as u64);
    }
    let words: Vec<String> = (0..64).map(|i| format!("w{}", 3 + (i * 7) % 50)).collect();
    fs_err::write(dir.path().join("odd.txt"), words.join(" ")).unwrap();
    let expert = |name: &str, word: &str| format!("  - source_model: {name}\n    positive_prompts: [{word}]\n");
    let recipe = format!(
        "base_model: base\ngate_mode: cheap_embed\nexperts_per_token: 1\nexperts:\n{}{}",
        expert("odd", "w5"),
        expert("\"<b>even\"", "w9")
    );
    fs_err::write(dir.path().join("recipe.yml"), recipe).unwrap();
    dir
}

#[test]
fn the_command_prints_what_it_saw() {
    let dir = directory();
    let args = ["inspect", "recipe.yml", "--text", "odd.txt", "--window", "16", "--windows", "3", "-q"];
    // Random models' numbers say nothing, and end differently on other machines.
    let shown = Regex::new(r" *-?\b\d+\.?\d*( %)?").unwrap().replace_all(&transcript(dir.path(), &args), " #").into_owned();
    assert_snapshot!(shown);
}

#[test]
fn the_page_holds_everything_and_nothing_gets_out_of_its_data() {
    let dir = directory();
    let args =
        ["inspect", "recipe.yml", "--text", "odd=odd.txt", "--window", "16", "--windows", "3", "-q", "--json", "--html", "page.html"];
    let shown = transcript(dir.path(), &args);
    let (_, json) = shown.split_once("--- stdout\n").unwrap_or_else(|| panic!("{shown}"));
    let json: Value = serde_json::from_str(json).unwrap();
    assert_eq!(json["experts"], serde_json::json!(["odd", "<b>even"]));
    assert_eq!(json["texts"][0]["expert"], 0);
    assert_eq!(json["texts"][0]["layers"].as_array().unwrap().len(), models::LAYERS);
    assert!(json["head_room"][0].as_f64().unwrap() > 0.0);
    assert!(json["texts"][0].get("sample").is_none(), "single tokens are for the page");

    let page = fs_err::read_to_string(dir.path().join("page.html")).unwrap();
    assert!(!page.contains("<b>"));
    let (_, data) = page.split_once("id=\"data\">").unwrap();
    let data: Value = serde_json::from_str(data.split_once("</script>").unwrap().0).unwrap();
    assert_eq!(data["inspection"]["experts"], json["experts"]);
    let sample = &data["samples"][0];
    assert_eq!(sample["pieces"].as_array().unwrap().len(), 16);
    assert_eq!(sample["choices"][1].as_array().unwrap().len(), 16);
    assert!(sample["pieces"][0].as_str().unwrap().contains('w'), "{}", sample["pieces"]);
}

#[test]
fn a_dense_model_has_no_routing() {
    let dir = directory();
    let shown = transcript(dir.path(), &["inspect", "base", "--text", "odd.txt", "--html", "page.html"]);
    assert!(shown.contains("exit 0") && shown.contains("a dense model routes nothing"), "{shown}");
    assert!(fs_err::read_to_string(dir.path().join("page.html")).unwrap().contains("\"experts\":[]"));
}
