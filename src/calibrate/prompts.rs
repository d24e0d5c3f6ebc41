//! A recipe's prompts as the base's tokens.
//!
//! As in mergekit-moe: the text of the BOS token, if there is one, then the prompt, in which the text of a special token is that token; or, if
//! the recipe asks for it, the prompt as a user's message in the base's chat template.

use serde_json::{Map, json};

use super::CalibrateError;
use crate::{
    engine::{
        template::{Chat, ChatTemplate},
        tokenizer::{Specials, Tokenizer},
    },
    recipe::{Expert, Recipe},
    source::Source,
};

/// A recipe's prompts.
pub(super) struct Tokenized {
    pub experts: Vec<Prompts>,
    /// what mergekit-moe pads a batch with: BOS, or EOS if there is none
    pub pad: Option<u32>,
}

/// One expert's prompts.
pub(super) struct Prompts {
    pub expert: String,
    pub positive: Vec<Vec<u32>>,
    pub negative: Vec<Vec<u32>>,
}

/// The tokens of every prompt, none without any. Prompts longer than the base's context are cut, with a warning.
pub(super) fn tokenize(
    recipe: &Recipe,
    base: &Source,
    experts: &[&Expert],
    names: &[String],
    warnings: &mut Vec<String>,
) -> Result<Tokenized, CalibrateError> {
    let tokenizer = Tokenizer::open(&base.sidecars, &base.config)?;
    let template = if recipe.chat_template == Some(true) { Some(template(base, &tokenizer)?) } else { None };
    let special = |name| tokenizer.special_tokens().get(name).map(String::as_str);
    let bos = special("bos_token").unwrap_or("");
    let pad = match special("bos_token").or_else(|| special("eos_token")) {
        Some(text) => tokenizer.encode(text, Specials::Written)?.first().copied(),
        None => None,
    };
    let limit = base.config.max_positions;
    let mut tokens = |expert: &str, prompt: &String| -> Result<Vec<u32>, CalibrateError> {
        let text = match &template {
            Some(template) => wrap(template, prompt)?,
            None => format!("{bos}{prompt}"),
        };
        let mut tokens = tokenizer.encode(&text, Specials::Written)?;
        if tokens.is_empty() {
            return Err(CalibrateError::Empty { expert: expert.to_owned(), prompt: prompt.clone() });
        }
        if tokens.len() > limit {
            let start: String = prompt.chars().take(40).collect();
            let length = tokens.len();
            warnings
                .push(format!("expert `{expert}`: prompt {start:?}... has {length} tokens and is cut to the base's context of {limit}"));
            tokens.truncate(limit);
        }
        Ok(tokens)
    };
    let mut all = |expert: &str, prompts: &[String]| prompts.iter().map(|prompt| tokens(expert, prompt)).collect::<Result<Vec<_>, _>>();
    let each = experts.iter().zip(names).map(|(expert, name)| {
        let positive = all(name, &expert.positive_prompts)?;
        let negative = all(name, &expert.negative_prompts)?;
        Ok(Prompts { expert: name.clone(), positive, negative })
    });
    Ok(Tokenized { experts: each.collect::<Result<_, CalibrateError>>()?, pad })
}

fn template(base: &Source, tokenizer: &Tokenizer) -> Result<ChatTemplate, CalibrateError> {
    let template = ChatTemplate::open(&base.sidecars, tokenizer.special_tokens().clone())?;
    template.ok_or_else(|| CalibrateError::NoTemplate { base: base.reference.to_string() })
}

fn wrap(template: &ChatTemplate, prompt: &str) -> Result<String, CalibrateError> {
    let messages = [json!({"role": "user", "content": prompt})];
    // No date: the same recipe must give the same gates tomorrow.
    Ok(template.render(&Chat { messages: &messages, add_generation_prompt: true, variables: &Map::new(), now: None })?)
}
