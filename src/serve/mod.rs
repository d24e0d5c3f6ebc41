//! The engine behind HTTP, with the APIs of `OpenAI` and Ollama.
//!
//! Handlers translate; what is generated and when is the engine's business. A request passes, in this order, `observe`, which tells of its end,
//! `guard`, which lets it in, and its handler, which gets its model from the `registry`.

mod calls;
mod completions;
mod embeddings;
mod error;
mod experts;
mod guard;
mod listen;
mod metrics;
mod observe;
mod ollama;
mod openai;
mod openapi;
mod page;
mod props;
mod registry;
mod tokens;
mod told;
mod tools;

use std::{any::Any, io, sync::Arc, time::Duration};

use axum::{
    Json, Router,
    body::Bytes,
    extract::{DefaultBodyLimit, Path, State},
    http::{Method, StatusCode, Uri},
    middleware,
    response::IntoResponse,
    routing::{MethodRouter, get, post},
};
use serde::Deserialize;
use serde_json::{Value, json};
use tokio::{
    net::TcpListener,
    sync::oneshot,
    task,
    time::{self, MissedTickBehavior},
};
use tower_http::catch_panic::CatchPanicLayer;

use self::{
    error::ApiError,
    guard::Gate,
    metrics::Metrics,
    observe::{Account, Events},
    registry::{Model, Registry},
};
pub use self::{
    guard::{Access, Key},
    listen::bind,
    registry::{Entry, Loader, Residence},
};
use crate::engine::Request;

/// How long requests may go on after a shutdown was asked for.
const GRACE: Duration = Duration::from_secs(20);

/// How often is looked which models nobody needs.
const SWEEP: Duration = Duration::from_secs(1);

/// What all handlers share. It may listen before its models are there: until then it answers 503.
#[derive(Debug)]
pub struct Server {
    access: Access,
    metrics: Metrics,
    registry: Registry,
}

impl Server {
    /// A server of these models for those whom `access` lets in.
    pub fn new(access: Access, entries: Vec<Entry>, residence: Residence) -> Self {
        Self { access, metrics: Metrics::default(), registry: Registry::new(entries, residence) }
    }

    /// Loads the first model and lets requests in. The error says why it cannot be loaded. Not for async code.
    pub fn open(&self) -> Result<(), String> {
        self.registry.open()
    }

    /// The model of this name, or the first one where a request names none. Not for async code: it may have to be loaded.
    fn model(&self, name: Option<&str>) -> Result<Arc<Model>, ApiError> {
        self.registry.get(name)
    }

    /// Hands a request to a model, on somebody's account.
    fn submit(&self, model: &Arc<Model>, request: Request, account: &Arc<Account>) -> Result<Events, ApiError> {
        let events = model.engine.submit(request)?;
        Ok(Events::new(events, model.clone(), self.metrics.model(&model.name), account.clone()))
    }

    fn described(&self, name: &str) -> Result<Value, ApiError> {
        let found = self.registry.list().into_iter().find(|model| model["id"] == name);
        found.ok_or_else(|| ApiError::new(StatusCode::NOT_FOUND, format!("the model `{name}` is not served here")).code("model_not_found"))
    }
}

/// Answers on `listener` until `shutdown` is done; then takes no more connections, lets requests finish for a while, and ends those that do not.
pub async fn serve(listener: TcpListener, server: Arc<Server>, shutdown: impl Future<Output = ()> + Send + 'static) -> io::Result<()> {
    let gate = Gate { access: server.access.clone(), local: listener.local_addr()?.ip().is_loopback() };
    let (closing, closed) = oneshot::channel();
    let drain = {
        let server = server.clone();
        async move {
            shutdown.await;
            server.registry.drain();
            let _ = closing.send(());
        }
    };
    let sweeping = task::spawn(sweep(server.clone()));
    let running = listen::listen(listener, router(server.clone(), gate), &server.access, drain);
    tokio::pin!(running);
    let patience = async {
        let _ = closed.await;
        time::sleep(GRACE).await;
    };
    tokio::select! {
        () = &mut running => {}
        () = patience => {
            server.registry.abort();
            // Clients that do not even read their error are left behind.
            let _ = time::timeout(Duration::from_secs(1), running).await;
        }
    }
    sweeping.abort();
    Ok(())
}

/// Gives models back that nobody needs, for ever.
async fn sweep(server: Arc<Server>) {
    let mut ticks = time::interval(SWEEP);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        ticks.tick().await;
        let server = server.clone();
        let _ = task::spawn_blocking(move || server.registry.sweep()).await;
    }
}

/// Path, method and handler of all that is served. `openapi.json` describes the same.
fn routes() -> Vec<(&'static str, &'static str, MethodRouter<Arc<Server>>)> {
    vec![
        ("/", "get", get(page::page)),
        ("/health", "get", get(health)),
        ("/metrics", "get", get(metrics::metrics)),
        ("/props", "get", get(props::props)),
        ("/version", "get", get(props::version)),
        ("/openapi.json", "get", get(openapi::openapi)),
        ("/v1/models", "get", get(models)),
        ("/v1/models/{*name}", "get", get(model)),
        ("/v1/experts", "get", get(experts::list)),
        ("/models/load", "post", post(load)),
        ("/models/unload", "post", post(unload)),
        ("/models/reload", "post", post(reload)),
        ("/v1/chat/completions", "post", post(completions::chat)),
        ("/v1/completions", "post", post(completions::text)),
        ("/v1/embeddings", "post", post(embeddings::embed)),
        ("/tokenize", "post", post(tokens::tokenize)),
        ("/detokenize", "post", post(tokens::detokenize)),
        ("/api/chat", "post", post(ollama::chat)),
        ("/api/generate", "post", post(ollama::generate)),
        ("/api/tags", "get", get(ollama::tags)),
        ("/api/ps", "get", get(ollama::ps)),
        ("/api/show", "post", post(ollama::show)),
        ("/api/version", "get", get(ollama::version)),
    ]
}

fn router(server: Arc<Server>, gate: Gate) -> Router {
    let gate = Arc::new(gate);
    let mut router = routes()
        .into_iter()
        .fold(Router::new(), |router, (path, _, handler)| router.route(path, handler))
        .fallback(async |method: Method, uri: Uri| ApiError::new(StatusCode::NOT_FOUND, format!("there is no {method} {}", uri.path())))
        .method_not_allowed_fallback(async |method: Method, uri: Uri| {
            ApiError::new(StatusCode::METHOD_NOT_ALLOWED, format!("{} does not take {method}", uri.path()))
        })
        // The gate has looked at how much there is.
        .layer(DefaultBodyLimit::disable())
        .layer(middleware::from_fn_with_state(gate.clone(), guard::admit));
    if let Some(cors) = gate.cors() {
        router = router.layer(cors);
    }
    router
        .layer(CatchPanicLayer::custom(|_: Box<dyn Any + Send>| {
            ApiError::new(StatusCode::INTERNAL_SERVER_ERROR, "the server made a mistake; its log has the details").into_response()
        }))
        .layer(middleware::from_fn_with_state(server.clone(), observe::observe))
        .with_state(server)
}

async fn health(State(server): State<Arc<Server>>) -> Result<Json<Value>, ApiError> {
    server.registry.ready()?;
    Ok(Json(json!({"status": "ok"})))
}

async fn models(State(server): State<Arc<Server>>) -> Json<Value> {
    Json(json!({"object": "list", "data": server.registry.list()}))
}

async fn model(State(server): State<Arc<Server>>, Path(name): Path<String>) -> Result<Json<Value>, ApiError> {
    server.described(&name).map(Json)
}

/// Which model something is to be done with; the first one if it is not said.
#[derive(Debug, Deserialize)]
struct Which {
    model: Option<String>,
}

async fn load(State(server): State<Arc<Server>>, body: Bytes) -> Result<Json<Value>, ApiError> {
    change(server, body, |registry, name| registry.get(name).map(drop)).await
}

async fn unload(State(server): State<Arc<Server>>, body: Bytes) -> Result<Json<Value>, ApiError> {
    change(server, body, Registry::unload).await
}

async fn reload(State(server): State<Arc<Server>>, body: Bytes) -> Result<Json<Value>, ApiError> {
    change(server, body, Registry::reload).await
}

/// Does something with a model, and says where it is then.
async fn change(
    server: Arc<Server>,
    body: Bytes,
    act: impl FnOnce(&Registry, Option<&str>) -> Result<(), ApiError> + Send + 'static,
) -> Result<Json<Value>, ApiError> {
    let invalid = |error: serde_json::Error| ApiError::new(StatusCode::BAD_REQUEST, format!("the request is not valid: {error}"));
    let Which { model } = serde_json::from_slice(&body).map_err(invalid)?;
    blocking(move || {
        act(&server.registry, model.as_deref())?;
        let name = server.registry.name(model.as_deref())?;
        Ok(Json(json!({"success": true, "model": server.described(name)?})))
    })
    .await
}

/// Does what takes its time where nobody else waits for it.
async fn blocking<T: Send + 'static>(work: impl FnOnce() -> Result<T, ApiError> + Send + 'static) -> Result<T, ApiError> {
    let done = task::spawn_blocking(work).await;
    done.unwrap_or_else(|error| Err(ApiError::new(StatusCode::INTERNAL_SERVER_ERROR, format!("the server made a mistake: {error}"))))
}
