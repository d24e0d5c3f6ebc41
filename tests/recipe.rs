//! Recipes as people write them, right and wrong.
//!
//! `tests/recipes` holds published mergekit-moe recipes, as published. The messages are part of the interface: each is a snapshot.

use std::{fmt::Write as _, path::Path};

use insta::assert_snapshot;
use proptest::prelude::*;
use upcycle::recipe::{self, Layout, ModelRef, Recipe, RecipeError, Shared};
use upcycle_architectures::Dtype;

/// What a recipe is understood as, and what is said about it.
fn verdict(text: &str, allow: &[&str]) -> String {
    let allow: Vec<String> = allow.iter().map(|name| (*name).to_owned()).collect();
    match recipe::parse(text, Path::new("recipe.yml"), &allow) {
        Ok((recipe, warnings)) => {
            let mut out = summary(&recipe);
            for warning in warnings {
                write!(out, "\n{warning}\n").unwrap();
            }
            out
        }
        Err(error) => error.to_string(),
    }
}

/// `to_json`, one line per key and expert, without what is not given.
fn summary(recipe: &Recipe) -> String {
    let mut out = String::new();
    for (key, value) in recipe.to_json().as_object_mut().unwrap() {
        if let Some(experts) = value.as_array_mut() {
            writeln!(out, "{key}:").unwrap();
            for expert in experts {
                expert.as_object_mut().unwrap().retain(|_, value| !value.is_null() && value.as_array().is_none_or(|list| !list.is_empty()));
                writeln!(out, "  - {expert}").unwrap();
            }
        } else if !value.is_null() {
            writeln!(out, "{key}: {value}").unwrap();
        }
    }
    out
}

/// A sound recipe of two experts.
const SOUND: &str = r#"base_model: base
gate_mode: hidden
experts_per_token: 1
experts:
  - source_model: one
    positive_prompts: ["Write a function that sorts a list", "Why does this loop never end?"]
  - source_model: two
    positive_prompts: ["What is the integral of x^2", "Prove that there are infinitely many primes."]
"#;

/// [`SOUND`] with `from` replaced by `to`.
fn edited(from: &str, to: &str) -> String {
    assert!(SOUND.contains(from), "{from:?} is not in the text");
    SOUND.replacen(from, to, 1)
}

/// What is said about [`SOUND`] with `from` replaced by `to`.
fn told(from: &str, to: &str) -> String {
    verdict(&edited(from, to), &[])
}

/// [`SOUND`] with another line at its top level.
fn with(line: &str) -> String {
    format!("{SOUND}{line}\n")
}

/// A recipe that must be understood.
fn parsed(text: &str) -> Recipe {
    recipe::parse(text, Path::new("recipe.yml"), &[]).unwrap().0
}

#[test]
fn published_recipes() {
    let mut count = 0;
    for entry in fs_err::read_dir("tests/recipes").unwrap() {
        let path = entry.unwrap().path();
        let name = path.file_stem().unwrap().to_str().unwrap();
        assert_snapshot!(format!("published-{name}"), verdict(&fs_err::read_to_string(&path).unwrap(), &[]));
        count += 1;
    }
    assert_eq!(count, 14);
}

#[test]
fn a_sound_recipe_is_passed_without_a_word() {
    assert_snapshot!(verdict(SOUND, &[]), @r#"
    base_model: "base"
    experts:
      - {"source_model":"one","positive_prompts":["Write a function that sorts a list","Why does this loop never end?"]}
      - {"source_model":"two","positive_prompts":["What is the integral of x^2","Prove that there are infinitely many primes."]}
    shared_experts:
    gate_mode: "hidden"
    experts_per_token: 1
    shared: "auto"
    chat_template: "auto"
    layout: "classic"
    "#);
    assert_eq!(parsed(SOUND).text, SOUND);
}

#[test]
fn every_key() {
    let text = r#"
base_model: {model: {path: org/base, revision: main}}
gate_mode: cheap_embed
dtype: torch.bfloat16
experts_per_token: 2
architecture: Qwen
shared: average
chat_template: true
tokenizer: org/tok@v2
layout: fused
seed: 18446744073709551615
experts:
  - source_model: org/one@abc
    positive_prompts: &p [a b c, "d"]
    negative_prompts: [e]
    noise_scale: 0.01
    residual_scale: 1
  - source_model: org/base+org/adapter@r1
    positive_prompts: [f, g]
    negative_prompts: *p
  - source_model: {model: org/base, lora: {path: org/adapter, revision: r2}}
    positive_prompts: [h, i]
shared_experts:
  - source_model: org/base
    residual_scale: 0.1
"#;
    assert_snapshot!(verdict(text, &[]), @r#"
    base_model: "org/base@main"
    experts:
      - {"source_model":"org/one@abc","positive_prompts":["a b c","d"],"negative_prompts":["e"],"noise_scale":0.01,"residual_scale":1.0}
      - {"source_model":"org/base+org/adapter@r1","positive_prompts":["f","g"],"negative_prompts":["a b c","d"]}
      - {"source_model":"org/base+org/adapter@r2","positive_prompts":["h","i"]}
    shared_experts:
      - {"source_model":"org/base","residual_scale":0.1}
    gate_mode: "cheap_embed"
    dtype: "bfloat16"
    experts_per_token: 2
    architecture: "Qwen"
    shared: "average"
    chat_template: true
    tokenizer: "org/tok@v2"
    layout: "fused"
    seed: 18446744073709551615
    "#);
}

#[test]
fn values_are_coerced_as_mergekit_does() {
    let recipe =
        parsed(&edited("experts_per_token: 1", "experts_per_token: \"1\"\ndtype: \"float16\"\nseed: \"7\"\nchat_template: \"true\""));
    assert_eq!((recipe.experts_per_token, recipe.dtype, recipe.seed, recipe.chat_template), (1, Some(Dtype::F16), Some(7), Some(true)));
    assert_eq!(parsed(&edited("experts_per_token: 1", "experts_per_token: 2.0")).experts_per_token, 2);
    let scales = edited("source_model: one", "source_model: one\n    noise_scale: \"0.5\"\n    residual_scale: 2");
    assert_eq!((parsed(&scales).experts[0].noise_scale, parsed(&scales).experts[0].residual_scale), (Some(0.5), Some(2.0)));
    let dtypes =
        [("bf16", Dtype::Bf16), ("BFloat16", Dtype::Bf16), ("torch.float32", Dtype::F32), ("f16", Dtype::F16), ("float64", Dtype::F64)];
    for (name, dtype) in dtypes {
        assert_eq!(parsed(&with(&format!("dtype: {name}"))).dtype, Some(dtype), "{name}");
    }
    for name in ["mix", "MIXTRAL", "qwen", "qwen3 moe", "deep"] {
        assert_eq!(parsed(&with(&format!("architecture: {name}"))).architecture.as_deref(), Some(name));
    }
    assert_eq!(parsed(&edited("gate_mode: hidden", "gate_mode: hidden_last")).gate_mode.name, "hidden");
}

#[test]
fn nothing_given_is_the_default() {
    let nulls = "dtype:\nseed: ~\narchitecture: \"\"\nshared: null\nlayout:\ntokenizer:\nshared_experts:\nchat_template:";
    let recipe = parsed(&with(nulls).replace("gate_mode: hidden\nexperts_per_token: 1\n", ""));
    assert_eq!((recipe.gate_mode.name, recipe.experts_per_token, recipe.chat_template), ("auto", 2, None));
    assert_eq!((recipe.dtype, recipe.seed, recipe.architecture, recipe.tokenizer), (None, None, None, None));
    assert_eq!((recipe.shared, recipe.layout, recipe.shared_experts.len()), (Shared::Auto, Layout::Classic, 0));
}

#[test]
fn a_byte_order_mark_and_windows_line_ends_are_no_matter() {
    let text = format!("\u{feff}{}", SOUND.replace('\n', "\r\n"));
    assert_eq!(parsed(&text).experts.len(), 2);
    assert_snapshot!(verdict(&text.replace("gate_mode: hidden", "gate_mode: hiden"), &[]), @"
    error: unknown value `hiden` for `gate_mode`
     --> recipe.yml:2:12
      |
    2 | gate_mode: hiden
      |            ^^^^^
      |
    hint: did you mean `hidden`? It is one of `auto`, `softmax`, `ridge`, `lda`, `centroid`, `hidden`, `hidden_avg`, `cheap_embed`, `uniform`, `sequence`, `subspace`, `random`, `uniform_random`
    ");
}

#[test]
fn model_references() {
    let parts = |text: &str| {
        let model: ModelRef = text.parse().unwrap();
        assert_eq!(model.to_string(), text);
        let lora = model.lora.map(|lora| (lora.path, lora.revision));
        (model.path, model.revision, lora)
    };
    let some = |text: &str| Some(text.to_owned());
    assert_eq!(parts("org/model"), ("org/model".into(), None, None));
    assert_eq!(parts("org/model@v1"), ("org/model".into(), some("v1"), None));
    assert_eq!(parts("org/model+org/lora"), ("org/model".into(), None, Some(("org/lora".into(), None))));
    assert_eq!(parts("org/model@v1+org/lora@v2"), ("org/model".into(), some("v1"), Some(("org/lora".into(), some("v2")))));

    // What exists on disk is what is meant, whatever is in its name.
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name).to_str().unwrap().to_owned();
    for name in ["a+b", "a@b", "plain", "c++@2"] {
        fs_err::create_dir(path(name)).unwrap();
    }
    assert_eq!(parts(&path("a+b")), (path("a+b"), None, None));
    assert_eq!(parts(&path("a@b")), (path("a@b"), None, None));
    assert_eq!(parts(&(path("a@b") + "@v1")), (path("a@b"), some("v1"), None));
    assert_eq!(parts(&(path("a+b") + "+" + &path("plain"))), (path("a+b"), None, Some((path("plain"), None))));
    assert_eq!(parts(&(path("c++@2") + "+org/lora@v1")), (path("c++@2"), None, Some(("org/lora".into(), some("v1")))));
    assert_eq!(parts(&(path("plain") + "+" + &path("a@b"))), (path("plain"), None, Some((path("a@b"), None))));

    let refused: Vec<_> =
        ["", "@v1", "a@", "a+", "+b", "a@b@c", "a+b+c", " "].iter().map(|text| text.parse::<ModelRef>().unwrap_err().to_string()).collect();
    assert_snapshot!(refused.join("\n"), @"
    `` has an empty part
    `@v1` has an empty part
    `a@` has an empty part
    `a+` has an empty part
    `+b` has an empty part
    `a@b@c` has more than one revision: write `MODEL@REVISION`
    `a+b+c` has more than one adapter: a model takes one (`MODEL+ADAPTER`)
    ` ` has an empty part
    ");
}

#[test]
fn prompt_files() {
    let dir = tempfile::tempdir().unwrap();
    let prompts = |name: &str, content: &str| {
        fs_err::write(dir.path().join(name), content).unwrap();
        let text = edited("source_model: one", &format!("source_model: one\n    prompts_file: {name}"));
        let file = dir.path().join("recipe.yml");
        let recipe = recipe::parse(&text, &file, &[]).map(|(recipe, _)| recipe.experts[0].positive_prompts[2..].to_vec());
        recipe.map_err(|error| error.to_string().replace(dir.path().to_str().unwrap(), "[dir]"))
    };
    assert_eq!(prompts("p.json", r#"["a", {"prompt": "b"}]"#).unwrap(), ["a", "b"]);
    assert_eq!(prompts("p.txt", "one line\n\n  two \n").unwrap(), ["one line", "  two "]);
    let rows = r#""a"
{"prompt": "b", "text": "not this"}

{"text": "c"}
{"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "d"}, {"role": "user", "content": "e"}]}
"#;
    assert_eq!(prompts("p.jsonl", rows).unwrap(), ["a", "b", "c", "d"]);
    let wrong = [
        ("p.json", "{\"prompts\": []}"),
        ("p.json", "[\"a\", 3]"),
        ("p.jsonl", "\"a\"\n{\"question\": \"b\"}"),
        ("p.jsonl", "\"a\"\n{\"text\": \"b\""),
        ("p.csv", "a,b"),
        ("p.txt", "\n"),
    ];
    let lines: Vec<_> =
        wrong.iter().map(|(name, content)| prompts(name, content).unwrap_err().lines().next().unwrap().to_owned()).collect();
    assert_snapshot!(lines.join("\n"), @"
    error: cannot take prompts from `[dir]/p.json`: it must hold a list of prompts
    error: cannot take prompts from `[dir]/p.json`: entry 1 is neither a string nor an object with `prompt`, `text` or `messages`
    error: cannot take prompts from `[dir]/p.jsonl`: line 2 is neither a string nor an object with `prompt`, `text` or `messages`
    error: cannot take prompts from `[dir]/p.jsonl`: line 2: EOF while parsing an object at line 1 column 12
    error: cannot take prompts from `[dir]/p.csv`: a file of prompts ends in .json, .jsonl or .txt
    error: `[dir]/p.txt` holds no prompts
    ");
    assert_snapshot!(told("source_model: one", "source_model: one\n    prompts_file: no-such.txt"), @"
    error: failed to open file `no-such.txt`: No such file or directory (os error 2)
     --> recipe.yml:6:19
      |
    6 |     prompts_file: no-such.txt
      |                   ^^^^^^^^^^^
      |
    hint: the path is relative to the recipe's folder
    ");
}

#[test]
fn text_files() {
    let dir = tempfile::tempdir().unwrap();
    fs_err::write(dir.path().join("t.txt"), "text").unwrap();
    let text = edited("source_model: one", "source_model: one\n    text_file: t.txt");
    let (recipe, _) = recipe::parse(&text, &dir.path().join("recipe.yml"), &[]).unwrap();
    assert_eq!(recipe.experts[0].text_file, Some(dir.path().join("t.txt")));
    assert_eq!((recipe.experts[1].text_file.as_ref(), recipe.chat_template), (None, None));
    assert_eq!(parsed(&with("chat_template: auto")).chat_template, None);
    assert_snapshot!(told("source_model: one", "source_model: one\n    text_file: no-such.jsonl"), @"
    error: failed to open file `no-such.jsonl`: No such file or directory (os error 2)
     --> recipe.yml:6:16
      |
    6 |     text_file: no-such.jsonl
      |                ^^^^^^^^^^^^^
      |
    hint: the path is relative to the recipe's folder
    ");
    assert_snapshot!(told("source_model: one", "source_model: one\n    text_file: prompts.json"), @r#"
    error: a file of text ends in .txt or .jsonl
     --> recipe.yml:6:16
      |
    6 |     text_file: prompts.json
      |                ^^^^^^^^^^^^
      |
    hint: plain text in a .txt; in a .jsonl one `{"messages": [..]}` or `{"text": ..}` per line
    "#);
}

#[test]
fn a_file_that_cannot_be_read() {
    let error = recipe::read(Path::new("no-such-recipe.yml"), &[]).unwrap_err();
    assert_snapshot!(error, @"failed to open file `no-such-recipe.yml`: No such file or directory (os error 2)");
    assert!(matches!(error, RecipeError::Read(_)));
}

#[test]
fn broken_yaml() {
    assert_snapshot!(verdict("", &[]), @"
    error: the recipe is empty
     --> recipe.yml:1:1
      |
    1 |
      | ^
      |
    hint: a recipe has at least `base_model` and `experts`, each with its `source_model`
    ");
    assert_snapshot!(verdict("just text", &[]), @"
    error: a recipe must be a mapping of keys, but this is text
     --> recipe.yml:1:1
      |
    1 | just text
      | ^^^^^^^^^
      |
    hint: a recipe has at least `base_model` and `experts`, each with its `source_model`
    ");
    assert_snapshot!(told("[\"Write a function that sorts a list\",", "[\"Write a function that sorts a list,"), @r#"
    error: invalid trailing content after double-quoted scalar
     --> recipe.yml:6:62
      |
    6 |     positive_prompts: ["Write a function that sorts a list, "Why does this loop never end?"]
      |                                                              ^
      |
    hint: check the indentation and the quotes here and in the line above
    "#);
    assert_snapshot!(told("gate_mode: hidden", "gate_mode: hidden: random"), @"
    error: mapping values are not allowed in this context
     --> recipe.yml:2:18
      |
    2 | gate_mode: hidden: random
      |                  ^
      |
    hint: check the indentation and the quotes here and in the line above
    ");
    assert_snapshot!(told("gate_mode: hidden", "gate_mode: hidden\ngate_mode: random"), @"
    error: duplicate mapping key `gate_mode` is not allowed here
     --> recipe.yml:3:1
      |
    3 | gate_mode: random
      | ^^^^^^^^^
      |
    hint: check the indentation and the quotes here and in the line above
    ");
    assert_snapshot!(told("  - source_model: one\n    positive", "  - source_model: one\n   positive"), @r#"
    error: while parsing a block collection, did not find expected '-' indicator
     --> recipe.yml:6:4
      |
    6 |    positive_prompts: ["Write a function that sorts a list", "Why does this loop never end?"]
      |    ^
      |
    hint: check the indentation and the quotes here and in the line above
    "#);
    assert_snapshot!(verdict("a: &a [*a]", &[]), @"
    error: Recursive reference not allowed here
     --> recipe.yml:1:8
      |
    1 | a: &a [*a]
      |        ^^
      |
    hint: check the indentation and the quotes here and in the line above
    ");
}

#[test]
fn unknown_keys_and_values() {
    assert_snapshot!(told("gate_mode", "gatemode"), @"
    error: unknown key `gatemode` in a recipe
     --> recipe.yml:2:1
      |
    2 | gatemode: hidden
      | ^^^^^^^^
      |
    hint: did you mean `gate_mode`? A recipe has the keys `base_model`, `experts`, `shared_experts`, `gate_mode`, `dtype`, `experts_per_token`, `architecture`, `shared`, `repair`, `chat_template`, `tokenizer`, `layout`, `seed`
    ");
    assert_snapshot!(told("positive_prompts", "postive_prompts"), @r#"
    error: unknown key `postive_prompts` in an expert
     --> recipe.yml:6:5
      |
    6 |     postive_prompts: ["Write a function that sorts a list", "Why does this loop never end?"]
      |     ^^^^^^^^^^^^^^^
      |
    hint: did you mean `positive_prompts`? An expert has the keys `source_model`, `positive_prompts`, `negative_prompts`, `prompts_file`, `text_file`, `noise_scale`, `residual_scale`
    "#);
    assert_snapshot!(told("gate_mode: hidden", "gate_mode: hiden"), @"
    error: unknown value `hiden` for `gate_mode`
     --> recipe.yml:2:12
      |
    2 | gate_mode: hiden
      |            ^^^^^
      |
    hint: did you mean `hidden`? It is one of `auto`, `softmax`, `ridge`, `lda`, `centroid`, `hidden`, `hidden_avg`, `cheap_embed`, `uniform`, `sequence`, `subspace`, `random`, `uniform_random`
    ");
    assert_snapshot!(told("gate_mode: hidden", "gate_mode: learned"), @"
    error: unknown value `learned` for `gate_mode`
     --> recipe.yml:2:12
      |
    2 | gate_mode: learned
      |            ^^^^^^^
      |
    hint: it is one of `auto`, `softmax`, `ridge`, `lda`, `centroid`, `hidden`, `hidden_avg`, `cheap_embed`, `uniform`, `sequence`, `subspace`, `random`, `uniform_random`
    ");
    assert_snapshot!(verdict(&with("dtype: int8"), &[]), @"
    error: unknown value `int8` for `dtype`
     --> recipe.yml:9:8
      |
    9 | dtype: int8
      |        ^^^^
      |
    hint: it is one of `float32`, `float16`, `bfloat16`, `float64`
    ");
    assert_snapshot!(verdict(&with("shared: avarage"), &[]), @"
    error: unknown value `avarage` for `shared`
     --> recipe.yml:9:9
      |
    9 | shared: avarage
      |         ^^^^^^^
      |
    hint: did you mean `average`? It is one of `auto`, `base`, `average`, `fit`
    ");
    assert_snapshot!(verdict(&with("architecture: mixtrl"), &[]), @"
    error: unknown value `mixtrl` for `architecture`
     --> recipe.yml:9:15
      |
    9 | architecture: mixtrl
      |               ^^^^^^
      |
    hint: did you mean `Mixtral`? It is one of `Mixtral`, `DeepSeek MoE`, `Qwen MoE`, `Qwen3 MoE`
    ");
    assert_snapshot!(verdict(&with("frobnicate: 3"), &[]), @"
    error: unknown key `frobnicate` in a recipe
     --> recipe.yml:9:1
      |
    9 | frobnicate: 3
      | ^^^^^^^^^^
      |
    hint: a recipe has the keys `base_model`, `experts`, `shared_experts`, `gate_mode`, `dtype`, `experts_per_token`, `architecture`, `shared`, `repair`, `chat_template`, `tokenizer`, `layout`, `seed`
    ");
}

#[test]
fn wrong_shapes() {
    assert_snapshot!(told("\"Write a function that sorts a list\"", "42"), @r#"
    error: a prompt must be text, but this is a number
     --> recipe.yml:6:24
      |
    6 |     positive_prompts: [42, "Why does this loop never end?"]
      |                        ^^
      |
    hint: quote it: "42"
    "#);
    assert_snapshot!(told("\"Write a function that sorts a list\"", "yes"), @r#"
    error: a prompt must be text, but this is a truth value
     --> recipe.yml:6:24
      |
    6 |     positive_prompts: [yes, "Why does this loop never end?"]
      |                        ^^^
      |
    hint: quote it: "yes"
    "#);
    assert_snapshot!(told("[\"Write a function that sorts a list\", \"Why does this loop never end?\"]", "Write code"), @"
    error: `positive_prompts` must be a list of prompts, but this is text
     --> recipe.yml:6:23
      |
    6 |     positive_prompts: Write code
      |                       ^^^^^^^^^^
      |
    hint: put `- ` in front of it, on a line of its own
    ");
    assert_snapshot!(verdict("base_model: base\nexperts: [one, two]", &[]), @"
    error: an expert must be a mapping of keys, but this is text
     --> recipe.yml:2:11
      |
    2 | experts: [one, two]
      |           ^^^
      |
    hint: write `- source_model: one`

    error: an expert must be a mapping of keys, but this is text
     --> recipe.yml:2:16
      |
    2 | experts: [one, two]
      |                ^^^
      |
    hint: write `- source_model: two`
    ");
    assert_snapshot!(verdict("base_model: base\nexperts: {one: two}", &[]), @"
    error: `experts` must be a list of experts, but this is a mapping of keys
     --> recipe.yml:2:11
      |
    2 | experts: {one: two}
      |           ^^^
      |
    hint: write one `- source_model: ...` per expert below it
    ");
    assert_snapshot!(told("base_model: base\n", ""), @"
    error: a recipe needs `base_model`
     --> recipe.yml:1:1
      |
    1 | gate_mode: hidden
      | ^^^^^^^^^
    ");
    assert_snapshot!(told("source_model: one\n    ", ""), @r#"
    error: an expert needs `source_model`
     --> recipe.yml:5:5
      |
    5 |   - positive_prompts: ["Write a function that sorts a list", "Why does this loop never end?"]
      |     ^^^^^^^^^^^^^^^^
    "#);
    assert_snapshot!(told("source_model: one", "source_model: one+a+b"), @"
    error: `one+a+b` has more than one adapter: a model takes one (`MODEL+ADAPTER`)
     --> recipe.yml:5:19
      |
    5 |   - source_model: one+a+b
      |                   ^^^^^^^
    ");
    assert_snapshot!(told("source_model: one", "source_model: {revision: main}"), @"
    error: a model must have either `path` or `model`
     --> recipe.yml:5:20
      |
    5 |   - source_model: {revision: main}
      |                    ^^^^^^^^
      |
    hint: write `model: {path: ..., revision: ...}`
    ");
    assert_snapshot!(told("source_model: one", "source_model: one\n    noise_scale: much\n    residual_scale: .nan"), @"
    error: `noise_scale` must be a finite number
     --> recipe.yml:6:18
      |
    6 |     noise_scale: much
      |                  ^^^^

    error: `residual_scale` must be a finite number
     --> recipe.yml:7:21
      |
    7 |     residual_scale: .nan
      |                     ^^^^
    ");
    assert_snapshot!(told("experts_per_token: 1", "experts_per_token: 0"), @"
    error: `experts_per_token` must be a whole number of at least 1
     --> recipe.yml:3:20
      |
    3 | experts_per_token: 0
      |                    ^
    ");
    assert_snapshot!(told("experts_per_token: 1", "experts_per_token: two"), @"
    error: `experts_per_token` must be a whole number of at least 1
     --> recipe.yml:3:20
      |
    3 | experts_per_token: two
      |                    ^^^
    ");
    assert_snapshot!(verdict(&with("chat_template: chatml"), &[]), @"
    error: `chat_template` must be `true`, `false` or `auto`
     --> recipe.yml:9:16
      |
    9 | chat_template: chatml
      |                ^^^^^^
      |
    hint: it says whether prompts are wrapped in the base's chat template before they are run
    ");
    assert_snapshot!(verdict(&with("seed: -1"), &[]), @"
    error: `seed` must be a whole number of at least 0
     --> recipe.yml:9:7
      |
    9 | seed: -1
      |       ^^
    ");
}

#[test]
fn keys_of_neighbouring_tools() {
    assert_snapshot!(verdict("merge_method: slerp\nslices:\n  - sources: []\n", &[]), @"
    error: this is a recipe for mergekit-yaml, which merges models into one
     --> recipe.yml:2:1
      |
    2 | slices:
      | ^^^^^^
      |
    hint: give `experts`, each with its `source_model`; a merge of models into one dense model is another job
    ");
    assert_snapshot!(told("experts_per_token", "num_experts_per_tok"), @r#"
    base_model: "base"
    experts:
      - {"source_model":"one","positive_prompts":["Write a function that sorts a list","Why does this loop never end?"]}
      - {"source_model":"two","positive_prompts":["What is the integral of x^2","Prove that there are infinitely many primes."]}
    shared_experts:
    gate_mode: "hidden"
    experts_per_token: 1
    shared: "auto"
    chat_template: "auto"
    layout: "classic"

    warning: `num_experts_per_tok` is read as `experts_per_token`
     --> recipe.yml:3:1
      |
    3 | num_experts_per_tok: 1
      | ^^^^^^^^^^^^^^^^^^^
      |
    hint: rename it
    "#);
    assert_snapshot!(told("experts_per_token: 1", "experts_per_token: 1\nnum_experts_per_tok: 2"), @"
    error: `experts_per_token` is given twice
     --> recipe.yml:4:1
      |
    4 | num_experts_per_tok: 2
      | ^^^^^^^^^^^^^^^^^^^
      |
    hint: keep one of `experts_per_token` and `num_experts_per_tok`
    ");
    assert_snapshot!(told("source_model: one", "source_model: one\n    negative_prompt: tell me a story"), @r#"
    base_model: "base"
    experts:
      - {"source_model":"one","positive_prompts":["Write a function that sorts a list","Why does this loop never end?"],"negative_prompts":["tell me a story"]}
      - {"source_model":"two","positive_prompts":["What is the integral of x^2","Prove that there are infinitely many primes."]}
    shared_experts:
    gate_mode: "hidden"
    experts_per_token: 1
    shared: "auto"
    chat_template: "auto"
    layout: "classic"

    warning: `negative_prompt` is read as `negative_prompts`
     --> recipe.yml:6:5
      |
    6 |     negative_prompt: tell me a story
      |     ^^^^^^^^^^^^^^^
      |
    hint: rename it
    "#);
    assert_eq!(parsed(&with("tokenizer_source: org/tok")).tokenizer.unwrap().path, "org/tok");
    assert_eq!(parsed(&with("tokenizer_source: base")).tokenizer, None);
    assert_snapshot!(verdict(&with("tokenizer_source: union"), &[]), @"
    warning: `tokenizer_source` is read as `tokenizer`
     --> recipe.yml:9:1
      |
    9 | tokenizer_source: union
      | ^^^^^^^^^^^^^^^^
      |
    hint: rename it

    error: tokenizers are not joined: every expert uses one vocabulary
     --> recipe.yml:9:19
      |
    9 | tokenizer_source: union
      |                   ^^^^^
      |
    hint: name the one model whose tokenizer files are copied, or leave the key out for the base's
    ");
}

#[test]
fn several_mistakes_are_shown_at_once() {
    assert_snapshot!(told("gate_mode: hidden\nexperts_per_token: 1", "gate_mode: hiden\nexperts_per_tok: 0"), @"
    error: unknown key `experts_per_tok` in a recipe
     --> recipe.yml:3:1
      |
    3 | experts_per_tok: 0
      | ^^^^^^^^^^^^^^^
      |
    hint: did you mean `experts_per_token`? A recipe has the keys `base_model`, `experts`, `shared_experts`, `gate_mode`, `dtype`, `experts_per_token`, `architecture`, `shared`, `repair`, `chat_template`, `tokenizer`, `layout`, `seed`

    error: unknown value `hiden` for `gate_mode`
     --> recipe.yml:2:12
      |
    2 | gate_mode: hiden
      |            ^^^^^
      |
    hint: did you mean `hidden`? It is one of `auto`, `softmax`, `ridge`, `lda`, `centroid`, `hidden`, `hidden_avg`, `cheap_embed`, `uniform`, `sequence`, `subspace`, `random`, `uniform_random`
    ");
}

#[test]
fn gate_modes_that_are_fitted() {
    let text = SOUND.replace(
        "    positive_prompts: [\"What is the integral of x^2\", \"Prove that there are infinitely many primes.\"]",
        "    text_file: two.txt",
    );
    let directory = tempfile::tempdir().unwrap();
    fs_err::write(directory.path().join("two.txt"), "2 + 2 = 4").unwrap();
    for mode in ["auto", "softmax", "ridge", "lda", "centroid"] {
        let text = text.replace("gate_mode: hidden", &format!("gate_mode: {mode}"));
        let (recipe, warnings) = recipe::parse(&text, &directory.path().join("recipe.yml"), &[]).unwrap();
        assert!(recipe.fitted() && recipe.gate_mode.name == mode && warnings.is_empty());
    }
    let refused = recipe::parse(&text, &directory.path().join("recipe.yml"), &[]).unwrap_err().to_string();
    assert!(refused.contains("`hidden` makes gates from prompts, but expert 1 has none"), "{refused}");
}

#[test]
fn without_routing_every_expert_is_used() {
    let text = SOUND.replace("gate_mode: hidden\nexperts_per_token: 1", "gate_mode: uniform");
    let (recipe, _) = recipe::parse(&text, Path::new("recipe.yml"), &[]).unwrap();
    assert_eq!((recipe.experts_per_token, recipe.fitted()), (2, false));
    let three = text + "  - source_model: three\n";
    assert_eq!(recipe::parse(&three, Path::new("recipe.yml"), &[]).unwrap().0.experts_per_token, 3);
}

#[test]
fn what_is_refused() {
    assert_snapshot!(verdict("base_model: base\nexperts: []", &[]), @"
    error: there are no experts
     --> recipe.yml:2:1
      |
    2 | experts: []
      | ^^^^^^^
      |
    hint: write one `- source_model: ...` per expert below `experts`
    ");
    assert_snapshot!(told("experts_per_token: 1", "experts_per_token: 3"), @"
    error: each token chooses 3 experts, but there are 2
     --> recipe.yml:3:1
      |
    3 | experts_per_token: 3
      | ^^^^^^^^^^^^^^^^^
      |
    hint: add experts, or lower `experts_per_token` (2 if not given)
    ");
    assert_snapshot!(verdict(&with("shared_experts: [{source_model: a}, {source_model: b}]"), &[]), @"
    error: there can be one shared expert, not 2
     --> recipe.yml:9:1
      |
    9 | shared_experts: [{source_model: a}, {source_model: b}]
      | ^^^^^^^^^^^^^^
      |
    hint: keep one, and make the others experts
    ");
    let no_prompts = "base_model: base\nexperts: [{source_model: one}, {source_model: two, positive_prompts: []}]\n";
    assert_snapshot!(verdict(no_prompts, &[]), @"
    error: `auto` makes gates from prompts, but experts 0 and 1 have none
     --> recipe.yml:2:26
      |
    2 | experts: [{source_model: one}, {source_model: two, positive_prompts: []}]
      |                          ^^^ expert 0         --- expert 1
      |
    hint: give it `positive_prompts` or a `prompts_file`, or set `gate_mode: random` and train the gates
    ");
    assert!(!verdict(&(no_prompts.to_owned() + "gate_mode: uniform_random"), &[]).contains("error"));
}

#[test]
fn what_is_refused_unless_allowed() {
    let same_prompts = SOUND.replace(
        "[\"What is the integral of x^2\", \"Prove that there are infinitely many primes.\"]",
        "[\"Write a function that sorts a list\", \"Why does this loop never end?\"]",
    );
    assert_snapshot!(verdict(&same_prompts, &[]), @r#"
    error[identical-prompts]: every expert has the same prompts
     --> recipe.yml:6:5
      |
    6 |     positive_prompts: ["Write a function that sorts a list", "Why does this loop never end?"]
      |     ^^^^^^^^^^^^^^^^ expert 0
    7 |   - source_model: two
    8 |     positive_prompts: ["Write a function that sorts a list", "Why does this loop never end?"]
      |     ---------------- expert 1
      |
      = note: equal prompts give equal gates: every token would go to the first experts
    hint: give each expert prompts of what it is good at; `--allow identical-prompts` if it is meant
    "#);
    assert_snapshot!(verdict(&same_prompts, &["identical-prompts"]), @r#"
    base_model: "base"
    experts:
      - {"source_model":"one","positive_prompts":["Write a function that sorts a list","Why does this loop never end?"]}
      - {"source_model":"two","positive_prompts":["Write a function that sorts a list","Why does this loop never end?"]}
    shared_experts:
    gate_mode: "hidden"
    experts_per_token: 1
    shared: "auto"
    chat_template: "auto"
    layout: "classic"

    warning[identical-prompts]: every expert has the same prompts
     --> recipe.yml:6:5
      |
    6 |     positive_prompts: ["Write a function that sorts a list", "Why does this loop never end?"]
      |     ^^^^^^^^^^^^^^^^ expert 0
    7 |   - source_model: two
    8 |     positive_prompts: ["Write a function that sorts a list", "Why does this loop never end?"]
      |     ---------------- expert 1
      |
      = note: equal prompts give equal gates: every token would go to the first experts
    hint: give each expert prompts of what it is good at
    "#);
    let fit = edited("gate_mode: hidden", "gate_mode: hidden\nshared: fit");
    assert_snapshot!(verdict(&fit, &[]), @"
    error: `shared: fit` fits the shared weights along with the gates, and `hidden` gates are not fitted
     --> recipe.yml:2:1
      |
    2 | gate_mode: hidden
      | ^^^^^^^^^
      |
    hint: leave `gate_mode` out, or set `shared: base` or `shared: average`
    ");
    let same_models = SOUND.replace("source_model: two", "source_model: one");
    assert_snapshot!(verdict(&same_models, &[]), @r#"
    error[same-model-experts]: every expert is the same model
     --> recipe.yml:5:19
      |
    5 |   - source_model: one
      |                   ^^^ expert 0
    6 |     positive_prompts: ["Write a function that sorts a list", "Why does this loop never end?"]
    7 |   - source_model: one
      |                   --- expert 1
      |
      = note: copies of one model compute what that model computes, at several times its size
    hint: name different fine-tunes; copies are useful only as a start for training; `--allow same-model-experts` if it is meant
    "#);
    assert!(verdict(&same_models, &["same-model-experts"]).contains("\n\nwarning[same-model-experts]"));
    let first = edited("gate_mode: hidden", "gate_mode: uniform");
    assert_snapshot!(verdict(&first, &["unused-prompts"]), @"
    error[first-experts]: `uniform` is for composites in which each token runs through all experts, not 1 of 2
     --> recipe.yml:3:1
      |
    3 | experts_per_token: 1
      | ^^^^^^^^^^^^^^^^^
      |
      = note: gates of zeros tell no experts apart, and of equal ones the first win: the others would never be chosen
    hint: leave `experts_per_token` out, or set it to the number of experts; `--allow first-experts` if it is meant
    ");
    let one = SOUND.split_once("  - source_model: two").unwrap().0;
    assert_snapshot!(verdict(one, &[]), @"
    error[one-expert]: there is only one expert
     --> recipe.yml:4:1
      |
    4 | experts:
      | ^^^^^^^
      |
      = note: with one expert there is nothing to choose
    hint: add experts; `--allow one-expert` if it is meant
    ");
    assert!(verdict(one, &["one-expert"]).contains("\n\nwarning[one-expert]"));

    let keywords =
        SOUND.replace("What is the integral of x^2", "integral").replace("Prove that there are infinitely many primes.", "primes");
    assert!(verdict(&keywords, &[]).contains("warning[keyword-prompts]"));
    assert_eq!(verdict(&keywords, &["keyword-prompts"]), summary(&parsed(&keywords)));

    // Random gates are a start for training: copies are welcome, prompts are not looked at.
    let random = same_models.replace("gate_mode: hidden", "gate_mode: random");
    assert_snapshot!(verdict(&random, &[]), @r#"
    base_model: "base"
    experts:
      - {"source_model":"one","positive_prompts":["Write a function that sorts a list","Why does this loop never end?"]}
      - {"source_model":"one","positive_prompts":["What is the integral of x^2","Prove that there are infinitely many primes."]}
    shared_experts:
    gate_mode: "random"
    experts_per_token: 1
    shared: "auto"
    chat_template: "auto"
    layout: "classic"

    warning[unused-prompts]: `random` does not look at prompts
     --> recipe.yml:2:1
      |
    2 | gate_mode: random
      | ^^^^^^^^^
      |
      = note: the prompts change nothing
    hint: remove the prompts, or set `gate_mode: hidden` to use them
    "#);
}

#[test]
fn what_is_warned_of() {
    let expert = |name: &str, keys: &str| format!("  - source_model: {name}\n    {keys}\n");
    let recipe = |experts: &[(&str, &str)]| {
        let experts: String = experts.iter().map(|(name, keys)| expert(name, keys)).collect();
        verdict(&format!("base_model: base\nexperts:\n{experts}gate_mode: hidden\n"), &[]).split_once("\n\n").unwrap().1.to_owned()
    };
    let (a, b, c) = ("positive_prompts: [how so, why then]", "positive_prompts: [sum these, add that]", "positive_prompts: [tell a joke]");
    assert_snapshot!(recipe(&[("one", a), ("two", b), ("three", a)]), @"
    warning[twin-prompts]: experts 0 and 2 have the same prompts
     --> recipe.yml:4:5
      |
    4 |     positive_prompts: [how so, why then]
      |     ^^^^^^^^^^^^^^^^ expert 0
    ...
    8 |     positive_prompts: [how so, why then]
      |     ---------------- expert 2
      |
      = note: equal prompts give equal gates, and of equal gates the first expert wins
    hint: give each expert prompts of its own
    ");
    assert_snapshot!(recipe(&[("one", a), ("two", b), ("one", c)]), @"
    warning[twin-experts]: experts 0 and 2 are the same model
     --> recipe.yml:3:19
      |
    3 |   - source_model: one
      |                   ^^^ expert 0
    ...
    7 |   - source_model: one
      |                   --- expert 2
      |
      = note: the second copy takes memory and adds nothing
    hint: keep one of them, with the prompts of both
    ");
    let im_end = |text: &str| format!("positive_prompts: [\"<|im_start|>user {text}<|im_end|>\"]");
    assert_snapshot!(recipe(&[("one", &im_end("how so")), ("two", b), ("three", &im_end("add this"))]), @r#"
    warning[same-endings]: the prompts of experts 0 and 2 end the same way, so their gates in the first layer are equal
     --> recipe.yml:4:5
      |
    4 |     positive_prompts: ["<|im_start|>user how so<|im_end|>"]
      |     ^^^^^^^^^^^^^^^^ expert 0
    ...
    8 |     positive_prompts: ["<|im_start|>user add this<|im_end|>"]
      |     ---------------- expert 2
      |
      = note: `hidden` looks at the last token of each prompt, and the gate of the first layer sees nothing else
    hint: end the prompts of different experts differently, or set `gate_mode: hidden_avg`
    "#);
    let (a, b) = (format!("{a}\n    negative_prompts: [add that]"), format!("{b}\n    negative_prompts: [how so, why then]"));
    assert_snapshot!(recipe(&[("one", &a), ("two", &b)]), @"
    warning[circular-negatives]: every expert's negative prompts are other experts' positive prompts
     --> recipe.yml:5:5
      |
    5 |     negative_prompts: [add that]
      |     ^^^^^^^^^^^^^^^^ expert 0
    ...
    8 |     negative_prompts: [how so, why then]
      |     ---------------- expert 1
      |
      = note: gates of which each is a sum of the others cannot be told apart well: they have one dimension too few
    hint: leave `negative_prompts` out, or write some that are no other expert's prompts
    ");
    assert_snapshot!(recipe(&[("one", "positive_prompts: [\"\", as is]"), ("two", c)]), @r#"
    warning[empty-prompts]: expert 0 has an empty prompt
     --> recipe.yml:4:5
      |
    4 |     positive_prompts: ["", as is]
      |     ^^^^^^^^^^^^^^^^ expert 0
      |
      = note: an empty prompt is the start token alone and says nothing about the expert
    hint: remove it, or write what the expert is good at
    "#);
    let many = "positive_prompts: [a b, c d, e f, g h]";
    assert_snapshot!(recipe(&[("one", many), ("two", c)]), @"
    warning[uneven-prompts]: expert 1 has far fewer prompts than expert 0: 1 against 4
     --> recipe.yml:6:5
      |
    4 |     positive_prompts: [a b, c d, e f, g h]
      |     ---------------- expert 0
    5 |   - source_model: two
    6 |     positive_prompts: [tell a joke]
      |     ^^^^^^^^^^^^^^^^ expert 1
      |
      = note: a gate is a mean over its prompts: one made from a few is noisy beside one made from many
    hint: give each expert about as many prompts
    ");
}

#[test]
fn positions_count_from_one_and_in_characters() {
    let text = "base_model: base\nexperts: [{source_model: \"ö\", öäü: 1}]\n";
    let Err(RecipeError::Invalid(problems)) = recipe::parse(text, Path::new("recipe.yml"), &[]) else { panic!("it is accepted") };
    assert_eq!(problems[0].position(), (2, 31));
    assert!(problems[0].styled().contains("\u{1b}["));
}

#[test]
fn alias_bombs_are_refused() {
    let mut text = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n".to_owned();
    for i in 1..30 {
        writeln!(text, "a{i}: &a{i} [*a{0}, *a{0}, *a{0}, *a{0}, *a{0}, *a{0}, *a{0}, *a{0}, *a{0}]", i - 1).unwrap();
    }
    let started = std::time::Instant::now();
    let told = verdict(&text, &[]);
    assert!(told.starts_with("error: "), "{told}");
    assert!(started.elapsed().as_secs() < 20, "{:?}", started.elapsed());
    let deep = format!("a: {}", "[".repeat(100_000));
    assert!(verdict(&deep, &[]).starts_with("error: "));
}

proptest! {
    #[test]
    fn no_text_makes_it_panic(text in any::<String>()) {
        verdict(&text, &[]);
    }

    #[test]
    fn no_yaml_like_text_makes_it_panic(text in "([a-c]|base_model|experts|source_model|positive_prompts|ö|[:\\-#&*!|>'\"%@\\[\\]{},?~\\\\ \t\r\n0-9.]){0,60}") {
        verdict(&text, &[]);
    }

    #[test]
    fn no_edit_makes_it_panic(at in 0..SOUND.len(), cut in 0..40_usize, put in "[ -~\n\tö]{0,6}") {
        let end = (at + cut).min(SOUND.len());
        verdict(&[&SOUND[..at], &put, &SOUND[end..]].concat(), &[]);
    }

    /// Whatever a prompt is made of, quoting it as JSON gives it back.
    #[test]
    fn quoted_prompts_come_back_as_they_are(prompt in any::<String>()) {
        let text = edited("\"Why does this loop never end?\"", &serde_json::to_string(&prompt).unwrap());
        prop_assert_eq!(&parsed(&text).experts[0].positive_prompts[1], &prompt);
    }
}
