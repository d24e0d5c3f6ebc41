//! The experts of a model: what they are called, and how often they are chosen in all that the engine reads and writes.

use std::sync::{Mutex, PoisonError};

use upcycle_architectures::decoder::Choice;

/// Tokens after which a choice counts 1/e of a new one among the recent ones.
const MEMORY: f64 = 4096.0;

/// The experts of a model.
#[derive(Debug)]
pub struct Experts {
    names: Vec<String>,
    choice: Choice,
    loads: Mutex<Loads>,
}

/// How often experts were chosen.
#[derive(Debug, Clone, PartialEq)]
pub struct Loads {
    /// tokens read and written
    pub tokens: u64,
    /// of each layer that has a router
    pub layers: Vec<LayerLoads>,
}

/// The same in one layer.
#[derive(Debug, Clone, PartialEq)]
pub struct LayerLoads {
    /// the layer
    pub layer: usize,
    /// how often each expert was chosen, [E]
    pub choices: Vec<u64>,
    /// the same where the past fades, [E]: mostly that of the last 4096 tokens
    pub recent: Vec<f64>,
}

impl Experts {
    /// Of a model with this choice, called `names` if there are as many; by their numbers else.
    pub(super) fn new(choice: Choice, names: Vec<String>) -> Self {
        let names = if names.len() == choice.experts { names } else { (0..choice.experts).map(|e| e.to_string()).collect() };
        let none = |&layer: &usize| LayerLoads { layer, choices: vec![0; choice.experts], recent: vec![0.0; choice.experts] };
        let loads = Loads { tokens: 0, layers: choice.layers.iter().map(none).collect() };
        Self { names, choice, loads: Mutex::new(loads) }
    }

    /// What they are called, [E].
    pub fn names(&self) -> &[String] {
        &self.names
    }

    /// Whom the model chooses among when nobody steers it.
    pub fn choice(&self) -> &Choice {
        &self.choice
    }

    /// The expert of that name or number.
    pub fn find(&self, name: &str) -> Option<usize> {
        let named = self.names.iter().position(|own| own == name);
        named.or_else(|| name.parse().ok().filter(|number| *number < self.names.len()))
    }

    /// How often they have been chosen so far.
    pub fn loads(&self) -> Loads {
        // Whoever panicked has left numbers that can be read.
        self.loads.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Adds a pass over so many tokens: counts [layer][E].
    pub(super) fn count(&self, tokens: usize, counts: &[Vec<u64>]) {
        let mut loads = self.loads.lock().unwrap_or_else(PoisonError::into_inner);
        loads.tokens += tokens as u64;
        let fade = (-(tokens as f64) / MEMORY).exp();
        for (layer, counts) in loads.layers.iter_mut().zip(counts) {
            for ((choices, recent), count) in layer.choices.iter_mut().zip(&mut layer.recent).zip(counts) {
                *choices += count;
                *recent = *recent * fade + *count as f64;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn experts(names: &[&str]) -> Experts {
        let choice = Choice { experts: 3, top_k: 2, layers: vec![0, 2], whole: false };
        Experts::new(choice, names.iter().map(|&name| name.to_owned()).collect())
    }

    #[test]
    fn experts_are_found_by_name_and_by_number() {
        let named = experts(&["code", "2", "math"]);
        assert_eq!(["math", "2", "0", "3", "german"].map(|name| named.find(name)), [Some(2), Some(1), Some(0), None, None]);
        assert_eq!(experts(&["code"]).names(), ["0", "1", "2"]);
    }

    #[test]
    fn long_after_only_the_new_choices_are_recent() {
        let experts = experts(&[]);
        experts.count(2, &[vec![2, 1, 1], vec![0, 4, 0]]);
        experts.count(100_000, &[vec![1, 0, 0], vec![0, 0, 0]]);
        let Loads { tokens, layers } = experts.loads();
        assert_eq!(tokens, 100_002);
        assert_eq!(
            layers.iter().map(|layer| (layer.layer, layer.choices.clone())).collect::<Vec<_>>(),
            [(0, vec![3, 1, 1]), (2, vec![0, 4, 0])]
        );
        let recent = &layers[0].recent;
        assert!((recent[0] - 1.0).abs() < 1e-6 && recent[1] < 1e-6, "{recent:?}");
    }
}
