//! Ollama's API: its requests said in `OpenAI`'s words, and the answers told in its own.
//!
//! Models are named as in `/v1/models`; a tag `:latest` is as good as none.

use std::{
    sync::Arc,
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use axum::{
    Extension, Json,
    body::{Body, Bytes},
    extract::State,
    http::{StatusCode, header},
    response::{IntoResponse, Response},
};
use jiff::Timestamp;
use serde::Deserialize;
use serde_json::{Map, Value, json};
use tokio::{
    sync::mpsc::{self, Sender},
    task,
};
use tokio_stream::{StreamExt as _, wrappers::ReceiverStream};

use super::{
    Server, blocking,
    calls::{Calls, Part},
    completions::{self, Running},
    error::ApiError,
    observe::Account,
    openai::Kind,
    registry::{Keep, Model},
};
use crate::engine::{Event, Finish, FinishReason};

/// Lines that wait for a slow client.
const LINES: usize = 16;

/// Where `OpenAI` has a default length, Ollama has none: more than any context holds.
const NO_LIMIT: u64 = 1 << 40;

/// Options that mean the same by another name, or by the same.
const OPTIONS: [(&str, &str); 9] = [
    ("temperature", "temperature"),
    ("top_k", "top_k"),
    ("top_p", "top_p"),
    ("min_p", "min_p"),
    ("seed", "seed"),
    ("stop", "stop"),
    ("repeat_penalty", "repetition_penalty"),
    ("presence_penalty", "presence_penalty"),
    ("frequency_penalty", "frequency_penalty"),
];

/// Options that would change the answer, and the value that asks for nothing.
const UNSUPPORTED: [(&str, f64); 3] = [("mirostat", 0.0), ("typical_p", 1.0), ("tfs_z", 1.0)];

/// An error as Ollama gives it.
#[derive(Debug)]
pub(super) struct OllamaError(ApiError);

impl From<ApiError> for OllamaError {
    fn from(error: ApiError) -> Self {
        Self(error)
    }
}

impl IntoResponse for OllamaError {
    fn into_response(self) -> Response {
        let message = Json(json!({"error": self.0.message}));
        let (mut parts, _) = self.0.into_response().into_parts();
        parts.headers.remove(header::CONTENT_LENGTH);
        (parts, message).into_response()
    }
}

/// The body of either request.
#[derive(Debug, Deserialize)]
struct Ask {
    #[serde(alias = "name")]
    model: String,
    messages: Option<Vec<Value>>,
    prompt: Option<String>,
    system: Option<String>,
    suffix: Option<String>,
    template: Option<String>,
    raw: Option<bool>,
    context: Option<Vec<Value>>,
    images: Option<Vec<Value>>,
    stream: Option<bool>,
    format: Option<Value>,
    options: Option<Map<String, Value>>,
    keep_alive: Option<Value>,
    tools: Option<Value>,
    think: Option<Value>,
}

impl Ask {
    fn parse(bytes: &[u8]) -> Result<Self, ApiError> {
        let invalid = |error: serde_json::Error| ApiError::new(StatusCode::BAD_REQUEST, format!("the request is not valid: {error}"));
        let mut ask: Self = serde_json::from_slice(bytes).map_err(invalid)?;
        ask.model = untagged(&ask.model).to_owned();
        Ok(ask)
    }

    /// Whether nothing is asked but that the model be there, or go.
    fn is_empty(&self, way: Way) -> bool {
        match way {
            Way::Chat => self.messages.as_ref().is_none_or(Vec::is_empty),
            Way::Generate => self.prompt.as_ref().is_none_or(String::is_empty) && self.suffix.is_none(),
        }
    }

    /// The same in `OpenAI`'s words.
    fn translated(&self, way: Way, templated: bool) -> Result<(Kind, Value), ApiError> {
        let asked = |text: &Option<String>| text.as_ref().is_some_and(|text| !text.is_empty());
        if asked(&self.template) {
            return Err(ApiError::invalid(
                "template",
                "`template` is not supported: `upcycle serve --chat-template FILE` takes one in Jinja",
            ));
        }
        if self.images.as_ref().is_some_and(|images| !images.is_empty()) || self.messages.iter().flatten().any(has_images) {
            return Err(ApiError::invalid("images", "`images` are not supported"));
        }
        if self.context.as_ref().is_some_and(|context| !context.is_empty()) {
            return Err(ApiError::invalid("context", "`context` is not supported: send the text, what has been read is not read again"));
        }
        let mut body = json!({"model": self.model});
        let raw = self.raw.unwrap_or(false) || self.suffix.is_some() || !templated;
        let kind = match way {
            Way::Chat => {
                body["messages"] = json!(self.messages);
                Kind::Chat
            }
            Way::Generate if raw => {
                let system = self.system.iter().filter(|_| !self.raw.unwrap_or(false));
                let parts: Vec<&str> = system.chain(&self.prompt).filter(|text| !text.is_empty()).map(String::as_str).collect();
                body["prompt"] = parts.join("\n\n").into();
                if let Some(suffix) = &self.suffix {
                    body["suffix"] = json!(suffix);
                }
                Kind::Text
            }
            Way::Generate => {
                let message = |role: &str, text: &Option<String>| text.as_ref().map(|text| json!({"role": role, "content": text}));
                let messages = [message("system", &self.system), message("user", &self.prompt)];
                body["messages"] = messages.into_iter().flatten().collect();
                Kind::Chat
            }
        };
        body["max_tokens"] = NO_LIMIT.into();
        self.options(&mut body)?;
        if let Some(format) = self.format()? {
            body["response_format"] = format;
        }
        if let Some(tools) = &self.tools {
            body["tools"] = tools.clone();
        }
        if let Some(think) = self.think.as_ref().filter(|think| !think.is_null()) {
            body["chat_template_kwargs"] = json!({"enable_thinking": think});
        }
        Ok((kind, body))
    }

    fn options(&self, body: &mut Value) -> Result<(), ApiError> {
        let Some(options) = &self.options else { return Ok(()) };
        for (name, nothing) in UNSUPPORTED {
            if options.get(name).and_then(Value::as_f64).is_some_and(|value| (value - nothing).abs() > f64::EPSILON) {
                return Err(ApiError::invalid(name, format!("`{name}` is not supported")));
            }
        }
        for (theirs, ours) in OPTIONS {
            if let Some(value) = options.get(theirs) {
                body[ours] = value.clone();
            }
        }
        if let Some(most) = options.get("num_predict").and_then(Value::as_u64).filter(|most| *most > 0) {
            body["max_tokens"] = most.into();
        }
        Ok(())
    }

    fn format(&self) -> Result<Option<Value>, ApiError> {
        match &self.format {
            None | Some(Value::Null) => Ok(None),
            Some(Value::String(word)) if word.is_empty() => Ok(None),
            Some(Value::String(word)) if word == "json" => Ok(Some(json!({"type": "json_object"}))),
            Some(schema @ Value::Object(_)) => {
                Ok(Some(json!({"type": "json_schema", "json_schema": {"name": "format", "schema": schema}})))
            }
            Some(_) => Err(ApiError::invalid("format", "`format` must be \"json\" or a JSON schema")),
        }
    }

    fn keep(&self) -> Result<Option<Keep>, ApiError> {
        let invalid =
            || ApiError::invalid("keep_alive", "`keep_alive` must be a number of seconds or a duration as \"5m\"; below 0 means for ever");
        match &self.keep_alive {
            None | Some(Value::Null) => Ok(None),
            Some(Value::Number(seconds)) => seconds.as_f64().and_then(keep).map(Some).ok_or_else(invalid),
            Some(Value::String(text)) => duration(text).and_then(keep).map(Some).ok_or_else(invalid),
            Some(_) => Err(invalid()),
        }
    }
}

fn has_images(message: &Value) -> bool {
    message["images"].as_array().is_some_and(|images| !images.is_empty())
}

fn keep(seconds: f64) -> Option<Keep> {
    if seconds < 0.0 { Some(Keep::Always) } else { Duration::try_from_secs_f64(seconds).ok().map(Keep::For) }
}

/// Seconds of a duration as Go writes them: `1h30m`, `-1s`, `250ms`, or a number of seconds.
fn duration(text: &str) -> Option<f64> {
    if let Ok(seconds) = text.parse() {
        return Some(seconds);
    }
    let (sign, mut rest) = text.strip_prefix('-').map_or((1.0, text), |rest| (-1.0, rest));
    let mut seconds = 0.0;
    while !rest.is_empty() {
        let digits = rest.find(|c: char| !c.is_ascii_digit() && c != '.')?;
        let (number, after) = rest.split_at(digits);
        let letters = after.find(|c: char| !c.is_ascii_alphabetic()).unwrap_or(after.len());
        let (unit, after) = after.split_at(letters);
        let factor = match unit {
            "h" => 3600.0,
            "m" => 60.0,
            "s" => 1.0,
            "ms" => 1e-3,
            _ => return None,
        };
        seconds += number.parse::<f64>().ok()? * factor;
        rest = after;
    }
    Some(sign * seconds)
}

/// A name without the tag that means nothing.
fn untagged(name: &str) -> &str {
    name.strip_suffix(":latest").unwrap_or(name)
}

/// The two ways to ask.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Way {
    Chat,
    Generate,
}

impl Way {
    /// A line with what is said.
    fn says(self, text: &str) -> Value {
        match self {
            Self::Chat => json!({"message": {"role": "assistant", "content": text}}),
            Self::Generate => json!({"response": text}),
        }
    }
}

/// `POST /api/chat`
pub(super) async fn chat(server: State<Arc<Server>>, account: Extension<Arc<Account>>, body: Bytes) -> Result<Response, OllamaError> {
    Ok(answer(server.0, account.0, body, Way::Chat).await?)
}

/// `POST /api/generate`
pub(super) async fn generate(server: State<Arc<Server>>, account: Extension<Arc<Account>>, body: Bytes) -> Result<Response, OllamaError> {
    Ok(answer(server.0, account.0, body, Way::Generate).await?)
}

async fn answer(server: Arc<Server>, account: Arc<Account>, body: Bytes, way: Way) -> Result<Response, ApiError> {
    let started = Instant::now();
    let taken = blocking(move || take(&server, &account, &body, way, started)).await?;
    let (lines, mut receiver) = mpsc::channel(LINES);
    let streams = taken.streams;
    task::spawn(async move {
        // An error means that the client is gone; the text's channel closes with it, and that cancels it.
        let _ = tell(taken, &lines).await;
    });
    if streams {
        let lines = ReceiverStream::new(receiver).map(|line: Value| Ok::<_, std::convert::Infallible>(format!("{line}\n")));
        return Ok(([(header::CONTENT_TYPE, "application/x-ndjson")], Body::from_stream(lines)).into_response());
    }
    let mut whole = Value::Null;
    while let Some(line) = receiver.recv().await {
        if let Some(error) = line["error"].as_str() {
            return Err(ApiError::new(StatusCode::INTERNAL_SERVER_ERROR, error));
        }
        whole = joined(&whole, line);
    }
    Ok(Json(whole).into_response())
}

/// The line after others, with what they said.
fn joined(before: &Value, mut line: Value) -> Value {
    let said = |line: &Value, way: Way| match way {
        Way::Chat => line["message"]["content"].as_str().unwrap_or_default().to_owned(),
        Way::Generate => line["response"].as_str().unwrap_or_default().to_owned(),
    };
    if line.get("message").is_some() {
        line["message"]["content"] = (said(before, Way::Chat) + &said(&line, Way::Chat)).into();
        if let Some(calls) = before["message"].get("tool_calls") {
            line["message"]["tool_calls"] = calls.clone();
        }
    } else {
        line["response"] = (said(before, Way::Generate) + &said(&line, Way::Generate)).into();
    }
    line
}

/// A request on its way.
struct Taken {
    way: Way,
    model: String,
    /// none where only the model was asked for
    running: Option<Running>,
    /// what became of a model that was asked for alone
    done: &'static str,
    streams: bool,
    started: Instant,
    /// how long it took until the model had the request
    load: Duration,
}

fn take(server: &Server, account: &Arc<Account>, body: &[u8], way: Way, started: Instant) -> Result<Taken, ApiError> {
    let ask = Ask::parse(body)?;
    let keep = ask.keep()?;
    let taken = |running, done| Taken {
        way,
        model: ask.model.clone(),
        running,
        done,
        streams: ask.stream.unwrap_or(true),
        started,
        load: started.elapsed(),
    };
    if ask.is_empty(way) && keep == Some(Keep::For(Duration::ZERO)) {
        server.registry.unload(Some(&ask.model))?;
        return Ok(taken(None, "unload"));
    }
    let model = server.model(Some(&ask.model))?;
    if let Some(keep) = keep {
        server.registry.keep(&ask.model, keep);
    }
    if ask.is_empty(way) {
        return Ok(taken(None, "load"));
    }
    let (kind, body) = ask.translated(way, model.engine.text().template.is_some())?;
    let running = completions::take(server, account, body.to_string().as_bytes(), kind)?.choices.into_iter().next();
    Ok(taken(running, ""))
}

/// Sends an answer line by line.
async fn tell(taken: Taken, lines: &Sender<Value>) -> Result<(), mpsc::error::SendError<Value>> {
    let Taken { way, model, running, done, started, load, .. } = taken;
    let line = |mut line: Value, done: bool| {
        let mut whole = json!({"model": model, "created_at": Timestamp::now().to_string()});
        if let (Some(whole), Some(line)) = (whole.as_object_mut(), line.as_object_mut()) {
            whole.append(line);
            whole.insert("done".into(), done.into());
        }
        whole
    };
    let Some(Running { mut events, mut calls, .. }) = running else {
        let mut last = line(way.says(""), true);
        last["done_reason"] = done.into();
        return lines.send(last).await;
    };
    // Ollama tells calls whole.
    let mut called: Vec<(String, String)> = Vec::new();
    let finish = loop {
        let event = tokio::select! {
            () = lines.closed() => return Ok(()),
            event = events.next() => event,
        };
        match event {
            Some(Event::Text(text)) => {
                for part in completions::parts(&mut calls, text) {
                    if let Some(text) = told(part, &mut called) {
                        lines.send(line(way.says(&text), false)).await?;
                    }
                }
            }
            // Ollama has no words for what is told of tokens.
            Some(Event::Tokens(_)) => {}
            Some(Event::Done(finish)) => break finish,
            Some(Event::Failed(reason)) => return lines.send(json!({"error": reason})).await,
            None => return lines.send(json!({"error": "the engine stopped"})).await,
        }
    };
    for part in calls.iter_mut().flat_map(Calls::finish) {
        if let Some(text) = told(part, &mut called) {
            lines.send(line(way.says(&text), false)).await?;
        }
    }
    if !called.is_empty() {
        let mut said = way.says("");
        said["message"]["tool_calls"] = called.iter().map(call).collect();
        lines.send(line(said, false)).await?;
    }
    let mut last = line(way.says(""), true);
    ending(&mut last, &finish, started.elapsed(), load);
    lines.send(last).await
}

/// The words of a part; calls are put aside.
fn told(part: Part, called: &mut Vec<(String, String)>) -> Option<String> {
    match part {
        Part::Text(text) => return Some(text),
        Part::Call { name, .. } => called.push((name, String::new())),
        Part::Arguments { index, piece } => {
            if let Some((_, arguments)) = called.get_mut(index) {
                *arguments += &piece;
            }
        }
    }
    None
}

fn call((name, arguments): &(String, String)) -> Value {
    // Arguments that a limit cut off are no object.
    let arguments: Value = serde_json::from_str(arguments).unwrap_or_else(|_| json!({}));
    json!({"function": {"name": name, "arguments": arguments}})
}

/// How a text ended, and how long all of it took.
fn ending(line: &mut Value, finish: &Finish, total: Duration, load: Duration) {
    line["done_reason"] = if finish.reason == FinishReason::Length { "length" } else { "stop" }.into();
    let counts = [
        ("total_duration", nanoseconds(total)),
        ("load_duration", nanoseconds(load)),
        ("prompt_eval_count", finish.prompt_tokens as u64),
        ("prompt_eval_duration", nanoseconds(finish.prefill)),
        ("eval_count", finish.completion_tokens as u64),
        ("eval_duration", nanoseconds(finish.decode)),
    ];
    counts.into_iter().for_each(|(name, count)| line[name] = count.into());
}

fn nanoseconds(duration: Duration) -> u64 {
    duration.as_nanos().try_into().unwrap_or(u64::MAX)
}

/// `GET /api/version`
pub(super) async fn version() -> Json<Value> {
    Json(json!({"version": env!("CARGO_PKG_VERSION")}))
}

/// `GET /api/tags`: what is served.
pub(super) async fn tags(State(server): State<Arc<Server>>) -> Json<Value> {
    let model = |(name, model): (&str, Option<Arc<Model>>)| described(name, model.map_or(UNIX_EPOCH, |model| model.since));
    Json(json!({"models": server.registry.models().into_iter().map(model).collect::<Vec<_>>()}))
}

/// `GET /api/ps`: what is in memory.
pub(super) async fn ps(State(server): State<Arc<Server>>) -> Json<Value> {
    let model = |(name, model): (&str, Option<Arc<Model>>)| Some(described(name, model?.since));
    Json(json!({"models": server.registry.models().into_iter().filter_map(model).collect::<Vec<_>>()}))
}

fn described(name: &str, at: SystemTime) -> Value {
    let at = Timestamp::try_from(at).unwrap_or(Timestamp::UNIX_EPOCH).to_string();
    json!({
        "name": name, "model": name, "modified_at": at, "size": 0, "digest": "",
        "details": {"parent_model": "", "format": "", "family": "", "families": [], "parameter_size": "", "quantization_level": ""},
    })
}

#[derive(Debug, Deserialize)]
struct Show {
    #[serde(alias = "name")]
    model: String,
}

/// `POST /api/show`
pub(super) async fn show(State(server): State<Arc<Server>>, body: Bytes) -> Result<Json<Value>, OllamaError> {
    let invalid = |error: serde_json::Error| ApiError::new(StatusCode::BAD_REQUEST, format!("the request is not valid: {error}"));
    let Show { model } = serde_json::from_slice(&body).map_err(invalid)?;
    let model = blocking(move || server.model(Some(untagged(&model)))).await?;
    let template = model.engine.text().template.as_ref();
    Ok(Json(json!({
        "modelfile": "", "parameters": "", "template": template.map_or("", |template| template.source()),
        "details": described(&model.name, model.since)["details"],
        "model_info": {"general.basename": model.name, "general.context_length": model.engine.context()},
        "capabilities": if template.is_some() { json!(["completion", "tools"]) } else { json!(["completion"]) },
    })))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ask(extra: &Value) -> Ask {
        let mut body = json!({"model": "m:latest"});
        extra.as_object().unwrap().iter().for_each(|(key, value)| body[key] = value.clone());
        Ask::parse(body.to_string().as_bytes()).unwrap()
    }

    #[test]
    fn durations_are_read_as_go_writes_them() {
        for (text, seconds) in [("5m", 300.0), ("1h30m", 5400.0), ("-1", -1.0), ("-1s", -1.0), ("250ms", 0.25), ("90", 90.0), ("0", 0.0)] {
            assert_eq!(duration(text), Some(seconds), "{text}");
        }
        for wrong in ["m", "5x", "5m3", "five"] {
            assert_eq!(duration(wrong), None, "{wrong}");
        }
        assert_eq!(ask(&json!({"keep_alive": -1})).keep().unwrap(), Some(Keep::Always));
        assert_eq!(ask(&json!({"keep_alive": "0"})).keep().unwrap(), Some(Keep::For(Duration::ZERO)));
        assert!(ask(&json!({"keep_alive": []})).keep().is_err());
    }

    #[test]
    fn requests_are_said_in_openais_words() {
        let (kind, body) = ask(&json!({
            "prompt": "p", "system": "s", "format": "json", "think": false,
            "options": {"num_predict": 5, "temperature": 0, "repeat_penalty": 1.1, "num_ctx": 4096},
        }))
        .translated(Way::Generate, true)
        .unwrap();
        assert_eq!(kind, Kind::Chat);
        let expected = json!({
            "model": "m", "messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "p"}], "max_tokens": 5,
            "temperature": 0, "repetition_penalty": 1.1, "response_format": {"type": "json_object"},
            "chat_template_kwargs": {"enable_thinking": false},
        });
        assert_eq!(body, expected);
        let (kind, body) =
            ask(&json!({"prompt": "p", "raw": true, "options": {"num_predict": -1}})).translated(Way::Generate, true).unwrap();
        assert_eq!((kind, body), (Kind::Text, json!({"model": "m", "prompt": "p", "max_tokens": NO_LIMIT})));
        let (kind, body) = ask(&json!({"prompt": "p", "system": "s"})).translated(Way::Generate, false).unwrap();
        assert_eq!((kind, &body["prompt"]), (Kind::Text, &json!("s\n\np")));
    }

    #[test]
    fn what_cannot_be_honoured_is_refused_by_name() {
        for (extra, param) in [
            (json!({"template": "{{ .Prompt }}"}), "template"),
            (json!({"images": ["aGk="]}), "images"),
            (json!({"messages": [{"role": "user", "content": "?", "images": ["aGk="]}]}), "images"),
            (json!({"context": [1, 2]}), "context"),
            (json!({"options": {"mirostat": 2}}), "mirostat"),
            (json!({"format": 3}), "format"),
        ] {
            let error = ask(&extra).translated(Way::Generate, true).unwrap_err();
            assert_eq!(error.param.as_deref(), Some(param));
        }
        ask(&json!({"options": {"mirostat": 0, "typical_p": 1.0, "num_keep": 4}})).translated(Way::Generate, true).unwrap();
    }

    #[test]
    fn calls_have_objects_as_arguments() {
        let mut called = Vec::new();
        for part in [
            Part::Call { index: 0, name: "f".into() },
            Part::Arguments { index: 0, piece: "{\"x\"".into() },
            Part::Arguments { index: 0, piece: ": 1}".into() },
            Part::Call { index: 1, name: "g".into() },
            Part::Arguments { index: 1, piece: "{\"cut".into() },
        ] {
            assert_eq!(told(part, &mut called), None);
        }
        let calls: Vec<Value> = called.iter().map(call).collect();
        assert_eq!(json!(calls), json!([{"function": {"name": "f", "arguments": {"x": 1}}}, {"function": {"name": "g", "arguments": {}}}]));
    }
}
