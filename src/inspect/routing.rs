//! Which experts the tokens of a text choose, and what becomes of the text if others choose for them.

use serde::Serialize;
use upcycle_architectures::decoder::{Decoder, DecoderError, Ensemble, LanguageModel as _, Logits, Probe, Step};
use upcycle_routers::{diagnose::Load, route::Routing};

/// Who chooses the experts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Router {
    /// the model's gates
    Gates,
    /// nobody: every token goes to all experts with equal weights
    Uniform,
    /// every token goes to this expert alone
    Only(usize),
}

/// What a layer's gate did with the tokens that it saw.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Choices {
    /// tokens seen; 0 for a dense layer
    pub tokens: u64,
    /// how often each expert was among the chosen
    pub chosen: Load,
    /// how often each expert came first
    pub first: Load,
    /// sum over tokens of the entropy of the softmax over all E logits, in nats
    pub entropy: f64,
}

impl Choices {
    /// None yet, of E experts.
    pub fn new(experts: usize) -> Self {
        Self { tokens: 0, chosen: Load::new(experts), first: Load::new(experts), entropy: 0.0 }
    }

    /// Counts what another saw too.
    pub fn merge(&mut self, other: &Self) {
        self.tokens += other.tokens;
        self.entropy += other.entropy;
        for (ours, theirs) in [(&mut self.chosen, &other.chosen), (&mut self.first, &other.first)] {
            ours.counts.iter_mut().zip(&theirs.counts).for_each(|(a, b)| *a += b);
        }
    }

    /// Share of the tokens that came to this expert first; not a number without tokens.
    pub fn accuracy(&self, expert: usize) -> f64 {
        self.first.counts.get(expert).copied().unwrap_or(0) as f64 / self.tokens as f64
    }
}

/// Steers a forward pass and counts, layer by layer, what the gates chose (before they were overruled).
#[derive(Debug, Clone)]
pub struct Observer {
    router: Router,
    experts: usize,
    /// [L]
    pub layers: Vec<Choices>,
}

impl Observer {
    /// For a model's forward passes.
    pub fn new(decoder: &Decoder, router: Router) -> Self {
        let config = decoder.config();
        let experts = config.moe.as_ref().map_or(0, |moe| moe.experts);
        Self { router, experts, layers: vec![Choices::new(experts); config.layers] }
    }

    /// For an ensemble's forward passes, whose only router is the posterior.
    pub fn of_ensemble(ensemble: &Ensemble) -> Self {
        let experts = ensemble.experts();
        Self { router: Router::Gates, experts, layers: vec![Choices::new(experts)] }
    }
}

impl Probe for Observer {
    fn route(&mut self, layer: usize, logits: &[f32], routing: &mut Routing) {
        let tokens = logits.len() / self.experts.max(1);
        let choices = &mut self.layers[layer];
        choices.tokens += tokens as u64;
        choices.chosen.add(routing);
        for &first in routing.experts.iter().step_by(routing.top_k.max(1)) {
            choices.first.counts[first as usize] += 1;
        }
        choices.entropy += logits.chunks_exact(self.experts).map(entropy).sum::<f64>();
        let experts = self.experts as u32;
        match self.router {
            Router::Gates => {}
            Router::Uniform => {
                let all = (0..tokens).flat_map(|_| 0..experts).collect();
                *routing = Routing { top_k: self.experts, experts: all, weights: vec![1.0 / experts as f32; tokens * self.experts] };
            }
            Router::Only(expert) => *routing = Routing { top_k: 1, experts: vec![expert as u32; tokens], weights: vec![1.0; tokens] },
        }
    }
}

/// Entropy of the softmax of the logits, in nats.
fn entropy(logits: &[f32]) -> f64 {
    let max = logits.iter().copied().fold(f32::MIN, f32::max);
    let exps = logits.iter().map(|v| f64::from(v - max).exp());
    let total: f64 = exps.clone().sum();
    let entropy: f64 = exps.map(|e| e / total).filter(|p| *p > 0.0).map(|p| -p * p.ln()).sum();
    // Logits that are no numbers decide nothing, and must not spoil the sum.
    if entropy.is_finite() { entropy } else { 0.0 }
}

/// Runs the tokens through a sparse model and counts how often each layer chose each expert: [L] (a dense layer's counts stay zero).
pub fn load(decoder: &Decoder, tokens: &[u32]) -> Result<Vec<Load>, DecoderError> {
    let mut observer = Observer::new(decoder, Router::Gates);
    let mut cache = decoder.scratch();
    decoder.forward(&mut [Step { tokens, cache: &mut cache, logits: Logits::None }], &mut observer)?;
    Ok(observer.layers.into_iter().map(|layer| layer.chosen).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entropy_is_that_of_the_softmax() {
        assert!((entropy(&[3.0, 3.0, 3.0, 3.0]) - 4f64.ln()).abs() < 1e-12);
        assert!(entropy(&[100.0, 0.0]) < 1e-12);
        // softmax of (0, ln 3) is (1/4, 3/4)
        let expected = 0.25 * 4f64.ln() + 0.75 * (4f64 / 3.0).ln();
        assert!((entropy(&[0.0, 3f32.ln()]) - expected).abs() < 1e-6);
        assert!(entropy(&[f32::NAN, 0.0]).abs() < f64::EPSILON);
    }
}
