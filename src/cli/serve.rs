//! `upcycle serve`: listens, loads the model, answers until a signal comes.

use std::{
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use anyhow::{Context as _, bail};
use tokio::{runtime::Runtime, task};
use upcycle::{
    engine::{self, Engine},
    serve::{self, Access, Entry, Key, Residence, Server},
};

use super::{
    compose,
    generation::GenerationArgs,
    model::{self, DeviceArgs, QuantizeArgs},
    recipe,
    ui::{self, LogFormat},
};

/// Arguments of `serve`. Each can be given as a variable and in a file, too: `layers`.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Recipes, directories, .gguf files, or owner/name; NAME=MODEL to give one a name. The first one is loaded at once, others when asked for
    #[arg(required = true, value_name = "MODEL")]
    model: Vec<String>,
    /// Address to listen on; 0.0.0.0 lets other machines in
    #[arg(long, default_value = "127.0.0.1")]
    host: String,
    /// Port to listen on; 0 takes a free one
    #[arg(long, default_value_t = 8080)]
    port: u16,
    /// What clients call the model, if there is one; its file name if not given
    #[arg(long, value_name = "NAME", alias = "served-model-name")]
    alias: Option<String>,
    /// Requests that are answered at the same time
    #[arg(long, value_name = "N", default_value_t = engine::Options::default().parallel)]
    parallel: usize,
    /// Requests that may wait for that
    #[arg(long, value_name = "N", default_value_t = engine::Options::default().queue)]
    queue: usize,
    /// Models in memory at most; when another is asked for, the one that nobody has asked for longest goes
    #[arg(long, value_name = "N")]
    max_models: Option<usize>,
    /// Seconds after which a model that nobody asks for is unloaded; 0 for never
    #[arg(long, value_name = "SECONDS", value_parser = seconds, default_value = "0")]
    idle: Duration,
    #[command(flatten)]
    access: AccessArgs,
    /// YAML file with any of these options; the command line wins, then variables (`UPCYCLE_MAX_BODY` for `--max-body`), then the file
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// What the log looks like
    #[arg(long, value_enum, value_name = "FORMAT", default_value_t = LogFormat::Text)]
    log_format: LogFormat,
    #[command(flatten)]
    generation: GenerationArgs,
    #[command(flatten)]
    options: recipe::Options,
    #[command(flatten)]
    quantize: QuantizeArgs,
    #[command(flatten)]
    device: DeviceArgs,
}

/// Who may ask, and how much.
#[derive(Debug, Clone, clap::Args)]
struct AccessArgs {
    /// Only who has one of these keys may ask; several with commas between (repeatable)
    #[arg(long, value_name = "KEY", value_delimiter = ',')]
    api_key: Vec<String>,
    /// File with such keys, one a line
    #[arg(long, value_name = "FILE")]
    api_key_file: Option<PathBuf>,
    /// Pages of these origins may ask, as https://host:port, several with commas between (repeatable); * for all
    #[arg(long, value_name = "ORIGIN", value_delimiter = ',')]
    cors_origin: Vec<String>,
    /// Bytes of a request at most, as 500K or 32M
    #[arg(long, value_name = "SIZE", value_parser = compose::size, default_value_t = Access::default().max_body as u64)]
    max_body: u64,
    /// How long a request may take to come, its head and its body
    #[arg(long, value_name = "SECONDS", value_parser = seconds, default_value = "30")]
    read_timeout: Duration,
    /// How long an answer may take; 0 for any time
    #[arg(long, value_name = "SECONDS", value_parser = seconds, default_value = "0")]
    timeout: Duration,
    /// Connections at most
    #[arg(long, value_name = "N", default_value_t = Access::default().connections)]
    max_connections: usize,
    /// Write what is asked into the log
    #[arg(long)]
    log_prompts: bool,
}

fn seconds(text: &str) -> Result<Duration, String> {
    let seconds: f64 = text.parse().map_err(|_| "a number of seconds is expected".to_owned())?;
    Duration::try_from_secs_f64(seconds).map_err(|error| error.to_string())
}

impl AccessArgs {
    fn access(&self) -> anyhow::Result<Access> {
        let file = self.api_key_file.as_ref().map(fs_err::read_to_string).transpose()?;
        let secrets = self.api_key.iter().map(String::as_str).chain(file.iter().flat_map(|text| text.lines()));
        let keys: Vec<Key> = secrets.map(str::trim).filter(|secret| !secret.is_empty()).map(Key::new).collect();
        if keys.is_empty() && (!self.api_key.is_empty() || file.is_some()) {
            bail!("keys were asked for with `--api-key` or `--api-key-file`, but there is none");
        }
        if let Some(wrong) = self.cors_origin.iter().find(|origin| !is_origin(origin)) {
            bail!("`{wrong}` is no origin: `https://host` or `http://host:port` is expected, without a path");
        }
        if self.read_timeout.is_zero() {
            bail!("`--read-timeout 0` would let no request in");
        }
        Ok(Access {
            keys,
            origins: self.cors_origin.clone(),
            max_body: self.max_body as usize,
            read_timeout: self.read_timeout,
            timeout: Some(self.timeout).filter(|timeout| !timeout.is_zero()),
            connections: self.max_connections,
            log_prompts: self.log_prompts,
        })
    }
}

/// Whether a browser could call a page's origin so.
fn is_origin(text: &str) -> bool {
    let place = |place: &str| !place.is_empty() && !place.contains(['/', '?', '#', '@', ' ']);
    text == "*" || text.split_once("://").is_some_and(|(scheme, rest)| !scheme.is_empty() && place(rest))
}

impl Args {
    pub(crate) fn log_format(&self) -> LogFormat {
        self.log_format
    }
}

pub(crate) fn run(args: Args) -> anyhow::Result<()> {
    args.device.set_threads()?;
    let runtime = Runtime::new()?;
    let result = runtime.block_on(serve(args));
    // A model that is still being loaded is not waited for.
    runtime.shutdown_background();
    result
}

async fn serve(args: Args) -> anyhow::Result<()> {
    let place = format!("{}:{}", args.host, args.port);
    let access = args.access.access()?;
    open_many_files();
    let listener = serve::bind(&args.host, args.port).await.with_context(|| format!("cannot listen on {place}"))?;
    let address = listener.local_addr()?;
    if !address.ip().is_loopback() && access.keys.is_empty() {
        ui::warn(format!("whoever can reach {address} may ask: `--api-key` keeps others out"));
    }
    let residence = Residence { most: args.max_models, idle: Some(args.idle).filter(|idle| !idle.is_zero()) };
    let server = Arc::new(Server::new(access, entries(args)?, residence));
    let mut serving = task::spawn(serve::serve(listener, server.clone(), shutdown()));
    let loading = task::spawn_blocking(move || server.open());
    tokio::select! {
        result = &mut serving => return Ok(result??),
        opened = loading => opened?.map_err(anyhow::Error::msg)?,
    }
    ui::say(format_args!("listening on http://{address}"));
    Ok(serving.await??)
}

/// What is served, each under a name of its own.
fn entries(args: Args) -> anyhow::Result<Vec<Entry>> {
    if args.alias.is_some() && args.model.len() > 1 {
        bail!("`--alias` names one model, but there are {}: NAME=MODEL gives each its own", args.model.len());
    }
    let args = Arc::new(args);
    let mut entries: Vec<Entry> = Vec::new();
    for model in &args.model {
        let (name, place) = named(model);
        let name = args.alias.clone().or(name).unwrap_or_else(|| model::name(&place));
        if let Some(other) = entries.iter().find(|entry| entry.name == name) {
            bail!("`{}` and `{place}` are both called `{name}`: NAME=MODEL gives one another name", other.place);
        }
        let load = {
            let (args, place) = (args.clone(), place.clone());
            move || load(&args, &place).map_err(|error| format!("{error:#}"))
        };
        entries.push(Entry { name, place, load: Box::new(load) });
    }
    Ok(entries)
}

/// The name that the user gives a model, if any, and what the model is.
fn named(model: &str) -> (Option<String>, String) {
    match model.split_once('=') {
        Some((name, place)) if !name.is_empty() && !name.contains('/') && !Path::new(model).exists() => (Some(name.into()), place.into()),
        _ => (None, model.into()),
    }
}

fn load(args: &Args, place: &str) -> anyhow::Result<Engine> {
    let loaded = args.quantize.apply(model::open(place, &args.options, &args.device)?);
    let options = engine::Options { parallel: args.parallel, queue: args.queue, ..engine::Options::default() };
    let engine = args.generation.engine(&loaded, &args.device, options)?;
    if engine.text().template.is_none() {
        ui::warn("the model has no chat template: only /v1/completions will work (`--chat-template FILE` gives it one)");
    }
    Ok(engine)
}

/// Lets the process have as many files as the system allows it: every connection is one.
fn open_many_files() {
    #[cfg(target_os = "linux")]
    {
        use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
        let maximum = getrlimit(Resource::Nofile).maximum;
        if let Err(error) = setrlimit(Resource::Nofile, Rlimit { current: maximum, maximum }) {
            tracing::debug!("the limit of open files stays as it is: {error}");
        }
    }
}

/// Waits for the first signal; the second one ends the process at once.
async fn shutdown() {
    signal().await;
    ui::say("finishing what has been asked; a second signal stops at once");
    #[expect(clippy::exit, reason = "the user insists")]
    task::spawn(async {
        signal().await;
        std::process::exit(130)
    });
}

async fn signal() {
    #[cfg(unix)]
    {
        use tokio::signal::unix::{SignalKind, signal};
        let (Ok(mut interrupt), Ok(mut terminate)) = (signal(SignalKind::interrupt()), signal(SignalKind::terminate())) else {
            return std::future::pending().await;
        };
        tokio::select! {
            _ = interrupt.recv() => {}
            _ = terminate.recv() => {}
        }
    }
    #[cfg(not(unix))]
    if tokio::signal::ctrl_c().await.is_err() {
        std::future::pending::<()>().await;
    }
}
