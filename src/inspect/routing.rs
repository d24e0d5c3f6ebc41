//! Which experts the tokens of a text choose.

use upcycle_architectures::decoder::{Decoder, DecoderError, Logits, Probe, Step};
use upcycle_routers::{diagnose::Load, route::Routing};

struct Counter {
    layers: Vec<Load>,
}

impl Probe for Counter {
    fn route(&mut self, layer: usize, _logits: &[f32], routing: &mut Routing) {
        self.layers[layer].add(routing);
    }
}

/// Runs the tokens through a sparse model and counts how often each layer chose each expert: [L] (a dense layer's counts stay zero).
pub fn load(decoder: &Decoder, tokens: &[u32]) -> Result<Vec<Load>, DecoderError> {
    let config = decoder.config();
    let experts = config.moe.as_ref().map_or(0, |moe| moe.experts);
    let mut counter = Counter { layers: vec![Load::new(experts); config.layers] };
    let mut cache = decoder.cache();
    decoder.forward(&mut [Step { tokens, cache: &mut cache, logits: Logits::None }], &mut counter)?;
    Ok(counter.layers)
}
