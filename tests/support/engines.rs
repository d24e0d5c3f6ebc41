//! Engines over the bundled models.

use std::path::PathBuf;

use candle_core::{DType, Device};
use upcycle::{
    calibrate,
    engine::{Engine, EngineError, Options, Text},
    plan::{self, Sources},
    recipe,
    source::{self, OpenOptions, Source},
};
use upcycle_architectures::decoder::{Decoder, Ensemble, KvType};

/// The directory of a bundled model.
pub fn demo(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("demo").join(name)
}

/// An engine over a bundled model.
pub fn engine(name: &str, options: Options) -> Engine {
    try_engine(name, options).unwrap()
}

/// The same, or why there is none.
pub fn try_engine(name: &str, options: Options) -> Result<Engine, EngineError> {
    let (decoder, text) = dense(name);
    Engine::start(decoder, text, options)
}

/// The same with a changed tokenizer, template or sampling.
pub fn with_text(name: &str, options: Options, change: impl FnOnce(Text) -> Text) -> Engine {
    let (decoder, text) = dense(name);
    Engine::start(decoder, change(text), options).unwrap()
}

/// An engine over a bundled model whose keys and values are kept in this type.
pub fn kept_as(kv_type: KvType, name: &str, options: Options) -> Engine {
    let (decoder, text) = dense(name);
    Engine::start(decoder.with_kv_type(kv_type).unwrap(), text, options).unwrap()
}

/// A bundled model, and what speaks for it.
pub fn dense(name: &str) -> (Decoder, Text) {
    let source = open(name);
    (decoder(&source), Text::open(&source.sidecars, &source.config).unwrap())
}

/// The bundled experts, as the composite has them.
pub const COMPOSED: [&str; 4] = ["code", "bible", "german", "math"];

/// An engine over the bundled experts, composed in memory with gates that need no fitting.
pub fn composite(options: Options) -> Engine {
    let (decoder, text) = composite_decoder();
    Engine::start(decoder, text, options).unwrap()
}

/// What that engine runs.
pub fn composite_decoder() -> (Decoder, Text) {
    let text = fs_err::read_to_string(demo("recipe.yml")).unwrap().replace("gate_mode: auto", "gate_mode: hidden");
    let (recipe, _) = recipe::parse(&text, &demo("recipe.yml"), &[]).unwrap();
    let opened = |reference: &recipe::ModelRef| Source { reference: reference.clone(), ..open(&reference.path) };
    let sources = Sources::open(&recipe, |reference, _| Ok::<_, source::SourceError>(opened(reference))).unwrap();
    let plan = plan::plan(&recipe, &sources, &[]).unwrap();
    let text = Text { experts: COMPOSED.map(str::to_owned).into(), ..Text::open(&sources.base().sidecars, &plan.config).unwrap() };
    let gates = calibrate::gates(&recipe, sources.base(), || Ok(decoder(sources.base()))).unwrap().gates;
    let composite = plan::composite(plan, sources, gates, None);
    let plan = &composite.plan;
    (Decoder::load(plan.family(), &plan.config, &composite, DType::F32, &Device::Cpu).unwrap(), text)
}

/// An engine over the bundled experts, each of them whole, in this order.
pub fn ensemble(experts: &[&str], options: Options) -> Engine {
    let base = open("base");
    let names = experts.iter().map(|&name| name.to_owned()).collect();
    let text = Text { experts: names, ..Text::open(&base.sidecars, &base.config).unwrap() };
    let experts = experts.iter().map(|name| decoder(&open(name))).collect();
    Engine::start(Ensemble::new(experts).unwrap(), text, options).unwrap()
}

fn open(name: &str) -> Source {
    source::open(&demo(name).to_string_lossy().parse().unwrap(), &OpenOptions::default()).unwrap()
}

fn decoder(source: &Source) -> Decoder {
    Decoder::load(source.family, &source.config, &*source.weights, DType::F32, &Device::Cpu).unwrap()
}
