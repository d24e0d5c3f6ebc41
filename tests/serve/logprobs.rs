//! Probabilities of tokens in both of OpenAI's forms, held against the decoder; echoes; the best of several; how texts end.

use serde_json::{Value, json};
use upcycle::engine::{Options, Text};
use upcycle_architectures::decoder::{Decoder, Logits, NoProbe, Step};

use super::{Running, merge};
use crate::support::engines::{dense, engine};

const PROMPT: &str = "Problem: Compute 12 + 30.\n";
/// Ends every text of the bundled models.
const EOS: usize = 0;

/// What a full forward says comes after each of the tokens: logarithms of probabilities.
fn forward(decoder: &Decoder, tokens: &[u32]) -> Vec<Vec<f64>> {
    let step = Step { tokens, cache: &mut decoder.cache(), logits: Logits::All };
    let rows = decoder.forward(&mut [step], &mut NoProbe).unwrap().to_vec2::<f32>().unwrap();
    let log_softmax = |row: Vec<f32>| {
        let total = row.iter().map(|v| f64::from(*v).exp()).sum::<f64>().ln();
        row.iter().map(|v| f64::from(*v) - total).collect()
    };
    rows.into_iter().map(log_softmax).collect()
}

fn greedy(decoder: &Decoder, prompt: &[u32], count: usize) -> Vec<u32> {
    let mut tokens = prompt.to_vec();
    for _ in 0..count {
        let last = forward(decoder, &tokens).pop().unwrap();
        tokens.push((0..last.len()).max_by(|&a, &b| last[a].total_cmp(&last[b]).then(b.cmp(&a))).unwrap() as u32);
    }
    tokens
}

fn word(text: &Text, id: u32) -> String {
    String::from_utf8(text.tokenizer.written(id)).unwrap()
}

fn close(found: &Value, expected: f64) {
    let found = found.as_f64().unwrap_or_else(|| panic!("{found} instead of {expected}"));
    assert!((found - expected).abs() < 1e-3, "{found} instead of {expected}");
}

/// The lists of all chunks of a stream, put together.
fn joined(chunks: &[Value]) -> Value {
    let mut all = json!({"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []});
    for logprobs in chunks.iter().map(|chunk| &chunk["choices"][0]["logprobs"]).filter(|logprobs| !logprobs.is_null()) {
        for (name, list) in all.as_object_mut().unwrap() {
            list.as_array_mut().unwrap().extend(logprobs[name].as_array().unwrap().iter().cloned());
        }
    }
    all
}

#[test]
fn an_echo_has_what_a_full_forward_says_of_every_token() {
    let (decoder, text) = dense("math");
    let prompt = text.prompt(PROMPT).unwrap();
    let tokens = greedy(&decoder, &prompt, 8);
    let expected = forward(&decoder, &tokens);
    let request = json!({"temperature": 0, "max_tokens": 8, "echo": true, "logprobs": 3, "logit_bias": {"0": -100}});
    for options in [Options::default(), Options { chunk: 5, ..Options::default() }] {
        let server = Running::over(engine("math", options));
        // Whoever has read the prompt before has not said how likely its tokens are.
        server.complete(&json!({}));
        let choice = server.complete(&request).ok()["choices"][0].clone();
        let said = choice["text"].as_str().unwrap();
        assert!(said.starts_with(PROMPT), "{said:?}");
        let logprobs = &choice["logprobs"];
        assert_eq!(logprobs["tokens"], json!(tokens.iter().map(|&id| word(&text, id)).collect::<Vec<_>>()));
        assert_eq!((&logprobs["token_logprobs"][0], &logprobs["top_logprobs"][0]), (&Value::Null, &Value::Null));
        for (i, row) in (1..tokens.len()).zip(&expected) {
            close(&logprobs["token_logprobs"][i], row[tokens[i] as usize]);
            let top = logprobs["top_logprobs"][i].as_object().unwrap();
            assert!(top.len() == 3 || (top.len() == 4 && top.contains_key(&word(&text, tokens[i]))), "{top:?}");
            let best = row.iter().copied().fold(f64::NEG_INFINITY, f64::max);
            close(&json!(top.values().map(|v| v.as_f64().unwrap()).fold(f64::NEG_INFINITY, f64::max)), best);
            top.iter().for_each(|(token, logprob)| {
                let ids = text.tokenizer.encode(token, upcycle::engine::Specials::Written).unwrap();
                if let [id] = ids.as_slice() {
                    close(logprob, row[*id as usize]);
                }
            });
            let start = logprobs["text_offset"][i].as_u64().unwrap() as usize;
            assert!(said[start..].starts_with(&word(&text, tokens[i])), "{start} of {said:?}");
        }
        let chunks = server.complete(&merge(request.clone(), &json!({"stream": true}))).chunks();
        assert_eq!(joined(&chunks), *logprobs);
        // The prompt alone.
        let alone = server.complete(&merge(request.clone(), &json!({"max_tokens": 0}))).ok();
        assert_eq!((&alone["choices"][0]["text"], &alone["usage"]["completion_tokens"]), (&json!(PROMPT), &json!(0)));
        assert_eq!(alone["choices"][0]["logprobs"]["token_logprobs"].as_array().unwrap().len(), prompt.len());
        assert_eq!(alone["choices"][0]["logprobs"]["token_logprobs"][prompt.len() - 1], logprobs["token_logprobs"][prompt.len() - 1]);
        let plain = server.complete(&json!({"echo": true, "max_tokens": 0})).ok()["choices"][0].clone();
        assert_eq!((&plain["text"], &plain["logprobs"], &plain["finish_reason"]), (&json!(PROMPT), &Value::Null, &json!("length")));
    }
}

#[test]
fn a_chat_tells_of_the_models_own_distribution_whatever_is_drawn() {
    let (decoder, text) = dense("math");
    let server = Running::start(Options::default());
    let asked = json!({
        "logprobs": true, "top_logprobs": 2, "temperature": 1.5, "top_k": 5, "seed": 4, "frequency_penalty": 1.0,
        "logit_bias": {"0": -100}, "response_format": {"type": "regex", "regex": "[a-z 0-9]{30}"}, "max_tokens": 20,
    });
    let choice = server.chat(&asked).ok()["choices"][0].clone();
    let content = choice["logprobs"]["content"].as_array().unwrap();
    let bytes = |token: &Value| token["bytes"].as_array().unwrap().iter().map(|byte| byte.as_u64().unwrap() as u8).collect::<Vec<u8>>();
    let said: Vec<u8> = content.iter().flat_map(bytes).collect();
    assert_eq!(choice["message"]["content"], String::from_utf8(said).unwrap());
    let messages = [json!({"role": "user", "content": "Compute 12 + 30."})];
    let mut tokens = text.chat_prompt(&messages, &serde_json::Map::new()).unwrap();
    let prompt = tokens.len();
    let id = |token: &Value| (0..2048).find(|&id| text.tokenizer.written(id) == bytes(token)).unwrap();
    tokens.extend(content.iter().map(id));
    for (token, row) in content.iter().zip(&forward(&decoder, &tokens)[prompt - 1..]) {
        close(&token["logprob"], row[id(token) as usize]);
        assert_eq!(token["token"].as_str().unwrap().as_bytes(), bytes(token));
        let mut best: Vec<f64> = row.clone();
        best.sort_by(|a, b| b.total_cmp(a));
        let top = token["top_logprobs"].as_array().unwrap();
        assert_eq!(top.len(), 2);
        top.iter().zip(best).for_each(|(top, best)| close(&top["logprob"], best));
    }
    let chunks = server.chat(&merge(asked.clone(), &json!({"stream": true}))).chunks();
    let streamed: Vec<Value> =
        chunks.iter().filter_map(|chunk| chunk["choices"][0]["logprobs"]["content"].as_array()).flatten().cloned().collect();
    assert_eq!(streamed, *content);
    assert!(server.chat(&json!({})).ok()["choices"][0]["logprobs"].is_null());
}

#[test]
fn the_best_of_several_is_the_likeliest() {
    let server = Running::start(Options::default());
    let drawn = json!({"temperature": 1.2, "seed": 7, "prompt": [PROMPT, "And God said"], "logit_bias": {"0": -100}});
    let all = server.complete(&merge(drawn.clone(), &json!({"n": 4, "logprobs": 0}))).ok();
    let mean = |choice: &Value| {
        let all: Vec<f64> = choice["logprobs"]["token_logprobs"].as_array().unwrap().iter().map(|v| v.as_f64().unwrap()).collect();
        all.iter().sum::<f64>() / all.len() as f64
    };
    let best = server.complete(&merge(drawn, &json!({"n": 2, "best_of": 4}))).ok();
    let choices = best["choices"].as_array().unwrap();
    assert_eq!(choices.iter().map(|choice| choice["index"].as_u64().unwrap()).collect::<Vec<_>>(), [0, 1, 2, 3]);
    for (prompt, written) in all["choices"].as_array().unwrap().chunks(4).enumerate() {
        let mut written: Vec<&Value> = written.iter().collect();
        written.sort_by(|a, b| mean(b).total_cmp(&mean(a)));
        for (choice, expected) in choices[2 * prompt..].iter().zip(&written[..2]) {
            assert_eq!((&choice["text"], &choice["logprobs"]), (&expected["text"], &Value::Null));
        }
    }
    let written = |answer: &Value| answer["usage"]["completion_tokens"].clone();
    assert_eq!(written(&best), written(&all), "what was written and not given was written all the same");
}

#[test]
fn texts_end_when_they_are_told_to() {
    let server = Running::start(Options::default());
    let ends = |extra: Value| {
        let answer = server.complete(&merge(json!({"temperature": 0, "logit_bias": {EOS.to_string(): 100}}), &extra)).ok();
        (answer["usage"]["completion_tokens"].as_u64().unwrap(), answer["choices"][0]["finish_reason"].as_str().unwrap().to_owned())
    };
    assert_eq!(ends(json!({})), (1, "stop".into()));
    assert_eq!(ends(json!({"min_tokens": 5})), (6, "stop".into()));
    assert_eq!(ends(json!({"ignore_eos": true})), (12, "length".into()));
    assert_eq!(ends(json!({"min_tokens": 100})), (12, "length".into()));

    let text = dense("math").1;
    let free = server.complete(&json!({"temperature": 0, "logprobs": 0})).ok()["choices"][0].clone();
    let words: Vec<&str> = free["logprobs"]["tokens"].as_array().unwrap().iter().map(|word| word.as_str().unwrap()).collect();
    let at = (1..words.len()).find(|&at| !words[..at].contains(&words[at])).unwrap();
    let id = (0..2048).find(|&id| text.tokenizer.written(id) == words[at].as_bytes()).unwrap();
    let stopped = server.complete(&json!({"temperature": 0, "stop_token_ids": [id], "logprobs": 0})).ok()["choices"][0].clone();
    assert_eq!((&stopped["text"], &stopped["finish_reason"]), (&json!(words[..at].concat()), &json!("stop")));
    assert_eq!(stopped["logprobs"]["tokens"], json!(words[..at]));
    let format = json!({"response_format": {"type": "json_object"}, "min_tokens": 3});
    assert_eq!(server.chat(&format).error().1.as_deref(), Some("min_tokens"));
}
