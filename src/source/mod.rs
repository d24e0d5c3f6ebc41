//! Opened checkpoints: headers and configs are read and checked, tensor bytes stay where they are until somebody reads them.

mod error;
mod extent;
pub(crate) mod gguf;
mod hub;
mod licence;
mod lora;
mod map;
mod place;
mod safetensors;
mod sidecar;

use std::{
    collections::{BTreeMap, HashMap},
    path::{Path, PathBuf},
    sync::Arc,
    time::UNIX_EPOCH,
};

use serde_json::Value;
use upcycle_architectures::{Config, Family, Role, Weights};

use self::{
    lora::Adapter,
    place::{Files, sidecar_names},
    safetensors::Checkpoint,
};
use crate::recipe::ModelRef;

pub use self::{
    error::SourceError,
    extent::{DataFile, Extent},
    hub::Hub,
    licence::{conflict, licence},
    map::lock,
    sidecar::{eos_ids, sidecar},
};
pub(crate) use self::{
    extent::Positioned,
    map::map,
    place::{CONFIG, INDEX},
};

/// An opened model.
pub struct Source {
    /// As the recipe names it.
    pub reference: ModelRef,
    /// The directory or file it was opened from.
    pub location: PathBuf,
    /// Its family.
    pub family: &'static Family,
    /// Its config, read.
    pub config: Config,
    /// Its config.json (for a GGUF: made from the metadata).
    pub config_json: Value,
    /// Its tensors, by the family's names.
    pub weights: Arc<dyn Weights>,
    /// Where its tensors lie, by the family's names: of those that a file holds as they are read.
    pub extents: HashMap<String, Extent>,
    /// The files of its weights, as they were when they were opened.
    pub files: Vec<Arc<DataFile>>,
    /// The files beside the weights that a user of the model needs, by file name: tokenizer files, `generation_config.json`, chat template.
    pub sidecars: BTreeMap<String, Sidecar>,
}

impl Source {
    /// Its location, and name, length and modification time of the files there: equal stamps, equal weights.
    pub(crate) fn stamps(&self) -> Vec<String> {
        let stamp = |path: &Path| {
            let meta = fs_err::metadata(path).ok()?;
            let time = meta.modified().ok()?.duration_since(UNIX_EPOCH).ok()?;
            Some(format!("{:?} {} {}", path.file_name(), meta.len(), time.as_nanos()))
        };
        let mut all: Vec<String> = match fs_err::read_dir(&self.location) {
            Ok(entries) => entries.flatten().filter_map(|entry| stamp(&entry.path())).collect(),
            Err(_) => stamp(&self.location).into_iter().collect(),
        };
        all.sort();
        all.insert(0, self.location.display().to_string());
        all
    }
}

/// Fails if a file of the model's weights is not what it was when it was opened.
pub fn check_unchanged(source: &Source) -> std::io::Result<()> {
    source.files.iter().try_for_each(|file| file.open().map(drop))
}

/// A small file that travels with a model.
#[derive(Debug, Clone)]
pub enum Sidecar {
    /// As it lies on disk.
    File(PathBuf),
    /// Made from a GGUF's metadata.
    Made(Vec<u8>),
}

impl Sidecar {
    /// Its bytes.
    pub fn read(&self) -> std::io::Result<Vec<u8>> {
        match self {
            Self::File(path) => fs_err::read(path),
            Self::Made(bytes) => Ok(bytes.clone()),
        }
    }
}

/// How models are found. The default knows local paths only.
#[derive(Clone, Default)]
pub struct OpenOptions {
    /// The model that a bare adapter is merged into, in place of the one that it names: the recipe's base.
    pub base: Option<ModelRef>,
    /// Where names on the Hub are looked up; `None`: nowhere.
    pub hub: Option<Hub>,
    /// Told about downloads.
    pub progress: Option<Arc<dyn Progress>>,
}

/// Is told how downloads go. Files are fetched one after another.
pub trait Progress: Send + Sync {
    /// A file of `total` bytes begins; `done` of them are there from an earlier try.
    fn start(&self, file: &str, total: u64, done: u64);
    /// So many more bytes are there.
    fn advance(&self, bytes: u64);
    /// The file is complete.
    fn finish(&self);
}

/// Opens a model: reads configs and headers, maps the weights. A name that is not a path here is looked up on the Hub.
pub fn open(reference: &ModelRef, options: &OpenOptions) -> Result<Source, SourceError> {
    let mut source = match locate(reference, options)? {
        Place::Model(directory, files) => open_directory(reference, &directory, &files)?,
        Place::Gguf(file) => gguf::open(reference, &file)?,
        Place::Adapter(directory) => {
            let adapter = Adapter::open(&directory)?;
            let base = options.base.clone().or_else(|| adapter.base());
            let base = base.ok_or_else(|| SourceError::NoBase { place: reference.path.clone() })?;
            adapter.merge(open_base(&base, options)?)?
        }
    };
    if let Some(lora) = &reference.lora {
        match locate(lora, options)? {
            Place::Adapter(directory) => source = Adapter::open(&directory)?.merge(source)?,
            Place::Model(..) | Place::Gguf(_) => {
                return Err(SourceError::WrongKind {
                    place: lora.to_string(),
                    found: "a whole model",
                    expected: "an adapter (what stands behind `+`)",
                });
            }
        }
    }
    source.reference = reference.clone();
    Ok(source)
}

/// Opens an adapter's base, which must be a model of its own: adapters do not name adapters as their base.
fn open_base(base: &ModelRef, options: &OpenOptions) -> Result<Source, SourceError> {
    if base.lora.is_none()
        && let Place::Adapter(_) = locate(base, options)?
    {
        return Err(SourceError::WrongKind { place: base.to_string(), found: "an adapter", expected: "its base model" });
    }
    open(base, &OpenOptions { base: None, ..options.clone() })
}

/// Where a reference leads, its adapter aside.
enum Place {
    Model(PathBuf, Files),
    Adapter(PathBuf),
    Gguf(PathBuf),
}

fn locate(reference: &ModelRef, options: &OpenOptions) -> Result<Place, SourceError> {
    let path = Path::new(&reference.path);
    let directory = if path.is_dir() {
        path.to_owned()
    } else if path.exists() {
        // What is called one and is none says best itself what is wrong with it.
        return if gguf::is_gguf(path)? || path.extension().is_some_and(|end| end == "gguf") {
            Ok(Place::Gguf(path.to_owned()))
        } else {
            Err(SourceError::NotAModel { file: path.to_owned() })
        };
    } else if let Some(hub) = &options.hub
        && let Some(repo) = hub::Repo::parse(reference)
    {
        let directory = hub.fetch(&repo, options.progress.as_deref())?;
        if let Some(file) = repo.file {
            return Ok(Place::Gguf(directory.join(file)));
        }
        directory
    } else {
        return Err(SourceError::NotFound { name: ModelRef { lora: None, ..reference.clone() }.to_string() });
    };
    Ok(match place::files(&directory.display().to_string(), &place::list(&directory)?)? {
        Files::Adapter => Place::Adapter(directory),
        Files::Gguf(file) => Place::Gguf(directory.join(file)),
        files => Place::Model(directory, files),
    })
}

fn open_directory(reference: &ModelRef, directory: &Path, files: &Files) -> Result<Source, SourceError> {
    let mut checkpoint = match files {
        Files::One(name) => Checkpoint::open(&directory.join(name))?,
        _ => Checkpoint::open_sharded(&directory.join(place::INDEX))?,
    };
    let config_json = read_json(&directory.join(place::CONFIG))?;
    let (family, config) =
        upcycle_architectures::detect(&config_json).map_err(|source| SourceError::Config { place: directory.to_owned(), source })?;
    add_trunk_prefix(&mut checkpoint, family);
    for (role, _) in family.tensors(&config) {
        if let Some(name) = family.name(role) {
            checkpoint.check_dtype(&name)?;
        }
    }
    let names = place::list(directory)?;
    Ok(Source {
        reference: reference.clone(),
        location: directory.to_owned(),
        family,
        config,
        config_json,
        extents: checkpoint.extents(),
        files: checkpoint.files(),
        weights: Arc::new(checkpoint),
        sidecars: sidecar_names(&names).map(|name| (name.clone(), Sidecar::File(directory.join(name)))).collect(),
    })
}

/// Checkpoints saved from the trunk (`LlamaModel`, not `LlamaForCausalLM`) lack the first part of every name.
fn add_trunk_prefix(checkpoint: &mut Checkpoint, family: &Family) {
    let names = family.names;
    if let Some((trunk, rest)) = names.embedding.split_once('.')
        && checkpoint.info(names.embedding).is_none()
        && checkpoint.info(rest).is_some()
    {
        checkpoint.prefix(&format!("{trunk}."), family.name(Role::Head).as_deref());
    }
}

/// Reads and parses a JSON file; errors carry its line and column.
fn read_json(file: &Path) -> Result<Value, SourceError> {
    let bytes = fs_err::read(file)?;
    serde_json::from_slice(&bytes).map_err(|error| {
        let (line, column) = (error.line(), error.column().max(1));
        let reason = error.to_string();
        // serde_json ends its messages with the position, which stands at the front already.
        let reason = reason.split(" at line ").next().unwrap_or_default().to_owned();
        SourceError::Json { file: file.to_owned(), line, column, reason }
    })
}
