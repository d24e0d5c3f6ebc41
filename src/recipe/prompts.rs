//! Files of prompts: `.json` (a list), `.jsonl` (one value per line), `.txt` (one prompt per line).
//!
//! A value is a string, `{"prompt": ..}`, `{"text": ..}` or `{"messages": [..]}`, of which the first message by a user counts.

use std::path::Path;

use serde_json::Value;

/// The prompts of a file, or what is wrong with it, file and place named.
pub(super) fn read(path: &Path) -> Result<Vec<String>, String> {
    let read = || fs_err::read_to_string(path).map_err(|error| error.to_string());
    let prompts: Result<Vec<String>, String> = match path.extension().and_then(|extension| extension.to_str()) {
        Some("txt") => Ok(read()?.lines().map(str::to_owned).filter(|line| !line.trim().is_empty()).collect()),
        Some("json") => match serde_json::from_str(&read()?) {
            Ok(Value::Array(items)) => {
                items.iter().enumerate().map(|(i, item)| prompt(item).ok_or_else(|| no_prompt(&format!("entry {i}")))).collect()
            }
            Ok(_) => Err("it must hold a list of prompts".to_owned()),
            Err(error) => Err(error.to_string()),
        },
        Some("jsonl") => {
            let line = |(i, line): (usize, &str)| {
                let value = serde_json::from_str(line).map_err(|error| format!("line {}: {error}", i + 1))?;
                prompt(&value).ok_or_else(|| no_prompt(&format!("line {}", i + 1)))
            };
            read()?.lines().enumerate().filter(|(_, line)| !line.trim().is_empty()).map(line).collect()
        }
        _ => Err("a file of prompts ends in .json, .jsonl or .txt".to_owned()),
    };
    match prompts {
        Ok(prompts) if prompts.is_empty() => Err(format!("`{}` holds no prompts", path.display())),
        Ok(prompts) => Ok(prompts),
        Err(reason) => Err(format!("cannot take prompts from `{}`: {reason}", path.display())),
    }
}

fn prompt(value: &Value) -> Option<String> {
    let by_user = |message: &&Value| message.get("role").is_some_and(|role| role == "user");
    let text = match value {
        Value::Object(map) => match map.get("messages") {
            Some(messages) => messages.as_array()?.iter().find(by_user)?.get("content")?,
            None => map.get("prompt").or_else(|| map.get("text"))?,
        },
        other => other,
    };
    text.as_str().map(str::to_owned)
}

fn no_prompt(at: &str) -> String {
    format!("{at} is neither a string nor an object with `prompt`, `text` or `messages`")
}
