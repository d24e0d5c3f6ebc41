//! Recipes as people write them, right and wrong.
//!
//! `tests/recipes` holds published mergekit-moe recipes, as published. The messages are part of the interface: each is a snapshot.

mod files;
mod keys;
mod lints;
mod names;
mod syntax;

use std::{fmt::Write as _, path::Path};

use insta::assert_snapshot;
use upcycle::recipe::{self, Recipe};

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
