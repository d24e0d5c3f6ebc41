//! Opened checkpoints: headers and configs are read and checked, tensor bytes stay where they are until somebody reads them.

use std::{collections::BTreeMap, path::PathBuf, sync::Arc};

use upcycle_architectures::{Config, Family, Weights};

use crate::recipe::ModelRef;

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
    pub config_json: serde_json::Value,
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
