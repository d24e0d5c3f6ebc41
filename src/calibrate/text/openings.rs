//! Openings: a few tokens from anywhere in a text, as if it began there.
//!
//! The first tokens of a text have nothing before them that would say whose they are. Gates are wrong about them more often than about all
//! that follow, and texts have but one beginning, so that a fit hardly sees any. Where chats are served, the template stands in front of all that
//! is said: of chats nothing is taken.

use super::{Sequence, encode::Encoder};

/// Tokens of one: those behind them are known nearly as well as any.
const TOKENS: usize = 4;

/// The sequences, each followed by its openings, one of every `every` tokens, so that they are in the same part of the corpus.
pub(super) fn among(sequences: Vec<Sequence>, every: usize, encoder: &Encoder) -> Vec<Sequence> {
    let mut all = Vec::new();
    for sequence in sequences {
        let openings = of(&sequence, every, encoder);
        all.push(sequence);
        all.extend(openings);
    }
    all
}

fn of(sequence: &Sequence, every: usize, encoder: &Encoder) -> Vec<Sequence> {
    let prefix = usize::from(encoder.prefix.is_some() && sequence.tokens.first().copied() == encoder.prefix);
    if every == 0 || sequence.tokens[prefix..].iter().any(|token| encoder.tokenizer.is_special(*token)) {
        return Vec::new();
    }
    let first = sequence.counts.iter().position(|counts| *counts).unwrap_or(sequence.tokens.len());
    let places = (first + every / 2..).step_by(every).map(|at| at..at + TOKENS).take_while(|place| place.end <= sequence.tokens.len());
    let counted = places.filter(|place| sequence.counts[place.clone()].iter().all(|counts| *counts));
    let opening = |place: std::ops::Range<usize>| {
        let tokens = encoder.prefixed(sequence.tokens[place].iter().map(|token| (*token, true)).collect());
        Sequence { opening: true, ..tokens }
    };
    counted.map(opening).collect()
}
