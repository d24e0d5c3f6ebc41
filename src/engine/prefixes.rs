//! What finished sequences leave behind, so that one that begins as they did need not read its beginning again.
//!
//! Tokens are compared one by one, never by hash. Caches that begin alike share their memory ([`Memory::fork`]), so that many continuations of one
//! system prompt hold it once; what has not been used for longest is forgotten first, from its end.

use std::collections::VecDeque;

use upcycle_architectures::decoder::Memory;

/// Fewer tokens than these are read again rather than looked for.
pub(super) const LEAST: usize = 16;
/// Tokens forgotten at a time.
const PIECE: usize = 64;

/// Caches of finished sequences and the tokens that they remember, the one not used for longest first.
#[derive(Debug)]
pub(super) struct Prefixes<C>(VecDeque<(Vec<u32>, C)>);

impl<C: Memory> Prefixes<C> {
    pub(super) fn new() -> Self {
        Self(VecDeque::new())
    }

    /// Keeps the cache of a sequence that began with `tokens`.
    pub(super) fn keep(&mut self, mut tokens: Vec<u32>, cache: C) {
        tokens.truncate(cache.len());
        if tokens.len() < LEAST {
            return;
        }
        if let Some(longer) = self.0.iter().position(|(other, _)| other.starts_with(&tokens)) {
            self.touch(longer);
            return;
        }
        self.0.retain(|(other, _)| !tokens.starts_with(other));
        self.0.push_back((tokens, cache));
    }

    /// The cache that remembers most of how `tokens` begin, and how many of them.
    pub(super) fn longest(&mut self, tokens: &[u32]) -> Option<(&C, usize)> {
        let (shared, index) = self.0.iter().enumerate().map(|(i, (other, _))| (common(tokens, other), i)).max()?;
        if shared == 0 {
            return None;
        }
        self.touch(index);
        self.0.back().map(|(_, cache)| (cache, shared))
    }

    /// Forgets a little; false if there is nothing left to forget.
    pub(super) fn forget(&mut self) -> bool {
        let Some((tokens, cache)) = self.0.front_mut() else { return false };
        cache.truncate(cache.len().saturating_sub(PIECE));
        tokens.truncate(cache.len());
        if tokens.len() < LEAST {
            self.0.pop_front();
        }
        true
    }

    fn touch(&mut self, index: usize) {
        let used = self.0.remove(index);
        self.0.extend(used);
    }
}

/// How many tokens two sequences begin with alike.
pub(super) fn common(a: &[u32], b: &[u32]) -> usize {
    a.iter().zip(b).take_while(|(a, b)| a == b).count()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Remembers how many tokens it holds.
    #[derive(Debug, PartialEq)]
    struct Count(usize);

    impl Memory for Count {
        fn len(&self) -> usize {
            self.0
        }

        fn truncate(&mut self, len: usize) {
            self.0 = self.0.min(len);
        }

        fn rewinds(&self) -> bool {
            true
        }

        fn fork(&self, len: usize) -> candle_core::Result<Self> {
            Ok(Self(self.0.min(len)))
        }

        fn growth(&self, tokens: usize) -> usize {
            tokens
        }
    }

    fn tokens(len: u32, seed: u32) -> Vec<u32> {
        (0..len).map(|i| if i < 40 { i } else { i + seed }).collect()
    }

    fn kept(prefixes: &Prefixes<Count>) -> Vec<usize> {
        prefixes.0.iter().map(|(tokens, _)| tokens.len()).collect()
    }

    #[test]
    fn the_longest_beginning_is_found_and_kept_longest() {
        let mut prefixes = Prefixes::new();
        prefixes.keep(tokens(100, 1), Count(100));
        prefixes.keep(tokens(200, 2), Count(199));
        assert_eq!(prefixes.longest(&tokens(150, 1)), Some((&Count(100), 100)));
        assert_eq!(kept(&prefixes), [199, 100]);
        assert_eq!(prefixes.longest(&tokens(150, 3)).map(|(_, shared)| shared), Some(40));
        assert_eq!(prefixes.longest(&[7, 8]), None);
    }

    #[test]
    fn a_turn_replaces_the_turns_before_it() {
        let mut prefixes = Prefixes::new();
        prefixes.keep(tokens(100, 1), Count(100));
        prefixes.keep(tokens(100, 2), Count(100));
        prefixes.keep(tokens(150, 1), Count(150));
        assert_eq!(kept(&prefixes), [100, 150]);
        prefixes.keep(tokens(90, 2), Count(90));
        assert_eq!(kept(&prefixes), [150, 100]);
        prefixes.keep(tokens(9, 3), Count(9));
        assert_eq!(kept(&prefixes), [150, 100]);
    }

    #[test]
    fn the_end_of_the_oldest_is_forgotten_first() {
        let mut prefixes = Prefixes::new();
        prefixes.keep(tokens(130, 1), Count(130));
        prefixes.keep(tokens(50, 2), Count(50));
        let mut seen = vec![kept(&prefixes)];
        while prefixes.forget() {
            seen.push(kept(&prefixes));
        }
        assert_eq!(seen, [vec![130, 50], vec![66, 50], vec![50], vec![]]);
    }
}
