//! What a composite's routers see in text of each expert's domain, to be kept in a file, merged with others', and turned into gates without
//! the text.
//!
//! Each text runs through the composite with its own expert forced in every layer, whatever the gates say ([`Routing::Forced`]). So what is
//! gathered depends on the shared weights and that one expert alone: statistics of several people, each with one expert, belong together, gates
//! may be fitted again and again, and an expert that is added leaves the statistics of the others as they are. What routers see when the
//! composite is served, with several experts mixed ([`Routing::Own`]), makes somewhat better gates, but depends on all experts.
//!
//! Of each text a sample of tokens is kept, the router inputs of all layers of each. L sparse layers, D hidden, E experts, n tokens kept.

mod file;
mod fingerprint;
mod gather;

use std::path::{Path, PathBuf};

use bytes::Bytes;
use half::f16;
use serde::{Deserialize, Serialize};
use upcycle_architectures::{WeightsError, decoder::DecoderError};
use upcycle_routers::{
    init::{self, Candidate, FitError, Fitted},
    statistics::{LayerStatistics, Shape},
};

pub use self::{file::read, fingerprint::Fingerprint, gather::gather};
use super::FOLDS;

/// Who chose the experts while statistics were gathered.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Routing {
    /// nobody: every token of a text ran through its expert alone
    Forced,
    /// the composite's gates
    Own,
}

/// Statistics of some or all experts of a composite.
#[derive(Debug, Clone, PartialEq)]
pub struct Stats {
    /// of the text's tokens
    pub routing: Routing,
    /// fingerprint of what they depend on beside a text's expert: see [`Fingerprint::of_routing`]
    pub composite: String,
    /// L
    pub layers: usize,
    /// D
    pub hidden: usize,
    /// of each expert that there was text for
    pub experts: Vec<Domain>,
}

/// What the routers see in text of one expert's domain.
#[derive(Debug, Clone, PartialEq)]
pub struct Domain {
    /// the expert
    pub expert: ExpertId,
    /// [`FOLDS`] parts of the text
    folds: Vec<Part>,
}

/// Which expert it is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ExpertId {
    /// what it is called
    pub name: String,
    /// the fingerprint of its weights
    pub weights: String,
}

/// A sample of one part of a text.
#[derive(Debug, Clone, Default, PartialEq)]
struct Part {
    /// tokens that the sample stands for
    seen: u64,
    /// `[n]`, the hashes by which tokens are chosen: the smallest are kept
    keys: Vec<u64>,
    /// [n, L, D], f16, little endian
    rows: Bytes,
}

/// Why there are no statistics, or no gates from them.
#[derive(Debug, thiserror::Error)]
pub enum StatsError {
    /// A file could not be read or written; the message names it.
    #[error(transparent)]
    Io(#[from] std::io::Error),
    /// A file that holds something else, or is damaged.
    #[error("{} holds no statistics that can be used: {reason}", .file.display())]
    File {
        /// the file
        file: PathBuf,
        /// what is wrong
        reason: String,
    },
    /// Statistics of another composite.
    #[error("{left} and {right} do not belong together: {what}")]
    Other {
        /// a file or model
        left: String,
        /// a file or model
        right: String,
        /// what differs
        what: String,
    },
    /// An expert without statistics.
    #[error("there are no statistics of expert `{expert}`, only of {found}: gather them with `upcycle stats MODEL --text {expert}=FILE`")]
    NoDomain {
        /// its name
        expert: String,
        /// the names of those that there are
        found: String,
    },
    /// A model that routes nothing.
    #[error("`{model}` is a dense model: only a Mixture-of-Experts has routers to gather statistics of")]
    Dense {
        /// the model
        model: String,
    },
    /// A router input that no half-precision number holds.
    #[error("layer {layer}: a router input is not finite, or too large for f16: the model's states overflow, or its weights are damaged")]
    NotFinite {
        /// the layer
        layer: usize,
    },
    /// The statistics give no gate.
    #[error("sparse layer {layer}: {cause}")]
    Gate {
        /// which of the sparse layers
        layer: usize,
        /// why
        cause: FitError,
    },
    /// The model could not be read.
    #[error(transparent)]
    Weights(#[from] WeightsError),
    /// The model could not be run.
    #[error(transparent)]
    Decoder(#[from] DecoderError),
}

impl Stats {
    /// Adds statistics of other text; `ours` and `theirs` are what they are called in messages. What is the same in both counts once.
    pub fn merge(&mut self, other: &Self, ours: &str, theirs: &str) -> Result<(), StatsError> {
        self.check(other, ours, theirs)?;
        let differ = |what: String| StatsError::Other { left: ours.to_owned(), right: theirs.to_owned(), what };
        let width = self.width();
        for domain in &other.experts {
            match self.experts.iter_mut().find(|own| own.expert.name == domain.expert.name) {
                Some(own) if own.expert != domain.expert => {
                    return Err(differ(format!("expert `{}` is not the same model in both", domain.expert.name)));
                }
                Some(own) => own.folds.iter_mut().zip(&domain.folds).for_each(|(own, part)| own.merge(part, width)),
                None => self.experts.push(domain.clone()),
            }
        }
        Ok(())
    }

    /// Whether both are statistics of the same composite. `ours` and `theirs` are what they are called in messages.
    pub fn check(&self, other: &Self, ours: &str, theirs: &str) -> Result<(), StatsError> {
        let what = if (self.layers, self.hidden) != (other.layers, other.hidden) {
            let (layers, hidden) = (other.layers, other.hidden);
            format!("one is of {} routers of width {}, the other of {layers} of width {hidden}", self.layers, self.hidden)
        } else if self.routing != other.routing {
            "one was gathered under the composite's own routing, the other with experts forced".to_owned()
        } else if self.composite != other.composite {
            match self.routing {
                Routing::Forced => "they are of composites with different shared weights".to_owned(),
                Routing::Own => "they are of different composites, and were gathered under their own routing".to_owned(),
            }
        } else {
            return Ok(());
        };
        Err(StatsError::Other { left: ours.to_owned(), right: theirs.to_owned(), what })
    }

    /// Keeps at most about `tokens` tokens of each expert.
    pub fn limit(&mut self, tokens: usize) {
        let width = self.width();
        self.experts.iter_mut().flat_map(|domain| &mut domain.folds).for_each(|part| part.cut(tokens.div_ceil(FOLDS), width));
    }

    /// Where the statistics of each of these experts stand: under the same weights, and if there are several under the same name.
    pub fn find(&self, experts: &[ExpertId]) -> Result<Vec<usize>, StatsError> {
        let found = || self.experts.iter().map(|domain| format!("`{}`", domain.expert.name)).collect::<Vec<_>>().join(", ");
        let place = |expert: &ExpertId| {
            let exact = self.experts.iter().position(|domain| domain.expert == *expert);
            exact.or_else(|| self.experts.iter().position(|domain| domain.expert.weights == expert.weights))
        };
        experts
            .iter()
            .map(|expert| place(expert).ok_or_else(|| StatsError::NoDomain { expert: expert.name.clone(), found: found() }))
            .collect()
    }

    /// Puts statistics in place of those of the same expert, and of any that is called so.
    pub fn replace(&mut self, domain: Domain) {
        self.experts.retain(|old| old.expert.weights != domain.expert.weights && old.expert.name != domain.expert.name);
        self.experts.push(domain);
    }

    /// Those of these experts alone, in their order and under their names.
    pub fn of(&self, experts: &[ExpertId]) -> Result<Self, StatsError> {
        let places = self.find(experts)?;
        let domain = |(expert, at): (&ExpertId, usize)| Domain { expert: expert.clone(), ..self.experts[at].clone() };
        Ok(Self { experts: experts.iter().zip(places).map(domain).collect(), composite: self.composite.clone(), ..*self })
    }

    /// Fits the gates of all sparse layers: row e to what stands at `order[e]`. `done` is told of every layer. Takes memory for E moments of
    /// [D, D]: [`check`](Self::check) first that D is that of a model.
    pub fn gates(&self, order: &[usize], candidates: &[Candidate], done: &dyn Fn(usize)) -> Result<Vec<Fitted>, StatsError> {
        let kept = order.iter().flat_map(|&at| &self.experts[at].folds).map(|part| part.keys.len()).max().unwrap_or(0);
        let shape = Shape { hidden: self.hidden, domains: order.len(), folds: FOLDS, rows: kept * FOLDS };
        let layer = |layer: usize| {
            let mut statistics = LayerStatistics::new(shape);
            for (domain, &at) in order.iter().enumerate() {
                for (fold, part) in self.experts[at].folds.iter().enumerate() {
                    statistics.add_sample(domain, fold, &self.rows(part, layer), part.seen)?;
                }
            }
            let fitted = init::fit(candidates, &statistics)?;
            done(layer + 1);
            Ok(fitted)
        };
        (0..self.layers).map(|l| layer(l).map_err(|cause| StatsError::Gate { layer: l, cause })).collect()
    }

    /// One layer's router inputs, [n, D].
    fn rows(&self, part: &Part, layer: usize) -> Vec<f32> {
        let size = self.hidden * 2;
        let of_layer = part.rows.chunks_exact(self.width()).flat_map(|token| token[layer * size..][..size].chunks_exact(2));
        of_layer.map(|bytes| f16::from_le_bytes([bytes[0], bytes[1]]).to_f32()).collect()
    }

    /// Bytes of one token's router inputs.
    fn width(&self) -> usize {
        self.layers * self.hidden * 2
    }

    /// Writes the file, whole or not at all.
    pub fn write(&self, path: &Path) -> Result<(), StatsError> {
        file::write(self, path)
    }
}

impl Domain {
    /// Tokens that the sample stands for.
    pub fn seen(&self) -> u64 {
        self.folds.iter().map(|part| part.seen).sum()
    }

    /// n, of all folds
    pub fn kept(&self) -> usize {
        self.folds.iter().map(|part| part.keys.len()).sum()
    }
}

impl Part {
    /// Both samples as one. Where one is of few tokens out of many, as few are kept of the other, so that all are as likely to be kept.
    fn merge(&mut self, other: &Self, width: usize) {
        if self == other {
            return;
        }
        let thinned = [&*self, other].into_iter().filter(|part| part.seen > part.keys.len() as u64);
        let largest = thinned.filter_map(|part| part.keys.iter().max()).min().copied();
        let both = Self {
            seen: self.seen + other.seen,
            keys: [&self.keys[..], &other.keys].concat(),
            rows: [&self.rows[..], &other.rows].concat().into(),
        };
        *self = largest.map_or_else(|| both.clone(), |largest| both.up_to(largest, width));
    }

    /// At most `limit` tokens of the sample.
    fn cut(&mut self, limit: usize, width: usize) {
        if self.keys.len() > limit && limit > 0 {
            let largest = *self.keys.clone().select_nth_unstable(limit - 1).1;
            *self = self.up_to(largest, width);
        }
    }

    fn up_to(&self, largest: u64, width: usize) -> Self {
        let kept = self.keys.iter().zip(self.rows.chunks_exact(width)).filter(|(key, _)| **key <= largest);
        let (keys, rows): (Vec<u64>, Vec<&[u8]>) = kept.unzip();
        Self { seen: self.seen, keys, rows: rows.concat().into() }
    }
}
