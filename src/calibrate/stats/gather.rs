//! Text through a composite, one expert forced, for what its routers see.

use bytes::Bytes;
use candle_core::{DType, Device, Result as TensorResult, Tensor};
use half::f16;
use upcycle_architectures::decoder::{Decoder, LanguageModel as _, Logits, Probe, Site, Step};
use upcycle_routers::{route, statistics::hash};

use super::{Domain, ExpertId, Part, StatsError};
use crate::calibrate::{FOLDS, text::Sequence};

/// Tokens of one forward pass, unless a single sequence has more.
const BATCH: usize = 2048;

/// Runs text of an expert through the composite, with that number of expert forced if there is one, else as its gates have it, and keeps what
/// the routers see in at most about `keep` of the tokens that count, in every sparse layer. At no time more than a batch's activations are held beside the sample. `progress` is told the
/// tokens done.
pub fn gather(
    decoder: &Decoder,
    (expert, forced): (ExpertId, Option<usize>),
    sequences: &[Sequence],
    keep: usize,
    progress: &dyn Fn(usize),
) -> Result<Domain, StatsError> {
    let config = decoder.config();
    let layers: Vec<usize> = config.moe.iter().flat_map(|moe| (0..config.layers).filter(|&l| moe.sparse[l])).collect();
    let mut folds = Vec::new();
    let mut done = 0;
    for fold in 0..FOLDS {
        let of_fold: Vec<&Sequence> =
            sequences.iter().enumerate().filter(|(i, _)| i * FOLDS / sequences.len() == fold).map(|(_, sequence)| sequence).collect();
        let seen = of_fold.iter().map(|sequence| sequence.counted() as u64).sum();
        let largest = largest_key(seen, keep.div_ceil(FOLDS));
        let mut part = Part { seen, ..Part::default() };
        let (mut rows, mut number) = (Vec::new(), 0);
        let mut rest = &of_fold[..];
        while let Some(first) = rest.first() {
            let (mut count, mut total) = (1, first.tokens.len());
            while let Some(next) = rest.get(count).filter(|next| total + next.tokens.len() <= BATCH) {
                (count, total) = (count + 1, total + next.tokens.len());
            }
            let (batch, others) = rest.split_at(count);
            rest = others;
            // Rows of the batch that are kept.
            let mut kept = Vec::new();
            for (at, _) in (0u32..).zip(batch.iter().flat_map(|sequence| &sequence.counts)).filter(|(_, counts)| **counts) {
                let key = hash(number);
                number += 1;
                if largest.is_some_and(|largest| key <= largest) {
                    part.keys.push(key);
                    kept.push(at);
                }
            }
            rows.extend(states(decoder, forced, batch, &kept, &layers)?);
            done += total;
            progress(done);
        }
        part.rows = Bytes::from(rows);
        folds.push(part);
    }
    Ok(Domain { expert, folds })
}

/// Of that many tokens, the largest key of those that are kept; `None` if none is.
fn largest_key(seen: u64, keep: usize) -> Option<u64> {
    let mut keys: Vec<u64> = (0..seen).map(hash).collect();
    let last = keep.min(keys.len()).checked_sub(1)?;
    Some(*keys.select_nth_unstable(last).1)
}

/// The router inputs of the batch's rows `kept`, [n, L, D] f16.
fn states(decoder: &Decoder, forced: Option<usize>, batch: &[&Sequence], kept: &[u32], layers: &[usize]) -> Result<Vec<u8>, StatsError> {
    let Some(&last) = layers.last().filter(|_| !kept.is_empty()) else { return Ok(Vec::new()) };
    let mut guide = Guide {
        forced,
        kept: Tensor::new(kept, &Device::Cpu).map_err(upcycle_architectures::decoder::DecoderError::from)?,
        last,
        seen: Vec::new(),
    };
    let mut caches: Vec<_> = batch.iter().map(|_| decoder.scratch()).collect();
    let mut steps: Vec<Step<'_>> =
        batch.iter().zip(&mut caches).map(|(sequence, cache)| Step { tokens: &sequence.tokens, cache, logits: Logits::None }).collect();
    decoder.forward(&mut steps, &mut guide)?;
    let (width, mut rows) = (decoder.config().hidden, Vec::new());
    let seen: Vec<&Vec<f16>> = guide.seen.iter().filter(|(layer, _)| layers.contains(layer)).map(|(_, values)| values).collect();
    for token in 0..kept.len() {
        for (values, &layer) in seen.iter().zip(layers) {
            let values = &values[token * width..(token + 1) * width];
            if !values.iter().all(|value| value.is_finite()) {
                return Err(StatsError::NotFinite { layer });
            }
            values.iter().for_each(|value| rows.extend_from_slice(&value.to_le_bytes()));
        }
    }
    Ok(rows)
}

/// Notes what the routers see, and may send all tokens to one expert.
struct Guide {
    forced: Option<usize>,
    /// `[n]`
    kept: Tensor,
    /// the last layer that is of interest
    last: usize,
    /// layer and values [n, D]
    seen: Vec<(usize, Vec<f16>)>,
}

impl Probe for Guide {
    fn wants(&self, site: Site) -> bool {
        site == Site::RouterInput
    }

    fn observe(&mut self, _: Site, layer: usize, x: &Tensor) -> TensorResult<()> {
        let rows = x.index_select(&self.kept.to_device(x.device())?, 0)?;
        self.seen.push((layer, rows.to_dtype(DType::F16)?.flatten_all()?.to_vec1()?));
        Ok(())
    }

    fn route(&mut self, _: usize, _: &[f32], routing: &mut route::Routing) {
        let Some(expert) = self.forced else { return };
        let tokens = routing.experts.len() / routing.top_k.max(1);
        *routing = route::Routing { top_k: 1, experts: vec![expert as u32; tokens], weights: vec![1.0; tokens] };
    }

    fn go_on(&self, layer: usize) -> bool {
        layer < self.last
    }
}
