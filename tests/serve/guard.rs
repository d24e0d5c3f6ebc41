//! Who is let in, and how much they may ask for.

use std::{
    io::{Read as _, Write as _},
    net::Shutdown,
    time::{Duration, Instant},
};

use serde_json::json;
use upcycle::{
    engine::Options,
    serve::{Access, Key},
};

use super::{Answer, Running, connect, finish, send, send_with};

impl Running {
    fn get_with(&self, path: &str, headers: &[(&str, &str)]) -> Answer {
        finish(send_with(self.address, "GET", path, headers, b""))
    }
}

fn guarded(access: Access) -> Running {
    Running::guarded(access, Options { parallel: 1, ..Options::default() })
}

/// Half a minute of work.
fn long() -> serde_json::Value {
    json!({"prompt": "Problem:", "n": 60, "max_tokens": 500, "logit_bias": {"0": -100}})
}

#[test]
fn a_key_opens_everything_and_health_needs_none() {
    let server = guarded(Access { keys: vec![Key::new("one"), Key::new("two")], ..Access::default() });
    assert_eq!(server.get("/health").status, 200);
    for path in ["/v1/models", "/metrics", "/props", "/nothing"] {
        let refused = server.get(path);
        assert_eq!((refused.status, refused.json()["error"]["code"].as_str()), (401, Some("invalid_api_key")), "{path}");
        assert!(refused.headers.contains("www-authenticate: bearer"), "{}", refused.headers);
    }
    assert_eq!(server.complete(&json!({})).status, 401);
    assert_eq!(server.get_with("/v1/models", &[("Authorization", "Bearer three")]).status, 401);
    for header in [("Authorization", "Bearer one"), ("Authorization", "bearer two"), ("x-api-key", "one")] {
        assert_eq!(server.get_with("/v1/models", &[header]).status, 200, "{header:?}");
    }
}

#[test]
fn pages_from_elsewhere_may_not_ask_unless_listed() {
    let server = guarded(Access::default());
    let host = server.address.to_string();
    let own = format!("http://{host}");
    let ask = |origin: &str| server.get_with("/v1/models", &[("Host", &host), ("Origin", origin)]);
    assert_eq!(ask(&own).status, 200);
    let refused = ask("https://evil.example");
    assert_eq!(refused.error(), (403, None, "pages of \"https://evil.example\" may not ask this server; `--cors-origin` lets them".into()));
    assert!(!refused.headers.contains("access-control"), "{}", refused.headers);
    assert_eq!(server.get_with("/v1/models", &[("Host", "evil.example:80")]).error().0, 403);

    let server = guarded(Access { origins: vec!["https://good.example".into()], keys: vec![Key::new("k")], ..Access::default() });
    let preflight = |origin: &str| {
        let wanted = [("Origin", origin), ("Access-Control-Request-Method", "POST"), ("Access-Control-Request-Headers", "authorization")];
        finish(send_with(server.address, "OPTIONS", "/v1/completions", &wanted, b""))
    };
    let allowed = preflight("https://good.example");
    assert_eq!(allowed.status, 200);
    for header in ["access-control-allow-origin: https://good.example", "access-control-allow-headers: authorization"] {
        assert!(allowed.headers.contains(header), "{}", allowed.headers);
    }
    assert!(!preflight("https://evil.example").headers.contains("access-control-allow-origin"));
    let refused = server.get_with("/v1/models", &[("Origin", "https://good.example")]);
    assert_eq!(refused.status, 401);
    assert!(refused.headers.contains("access-control-allow-origin: https://good.example"), "a page can read why: {}", refused.headers);
}

#[test]
fn a_body_over_the_limit_is_refused_and_its_sender_told() {
    let server = guarded(Access { max_body: 1000, ..Access::default() });
    assert_eq!(server.complete(&json!({})).status, 200);
    let large = finish(send(server.address, "POST", "/v1/completions", &vec![b' '; 20 << 20]));
    assert_eq!(large.error(), (413, None, "the body has more than 1000 bytes (`--max-body`)".into()));
    let mut chunked = connect(server.address);
    chunked
        .write_all(b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nTransfer-Encoding: chunked\r\n\r\n")
        .unwrap();
    for _ in 0..3 {
        chunked.write_all(format!("1f4\r\n{}\r\n", " ".repeat(500)).as_bytes()).unwrap();
    }
    chunked.write_all(b"0\r\n\r\n").unwrap();
    let mut answer = String::new();
    chunked.read_to_string(&mut answer).unwrap();
    assert!(answer.starts_with("HTTP/1.1 413 "), "{answer}");
}

#[test]
fn who_dawdles_is_cut_off() {
    let server = guarded(Access { read_timeout: Duration::from_secs(1), ..Access::default() });
    for head in ["", "GET /health HT", "GET /health HTTP/1.1\r\nHost: localhost\r\n"] {
        let (start, mut slow) = (Instant::now(), connect(server.address));
        slow.write_all(head.as_bytes()).unwrap();
        let mut answer = String::new();
        let _ = slow.read_to_string(&mut answer);
        assert!(start.elapsed() < Duration::from_secs(10), "{head:?} held its connection for {:?}", start.elapsed());
    }
    let mut slow = connect(server.address);
    slow.write_all(b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 10\r\n\r\n{").unwrap();
    let mut answer = [0; 12];
    slow.read_exact(&mut answer).unwrap();
    assert_eq!(&answer, b"HTTP/1.1 408");
    assert_eq!(server.get("/health").status, 200);
}

#[test]
fn an_answer_that_takes_too_long_ends_with_an_error() {
    let server = guarded(Access { timeout: Some(Duration::from_secs(2)), ..Access::default() });
    let mut request = long();
    let late = server.post("/v1/completions", &request);
    assert_eq!(late.error(), (504, None, "the answer took more than 2 s (`--timeout`)".into()));
    request["stream"] = true.into();
    let late = server.post("/v1/completions", &request);
    assert_eq!(late.status, 200);
    let last = late.body.trim_end().rsplit("\n\n").next().unwrap();
    let last: serde_json::Value = serde_json::from_str(last.strip_prefix("data: ").unwrap()).unwrap();
    assert_eq!(last["error"]["code"], "timeout");
    let start = Instant::now();
    assert_eq!(server.complete(&json!({"max_tokens": 1})).status, 200, "the place is free again");
    assert!(start.elapsed() < Duration::from_secs(10));
}

#[test]
fn connections_beyond_the_limit_are_turned_away() {
    let server = guarded(Access { connections: 2, ..Access::default() });
    let held = [connect(server.address), connect(server.address)];
    // They are taken in the order in which they came.
    let refused = server.get("/health");
    assert_eq!(refused.error(), (503, None, "the server has too many connections".into()));
    assert!(refused.headers.contains("retry-after: 1"), "{}", refused.headers);
    for connection in held {
        connection.shutdown(Shutdown::Both).unwrap();
    }
    let start = Instant::now();
    while server.get("/health").status != 200 {
        assert!(start.elapsed() < Duration::from_secs(10), "the places stay taken");
        std::thread::sleep(Duration::from_millis(20));
    }
}
