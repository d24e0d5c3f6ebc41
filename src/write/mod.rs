//! A composite onto disk, as a Hugging Face directory; [`gguf`]: any model as one file.
//!
//! Shards are laid out before a byte is written and filled in parallel at disjoint ranges of `.partial` files. When all of them are synced
//! they get their names, `config.json` last, so that a directory that was not finished is not a model. A second run goes on where the
//! first one was.

mod card;
mod fill;
pub mod gguf;
mod manifest;
mod shard;
mod state;
mod verify;

use std::{
    collections::BTreeMap,
    io::{ErrorKind, Read as _, Write as _},
    path::{Path, PathBuf},
};

use serde_json::{Value, json};
use sha2::{Digest as _, Sha256};
use upcycle_architectures::WeightsError;

use self::{
    fill::Job,
    manifest::Manifest,
    shard::Shard,
    state::{JobId, State},
};
pub use self::{
    manifest::{MANIFEST, folded},
    shard::is_by_expert,
    verify::{Verified, verify},
};
use crate::{
    plan::{self, Composite, Plan, Sources},
    recipe::Recipe,
    source::{self, CONFIG, Extent, INDEX, Source},
};

/// How to write.
#[derive(Debug, Clone)]
#[expect(clippy::struct_excessive_bools, reason = "each is a choice of the user's, and any combination is one")]
pub struct Options {
    /// Most bytes of one shard; a bigger tensor gets a shard of its own.
    pub shard_size: u64,
    /// Whether there is a shard for each expert instead, one for the gates, and one for the rest.
    pub by_expert: bool,
    /// Whether a directory that holds something else may be written into.
    pub overwrite: bool,
    /// Whether the tokenizer's files come along.
    pub tokenizer: bool,
    /// Whether `README.md` and the recipe are written.
    pub card: bool,
    /// Whether weights that are NaN or infinite may be written.
    pub allow_non_finite: bool,
    /// Whether what is written is on the disk before it gets its name: if not, a machine that fails may leave files with holes.
    pub sync: bool,
    /// Bytes of a shard after which what is written is synced and recorded, so that it need not be written again.
    pub checkpoint: u64,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            shard_size: 5_000_000_000,
            by_expert: false,
            overwrite: false,
            tokenizer: true,
            card: true,
            allow_non_finite: false,
            sync: true,
            checkpoint: 128 << 20,
        }
    }
}

/// Told how far the writing is.
pub trait Progress: Sync {
    /// Before the first byte: bytes of all tensors, and those of them that are there already.
    fn begin(&self, _total: u64, _found: u64) {}
    /// After each run of bytes.
    fn advance(&self, _bytes: u64) {}
    /// A shard is on disk.
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
    /// There is no room.
    #[error(
        "no room in {} for {bytes} bytes that are still to be written ({error}); free some, and the same command goes on where it was",
        out.display()
    )]
    Full {
        /// the directory
        out: PathBuf,
        /// how many
        bytes: u64,
        /// what the file system said
        error: std::io::Error,
    },
    /// What the composite says of itself is missing or damaged.
    #[error("{}: {reason}", out.join(MANIFEST).display())]
    Manifest {
        /// the directory
        out: PathBuf,
        /// what is wrong
        reason: String,
    },
    /// The directory is where a source was read from.
    #[error("{} is one of the models that are composed; give another directory to write into", .0.display())]
    Source(PathBuf),
}

/// What was written.
#[derive(Debug, Clone)]
pub struct Written {
    /// File and bytes of every shard.
    pub shards: Vec<(String, u64)>,
    /// Bytes that were there: written by an earlier run, or the same in an earlier composite.
    pub found: u64,
}

/// Most bytes of tensors held at once while writing, by all threads of the current pool: a block each, of f32s beside its own bytes, or all
/// of a part that can only be computed as a whole.
pub fn memory(plan: &Plan, sources: &Sources) -> u64 {
    let parts = plan.tensors.iter().flat_map(|tensor| tensor.parts.iter().map(move |part| (tensor, part)));
    let whole = parts.filter(|(_, part)| !part.divisible(sources)).map(|(tensor, _)| tensor.info.elements() / tensor.parts.len());
    let elements = whole.max().unwrap_or(0).max(fill::ELEMENTS) as u64;
    // The values, and twice the bytes: of the source, and of the output.
    elements * (4 + 2 * plan.dtype.bytes(1) as u64) * rayon::current_num_threads() as u64
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
/// The name of the statistics that a composite's gates were fitted to.
pub const STATS: &str = "upcycle.stats";

/// The papers of a recipe's composite.
pub fn papers<'a>(composite: &'a Composite, recipe: &Recipe) -> Papers<'a> {
    let base = composite.sources.base();
    Papers {
        tokenizer: recipe.tokenizer.as_ref().map_or(base, |reference| composite.sources.get(reference)),
        files: vec![(RECIPE, recipe.text.clone().into_bytes()), (CARD, card::render(composite, recipe).into_bytes())],
    }
}

/// Adds an evaluation, as markdown, to the card of the composite in a directory.
pub fn evaluated(out: &Path, table: &str) -> Result<(), WriteError> {
    let card = fs_err::read_to_string(out.join(CARD))?;
    put(out, CARD, card::evaluated(&card, table).as_bytes(), true)
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

/// Writes a composite with these papers into directory `out` (made if it is not there). An earlier composite in it stays whole until
/// everything of the new one is on disk; the new one may be made of it.
pub fn write_with(
    composite: &Composite,
    papers: &Papers<'_>,
    out: &Path,
    options: &Options,
    progress: &dyn Progress,
) -> Result<Written, WriteError> {
    let others = composite.sources.all.iter().enumerate().filter(|(number, _)| composite.earlier != Some(*number));
    if let Some((_, source)) = others.into_iter().find(|(_, source)| same_place(&source.location, out)) {
        return Err(WriteError::Source(source.location.clone()));
    }
    let earlier = match Manifest::read(out) {
        Err(error) if composite.earlier.is_some() => return Err(error),
        other => other.ok(),
    };
    let shards = shard::layout(composite, earlier.as_ref(), options);
    let fingerprint = composite.fingerprint();
    let keys: Vec<String> = shards.iter().map(|shard| manifest::key(composite, shard, &fingerprint)).collect();
    let digest = plan::hex(&Sha256::digest(format!("{fingerprint} {} {}", options.shard_size, options.by_expert)));
    let mut state = state::claim(out, &digest, options.overwrite, progress)?;

    let jobs: Vec<Vec<Job>> = shards.iter().enumerate().map(|(number, shard)| fill::jobs(composite, number, shard)).collect();
    let kept: Vec<bool> = match (&earlier, composite.earlier) {
        (None, _) => vec![false; shards.len()],
        (Some(manifest), None) => manifest.kept(out, &shards, &keys),
        (Some(_), Some(_)) => shards.iter().map(|shard| untouched(composite, shard, out)).collect::<Result<_, _>>()?,
    };
    let begun: Vec<bool> = (0..shards.len()).map(|number| begun(out, &shards[number], &jobs[number], &state)).collect();
    state.retain(|number| begun.get(number).is_some_and(|begun| *begun))?;

    let left = jobs.iter().zip(&kept).filter(|(_, kept)| !**kept).flat_map(|(jobs, _)| jobs);
    let todo: Vec<&Job> = left.filter(|job| !state.done.contains_key(&job.id)).collect();
    let missing = todo.iter().map(|job| job.bytes).sum();
    let total: u64 = shards.iter().map(|shard| shard.data).sum();
    progress.begin(total, total - missing);
    let fresh: Vec<&Shard> = (0..shards.len()).filter(|&number| !kept[number] && !begun[number]).map(|number| &shards[number]).collect();
    let filled = preallocate(&fresh, out).and_then(|()| fill::fill(composite, &shards, &todo, out, &state, options, progress));
    let filled = filled.map_err(|error| full(error, out, missing))?;
    composite.sources.all.iter().try_for_each(source::check_unchanged)?;

    let crcs: BTreeMap<JobId, u32> = state.done.iter().map(|(id, crc)| (*id, *crc)).chain(filled).collect();
    let mut manifest = Manifest::of(composite, &shards, &keys, &jobs, &crcs);
    manifest.recipe = papers.files.iter().find(|(name, _)| *name == RECIPE).map(|(_, bytes)| plan::hex(&Sha256::digest(bytes)));
    if let Some(earlier) = earlier {
        if let Some(own) = composite.earlier {
            manifest.inherit(&earlier, own);
        }
        manifest.keep(&earlier, shards.iter().zip(&kept).filter(|(_, kept)| **kept).map(|(shard, _)| shard.file.as_str()));
    }
    commit(&Final { composite, papers, manifest: &manifest, options }, &shards, out)?;
    state.finish()?;
    sync_directory(out, options)?;
    Ok(Written { shards: shards.iter().map(|shard| (shard.file.clone(), shard.bytes())).collect(), found: total - missing })
}

/// Whether a file of the composite that is changed is, to the last byte, what this shard would be.
fn untouched(composite: &Composite, shard: &Shard, out: &Path) -> std::io::Result<bool> {
    let file = out.join(&shard.file);
    let mut at = shard.header.len() as u64;
    for &t in &shard.tensors {
        let here = |extent: &Extent| extent.file.path() == file && extent.offset == at;
        if composite.plan.tensors[t].parts.len() != 1 || !composite.copied(t, 0).is_some_and(here) {
            return Ok(false);
        }
        at += composite.plan.tensors[t].info.bytes() as u64;
    }
    let mut header = vec![0; shard.header.len()];
    fs_err::File::open(&file)?.read_exact(&mut header)?;
    Ok(header == shard.header)
}

/// Whether what the journal says of a shard is true of a file: the partial one, or, where nothing is left to do, the one that was renamed.
fn begun(out: &Path, shard: &Shard, jobs: &[Job], state: &State) -> bool {
    let length = |name: &str| fs_err::metadata(out.join(name)).map(|meta| meta.len()).ok();
    match length(&shard.partial()) {
        Some(bytes) => bytes == shard.bytes(),
        None => length(&shard.file) == Some(shard.bytes()) && jobs.iter().all(|job| state.done.contains_key(&job.id)),
    }
}

/// Makes the files of shards, or none of them: what there is no room for is not begun.
fn preallocate(shards: &[&Shard], out: &Path) -> Result<(), WriteError> {
    shards.iter().try_for_each(|shard| fill::preallocate(shard, out)).map_err(|error| {
        for shard in shards {
            // The first error is the one to tell.
            let _ = fs_err::remove_file(out.join(shard.partial()));
        }
        error.into()
    })
}

/// The same error, with the number of bytes that were still to be written if it is for want of room.
fn full(error: WriteError, out: &Path, bytes: u64) -> WriteError {
    match error {
        WriteError::Io(error) if matches!(error.kind(), ErrorKind::StorageFull | ErrorKind::QuotaExceeded | ErrorKind::FileTooLarge) => {
            WriteError::Full { out: out.to_owned(), bytes, error }
        }
        other => other,
    }
}

/// What gets its final name when all shards are filled.
struct Final<'a> {
    composite: &'a Composite,
    papers: &'a Papers<'a>,
    manifest: &'a Manifest,
    options: &'a Options,
}

/// Gives everything its final name. On the way the directory is no model: its config goes first and comes last.
fn commit(last: &Final<'_>, shards: &[Shard], out: &Path) -> Result<(), WriteError> {
    let Final { composite, papers, manifest, options } = last;
    let finished: Vec<&Shard> = shards.iter().filter(|shard| out.join(shard.partial()).exists()).collect();
    let stale = stale(out, shards)?;
    if !finished.is_empty() || !stale.is_empty() {
        remove(&out.join(CONFIG))?;
        sync_directory(out, options)?;
    }
    for shard in finished {
        fs_err::rename(out.join(shard.partial()), out.join(&shard.file))?;
    }
    stale.iter().try_for_each(|path| remove(path))?;
    if shards.len() > 1 {
        let map: BTreeMap<&str, &str> = shards
            .iter()
            .flat_map(|shard| shard.tensors.iter().map(|&t| (composite.plan.tensors[t].name.as_str(), shard.file.as_str())))
            .collect();
        let index = json!({"metadata": {"total_size": composite.plan.bytes()}, "weight_map": map});
        put(out, INDEX, &pretty(&index), options.sync)?;
    }
    sidecars(composite, papers.tokenizer, out, options)?;
    for (name, bytes) in papers.files.iter().filter(|_| options.card) {
        put(out, name, bytes, options.sync)?;
    }
    put(out, MANIFEST, &pretty(&json!(manifest)), options.sync)?;
    sync_directory(out, options)?;
    put(out, CONFIG, &pretty(&composite.plan.config_json), options.sync)?;
    sync_directory(out, options)
}

/// Weights in the directory that are not of this composite.
fn stale(out: &Path, shards: &[Shard]) -> std::io::Result<Vec<PathBuf>> {
    let mut stale = Vec::new();
    for entry in fs_err::read_dir(out)? {
        let path = entry?.path();
        let name = path.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
        let weights = name.starts_with("model") && name.ends_with(".safetensors") && !shards.iter().any(|shard| shard.file == name);
        if weights || name == INDEX && shards.len() == 1 {
            stale.push(path);
        }
    }
    Ok(stale)
}

fn remove(path: &Path) -> Result<(), WriteError> {
    match fs_err::remove_file(path) {
        Err(error) if error.kind() != ErrorKind::NotFound => Err(error.into()),
        _ => Ok(()),
    }
}

fn same_place(a: &Path, b: &Path) -> bool {
    matches!((fs_err::canonicalize(a), fs_err::canonicalize(b)), (Ok(a), Ok(b)) if a == b)
}

/// Renames are on disk when their directory is.
#[cfg(unix)]
fn sync_directory(out: &Path, options: &Options) -> Result<(), WriteError> {
    if options.sync {
        fs_err::File::open(out)?.sync_all()?;
    }
    Ok(())
}

#[cfg(not(unix))]
fn sync_directory(_: &Path, _: &Options) -> Result<(), WriteError> {
    Ok(())
}

/// Whether [`write`] would refuse the directory, asked before any work is done.
pub fn check_directory(out: &Path, options: &Options) -> Result<(), WriteError> {
    let mut entries = match fs_err::read_dir(out) {
        Ok(entries) => entries,
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(()),
        Err(error) if error.kind() == ErrorKind::NotADirectory => return Err(WriteError::File(out.to_owned())),
        Err(error) => return Err(error.into()),
    };
    if !options.overwrite && !out.join(UNFINISHED).exists() && entries.next().is_some() {
        return Err(WriteError::Occupied(out.to_owned()));
    }
    Ok(())
}

fn sidecars(composite: &Composite, tokenizer: &Source, out: &Path, options: &Options) -> Result<(), WriteError> {
    let base = composite.sources.base();
    for (name, sidecar) in &tokenizer.sidecars {
        if options.tokenizer && name != "generation_config.json" && !name.starts_with("LICENSE") {
            put(out, name, &sidecar.read()?, options.sync)?;
        }
    }
    if let Some(bytes) = source::sidecar(base, "generation_config.json") {
        put(out, "generation_config.json", &generation_config(&bytes, composite), options.sync)?;
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
fn put(out: &Path, name: &str, bytes: &[u8], sync: bool) -> Result<(), WriteError> {
    let partial = out.join(format!(".{name}.partial"));
    let mut file = fs_err::File::create(&partial)?;
    file.write_all(bytes)?;
    if sync {
        file.sync_all()?;
    }
    drop(file);
    Ok(fs_err::rename(&partial, out.join(name))?)
}
