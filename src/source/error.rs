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
    #[error("`{path}` is neither a file nor a directory here, nor a name on the Hub (`owner/name`)")]
    NotFound {
        /// as the user wrote it
        path: String,
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
    #[error("`{place}` has several {kind} files and nothing says which one is the model: {}", files.join(", "))]
    Ambiguous {
        /// directory or repository
        place: String,
        /// safetensors or GGUF
        kind: &'static str,
        /// all of them
        files: Vec<String>,
    },
    /// Weights without a config.
    #[error("`{place}` has weights but no config.json; copy it from the model that was fine-tuned")]
    NoConfig {
        /// directory or repository
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
    #[error("{}: {source}", file.display())]
    Config {
        /// config.json, or the GGUF it was made from
        file: PathBuf,
        /// what is wrong with it
        source: ConfigError,
    },
    /// Weights that need another reader.
    #[error("{}: the checkpoint is quantised ({method}); use the full-precision one, or a GGUF", file.display())]
    Quantised {
        /// config.json
        file: PathBuf,
        /// `quantization_config.quant_method`
        method: String,
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
}
