//! What is counted, and its text in Prometheus' format.

use std::{
    collections::BTreeMap,
    fmt::{Display, Write as _},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use axum::{
    extract::State,
    http::header,
    response::{IntoResponse, Response},
};

use super::{Server, registry::Model};
use crate::engine::{Experts, Finish, FinishReason, Load};

/// Upper ends of the buckets of every histogram, in seconds.
const BOUNDS: [f64; 18] = [0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0];

/// Counts since the start.
#[derive(Debug, Default)]
pub(super) struct Metrics {
    /// by route and status
    requests: Mutex<BTreeMap<(String, u16), Histogram>>,
    /// by the model's name
    models: Mutex<BTreeMap<String, Arc<Mutex<Generation>>>>,
}

/// What one model has written.
#[derive(Debug, Default)]
pub(super) struct Generation {
    prompt_tokens: u64,
    cached_tokens: u64,
    completion_tokens: u64,
    /// texts that the model or a stop string ended, that a limit ended, that nobody waited for, that failed
    ends: [u64; 4],
    first_token: Histogram,
    between_tokens: Histogram,
    prefill: f64,
    decode: f64,
}

/// How a text ended, in the order in which ends are counted.
const ENDS: [&str; 4] = ["stop", "length", "abandoned", "error"];

impl Generation {
    pub(super) fn first_token(&mut self, after: Duration) {
        self.first_token.add(after);
    }

    pub(super) fn next_token(&mut self, after: Duration) {
        self.between_tokens.add(after);
    }

    pub(super) fn finished(&mut self, finish: &Finish) {
        self.prompt_tokens += finish.prompt_tokens as u64;
        self.cached_tokens += finish.cached_tokens as u64;
        self.completion_tokens += finish.completion_tokens as u64;
        self.prefill += finish.prefill.as_secs_f64();
        self.decode += finish.decode.as_secs_f64();
        self.ends[usize::from(finish.reason != FinishReason::Stop)] += 1;
    }

    pub(super) fn abandoned(&mut self) {
        self.ends[2] += 1;
    }

    pub(super) fn failed(&mut self) {
        self.ends[3] += 1;
    }
}

/// Durations in buckets, each with those of the ones before it left out.
#[derive(Debug, Default)]
struct Histogram {
    counts: [u64; BOUNDS.len() + 1],
    sum: f64,
}

impl Histogram {
    fn add(&mut self, duration: Duration) {
        let seconds = duration.as_secs_f64();
        self.counts[BOUNDS.partition_point(|bound| *bound < seconds)] += 1;
        self.sum += seconds;
    }
}

impl Metrics {
    /// A request that was answered, or left by its client.
    pub(super) fn answered(&self, route: &str, status: u16, took: Duration) {
        lock(&self.requests).entry((route.to_owned(), status)).or_default().add(took);
    }

    /// The counts of a model, for whoever writes with it.
    pub(super) fn model(&self, name: &str) -> Arc<Mutex<Generation>> {
        lock(&self.models).entry(name.to_owned()).or_default().clone()
    }
}

/// Counts are never left half changed.
pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// `GET /metrics`
pub(super) async fn metrics(State(server): State<Arc<Server>>) -> Response {
    ([(header::CONTENT_TYPE, "text/plain; version=0.0.4")], text(&server)).into_response()
}

fn text(server: &Server) -> String {
    let mut page = Page::default();
    page.family("upcycle_build_info", "gauge", "Always 1, for its labels.");
    page.sample("upcycle_build_info", &[("version", env!("CARGO_PKG_VERSION"))], 1);

    let requests = lock(&server.metrics.requests);
    page.family("upcycle_requests_total", "counter", "Requests that were answered; status 499: the client left.");
    for ((route, status), histogram) in requests.iter() {
        page.sample("upcycle_requests_total", &[("route", route), ("status", &status.to_string())], histogram.counts.iter().sum::<u64>());
    }
    page.family("upcycle_request_duration_seconds", "histogram", "From a request's head to the last byte of its answer.");
    for ((route, status), histogram) in requests.iter() {
        page.histogram("upcycle_request_duration_seconds", &[("route", route), ("status", &status.to_string())], histogram);
    }
    drop(requests);

    let models: Vec<(String, Arc<Mutex<Generation>>)> = lock(&server.metrics.models).clone().into_iter().collect();
    let counters: [(&str, &str, fn(&Generation) -> f64); 5] = [
        ("upcycle_prompt_tokens_total", "Tokens of prompts.", |m| m.prompt_tokens as f64),
        ("upcycle_cached_prompt_tokens_total", "Tokens of prompts that had been read for others.", |m| m.cached_tokens as f64),
        ("upcycle_generated_tokens_total", "Tokens that were written.", |m| m.completion_tokens as f64),
        ("upcycle_prefill_seconds_total", "Time from the first pass of texts to their first tokens.", |m| m.prefill),
        ("upcycle_decode_seconds_total", "Time from the first tokens of texts to their last.", |m| m.decode),
    ];
    for (name, help, value) in counters {
        page.family(name, "counter", help);
        models.iter().for_each(|(model, counts)| page.sample(name, &[("model", model)], value(&lock(counts))));
    }
    page.family("upcycle_texts_total", "counter", "Texts by how they ended.");
    for (model, counts) in &models {
        for (end, count) in ENDS.iter().zip(lock(counts).ends) {
            page.sample("upcycle_texts_total", &[("model", model), ("end", end)], count);
        }
    }
    let histograms: [(&str, &str, fn(&Generation) -> &Histogram); 2] = [
        ("upcycle_time_to_first_token_seconds", "From a request to the first text of its answer.", |m| &m.first_token),
        ("upcycle_inter_token_seconds", "From one piece of text to the next.", |m| &m.between_tokens),
    ];
    for (name, help, value) in histograms {
        page.family(name, "histogram", help);
        models.iter().for_each(|(model, counts)| page.histogram(name, &[("model", model)], value(&lock(counts))));
    }

    let models = server.registry.models();
    page.family("upcycle_model_loaded", "gauge", "Whether a model is in memory.");
    models.iter().for_each(|(name, model)| page.sample("upcycle_model_loaded", &[("model", name)], u8::from(model.is_some())));
    let loaded: Vec<(&str, Arc<Model>)> = models.into_iter().filter_map(|(name, model)| Some((name, model?))).collect();
    page.family("upcycle_expert_choices_total", "counter", "Times that an expert was chosen, in all layers, since its model was loaded.");
    for (name, model) in &loaded {
        for (expert, choices) in model.engine.experts().into_iter().flat_map(choices) {
            page.sample("upcycle_expert_choices_total", &[("model", name), ("expert", expert)], choices);
        }
    }
    let loads: Vec<(&str, Load)> = loaded.iter().map(|(name, model)| (*name, model.engine.load())).collect();
    let gauges: [(&str, &str, fn(&Load) -> usize); 5] = [
        ("upcycle_requests_running", "Texts that are being written.", |load| load.running),
        ("upcycle_requests_waiting", "Texts that wait for that.", |load| load.waiting),
        ("upcycle_requests_parallel", "Texts that may be written together.", |load| load.parallel),
        ("upcycle_cache_bytes", "Keys and values in memory.", |load| load.cache),
        ("upcycle_cache_limit_bytes", "Keys and values that may be in memory.", |load| load.cache_limit),
    ];
    for (name, help, value) in gauges {
        page.family(name, "gauge", help);
        loads.iter().for_each(|(model, load)| page.sample(name, &[("model", model)], value(load)));
    }
    page.0
}

/// How often each expert was chosen, in all layers.
fn choices(experts: &Experts) -> Vec<(&str, u64)> {
    let layers = experts.loads().layers;
    experts.names().iter().enumerate().map(|(e, name)| (name.as_str(), layers.iter().map(|layer| layer.choices[e]).sum())).collect()
}

/// Text in the making.
#[derive(Default)]
struct Page(String);

impl Page {
    fn family(&mut self, name: &str, kind: &str, help: &str) {
        let _ = writeln!(self.0, "# HELP {name} {help}\n# TYPE {name} {kind}");
    }

    fn sample(&mut self, name: &str, labels: &[(&str, &str)], value: impl Display) {
        let escaped = |value: &str| value.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n");
        let labels: Vec<String> = labels.iter().map(|(label, value)| format!("{label}=\"{}\"", escaped(value))).collect();
        let _ = writeln!(self.0, "{name}{{{}}} {value}", labels.join(","));
    }

    fn histogram(&mut self, name: &str, labels: &[(&str, &str)], histogram: &Histogram) {
        let mut below = 0;
        for (bound, count) in BOUNDS.iter().map(ToString::to_string).chain(["+Inf".into()]).zip(histogram.counts) {
            below += count;
            self.sample(&format!("{name}_bucket"), &[labels, &[("le", &bound)]].concat(), below);
        }
        self.sample(&format!("{name}_sum"), labels, histogram.sum);
        self.sample(&format!("{name}_count"), labels, below);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buckets_count_what_is_not_greater() {
        let mut histogram = Histogram::default();
        for seconds in [0.001, 0.0011, 0.5, 1000.0] {
            histogram.add(Duration::from_secs_f64(seconds));
        }
        let mut page = Page::default();
        page.histogram("h", &[("model", "a\"b")], &histogram);
        for line in [
            "h_bucket{model=\"a\\\"b\",le=\"0.001\"} 1",
            "h_bucket{model=\"a\\\"b\",le=\"0.0025\"} 2",
            "h_bucket{model=\"a\\\"b\",le=\"0.25\"} 2",
            "h_bucket{model=\"a\\\"b\",le=\"0.5\"} 3",
            "h_bucket{model=\"a\\\"b\",le=\"600\"} 3",
            "h_bucket{model=\"a\\\"b\",le=\"+Inf\"} 4",
            "h_count{model=\"a\\\"b\"} 4",
        ] {
            assert!(page.0.lines().any(|found| found == line), "{line} in {}", page.0);
        }
    }
}
