//! Opened checkpoints: headers and configs are read and checked, tensor bytes stay where they are until somebody reads them.

mod error;
mod map;
mod place;
mod safetensors;
mod sidecar;

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
    sync::Arc,
};

use serde_json::Value;
use upcycle_architectures::{Config, Family, Role, Weights};

use self::{
    place::{Files, sidecar_names},
    safetensors::Checkpoint,
};
use crate::recipe::ModelRef;

pub use self::{
    error::SourceError,
    sidecar::{eos_ids, sidecar},
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
    /// The files beside the weights that a user of the model needs, by file name: tokenizer files, `generation_config.json`, chat template.
    pub sidecars: BTreeMap<String, Sidecar>,
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
#[derive(Debug, Clone, Default)]
pub struct OpenOptions {
    /// The model that an adapter without a base of its own is merged into: the recipe's base.
    pub base: Option<ModelRef>,
}

/// Opens a model: reads configs and headers, maps the weights.
pub fn open(reference: &ModelRef, _options: &OpenOptions) -> Result<Source, SourceError> {
    let path = Path::new(&reference.path);
    if path.is_dir() {
        open_directory(reference, path)
    } else if path.exists() {
        Err(SourceError::NotAModel { file: path.to_owned() })
    } else {
        Err(SourceError::NotFound { path: reference.path.clone() })
    }
}

fn open_directory(reference: &ModelRef, directory: &Path) -> Result<Source, SourceError> {
    let names = place::list(directory)?;
    let config_file = directory.join("config.json");
    let mut checkpoint = match place::files(&directory.display().to_string(), &names)? {
        Files::One(name) => Checkpoint::open(&directory.join(name))?,
        Files::Sharded => Checkpoint::open_sharded(&directory.join(place::INDEX))?,
    };
    let config_json = read_json(&config_file)?;
    let (family, config) =
        upcycle_architectures::detect(&config_json).map_err(|source| SourceError::Config { file: config_file.clone(), source })?;
    if let Some(quantization) = config_json.get("quantization_config").filter(|config| !config.is_null()) {
        let method = quantization.get("quant_method").and_then(Value::as_str).unwrap_or("quantization_config");
        return Err(SourceError::Quantised { file: config_file, method: method.to_owned() });
    }
    add_trunk_prefix(&mut checkpoint, family);
    for (role, _) in family.tensors(&config) {
        if let Some(name) = family.name(role) {
            checkpoint.check_dtype(&name)?;
        }
    }
    Ok(Source {
        reference: reference.clone(),
        location: directory.to_owned(),
        family,
        config,
        config_json,
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
        let (line, column) = (error.line(), error.column());
        let reason = error.to_string();
        // serde_json ends its messages with the position, which stands at the front already.
        let reason = reason.split(" at line ").next().unwrap_or_default().to_owned();
        SourceError::Json { file: file.to_owned(), line, column, reason }
    })
}
