//! A composite onto disk, as a Hugging Face directory; [`gguf`]: any model as one file.
//!
//! Shards are laid out before a byte is written, filled in parallel at disjoint ranges of a `.partial` file, synced and renamed;
//! `config.json` comes last, so that a directory that was not finished is not a model. A second run goes on from the finished shards.

mod card;
pub mod gguf;
mod shard;

use std::{
    collections::BTreeMap,
    io::Write as _,
    path::{Path, PathBuf},
};

use serde_json::{Value, json};
use sha2::{Digest as _, Sha256};
use upcycle_architectures::WeightsError;

use crate::{
    plan::Composite,
    recipe::Recipe,
    source::{self, Source},
};

/// How to write.
#[derive(Debug, Clone)]
#[expect(clippy::struct_excessive_bools, reason = "each is a choice of the user's, and any combination is one")]
pub struct Options {
    /// Most bytes of one shard; a bigger tensor gets a shard of its own.
    pub shard_size: u64,
    /// Whether a directory that holds something else may be written into.
    pub overwrite: bool,
    /// Whether the tokenizer's files come along.
    pub tokenizer: bool,
    /// Whether `README.md` and the recipe are written.
    pub card: bool,
    /// Whether weights that are NaN or infinite may be written.
    pub allow_non_finite: bool,
}

impl Default for Options {
    fn default() -> Self {
        Self { shard_size: 5_000_000_000, overwrite: false, tokenizer: true, card: true, allow_non_finite: false }
    }
}

/// Told how far the writing is.
pub trait Progress: Sync {
    /// Before the first byte: bytes of all tensors, and bytes of finished shards found.
    fn begin(&self, _total: u64, _found: u64) {}
    /// After each run of bytes.
    fn advance(&self, _bytes: u64) {}
    /// A shard has its final name.
    fn shard(&self, _file: &str, _bytes: u64) {}
    /// Something worth saying.
    fn note(&self, _message: &str) {}
}

/// Tells nobody.
pub struct Silent;

impl Progress for Silent {}

/// Why nothing, or not everything, was written. What was finished stays; nothing unfinished has a final name.
#[derive(Debug, thiserror::Error)]
pub enum WriteError {
    /// There is no file format for that.
    #[error("`gate_mode: {method}` cannot be written: {reason}; serve the recipe itself (`upcycle serve {}`), or set `gate_mode: auto` for a composite that every engine loads", recipe.display())]
    Runtime {
        /// the gate mode
        method: &'static str,
        /// why
        reason: &'static str,
        /// the recipe
        recipe: PathBuf,
    },
    /// The directory holds something else.
    #[error("{} is not empty; give another directory, or `--overwrite`", .0.display())]
    Occupied(PathBuf),
    /// There is a file of that name.
    #[error("{} is a file; a model is a directory: give another name", .0.display())]
    File(PathBuf),
    /// Somebody else is writing there.
    #[error("another compose is writing into {}", .0.display())]
    Locked(PathBuf),
    /// A file operation failed; the message names the file.
    #[error(transparent)]
    Io(#[from] std::io::Error),
    /// A source could not be read.
    #[error("cannot read {origin}: {error}")]
    Weights {
        /// which models
        origin: String,
        /// why
        error: WeightsError,
    },
    /// A tensor with NaN or infinity in it.
    #[error(
        "tensor `{tensor}` has NaN or infinite values; they come from {origin}, which is damaged: fetch it again \
         (`--allow non-finite-weights` writes them all the same)"
    )]
    NonFinite {
        /// its name in the composite
        tensor: String,
        /// which models
        origin: String,
    },
    /// A tensor whose source gave another number of bytes.
    #[error("tensor `{tensor}`: {origin} gave {found} bytes, planned were {expected}")]
    Length {
        /// its name in the composite
        tensor: String,
        /// which models
        origin: String,
        /// from the plan
        expected: u64,
        /// from the source
        found: u64,
    },
}

/// What was written.
#[derive(Debug, Clone)]
pub struct Written {
    /// File and bytes of every shard.
    pub shards: Vec<(String, u64)>,
    /// Bytes of shards that an earlier run had finished.
    pub found: u64,
}

/// Whether a checkpoint can hold what the recipe asks for.
pub fn check_recipe(recipe: &Recipe) -> Result<(), WriteError> {
    match recipe.gate_mode.runtime() {
        None => Ok(()),
        Some(runtime) => Err(WriteError::Runtime { method: recipe.gate_mode.name, reason: runtime.reason(), recipe: recipe.file.clone() }),
    }
}

/// Is in a directory from the first byte written to the last.
pub(crate) const UNFINISHED: &str = ".upcycle-unfinished";

/// What lies beside the weights.
pub struct Papers<'a> {
    /// whose tokenizer's files come along
    pub tokenizer: &'a Source,
    /// name and content of the card and the recipe
    pub files: Vec<(&'static str, Vec<u8>)>,
}

/// The name of the model card.
pub const CARD: &str = "README.md";
/// The name of the recipe that a composite was made from.
pub const RECIPE: &str = "upcycle_recipe.yml";

/// The papers of a recipe's composite.
pub fn papers<'a>(composite: &'a Composite, recipe: &Recipe) -> Papers<'a> {
    let base = composite.sources.base();
    Papers {
        tokenizer: recipe.tokenizer.as_ref().map_or(base, |reference| composite.sources.get(reference)),
        files: vec![(RECIPE, recipe.text.clone().into_bytes()), (CARD, card::render(composite, recipe).into_bytes())],
    }
}

/// Writes the recipe's composite into directory `out` (made if it is not there).
pub fn write(
    composite: &Composite,
    recipe: &Recipe,
    out: &Path,
    options: &Options,
    progress: &dyn Progress,
) -> Result<Written, WriteError> {
    check_recipe(recipe)?;
    write_with(composite, &papers(composite, recipe), out, options, progress)
}

/// Writes a composite with these papers into directory `out` (made if it is not there).
pub fn write_with(
    composite: &Composite,
    papers: &Papers<'_>,
    out: &Path,
    options: &Options,
    progress: &dyn Progress,
) -> Result<Written, WriteError> {
    let shards = shard::layout(&composite.plan.tensors, options.shard_size);
    let digest = digest(composite, options);
    let state = claim(out, &digest, options.overwrite, progress)?;

    let done = |shard: &shard::Shard| fs_err::metadata(out.join(&shard.file)).is_ok_and(|meta| meta.len() == shard.bytes());
    let found = shards.iter().filter(|shard| done(shard)).map(|shard| shard.data).sum();
    progress.begin(shards.iter().map(|shard| shard.data).sum(), found);
    for shard in &shards {
        if done(shard) {
            continue;
        }
        let path = out.join(&shard.file);
        let partial = out.join(format!(".{}.partial", shard.file));
        shard::fill(composite, shard, &partial, options, progress)?;
        fs_err::rename(&partial, &path)?;
        progress.shard(&shard.file, shard.bytes());
    }
    if shards.len() > 1 {
        let map: BTreeMap<&str, &str> = shards
            .iter()
            .flat_map(|shard| shard.tensors.clone().map(|t| (composite.plan.tensors[t].name.as_str(), shard.file.as_str())))
            .collect();
        let index = json!({"metadata": {"total_size": composite.plan.bytes()}, "weight_map": map});
        put(out, "model.safetensors.index.json", &pretty(&index))?;
    }
    sidecars(composite, papers.tokenizer, out, options)?;
    for (name, bytes) in papers.files.iter().filter(|_| options.card) {
        put(out, name, bytes)?;
    }
    put(out, "config.json", &pretty(&composite.plan.config_json))?;
    drop(state);
    fs_err::remove_file(out.join(UNFINISHED))?;
    Ok(Written { shards: shards.iter().map(|shard| (shard.file.clone(), shard.bytes())).collect(), found })
}

/// Whether [`write`] would refuse the directory, asked before any work is done.
pub fn check_directory(out: &Path, options: &Options) -> Result<(), WriteError> {
    let mut entries = match fs_err::read_dir(out) {
        Ok(entries) => entries,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(()),
        Err(error) if error.kind() == std::io::ErrorKind::NotADirectory => return Err(WriteError::File(out.to_owned())),
        Err(error) => return Err(error.into()),
    };
    if !options.overwrite && !out.join(UNFINISHED).exists() && entries.next().is_some() {
        return Err(WriteError::Occupied(out.to_owned()));
    }
    Ok(())
}

/// Makes the directory ours: empty, or left unfinished by the same recipe. The returned file holds the lock.
fn claim(out: &Path, digest: &str, overwrite: bool, progress: &dyn Progress) -> Result<fs_err::File, WriteError> {
    fs_err::create_dir_all(out)?;
    let path = out.join(UNFINISHED);
    let entries: Vec<PathBuf> = fs_err::read_dir(out)?.map(|entry| Ok(entry?.path())).collect::<std::io::Result<_>>()?;
    let unfinished = entries.contains(&path);
    if !unfinished && !entries.is_empty() && !overwrite {
        return Err(WriteError::Occupied(out.to_owned()));
    }
    let mut state = fs_err::OpenOptions::new().read(true).write(true).create(true).truncate(false).open(&path)?;
    if state.file().try_lock().is_err() {
        return Err(WriteError::Locked(out.to_owned()));
    }
    let before = if unfinished { fs_err::read_to_string(&path)? } else { String::new() };
    if before != digest {
        if unfinished && !before.is_empty() {
            progress.note("the recipe or a source changed since the unfinished run: starting over");
        }
        // A file of an earlier composite must not be taken for one of this: not its shards, and not its config.
        for entry in entries.iter().filter(|entry| stale(entry)) {
            fs_err::remove_file(entry)?;
        }
        state.set_len(0)?;
        state.write_all(digest.as_bytes())?;
        state.sync_all()?;
    }
    Ok(state)
}

fn stale(path: &Path) -> bool {
    let name = path.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
    let ours = name.starts_with("model") || name.starts_with(".model");
    name == "config.json" || ours && [".safetensors", ".partial", ".index.json"].iter().any(|end| name.ends_with(end))
}

/// Of everything that decides the output's bytes.
fn digest(composite: &Composite, options: &Options) -> String {
    let parts = format!("{} {}", composite.fingerprint(), options.shard_size);
    Sha256::digest(parts).iter().map(|byte| format!("{byte:02x}")).collect()
}

fn sidecars(composite: &Composite, tokenizer: &Source, out: &Path, options: &Options) -> Result<(), WriteError> {
    let base = composite.sources.base();
    for (name, sidecar) in &tokenizer.sidecars {
        if options.tokenizer && name != "generation_config.json" && !name.starts_with("LICENSE") {
            put(out, name, &sidecar.read()?)?;
        }
    }
    if let Some(bytes) = source::sidecar(base, "generation_config.json") {
        put(out, "generation_config.json", &generation_config(&bytes, composite))?;
    }
    Ok(())
}

/// The base's file as it is, unless an expert ends its texts with another token than those listed there.
fn generation_config(bytes: &[u8], composite: &Composite) -> Vec<u8> {
    let Ok(Value::Object(mut json)) = serde_json::from_slice(bytes) else { return bytes.to_vec() };
    let listed: Vec<u64> = match json.get("eos_token_id") {
        Some(Value::Array(ids)) => ids.iter().filter_map(Value::as_u64).collect(),
        Some(id) => id.as_u64().into_iter().collect(),
        None => Vec::new(),
    };
    let all = &composite.plan.config.eos;
    if all.iter().all(|id| listed.contains(&u64::from(*id))) {
        return bytes.to_vec();
    }
    json.insert("eos_token_id".into(), json!(all));
    pretty(&Value::Object(json))
}

fn pretty(value: &Value) -> Vec<u8> {
    format!("{value:#}\n").into_bytes()
}

/// A small file, whole or not at all.
fn put(out: &Path, name: &str, bytes: &[u8]) -> Result<(), WriteError> {
    let partial = out.join(format!(".{name}.partial"));
    let mut file = fs_err::File::create(&partial)?;
    file.write_all(bytes)?;
    file.sync_all()?;
    drop(file);
    Ok(fs_err::rename(&partial, out.join(name))?)
}
