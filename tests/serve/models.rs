//! Several models in one process: loaded when asked for, once, and given back.

use std::{
    sync::{
        Arc, Barrier,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use serde_json::json;
use upcycle::{
    engine::Options,
    serve::{Access, Entry, Residence},
};

use super::{Running, entry, send};
use crate::support::engines::engine;

impl Running {
    fn several(names: &[&'static str], residence: Residence) -> Self {
        Self::of(names.iter().map(|name| entry(name, Options::default())).collect(), residence)
    }

    fn of(entries: Vec<Entry>, residence: Residence) -> Self {
        let running = Self::listening(Access::default(), entries, residence);
        running.server.open().unwrap();
        running
    }

    fn ask(&self, model: &str) -> u16 {
        self.complete(&json!({"model": model, "max_tokens": 2})).status
    }

    fn states(&self) -> Vec<String> {
        let models = self.get("/v1/models").ok()["data"].clone();
        models.as_array().unwrap().iter().map(|model| model["status"]["value"].as_str().unwrap().to_owned()).collect()
    }

    fn until(&self, states: &[&str]) {
        let start = Instant::now();
        while self.states() != states {
            assert!(start.elapsed() < Duration::from_secs(20), "{:?}, not {states:?}", self.states());
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}

/// A request that is answered for seconds.
fn long(server: &Running, model: &str) -> std::net::TcpStream {
    let body = json!({"model": model, "prompt": "Problem:", "n": 60, "max_tokens": 500, "logit_bias": {"0": -100}}).to_string();
    let asking = send(server.address, "POST", "/v1/completions", body.as_bytes());
    let start = Instant::now();
    let running = format!("upcycle_requests_running{{model=\"{model}\"}} 8");
    while !server.get("/metrics").body.contains(&running) {
        assert!(start.elapsed() < Duration::from_secs(20), "{}", server.get("/metrics").body);
        std::thread::sleep(Duration::from_millis(5));
    }
    asking
}

#[test]
fn models_are_loaded_when_asked_for() {
    let server = Running::several(&["math", "code"], Residence::default());
    assert_eq!(server.states(), ["loaded", "unloaded"]);
    let answer = server.complete(&json!({})).ok();
    assert_eq!(answer["model"], "math", "who names none means the first");
    let other = server.complete(&json!({"model": "code"})).ok();
    assert_eq!(other["model"], "code");
    assert_ne!(answer["choices"], other["choices"]);
    assert_eq!(server.states(), ["loaded", "loaded"]);
    let unknown = server.complete(&json!({"model": "gpt-4o"}));
    assert_eq!(unknown.json()["error"]["code"], "model_not_found");
    assert_eq!(unknown.error(), (404, Some("model".into()), "the model `gpt-4o` is not served here; `math`, `code` are".into()));
}

#[test]
fn a_model_asked_for_twice_is_loaded_once_and_its_failure_told_to_both() {
    let (loads, fails) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicUsize::new(1)));
    let slow = {
        let (loads, fails) = (loads.clone(), fails.clone());
        move || {
            loads.fetch_add(1, Ordering::SeqCst);
            std::thread::sleep(Duration::from_millis(500));
            if fails.load(Ordering::SeqCst) > 0 { Err("no such file".into()) } else { Ok(engine("code", Options::default())) }
        }
    };
    let slow = Entry { name: "slow".into(), place: "slow".into(), load: Box::new(slow) };
    let server = Running::of(vec![entry("math", Options::default()), slow], Residence::default());
    let together = || {
        let start = Barrier::new(2);
        let ask = || {
            start.wait();
            server.complete(&json!({"model": "slow", "max_tokens": 2}))
        };
        std::thread::scope(|scope| [scope.spawn(ask), scope.spawn(ask)].map(|thread| thread.join().unwrap()))
    };
    for refused in together() {
        assert_eq!(refused.error(), (500, None, "the model `slow` cannot be loaded: no such file".into()));
    }
    assert_eq!(loads.load(Ordering::SeqCst), 1);
    let shown = server.get("/v1/models/slow").ok();
    assert_eq!(shown["status"], json!({"value": "failed", "error": "no such file"}));
    assert_eq!(server.ask("math"), 200, "others are not troubled");
    fails.store(0, Ordering::SeqCst);
    assert!(together().iter().all(|answer| answer.status == 200));
    assert_eq!(loads.load(Ordering::SeqCst), 2, "it is tried again, once");
}

#[test]
fn the_model_that_nobody_has_asked_for_longest_makes_room() {
    let server = Running::several(&["math", "code", "base"], Residence { most: Some(2), idle: None });
    assert_eq!((server.ask("code"), server.ask("math"), server.ask("base")), (200, 200, 200));
    assert_eq!(server.states(), ["loaded", "unloaded", "loaded"]);
    let (math, base) = (long(&server, "math"), long(&server, "base"));
    let refused = server.complete(&json!({"model": "code"}));
    assert_eq!(refused.error(), (503, None, "2 models may be in memory (`--max-models`), and all that are there are answering".into()));
    assert!(refused.headers.contains("retry-after: 1"), "{}", refused.headers);
    drop(base);
    let start = Instant::now();
    while server.ask("code") != 200 {
        assert!(start.elapsed() < Duration::from_secs(20));
        std::thread::sleep(Duration::from_millis(20));
    }
    assert_eq!(server.states(), ["loaded", "loaded", "unloaded"], "the one that answers stays");
    drop(math);
}

#[test]
fn a_model_that_nobody_asks_for_goes_and_comes_back() {
    let server = Running::several(&["math"], Residence { most: None, idle: Some(Duration::from_millis(300)) });
    server.until(&["unloaded"]);
    assert_eq!(server.get("/health").status, 200);
    assert_eq!(server.ask("math"), 200);
    let asking = long(&server, "math");
    std::thread::sleep(Duration::from_millis(1500));
    assert_eq!(server.states(), ["loaded"], "who answers is not idle");
    assert_eq!(server.get("/v1/experts?load=false").status, 200);
    drop(asking);
    let start = Instant::now();
    let absent = loop {
        let answer = server.get("/v1/experts?load=false");
        if answer.status != 200 {
            break answer;
        }
        assert!(start.elapsed() < Duration::from_secs(10), "who looks on keeps it");
        std::thread::sleep(Duration::from_millis(20));
    };
    assert_eq!(absent.error(), (404, None, "the model `math` is not in memory".into()));
    assert_eq!(server.states(), ["unloaded"]);
}

#[test]
fn models_are_loaded_unloaded_and_made_anew_when_told() {
    let made = Arc::new(AtomicUsize::new(0));
    let changing = {
        let made = made.clone();
        move || Ok(engine(["math", "code"][made.fetch_add(1, Ordering::SeqCst).min(1)], Options::default()))
    };
    let changing = Entry { name: "m".into(), place: "m".into(), load: Box::new(changing) };
    let server = Running::of(vec![changing], Residence::default());
    let before = server.complete(&json!({})).ok()["choices"].clone();
    let endless = json!({"prompt": "Problem:", "max_tokens": 300, "logit_bias": {"0": -100}, "stream": true}).to_string();
    let running = send(server.address, "POST", "/v1/completions", endless.as_bytes());
    let done = server.post("/models/reload", &json!({"model": "m"})).ok();
    assert_eq!((&done["success"], &done["model"]["status"]["value"]), (&json!(true), &json!("loaded")));
    let after = server.complete(&json!({})).ok()["choices"].clone();
    assert_ne!(before, after, "what lies there now is served");
    let whole = super::finish(running).chunks();
    let text: String = whole.iter().map(|chunk| chunk["choices"][0]["text"].as_str().unwrap()).collect();
    assert!(!text.is_empty(), "what was running has been finished");
    assert_eq!(server.post("/models/unload", &json!({})).ok()["model"]["status"]["value"], "unloaded");
    assert_eq!(server.post("/models/unload", &json!({"model": "m"})).status, 200);
    assert_eq!(server.post("/models/load", &json!({"model": "m"})).ok()["model"]["status"]["value"], "loaded");
    assert_eq!(made.load(Ordering::SeqCst), 3);
    assert_eq!(server.post("/models/load", &json!({"model": "other"})).error().0, 404);
    assert_eq!(server.post("/models/load", &json!([])).error().0, 400);
}
