//! `/tokenize` and `/detokenize`, as llama.cpp's server has them.

use std::sync::Arc;

use axum::{Json, body::Bytes, extract::State};
use serde::Deserialize;
use serde_json::{Value, json};

use super::{Server, blocking, error::ApiError, openai::parse};
use crate::engine::{EngineError, Specials};

#[derive(Debug, Deserialize)]
struct Text {
    model: Option<String>,
    #[serde(alias = "prompt", alias = "text")]
    content: String,
    #[serde(default)]
    add_special: bool,
    #[serde(default)]
    with_pieces: bool,
}

pub(super) async fn tokenize(State(server): State<Arc<Server>>, body: Bytes) -> Result<Json<Value>, ApiError> {
    let tokens = blocking(move || {
        let text: Text = parse(&body)?;
        let model = server.model(text.model.as_deref())?;
        let tokenizer = model.engine.tokenizer();
        let specials = if text.add_special { Specials::Add } else { Specials::Written };
        let tokens = tokenizer.encode(&text.content, specials).map_err(EngineError::from)?;
        // What is half a character is no string.
        let piece = |bytes: Vec<u8>| String::from_utf8(bytes).map_or_else(|error| json!(error.as_bytes()), Value::String);
        let with_piece = |id: &u32| json!({"id": id, "piece": piece(tokenizer.written(*id))});
        Ok(if text.with_pieces { tokens.iter().map(with_piece).collect() } else { json!(tokens) })
    });
    Ok(Json(json!({"tokens": tokens.await?})))
}

#[derive(Debug, Deserialize)]
struct Tokens {
    model: Option<String>,
    tokens: Vec<u32>,
}

pub(super) async fn detokenize(State(server): State<Arc<Server>>, body: Bytes) -> Result<Json<Value>, ApiError> {
    let content = blocking(move || {
        let tokens: Tokens = parse(&body)?;
        let model = server.model(tokens.model.as_deref())?;
        Ok(model.engine.tokenizer().spell(&tokens.tokens).map_err(EngineError::from)?)
    });
    Ok(Json(json!({"content": content.await?})))
}
