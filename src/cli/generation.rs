//! Options of the commands that generate text, and the engine that they make of a loaded model.

use std::path::PathBuf;

use anyhow::Context as _;
use upcycle::engine::{ChatTemplate, Engine, Options, Sampling, Text};

use super::model::{self, DeviceArgs, Loaded, Precision};

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
}

impl GenerationArgs {
    /// Starts the engine over a loaded model. `options` are completed with ours.
    pub(crate) fn engine(&self, loaded: &Loaded, device: &DeviceArgs, options: Options) -> anyhow::Result<Engine> {
        let mut text = Text::open(&loaded.sidecars, &loaded.config)?;
        text.sampling = self.sampling(&text.sampling);
        text.sampling.check()?;
        if let Some(file) = &self.chat_template {
            let template = ChatTemplate::new(&fs_err::read_to_string(file)?, text.tokenizer.special_tokens().clone());
            text.template = Some(template.with_context(|| file.display().to_string())?);
        }
        let options = Options { context: self.ctx_size, ..options };
        Ok(if loaded.experts.is_empty() {
            Engine::start(model::load_decoder(loaded, device, Precision::Fast)?, text, options)?
        } else {
            Engine::start(model::load_ensemble(loaded, device, Precision::Fast)?, text, options)?
        })
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
