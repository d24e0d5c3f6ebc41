//! Embeddings held against the decoder, and tokens there and back.

use base64::{Engine as _, prelude::BASE64_STANDARD};
use candle_core::Tensor;
use serde_json::{Value, json};
use upcycle::engine::{Options, Specials};
use upcycle_architectures::decoder::{Logits, Probe, Site, Step};

use super::Running;
use crate::support::engines::{dense, engine, ensemble};

/// Keeps what the head sees.
struct Last(Vec<Vec<f32>>);

impl Probe for Last {
    fn wants(&self, site: Site) -> bool {
        site == Site::FinalNorm
    }

    fn observe(&mut self, _: Site, _: usize, x: &Tensor) -> candle_core::Result<()> {
        self.0 = x.to_vec2()?;
        Ok(())
    }
}

fn numbers(object: &Value) -> Vec<f64> {
    object["embedding"].as_array().unwrap().iter().map(|x| x.as_f64().unwrap()).collect()
}

#[test]
fn embeddings_are_the_mean_of_the_last_states_whoever_writes_beside_them() {
    let (decoder, text) = dense("math");
    let long = "In the beginning was the Word, and the Word was with God. ".repeat(12);
    let inputs = ["Compute 12 + 30.", "a", &long, "Compute 12 + 31."];
    let expected = inputs.map(|input| {
        let tokens = text.prompt(input).unwrap();
        let mut last = Last(Vec::new());
        decoder.forward(&mut [Step { tokens: &tokens, cache: &mut decoder.cache(), logits: Logits::None }], &mut last).unwrap();
        let mut mean = vec![0.0; decoder.config().hidden];
        last.0.iter().for_each(|row| mean.iter_mut().zip(row).for_each(|(mean, x)| *mean += f64::from(*x)));
        let length = mean.iter().map(|x| x * x).sum::<f64>().sqrt();
        mean.iter().map(|x| x / length).collect::<Vec<f64>>()
    });
    let server = Running::over(engine("math", Options { chunk: 48, ..Options::default() }));
    let ask = |body: Value| server.post("/v1/embeddings", &body);
    let writing = std::thread::scope(|scope| {
        let writing = scope.spawn(|| server.complete(&json!({"max_tokens": 100, "ignore_eos": true, "temperature": 0})).ok());
        // The second time, all has been read before.
        for _ in 0..2 {
            let answer = ask(json!({"input": inputs, "model": "math"})).ok();
            assert_eq!((&answer["object"], &answer["model"]), (&json!("list"), &json!("math")));
            for (i, (object, expected)) in answer["data"].as_array().unwrap().iter().zip(&expected).enumerate() {
                assert_eq!((&object["object"], &object["index"]), (&json!("embedding"), &json!(i)));
                let distance = numbers(object).iter().zip(expected).map(|(a, b)| (a - b).abs()).fold(0.0, f64::max);
                assert!(distance < 1e-4 && numbers(object).len() == expected.len(), "{i}: {distance}");
            }
            let tokens: usize = inputs.iter().map(|input| text.prompt(input).unwrap().len()).sum();
            assert_eq!(answer["usage"], json!({"prompt_tokens": tokens, "total_tokens": tokens}));
        }
        writing.join().unwrap()
    });
    assert_eq!(server.complete(&json!({"max_tokens": 100, "ignore_eos": true, "temperature": 0})).ok()["choices"], writing["choices"]);

    // To the last bit, however it is cut into passes.
    let (one, alone) = (|answer: Value| answer["data"][0].clone(), Running::start(Options::default()));
    assert_eq!(one(alone.post("/v1/embeddings", &json!({"input": long})).ok()), one(ask(json!({"input": long})).ok()));
    let one = one(ask(json!({"input": inputs[0]})).ok());
    let bytes = ask(json!({"input": text.prompt(inputs[0]).unwrap(), "encoding_format": "base64"})).ok()["data"][0].clone();
    let bytes = BASE64_STANDARD.decode(bytes["embedding"].as_str().unwrap()).unwrap();
    let floats: Vec<f64> = bytes.chunks(4).map(|four| f64::from(f32::from_le_bytes(four.try_into().unwrap()))).collect();
    assert_eq!(floats.len(), numbers(&one).len());
    assert!(floats.iter().zip(numbers(&one)).all(|(a, b)| (a - b).abs() < 1e-6));
    for (body, param) in [
        (json!({"input": ""}), "input"),
        (json!({}), "input"),
        (json!({"input": [1.5]}), "input"),
        (json!({"input": "a", "dimensions": 8}), "dimensions"),
        (json!({"input": "a", "encoding_format": "int8"}), "encoding_format"),
        (json!({"input": "a", "model": "other"}), "model"),
    ] {
        assert_eq!(ask(body).error().1.as_deref(), Some(param));
    }
    let many = Running::over(ensemble(&["code", "math"], Options::default()));
    let (status, _, message) = many.post("/v1/embeddings", &json!({"input": "a"})).error();
    assert!(status == 400 && message.contains("no embeddings in common"), "{message}");
}

#[test]
fn tokens_go_there_and_back() {
    let server = Running::start(Options::default());
    let tokenizer = dense("math").1.tokenizer;
    let words = "<|im_start|>Zwölf €\n";
    let ids = tokenizer.encode(words, Specials::Written).unwrap();
    for field in ["content", "prompt", "text"] {
        assert_eq!(server.post("/tokenize", &json!({field: words})).ok(), json!({"tokens": ids}));
    }
    let added = tokenizer.encode(words, Specials::Add).unwrap();
    assert_eq!(server.post("/tokenize", &json!({"content": words, "add_special": true})).ok()["tokens"], json!(added));
    let pieces = server.post("/tokenize", &json!({"content": words, "with_pieces": true})).ok()["tokens"].clone();
    let bytes = |piece: &Value| match piece {
        Value::String(text) => text.clone().into_bytes(),
        bytes => serde_json::from_value(bytes.clone()).unwrap(),
    };
    let spelled: Vec<u8> = pieces.as_array().unwrap().iter().flat_map(|token| bytes(&token["piece"])).collect();
    assert_eq!(String::from_utf8(spelled).unwrap(), words);
    assert!(pieces.as_array().unwrap().iter().map(|token| token["id"].as_u64().unwrap() as u32).eq(ids.iter().copied()));
    assert_eq!(server.post("/detokenize", &json!({"tokens": ids})).ok(), json!({"content": words}));
    assert_eq!(server.post("/detokenize", &json!({"tokens": ["a"]})).error().1.as_deref(), Some("tokens[0]"));
    assert_eq!(server.post("/tokenize", &json!({})).error().0, 400);
}
