//! `upcycle serve`: listens, loads the model, answers until a signal comes.

use std::sync::Arc;

use anstream::eprintln;
use anyhow::Context as _;
use tokio::{net::TcpListener, runtime::Runtime, task};
use upcycle::{
    engine, env,
    serve::{self, Model, Server},
};

use super::{
    generation::GenerationArgs,
    model::{self, DeviceArgs, QuantizeArgs},
    recipe, ui,
};

/// Arguments of `serve`.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// A recipe, a directory, a .gguf file, or owner/name
    model: String,
    /// Address to listen on; 0.0.0.0 lets other machines in
    #[arg(long, env = env::HOST, default_value = "127.0.0.1")]
    host: String,
    /// Port to listen on; 0 takes a free one
    #[arg(long, env = env::PORT, default_value_t = 8080)]
    port: u16,
    /// What clients call the model; its file name if not given
    #[arg(long, value_name = "NAME", alias = "served-model-name")]
    alias: Option<String>,
    /// Requests that are answered at the same time
    #[arg(long, value_name = "N", default_value_t = engine::Options::default().parallel)]
    parallel: usize,
    /// Requests that may wait for that
    #[arg(long, value_name = "N", default_value_t = engine::Options::default().queue)]
    queue: usize,
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
    let runtime = Runtime::new()?;
    let result = runtime.block_on(serve(args));
    // A model that is still being loaded is not waited for.
    runtime.shutdown_background();
    result
}

async fn serve(args: Args) -> anyhow::Result<()> {
    let place = format!("{}:{}", args.host, args.port);
    let listener = TcpListener::bind((args.host.as_str(), args.port)).await.with_context(|| format!("cannot listen on {place}"))?;
    let address = listener.local_addr()?;
    let server = Arc::new(Server::default());
    let mut serving = task::spawn(serve::serve(listener, server.clone(), shutdown()));
    let loading = task::spawn_blocking(move || load(&args));
    tokio::select! {
        result = &mut serving => return Ok(result??),
        model = loading => server.ready(model??),
    }
    eprintln!("listening on http://{address}");
    Ok(serving.await??)
}

fn load(args: &Args) -> anyhow::Result<Model> {
    let loaded = args.quantize.apply(model::open(&args.model, &args.options, &args.device)?);
    let options = engine::Options { parallel: args.parallel, queue: args.queue, ..engine::Options::default() };
    let engine = args.generation.engine(&loaded, &args.device, options)?;
    if engine.text().template.is_none() {
        ui::warn("the model has no chat template: only /v1/completions will work (`--chat-template FILE` gives it one)");
    }
    Ok(Model { name: args.alias.clone().unwrap_or(loaded.name), engine })
}

/// Waits for the first signal; the second one ends the process at once.
async fn shutdown() {
    signal().await;
    eprintln!("finishing what has been asked; a second signal stops at once");
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
