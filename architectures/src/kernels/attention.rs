//! Attention of new tokens over cached keys and values, without their repetition for grouped queries and without a matrix of all scores.
//!
//! Keys and values lie in blocks of [`BLOCK`] positions and are read there in the type that they are stored in. The softmax is rescaled from block to
//! block (arXiv 2205.14135, section 3.1), so a task's scores fit the first-level cache however long the sequence is. A query that does not see
//! a block is not changed by it: a query's result does not depend on which queries share its task, nor on how many tokens came in the same call.
//!
//! T new tokens of a sequence, H heads over KV key/value heads, G = H / KV, hd head size.

use half::{f16, slice::HalfFloatSliceExt as _};

use super::{
    Kernels, parallel,
    simd::{F16, F32, Kernel, Simd, exp},
};

/// Positions in a block of keys and values.
pub(crate) const BLOCK: usize = 64;
/// Tokens whose queries share a task, and so the reading of keys.
const TOKENS: usize = 16;
/// Elements of a `q8_0` row that share a scale.
const GROUP: usize = 32;
/// Bytes of such a group: its scale, an f16, and a signed byte for each element.
const GROUP_BYTES: usize = 2 + GROUP;

/// In what type keys and values are kept in the CPU's memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum KvType {
    /// as they were computed
    F32,
    /// rounded; what f16 cannot hold becomes its largest number
    F16,
    /// 8 bits and a scale for each 32 of a head, as in GGUF's type of this name
    Q8_0,
}

impl KvType {
    /// Whether heads of this size can be kept so.
    pub(crate) fn fits(self, head_dim: usize) -> bool {
        self != Self::Q8_0 || head_dim.is_multiple_of(GROUP)
    }

    /// Bytes of one head's key or value.
    pub(crate) fn row_bytes(self, head_dim: usize) -> usize {
        match self {
            Self::F32 => 4 * head_dim,
            Self::F16 => 2 * head_dim,
            Self::Q8_0 => head_dim / GROUP * GROUP_BYTES,
        }
    }

    /// Rounds x [hd] into a row.
    pub(crate) fn store(self, x: &[f32], row: &mut [u8]) {
        match self {
            Self::F32 => row.as_chunks_mut().0.iter_mut().zip(x).for_each(|(bytes, x)| *bytes = x.to_le_bytes()),
            Self::F16 => {
                let largest = f16::MAX.to_f32();
                for (row, x) in row.chunks_mut(2 * GROUP).zip(x.chunks(GROUP)) {
                    let (mut bounded, mut rounded) = ([0.0; GROUP], [f16::ZERO; GROUP]);
                    bounded.iter_mut().zip(x).for_each(|(bounded, x)| *bounded = x.clamp(-largest, largest));
                    rounded.convert_from_f32_slice(&bounded);
                    row.as_chunks_mut().0.iter_mut().zip(rounded).for_each(|(bytes, x)| *bytes = x.to_le_bytes());
                }
            }
            Self::Q8_0 => {
                for (row, x) in row.chunks_exact_mut(GROUP_BYTES).zip(x.chunks_exact(GROUP)) {
                    let largest = x.iter().fold(0f32, |largest, x| largest.max(x.abs()));
                    let step = f16::from_f32((largest / 127.0).min(f16::MAX.to_f32()));
                    let (scale, bytes) = row.split_at_mut(2);
                    scale.copy_from_slice(&step.to_le_bytes());
                    let inverse = if step > f16::ZERO { 1.0 / step.to_f32() } else { 0.0 };
                    bytes
                        .iter_mut()
                        .zip(x)
                        .for_each(|(byte, x)| *byte = ((x * inverse).round().clamp(-127.0, 127.0) as i8).cast_unsigned());
                }
            }
        }
    }

    /// The values [hd] of a row.
    pub(crate) fn load(self, row: &[u8], x: &mut [f32]) {
        match self {
            Self::F32 => row.as_chunks().0.iter().zip(x).for_each(|(bytes, x)| *x = f32::from_le_bytes(*bytes)),
            Self::F16 => row.as_chunks().0.iter().zip(x).for_each(|(bytes, x)| *x = f16::from_le_bytes(*bytes).to_f32()),
            Self::Q8_0 => {
                for (row, x) in row.chunks_exact(GROUP_BYTES).zip(x.chunks_exact_mut(GROUP)) {
                    let scale = scale(u16::from_le_bytes([row[0], row[1]]));
                    x.iter_mut().zip(&row[2..]).for_each(|(x, byte)| *x = f32::from(byte.cast_signed()) * scale);
                }
            }
        }
    }
}

/// A finite f16 that is not negative: its bits are a f32's but for the width of the exponent, which a product with 2^112 makes good.
#[inline(always)]
fn scale(bits: u16) -> f32 {
    const BIAS: f32 = f32::from_bits((127 + 112) << 23);
    f32::from_bits(u32::from(bits) << 13) * BIAS
}

/// A [`KvType`] as kernels read it.
trait Row: Copy + 'static {
    /// Elements `at..at + S::LANES` of a row; `at` is a multiple of the lanes.
    ///
    /// # Safety
    /// The row has them, and the CPU the instructions.
    unsafe fn load<S: Simd>(row: *const u8, at: usize) -> S::Vector;

    /// Element `at` of a row, among those that fill no vector.
    ///
    /// # Safety
    /// The row has it.
    unsafe fn one(row: *const u8, at: usize) -> f32;
}

// SAFETY of the reads below: the callers', who give addresses of whole rows; every read is unaligned.
impl Row for F32 {
    #[inline(always)]
    unsafe fn load<S: Simd>(row: *const u8, at: usize) -> S::Vector {
        unsafe { S::load(row.add(4 * at).cast()) }
    }

    #[inline(always)]
    unsafe fn one(row: *const u8, at: usize) -> f32 {
        unsafe { row.add(4 * at).cast::<f32>().read_unaligned() }
    }
}

impl Row for F16 {
    #[inline(always)]
    unsafe fn load<S: Simd>(row: *const u8, at: usize) -> S::Vector {
        unsafe { S::load_f16(row.add(2 * at)) }
    }

    #[inline(always)]
    unsafe fn one(row: *const u8, at: usize) -> f32 {
        f16::from_bits(unsafe { row.add(2 * at).cast::<u16>().read_unaligned() }).to_f32()
    }
}

#[derive(Clone, Copy)]
struct Q8;

impl Row for Q8 {
    #[inline(always)]
    unsafe fn load<S: Simd>(row: *const u8, at: usize) -> S::Vector {
        // Groups are whole vectors.
        unsafe {
            let group = row.add(at / GROUP * GROUP_BYTES);
            let scale = scale(group.cast::<u16>().read_unaligned());
            S::mul_add(S::load_i8(group.add(2 + at % GROUP)), S::splat(scale), S::splat(0.0))
        }
    }

    #[inline(always)]
    unsafe fn one(row: *const u8, at: usize) -> f32 {
        unsafe {
            let group = row.add(at / GROUP * GROUP_BYTES);
            f32::from((*group.add(2 + at % GROUP)).cast_signed()) * scale(group.cast::<u16>().read_unaligned())
        }
    }
}

/// What is the same for all sequences of a layer.
#[derive(Debug, Clone, Copy)]
#[allow(clippy::struct_field_names, reason = "the config's names")]
pub(crate) struct Heads {
    /// H
    pub heads: usize,
    /// KV
    pub kv_heads: usize,
    /// hd
    pub head_dim: usize,
    /// a token sees itself and the `window - 1` tokens before it
    pub window: Option<usize>,
}

/// One sequence's new tokens and what they can see.
#[derive(Clone)]
pub(crate) struct Sequence<'a> {
    /// T
    pub tokens: usize,
    /// position of the first of them
    pub first: usize,
    /// of the blocks
    pub kv_type: KvType,
    /// keys and values of the positions from 0 on, at least `first + tokens` of them written: each [2, KV, `BLOCK`, row]
    pub blocks: Vec<&'a [u8]>,
}

/// Tasks write disjoint rows.
struct Output(*mut f32);

// SAFETY: see `attend`.
unsafe impl Sync for Output {}

impl Output {
    fn start(&self) -> *mut f32 {
        self.0
    }
}

/// q [N, H, hd], already scaled, the rows of all sequences end to end -> [N, H, hd].
///
/// # Panics
/// If a slice is not of the shape that `heads` and `sequences` say.
pub(crate) fn attend(kernels: Kernels, heads: Heads, q: &[f32], sequences: &[Sequence<'_>], out: &mut [f32]) {
    let Heads { heads: h, kv_heads: kv, head_dim: hd, .. } = heads;
    let n: usize = sequences.iter().map(|sequence| sequence.tokens).sum();
    assert!(kv > 0 && h % kv == 0 && q.len() == n * h * hd && out.len() == q.len(), "queries of another shape");
    let mut tasks = Vec::new();
    let mut start = 0;
    for sequence in sequences {
        let bytes = 2 * kv * BLOCK * sequence.kv_type.row_bytes(hd);
        assert!(sequence.first + sequence.tokens <= sequence.blocks.len() * BLOCK, "more tokens than there are keys");
        assert!(sequence.kv_type.fits(hd) && sequence.blocks.iter().all(|block| block.len() == bytes), "keys of another shape");
        for head in 0..kv {
            tasks.extend((0..sequence.tokens).step_by(TOKENS).map(|token| (sequence, head, start, token)));
        }
        start += sequence.tokens;
    }
    let out = Output(out.as_mut_ptr());
    parallel(tasks.len(), |task| {
        let (sequence, head, start, token) = tasks[task];
        let part = BLOCK * sequence.kv_type.row_bytes(hd);
        let tokens = (sequence.tokens - token).min(TOKENS);
        let group = h / kv;
        // Row t G + g is of token t and the group's head g; in q and in the output it is this one.
        let row = |token: usize, g| ((start + token) * h + head * group + g) as u32;
        let rows: Vec<u32> = (token..token + tokens).flat_map(|token| (0..group).map(move |g| row(token, g))).collect();
        let tile = Tile {
            q,
            rows: &rows,
            group,
            first: sequence.first + token,
            window: heads.window,
            kv_type: sequence.kv_type,
            blocks: &sequence.blocks,
            keys: head * part,
            values: (kv + head) * part,
            head_dim: hd,
            out: out.start(),
        };
        kernels.run(tile);
    });
}

/// The queries of some tokens and one group of heads.
struct Tile<'a> {
    q: &'a [f32],
    /// rows of q and of the output; no other tile has them
    rows: &'a [u32],
    /// G
    group: usize,
    /// position of the first token
    first: usize,
    window: Option<usize>,
    kv_type: KvType,
    blocks: &'a [&'a [u8]],
    /// where in a block the head's keys and values begin
    keys: usize,
    values: usize,
    head_dim: usize,
    out: *mut f32,
}

impl Tile<'_> {
    /// Positions that a row's token sees.
    fn sees(&self, row: usize) -> std::ops::Range<usize> {
        let end = self.first + row / self.group + 1;
        self.window.map_or(0, |window| end.saturating_sub(window))..end
    }
}

impl Kernel for Tile<'_> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        // SAFETY: the caller's.
        unsafe {
            match self.kv_type {
                KvType::F32 => self.over::<S, F32>(),
                KvType::F16 => self.over::<S, F16>(),
                KvType::Q8_0 => self.over::<S, Q8>(),
            }
        }
    }
}

impl Tile<'_> {
    /// # Safety
    /// The blocks hold E, and the CPU has the instructions.
    #[inline(always)]
    unsafe fn over<S: Simd, E: Row>(self) {
        let (n, hd, stride) = (self.rows.len(), self.head_dim, self.kv_type.row_bytes(self.head_dim));
        let mut scores = vec![0f32; n * BLOCK];
        let mut mixed = vec![0f32; n * hd];
        let mut states = vec![State { max: f32::NEG_INFINITY, sum: 0.0 }; n];
        let (begin, end) = (self.sees(0).start / BLOCK, self.sees(n - 1).end);
        for (number, block) in self.blocks.iter().enumerate().take(end.div_ceil(BLOCK)).skip(begin) {
            let start = number * BLOCK;
            let count = (end - start).min(BLOCK);
            // SAFETY: a block has BLOCK keys and as many values of each head, all rows are in q, and `scores` has room for n rows.
            unsafe { score::<S, E>(self.q.as_ptr(), self.rows, block[self.keys..].as_ptr(), [count, hd, stride], scores.as_mut_ptr()) };
            for (row, (scores, state)) in scores.chunks_exact_mut(BLOCK).zip(&mut states).enumerate() {
                let seen = self.sees(row);
                let seen = seen.start.clamp(start, start + count) - start..seen.end.clamp(start, start + count) - start;
                // SAFETY: the row is `BLOCK` long, and of `mixed` there are n rows.
                unsafe { state.soften::<S>(scores, seen, &mut mixed[row * hd..(row + 1) * hd]) };
            }
            // SAFETY: as above.
            unsafe { mix::<S, E>(&scores, block[self.values..].as_ptr(), [count, hd, stride], &mut mixed) };
        }
        for ((row, state), mixed) in self.rows.iter().zip(&states).zip(mixed.chunks_exact(hd)) {
            // SAFETY: the row is in the output, and only this tile's.
            let out = unsafe { std::slice::from_raw_parts_mut(self.out.add(*row as usize * hd), hd) };
            out.iter_mut().zip(mixed).for_each(|(out, mixed)| *out = mixed / state.sum);
        }
    }
}

/// scores [n, `BLOCK`]: of the rows of q and the first `count` keys, rounded up to four, each the sum over the lanes of one vector.
///
/// # Safety
/// The rows are in q, `BLOCK` keys of `stride` bytes lie at `keys`, and the CPU has the instructions.
#[inline(always)]
unsafe fn score<S: Simd, E: Row>(q: *const f32, rows: &[u32], keys: *const u8, [count, hd, stride]: [usize; 3], scores: *mut f32) {
    let n = rows.len();
    for key in (0..count).step_by(4) {
        let mut row = 0;
        // SAFETY: the rows are there; BLOCK is a multiple of four.
        unsafe {
            let keys = keys.add(key * stride);
            if S::ROWS >= 6 {
                while row + 4 <= n {
                    score_rows::<S, E, 4>(q, &rows[row..row + 4], keys, [hd, stride], scores.add(row * BLOCK + key));
                    row += 4;
                }
            }
            while row + 2 <= n {
                score_rows::<S, E, 2>(q, &rows[row..row + 2], keys, [hd, stride], scores.add(row * BLOCK + key));
                row += 2;
            }
            if row < n {
                score_rows::<S, E, 1>(q, &rows[row..], keys, [hd, stride], scores.add(row * BLOCK + key));
            }
        }
    }
}

#[inline(always)]
unsafe fn score_rows<S: Simd, E: Row, const N: usize>(
    q: *const f32,
    rows: &[u32],
    keys: *const u8,
    [hd, stride]: [usize; 2],
    scores: *mut f32,
) {
    // SAFETY: N rows and four keys are there.
    unsafe {
        let mut x = [q; N];
        for (x, row) in x.iter_mut().zip(rows) {
            *x = q.add(*row as usize * hd);
        }
        let mut sums = [[S::splat(0.0); 4]; N];
        let mut at = 0;
        while at + S::LANES <= hd {
            let mut lanes = [S::splat(0.0); 4];
            for (key, lanes) in lanes.iter_mut().enumerate() {
                *lanes = E::load::<S>(keys.add(key * stride), at);
            }
            for (x, sums) in x.iter().zip(&mut sums) {
                let x = S::load(x.add(at));
                for (sum, lanes) in sums.iter_mut().zip(lanes) {
                    *sum = S::mul_add(x, lanes, *sum);
                }
            }
            at += S::LANES;
        }
        for (row, (x, sums)) in x.iter().zip(sums).enumerate() {
            let mut sums = S::sums(sums);
            for at in at..hd {
                for (key, sum) in sums.iter_mut().enumerate() {
                    *sum += *x.add(at) * E::one(keys.add(key * stride), at);
                }
            }
            scores.add(row * BLOCK).cast::<[f32; 4]>().write_unaligned(sums);
        }
    }
}

/// A row's softmax so far.
#[derive(Clone, Copy)]
struct State {
    max: f32,
    sum: f32,
}

impl State {
    /// Makes a block's scores of keys `seen` weights relative to the largest score so far, the others 0, and `mixed` relative to the same.
    ///
    /// # Safety
    /// `scores` is `BLOCK` long, and the CPU has the instructions.
    #[inline(always)]
    unsafe fn soften<S: Simd>(&mut self, scores: &mut [f32], seen: std::ops::Range<usize>, mixed: &mut [f32]) {
        scores[..seen.start].fill(f32::NEG_INFINITY);
        scores[seen.end.max(seen.start)..].fill(f32::NEG_INFINITY);
        // SAFETY: the caller's.
        unsafe {
            let mut lanes = S::splat(f32::NEG_INFINITY);
            for at in (0..BLOCK).step_by(S::LANES) {
                lanes = S::max(lanes, S::load(scores.as_ptr().add(at)));
            }
            let mut buffer = [f32::NEG_INFINITY; 16];
            S::store(buffer.as_mut_ptr(), lanes);
            let max = buffer.iter().fold(self.max, |max, x| if *x > max { *x } else { max });
            if max == f32::NEG_INFINITY {
                scores.fill(0.0);
                return;
            }
            let factor = exp(self.max - max);
            scores.iter_mut().for_each(|score| *score = exp(*score - max));
            let (one, mut sum) = (S::splat(1.0), S::splat(0.0));
            for at in (0..BLOCK).step_by(S::LANES) {
                sum = S::mul_add(one, S::load(scores.as_ptr().add(at)), sum);
            }
            let zero = S::splat(0.0);
            self.sum = self.sum * factor + S::sums([sum, zero, zero, zero])[0];
            self.max = max;
            if factor < 1.0 {
                mixed.iter_mut().for_each(|mixed| *mixed *= factor);
            }
        }
    }
}

/// mixed [n, hd] += weights [n, `BLOCK`] values [count, hd], one key after the other.
///
/// # Safety
/// `count` values of `stride` bytes lie at `values`, at most `BLOCK`, and the CPU has the instructions.
#[inline(always)]
unsafe fn mix<S: Simd, E: Row>(weights: &[f32], values: *const u8, shape: [usize; 3], mixed: &mut [f32]) {
    let hd = shape[1];
    let n = mixed.len() / hd;
    let mut row = 0;
    // SAFETY: the rows are there.
    unsafe {
        if S::ROWS >= 6 {
            while row + 4 <= n {
                mix_rows::<S, E, 4>(weights.as_ptr().add(row * BLOCK), values, shape, mixed.as_mut_ptr().add(row * hd));
                row += 4;
            }
        }
        while row + 2 <= n {
            mix_rows::<S, E, 2>(weights.as_ptr().add(row * BLOCK), values, shape, mixed.as_mut_ptr().add(row * hd));
            row += 2;
        }
        if row < n {
            mix_rows::<S, E, 1>(weights.as_ptr().add(row * BLOCK), values, shape, mixed.as_mut_ptr().add(row * hd));
        }
    }
}

#[inline(always)]
unsafe fn mix_rows<S: Simd, E: Row, const N: usize>(weights: *const f32, values: *const u8, shape: [usize; 3], mixed: *mut f32) {
    let [count, hd, stride] = shape;
    // SAFETY: N rows are there.
    unsafe {
        let mut at = 0;
        while at + 4 * S::LANES <= hd {
            mix_lanes::<S, E, N, 4>(weights, values, shape, mixed, at);
            at += 4 * S::LANES;
        }
        while at + S::LANES <= hd {
            mix_lanes::<S, E, N, 1>(weights, values, shape, mixed, at);
            at += S::LANES;
        }
        for at in at..hd {
            for row in 0..N {
                for key in 0..count {
                    *mixed.add(row * hd + at) += *weights.add(row * BLOCK + key) * E::one(values.add(key * stride), at);
                }
            }
        }
    }
}

#[inline(always)]
unsafe fn mix_lanes<S: Simd, E: Row, const N: usize, const V: usize>(
    weights: *const f32,
    values: *const u8,
    [count, hd, stride]: [usize; 3],
    mixed: *mut f32,
    at: usize,
) {
    // SAFETY: V vectors from `at` on are within a row.
    unsafe {
        let mut sums = [[S::splat(0.0); V]; N];
        for (row, sums) in sums.iter_mut().enumerate() {
            for (v, sum) in sums.iter_mut().enumerate() {
                *sum = S::load(mixed.add(row * hd + at + v * S::LANES));
            }
        }
        for key in 0..count {
            let mut lanes = [S::splat(0.0); V];
            for (v, lanes) in lanes.iter_mut().enumerate() {
                *lanes = E::load::<S>(values.add(key * stride), at + v * S::LANES);
            }
            for (row, sums) in sums.iter_mut().enumerate() {
                let weight = S::splat(*weights.add(row * BLOCK + key));
                for (sum, lanes) in sums.iter_mut().zip(lanes) {
                    *sum = S::mul_add(weight, lanes, *sum);
                }
            }
        }
        for (row, sums) in sums.iter().enumerate() {
            for (v, sum) in sums.iter().enumerate() {
                S::store(mixed.add(row * hd + at + v * S::LANES), *sum);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn numbers(seed: usize, len: usize) -> Vec<f32> {
        (0..len).map(|i| ((i as f32 + 1.0) * (seed as f32 + 1.3) * 12.9898).sin()).collect()
    }

    const TYPES: [KvType; 3] = [KvType::F32, KvType::F16, KvType::Q8_0];

    /// Keys and values of `positions`, one byte off their alignment.
    struct Cached {
        kv_type: KvType,
        kv: usize,
        hd: usize,
        bytes: Vec<u8>,
    }

    impl Cached {
        fn new(kv_type: KvType, kv: usize, hd: usize, positions: usize) -> Self {
            let row = kv_type.row_bytes(hd);
            let rows = numbers(1, positions.next_multiple_of(BLOCK) * 2 * kv * hd);
            let mut bytes = vec![0; 1 + rows.len() / hd * row];
            rows.chunks(hd).zip(bytes[1..].chunks_mut(row)).for_each(|(x, row)| kv_type.store(x, row));
            Self { kv_type, kv, hd, bytes }
        }

        fn sequence(&self, tokens: usize, first: usize) -> Sequence<'_> {
            let block = 2 * self.kv * BLOCK * self.kv_type.row_bytes(self.hd);
            Sequence { tokens, first, kv_type: self.kv_type, blocks: self.bytes[1..].chunks(block).collect() }
        }

        /// Of a key (0) or a value (1).
        fn row(&self, which: usize, head: usize, position: usize) -> Vec<f32> {
            let row = self.kv_type.row_bytes(self.hd);
            let at = ((position / BLOCK * 2 + which) * self.kv + head) * BLOCK + position % BLOCK;
            let mut x = vec![0.0; self.hd];
            self.kv_type.load(&self.bytes[1 + at * row..][..row], &mut x);
            x
        }
    }

    /// By the definition, in f64.
    fn plain(heads: Heads, q: &[f32], first: usize, cached: &Cached) -> Vec<f64> {
        let Heads { heads: h, kv_heads: kv, head_dim: hd, window } = heads;
        let mut out = Vec::new();
        for (i, q) in q.chunks(hd).enumerate() {
            let (position, head) = (first + i / h, i % h / (h / kv));
            let low = window.map_or(0, |window| (position + 1).saturating_sub(window));
            let score = |key| q.iter().zip(cached.row(0, head, key)).map(|(q, k)| f64::from(*q) * f64::from(k)).sum::<f64>();
            let weights: Vec<f64> = (low..=position).map(|key| score(key).exp()).collect();
            let total: f64 = weights.iter().sum();
            let values: Vec<Vec<f32>> = (low..=position).map(|key| cached.row(1, head, key)).collect();
            let mixed = |d: usize| values.iter().zip(&weights).map(|(value, w)| w * f64::from(value[d])).sum::<f64>();
            out.extend((0..hd).map(|d| mixed(d) / total));
        }
        out
    }

    #[test]
    fn attention_is_that_of_the_definition() {
        for (kv_type, (h, kv, hd)) in
            TYPES.into_iter().flat_map(|t| [(4, 2, 64), (6, 2, 20), (3, 3, 7), (8, 1, 96)].map(|shape| (t, shape)))
        {
            for window in [None, Some(1), Some(50)].into_iter().filter(|_| kv_type.fits(hd)) {
                let heads = Heads { heads: h, kv_heads: kv, head_dim: hd, window };
                let cached = Cached::new(kv_type, kv, hd, 300);
                let [a, b] = [(37, 0), (1, 299)].map(|(tokens, first)| cached.sequence(tokens, first));
                let q: Vec<f32> = numbers(3, 38 * h * hd).iter().map(|q| q * 0.3).collect();
                let (of_a, of_b) = q.split_at(37 * h * hd);
                let expected = [plain(heads, of_a, 0, &cached), plain(heads, of_b, 299, &cached)].concat();
                for kernels in Kernels::available() {
                    let mut out = vec![f32::NAN; q.len()];
                    attend(kernels, heads, &q, &[a.clone(), b.clone()], &mut out);
                    for (out, expected) in out.iter().zip(&expected) {
                        assert!((f64::from(*out) - expected).abs() < 2e-5, "{heads:?} {kv_type:?} {kernels:?}: {out} {expected}");
                    }
                }
            }
        }
    }

    #[test]
    fn chunks_and_neighbours_do_not_change_a_bit() {
        let (h, kv, hd) = (6, 2, 32);
        let q = numbers(3, 200 * h * hd);
        for (kv_type, window) in TYPES.into_iter().flat_map(|t| [(t, None), (t, Some(70))]) {
            let (heads, cached) = (Heads { heads: h, kv_heads: kv, head_dim: hd, window }, Cached::new(kv_type, kv, hd, 200));
            for kernels in Kernels::available() {
                let run = |pieces: &[usize]| {
                    let (mut all, mut first) = (Vec::new(), 0);
                    for tokens in pieces {
                        let mut out = vec![0f32; tokens * h * hd];
                        attend(kernels, heads, &q[first * h * hd..(first + tokens) * h * hd], &[cached.sequence(*tokens, first)], &mut out);
                        all.extend(out);
                        first += tokens;
                    }
                    all
                };
                assert_eq!(run(&[200]), run(&[3, 1, 1, 60, 64, 70, 1]), "{kv_type:?} {window:?} {kernels:?}");
            }
        }
    }

    #[test]
    fn rows_are_rounded_as_their_type_says() {
        let x: Vec<f32> = numbers(5, 64).iter().enumerate().map(|(i, x)| x * if i < 32 { 1e-3 } else { 300.0 }).collect();
        for (kv_type, tolerance) in [(KvType::F32, 0.0), (KvType::F16, 1.0 / 2048.0), (KvType::Q8_0, 1.01 / 254.0)] {
            let (mut row, mut back) = (vec![0; kv_type.row_bytes(64)], vec![0f32; 64]);
            kv_type.store(&x, &mut row);
            kv_type.load(&row, &mut back);
            for (i, (x, back)) in x.iter().zip(&back).enumerate() {
                // q8_0 rounds to a share of a group's largest element, f16 to one of the element.
                let size = if kv_type == KvType::Q8_0 { [1e-3, 300.0][i / 32] } else { x.abs() };
                assert!((x - back).abs() <= tolerance * size + 1e-7, "{kv_type:?} {i}: {x} {back}");
            }
            // What has no rounded form is bounded, and nothing divides by zero.
            let mut large = vec![1e30, -1e30, 0.0, 1.0];
            large.resize(64, 0.0);
            kv_type.store(&large, &mut row);
            kv_type.load(&row, &mut back);
            assert!(
                back.iter().all(|x| x.is_finite()) && back[0] > 6e4 && back[1] < -6e4 && back[63].to_bits() == 0,
                "{kv_type:?} {back:?}"
            );
        }
        assert!(!KvType::Q8_0.fits(80) && KvType::F16.fits(7));
        for bits in 0..0x7c00 {
            assert_eq!(scale(bits).to_bits(), f16::from_bits(bits).to_f32().to_bits());
        }
    }
}
