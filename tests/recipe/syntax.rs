//! Text that is no YAML, or no recipe.

use std::fmt::Write as _;
use std::path::Path;

use insta::assert_snapshot;
use proptest::prelude::*;
use upcycle::recipe::{self, RecipeError};

use super::{SOUND, edited, parsed, told, verdict, with};

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
