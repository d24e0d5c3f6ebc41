//! What an expert goes on from when it writes: its prompts, and where a prompt is only a keyword, something worth going on from; or places in
//! a text.

use serde_json::json;

use super::{Form, Sequence, TextError, encode::Encoder};
use crate::{
    calibrate::CalibrateError,
    plan::Sources,
    recipe::{Expert, Recipe},
};

/// Tokens of a prompt; the rest of a longer one would only take the place of the expert's own words.
const PROMPT: usize = 256;

/// Tokens of a place in a text.
const SNIPPET: usize = 24;

/// How requests begin in English; in any language a question ends in a question mark.
const REQUESTS: [&str; 50] = [
    "act",
    "analyze",
    "answer",
    "are",
    "calculate",
    "can",
    "classify",
    "compare",
    "compose",
    "compute",
    "convert",
    "could",
    "create",
    "debug",
    "define",
    "describe",
    "design",
    "develop",
    "discuss",
    "do",
    "does",
    "draft",
    "explain",
    "find",
    "fix",
    "generate",
    "give",
    "help",
    "how",
    "implement",
    "is",
    "list",
    "make",
    "outline",
    "please",
    "prove",
    "provide",
    "show",
    "should",
    "solve",
    "suggest",
    "summarize",
    "tell",
    "translate",
    "what",
    "when",
    "where",
    "which",
    "why",
    "write",
];

/// The form that the recipe asks for. Where it does not say, prompts that are no requests are gone on from; for requests it is `None`: the
/// expert shows whether it answers.
pub(super) fn form(recipe: &Recipe, sources: &Sources, encoder: &Encoder) -> Result<Option<Form>, CalibrateError> {
    let prompts = || recipe.experts.iter().flat_map(|expert| &expert.positive_prompts);
    match (recipe.chat_template, &encoder.template) {
        (Some(true), None) => Err(CalibrateError::NoTemplate { base: sources.base().reference.to_string() }),
        (Some(true), Some(_)) => Ok(Some(Form::Chat)),
        (Some(false), _) | (None, None) => Ok(Some(Form::Plain)),
        (None, Some(_)) => {
            let whole = || prompts().filter(|prompt| !is_keyword(prompt));
            let requests = whole().filter(|prompt| is_request(prompt)).count();
            Ok((2 * requests < whole().count()).then_some(Form::Plain))
        }
    }
}

/// What the expert goes on from in one form. Words that are not the recipe's own do not count.
pub(super) fn starts(expert: &Expert, form: Form, encoder: &Encoder) -> Result<Vec<Sequence>, TextError> {
    let start = |text: &str| -> Result<Sequence, TextError> {
        let text = encoder.shortened(text, PROMPT.min(encoder.context / 2))?;
        Ok(match form {
            Form::Plain => encoder.prefixed(encoder.text(text)?),
            Form::Chat => encoder.chat(&[json!({"role": "user", "content": text})])?.unwrap_or_default(),
        })
    };
    // Space at the end would be a token of its own, which text does not have there.
    let prompts = || expert.positive_prompts.iter().map(|prompt| prompt.trim_end()).filter(|prompt| !prompt.is_empty());
    let nothing = if form == Form::Plain { text_start(encoder)? } else { None };
    let mut starts = Vec::new();
    for prompt in prompts() {
        starts.push(start(prompt)?);
        if is_keyword(prompt) {
            for [before, after] in frames(form) {
                starts.push(start(&format!("{before}{prompt}{after}"))?.uncounted());
            }
            // An expert of one kind of text writes it from nothing.
            starts.extend(nothing.clone());
        }
    }
    if starts.is_empty() {
        starts.extend(nothing);
    }
    starts.retain(|start| !start.tokens.is_empty());
    Ok(starts)
}

/// `count` places in a text, evenly spread, to go on from; they do not count, because the text does. A chat is gone on from only where it was
/// begun, as its template's tokens are of no meaning elsewhere.
pub(super) fn snippets(text: &[Sequence], count: usize, encoder: &Encoder) -> Vec<Sequence> {
    let total: usize = text.iter().map(Sequence::counted).sum();
    let (mut seen, mut given, mut snippets) = (0, 0, Vec::new());
    for sequence in text {
        let first = sequence.counts.iter().position(|counts| *counts).unwrap_or(sequence.tokens.len());
        let counted = sequence.counted();
        seen += counted;
        let due = count * seen / total.max(1) - given;
        given += due;
        if sequence.counts[first..].iter().all(|counts| *counts) && first <= usize::from(encoder.prefix.is_some()) {
            let tokens = &sequence.tokens[first..];
            let length = SNIPPET.min(tokens.len());
            let places = (0..due).map(|i| i * (tokens.len() - length) / due);
            snippets.extend(places.map(|at| encoder.prefixed(tokens[at..at + length].iter().map(|token| (*token, false)).collect())));
        } else if due > 0 {
            let mut start = sequence.clone().uncounted();
            start.truncate(first + SNIPPET);
            snippets.push(start);
        }
    }
    snippets
}

/// What a keyword is put into, beside being gone on from as it is.
fn frames(form: Form) -> &'static [[&'static str; 2]] {
    match form {
        Form::Plain => &[["The following is about ", ".\n\n"]],
        Form::Chat => &[["Write a detailed example about ", "."], ["Explain ", " step by step."]],
    }
}

/// What stands before a text: the tokenizer's prefix, or a BOS token that opens texts rather than the turns of a chat.
fn text_start(encoder: &Encoder) -> Result<Option<Sequence>, TextError> {
    let turns = [json!({"role": "user", "content": "a"}), json!({"role": "assistant", "content": "b"})];
    let chat = encoder.chat(&turns)?.unwrap_or_default();
    let bos = encoder.tokenizer.bos().filter(|bos| chat.tokens.iter().filter(|token| *token == bos).count() < 2);
    Ok(encoder.prefix.or(bos).map(|token| Sequence::from_iter([(token, false)])))
}

/// One or two words without a full stop.
fn is_keyword(prompt: &str) -> bool {
    !prompt.trim().is_empty()
        && prompt.split_whitespace().count() <= 2
        && !prompt.contains(['.', '?', '!', ':', ';', '(', '\u{3002}', '\u{FF1F}', '\u{FF01}'])
}

fn is_request(prompt: &str) -> bool {
    let first: String = prompt.trim_start().chars().take_while(|c| c.is_alphabetic()).flat_map(char::to_lowercase).collect();
    REQUESTS.contains(&first.as_str()) || prompt.trim_end().ends_with(['?', '\u{FF1F}'])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keywords_and_requests_are_told_from_text() {
        for keyword in ["math", "C++", "creative writing", " python "] {
            assert!(is_keyword(keyword), "{keyword}");
        }
        for text in ["", "Solve this.", "three words here", "What now?", "main():", "def f(x):"] {
            assert!(!is_keyword(text), "{text}");
        }
        for request in ["Write a poem about rain", "how do I sort a list", "And what is that?", "  Explain:\nx", "Wie geht das?"] {
            assert!(is_request(request), "{request}");
        }
        for text in ["import os", "In the beginning God created", "Whatever happens, happens.", "Problem: Compute 1 + 2."] {
            assert!(!is_request(text), "{text}");
        }
    }
}
