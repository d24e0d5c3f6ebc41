//! Grouped-query attention with a causal mask, a sliding window where the layer has one, and a cache per sequence.
//!
//! N rows of all sequences, T new tokens of one of them, S tokens that they can see; H heads over KV key/value heads, G = H / KV, hd head size.

use candle_core::{D, DType, Device, Result, Tensor};

use super::{
    Step,
    matrix::{Linear, Values},
    norm::Norm,
    rope::Table,
    train,
};
use crate::kernels::{
    attention::{Heads, Sequence, attend},
    parallel_pieces,
    product::{self, Job, Operation, Rows},
};

/// Queries that attend at a time: bounds the scores to H * QUERIES * S, and a block sees no keys behind its last query.
const QUERIES: usize = 256;

/// Tokens that are normed and rotated in one task.
const TOKENS: usize = 16;

#[derive(Debug, Clone)]
pub(super) struct Attention {
    pub q: Linear,
    pub k: Linear,
    pub v: Linear,
    pub o: Linear,
    /// norms over each head of q and k
    pub qk_norm: Option<(Norm, Norm)>,
    pub heads: usize,
    pub kv_heads: usize,
    pub head_dim: usize,
    pub window: Option<usize>,
}

impl Attention {
    /// x [N, D], the rows of `steps` end to end -> what the output projection sees [N, H hd]. Writes the new keys and values of `layer`.
    pub fn forward(&self, x: &Tensor, rope: &Table, layer: usize, steps: &mut [Step<'_>]) -> Result<Tensor> {
        if !x.track_op()
            && let Some(mixed) = self.forward_direct(x, rope, layer, steps)?
        {
            return Ok(mixed);
        }
        let (n, _) = x.dims2()?;
        let (q_norm, k_norm) = self.qk_norm.as_ref().map(|(q, k)| (q, k)).unzip();
        let rotated = |linear: &Linear, norm: Option<&Norm>, heads| {
            let y = linear.forward(x)?.reshape((n, heads, self.head_dim))?; // [N, heads, hd]
            rope.rotate(&norm.map_or(Ok(y.clone()), |norm| norm.forward(&y))?)
        };
        let scale = (self.head_dim as f64).powf(-0.5);
        let q = (rotated(&self.q, q_norm, self.heads)? * scale)?.to_dtype(x.dtype())?; // [N, H, hd]
        let k = rotated(&self.k, k_norm, self.kv_heads)?.to_dtype(x.dtype())?; // [N, KV, hd]
        let v = self.v.forward(x)?.reshape((n, self.kv_heads, self.head_dim))?; // [N, KV, hd]
        let mut start = 0;
        let mut outputs = Vec::with_capacity(steps.len());
        for step in steps.iter_mut().filter(|step| !step.tokens.is_empty()) {
            let tokens = step.tokens.len();
            let own = |all: &Tensor| all.narrow(0, start, tokens)?.transpose(0, 1); // [heads, T, hd]
            let first = step.cache.len();
            let (keys, values) = step.cache.write(layer, &own(&k)?, &own(&v)?)?; // [KV, S, hd]
            outputs.push(self.attend(&own(&q)?, &keys, &values, first)?);
            start += tokens;
        }
        Tensor::cat(&outputs, 0)
    }

    /// As [`Attention::forward`], with the CPU's kernels; `None` where candle computes.
    fn forward_direct(&self, x: &Tensor, rope: &Table, layer: usize, steps: &mut [Step<'_>]) -> Result<Option<Tensor>> {
        let (Some(q), Some(k), Some(v)) = (self.q.direct()?, self.k.direct()?, self.v.direct()?) else { return Ok(None) };
        let Self { heads, kv_heads, head_dim, .. } = *self;
        let norms = match &self.qk_norm {
            Some((q, k)) if q.weight.track_op() || k.weight.track_op() => return Ok(None),
            Some((q, k)) => [Some((q.weight.to_vec1::<f32>()?, q.eps)), Some((k.weight.to_vec1()?, k.eps))],
            None => [None, None],
        };
        let n = x.dim(0)?;
        let x = x.contiguous()?;
        let x = Values::of(&x)?;
        let mut rows = [heads, kv_heads, kv_heads].map(|heads| vec![0f32; n * heads * head_dim]);
        let mut jobs = Vec::with_capacity(3);
        for (linear, y) in [&q, &k, &v].into_iter().zip(&mut rows) {
            let (weights, bias) = linear.operand();
            jobs.push(Job { operation: Operation::Linear(weights, bias), x: x.slice()?, rows: Rows::All, y });
        }
        product::run(q.kernels, jobs);

        let ([cos, sin], half) = rope.values()?;
        let (cos, sin) = (cos.slice()?, sin.slice()?);
        let scales = [(head_dim as f32).powf(-0.5), 1.0];
        for (((rows, heads), norm), scale) in rows.iter_mut().zip([heads, kv_heads]).zip(&norms).zip(scales) {
            parallel_pieces(rows, TOKENS * heads * head_dim, |piece, rows| {
                for (token, row) in (piece * TOKENS..).zip(rows.chunks_exact_mut(heads * head_dim)) {
                    let angles = token * half..(token + 1) * half;
                    for head in row.chunks_exact_mut(head_dim) {
                        if let Some((weight, eps)) = norm {
                            normalise(head, weight, *eps);
                        }
                        rotate(head, &cos[angles.clone()], &sin[angles.clone()]);
                        head.iter_mut().for_each(|x| *x *= scale);
                    }
                }
            });
        }

        let [q_rows, k_rows, v_rows] = rows;
        let row = kv_heads * head_dim;
        let mut start = 0;
        for step in steps.iter_mut().filter(|step| !step.tokens.is_empty()) {
            let own = start * row..(start + step.tokens.len()) * row;
            step.cache.write_rows(layer, &k_rows[own.clone()], &v_rows[own]);
            start += step.tokens.len();
        }
        let mut sequences = Vec::with_capacity(steps.len());
        for step in steps.iter().filter(|step| !step.tokens.is_empty()) {
            let Some((kv_type, blocks)) = step.cache.blocks(layer) else { candle_core::bail!("the CPU's kernels want a cache in blocks") };
            sequences.push(Sequence { tokens: step.tokens.len(), first: step.cache.len(), kv_type, blocks });
        }
        let mut mixed = vec![0f32; q_rows.len()];
        attend(q.kernels, Heads { heads, kv_heads, head_dim, window: self.window }, &q_rows, &sequences, &mut mixed);
        Ok(Some(Tensor::from_vec(mixed, (n, heads * head_dim), &Device::Cpu)?))
    }

    /// What tokens that attend to nothing get, for x [N, D]: zeros [N, H hd].
    pub fn nothing(&self, x: &Tensor) -> Result<Tensor> {
        Tensor::zeros((x.dim(0)?, self.heads * self.head_dim), x.dtype(), x.device())
    }

    /// q [H, T, hd] at positions `first..`, keys and values [KV, S, hd] at positions `0..` -> [T, H hd]
    fn attend(&self, q: &Tensor, keys: &Tensor, values: &Tensor, first: usize) -> Result<Tensor> {
        let (kv, hd, group) = (self.kv_heads, self.head_dim, self.heads / self.kv_heads);
        let tokens = q.dim(1)?;
        let mut blocks = Vec::with_capacity(tokens.div_ceil(QUERIES));
        for start in (0..tokens).step_by(QUERIES) {
            let t = QUERIES.min(tokens - start);
            let position = first + start;
            // What the block's first query no longer sees, none of its queries does.
            let low = self.window.map_or(0, |window| (position + 1).saturating_sub(window));
            let seen = position + t - low;
            // The queries of a group share their keys: together they are the rows of one product, and no key is repeated.
            let q = q.narrow(1, start, t)?.contiguous()?.reshape((kv, group * t, hd))?;
            let scores = q.matmul(&keys.narrow(1, low, seen)?.t()?)?.to_dtype(DType::F32)?; // [KV, G T, S]
            let scores = if t == 1 {
                scores
            } else {
                let mask = self.mask(position, t, low, q.device())?; // [T, S]
                scores.reshape((kv, group, t, seen))?.broadcast_add(&mask)?.reshape((kv, group * t, seen))?
            };
            let weights = if scores.track_op() { train::softmax(&scores) } else { candle_nn::ops::softmax_last_dim(&scores) };
            let weights = weights?.to_dtype(q.dtype())?;
            let mixed = weights.matmul(&values.narrow(1, low, seen)?)?; // [KV, G T, hd]
            blocks.push(mixed.reshape((self.heads, t, hd))?.transpose(0, 1)?); // [T, H, hd]
        }
        Tensor::cat(&blocks, 0)?.flatten(D::Minus2, D::Minus1)
    }

    /// 0 where query i, at `position + i`, sees the key at `low + j`, and minus infinity elsewhere; [T, S]
    fn mask(&self, position: usize, t: usize, low: usize, device: &Device) -> Result<Tensor> {
        let seen = position + t - low;
        let sees = |query: usize, key: usize| key <= query && self.window.is_none_or(|window| query - key < window);
        let value = |query, key| if sees(query, key) { 0.0 } else { f32::NEG_INFINITY };
        let mask: Vec<f32> = (position..position + t).flat_map(|query| (low..low + seen).map(move |key| value(query, key))).collect();
        Tensor::from_vec(mask, (t, seen), device)
    }
}

/// x / rms(x) * weight
fn normalise(x: &mut [f32], weight: &[f32], eps: f64) {
    let squares: f32 = x.iter().map(|x| x * x).sum();
    let scale = 1.0 / (squares / x.len() as f32 + eps as f32).sqrt();
    x.iter_mut().zip(weight).for_each(|(x, weight)| *x *= scale * weight);
}

/// Dimension i turns with dimension i + R / 2, for R / 2 angles; the rest of the head stays.
fn rotate(head: &mut [f32], cos: &[f32], sin: &[f32]) {
    let (first, rest) = head.split_at_mut(cos.len());
    for (((a, b), cos), sin) in first.iter_mut().zip(rest).zip(cos).zip(sin) {
        (*a, *b) = (*a * cos - *b * sin, *a * sin + *b * cos);
    }
}
