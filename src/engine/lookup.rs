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

/// How far guesses are trusted.
#[derive(Debug, Clone, Copy)]
pub(super) struct Trust {
    now: usize,
    most: usize,
}

impl Trust {
    /// At most `most` tokens.
    pub(super) fn new(most: usize) -> Self {
        Self { now: most.min(4), most }
    }

    /// Tokens to guess.
    pub(super) fn tokens(self) -> usize {
        self.now
    }

    /// Learns from a guess.
    pub(super) fn learn(&mut self, guessed: usize, right: usize) {
        if guessed > 0 {
            self.now = if right == guessed { (2 * self.now).min(self.most) } else { right.max(1) };
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
    fn trust_follows_success() {
        let mut trust = Trust::new(10);
        let mut seen = vec![trust.tokens()];
        for (guessed, right) in [(4, 4), (8, 8), (10, 3), (0, 0), (3, 0), (1, 1)] {
            trust.learn(guessed, right);
            seen.push(trust.tokens());
        }
        assert_eq!(seen, [4, 8, 10, 3, 3, 1, 2]);
        assert_eq!(Trust::new(0).tokens(), 0);
    }
}
