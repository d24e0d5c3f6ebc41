//! Text in, text out: tokenizer, chat template, sampling, sequences and their scheduler over one model.
//!
//! An [`Engine`] owns a model on a thread of its own. Requests go in as tokens, text comes back piece by piece through a channel that
//! both threads and async tasks can wait on; dropping the receiving end cancels the request. Nothing here knows HTTP.

pub mod bench;
pub mod constraint;
pub mod device;
pub mod experts;
mod lookup;
mod prefixes;
pub mod sampling;
mod scheduler;
mod sidecars;
mod stops;
pub mod template;
pub mod tokenizer;
mod told;
mod watch;
mod wishes;

use std::{
    collections::{BTreeMap, BTreeSet},
    ops::ControlFlow,
    sync::{
        Arc, OnceLock,
        atomic::{AtomicBool, AtomicUsize, Ordering},
        mpsc,
    },
    thread::JoinHandle,
    time::{Duration, SystemTime},
};

use serde_json::{Map, Value, json};
use tokio::sync::mpsc::{UnboundedReceiver, unbounded_channel};
use upcycle_architectures::decoder::{LanguageModel, Memory as _};

use self::{
    constraint::Vocabulary,
    scheduler::{Desk, Gauges, Job, Limits, Ticket},
    stops::Stops,
    tokenizer::TextStream,
    told::Reading,
};
pub use self::{
    constraint::{Constraint, ConstraintError, Grammar},
    experts::Experts,
    sampling::{Sampling, SamplingError},
    sidecars::SidecarError,
    template::{Chat, ChatTemplate, TemplateError},
    tokenizer::{Specials, Tokenizer, TokenizerError},
    told::{Tell, Token},
    watch::Chosen,
    wishes::{WishError, Wishes},
};
use crate::source::Sidecar;
pub use upcycle_routers::route::Steering;

/// How much an engine does at once.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Options {
    /// sequences that run together
    pub parallel: usize,
    /// requests that may wait for a place among them
    pub queue: usize,
    /// tokens of prompts in one pass at most; it is fewer where they take long
    pub chunk: usize,
    /// tokens of a sequence, prompt and text together; the model's own limit if not given or greater
    pub context: Option<usize>,
    /// bytes of keys and values, of running sequences and of finished ones that others may go on from; if not given, what `parallel`
    /// sequences of full length take
    pub cache: Option<usize>,
    /// tokens that are looked up in a sequence's own past and checked together; 0 turns that off
    pub lookup: usize,
}

impl Default for Options {
    fn default() -> Self {
        Self { parallel: 8, queue: 256, chunk: 512, context: None, cache: None, lookup: 8 }
    }
}

/// What speaks for a model besides its weights.
#[derive(Debug)]
pub struct Text {
    /// text to tokens and back
    pub tokenizer: Arc<Tokenizer>,
    /// messages to a prompt, if the model is made for that
    pub template: Option<ChatTemplate>,
    /// what its makers recommend
    pub sampling: Sampling,
    /// what its experts are called; their numbers if there are not as many
    pub experts: Vec<String>,
}

impl Text {
    /// Reads them from the files beside the weights.
    pub fn open(sidecars: &BTreeMap<String, Sidecar>, config: &upcycle_architectures::Config) -> Result<Self, EngineError> {
        let tokenizer = Tokenizer::open(sidecars, config)?;
        let template = ChatTemplate::open(sidecars, tokenizer.special_tokens().clone())?;
        let generation_config = sidecars::json(sidecars, "generation_config.json")?.unwrap_or_default();
        Ok(Self { tokenizer: Arc::new(tokenizer), template, sampling: Sampling::recommended(&generation_config), experts: Vec::new() })
    }

    /// The tokens of a text as it is.
    pub fn prompt(&self, text: &str) -> Result<Vec<u32>, EngineError> {
        Ok(self.tokenizer.encode(text, Specials::Add)?)
    }

    /// The tokens of messages, up to where the assistant speaks. `variables` go to the template.
    pub fn chat_prompt(&self, messages: &[Value], variables: &Map<String, Value>) -> Result<Vec<u32>, EngineError> {
        let template = self.template.as_ref().ok_or(EngineError::NoTemplate)?;
        let chat = Chat { messages, add_generation_prompt: true, variables, now: Some(SystemTime::now()) };
        Ok(self.tokenizer.encode(&template.render(&chat)?, Specials::Written)?)
    }

    /// The special token that the template writes after the assistant's words. It ends a text too: a composite whose base is no chat model
    /// has experts that end their turns, and a config that does not say with what.
    fn turn_end(&self) -> Option<u32> {
        const WORDS: &str = "yes";
        let messages = [json!({"role": "user", "content": "?"}), json!({"role": "assistant", "content": WORDS})];
        let chat = Chat { messages: &messages, add_generation_prompt: false, variables: &Map::new(), now: None };
        let text = self.template.as_ref()?.render(&chat).ok()?;
        let (_, after) = text.rsplit_once(WORDS)?;
        let first = *self.tokenizer.encode(after.trim_start(), Specials::Written).ok()?.first()?;
        self.tokenizer.is_special(first).then_some(first)
    }
}

/// What to do with a prompt.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Task {
    /// to go on from it
    #[default]
    Continue,
    /// to say it again first
    Echo,
    /// to say nothing: [`Finish::embedding`] is wanted
    Embed,
}

/// What to generate.
#[derive(Debug, Clone, Default)]
pub struct Request {
    /// tokens to go on from
    pub prompt: Vec<u32>,
    /// what to do with them
    pub task: Task,
    /// how tokens are chosen
    pub sampling: Sampling,
    /// tokens to generate at most, none only behind an echo; up to the context limit if not given
    pub max_tokens: Option<usize>,
    /// tokens before which none ends the text
    pub min_tokens: usize,
    /// whether the model cannot end the text
    pub ignore_eos: bool,
    /// tokens that end the text besides those of the model
    pub stop_tokens: Vec<u32>,
    /// strings that end the text and are not part of it
    pub stop: Vec<String>,
    /// what the text may be; of [`Engine::constraint`]
    pub constraint: Option<Constraint>,
    /// how experts are chosen, if not by the routers alone
    pub steering: Option<Steering>,
    /// what is told of each token
    pub tell: Tell,
    /// special tokens that are part of the text, as they are written; others have none
    pub marks: Vec<String>,
}

/// What comes back: any number of texts, then one of the last two.
#[derive(Debug, Clone, PartialEq)]
pub enum Event {
    /// the tokens that end in the text that comes next, or that have none and stand at its end; none unless the request asks for them, and
    /// none of those that a stop string cuts off
    Tokens(Vec<Token>),
    /// more text; never half a character, never a part of a stop string
    Text(String),
    /// the text is complete
    Done(Finish),
    /// the engine could not go on
    Failed(String),
}

/// How a text ended.
#[derive(Debug, Clone, PartialEq)]
pub struct Finish {
    /// why
    pub reason: FinishReason,
    /// P
    pub prompt_tokens: usize,
    /// tokens of the prompt that had been read for other sequences
    pub cached_tokens: usize,
    /// sampled tokens, the one that ended the text among them
    pub completion_tokens: usize,
    /// the logarithm of their probability, where that of each is told
    pub logprob: f64,
    /// the mean of the last hidden states of the prompt's tokens, [D], where it is wanted
    pub embedding: Option<Vec<f32>>,
    /// from the start of the request's first pass to its first token
    pub prefill: Duration,
    /// from the first token to the last
    pub decode: Duration,
    /// the expert that answered, where one does so as a whole
    pub expert: Option<usize>,
}

/// How busy an engine is; as of its last pass.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Load {
    /// sequences that are being answered
    pub running: usize,
    /// those that wait for that
    pub waiting: usize,
    /// sequences that may run together
    pub parallel: usize,
    /// bytes of keys and values, of finished sequences too
    pub cache: usize,
    /// bytes that they may have
    pub cache_limit: usize,
}

/// Why a text ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FinishReason {
    /// the model ended it, or a stop string came
    Stop,
    /// `max_tokens` or the context limit
    Length,
}

/// Why a request was not taken, or not finished.
#[derive(Debug, thiserror::Error)]
pub enum EngineError {
    /// a file beside the weights
    #[error(transparent)]
    Sidecar(#[from] SidecarError),
    /// from the tokenizer
    #[error(transparent)]
    Tokenizer(#[from] TokenizerError),
    /// from the chat template
    #[error(transparent)]
    Template(#[from] TemplateError),
    /// messages for a model that has no words for them
    #[error("the model has no chat template: use plain completion, or give a template with `--chat-template FILE`")]
    NoTemplate,
    /// a sampling parameter
    #[error(transparent)]
    Sampling(#[from] SamplingError),
    /// a grammar for texts of this model
    #[error(transparent)]
    Constraint(#[from] ConstraintError),
    /// nothing to go on from
    #[error("the prompt is empty")]
    EmptyPrompt,
    /// wishes about experts where there are none
    #[error("the model is dense: it has no experts to choose from")]
    Dense,
    /// hidden states that are not of one kind
    #[error("one of several whole models answers here: they have no embeddings in common")]
    Whole,
    /// no room for a token
    #[error("the prompt has {prompt} tokens, but the context holds {context}, at least one of them for the answer")]
    Context {
        /// P
        prompt: usize,
        /// the limit
        context: usize,
    },
    /// no room for keys and values
    #[error("a cache of {cache} bytes holds no sequence: {least} bytes hold the first tokens of one; give more with `--cache-size`")]
    Cache {
        /// the limit
        cache: usize,
        /// for the fewest tokens
        least: usize,
    },
    /// a token beyond the vocabulary
    #[error("token {token} is not in the vocabulary of {vocab}")]
    Token {
        /// the id
        token: u32,
        /// V
        vocab: usize,
    },
    /// as many as may wait do
    #[error("{waiting} requests are waiting already")]
    Busy {
        /// how many
        waiting: usize,
    },
    /// no new requests are taken
    #[error("the engine is shutting down")]
    Stopped,
    /// a pass failed
    #[error("generation failed: {0}")]
    Failed(String),
    /// no thread for the engine
    #[error("cannot start the engine's thread: {0}")]
    Thread(#[source] std::io::Error),
}

/// A model at work on its own thread.
#[derive(Debug)]
pub struct Engine {
    text: Text,
    options: Options,
    context: usize,
    vocab: usize,
    experts: Option<Arc<Experts>>,
    /// the tokens that end a text
    ends: BTreeSet<u32>,
    /// made when the first grammar is compiled
    vocabulary: OnceLock<Result<Vocabulary, ConstraintError>>,
    inbox: Option<mpsc::Sender<Job>>,
    unfinished: Arc<AtomicUsize>,
    gauges: Arc<Gauges>,
    /// bytes of keys and values at most
    cache: usize,
    draining: AtomicBool,
    abort: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Engine {
    /// Starts the thread.
    pub fn start<M>(model: M, text: Text, options: Options) -> Result<Self, EngineError>
    where
        M: LanguageModel + Send + 'static,
    {
        let vocab = model.config().vocab;
        let parallel = options.parallel.max(1);
        let (context, cache) = fit(&model, options.context.unwrap_or(usize::MAX), options.cache, parallel)?;
        let limits = Limits { parallel, chunk: options.chunk, cache, lookup: options.lookup };
        let (sender, inbox) = mpsc::channel();
        let (abort, gauges) = (Arc::new(AtomicBool::new(false)), Arc::<Gauges>::default());
        let ends: BTreeSet<u32> = text.tokenizer.eos().iter().copied().chain(text.turn_end()).collect();
        let experts = model.choice().map(|choice| Arc::new(Experts::new(choice, text.experts.clone())));
        let desk = Desk { limits, experts: experts.clone(), inbox, abort: abort.clone(), gauges: gauges.clone() };
        let thread = std::thread::Builder::new().name("engine".into()).spawn(move || scheduler::run(&model, &desk));
        Ok(Self {
            text,
            options,
            context,
            vocab,
            experts,
            ends,
            vocabulary: OnceLock::new(),
            inbox: Some(sender),
            unfinished: Arc::default(),
            gauges,
            cache,
            draining: AtomicBool::new(false),
            abort,
            thread: Some(thread.map_err(EngineError::Thread)?),
        })
    }

    /// Text to tokens and back.
    pub fn tokenizer(&self) -> &Tokenizer {
        &self.text.tokenizer
    }

    /// Tokenizer, template and recommended sampling.
    pub fn text(&self) -> &Text {
        &self.text
    }

    /// Its experts; `None` if the model is dense.
    pub fn experts(&self) -> Option<&Experts> {
        self.experts.as_deref()
    }

    /// Tokens that a sequence may have.
    pub fn context(&self) -> usize {
        self.context
    }

    /// Requests that run or wait.
    pub fn unfinished(&self) -> usize {
        self.unfinished.load(Ordering::Relaxed)
    }

    /// How busy it is.
    pub fn load(&self) -> Load {
        let (unfinished, running) = (self.unfinished(), self.gauges.running.load(Ordering::Relaxed));
        Load {
            running: running.min(unfinished),
            waiting: unfinished.saturating_sub(running),
            parallel: self.options.parallel,
            cache: self.gauges.held.load(Ordering::Relaxed),
            cache_limit: self.cache,
        }
    }

    /// Whether new requests are taken.
    pub fn accepts(&self) -> bool {
        !self.draining.load(Ordering::Relaxed) && self.thread.as_ref().is_some_and(|thread| !thread.is_finished())
    }

    /// Takes no new requests from now on; those that run or wait are finished.
    pub fn drain(&self) {
        self.draining.store(true, Ordering::Relaxed);
    }

    /// Ends every request that runs or waits with [`Event::Failed`], and takes no new ones.
    pub fn abort(&self) {
        self.drain();
        self.abort.store(true, Ordering::Relaxed);
    }

    /// Compiles what a text may be. Takes its time the first time, and with a large grammar.
    pub fn constraint(&self, grammar: &Grammar) -> Result<Constraint, EngineError> {
        let new = || Vocabulary::new(&self.text.tokenizer, self.vocab, &self.ends.iter().copied().collect::<Vec<_>>());
        Ok(self.vocabulary.get_or_init(new).as_ref().map_err(Clone::clone)?.constraint(grammar)?)
    }

    /// Hands in a request. Dropping the receiver cancels it.
    pub fn submit(&self, request: Request) -> Result<UnboundedReceiver<Event>, EngineError> {
        request.sampling.check()?;
        if request.max_tokens == Some(0) && request.task == Task::Continue {
            return Err(SamplingError { parameter: "max_tokens", found: 0.0, expected: "at least 1" }.into());
        }
        if request.prompt.is_empty() {
            return Err(EngineError::EmptyPrompt);
        }
        if request.prompt.len() >= self.context {
            return Err(EngineError::Context { prompt: request.prompt.len(), context: self.context });
        }
        if request.task == Task::Embed && self.experts().is_some_and(|experts| experts.choice().whole) {
            return Err(EngineError::Whole);
        }
        if let Some(&token) = request.prompt.iter().find(|&&token| token as usize >= self.vocab) {
            return Err(EngineError::Token { token, vocab: self.vocab });
        }
        if (request.steering.is_some() || request.tell.experts) && self.experts.is_none() {
            return Err(EngineError::Dense);
        }
        if !self.accepts() {
            return Err(EngineError::Stopped);
        }
        let ticket = Ticket::take(&self.unfinished);
        let waiting = self.unfinished().saturating_sub(self.options.parallel + 1);
        if waiting >= self.options.queue {
            return Err(EngineError::Busy { waiting });
        }
        let (events, receiver) = unbounded_channel();
        let room = if request.task == Task::Embed { 0 } else { self.context - request.prompt.len() };
        let job = Job {
            max_tokens: request.max_tokens.map_or(room, |max| max.min(room)),
            reading: self.reading(request.task, &request.prompt)?,
            min_tokens: request.min_tokens,
            never: if request.ignore_eos { self.ends.clone() } else { BTreeSet::new() },
            ends: self.ends.iter().copied().chain(request.stop_tokens).collect(),
            sampler: sampling::Sampler::new(request.sampling, &request.prompt),
            text: TextStream::new(self.text.tokenizer.clone(), &request.prompt)?,
            stops: Stops::new(request.stop),
            constraint: request.constraint,
            steering: request.steering.filter(|steering| *steering != Steering::default()).map(Arc::new),
            tell: request.tell,
            marks: request.marks.into_iter().filter_map(|mark| Some((self.text.tokenizer.special(&mark)?, mark))).collect(),
            prompt: request.prompt,
            events,
            ticket,
        };
        self.inbox.as_ref().and_then(|inbox| inbox.send(job).ok()).ok_or(EngineError::Stopped)?;
        Ok(receiver)
    }

    /// What becomes of a prompt's tokens.
    fn reading(&self, task: Task, prompt: &[u32]) -> Result<Reading, EngineError> {
        Ok(match task {
            Task::Continue => Reading::Plain,
            Task::Embed => Reading::Embed(Vec::new()),
            Task::Echo => {
                let mut text = TextStream::new(self.text.tokenizer.clone(), &[])?;
                let token = |&id: &u32| text.push(id).map(|piece| (Token { id, ..Token::default() }, piece));
                let mut tokens = prompt.iter().map(token).collect::<Result<Vec<_>, _>>()?;
                if let Some((_, last)) = tokens.last_mut() {
                    *last += &text.rest()?;
                }
                Reading::Echo(tokens)
            }
        })
    }

    /// Generates to the end on the caller's thread, handing over text as it comes; a break cancels and gives no finish. Not for async code.
    pub fn stream(&self, request: Request, mut on_text: impl FnMut(&str) -> ControlFlow<()>) -> Result<Option<Finish>, EngineError> {
        let mut events = self.submit(request)?;
        while let Some(event) = events.blocking_recv() {
            match event {
                Event::Text(text) => {
                    if on_text(&text).is_break() {
                        return Ok(None);
                    }
                }
                Event::Tokens(_) => {}
                Event::Done(finish) => return Ok(Some(finish)),
                Event::Failed(reason) => return Err(EngineError::Failed(reason)),
            }
        }
        Err(EngineError::Stopped)
    }

    /// The text after `prompt`, sampled as the model's makers recommend. Not for async code.
    pub fn generate(&self, prompt: &str, max_tokens: usize) -> Result<String, EngineError> {
        let (prompt, sampling) = (self.text.prompt(prompt)?, self.text.sampling.clone());
        let mut text = String::new();
        self.stream(Request { prompt, sampling, max_tokens: Some(max_tokens), ..Request::default() }, |piece| {
            text.push_str(piece);
            ControlFlow::Continue(())
        })?;
        Ok(text)
    }
}

/// Tokens that a sequence may have, and bytes for all caches: one sequence of that length must fit, so that whoever runs alone can finish.
fn fit(model: &impl LanguageModel, context: usize, cache: Option<usize>, parallel: usize) -> Result<(usize, usize), EngineError> {
    let empty = model.cache();
    let context = context.min(model.config().max_positions);
    let whole = empty.growth(context);
    let cache = cache.unwrap_or_else(|| whole.saturating_mul(parallel));
    if whole <= cache {
        return Ok((context, cache));
    }
    // What grows by blocks is asked again.
    let mut fits = (context as f64 * (cache as f64 / whole as f64)) as usize;
    while fits > 1 && empty.growth(fits) > cache {
        fits -= 1;
    }
    let least = empty.growth(2);
    if fits < 2 || least > cache { Err(EngineError::Cache { cache, least }) } else { Ok((fits, cache)) }
}

impl Drop for Engine {
    fn drop(&mut self) {
        self.abort();
        self.inbox = None;
        if let Some(thread) = self.thread.take() {
            // A panic there has been reported by the panic hook; there is nobody left to tell.
            let _ = thread.join();
        }
    }
}
