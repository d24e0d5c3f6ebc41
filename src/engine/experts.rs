//! Which experts are chosen: counted over all that the engine reads and writes, and recorded for tokens whose requests ask for it.

use std::sync::{Mutex, PoisonError};

use upcycle_architectures::decoder::{Choice, Probe};
use upcycle_routers::route::Routing;

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

/// The experts chosen for a token and their weights, of each layer that has a router.
pub type Chosen = Vec<Vec<(u32, f32)>>;

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
    fn count(&self, tokens: usize, counts: &[Vec<u64>]) {
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

/// Looks at the choices of one pass.
pub(super) struct Watch<'a> {
    experts: Option<&'a Experts>,
    /// of this pass, [layer][E]
    counts: Vec<Vec<u64>>,
    /// rows whose choices are recorded
    rows: Vec<usize>,
    /// theirs
    chosen: Vec<Chosen>,
}

impl<'a> Watch<'a> {
    /// Counts the choices of all rows and records those of `rows`.
    pub(super) fn new(experts: Option<&'a Experts>, rows: Vec<usize>) -> Self {
        let counts = experts.map_or_else(Vec::new, |experts| vec![vec![0; experts.names.len()]; experts.choice.layers.len()]);
        Self { experts, counts, chosen: vec![Chosen::new(); rows.len()], rows }
    }

    /// Adds what was counted, over so many tokens, to what was before; returns what was recorded, row by row.
    pub(super) fn finish(self, tokens: usize) -> Vec<Chosen> {
        if let Some(experts) = self.experts {
            experts.count(tokens, &self.counts);
        }
        self.chosen
    }
}

impl Probe for Watch<'_> {
    fn route(&mut self, layer: usize, _: &[f32], routing: &mut Routing) {
        let Some(layer) = self.experts.and_then(|experts| experts.choice.layers.binary_search(&layer).ok()) else { return };
        for (&expert, _) in routing.experts.iter().zip(&routing.weights).filter(|(_, weight)| **weight > 0.0) {
            self.counts[layer][expert as usize] += 1;
        }
        for (&row, chosen) in self.rows.iter().zip(&mut self.chosen) {
            let own = row * routing.top_k..(row + 1) * routing.top_k;
            let choices = routing.experts[own.clone()].iter().copied().zip(routing.weights[own].iter().copied());
            chosen.push(choices.filter(|(_, weight)| *weight > 0.0).collect());
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
    fn choices_are_counted_and_recorded_but_not_those_without_weight() {
        let experts = experts(&[]);
        let mut watch = Watch::new(Some(&experts), vec![1]);
        let routing = Routing { top_k: 2, experts: vec![0, 1, 2, 2], weights: vec![0.75, 0.25, 1.0, 0.0] };
        watch.route(0, &[], &mut routing.clone());
        watch.route(2, &[], &mut Routing { experts: vec![1, 2, 1, 0], weights: vec![0.5; 4], ..routing });
        assert_eq!(watch.finish(2), [vec![vec![(2, 1.0)], vec![(1, 0.5), (0, 0.5)]]]);
        let loads = experts.loads();
        assert_eq!(loads.tokens, 2);
        assert_eq!(
            loads.layers.iter().map(|layer| (layer.layer, layer.choices.clone())).collect::<Vec<_>>(),
            [(0, vec![1, 1, 1]), (2, vec![1, 2, 1])]
        );
        // Long after, only the new choices are recent ones.
        let mut watch = Watch::new(Some(&experts), Vec::new());
        watch.route(0, &[], &mut Routing { top_k: 1, experts: vec![0], weights: vec![1.0] });
        watch.finish(100_000);
        let recent = &experts.loads().layers[0].recent;
        assert!((recent[0] - 1.0).abs() < 1e-6 && recent[1] < 1e-6, "{recent:?}");
    }
}
