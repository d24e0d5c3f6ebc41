//! How fast a decoder reads prompts and writes tokens, and what of the machine it uses.
//!
//! Tokens are made up, not sampled: this times forward passes alone.

use std::time::Instant;

use upcycle_architectures::{
    Config, Dtype, Family, LayerRole, Role, Weights,
    decoder::{Cache, Decoder, DecoderError, Logits, NoProbe, Step},
};

/// What is timed.
#[derive(Debug, Clone)]
pub struct Load {
    /// tokens of the prompt that is read in one pass
    pub prompt: usize,
    /// tokens that each sequence writes
    pub tokens: usize,
    /// sequences that write together
    pub parallel: usize,
    /// how often; medians are reported
    pub repeat: usize,
}

/// Medians over the repeats.
#[derive(Debug, Clone, Copy)]
pub struct Speed {
    /// tokens per second of a prompt
    pub prefill: f64,
    /// tokens per second of all sequences together
    pub decode: f64,
}

/// Bytes of weights.
#[derive(Debug, Clone, Copy)]
pub struct Bytes {
    /// of all tensors
    pub total: usize,
    /// read for one token of one sequence: of experts the K chosen, of the embedding nothing that counts
    pub token: usize,
    /// multiplications with one token's activations in a prompt: parameters of what is read, but for the head
    pub products: usize,
}

/// What a model's weights weigh, from headers alone.
pub fn bytes(family: &Family, config: &Config, weights: &dyn Weights) -> Bytes {
    let mut bytes = Bytes { total: 0, token: 0, products: 0 };
    let (mut token, mut products) = (0.0, 0.0);
    for (role, shape) in family.tensors(config) {
        let elements: usize = shape.iter().product();
        // A fused tensor has other names; its parts are of the model's own type.
        let dtype = family.name(role).and_then(|name| weights.info(&name)).map(|info| info.dtype).or(config.dtype);
        let size = dtype.unwrap_or(Dtype::Bf16).bytes(elements);
        let share = match (role, &config.moe) {
            (Role::Layer(_, LayerRole::Expert(..)), Some(moe)) => moe.top_k as f64 / moe.experts as f64,
            (Role::Embedding, _) if !config.tied => 0.0,
            _ => 1.0,
        };
        bytes.total += size;
        token += size as f64 * share;
        if !matches!(role, Role::Embedding | Role::Head) {
            products += elements as f64 * share;
        }
    }
    (bytes.token, bytes.products) = (token as usize, products as usize);
    bytes
}

/// Times a decoder; one pass of each kind is not counted.
pub fn speed(decoder: &Decoder, load: &Load) -> Result<Speed, DecoderError> {
    let (mut prefill, mut decode) = (Vec::new(), Vec::new());
    for round in 0..=load.repeat.max(1) {
        let counts = round > 0;
        let prompt = made_up(decoder, load.prompt.max(1), round);
        let seconds = timed(|| pass(decoder, &mut [decoder.cache()], &prompt).map(drop))?;
        if counts {
            prefill.push(prompt.len() as f64 / seconds);
        }
        let mut caches: Vec<Cache> = (0..load.parallel.max(1)).map(|_| decoder.cache()).collect();
        let first = made_up(decoder, caches.len(), round);
        pass(decoder, &mut caches, &first)?;
        let tokens = if counts { load.tokens.max(1) } else { 1 };
        let seconds = timed(|| (0..tokens).try_for_each(|step| pass(decoder, &mut caches, &made_up(decoder, first.len(), step))))?;
        if counts {
            decode.push((tokens * caches.len()) as f64 / seconds);
        }
    }
    Ok(Speed { prefill: median(prefill), decode: median(decode) })
}

/// One pass over as many tokens as there are caches, one each; or over all of them with the only cache.
fn pass(decoder: &Decoder, caches: &mut [Cache], tokens: &[u32]) -> Result<(), DecoderError> {
    let length = tokens.len() / caches.len();
    let steps = caches.iter_mut().zip(tokens.chunks(length)).map(|(cache, tokens)| Step { tokens, cache, logits: Logits::Last });
    decoder.forward(&mut steps.collect::<Vec<_>>(), &mut NoProbe).map(drop)
}

fn made_up(decoder: &Decoder, tokens: usize, seed: usize) -> Vec<u32> {
    (0..tokens).map(|i| ((i * 7919 + seed * 104_729 + 13) % decoder.config().vocab) as u32).collect()
}

fn timed(run: impl FnOnce() -> Result<(), DecoderError>) -> Result<f64, DecoderError> {
    let start = Instant::now();
    run()?;
    Ok(start.elapsed().as_secs_f64())
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

#[cfg(test)]
mod tests {
    use serde_json::json;
    use upcycle_architectures::{TensorInfo, View, WeightsError, detect};

    use super::*;

    struct NoHeaders;

    impl Weights for NoHeaders {
        fn names(&self) -> Vec<String> {
            Vec::new()
        }

        fn info(&self, _: &str) -> Option<TensorInfo> {
            None
        }

        fn read(&self, name: &str) -> Result<View, WeightsError> {
            Err(WeightsError::Missing { tensor: name.to_owned() })
        }
    }

    #[test]
    fn a_token_reads_what_it_needs() {
        let (family, config) = detect(&json!({
            "model_type": "mixtral", "hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
            "num_key_value_heads": 1, "vocab_size": 100, "num_local_experts": 4, "num_experts_per_tok": 2, "torch_dtype": "bfloat16",
        }))
        .unwrap();
        let bytes = bytes(family, &config, &NoHeaders);
        let (attention, gate, experts, norms) = (8 * 8 * 2 + 8 * 4 * 2, 4 * 8, 3 * 8 * 16, 3 * 8);
        assert_eq!(bytes.total, 2 * (attention + gate + 4 * experts + norms + 2 * 800));
        assert_eq!(bytes.token, 2 * (attention + gate + 2 * experts + norms + 800));
        assert_eq!(bytes.products, attention + gate + 2 * experts + norms);
    }
}
