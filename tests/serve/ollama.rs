//! Ollama's API: the same answers in its own words.

use serde_json::{Value, json};
use upcycle::engine::Options;

use super::{Answer, Running, merge};

impl Running {
    fn ollama(&self, path: &str, extra: &Value) -> Answer {
        self.post(path, &merge(json!({"model": "math", "options": {"num_predict": 12}}), extra))
    }
}

impl Answer {
    fn lines(&self) -> Vec<Value> {
        assert_eq!(self.status, 200, "{}", self.body);
        assert!(self.headers.contains("content-type: application/x-ndjson"), "{}", self.headers);
        self.body.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
    }
}

#[test]
fn a_chat_says_what_openais_says() {
    let server = Running::start(Options::default());
    let messages = json!([{"role": "user", "content": "Compute 12 + 30."}]);
    let expected = server.chat(&json!({})).ok();
    let text = &expected["choices"][0]["message"]["content"];
    let whole = server.ollama("/api/chat", &json!({"messages": messages, "stream": false})).ok();
    assert_eq!((&whole["message"]["content"], &whole["message"]["role"]), (text, &json!("assistant")));
    assert_eq!((&whole["done"], &whole["done_reason"], &whole["model"]), (&json!(true), &json!("length"), &json!("math")));
    assert_eq!((&whole["prompt_eval_count"], &whole["eval_count"]), (&expected["usage"]["prompt_tokens"], &json!(12)));
    for duration in ["total_duration", "load_duration", "prompt_eval_duration", "eval_duration"] {
        assert!(whole[duration].is_u64(), "{duration}: {whole}");
    }
    let lines = server.ollama("/api/chat", &json!({"model": "math:latest", "messages": messages})).lines();
    let streamed: String = lines.iter().map(|line| line["message"]["content"].as_str().unwrap()).collect();
    assert_eq!(json!(streamed), *text);
    let (last, others) = lines.split_last().unwrap();
    assert!(last["done"] == true && last["eval_count"] == 12 && others.len() > 2 && others.iter().all(|line| line["done"] == false));
    assert!(lines[0]["created_at"].as_str().unwrap().ends_with('Z'), "{}", lines[0]);
}

#[test]
fn a_text_goes_on_raw_or_as_a_chat() {
    let server = Running::start(Options::default());
    let prompt = "Compute 12 + 30.";
    let chat = server.chat(&json!({})).ok()["choices"][0]["message"]["content"].clone();
    assert_eq!(server.ollama("/api/generate", &json!({"prompt": prompt, "stream": false})).ok()["response"], chat);
    let text = server.complete(&json!({})).ok()["choices"][0]["text"].clone();
    let raw = json!({"prompt": "Problem: Compute 12 + 30.\n", "raw": true});
    assert_eq!(server.ollama("/api/generate", &merge(raw.clone(), &json!({"stream": false}))).ok()["response"], text);
    let streamed: String = server.ollama("/api/generate", &raw).lines().iter().map(|line| line["response"].as_str().unwrap()).collect();
    assert_eq!(json!(streamed), text);
    let schema = json!({"type": "object", "properties": {"x": {"type": "integer"}}, "required": ["x"], "additionalProperties": false});
    let bound = json!({"prompt": prompt, "format": schema, "stream": false, "options": {"num_predict": 60, "temperature": 1, "seed": 1}});
    let object: Value = serde_json::from_str(server.ollama("/api/generate", &bound).ok()["response"].as_str().unwrap()).unwrap();
    assert!(object["x"].is_i64(), "{object}");
}

#[test]
fn mistakes_are_one_sentence() {
    let server = Running::start(Options::default());
    for (path, body, status, expected) in [
        (
            "/api/chat",
            json!({"model": "other", "messages": [{"role": "user", "content": "?"}]}),
            404,
            "the model `other` is not served here; `math` is",
        ),
        ("/api/generate", json!({"prompt": "a", "template": "{{ .Prompt }}"}), 400, "`template` is not supported"),
        ("/api/generate", json!({"prompt": "a", "options": {"temperature": -1}}), 400, "temperature"),
        ("/api/generate", json!({"prompt": "a", "keep_alive": "soon"}), 400, "`keep_alive` must be"),
        ("/api/show", json!({"model": "other"}), 404, "is not served here"),
    ] {
        let answer = server.ollama(path, &body);
        let error = answer.json()["error"].as_str().unwrap().to_owned();
        assert_eq!((answer.status, error.contains(expected)), (status, true), "{error}");
    }
}

#[test]
fn models_are_shown_loaded_and_let_go() {
    let server = Running::start(Options::default());
    assert_eq!(server.get("/api/tags").ok()["models"][0]["name"], "math");
    assert_eq!(server.get("/api/version").ok()["version"], env!("CARGO_PKG_VERSION"));
    let shown = server.post("/api/show", &json!({"model": "math"})).ok();
    assert_eq!((&shown["model_info"]["general.context_length"], &shown["capabilities"]), (&json!(512), &json!(["completion", "tools"])));
    let loaded = |server: &Running| server.get("/api/ps").ok()["models"].as_array().unwrap().len();
    assert_eq!(loaded(&server), 1);
    let gone = server.ollama("/api/generate", &json!({"keep_alive": 0, "stream": false})).ok();
    assert_eq!((&gone["done_reason"], loaded(&server)), (&json!("unload"), 0));
    let back = server.ollama("/api/chat", &json!({"messages": [], "stream": false})).ok();
    assert_eq!((&back["done_reason"], loaded(&server)), (&json!("load"), 1));
}
