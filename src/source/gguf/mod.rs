//! GGUF files as models: metadata becomes `config.json` and a tokenizer, tensors get their Hugging Face names.
//!
//! Floats and the blocks that [`Dtype`](upcycle_architectures::Dtype) knows are slices of the map; tensors of ggml's other types are decoded
//! to f32 when they are read.

mod config;
mod read;
mod tensors;
mod tokenizer;

use std::{collections::HashMap, path::Path, sync::Arc};

pub(crate) use self::{
    read::Gguf,
    tensors::{floats, names},
    tokenizer::{GPT2, splitting_name},
};
use super::{DataFile, ModelRef, Source, SourceError};

/// Whether a file is one, by its first bytes.
pub(super) fn is_gguf(file: &Path) -> std::io::Result<bool> {
    read::has_magic(file)
}

/// Opens a GGUF file.
pub(super) fn open(reference: &ModelRef, file: &Path) -> Result<Source, SourceError> {
    let gguf = Gguf::open(file)?;
    let error = |reason: String| SourceError::Gguf { file: file.to_owned(), reason };
    let config_json = config::make(&gguf).map_err(error)?;
    let (family, config) =
        upcycle_architectures::detect(&config_json).map_err(|source| SourceError::Config { place: file.to_owned(), source })?;
    let weights = tensors::find(&gguf, family, &config).map_err(error)?;
    let sidecars = tokenizer::make(&gguf, &config_json).map_err(error)?;
    Ok(Source {
        reference: reference.clone(),
        location: file.to_owned(),
        family,
        config,
        config_json,
        weights: Arc::new(weights),
        extents: HashMap::new(),
        files: vec![Arc::new(DataFile::of(file)?)],
        sidecars,
    })
}
