//! Guesses at the next tokens from the text itself (prompt lookup): what followed the last time that its last tokens stood there.
//!
//! A guess costs a row of a pass; the model says itself what comes after each, so that a wrong one changes nothing.

/// Tokens that must have stood there before.
const LEAST: usize = 3;
/// Of places where as many tokens or more agree, the last is taken.
const ENOUGH: usize = 8;

/// At most `most` tokens that may come next.
pub(super) fn guess(tokens: &[u32], most: usize) -> &[u32] {
    let agree = |end: usize| tokens[..end].iter().rev().zip(tokens.iter().rev()).take(ENOUGH).take_while(|(a, b)| a == b).count();
    let mut best = (LEAST - 1, tokens.len());
    for end in (1..tokens.len()).rev() {
        let length = agree(end);
        if length > best.0 {
            best = (length, end);
        }
        if length == ENOUGH {
            break;
        }
    }
    &tokens[best.1..(best.1 + most).min(tokens.len())]
}

/// Guesses in a row that must have been right before one is checked at a cost.
const PROVEN: usize = 2;
/// Tokens guessed first.
const FIRST: usize = 4;

/// How far guesses are trusted. Whether a guess would have been right is seen without checking it, so text that does not repeat itself pays
/// nothing.
#[derive(Debug, Clone, Copy)]
pub(super) struct Trust {
    /// guesses in a row that were right
    streak: usize,
    tokens: usize,
    most: usize,
}

impl Trust {
    /// At most `most` tokens.
    pub(super) fn new(most: usize) -> Self {
        Self { streak: 0, tokens: FIRST.min(most), most }
    }

    /// Whether there are guesses at all.
    pub(super) fn guesses(self) -> bool {
        self.most > 0
    }

    /// Tokens to check.
    pub(super) fn tokens(self) -> usize {
        if self.streak < PROVEN { 0 } else { self.tokens }
    }

    /// Learns what became of a guess: how many tokens were checked and right, and whether the first would have been.
    pub(super) fn learn(&mut self, checked: usize, right: usize, first: bool) {
        if !first || right < checked {
            *self = Self::new(self.most);
            return;
        }
        self.streak += 1;
        if checked > 0 {
            self.tokens = (2 * self.tokens).min(self.most);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_followed_is_guessed() {
        assert_eq!(guess(&[1, 2, 3, 4, 5, 9, 1, 2, 3], 2), [4, 5]);
        assert_eq!(guess(&[1, 2, 3, 4, 5, 9, 1, 2, 3], 10), [4, 5, 9, 1, 2, 3]);
        assert_eq!(guess(&[1, 2, 3, 4, 5, 9, 1, 2, 3], 0).len(), 0);
        // The longest agreement wins, then the latest.
        assert_eq!(guess(&[0, 1, 2, 3, 4, 7, 1, 2, 3, 5, 0, 1, 2, 3], 1), [4]);
        assert_eq!(guess(&[7, 1, 2, 3, 4, 8, 1, 2, 3, 5, 0, 1, 2, 3], 1), [5]);
        // A loop goes on.
        assert_eq!(guess(&[5, 5, 5, 5], 3), [5]);
        for nothing in [&[][..], &[1], &[1, 2, 1, 2], &[1, 2, 3, 4]] {
            assert_eq!(guess(nothing, 4).len(), 0);
        }
    }

    #[test]
    fn trust_is_earned_and_lost() {
        let mut trust = Trust::new(10);
        let mut seen = vec![trust.tokens()];
        for (checked, right, first) in [(0, 0, true), (0, 0, false), (0, 0, true), (0, 0, true), (4, 4, true), (8, 8, true), (10, 3, true)]
        {
            trust.learn(checked, right, first);
            seen.push(trust.tokens());
        }
        assert_eq!(seen, [0, 0, 0, 0, 4, 8, 10, 0]);
        assert!(trust.guesses() && !Trust::new(0).guesses());
    }
}
