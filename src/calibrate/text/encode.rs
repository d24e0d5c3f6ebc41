//! Text and messages to sequences: tokens as a model is given them when it is served, and which of them count.

use std::{collections::BTreeMap, ops::Range};

use serde_json::{Map, Value};
use upcycle_architectures::Config;

use super::{Sequence, TextError};
use crate::{
    engine::{
        template::{Chat, ChatTemplate, TemplateError},
        tokenizer::{Tokenizer, TokenizerError},
    },
    plan::Sources,
    recipe::Recipe,
    source::Sidecar,
};

/// Put around what is said to find it again in a rendered template: code points that are no characters, so no text has them.
const MARKS: [char; 2] = ['\u{FDD0}', '\u{FDD1}'];

/// The tokenizer and template that the composite will have.
pub(super) struct Encoder {
    pub(super) tokenizer: Tokenizer,
    pub(super) template: Option<ChatTemplate>,
    /// the token in front of plain text
    pub(super) prefix: Option<u32>,
    /// T at most
    pub(super) context: usize,
    /// V
    pub(super) vocab: usize,
}

impl Encoder {
    pub(super) fn open(recipe: &Recipe, sources: &Sources) -> Result<Self, TextError> {
        let base = sources.base();
        let speaker = recipe.tokenizer.as_ref().map_or(base, |reference| sources.get(reference));
        Self::of(&speaker.sidecars, &base.config)
    }

    /// Of a model with this config and these files beside it.
    pub(super) fn of(sidecars: &BTreeMap<String, Sidecar>, config: &Config) -> Result<Self, TextError> {
        let tokenizer = Tokenizer::open(sidecars, config)?;
        let template = ChatTemplate::open(sidecars, tokenizer.special_tokens().clone())?;
        let prefix = tokenizer.prefix()?;
        Ok(Self { tokenizer, template, prefix, context: config.max_positions, vocab: config.vocab })
    }

    /// Plain text, every token of which counts but special ones.
    pub(super) fn text(&self, text: &str) -> Result<Sequence, TokenizerError> {
        let tokens = self.tokenizer.encode_with_offsets(text)?.into_iter().map(|(token, _)| token);
        Ok(tokens.map(|token| (token, !self.tokenizer.is_special(token))).collect())
    }

    /// Plain text cut into sequences of `window` tokens, the prefix in front of each.
    pub(super) fn windows(&self, text: &str, window: usize) -> Result<Vec<Sequence>, TokenizerError> {
        let text = self.text(text)?;
        let room = window.min(self.context).saturating_sub(usize::from(self.prefix.is_some())).max(1);
        let parts = text.tokens.chunks(room).zip(text.counts.chunks(room));
        Ok(parts.map(|(tokens, counts)| self.prefixed(tokens.iter().copied().zip(counts.iter().copied()).collect())).collect())
    }

    /// The same with the prefix, which does not count, in front.
    pub(super) fn prefixed(&self, text: Sequence) -> Sequence {
        let Some(prefix) = self.prefix else { return text };
        std::iter::once((prefix, false)).chain(text.pairs()).collect()
    }

    /// Messages in the chat template, up to where the assistant speaks if the last is not its own. What user, assistant and tools say counts.
    /// `None` without a template.
    pub(super) fn chat(&self, messages: &[Value]) -> Result<Option<Sequence>, TextError> {
        Ok(self.template.as_ref().map(|template| self.tagged(template, messages)).transpose()?.map(|(sequence, _)| sequence))
    }

    /// A chat, and the token after the last that was said: what ends a turn.
    pub(super) fn tagged(&self, template: &ChatTemplate, messages: &[Value]) -> Result<(Sequence, Option<usize>), TextError> {
        let (text, spans) = render(template, messages)?;
        let tokens = self.tokenizer.encode_with_offsets(&text)?;
        let said = |at: &Range<usize>| spans.iter().any(|span| overlap(at, span));
        let end = spans.last().and_then(|span| tokens.iter().position(|(_, at)| at.start >= span.end && at.end > span.end));
        let sequence = tokens.iter().map(|(token, at)| (*token, said(at) && !self.tokenizer.is_special(*token))).collect();
        Ok((sequence, end))
    }

    /// The start of a text that is at most so many tokens.
    pub(super) fn shortened<'t>(&self, text: &'t str, tokens: usize) -> Result<&'t str, TokenizerError> {
        let cut = self.tokenizer.encode_with_offsets(text)?.get(tokens).map(|(_, at)| at.start);
        Ok(cut.and_then(|cut| text.get(..cut)).unwrap_or(text))
    }
}

impl Sequence {
    fn pairs(self) -> impl Iterator<Item = (u32, bool)> {
        self.tokens.into_iter().zip(self.counts)
    }

    /// Its first tokens.
    pub(super) fn truncate(&mut self, tokens: usize) {
        self.tokens.truncate(tokens);
        self.counts.truncate(tokens);
    }

    /// The same, of which nothing counts.
    pub(super) fn uncounted(mut self) -> Self {
        self.counts.fill(false);
        self
    }

    /// How many of its tokens count.
    pub fn counted(&self) -> usize {
        self.counts.iter().filter(|counts| **counts).count()
    }
}

impl FromIterator<(u32, bool)> for Sequence {
    fn from_iter<I: IntoIterator<Item = (u32, bool)>>(pairs: I) -> Self {
        let (tokens, counts) = pairs.into_iter().unzip();
        Self { tokens, counts, opening: false }
    }
}

/// A token that is said in part is said. A token of no bytes is white space that stands before its place.
fn overlap(token: &Range<usize>, span: &Range<usize>) -> bool {
    token.end > span.start && if token.is_empty() { token.end <= span.end } else { token.start < span.end }
}

/// The rendered messages, and where in them is what was said.
fn render(template: &ChatTemplate, messages: &[Value]) -> Result<(String, Vec<Range<usize>>), TemplateError> {
    let add_generation_prompt = messages.last().is_none_or(|message| message["role"] != "assistant");
    // No date: the same text must come out tomorrow.
    let messages: Vec<Value> = messages.iter().map(joined).collect();
    let rendered = |messages: &[Value]| template.render(&Chat { messages, add_generation_prompt, variables: &Map::new(), now: None });
    let marked = |edit: fn(&str) -> &str| {
        let messages: Vec<Value> = messages.iter().map(|message| marked(message, edit)).collect();
        rendered(&messages).map(|text| unmarked(&text))
    };
    let plain = rendered(&messages)?;
    let as_is = marked(|text| text)?;
    if as_is.0 == plain {
        return Ok(as_is);
    }
    // The template trims what is said; if it does more to it, this is what it makes of the same words, and where they went is known.
    marked(str::trim)
}

/// The message with its parts, if it has some, as one text, as the server joins them.
fn joined(message: &Value) -> Value {
    let mut message = message.clone();
    if let Some(content) = message.get_mut("content")
        && let Value::Array(parts) = content
    {
        *content = parts.iter().filter_map(|part| part["text"].as_str()).collect::<Vec<_>>().join("\n").into();
    }
    message
}

/// The message with marks around what it says. A system prompt counts as part of the template.
fn marked(message: &Value, edit: fn(&str) -> &str) -> Value {
    let mut message = message.clone();
    let system = message["role"] == "system" || message["role"] == "developer";
    if let Some(Value::String(text)) = message.get_mut("content").filter(|_| !system) {
        *text = format!("{}{}{}", MARKS[0], edit(text), MARKS[1]);
    }
    message
}

/// The text without marks, and what was between them.
fn unmarked(text: &str) -> (String, Vec<Range<usize>>) {
    let (mut plain, mut spans, mut open) = (String::with_capacity(text.len()), Vec::new(), None);
    for c in text.chars() {
        if c == MARKS[0] {
            open = Some(plain.len());
        } else if c == MARKS[1] {
            spans.extend(open.take().map(|start| start..plain.len()));
        } else {
            plain.push(c);
        }
    }
    (plain, spans)
}
