//! The server on a real socket: OpenAI's API whole and as a stream, its errors, and its life from loading to shutdown.
#![cfg(feature = "serve")]

mod command;
mod embeddings;
mod experts;
mod guard;
mod logprobs;
mod metrics;
mod models;
mod ollama;

use std::{
    io::{Read as _, Write as _},
    net::{SocketAddr, TcpStream},
    sync::{Arc, Mutex},
    thread::JoinHandle,
    time::{Duration, Instant},
};

use serde_json::{Value, json};
use tokio::{net::TcpListener, sync::oneshot};
use upcycle::{
    engine::{Engine, Options, Request, Sampling, Text},
    serve::{self, Access, Entry, Residence, Server},
};

use crate::support::engines::{engine, with_text};

/// A server on a free port; shut down when dropped.
pub(crate) struct Running {
    address: SocketAddr,
    server: Arc<Server>,
    shutdown: Option<oneshot::Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Running {
    /// One that listens, and has loaded nothing yet.
    fn listening(access: Access, entries: Vec<Entry>, residence: Residence) -> Self {
        let server = Arc::new(Server::new(access, entries, residence));
        let (shutdown, asked) = oneshot::channel::<()>();
        let (tell, address) = std::sync::mpsc::channel();
        let thread = std::thread::spawn({
            let server = server.clone();
            move || {
                tokio::runtime::Runtime::new().unwrap().block_on(async {
                    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
                    tell.send(listener.local_addr().unwrap()).unwrap();
                    let asked = async {
                        let _ = asked.await;
                    };
                    serve::serve(listener, server, asked).await.unwrap();
                });
            }
        });
        Self { address: address.recv().unwrap(), server, shutdown: Some(shutdown), thread: Some(thread) }
    }

    pub(crate) fn start(options: Options) -> Self {
        Self::guarded(Access::default(), options)
    }

    /// One whose bundled model is not there before it is [opened](Self::open).
    pub(crate) fn loading(name: &'static str) -> Self {
        Self::listening(Access::default(), vec![entry(name, Options::default())], Residence::default())
    }

    pub(crate) fn open(&self) {
        self.server.open().unwrap();
    }

    fn guarded(access: Access, options: Options) -> Self {
        let running = Self::listening(access, vec![entry("math", options)], Residence::default());
        running.open();
        running
    }

    /// Over an engine that is made already.
    pub(crate) fn over(engine: Engine) -> Self {
        let engine = Mutex::new(Some(engine));
        let load = move || engine.lock().unwrap().take().ok_or_else(|| "it was there once".to_owned());
        let entry = Entry { name: "math".into(), place: "math".into(), load: Box::new(load) };
        let running = Self::listening(Access::default(), vec![entry], Residence::default());
        running.open();
        running
    }

    fn with_text(change: impl FnOnce(Text) -> Text) -> Self {
        Self::over(with_text("math", Options::default(), change))
    }

    pub(crate) fn url(&self) -> String {
        format!("http://{}/", self.address)
    }

    pub(crate) fn get(&self, path: &str) -> Answer {
        finish(send(self.address, "GET", path, b""))
    }

    pub(crate) fn post(&self, path: &str, body: &Value) -> Answer {
        finish(send(self.address, "POST", path, body.to_string().as_bytes()))
    }

    /// Sends any bytes: whatever they are, the answer is whole, and no mistake of the server's.
    pub(crate) fn survives(&self, path: &str, body: &[u8]) {
        let answer = finish(send(self.address, "POST", path, body));
        assert!(answer.status < 500 && !answer.body.contains("server_error"), "{} {}", answer.status, answer.body);
    }

    pub(crate) fn chat(&self, extra: &Value) -> Answer {
        self.post(
            "/v1/chat/completions",
            &merge(json!({"messages": [{"role": "user", "content": "Compute 12 + 30."}], "max_tokens": 12}), extra),
        )
    }

    pub(crate) fn complete(&self, extra: &Value) -> Answer {
        self.post("/v1/completions", &merge(json!({"prompt": "Problem: Compute 12 + 30.\n", "max_tokens": 12}), extra))
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        drop(self.shutdown.take());
        self.thread.take().unwrap().join().unwrap();
    }
}

/// A bundled model under its own name.
fn entry(name: &'static str, options: Options) -> Entry {
    Entry { name: name.into(), place: name.into(), load: Box::new(move || Ok(engine(name, options))) }
}

fn merge(mut body: Value, extra: &Value) -> Value {
    for (key, value) in extra.as_object().unwrap() {
        body[key] = value.clone();
    }
    body
}

/// Sends a request with HTTP/1.0, so that the body comes as it is until the connection ends.
fn send(address: SocketAddr, method: &str, path: &str, body: &[u8]) -> TcpStream {
    send_with(address, method, path, &[], body)
}

fn send_with(address: SocketAddr, method: &str, path: &str, headers: &[(&str, &str)], body: &[u8]) -> TcpStream {
    let mut stream = connect(address);
    let headers: String = headers.iter().map(|(name, value)| format!("{name}: {value}\r\n")).collect();
    write!(stream, "{method} {path} HTTP/1.0\r\nContent-Length: {}\r\n{headers}\r\n", body.len()).unwrap();
    stream.write_all(body).unwrap();
    stream
}

fn connect(address: SocketAddr) -> TcpStream {
    let stream = TcpStream::connect(address).unwrap();
    stream.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
    stream
}

#[derive(Debug)]
pub(crate) struct Answer {
    pub(crate) status: u16,
    headers: String,
    body: String,
}

fn finish(mut stream: TcpStream) -> Answer {
    let mut text = String::new();
    stream.read_to_string(&mut text).unwrap();
    let (headers, body) = text.split_once("\r\n\r\n").unwrap();
    let status = headers.split(' ').nth(1).unwrap().parse().unwrap();
    Answer { status, headers: headers.to_ascii_lowercase(), body: body.to_owned() }
}

impl Answer {
    fn json(&self) -> Value {
        serde_json::from_str(&self.body).unwrap_or_else(|error| panic!("{error}: {}", self.body))
    }

    pub(crate) fn ok(&self) -> Value {
        assert_eq!(self.status, 200, "{}", self.body);
        self.json()
    }

    /// Status, `param` and message of an error object.
    pub(crate) fn error(&self) -> (u16, Option<String>, String) {
        let json = self.json();
        let error = &json["error"];
        assert!(error["type"].is_string() && error.get("code").is_some(), "{json}");
        (self.status, error["param"].as_str().map(str::to_owned), error["message"].as_str().unwrap().to_owned())
    }

    /// The chunks of a stream that ended as it should.
    pub(crate) fn chunks(&self) -> Vec<Value> {
        assert_eq!(self.status, 200, "{}", self.body);
        assert!(self.headers.contains("content-type: text/event-stream"), "{}", self.headers);
        let mut events: Vec<&str> = self.body.split("\n\n").filter(|event| !event.is_empty() && !event.starts_with(':')).collect();
        assert_eq!(events.pop(), Some("data: [DONE]"));
        events.iter().map(|event| serde_json::from_str(event.strip_prefix("data: ").unwrap()).unwrap()).collect()
    }
}

#[test]
fn models_health_and_what_is_not_there() {
    let server = Running::start(Options::default());
    assert_eq!(server.get("/health").ok(), json!({"status": "ok"}));
    let models = server.get("/v1/models").ok();
    assert_eq!(
        (&models["object"], &models["data"][0]["id"], &models["data"][0]["max_model_len"]),
        (&json!("list"), &json!("math"), &json!(512))
    );
    assert_eq!(server.get("/v1/models/math").ok()["object"], "model");
    assert_eq!(server.get("/v1/models/owner/other").error().0, 404);
    assert_eq!(server.get("/v1/nothing").error(), (404, None, "there is no GET /v1/nothing".into()));
    assert_eq!(server.get("/v1/completions").error(), (405, None, "/v1/completions does not take GET".into()));
    let other = server.chat(&json!({"model": "gpt-4o"})).error();
    assert_eq!(other, (404, Some("model".into()), "the model `gpt-4o` is not served here; `math` is".into()));
    assert_eq!(server.chat(&json!({"model": "math"})).status, 200);
}

#[test]
fn a_chat_gives_the_engines_text_with_counts() {
    let engine = engine("math", Options::default());
    let prompt = engine.text().chat_prompt(&[json!({"role": "user", "content": "Compute 12 + 30."})], &serde_json::Map::new()).unwrap();
    let mut expected = String::new();
    let request = Request { prompt: prompt.clone(), sampling: engine.text().sampling.clone(), max_tokens: Some(12), ..Request::default() };
    engine
        .stream(request, |text| {
            expected += text;
            std::ops::ControlFlow::Continue(())
        })
        .unwrap();

    let server = Running::start(Options::default());
    let answer = server.chat(&json!({"unknown_field": [1], "temperature": null})).ok();
    assert_eq!(answer["object"], "chat.completion");
    assert_eq!(answer["model"], "math");
    assert!(answer["id"].as_str().unwrap().starts_with("chatcmpl-"));
    assert_eq!(
        answer["choices"],
        json!([{
            "index": 0, "message": {"role": "assistant", "content": expected, "refusal": null}, "logprobs": null, "finish_reason": "length",
        }])
    );
    let usage = |cached: usize| {
        let details = json!({"cached_tokens": cached});
        json!({"prompt_tokens": prompt.len(), "completion_tokens": 12, "total_tokens": prompt.len() + 12, "prompt_tokens_details": details})
    };
    assert_eq!(answer["usage"], usage(0));
    let parts =
        json!({"messages": [{"role": "user", "content": [{"type": "text", "text": "Compute 12 + 30."}]}], "max_completion_tokens": 12});
    let again = server.post("/v1/chat/completions", &parts).ok();
    assert_eq!((&again["choices"], &again["usage"]), (&answer["choices"], &usage(prompt.len() - 1)));
}

#[test]
fn a_stream_gives_the_same_text_in_order() {
    let server = Running::start(Options::default());
    let whole = server.chat(&json!({})).ok();
    let chunks = server.chat(&json!({"stream": true, "stream_options": {"include_usage": true}})).chunks();
    assert!(chunks.iter().all(|chunk| chunk["object"] == "chat.completion.chunk" && chunk["id"] == chunks[0]["id"]));
    assert_eq!(chunks[0]["choices"][0]["delta"]["role"], "assistant");
    let text: String = chunks.iter().filter_map(|chunk| chunk["choices"][0]["delta"]["content"].as_str()).collect();
    assert_eq!(text, whole["choices"][0]["message"]["content"].as_str().unwrap());
    let [.., last, usage] = chunks.as_slice() else { panic!("{chunks:?}") };
    assert_eq!(
        (&last["choices"][0]["delta"], &last["choices"][0]["finish_reason"], &last["usage"]),
        (&json!({}), &json!("length"), &Value::Null)
    );
    assert_eq!((&usage["choices"], &usage["usage"]["total_tokens"]), (&json!([]), &whole["usage"]["total_tokens"]));
    assert!(chunks[..chunks.len() - 2].iter().all(|chunk| chunk["choices"][0]["finish_reason"].is_null()));
    assert!(server.chat(&json!({"stream": true})).chunks().iter().all(|chunk| chunk.get("usage").is_none()));
}

#[test]
fn completions_take_several_prompts_and_choices() {
    let server = Running::start(Options::default());
    let one = server.complete(&json!({})).ok();
    assert_eq!(one["object"], "text_completion");
    let tokens = json!({"prompt": [[5, 6, 7], [8, 9]], "temperature": 1, "seed": 3, "n": 2});
    let several = server.complete(&tokens).ok();
    let texts = |answer: &Value| -> Vec<String> {
        answer["choices"].as_array().unwrap().iter().map(|choice| choice["text"].as_str().unwrap().to_owned()).collect()
    };
    assert_eq!(several["choices"].as_array().unwrap().iter().map(|c| c["index"].as_u64().unwrap()).collect::<Vec<_>>(), [0, 1, 2, 3]);
    assert_eq!(several["usage"]["prompt_tokens"], 5);
    let texts_of = texts(&several);
    assert_ne!(texts_of[0], texts_of[1], "the choices of one prompt differ");
    assert_eq!(texts(&server.complete(&tokens).ok()), texts_of, "a seed fixes them");
    let chunks = server.complete(&merge(tokens, &json!({"stream": true}))).chunks();
    let streamed: Vec<String> = (0..4)
        .map(|i| {
            let own = chunks.iter().filter(|chunk| chunk["choices"][0]["index"] == i);
            own.map(|chunk| chunk["choices"][0]["text"].as_str().unwrap()).collect()
        })
        .collect();
    assert_eq!(streamed, texts_of);
    let default_length = server.post("/v1/completions", &json!({"prompt": "Problem:", "logit_bias": {"0": -100}})).ok();
    assert_eq!(default_length["usage"]["completion_tokens"], 16);
}

#[test]
fn stop_strings_over_several_tokens_do_not_show() {
    let server = Running::start(Options::default());
    let text = server.complete(&json!({})).ok()["choices"][0]["text"].as_str().unwrap().to_owned();
    let stop = text.get(4..9).unwrap();
    let stopped = server.complete(&json!({"stop": [stop, "never"]})).ok();
    assert_eq!(stopped["choices"][0]["text"], text[..text.find(stop).unwrap()]);
    assert_eq!(stopped["choices"][0]["finish_reason"], "stop");
    let chunks = server.complete(&json!({"stop": stop, "stream": true})).chunks();
    let streamed: String = chunks.iter().map(|chunk| chunk["choices"][0]["text"].as_str().unwrap()).collect();
    assert_eq!(streamed, text[..text.find(stop).unwrap()]);
}

#[test]
fn mistakes_are_named() {
    let server = Running::start(Options::default());
    let (status, param, message) = finish(send(server.address, "POST", "/v1/completions", b"{\"prompt\": ")).error();
    assert_eq!((status, param), (400, None));
    assert!(message.contains("EOF while parsing"), "{message}");
    for (body, param) in [
        (json!({"temperature": "hot"}), "temperature"),
        (json!({"temperature": -1}), "temperature"),
        (json!({"top_p": 2}), "top_p"),
        (json!({"n": 0}), "n"),
        (json!({"n": 1000}), "n"),
        (json!({"max_tokens": 0}), "max_tokens"),
        (json!({"stop": 3}), "stop"),
        (json!({"logprobs": 21}), "logprobs"),
        (json!({"suffix": "x"}), "suffix"),
        (json!({"best_of": 2, "n": 3}), "best_of"),
        (json!({"prompt": {}}), "prompt"),
        (json!({"prompt": ""}), "prompt"),
        (json!({"prompt": [999_999]}), "prompt"),
        (json!({"logit_bias": {"1": 1000}}), "logit_bias"),
    ] {
        let (status, found, message) = server.complete(&body).error();
        assert_eq!((status, found.as_deref()), (400, Some(param)), "{message}");
    }
    for (body, param) in [
        (json!({"messages": []}), "messages"),
        (json!({"messages": [{"role": 1}]}), "messages[0].role"),
        (json!({"tools": [{}]}), "tools[0].function"),
    ] {
        let (status, found, message) = server.chat(&body).error();
        assert_eq!((status, found.as_deref()), (400, Some(param)), "{message}");
    }
    let long = server.complete(&json!({"prompt": vec![5; 600]}));
    assert_eq!(
        long.error(),
        (400, None, "the prompt has 600 tokens, but the context holds 512, at least one of them for the answer".into())
    );
    assert_eq!(long.json()["error"]["code"], "context_length_exceeded");
    let limit = 32 << 20;
    assert_eq!(finish(send(server.address, "POST", "/v1/completions", &vec![b' '; limit + 1])).error().0, 413);
    assert_eq!(server.complete(&json!({})).status, 200, "the server goes on");
}

#[test]
fn templates_refuse_with_their_own_words_or_are_missing() {
    let raising = "{% if messages[0].role != 'user' %}{{ raise_exception('Users first!') }}{% endif %}{{ messages[0].content + word }}";
    let server = Running::with_text(|text| Text {
        template: Some(upcycle::engine::ChatTemplate::new(raising, text.tokenizer.special_tokens().clone()).unwrap()),
        ..text
    });
    let refused = server.chat(&json!({"messages": [{"role": "assistant", "content": "a"}]})).error();
    assert_eq!(refused, (400, Some("messages".into()), "the model's chat template refuses these messages: Users first!".into()));
    let a = server.chat(&json!({"messages": [{"role": "user", "content": "Compute 12"}], "chat_template_kwargs": {"word": " + 30."}})).ok();
    let b = server.chat(&json!({"messages": [{"role": "user", "content": "Compute 12 + 30."}], "chat_template_kwargs": {"word": ""}})).ok();
    assert_eq!((&a["choices"], &a["usage"]), (&b["choices"], &b["usage"]));

    let server = Running::with_text(|text| Text { template: None, ..text });
    let (status, _, message) = server.chat(&json!({})).error();
    assert_eq!(status, 400);
    assert!(message.contains("/v1/completions") && message.contains("--chat-template"), "{message}");
    assert_eq!(server.complete(&json!({})).status, 200);
}

#[test]
fn a_client_that_leaves_frees_its_place() {
    let server = Running::start(Options { parallel: 1, ..Options::default() });
    // Minutes of work, one after the other.
    let endless = json!({"n": 60, "max_tokens": 500, "logit_bias": {"0": -100}, "stream": true});
    for stream in [true, false] {
        let body = merge(json!({"prompt": "Problem:"}), &merge(endless.clone(), &json!({"stream": stream}))).to_string();
        let mut leaving = send(server.address, "POST", "/v1/completions", body.as_bytes());
        if stream {
            let mut first = [0; 200];
            leaving.read_exact(&mut first).unwrap();
            assert!(first.starts_with(b"HTTP/1.0 200"));
        } else {
            std::thread::sleep(Duration::from_millis(100));
        }
        drop(leaving);
        let start = Instant::now();
        assert_eq!(server.complete(&json!({})).status, 200);
        assert!(start.elapsed() < Duration::from_secs(10), "took {:?}", start.elapsed());
    }
}

#[test]
fn a_full_queue_says_when_to_come_again() {
    let server = Running::start(Options { parallel: 1, queue: 1, ..Options::default() });
    let answer = server.complete(&json!({"n": 3, "logit_bias": {"0": -100}, "max_tokens": 400}));
    assert_eq!((answer.status, answer.json()["error"]["type"].as_str()), (429, Some("rate_limit_error")));
    assert!(answer.headers.contains("retry-after: 1"), "{}", answer.headers);
}

#[test]
fn a_server_that_loads_says_so() {
    let server = Running::loading("base");
    assert_eq!(server.get("/health").error(), (503, None, "the model is being loaded".into()));
    assert_eq!(server.complete(&json!({})).error().0, 503);
    assert_eq!(server.get("/v1/models").ok()["data"][0]["status"], json!({"value": "unloaded"}));
    server.open();
    assert_eq!(server.get("/health").status, 200);
}

#[test]
fn a_shutdown_lets_requests_finish() {
    let mut server = Running::start(Options::default());
    let body = json!({"prompt": "Problem:", "max_tokens": 200, "logit_bias": {"0": -100}, "stream": true}).to_string();
    let mut stream = send(server.address, "POST", "/v1/completions", body.as_bytes());
    stream.read_exact(&mut [0; 10]).unwrap();
    server.shutdown.take().unwrap().send(()).unwrap();
    server.thread.take().unwrap().join().unwrap();
    let mut rest = String::new();
    stream.read_to_string(&mut rest).unwrap();
    assert!(rest.ends_with("data: [DONE]\n\n"), "{rest}");
    assert!(TcpStream::connect(server.address).is_err());
    server.thread = Some(std::thread::spawn(|| {}));
}

#[test]
fn sampling_defaults_are_the_models_and_requests_override_them() {
    let server = Running::with_text(|text| Text { sampling: Sampling { temperature: 1.5, seed: None, ..text.sampling }, ..text });
    let text = |extra: &Value| server.complete(&merge(json!({"max_tokens": 30}), extra)).ok()["choices"][0]["text"].clone();
    assert_ne!(text(&json!({})), text(&json!({})));
    assert_eq!(text(&json!({"temperature": 0})), text(&json!({"temperature": 0})));
    assert_eq!(text(&json!({"seed": 5})), text(&json!({"seed": 5})));
}
