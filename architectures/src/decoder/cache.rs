//! Keys and values of one sequence.
//!
//! In the CPU's memory they lie in blocks of [`BLOCK`] positions, which sequences that begin alike share: who writes into a block that others
//! hold too gets a copy of it. What blocks hold is of a [`KvType`]. On devices, and wherever candle holds the weights, a layer's keys are one tensor
//! of the type of the activations, and a fork copies it. L layers, KV key/value heads of hd, T new tokens.

use std::sync::{
    Arc,
    atomic::{AtomicUsize, Ordering},
};

use candle_core::{DType, Device, Result, Tensor};
use upcycle_routers::route::Steering;

use super::DecoderError;
use crate::{
    config::Config,
    kernels::attention::{BLOCK, KvType},
};

/// Tokens for which tensors first make room.
const FIRST: usize = 64;

/// What is the same for all caches of a model.
#[derive(Debug, Clone)]
pub(super) struct Caches {
    layers: usize,
    /// whether only the layer's keys and values are held that a pass is at, and none when it is over
    scratch: bool,
    kv_heads: usize,
    head_dim: usize,
    /// of blocks; `None`: tensors
    kv_type: Option<KvType>,
    /// bytes that they hold
    held: Arc<AtomicUsize>,
}

impl Caches {
    pub fn new(config: &Config, layers: usize, kv_type: Option<KvType>) -> Self {
        Self { layers, scratch: false, kv_heads: config.kv_heads, head_dim: config.head_dim, kv_type, held: Arc::default() }
    }

    /// The same with blocks of another type, where there are blocks.
    pub fn of_type(&self, kv_type: KvType) -> std::result::Result<Self, DecoderError> {
        if self.kv_type.is_some() && !kv_type.fits(self.head_dim) {
            return Err(DecoderError::KvType { head_dim: self.head_dim });
        }
        Ok(Self { kv_type: self.kv_type.map(|_| kv_type), held: Arc::default(), ..*self })
    }

    /// The same for caches that remember nothing when a pass is over: each layer's keys and values take the place of those of the one before.
    pub fn scratch(&self) -> Self {
        Self { scratch: true, ..self.clone() }
    }

    /// Layers that have a place.
    fn places(&self) -> usize {
        if self.scratch { 1 } else { self.layers }
    }

    fn place(&self, layer: usize) -> usize {
        if self.scratch { 0 } else { layer }
    }

    pub fn held(&self) -> usize {
        self.held.load(Ordering::Relaxed)
    }

    /// Bytes of the keys of one head in a block.
    fn part(&self, kv_type: KvType) -> usize {
        BLOCK * kv_type.row_bytes(self.head_dim)
    }

    /// Bytes of a block, [L, 2, KV, `BLOCK`, row]: of each layer that has a place the keys and the values.
    fn block(&self, kv_type: KvType) -> usize {
        self.places() * 2 * self.kv_heads * self.part(kv_type)
    }
}

/// Bytes counted as held as long as it lives.
#[derive(Debug)]
struct Charge {
    bytes: usize,
    held: Arc<AtomicUsize>,
}

impl Charge {
    fn new(bytes: usize, held: &Arc<AtomicUsize>) -> Self {
        held.fetch_add(bytes, Ordering::Relaxed);
        Self { bytes, held: held.clone() }
    }
}

impl Clone for Charge {
    fn clone(&self) -> Self {
        Self::new(self.bytes, &self.held)
    }
}

impl Drop for Charge {
    fn drop(&mut self) {
        self.held.fetch_sub(self.bytes, Ordering::Relaxed);
    }
}

/// Keys and values of [`BLOCK`] positions.
#[derive(Debug, Clone)]
struct Block {
    data: Vec<u8>,
    #[expect(dead_code, reason = "counts the bytes by being held")]
    charge: Charge,
}

/// Keys and values of one sequence.
///
/// It holds every token's, also those that have left a sliding window, as they came out under one steering.
#[derive(Debug)]
pub struct Cache {
    len: usize,
    caches: Caches,
    held: Held,
    steering: Option<Arc<Steering>>,
}

#[derive(Debug)]
enum Held {
    Blocks(KvType, Vec<Arc<Block>>),
    Tensors(Vec<LayerCache>),
}

impl Cache {
    pub(super) fn new(caches: &Caches) -> Self {
        Self::steered(caches, None)
    }

    pub(super) fn steered(caches: &Caches, steering: Option<Arc<Steering>>) -> Self {
        let held = match caches.kv_type {
            Some(kv_type) => Held::Blocks(kv_type, Vec::new()),
            None => Held::Tensors((0..caches.places()).map(|_| LayerCache(None)).collect()),
        };
        Self { len: 0, caches: caches.clone(), held, steering }
    }

    /// Tokens held.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether it holds nothing.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// How the experts of its tokens are chosen, if not by the routers alone.
    pub fn steering(&self) -> Option<&Arc<Steering>> {
        self.steering.as_ref()
    }

    /// Forgets all tokens from position `len` on, and frees the blocks that held nothing else.
    pub fn truncate(&mut self, len: usize) {
        self.len = self.len.min(len);
        if let Held::Blocks(_, blocks) = &mut self.held {
            blocks.truncate(self.len.div_ceil(BLOCK));
        }
    }

    /// Another cache of the first `len` tokens, which shares its blocks with this one until either writes.
    pub fn fork(&self, len: usize) -> Result<Self> {
        let len = len.min(self.len);
        let held = match &self.held {
            Held::Blocks(kv_type, blocks) => Held::Blocks(*kv_type, blocks[..len.div_ceil(BLOCK)].to_vec()),
            Held::Tensors(layers) => Held::Tensors(layers.iter().map(|layer| layer.copy(len, &self.caches)).collect::<Result<_>>()?),
        };
        Ok(Self { len, caches: self.caches.clone(), held, steering: self.steering.clone() })
    }

    /// Bytes that so many tokens more would take.
    pub fn growth(&self, tokens: usize) -> usize {
        let len = self.len + tokens;
        match &self.held {
            Held::Blocks(kv_type, blocks) => {
                let new = len.div_ceil(BLOCK).saturating_sub(blocks.len());
                let written = self.len / BLOCK..len.div_ceil(BLOCK).min(blocks.len());
                let copied = blocks.get(written).map_or(0, |blocks| blocks.iter().filter(|block| Arc::strong_count(block) > 1).count());
                (new + copied) * self.caches.block(*kv_type)
            }
            Held::Tensors(layers) => layers.iter().map(|layer| layer.growth(len, &self.caches)).sum(),
        }
    }

    /// Whether it can hold what a model with these caches remembers.
    pub(super) fn fits(&self, caches: &Caches) -> bool {
        (self.caches.kv_heads, self.caches.head_dim, self.caches.kv_type.is_some())
            == (caches.kv_heads, caches.head_dim, caches.kv_type.is_some())
    }

    pub(super) fn layers(&self) -> usize {
        self.caches.layers
    }

    /// Counts tokens whose keys and values every layer has been given.
    pub(super) fn advance(&mut self, tokens: usize) {
        if !self.caches.scratch {
            self.len += tokens;
        }
    }

    /// Writes a layer's keys and values [KV, T, hd] behind the tokens held. Returns both from position 0 on, [KV, len + T, hd].
    ///
    /// What gradients flow through is put behind the tokens before it, and not written.
    pub(super) fn write(&mut self, layer: usize, k: &Tensor, v: &Tensor) -> Result<(Tensor, Tensor)> {
        let (at, tracked, place) = (self.len, k.track_op() || v.track_op(), self.caches.place(layer));
        let held = match &mut self.held {
            Held::Tensors(layers) if tracked => layers[place].held(at)?,
            Held::Tensors(layers) => return layers[place].write(at, k, v, &self.caches),
            Held::Blocks(..) if tracked => (at > 0).then(|| self.read(layer, at)).transpose()?,
            Held::Blocks(..) => {
                let rows = |x: &Tensor| x.transpose(0, 1)?.flatten_all()?.to_vec1::<f32>();
                self.write_rows(layer, &rows(k)?, &rows(v)?);
                return self.read(layer, at + k.dim(1)?);
            }
        };
        match held {
            Some((keys, values)) => Ok((Tensor::cat(&[&keys, k], 1)?, Tensor::cat(&[&values, v], 1)?)),
            None => Ok((k.contiguous()?, v.contiguous()?)),
        }
    }

    /// Writes a layer's keys and values [T, KV, hd] behind the tokens held, where there are blocks.
    pub(super) fn write_rows(&mut self, layer: usize, k: &[f32], v: &[f32]) {
        let Held::Blocks(kv_type, blocks) = &mut self.held else { return };
        let Caches { kv_heads, head_dim, .. } = self.caches;
        let (part, row, place) = (self.caches.part(*kv_type), kv_type.row_bytes(head_dim), self.caches.place(layer));
        for (part_of_layer, rows) in [k, v].into_iter().enumerate() {
            for (position, heads) in (self.len..).zip(rows.chunks_exact(kv_heads * head_dim)) {
                if position / BLOCK == blocks.len() {
                    let bytes = self.caches.block(*kv_type);
                    blocks.push(Arc::new(Block { data: vec![0; bytes], charge: Charge::new(bytes, &self.caches.held) }));
                }
                let data = &mut Arc::make_mut(&mut blocks[position / BLOCK]).data;
                for (head, x) in heads.chunks_exact(head_dim).enumerate() {
                    let start = ((place * 2 + part_of_layer) * kv_heads + head) * part + position % BLOCK * row;
                    kv_type.store(x, &mut data[start..start + row]);
                }
            }
        }
    }

    /// A layer's part of each block, [2, KV, `BLOCK`, row], and the type of what they hold; `None` where there are no blocks.
    pub(super) fn blocks(&self, layer: usize) -> Option<(KvType, Vec<&[u8]>)> {
        let Held::Blocks(kv_type, blocks) = &self.held else { return None };
        let (bytes, place) = (2 * self.caches.kv_heads * self.caches.part(*kv_type), self.caches.place(layer));
        Some((*kv_type, blocks.iter().map(|block| &block.data[place * bytes..(place + 1) * bytes]).collect()))
    }

    /// A layer's keys and values of the first `len` positions, [KV, len, hd], out of blocks.
    fn read(&self, layer: usize, len: usize) -> Result<(Tensor, Tensor)> {
        let Caches { kv_heads, head_dim, .. } = self.caches;
        let Some((kv_type, blocks)) = self.blocks(layer) else { candle_core::bail!("there are no blocks") };
        let (part, row) = (self.caches.part(kv_type), kv_type.row_bytes(head_dim));
        let mut both = [vec![0f32; kv_heads * len * head_dim], vec![0f32; kv_heads * len * head_dim]];
        for (part_of_layer, all) in both.iter_mut().enumerate() {
            for (i, x) in all.chunks_exact_mut(head_dim).enumerate() {
                let (head, position) = (i / len, i % len);
                let start = (part_of_layer * kv_heads + head) * part + position % BLOCK * row;
                kv_type.load(&blocks[position / BLOCK][start..start + row], x);
            }
        }
        let [keys, values] = both.map(|all| Tensor::from_vec(all, (kv_heads, len, head_dim), &Device::Cpu));
        Ok((keys?, values?))
    }
}

/// Keys and values of one layer, each [KV, room, hd]; what lies beyond the cache's length is of no meaning. Room doubles when it runs out, so
/// a token costs no copy of the tokens before it.
#[derive(Debug)]
struct LayerCache(Option<Tensors>);

#[derive(Debug)]
struct Tensors {
    keys: Tensor,
    values: Tensor,
    #[expect(dead_code, reason = "counts the bytes by being held")]
    charge: Charge,
}

impl LayerCache {
    /// Writes keys and values [KV, T, hd] at positions `at..at + T`. Returns both from position 0 on.
    fn write(&mut self, at: usize, k: &Tensor, v: &Tensor, caches: &Caches) -> Result<(Tensor, Tensor)> {
        let len = at + k.dim(1)?;
        let held = match self.0.take() {
            Some(held) if len <= held.keys.dim(1)? => held,
            old => {
                let room = room(len, old.as_ref().map_or(0, |old| old.keys.dims()[1]));
                let new = Tensors::new(room, k.dtype(), k.device(), caches)?;
                if let (Some(old), 1..) = (old, at) {
                    new.keys.slice_set(&old.keys.narrow(1, 0, at)?.contiguous()?, 1, 0)?;
                    new.values.slice_set(&old.values.narrow(1, 0, at)?.contiguous()?, 1, 0)?;
                }
                new
            }
        };
        let held = self.0.insert(held);
        held.keys.slice_set(&k.contiguous()?, 1, at)?;
        held.values.slice_set(&v.contiguous()?, 1, at)?;
        Ok((held.keys.narrow(1, 0, len)?, held.values.narrow(1, 0, len)?))
    }

    /// Keys and values of the first `len` positions, if there are any.
    fn held(&self, len: usize) -> Result<Option<(Tensor, Tensor)>> {
        match &self.0 {
            Some(held) if len > 0 => Ok(Some((held.keys.narrow(1, 0, len)?, held.values.narrow(1, 0, len)?))),
            _ => Ok(None),
        }
    }

    fn copy(&self, len: usize, caches: &Caches) -> Result<Self> {
        let mut copy = Self(None);
        if let Some((keys, values)) = self.held(len)? {
            copy.write(0, &keys, &values, caches)?;
        }
        Ok(copy)
    }

    /// Bytes that room for `len` takes beyond what it has.
    fn growth(&self, len: usize, caches: &Caches) -> usize {
        let (has, size) = self.0.as_ref().map_or((0, size_of::<f32>()), |held| (held.keys.dims()[1], held.keys.dtype().size_in_bytes()));
        if len <= has { 0 } else { 2 * caches.kv_heads * caches.head_dim * size * (room(len, has) - has) }
    }
}

/// Positions that tensors make room for, when `has` is too little for `len`.
fn room(len: usize, has: usize) -> usize {
    len.max(2 * has).next_multiple_of(FIRST)
}

impl Tensors {
    fn new(room: usize, dtype: DType, device: &Device, caches: &Caches) -> Result<Self> {
        let shape = (caches.kv_heads, room, caches.head_dim);
        let bytes = 2 * caches.kv_heads * room * caches.head_dim * dtype.size_in_bytes();
        let [keys, values] = [Tensor::zeros(shape, dtype, device)?, Tensor::zeros(shape, dtype, device)?];
        Ok(Self { keys, values, charge: Charge::new(bytes, &caches.held) })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const HEADS: usize = 2;
    const DIM: usize = 32;
    const LAYERS: usize = 2;

    fn caches(kv_type: Option<KvType>) -> Caches {
        Caches { layers: LAYERS, scratch: false, kv_heads: HEADS, head_dim: DIM, kv_type, held: Arc::default() }
    }

    /// The row that token `token` writes, [KV, hd]; every type holds it exactly.
    fn row(layer: usize, token: u8, position: usize) -> Vec<f32> {
        (0..HEADS * DIM)
            .map(|i| if i % 8 == 0 { 127.0 } else { f32::from(token % 100) - (layer + position % 7 + i / DIM) as f32 })
            .collect()
    }

    fn append(cache: &mut Cache, tokens: &[u8]) {
        for layer in 0..LAYERS {
            let rows: Vec<f32> = (cache.len()..).zip(tokens).flat_map(|(position, token)| row(layer, *token, position)).collect();
            if cache.caches.kv_type.is_some() {
                cache.write_rows(layer, &rows, &rows);
            } else {
                let rows = Tensor::from_vec(rows, (tokens.len(), HEADS, DIM), &Device::Cpu).unwrap().transpose(0, 1).unwrap();
                cache.write(layer, &rows, &rows).unwrap();
            }
        }
        cache.advance(tokens.len());
    }

    /// Keys and values of each layer, by position.
    fn contents(cache: &Cache) -> Vec<Vec<f32>> {
        let layer = |layer| match &cache.held {
            _ if cache.is_empty() => Vec::new(),
            Held::Blocks(..) => vec![cache.read(layer, cache.len()).unwrap()],
            Held::Tensors(layers) => vec![layers[layer].held(cache.len()).unwrap().unwrap()],
        };
        let rows = |x: Tensor| x.transpose(0, 1).unwrap().flatten_all().unwrap().to_vec1::<f32>().unwrap();
        (0..LAYERS).flat_map(layer).flat_map(|(keys, values)| [rows(keys), rows(values)]).collect()
    }

    fn expected(tokens: &[u8]) -> Vec<Vec<f32>> {
        let layer = |layer| tokens.iter().enumerate().flat_map(|(position, token)| row(layer, *token, position)).collect::<Vec<f32>>();
        if tokens.is_empty() { Vec::new() } else { (0..LAYERS).flat_map(|l| [layer(l), layer(l)]).collect() }
    }

    #[derive(Debug, Clone)]
    enum Act {
        Append(usize, Vec<u8>),
        Fork(usize, usize),
        Truncate(usize, usize),
        Drop(usize),
    }

    fn act() -> impl Strategy<Value = Act> {
        prop_oneof![
            3 => (0..9usize, prop::collection::vec(any::<u8>(), 1..100)).prop_map(|(i, tokens)| Act::Append(i, tokens)),
            2 => (0..9usize, 0..300usize).prop_map(|(i, len)| Act::Fork(i, len)),
            1 => (0..9usize, 0..300usize).prop_map(|(i, len)| Act::Truncate(i, len)),
            1 => (0..9usize).prop_map(Act::Drop),
        ]
    }

    #[test]
    fn a_scratch_cache_holds_one_layer_at_a_time() {
        for kv_type in [Some(KvType::F32), Some(KvType::Q8_0), None] {
            let caches = caches(kv_type);
            let mut cache = Cache::new(&caches.scratch());
            for tokens in [&[1, 2, 3][..], &[4; 70]] {
                append(&mut cache, tokens);
                assert!(cache.is_empty());
                let mut whole = Cache::new(&caches);
                append(&mut whole, tokens);
                assert!(cache.fits(&caches) && cache.layers() == LAYERS);
                drop(whole);
            }
            let room = BLOCK.max(FIRST).max(70usize.next_multiple_of(FIRST));
            let row = kv_type.map_or(4 * DIM, |kv_type| kv_type.row_bytes(DIM));
            assert!(caches.held() > 0 && caches.held() <= 2 * HEADS * room.next_multiple_of(BLOCK) * row, "{kv_type:?}: {}", caches.held());
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        /// Whatever is appended, forked, cut and dropped: every cache holds its own tokens, growth is foretold, and in the end nothing is held.
        #[test]
        fn caches_share_without_seeing_each_other(acts in prop::collection::vec(act(), 1..40), kind in 0..4usize) {
            let kv_type = [Some(KvType::F32), Some(KvType::F16), Some(KvType::Q8_0), None][kind];
            let caches = caches(kv_type);
            let mut all: Vec<(Cache, Vec<u8>)> = vec![(Cache::new(&caches), Vec::new())];
            for act in acts {
                let last = all.len() - 1;
                match act {
                    Act::Append(i, tokens) => {
                        let (cache, held) = &mut all[i.min(last)];
                        let (before, growth) = (caches.held(), cache.growth(tokens.len()));
                        append(cache, &tokens);
                        held.extend(tokens);
                        prop_assert_eq!(caches.held(), before + growth);
                    }
                    Act::Fork(i, len) => {
                        let (cache, held) = &all[i.min(last)];
                        let before = caches.held();
                        let fork = (cache.fork(len).unwrap(), held[..len.min(held.len())].to_vec());
                        prop_assert!(kv_type.is_none() || caches.held() == before);
                        all.push(fork);
                    }
                    Act::Truncate(i, len) => {
                        let (cache, held) = &mut all[i.min(last)];
                        cache.truncate(len);
                        held.truncate(len);
                    }
                    Act::Drop(i) if last > 0 => drop(all.swap_remove(i.min(last))),
                    Act::Drop(_) => {}
                }
                for (cache, held) in &all {
                    prop_assert_eq!(cache.len(), held.len());
                    prop_assert!(contents(cache) == expected(held), "{:?} of {:?}", cache.len(), kv_type);
                }
            }
            if let Some(kv_type) = kv_type {
                let blocks = all.iter().flat_map(|(cache, _)| match &cache.held {
                    Held::Blocks(_, blocks) => blocks.iter().map(Arc::as_ptr).collect(),
                    Held::Tensors(_) => Vec::new(),
                });
                let distinct: std::collections::HashSet<_> = blocks.collect();
                prop_assert_eq!(caches.held(), distinct.len() * caches.block(kv_type));
            }
            drop(all);
            prop_assert_eq!(caches.held(), 0);
        }
    }
}
