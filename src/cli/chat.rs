//! `upcycle chat`: talk to a model line by line; without a terminal, each line of stdin is a turn.

use std::io::{self, BufRead as _, IsTerminal as _};

use anstream::{eprint, eprintln};
use anyhow::bail;
use serde_json::{Map, Value, json};
use upcycle::engine::{Engine, Options, Request};

use super::{
    generation::GenerationArgs,
    model::{self, DeviceArgs, Loaded, QuantizeArgs},
    recipe, run, ui,
};

const HELP: &str = "/system TEXT  what the model should be (starts again)\n/reset        start again\n/exit         leave (or Ctrl-D)";

/// Arguments of `chat`.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// A recipe, a directory, a .gguf file, or owner/name
    model: String,
    /// What the system message says
    #[arg(long, value_name = "TEXT")]
    system: Option<String>,
    /// Tokens of one answer at most
    #[arg(long, short = 'n', value_name = "N", default_value_t = 512)]
    max_tokens: usize,
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
    let loaded = args.quantize.apply(model::open(&args.model, &args.options, &args.device)?);
    let engine = args.generation.engine(&loaded, &args.device, Options::default())?;
    if engine.text().template.is_none() {
        bail!("{} has no chat template: give one with `--chat-template FILE`, or use `upcycle run {} PROMPT`", loaded.name, args.model);
    }
    let terminal = io::stdin().is_terminal();
    if terminal {
        eprintln!("{} is listening; /help lists the commands.", loaded.name);
    }
    let mut messages = opening(args.system);
    let mut lines = io::stdin().lock().lines();
    loop {
        if terminal {
            eprint!("> ");
        }
        let Some(line) = lines.next().transpose()? else { break };
        let line = line.trim();
        match line.split_once(char::is_whitespace).unwrap_or((line, "")) {
            ("", _) => {}
            ("/exit" | "/quit", _) => break,
            ("/help", _) => eprintln!("{HELP}"),
            ("/reset", _) => messages.retain(|message| message["role"] == "system"),
            ("/system", text) => messages = opening(Some(text.trim().to_owned())),
            (command, _) if command.starts_with('/') => ui::warn(format!("there is no command {command}; /help lists them")),
            _ => {
                messages.push(json!({"role": "user", "content": line}));
                match answer(&engine, &loaded, &messages, args.max_tokens) {
                    Ok(text) => messages.push(json!({"role": "assistant", "content": text})),
                    Err(error) if terminal => {
                        messages.pop();
                        ui::warn(format!("{error:#} (/reset starts again)"));
                    }
                    Err(error) => return Err(error),
                }
            }
        }
    }
    Ok(())
}

fn opening(system: Option<String>) -> Vec<Value> {
    system.filter(|text| !text.is_empty()).map(|content| json!({"role": "system", "content": content})).into_iter().collect()
}

fn answer(engine: &Engine, loaded: &Loaded, messages: &[Value], max_tokens: usize) -> anyhow::Result<String> {
    let prompt = engine.text().chat_prompt(messages, &Map::new())?;
    let sampling = engine.text().sampling.clone();
    run::print(engine, loaded, Request { prompt, sampling, max_tokens: Some(max_tokens), ..Request::default() })
}
