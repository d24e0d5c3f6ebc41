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
    assert_snapshot!(compose(|dir| edit(dir, "    positive_prompts: [w5", "  positive_prompts: [w5")), @"
    $ upcycle compose recipe.yml out
    exit 1
    --- stderr
    error: while parsing a block collection, did not find expected '-' indicator
     --> recipe.yml:4:3
      |
    4 |   positive_prompts: [w5 w6 w7]
      |   ^
      |
    hint: check the indentation and the quotes here and in the line above
    ");
    assert_snapshot!(compose(|dir| edit(dir, "base_model: base", "base_model: base\nshard_size: 5B\ngate_mode: hiden")), @"
    $ upcycle compose recipe.yml out
    exit 1
    --- stderr
    error: unknown key `shard_size` in a recipe
     --> recipe.yml:2:1
      |
    2 | shard_size: 5B
      | ^^^^^^^^^^
      |
    hint: a recipe has the keys `base_model`, `experts`, `shared_experts`, `gate_mode`, `dtype`, `experts_per_token`, `architecture`, `shared`, `repair`, `chat_template`, `tokenizer`, `layout`, `seed`

    error: unknown value `hiden` for `gate_mode`
     --> recipe.yml:3:12
      |
    3 | gate_mode: hiden
      |            ^^^^^
      |
    hint: did you mean `hidden`? It is one of `auto`, `softmax`, `ridge`, `lda`, `centroid`, `hidden`, `hidden_avg`, `cheap_embed`, `uniform`, `sequence`, `subspace`, `random`, `uniform_random`
    ");
    assert_snapshot!(compose(|dir| edit(dir, "    positive_prompts: [w8 w9]\n", "")), @"
    $ upcycle compose recipe.yml out
    exit 1
    --- stderr
    error: `auto` makes gates from prompts, but expert 1 has none
     --> recipe.yml:5:19
      |
    5 |   - source_model: b
      |                   ^ expert 1
      |
    hint: give it `positive_prompts` or a `prompts_file`, or set `gate_mode: random` and train the gates
    ");
    assert_snapshot!(compose(|dir| edit(dir, "[w8 w9]", "[w5 w6 w7]")), @"
    $ upcycle compose recipe.yml out
    exit 1
    --- stderr
    error[identical-prompts]: every expert has the same prompts
     --> recipe.yml:4:5
      |
    4 |     positive_prompts: [w5 w6 w7]
      |     ^^^^^^^^^^^^^^^^ expert 0
    5 |   - source_model: b
    6 |     positive_prompts: [w5 w6 w7]
      |     ---------------- expert 1
      |
      = note: equal prompts give equal gates: every token would go to the first experts
    hint: give each expert prompts of what it is good at; `--allow identical-prompts` if it is meant
    ");
    assert_snapshot!(compose(|dir| edit(dir, "positive_prompts: [w8 w9]", "prompts_file: poems.txt")), @"
    $ upcycle compose recipe.yml out
    exit 1
    --- stderr
    error: failed to open file `poems.txt`: No such file or directory (os error 2)
     --> recipe.yml:6:19
      |
    6 |     prompts_file: poems.txt
      |                   ^^^^^^^^^
      |
    hint: the path is relative to the recipe's folder
    ");
    assert_snapshot!(compose(|dir| edit(dir, "base_model: base", "base_model: base\nexperts_per_token: 3")), @"
    $ upcycle compose recipe.yml out
    exit 1
    --- stderr
    error: each token chooses 3 experts, but there are 2
     --> recipe.yml:2:1
      |
    2 | experts_per_token: 3
      | ^^^^^^^^^^^^^^^^^
      |
    hint: add experts, or lower `experts_per_token` (2 if not given)
    ");
    assert_snapshot!(compose(|dir| edit(dir, "base_model: base", "base_model: base\ndtype: int8")), @"
    $ upcycle compose recipe.yml out
    exit 1
    --- stderr
    error: unknown value `int8` for `dtype`
     --> recipe.yml:2:8
      |
    2 | dtype: int8
      |        ^^^^
      |
    hint: it is one of `float32`, `float16`, `bfloat16`, `float64`
    ");
    assert_snapshot!(compose(|dir| edit(dir, "base_model: base", "base_model: base\narchitecture: deepseek")), @"
    $ upcycle compose recipe.yml out
    exit 1
    --- stderr
    error: `architecture: deepseek` is none of `Mixtral`, `Qwen MoE`, `Qwen3 MoE`
    ");
    assert_snapshot!(compose(|dir| fs_err::write(dir.join("recipe.yml"), b"base_model: caf\xe9").unwrap()), @"
    $ upcycle compose recipe.yml out
    exit 1
    --- stderr
    error: recipe.yml:1: this is not UTF-8; save the recipe in that encoding
    ");
    assert_snapshot!(fails(&["compose", "base", "out"], |_| ()), @"
    $ upcycle compose base out
    exit 1
    --- stderr
    error: failed to read from file `base`: Is a directory (os error 21)
    ");
}

#[test]
fn models_that_are_not_there() {
    assert_snapshot!(compose(|dir| edit(dir, "source_model: b", "source_model: ./poet")), @"
    $ upcycle compose recipe.yml out
    exit 1
    --- stderr
    error: `./poet` is neither a file nor a directory here, nor a name on the Hub (`owner/name[@revision]`); check the path
    ");
    assert_snapshot!(compose(|dir| edit(dir, "source_model: b", "source_model: org/poet")), @"
    $ upcycle compose recipe.yml out
    exit 1
    --- stderr
    error: `org/poet@main` is not a path here, its snapshot is not in the Hub's cache (`hf/hub`), and HF_HUB_OFFLINE forbids to fetch it: unset it, or fetch the model first
    ");
    assert_snapshot!(compose(|dir| fs_err::remove_dir_all(dir.join("b")).and_then(|()| fs_err::create_dir(dir.join("b"))).unwrap()), @"
    $ upcycle compose recipe.yml out
    exit 1
    --- stderr
    error: `b` holds no weights; a model is config.json with model.safetensors (or its shards and index), a PEFT adapter, or one .gguf file
    ");
    assert_snapshot!(compose(|dir| fs_err::rename(dir.join("b/model.safetensors"), dir.join("b/pytorch_model.bin")).unwrap()), @"
    $ upcycle compose recipe.yml out
    exit 1
    --- stderr
    error: `b` has its weights only as PyTorch pickles (`pytorch_model.bin`), which are not read because they can run code; convert them: `AutoModelForCausalLM.from_pretrained(dir).save_pretrained(out, safe_serialization=True)`
    ");
    assert_snapshot!(compose(|dir| fs_err::remove_file(dir.join("b/config.json")).unwrap()), @"
    $ upcycle compose recipe.yml out
    exit 1
    --- stderr
    error: `b` has weights but no config.json; copy it from the model that was fine-tuned
    ");
}

#[cfg(unix)]
#[test]
fn models_that_cannot_be_read() {
    use std::os::unix::fs::{PermissionsExt as _, symlink};
    // What is left of a Hub cache that was cleaned up, or copied without what its links lead to.
    assert_snapshot!(compose(|dir| {
        fs_err::remove_file(dir.join("b/model.safetensors")).unwrap();
        symlink("../blobs/1234", dir.join("b/model.safetensors")).unwrap();
    }), @"
    $ upcycle compose recipe.yml out
    exit 1
    --- stderr
    error: `b/model.safetensors` is a link to `../blobs/1234`, which is not there; fetch the model again
    ");
    assert_snapshot!(compose(|dir| {
        fs_err::remove_file(dir.join("b/config.json")).unwrap();
        fs_err::create_dir(dir.join("b/config.json")).unwrap();
    }), @"
    $ upcycle compose recipe.yml out
    exit 1
    --- stderr
    error: failed to read from file `b/config.json`: Is a directory (os error 21)
    ");
    let dir = tempfile::tempdir().unwrap();
    let closed = dir.path().join("closed");
    fs_err::create_dir(&closed).unwrap();
    fs_err::set_permissions(&closed, std::fs::Permissions::from_mode(0o000)).unwrap();
    if fs_err::read_dir(&closed).is_ok() {
        eprintln!("skipped: root reads every directory");
        return;
    }
    assert_snapshot!(transcript(dir.path(), &["inspect", "closed"]), @"
    $ upcycle inspect closed
    exit 1
    --- stderr
    error: failed to read directory `closed`: Permission denied (os error 13)
    ");
}

#[test]
fn broken_checkpoints() {
    let file = |dir: &Path| dir.join("b");
    assert_snapshot!(compose(|dir| rewrite(&file(dir), |bytes| bytes.truncate(bytes.len() / 2))), @"
    $ upcycle compose recipe.yml out
    exit 1
    --- stderr
    error: `b/model.safetensors` cannot be read: its tensors do not end where the file ends, at byte 20672; it was cut short or appended to; fetch it again
    ");
    assert_snapshot!(compose(|dir| rewrite(&file(dir), |bytes| bytes.splice(.., *b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\n").for_each(drop))), @"
    $ upcycle compose recipe.yml out
    exit 1
    --- stderr
    error: `b/model.safetensors` cannot be read: it is a Git LFS pointer, not the weights; run `git lfs pull` in its repository, or download the file
    ");
    assert_snapshot!(compose(|dir| rewrite_header(&file(dir), |header| header["model.norm.weight"]["shape"] = json!([33]))), @"
    $ upcycle compose recipe.yml out
    exit 1
    --- stderr
    error: `b/model.safetensors` cannot be read: tensor `model.norm.weight` has shape [33] of BF16, which does not fit its 64 bytes; the file is damaged: fetch it again
    ");
    assert_snapshot!(compose(|dir| rewrite_header(&file(dir), |header| header["model.layers.1.mlp.up_proj.weight"]["shape"] = json!([HIDDEN, FFN]))), @"
    $ upcycle compose recipe.yml out
    exit 1
    --- stderr
    error: `b`: tensor `model.layers.1.mlp.up_proj.weight` has shape [32, 48], but its config.json makes it [48, 32]; weights and config are of different models: fetch both again
    ");
    assert_snapshot!(compose(|dir| rewrite_header(&file(dir), |header| {
        let tensor = header.as_object_mut().unwrap().remove("model.layers.1.mlp.up_proj.weight").unwrap();
        header["model.layers.1.mlp.other.weight"] = tensor;
    })), @"
    $ upcycle compose recipe.yml out
    exit 1
    --- stderr
    error: `b` has no tensor `model.layers.1.mlp.up_proj.weight`, which its config.json asks for; it is incomplete: fetch it again
    ");
    assert_snapshot!(compose(|dir| rewrite_header(&file(dir), |header| header["model.layers.0.mlp.up_proj.weight"]["dtype"] = json!("I16"))), @"
    $ upcycle compose recipe.yml out
    exit 1
    --- stderr
    error: `b/model.safetensors`: tensor `model.layers.0.mlp.up_proj.weight` is stored as I16; only float checkpoints are read: use the model that was quantised
    ");
    assert_snapshot!(compose(|dir| fs_err::remove_file(file(dir).join(&shard(&file(dir))[1])).unwrap()), @"
    $ upcycle compose recipe.yml out
    exit 1
    --- stderr
    error: b/model.safetensors.index.json: shard `model-00002-of-00002.safetensors` is missing; fetch it, or fetch the model again
    ");
    assert_snapshot!(compose(|dir| {
        shard(&file(dir));
        rewrite_index(&file(dir), |index| index["weight_map"]["model.norm.weight"] = json!("../a/model.safetensors"));
    }), @"
    $ upcycle compose recipe.yml out
    exit 1
    --- stderr
    error: b/model.safetensors.index.json: the shard of tensor `model.norm.weight` is `../a/model.safetensors`; a shard must be a plain file name beside the index
    ");
    assert_snapshot!(compose(|dir| {
        edit(dir, "base_model: base", "base_model: base\ngate_mode: hidden");
        rewrite_tensor(&file(dir), "model.layers.1.mlp.up_proj.weight", 0x7fc0);
    }), @"
    $ upcycle compose recipe.yml out
    exit 1
    --- stderr
    warning: attention of expert `a` has drifted by 122.8 % from the base's, which the composite uses: what attention learned is lost; `shared: fit` with `gate_mode: auto` keeps most of it (`--allow drift` if it is meant)
    error: tensor `model.layers.1.block_sparse_moe.experts.1.w3.weight` has NaN or infinite values; they come from b, which is damaged: fetch it again (`--allow non-finite-weights` writes them all the same)
    ");
}

#[test]
fn broken_configs() {
    assert_snapshot!(compose(|dir| fs_err::write(dir.join("b/config.json"), "{\n  \"hidden_size\": 32,\n}").unwrap()), @"
    $ upcycle compose recipe.yml out
    exit 1
    --- stderr
    error: b/config.json:3:1: not valid JSON: trailing comma
    ");
    assert_snapshot!(compose(|dir| other_config(dir, |config| drop(config.as_object_mut().unwrap().remove("hidden_size")))), @"
    $ upcycle compose recipe.yml out
    exit 1
    --- stderr
    error: `b`: config.json: `hidden_size` is missing; copy config.json from the model that was fine-tuned
    ");
    assert_snapshot!(compose(|dir| other_config(dir, |config| config["model_type"] = json!("mamba"))), @"
    $ upcycle compose recipe.yml out
    exit 1
    --- stderr
    error: `b`: config.json: model type `mamba` is not supported (supported: llama, mistral, qwen2, qwen3, mixtral, qwen2_moe, qwen3_moe)
    ");
    assert_snapshot!(compose(|dir| other_config(dir, |config| config["quantization_config"] = json!({"quant_method": "awq"}))), @r#"
    $ upcycle compose recipe.yml out
    exit 1
    --- stderr
    error: `b`: config.json: `quantization_config` is "awq", expected none: quantised safetensors are not read, use the original checkpoint or a GGUF
    "#);
    assert_snapshot!(compose(|dir| fs_err::write(dir.join("base/tokenizer.json"), "{}").unwrap()), @"
    $ upcycle compose recipe.yml out
    exit 1
    --- stderr
    warning: attention of expert `a` has drifted by 122.8 % from the base's, too far for shared weights to keep all that it learned: compare with `upcycle eval`, or serve whole experts (`gate_mode: sequence`) (`--allow drift` if it is meant)
    error: base/tokenizer.json: Model missing. at line 1 column 2; fetch it again
    ");
}

#[test]
fn models_that_do_not_fit_together() {
    assert_snapshot!(compose(|dir| models::write(&dir.join("b"), "qwen3", 2)), @"
    $ upcycle compose recipe.yml out
    exit 1
    --- stderr
    error: model type differs: llama in the base `base`, qwen3 in `b`; experts must be fine-tunes of the base
    ");
    assert_snapshot!(compose(|dir| {
        let tokenizer = fs_err::read_to_string(dir.join("b/tokenizer.json")).unwrap();
        fs_err::write(dir.join("b/tokenizer.json"), tokenizer.replace("\"w5\"", "\"w\"").replace("\"w6\"", "\"w5\"").replace("\"w\"", "\"w6\"")).unwrap();
    }), @"
    $ upcycle compose recipe.yml out
    exit 1
    --- stderr
    error: 2 of 64 tokens of `b` have another id than in the base `base` (`w5` is 6 there, 5 here): the expert would read another text than is written (`--allow vocabulary-mismatch` if it is meant)
    ");
    assert_snapshot!(compose(|dir| {
        let mut config = models::config("llama");
        config["intermediate_size"] = json!(FFN + 16);
        let tensors = models::tensors("llama").into_iter().map(|(name, shape)| (name, shape.into_iter().map(|n| if n == FFN { FFN + 16 } else { n }).collect()));
        models::write_with(&dir.join("b"), &config, &tensors.collect::<Vec<_>>(), 2);
    }), @"
    $ upcycle compose recipe.yml out
    exit 1
    --- stderr
    error: experts differ in `intermediate_size`: 48 in `a`, 64 in `b`; use experts of one size
    ");
    assert_snapshot!(compose(|dir| other_config(dir, |config| config["rope_theta"] = json!(500_000.0))), @"
    $ upcycle compose recipe.yml out
    exit 1
    --- stderr
    error: `rope_theta` differs: 10000 in the base `base`, 500000 in `b`; the composite uses the base's, which that expert was not trained with (`--allow rope-mismatch` if it is meant)
    ");
    assert_snapshot!(compose(|dir| other_config(dir, |config| config["num_key_value_heads"] = json!(4))), @"
    $ upcycle compose recipe.yml out
    exit 1
    --- stderr
    error: `num_key_value_heads` differs: 2 in the base `base`, 4 in `b`; experts must be fine-tunes of the base
    ");
    assert_snapshot!(compose(|dir| {
        let made = transcript(dir, &["compose", "recipe.yml", "sparse"]);
        assert!(made.contains("exit 0"), "{made}");
        edit(dir, "source_model: b", "source_model: sparse");
    }), @"
    $ upcycle compose recipe.yml out
    exit 1
    --- stderr
    error: `sparse` is a Mixture-of-Experts already (`mixtral`); name the dense models that it was made from
    ");
}

#[test]
fn adapters_that_do_not_fit() {
    let on_base = |dir: &Path| edit(dir, "source_model: b", "source_model: base+lora");
    assert_snapshot!(compose(|dir| {
        on_base(dir);
        adapter(&dir.join("lora"), "model.layers.0.mlp.up_proj", [FFN, 2 * HIDDEN]);
    }), @"
    $ upcycle compose recipe.yml out
    exit 1
    --- stderr
    error: `lora/adapter_model.safetensors`: tensor `base_model.model.model.layers.0.mlp.up_proj.lora_A.weight`: its A has shape [2, 64], expected [2, 32] (base tensor `model.layers.0.mlp.up_proj.weight` [48, 32]); is it for another base?
    ");
    assert_snapshot!(compose(|dir| {
        on_base(dir);
        adapter(&dir.join("lora"), "transformer.h.0.attn.c_attn", [HIDDEN, HIDDEN]);
    }), @"
    $ upcycle compose recipe.yml out
    exit 1
    --- stderr
    error: `lora/adapter_model.safetensors`: tensor `base_model.model.transformer.h.0.attn.c_attn.lora_A.weight`: the base has no tensor `transformer.h.0.attn.c_attn.weight`; is it for another model?
    ");
    assert_snapshot!(compose(|dir| edit(dir, "source_model: b", "source_model: base+a")), @"
    $ upcycle compose recipe.yml out
    exit 1
    --- stderr
    error: `a` is a whole model, where an adapter (what stands behind `+`) is needed
    ");
    assert_snapshot!(compose(|dir| {
        edit(dir, "base_model: base", "base_model: lora");
        adapter(&dir.join("lora"), "model.layers.0.mlp.up_proj", [FFN, HIDDEN]);
    }), @"
    $ upcycle compose recipe.yml out
    exit 1
    --- stderr
    error: `lora` is an adapter and does not say for which base; write BASE+lora
    ");
}

#[test]
fn broken_gguf_files() {
    let expert = |dir: &Path, bytes: &[u8]| {
        edit(dir, "source_model: b", "source_model: b.gguf");
        fs_err::write(dir.join("b.gguf"), bytes).unwrap();
    };
    assert_snapshot!(compose(|dir| expert(dir, &gguf("llama")[..40])), @"
    $ upcycle compose recipe.yml out
    exit 1
    --- stderr
    error: `b.gguf`: its header claims 20 bytes at 32, but the file has 40; it was cut short: fetch it again
    ");
    assert_snapshot!(compose(|dir| expert(dir, b"<!DOCTYPE html>")), @"
    $ upcycle compose recipe.yml out
    exit 1
    --- stderr
    error: `b.gguf`: it does not begin with `GGUF`: it is something else under this name; fetch it again
    ");
    assert_snapshot!(compose(|dir| expert(dir, &gguf("rwkv6"))), @"
    $ upcycle compose recipe.yml out
    exit 1
    --- stderr
    error: `b.gguf`: architecture `rwkv6` is not supported in GGUF (supported: llama, qwen2, qwen2moe, qwen3, qwen3moe)
    ");
    assert_snapshot!(compose(|dir| expert(dir, &gguf("llama"))), @"
    $ upcycle compose recipe.yml out
    exit 1
    --- stderr
    error: `b.gguf`: metadata `llama.embedding_length` is missing; the file is incomplete: fetch it again, or use the original checkpoint
    ");
}

#[test]
fn output_directories_that_are_taken() {
    assert_snapshot!(compose(|dir| {
        fs_err::create_dir(dir.join("out")).unwrap();
        fs_err::write(dir.join("out/thesis.tex"), "").unwrap();
    }), @"
    $ upcycle compose recipe.yml out
    exit 1
    --- stderr
    error: out is not empty; give another directory, or `--overwrite`
    ");
    assert_snapshot!(compose(|dir| fs_err::write(dir.join("out"), "").unwrap()), @"
    $ upcycle compose recipe.yml out
    exit 1
    --- stderr
    error: out is a file; a model is a directory: give another name
    ");
    // A directory that a compose did not finish is no model.
    assert_snapshot!(fails(&["run", "out", "w5"], |dir| {
        fs_err::create_dir(dir.join("out")).unwrap();
        fs_err::copy(dir.join("a/model.safetensors"), dir.join("out/model.safetensors")).unwrap();
        fs_err::write(dir.join("out/.upcycle-unfinished"), "").unwrap();
    }), @"
    $ upcycle run out w5
    exit 1
    --- stderr
    error: `out` was not finished by `upcycle compose`; run the same compose again, it goes on from there
    ");
}

#[test]
fn bad_command_lines() {
    assert_snapshot!(fails(&["compose", "recipe.yml"], |_| ()), @"
    $ upcycle compose recipe.yml
    exit 2
    --- stderr
    error: the following required arguments were not provided:
      <OUT>

    Usage: upcycle compose <RECIPE> <OUT>

    For more information, try '--help'.
    ");
    assert_snapshot!(fails(&["compose", "recipe.yml", "out", "--out-shard-size", "5X"], |_| ()), @"
    $ upcycle compose recipe.yml out --out-shard-size 5X
    exit 2
    --- stderr
    error: invalid value '5X' for '--out-shard-size <SIZE>': `X` is no unit; use K, M, G or B

    For more information, try '--help'.
    ");
    assert_snapshot!(fails(&["compose", "recipe.yml", "out", "--trust-remote-code"], |_| ()), @"
    $ upcycle compose recipe.yml out --trust-remote-code
    exit 2
    --- stderr
    error: `--trust-remote-code`: upcycle runs no code from a model's repository; families are built in (`upcycle doctor` lists them)

    Usage: upcycle [OPTIONS] <COMMAND>

    For more information, try '--help'.
    ");
    assert_snapshot!(fails(&["compose", "recipe.yml", "out", "--device", "tpu"], |_| ()), @"
    $ upcycle compose recipe.yml out --device tpu
    exit 2
    --- stderr
    error: invalid value 'tpu' for '--device <DEVICE>': `tpu` is none of `auto`, `cpu`, `cuda`, `cuda:N`, `metal`

    For more information, try '--help'.
    ");
    assert_snapshot!(fails(&["run", "a"], |_| ()), @"
    $ upcycle run a
    exit 2
    --- stderr
    error: the following required arguments were not provided:
      <PROMPT>

    Usage: upcycle run <MODEL> <PROMPT>

    For more information, try '--help'.
    ");
    assert_snapshot!(fails(&["run", "./nowhere", "w5"], |_| ()), @"
    $ upcycle run ./nowhere w5
    exit 1
    --- stderr
    error: `./nowhere` is neither a file nor a directory here, nor a name on the Hub (`owner/name[@revision]`); check the path
    ");
}
