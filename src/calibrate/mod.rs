//! What a composite needs besides its plan: gates from the experts' prompts in the base, as mergekit makes them (`prompts`, `states`), or gates,
//! shared weights and repaired experts fitted to text (`text`, `sweep`, `fit`); and gates alone, from statistics that are kept in files (`stats`).
//!
//! What is gathered is only what the recipe's method needs: a model is made for states, embedding rows are read for `cheap_embed`, and
//! nothing is touched for drawn gates. Dimensions: L layers, E experts, D hidden.

mod drift;
mod fit;
mod prompts;
mod solve;
mod states;
pub mod stats;
mod store;
mod subspace;
mod sweep;
pub mod text;

use upcycle_architectures::{
    WeightsError,
    decoder::{Decoder, DecoderError},
};
use upcycle_routers::{
    diagnose::{self, diagnose},
    gate::Gate,
    init::{DEFAULT_SEED, FitError, How, Needs, Shape, Statistics},
};

use self::prompts::Tokenized;
pub use self::{
    drift::{advice, drift, settle},
    fit::fit,
    store::{Found, Store},
    subspace::subspace,
};
use crate::{
    engine::{template::TemplateError, tokenizer::TokenizerError},
    plan::Gates,
    recipe::{Expert, Recipe},
    source::Source,
};

/// Parts of each expert's text; what is fitted is judged by a part that it was not fitted to.
const FOLDS: usize = 4;

/// A recipe's gates, and how good they look.
#[derive(Debug)]
pub struct Calibrated {
    /// those of the experts, and the shared expert's if that one has prompts or the method needs none
    pub gates: Gates,
    /// one per layer, over all rows: the experts in their order, then the shared one
    pub diagnosis: Vec<diagnose::Layer>,
    /// what the user should know, a line each
    pub warnings: Vec<String>,
}

/// Why there are no gates.
#[derive(Debug, thiserror::Error)]
pub enum CalibrateError {
    /// A prompt could not be tokenized.
    #[error(transparent)]
    Tokenizer(#[from] TokenizerError),
    /// A prompt could not be wrapped.
    #[error(transparent)]
    Template(#[from] TemplateError),
    /// There is nothing to wrap a prompt in.
    #[error(
        "the recipe says `chat_template: true`, but base model `{base}` has no chat template (leave it out, or use an instruct model as base)"
    )]
    NoTemplate {
        /// the base
        base: String,
    },
    /// A prompt without a single token.
    #[error("expert `{expert}`: prompt {prompt:?} has no tokens in the base's tokenizer")]
    Empty {
        /// the expert
        expert: String,
        /// its text
        prompt: String,
    },
    /// There is no text to gather statistics on.
    #[error(transparent)]
    Text(#[from] text::TextError),
    /// A token that the base's embedding does not have.
    #[error(
        "expert `{expert}`: token {token} of a prompt is not in the base's vocabulary of {vocab}: its tokenizer and its weights do not match"
    )]
    Token {
        /// the expert
        expert: String,
        /// the id
        token: u32,
        /// V
        vocab: usize,
    },
    /// Weights that overflow or are broken.
    #[error("expert `{expert}`: the base's states for its prompts are not finite in layer {layer}: the base's weights are damaged")]
    NotFinite {
        /// the expert
        expert: String,
        /// the layer that they enter
        layer: usize,
    },
    /// The base's weights could not be read.
    #[error(transparent)]
    Weights(#[from] WeightsError),
    /// A layer's inputs do not determine what is to be fitted.
    #[error(transparent)]
    Singular(#[from] upcycle_routers::linalg::Singular),
    /// What the routers see determines no gate.
    #[error("layer {layer}: {cause}")]
    Gate {
        /// the layer
        layer: usize,
        /// what is missing
        cause: FitError,
    },
    /// Gates that take a sweep over the composite were asked for from the base alone.
    #[error("`{method}` gates are fitted to the composite's routers; the base's states for prompts give none")]
    Fitted {
        /// the gate mode
        method: &'static str,
    },
    /// The cache of fits could not be written.
    #[error(transparent)]
    Io(#[from] std::io::Error),
    /// A tensor operation failed.
    #[error(transparent)]
    Tensor(#[from] candle_core::Error),
    /// There is nothing to fit.
    #[error("there are no dense experts to fit")]
    NoExperts,
    /// The base could not be run.
    #[error(transparent)]
    Decoder(#[from] DecoderError),
}

/// The gates that the recipe asks for. `decoder` makes the base's decoder; it is called only if the method needs states.
///
/// mergekit-moe runs the base in bf16. With the same weights run in f32, as on the CPU here, rows keep a cosine of 0.9999 and more to its.
pub fn gates(
    recipe: &Recipe,
    base: &Source,
    decoder: impl FnOnce() -> Result<Decoder, DecoderError>,
) -> Result<Calibrated, CalibrateError> {
    let How::Prompts { needs, init } = recipe.gate_mode.how else {
        return Err(CalibrateError::Fitted { method: recipe.gate_mode.name });
    };
    let rows: Vec<&Expert> = recipe.gated().collect();
    let names = names(&rows);
    let mut warnings = Vec::new();
    let statistics = if needs == Needs::Nothing {
        Statistics::default()
    } else {
        let Tokenized { experts, pad } = prompts::tokenize(recipe, base, &rows, &names, &mut warnings)?;
        let layers = match needs {
            Needs::Nothing | Needs::Embeddings => states::embeddings(base, &experts)?,
            Needs::LastState => states::run(&decoder()?, &experts, states::Pool::Last)?,
            Needs::MeanState => states::run(&decoder()?, &experts, states::Pool::Mean { pad })?,
        };
        Statistics { layers }
    };
    let shape =
        Shape { layers: base.config.layers, experts: rows.len(), hidden: base.config.hidden, seed: recipe.seed.unwrap_or(DEFAULT_SEED) };
    let all = init(shape, &statistics);
    let diagnosis = diagnose(&all);
    warnings.extend(diagnose::warnings(&diagnosis, &names.iter().map(String::as_str).collect::<Vec<_>>()));
    let (routed, shared): (Vec<Gate>, Vec<Gate>) = all.into_iter().map(|gate| gate.split(recipe.experts.len())).unzip();
    let shared = if rows.len() > recipe.experts.len() { shared } else { Vec::new() };
    Ok(Calibrated { gates: Gates { routed, shared }, diagnosis, warnings })
}

/// What to call the experts: the last part of their path if that tells them apart, else all of it.
pub fn names(experts: &[&Expert]) -> Vec<String> {
    let full: Vec<String> = experts.iter().map(|expert| expert.source_model.to_string()).collect();
    let short: Vec<&str> = full.iter().map(|name| name.trim_end_matches('/').rsplit('/').next().unwrap_or(name)).collect();
    let unique = |name: &&str| short.iter().filter(|other| *other == name).count() == 1;
    if short.iter().all(unique) { short.iter().map(ToString::to_string).collect() } else { full }
}
