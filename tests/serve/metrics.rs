//! What is counted, and what a server says of itself.

use std::time::{Duration, Instant};

use serde_json::json;
use upcycle::engine::Options;

use super::{Running, finish, send, send_with};

impl Running {
    /// The value of a sample in `/metrics`.
    fn metric(&self, sample: &str) -> f64 {
        let page = self.get("/metrics");
        assert_eq!(page.status, 200);
        let value = page.body.lines().find_map(|line| line.strip_prefix(sample)?.strip_prefix(' ')).map(|value| value.parse().unwrap());
        value.unwrap_or_default()
    }
}

/// Waits for a figure: an answer can be read before what it cost is counted.
fn until(server: &Running, sample: &str, expected: f64) {
    let start = Instant::now();
    while (server.metric(sample) - expected).abs() > f64::EPSILON {
        assert!(start.elapsed() < Duration::from_secs(20), "{sample} is {}, not {expected}", server.metric(sample));
        std::thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn requests_and_tokens_are_counted() {
    let server = Running::start(Options::default());
    let usage = server.complete(&json!({})).ok()["usage"].clone();
    server.chat(&json!({"stream": true})).chunks();
    server.complete(&json!({"temperature": -1}));
    server.get("/health");
    server.get("/no/such/place");
    for (sample, expected) in [
        ("upcycle_requests_total{route=\"/v1/completions\",status=\"200\"}", 1.0),
        ("upcycle_requests_total{route=\"/v1/completions\",status=\"400\"}", 1.0),
        ("upcycle_requests_total{route=\"other\",status=\"404\"}", 1.0),
        ("upcycle_request_duration_seconds_count{route=\"/v1/chat/completions\",status=\"200\"}", 1.0),
        ("upcycle_generated_tokens_total{model=\"math\"}", 24.0),
        ("upcycle_texts_total{model=\"math\",end=\"length\"}", 2.0),
        ("upcycle_time_to_first_token_seconds_count{model=\"math\"}", 2.0),
        ("upcycle_requests_running{model=\"math\"}", 0.0),
        ("upcycle_requests_waiting{model=\"math\"}", 0.0),
        ("upcycle_requests_parallel{model=\"math\"}", 8.0),
    ] {
        until(&server, sample, expected);
    }
    assert!(server.metric("upcycle_prompt_tokens_total{model=\"math\"}") > usage["prompt_tokens"].as_f64().unwrap());
    assert!(server.metric("upcycle_inter_token_seconds_count{model=\"math\"}") > 10.0);
    assert!(server.metric("upcycle_cache_bytes{model=\"math\"}") > 0.0, "finished texts stay for those that begin alike");
}

#[test]
fn what_runs_and_what_nobody_waits_for_show() {
    let server = Running::start(Options { parallel: 2, ..Options::default() });
    let body = json!({"prompt": "Problem:", "n": 5, "max_tokens": 500, "logit_bias": {"0": -100}}).to_string();
    let asking = send(server.address, "POST", "/v1/completions", body.as_bytes());
    let until = |sample: &str, expected: f64| until(&server, sample, expected);
    until("upcycle_requests_running{model=\"math\"}", 2.0);
    until("upcycle_requests_waiting{model=\"math\"}", 3.0);
    drop(asking);
    until("upcycle_requests_running{model=\"math\"}", 0.0);
    until("upcycle_texts_total{model=\"math\",end=\"abandoned\"}", 5.0);
    until("upcycle_requests_total{route=\"/v1/completions\",status=\"499\"}", 1.0);
}

#[test]
fn requests_have_an_identity() {
    let server = Running::start(Options::default());
    let id = |headers: &[(&str, &str)]| {
        let answer = finish(send_with(server.address, "GET", "/health", headers, b""));
        answer.headers.lines().find_map(|line| line.strip_prefix("x-request-id: ")).unwrap().to_owned()
    };
    assert_eq!(id(&[("X-Request-Id", "mine-1")]), "mine-1");
    let (a, b) = (id(&[]), id(&[("X-Request-Id", &"x".repeat(200))]));
    assert!(a.starts_with("req-") && b.starts_with("req-") && a != b, "{a} {b}");
}

#[test]
fn a_server_says_what_it_is() {
    let server = Running::start(Options { parallel: 3, ..Options::default() });
    assert_eq!(server.get("/version").ok(), json!({"version": env!("CARGO_PKG_VERSION")}));
    let props = server.get("/props?model=math").ok();
    assert_eq!((&props["model_alias"], &props["total_slots"]), (&json!("math"), &json!(3)));
    assert_eq!(props["default_generation_settings"]["n_ctx"], 512);
    assert!(props["chat_template"].as_str().unwrap().contains("messages"));
    assert_eq!(server.get("/props?model=other").error().0, 404);
}
