//! The text that statistics are gathered on: a file where the recipe names one, otherwise what each expert writes itself. Of a short file an
//! expert goes on from many places: a few KB with what it makes of them are worth nearly as much as tens of KB.
//!
//! What is known here is which tokens say something about an expert: those of its text, not the BOS in front of it, not the chat template
//! around it, and not a system prompt, which is the same in every chat. What is done with the text is not known here, but for one thing: gates are
//! shown more beginnings of texts than there are (`openings`).

mod cache;
mod encode;
mod files;
mod openings;
mod starts;
mod write;

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
};

use serde::{Deserialize, Serialize};
use upcycle_architectures::{
    Config,
    decoder::{Decoder, DecoderError},
};
use upcycle_routers::init::DEFAULT_SEED;

use self::{
    encode::Encoder,
    write::{Author, Written},
};
use super::{CalibrateError, names};
use crate::{
    engine::{template::TemplateError, tokenizer::TokenizerError},
    plan::Sources,
    recipe::Recipe,
    source::{Sidecar, Source},
};

/// One stretch of text of one expert, to be run from its first token.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Sequence {
    /// T
    pub tokens: Vec<u32>,
    /// which of them count [T]
    pub counts: Vec<bool>,
    /// whether they are the beginning of what is in another sequence already: gates are fitted to it, and nothing else
    #[serde(skip)]
    pub opening: bool,
}

/// The text of every expert.
#[derive(Debug)]
pub struct Corpus {
    /// in the order of the recipe's experts
    pub experts: Vec<Vec<Sequence>>,
    /// where each one's text comes from
    pub origin: Vec<Origin>,
    /// what the user should know, a line each
    pub warnings: Vec<String>,
}

/// Where an expert's text comes from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Origin {
    /// its `text_file`
    File(PathBuf),
    /// its `text_file`, which is short, and what the expert wrote going on from places in it
    Continued {
        /// the file
        file: PathBuf,
        /// and not just now
        cached: bool,
    },
    /// the expert wrote it
    Written {
        /// in what form
        form: Form,
        /// and not just now
        cached: bool,
    },
}

/// What an expert is shown when it is to write.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Form {
    /// a prompt, to be gone on from
    Plain,
    /// a prompt as a user's message in the chat template, to be answered
    Chat,
}

/// How much text there shall be.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TextOptions {
    /// tokens that count, per expert, of a file that has more
    pub tokens: usize,
    /// tokens that count below which an expert goes on from its file
    pub short: usize,
    /// tokens of one sequence of plain text
    pub window: usize,
    /// texts that an expert without a file writes
    pub continuations: usize,
    /// tokens of one of them at most
    pub length: usize,
    /// tokens of plain text of which a few are an opening; none is taken if 0
    pub opening: usize,
    /// texts that are written together: as many as fit in memory; the text does not depend on it
    pub batch: usize,
    /// directory in which written text is kept
    pub cache: Option<PathBuf>,
}

impl Default for TextOptions {
    fn default() -> Self {
        Self { tokens: 8192, short: 4096, window: 256, continuations: 48, length: 128, opening: 16, batch: 16, cache: None }
    }
}

/// Why there is no text.
#[derive(Debug, thiserror::Error)]
pub enum TextError {
    /// A file cannot be read; the message names it.
    #[error(transparent)]
    Read(#[from] std::io::Error),
    /// A file holds what is no text.
    #[error("cannot take text from {place}: {reason}")]
    File {
        /// the file, and the line in it
        place: String,
        /// what is wrong
        reason: String,
    },
    /// A file or an expert without a token that counts.
    #[error("expert `{expert}` has no text: {reason}")]
    None {
        /// the expert
        expert: String,
        /// what is missing, and what to do
        reason: String,
    },
    /// Logits that are not numbers.
    #[error("expert `{expert}` cannot write: its logits are not numbers, its weights are damaged")]
    NotFinite {
        /// the expert
        expert: String,
    },
    /// Tokens of text could not be had.
    #[error(transparent)]
    Tokenizer(#[from] TokenizerError),
    /// Messages could not be wrapped.
    #[error(transparent)]
    Template(#[from] TemplateError),
    /// An expert's model could not be made or run.
    #[error(transparent)]
    Decoder(#[from] DecoderError),
}

/// The text of every expert of the recipe: `text_file` if it has one, with what the expert makes of it if it is short; otherwise what it
/// writes going on from its prompts.
///
/// `decoder` makes an expert's own model. It is called only for experts that write, one after another, and not where their text is in the
/// cache. `progress` is told what is being done.
pub fn corpus(
    recipe: &Recipe,
    sources: &Sources,
    options: &TextOptions,
    decoder: &dyn Fn(&Source) -> Result<Decoder, DecoderError>,
    progress: &dyn Fn(&str),
) -> Result<Corpus, CalibrateError> {
    let encoder = Encoder::open(recipe, sources)?;
    let names = names(&recipe.experts.iter().collect::<Vec<_>>());
    let mut corpus = Corpus { experts: Vec::new(), origin: Vec::new(), warnings: Vec::new() };
    for (expert, name) in recipe.experts.iter().zip(&names) {
        let source = sources.get(&expert.source_model);
        let seed = recipe.seed.unwrap_or(DEFAULT_SEED);
        let author = |form, starts, options| Author { name, expert, source, form, starts, seed, encoder: &encoder, options, progress };
        let (sequences, origin) = if let Some(file) = &expert.text_file {
            progress(&format!("{name}: reading {}", file.display()));
            let mut sequences = files::read(file, &encoder, options)?;
            let counted: usize = sequences.iter().map(Sequence::counted).sum();
            if (1..options.short).contains(&counted) {
                let starts = starts::snippets(&sequences, options.continuations, &encoder);
                let options = TextOptions {
                    continuations: options.continuations.min((options.tokens - counted).div_ceil(options.length)),
                    ..options.clone()
                };
                let (written, cached) =
                    written(&author(Some(Form::Plain), starts, &options), sources.base(), decoder, &mut corpus.warnings)?;
                sequences.extend(written.sequences);
                (sequences, Origin::Continued { file: file.clone(), cached })
            } else {
                (sequences, Origin::File(file.clone()))
            }
        } else {
            let form = starts::form(recipe, sources, &encoder)?;
            let (written, cached) = written(&author(form, Vec::new(), options), sources.base(), decoder, &mut corpus.warnings)?;
            (written.sequences, Origin::Written { form: written.form, cached })
        };
        if !sequences.iter().any(|sequence| sequence.counts.contains(&true)) {
            let reason = match &origin {
                Origin::File(file) | Origin::Continued { file, .. } => format!("`{}` is empty", file.display()),
                Origin::Written { .. } => "what it writes is empty or only repeats itself; give it a `text_file`".to_owned(),
            };
            return Err(TextError::None { expert: name.clone(), reason }.into());
        }
        corpus.experts.push(openings::among(sequences, options.opening, &encoder));
        corpus.origin.push(origin);
    }
    Ok(corpus)
}

/// A file's text for a model with this config and these files beside it: about `options.tokens` tokens that count, spread evenly over the file.
pub fn read(file: &Path, sidecars: &BTreeMap<String, Sidecar>, config: &Config, options: &TextOptions) -> Result<Vec<Sequence>, TextError> {
    let sequences = files::read(file, &Encoder::of(sidecars, config)?, options)?;
    if sequences.is_empty() {
        return Err(TextError::File { place: file.display().to_string(), reason: "it is empty".to_owned() });
    }
    Ok(sequences)
}

/// What an expert wrote, and whether that was before now.
fn written(
    author: &Author<'_>,
    base: &Source,
    decoder: &dyn Fn(&Source) -> Result<Decoder, DecoderError>,
    warnings: &mut Vec<String>,
) -> Result<(Written, bool), CalibrateError> {
    let starts = author.starts()?;
    let file = author.options.cache.as_deref().map(|cache| cache::file(cache, author, base, &starts));
    let found = file.as_deref().and_then(cache::load);
    let cached = found.is_some();
    let written = if let Some(written) = found {
        written
    } else {
        (author.progress)(&format!("{}: loading", author.name));
        let written = write::write(author, &decoder(author.source).map_err(TextError::from)?, &starts)?;
        if let Some(Err(error)) = file.map(|file| cache::store(&file, &written)) {
            warnings.push(format!("what expert `{}` wrote cannot be kept for the next time: {error}", author.name));
        }
        written
    };
    if written.dropped > 0 {
        let (name, dropped, all) = (author.name, written.dropped, written.dropped + written.sequences.len());
        warnings.push(format!("expert `{name}`: {dropped} of the {all} texts that it wrote only repeat themselves and are left out"));
    }
    let TextOptions { continuations, length, .. } = *author.options;
    let counted: usize = written.sequences.iter().map(Sequence::counted).sum();
    if 4 * counted < (continuations - continuations.min(written.dropped)) * length {
        let (name, all) = (author.name, continuations * length);
        warnings
            .push(format!("expert `{name}` ends its texts early: they have {counted} tokens, not {all}; a `text_file` would tell more"));
    }
    Ok((written, cached))
}
