//! The command line as its users see it: transcripts of what is typed and what comes back. Models are the business of other modules.

use insta::assert_snapshot;

use crate::support::cli::transcript;

/// Runs a command in a directory that holds `recipe.yml`.
fn with_recipe(recipe: &str, args: &[&str]) -> String {
    let dir = tempfile::tempdir().unwrap();
    fs_err::write(dir.path().join("recipe.yml"), recipe).unwrap();
    transcript(dir.path(), args)
}

const RECIPE: &str = "base_model: org/base
experts_per_token: 1
experts:
  - source_model: org/coder
    positive_prompts: [\"Write a function that sorts a list\"]
  - source_model: org/poet
    positive_prompts: [\"Compose a sonnet about rain.\"]
";

#[test]
fn a_recipe_alone_can_be_checked() {
    assert_snapshot!(with_recipe(RECIPE, &["plan", "--recipe-only", "recipe.yml"]), @"");
    assert_snapshot!(with_recipe(RECIPE, &["plan", "--recipe-only", "--json", "recipe.yml"]), @"");
}

#[test]
fn a_warning_does_not_stop_a_command() {
    let recipe = RECIPE.to_owned() + "merge_method: moe\n";
    assert_snapshot!(with_recipe(&recipe, &["plan", "--recipe-only", "recipe.yml"]), @"");
}

#[test]
fn mistakes_in_a_recipe_end_with_exit_code_1() {
    let recipe = RECIPE.replace("experts_per_token: 1", "expert_per_token: 1\ngate_mode: hiden");
    assert_snapshot!(with_recipe(&recipe, &["plan", "--recipe-only", "recipe.yml"]), @"");
    assert_snapshot!(with_recipe("", &["plan", "no-such.yml"]), @"");
}

#[test]
fn checks_are_waived_by_name() {
    let same = RECIPE.replace("org/poet", "org/coder");
    assert_snapshot!(with_recipe(&same, &["plan", "--recipe-only", "recipe.yml"]), @"");
    assert_snapshot!(with_recipe(&same, &["plan", "--recipe-only", "recipe.yml", "--allow", "same-model-experts"]), @"");
    assert_snapshot!(with_recipe(&same, &["plan", "--recipe-only", "recipe.yml", "--allow", "same-modelexperts"]), @"");
}

#[test]
fn a_bad_command_line_ends_with_exit_code_2() {
    assert_snapshot!(with_recipe("", &["plan"]), @"");
    assert_snapshot!(with_recipe("", &["plann", "recipe.yml"]), @"");
    assert_snapshot!(with_recipe("", &["plan", "recipe.yml", "--jsn"]), @"");
}

#[test]
fn help_names_every_command() {
    assert_snapshot!(with_recipe("", &["--help"]), @"");
    assert!(with_recipe("", &["completions", "bash"]).contains("complete -F _upcycle"));
}
