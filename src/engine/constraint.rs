//! What a text may be: before each token is chosen, those that no allowed text can go on with are ruled out.
//!
//! Grammars (JSON schemas, regular expressions, Lark) are compiled and followed by `llguidance`; here its view of a vocabulary is made from a
//! tokenizer, and its limits are set so that no request can take long. A constraint looks at tokens alone: what is guessed and checked
//! (`lookup`) is chosen under the same masks.

use std::{fmt, sync::Arc};

use llguidance::{
    Matcher, ParserFactory,
    api::TopLevelGrammar,
    toktrie::{ApproximateTokEnv, InferenceCapabilities, TokEnv, TokRxInfo, TokTrie},
};
use serde_json::{Value, json};

use super::tokenizer::{Piece, Tokenizer};

/// Bytes of a token at most; longer ones are never chosen under a constraint.
const LONGEST: usize = 200;
/// White space in a row, where JSON may have any: models that have nothing to say write it for ever.
const WHITE_SPACE: &str = r"[ \n\r\t]{1,32}";

/// What a text may be.
#[derive(Debug, Clone, PartialEq)]
pub enum Grammar {
    /// JSON that fits this schema (draft 2020-12, what of it `llguidance` knows; references within the schema alone)
    JsonSchema(Value),
    /// all of it matches this regular expression
    Regex(String),
    /// a grammar in `llguidance`'s kind of Lark, with the rule `start`
    Lark(String),
}

impl Grammar {
    /// Any JSON object.
    pub fn json_object() -> Self {
        Self::JsonSchema(json!({"type": "object"}))
    }
}

/// Why there is no constraint, or it could not be followed.
#[derive(Debug, Clone, thiserror::Error)]
pub enum ConstraintError {
    /// tokens without bytes
    #[error("the model's tokenizer has no bytes for its tokens (neither byte-level nor with byte fallback): text cannot be constrained")]
    Vocabulary,
    /// not a grammar, or one that nothing fits, or too large a one
    #[error("the grammar cannot be used: {0}")]
    Grammar(String),
    /// no token goes on, or the parser gave up
    #[error("the constraint cannot be followed: {0}")]
    Stuck(String),
}

/// A vocabulary that grammars can be compiled for.
pub(super) struct Vocabulary(ParserFactory);

impl fmt::Debug for Vocabulary {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Vocabulary").field("tokens", &self.0.tok_env().tok_trie().vocab_size()).finish()
    }
}

impl Vocabulary {
    /// `vocab` is the number of logits; texts end at the tokens `ends`.
    pub(super) fn new(tokenizer: &Tokenizer, vocab: usize, ends: &[u32]) -> Result<Self, ConstraintError> {
        let pieces = tokenizer.pieces(vocab).ok_or(ConstraintError::Vocabulary)?;
        let word = |piece: Option<Piece>| match piece {
            Some(Piece::Bytes(bytes)) if bytes.len() <= LONGEST => bytes,
            Some(Piece::Special(text)) if text.len() < LONGEST => [&[TokTrie::SPECIAL_TOKEN_MARKER], text.as_bytes()].concat(),
            _ => Vec::new(),
        };
        let mut words: Vec<Vec<u8>> = pieces.into_iter().map(word).collect();
        let mut ends: Vec<u32> = ends.iter().copied().filter(|&token| (token as usize) < vocab).collect();
        if ends.is_empty() {
            // The parser wants a token that ends texts: one beyond the logits is never chosen.
            ends.push(words.len() as u32);
            words.push(Vec::new());
        }
        let trie = TokTrie::from(&TokRxInfo::new(words.len() as u32, ends[0]), &words).with_eos_tokens(&ends);
        let env: TokEnv = Arc::new(ApproximateTokEnv::new(trie));
        let factory = ParserFactory::new(&env, InferenceCapabilities::default(), &[]);
        let mut factory = factory.map_err(|error| ConstraintError::Grammar(error.to_string()))?;
        factory.quiet();
        factory.limits_mut().verbose_errors = false;
        Ok(Self(factory))
    }

    /// Compiles a grammar; nothing of it has been seen yet.
    pub(super) fn constraint(&self, grammar: &Grammar) -> Result<Constraint, ConstraintError> {
        let grammar = match grammar {
            Grammar::JsonSchema(schema) => TopLevelGrammar::from_json_schema(with_white_space(schema.clone())),
            Grammar::Regex(pattern) => TopLevelGrammar::from_regex(pattern),
            Grammar::Lark(text) => TopLevelGrammar::from_lark(text.clone()),
        };
        let mut matcher = Matcher::new(self.0.create_parser(grammar));
        // The first mask may find what compiling has not: a regular expression that is too large, a schema that nothing fits.
        match matcher.compute_mask() {
            Ok(_) => Ok(Constraint(matcher)),
            Err(error) => Err(ConstraintError::Grammar(first_line(&error.to_string()))),
        }
    }
}

fn with_white_space(mut schema: Value) -> Value {
    if schema == Value::Bool(true) {
        schema = json!({});
    }
    if let Some(schema) = schema.as_object_mut() {
        schema.entry("x-guidance").or_insert_with(|| json!({"whitespace_flexible": true, "whitespace_pattern": WHITE_SPACE}));
    }
    schema
}

fn first_line(message: &str) -> String {
    message.lines().next().unwrap_or_default().to_owned()
}

/// Where a text stands in its grammar.
#[derive(Clone)]
pub struct Constraint(Matcher);

impl fmt::Debug for Constraint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Constraint").field("stopped", &self.0.is_stopped()).finish_non_exhaustive()
    }
}

impl Constraint {
    /// Makes impossible what may not come next, in logits [V].
    pub(super) fn mask(&mut self, logits: &mut [f32]) -> Result<(), ConstraintError> {
        let mask = self.0.compute_mask_or_eos().map_err(|error| stuck(&error))?;
        let mut left = 0usize;
        for (token, logit) in logits.iter_mut().enumerate() {
            if mask.get(token) {
                left += usize::from(*logit > f32::NEG_INFINITY);
            } else {
                *logit = f32::NEG_INFINITY;
            }
        }
        if left == 0 { Err(ConstraintError::Stuck("no token of the vocabulary goes on".into())) } else { Ok(()) }
    }

    /// Takes the token that was chosen. Whether the text is complete: nothing can follow.
    pub(super) fn take(&mut self, token: u32) -> Result<bool, ConstraintError> {
        self.0.consume_token(token).map_err(|error| stuck(&error))?;
        Ok(self.0.is_stopped())
    }
}

fn stuck(error: &impl fmt::Display) -> ConstraintError {
    ConstraintError::Stuck(first_line(&error.to_string()))
}
