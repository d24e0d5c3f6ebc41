//! What finished sequences leave behind, so that one that begins as they did need not read its beginning again.
//!
//! Tokens are compared one by one, never by hash. Caches that begin alike share their memory ([`Memory::fork`]), so that many continuations of one
//! system prompt hold it once; what has not been used for longest is forgotten first, from its end. What was read under one steering is of no
//! use under another.

use std::{collections::VecDeque, sync::Arc};

use upcycle_architectures::decoder::Memory;
use upcycle_routers::route::Steering;

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
        let alike = |other: &C| other.steering() == cache.steering();
        if let Some(longer) = self.0.iter().position(|(other, held)| alike(held) && other.starts_with(&tokens)) {
            self.touch(longer);
            return;
        }
        self.0.retain(|(other, held)| !(alike(held) && tokens.starts_with(other)));
        self.0.push_back((tokens, cache));
    }

    /// The cache that remembers most of how `tokens` begin under this steering, and how many of them.
    pub(super) fn longest(&mut self, tokens: &[u32], steering: Option<&Arc<Steering>>) -> Option<(&C, usize)> {
        let alike = self.0.iter().enumerate().filter(|(_, (_, held))| held.steering() == steering);
        let (shared, index) = alike.map(|(i, (other, _))| (common(tokens, other), i)).max()?;
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

    /// Remembers how many tokens it holds, and under which steering.
    #[derive(Debug, Clone, PartialEq)]
    struct Count(usize, Option<Arc<Steering>>);

    impl Memory for Count {
        fn steering(&self) -> Option<&Arc<Steering>> {
            self.1.as_ref()
        }

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
            Ok(Self(self.0.min(len), self.1.clone()))
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
        prefixes.keep(tokens(100, 1), Count(100, None));
        prefixes.keep(tokens(200, 2), Count(199, None));
        assert_eq!(prefixes.longest(&tokens(150, 1), None), Some((&Count(100, None), 100)));
        assert_eq!(kept(&prefixes), [199, 100]);
        assert_eq!(prefixes.longest(&tokens(150, 3), None).map(|(_, shared)| shared), Some(40));
        assert_eq!(prefixes.longest(&[7, 8], None), None);
    }

    #[test]
    fn a_turn_replaces_the_turns_before_it() {
        let mut prefixes = Prefixes::new();
        prefixes.keep(tokens(100, 1), Count(100, None));
        prefixes.keep(tokens(100, 2), Count(100, None));
        prefixes.keep(tokens(150, 1), Count(150, None));
        assert_eq!(kept(&prefixes), [100, 150]);
        prefixes.keep(tokens(90, 2), Count(90, None));
        assert_eq!(kept(&prefixes), [150, 100]);
        prefixes.keep(tokens(9, 3), Count(9, None));
        assert_eq!(kept(&prefixes), [150, 100]);
    }

    #[test]
    fn what_was_read_under_one_steering_is_of_no_use_under_another() {
        let steering = |top_k| Some(Arc::new(Steering { top_k: Some(top_k), ..Steering::default() }));
        let mut prefixes = Prefixes::new();
        prefixes.keep(tokens(100, 1), Count(100, steering(1)));
        prefixes.keep(tokens(90, 1), Count(90, None));
        prefixes.keep(tokens(80, 1), Count(80, steering(1)));
        assert_eq!(kept(&prefixes), [90, 100]);
        let found = |prefixes: &mut Prefixes<Count>, steering: Option<Arc<Steering>>| {
            prefixes.longest(&tokens(120, 1), steering.as_ref()).map(|(cache, shared)| (cache.clone(), shared))
        };
        assert_eq!(found(&mut prefixes, steering(1)), Some((Count(100, steering(1)), 100)));
        assert_eq!(found(&mut prefixes, None), Some((Count(90, None), 90)));
        assert_eq!(found(&mut prefixes, steering(2)), None);
    }

    #[test]
    fn the_end_of_the_oldest_is_forgotten_first() {
        let mut prefixes = Prefixes::new();
        prefixes.keep(tokens(130, 1), Count(130, None));
        prefixes.keep(tokens(50, 2), Count(50, None));
        let mut seen = vec![kept(&prefixes)];
        while prefixes.forget() {
            seen.push(kept(&prefixes));
        }
        assert_eq!(seen, [vec![130, 50], vec![66, 50], vec![50], vec![]]);
    }
}
