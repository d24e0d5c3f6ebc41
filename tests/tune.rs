//! Training gates and attention: what comes out, that it is never worse, and that an interrupted run ends as it would have.

use std::{
    collections::BTreeMap,
    panic::AssertUnwindSafe,
    path::{Path, PathBuf},
    sync::Mutex,
};

use candle_core::{DType, Device};
use insta::assert_snapshot;
use regex::Regex;
use safetensors::SafeTensors;
use tempfile::TempDir;
use upcycle::{
    engine::tokenizer::Tokenizer,
    plan::{self, Composite, Gates, Sources},
    recipe,
    source::{self, OpenOptions},
    tune::{self, Domain, Progress, Scope, Settings, Stage, Target, Task, Tuned, mean},
    write::{self, Options, Silent},
};
use upcycle_architectures::View;
use upcycle_routers::gate::Gate;

use crate::support::{cli::transcript, models};

/// A base, experts `odd` and `even`, their composite `moe` with patternless gates, and a text of each.
fn directory(family: &str, layout: &str) -> TempDir {
    let dir = TempDir::new().unwrap();
    for (seed, name) in ["base", "odd", "even"].iter().enumerate() {
        models::write(&dir.path().join(name), family, seed as u64);
    }
    let text = |first: usize| {
        (0..800)
            .map(|i| format!("w{}", first + 2 * (i * i % 13)))
            .collect::<Vec<_>>()
            .chunks(10)
            .map(|line| line.join(" "))
            .collect::<Vec<_>>()
    };
    fs_err::write(dir.path().join("odd.txt"), text(3).join("\n")).unwrap();
    fs_err::write(dir.path().join("even.txt"), text(4).join("\n")).unwrap();
    let expert =
        |name: &str, word: &str| format!("  - source_model: {}\n    positive_prompts: [{word}]\n", dir.path().join(name).display());
    let text = format!(
        "base_model: {}\ngate_mode: random\nlayout: {layout}\nexperts_per_token: 2\nexperts:\n{}{}",
        dir.path().join("base").display(),
        expert("odd", "w5"),
        expert("even", "w8"),
    );
    let file = dir.path().join("recipe.yml");
    fs_err::write(&file, &text).unwrap();
    let (recipe, _) = recipe::parse(&text, &file, &[]).unwrap();
    let sources = Sources::open(&recipe, |reference, _| source::open(reference, &OpenOptions::default())).unwrap();
    let plan = plan::plan(&recipe, &sources, &[]).unwrap();
    let weight = |l: usize| (0..2 * models::HIDDEN).map(|i| ((i + 1) as f32 * (l as f32 + 1.7)).sin() * 0.1).collect();
    let gate = |l| Gate { experts: 2, hidden: models::HIDDEN, weight: weight(l) };
    let gates = Gates { routed: (0..models::LAYERS).map(gate).collect(), shared: Vec::new() };
    let composite = plan::composite(plan, sources, gates, None);
    write::write(&composite, &recipe, &dir.path().join("moe"), &Options::default(), &Silent).unwrap();
    dir
}

fn open(model: &Path) -> (Composite, Tokenizer) {
    let source = source::open(&model.to_str().unwrap().parse().unwrap(), &OpenOptions::default()).unwrap();
    let tokenizer = Tokenizer::open(&source.sidecars, &source.config).unwrap();
    (plan::opened(source).unwrap(), tokenizer)
}

fn settings() -> Settings {
    Settings {
        scope: Scope::Gates,
        router_steps: 6,
        steps: 8,
        batch: 2,
        window: 16,
        held_out: 4,
        target: Target::Text,
        rate: 0.05,
        balance: 0.0,
        evaluate_every: 4,
        patience: 10,
        seed: 1,
    }
}

const ATTENTION: Scope = Scope::Attention { rank: 2 };

/// Remembers what it was told, and may stop a run as a kill would.
#[derive(Default)]
struct Told {
    losses: Mutex<Vec<f64>>,
    notes: Mutex<Vec<String>>,
    stop_at: Option<(Stage, usize)>,
}

impl Progress for Told {
    fn begin(&self, _: Stage, _: usize, _: usize) {}

    fn step(&self, loss: f64, _: usize) {
        self.losses.lock().unwrap().push(loss);
    }

    fn evaluated(&self, stage: Stage, step: usize, _: f64, _: bool) {
        assert_ne!(self.stop_at, Some((stage, step)), "killed");
    }

    fn note(&self, message: &str) {
        self.notes.lock().unwrap().push(message.to_owned());
    }
}

fn tune(dir: &Path, model: &str, settings: &Settings, told: &Told) -> Tuned {
    let (composite, tokenizer) = open(&dir.join(model));
    let domain = |(expert, name): (usize, &str)| Domain { name: name.into(), file: dir.join(format!("{name}.txt")), expert: Some(expert) };
    let domains: Vec<Domain> = ["odd", "even"].into_iter().enumerate().map(domain).collect();
    let expert = |name: &str| source::open(&dir.join(name).to_str().unwrap().parse().unwrap(), &OpenOptions::default()).unwrap();
    let (odd, even) = (expert("odd"), expert("even"));
    let task = Task {
        composite: &composite,
        tokenizer: &tokenizer,
        domains: &domains,
        experts: &[&odd, &even],
        device: Device::Cpu,
        dtype: DType::F32,
    };
    tune::tune(&task, settings, &dir.join("checkpoint"), told).unwrap()
}

/// Without what an earlier run left.
fn afresh(dir: &Path, settings: &Settings) -> Tuned {
    let _ = fs_err::remove_file(dir.join("checkpoint"));
    tune(dir, "moe", settings, &Told::default())
}

fn bytes(tensors: &BTreeMap<String, View>) -> BTreeMap<String, Vec<u8>> {
    tensors.iter().map(|(name, view)| (name.clone(), view.data.to_vec())).collect()
}

fn tensors(model: &Path) -> BTreeMap<String, Vec<u8>> {
    let file = fs_err::read(model.join("model.safetensors")).unwrap();
    SafeTensors::deserialize(&file).unwrap().tensors().into_iter().map(|(name, view)| (name, view.data().to_vec())).collect()
}

#[test]
fn what_is_written_differs_where_it_was_trained_and_keeps_its_promise() {
    for (family, layout, gate) in
        [("llama", "classic", "block_sparse_moe.gate"), ("qwen2", "fused", "mlp.gate"), ("qwen3", "fused", "mlp.gate")]
    {
        let dir = directory(family, layout);
        for scope in [Scope::Gates, ATTENTION] {
            let tuned = afresh(dir.path(), &Settings { scope, ..settings() });
            assert!(mean(&tuned.best) < mean(&tuned.start), "{family}: {tuned:?}");
            let (composite, _) = open(&dir.path().join("moe"));
            let out = dir.path().join("out");
            let papers = write::Papers { tokenizer: composite.sources.base(), files: Vec::new() };
            let options = Options { overwrite: true, ..Options::default() };
            write::write_with(&composite.replacing(tuned.changed.clone()), &papers, &out, &options, &Silent).unwrap();

            let (before, after) = (tensors(&dir.path().join("moe")), tensors(&out));
            let changed: Vec<&String> = before.iter().filter(|(name, data)| after[*name] != **data).map(|(name, _)| name).collect();
            assert_eq!(before.len(), after.len());
            assert_eq!(changed, tuned.changed.keys().collect::<Vec<_>>());
            let trained =
                |name: &&String| name.contains(gate) || (scope == ATTENTION && (name.contains("norm") || name.contains("self_attn")));
            assert!(changed.iter().all(trained), "{changed:?}");
            assert!(changed.iter().any(|name| name.contains(gate)), "{changed:?}");
            let config = |model: &str| fs_err::read(dir.path().join(model).join("config.json")).unwrap();
            assert_eq!(config("moe"), config("out"));

            // What is read again starts from the loss that was promised.
            let _ = fs_err::remove_file(dir.path().join("checkpoint"));
            let again = tune(dir.path(), "out", &Settings { router_steps: 0, steps: 0, ..settings() }, &Told::default());
            assert!(again.start.iter().zip(&tuned.best).all(|(a, b)| (a - b).abs() < 1e-5), "{:?} {:?}", again.start, tuned.best);
            assert!(again.changed.is_empty());
        }
    }
}

#[test]
fn an_interrupted_run_ends_as_it_would_have() {
    let dir = directory("llama", "classic");
    let settings = Settings { scope: ATTENTION, balance: 0.1, ..settings() };
    let whole = afresh(dir.path(), &settings);
    for stop_at in [(Stage::Router, 6), (Stage::Language, 4), (Stage::Language, 8)] {
        let _ = fs_err::remove_file(dir.path().join("checkpoint"));
        let stopping = Told { stop_at: Some(stop_at), ..Told::default() };
        assert!(std::panic::catch_unwind(AssertUnwindSafe(|| tune(dir.path(), "moe", &settings, &stopping))).is_err());
        let told = Told::default();
        let resumed = tune(dir.path(), "moe", &settings, &told);
        assert_eq!(told.notes.into_inner().unwrap().len(), 1, "it says that it goes on");
        assert!(told.losses.into_inner().unwrap().len() < 14, "not every step is made again");
        assert_eq!((bytes(&resumed.changed), resumed.best_at, resumed.tokens), (bytes(&whole.changed), whole.best_at, whole.tokens));
        assert_eq!(resumed.best, whole.best);
    }
    // Another setting starts over, says so, and ends as it would have.
    let other = Settings { seed: 2, ..settings.clone() };
    let told = Told::default();
    let resumed = tune(dir.path(), "moe", &other, &told);
    assert!(told.notes.into_inner().unwrap()[0].contains("starting over"));
    let fresh = afresh(dir.path(), &other);
    assert_eq!(bytes(&resumed.changed), bytes(&fresh.changed));
    assert_ne!(bytes(&fresh.changed), bytes(&whole.changed), "the seed decides what is drawn");
}

#[test]
fn routers_learn_whose_text_it_is() {
    let dir = directory("llama", "classic");
    let told = Told::default();
    tune(dir.path(), "moe", &Settings { router_steps: 30, steps: 0, rate: 0.2, ..settings() }, &told);
    let losses = told.losses.into_inner().unwrap();
    // A coin toss is ln 2 in each of two layers.
    assert!(losses[0] > 1.2 && losses[29] < 0.4, "{losses:?}");
}

/// Steps of many times a weight's size.
const WILD: f64 = 300.0;

/// The composite after so much training that chance does not better it.
fn trained() -> TempDir {
    let dir = directory("llama", "classic");
    let long = Settings { scope: Scope::Attention { rank: 8 }, router_steps: 0, steps: 80, evaluate_every: 20, ..settings() };
    let tuned = afresh(dir.path(), &long);
    assert!(mean(&tuned.best) < 0.9 * 64f64.ln(), "{tuned:?}");
    let model = dir.path().join("moe");
    let (composite, _) = open(&model);
    let papers = write::Papers { tokenizer: composite.sources.base(), files: Vec::new() };
    write::write_with(&composite.replacing(tuned.changed), &papers, &dir.path().join("out"), &Options::default(), &Silent).unwrap();
    fs_err::remove_dir_all(&model).unwrap();
    fs_err::rename(dir.path().join("out"), model).unwrap();
    dir
}

#[test]
fn nothing_gained_changes_nothing() {
    let dir = trained();
    let tuned = afresh(dir.path(), &Settings { scope: ATTENTION, router_steps: 0, rate: WILD, ..settings() });
    assert!(tuned.changed.is_empty() && tuned.best_at.is_none());
    assert_eq!(tuned.best, tuned.start);
}

#[test]
fn a_stage_ends_when_nothing_is_gained_any_more() {
    let dir = trained();
    let _ = fs_err::remove_file(dir.path().join("checkpoint"));
    let told = Told::default();
    let settings = Settings { scope: ATTENTION, rate: WILD, router_steps: 0, steps: 50, evaluate_every: 2, patience: 2, ..settings() };
    tune(dir.path(), "moe", &settings, &told);
    assert_eq!(told.losses.into_inner().unwrap().len(), 4, "two evaluations of two steps");
}

#[test]
fn one_choice_of_weight_one_says_nothing_to_a_gate() {
    let dir = directory("llama", "classic");
    let config = dir.path().join("moe/config.json");
    let text = fs_err::read_to_string(&config).unwrap();
    assert!(text.contains("\"num_experts_per_tok\": 2"), "{text}");
    fs_err::write(&config, text.replace("\"num_experts_per_tok\": 2", "\"num_experts_per_tok\": 1")).unwrap();
    let told = Told::default();
    tune(dir.path(), "moe", &settings(), &told);
    assert_eq!(told.losses.into_inner().unwrap().len(), 6, "the routers' steps alone");
    assert!(told.notes.into_inner().unwrap()[0].contains("no gradient"));
}

/// The loss against an expert's own predictions is least where they are the composite's: its entropy.
#[test]
fn experts_teach_what_they_expect() {
    let dir = directory("llama", "classic");
    let run = |target, steps| {
        let _ = fs_err::remove_file(dir.path().join("checkpoint"));
        let told = Told::default();
        let settings = Settings { scope: Scope::Attention { rank: 8 }, target, router_steps: 0, steps, evaluate_every: 100, ..settings() };
        tune(dir.path(), "moe", &settings, &told);
        told.losses.into_inner().unwrap()
    };
    let losses = run(Target::Experts, 60);
    let ends = [&losses[..5], &losses[55..]].map(mean);
    assert!(ends[1] < ends[0] - 0.05, "{losses:?}");
    assert!((losses[0] - run(Target::Text, 1)[0]).abs() > 1e-3, "the text itself says something else");
}

/// Runs `upcycle tune` with small settings; random models' figures say nothing.
fn command(dir: &Path, args: &[&str]) -> String {
    let small = ["--window", "16", "--windows", "4", "--batch", "1", "--router-steps", "4", "--steps", "4", "--evaluate-every", "2"];
    let shown = transcript(dir, &[&["tune"], args, &small].concat());
    Regex::new(r"-?\d+\.\d+").unwrap().replace_all(&shown, "#").into_owned()
}

const TEXTS: [&str; 4] = ["--text", "odd=odd.txt", "--text", "even.txt"];

#[test]
fn the_command_writes_a_composite_from_a_recipe_or_a_directory() {
    let dir = directory("llama", "classic");
    let shown = command(dir.path(), &[&["recipe.yml", "-o", "one", "--random-seed", "3", "--learning-rate", "0.05"][..], &TEXTS].concat());
    assert!(shown.contains("exit 0"), "{shown}");
    let table = shown.lines().filter(|line| line.starts_with('|')).collect::<Vec<_>>().join("\n");
    assert_snapshot!(table, @"
    | held-out perplexity | odd | even | geomean |
    |---|---:|---:|---:|
    | as given | # | # | # |
    | tuned | # | # | # |
    ");
    let shown = command(dir.path(), &[&["one", "-o", "two", "--also", "attention", "--rank", "2"][..], &TEXTS].concat());
    assert!(shown.contains("exit 0"), "{shown}");
    let names = |model: &str| {
        let entries = fs_err::read_dir(dir.path().join(model)).unwrap();
        let mut names: Vec<_> = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    };
    assert_eq!(names("two"), names("moe"));
    let card = fs_err::read_to_string(dir.path().join("two/README.md")).unwrap();
    assert!(card.contains("## Tuned") && card.contains("the gates, the norms and attention (changes of rank 2)"), "{card}");
    open(&dir.path().join("two"));
}

#[test]
fn mistakes_are_named() {
    let dir = directory("llama", "classic");
    fs_err::write(dir.path().join("short.txt"), "w5 w6 w7 w8").unwrap();
    fs_err::write(dir.path().join("bytes.txt"), [&b"w5 w6 "[..], &[0xff; 4000]].concat()).unwrap();
    let shown: Vec<String> = [
        &["base", "-o", "out", "--text", "odd=odd.txt"][..],
        &["moe", "-o", "out", "--text", "odd=odd.txt", "--text", "law=even.txt"],
        &["moe", "-o", "out", "--text", "odd=short.txt"],
        &["moe", "-o", "out", "--text", "odd=bytes.txt"],
        &["moe", "-o", "out", "--text", "odd=missing.txt"],
        &["moe", "-o", "base", "--text", "odd=odd.txt"],
        &["moe", "-o", "out", "--text", "odd=odd.txt", "--learn", "experts"],
        &["moe", "-o", "out"],
    ]
    .iter()
    .map(|args| command(dir.path(), args))
    .collect();
    let said: Vec<&str> =
        shown.iter().flat_map(|shown| shown.lines()).filter(|line| line.starts_with("error") || line.starts_with("  --text")).collect();
    assert_snapshot!(said.join("\n"), @"
    error: the model is dense: it has no gates to tune; give a recipe, or the directory of a composite
    error: text `law` belongs to no expert: name it after its expert (`odd`, `even`), or leave out what needs to know it (`--router-steps 0`, `--learn text`)
    error: text `odd` has about 4 tokens; at least 8 pieces of 16 are needed, to train on some and hold out others: give more text, or a smaller `--window`
    error: bytes.txt: byte 6 is not UTF-8: give plain text
    error: failed to query resolved metadata `missing.txt`: No such file or directory (os error 2)
    error: base is not empty; give another directory, or `--overwrite`
    error: `--learn experts` needs the experts' own models: give the recipe instead of `moe`
    error: the following required arguments were not provided:
      --text <DOMAIN=FILE>
    ");
    let out: PathBuf = dir.path().join("out");
    assert!(!out.join("config.json").exists());
}
