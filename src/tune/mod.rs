//! Trains the gates of a composite, and if wanted its norms and a change of low rank to its attention, on text of each expert's kind.
//!
//! First each router's cross-entropy against the expert that the text is named after, then the language model's loss. A part of the text is
//! held out; the state with the least loss on it is what comes out, and the state given is one of them: a composite never gets worse there
//! than it was. Weights are evaluated rounded as they are written. Every domain counts alike, whatever its size.
//!
//! Everything drawn is drawn by the seed, and nothing depends on the time, so a run that was interrupted ends as it would have.

mod checkpoint;
mod objective;
mod optimiser;
mod parameters;
mod stream;

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use candle_core::{DType, Device, Tensor};
use rand::SeedableRng as _;
use rand_chacha::ChaCha8Rng;
use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};
use upcycle_architectures::{
    View, WeightsError,
    decoder::{Decoder, DecoderError, NoProbe},
};

pub use self::parameters::Scope;
use self::{
    checkpoint::State,
    objective::Piece,
    parameters::{Frozen, Parameters},
    stream::{Cutter, Stream},
};
use crate::{
    engine::tokenizer::{Tokenizer, TokenizerError},
    inspect::perplexity::{self, Window},
    plan::Composite,
    source::Source,
};

/// Counts changes of how training goes, so that a checkpoint is not gone on with by another.
const VERSION: u32 = 1;
/// Rows of a pass with gradients: what they take in memory grows with them.
const ROWS: usize = 512;
/// A checkpoint is written at every evaluation, and when the last one is older than this.
const CHECKPOINT: Duration = Duration::from_secs(60);

/// A text, and whose it is.
#[derive(Debug, Clone)]
pub struct Domain {
    /// as on the command line
    pub name: String,
    /// plain text, of any size
    pub file: PathBuf,
    /// the expert whose text it is
    pub expert: Option<usize>,
}

/// What the model is to expect.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Target {
    /// the text
    Text,
    /// what the text's expert expects in its own model (distillation, arXiv 1503.02531)
    Experts,
}

/// How to train.
#[derive(Debug, Clone)]
pub struct Settings {
    /// what is trained
    pub scope: Scope,
    /// steps of the routers' cross-entropy at most
    pub router_steps: usize,
    /// steps of the language model's loss at most
    pub steps: usize,
    /// pieces of each domain in a step
    pub batch: usize,
    /// tokens of a piece
    pub window: usize,
    /// pieces of each domain held out, at most
    pub held_out: usize,
    /// what the language model's loss is taken against
    pub target: Target,
    /// a step of rate h changes a weight by about h of its size
    pub rate: f64,
    /// factor on the load-balance term; 0: without
    pub balance: f64,
    /// steps between evaluations
    pub evaluate_every: usize,
    /// a stage ends after so many evaluations without a gain
    pub patience: usize,
    /// of everything drawn
    pub seed: u64,
}

/// A sparse model and its texts.
pub struct Task<'a> {
    /// the model
    pub composite: &'a Composite,
    /// its tokenizer
    pub tokenizer: &'a Tokenizer,
    /// at least one
    pub domains: &'a [Domain],
    /// the experts' own models in the order of their index, for [`Target::Experts`]
    pub experts: &'a [&'a Source],
    /// where to compute
    pub device: Device,
    /// in what type
    pub dtype: DType,
}

/// Parts of training, in their order.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub enum Stage {
    /// routers against labels
    Router,
    /// the language model's loss
    Language,
}

impl std::fmt::Display for Stage {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Router => "router",
            Self::Language => "language model",
        })
    }
}

/// Is told how training goes.
pub trait Progress {
    /// A stage begins, or goes on, with `done` of `steps` steps made.
    fn begin(&self, stage: Stage, done: usize, steps: usize);
    /// A step over so many tokens was made: its loss.
    fn step(&self, loss: f64, tokens: usize);
    /// The held-out loss after `step` steps of the stage; `best` if none was lower.
    fn evaluated(&self, stage: Stage, step: usize, loss: f64, best: bool);
    /// Something the user should know.
    fn note(&self, message: &str);
}

/// What came of it.
#[derive(Debug, Clone)]
pub struct Tuned {
    /// tensors that differ from the given ones, by their name in the checkpoint; none if nothing was gained
    pub changed: BTreeMap<String, View>,
    /// held-out loss of each domain as the model was given
    pub start: Vec<f64>,
    /// and with the changed tensors
    pub best: Vec<f64>,
    /// the stage, and its step, that they come from
    pub best_at: Option<(Stage, usize)>,
    /// how many numbers were trained
    pub parameters: usize,
    /// tokens trained on, over all runs
    pub tokens: u64,
}

/// Mean over domains; its exponential is the geometric mean of their perplexities.
pub fn mean(losses: &[f64]) -> f64 {
    losses.iter().sum::<f64>() / losses.len() as f64
}

/// Why nothing was trained.
#[derive(Debug, thiserror::Error)]
pub enum TuneError {
    /// A model without gates.
    #[error("the model is dense: it has no gates to tune; give a recipe, or the directory of a composite")]
    Dense,
    /// Nobody to learn from.
    #[error("to learn from the experts, their own models must be there, and every text must belong to one: give the recipe")]
    NoTeacher,
    /// No text.
    #[error("there is no text to train on")]
    NoText,
    /// Less text than pieces are needed.
    #[error(
        "text `{name}` has about {tokens} tokens; at least {least} pieces of {window} are needed, to train on some and hold out others: give \
         more text, or a smaller `--window`"
    )]
    Short {
        /// the text
        name: String,
        /// about
        tokens: u64,
        /// of a piece
        window: usize,
        /// pieces
        least: usize,
    },
    /// A file that holds something else.
    #[error("{}: byte {byte} is not UTF-8: give plain text", file.display())]
    NotText {
        /// the file
        file: PathBuf,
        /// where in it
        byte: u64,
    },
    /// Numbers that are none.
    #[error("the {stage} loss of step {step} is not a number: {advice}")]
    NotFinite {
        /// when
        stage: Stage,
        /// when
        step: usize,
        /// what to do
        advice: &'static str,
    },
    /// A checkpoint that cannot be gone on with.
    #[error("the checkpoint is damaged ({reason}): remove it to start over")]
    Checkpoint {
        /// what is wrong
        reason: String,
    },
    /// A file operation failed; the message names the file.
    #[error(transparent)]
    Io(#[from] std::io::Error),
    /// From the tokenizer.
    #[error(transparent)]
    Tokenizer(#[from] TokenizerError),
    /// From the weights.
    #[error(transparent)]
    Weights(#[from] WeightsError),
    /// From the decoder.
    #[error(transparent)]
    Decoder(#[from] DecoderError),
    /// From candle.
    #[error(transparent)]
    Tensor(#[from] candle_core::Error),
}

/// Trains. What is needed to go on after an interruption is kept in the file `checkpoint`, whose directory exists; it is the caller's to remove.
pub fn tune(task: &Task<'_>, settings: &Settings, checkpoint: &Path, progress: &dyn Progress) -> Result<Tuned, TuneError> {
    let plan = &task.composite.plan;
    if plan.config.moe.is_none() {
        return Err(TuneError::Dense);
    }
    let prefix: Vec<u32> = task.tokenizer.prefix()?.into_iter().collect();
    let cutter = Cutter { tokenizer: task.tokenizer, prefix, window: settings.window };
    let texts = task.domains.iter().map(|domain| Stream::open(&domain.name, &domain.file, settings.held_out, &cutter));
    let (streams, held_out): (Vec<Stream>, Vec<Vec<Window>>) = texts.collect::<Result<Vec<_>, _>>()?.into_iter().unzip();
    if streams.is_empty() {
        return Err(TuneError::NoText);
    }
    let decoder = Decoder::load(plan.family(), &plan.config, task.composite, task.dtype, &task.device)?;
    let parameters = Parameters::new(task.composite, settings.scope, settings.seed, &task.device)?;
    let mut teachers = BTreeMap::new();
    if settings.target == Target::Experts {
        for expert in task.domains.iter().filter_map(|domain| domain.expert) {
            let source = task.experts.get(expert).ok_or(TuneError::NoTeacher)?;
            let teacher = Decoder::load(source.family, &source.config, &*source.weights, task.dtype, &task.device)?;
            teachers.insert(expert, teacher);
        }
        if task.domains.iter().any(|domain| domain.expert.is_none()) {
            return Err(TuneError::NoTeacher);
        }
    }
    let mut run = Run { task, settings, cutter, streams, held_out, decoder, teachers, parameters, checkpoint, progress };
    let (mut state, mut best) = run.resume()?;
    // The one weight of a single choice is one, whatever the gate says.
    let mute = plan.config.moe.as_ref().is_some_and(|moe| moe.top_k == 1 && moe.normalise && moe.shared_ffn.is_none());
    let mute = mute && settings.scope == Scope::Gates && settings.balance == 0.0;
    if mute && settings.steps > 0 {
        progress.note(
            "with one expert per token, its weight is 1 and the language model's loss has no gradient for gates: that stage is left out",
        );
    }
    let language = if mute { 0 } else { settings.steps };
    for (stage, steps) in [(Stage::Router, settings.router_steps), (Stage::Language, language)] {
        if stage >= state.stage && steps > 0 {
            run.stage(stage, steps, &mut state, &mut best)?;
        }
    }
    run.set(&best)?;
    let changed = if state.best_at.is_some() { run.parameters.changed()? } else { BTreeMap::new() };
    let State { start, best, best_at, tokens, .. } = state;
    Ok(Tuned { changed, start, best, best_at, parameters: run.parameters.count(), tokens })
}

struct Run<'a> {
    task: &'a Task<'a>,
    settings: &'a Settings,
    cutter: Cutter<'a>,
    streams: Vec<Stream>,
    /// [domain]
    held_out: Vec<Vec<Window>>,
    /// as the model was given
    decoder: Decoder,
    /// by the expert's index
    teachers: BTreeMap<usize, Decoder>,
    parameters: Parameters,
    checkpoint: &'a Path,
    progress: &'a dyn Progress,
}

impl Run<'_> {
    /// Where an earlier run with the same settings was, or the start; and the best values of the slots.
    fn resume(&mut self) -> Result<(State, Vec<Tensor>), TuneError> {
        let key = self.key();
        match checkpoint::open(self.checkpoint) {
            Some((state, bytes)) if state.key == key => {
                let best = checkpoint::restore(&bytes, &mut self.parameters)?;
                self.progress.note(&format!("going on from step {} of the {} stage", state.step, state.stage));
                return Ok((state, best));
            }
            Some(_) => self.progress.note("the settings, the model or a text changed since the unfinished run: starting over"),
            None => {}
        }
        let start = self.evaluate(&self.decoder)?;
        if !mean(&start).is_finite() {
            return Err(TuneError::NotFinite { stage: Stage::Router, step: 0, advice: "the model's weights are damaged" });
        }
        self.progress.evaluated(Stage::Router, 0, mean(&start), true);
        let best = start.clone();
        let state = State { key, stage: Stage::Router, step: 0, start, best, best_at: None, stale: 0, tokens: 0 };
        Ok((state, self.values()?))
    }

    /// From the best state so far, or where `state` is in this stage.
    fn stage(&mut self, stage: Stage, steps: usize, state: &mut State, best: &mut Vec<Tensor>) -> Result<(), TuneError> {
        if stage > state.stage || state.step == 0 {
            self.set(best)?;
            for slot in &mut self.parameters.slots {
                slot.reset()?;
            }
            *state = State { stage, step: 0, stale: 0, ..state.clone() };
        }
        // Routers are labelled at what they see now; they need no gradient of what is in front of them.
        let frozen = if stage == Stage::Router { Frozen::Yes } else { Frozen::No };
        let decoder = self.parameters.placed(&self.decoder, frozen)?;
        self.progress.begin(stage, state.step, steps);
        let mut saved = Instant::now();
        while state.step < steps && state.stale < self.settings.patience {
            state.step += 1;
            let (loss, tokens) = self.step(&decoder, stage, state.step, steps)?;
            state.tokens += tokens as u64;
            self.progress.step(loss, tokens);
            let evaluated = state.step.is_multiple_of(self.settings.evaluate_every) || state.step == steps;
            if evaluated {
                let losses = self.evaluate(&self.parameters.written(&self.decoder)?)?;
                let gained = mean(&losses) < mean(&state.best);
                self.progress.evaluated(stage, state.step, mean(&losses), gained);
                state.stale += 1;
                if gained {
                    *best = self.values()?;
                    *state = State { best: losses, best_at: Some((stage, state.step)), stale: 0, ..state.clone() };
                }
            }
            if evaluated || saved.elapsed() > CHECKPOINT {
                checkpoint::save(self.checkpoint, state, &self.parameters, best)?;
                saved = Instant::now();
            }
        }
        Ok(())
    }

    /// One step: its loss, and how many tokens it was over.
    fn step(&mut self, decoder: &Decoder, stage: Stage, step: usize, steps: usize) -> Result<(f64, usize), TuneError> {
        let pieces = self.pieces(stage, step)?;
        let tokens = pieces.iter().map(|piece| piece.window.tokens.len()).sum();
        let mut loss = 0.0;
        let mut rest = pieces.as_slice();
        while let Some(first) = rest.first() {
            let (mut count, mut rows) = (1, first.window.tokens.len());
            while let Some(next) = rest.get(count).filter(|next| rows + next.window.tokens.len() <= ROWS) {
                (count, rows) = (count + 1, rows + next.window.tokens.len());
            }
            let (together, others) = rest.split_at(count);
            let gates = self.parameters.gates();
            let (total, told) = match stage {
                Stage::Router => {
                    let loss = objective::router_loss(decoder, gates, together)?;
                    (loss.clone(), loss)
                }
                Stage::Language => {
                    let losses = objective::language_loss(decoder, gates, together, &self.teachers, self.settings.balance)?;
                    (losses.total, losses.language)
                }
            };
            loss += f64::from(told.to_scalar::<f32>()?);
            if !loss.is_finite() || !total.to_scalar::<f32>()?.is_finite() {
                return Err(TuneError::NotFinite { stage, step, advice: "try a lower `--learning-rate`" });
            }
            if total.track_op() {
                let gradients = total.backward()?;
                self.parameters.accumulate(&gradients)?;
            }
            rest = others;
        }
        optimiser::step(&mut self.parameters.slots, step, optimiser::scheduled(self.settings.rate, step, steps))?;
        Ok((loss, tokens))
    }

    /// The pieces of a step: as many of each domain, and each domain's tokens together count one over the number of domains.
    fn pieces(&self, stage: Stage, step: usize) -> Result<Vec<Piece>, TuneError> {
        let mut pieces = Vec::new();
        for (domain, stream) in self.streams.iter().enumerate() {
            let place = [self.settings.seed, stage as u64, step as u64, domain as u64];
            let mut rng =
                ChaCha8Rng::from_seed(place.iter().fold(Sha256::new(), |hash, n| hash.chain_update(n.to_le_bytes())).finalize().into());
            let windows = (0..self.settings.batch).map(|_| stream.draw(&mut rng, &self.cutter)).collect::<Result<Vec<_>, _>>()?;
            let counted = |window: &Window| match stage {
                Stage::Router => window.tokens.len() - window.prefix,
                Stage::Language => window.scored().len(),
            };
            let counted: usize = windows.iter().map(counted).sum();
            let weight = 1.0 / (self.streams.len() * counted.max(1)) as f64;
            let expert = self.task.domains[domain].expert;
            pieces.extend(windows.into_iter().map(|window| Piece { window, expert, weight }));
        }
        Ok(pieces)
    }

    /// Loss per held-out token of each domain.
    fn evaluate(&self, decoder: &Decoder) -> Result<Vec<f64>, TuneError> {
        let loss = |windows: &Vec<Window>| Ok(perplexity::mean(&perplexity::losses(decoder, windows, &mut NoProbe, &mut |_| {})?));
        self.held_out.iter().map(loss).collect()
    }

    fn values(&self) -> Result<Vec<Tensor>, TuneError> {
        Ok(self.parameters.slots.iter().map(|slot| slot.var.copy().map(|value| value.detach())).collect::<Result<_, _>>()?)
    }

    fn set(&self, values: &[Tensor]) -> Result<(), TuneError> {
        Ok(self.parameters.slots.iter().zip(values).try_for_each(|(slot, value)| slot.var.set(value))?)
    }

    /// Of everything that decides the outcome.
    fn key(&self) -> String {
        let mut hash = Sha256::new().chain_update(format!("{VERSION} {:?} {:?}", self.settings, self.task.dtype));
        hash.update(self.task.composite.fingerprint());
        for (domain, stream) in self.task.domains.iter().zip(&self.streams) {
            hash.update(format!("{domain:?} {}", stream.stamp()));
        }
        hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect()
    }
}
