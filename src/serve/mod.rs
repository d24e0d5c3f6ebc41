//! The engine behind HTTP, with the API of `OpenAI`.
//!
//! Handlers translate; what is generated and when is the engine's business. Who may connect is decided by the address that the caller binds.

mod calls;
mod completions;
mod error;
mod experts;
mod openai;
mod page;
mod told;
mod tools;

use std::{
    any::Any,
    io,
    sync::{Arc, OnceLock},
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use axum::{
    Json, Router,
    extract::{DefaultBodyLimit, Path, State},
    http::{Method, StatusCode, Uri},
    response::{IntoResponse, Response},
    routing::{get, post},
};
use serde_json::{Value, json};
use tokio::{net::TcpListener, sync::oneshot, time};
use tower_http::{catch_panic::CatchPanicLayer, trace::TraceLayer};

use self::error::ApiError;
use crate::engine::Engine;

/// Bytes of a request's body at most.
const MAX_BODY: usize = 32 << 20;

/// How long requests may go on after a shutdown was asked for.
const GRACE: Duration = Duration::from_secs(20);

/// A model that is served.
#[derive(Debug)]
pub struct Model {
    /// what clients call it
    pub name: String,
    /// what answers
    pub engine: Engine,
}

/// What all handlers share. It may listen before its model is loaded: until then it answers 503.
#[derive(Debug, Default)]
pub struct Server {
    model: OnceLock<(Model, SystemTime)>,
}

impl Server {
    /// Hands over the model. Only the first one counts.
    pub fn ready(&self, model: Model) {
        let _ = self.model.set((model, SystemTime::now()));
    }

    fn model(&self) -> Result<&Model, ApiError> {
        let unavailable = |message: &str| ApiError::new(StatusCode::SERVICE_UNAVAILABLE, message);
        let (model, _) = self.model.get().ok_or_else(|| unavailable("the model is being loaded"))?;
        if model.engine.accepts() { Ok(model) } else { Err(unavailable("the server is shutting down")) }
    }

    /// The model, if it is called so.
    fn named(&self, name: Option<&str>) -> Result<&Model, ApiError> {
        let model = self.model()?;
        match name.filter(|wanted| *wanted != model.name) {
            None => Ok(model),
            Some(wanted) => Err(ApiError {
                param: Some("model".into()),
                ..ApiError::new(StatusCode::NOT_FOUND, format!("the model `{wanted}` is not served here; `{}` is", model.name))
                    .code("model_not_found")
            }),
        }
    }

    fn list(&self) -> Vec<Value> {
        let object = |(model, since): &(Model, SystemTime)| {
            let created = since.duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
            json!({"id": model.name, "object": "model", "created": created, "owned_by": "upcycle", "max_model_len": model.engine.context()})
        };
        self.model.get().map(object).into_iter().collect()
    }
}

/// Answers on `listener` until `shutdown` is done; then takes no more connections, lets requests finish for a while, and ends those that do not.
pub async fn serve(listener: TcpListener, server: Arc<Server>, shutdown: impl Future<Output = ()> + Send + 'static) -> io::Result<()> {
    let (closing, closed) = oneshot::channel();
    let drain = {
        let server = server.clone();
        async move {
            shutdown.await;
            if let Some((model, _)) = server.model.get() {
                model.engine.drain();
            }
            let _ = closing.send(());
        }
    };
    let running = axum::serve(listener, router(server.clone())).with_graceful_shutdown(drain).into_future();
    tokio::pin!(running);
    let patience = async {
        let _ = closed.await;
        time::sleep(GRACE).await;
    };
    tokio::select! {
        result = &mut running => return result,
        () = patience => {}
    }
    if let Some((model, _)) = server.model.get() {
        model.engine.abort();
    }
    // Clients that do not even read their error are left behind.
    time::timeout(Duration::from_secs(1), running).await.unwrap_or(Ok(()))
}

fn router(server: Arc<Server>) -> Router {
    Router::new()
        .route("/", get(page::page))
        .route("/health", get(health))
        .route("/v1/models", get(models))
        .route("/v1/models/{*name}", get(model))
        .route("/v1/experts", get(experts::list))
        .route("/v1/chat/completions", post(completions::chat))
        .route("/v1/completions", post(completions::text))
        .fallback(async |method: Method, uri: Uri| ApiError::new(StatusCode::NOT_FOUND, format!("there is no {method} {}", uri.path())))
        .method_not_allowed_fallback(async |method: Method, uri: Uri| {
            ApiError::new(StatusCode::METHOD_NOT_ALLOWED, format!("{} does not take {method}", uri.path()))
        })
        .layer(DefaultBodyLimit::max(MAX_BODY))
        .layer(CatchPanicLayer::custom(|_: Box<dyn Any + Send>| {
            ApiError::new(StatusCode::INTERNAL_SERVER_ERROR, "the server made a mistake; its log has the details").into_response()
        }))
        .layer(TraceLayer::new_for_http())
        .with_state(server)
}

async fn health(State(server): State<Arc<Server>>) -> Result<Response, ApiError> {
    server.model()?;
    Ok(Json(json!({"status": "ok"})).into_response())
}

async fn models(State(server): State<Arc<Server>>) -> Json<Value> {
    Json(json!({"object": "list", "data": server.list()}))
}

async fn model(State(server): State<Arc<Server>>, Path(name): Path<String>) -> Result<Json<Value>, ApiError> {
    let found = server.list().into_iter().find(|model| model["id"] == name);
    found
        .map(Json)
        .ok_or_else(|| ApiError::new(StatusCode::NOT_FOUND, format!("the model `{name}` is not served here")).code("model_not_found"))
}
