//! Opening models: directories, adapters, GGUF files, the Hub. The messages are part of the interface: each is a snapshot.

mod broken;
pub mod gguf;
#[cfg(feature = "hub")]
mod hub;
mod lora;
mod quantize;

use std::path::Path;

use tempfile::TempDir;
use upcycle::{
    recipe::ModelRef,
    source::{self, OpenOptions, Source, SourceError},
};

use crate::support::models;

fn reference(path: impl AsRef<Path>) -> ModelRef {
    ModelRef { path: path.as_ref().to_str().unwrap().to_owned(), revision: None, lora: None }
}

fn open(path: impl AsRef<Path>) -> Result<Source, SourceError> {
    source::open(&reference(path), &OpenOptions::default())
}

/// A tiny model in a temporary directory.
fn model(family: &str) -> TempDir {
    let dir = tempfile::tempdir().unwrap();
    models::write(dir.path(), family, 1);
    dir
}

/// Every tensor of both, by name, is the same bytes.
fn assert_same_tensors(a: &Source, b: &Source) {
    let sorted = |source: &Source| {
        let mut names = source.weights.names();
        names.sort();
        names
    };
    assert_eq!(sorted(a), sorted(b));
    for name in a.weights.names() {
        let (a, b) = (a.weights.read(&name).unwrap(), b.weights.read(&name).unwrap());
        assert_eq!(a.info, b.info, "{name}");
        assert!(a.data == b.data, "{name} differs");
    }
}

#[test]
fn a_directory_is_a_model() {
    let dir = model("qwen2");
    let source = open(dir.path()).unwrap();
    assert_eq!(source.family.model_type, "qwen2");
    assert_eq!(source.config.hidden, models::HIDDEN);
    let sidecars: Vec<_> = source.sidecars.keys().map(String::as_str).collect();
    assert_eq!(sidecars, ["generation_config.json", "tokenizer.json", "tokenizer_config.json"]);
    let file = fs_err::read(dir.path().join("model.safetensors")).unwrap();
    let tensors = safetensors::SafeTensors::deserialize(&file).unwrap();
    assert_eq!(source.weights.names().len(), tensors.len());
    for (name, tensor) in tensors.tensors() {
        let view = source.weights.read(&name).unwrap();
        assert_eq!((view.info.shape.as_slice(), &view.data[..]), (tensor.shape(), tensor.data()));
    }
}

#[test]
fn shards_are_one_model() {
    let (whole, sharded) = (model("llama"), model("llama"));
    models::shard(sharded.path());
    assert_same_tensors(&open(whole.path()).unwrap(), &open(sharded.path()).unwrap());
}

#[test]
fn a_single_file_may_have_any_name() {
    let dir = model("llama");
    fs_err::rename(dir.path().join("model.safetensors"), dir.path().join("weights.safetensors")).unwrap();
    assert!(open(dir.path()).is_ok());
}

#[test]
fn a_trunk_gets_its_prefix() {
    let (whole, trunk) = (model("llama"), model("llama"));
    let names = models::tensors("llama").into_iter();
    let names: Vec<_> = names.map(|(name, shape)| (name.trim_start_matches("model.").to_owned(), shape)).collect();
    models::write_with(trunk.path(), &models::config("llama"), &names, 1);
    let (whole, trunk) = (open(whole.path()).unwrap(), open(trunk.path()).unwrap());
    for name in whole.weights.names() {
        assert_eq!(trunk.weights.info(&name), whole.weights.info(&name), "{name}");
    }
}

#[test]
fn integer_tensors_that_the_model_does_not_need_are_let_be() {
    let dir = model("llama");
    let bytes = fs_err::read(dir.path().join("model.safetensors")).unwrap();
    let tensors = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    let ids = 7i64.to_le_bytes();
    let extra = [
        ("model.position_ids", safetensors::tensor::TensorView::new(safetensors::Dtype::I64, vec![1], &ids).unwrap()),
        ("model.layers.0.self_attn.rotary_emb.inv_freq", tensors.tensor("model.norm.weight").unwrap()),
    ];
    let all = tensors.tensors().into_iter().chain(extra.map(|(name, view)| (name.to_owned(), view)));
    let file = dir.path().join("new");
    safetensors::serialize_to_file(all, None, &file).unwrap();
    fs_err::rename(file, dir.path().join("model.safetensors")).unwrap();
    let source = open(dir.path()).unwrap();
    assert!(source.weights.names().contains(&"model.position_ids".to_owned()));
    assert!(source.weights.info("model.position_ids").is_none());
    assert!(source.weights.read("model.position_ids").unwrap_err().to_string().contains("I64"));
    assert!(!source.weights.names().iter().any(|name| name.contains("inv_freq")));
}
