//! Who may ask, and how much: keys, origins of browsers' requests, sizes and times.
//!
//! What a request asks of a model is checked where it is understood; here nobody reads more of it than its head and its length.

use std::{
    fmt, io,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};

use axum::{
    body::{Body, BodyDataStream, HttpBody},
    extract::{Request, State},
    http::{HeaderMap, HeaderName, HeaderValue, Method, StatusCode, header, uri::Authority},
    middleware::Next,
    response::{IntoResponse, Response},
};
use bytes::Bytes;
use hyper::body::Frame;
use serde_json::json;
use sha2::{Digest as _, Sha256};
use tokio::time::{self, Instant, Sleep};
use tokio_stream::StreamExt as _;
use tower_http::cors::{AllowHeaders, AllowOrigin, CorsLayer};

use super::{error::ApiError, observe};

/// Paths that need no key: whoever balances load has none, and a page asks its user for it.
const OPEN: [&str; 2] = ["/", "/health"];

/// Bytes and time for which a refused body is read on, so that its sender sees the answer instead of a broken connection.
const LINGER: (usize, Duration) = (256 << 20, Duration::from_secs(5));

/// Who may ask, and how much.
#[derive(Debug, Clone)]
pub struct Access {
    /// whoever has one of these may ask; everybody if there is none
    pub keys: Vec<Key>,
    /// pages of these origins may ask, as `https://host:port`; `*` stands for all
    pub origins: Vec<String>,
    /// bytes of a body at most
    pub max_body: usize,
    /// how long a head may take to come, and a body
    pub read_timeout: Duration,
    /// how long an answer may take, from the whole request to its last byte
    pub timeout: Option<Duration>,
    /// connections at most
    pub connections: usize,
    /// whether the log has what was asked
    pub log_prompts: bool,
}

impl Default for Access {
    fn default() -> Self {
        Self {
            keys: Vec::new(),
            origins: Vec::new(),
            max_body: 32 << 20,
            read_timeout: Duration::from_secs(30),
            timeout: None,
            connections: 4096,
            log_prompts: false,
        }
    }
}

/// A secret that lets its holder ask. Only its digest is kept.
#[derive(Clone, PartialEq, Eq)]
pub struct Key([u8; 32]);

impl Key {
    /// The key with this secret.
    pub fn new(secret: &str) -> Self {
        Self(Sha256::digest(secret).into())
    }

    /// Takes the same time whatever differs.
    fn is(&self, other: &Self) -> bool {
        let difference = self.0.iter().zip(&other.0).fold(0, |difference, (a, b)| difference | (a ^ b));
        std::hint::black_box(difference) == 0
    }
}

impl fmt::Debug for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Key(..)")
    }
}

/// What [`admit`] goes by.
#[derive(Debug)]
pub(super) struct Gate {
    pub(super) access: Access,
    /// only this machine can connect
    pub(super) local: bool,
}

impl Gate {
    /// Tells browsers whose pages may ask.
    pub(super) fn cors(&self) -> Option<CorsLayer> {
        let origins = &self.access.origins;
        if origins.is_empty() {
            return None;
        }
        let allowed = if origins.iter().any(|origin| origin == "*") {
            AllowOrigin::any()
        } else {
            AllowOrigin::list(origins.iter().filter_map(|origin| HeaderValue::from_str(origin).ok()))
        };
        let methods = [Method::GET, Method::POST];
        Some(
            CorsLayer::new()
                .allow_origin(allowed)
                .allow_methods(methods)
                // A star would leave out `Authorization`.
                .allow_headers(AllowHeaders::mirror_request())
                .expose_headers([observe::REQUEST_ID]),
        )
    }

    /// Refuses what a page elsewhere makes a browser ask, and, where only this machine can connect, what it asks under a name that was made
    /// to point here.
    fn origin(&self, headers: &HeaderMap) -> Result<(), ApiError> {
        let text = |name: HeaderName| headers.get(name).and_then(|value| value.to_str().ok());
        let host = text(header::HOST);
        let listed = |origin: &str| self.access.origins.iter().any(|allowed| allowed == "*" || allowed.eq_ignore_ascii_case(origin));
        let refused = |message: String| Err(ApiError::new(StatusCode::FORBIDDEN, message));
        if let Some(origin) = headers.get(header::ORIGIN) {
            let origin = origin.to_str().unwrap_or_default();
            let own = origin.split_once("://").is_some_and(|(_, place)| host.is_some_and(|host| host.eq_ignore_ascii_case(place)));
            if !own && !listed(origin) {
                return refused(format!("pages of {origin:?} may not ask this server; `--cors-origin` lets them"));
            }
        }
        let ours = |host: &str| is_here(host) || ["http", "https"].iter().any(|scheme| listed(&format!("{scheme}://{host}")));
        match host {
            Some(host) if self.local && self.access.keys.is_empty() && !ours(host) => {
                refused(format!("this server is not {host:?}; `--cors-origin https://{host}` says that it is, and so does any `--api-key`"))
            }
            _ => Ok(()),
        }
    }

    fn key(&self, headers: &HeaderMap) -> Result<(), ApiError> {
        if self.access.keys.is_empty() {
            return Ok(());
        }
        let bearer = |value: &str| {
            value.split_once(' ').filter(|(scheme, _)| scheme.eq_ignore_ascii_case("bearer")).map(|(_, key)| key.trim().to_owned())
        };
        let text = |name: &str| headers.get(name).and_then(|value| value.to_str().ok());
        let given = text("authorization").and_then(bearer).or_else(|| text("x-api-key").map(str::to_owned));
        let refused = |message: &str| Err(ApiError::new(StatusCode::UNAUTHORIZED, message).code("invalid_api_key"));
        let Some(given) = given else { return refused("this server wants a key: `Authorization: Bearer KEY`") };
        let given = Key::new(&given);
        // All of them are looked at, so that time tells nothing of which one it is.
        if self.access.keys.iter().fold(false, |found, key| key.is(&given) | found) {
            Ok(())
        } else {
            refused("the key is not one of this server's")
        }
    }
}

/// Whether a Host header means this machine, for certain: numbers cannot be made to point elsewhere, names can.
fn is_here(host: &str) -> bool {
    let Ok(authority) = host.parse::<Authority>() else { return false };
    let name = authority.host().to_ascii_lowercase();
    let number = name.trim_start_matches('[').trim_end_matches(']');
    name == "localhost" || name.ends_with(".localhost") || number.parse::<std::net::IpAddr>().is_ok()
}

/// Lets a request through, all of it read, or says why not.
pub(super) async fn admit(State(gate): State<Arc<Gate>>, request: Request, next: Next) -> Response {
    match admitted(&gate, request, next).await {
        Ok(response) => response,
        Err(error) => error.into_response(),
    }
}

async fn admitted(gate: &Gate, request: Request, next: Next) -> Result<Response, ApiError> {
    gate.origin(request.headers())?;
    if !OPEN.contains(&request.uri().path()) {
        gate.key(request.headers())?;
    }
    let (parts, body) = request.into_parts();
    let body = whole(body, gate.access.max_body, gate.access.read_timeout).await?;
    if gate.access.log_prompts
        && let Some(account) = parts.extensions.get::<Arc<observe::Account>>()
    {
        account.asked(&body);
    }
    let request = Request::from_parts(parts, body.into());
    let Some(limit) = gate.access.timeout else { return Ok(next.run(request).await) };
    let deadline = Instant::now() + limit;
    let response = time::timeout_at(deadline, next.run(request)).await.map_err(|_| late(limit))?;
    let last = last_words(&response, limit);
    Ok(response.map(|body| Body::new(Bounded { body, deadline: Box::pin(time::sleep_until(deadline)), last })))
}

/// Reads a body, up to a limit and for so long.
async fn whole(body: Body, limit: usize, patience: Duration) -> Result<Bytes, ApiError> {
    let large = || ApiError::new(StatusCode::PAYLOAD_TOO_LARGE, format!("the body has more than {limit} bytes (`--max-body`)"));
    let expected = body.size_hint().lower();
    let mut frames = body.into_data_stream();
    if expected > limit as u64 {
        tokio::spawn(linger(frames));
        return Err(large());
    }
    let mut read = Vec::with_capacity((expected as usize).min(1 << 16));
    let reading = async {
        while let Some(frame) = frames.next().await {
            let frame = frame.map_err(|error| ApiError::new(StatusCode::BAD_REQUEST, format!("the body did not come whole: {error}")))?;
            if read.len() + frame.len() > limit {
                return Err(large());
            }
            read.extend_from_slice(&frame);
        }
        Ok(())
    };
    let slow = |_| {
        ApiError::new(
            StatusCode::REQUEST_TIMEOUT,
            format!("the body took more than {} s to come (`--read-timeout`)", patience.as_secs_f32()),
        )
    };
    let result = time::timeout(patience, reading).await.map_err(slow).flatten();
    match result {
        Ok(()) => Ok(read.into()),
        Err(error) => {
            tokio::spawn(linger(frames));
            Err(error)
        }
    }
}

/// Reads on and forgets.
async fn linger(mut frames: BodyDataStream) {
    let (mut left, patience) = LINGER;
    let reading = async {
        while let Some(Ok(frame)) = frames.next().await {
            left = left.saturating_sub(frame.len());
            if left == 0 {
                return;
            }
        }
    };
    let _ = time::timeout(patience, reading).await;
}

fn late(limit: Duration) -> ApiError {
    ApiError::new(StatusCode::GATEWAY_TIMEOUT, format!("the answer took more than {} s (`--timeout`)", limit.as_secs_f32())).code("timeout")
}

/// How an answer that is told line by line says that it is too late; others just break off.
fn last_words(response: &Response, limit: Duration) -> Option<Bytes> {
    let kind = response.headers().get(header::CONTENT_TYPE)?.to_str().ok()?;
    let error = late(limit);
    match kind.split(';').next()? {
        "text/event-stream" => Some(format!("data: {}\n\n", error.object()).into()),
        "application/x-ndjson" => Some(format!("{}\n", json!({"error": error.message})).into()),
        _ => None,
    }
}

/// An answer that must end in time.
struct Bounded {
    body: Body,
    deadline: Pin<Box<Sleep>>,
    last: Option<Bytes>,
}

impl HttpBody for Bounded {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        if self.deadline.as_mut().poll(cx).is_pending() {
            return Pin::new(&mut self.body).poll_frame(cx);
        }
        // What is dropped is cancelled.
        if self.body.is_end_stream() {
            return Poll::Ready(None);
        }
        self.body = Body::empty();
        Poll::Ready(Some(self.last.take().map(Frame::data).ok_or_else(|| axum::Error::new(io::Error::from(io::ErrorKind::TimedOut)))))
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> hyper::body::SizeHint {
        self.body.size_hint()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn headers(pairs: &[(&str, &str)]) -> HeaderMap {
        pairs.iter().map(|(name, value)| (name.parse::<HeaderName>().unwrap(), HeaderValue::from_str(value).unwrap())).collect()
    }

    #[test]
    fn only_numbers_and_localhost_are_this_machine_for_certain() {
        for host in ["localhost", "LOCALHOST:8080", "a.localhost:1", "127.0.0.1:8080", "[::1]:8080", "192.168.0.7"] {
            assert!(is_here(host), "{host}");
        }
        for host in ["evil.example", "localhost.evil.example:8080", "127.0.0.1.evil.example", "", "a b"] {
            assert!(!is_here(host), "{host}");
        }
    }

    #[test]
    fn pages_from_elsewhere_are_refused_unless_listed() {
        let gate = |origins: &[&str], local| Gate {
            access: Access { origins: origins.iter().map(|&origin| origin.into()).collect(), ..Access::default() },
            local,
        };
        let asks = |gate: &Gate, host: &str, origin: &str| gate.origin(&headers(&[("host", host), ("origin", origin)])).is_ok();
        let here = "127.0.0.1:8080";
        for local in [true, false] {
            assert!(asks(&gate(&[], local), here, "http://127.0.0.1:8080"), "its own page");
            for origin in ["http://127.0.0.1:3000", "https://evil.example", "null", ""] {
                assert!(!asks(&gate(&[], local), here, origin), "{origin}");
            }
            assert!(asks(&gate(&["https://Good.example"], local), here, "https://good.example"));
            assert!(!asks(&gate(&["https://good.example"], local), here, "https://good.example.evil.example"));
            assert!(asks(&gate(&["*"], local), here, "https://any.example"));
        }
        let rebound = headers(&[("host", "evil.example")]);
        assert!(gate(&[], true).origin(&rebound).is_err());
        assert!(gate(&["https://evil.example"], true).origin(&rebound).is_ok(), "a proxy's name");
        assert!(gate(&[], false).origin(&rebound).is_ok(), "other machines know it by any name");
        assert!(gate(&[], true).origin(&HeaderMap::new()).is_ok(), "HTTP/1.0 has no Host");
        let keyed = Gate { access: Access { keys: vec![Key::new("k")], ..Access::default() }, local: true };
        assert!(keyed.origin(&rebound).is_ok(), "no page elsewhere has the key");
    }

    #[test]
    fn any_of_the_keys_opens_and_none_is_shown() {
        let gate = Gate { access: Access { keys: vec![Key::new("one"), Key::new("two")], ..Access::default() }, local: true };
        for (name, value) in [("authorization", "Bearer one"), ("authorization", "bearer  two"), ("x-api-key", "one")] {
            gate.key(&headers(&[(name, value)])).unwrap();
        }
        for (name, value) in
            [("authorization", "Bearer"), ("authorization", "Basic one"), ("authorization", "Bearer on"), ("x-api-key", "")]
        {
            assert_eq!(gate.key(&headers(&[(name, value)])).unwrap_err().status, StatusCode::UNAUTHORIZED, "{value}");
        }
        assert_eq!(format!("{:?}", gate.access.keys), "[Key(..), Key(..)]");
    }
}
