//! Attention of new tokens over cached keys and values, without their repetition for grouped queries and without a matrix of all scores.
//!
//! Keys are taken in blocks, the softmax is rescaled from block to block (arXiv 2205.14135, section 3.1), so a task's scores fit the first-level
//! cache however long the sequence is. Blocks begin at multiples of [`KEYS`], and a query that does not see a block is not changed by it: a
//! query's result does not depend on which queries share its task, nor on how many tokens came in the same call.
//!
//! T new tokens of a sequence, H heads over KV key/value heads, G = H / KV, hd head size.

use super::{
    Kernels, parallel,
    product::{Block, Element, Rows, Weights},
    simd::{Kernel, Simd, exp},
};

/// Keys in a block.
const KEYS: usize = 64;
/// Tokens whose queries share a task, and so the reading of keys.
const TOKENS: usize = 16;

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
pub(crate) struct Sequence<'a> {
    /// T
    pub tokens: usize,
    /// position of the first of them
    pub first: usize,
    /// [KV, room, hd], at least `first + tokens` positions written
    pub keys: &'a [f32],
    /// as `keys`
    pub values: &'a [f32],
    pub room: usize,
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
        assert!(sequence.first + sequence.tokens <= sequence.room, "more tokens than the cache has room for");
        assert_eq!([sequence.keys.len(), sequence.values.len()], [kv * sequence.room * hd; 2], "keys of another shape");
        for head in 0..kv {
            tasks.extend((0..sequence.tokens).step_by(TOKENS).map(|token| (sequence, head, start, token)));
        }
        start += sequence.tokens;
    }
    let out = Output(out.as_mut_ptr());
    parallel(tasks.len(), |task| {
        let (sequence, head, start, token) = tasks[task];
        let cached = head * sequence.room * hd..(head + 1) * sequence.room * hd;
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
            keys: &sequence.keys[cached.clone()],
            values: &sequence.values[cached],
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
    /// [room, hd]
    keys: &'a [f32],
    values: &'a [f32],
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
        let (n, hd) = (self.rows.len(), self.head_dim);
        // SAFETY: any f32 is four bytes.
        let bytes = unsafe { std::slice::from_raw_parts(self.keys.as_ptr().cast::<u8>(), size_of_val(self.keys)) };
        let Some(keys) = Weights::new(bytes, Element::F32, self.keys.len() / hd, hd) else { return };
        let mut scores = vec![0f32; n * KEYS];
        let mut mixed = vec![0f32; n * hd];
        let mut states = vec![State { max: f32::NEG_INFINITY, sum: 0.0 }; n];
        let (begin, end) = (self.sees(0).start / KEYS * KEYS, self.sees(n - 1).end);
        for block in (begin..end).step_by(KEYS) {
            let count = (end - block).min(KEYS);
            let (x, rows) = (self.q.as_ptr(), Rows::Listed(self.rows));
            let product =
                Block { weights: keys, start: block, out: count, x: x.cast(), rows, row: 0, n, y: scores.as_mut_ptr(), stride: KEYS };
            // SAFETY: `end` keys are in the cache, all rows are in q, and `scores` has room for n rows.
            unsafe { product.run::<S>() };
            for (row, (scores, state)) in scores.chunks_exact_mut(KEYS).zip(&mut states).enumerate() {
                let seen = self.sees(row);
                let seen = seen.start.clamp(block, block + count) - block..seen.end.clamp(block, block + count) - block;
                // SAFETY: the row is KEYS long, and of `mixed` there are n rows.
                unsafe { state.soften::<S>(scores, seen, &mut mixed[row * hd..(row + 1) * hd]) };
            }
            // SAFETY: `count` values follow in the cache, and the rows are as long as said.
            unsafe { mix::<S>(&scores, &self.values[block * hd..(block + count) * hd], &mut mixed, hd) };
        }
        for ((row, state), mixed) in self.rows.iter().zip(&states).zip(mixed.chunks_exact(hd)) {
            // SAFETY: the row is in the output, and only this tile's.
            let out = unsafe { std::slice::from_raw_parts_mut(self.out.add(*row as usize * hd), hd) };
            out.iter_mut().zip(mixed).for_each(|(out, mixed)| *out = mixed / state.sum);
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
    /// `scores` is KEYS long, and the CPU has the instructions.
    #[inline(always)]
    unsafe fn soften<S: Simd>(&mut self, scores: &mut [f32], seen: std::ops::Range<usize>, mixed: &mut [f32]) {
        scores[..seen.start].fill(f32::NEG_INFINITY);
        scores[seen.end.max(seen.start)..].fill(f32::NEG_INFINITY);
        // SAFETY: the caller's.
        unsafe {
            let mut lanes = S::splat(f32::NEG_INFINITY);
            for at in (0..KEYS).step_by(S::LANES) {
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
            for at in (0..KEYS).step_by(S::LANES) {
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

/// mixed [n, hd] += weights [n, KEYS] values [.., hd], one key after the other.
///
/// # Safety
/// There are at most KEYS values, and the CPU has the instructions.
#[inline(always)]
unsafe fn mix<S: Simd>(weights: &[f32], values: &[f32], mixed: &mut [f32], hd: usize) {
    let n = mixed.len() / hd;
    let mut row = 0;
    // SAFETY: the rows are there.
    unsafe {
        if S::ROWS >= 6 {
            while row + 4 <= n {
                mix_rows::<S, 4, 4>(weights.as_ptr().add(row * KEYS), values, mixed.as_mut_ptr().add(row * hd), hd);
                row += 4;
            }
        } else {
            while row + 2 <= n {
                mix_rows::<S, 2, 4>(weights.as_ptr().add(row * KEYS), values, mixed.as_mut_ptr().add(row * hd), hd);
                row += 2;
            }
        }
        while row < n {
            mix_rows::<S, 1, 4>(weights.as_ptr().add(row * KEYS), values, mixed.as_mut_ptr().add(row * hd), hd);
            row += 1;
        }
    }
}

#[inline(always)]
unsafe fn mix_rows<S: Simd, const N: usize, const V: usize>(weights: *const f32, values: &[f32], mixed: *mut f32, hd: usize) {
    // SAFETY: N rows are there.
    unsafe {
        let mut at = 0;
        while at + V * S::LANES <= hd {
            mix_lanes::<S, N, V>(weights, values, mixed, hd, at);
            at += V * S::LANES;
        }
        while at + S::LANES <= hd {
            mix_lanes::<S, N, 1>(weights, values, mixed, hd, at);
            at += S::LANES;
        }
        for at in at..hd {
            for row in 0..N {
                for (key, value) in values.chunks_exact(hd).enumerate() {
                    *mixed.add(row * hd + at) += *weights.add(row * KEYS + key) * value[at];
                }
            }
        }
    }
}

#[inline(always)]
unsafe fn mix_lanes<S: Simd, const N: usize, const V: usize>(weights: *const f32, values: &[f32], mixed: *mut f32, hd: usize, at: usize) {
    // SAFETY: V vectors from `at` on are within a row.
    unsafe {
        let mut sums = [[S::splat(0.0); V]; N];
        for (row, sums) in sums.iter_mut().enumerate() {
            for (v, sum) in sums.iter_mut().enumerate() {
                *sum = S::load(mixed.add(row * hd + at + v * S::LANES));
            }
        }
        for (key, value) in values.chunks_exact(hd).enumerate() {
            let mut lanes = [S::splat(0.0); V];
            for (v, lanes) in lanes.iter_mut().enumerate() {
                *lanes = S::load(value.as_ptr().add(at + v * S::LANES));
            }
            for (row, sums) in sums.iter_mut().enumerate() {
                let weight = S::splat(*weights.add(row * KEYS + key));
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

    /// By the definition, in f64.
    fn plain(heads: Heads, q: &[f32], sequence: &Sequence<'_>) -> Vec<f64> {
        let Heads { heads: h, kv_heads: kv, head_dim: hd, window } = heads;
        let mut out = Vec::new();
        for (i, q) in q.chunks(hd).enumerate() {
            let (position, head) = (sequence.first + i / h, i % h / (h / kv));
            let low = window.map_or(0, |window| (position + 1).saturating_sub(window));
            let row = |cached: &[f32], key: usize| cached[(head * sequence.room + key) * hd..][..hd].to_vec();
            let score = |key| q.iter().zip(row(sequence.keys, key)).map(|(q, k)| f64::from(*q) * f64::from(k)).sum::<f64>();
            let weights: Vec<f64> = (low..=position).map(|key| score(key).exp()).collect();
            let total: f64 = weights.iter().sum();
            let mixed = |d| (low..=position).zip(&weights).map(|(key, w)| w * f64::from(row(sequence.values, key)[d])).sum::<f64>();
            out.extend((0..hd).map(|d| mixed(d) / total));
        }
        out
    }

    #[test]
    fn attention_is_that_of_the_definition() {
        for (h, kv, hd) in [(4, 2, 64), (6, 2, 20), (3, 3, 7), (8, 1, 80)] {
            for window in [None, Some(1), Some(50)] {
                let heads = Heads { heads: h, kv_heads: kv, head_dim: hd, window };
                let room = 320;
                let (keys, values) = (numbers(1, kv * room * hd), numbers(2, kv * room * hd));
                let [a, b] = [(37, 0), (1, 299)].map(|(tokens, first)| Sequence { tokens, first, keys: &keys, values: &values, room });
                let q: Vec<f32> = numbers(3, 38 * h * hd).iter().map(|q| q * 0.3).collect();
                let expected = [plain(heads, &q[..37 * h * hd], &a), plain(heads, &q[37 * h * hd..], &b)].concat();
                for kernels in Kernels::available() {
                    let mut out = vec![f32::NAN; q.len()];
                    attend(kernels, heads, &q, &[Sequence { ..a }, Sequence { ..b }], &mut out);
                    for (out, expected) in out.iter().zip(&expected) {
                        assert!((f64::from(*out) - expected).abs() < 2e-5, "{heads:?} {kernels:?}: {out} {expected}");
                    }
                }
            }
        }
    }

    #[test]
    fn chunks_and_neighbours_do_not_change_a_bit() {
        let (h, kv, hd, room) = (6, 2, 24, 256);
        let (keys, values, q) = (numbers(1, kv * room * hd), numbers(2, kv * room * hd), numbers(3, 200 * h * hd));
        for window in [None, Some(70)] {
            let heads = Heads { heads: h, kv_heads: kv, head_dim: hd, window };
            for kernels in Kernels::available() {
                let run = |pieces: &[usize]| {
                    let (mut all, mut first) = (Vec::new(), 0);
                    for tokens in pieces {
                        let mut out = vec![0f32; tokens * h * hd];
                        let sequence = Sequence { tokens: *tokens, first, keys: &keys, values: &values, room };
                        attend(kernels, heads, &q[first * h * hd..(first + tokens) * h * hd], &[sequence], &mut out);
                        all.extend(out);
                        first += tokens;
                    }
                    all
                };
                assert_eq!(run(&[200]), run(&[3, 1, 1, 60, 64, 70, 1]), "{window:?} {kernels:?}");
            }
        }
    }
}
