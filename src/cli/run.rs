//! `upcycle run`: one prompt in, text out.

use std::{
    io::{self, Read as _, Write as _},
    ops::ControlFlow,
};

use serde_json::{Map, json};
use upcycle::engine::{Engine, Finish, Options, Request};

use super::{
    generation::GenerationArgs,
    model::{self, DeviceArgs, Loaded, QuantizeArgs},
    recipe,
};

/// Arguments of `run`.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// A recipe, a directory, a .gguf file, or owner/name
    model: String,
    /// The prompt, or - to read it from stdin
    prompt: String,
    /// Go on from the prompt as it is, without the chat template
    #[arg(long)]
    raw: bool,
    /// What the system message says
    #[arg(long, value_name = "TEXT", conflicts_with = "raw")]
    system: Option<String>,
    /// Tokens to generate at most
    #[arg(long, short = 'n', value_name = "N", default_value_t = 512)]
    max_tokens: usize,
    /// End before this text (repeatable)
    #[arg(long, value_name = "TEXT")]
    stop: Vec<String>,
    #[command(flatten)]
    generation: GenerationArgs,
    #[command(flatten)]
    options: recipe::Options,
    #[command(flatten)]
    quantize: QuantizeArgs,
    #[command(flatten)]
    device: DeviceArgs,
}

pub(crate) fn run(args: Args) -> anyhow::Result<()> {
    args.device.set_threads()?;
    let mut prompt = args.prompt;
    if prompt == "-" {
        prompt.clear();
        io::stdin().read_to_string(&mut prompt)?;
    }
    let loaded = args.quantize.apply(model::open(&args.model, &args.options, &args.device)?);
    let engine = args.generation.engine(&loaded, &args.device, Options::default())?;
    let text = engine.text();
    // A model without a template was made to go on from plain text.
    let prompt = if args.raw || (text.template.is_none() && args.system.is_none()) {
        text.prompt(&prompt)?
    } else {
        let system = args.system.map(|content| json!({"role": "system", "content": content}));
        let messages: Vec<_> = system.into_iter().chain([json!({"role": "user", "content": prompt})]).collect();
        text.chat_prompt(&messages, &Map::new())?
    };
    let sampling = text.sampling.clone();
    print(&engine, &loaded, Request { prompt, sampling, max_tokens: Some(args.max_tokens), stop: args.stop, ..Request::default() })
}

/// Prints the text to stdout as it comes.
fn print(engine: &Engine, loaded: &Loaded, request: Request) -> anyhow::Result<()> {
    let mut out = io::stdout().lock();
    let mut ends_a_line = false;
    let mut written = Ok(());
    let finish = engine.stream(request, |piece| {
        ends_a_line = piece.ends_with('\n');
        written = out.write_all(piece.as_bytes()).and_then(|()| out.flush());
        if written.is_ok() { ControlFlow::Continue(()) } else { ControlFlow::Break(()) }
    })?;
    written?;
    if !ends_a_line {
        writeln!(out)?;
    }
    finish.iter().for_each(|finish| report(loaded, finish));
    Ok(())
}

/// Says how an answer was made.
pub(super) fn report(loaded: &Loaded, finish: &Finish) {
    tracing::debug!("{}", statistics(finish));
    if let Some(expert) = loaded.expert(finish.expert) {
        tracing::debug!("answered by {expert}");
    }
}

fn statistics(finish: &Finish) -> String {
    let speed = |tokens: usize, seconds: f64| if seconds > 0.0 { tokens as f64 / seconds } else { 0.0 };
    let read = finish.prompt_tokens - finish.cached_tokens;
    let (prefill, decode) = (finish.prefill.as_secs_f64(), finish.decode.as_secs_f64());
    format!(
        "{} tokens known and {read} read in {prefill:.2} s ({:.1}/s), {} written in {decode:.2} s ({:.1}/s), ended by {:?}",
        finish.cached_tokens,
        speed(read, prefill),
        finish.completion_tokens,
        speed(finish.completion_tokens.saturating_sub(1), decode),
        finish.reason,
    )
}
