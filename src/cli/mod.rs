//! The commands, one file each: the only place that prints, exits, or uses `anyhow`.
//!
//! Data goes to stdout, everything else to stderr. Exit code 0: done; 1: the input is wrong and the message says what to change;
//! 2: a bad command line.

mod bench;
mod chat;
mod completions;
mod compose;
mod composite;
mod demo;
mod doctor;
mod eval;
mod experts;
mod gates;
mod generation;
mod inspect;
#[cfg(feature = "serve")]
mod layers;
mod model;
mod plan;
mod quantize;
mod recipe;
mod run;
#[cfg(feature = "serve")]
mod serve;
mod stats;
mod texts;
mod tune;
mod ui;
mod verify;

use std::{ffi::OsString, process::ExitCode};

use clap::{FromArgMatches as _, Parser, Subcommand};

use self::ui::LogFormat;

/// Compose fine-tunes of one base model into a Mixture-of-Experts, and serve it.
#[derive(Debug, Parser)]
#[command(version, propagate_version = true)]
struct Cli {
    /// Say more (-v), or much more (-vv)
    #[arg(short, long, action = clap::ArgAction::Count, global = true)]
    verbose: u8,
    /// Say nothing but errors
    #[arg(short, long, global = true, conflicts_with = "verbose")]
    quiet: bool,
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Compose and try the bundled tiny experts: nothing to download
    Demo(demo::Args),
    /// Say what would be written: tensors, bytes, memory, problems
    Plan(plan::Args),
    /// Write the composite
    Compose(compose::Args),
    /// One more expert in a composite
    AddExpert(experts::Add),
    /// Another model in place of an expert of a composite
    ReplaceExpert(experts::Replace),
    /// One expert less in a composite
    RemoveExpert(experts::Remove),
    /// Hold a composite against what was written, and the models that it was made of
    Verify(verify::Args),
    /// Serve a model with OpenAI's API
    #[cfg(feature = "serve")]
    Serve(serve::Args),
    /// Talk to a model in the terminal
    Chat(chat::Args),
    /// One prompt in, text out
    Run(run::Args),
    /// Perplexity per domain, beside the experts, their average and a perfect router
    Eval(eval::Args),
    /// Show what a model is made of and where its tokens go
    Inspect(inspect::Args),
    /// Train the gates of a composite, or its attention too, on text of each expert's kind
    Tune(tune::Args),
    /// Gather or merge statistics of what a composite's routers see
    Stats(stats::Args),
    /// Set a composite's gates anew, from such statistics
    Gates(gates::Args),
    /// Write a model as one GGUF file, smaller
    Quantize(quantize::Args),
    /// How fast a model reads and writes here
    Bench(bench::Args),
    /// Devices, features, disk and memory
    Doctor(doctor::Args),
    /// Shell completions
    Completions(completions::Args),
}

impl Command {
    fn log_format(&self) -> LogFormat {
        match self {
            #[cfg(feature = "serve")]
            Self::Serve(args) => args.log_format(),
            _ => LogFormat::Text,
        }
    }
}

fn parse() -> anyhow::Result<Cli> {
    let arguments: Vec<OsString> = std::env::args_os().collect();
    let command = command();
    #[cfg(feature = "serve")]
    let command = layers::command(command, &arguments)?;
    Ok(Cli::from_arg_matches(&command.get_matches_from(arguments))?)
}

/// Runs the command line; errors go to stderr as `error: ...`, causes below it.
pub(crate) fn main() -> ExitCode {
    let cli = match parse() {
        Ok(cli) => cli,
        Err(error) => return ui::report(&error),
    };
    ui::init(cli.verbose, cli.quiet, cli.command.log_format());
    let result = match cli.command {
        Command::Demo(args) => demo::run(&args),
        Command::Plan(args) => plan::run(&args),
        Command::Compose(args) => compose::run(args),
        Command::AddExpert(args) => experts::add(&args),
        Command::ReplaceExpert(args) => experts::replace(&args),
        Command::RemoveExpert(args) => experts::remove(&args),
        Command::Verify(args) => verify::run(&args),
        #[cfg(feature = "serve")]
        Command::Serve(args) => serve::run(args),
        Command::Chat(args) => chat::run(args),
        Command::Run(args) => run::run(args),
        Command::Eval(args) => eval::run(&args),
        Command::Inspect(args) => inspect::run(&args),
        Command::Tune(args) => tune::run(&args),
        Command::Stats(args) => stats::run(&args),
        Command::Gates(args) => gates::run(&args),
        Command::Quantize(args) => quantize::run(&args),
        Command::Bench(args) => bench::run(&args),
        Command::Doctor(args) => doctor::run(args),
        Command::Completions(args) => {
            completions::run(&args);
            Ok(())
        }
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => ui::report(&error),
    }
}

/// For `completions`.
fn command() -> clap::Command {
    use clap::CommandFactory as _;
    Cli::command()
}
