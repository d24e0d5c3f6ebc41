//! Answers in the colours of the experts that wrote them. Whether colours are seen at all is the stream's business.

use std::{collections::VecDeque, ops::Range};

use anstyle::{AnsiColor, Style};
use upcycle::engine::{Chosen, Token};

/// In the order of experts; further ones begin again.
const COLOURS: [AnsiColor; 8] = [
    AnsiColor::Blue,
    AnsiColor::Yellow,
    AnsiColor::Green,
    AnsiColor::Magenta,
    AnsiColor::Cyan,
    AnsiColor::Red,
    AnsiColor::BrightBlue,
    AnsiColor::BrightGreen,
];

/// Text in an expert's colour.
pub(super) fn painted(text: &str, expert: usize) -> String {
    let style = Style::new().fg_color(Some(COLOURS[expert % COLOURS.len()].into()));
    format!("{style}{text}{style:#}")
}

/// The experts' names in their colours.
pub(super) fn legend(names: &[String]) -> String {
    names.iter().enumerate().map(|(e, name)| painted(name, e)).collect::<Vec<_>>().join(" ")
}

/// Paints a text piece by piece.
#[derive(Debug, Default)]
pub(super) struct Painter {
    /// where tokens begin that are not painted yet, in characters of the text, and who wrote most of each
    tokens: VecDeque<(usize, Option<usize>)>,
    /// characters that are painted
    done: usize,
}

impl Painter {
    /// Takes what is told of the tokens of the next piece.
    pub(super) fn told(&mut self, tokens: &[Token]) {
        self.tokens.extend(tokens.iter().map(|token| (token.start, leader(&token.experts))));
    }

    /// The next piece, painted.
    pub(super) fn paint(&mut self, piece: &str) -> String {
        let end = self.done + piece.chars().count();
        let mut text = String::with_capacity(piece.len());
        let mut rest = piece;
        let mut take = |range: Range<usize>, expert: Option<usize>| {
            let bytes = rest.char_indices().nth(range.len()).map_or(rest.len(), |(at, _)| at);
            let (own, after) = rest.split_at(bytes);
            rest = after;
            match expert {
                _ if own.is_empty() => {}
                Some(expert) => text += &painted(own, expert),
                None => text += own,
            }
        };
        while let Some((start, expert)) = self.tokens.pop_front() {
            let start = start.clamp(self.done, end);
            let stop = self.tokens.front().map_or(end, |(next, _)| (*next).clamp(start, end));
            take(self.done..start, None);
            take(start..stop, expert);
            self.done = stop;
        }
        take(self.done..end, None);
        self.done = end;
        text
    }
}

/// The expert with most weight in all layers together.
fn leader(chosen: &Chosen) -> Option<usize> {
    let mut weights: Vec<f32> = Vec::new();
    for &(expert, weight) in chosen.iter().flatten() {
        let expert = expert as usize;
        weights.resize(weights.len().max(expert + 1), 0.0);
        weights[expert] += weight;
    }
    (0..weights.len()).max_by(|a, b| weights[*a].total_cmp(&weights[*b]).then(b.cmp(a)))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn token(start: usize, expert: u32) -> Token {
        Token { start, experts: vec![vec![(expert, 0.7), (0, 0.3)], vec![(expert, 1.0)]], ..Token::default() }
    }

    #[test]
    fn each_token_has_the_colour_of_its_leader() {
        let mut painter = Painter::default();
        painter.told(&[token(0, 1), token(2, 2)]);
        assert_eq!(painter.paint("äbcd"), format!("{}{}", painted("äb", 1), painted("cd", 2)));
        assert_eq!(painter.paint("?"), "?", "nobody told who wrote that");
        painter.told(&[token(5, 0)]);
        assert_eq!(painter.paint("e"), painted("e", 0));
        painter.told(&[token(6, 3)]);
        assert_eq!(painter.paint(""), "", "the end of a text has no text");
    }

    #[test]
    fn the_heaviest_leads_and_of_equals_the_first() {
        assert_eq!(leader(&vec![vec![(2, 0.5), (1, 0.5)]]), Some(1));
        assert_eq!(leader(&vec![vec![(0, 0.6), (1, 0.4)], vec![(1, 0.9), (0, 0.1)]]), Some(1));
        assert_eq!(leader(&Chosen::new()), None);
    }
}
