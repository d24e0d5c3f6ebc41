//! Experts over HTTP: masked, forced and weighed, by name and by number; told in answers and streams; counted.

use serde_json::{Value, json};
use upcycle::engine::Options;
use upcycle_architectures::decoder::{Logits, Probe, Step};
use upcycle_routers::route::Routing;

use super::{Running, merge};
use crate::support::engines::{COMPOSED, composite, composite_decoder, engine, ensemble};

const LAYERS: usize = 4;
const PROMPT: &str = "Problem: Compute 12 + 30.\n";

fn told(choice: &Value) -> Vec<Value> {
    choice["experts"].as_array().unwrap_or_else(|| panic!("{choice}")).clone()
}

fn words(tokens: &[Value]) -> String {
    tokens.iter().map(|token| token["text"].as_str().unwrap()).collect()
}

/// Every choice of an answer's tokens.
fn chosen(tokens: &[Value]) -> impl Iterator<Item = u64> {
    let layers = tokens.iter().flat_map(|token| token["layers"].as_array().unwrap());
    layers.flat_map(|layer| layer.as_array().unwrap()).map(|expert| expert.as_u64().unwrap())
}

#[test]
fn whoever_is_masked_is_never_chosen() {
    let server = Running::over(composite(Options::default()));
    let answer =
        |extra: Value| server.complete(&merge(json!({"temperature": 0, "return_experts": true}), &extra)).ok()["choices"][0].clone();
    let free = told(&answer(json!({})));
    assert_eq!(free.len(), 12);
    for token in &free {
        let share: f64 = token["share"].as_array().unwrap().iter().map(|share| share.as_f64().unwrap()).sum();
        assert!((share - 1.0).abs() < 1e-5, "{token}");
        let layers = token["layers"].as_array().unwrap();
        assert!(layers.len() == LAYERS && layers.iter().all(|layer| layer.as_array().unwrap().len() == 2), "{token}");
    }
    for (index, name) in COMPOSED.iter().enumerate() {
        let masked = answer(json!({"mask_experts": [name]}));
        assert!(chosen(&free).any(|expert| expert == index as u64), "{name} is never chosen anyway");
        assert!(chosen(&told(&masked)).all(|expert| expert != index as u64), "{masked}");
        // By its number, and pushed away instead of ruled out.
        for same in [json!({"mask_experts": [index]}), json!({"mask_experts": [index.to_string()]}), json!({"expert_bias": {*name: -1e9}})]
        {
            assert_eq!(answer(same)["text"], masked["text"]);
        }
    }
    let three = told(&answer(json!({"experts_per_token": 3})));
    assert!(three.iter().flat_map(|token| token["layers"].as_array().unwrap()).all(|layer| layer.as_array().unwrap().len() == 3));
}

/// Sends every token to one expert.
struct Forced(u32);

impl Probe for Forced {
    fn route(&mut self, _: usize, _: &[f32], routing: &mut Routing) {
        let tokens = routing.experts.len() / routing.top_k;
        *routing = Routing { top_k: 1, experts: vec![self.0; tokens], weights: vec![1.0; tokens] };
    }
}

#[test]
fn whoever_is_forced_writes_alone() {
    let server = Running::over(composite(Options::default()));
    let (decoder, text) = composite_decoder();
    for (index, name) in COMPOSED.iter().enumerate() {
        let (mut tokens, mut cache, mut expected) = (text.prompt(PROMPT).unwrap(), decoder.cache(), Vec::<u32>::new());
        for _ in 0..12 {
            let step = Step { tokens: &tokens, cache: &mut cache, logits: Logits::Last };
            let logits = decoder.forward(&mut [step], &mut Forced(index as u32)).unwrap().flatten_all().unwrap().to_vec1::<f32>().unwrap();
            tokens = vec![(0..logits.len()).max_by(|&a, &b| logits[a].total_cmp(&logits[b])).unwrap() as u32];
            expected.extend(&tokens);
        }
        let answer = server.complete(&json!({"temperature": 0, "force_experts": [name], "return_experts": true})).ok();
        let told = told(&answer["choices"][0]);
        let ids: Vec<u32> = told.iter().map(|token| token["token"].as_u64().unwrap() as u32).collect();
        assert!(!ids.is_empty() && ids == expected[..ids.len()], "{name}: {ids:?} {expected:?}");
        assert!(chosen(&told).all(|expert| expert == index as u64));
        let whole: Vec<f64> = (0..COMPOSED.len()).map(|e| f64::from(u8::from(e == index))).collect();
        assert!(told.iter().all(|token| token["share"] == json!(whole)));
    }
}

#[test]
fn a_stream_tells_with_each_chunk_who_wrote_its_text() {
    let server = Running::over(composite(Options::default()));
    for extra in [json!({}), json!({"stop": "4"})] {
        let wished = merge(json!({"temperature": 0, "return_experts": true, "force_experts": ["math", "code"]}), &extra);
        let whole = server.complete(&wished).ok()["choices"][0].clone();
        let chunks = server.complete(&merge(wished, &json!({"stream": true}))).chunks();
        let mut streamed = Vec::new();
        for choice in chunks.iter().map(|chunk| &chunk["choices"][0]) {
            let own = choice.get("experts").map_or_else(Vec::new, |_| told(choice));
            if extra.get("stop").is_none() {
                assert_eq!(choice["text"], words(&own));
            }
            streamed.extend(own);
        }
        assert_eq!(streamed, told(&whole));
        // What is told is the text, to the last whole token before the stop string.
        let (text, told) = (whole["text"].as_str().unwrap(), words(&streamed));
        assert!(text.starts_with(&told) && text.len() - told.len() < 3, "{text:?} {told:?}");
        let plain =
            server.complete(&merge(json!({"temperature": 0, "force_experts": ["code", "math"]}), &extra)).ok()["choices"][0].clone();
        assert!(plain.get("experts").is_none() && plain["text"] == whole["text"]);
    }
}

#[test]
fn wishes_that_cannot_be_met_are_named() {
    let server = Running::over(composite(Options::default()));
    let names = COMPOSED.join(", ");
    let unknown = format!("there is no expert `physics`; there are {names}, numbered from 0");
    for (wish, param) in [
        (json!({"mask_experts": ["physics"]}), "mask_experts"),
        (json!({"force_experts": ["code", "physics"]}), "force_experts"),
        (json!({"expert_bias": {"physics": 1}}), "expert_bias"),
    ] {
        assert_eq!(server.complete(&wish).error(), (400, Some(param.into()), unknown.clone()));
    }
    for (wish, param) in [
        (json!({"mask_experts": [9]}), "mask_experts"),
        (json!({"mask_experts": [[0]]}), "mask_experts"),
        (json!({"mask_experts": COMPOSED}), "mask_experts"),
        (json!({"mask_experts": ["code"], "force_experts": ["code"]}), "mask_experts"),
        (json!({"experts_per_token": 0}), "experts_per_token"),
        (json!({"experts_per_token": 5}), "experts_per_token"),
        (json!({"expert_bias": {"code": "much"}}), "expert_bias"),
    ] {
        let (status, found, message) = server.complete(&wish).error();
        assert_eq!((status, found.as_deref().map(|param| param.split('.').next().unwrap())), (400, Some(param)), "{message}");
    }
    assert_eq!(server.chat(&json!({"mask_experts": [], "force_experts": null, "return_experts": false})).status, 200);
    let dense = Running::start(Options::default());
    for (wish, param) in [(json!({"return_experts": true}), "return_experts"), (json!({"experts_per_token": 1}), "experts_per_token")] {
        let refused = dense.chat(&wish).error();
        assert_eq!(refused, (400, Some(param.into()), "the model is dense: it has no experts to choose from".into()));
    }
    assert_eq!(dense.complete(&json!({"mask_experts": []})).status, 200);
}

#[test]
fn whole_experts_are_forced_and_masked_too() {
    let names = ["code", "bible", "german", "math"];
    let server = Running::over(ensemble(&names, Options::default()));
    let wish = |extra: Value| server.complete(&merge(json!({"temperature": 0, "max_tokens": 20}), &extra));
    for name in names {
        let alone = engine(name, Options::default());
        let sampling = upcycle::engine::Sampling { temperature: 0.0, ..alone.text().sampling.clone() };
        let request = upcycle::engine::Request {
            prompt: alone.text().prompt(PROMPT).unwrap(),
            sampling,
            max_tokens: Some(20),
            ..upcycle::engine::Request::default()
        };
        let mut expected = String::new();
        let said = |text: &str| {
            expected += text;
            std::ops::ControlFlow::Continue(())
        };
        alone.stream(request, said).unwrap();
        assert_eq!(wish(json!({"force_experts": [name]})).ok()["choices"][0]["text"], expected, "{name}");
    }
    let masked = wish(json!({"mask_experts": ["math"], "return_experts": true})).ok();
    assert!(chosen(&told(&masked["choices"][0])).all(|expert| expert != 3), "{masked}");
    let (status, param, message) = wish(json!({"experts_per_token": 2})).error();
    assert_eq!((status, param.as_deref()), (400, Some("experts_per_token")), "{message}");
}

#[test]
fn choices_are_counted() {
    let server = Running::over(composite(Options::default()));
    let before = server.get("/v1/experts").ok();
    assert_eq!(before["experts"][1], json!({"index": 1, "name": COMPOSED[1]}));
    assert_eq!((&before["object"], &before["model"], &before["experts_per_token"]), (&json!("experts"), &json!("math"), &json!(2)));
    assert_eq!((&before["tokens"], &before["layers"][0]["load"]), (&json!(0), &json!([0.0, 0.0, 0.0, 0.0])));
    let usage = server.complete(&json!({"force_experts": [COMPOSED[1], COMPOSED[2]]})).ok()["usage"].clone();
    let after = server.get("/v1/experts?model=math").ok();
    // The last token is written and never read.
    assert_eq!(after["tokens"].as_u64().unwrap(), usage["total_tokens"].as_u64().unwrap() - 1);
    assert_eq!(after["layers"].as_array().unwrap().len(), LAYERS);
    for (number, layer) in after["layers"].as_array().unwrap().iter().enumerate() {
        assert_eq!((layer["layer"].as_u64(), &layer["load"]), (Some(number as u64), &json!([0.0, 0.5, 0.5, 0.0])));
        assert!((layer["entropy"].as_f64().unwrap() - 2f64.ln()).abs() < 1e-9 && layer["recent"][1].as_f64().unwrap() > 0.49, "{layer}");
    }
    assert_eq!(server.get("/v1/experts?model=other").error().0, 404);
    let dense = Running::start(Options::default()).get("/v1/experts").ok();
    assert_eq!((&dense["experts"], &dense["layers"]), (&json!([]), &json!([])));
}
