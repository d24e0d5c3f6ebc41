//! Models that cannot be opened, each with the message it gives.

use std::path::Path;

use insta::assert_snapshot;
use proptest::prelude::*;
use serde_json::{Value, json};

use super::{model, open};
use crate::support::models::{self, rewrite, rewrite_header, rewrite_index, shard};

/// The message for a tiny llama after `change`; its directory reads `[DIR]`.
fn message(change: impl FnOnce(&Path)) -> String {
    let dir = model("llama");
    change(dir.path());
    let error = open(dir.path()).err().expect("it opens");
    error.to_string().replace(dir.path().to_str().unwrap(), "[DIR]")
}

#[test]
fn nothing_there() {
    let dir = tempfile::tempdir().unwrap();
    let say = |path: &Path| open(path).err().unwrap().to_string().replace(dir.path().to_str().unwrap(), "[DIR]");
    assert_snapshot!(say(&dir.path().join("nowhere")), @"`[DIR]/nowhere` is neither a file nor a directory here, nor a name on the Hub (`owner/name[@revision]`); check the path");
    assert_snapshot!(say(dir.path()), @"`[DIR]` holds no weights; a model is config.json with model.safetensors (or its shards and index), a PEFT adapter, or one .gguf file");
    fs_err::write(dir.path().join("notes.txt"), "hello").unwrap();
    assert_snapshot!(say(&dir.path().join("notes.txt")), @"`[DIR]/notes.txt` is not a model; name its directory, or a .gguf file");
}

#[test]
fn wrong_files() {
    assert_snapshot!(message(|dir| fs_err::rename(dir.join("model.safetensors"), dir.join("pytorch_model.bin")).unwrap()), @"`[DIR]` has its weights only as PyTorch pickles (`pytorch_model.bin`), which are not read because they can run code; convert them: `AutoModelForCausalLM.from_pretrained(dir).save_pretrained(out, safe_serialization=True)`");
    assert_snapshot!(message(|dir| fs_err::remove_file(dir.join("config.json")).unwrap()), @"`[DIR]` has weights but no config.json; copy it from the model that was fine-tuned");
    assert_snapshot!(message(|dir| {
        fs_err::copy(dir.join("model.safetensors"), dir.join("a.safetensors")).unwrap();
        fs_err::rename(dir.join("model.safetensors"), dir.join("b.safetensors")).unwrap();
    }), @"`[DIR]` has several safetensors files and nothing says which one is the model: a.safetensors, b.safetensors; call it model.safetensors, or write the index of the shards");
    assert_snapshot!(message(|dir| fs_err::write(dir.join("model.safetensors"), "version https://git-lfs.github.com/spec/v1\n").unwrap()), @"`[DIR]/model.safetensors` cannot be read: it is a Git LFS pointer, not the weights; run `git lfs pull` in its repository, or download the file");
    assert_snapshot!(message(|dir| fs_err::write(dir.join("model.safetensors"), b"PK\x03\x04 and so on, as torch.save writes").unwrap()), @"`[DIR]/model.safetensors` cannot be read: it is a PyTorch pickle under another name; convert it with `safetensors.torch.save_file`");
}

#[test]
fn broken_configs() {
    assert_snapshot!(message(|dir| fs_err::write(dir.join("config.json"), "{\n  \"hidden_size\": 32,\n}").unwrap()), @"[DIR]/config.json:3:1: not valid JSON: trailing comma");
    assert_snapshot!(message(|dir| fs_err::write(dir.join("config.json"), "").unwrap()), @"[DIR]/config.json:1:1: not valid JSON: EOF while parsing a value");
    let config = |change: fn(&mut Value)| {
        message(|dir| {
            let mut config = models::config("llama");
            change(&mut config);
            fs_err::write(dir.join("config.json"), config.to_string()).unwrap();
        })
    };
    assert_snapshot!(config(|config| config["model_type"] = json!("mamba")), @"`[DIR]`: config.json: model type `mamba` is not supported (supported: llama, mistral, qwen2, qwen3, mixtral, qwen2_moe, qwen3_moe)");
    assert_snapshot!(config(|config| drop(config.as_object_mut().unwrap().remove("hidden_size"))), @"`[DIR]`: config.json: `hidden_size` is missing; copy config.json from the model that was fine-tuned");
    assert_snapshot!(config(|config| config["quantization_config"] = json!({"quant_method": "awq", "bits": 4})), @r#"`[DIR]`: config.json: `quantization_config` is "awq", expected none: quantised safetensors are not read, use the original checkpoint or a GGUF"#);
}

#[test]
fn broken_safetensors() {
    assert_snapshot!(message(|dir| rewrite(dir, Vec::clear)), @"`[DIR]/model.safetensors` cannot be read: it has 0 bytes, too few for a header; it was cut short or is no safetensors file; fetch it again");
    assert_snapshot!(message(|dir| rewrite(dir, |bytes| bytes.truncate(100))), @"`[DIR]/model.safetensors` cannot be read: its header claims 2104 bytes, but the file has 100; it was cut short or is no safetensors file; fetch it again");
    assert_snapshot!(message(|dir| rewrite(dir, |bytes| bytes.truncate(bytes.len() - 5))), @"`[DIR]/model.safetensors` cannot be read: its tensors do not end where the file ends, at byte 41339; it was cut short or appended to; fetch it again");
    assert_snapshot!(message(|dir| rewrite(dir, |bytes| bytes[20] = b'\\')), @"`[DIR]/model.safetensors` cannot be read: invalid JSON in header: invalid escape at line 1 column 14");
    assert_snapshot!(message(|dir| rewrite_header(dir, |header| header["model.norm.weight"]["shape"] = json!([33]))), @"`[DIR]/model.safetensors` cannot be read: tensor `model.norm.weight` has shape [33] of BF16, which does not fit its 64 bytes; the file is damaged: fetch it again");
    assert_snapshot!(message(|dir| rewrite_header(dir, |header| header["model.norm.weight"]["shape"] = json!([u64::MAX, 2]))), @"`[DIR]/model.safetensors` cannot be read: tensor `model.norm.weight` has shape [18446744073709551615, 2] of BF16, which does not fit its 64 bytes; the file is damaged: fetch it again");
    assert_snapshot!(message(|dir| rewrite_header(dir, |header| header["model.norm.weight"]["data_offsets"] = json!([0, 64]))), @"`[DIR]/model.safetensors` cannot be read: the bytes of tensor `lm_head.weight` overlap another's or leave a gap; the file is damaged: fetch it again");
    assert_snapshot!(message(|dir| rewrite_header(dir, |header| header["model.norm.weight"]["dtype"] = json!("I16"))), @"`[DIR]/model.safetensors`: tensor `model.norm.weight` is stored as I16; only float checkpoints are read: use the model that was quantised");
    assert_snapshot!(message(|dir| rewrite_header(dir, |header| header["model.norm.weight"]["dtype"] = json!("Q3"))), @"`[DIR]/model.safetensors` cannot be read: invalid JSON in header: unknown variant `Q3`, expected one of `BOOL`, `F4`, `F6_E2M3`, `F6_E3M2`, `U8`, `I8`, `F8_E5M2`, `F8_E4M3`, `F8_E8M0`, `F8_E4M3FNUZ`, `F8_E5M2FNUZ`, `I16`, `U16`, `F16`, `BF16`, `I32`, `U32`, `F32`, `C64`, `F64`, `I64`, `U64` at line 1 column 2102");
}

#[test]
fn broken_shards() {
    assert_snapshot!(message(|dir| fs_err::remove_file(dir.join(&shard(dir)[1])).unwrap()), @"[DIR]/model.safetensors.index.json: shard `model-00002-of-00002.safetensors` is missing; fetch it, or fetch the model again");
    let index = |shard_name: &str| {
        message(|dir| {
            shard(dir);
            rewrite_index(dir, |index| index["weight_map"]["model.norm.weight"] = json!(shard_name));
        })
    };
    assert_snapshot!(index("../model.safetensors"), @"[DIR]/model.safetensors.index.json: the shard of tensor `model.norm.weight` is `../model.safetensors`; a shard must be a plain file name beside the index");
    assert_snapshot!(index("/etc/passwd"), @"[DIR]/model.safetensors.index.json: the shard of tensor `model.norm.weight` is `/etc/passwd`; a shard must be a plain file name beside the index");
    assert_snapshot!(index(r"..\model.safetensors"), @r#"[DIR]/model.safetensors.index.json: the shard of tensor `model.norm.weight` is `..\model.safetensors`; a shard must be a plain file name beside the index"#);
    assert_snapshot!(index("model-00001-of-00002.safetensors"), @"[DIR]/model.safetensors.index.json: tensor `model.norm.weight` should be in `model-00001-of-00002.safetensors`, but is not; index and shards are of different models");
    let index = |change: fn(&mut Value)| {
        message(|dir| {
            shard(dir);
            rewrite_index(dir, change);
        })
    };
    assert_snapshot!(index(|index| index["weight_map"]["model.more"] = json!("model-00001-of-00002.safetensors")), @"[DIR]/model.safetensors.index.json: tensor `model.more` should be in `model-00001-of-00002.safetensors`, but is not; index and shards are of different models");
    assert_snapshot!(index(|index| index["weight_map"]["model.norm.weight"] = json!(3)), @"[DIR]/model.safetensors.index.json: the shard of tensor `model.norm.weight` is 3, not a file name");
    assert_snapshot!(index(|index| index["weight_map"] = json!({})), @"[DIR]/model.safetensors.index.json: `weight_map` is empty");
    assert_snapshot!(index(|index| drop(index.as_object_mut().unwrap().remove("weight_map"))), @"[DIR]/model.safetensors.index.json: `weight_map` is not an object");
    assert_snapshot!(message(|dir| {
        let shards = shard(dir);
        fs_err::copy(dir.join(&shards[0]), dir.join(&shards[1])).unwrap();
    }), @"tensor `lm_head.weight` is both in `[DIR]/model-00001-of-00002.safetensors` and in `[DIR]/model-00002-of-00002.safetensors`; one of the files is a leftover");
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
