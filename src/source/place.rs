//! What a directory or repository holds, judged by its file names alone: the same rules for a local directory, a snapshot in the Hub's
//! cache and a listing from the Hub.

use std::{io, path::Path};

use super::{SourceError, safetensors::is_plain_name};
use crate::write::UNFINISHED;

/// Name of the index of a sharded checkpoint.
pub(crate) const INDEX: &str = "model.safetensors.index.json";
pub(crate) const CONFIG: &str = "config.json";
pub(super) const ADAPTER_CONFIG: &str = "adapter_config.json";
pub(super) const ADAPTER_WEIGHTS: &str = "adapter_model.safetensors";

/// The files that travel with a model beside `LICENSE*`.
const SIDECARS: [&str; 10] = [
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    "generation_config.json",
    "chat_template.jinja",
    "chat_template.json",
];

/// How a place's weights are stored.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Files {
    /// `config.json` and this safetensors file.
    One(String),
    /// `config.json`, an index and its shards.
    Sharded,
    /// A PEFT adapter.
    Adapter,
    /// This GGUF file, which holds everything.
    Gguf(String),
}

/// Names of the entries of a directory, sorted. Names that are not UTF-8 are none of ours.
pub(super) fn list(directory: &Path) -> io::Result<Vec<String>> {
    let mut names = Vec::new();
    for entry in fs_err::read_dir(directory)? {
        if let Ok(name) = entry?.file_name().into_string() {
            names.push(name);
        }
    }
    names.sort();
    Ok(names)
}

/// How the weights among these files are stored. `place` is for messages.
pub(super) fn files(place: &str, names: &[String]) -> Result<Files, SourceError> {
    let has = |name: &str| names.iter().any(|n| n == name);
    let ending = |endings: &[&str]| -> Vec<String> {
        let fits = |name: &&String| endings.iter().any(|ending| name.ends_with(ending)) && is_plain_name(name);
        names.iter().filter(fits).cloned().collect()
    };
    let mut safetensors = ending(&[".safetensors"]);
    safetensors.retain(|name| name != ADAPTER_WEIGHTS);
    let mut gguf = ending(&[".gguf"]);
    // One that is being overwritten stays whole until its config goes.
    if has(UNFINISHED) && !has(CONFIG) {
        return Err(SourceError::Unfinished { place: place.to_owned() });
    }
    let files = if has("model.safetensors") {
        Files::One("model.safetensors".into())
    } else if has(INDEX) {
        Files::Sharded
    } else if has(ADAPTER_CONFIG) && has(ADAPTER_WEIGHTS) {
        return Ok(Files::Adapter);
    } else if safetensors.len() == 1 {
        Files::One(safetensors.remove(0))
    } else if !safetensors.is_empty() {
        let remedy = "call it model.safetensors, or write the index of the shards";
        return Err(SourceError::Ambiguous { place: place.to_owned(), kind: "safetensors", files: safetensors, remedy });
    } else if gguf.len() == 1 {
        return Ok(Files::Gguf(gguf.remove(0)));
    } else if !gguf.is_empty() {
        let remedy = "name the file too: .../FILE.gguf";
        return Err(SourceError::Ambiguous { place: place.to_owned(), kind: "GGUF", files: gguf, remedy });
    } else if let Some(file) = ending(&[".bin", ".pt", ".pth"]).into_iter().find(|name| name != "training_args.bin") {
        return Err(SourceError::Pickle { place: place.to_owned(), file });
    } else {
        return Err(SourceError::NoWeights { place: place.to_owned() });
    };
    if has(CONFIG) { Ok(files) } else { Err(SourceError::NoConfig { place: place.to_owned() }) }
}

/// The files among these that travel with a model.
pub(super) fn sidecar_names(names: &[String]) -> impl Iterator<Item = &String> {
    names.iter().filter(|name| SIDECARS.contains(&name.as_str()) || name.starts_with("LICENSE"))
}
