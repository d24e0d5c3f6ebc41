//! `eval`: losses against brute force, the baselines against what they stand for, the command's tables and messages.

use std::{fmt::Write as _, path::Path};

use candle_core::{DType, Device};
use insta::assert_snapshot;
use regex::Regex;
use upcycle::{
    engine::tokenizer::{Specials, Tokenizer},
    inspect::{
        Average, Observer, Router,
        evaluate::{self, Progress, Setting, Text},
        perplexity::{self, Loss, Window},
        report::Kind::{self, Base, Expert, Hidden, Oracle, Perfect},
    },
    plan::{self, Composite, Gates, Sources},
    recipe::{self, Recipe},
    source::{self, OpenOptions, Source},
};
use upcycle_architectures::{
    Config, Dtype, Family, LayerRole, Role, TensorInfo, View, Weights, WeightsError,
    decoder::{Decoder, Logits, NoProbe, Step},
};
use upcycle_routers::gate::Gate;

use crate::support::{cli::transcript, engines::demo, models};

const EXPERTS: [&str; 4] = ["code", "bible", "german", "math"];
const VERSE: &str = "And the sheep went into the valley, and the shepherd said unto them, Where is the water that was here yesterday?";
const CODE: &str =
    "def area(shapes):\n    total = 0\n    for shape in shapes:\n        total += shape.width * shape.height\n    return total\n";

fn open(name: &str) -> Source {
    source::open(&demo(name).to_string_lossy().parse().unwrap(), &OpenOptions::default()).unwrap()
}

fn tokens(text: &str) -> Vec<u32> {
    let base = open("base");
    Tokenizer::open(&base.sidecars, &base.config).unwrap().encode(text, Specials::Written).unwrap()
}

fn load(family: &Family, config: &Config, weights: &dyn Weights) -> Decoder {
    Decoder::load(family, config, weights, DType::F32, &Device::Cpu).unwrap()
}

/// The bundled recipe's composite, with gates that choose by chance, or zero.
fn composite(top_k: usize, gate: impl Fn(usize) -> f32) -> (Recipe, Composite) {
    let mut text = format!("base_model: {}\ngate_mode: random\nexperts_per_token: {top_k}\nexperts:\n", demo("base").display());
    for name in EXPERTS {
        writeln!(text, "  - source_model: {}", demo(name).display()).unwrap();
    }
    let recipe = recipe::parse(&text, Path::new("recipe.yml"), &[]).unwrap().0;
    let sources = Sources::open(&recipe, |reference, _| source::open(reference, &OpenOptions::default())).unwrap();
    let plan = plan::plan(&recipe, &sources, &[]).unwrap();
    let (hidden, layers) = (plan.config.hidden, plan.config.layers);
    let one = |l: usize| Gate { experts: 4, hidden, weight: (0..4 * hidden).map(|i| gate(l * 4 * hidden + i)).collect() };
    let gates = Gates { routed: (0..layers).map(one).collect(), shared: Vec::new() };
    (recipe, plan::composite(plan, sources, gates, None))
}

fn by_chance(i: usize) -> f32 {
    (i as f32 * 12.9898).sin()
}

fn composite_losses(composite: &Composite, router: Router, windows: &[Window]) -> Vec<Loss> {
    let decoder = load(composite.plan.family(), &composite.plan.config, composite);
    let mut observer = Observer::new(&decoder, router);
    perplexity::losses(&decoder, windows, &mut observer, &mut |_| {}).unwrap()
}

fn same(a: &[Loss], b: &[Loss]) {
    assert_eq!(a.len(), b.len());
    for (a, b) in a.iter().zip(b) {
        assert_eq!(a.tokens, b.tokens);
        assert!((a.sum - b.sum).abs() <= 1e-4 * b.sum, "{} and {}", a.sum, b.sum);
    }
}

/// Loss of a window from the logits of one forward pass, position by position, in f64.
fn brute_force(decoder: &Decoder, window: &Window) -> Loss {
    let mut cache = decoder.cache();
    let step = Step { tokens: &window.tokens, cache: &mut cache, logits: Logits::All };
    let logits = decoder.forward(&mut [step], &mut NoProbe).unwrap().to_vec2::<f32>().unwrap();
    let mut loss = Loss { sum: 0.0, tokens: 0 };
    for (at, &target) in window.tokens.iter().enumerate().skip(window.prefix + 1) {
        let row: Vec<f64> = logits[at - 1].iter().map(|v| f64::from(*v)).collect();
        loss.sum -= (row[target as usize].exp() / row.iter().map(|v| v.exp()).sum::<f64>()).ln();
        loss.tokens += 1;
    }
    loss
}

#[test]
fn losses_are_those_of_the_logits() {
    let source = open("base");
    let decoder = load(source.family, &source.config, &*source.weights);
    let text = tokens(&[VERSE, CODE, VERSE].join("\n"));
    // Side by side with and without a token in front, and one that is too long for a single pass.
    let mut batches = vec![perplexity::windows(&text, &[], 16, 5), perplexity::windows(&text, &[0], 16, 5)];
    let long: Vec<u32> = text.iter().copied().cycle().take(2300).collect();
    batches.push(perplexity::windows(&long, &[0], 2300, 1));
    for windows in batches {
        let mut finished = 0;
        let losses = perplexity::losses(&decoder, &windows, &mut NoProbe, &mut |done| finished += done).unwrap();
        assert_eq!(finished, windows.len());
        same(&losses, &windows.iter().map(|window| brute_force(&decoder, window)).collect::<Vec<_>>());
        assert_eq!(losses[0].tokens, windows[0].tokens.len() - windows[0].prefix - 1);
    }
}

#[test]
fn the_average_is_the_mean_of_every_weight() {
    let sources: Vec<Source> = EXPERTS.iter().map(|name| open(name)).collect();
    let base = open("base");
    let average = Average::new(&base, sources.iter().collect(), Dtype::F32).unwrap();
    let mut names = average.names();
    let mut expected = base.weights.names();
    names.sort();
    expected.sort();
    assert_eq!(names, expected);
    for name in
        ["model.embed_tokens.weight", "model.layers.2.self_attn.q_proj.weight", "model.layers.0.mlp.down_proj.weight", "lm_head.weight"]
    {
        let all: Vec<Vec<f32>> = sources.iter().map(|source| source.weights.read(name).unwrap().to_f32()).collect();
        for (i, mean) in average.read(name).unwrap().to_f32().into_iter().enumerate() {
            let values = all.iter().map(|values| values[i]).sum::<f32>() / 4.0;
            assert!((mean - values).abs() < 1e-6, "{name}[{i}]: {mean}, not {values}");
        }
    }
    assert!(Average::new(&base, vec![&sources[0]], Dtype::Bf16).unwrap().read("model.norm.weight").is_ok());
    let other = tempfile::tempdir().unwrap();
    models::write(other.path(), "llama", 0);
    let other = source::open(&other.path().to_string_lossy().parse().unwrap(), &OpenOptions::default()).unwrap();
    assert!(matches!(Average::new(&base, vec![&sources[0], &other], Dtype::F32), Err(WeightsError::Shape { .. })));
}

/// The base with one expert's MLPs.
struct Grafted {
    base: Source,
    expert: Source,
}

impl Weights for Grafted {
    fn names(&self) -> Vec<String> {
        self.base.weights.names()
    }

    fn info(&self, name: &str) -> Option<TensorInfo> {
        self.base.weights.info(name)
    }

    fn read(&self, name: &str) -> Result<View, WeightsError> {
        let mlp = self
            .base
            .family
            .tensors(&self.base.config)
            .into_iter()
            .any(|(role, _)| matches!(role, Role::Layer(_, LayerRole::Mlp(_))) && self.base.family.name(role).as_deref() == Some(name));
        if mlp { self.expert.weights.read(name) } else { self.base.weights.read(name) }
    }
}

#[test]
fn the_perfect_router_makes_the_composite_the_base_with_that_expert_s_mlps() {
    let windows = perplexity::windows(&tokens(&VERSE.repeat(3)), &[], 32, 4);
    let (_, composite) = composite(2, by_chance);
    for (e, name) in EXPERTS.iter().enumerate() {
        let grafted = Grafted { base: open("base"), expert: open(name) };
        let dense = load(grafted.base.family, &grafted.base.config, &grafted);
        let expected = perplexity::losses(&dense, &windows, &mut NoProbe, &mut |_| {}).unwrap();
        same(&composite_losses(&composite, Router::Only(e), &windows), &expected);
    }
}

#[test]
fn uniform_is_what_zero_gates_and_all_experts_are() {
    let windows = perplexity::windows(&tokens(&CODE.repeat(3)), &[], 32, 4);
    let uniform = composite_losses(&composite(2, by_chance).1, Router::Uniform, &windows);
    let zero = composite(4, |_| 0.0).1;
    same(&uniform, &composite_losses(&zero, Router::Gates, &windows));
    let gates = composite_losses(&composite(2, by_chance).1, Router::Gates, &windows);
    assert!((gates[0].sum - uniform[0].sum).abs() > 1e-2, "random gates are another model");
}

#[test]
fn choices_are_counted_before_they_are_overruled() {
    let (_, composite) = composite(2, by_chance);
    let decoder = load(composite.plan.family(), &composite.plan.config, &composite);
    let windows = perplexity::windows(&tokens(VERSE), &[], 16, 2);
    let observed = |router| {
        let mut observer = Observer::new(&decoder, router);
        perplexity::losses(&decoder, &windows, &mut observer, &mut |_| {}).unwrap();
        observer.layers
    };
    let (gates, forced) = (observed(Router::Gates), observed(Router::Only(3)));
    assert_eq!(gates[0], forced[0], "the first layer sees the same tokens");
    assert_ne!(gates[1], forced[1]);
    for layer in gates {
        assert_eq!(layer.tokens, 32);
        assert_eq!(layer.first.counts.iter().sum::<u64>(), 32);
        assert_eq!(layer.chosen.counts.iter().sum::<u64>(), 64);
        assert!((0.0..=4f64.ln()).contains(&(layer.entropy / 32.0)));
        let accuracies: f64 = (0..4).map(|e| layer.accuracy(e)).sum();
        assert!((accuracies - 1.0).abs() < 1e-9);
    }
}

struct Silent;

impl Progress for Silent {
    fn begin(&self, _: &str, _: usize) {}
    fn advance(&self, _: usize) {}
}

#[test]
fn a_recipe_has_every_row() {
    let (recipe, composite) = composite(2, by_chance);
    let text = |name: &str, text: &str, expert| Text { name: name.into(), windows: perplexity::windows(&tokens(text), &[], 24, 1), expert };
    let texts = [text("code", CODE, Some(0)), text("bible", VERSE, Some(1)), text("prose", VERSE, None)];
    let setting = Setting { device: Device::Cpu, dtype: DType::F32, progress: &Silent };
    let names = EXPERTS.map(str::to_owned);
    let evaluation = evaluate::recipe(&recipe, &composite, Some(&composite), &names, &texts, &setting).unwrap();
    let kinds: Vec<Kind> = evaluation.rows.iter().map(|row| row.kind).collect();
    assert_eq!(
        kinds,
        [Base, Expert, Expert, Expert, Expert, Kind::Average, Kind::Uniform, Hidden, Kind::Recipe, Perfect, Kind::Mixture, Oracle]
    );
    let row = |kind| evaluation.rows.iter().find(|row| row.kind == kind).unwrap();
    assert_eq!(row(Oracle).losses[0], evaluation.rows[1].losses[0]);
    assert_eq!(row(Oracle).losses[1], evaluation.rows[2].losses[1]);
    assert!(row(Oracle).losses[2].is_empty() && row(Perfect).losses[2].is_empty(), "nobody's text has no right expert");
    assert_eq!(row(Hidden).losses, row(Kind::Recipe).losses, "the same composite was given for both");
    assert_eq!(row(Perfect).losses[1], composite_losses(&composite, Router::Only(1), &texts[1].windows));
    assert_eq!(evaluation.choices.len(), 3);
    assert!(evaluation.notes.is_empty(), "{:?}", evaluation.notes);
}

/// Two experts over a tiny random base, with texts in their words.
fn directory() -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    for (seed, name) in ["base", "mlp-odd", "mlp-even"].iter().enumerate() {
        models::write(&dir.path().join(name), "llama", seed as u64);
    }
    let words = |step: usize| (0..64).map(|i| format!("w{}", 3 + (i * step) % 50)).collect::<Vec<_>>().join(" ");
    fs_err::write(dir.path().join("odd.txt"), words(7)).unwrap();
    fs_err::write(dir.path().join("even.txt"), words(4)).unwrap();
    let expert = |name: &str, word: &str| format!("  - source_model: {name}\n    positive_prompts: [{word}]\n");
    let recipe = format!(
        "base_model: base\ngate_mode: cheap_embed\nexperts_per_token: 1\nexperts:\n{}{}",
        expert("mlp-odd", "w5"),
        expert("mlp-even", "w9")
    );
    fs_err::write(dir.path().join("recipe.yml"), recipe).unwrap();
    dir
}

/// A transcript in which figures are but their form: random models' numbers say nothing, and end differently on other machines.
fn eval(dir: &Path, args: &[&str]) -> String {
    let transcript = transcript(dir, &[&["eval"], args].concat());
    Regex::new(r" *-?\d+(\.\d+)?( %)?").unwrap().replace_all(&transcript, " #").into_owned()
}

#[test]
fn the_command_prints_tables_and_a_verdict() {
    let dir = directory();
    let shown =
        eval(dir.path(), &["recipe.yml", "base", "--text", "odd=odd.txt", "--text", "even.txt", "--window", "16", "--windows", "3", "-q"]);
    // What the verdict on random models is, is left to chance.
    let table = shown.split("\n\n").take(2).collect::<Vec<_>>().join("\n\n");
    assert_snapshot!(table);
}

#[test]
fn json_has_every_figure() {
    let dir = directory();
    let run = |args: &[&str]| {
        let shown = transcript(dir.path(), &[&["eval", "--json", "-q"], args].concat());
        let (_, json) = shown.split_once("--- stdout\n").unwrap_or_else(|| panic!("{shown}"));
        serde_json::from_str::<serde_json::Value>(json).unwrap()
    };
    let json = run(&["recipe.yml", "--text", "odd.txt", "--text", "even.txt", "--window", "16", "--windows", "3"]);
    assert_eq!(json["domains"][1], serde_json::json!({"name": "even", "expert": "mlp-even"}));
    assert_eq!((&json["window"], &json["windows"]), (&16.into(), &3.into()));
    let rows = json["rows"].as_array().unwrap();
    let kinds: Vec<&str> = rows.iter().map(|row| row["kind"].as_str().unwrap()).collect();
    assert_eq!(kinds, ["base", "expert", "expert", "average", "uniform", "hidden", "recipe", "perfect", "mixture", "oracle"]);
    for row in rows {
        let perplexities = row["perplexity"].as_array().unwrap();
        let mean = perplexities.iter().map(|p| p.as_f64().unwrap().ln()).sum::<f64>() / 2.0;
        assert!((mean.exp() / row["geomean"].as_f64().unwrap() - 1.0).abs() < 1e-9, "{row}");
    }
    assert_eq!(json["routing"].as_array().unwrap().len(), models::LAYERS);
    assert_eq!(json["routing"][0]["load_by_domain"].as_array().unwrap().len(), 2);
    assert!(!json["verdict"].as_array().unwrap().is_empty());

    let json = run(&["base", "mlp-odd", "--text", "some=odd.txt", "--window", "16"]);
    let names: Vec<_> = json["rows"].as_array().unwrap().iter().map(|row| &row["name"]).collect();
    assert_eq!(names, ["base", "mlp-odd"]);
    assert_eq!((&json["verdict"], &json["routing"]), (&serde_json::json!([]), &serde_json::json!([])));
}

#[test]
fn mistakes_are_named() {
    let dir = directory();
    let shown = [
        eval(dir.path(), &["recipe.yml"]),
        eval(dir.path(), &["recipe.yml", "--text", "odd=odd.txt", "--window", "100"]),
        eval(dir.path(), &["recipe.yml", "--text", "odd.txt", "--text", "odd=even.txt"]),
        eval(dir.path(), &["recipe.yml", "--text", "odd=missing.txt"]),
    ];
    assert_snapshot!(shown.join("\n"));
}
