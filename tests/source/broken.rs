//! Models that cannot be opened, each with the message it gives.

use std::path::Path;

use insta::assert_snapshot;
use proptest::prelude::*;
use serde_json::{Value, json};

use super::{model, open, shard};
use crate::support::models;

/// The message for a tiny llama after `change`; its directory reads `[DIR]`.
fn message(change: impl FnOnce(&Path)) -> String {
    let dir = model("llama");
    change(dir.path());
    let error = open(dir.path()).err().expect("it opens");
    error.to_string().replace(dir.path().to_str().unwrap(), "[DIR]")
}

/// Rewrites `model.safetensors`.
fn rewrite(dir: &Path, change: impl FnOnce(&mut Vec<u8>)) {
    let file = dir.join("model.safetensors");
    let mut bytes = fs_err::read(&file).unwrap();
    change(&mut bytes);
    fs_err::write(file, bytes).unwrap();
}

/// Replaces the header of `model.safetensors`.
fn rewrite_header(dir: &Path, change: impl FnOnce(&mut Value)) {
    rewrite(dir, |bytes| {
        let length = usize::try_from(u64::from_le_bytes(*bytes.first_chunk().unwrap())).unwrap();
        let mut header = serde_json::from_slice(&bytes[8..8 + length]).unwrap();
        change(&mut header);
        let header = header.to_string();
        bytes.splice(..8 + length, (header.len() as u64).to_le_bytes().into_iter().chain(header.into_bytes()));
    });
}

fn rewrite_index(dir: &Path, change: impl FnOnce(&mut Value)) {
    let file = dir.join("model.safetensors.index.json");
    let mut index = serde_json::from_slice(&fs_err::read(&file).unwrap()).unwrap();
    change(&mut index);
    fs_err::write(file, index.to_string()).unwrap();
}

#[test]
fn nothing_there() {
    let dir = tempfile::tempdir().unwrap();
    let say = |path: &Path| open(path).err().unwrap().to_string().replace(dir.path().to_str().unwrap(), "[DIR]");
    assert_snapshot!(say(&dir.path().join("nowhere")), @"");
    assert_snapshot!(say(dir.path()), @"");
    fs_err::write(dir.path().join("notes.txt"), "hello").unwrap();
    assert_snapshot!(say(&dir.path().join("notes.txt")), @"");
}

#[test]
fn wrong_files() {
    assert_snapshot!(message(|dir| fs_err::rename(dir.join("model.safetensors"), dir.join("pytorch_model.bin")).unwrap()), @"");
    assert_snapshot!(message(|dir| fs_err::remove_file(dir.join("config.json")).unwrap()), @"");
    assert_snapshot!(message(|dir| {
        fs_err::copy(dir.join("model.safetensors"), dir.join("a.safetensors")).unwrap();
        fs_err::rename(dir.join("model.safetensors"), dir.join("b.safetensors")).unwrap();
    }), @"");
    assert_snapshot!(message(|dir| fs_err::write(dir.join("model.safetensors"), "version https://git-lfs.github.com/spec/v1\n").unwrap()), @"");
    assert_snapshot!(message(|dir| fs_err::write(dir.join("model.safetensors"), b"PK\x03\x04 and so on, as torch.save writes").unwrap()), @"");
}

#[test]
fn broken_configs() {
    assert_snapshot!(message(|dir| fs_err::write(dir.join("config.json"), "{\n  \"hidden_size\": 32,\n}").unwrap()), @"");
    assert_snapshot!(message(|dir| fs_err::write(dir.join("config.json"), "").unwrap()), @"");
    let config = |change: fn(&mut Value)| {
        message(|dir| {
            let mut config = models::config("llama");
            change(&mut config);
            fs_err::write(dir.join("config.json"), config.to_string()).unwrap();
        })
    };
    assert_snapshot!(config(|config| config["model_type"] = json!("mamba")), @"");
    assert_snapshot!(config(|config| drop(config.as_object_mut().unwrap().remove("hidden_size"))), @"");
    assert_snapshot!(config(|config| config["quantization_config"] = json!({"quant_method": "awq", "bits": 4})), @"");
}

#[test]
fn broken_safetensors() {
    assert_snapshot!(message(|dir| rewrite(dir, Vec::clear)), @"");
    assert_snapshot!(message(|dir| rewrite(dir, |bytes| bytes.truncate(100))), @"");
    assert_snapshot!(message(|dir| rewrite(dir, |bytes| bytes.truncate(bytes.len() - 5))), @"");
    assert_snapshot!(message(|dir| rewrite(dir, |bytes| bytes[20] = b'\\')), @"");
    assert_snapshot!(message(|dir| rewrite_header(dir, |header| header["model.norm.weight"]["shape"] = json!([33]))), @"");
    assert_snapshot!(message(|dir| rewrite_header(dir, |header| header["model.norm.weight"]["shape"] = json!([u64::MAX, 2]))), @"");
    assert_snapshot!(message(|dir| rewrite_header(dir, |header| header["model.norm.weight"]["data_offsets"] = json!([0, 64]))), @"");
    assert_snapshot!(message(|dir| rewrite_header(dir, |header| header["model.norm.weight"]["dtype"] = json!("I16"))), @"");
    assert_snapshot!(message(|dir| rewrite_header(dir, |header| header["model.norm.weight"]["dtype"] = json!("Q3"))), @"");
}

#[test]
fn broken_shards() {
    assert_snapshot!(message(|dir| fs_err::remove_file(dir.join(&shard(dir)[1])).unwrap()), @"");
    let index = |shard_name: &str| {
        message(|dir| {
            shard(dir);
            rewrite_index(dir, |index| index["weight_map"]["model.norm.weight"] = json!(shard_name));
        })
    };
    assert_snapshot!(index("../model.safetensors"), @"");
    assert_snapshot!(index("/etc/passwd"), @"");
    assert_snapshot!(index(r"..\model.safetensors"), @"");
    assert_snapshot!(index("model-00001-of-00002.safetensors"), @"");
    let index = |change: fn(&mut Value)| {
        message(|dir| {
            shard(dir);
            rewrite_index(dir, change);
        })
    };
    assert_snapshot!(index(|index| index["weight_map"]["model.more"] = json!("model-00001-of-00002.safetensors")), @"");
    assert_snapshot!(index(|index| index["weight_map"]["model.norm.weight"] = json!(3)), @"");
    assert_snapshot!(index(|index| index["weight_map"] = json!({})), @"");
    assert_snapshot!(index(|index| drop(index.as_object_mut().unwrap().remove("weight_map"))), @"");
    assert_snapshot!(message(|dir| {
        let shards = shard(dir);
        fs_err::copy(dir.join(&shards[0]), dir.join(&shards[1])).unwrap();
    }), @"");
}

#[cfg(unix)]
#[test]
fn unreadable_directory() {
    use std::os::unix::fs::PermissionsExt as _;
    let dir = model("llama");
    let permissions = |mode| fs_err::set_permissions(dir.path(), std::fs::Permissions::from_mode(mode)).unwrap();
    permissions(0o000);
    // Root reads everything.
    if fs_err::read_dir(dir.path()).is_err() {
        let message = open(dir.path()).err().unwrap().to_string();
        assert!(message.contains(dir.path().to_str().unwrap()) && message.contains("ermission"), "{message}");
    }
    permissions(0o700);
}

/// Reads everything that opens.
fn exercise(dir: &Path) {
    if let Ok(source) = open(dir) {
        for name in source.weights.names() {
            if let (Some(info), Ok(view)) = (source.weights.info(&name), source.weights.read(&name)) {
                assert_eq!(info.bytes(), view.data.len());
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(256))]

    #[test]
    fn mutated_headers_never_panic(changes in prop::collection::vec((0usize..4000, any::<u8>()), 1..6), length in prop::option::of(any::<u64>())) {
        let dir = model("llama");
        rewrite(dir.path(), |bytes| {
            for (at, byte) in changes {
                bytes[at] = byte;
            }
            if let Some(length) = length {
                bytes[..8].copy_from_slice(&length.to_le_bytes());
            }
        });
        exercise(dir.path());
    }

    #[test]
    fn mutated_indexes_never_panic(changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..6)) {
        let dir = model("llama");
        shard(dir.path());
        let file = dir.path().join("model.safetensors.index.json");
        let mut bytes = fs_err::read(&file).unwrap();
        for (at, byte) in changes {
            let at = at.index(bytes.len());
            bytes[at] = byte;
        }
        fs_err::write(&file, bytes).unwrap();
        exercise(dir.path());
    }
}
