//! How the commands talk: messages to stderr in the form `error: what`, `caused by: ...`, `hint: what to do`.

use std::process::ExitCode;

use anstream::eprintln;
use anstyle::{AnsiColor, Style};
use tracing_subscriber::EnvFilter;
use upcycle::recipe::{Problem, RecipeError};

const ERROR: Style = AnsiColor::Red.on_default().bold();
const WARNING: Style = AnsiColor::Yellow.on_default().bold();
const HINT: Style = AnsiColor::Cyan.on_default().bold();

/// Sets up logging to stderr: warnings by default, `-v` what is done, `-vv` how, `-q` errors alone. `RUST_LOG` overrides.
pub(crate) fn init(verbose: u8, quiet: bool) {
    let level = match (quiet, verbose) {
        (true, _) => "error",
        (_, 0) => "warn,upcycle=info",
        (_, 1) => "info,upcycle=debug",
        _ => "debug",
    };
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new(level));
    tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).without_time().with_target(false).init();
}

/// Prints an error with its causes and gives exit code 1. A closed pipe is success.
pub(crate) fn report(error: &anyhow::Error) -> ExitCode {
    let broken_pipe = |e: &std::io::Error| e.kind() == std::io::ErrorKind::BrokenPipe;
    if error.chain().any(|cause| cause.downcast_ref::<std::io::Error>().is_some_and(broken_pipe)) {
        return ExitCode::SUCCESS;
    }
    if let Some(RecipeError::Invalid(problems)) = error.downcast_ref() {
        problems.iter().for_each(problem);
        return ExitCode::FAILURE;
    }
    eprintln!("{ERROR}error{ERROR:#}: {error}");
    for cause in error.chain().skip(1) {
        eprintln!("  caused by: {cause}");
    }
    ExitCode::FAILURE
}

/// Prints what is wrong or doubtful in a recipe.
pub(crate) fn problem(problem: &Problem) {
    eprintln!("{}\n", problem.styled());
}

/// Prints a warning.
pub(crate) fn warn(message: impl std::fmt::Display) {
    eprintln!("{WARNING}warning{WARNING:#}: {message}");
}

/// Prints a hint.
pub(crate) fn hint(message: impl std::fmt::Display) {
    eprintln!("{HINT}hint{HINT:#}: {message}");
}
