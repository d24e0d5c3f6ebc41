//! OpenAI's schema: what a request may say, and what answers look like. Fields that we do not know are ignored; fields that would change
//! the answer and that we cannot honour are refused.

use std::collections::BTreeMap;

use axum::http::StatusCode;
use serde::{Deserialize, Serialize, de::DeserializeOwned};
use serde_json::{Map, Value, json};

use super::{calls::Part, error::ApiError, experts::Wishes, tools::Tools};
use crate::engine::{EngineError, Finish, FinishReason, Grammar, Request, Sampling, Task, Tell, Text};

/// Tokens of a plain completion whose request does not say.
const DEFAULT_COMPLETION_TOKENS: usize = 16;

/// Choices of one request at most.
const MAX_CHOICES: usize = 64;

/// Likely tokens that are told in the place of each at most.
const MAX_LIKELY: usize = 20;

/// The two ways to ask for text.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    /// `/v1/chat/completions`
    Chat,
    /// `/v1/completions`
    Text,
}

/// The body of either request.
#[derive(Debug, Deserialize)]
pub(super) struct Body {
    pub(super) model: Option<String>,
    messages: Option<Vec<Value>>,
    prompt: Option<Value>,
    stream: Option<bool>,
    stream_options: Option<StreamOptions>,
    n: Option<usize>,
    stop: Option<Value>,
    max_tokens: Option<usize>,
    max_completion_tokens: Option<usize>,
    temperature: Option<f32>,
    top_p: Option<f32>,
    top_k: Option<i64>,
    min_p: Option<f32>,
    #[serde(alias = "repeat_penalty")]
    repetition_penalty: Option<f32>,
    presence_penalty: Option<f32>,
    frequency_penalty: Option<f32>,
    repeat_last_n: Option<i64>,
    min_tokens: Option<usize>,
    ignore_eos: Option<bool>,
    stop_token_ids: Option<Vec<u32>>,
    logit_bias: Option<BTreeMap<String, f32>>,
    seed: Option<i64>,
    chat_template_kwargs: Option<Map<String, Value>>,
    logprobs: Option<Value>,
    top_logprobs: Option<usize>,
    echo: Option<bool>,
    suffix: Option<Value>,
    best_of: Option<usize>,
    tools: Option<Value>,
    tool_choice: Option<Value>,
    parallel_tool_calls: Option<bool>,
    functions: Option<Value>,
    function_call: Option<Value>,
    response_format: Option<Value>,
    experts_per_token: Option<usize>,
    expert_bias: Option<BTreeMap<String, f32>>,
    mask_experts: Option<Vec<Value>>,
    force_experts: Option<Vec<Value>>,
    return_experts: Option<bool>,
}

#[derive(Debug, Deserialize)]
struct StreamOptions {
    include_usage: Option<bool>,
}

/// Text to go on from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Prompt {
    Text(String),
    Tokens(Vec<u32>),
}

/// Parses a body; the error says which field is wrong.
pub(super) fn parse<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, ApiError> {
    let mut json = serde_json::Deserializer::from_slice(bytes);
    serde_path_to_error::deserialize(&mut json).map_err(|error| match error.path().iter().next() {
        Some(_) if error.inner().is_data() => ApiError::invalid(error.path().to_string(), format!("the request is not valid: {error}")),
        _ => ApiError::new(StatusCode::BAD_REQUEST, format!("the request is not valid JSON: {}", error.inner())),
    })
}

/// A text or a list of texts, tokens or a list of lists of them.
pub(super) fn prompts(field: &'static str, value: Option<&Value>) -> Result<Vec<Prompt>, ApiError> {
    let invalid =
        || ApiError::invalid(field, format!("`{field}` must be a string, a list of strings, or one or several lists of token ids"));
    let token = |value: &Value| value.as_u64().and_then(|id| u32::try_from(id).ok());
    let one = |value: &Value| match value {
        Value::String(text) => Some(Prompt::Text(text.clone())),
        Value::Array(ids) => ids.iter().map(token).collect::<Option<_>>().map(Prompt::Tokens),
        _ => None,
    };
    match value {
        Some(tokens @ Value::Array(all)) if all.first().is_some_and(Value::is_number) => Ok(vec![one(tokens).ok_or_else(invalid)?]),
        Some(Value::Array(all)) if !all.is_empty() => all.iter().map(|prompt| one(prompt).ok_or_else(invalid)).collect(),
        Some(text @ Value::String(_)) => Ok(vec![one(text).ok_or_else(invalid)?]),
        _ => Err(invalid()),
    }
}

impl Prompt {
    /// Its tokens.
    pub(super) fn tokens(self, text: &Text) -> Result<Vec<u32>, EngineError> {
        match self {
            Self::Text(words) => text.prompt(&words),
            Self::Tokens(tokens) => Ok(tokens),
        }
    }
}

impl Body {
    /// Refuses what would change the answer and cannot be done.
    pub(super) fn refuse_unsupported(&self, kind: Kind) -> Result<(), ApiError> {
        let unsupported = |param: &str, message: &str| Err(ApiError::invalid(param, message).code("unsupported_parameter"));
        if self.suffix.as_ref().is_some_and(|suffix| !suffix.is_null() && *suffix != json!("")) {
            return unsupported("suffix", "`suffix` is not supported: it needs a model that was trained to fill in the middle of a text");
        }
        if kind == Kind::Chat && self.echo == Some(true) {
            return unsupported("echo", "`echo` is not supported in a chat: /v1/completions has it");
        }
        Ok(())
    }

    /// The tools that may be called.
    pub(super) fn tools(&self) -> Result<Option<Tools>, ApiError> {
        let fields = [&self.tools, &self.tool_choice, &self.functions, &self.function_call];
        Tools::parse(fields.map(Option::as_ref), self.parallel_tool_calls)
    }

    /// `response_format`: what the answer must be. Regular expressions and Lark are no part of OpenAI's API.
    pub(super) fn grammar(&self) -> Result<Option<Grammar>, ApiError> {
        let Some(format) = self.response_format.as_ref().filter(|format| !format.is_null()) else { return Ok(None) };
        let invalid = |what: &str, expected: &str| {
            let param = format!("response_format{what}");
            let message = format!("`{param}` must be {expected}");
            ApiError::invalid(param, message)
        };
        let text = |field: &str| format[field].as_str().map(str::to_owned).ok_or_else(|| invalid(&format!(".{field}"), "a string"));
        Ok(Some(match format["type"].as_str() {
            Some("text") => return Ok(None),
            Some("json_object") => Grammar::json_object(),
            Some("json_schema") => {
                let schema = &format["json_schema"]["schema"];
                if !schema.is_object() {
                    return Err(invalid(".json_schema.schema", "a JSON schema, an object"));
                }
                Grammar::JsonSchema(schema.clone())
            }
            Some("regex") => Grammar::Regex(text("regex")?),
            Some("lark") => Grammar::Lark(text("lark")?),
            _ => return Err(invalid(".type", "\"text\", \"json_object\", \"json_schema\", \"regex\" or \"lark\"")),
        }))
    }

    /// What is wished of experts.
    pub(super) fn wishes(&self) -> Wishes<'_> {
        Wishes {
            per_token: self.experts_per_token,
            bias: self.expert_bias.as_ref(),
            mask: self.mask_experts.as_deref(),
            force: self.force_experts.as_deref(),
            told: self.return_experts.unwrap_or(false),
        }
    }

    /// What is told of tokens. `logprobs` says how many likely ones in a completion, and in a chat `top_logprobs` does.
    pub(super) fn tell(&self, kind: Kind) -> Result<Tell, ApiError> {
        let asked = self.logprobs.as_ref().filter(|asked| !matches!(asked, Value::Null | Value::Bool(false)));
        let (param, likely) = match (kind, asked) {
            (Kind::Chat, None) if self.top_logprobs.is_some_and(|top| top > 0) => {
                return Err(ApiError::invalid("top_logprobs", "`top_logprobs` needs `logprobs: true`"));
            }
            (_, None) => ("logprobs", None),
            (Kind::Chat, Some(Value::Bool(_))) => ("top_logprobs", Some(self.top_logprobs.unwrap_or(0))),
            (Kind::Chat, Some(_)) => return Err(ApiError::invalid("logprobs", "`logprobs` must be true or false")),
            (Kind::Text, Some(likely)) => ("logprobs", Some(likely.as_u64().map_or(usize::MAX, |likely| likely as usize))),
        };
        if likely.is_some_and(|likely| likely > MAX_LIKELY) {
            return Err(ApiError::invalid(param, format!("`{param}` must be a number from 0 to {MAX_LIKELY}")));
        }
        Ok(Tell { logprobs: likely, experts: self.return_experts.unwrap_or(false) })
    }

    /// What is to be generated, as far as that can be said without a model.
    pub(super) fn request(&self, kind: Kind) -> Result<Request, ApiError> {
        Ok(Request {
            task: if self.echo == Some(true) { Task::Echo } else { Task::Continue },
            max_tokens: self.max_tokens(kind),
            min_tokens: self.min_tokens.unwrap_or(0),
            ignore_eos: self.ignore_eos.unwrap_or(false),
            stop: self.stop()?,
            stop_tokens: self.stop_token_ids.clone().unwrap_or_default(),
            ..Request::default()
        })
    }

    /// Refuses wishes about the end of an answer that a grammar ends.
    pub(super) fn refuse_ends(&self) -> Result<(), ApiError> {
        let wishes = [("min_tokens", self.min_tokens.is_some_and(|min| min > 0)), ("ignore_eos", self.ignore_eos == Some(true))];
        match wishes.into_iter().find(|(_, wished)| *wished) {
            None => Ok(()),
            Some((field, _)) => {
                Err(ApiError::invalid(field, format!("`{field}` cannot be kept here: the answer ends where its grammar does")))
            }
        }
    }

    pub(super) fn streams(&self) -> bool {
        self.stream.unwrap_or(false)
    }

    /// Whether a stream ends with the counts of tokens.
    pub(super) fn wants_usage(&self) -> bool {
        self.stream_options.as_ref().and_then(|options| options.include_usage).unwrap_or(false)
    }

    fn choices(&self) -> usize {
        self.n.unwrap_or(1)
    }

    /// The number of answers to each prompt.
    pub(super) fn n(&self) -> Result<usize, ApiError> {
        let n = self.choices();
        if (1..=MAX_CHOICES).contains(&n) { Ok(n) } else { Err(ApiError::invalid("n", format!("`n` is {n}, expected 1 to {MAX_CHOICES}"))) }
    }

    /// The number of answers to each prompt that are written, of which the likeliest `n` are given.
    pub(super) fn best_of(&self) -> Result<usize, ApiError> {
        let (n, best_of) = (self.n()?, self.best_of.unwrap_or_else(|| self.choices()));
        if !(n..=MAX_CHOICES).contains(&best_of) {
            return Err(ApiError::invalid("best_of", format!("`best_of` is {best_of}, expected {n} (`n`) to {MAX_CHOICES}")));
        }
        if best_of > n && self.streams() {
            return Err(ApiError::invalid("best_of", "which answer is the best is known when all are whole: `best_of` cannot be streamed"));
        }
        Ok(best_of)
    }

    /// The recommended sampling with what the request changes.
    pub(super) fn sampling(&self, recommended: &Sampling) -> Result<Sampling, ApiError> {
        let r = recommended.clone();
        let mut logit_bias = Vec::new();
        for (token, &bias) in self.logit_bias.iter().flatten() {
            let id = token.parse().map_err(|_| ApiError::invalid("logit_bias", format!("`logit_bias`: `{token}` is not a token id")))?;
            logit_bias.push((id, bias));
        }
        Ok(Sampling {
            temperature: self.temperature.unwrap_or(r.temperature),
            top_p: self.top_p.unwrap_or(r.top_p),
            // Other servers write "all" as -1.
            top_k: self.top_k.map_or(r.top_k, |k| usize::try_from(k).unwrap_or(0)),
            min_p: self.min_p.unwrap_or(r.min_p),
            repetition_penalty: self.repetition_penalty.unwrap_or(r.repetition_penalty),
            presence_penalty: self.presence_penalty.unwrap_or(r.presence_penalty),
            frequency_penalty: self.frequency_penalty.unwrap_or(r.frequency_penalty),
            // Other servers write "all" as -1.
            repeat_last_n: self.repeat_last_n.map_or(r.repeat_last_n, |n| usize::try_from(n).ok()),
            logit_bias,
            seed: self.seed.map(i64::cast_unsigned).or(r.seed),
        })
    }

    fn max_tokens(&self, kind: Kind) -> Option<usize> {
        let default = if kind == Kind::Text { Some(DEFAULT_COMPLETION_TOKENS) } else { None };
        self.max_completion_tokens.or(self.max_tokens).or(default)
    }

    /// `stop`: a string or a list of them.
    fn stop(&self) -> Result<Vec<String>, ApiError> {
        let invalid = || ApiError::invalid("stop", "`stop` must be a string or a list of strings");
        match &self.stop {
            None | Some(Value::Null) => Ok(Vec::new()),
            Some(Value::String(stop)) => Ok(vec![stop.clone()]),
            Some(Value::Array(all)) => all.iter().map(|stop| stop.as_str().map(str::to_owned).ok_or_else(invalid)).collect(),
            Some(_) => Err(invalid()),
        }
    }

    /// `prompt`: a string, a list of them, a list of tokens, or a list of those.
    pub(super) fn prompts(&self) -> Result<Vec<Prompt>, ApiError> {
        prompts("prompt", self.prompt.as_ref())
    }

    /// `messages` as templates expect them: content is text, and the developer speaks as the system.
    pub(super) fn messages(&self) -> Result<Vec<Value>, ApiError> {
        let all = self.messages.as_ref().filter(|all| !all.is_empty());
        let all = all.ok_or_else(|| ApiError::invalid("messages", "`messages` must be a list of at least one message"))?;
        all.iter().enumerate().map(|(i, message)| self::message(i, message)).collect()
    }

    /// Further variables of the template.
    pub(super) fn template_variables(&self) -> Map<String, Value> {
        self.chat_template_kwargs.clone().unwrap_or_default()
    }
}

fn message(i: usize, message: &Value) -> Result<Value, ApiError> {
    let invalid = |what: &str, expected: &str| {
        let param = format!("messages[{i}]{what}");
        let message = format!("`{param}` must be {expected}");
        ApiError::invalid(param, message)
    };
    let mut message = message.as_object().ok_or_else(|| invalid("", "an object with `role` and `content`"))?.clone();
    let role = message.get("role").and_then(Value::as_str).ok_or_else(|| invalid(".role", "a string"))?;
    if role == "developer" {
        message.insert("role".into(), "system".into());
    }
    let content = match message.get("content") {
        None | Some(Value::Null) => String::new(),
        Some(Value::String(text)) => text.clone(),
        Some(Value::Array(parts)) => {
            let text = |part: &Value| (part["type"] == "text").then(|| part["text"].as_str().map(str::to_owned)).flatten();
            let texts: Option<Vec<String>> = parts.iter().map(text).collect();
            texts.ok_or_else(|| invalid(".content", "text: other parts (images, audio, files) are not supported"))?.join("\n")
        }
        Some(_) => return Err(invalid(".content", "a string or a list of text parts")),
    };
    message.insert("content".into(), content.into());
    Ok(Value::Object(message))
}

/// Counts of tokens.
#[derive(Debug, Clone, Copy, Default, Serialize)]
pub(super) struct Usage {
    prompt_tokens: usize,
    completion_tokens: usize,
    total_tokens: usize,
    prompt_tokens_details: PromptTokens,
}

/// Of a prompt's tokens.
#[derive(Debug, Clone, Copy, Default, Serialize)]
struct PromptTokens {
    /// that need not be read again
    cached_tokens: usize,
}

impl Usage {
    /// Adds one choice. Its prompt counts once for all its choices: for the first of `n`.
    pub(super) fn add(&mut self, choice: usize, n: usize, finish: &Finish) {
        if choice.is_multiple_of(n) {
            self.prompt_tokens += finish.prompt_tokens;
            self.prompt_tokens_details.cached_tokens += finish.cached_tokens;
        }
        self.completion_tokens += finish.completion_tokens;
        self.total_tokens = self.prompt_tokens + self.completion_tokens;
    }
}

/// One answer to a prompt.
#[derive(Debug, Default)]
pub(super) struct Choice {
    text: String,
    /// in OpenAI's form
    calls: Vec<Value>,
}

impl Choice {
    /// Takes the next part.
    pub(super) fn push(&mut self, part: Part) {
        match part {
            Part::Text(text) => self.text += &text,
            Part::Call { name, .. } => self.calls.push(call(&name)),
            Part::Arguments { index, piece } => {
                if let Some(Value::String(arguments)) = self.calls.get_mut(index).map(|call| &mut call["function"]["arguments"]) {
                    *arguments += &piece;
                }
            }
        }
    }

    fn message(&self) -> Value {
        let mut message = json!({"role": "assistant", "content": self.text, "refusal": null});
        if !self.calls.is_empty() {
            message["tool_calls"] = json!(self.calls);
            if self.text.is_empty() {
                message["content"] = Value::Null;
            }
        }
        message
    }
}

/// A call without arguments yet, under an identity of its own.
fn call(name: &str) -> Value {
    json!({"id": format!("call_{:016x}", rand::random::<u64>()), "type": "function", "function": {"name": name, "arguments": ""}})
}

/// What all parts of one answer share.
#[derive(Debug, Clone)]
pub(super) struct Envelope {
    pub(super) kind: Kind,
    pub(super) id: String,
    pub(super) created: u64,
    pub(super) model: String,
}

impl Envelope {
    /// The whole answer.
    pub(super) fn answer(&self, choices: &[(Choice, FinishReason)], usage: Usage) -> Value {
        let choice = |(index, (choice, finish)): (usize, &(Choice, FinishReason))| {
            let reason = reason(*finish, choice.calls.len());
            match self.kind {
                Kind::Chat => json!({"index": index, "message": choice.message(), "logprobs": null, "finish_reason": reason}),
                Kind::Text => json!({"index": index, "text": choice.text, "logprobs": null, "finish_reason": reason}),
            }
        };
        let object = if self.kind == Kind::Chat { "chat.completion" } else { "text_completion" };
        let mut answer = self.object(object, &choices.iter().enumerate().map(choice).collect::<Vec<_>>());
        answer["usage"] = json!(usage);
        answer
    }

    /// The chunk that opens a choice, if there is one.
    pub(super) fn opening(&self, index: usize) -> Option<Value> {
        let delta = json!({"role": "assistant", "content": "", "refusal": null});
        (self.kind == Kind::Chat).then(|| self.chunk(&[json!({"index": index, "delta": delta, "logprobs": null, "finish_reason": null})]))
    }

    /// A chunk with a part of a choice.
    pub(super) fn part(&self, index: usize, part: &Part) -> Value {
        let delta = match part {
            Part::Text(text) if self.kind == Kind::Text => {
                return self.chunk(&[json!({"index": index, "text": text, "logprobs": null, "finish_reason": null})]);
            }
            Part::Text(text) => json!({"content": text}),
            Part::Call { index, name } => {
                let mut call = call(name);
                call["index"] = json!(index);
                json!({"tool_calls": [call]})
            }
            Part::Arguments { index, piece } => json!({"tool_calls": [{"index": index, "function": {"arguments": piece}}]}),
        };
        self.chunk(&[json!({"index": index, "delta": delta, "logprobs": null, "finish_reason": null})])
    }

    /// The chunk that closes a choice with so many calls.
    pub(super) fn closing(&self, index: usize, finish: FinishReason, calls: usize) -> Value {
        let reason = reason(finish, calls);
        self.chunk(&[match self.kind {
            Kind::Chat => json!({"index": index, "delta": {}, "logprobs": null, "finish_reason": reason}),
            Kind::Text => json!({"index": index, "text": "", "logprobs": null, "finish_reason": reason}),
        }])
    }

    /// The chunk with the counts.
    pub(super) fn usage(&self, usage: Usage) -> Value {
        let mut chunk = self.chunk(&[]);
        chunk["usage"] = json!(usage);
        chunk
    }

    fn chunk(&self, choices: &[Value]) -> Value {
        self.object(if self.kind == Kind::Chat { "chat.completion.chunk" } else { "text_completion" }, choices)
    }

    fn object(&self, object: &str, choices: &[Value]) -> Value {
        json!({
            "id": self.id, "object": object, "created": self.created, "model": self.model,
            "system_fingerprint": concat!("upcycle-", env!("CARGO_PKG_VERSION")), "choices": choices,
        })
    }
}

fn reason(finish: FinishReason, calls: usize) -> &'static str {
    match finish {
        FinishReason::Stop if calls > 0 => "tool_calls",
        FinishReason::Stop => "stop",
        FinishReason::Length => "length",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn body(json: &Value) -> Body {
        parse(json.to_string().as_bytes()).unwrap()
    }

    #[test]
    fn unknown_fields_and_nulls_are_ignored() {
        let body = body(
            &json!({"prompt": "a", "user": "me", "stream": null, "tools": [], "logprobs": false, "response_format": {"type": "text"}}),
        );
        body.refuse_unsupported(Kind::Text).unwrap();
        assert_eq!(body.tell(Kind::Text).unwrap(), Tell::default());
        assert!(!body.streams());
        assert_eq!(body.max_tokens(Kind::Text), Some(16));
        assert_eq!(body.max_tokens(Kind::Chat), None);
    }

    #[test]
    fn prompts_come_in_four_shapes() {
        let prompts = |prompt: Value| body(&json!({"prompt": prompt})).prompts();
        assert_eq!(prompts(json!("a")).unwrap(), [Prompt::Text("a".into())]);
        assert_eq!(prompts(json!(["a", "b"])).unwrap(), [Prompt::Text("a".into()), Prompt::Text("b".into())]);
        assert_eq!(prompts(json!([1, 2])).unwrap(), [Prompt::Tokens(vec![1, 2])]);
        assert_eq!(prompts(json!([[1], [2, 3]])).unwrap(), [Prompt::Tokens(vec![1]), Prompt::Tokens(vec![2, 3])]);
        for wrong in [json!(null), json!([]), json!(1), json!([1, "a"]), json!([-1]), json!([[1.5]]), json!({})] {
            assert_eq!(prompts(wrong).unwrap_err().param.as_deref(), Some("prompt"));
        }
    }

    #[test]
    fn messages_become_plain_text() {
        let messages = json!({"messages": [
            {"role": "developer", "content": "S"}, {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}], "name": "n"},
            {"role": "assistant", "content": null},
        ]});
        let expected = json!([
            {"role": "system", "content": "S"}, {"role": "user", "content": "a\nb", "name": "n"}, {"role": "assistant", "content": ""},
        ]);
        assert_eq!(json!(body(&messages).messages().unwrap()), expected);
        for (wrong, param) in [
            (json!([]), "messages"),
            (json!([{"content": "a"}]), "messages[0].role"),
            (json!([{"role": "user"}, "a"]), "messages[1]"),
            (json!([{"role": "user", "content": [{"type": "image_url"}]}]), "messages[0].content"),
            (json!([{"role": "user", "content": 1}]), "messages[0].content"),
        ] {
            assert_eq!(body(&json!({"messages": wrong})).messages().unwrap_err().param.as_deref(), Some(param));
        }
    }

    #[test]
    fn a_wrong_type_names_its_field() {
        let error = parse::<Body>(br#"{"prompt": "a", "temperature": "hot"}"#).unwrap_err();
        assert_eq!(error.param.as_deref(), Some("temperature"));
        assert!(error.message.contains("invalid type: string \"hot\""), "{}", error.message);
        assert_eq!(parse::<Body>(b"{").unwrap_err().param, None);
        assert!(parse::<Body>(b"[1]").is_err());
    }

    #[test]
    fn what_cannot_be_honoured_is_refused_by_name() {
        let refused = |request: &Value, kind| body(request).refuse_unsupported(kind).unwrap_err().param;
        assert_eq!(refused(&json!({"prompt": "a", "suffix": "x"}), Kind::Text).as_deref(), Some("suffix"));
        assert_eq!(refused(&json!({"messages": [], "echo": true}), Kind::Chat).as_deref(), Some("echo"));
        body(&json!({"prompt": "a", "suffix": "", "echo": true})).refuse_unsupported(Kind::Text).unwrap();
        assert!(body(&json!({"n": 0})).n().is_err());
        assert!(body(&json!({"stop": [1]})).stop().is_err());
        assert!(body(&json!({"logit_bias": {"a": 1}})).sampling(&Sampling::default()).is_err());
    }

    #[test]
    fn logprobs_are_asked_for_in_two_ways() {
        let tell = |request: Value, kind| body(&request).tell(kind).map(|tell| tell.logprobs).map_err(|error| error.param.unwrap());
        assert_eq!(tell(json!({"logprobs": 0}), Kind::Text), Ok(Some(0)));
        assert_eq!(tell(json!({"logprobs": 5}), Kind::Text), Ok(Some(5)));
        assert_eq!(tell(json!({"logprobs": true}), Kind::Chat), Ok(Some(0)));
        assert_eq!(tell(json!({"logprobs": true, "top_logprobs": 20}), Kind::Chat), Ok(Some(20)));
        assert_eq!(tell(json!({"logprobs": null, "top_logprobs": 0}), Kind::Chat), Ok(None));
        for (wrong, kind, param) in [
            (json!({"logprobs": true}), Kind::Text, "logprobs"),
            (json!({"logprobs": 21}), Kind::Text, "logprobs"),
            (json!({"logprobs": 1}), Kind::Chat, "logprobs"),
            (json!({"top_logprobs": 1}), Kind::Chat, "top_logprobs"),
            (json!({"logprobs": true, "top_logprobs": 21}), Kind::Chat, "top_logprobs"),
        ] {
            assert_eq!(tell(wrong, kind), Err(param.to_owned()));
        }
    }

    #[test]
    fn the_best_are_of_as_many_or_more_and_not_streamed() {
        let best_of = |request: Value| body(&request).best_of().map_err(|error| error.param.unwrap());
        assert_eq!((best_of(json!({"n": 2})), best_of(json!({"n": 2, "best_of": 5}))), (Ok(2), Ok(5)));
        assert_eq!(best_of(json!({"n": 2, "best_of": 2, "stream": true})), Ok(2));
        for wrong in [json!({"n": 2, "best_of": 1}), json!({"best_of": 65}), json!({"best_of": 2, "stream": true})] {
            assert_eq!(best_of(wrong), Err("best_of".to_owned()));
        }
    }

    #[test]
    fn response_formats_become_grammars() {
        let grammar = |format: Value| body(&json!({"response_format": format})).grammar();
        assert_eq!(grammar(json!({"type": "text"})).unwrap(), None);
        assert_eq!(grammar(json!({"type": "json_object"})).unwrap(), Some(Grammar::json_object()));
        let schema = json!({"type": "json_schema", "json_schema": {"name": "n", "strict": true, "schema": {"type": "integer"}}});
        assert_eq!(grammar(schema).unwrap(), Some(Grammar::JsonSchema(json!({"type": "integer"}))));
        assert_eq!(grammar(json!({"type": "regex", "regex": "a+"})).unwrap(), Some(Grammar::Regex("a+".into())));
        for (wrong, param) in [
            (json!({"type": "xml"}), "response_format.type"),
            (json!("json"), "response_format.type"),
            (json!({"type": "json_schema"}), "response_format.json_schema.schema"),
            (json!({"type": "lark"}), "response_format.lark"),
        ] {
            assert_eq!(grammar(wrong).unwrap_err().param.as_deref(), Some(param));
        }
    }

    #[test]
    fn a_request_overrides_the_recommended_sampling_field_by_field() {
        let recommended = Sampling { temperature: 0.6, top_k: 20, top_p: 0.9, ..Sampling::default() };
        let body = body(&json!({"temperature": 0, "top_k": -1, "seed": -1, "logit_bias": {"7": -100}, "repeat_penalty": 1.5}));
        let expected = Sampling {
            temperature: 0.0,
            top_k: 0,
            seed: Some(u64::MAX),
            logit_bias: vec![(7, -100.0)],
            repetition_penalty: 1.5,
            ..recommended.clone()
        };
        assert_eq!(body.sampling(&recommended).unwrap(), expected);
    }
}
