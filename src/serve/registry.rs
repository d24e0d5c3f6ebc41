//! The models of a process: loaded when they are asked for, given back when nobody does or when others need their place.
//!
//! Whoever holds a model's `Arc` uses it: its text is still being written, or is about to be asked for. Loading is done one model after the
//! other, so that a model asked for twice is loaded once, and two never need memory for both at a time when there may be one.

use std::{
    fmt,
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{Arc, Mutex, MutexGuard},
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use axum::http::StatusCode;
use serde_json::{Value, json};

use super::{error::ApiError, metrics::lock};
use crate::engine::Engine;

/// Opens a model anew; the error says what is wrong with it. It is called on a thread that may block.
pub type Loader = Box<dyn Fn() -> Result<Engine, String> + Send + Sync>;

/// A model that can be served.
pub struct Entry {
    /// what clients call it
    pub name: String,
    /// what the user calls it: a path, or a name on the Hub
    pub place: String,
    /// makes its engine
    pub load: Loader,
}

impl fmt::Debug for Entry {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}={}", self.name, self.place)
    }
}

/// When models are given back.
#[derive(Debug, Clone, Copy, Default)]
pub struct Residence {
    /// models in memory at most; any number if not given
    pub most: Option<usize>,
    /// how long one stays that nobody asks
    pub idle: Option<Duration>,
}

/// A model in memory.
#[derive(Debug)]
pub(super) struct Model {
    pub(super) name: String,
    pub(super) engine: Engine,
    pub(super) since: SystemTime,
}

/// All models, and where they are.
#[derive(Debug)]
pub(super) struct Registry {
    entries: Vec<Entry>,
    residence: Residence,
    state: Mutex<State>,
    /// held while a model is loaded
    loading: Mutex<()>,
}

#[derive(Debug)]
struct State {
    /// one per entry
    slots: Vec<Slot>,
    /// models that have been replaced and still write
    retired: Vec<Arc<Model>>,
    phase: Phase,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    /// the first model is not there yet
    Starting,
    Open,
    Closing,
}

#[derive(Debug)]
struct Slot {
    model: Option<Arc<Model>>,
    /// it is being loaded, in place of what is there, if anything is
    loading: bool,
    /// times that loading it ended, well or not
    attempts: u64,
    /// why the last time failed
    failure: Option<String>,
    used: Instant,
    /// how long it stays instead of the usual time
    keep: Option<Keep>,
}

/// How long a model stays that nobody asks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Keep {
    For(Duration),
    Always,
}

impl Slot {
    fn new() -> Self {
        Self { model: None, loading: false, attempts: 0, failure: None, used: Instant::now(), keep: None }
    }

    /// Nobody uses the model that is there.
    fn is_idle(&self) -> bool {
        self.model.as_ref().is_some_and(|model| Arc::strong_count(model) == 1)
    }

    fn status(&self) -> &'static str {
        match self {
            Self { loading: true, .. } => "loading",
            Self { model: Some(_), .. } => "loaded",
            Self { failure: Some(_), .. } => "failed",
            _ => "unloaded",
        }
    }
}

impl Registry {
    pub(super) fn new(entries: Vec<Entry>, residence: Residence) -> Self {
        let slots = entries.iter().map(|_| Slot::new()).collect();
        let state = State { slots, retired: Vec::new(), phase: Phase::Starting };
        Self { entries, residence, state: Mutex::new(state), loading: Mutex::default() }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        lock(&self.state)
    }

    /// Loads the first model, and lets requests in.
    pub(super) fn open(&self) -> Result<(), String> {
        if !self.entries.is_empty() {
            let _turn = lock(&self.loading);
            self.load(0).map_err(|error| error.message)?;
        }
        let mut state = self.state();
        if state.phase == Phase::Starting {
            state.phase = Phase::Open;
        }
        Ok(())
    }

    /// What the model is called that this name means.
    pub(super) fn name(&self, name: Option<&str>) -> Result<&str, ApiError> {
        Ok(&self.entries[self.find(name)?].name)
    }

    /// Whether requests are let in.
    pub(super) fn ready(&self) -> Result<(), ApiError> {
        match self.state().phase {
            Phase::Starting => Err(unavailable("the model is being loaded")),
            Phase::Open => Ok(()),
            Phase::Closing => Err(unavailable("the server is shutting down")),
        }
    }

    /// The model of this name, or the first one where there is no name. Loads it where it is not in memory: blocks.
    pub(super) fn get(&self, name: Option<&str>) -> Result<Arc<Model>, ApiError> {
        self.ready()?;
        let index = self.find(name)?;
        let attempts = self.state().slots[index].attempts;
        if let Some(model) = self.loaded(index) {
            return Ok(model);
        }
        let _turn = lock(&self.loading);
        // Somebody else may have loaded it, or failed to, while we waited for our turn.
        if let Some(model) = self.loaded(index) {
            return Ok(model);
        }
        match self.failure_after(index, attempts) {
            Some(failure) => Err(self.failed(index, &failure)),
            None => self.load(index),
        }
    }

    /// The model of this name, or the first one where there is no name, if it is in memory; it does not count as asked.
    pub(super) fn present(&self, name: Option<&str>) -> Result<Arc<Model>, ApiError> {
        let index = self.find(name)?;
        let absent = || {
            ApiError::new(StatusCode::NOT_FOUND, format!("the model `{}` is not in memory", self.entries[index].name))
                .code("model_not_loaded")
        };
        self.state().slots[index].model.clone().ok_or_else(absent)
    }

    /// Loads a model anew, also where it is in memory: what is being written is finished by the old one. If it cannot be loaded, the old one stays.
    pub(super) fn reload(&self, name: Option<&str>) -> Result<(), ApiError> {
        self.ready()?;
        let index = self.find(name)?;
        let _turn = lock(&self.loading);
        self.load(index).map(drop)
    }

    /// Gives a model back as soon as it has written what it was asked for.
    pub(super) fn unload(&self, name: Option<&str>) -> Result<(), ApiError> {
        let index = self.find(name)?;
        let _turn = lock(&self.loading);
        let mut state = self.state();
        let model = state.slots[index].model.take();
        state.retired.extend(model);
        drop(state);
        self.sweep();
        Ok(())
    }

    /// How long a model stays from now on when nobody asks it.
    pub(super) fn keep(&self, name: &str, keep: Keep) {
        let mut state = self.state();
        if let Some(index) = self.entries.iter().position(|entry| entry.name == name) {
            state.slots[index].keep = Some(keep);
        }
    }

    /// Gives back what nobody needs. To be called now and then.
    pub(super) fn sweep(&self) {
        let mut state = self.state();
        let mut gone = Vec::new();
        for slot in &mut state.slots {
            if !slot.is_idle() {
                slot.used = Instant::now();
            }
            let stays = match slot.keep {
                Some(Keep::For(time)) => Some(time),
                Some(Keep::Always) => None,
                None => self.residence.idle,
            };
            if stays.is_some_and(|time| slot.used.elapsed() >= time) && slot.is_idle() {
                tracing::info!(model = slot.model.as_ref().map(|model| &*model.name), "unloaded: nobody asked it");
                gone.extend(slot.model.take());
            }
        }
        gone.extend(state.retired.extract_if(.., |model| Arc::strong_count(model) == 1));
        // Memory takes its time to be given back; nobody else needs to wait for it.
        drop(state);
    }

    /// Lets no more requests in; what has been asked is finished.
    pub(super) fn drain(&self) {
        self.state().phase = Phase::Closing;
        self.engines(Engine::drain);
    }

    /// Ends what is still being written.
    pub(super) fn abort(&self) {
        self.engines(Engine::abort);
    }

    fn engines(&self, act: impl Fn(&Engine)) {
        let state = self.state();
        state.slots.iter().filter_map(|slot| slot.model.as_ref()).chain(&state.retired).for_each(|model| act(&model.engine));
    }

    /// The models by name, and those in memory.
    pub(super) fn models(&self) -> Vec<(&str, Option<Arc<Model>>)> {
        self.entries.iter().zip(&self.state().slots).map(|(entry, slot)| (entry.name.as_str(), slot.model.clone())).collect()
    }

    /// The models, as `/v1/models` shows them.
    pub(super) fn list(&self) -> Vec<Value> {
        let state = self.state();
        let object = |(entry, slot): (&Entry, &Slot)| {
            let model = slot.model.as_ref();
            let since = model.map_or(UNIX_EPOCH, |model| model.since).duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
            let mut status = json!({"value": slot.status()});
            if let Some(failure) = slot.failure.as_ref().filter(|_| slot.model.is_none()) {
                status["error"] = json!(failure);
            }
            json!({
                "id": entry.name, "object": "model", "created": since, "owned_by": "upcycle",
                "max_model_len": model.map(|model| model.engine.context()), "status": status,
            })
        };
        self.entries.iter().zip(&state.slots).map(object).collect()
    }

    fn find(&self, name: Option<&str>) -> Result<usize, ApiError> {
        let found = match name {
            Some(name) => self.entries.iter().position(|entry| entry.name == name),
            None => (!self.entries.is_empty()).then_some(0),
        };
        found.ok_or_else(|| {
            let names: Vec<String> = self.entries.iter().map(|entry| format!("`{}`", entry.name)).collect();
            let verb = if names.len() == 1 { "is" } else { "are" };
            let message = format!("the model `{}` is not served here; {} {verb}", name.unwrap_or_default(), names.join(", "));
            ApiError { param: Some("model".into()), ..ApiError::new(StatusCode::NOT_FOUND, message).code("model_not_found") }
        })
    }

    /// The model if it is in memory and at work.
    fn loaded(&self, index: usize) -> Option<Arc<Model>> {
        let slot = &mut self.state().slots[index];
        slot.used = Instant::now();
        slot.model.clone().filter(|model| model.engine.accepts())
    }

    /// Why a model cannot be loaded, if that was tried after so many attempts.
    fn failure_after(&self, index: usize, attempts: u64) -> Option<String> {
        let slot = &self.state().slots[index];
        slot.failure.clone().filter(|_| slot.attempts > attempts)
    }

    /// Loads a model, whatever is there. To be called with the turn to load.
    fn load(&self, index: usize) -> Result<Arc<Model>, ApiError> {
        let entry = &self.entries[index];
        drop(self.make_room(index)?);
        self.state().slots[index].loading = true;
        let started = Instant::now();
        let made = catch_unwind(AssertUnwindSafe(|| (entry.load)()))
            .unwrap_or_else(|_| Err("loading it went wrong; the log has the details".into()));
        let mut state = self.state();
        let closing = state.phase == Phase::Closing;
        let slot = &mut state.slots[index];
        (slot.loading, slot.used) = (false, Instant::now());
        slot.attempts += 1;
        match made {
            Ok(engine) => {
                tracing::info!(model = entry.name, seconds = started.elapsed().as_secs_f64(), "loaded");
                if closing {
                    engine.drain();
                }
                let model = Arc::new(Model { name: entry.name.clone(), engine, since: SystemTime::now() });
                (slot.failure, slot.keep) = (None, None);
                let old = slot.model.replace(model.clone());
                state.retired.extend(old);
                Ok(model)
            }
            Err(failure) => {
                tracing::error!(model = entry.name, "cannot be loaded: {failure}");
                let error = self.failed(index, &failure);
                slot.failure = Some(failure);
                Err(error)
            }
        }
    }

    /// Takes models out that nobody uses, the longest unasked first, until there is room for one more.
    fn make_room(&self, index: usize) -> Result<Vec<Arc<Model>>, ApiError> {
        let mut gone = Vec::new();
        let Some(most) = self.residence.most else { return Ok(gone) };
        let mut state = self.state();
        gone.extend(state.retired.extract_if(.., |model| Arc::strong_count(model) == 1));
        // What takes a model's own place needs no other.
        let taken = |state: &State| {
            let others = state.slots.iter().enumerate().filter(|(i, slot)| *i != index && slot.model.is_some());
            others.count() + state.retired.iter().filter(|model| model.name != self.entries[index].name).count()
        };
        while taken(&state) >= most.max(1) {
            let idle = state.slots.iter_mut().enumerate().filter(|(i, slot)| *i != index && slot.is_idle());
            let Some((_, longest)) = idle.min_by_key(|(_, slot)| slot.used) else {
                return Err(unavailable(&format!("{most} models may be in memory (`--max-models`), and all that are there are answering")));
            };
            tracing::info!(model = longest.model.as_ref().map(|model| &*model.name), "unloaded: another needs its place");
            gone.extend(longest.model.take());
        }
        Ok(gone)
    }

    fn failed(&self, index: usize, failure: &str) -> ApiError {
        let message = format!("the model `{}` cannot be loaded: {failure}", self.entries[index].name);
        ApiError::new(StatusCode::INTERNAL_SERVER_ERROR, message).code("model_load_failed")
    }
}

fn unavailable(message: &str) -> ApiError {
    ApiError::new(StatusCode::SERVICE_UNAVAILABLE, message)
}
