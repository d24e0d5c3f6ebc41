//! Files that a recipe names.

use std::path::Path;

use insta::assert_snapshot;
use upcycle::recipe::{self, RecipeError};

use super::{edited, parsed, told, with};

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
