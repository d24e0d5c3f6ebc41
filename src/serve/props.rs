//! What a server is and how it answers where a request does not say, in the form of llama.cpp's `/props`.

use std::sync::Arc;

use axum::{
    Json,
    extract::{Query, State, rejection::QueryRejection},
    http::StatusCode,
};
use serde_json::{Value, json};

use super::{Server, Which, blocking, error::ApiError};
use crate::engine::{ChatTemplate, Sampling};

/// What kind of server this is.
const BUILD: &str = concat!("upcycle-", env!("CARGO_PKG_VERSION"));

/// `GET /version`
pub(super) async fn version() -> Json<Value> {
    Json(json!({"version": env!("CARGO_PKG_VERSION")}))
}

/// `GET /props`
pub(super) async fn props(State(server): State<Arc<Server>>, which: Result<Query<Which>, QueryRejection>) -> Result<Json<Value>, ApiError> {
    let Query(which) = which.map_err(|rejection| ApiError::new(StatusCode::BAD_REQUEST, rejection.body_text()))?;
    let model = blocking(move || server.model(which.model.as_deref())).await?;
    let (text, load) = (model.engine.text(), model.engine.load());
    let Sampling { temperature, top_k, top_p, min_p, repetition_penalty, presence_penalty, frequency_penalty, seed, .. } = text.sampling;
    Ok(Json(json!({
        "model_alias": model.name,
        "build_info": BUILD,
        "total_slots": load.parallel,
        "chat_template": text.template.as_ref().map(ChatTemplate::source),
        "default_generation_settings": {
            "n_ctx": model.engine.context(),
            "params": {
                "temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p, "repeat_penalty": repetition_penalty,
                "presence_penalty": presence_penalty, "frequency_penalty": frequency_penalty, "seed": seed,
            },
        },
    })))
}
