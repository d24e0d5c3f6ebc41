//! How the commands talk: messages to stderr in the form `error: what`, `caused by: ...`, `hint: what to do`.

use std::{
    process::ExitCode,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use anstream::{AutoStream, ColorChoice, eprintln, println};
use anstyle::{AnsiColor, Style};
use indicatif::{HumanBytes, HumanDuration, ProgressBar, ProgressStyle};
use serde_json::json;
use tracing_subscriber::EnvFilter;
use upcycle::{
    recipe::{ModelRef, Problem, RecipeError},
    source::OpenOptions,
};

const ERROR: Style = AnsiColor::Red.on_default().bold();
const WARNING: Style = AnsiColor::Yellow.on_default().bold();
const HINT: Style = AnsiColor::Cyan.on_default().bold();

/// Whether only errors are to be said.
static QUIET: AtomicBool = AtomicBool::new(false);

/// Whether everything that is said while a command runs is a line of JSON.
static JSON: AtomicBool = AtomicBool::new(false);

/// What the log looks like.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum LogFormat {
    /// for people
    Text,
    /// for programs: an object per line, with the time
    Json,
}

/// Sets up logging to stderr: warnings by default, `-v` what is done, `-vv` how, `-q` errors alone. `RUST_LOG` overrides.
pub(crate) fn init(verbose: u8, quiet: bool, format: LogFormat) {
    JSON.store(format == LogFormat::Json, Ordering::Relaxed);
    QUIET.store(quiet, Ordering::Relaxed);
    let level = match (quiet, verbose) {
        (true, _) => "error",
        (_, 0) => "warn,upcycle=info",
        (_, 1) => "info,upcycle=debug",
        _ => "debug",
    };
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new(level));
    let colour = AutoStream::choice(&std::io::stderr()) != ColorChoice::Never;
    let log = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).with_target(false);
    match format {
        LogFormat::Text => log.with_ansi(colour).without_time().init(),
        LogFormat::Json => log.json().flatten_event(true).with_current_span(false).with_span_list(false).init(),
    }
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
    if let Some(usage) = error.downcast_ref::<clap::Error>() {
        return ExitCode::from(if usage.print().is_ok() { 2 } else { 1 });
    }
    let mut said = error.to_string();
    eprintln!("{ERROR}error{ERROR:#}: {said}");
    for cause in error.chain().skip(1).map(ToString::to_string) {
        // Many a message ends with its cause.
        if !said.contains(&cause) {
            eprintln!("  caused by: {cause}");
            said = cause;
        }
    }
    ExitCode::FAILURE
}

/// Prints what is wrong in a recipe.
pub(crate) fn problem(problem: &Problem) {
    eprintln!("{}\n", problem.styled());
}

/// Prints what is doubtful in a recipe, unless told to be quiet.
pub(crate) fn doubt(doubt: &Problem) {
    if !QUIET.load(Ordering::Relaxed) {
        problem(doubt);
    }
}

/// Prints what a long-running command has to say, whatever else is not to be said.
#[cfg(feature = "serve")]
pub(crate) fn say(message: impl std::fmt::Display) {
    if JSON.load(Ordering::Relaxed) {
        tracing::info!("{message}");
    } else {
        eprintln!("{message}");
    }
}

/// Prints a warning, unless told to be quiet.
pub(crate) fn warn(message: impl std::fmt::Display) {
    if JSON.load(Ordering::Relaxed) {
        tracing::warn!("{message}");
        return;
    }
    if QUIET.load(Ordering::Relaxed) {
        return;
    }
    eprintln!("{WARNING}warning{WARNING:#}: {message}");
}

/// Prints a hint.
pub(crate) fn hint(message: impl std::fmt::Display) {
    eprintln!("{HINT}hint{HINT:#}: {message}");
}

/// Progress of a write: a bar on a terminal, a line per shard elsewhere.
pub(crate) struct WriteProgress {
    bar: ProgressBar,
}

impl WriteProgress {
    pub(crate) fn new() -> Self {
        Self { bar: bytes_bar() }
    }

    /// Takes the bar away.
    pub(crate) fn finish(&self) {
        self.bar.finish_and_clear();
    }
}

impl upcycle::write::Progress for WriteProgress {
    fn begin(&self, total: u64, found: u64) {
        self.bar.set_length(total);
        self.bar.set_position(found);
        self.bar.reset_eta();
        if found > 0 {
            self.note(&format!("{} of {} are there from an earlier run", HumanBytes(found), HumanBytes(total)));
        }
    }

    fn advance(&self, bytes: u64) {
        self.bar.inc(bytes);
    }

    fn shard(&self, file: &str, bytes: u64) {
        let left = self.bar.length().is_some_and(|total| self.bar.position() < total);
        let rate = format!(", {}/s, {} left", HumanBytes(self.bar.per_sec() as u64), HumanDuration(self.bar.eta()));
        self.note(&format!("{file}  {}{}", HumanBytes(bytes), if left { &rate } else { "" }));
    }

    fn note(&self, message: &str) {
        self.bar.suspend(|| tracing::info!("{message}"));
    }
}

/// The same as lines of JSON on stdout: `begin`, `progress` at most twice a second, `shard`, `note`.
#[derive(Default)]
pub(crate) struct JsonProgress(Mutex<Written>);

#[derive(Default)]
struct Written {
    total: u64,
    found: u64,
    bytes: u64,
    begun: Option<Instant>,
    said: Option<Instant>,
}

impl JsonProgress {
    fn lock(&self) -> MutexGuard<'_, Written> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl upcycle::write::Progress for JsonProgress {
    fn begin(&self, total: u64, found: u64) {
        *self.lock() = Written { total, found, bytes: 0, begun: Some(Instant::now()), said: None };
        println!("{}", json!({"event": "begin", "total": total, "found": found}));
    }

    fn advance(&self, bytes: u64) {
        let mut state = self.lock();
        state.bytes += bytes;
        if state.said.is_some_and(|said| said.elapsed() < Duration::from_millis(500)) {
            return;
        }
        state.said = Some(Instant::now());
        let done = state.found + state.bytes;
        let rate = state.bytes as f64 / state.begun.map_or(0.0, |begun| begun.elapsed().as_secs_f64()).max(1e-3);
        let left = state.total.saturating_sub(done) as f64 / rate.max(1.0);
        println!(
            "{}",
            json!({"event": "progress", "done": done, "total": state.total, "bytes_per_second": rate as u64, "seconds_left": left})
        );
    }

    fn shard(&self, file: &str, bytes: u64) {
        println!("{}", json!({"event": "shard", "file": file, "bytes": bytes}));
    }

    fn note(&self, message: &str) {
        println!("{}", json!({"event": "note", "message": message}));
    }
}

/// How commands open models: the Hub of the environment, with a bar for downloads.
pub(crate) fn open_options(base: Option<ModelRef>) -> OpenOptions {
    OpenOptions { base, hub: Some(upcycle::env::hub()), progress: Some(Arc::new(DownloadProgress(bytes_bar()))) }
}

/// Progress of downloads: a bar on a terminal, a line per file elsewhere.
struct DownloadProgress(ProgressBar);

impl upcycle::source::Progress for DownloadProgress {
    fn start(&self, file: &str, total: u64, done: u64) {
        self.0.reset();
        self.0.set_message(file.to_owned());
        self.0.set_length(total);
        self.0.set_position(done);
        self.0.reset_eta();
    }

    fn advance(&self, bytes: u64) {
        self.0.inc(bytes);
    }

    fn finish(&self) {
        self.0.suspend(|| tracing::info!("fetched {}  {}", self.0.message(), HumanBytes(self.0.position())));
        self.0.finish_and_clear();
    }
}

/// A bar with bytes per second and time left; invisible when stderr is no terminal.
pub(crate) fn bytes_bar() -> ProgressBar {
    let style = ProgressStyle::with_template("{msg:20!} {wide_bar} {bytes}/{total_bytes} {bytes_per_sec} {eta} left");
    ProgressBar::new(0).with_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()))
}

/// A bar for steps of work with a word on what is being done; invisible when stderr is no terminal.
pub(crate) fn steps() -> ProgressBar {
    let style = ProgressStyle::with_template("{spinner} {msg:40!} {wide_bar} {pos}/{len} {eta} left");
    let bar = ProgressBar::new(0).with_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()));
    bar.enable_steady_tick(std::time::Duration::from_millis(200));
    bar
}
