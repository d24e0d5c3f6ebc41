//! Which experts the tokens of a text choose.

use upcycle_architectures::decoder::{Decoder, DecoderError, Logits, Probe, Step};
use upcycle_routers::route::Routing;

/// Share of the routing weight that each expert gets: [L][E], each layer's shares summing to one (dense layers are empty).
#[derive(Debug, Clone, PartialEq)]
pub struct Load {
    /// [layer][expert]
    pub layers: Vec<Vec<f64>>,
    /// tokens looked at
    pub tokens: usize,
}

impl Load {
    /// The mean over the sparse layers, [E].
    pub fn mean(&self) -> Vec<f64> {
        let sparse: Vec<&Vec<f64>> = self.layers.iter().filter(|layer| !layer.is_empty()).collect();
        let experts = sparse.first().map_or(0, |layer| layer.len());
        (0..experts).map(|e| sparse.iter().map(|layer| layer[e]).sum::<f64>() / sparse.len() as f64).collect()
    }
}

struct Counter {
    layers: Vec<Vec<f64>>,
}

impl Probe for Counter {
    fn route(&mut self, layer: usize, logits: &[f32], routing: &mut Routing) {
        let tokens = routing.experts.len() / routing.top_k.max(1);
        let experts = logits.len() / tokens.max(1);
        let sums = &mut self.layers[layer];
        sums.resize(experts, 0.0);
        for (&expert, &weight) in routing.experts.iter().zip(&routing.weights) {
            sums[expert as usize] += f64::from(weight);
        }
    }
}

/// Runs the tokens through a sparse model and adds up the weights with which each expert was chosen.
pub fn load(decoder: &Decoder, tokens: &[u32]) -> Result<Load, DecoderError> {
    let mut counter = Counter { layers: vec![Vec::new(); decoder.config().layers] };
    let mut cache = decoder.cache();
    decoder.forward(&mut [Step { tokens, cache: &mut cache, logits: Logits::None }], &mut counter)?;
    for layer in &mut counter.layers {
        let total: f64 = layer.iter().sum();
        layer.iter_mut().for_each(|sum| *sum /= total.max(f64::MIN_POSITIVE));
    }
    Ok(Load { layers: counter.layers, tokens: tokens.len() })
}
