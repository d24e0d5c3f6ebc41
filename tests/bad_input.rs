//! Broken recipes and checkpoints as their users meet them: what was typed, the exit code, and a message that says what is wrong, where, and
//! what to do. Whatever goes wrong, no model is left behind.
//!
//! What each room of the library says is in `recipe` and `source`; here is what arrives at the terminal.

use std::path::Path;

use insta::assert_snapshot;
use safetensors::{Dtype, SafeTensors, tensor::TensorView};
use serde_json::{Value, json};

use crate::support::{
    cli::transcript,
    models::{self, FFN, HIDDEN, rewrite, rewrite_header, rewrite_index, shard},
};

const RECIPE: &str = "base_model: base
experts:
  - source_model: a
    positive_prompts: [w5 w6 w7]
  - source_model: b
    positive_prompts: [w8 w9]
";

/// Runs a command in a directory that holds `recipe.yml` and its models `base`, `a` and `b`, after `change`. Nothing may be left in `out`.
fn fails(args: &[&str], change: impl FnOnce(&Path)) -> String {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path();
    for (seed, name) in ["base", "a", "b"].iter().enumerate() {
        models::write(&path.join(name), "llama", seed as u64);
    }
    fs_err::write(path.join("recipe.yml"), RECIPE).unwrap();
    change(path);
    let before = files(path);
    let transcript = transcript(path, args);
    let left: Vec<String> = files(path).into_iter().filter(|file| !before.contains(file) && !file.contains("/.")).collect();
    assert!(left.is_empty(), "{left:?} is left behind by\n{transcript}");
    assert!(!transcript.contains("exit 0"), "it works:\n{transcript}");
    transcript
}

fn compose(change: impl FnOnce(&Path)) -> String {
    fails(&["compose", "recipe.yml", "out"], change)
}

/// Every file below a directory, as `folder/name`.
fn files(dir: &Path) -> Vec<String> {
    let entries = fs_err::read_dir(dir).unwrap().map(|entry| entry.unwrap().path());
    let below = |path: std::path::PathBuf| if path.is_dir() { files(&path) } else { vec![path.display().to_string()] };
    entries.flat_map(below).collect()
}

/// Replaces a piece of the recipe.
fn edit(dir: &Path, from: &str, to: &str) {
    assert!(RECIPE.contains(from), "{from}");
    fs_err::write(dir.join("recipe.yml"), RECIPE.replace(from, to)).unwrap();
}

/// Writes expert `b` anew, with another config.
fn other_config(dir: &Path, change: impl FnOnce(&mut Value)) {
    let mut config = models::config("llama");
    change(&mut config);
    fs_err::write(dir.join("b/config.json"), config.to_string()).unwrap();
}

/// A PEFT adapter of rank 2 on one projection of [out, in].
fn adapter(dir: &Path, module: &str, [out, inner]: [usize; 2]) {
    fs_err::create_dir(dir).unwrap();
    let zeros = vec![0; 4 * 2 * out.max(inner)];
    let view = |shape: [usize; 2]| TensorView::new(Dtype::F32, shape.to_vec(), &zeros[..4 * shape[0] * shape[1]]).unwrap();
    let tensors = [("A", view([2, inner])), ("B", view([out, 2]))];
    let tensors = tensors.map(|(part, view)| (format!("base_model.model.{module}.lora_{part}.weight"), view));
    safetensors::serialize_to_file(tensors, None, &dir.join("adapter_model.safetensors")).unwrap();
    fs_err::write(dir.join("adapter_config.json"), json!({"peft_type": "LORA", "r": 2, "lora_alpha": 4}).to_string()).unwrap();
}

/// Overwrites the first value of a bf16 tensor with these bits.
fn rewrite_tensor(dir: &Path, tensor: &str, bits: u16) {
    rewrite(dir, |bytes| {
        let (header, metadata) = SafeTensors::read_metadata(bytes).unwrap();
        let at = 8 + header + metadata.info(tensor).unwrap().data_offsets.0;
        bytes[at..at + 2].copy_from_slice(&bits.to_le_bytes());
    });
}

/// The beginning of a GGUF file: magic, version, numbers of tensors and of metadata, and `general.architecture`.
fn gguf(architecture: &str) -> Vec<u8> {
    let text = |text: &str| [&(text.len() as u64).to_le_bytes(), text.as_bytes()].concat();
    let kind = 8u32.to_le_bytes();
    [b"GGUF", &3u32.to_le_bytes()[..], &0u64.to_le_bytes(), &1u64.to_le_bytes(), &text("general.architecture"), &kind, &text(architecture)]
        .concat()
}

#[test]
fn broken_recipes() {
    assert_snapshot!(compose(|dir| edit(dir, "    positive_prompts: [w5", "  positive_prompts: [w5")), @"");
    assert_snapshot!(compose(|dir| edit(dir, "base_model: base", "base_model: base\nshard_size: 5B\ngate_mode: hiden")), @"");
    assert_snapshot!(compose(|dir| edit(dir, "    positive_prompts: [w8 w9]\n", "")), @"");
    assert_snapshot!(compose(|dir| edit(dir, "[w8 w9]", "[w5 w6 w7]")), @"");
    assert_snapshot!(compose(|dir| edit(dir, "positive_prompts: [w8 w9]", "prompts_file: poems.txt")), @"");
    assert_snapshot!(compose(|dir| edit(dir, "base_model: base", "base_model: base\nexperts_per_token: 3")), @"");
    assert_snapshot!(compose(|dir| edit(dir, "base_model: base", "base_model: base\ndtype: int8")), @"");
    assert_snapshot!(compose(|dir| edit(dir, "base_model: base", "base_model: base\narchitecture: deepseek")), @"");
    assert_snapshot!(compose(|dir| fs_err::write(dir.join("recipe.yml"), b"base_model: caf\xe9").unwrap()), @"");
    assert_snapshot!(fails(&["compose", "base", "out"], |_| ()), @"");
}

#[test]
fn models_that_are_not_there() {
    assert_snapshot!(compose(|dir| edit(dir, "source_model: b", "source_model: ./poet")), @"");
    assert_snapshot!(compose(|dir| edit(dir, "source_model: b", "source_model: org/poet")), @"");
    assert_snapshot!(compose(|dir| fs_err::remove_dir_all(dir.join("b")).and_then(|()| fs_err::create_dir(dir.join("b"))).unwrap()), @"");
    assert_snapshot!(compose(|dir| fs_err::rename(dir.join("b/model.safetensors"), dir.join("b/pytorch_model.bin")).unwrap()), @"");
    assert_snapshot!(compose(|dir| fs_err::remove_file(dir.join("b/config.json")).unwrap()), @"");
}

#[cfg(unix)]
#[test]
fn models_that_cannot_be_read() {
    use std::os::unix::fs::{PermissionsExt as _, symlink};
    // What is left of a Hub cache that was cleaned up, or copied without what its links lead to.
    assert_snapshot!(compose(|dir| {
        fs_err::remove_file(dir.join("b/model.safetensors")).unwrap();
        symlink("../blobs/1234", dir.join("b/model.safetensors")).unwrap();
    }), @"");
    assert_snapshot!(compose(|dir| {
        fs_err::remove_file(dir.join("b/config.json")).unwrap();
        fs_err::create_dir(dir.join("b/config.json")).unwrap();
    }), @"");
    let closed = |dir: &Path, mode| fs_err::set_permissions(dir.join("b"), std::fs::Permissions::from_mode(mode)).unwrap();
    let dir = tempfile::tempdir().unwrap();
    fs_err::create_dir(dir.path().join("b")).unwrap();
    closed(dir.path(), 0o000);
    if fs_err::read_dir(dir.path().join("b")).is_ok() {
        eprintln!("skipped: root reads every directory");
        return;
    }
    assert_snapshot!(transcript(dir.path(), &["inspect", "b"]), @"");
}

#[test]
fn broken_checkpoints() {
    let file = |dir: &Path| dir.join("b");
    assert_snapshot!(compose(|dir| rewrite(&file(dir), |bytes| bytes.truncate(bytes.len() / 2))), @"");
    assert_snapshot!(compose(|dir| rewrite(&file(dir), |bytes| bytes.splice(.., *b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\n").for_each(drop))), @"");
    assert_snapshot!(compose(|dir| rewrite_header(&file(dir), |header| header["model.norm.weight"]["shape"] = json!([33]))), @"");
    assert_snapshot!(compose(|dir| rewrite_header(&file(dir), |header| header["model.layers.1.mlp.up_proj.weight"]["shape"] = json!([HIDDEN, FFN]))), @"");
    assert_snapshot!(compose(|dir| rewrite_header(&file(dir), |header| {
        let tensor = header.as_object_mut().unwrap().remove("model.layers.1.mlp.up_proj.weight").unwrap();
        header["model.layers.1.mlp.other.weight"] = tensor;
    })), @"");
    assert_snapshot!(compose(|dir| rewrite_header(&file(dir), |header| header["model.layers.0.mlp.up_proj.weight"]["dtype"] = json!("I16"))), @"");
    assert_snapshot!(compose(|dir| fs_err::remove_file(file(dir).join(&shard(&file(dir))[1])).unwrap()), @"");
    assert_snapshot!(compose(|dir| {
        shard(&file(dir));
        rewrite_index(&file(dir), |index| index["weight_map"]["model.norm.weight"] = json!("../a/model.safetensors"));
    }), @"");
    assert_snapshot!(compose(|dir| rewrite_tensor(&file(dir), "model.layers.1.mlp.up_proj.weight", 0x7fc0)), @"");
}

#[test]
fn broken_configs() {
    assert_snapshot!(compose(|dir| fs_err::write(dir.join("b/config.json"), "{\n  \"hidden_size\": 32,\n}").unwrap()), @"");
    assert_snapshot!(compose(|dir| other_config(dir, |config| drop(config.as_object_mut().unwrap().remove("hidden_size")))), @"");
    assert_snapshot!(compose(|dir| other_config(dir, |config| config["model_type"] = json!("mamba"))), @"");
    assert_snapshot!(compose(|dir| other_config(dir, |config| config["quantization_config"] = json!({"quant_method": "awq"}))), @"");
    assert_snapshot!(compose(|dir| fs_err::write(dir.join("base/tokenizer.json"), "{}").unwrap()), @"");
}

#[test]
fn models_that_do_not_fit_together() {
    assert_snapshot!(compose(|dir| models::write(&dir.join("b"), "qwen3", 2)), @"");
    assert_snapshot!(compose(|dir| {
        let tokenizer = fs_err::read_to_string(dir.join("b/tokenizer.json")).unwrap();
        fs_err::write(dir.join("b/tokenizer.json"), tokenizer.replace("\"w5\"", "\"w\"").replace("\"w6\"", "\"w5\"").replace("\"w\"", "\"w6\"")).unwrap();
    }), @"");
    assert_snapshot!(compose(|dir| {
        let mut config = models::config("llama");
        config["intermediate_size"] = json!(FFN + 16);
        let tensors = models::tensors("llama").into_iter().map(|(name, shape)| (name, shape.into_iter().map(|n| if n == FFN { FFN + 16 } else { n }).collect()));
        models::write_with(&dir.join("b"), &config, &tensors.collect::<Vec<_>>(), 2);
    }), @"");
    assert_snapshot!(compose(|dir| other_config(dir, |config| config["rope_theta"] = json!(500_000.0))), @"");
    assert_snapshot!(compose(|dir| other_config(dir, |config| config["num_key_value_heads"] = json!(4))), @"");
    assert_snapshot!(compose(|dir| {
        let made = transcript(dir, &["compose", "recipe.yml", "sparse"]);
        assert!(made.contains("exit 0"), "{made}");
        edit(dir, "source_model: b", "source_model: sparse");
    }), @"");
}

#[test]
fn adapters_that_do_not_fit() {
    let on_base = |dir: &Path| edit(dir, "source_model: b", "source_model: base+lora");
    assert_snapshot!(compose(|dir| {
        on_base(dir);
        adapter(&dir.join("lora"), "model.layers.0.mlp.up_proj", [FFN, 2 * HIDDEN]);
    }), @"");
    assert_snapshot!(compose(|dir| {
        on_base(dir);
        adapter(&dir.join("lora"), "transformer.h.0.attn.c_attn", [HIDDEN, HIDDEN]);
    }), @"");
    assert_snapshot!(compose(|dir| edit(dir, "source_model: b", "source_model: base+a")), @"");
    assert_snapshot!(compose(|dir| {
        edit(dir, "base_model: base", "base_model: lora");
        adapter(&dir.join("lora"), "model.layers.0.mlp.up_proj", [FFN, HIDDEN]);
    }), @"");
}

#[test]
fn broken_gguf_files() {
    let expert = |dir: &Path, bytes: &[u8]| {
        edit(dir, "source_model: b", "source_model: b.gguf");
        fs_err::write(dir.join("b.gguf"), bytes).unwrap();
    };
    assert_snapshot!(compose(|dir| expert(dir, &gguf("llama")[..40])), @"");
    assert_snapshot!(compose(|dir| expert(dir, b"<!DOCTYPE html>")), @"");
    assert_snapshot!(compose(|dir| expert(dir, &gguf("rwkv6"))), @"");
    assert_snapshot!(compose(|dir| expert(dir, &gguf("llama"))), @"");
}

#[test]
fn output_directories_that_are_taken() {
    assert_snapshot!(compose(|dir| {
        fs_err::create_dir(dir.join("out")).unwrap();
        fs_err::write(dir.join("out/thesis.tex"), "").unwrap();
    }), @"");
    assert_snapshot!(compose(|dir| fs_err::write(dir.join("out"), "").unwrap()), @"");
    // A directory that a compose did not finish is no model.
    assert_snapshot!(fails(&["run", "out", "w5"], |dir| {
        fs_err::create_dir(dir.join("out")).unwrap();
        fs_err::copy(dir.join("a/model.safetensors"), dir.join("out/model.safetensors")).unwrap();
        fs_err::write(dir.join("out/.upcycle-unfinished"), "").unwrap();
    }), @"");
}

#[test]
fn bad_command_lines() {
    assert_snapshot!(fails(&["compose", "recipe.yml"], |_| ()), @"");
    assert_snapshot!(fails(&["compose", "recipe.yml", "out", "--out-shard-size", "5X"], |_| ()), @"");
    assert_snapshot!(fails(&["compose", "recipe.yml", "out", "--trust-remote-code"], |_| ()), @"");
    assert_snapshot!(fails(&["compose", "recipe.yml", "out", "--device", "tpu"], |_| ()), @"");
    assert_snapshot!(fails(&["run", "a"], |_| ()), @"");
    assert_snapshot!(fails(&["run", "./nowhere", "w5"], |_| ()), @"");
}
