//! Keys and values of one sequence.

use candle_core::{Result, Tensor};

/// Tokens for which a cache first makes room.
const FIRST: usize = 64;

/// Keys and values of one sequence.
///
/// It holds every token's, also those that have left a sliding window. Room doubles when it runs out, so a token costs no copy of the
/// tokens before it.
#[derive(Debug)]
pub struct Cache {
    len: usize,
    pub(super) layers: Vec<LayerCache>,
}

impl Cache {
    pub(super) fn new(layers: usize) -> Self {
        Self { len: 0, layers: (0..layers).map(|_| LayerCache(None)).collect() }
    }

    /// Tokens held.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether it holds nothing.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Forgets all tokens from position `len` on.
    pub fn truncate(&mut self, len: usize) {
        self.len = self.len.min(len);
    }

    /// Counts tokens whose keys and values every layer has been given.
    pub(super) fn advance(&mut self, tokens: usize) {
        self.len += tokens;
    }
}

/// Keys and values of one layer, each [KV, room, hd]; what lies beyond the cache's length is of no meaning.
#[derive(Debug)]
pub(super) struct LayerCache(Option<(Tensor, Tensor)>);

impl LayerCache {
    /// Writes keys and values [KV, T, hd] at positions `at..at + T`. Returns both from position 0 on, [KV, at + T, hd].
    ///
    /// What gradients flow through is put behind the tokens before it, and not written.
    pub fn write(&mut self, at: usize, k: &Tensor, v: &Tensor) -> Result<(Tensor, Tensor)> {
        let (heads, tokens, head_dim) = k.dims3()?;
        let len = at + tokens;
        if k.track_op() || v.track_op() {
            let behind = |held: Option<&Tensor>, new: &Tensor| match held {
                Some(held) if at > 0 => Tensor::cat(&[&held.narrow(1, 0, at)?, new], 1),
                _ => new.contiguous(),
            };
            let held = self.0.as_ref();
            return Ok((behind(held.map(|held| &held.0), k)?, behind(held.map(|held| &held.1), v)?));
        }
        let room = self.0.as_ref().map_or(Ok(0), |(k, _)| k.dim(1))?;
        let (keys, values) = match self.0.take() {
            Some(both) if len <= room => both,
            old => {
                let shape = (heads, len.max(2 * room).next_multiple_of(FIRST), head_dim);
                let new = (Tensor::zeros(shape, k.dtype(), k.device())?, Tensor::zeros(shape, v.dtype(), v.device())?);
                if let (Some((keys, values)), 1..) = (old, at) {
                    new.0.slice_set(&keys.narrow(1, 0, at)?.contiguous()?, 1, 0)?;
                    new.1.slice_set(&values.narrow(1, 0, at)?.contiguous()?, 1, 0)?;
                }
                new
            }
        };
        keys.slice_set(&k.contiguous()?, 1, at)?;
        values.slice_set(&v.contiguous()?, 1, at)?;
        let seen = (keys.narrow(1, 0, len)?, values.narrow(1, 0, len)?);
        self.0 = Some((keys, values));
        Ok(seen)
    }
}
