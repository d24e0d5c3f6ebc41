//! Composites that are on disk: changed expert by expert, held against what was written, told about in JSON; and the plan of one that no machine
//! here could hold.

use std::{
    collections::{BTreeMap, BTreeSet},
    path::Path,
    process::{Command, Output},
    time::{Duration, Instant, SystemTime},
};

use assert_cmd::cargo::cargo_bin;
use serde_json::{Map, Value, json};

use crate::{compose::files, support::models};

fn upcycle(dir: &Path, args: &[&str]) -> Output {
    let mut command = Command::new(cargo_bin!("upcycle"));
    command.args(args).current_dir(dir).envs([
        ("RAYON_NUM_THREADS", "2"),
        ("HF_HUB_OFFLINE", "1"),
        ("NO_COLOR", "1"),
        ("HF_HOME", "hf"),
        ("UPCYCLE_CACHE", "cache"),
    ]);
    command.output().unwrap()
}

/// Exit code 0; what came out on stdout.
fn done(dir: &Path, args: &[&str]) -> String {
    let output = upcycle(dir, args);
    assert!(output.status.success(), "{args:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

fn fails(dir: &Path, args: &[&str]) -> (String, String) {
    let output = upcycle(dir, args);
    assert_eq!(output.status.code(), Some(1), "{args:?}");
    (String::from_utf8(output.stdout).unwrap(), String::from_utf8(output.stderr).unwrap())
}

/// A base and experts `a` to `d`, and a recipe over some of them.
fn directory(experts: &str) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    for (seed, name) in ["base", "a", "b", "c", "d"].iter().enumerate() {
        models::write(&dir.path().join(name), "llama", seed as u64);
    }
    recipe(dir.path(), "recipe.yml", experts);
    dir
}

fn recipe(dir: &Path, file: &str, experts: &str) {
    let expert = |name: char| format!("  - source_model: {name}\n    positive_prompts: [w{}]\n", u32::from(name));
    let experts: String = experts.chars().map(expert).collect();
    fs_err::write(dir.join(file), format!("base_model: base\ngate_mode: hidden\nexperts:\n{experts}")).unwrap();
}

const SHARDS: [&str; 2] = ["--out-shard-size", "20K"];

#[test]
fn experts_come_and_go_in_place() {
    let dir = directory("abc");
    let dir = dir.path();
    let compose = |recipe: &str, out: &str| done(dir, &["compose", recipe, out, SHARDS[0], SHARDS[1]]);
    // The same but for the recipe's own text, which is not kept to the letter.
    let same_as = |experts: &str| {
        recipe(dir, "fresh.yml", experts);
        compose("fresh.yml", "fresh");
        let [changed, fresh] = ["out", "fresh"].map(|name| {
            let mut files = files(&dir.join(name));
            assert!(files.remove("upcycle_recipe.yml").is_some() && files.remove("README.md").is_some());
            let manifest = files.get_mut("upcycle_manifest.json").unwrap();
            let mut json: Value = serde_json::from_slice(manifest).unwrap();
            assert!(json.as_object_mut().unwrap().remove("recipe").is_some());
            *manifest = json.to_string().into_bytes();
            files
        });
        assert!(changed == fresh, "{experts}: {:?} and {:?}", changed.keys(), fresh.keys());
        fs_err::remove_dir_all(dir.join("fresh")).unwrap();
    };
    compose("recipe.yml", "out");
    done(dir, &["replace-expert", "out", "b", "d", "--prompt", "w100", SHARDS[0], SHARDS[1]]);
    same_as("adc");
    done(dir, &["add-expert", "out", "b", "--prompt", "w98", SHARDS[0], SHARDS[1]]);
    same_as("adcb");
    done(dir, &["remove-expert", "out", "0", SHARDS[0], SHARDS[1]]);
    same_as("dcb");
    done(dir, &["verify", "out"]);
    let before = files(&dir.join("out"));
    assert!(fails(dir, &["remove-expert", "out", "a"]).1.contains("there is no expert `a`; there are d, c, b, numbered from 0"));
    assert!(fails(dir, &["add-expert", "out", "nowhere", "--prompt", "x"]).1.contains("nowhere"));
    assert!(files(&dir.join("out")) == before, "a change that fails changes nothing");
}

/// A text of words of its own for each expert, and a recipe over experts `a` to `c` whose gates are fitted to them.
fn fitted(dir: &Path, head: &str) {
    let mut recipe = format!("base_model: base\ngate_mode: ridge\n{head}experts:\n");
    for (e, name) in ["a", "b", "c", "d"].into_iter().enumerate() {
        let words: Vec<String> = (0..6000).map(|i| format!("w{}", 3 + 15 * e + (i * i + 3 * i + i / 7) % 14)).collect();
        fs_err::write(dir.join(format!("{name}.txt")), words.join(" ")).unwrap();
        if name != "d" {
            recipe += &format!("  - source_model: {name}\n    text_file: {name}.txt\n");
        }
    }
    fs_err::write(dir.join("fitted.yml"), recipe).unwrap();
}

/// Time and bytes of the weights' files.
fn weights(dir: &Path) -> BTreeMap<String, (SystemTime, Vec<u8>)> {
    let names = files(dir).into_keys().filter(|name| name.ends_with(".safetensors"));
    let state = |name: &String| (fs_err::metadata(dir.join(name)).unwrap().modified().unwrap(), fs_err::read(dir.join(name)).unwrap());
    names.map(|name| (name.clone(), state(&name))).collect()
}

/// The names of files that are not the same in both.
fn changed<T: PartialEq>(a: &BTreeMap<String, T>, b: &BTreeMap<String, T>) -> Vec<String> {
    a.keys().chain(b.keys()).filter(|name| a.get(*name) != b.get(*name)).cloned().collect::<BTreeSet<_>>().into_iter().collect()
}

#[test]
fn with_statistics_experts_come_and_go_without_the_texts_of_others() {
    for head in ["", "shared: base\nrepair: false\n", "shared: average\n"] {
        let dir = directory("abc");
        let dir = dir.path();
        fitted(dir, head);
        done(dir, &["compose", "fitted.yml", "out", "--keep-stats", "--shard-by", "expert"]);
        let out = dir.join("out");
        let (before, old) = (weights(&out), files(&out));
        assert_eq!(before.len(), 3 + 2, "{:?}", before.keys());
        ["a", "b", "c"].iter().for_each(|name| fs_err::remove_file(dir.join(format!("{name}.txt"))).unwrap());

        done(dir, &["add-expert", "out", "d", "--text-file", "d.txt"]);
        let four = weights(&out);
        assert_eq!(changed(&before, &four), ["model-expert-003.safetensors", "model-gates.safetensors"], "{head}");
        let verified: Value = serde_json::from_str(&done(dir, &["verify", "out", "--json"])).unwrap();
        assert_eq!((&verified["differences"], &verified["absent"]), (&json!([]), &json!([])), "{head}");
        done(dir, &["run", "out", "w5 w6", "--max-tokens", "2"]);

        done(dir, &["remove-expert", "out", "d"]);
        let again = files(&out);
        let differ = changed(&old, &again);
        // The recipe is not kept to the letter, and the card has it; the manifest knows how the gates came about this time.
        assert!(
            differ.iter().all(|name| ["README.md", "upcycle_recipe.yml", "upcycle_manifest.json"].contains(&name.as_str())),
            "{differ:?}"
        );
        assert_eq!(changed(&before, &weights(&out)), ["model-gates.safetensors"], "the others were not even written");

        // In the middle: what was behind it moves up.
        done(dir, &["remove-expert", "out", "b"]);
        done(dir, &["add-expert", "out", "d", "--text-file", "d.txt"]);
        let moved = weights(&out);
        let expert = |e: usize| format!("model-expert-{e:03}.safetensors");
        assert_eq!(moved[&expert(0)], before[&expert(0)]);
        assert_eq!(moved[&expert(2)].1.len(), four[&expert(3)].1.len());
        done(dir, &["verify", "out"]);
    }
}

#[test]
fn an_expert_replaced_by_itself_changes_nothing() {
    let dir = directory("abc");
    let dir = dir.path();
    fitted(dir, "shared: base\nrepair: false\n");
    done(dir, &["compose", "fitted.yml", "out", "--keep-stats", SHARDS[0], SHARDS[1]]);
    let out = dir.join("out");
    let (before, old) = (weights(&out), files(&out));
    assert!(before.len() > 3);
    done(dir, &["replace-expert", "out", "b", "b", "--text-file", "b.txt", SHARDS[0], SHARDS[1]]);
    let differ = changed(&old, &files(&out));
    assert!(differ.iter().all(|name| ["README.md", "upcycle_recipe.yml", "upcycle_manifest.json"].contains(&name.as_str())), "{differ:?}");
    done(dir, &["replace-expert", "out", "b", "d", "--text-file", "d.txt", SHARDS[0], SHARDS[1]]);
    assert!(!changed(&before, &weights(&out)).is_empty());
    done(dir, &["verify", "out"]);
    // Written anew without statistics there are none to be taken for its own.
    done(dir, &["compose", "fitted.yml", "out", "--overwrite"]);
    assert!(!out.join("upcycle.stats").exists());
}

#[test]
fn statistics_of_another_composite_are_refused() {
    let dir = directory("abc");
    let dir = dir.path();
    fitted(dir, "shared: base\n");
    done(dir, &["compose", "fitted.yml", "out", "--keep-stats"]);
    fitted(dir, "shared: average\n");
    done(dir, &["compose", "fitted.yml", "other", "--keep-stats"]);
    fs_err::copy(dir.join("other/upcycle.stats"), dir.join("out/upcycle.stats")).unwrap();
    let before = files(&dir.join("out"));
    let (_, stderr) = fails(dir, &["add-expert", "out", "d", "--text-file", "d.txt"]);
    assert!(stderr.contains("do not belong together"), "{stderr}");
    assert!(files(&dir.join("out")) == before);
    let (_, stderr) = fails(dir, &["compose", "recipe.yml", "new", "--keep-stats"]);
    assert!(stderr.contains("`gate_mode: hidden` is not fitted"), "{stderr}");
}

#[test]
fn verify_says_what_differs_a_line_each() {
    let dir = directory("abc");
    let dir = dir.path();
    done(dir, &["compose", "recipe.yml", "out"]);
    let good: Value = serde_json::from_str(&done(dir, &["verify", "--json", "out"])).unwrap();
    assert_eq!((&good["differences"], &good["absent"]), (&json!([]), &json!([])));
    assert!(good["compared"].as_u64() > Some(20) && good["compared"].as_u64() < good["tensors"].as_u64());
    models::rewrite(&dir.join("out"), |bytes| *bytes.last_mut().unwrap() ^= 1);
    let (stdout, stderr) = fails(dir, &["verify", "out", "--no-sources"]);
    assert_eq!(stdout.lines().count(), 1);
    assert!(stdout.starts_with("tensor `lm_head.weight` in model.safetensors has the checksum "), "{stdout}");
    assert!(stderr.contains("error: out is not as it was written"), "{stderr}");
    models::rewrite(&dir.join("out"), |bytes| bytes.truncate(bytes.len() - 4));
    assert!(fails(dir, &["verify", "out"]).1.contains("it was cut short"));
    let (_, stderr) = fails(dir, &["verify", "a"]);
    assert!(stderr.contains("upcycle_manifest.json") && stderr.contains("did not write this model"), "{stderr}");
}

#[test]
fn progress_is_told_in_json() {
    let dir = directory("abc");
    let stdout = done(dir.path(), &["-q", "compose", "recipe.yml", "out", "--json", SHARDS[0], SHARDS[1]]);
    let events: Vec<Value> = stdout.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let of = |kind: &str| events.iter().filter(|event| event["event"] == kind).collect::<Vec<_>>();
    assert_eq!(events[0]["event"], "begin");
    assert!(of("progress").iter().all(|event| event["bytes_per_second"].is_u64() && event["seconds_left"].is_number()));
    let shards = of("shard");
    assert!(shards.len() > 2);
    let written: u64 = shards.iter().map(|shard| shard["bytes"].as_u64().unwrap()).sum();
    assert!(written > events[0]["total"].as_u64().unwrap());
}

#[test]
fn licences_are_on_the_card_and_conflicts_are_found() {
    let dir = directory("ab");
    let dir = dir.path();
    let card =
        |model: &str, licence: &str| fs_err::write(dir.join(model).join("README.md"), format!("---\nlicense: {licence}\n---\n")).unwrap();
    card("base", "apache-2.0");
    card("a", "apache-2.0");
    done(dir, &["compose", "recipe.yml", "out"]);
    let text = fs_err::read_to_string(dir.join("out/README.md")).unwrap();
    assert!(text.contains("\nlicense: apache-2.0\n") && text.contains("| expert 0 | a | apache-2.0 |"), "{text}");
    assert!(text.contains("condition numbers of the 2 layers"), "{text}");
    card("a", "gpl-3.0");
    card("b", "llama3");
    let (_, stderr) = fails(dir, &["plan", "recipe.yml"]);
    assert!(stderr.contains("`a` is under `gpl-3.0`, `b` under `llama3`") && stderr.contains("--allow licence-conflict"), "{stderr}");
    done(dir, &["plan", "recipe.yml", "--allow", "licence-conflict"]);
}

/// Llama 70B as a file of holes.
fn seventy_billion(dir: &Path) {
    let (d, f, layers, kv, vocab) = (8192, 28672, 80, 1024, 128_256);
    let config = json!({
        "model_type": "llama", "hidden_size": d, "intermediate_size": f, "num_hidden_layers": layers, "num_attention_heads": 64,
        "num_key_value_heads": 8, "max_position_embeddings": 8192, "rms_norm_eps": 1e-5, "rope_theta": 500_000.0, "vocab_size": vocab,
        "tie_word_embeddings": false, "torch_dtype": "bfloat16",
    });
    let mut tensors = vec![
        ("model.embed_tokens.weight".to_owned(), vec![vocab, d]),
        ("lm_head.weight".into(), vec![vocab, d]),
        ("model.norm.weight".into(), vec![d]),
    ];
    for l in 0..layers {
        for (name, shape) in [
            ("input_layernorm", vec![d]),
            ("post_attention_layernorm", vec![d]),
            ("self_attn.q_proj", vec![d, d]),
            ("self_attn.k_proj", vec![kv, d]),
            ("self_attn.v_proj", vec![kv, d]),
            ("self_attn.o_proj", vec![d, d]),
            ("mlp.gate_proj", vec![f, d]),
            ("mlp.up_proj", vec![f, d]),
            ("mlp.down_proj", vec![d, f]),
        ] {
            tensors.push((format!("model.layers.{l}.{name}.weight"), shape));
        }
    }
    let (mut header, mut end) = (Map::new(), 0_u64);
    for (name, shape) in tensors {
        let start = end;
        end += 2 * shape.iter().product::<usize>() as u64;
        header.insert(name, json!({"dtype": "BF16", "shape": shape, "data_offsets": [start, end]}));
    }
    let header = Value::Object(header).to_string();
    fs_err::create_dir_all(dir).unwrap();
    fs_err::write(dir.join("config.json"), config.to_string()).unwrap();
    let file = dir.join("model.safetensors");
    fs_err::write(&file, [&(header.len() as u64).to_le_bytes(), header.as_bytes()].concat()).unwrap();
    fs_err::OpenOptions::new().write(true).open(&file).unwrap().set_len(8 + header.len() as u64 + end).unwrap();
}

#[test]
fn eight_times_70_billion_are_planned_in_seconds() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    let mut recipe = "base_model: base\ngate_mode: random\nexperts:\n".to_owned();
    seventy_billion(&dir.join("base"));
    for e in 0..8 {
        seventy_billion(&dir.join(format!("ft{e}")));
        recipe += &format!("  - source_model: ft{e}\n    positive_prompts: [\"{e}\"]\n");
    }
    fs_err::write(dir.join("recipe.yml"), recipe).unwrap();
    let start = Instant::now();
    let plan: Value = serde_json::from_str(&done(dir, &["plan", "recipe.yml", "--json"])).unwrap();
    assert!(start.elapsed() < Duration::from_secs(60), "{:?}", start.elapsed());
    let mlps = 8 * 80 * 3 * 8192 * 28672_u64;
    let attention = 80 * (2 * 8192 * 8192 + 2 * 1024 * 8192_u64);
    let rest = 2 * 128_256 * 8192 + 80 * (2 * 8192 + 8 * 8192) + 8192;
    assert_eq!(plan["parameters"], mlps + attention + rest);
    assert_eq!(plan["bytes"], 2 * (mlps + attention + rest));
    assert!(plan["memory"].as_u64().unwrap() < 150_000_000, "{}", plan["memory"]);
}
