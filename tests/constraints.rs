//! Answers that must be what a request says: JSON schemas, regular expressions, calls of tools. The model is the tiny mathematician, who would
//! say none of it by himself.
#![cfg(feature = "serve")]

use serde_json::{Value, json};
use upcycle::engine::{Grammar, Options, Request, Sampling};

use crate::{serve::Running, support::engines::engine};

fn schema() -> Value {
    json!({
        "type": "object",
        "properties": {
            "sum": {"type": "integer", "minimum": 0, "maximum": 999},
            "steps": {"type": "array", "items": {"enum": ["add", "carry"]}, "minItems": 1, "maxItems": 3},
            "note": {"type": "string", "maxLength": 12},
        },
        "required": ["sum", "steps", "note"], "additionalProperties": false,
    })
}

fn fits(text: &str) {
    let answer: Value = serde_json::from_str(text).unwrap_or_else(|error| panic!("{error}: {text}"));
    assert_eq!(answer.as_object().unwrap().keys().collect::<Vec<_>>(), ["sum", "steps", "note"]);
    assert!(answer["sum"].as_u64().unwrap() < 1000, "{answer}");
    let steps = answer["steps"].as_array().unwrap();
    assert!((1..=3).contains(&steps.len()) && steps.iter().all(|step| step == "add" || step == "carry"), "{answer}");
    assert!(answer["note"].as_str().unwrap().chars().count() <= 12, "{answer}");
}

fn format() -> Value {
    json!({"type": "json_schema", "json_schema": {"name": "sum", "strict": true, "schema": schema()}})
}

#[test]
fn answers_fit_their_schema() {
    let server = Running::start(Options::default());
    for seed in 0..4 {
        let sampled = json!({"response_format": format(), "temperature": 1.5, "seed": seed, "max_tokens": 400});
        let whole = server.chat(&sampled).ok();
        assert_eq!(whole["choices"][0]["finish_reason"], "stop", "{whole}");
        let text = whole["choices"][0]["message"]["content"].as_str().unwrap();
        fits(text);
        let mut streaming = sampled;
        streaming["stream"] = true.into();
        let chunks = server.chat(&streaming).chunks();
        assert_eq!(chunks.iter().filter_map(|chunk| chunk["choices"][0]["delta"]["content"].as_str()).collect::<String>(), text);
    }
    let object = server.chat(&json!({"response_format": {"type": "json_object"}, "temperature": 1, "seed": 1, "max_tokens": 300})).ok();
    let text = object["choices"][0]["message"]["content"].as_str().unwrap();
    assert!(text.starts_with('{'), "{text}");
    assert!(object["choices"][0]["finish_reason"] == "length" || serde_json::from_str::<Value>(text).unwrap().is_object(), "{text}");
}

#[test]
fn other_grammars_bind_completions_too() {
    let server = Running::start(Options::default());
    let pattern = json!({"type": "regex", "regex": "[ab]{3}-(é|ü)+!"});
    let answer =
        server.complete(&json!({"response_format": pattern, "max_tokens": 60, "temperature": 1, "seed": 2, "logit_bias": {}})).ok();
    let text = answer["choices"][0]["text"].as_str().unwrap();
    let expected = regex::Regex::new("^[ab]{3}-(é|ü)+!$").unwrap();
    assert!(expected.is_match(text) || answer["choices"][0]["finish_reason"] == "length", "{answer}");
    let lark = json!({"type": "lark", "grammar": "x", "lark": "start: \"yes\" | \"no\""});
    let answer = server.complete(&json!({"response_format": lark})).ok();
    assert!(["yes", "no"].contains(&answer["choices"][0]["text"].as_str().unwrap()), "{answer}");
    assert_eq!(answer["choices"][0]["finish_reason"], "stop");
}

#[test]
fn guesses_do_not_change_what_fits() {
    let text = |lookup: usize| {
        let engine = engine("math", Options { lookup, ..Options::default() });
        // A list of the same word invites guesses.
        let list = json!({"type": "array", "items": {"const": "carry"}, "minItems": 12, "maxItems": 12, "x-guidance": {"whitespace_flexible": false}});
        let constraint = Some(engine.constraint(&Grammar::JsonSchema(list)).unwrap());
        let sampling = Sampling { temperature: 0.0, ..Sampling::default() };
        let prompt = engine.text().prompt("[\"carry\", \"carry\", \"carry\", \"carry\"]\n").unwrap();
        let mut text = String::new();
        let request = Request { prompt, sampling, max_tokens: Some(300), constraint, ..Request::default() };
        engine
            .stream(request, |piece| {
                text += piece;
                std::ops::ControlFlow::Continue(())
            })
            .unwrap();
        text
    };
    let plain = text(0);
    assert_eq!(serde_json::from_str::<Value>(&plain).unwrap(), json!(vec!["carry"; 12]));
    assert_eq!(text(8), plain);
}

#[test]
fn grammars_that_cannot_be_used_are_refused() {
    let server = Running::start(Options::default());
    for schema in [
        json!({"type": "nonsense"}),
        json!({"$ref": "https://example.org/schema.json"}),
        json!({"type": "object", "properties": {"a": false}, "required": ["a"]}),
    ] {
        let format = json!({"type": "json_schema", "json_schema": {"schema": schema}});
        let (status, param, message) = server.chat(&json!({"response_format": format})).error();
        assert_eq!((status, param.as_deref()), (400, Some("response_format")), "{schema}: {message}");
    }
    for format in [json!({"type": "regex", "regex": "("}), json!({"type": "lark", "lark": "start: other"})] {
        let (status, param, message) = server.chat(&json!({"response_format": format})).error();
        assert_eq!((status, param.as_deref()), (400, Some("response_format")), "{format}: {message}");
    }
}

fn tools() -> Value {
    let parameters = json!({
        "type": "object", "properties": {"a": {"type": "integer", "maximum": 99, "minimum": 0}, "op": {"enum": ["+", "-"]}},
        "required": ["a", "op"], "additionalProperties": false,
    });
    json!([
        {"type": "function", "function": {"name": "compute", "description": "Computes.", "parameters": parameters}},
        {"type": "function", "function": {"name": "stop_now"}},
    ])
}

#[test]
fn wanted_calls_are_made_and_their_arguments_fit() {
    let server = Running::start(Options::default());
    let named = json!({"type": "function", "function": {"name": "compute"}});
    for (choice, seed) in [(named.clone(), 1), (named, 2), (json!("required"), 3)] {
        let request = json!({"tools": tools(), "tool_choice": choice, "parallel_tool_calls": false, "temperature": 1, "seed": seed, "max_tokens": 200});
        let whole = server.chat(&request).ok();
        let whole = &whole["choices"][0];
        assert_eq!((&whole["finish_reason"], &whole["message"]["content"]), (&json!("tool_calls"), &Value::Null), "{whole}");
        let [call] = whole["message"]["tool_calls"].as_array().unwrap().as_slice() else { panic!("{whole}") };
        assert!(call["id"].as_str().unwrap().starts_with("call_") && call["type"] == "function", "{call}");
        let arguments: Value = serde_json::from_str(call["function"]["arguments"].as_str().unwrap()).unwrap();
        if call["function"]["name"] == "compute" {
            assert!(arguments["a"].as_u64().unwrap() < 100 && ["+", "-"].contains(&arguments["op"].as_str().unwrap()), "{arguments}");
        }

        let mut streaming = request;
        streaming["stream"] = true.into();
        let chunks = server.chat(&streaming).chunks();
        let deltas: Vec<&Value> =
            chunks.iter().filter_map(|chunk| chunk["choices"][0]["delta"]["tool_calls"].as_array()).flatten().collect();
        assert_eq!((&deltas[0]["index"], &deltas[0]["function"]["name"]), (&json!(0), &call["function"]["name"]));
        assert!(deltas[0]["id"].is_string() && deltas[1..].iter().all(|delta| delta.get("id").is_none()));
        let streamed: String = deltas.iter().filter_map(|delta| delta["function"]["arguments"].as_str()).collect();
        assert_eq!(streamed, call["function"]["arguments"].as_str().unwrap());
        assert_eq!(chunks.last().unwrap()["choices"][0]["finish_reason"], "tool_calls");
    }
}

#[test]
fn results_of_calls_can_be_told() {
    let server = Running::start(Options::default());
    let call = json!({"id": "call_1", "type": "function", "function": {"name": "compute", "arguments": "{\"a\": 1, \"op\": \"+\"}"}});
    let messages = json!([
        {"role": "user", "content": "Compute 12 + 30."}, {"role": "assistant", "content": null, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_1", "content": "42"},
    ]);
    let answer = server.post("/v1/chat/completions", &json!({"messages": messages, "tools": tools(), "max_tokens": 8})).ok();
    assert!(answer["choices"][0]["message"].get("tool_calls").is_none(), "{answer}");
    let conflict = json!({"tools": tools(), "tool_choice": "required", "response_format": {"type": "json_object"}});
    assert_eq!(server.chat(&conflict).error().1.as_deref(), Some("response_format"));
    let wrong = server.chat(&json!({"tools": [{"type": "function", "function": {}}]})).error();
    assert_eq!((wrong.0, wrong.1.as_deref()), (400, Some("tools[0].function.name")));
}
