//! What is told of tokens, in step with the text: a token is told when all of its text is shown, and never if a stop string cuts it off.

use std::{cmp::Ordering, collections::VecDeque};

use super::watch::Chosen;

/// What is told of each token of a text.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Tell {
    /// how likely it was, and so many of the most likely tokens in its place
    pub logprobs: Option<usize>,
    /// the experts that computed the logits that it was chosen from
    pub experts: bool,
}

impl Tell {
    /// Whether anything is.
    pub(super) fn any(self) -> bool {
        self.logprobs.is_some() || self.experts
    }
}

/// A token of a text.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Token {
    /// which
    pub id: u32,
    /// characters of the text before its own
    pub start: usize,
    /// the logarithm of its probability, before anything is done to the model's logits; of the first token of all, nothing is known
    pub logprob: Option<f32>,
    /// the most likely tokens in its place and theirs
    pub top: Vec<(u32, f32)>,
    /// who was chosen, layer by layer
    pub experts: Chosen,
}

/// The logarithms of probabilities, as softmax gives them of logits [V].
pub(super) struct Scores<'a> {
    logits: &'a [f32],
    /// the logarithm of the sum of all exponentials
    total: f64,
}

impl<'a> Scores<'a> {
    pub(super) fn new(logits: &'a [f32]) -> Self {
        let max = f64::from(logits.iter().copied().fold(f32::NEG_INFINITY, f32::max));
        let total = max + logits.iter().filter(|v| !v.is_nan()).map(|&v| (f64::from(v) - max).exp()).sum::<f64>().ln();
        Self { logits, total }
    }

    pub(super) fn of(&self, token: u32) -> f32 {
        self.logits.get(token as usize).map_or(f32::NEG_INFINITY, |&logit| (f64::from(logit) - self.total) as f32)
    }

    /// The most likely tokens, of equal ones the first.
    pub(super) fn top(&self, count: usize) -> Vec<(u32, f32)> {
        let count = count.min(self.logits.len());
        if count == 0 {
            return Vec::new();
        }
        let by_falling_logit = |a: &u32, b: &u32| {
            let logit = |token: &u32| Some(self.logits[*token as usize]).filter(|logit| !logit.is_nan()).unwrap_or(f32::NEG_INFINITY);
            logit(b).partial_cmp(&logit(a)).unwrap_or(Ordering::Equal).then(a.cmp(b))
        };
        let mut order: Vec<u32> = (0..self.logits.len() as u32).collect();
        order.select_nth_unstable_by(count - 1, by_falling_logit);
        order.truncate(count);
        order.sort_unstable_by(by_falling_logit);
        order.into_iter().map(|token| (token, self.of(token))).collect()
    }
}

/// What is made of a prompt's own tokens while they are read.
#[derive(Debug)]
pub(super) enum Reading {
    /// nothing
    Plain,
    /// they are told, each with its text
    Echo(Vec<(Token, String)>),
    /// their last hidden states are summed up, [D]
    Embed(Vec<f64>),
}

/// Tokens that wait for their text to be shown.
#[derive(Debug, Default)]
pub(super) struct Waiting {
    /// each with the characters of the text up to its end
    tokens: VecDeque<(Token, usize)>,
    /// characters of the text so far
    said: usize,
    /// of which so many are shown
    shown: usize,
}

impl Waiting {
    /// Takes a token and the text that came with it. One without text, as part of a character, waits for the text that comes next.
    pub(super) fn push(&mut self, token: Token, text: &str) {
        let start = self.said;
        self.said += text.chars().count();
        self.tokens.push_back((Token { start, ..token }, self.said.max(start + 1)));
    }

    /// The tokens that are shown whole with so much more of the text.
    pub(super) fn show(&mut self, text: &str) -> Vec<Token> {
        self.shown += text.chars().count();
        let whole = self.tokens.iter().take_while(|(_, end)| *end <= self.shown).count();
        self.tokens.drain(..whole).map(|(token, _)| token).collect()
    }

    /// All others, when the text is complete.
    pub(super) fn rest(&mut self) -> Vec<Token> {
        self.tokens.drain(..).map(|(token, _)| token).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn scores_are_those_of_the_softmax() {
        // softmax of (0, ln 3, NaN, -inf) is (1/4, 3/4, 0, 0)
        let logits = [0.0, 3f32.ln(), f32::NAN, f32::NEG_INFINITY];
        let scores = Scores::new(&logits);
        assert!((scores.of(0) - 0.25f32.ln()).abs() < 1e-6 && (scores.of(1) - 0.75f32.ln()).abs() < 1e-6);
        assert!(scores.of(3).is_infinite() && scores.of(9).is_infinite());
        assert_eq!(scores.top(2).iter().map(|(token, _)| *token).collect::<Vec<_>>(), [1, 0]);
        assert_eq!((scores.top(0).len(), scores.top(9).len()), (0, 4));
        // far beyond what exp can hold
        assert!((Scores::new(&[1000.0, 1000.0]).of(0) - 0.5f32.ln()).abs() < 1e-6);
    }

    #[test]
    fn tokens_are_told_with_the_last_of_their_text() {
        let mut waiting = Waiting::default();
        let told = |tokens: Vec<Token>| tokens.iter().map(|token| (token.id, token.start)).collect::<Vec<_>>();
        for (id, text) in [(1, "ab"), (2, ""), (3, "é"), (4, "cd")] {
            waiting.push(Token { id, ..Token::default() }, text);
        }
        assert_eq!(told(waiting.show("")), []);
        assert_eq!(told(waiting.show("a")), []);
        assert_eq!(told(waiting.show("b")), [(1, 0)]);
        assert_eq!(told(waiting.show("éc")), [(2, 2), (3, 2)], "half a character is told with the character");
        assert_eq!(told(waiting.rest()), [(4, 3)]);
    }
}
