//! `/v1/chat/completions` and `/v1/completions`: from a body to requests for the engine, and their events back, whole or as a stream.

use std::{
    convert::Infallible,
    sync::Arc,
    time::{SystemTime, UNIX_EPOCH},
};

use axum::{
    Json,
    body::Bytes,
    extract::{State, rejection::BytesRejection},
    http::StatusCode,
    response::{
        IntoResponse, Response,
        sse::{self, KeepAlive, Sse},
    },
};
use serde_json::Value;
use tokio::sync::mpsc::{self, Sender, UnboundedReceiver};
use tokio_stream::{
    StreamExt as _, StreamMap,
    wrappers::{ReceiverStream, UnboundedReceiverStream},
};

use super::{
    Server,
    error::ApiError,
    openai::{Body, Envelope, Kind, Prompt, Usage},
};
use crate::engine::{Event, FinishReason, Request};

/// Chunks that wait for a slow client before its events wait in the engine's channel.
const CHUNKS: usize = 16;

pub(super) async fn chat(State(server): State<Arc<Server>>, body: Result<Bytes, BytesRejection>) -> Result<Response, ApiError> {
    answer(server, body, Kind::Chat).await
}

pub(super) async fn text(State(server): State<Arc<Server>>, body: Result<Bytes, BytesRejection>) -> Result<Response, ApiError> {
    answer(server, body, Kind::Text).await
}

async fn answer(server: Arc<Server>, body: Result<Bytes, BytesRejection>, kind: Kind) -> Result<Response, ApiError> {
    let body = body.map_err(|rejection| ApiError::new(rejection.status(), rejection.body_text()))?;
    // Templates and tokenizers take their time on long prompts.
    let taken = tokio::task::spawn_blocking(move || take(&server, &body, kind)).await;
    let taken = taken.map_err(|error| ApiError::new(StatusCode::INTERNAL_SERVER_ERROR, error.to_string()))??;
    if taken.streams { Ok(stream(taken)) } else { whole(taken).await }
}

/// A request that the engine has taken: a channel for each choice.
struct Taken {
    envelope: Envelope,
    choices: Vec<UnboundedReceiver<Event>>,
    /// choices of one prompt
    n: usize,
    streams: bool,
    wants_usage: bool,
}

fn take(server: &Server, bytes: &[u8], kind: Kind) -> Result<Taken, ApiError> {
    let model = server.model()?;
    let body = Body::parse(bytes)?;
    if let Some(wanted) = body.model.as_ref().filter(|wanted| **wanted != model.name) {
        return Err(ApiError {
            param: Some("model".into()),
            ..ApiError::new(StatusCode::NOT_FOUND, format!("the model `{wanted}` is not served here; `{}` is", model.name))
                .code("model_not_found")
        });
    }
    body.refuse_unsupported()?;
    let text = model.engine.text();
    let prompts = match kind {
        Kind::Chat => vec![text.chat_prompt(&body.messages()?, &body.template_variables())?],
        Kind::Text => body
            .prompts()?
            .into_iter()
            .map(|prompt| match prompt {
                Prompt::Text(words) => text.prompt(&words),
                Prompt::Tokens(tokens) => Ok(tokens),
            })
            .collect::<Result<_, _>>()?,
    };
    let (n, stop, max_tokens) = (body.n()?, body.stop()?, body.max_tokens(kind));
    let sampling = body.sampling(&text.sampling)?;
    let mut choices = Vec::with_capacity(prompts.len() * n);
    for prompt in prompts {
        for choice in 0..n as u64 {
            // The choices of one prompt differ, and each is the same the next time.
            let seed = sampling.seed.map(|seed| seed.wrapping_add(choice));
            let sampling = crate::engine::Sampling { seed, ..sampling.clone() };
            choices.push(model.engine.submit(Request { prompt: prompt.clone(), sampling, max_tokens, stop: stop.clone() })?);
        }
    }
    let prefix = if kind == Kind::Chat { "chatcmpl" } else { "cmpl" };
    let envelope = Envelope {
        kind,
        id: format!("{prefix}-{:016x}", rand::random::<u64>()),
        created: SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs()),
        model: model.name.clone(),
    };
    Ok(Taken { envelope, choices, n, streams: body.streams(), wants_usage: body.wants_usage() })
}

async fn whole(taken: Taken) -> Result<Response, ApiError> {
    let mut usage = Usage::default();
    let mut choices: Vec<(String, FinishReason)> = Vec::with_capacity(taken.choices.len());
    for (index, mut events) in taken.choices.into_iter().enumerate() {
        let mut text = String::new();
        let finish = loop {
            match events.recv().await {
                Some(Event::Text(piece)) => text.push_str(&piece),
                Some(Event::Done(finish)) => break finish,
                Some(Event::Failed(reason)) => return Err(failed(reason)),
                None => return Err(failed("the engine stopped".into())),
            }
        };
        usage.add(index, taken.n, &finish);
        choices.push((text, finish.reason));
    }
    Ok(Json(taken.envelope.answer(&choices, usage)).into_response())
}

fn stream(taken: Taken) -> Response {
    let (chunks, receiver) = mpsc::channel(CHUNKS);
    tokio::spawn(async move {
        // An error means that the client is gone; the choices' channels close with it, and that cancels them.
        let _ = send_chunks(taken, &chunks).await;
    });
    let chunks = ReceiverStream::new(receiver).map(|data| Ok::<_, Infallible>(sse::Event::default().data(data)));
    Sse::new(chunks).keep_alive(KeepAlive::default()).into_response()
}

async fn send_chunks(taken: Taken, chunks: &Sender<String>) -> Result<(), mpsc::error::SendError<String>> {
    let Taken { envelope, choices, n, wants_usage, .. } = taken;
    let send = |mut chunk: Value| {
        if wants_usage && chunk.get("usage").is_none() {
            chunk["usage"] = Value::Null;
        }
        chunks.send(chunk.to_string())
    };
    for chunk in (0..choices.len()).filter_map(|index| envelope.opening(index)) {
        send(chunk).await?;
    }
    let mut usage = Usage::default();
    let mut left = choices.len();
    let mut events: StreamMap<_, _> = choices.into_iter().map(UnboundedReceiverStream::new).enumerate().collect();
    while left > 0 {
        let event = tokio::select! {
            () = chunks.closed() => return Ok(()),
            event = events.next() => event,
        };
        match event {
            Some((index, Event::Text(text))) => send(envelope.text(index, &text)).await?,
            Some((index, Event::Done(finish))) => {
                left -= 1;
                usage.add(index, n, &finish);
                send(envelope.closing(index, finish.reason)).await?;
            }
            Some((_, Event::Failed(reason))) => return chunks.send(failed(reason).object().to_string()).await,
            None => return chunks.send(failed("the engine stopped".into()).object().to_string()).await,
        }
    }
    if wants_usage {
        send(envelope.usage(usage)).await?;
    }
    chunks.send("[DONE]".into()).await
}

fn failed(reason: String) -> ApiError {
    ApiError::new(StatusCode::INTERNAL_SERVER_ERROR, reason)
}
