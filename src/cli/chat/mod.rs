//! `upcycle chat`: talk to a model; without a terminal, each line of stdin is a turn.

mod command;
#[cfg(unix)]
mod editor;
mod input;
#[cfg(unix)]
mod keys;
mod paint;
mod session;
#[cfg(unix)]
mod terminal;

use anstream::eprintln;
use anyhow::bail;
use upcycle::{engine::Options, env};

use self::{command::Turn, input::Input, session::Session};
use super::{
    generation::GenerationArgs,
    model::{self, DeviceArgs, QuantizeArgs},
    recipe, ui,
};

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
    let mut session = Session::new(&engine, &loaded, args.max_tokens);
    session.take(Turn::System(args.system.unwrap_or_default()), &mut || false)?;
    let mut input = Input::open(env::state().join("chat_history"), session.names().to_vec())?;
    let terminal = input.is_terminal();
    if terminal {
        eprintln!("{} is listening; /help lists the commands.", loaded.name);
        if !session.names().is_empty() {
            eprintln!("experts: {}", paint::legend(session.names()));
        }
    }
    while let Some(turn) = input.next()? {
        match command::parse(&turn) {
            Ok(Turn::Exit) => break,
            Ok(turn) => match session.take(turn, &mut || input.interrupted()) {
                Err(error) if terminal => ui::warn(format!("{error:#}")),
                other => other?,
            },
            Err(message) => ui::warn(message),
        }
    }
    Ok(())
}
