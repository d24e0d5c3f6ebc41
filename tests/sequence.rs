//! `gate_mode: sequence` and `subspace`: who answers, whatever the neighbours; what the commands say; what is refused, and why.

use std::{collections::BTreeMap, path::Path};

use candle_core::{DType, Device, Tensor};
use tempfile::TempDir;
use upcycle::{
    calibrate,
    engine::{Engine, Event, Finish, Options, Request, Sampling},
    plan::{self, Sources},
    recipe, source,
    write::{self, Silent},
};
use upcycle_architectures::decoder::{Decoder, Logits, Probe, Site, Step};
use upcycle_routers::{
    init::subspace::{DIRECTIONS, SCALE},
    route::Routing,
};

use crate::support::{
    cli::transcript,
    engines::{demo, ensemble},
    models,
};

const EXPERTS: [&str; 4] = ["code", "bible", "german", "math"];

/// A text of each expert's kind.
fn samples() -> BTreeMap<String, String> {
    serde_json::from_str(&fs_err::read_to_string(demo("samples.json")).unwrap()).unwrap()
}

/// A recipe over the bundled experts, in a directory of its own.
fn recipe(mode: &str, expert: &str) -> (TempDir, String) {
    let mut text = format!("base_model: {}\ngate_mode: {mode}\ndtype: float32\nexperts:\n", demo("base").display());
    EXPERTS.iter().for_each(|name| text += &format!("  - source_model: {}\n{expert}", demo(name).display()));
    let dir = TempDir::new().unwrap();
    fs_err::write(dir.path().join("recipe.yml"), &text).unwrap();
    (dir, text)
}

fn opened(text: &str) -> (recipe::Recipe, Sources) {
    let recipe = recipe::parse(text, Path::new("recipe.yml"), &[]).unwrap().0;
    let sources = Sources::open(&recipe, |reference, _| source::open(reference, &source::OpenOptions::default())).unwrap();
    (recipe, sources)
}

fn answers(engine: &Engine, together: bool) -> Vec<(String, Finish)> {
    let greedy = Sampling { temperature: 0.0, ..Sampling::default() };
    let request = |text: &String| {
        let prompt = engine.text().prompt(text).unwrap();
        Request { prompt, sampling: greedy.clone(), max_tokens: Some(12), ..Request::default() }
    };
    let samples = samples();
    let mut running = Vec::new();
    let mut finished = Vec::new();
    for text in samples.values() {
        let mut events = engine.submit(request(text)).unwrap();
        if together {
            running.push(events);
        } else {
            finished.push(collect(&mut events));
        }
    }
    finished.extend(running.iter_mut().map(collect));
    finished
}

fn collect(events: &mut tokio::sync::mpsc::UnboundedReceiver<Event>) -> (String, Finish) {
    let mut text = String::new();
    loop {
        match events.blocking_recv().unwrap() {
            Event::Tokens(_) => {}
            Event::Text(piece) => text += &piece,
            Event::Done(finish) => return (text, finish),
            Event::Failed(reason) => panic!("{reason}"),
        }
    }
}

#[test]
fn every_text_is_answered_by_its_expert_whoever_runs_beside_it() {
    let alone = answers(&ensemble(&EXPERTS, Options { parallel: 1, ..Options::default() }), false);
    for ((domain, _), (_, finish)) in samples().iter().zip(&alone) {
        assert_eq!(finish.expert.map(|e| EXPERTS[e]), Some(domain.as_str()));
    }
    for chunk in [5, 256] {
        let together = answers(&ensemble(&EXPERTS, Options { chunk, ..Options::default() }), true);
        for ((text, finish), (expected, alone)) in together.iter().zip(&alone) {
            assert_eq!((text, finish.expert, finish.completion_tokens), (expected, alone.expert, alone.completion_tokens));
        }
    }
}

#[test]
fn an_answer_is_what_its_expert_alone_says() {
    let all = answers(&ensemble(&EXPERTS, Options::default()), false);
    for ((domain, _), (text, _)) in samples().iter().zip(&all) {
        let own = answers(&crate::support::engines::engine(domain, Options::default()), false);
        let at = samples().keys().position(|name| name == domain).unwrap();
        assert_eq!(*text, own[at].0, "{domain}");
        assert_eq!(own[at].1.expert, None, "a model alone is no choice");
    }
}

#[test]
fn commands_take_it_and_compose_says_why_not() {
    let (dir, _) = recipe("sequence", "");
    fs_err::write(dir.path().join("math.txt"), samples()["math"].repeat(3)).unwrap();
    let said = |args: &[&str]| transcript(dir.path(), args);
    let compose = said(&["compose", "recipe.yml", "out"]);
    for part in ["exit 1", "`gate_mode: sequence` cannot be written", "whole models", "`upcycle serve recipe.yml`", "`gate_mode: auto`"] {
        assert!(compose.contains(part), "{part}: {compose}");
    }
    assert!(!dir.path().join("out").exists());
    let plan = said(&["plan", "recipe.yml"]);
    assert!(
        plan.contains("output      none: recipe.yml is served from the experts' own files") && plan.contains("4, one per sequence"),
        "{plan}"
    );
    let run = said(&["-v", "run", "recipe.yml", &samples()["math"], "--raw", "-n", "3"]);
    assert!(run.contains("exit 0") && run.contains("answered by math"), "{run}");
    let eval = said(&["eval", "recipe.yml", "--text", "math=math.txt", "--window", "64", "--windows", "2"]);
    for part in ["exit 0", "**this recipe**", "| oracle ", "| all ", "who always asks the right one is the oracle", "a token was read by"] {
        assert!(eval.contains(part), "{part}: {eval}");
    }
    assert!(!eval.contains("| perfect router") && !eval.contains("| uniform"), "{eval}");
    let inspect = said(&["inspect", "recipe.yml", "--text", "math=math.txt", "--window", "64", "--windows", "2", "--html", "page.html"]);
    assert!(inspect.contains("4 whole models, 1 per sequence") && inspect.contains("text        `math`, of `math`"), "{inspect}");
    assert!(dir.path().join("page.html").exists());
}

#[test]
fn whole_experts_are_taken_as_they_are() {
    let refused = |text: &str| recipe::parse(text, Path::new("recipe.yml"), &[]).unwrap_err().to_string();
    let (_dir, text) = recipe("sequence", "    noise_scale: 0.1\n");
    let error = refused(&text);
    assert!(error.contains("the recipe has `noise_scale`") && error.contains("remove it"), "{error}");
    let (_dir, text) = recipe("sequence\nshared: average", "");
    assert!(refused(&text).contains("the recipe has `shared`"));
    let one = text.split("  - source_model").take(2).collect::<Vec<_>>().join("  - source_model").replace("\nshared: average", "");
    assert!(refused(&one).contains("there is only one expert"));
}

#[test]
fn an_expert_must_know_every_token_of_the_base() {
    let dir = TempDir::new().unwrap();
    let at = |name: &str| dir.path().join(name);
    models::write(&at("base"), "llama", 0);
    // other sizes and another family are no obstacle
    let mut config = models::config("qwen2");
    config["max_position_embeddings"] = 96.into();
    models::write_with(&at("a"), &config, &models::tensors("qwen2"), 1);
    let text = |second: &str| {
        format!(
            "base_model: {}\ngate_mode: sequence\nexperts:\n  - source_model: {}\n  - source_model: {}\n",
            at("base").display(),
            at("a").display(),
            at(second).display()
        )
    };
    let (recipe, sources) = opened(&text("base"));
    let plan = plan::sequence(&recipe, &sources, &[]).unwrap();
    assert_eq!(plan.config.max_positions, 96);
    assert!(plan.warnings.iter().any(|warning| warning.contains("the context is 96 tokens")), "{:?}", plan.warnings);

    let mut tensors = models::tensors("llama");
    tensors.iter_mut().filter(|(name, _)| name.contains("embed") || name.contains("head")).for_each(|(_, shape)| shape[0] = 60);
    let mut config = models::config("llama");
    config["vocab_size"] = 60.into();
    models::write_with(&at("small"), &config, &tensors, 2);
    let (recipe, sources) = opened(&text("small"));
    let error = plan::sequence(&recipe, &sources, &[]).unwrap_err().to_string();
    assert!(error.contains("has embeddings of 60 tokens, but the tokenizer of the base"), "{error}");
}

/// What a router sees and says.
#[derive(Default)]
struct Seen {
    input: Vec<Vec<f32>>,
    logits: Vec<Vec<f32>>,
}

impl Probe for Seen {
    fn wants(&self, site: Site) -> bool {
        site == Site::RouterInput
    }

    fn observe(&mut self, _: Site, _: usize, x: &Tensor) -> candle_core::Result<()> {
        self.input.push(x.flatten_all()?.to_vec1()?);
        Ok(())
    }

    fn route(&mut self, _: usize, logits: &[f32], _: &mut Routing) {
        self.logits.push(logits.to_vec());
    }
}

#[test]
fn a_subspace_router_measures_what_lies_in_each_experts_directions() {
    let (dir, text) = recipe("subspace", "");
    let (recipe, sources) = opened(&text);
    let plan = plan::plan(&recipe, &sources, &[]).unwrap();
    let gates = calibrate::subspace(&recipe, &sources).unwrap();
    let hidden = plan.config.hidden;
    for gate in &gates.routed {
        assert_eq!(gate.experts, EXPERTS.len() * DIRECTIONS);
        let dot = |a: usize, b: usize| gate.row(a).iter().zip(gate.row(b)).map(|(a, b)| a * b).sum::<f32>();
        for (a, b) in (0..DIRECTIONS).flat_map(|a| (0..DIRECTIONS).map(move |b| (a, b))) {
            assert!((dot(a, b) - f32::from(u8::from(a == b))).abs() < 1e-4, "{a} {b}");
        }
    }
    let alone = rayon::ThreadPoolBuilder::new().num_threads(1).build().unwrap();
    let again = alone.install(|| calibrate::subspace(&recipe, &sources).unwrap());
    assert_eq!(again.routed, gates.routed, "threads change nothing");

    let composite = plan::composite(plan, sources, gates.clone(), None);
    let decoder = Decoder::load(composite.plan.family(), &composite.plan.config, &composite, DType::F32, &Device::Cpu).unwrap();
    let mut seen = Seen::default();
    let tokens: Vec<u32> = (3..40).collect();
    decoder.forward(&mut [Step { tokens: &tokens, cache: &mut decoder.cache(), logits: Logits::None }], &mut seen).unwrap();
    for ((x, logits), gate) in seen.input.iter().zip(&seen.logits).zip(&gates.routed) {
        for (x, logits) in x.chunks_exact(hidden).zip(logits.chunks_exact(EXPERTS.len())) {
            let square: f64 = x.iter().map(|x| f64::from(*x).powi(2)).sum();
            for (e, logit) in logits.iter().enumerate() {
                let along = |row: usize| gate.row(row).iter().zip(x).map(|(v, x)| f64::from(*v) * f64::from(*x)).sum::<f64>();
                let within: f64 = (0..DIRECTIONS).map(|r| along(e * DIRECTIONS + r).powi(2)).sum();
                assert!((f64::from(*logit) - SCALE * within / square).abs() < 1e-3, "{logit}");
            }
        }
    }
    let error = write::write(&composite, &recipe, &dir.path().join("out"), &write::Options::default(), &Silent).unwrap_err().to_string();
    assert!(error.contains("`gate_mode: subspace` cannot be written") && error.contains("linear gates"), "{error}");
    let run = transcript(dir.path(), &["run", "recipe.yml", "Problem: Compute 1 + 2.", "--raw", "-n", "3"]);
    assert!(run.contains("exit 0"), "{run}");
    let inspect = transcript(dir.path(), &["inspect", "recipe.yml"]);
    assert!(inspect.contains("exit 0"), "{inspect}");
}
