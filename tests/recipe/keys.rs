//! Every key: its values, and what is the default.

use std::path::Path;

use insta::assert_snapshot;
use upcycle::recipe::{self, Layout, ModelRef, Shared};
use upcycle_architectures::Dtype;

use super::{SOUND, edited, parsed, verdict, with};

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
