//! `/v1/chat/completions` and `/v1/completions`: from a body to requests for the engine, and their events back, whole or as a stream.

use std::{
    convert::Infallible,
    sync::Arc,
    time::{SystemTime, UNIX_EPOCH},
};

use axum::{
    Extension, Json,
    body::Bytes,
    extract::State,
    http::StatusCode,
    response::{
        IntoResponse, Response,
        sse::{self, KeepAlive, Sse},
    },
};
use serde_json::Value;
use tokio::sync::mpsc::{self, Sender};
use tokio_stream::{StreamExt as _, StreamMap, wrappers::ReceiverStream};

use super::{
    Server, blocking,
    calls::{Calls, Part},
    error::ApiError,
    observe::{Account, Events},
    openai::{Body, Choice, Envelope, Kind, Usage, parse},
    told::Told,
    tools,
};
use crate::engine::{Event, Finish, Request, Sampling, Tell};

/// Chunks that wait for a slow client before its events wait in the engine's channel.
const CHUNKS: usize = 16;

pub(super) async fn chat(server: State<Arc<Server>>, account: Extension<Arc<Account>>, body: Bytes) -> Result<Response, ApiError> {
    answer(server.0, account.0, body, Kind::Chat).await
}

pub(super) async fn text(server: State<Arc<Server>>, account: Extension<Arc<Account>>, body: Bytes) -> Result<Response, ApiError> {
    answer(server.0, account.0, body, Kind::Text).await
}

async fn answer(server: Arc<Server>, account: Arc<Account>, body: Bytes, kind: Kind) -> Result<Response, ApiError> {
    // Templates and tokenizers take their time on long prompts.
    let taken = blocking(move || take(&server, &account, &body, kind)).await?;
    if taken.streams { Ok(stream(taken)) } else { whole(taken).await }
}

/// A request that the engine has taken: a channel for each choice.
pub(super) struct Taken {
    envelope: Envelope,
    pub(super) choices: Vec<Running>,
    /// choices of one prompt that are given
    n: usize,
    /// of so many that are written
    best_of: usize,
    streams: bool,
    wants_usage: bool,
}

/// A choice that is being generated.
pub(super) struct Running {
    pub(super) events: Events,
    /// reads calls out of its text, where there are tools
    pub(super) calls: Option<Calls>,
    told: Told,
}

/// What a piece of text says.
pub(super) fn parts(calls: &mut Option<Calls>, text: String) -> Vec<Part> {
    match calls {
        Some(calls) => calls.push(&text),
        None => vec![Part::Text(text)],
    }
}

pub(super) fn take(server: &Server, account: &Arc<Account>, bytes: &[u8], kind: Kind) -> Result<Taken, ApiError> {
    let body: Body = parse(bytes)?;
    let model = server.model(body.model.as_deref())?;
    body.refuse_unsupported(kind)?;
    let text = model.engine.text();
    let template = text.template.as_ref();
    let tools = if kind == Kind::Chat { body.tools()? } else { None };
    let prompts = match kind {
        Kind::Chat => {
            let (mut messages, mut variables) = (body.messages()?, body.template_variables());
            tools::explain(tools.as_ref(), &mut messages, &mut variables, template);
            vec![text.chat_prompt(&messages, &variables)?]
        }
        Kind::Text => body.prompts()?.into_iter().map(|prompt| prompt.tokens(text)).collect::<Result<_, _>>()?,
    };
    let (n, best_of) = (body.n()?, body.best_of()?);
    let sampling = body.sampling(&text.sampling)?;
    let (steering, tell) = (body.wishes().steering(&model.engine)?, body.tell(kind)?);
    let (call, format) = (tools.as_ref().and_then(|tools| tools.grammar(text)), body.grammar()?);
    let param = if call.is_some() { "tools" } else { "response_format" };
    if call.is_some() && format.is_some() {
        return Err(ApiError::invalid("response_format", "an answer cannot be both a call of a tool and of a `response_format`"));
    }
    if call.is_some() || format.is_some() {
        body.refuse_ends()?;
    }
    let constraint = call.or(format).map(|grammar| model.engine.constraint(&grammar)).transpose();
    let constraint = constraint.map_err(|error| ApiError { param: Some(param.into()), ..error.into() })?;
    let calls = || tools.as_ref().map(|tools| tools.calls(template));
    let experts = model.engine.experts().map_or(0, |experts| experts.names().len());
    let told = || Told { kind, tell, tokenizer: text.tokenizer.clone(), experts, tokens: Vec::new() };
    let marks: Vec<String> = calls().iter().map(|calls| calls.opening().to_owned()).collect();
    // To know the best takes to know how likely each is.
    let ranked = Tell { logprobs: tell.logprobs.or((best_of > n).then_some(0)), ..tell };
    let request = Request { constraint, steering, tell: ranked, marks, ..body.request(kind)? };
    let mut choices = Vec::with_capacity(prompts.len() * best_of);
    for prompt in prompts {
        for choice in 0..best_of as u64 {
            // The choices of one prompt differ, and each is the same the next time.
            let seed = sampling.seed.map(|seed| seed.wrapping_add(choice));
            let sampling = Sampling { seed, ..sampling.clone() };
            let request = Request { prompt: prompt.clone(), sampling, ..request.clone() };
            choices.push(Running { events: server.submit(&model, request, account)?, calls: calls(), told: told() });
        }
    }
    let prefix = if kind == Kind::Chat { "chatcmpl" } else { "cmpl" };
    let envelope = Envelope {
        kind,
        id: format!("{prefix}-{:016x}", rand::random::<u64>()),
        created: SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs()),
        model: model.name.clone(),
    };
    Ok(Taken { envelope, choices, n, best_of, streams: body.streams(), wants_usage: body.wants_usage() })
}

/// A choice that is whole.
struct Written {
    choice: Choice,
    told: Told,
    finish: Finish,
}

impl Written {
    /// The mean of its tokens' logarithms of probability.
    fn likelihood(&self) -> f64 {
        self.finish.logprob / self.finish.completion_tokens.max(1) as f64
    }
}

async fn whole(taken: Taken) -> Result<Response, ApiError> {
    let mut usage = Usage::default();
    let mut written: Vec<Written> = Vec::with_capacity(taken.choices.len());
    for (index, Running { mut events, mut calls, mut told }) in taken.choices.into_iter().enumerate() {
        let mut choice = Choice::default();
        let finish = loop {
            match events.next().await {
                Some(Event::Tokens(tokens)) => told.tokens.extend(tokens),
                Some(Event::Text(text)) => parts(&mut calls, text).into_iter().for_each(|part| choice.push(part)),
                Some(Event::Done(finish)) => break finish,
                Some(Event::Failed(reason)) => return Err(failed(reason)),
                None => return Err(failed("the engine stopped".into())),
            }
        };
        calls.iter_mut().flat_map(Calls::finish).for_each(|part| choice.push(part));
        usage.add(index, taken.best_of, &finish);
        written.push(Written { choice, told, finish });
    }
    let (mut written, mut best) = (written.into_iter().peekable(), Vec::new());
    while written.peek().is_some() {
        let mut all: Vec<Written> = written.by_ref().take(taken.best_of).collect();
        if taken.best_of > taken.n {
            all.sort_by(|a, b| b.likelihood().total_cmp(&a.likelihood()));
        }
        best.extend(all.into_iter().take(taken.n));
    }
    let (choices, mut told): (Vec<_>, Vec<_>) = best.into_iter().map(|best| ((best.choice, best.finish.reason), best.told)).unzip();
    let mut answer = taken.envelope.answer(&choices, usage);
    told.iter_mut().enumerate().for_each(|(index, told)| told.put(&mut answer["choices"][index]));
    Ok(Json(answer).into_response())
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
    let Taken { envelope, choices, best_of, wants_usage, .. } = taken;
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
    let (events, mut writing): (Vec<_>, Vec<_>) =
        choices.into_iter().map(|running| (running.events, (running.calls, running.told))).unzip();
    let mut events: StreamMap<_, _> = events.into_iter().enumerate().collect();
    while left > 0 {
        let event = tokio::select! {
            () = chunks.closed() => return Ok(()),
            event = events.next() => event,
        };
        match event {
            Some((index, Event::Tokens(tokens))) => writing[index].1.tokens.extend(tokens),
            Some((index, Event::Text(text))) => {
                let (calls, told) = &mut writing[index];
                for part in parts(calls, text) {
                    send(with(told, envelope.part(index, &part))).await?;
                }
            }
            Some((index, Event::Done(finish))) => {
                left -= 1;
                usage.add(index, best_of, &finish);
                let (calls, told) = &mut writing[index];
                for part in calls.iter_mut().flat_map(Calls::finish) {
                    send(with(told, envelope.part(index, &part))).await?;
                }
                send(with(told, envelope.closing(index, finish.reason, calls.as_ref().map_or(0, Calls::count)))).await?;
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

/// A chunk with what is told of its tokens, and of those before it whose text is no part of any.
fn with(told: &mut Told, mut chunk: Value) -> Value {
    told.put(&mut chunk["choices"][0]);
    chunk
}

pub(super) fn failed(reason: String) -> ApiError {
    ApiError::new(StatusCode::INTERNAL_SERVER_ERROR, reason)
}
