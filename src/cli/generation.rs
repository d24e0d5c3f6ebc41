//! Options of the commands that generate text, and the engine that they make of a loaded model.

use std::path::PathBuf;

use anyhow::Context as _;
use sysinfo::{MemoryRefreshKind, RefreshKind, System};
use upcycle::engine::{ChatTemplate, Engine, Options, Sampling, Text};
use upcycle_architectures::decoder::{LanguageModel, Memory as _};

use super::{
    compose,
    model::{self, DeviceArgs, KvArgs, Loaded, MemoryArgs, Precision},
    ui,
};

/// How text is generated. What is not given is what the model's `generation_config.json` recommends.
#[derive(Debug, Clone, clap::Args)]
pub(crate) struct GenerationArgs {
    /// 0 takes the most likely token, greater values the less likely ones more often
    #[arg(long, value_name = "T")]
    temperature: Option<f32>,
    /// Choose among the K most likely tokens; 0 for all
    #[arg(long, value_name = "K")]
    top_k: Option<usize>,
    /// Choose among the most likely tokens that together have this probability
    #[arg(long, value_name = "P")]
    top_p: Option<f32>,
    /// Choose among tokens at least this likely relative to the most likely one
    #[arg(long, value_name = "P")]
    min_p: Option<f32>,
    /// Make tokens that are there already less likely (above 1)
    #[arg(long, value_name = "R", alias = "repeat-penalty")]
    repetition_penalty: Option<f32>,
    /// The same seed gives the same text
    #[arg(long, value_name = "N")]
    seed: Option<u64>,
    /// A Jinja chat template to use instead of the model's
    #[arg(long, value_name = "FILE")]
    chat_template: Option<PathBuf>,
    /// Tokens that prompt and answer may have together; the model's limit if not given
    #[arg(long, value_name = "N")]
    ctx_size: Option<usize>,
    /// Memory for keys and values, as 500M or 4G; if not given, what the requests answered together can fill, but at most half of what is free
    #[arg(long, value_name = "SIZE", value_parser = compose::size)]
    cache_size: Option<u64>,
    #[command(flatten)]
    kv: KvArgs,
    #[command(flatten)]
    memory: MemoryArgs,
    /// Look up at most N next tokens in the text so far and check them together; faster where text repeats itself, and the same text; 0 for off
    #[arg(long, value_name = "N", default_value_t = Options::default().lookup)]
    lookup: usize,
}

impl GenerationArgs {
    /// Starts the engine over a loaded model. `options` are completed with ours.
    pub(crate) fn engine(&self, loaded: &Loaded, device: &DeviceArgs, options: Options) -> anyhow::Result<Engine> {
        let mut text = Text::open(&loaded.sidecars, &loaded.config)?;
        text.experts.clone_from(&loaded.names);
        text.sampling = self.sampling(&text.sampling);
        text.sampling.check()?;
        if let Some(file) = &self.chat_template {
            let template = ChatTemplate::new(&fs_err::read_to_string(file)?, text.tokenizer.special_tokens().clone());
            text.template = Some(template.with_context(|| file.display().to_string())?);
        }
        let options = Options { context: self.ctx_size, cache: self.cache_size.map(|size| size as usize), lookup: self.lookup, ..options };
        if loaded.experts.is_empty() {
            self.start(self.kv.decoder(model::load_decoder(loaded, device, Precision::Fast)?, Precision::Fast)?, text, options)
        } else {
            self.start(self.kv.ensemble(model::load_ensemble(loaded, device, Precision::Fast)?, Precision::Fast)?, text, options)
        }
    }

    fn start(&self, model: impl LanguageModel + Send + 'static, text: Text, options: Options) -> anyhow::Result<Engine> {
        self.memory.settle(&model)?;
        start(model, text, options)
    }

    fn sampling(&self, recommended: &Sampling) -> Sampling {
        let r = recommended.clone();
        Sampling {
            temperature: self.temperature.unwrap_or(r.temperature),
            top_k: self.top_k.unwrap_or(r.top_k),
            top_p: self.top_p.unwrap_or(r.top_p),
            min_p: self.min_p.unwrap_or(r.min_p),
            repetition_penalty: self.repetition_penalty.unwrap_or(r.repetition_penalty),
            seed: self.seed,
            ..r
        }
    }
}

/// Starts an engine whose caches leave others half of the memory that is free, if the user said nothing else.
fn start<M>(model: M, text: Text, mut options: Options) -> anyhow::Result<Engine>
where
    M: LanguageModel + Send + 'static,
{
    let limit = model.config().max_positions.min(options.context.unwrap_or(usize::MAX));
    if options.cache.is_none() {
        let wanted = model.cache().growth(limit).saturating_mul(options.parallel);
        let system = System::new_with_specifics(RefreshKind::nothing().with_memory(MemoryRefreshKind::everything()))?;
        options.cache = Some(wanted.min(system.available_memory() as usize / 2));
    }
    let engine = Engine::start(model, text, options)?;
    if engine.context() < limit {
        let context = engine.context();
        ui::warn(format!(
            "prompt and answer can have {context} tokens instead of {limit}: the memory for keys and values is full then (`--cache-size`)"
        ));
    }
    Ok(engine)
}
