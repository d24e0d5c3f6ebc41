//! Engines over the bundled models.

use std::path::PathBuf;

use candle_core::{DType, Device};
use upcycle::{
    engine::{Engine, Options, Text},
    source,
};
use upcycle_architectures::decoder::Decoder;

/// The directory of a bundled model.
pub fn demo(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("demo").join(name)
}

/// An engine over a bundled model.
pub fn engine(name: &str, options: Options) -> Engine {
    with_text(name, options, |text| text)
}

/// The same with a changed tokenizer, template or sampling.
pub fn with_text(name: &str, options: Options, change: impl FnOnce(Text) -> Text) -> Engine {
    let source = source::open(&demo(name).to_string_lossy().parse().unwrap(), &source::OpenOptions::default()).unwrap();
    let text = Text::open(&source.sidecars, &source.config).unwrap();
    let decoder = Decoder::load(source.family, &source.config, &*source.weights, DType::F32, &Device::Cpu).unwrap();
    Engine::start(decoder, change(text), options).unwrap()
}
