//! What an answer says of its tokens beside their text: their probabilities in OpenAI's two forms, and the experts that wrote them.

use std::sync::Arc;

use serde_json::{Map, Value, json};

use super::openai::Kind;
use crate::engine::{Tell, Token, Tokenizer};

/// The tokens of a choice that have not been told yet.
#[derive(Debug)]
pub(super) struct Told {
    pub(super) kind: Kind,
    pub(super) tell: Tell,
    pub(super) tokenizer: Arc<Tokenizer>,
    /// E
    pub(super) experts: usize,
    pub(super) tokens: Vec<Token>,
}

impl Told {
    /// Puts them into a choice, or the part of one that is sent next.
    pub(super) fn put(&mut self, choice: &mut Value) {
        let tokens = std::mem::take(&mut self.tokens);
        if tokens.is_empty() {
            return;
        }
        if self.tell.logprobs.is_some() {
            choice["logprobs"] = match self.kind {
                Kind::Chat => json!({"content": tokens.iter().map(|token| self.content(token)).collect::<Vec<_>>(), "refusal": null}),
                Kind::Text => self.lists(&tokens),
            };
        }
        if self.tell.experts {
            choice["experts"] = tokens.iter().filter(|token| !token.experts.is_empty()).map(|token| self.chosen(token)).collect();
        }
    }

    /// A token as chats have it.
    fn content(&self, token: &Token) -> Value {
        let one = |id: u32, logprob: f32| {
            let bytes = self.tokenizer.written(id);
            json!({"token": String::from_utf8_lossy(&bytes), "logprob": finite(logprob), "bytes": bytes})
        };
        let mut content = one(token.id, token.logprob.unwrap_or_default());
        content["top_logprobs"] = token.top.iter().map(|&(id, logprob)| one(id, logprob)).collect();
        content
    }

    /// Tokens as plain completions have them. The token itself is always among the likely ones; where none are asked for, there is no list.
    fn lists(&self, tokens: &[Token]) -> Value {
        let top = |token: &Token| {
            let Some(logprob) = token.logprob.filter(|_| self.tell.logprobs > Some(0)) else { return Value::Null };
            let all = token.top.iter().copied().chain([(token.id, logprob)]);
            all.map(|(id, logprob)| (self.word(id), finite(logprob))).collect::<Map<_, _>>().into()
        };
        json!({
            "tokens": tokens.iter().map(|token| self.word(token.id)).collect::<Vec<_>>(),
            "token_logprobs": tokens.iter().map(|token| token.logprob.map(finite)).collect::<Vec<_>>(),
            "top_logprobs": tokens.iter().map(top).collect::<Vec<_>>(),
            "text_offset": tokens.iter().map(|token| token.start).collect::<Vec<_>>(),
        })
    }

    /// A token in lists that have no room for bytes: what is no text is spelled, so that two such tokens are not one.
    fn word(&self, id: u32) -> String {
        let spelled = |bytes: &[u8]| bytes.iter().fold("bytes:".to_owned(), |spelled, byte| spelled + &format!("\\x{byte:02x}"));
        String::from_utf8(self.tokenizer.written(id)).unwrap_or_else(|error| spelled(error.as_bytes()))
    }

    fn chosen(&self, token: &Token) -> Value {
        let mut share = vec![0.0; self.experts];
        for layer in &token.experts {
            let total: f32 = layer.iter().map(|(_, weight)| weight).sum();
            layer.iter().for_each(|&(expert, weight)| share[expert as usize] += weight / total / token.experts.len() as f32);
        }
        let layers: Vec<Vec<u32>> = token.experts.iter().map(|layer| layer.iter().map(|(expert, _)| *expert).collect()).collect();
        json!({"token": token.id, "text": String::from_utf8_lossy(&self.tokenizer.written(token.id)), "share": share, "layers": layers})
    }
}

/// JSON has no infinity: what is impossible is very unlikely, as in OpenAI's API.
fn finite(logprob: f32) -> Value {
    json!(logprob.max(-9999.0))
}
