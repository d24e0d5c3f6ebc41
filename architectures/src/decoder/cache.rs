//! Keys and values of one sequence.

use candle_core::{CpuStorage, DType, Device, InplaceOp1, Layout, Result, Tensor};

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
        let (keys, values) = self.reserve(at, (heads, tokens, head_dim), k.dtype(), k.device())?;
        keys.slice_set(&k.contiguous()?, 1, at)?;
        values.slice_set(&v.contiguous()?, 1, at)?;
        Ok((keys.narrow(1, 0, len)?, values.narrow(1, 0, len)?))
    }

    /// Writes keys and values [T, KV, hd] at positions `at..at + T`, for `kv_heads` heads in the CPU's memory.
    pub fn write_rows(&mut self, at: usize, k: &[f32], v: &[f32], [kv_heads, head_dim]: [usize; 2]) -> Result<()> {
        let tokens = k.len() / (kv_heads * head_dim);
        let (keys, values) = self.reserve(at, (kv_heads, tokens, head_dim), DType::F32, &Device::Cpu)?;
        keys.inplace_op1(&Put { rows: k, at })?;
        values.inplace_op1(&Put { rows: v, at })
    }

    /// Keys and values as they lie, [KV, room, hd].
    pub fn held(&self) -> Option<&(Tensor, Tensor)> {
        self.0.as_ref()
    }

    /// Makes room for T more behind the first `at`, which are kept.
    fn reserve(
        &mut self,
        at: usize,
        (heads, tokens, head_dim): (usize, usize, usize),
        dtype: DType,
        device: &Device,
    ) -> Result<&(Tensor, Tensor)> {
        let len = at + tokens;
        let room = self.0.as_ref().map_or(Ok(0), |(k, _)| k.dim(1))?;
        let both = match self.0.take() {
            Some(both) if len <= room => both,
            old => {
                let shape = (heads, len.max(2 * room).next_multiple_of(FIRST), head_dim);
                let new = (Tensor::zeros(shape, dtype, device)?, Tensor::zeros(shape, dtype, device)?);
                if let (Some((keys, values)), 1..) = (old, at) {
                    new.0.slice_set(&keys.narrow(1, 0, at)?.contiguous()?, 1, 0)?;
                    new.1.slice_set(&values.narrow(1, 0, at)?.contiguous()?, 1, 0)?;
                }
                new
            }
        };
        Ok(self.0.insert(both))
    }
}

/// Rows [T, KV, hd] into [KV, room, hd] from position `at` on.
struct Put<'a> {
    rows: &'a [f32],
    at: usize,
}

impl InplaceOp1 for Put<'_> {
    fn name(&self) -> &'static str {
        "put-rows"
    }

    fn cpu_fwd(&self, storage: &mut CpuStorage, layout: &Layout) -> Result<()> {
        let (CpuStorage::F32(held), &[heads, room, head_dim], 0) = (storage, layout.dims(), layout.start_offset()) else {
            candle_core::bail!("a cache is f32 [KV, room, hd]")
        };
        for (token, row) in self.rows.chunks_exact(heads * head_dim).enumerate() {
            for (head, row) in row.chunks_exact(head_dim).enumerate() {
                held[(head * room + self.at + token) * head_dim..][..head_dim].copy_from_slice(row);
            }
        }
        Ok(())
    }
}
