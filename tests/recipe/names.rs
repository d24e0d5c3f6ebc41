//! Keys and values that there are not, and those of neighbouring tools.

use insta::assert_snapshot;

use super::{parsed, told, verdict, with};

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
