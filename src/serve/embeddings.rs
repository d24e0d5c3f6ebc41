//! `/v1/embeddings`: the mean of the last hidden states over a text's tokens, of length 1.
//!
//! What a model that was made to write says of a text this way is coarser than what models made for search say: good for telling subjects apart.

use std::sync::Arc;

use axum::{Extension, Json, body::Bytes, extract::State};
use base64::{Engine as _, prelude::BASE64_STANDARD};
use serde::Deserialize;
use serde_json::{Value, json};
use tokio_stream::StreamExt as _;

use super::{
    Server, blocking,
    completions::failed,
    error::ApiError,
    observe::Account,
    openai::{Prompt, parse, prompts},
};
use crate::engine::{Event, Finish, Request, Task};

/// Inputs of one request at most.
const MOST: usize = 2048;
/// Inputs that the engine is given at a time: more would fill its queue.
const TOGETHER: usize = 16;

#[derive(Debug, Deserialize)]
struct Body {
    model: Option<String>,
    input: Option<Value>,
    encoding_format: Option<String>,
    dimensions: Option<usize>,
}

/// How numbers are written.
#[derive(Debug, Clone, Copy)]
enum Format {
    Floats,
    /// of the bytes of f32, little endian
    Base64,
}

impl Body {
    fn format(&self) -> Result<Format, ApiError> {
        match self.encoding_format.as_deref() {
            None | Some("float") => Ok(Format::Floats),
            Some("base64") => Ok(Format::Base64),
            Some(_) => Err(ApiError::invalid("encoding_format", "`encoding_format` must be \"float\" or \"base64\"")),
        }
    }
}

pub(super) async fn embed(
    State(server): State<Arc<Server>>,
    Extension(account): Extension<Arc<Account>>,
    body: Bytes,
) -> Result<Json<Value>, ApiError> {
    let body: Body = parse(&body)?;
    let format = body.format()?;
    if body.dimensions.is_some() {
        let message = "`dimensions` is not supported: a part of these embeddings means little (it takes a model that was trained for that)";
        return Err(ApiError::invalid("dimensions", message).code("unsupported_parameter"));
    }
    let inputs = prompts("input", body.input.as_ref())?;
    if inputs.len() > MOST {
        return Err(ApiError::invalid("input", format!("`input` has {} entries, expected {MOST} at most", inputs.len())));
    }
    let name = body.model;
    let model = blocking({
        let server = server.clone();
        move || server.model(name.as_deref())
    });
    let model = model.await?;
    let of_input = |error: ApiError| ApiError { param: error.param.map(|_| "input".into()), ..error };
    let (mut data, mut tokens) = (Vec::with_capacity(inputs.len()), 0);
    let mut inputs = inputs.into_iter().peekable();
    while inputs.peek().is_some() {
        let (some, server, model, account) =
            (inputs.by_ref().take(TOGETHER).collect::<Vec<_>>(), server.clone(), model.clone(), account.clone());
        let taken = blocking(move || {
            let submit = |input: Prompt| {
                let prompt = input.tokens(model.engine.text())?;
                server.submit(&model, Request { prompt, task: Task::Embed, ..Request::default() }, &account)
            };
            some.into_iter().map(|input| submit(input).map_err(of_input)).collect::<Result<Vec<_>, _>>()
        });
        for mut events in taken.await? {
            let finish = loop {
                match events.next().await {
                    Some(Event::Done(finish)) => break finish,
                    Some(Event::Failed(reason)) => return Err(failed(reason)),
                    Some(Event::Tokens(_) | Event::Text(_)) => {}
                    None => return Err(failed("the engine stopped".into())),
                }
            };
            tokens += finish.prompt_tokens;
            data.push(object(data.len(), finish, format));
        }
    }
    let usage = json!({"prompt_tokens": tokens, "total_tokens": tokens});
    Ok(Json(json!({"object": "list", "data": data, "model": model.name, "usage": usage})))
}

fn object(index: usize, finish: Finish, format: Format) -> Value {
    let mut embedding = finish.embedding.unwrap_or_default();
    let length = embedding.iter().map(|x| f64::from(*x).powi(2)).sum::<f64>().sqrt();
    embedding.iter_mut().for_each(|x| *x = (f64::from(*x) / length.max(f64::MIN_POSITIVE)) as f32);
    let embedding = match format {
        Format::Floats => json!(embedding),
        Format::Base64 => json!(BASE64_STANDARD.encode(embedding.iter().flat_map(|x| x.to_le_bytes()).collect::<Vec<u8>>())),
    };
    json!({"object": "embedding", "index": index, "embedding": embedding})
}
