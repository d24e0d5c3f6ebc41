//! What is looked at in a pass beside its logits: who is chosen, counted for all rows and recorded for some; the last hidden states of prompts.

use std::ops::Range;

use candle_core::{DType, Result, Tensor};
use upcycle_architectures::decoder::{Probe, Site};
use upcycle_routers::route::Routing;

use super::experts::Experts;

/// The experts chosen for a token and their weights, of each layer that has a router.
pub type Chosen = Vec<Vec<(u32, f32)>>;

/// Looks at one pass.
pub(super) struct Watch<'a> {
    experts: Option<&'a Experts>,
    /// choices, [layer][E]
    counts: Vec<Vec<u64>>,
    /// rows whose choices are recorded
    rows: Vec<usize>,
    /// theirs
    chosen: Vec<Chosen>,
    /// rows whose last hidden states are wanted
    spans: Vec<Range<usize>>,
    /// theirs, of each span [rows][D]
    states: Vec<Vec<Vec<f32>>>,
}

impl<'a> Watch<'a> {
    /// Counts the choices of all rows, records those of `rows`, and keeps the last hidden states of `spans`.
    pub(super) fn new(experts: Option<&'a Experts>, rows: Vec<usize>, spans: Vec<Range<usize>>) -> Self {
        let counts = experts.map_or_else(Vec::new, |experts| vec![vec![0; experts.choice().experts]; experts.choice().layers.len()]);
        Self { experts, counts, chosen: vec![Chosen::new(); rows.len()], rows, spans, states: Vec::new() }
    }

    /// Adds what was counted, over so many tokens, to what was before; returns what was recorded, row by row, and the states, span by span.
    pub(super) fn finish(self, tokens: usize) -> (Vec<Chosen>, Vec<Vec<Vec<f32>>>) {
        if let Some(experts) = self.experts {
            experts.count(tokens, &self.counts);
        }
        (self.chosen, self.states)
    }
}

impl Probe for Watch<'_> {
    fn wants(&self, site: Site) -> bool {
        site == Site::FinalNorm && !self.spans.is_empty()
    }

    fn observe(&mut self, _: Site, _: usize, x: &Tensor) -> Result<()> {
        let rows = |span: &Range<usize>| x.narrow(0, span.start, span.len())?.to_dtype(DType::F32)?.to_vec2();
        self.states = self.spans.iter().map(rows).collect::<Result<_>>()?;
        Ok(())
    }

    fn route(&mut self, layer: usize, _: &[f32], routing: &mut Routing) {
        let Some(layer) = self.experts.and_then(|experts| experts.choice().layers.binary_search(&layer).ok()) else { return };
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
    use upcycle_architectures::decoder::Choice;

    use super::*;

    #[test]
    fn choices_are_counted_and_recorded_but_not_those_without_weight() {
        let experts = Experts::new(Choice { experts: 3, top_k: 2, layers: vec![0, 2], whole: false }, Vec::new());
        let mut watch = Watch::new(Some(&experts), vec![1], Vec::new());
        let routing = Routing { top_k: 2, experts: vec![0, 1, 2, 2], weights: vec![0.75, 0.25, 1.0, 0.0] };
        watch.route(0, &[], &mut routing.clone());
        watch.route(2, &[], &mut Routing { experts: vec![1, 2, 1, 0], weights: vec![0.5; 4], ..routing });
        assert_eq!(watch.finish(2).0, [vec![vec![(2, 1.0)], vec![(1, 0.5), (0, 0.5)]]]);
        let choices: Vec<Vec<u64>> = experts.loads().layers.into_iter().map(|layer| layer.choices).collect();
        assert_eq!(choices, [[1, 1, 1], [1, 2, 1]]);
    }

    #[test]
    fn states_are_kept_of_some_rows() {
        let mut watch = Watch::new(None, Vec::new(), vec![0..1, 2..4]);
        assert!(watch.wants(Site::FinalNorm) && !watch.wants(Site::LayerInput));
        watch.observe(Site::FinalNorm, 2, &Tensor::arange(0f32, 8.0, &candle_core::Device::Cpu).unwrap().reshape((4, 2)).unwrap()).unwrap();
        assert_eq!(watch.finish(4).1, [vec![vec![0.0, 1.0]], vec![vec![4.0, 5.0], vec![6.0, 7.0]]]);
        assert!(!Watch::new(None, Vec::new(), Vec::new()).wants(Site::FinalNorm));
    }
}
