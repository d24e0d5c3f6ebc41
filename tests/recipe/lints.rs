//! Recipes that can be read and had better not be used.

use insta::assert_snapshot;

use super::{SOUND, edited, parsed, summary, told, verdict, with};

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
