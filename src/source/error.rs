//! Why a model could not be opened: every message names the file and says what to do.

use std::path::PathBuf;

use upcycle_architectures::ConfigError;

/// Why a model could not be opened.
#[derive(Debug, thiserror::Error)]
pub enum SourceError {
    /// The file system said no; the message names the file.
    #[error(transparent)]
    Io(#[from] std::io::Error),
    /// There is no such path, and it is no Hub name either.
    #[error("`{name}` is neither a file nor a directory here, nor a name on the Hub (`owner/name[@revision]`); check the path")]
    NotFound {
        /// as the user wrote it
        name: String,
    },
    /// Something that only the Hub could have, and the Hub is not asked.
    #[error("`{model}` is not a path here, its {missing} is not in the Hub's cache (`{}`), and {why}", cache.display())]
    NotCached {
        /// owner/name@revision
        model: String,
        /// what is missing
        missing: String,
        /// the cache
        cache: PathBuf,
        /// why it is not fetched
        why: &'static str,
    },
    /// The Hub has nothing of this name, or does not show it.
    #[error("`{model}` is not a path here, and {endpoint} answered {status}: {hint}")]
    Refused {
        /// owner/name@revision
        model: String,
        /// the Hub
        endpoint: String,
        /// HTTP status
        status: u16,
        /// what to do
        hint: &'static str,
    },
    /// The Hub could not be reached, or broke off.
    #[error("cannot fetch {what} of `{model}`: {reason}; what has arrived is kept: run the command again to go on")]
    Network {
        /// owner/name@revision
        model: String,
        /// listing or file
        what: String,
        /// what went wrong
        reason: String,
    },
    /// The Hub answered something that cannot be used.
    #[error("{endpoint} answered about `{model}`: {reason}")]
    Protocol {
        /// owner/name@revision
        model: String,
        /// the Hub
        endpoint: String,
        /// what is wrong with it
        reason: String,
    },
    /// A download whose bytes are not those that the Hub announced.
    #[error("{file} of `{model}` arrived as {found}, but the Hub announced {expected}; the download was deleted: run the command again")]
    Corrupt {
        /// owner/name@revision
        model: String,
        /// the file
        file: String,
        /// bytes or SHA-256
        expected: String,
        /// bytes or SHA-256
        found: String,
    },
    /// A file that no model is read from.
    #[error("`{}` is not a model; name its directory, or a .gguf file", file.display())]
    NotAModel {
        /// the file
        file: PathBuf,
    },
    /// A directory or repository without weights.
    #[error(
        "`{place}` holds no weights; a model is config.json with model.safetensors (or its shards and index), a PEFT adapter, or one .gguf file"
    )]
    NoWeights {
        /// directory or repository
        place: String,
    },
    /// Weights only as pickles, which can run code when they are read.
    #[error(
        "`{place}` has its weights only as PyTorch pickles (`{file}`), which are not read because they can run code; convert them: \
         `AutoModelForCausalLM.from_pretrained(dir).save_pretrained(out, safe_serialization=True)`"
    )]
    Pickle {
        /// directory or repository
        place: String,
        /// one of them
        file: String,
    },
    /// Several candidates.
    #[error("`{place}` has several {kind} files and nothing says which one is the model: {}; {remedy}", files.join(", "))]
    Ambiguous {
        /// directory or repository
        place: String,
        /// safetensors or GGUF
        kind: &'static str,
        /// all of them
        files: Vec<String>,
        /// what to do
        remedy: &'static str,
    },
    /// Weights without a config.
    #[error("`{place}` has weights but no config.json; copy it from the model that was fine-tuned")]
    NoConfig {
        /// directory or repository
        place: String,
    },
    /// A directory that a compose did not finish.
    #[error("`{place}` was not finished by `upcycle compose`; run the same compose again, it goes on from there")]
    Unfinished {
        /// the directory
        place: String,
    },
    /// A file that should be JSON.
    #[error("{}:{line}:{column}: not valid JSON: {reason}", file.display())]
    Json {
        /// the file
        file: PathBuf,
        /// from 1
        line: usize,
        /// from 1
        column: usize,
        /// what the parser says
        reason: String,
    },
    /// A config that makes no model of ours.
    #[error("`{}`: {source}", place.display())]
    Config {
        /// directory, or the GGUF that it was made from
        place: PathBuf,
        /// what is wrong with it
        source: ConfigError,
    },
    /// A broken safetensors file.
    #[error("`{}` cannot be read: {reason}", file.display())]
    Safetensors {
        /// the file
        file: PathBuf,
        /// what is wrong and what to do
        reason: String,
    },
    /// A broken index.
    #[error("{}: {reason}", index.display())]
    Index {
        /// model.safetensors.index.json
        index: PathBuf,
        /// what is wrong
        reason: String,
    },
    /// A shard that is not there.
    #[error("{}: shard `{shard}` is missing; fetch it, or fetch the model again", index.display())]
    MissingShard {
        /// model.safetensors.index.json
        index: PathBuf,
        /// the shard's name
        shard: String,
    },
    /// Index and shard disagree.
    #[error("{}: tensor `{tensor}` should be in `{shard}`, but is not; index and shards are of different models", index.display())]
    NotInShard {
        /// model.safetensors.index.json
        index: PathBuf,
        /// the tensor
        tensor: String,
        /// the shard's name
        shard: String,
    },
    /// One name, two tensors.
    #[error("tensor `{tensor}` is both in `{}` and in `{}`; one of the files is a leftover", first.display(), second.display())]
    Duplicate {
        /// the tensor
        tensor: String,
        /// a shard
        first: PathBuf,
        /// another shard
        second: PathBuf,
    },
    /// A tensor that the model needs, in a type that no model computes with.
    #[error("`{}`: tensor `{tensor}` is stored as {dtype}; only float checkpoints are read: use the model that was quantised", file.display())]
    UnsupportedDtype {
        /// its file
        file: PathBuf,
        /// the tensor
        tensor: String,
        /// as the header says
        dtype: String,
    },
    /// An adapter that cannot be merged.
    #[error("{}: {reason}", file.display())]
    Adapter {
        /// its config
        file: PathBuf,
        /// what is wrong and what to do
        reason: String,
    },
    /// A tensor of an adapter that does not fit the base.
    #[error("`{}`: tensor `{tensor}`: {reason}", file.display())]
    AdapterTensor {
        /// its weights
        file: PathBuf,
        /// the adapter's tensor
        tensor: String,
        /// what does not fit
        reason: String,
    },
    /// An adapter alone.
    #[error("`{place}` is an adapter and does not say for which base; write BASE+{place}")]
    NoBase {
        /// the adapter
        place: String,
    },
    /// An adapter where a model must stand, or the other way round.
    #[error("`{place}` is {found}, where {expected} is needed")]
    WrongKind {
        /// the reference
        place: String,
        /// what it is
        found: &'static str,
        /// what it should be
        expected: &'static str,
    },
    /// A GGUF file that cannot be read, or holds a model that is not supported.
    #[error("`{}`: {reason}", file.display())]
    Gguf {
        /// the file
        file: PathBuf,
        /// what is wrong and what to do
        reason: String,
    },
}
