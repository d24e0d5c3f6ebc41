//! Which sequences run in the next pass, and what becomes of the logits.
//!
//! Every pass takes one new token of each sequence that generates and up to a chunk of the prompts that are still to be read. A sequence
//! sees nothing of the others: its tokens depend on its own prompt, cache and sampler alone.

use std::{
    collections::{BTreeSet, VecDeque},
    ops::ControlFlow,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering},
        mpsc,
    },
    time::Instant,
};

use tokio::sync::mpsc::UnboundedSender;
use upcycle_architectures::decoder::{DecoderError, LanguageModel, Logits, NoProbe, Step};

use super::{
    Event, Finish, FinishReason, Options,
    sampling::Sampler,
    stops::{Shown, Stops},
    tokenizer::{TextStream, TokenizerError},
};

/// Counts a request as long as it lives.
#[derive(Debug)]
pub(super) struct Ticket(Arc<AtomicUsize>);

impl Ticket {
    pub(super) fn take(count: &Arc<AtomicUsize>) -> Self {
        count.fetch_add(1, Ordering::Relaxed);
        Self(count.clone())
    }
}

impl Drop for Ticket {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

/// A request that has been checked.
#[derive(Debug)]
pub(super) struct Job {
    pub(super) prompt: Vec<u32>,
    pub(super) max_tokens: usize,
    pub(super) sampler: Sampler,
    pub(super) text: TextStream,
    pub(super) stops: Stops,
    pub(super) events: UnboundedSender<Event>,
    #[expect(dead_code, reason = "counts the request by being held")]
    pub(super) ticket: Ticket,
}

/// A request that runs.
struct Sequence<C> {
    job: Job,
    /// prompt and text
    tokens: Vec<u32>,
    /// how many of them the model has read
    read: usize,
    cache: C,
    started: Instant,
    first_token: Option<Instant>,
}

/// Runs requests until the inbox is closed and all are finished. The tokens `ends` end a text; while `abort` is set, nothing runs.
pub(super) fn run(model: &impl LanguageModel, ends: &BTreeSet<u32>, options: &Options, inbox: &mpsc::Receiver<Job>, abort: &AtomicBool) {
    let mut waiting = VecDeque::new();
    let mut active: Vec<Sequence<_>> = Vec::new();
    loop {
        if active.is_empty() && waiting.is_empty() {
            match inbox.recv() {
                Ok(job) => waiting.push_back(job),
                Err(mpsc::RecvError) => return,
            }
        }
        waiting.extend(inbox.try_iter());
        if abort.load(Ordering::Relaxed) {
            let stopped = active.drain(..).map(|sequence| sequence.job).chain(waiting.drain(..));
            stopped.for_each(|job| fail(&job, "the engine is shutting down"));
            continue;
        }
        waiting.retain(|job: &Job| !job.events.is_closed());
        active.retain(|sequence| !sequence.job.events.is_closed());
        let free = options.parallel.max(1).saturating_sub(active.len()).min(waiting.len());
        active.extend(waiting.drain(..free).map(|job| Sequence::new(job, model.cache())));

        match pass(model, &mut active, options.chunk) {
            Ok(rows) => {
                let mut rows = rows.into_iter();
                active.retain_mut(|sequence| match rows.next().flatten() {
                    Some(mut logits) => sequence.take(&mut logits, ends, model).is_continue(),
                    None => true,
                });
            }
            // Nobody can say how far the caches got.
            Err(error) => active.drain(..).for_each(|sequence| fail(&sequence.job, &error.to_string())),
        }
    }
}

/// One pass. Returns a row of logits for each sequence that has nothing left to read.
fn pass<M: LanguageModel>(model: &M, active: &mut [Sequence<M::Cache>], chunk: usize) -> Result<Vec<Option<Vec<f32>>>, DecoderError> {
    let mut room = chunk.max(1);
    let mut steps = Vec::with_capacity(active.len());
    let mut complete = Vec::with_capacity(active.len());
    for Sequence { tokens, read, cache, .. } in active {
        let unread = &tokens[*read..];
        let now = if unread.len() == 1 { 1 } else { unread.len().min(room) };
        if unread.len() > 1 {
            room -= now;
        }
        complete.push(now == unread.len());
        *read += now;
        if now > 0 {
            let logits = if now == unread.len() { Logits::Last } else { Logits::None };
            steps.push(Step { tokens: &unread[..now], cache, logits });
        }
    }
    if steps.is_empty() {
        return Ok(Vec::new());
    }
    let logits = model.forward(&mut steps, &mut NoProbe)?;
    let rows = if complete.contains(&true) { logits.to_vec2()? } else { Vec::new() };
    let mut rows = rows.into_iter();
    Ok(complete.into_iter().map(|complete| if complete { rows.next() } else { None }).collect())
}

impl<C> Sequence<C> {
    fn new(job: Job, cache: C) -> Self {
        Self { tokens: job.prompt.clone(), read: 0, cache, started: Instant::now(), first_token: None, job }
    }

    /// Chooses the next token and says what it means; breaks when the text is complete.
    fn take(&mut self, logits: &mut [f32], ends: &BTreeSet<u32>, model: &impl LanguageModel<Cache = C>) -> ControlFlow<()> {
        let token = self.job.sampler.sample(logits);
        self.tokens.push(token);
        self.first_token.get_or_insert_with(Instant::now);
        match self.show(token, ends) {
            Ok(None) => ControlFlow::Continue(()),
            Ok(Some(reason)) => {
                self.send(Event::Done(self.finish(reason, model.answering(&self.cache))));
                ControlFlow::Break(())
            }
            Err(error) => {
                fail(&self.job, &error.to_string());
                ControlFlow::Break(())
            }
        }
    }

    /// Sends the text that the token completes; returns why the text ends here, if it does.
    fn show(&mut self, token: u32, ends: &BTreeSet<u32>) -> Result<Option<FinishReason>, TokenizerError> {
        let end = match (ends.contains(&token), self.tokens.len() - self.job.prompt.len() >= self.job.max_tokens) {
            (true, _) => Some(FinishReason::Stop),
            (false, true) => Some(FinishReason::Length),
            (false, false) => None,
        };
        let mut piece = if end == Some(FinishReason::Stop) { String::new() } else { self.job.text.push(token)? };
        if end.is_some() {
            piece += &self.job.text.rest()?;
        }
        let (mut text, stopped) = match self.job.stops.push(&piece) {
            Shown::More(text) => (text, false),
            Shown::Last(text) => (text, true),
        };
        if end.is_some() {
            text += &self.job.stops.rest();
        }
        if !text.is_empty() {
            self.send(Event::Text(text));
        }
        Ok(if stopped { Some(FinishReason::Stop) } else { end })
    }

    fn finish(&self, reason: FinishReason, expert: Option<usize>) -> Finish {
        let first = self.first_token.unwrap_or(self.started);
        Finish {
            reason,
            prompt_tokens: self.job.prompt.len(),
            completion_tokens: self.tokens.len() - self.job.prompt.len(),
            prefill: first - self.started,
            decode: first.elapsed(),
            expert,
        }
    }

    /// Whether anybody still listens is looked up before every pass.
    fn send(&self, event: Event) {
        let _ = self.job.events.send(event);
    }
}

fn fail(job: &Job, reason: &str) {
    let _ = job.events.send(Event::Failed(reason.to_owned()));
}
