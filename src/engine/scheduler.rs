//! Which sequences run in the next pass, and what becomes of the logits.
//!
//! Every pass takes one new token of each sequence that generates (and guesses at the ones after it) and a piece of a prompt that is still to be
//! read. Prompts are read one after the other, so that each has its first token as early as it can: in turn the oldest, which nobody passes
//! for ever, and the shortest, which does not wait for a long one. A piece is no longer than what those who generate can wait for.
//!
//! Memory has a limit. A sequence is let in when there is room for its prompt, finished ones leave their caches to those that begin alike until
//! the room is needed, and when running ones outgrow it, the youngest gives its memory back and reads its tokens again later.
//!
//! A sequence sees nothing of all this: its tokens depend on its own prompt, parameters and seed alone.

use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    ops::ControlFlow,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering},
        mpsc,
    },
    time::{Duration, Instant},
};

use tokio::sync::mpsc::UnboundedSender;
use upcycle_architectures::{
    decoder::{DecoderError, LanguageModel, Logits, Memory, Step},
    kernels::parallel_map,
};
use upcycle_routers::route::Steering;

use super::{
    Constraint, ConstraintError, Event, Finish, FinishReason,
    experts::Experts,
    lookup::{Trust, guess},
    prefixes::{LEAST, Prefixes, common},
    sampling::Sampler,
    stops::{Shown, Stops},
    tokenizer::{TextStream, TokenizerError},
    told::{Reading, Scores, Tell, Token, Waiting},
    watch::{Chosen, Watch},
};

/// Tokens of text that a new sequence must find room for besides its prompt, and that all others must.
const MARGIN: usize = 64;
/// Rows of prompts that short ones may share a pass up to: more hardly make a row cheaper, and each then waits for the others.
const TOGETHER: usize = 64;
/// How long a pass may keep those waiting who generate; four times as long where nobody does.
const PATIENCE: Duration = Duration::from_millis(750);
/// Rows of prompts in a pass as long as nobody knows how long a row takes.
const FIRST_ROWS: usize = 128;
/// Rows of prompts in a pass, however long they take.
const FEWEST_ROWS: usize = 16;
/// Rows of a prompt whose logits are all wanted: they are as long as the vocabulary.
const SCORED_ROWS: usize = 64;

/// What a scheduler may do at once.
#[derive(Debug, Clone, Copy)]
pub(super) struct Limits {
    /// sequences that run together, at least one
    pub(super) parallel: usize,
    /// tokens of prompts in a pass
    pub(super) chunk: usize,
    /// bytes of caches; enough for one sequence of any length that is let in
    pub(super) cache: usize,
    /// tokens guessed at a time
    pub(super) lookup: usize,
}

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

/// What is told of the scheduler while it runs.
#[derive(Debug, Default)]
pub(super) struct Gauges {
    /// sequences in passes
    pub(super) running: AtomicUsize,
    /// bytes of caches
    pub(super) held: AtomicUsize,
}

impl Gauges {
    fn set(&self, running: usize, held: usize) {
        self.running.store(running, Ordering::Relaxed);
        self.held.store(held, Ordering::Relaxed);
    }
}

/// A request that has been checked.
#[derive(Debug)]
pub(super) struct Job {
    pub(super) prompt: Vec<u32>,
    pub(super) reading: Reading,
    pub(super) max_tokens: usize,
    pub(super) min_tokens: usize,
    /// tokens that end the text, but not before there are `min_tokens`
    pub(super) ends: BTreeSet<u32>,
    /// tokens that are never chosen
    pub(super) never: BTreeSet<u32>,
    pub(super) sampler: Sampler,
    pub(super) text: TextStream,
    pub(super) stops: Stops,
    pub(super) constraint: Option<Constraint>,
    pub(super) steering: Option<Arc<Steering>>,
    pub(super) tell: Tell,
    /// special tokens that are part of the text
    pub(super) marks: BTreeMap<u32, String>,
    pub(super) events: UnboundedSender<Event>,
    #[expect(dead_code, reason = "counts the request by being held")]
    pub(super) ticket: Ticket,
}

impl Job {
    /// The next token behind so many of the text, and whether the text is complete with it.
    fn choose(&mut self, row: Row, written: usize) -> Result<(Token, bool), ConstraintError> {
        let mut logits = row.logits;
        let raw = self.tell.logprobs.map(|_| logits.clone());
        let early = if written < self.min_tokens { Some(&self.ends) } else { None };
        for &token in self.never.iter().chain(early.into_iter().flatten()) {
            logits.get_mut(token as usize).into_iter().for_each(|logit| *logit = f32::NEG_INFINITY);
        }
        if let Some(constraint) = &mut self.constraint {
            constraint.mask(&mut logits)?;
        }
        let id = self.sampler.sample(&mut logits);
        let complete = self.constraint.as_mut().map_or(Ok(false), |constraint| constraint.take(id))?;
        let mut token = Token { id, experts: row.experts, ..Token::default() };
        if let Some(raw) = raw {
            self.score(&mut token, &raw);
        }
        Ok((token, complete))
    }

    /// Says of a token how likely it was among logits [V], if that is to be told.
    fn score(&self, token: &mut Token, logits: &[f32]) {
        let Some(top) = self.tell.logprobs else { return };
        let scores = Scores::new(logits);
        (token.logprob, token.top) = (Some(scores.of(token.id)), scores.top(top));
    }

    /// Whether the logits of all of the prompt's tokens are wanted.
    fn scores(&self) -> bool {
        matches!(self.reading, Reading::Echo(_)) && self.tell.any()
    }

    fn embeds(&self) -> bool {
        matches!(self.reading, Reading::Embed(_))
    }
}

/// What a token says about the end of a text.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum End {
    /// it goes on
    Open,
    /// the token is the last of the text
    Complete,
    /// the token stands for the end
    Mark,
}

/// What a pass says of a sequence.
struct Seen {
    /// of the tokens that come next
    rows: Vec<Row>,
    /// the last hidden states of the tokens read, [D] each, if they are wanted
    states: Vec<Vec<f32>>,
}

/// What a pass says about the token that comes next.
struct Row {
    /// [V]
    logits: Vec<f32>,
    /// who computed them, if that is recorded
    experts: Chosen,
}

/// A request that waits or runs.
struct Sequence<C> {
    job: Job,
    /// tokens whose text is not shown, if anything is told of them
    told: Waiting,
    /// prompt and text; the model has read as many of them as the cache remembers
    tokens: Vec<u32>,
    cache: C,
    /// the logarithm of the probability of the tokens of the text, if that of each is told
    logprob: f64,
    /// tokens of the prompt that were read for others
    cached: usize,
    trust: Trust,
    started: Option<Instant>,
    first_token: Option<Instant>,
}

/// What a sequence gives the next pass to read.
#[derive(Debug, Default)]
struct Share {
    tokens: Vec<u32>,
    /// how many of them, at the end, are guesses
    guessed: usize,
    /// what the token after the newest may be, checked or not
    next: Option<u32>,
}

/// What the engine's thread has from the engine.
pub(super) struct Desk {
    pub(super) limits: Limits,
    pub(super) experts: Option<Arc<Experts>>,
    pub(super) inbox: mpsc::Receiver<Job>,
    /// while it is set, nothing runs
    pub(super) abort: Arc<AtomicBool>,
    pub(super) gauges: Arc<Gauges>,
}

/// Runs requests until the inbox is closed and all are finished.
pub(super) fn run<M: LanguageModel>(model: &M, desk: &Desk) {
    let Desk { limits, inbox, abort, gauges, .. } = desk;
    let mut waiting: VecDeque<Sequence<M::Cache>> = VecDeque::new();
    let mut active: Vec<Sequence<M::Cache>> = Vec::new();
    let mut prefixes = Prefixes::new();
    let (mut pace, mut shortest_first) = (Pace(None), false);
    let new = |job: Job| Sequence::new(model.steered(job.steering.clone()), job, limits.lookup);
    loop {
        gauges.set(active.len(), model.held());
        if active.is_empty() && waiting.is_empty() {
            match inbox.recv() {
                Ok(job) => waiting.push_back(new(job)),
                Err(mpsc::RecvError) => return,
            }
        }
        waiting.extend(inbox.try_iter().map(new));
        if abort.load(Ordering::Relaxed) {
            active.drain(..).chain(waiting.drain(..)).for_each(|sequence| fail(&sequence.job, "the engine is shutting down"));
            continue;
        }
        waiting.retain(|sequence| !sequence.job.events.is_closed());
        active.retain(|sequence| !sequence.job.events.is_closed());
        admit(model, *limits, &mut waiting, &mut active, &mut prefixes);
        gauges.set(active.len(), model.held());
        if active.is_empty() {
            continue;
        }

        for i in 0..active.len() {
            let start = head_start(&active[i], &active, &mut prefixes);
            active[i].catch_up(start);
        }
        shortest_first = !shortest_first;
        let shares = loop {
            let someone_writes = active.iter().any(|sequence| sequence.first_token.is_some());
            let shares = share(&active, pace.rows(limits.chunk, someone_writes), shortest_first);
            let wanted = || active.iter().zip(&shares).map(|(sequence, share)| sequence.cache.growth(share.tokens.len())).sum();
            if make_room(model, limits.cache, &mut prefixes, wanted) || active.len() == 1 {
                break shares;
            }
            if let Some(mut youngest) = active.pop() {
                youngest.cache = model.steered(youngest.job.steering.clone());
                waiting.push_front(youngest);
            }
        };

        match pass(model, desk.experts.as_deref(), &mut active, &shares, &mut pace) {
            Ok(seen) => {
                // A draw from a large vocabulary takes long.
                let all = std::mem::take(&mut active).into_iter().zip(&shares).zip(seen).collect();
                let taken = parallel_map(all, |((mut sequence, share), seen)| (sequence.take(share, seen, model), sequence));
                for (flow, sequence) in taken {
                    match flow {
                        ControlFlow::Continue(()) => active.push(sequence),
                        ControlFlow::Break(()) => prefixes.keep(sequence.tokens, sequence.cache),
                    }
                }
            }
            // Nobody can say how far the caches got.
            Err(error) => active.drain(..).for_each(|sequence| fail(&sequence.job, &error.to_string())),
        }
    }
}

/// Lets in those who wait, in their order, as long as there are places and room.
fn admit<M: LanguageModel>(
    model: &M,
    limits: Limits,
    waiting: &mut VecDeque<Sequence<M::Cache>>,
    active: &mut Vec<Sequence<M::Cache>>,
    prefixes: &mut Prefixes<M::Cache>,
) {
    while active.len() < limits.parallel
        && let Some(mut sequence) = waiting.pop_front()
    {
        let cached = sequence.cached;
        let start = head_start(&sequence, active, prefixes);
        sequence.catch_up(start);
        let wanted = || active.iter().chain([&sequence]).map(|sequence| sequence.cache.growth(sequence.unread().len() + MARGIN)).sum();
        if !make_room(model, limits.cache, prefixes, wanted) && !active.is_empty() {
            // Who waits holds nothing.
            (sequence.cache, sequence.cached) = (model.steered(sequence.job.steering.clone()), cached);
            waiting.push_front(sequence);
            return;
        }
        sequence.started.get_or_insert_with(Instant::now);
        active.push(sequence);
    }
}

/// Forgets prefixes until there is room for `wanted` bytes more, which may shrink on the way; false if there is not enough to forget.
fn make_room<M: LanguageModel>(model: &M, limit: usize, prefixes: &mut Prefixes<M::Cache>, wanted: impl Fn() -> usize) -> bool {
    while model.held() + wanted() > limit {
        if !prefixes.forget() {
            return false;
        }
    }
    true
}

/// A cache that knows more of how a sequence begins than its own does, from who finished or runs. The last token is left: its logits are wanted.
fn head_start<C: Memory>(sequence: &Sequence<C>, active: &[Sequence<C>], prefixes: &mut Prefixes<C>) -> Option<C> {
    // What others have read says nothing of its tokens.
    if sequence.job.scores() || sequence.job.embeds() {
        return None;
    }
    let least = sequence.cache.len() + LEAST;
    let wanted = &sequence.tokens[..sequence.tokens.len() - 1];
    if wanted.len() < least {
        return None;
    }
    let steering = sequence.cache.steering();
    let alike = active.iter().filter(|other| other.cache.steering() == steering);
    let running = alike.map(|other| (&other.cache, common(wanted, &other.tokens[..other.cache.len()])));
    let (cache, shared) = running.chain(prefixes.longest(wanted, steering)).max_by_key(|(_, shared)| *shared)?;
    if shared < least {
        return None;
    }
    // Where a device has no memory for a copy, tokens are read again.
    cache.fork(shared).ok().filter(|fork| fork.len() >= least)
}

/// Shares of a pass with so many rows of prompts.
fn share<C: Memory>(active: &[Sequence<C>], rows: usize, shortest_first: bool) -> Vec<Share> {
    let mut shares: Vec<Share> = active.iter().map(Sequence::next_token).collect();
    let mut reading: Vec<usize> = (0..active.len()).filter(|&i| active[i].unread().len() > 1).collect();
    if shortest_first {
        reading.sort_by_key(|&i| active[i].unread().len());
    }
    let (mut room, mut chosen) = (rows, Vec::new());
    for i in reading {
        let sequence = &active[i];
        // Who begins as one does that is being read will take over what that one has read.
        let waits = |&other: &usize| {
            let other = &active[other];
            other.cache.steering() == sequence.cache.steering() && common(&other.tokens, &sequence.tokens) >= sequence.cache.len() + LEAST
        };
        let unread = sequence.unread();
        if chosen.is_empty() {
            let most = if sequence.job.scores() { SCORED_ROWS.min(room) } else { room };
            shares[i].tokens = unread[..unread.len().min(most)].to_vec();
            room = TOGETHER.min(room).saturating_sub(unread.len());
            chosen.push(i);
        } else if unread.len() <= room && !chosen.iter().any(waits) {
            shares[i].tokens = unread.to_vec();
            room -= unread.len();
            chosen.push(i);
        }
    }
    shares
}

/// One pass. Returns what it says of each sequence: of one that has more to read, only what is wanted of its prompt.
fn pass<M: LanguageModel>(
    model: &M,
    experts: Option<&Experts>,
    active: &mut [Sequence<M::Cache>],
    shares: &[Share],
    pace: &mut Pace,
) -> Result<Vec<Seen>, DecoderError> {
    let mut steps = Vec::with_capacity(active.len());
    let mut wanted = Vec::with_capacity(active.len());
    let (mut rows, mut recorded, mut spans) = (0, Vec::new(), Vec::new());
    for (sequence, share) in active.iter_mut().zip(shares) {
        let (new, scores) = (share.tokens.len(), sequence.job.scores());
        let embeds = sequence.job.embeds() && new > 0;
        let (logits, own) = if embeds || new == 0 || (new < sequence.unread().len() && !scores) {
            (Logits::None, 0)
        } else if scores {
            (Logits::All, new)
        } else if share.guessed > 0 {
            (Logits::All, 1 + share.guessed)
        } else {
            (Logits::Last, 1)
        };
        rows += new;
        if sequence.job.tell.experts {
            recorded.extend(rows - own..rows);
        }
        if embeds {
            spans.push(rows - new..rows);
        }
        wanted.push((own, sequence.job.tell.experts, embeds));
        if new > 0 {
            steps.push(Step { tokens: &share.tokens, cache: &mut sequence.cache, logits });
        }
    }
    let start = Instant::now();
    let mut watch = Watch::new(experts, recorded, spans);
    let logits = model.forward(&mut steps, &mut watch)?;
    let mut logits = if wanted.iter().any(|(own, ..)| *own > 0) { logits.to_vec2()? } else { Vec::new() }.into_iter();
    pace.learn(rows, start.elapsed());
    let (chosen, states) = watch.finish(rows);
    let (mut chosen, mut states) = (chosen.into_iter(), states.into_iter());
    let mut row = |records| Some(Row { logits: logits.next()?, experts: if records { chosen.next()? } else { Chosen::new() } });
    let seen = |(own, records, embeds): (usize, bool, bool)| Seen {
        rows: (0..own).map_while(|_| row(records)).collect(),
        states: if embeds { states.next().unwrap_or_default() } else { Vec::new() },
    };
    Ok(wanted.into_iter().map(seen).collect())
}

/// How long a row of a pass takes, as far as that is known.
struct Pace(Option<Duration>);

impl Pace {
    /// Rows of prompts that the next pass may have, at most `chunk`.
    fn rows(&self, chunk: usize, someone_writes: bool) -> usize {
        let patience = if someone_writes { PATIENCE } else { 4 * PATIENCE };
        let rows = self.0.map_or(FIRST_ROWS, |row| (patience.as_secs_f64() / row.as_secs_f64()) as usize);
        rows.max(FEWEST_ROWS).min(chunk.max(1))
    }

    /// Learns from a pass; one of a few rows says nothing about many.
    fn learn(&mut self, rows: usize, took: Duration) {
        if rows >= FEWEST_ROWS {
            self.0 = Some((took / rows as u32).max(Duration::from_nanos(1)));
        }
    }
}

impl<C: Memory> Sequence<C> {
    fn new(cache: C, job: Job, lookup: usize) -> Self {
        let (tokens, told, trust) = (job.prompt.clone(), Waiting::default(), Trust::new(lookup));
        Self { job, told, tokens, cache, logprob: 0.0, cached: 0, trust, started: None, first_token: None }
    }

    /// What the model has not read.
    fn unread(&self) -> &[u32] {
        &self.tokens[self.cache.len()..]
    }

    /// Goes on from a cache that knows more than its own.
    fn catch_up(&mut self, start: Option<C>) {
        let Some(start) = start else { return };
        if self.first_token.is_none() {
            self.cached = (self.cached + start.len() - self.cache.len()).min(self.job.prompt.len());
        }
        self.cache = start;
    }

    /// The share of a sequence that has only its newest token to read; nothing for others.
    fn next_token(&self) -> Share {
        let &[token] = self.unread() else { return Share::default() };
        let left = (self.job.prompt.len() + self.job.max_tokens).saturating_sub(self.tokens.len() + 1);
        let most = if self.cache.rewinds() { self.trust.tokens().min(left) } else { 0 };
        let guess = if self.trust.guesses() { guess(&self.tokens, most.max(1)) } else { &[] };
        let checked = &guess[..guess.len().min(most)];
        Share { tokens: [&[token], checked].concat(), guessed: checked.len(), next: guess.first().copied() }
    }

    /// Takes what a pass says of the prompt's own tokens, and says it when it is whole. Rows of what comes behind them are left.
    fn read(&mut self, share: &Share, seen: &mut Seen) {
        let prompt = self.job.prompt.len();
        let (start, end) = (self.cache.len() - share.tokens.len(), self.cache.len());
        match std::mem::replace(&mut self.job.reading, Reading::Plain) {
            Reading::Plain => {}
            Reading::Echo(mut tokens) => {
                if self.job.tell.any() {
                    let inner = seen.rows.len().min((prompt - 1).saturating_sub(start));
                    for ((token, _), row) in tokens[start + 1..].iter_mut().zip(seen.rows.drain(..inner)) {
                        self.job.score(token, &row.logits);
                        token.experts = row.experts;
                    }
                }
                if end < prompt {
                    self.job.reading = Reading::Echo(tokens);
                } else {
                    let text: String = tokens.iter().map(|(_, text)| text.as_str()).collect();
                    if self.job.tell.any() {
                        tokens.into_iter().for_each(|(token, text)| self.told.push(token, &text));
                        let mut told = self.told.show(&text);
                        told.extend(self.told.rest());
                        self.send(Event::Tokens(told));
                    }
                    self.send(Event::Text(text));
                }
            }
            Reading::Embed(mut sum) => {
                // Who begins anew forgets what was summed up. Row by row, so that the cut into passes changes nothing.
                if start == 0 {
                    sum = vec![0.0; seen.states.first().map_or(0, Vec::len)];
                }
                seen.states.iter().for_each(|state| sum.iter_mut().zip(state).for_each(|(sum, x)| *sum += f64::from(*x)));
                self.job.reading = Reading::Embed(sum);
            }
        }
    }

    /// Chooses the tokens that rows lead to, as long as the share's guesses are right; breaks when the text is complete.
    fn take(&mut self, share: &Share, mut seen: Seen, model: &impl LanguageModel<Cache = C>) -> ControlFlow<()> {
        self.read(share, &mut seen);
        if self.job.max_tokens == 0 && self.cache.len() >= self.job.prompt.len() {
            self.first_token.get_or_insert_with(Instant::now);
            self.send(Event::Done(self.finish(FinishReason::Length, model.answering(&self.cache))));
            return ControlFlow::Break(());
        }
        let mut guesses = share.tokens[share.tokens.len() - share.guessed..].iter();
        let (mut flow, mut right, known) = (ControlFlow::Continue(()), 0, self.tokens.len());
        for row in seen.rows {
            let (token, complete) = match self.job.choose(row, self.tokens.len() - self.job.prompt.len()) {
                Ok(chosen) => chosen,
                Err(error) => {
                    fail(&self.job, &error.to_string());
                    flow = ControlFlow::Break(());
                    break;
                }
            };
            let id = token.id;
            self.tokens.push(id);
            self.logprob += f64::from(token.logprob.unwrap_or_default());
            self.first_token.get_or_insert_with(Instant::now);
            let end = if self.job.ends.contains(&id) {
                End::Mark
            } else if complete {
                End::Complete
            } else {
                End::Open
            };
            flow = self.tell(token, end, model);
            if flow.is_break() || guesses.next() != Some(&id) {
                break;
            }
            right += 1;
        }
        if let Some(&first) = self.tokens.get(known) {
            self.trust.learn(share.guessed, right, share.next == Some(first));
        }
        if share.guessed > 0 {
            self.cache.truncate(self.tokens.len() - 1);
        }
        flow
    }

    /// Says what a token means; breaks when the text is complete.
    fn tell(&mut self, token: Token, end: End, model: &impl LanguageModel<Cache = C>) -> ControlFlow<()> {
        match self.show(token, end) {
            Ok(None) => return ControlFlow::Continue(()),
            Ok(Some(reason)) => self.send(Event::Done(self.finish(reason, model.answering(&self.cache)))),
            Err(error) => fail(&self.job, &error.to_string()),
        }
        ControlFlow::Break(())
    }

    /// Sends the text that the token completes, behind what is told of its tokens; returns why the text ends here, if it does.
    fn show(&mut self, token: Token, end: End) -> Result<Option<FinishReason>, TokenizerError> {
        let mark = end == End::Mark;
        let mut piece = if mark { String::new() } else { self.job.text.push(token.id)? };
        piece.extend(self.job.marks.get(&token.id).cloned());
        let end = match (end, self.tokens.len() - self.job.prompt.len() >= self.job.max_tokens) {
            (End::Mark | End::Complete, _) => Some(FinishReason::Stop),
            (End::Open, true) => Some(FinishReason::Length),
            (End::Open, false) => None,
        };
        if end.is_some() {
            piece += &self.job.text.rest()?;
        }
        if self.job.tell.any() && !mark {
            self.told.push(token, &piece);
        }
        let (mut text, stopped) = match self.job.stops.push(&piece) {
            Shown::More(text) => (text, false),
            Shown::Last(text) => (text, true),
        };
        if end.is_some() {
            text += &self.job.stops.rest();
        }
        let mut told = self.told.show(&text);
        if end.is_some() && !stopped {
            told.extend(self.told.rest());
        }
        if !told.is_empty() {
            self.send(Event::Tokens(told));
        }
        if !text.is_empty() {
            self.send(Event::Text(text));
        }
        Ok(if stopped { Some(FinishReason::Stop) } else { end })
    }

    fn finish(&self, reason: FinishReason, expert: Option<usize>) -> Finish {
        let started = self.started.unwrap_or_else(Instant::now);
        let first = self.first_token.unwrap_or(started);
        Finish {
            reason,
            prompt_tokens: self.job.prompt.len(),
            cached_tokens: self.cached,
            completion_tokens: self.tokens.len() - self.job.prompt.len(),
            logprob: self.logprob,
            embedding: match &self.job.reading {
                Reading::Embed(sum) => Some(sum.iter().map(|sum| (sum / self.job.prompt.len() as f64) as f32).collect()),
                Reading::Plain | Reading::Echo(_) => None,
            },
            prefill: first - started,
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
