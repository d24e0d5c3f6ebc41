//! What becomes of each request: its identity, its line in the log, its place in the metrics, and the texts that are written for it.

use std::{
    pin::Pin,
    sync::{Arc, Mutex},
    task::{Context, Poll, ready},
    time::{Duration, Instant},
};

use axum::{
    body::{Body, HttpBody},
    extract::{MatchedPath, Request, State},
    http::{HeaderName, HeaderValue},
    middleware::Next,
    response::Response,
};
use bytes::Bytes;
use hyper::body::{Frame, SizeHint};
use tokio::sync::mpsc::UnboundedReceiver;
use tokio_stream::Stream;

use super::{
    Server,
    metrics::{Generation, lock},
    registry::Model,
};
use crate::engine::{Event, Finish};

/// The header with a request's identity, the client's or ours.
pub(super) const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");

/// The status that stands for a client that left before there was one.
const LEFT: u16 = 499;

/// What a request used, as far as it is known.
#[derive(Debug)]
pub(super) struct Account {
    id: String,
    used: Mutex<Used>,
}

#[derive(Debug, Default)]
struct Used {
    model: Option<String>,
    asked: Option<String>,
    prompt_tokens: usize,
    cached_tokens: usize,
    completion_tokens: usize,
    first_token: Option<Duration>,
}

impl Account {
    /// Keeps a body for the log.
    pub(super) fn asked(&self, body: &[u8]) {
        lock(&self.used).asked = Some(String::from_utf8_lossy(body).into_owned());
    }

    fn finished(&self, finish: &Finish) {
        let mut used = lock(&self.used);
        used.prompt_tokens += finish.prompt_tokens;
        used.cached_tokens += finish.cached_tokens;
        used.completion_tokens += finish.completion_tokens;
    }
}

/// Gives a request an identity, and tells of it when its answer has ended or its client has left.
pub(super) async fn observe(State(server): State<Arc<Server>>, mut request: Request, next: Next) -> Response {
    let good = |id: &&str| (1..=128).contains(&id.len()) && id.bytes().all(|byte| byte.is_ascii_graphic());
    let given = request.headers().get(REQUEST_ID).and_then(|id| id.to_str().ok()).filter(good);
    let id = given.map_or_else(|| format!("req-{:016x}", rand::random::<u64>()), str::to_owned);
    let account = Arc::new(Account { id, used: Mutex::default() });
    request.extensions_mut().insert(account.clone());
    let mut record = Record {
        server,
        account: account.clone(),
        started: Instant::now(),
        method: request.method().to_string(),
        path: request.uri().path().to_owned(),
        route: request.extensions().get::<MatchedPath>().map_or_else(|| "other".into(), |path| path.as_str().to_owned()),
        status: LEFT,
    };
    let mut response = next.run(request).await;
    record.status = response.status().as_u16();
    if let Ok(id) = HeaderValue::from_str(&account.id) {
        response.headers_mut().insert(REQUEST_ID, id);
    }
    response.map(|body| Body::new(Told { body, whole: false, record }))
}

/// Tells of a request when it is dropped.
struct Record {
    server: Arc<Server>,
    account: Arc<Account>,
    started: Instant,
    method: String,
    path: String,
    route: String,
    status: u16,
}

impl Drop for Record {
    fn drop(&mut self) {
        let took = self.started.elapsed();
        self.server.metrics.answered(&self.route, self.status, took);
        // Whoever looks after the server asks for these all the time.
        if self.status < 400 && matches!(self.route.as_str(), "/health" | "/metrics") {
            return;
        }
        let Self { account, method, path, status, .. } = self;
        let used = lock(&account.used);
        let tokens = |count: usize| used.model.is_some().then_some(count);
        tracing::info!(
            id = account.id,
            method,
            path,
            status,
            seconds = took.as_secs_f64(),
            model = used.model,
            prompt_tokens = tokens(used.prompt_tokens),
            cached_tokens = tokens(used.cached_tokens),
            completion_tokens = tokens(used.completion_tokens),
            first_token_seconds = used.first_token.map(|after| after.as_secs_f64()),
            body = used.asked,
            "request"
        );
    }
}

/// An answer whose end is told.
struct Told {
    body: Body,
    whole: bool,
    record: Record,
}

impl HttpBody for Told {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        let frame = ready!(Pin::new(&mut self.body).poll_frame(cx));
        self.whole = frame.is_none() || self.body.is_end_stream();
        Poll::Ready(frame)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

impl Drop for Told {
    fn drop(&mut self) {
        if !self.whole && !self.body.is_end_stream() {
            self.record.status = LEFT;
        }
    }
}

/// A text as it comes from an engine, counted on its way. Dropping it cancels the rest.
#[derive(Debug)]
pub(super) struct Events {
    receiver: UnboundedReceiver<Event>,
    account: Arc<Account>,
    counts: Arc<Mutex<Generation>>,
    /// stays in memory as long as it writes
    #[expect(dead_code, reason = "kept by being held")]
    model: Arc<Model>,
    /// when it was asked for, then when its last piece came
    since: Instant,
    begun: bool,
    ended: bool,
}

impl Events {
    pub(super) fn new(
        receiver: UnboundedReceiver<Event>,
        model: Arc<Model>,
        counts: Arc<Mutex<Generation>>,
        account: Arc<Account>,
    ) -> Self {
        lock(&account.used).model.get_or_insert_with(|| model.name.clone());
        Self { receiver, account, counts, model, since: Instant::now(), begun: false, ended: false }
    }

    fn count(&mut self, event: &Event) {
        let mut counts = lock(&self.counts);
        match event {
            Event::Text(_) => {
                let after = std::mem::replace(&mut self.since, Instant::now()).elapsed();
                if std::mem::replace(&mut self.begun, true) {
                    counts.next_token(after);
                } else {
                    counts.first_token(after);
                    lock(&self.account.used).first_token.get_or_insert(after);
                }
            }
            Event::Tokens(_) => {}
            Event::Done(finish) => {
                self.ended = true;
                counts.finished(finish);
                self.account.finished(finish);
            }
            Event::Failed(_) => {
                self.ended = true;
                counts.failed();
            }
        }
    }
}

impl Stream for Events {
    type Item = Event;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Event>> {
        let event = ready!(self.receiver.poll_recv(cx));
        event.iter().for_each(|event| self.count(event));
        Poll::Ready(event)
    }
}

impl Drop for Events {
    fn drop(&mut self) {
        if !self.ended {
            lock(&self.counts).abandoned();
        }
    }
}
