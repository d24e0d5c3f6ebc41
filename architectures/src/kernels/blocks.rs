//! Products of weights in ggml's blocks with rows of x in eight bits, scaled for every 32 of them.
//!
//! The integers of sixteen rows of weights are unpacked into a [`Panel`], which stays in the first-level cache while all rows of x pass by; a
//! lane is a row of weights, so no sum crosses lanes and scales are whole vectors. Whatever the type, weight = scale level - minimum with
//! levels from 0 to 255, so one inner loop serves all: the levels' products with x are exact integers, and
//! y = sum over sub-blocks of scale (scale of x) (levels . x) - minimum (sum of x). These sums run along the inner dimension for any number of
//! rows and any kind of instructions.

use super::{
    Kernels, parallel,
    product::{Block, Rows},
    simd::ROUND,
};
use crate::{blocks::Parts, weights::Dtype};

/// Rows of weights in a panel.
pub(super) const LANES: usize = 16;
/// Inner elements in a panel: a whole number of blocks of any type.
pub(super) const CHUNK: usize = 512;
/// Elements of x that share a scale.
pub(super) const GROUP: usize = 32;
/// Rows of x that are worth a parallel loop.
const MANY: usize = 16;

/// Rows [N, in] in eight bits.
pub(super) struct Eight {
    inner: usize,
    /// x over its scale, [N, in]
    levels: Vec<i8>,
    /// [N, in / 32]
    scales: Vec<f32>,
    /// of what levels and scales stand for, over every 16 elements and over every 32
    sums: [Vec<f32>; 2],
}

impl Eight {
    /// `inner` is a multiple of 32.
    pub fn of(x: &[f32], inner: usize) -> Self {
        struct Shared(*mut Eight);
        // SAFETY: every row writes its own part of each list.
        unsafe impl Sync for Shared {}
        impl Shared {
            fn at(&self) -> *mut Eight {
                self.0
            }
        }
        let groups = x.len() / GROUP;
        let mut eight =
            Self { inner, levels: vec![0; x.len()], scales: vec![0.0; groups], sums: [vec![0.0; 2 * groups], vec![0.0; groups]] };
        let shared = Shared(&raw mut eight);
        let row = |row: usize| {
            // SAFETY: as above, within lists of these lengths.
            let eight = unsafe { &mut *shared.at() };
            for group in row * inner / GROUP..(row + 1) * inner / GROUP {
                let x = &x[group * GROUP..][..GROUP];
                let max = x.iter().fold(0f32, |max, x| max.max(x.abs()));
                let (scale, inverse) = if max > 0.0 { (max / 127.0, 127.0 / max) } else { (0.0, 0.0) };
                let mut sums = [0i32; 2];
                for (half, (levels, x)) in eight.levels[group * GROUP..][..GROUP].chunks_exact_mut(16).zip(x.chunks_exact(16)).enumerate() {
                    for (level, x) in levels.iter_mut().zip(x) {
                        *level = (x * inverse + ROUND - ROUND) as i8;
                    }
                    sums[half] = levels.iter().map(|level| i32::from(*level)).sum();
                    eight.sums[0][2 * group + half] = scale * sums[half] as f32;
                }
                eight.scales[group] = scale;
                eight.sums[1][group] = scale * (sums[0] + sums[1]) as f32;
            }
        };
        let rows = x.len() / inner;
        if rows < MANY {
            (0..rows).for_each(row);
        } else {
            parallel(rows, row);
        }
        eight
    }
}

/// Some inner elements of sixteen rows of weights.
#[repr(C, align(64))]
pub(super) struct Panel {
    /// [in / 4][16][4]
    pub levels: [u8; LANES * CHUNK],
    /// [in / S][16] for sub-blocks of S elements
    pub scales: [f32; LANES * CHUNK / 16],
    /// as `scales`
    pub minima: [f32; LANES * CHUNK / 16],
}

impl Panel {
    const EMPTY: Self = Self { levels: [0; LANES * CHUNK], scales: [0.0; LANES * CHUNK / 16], minima: [0.0; LANES * CHUNK / 16] };
}

/// Sixteen rows of blocks in memory, from some column on.
#[derive(Clone, Copy)]
pub(super) struct Rows16 {
    /// a block of the first row
    pub first: *const u8,
    /// bytes from row to row
    pub stride: usize,
    /// rows that are there, the first ones; lanes beyond them are of no meaning
    pub there: usize,
    /// blocks of each row
    pub blocks: usize,
    /// what is unpacked soon, if it is there: as many bytes, worth fetching
    pub next: *const u8,
}

/// Rows of x, from some column on.
#[derive(Clone, Copy)]
pub(super) struct Columns<const T: usize> {
    pub levels: [*const i8; T],
    pub scales: [*const f32; T],
    /// over sub-blocks
    pub sums: [*const f32; T],
}

/// What a kind of instructions does with integers. Every method is unsafe for one reason: the CPU must have the instructions; and pointers
/// are to what they are said to be.
pub(super) trait Integers {
    /// Rows of x in a tile, at most six.
    const TOKENS: usize;

    unsafe fn unpack(dtype: Dtype, rows: Rows16, panel: &mut Panel);

    /// Adds to `sums` [T][P][16] the products of the panels' first `len` elements, in sub-blocks of `S`, with T rows of x.
    unsafe fn tile<const P: usize, const T: usize, const S: usize>(panels: &[Panel; 2], len: usize, x: Columns<T>, sums: *mut f32);
}

/// As [`Block`] promises; its x is an [`Eight`] with as many inner elements as the weights, which are blocks of `dtype`.
pub(super) unsafe fn multiply(kernels: Kernels, b: &Block<'_>, dtype: Dtype) {
    // SAFETY: the caller's promise, and the CPU has what is asked for.
    unsafe {
        match kernels {
            #[cfg(target_arch = "x86_64")]
            Kernels::Avx512 | Kernels::Avx512Bf16 if super::x86_blocks::has_avx512() => super::x86_blocks::run_avx512(b, dtype),
            #[cfg(target_arch = "x86_64")]
            Kernels::Avx2 | Kernels::Avx512 | Kernels::Avx512Bf16 if super::x86::has_avx2() => super::x86_blocks::run_avx2(b, dtype),
            _ => block::<Plain>(b, dtype),
        }
    }
}

/// # Safety
/// As for [`multiply`], and the CPU has the instructions.
#[inline(always)]
pub(super) unsafe fn block<I: Integers>(b: &Block<'_>, dtype: Dtype) {
    // SAFETY: the caller's.
    unsafe { if dtype.sub_block() == 16 { block_of::<I, 16>(b, dtype) } else { block_of::<I, 32>(b, dtype) } }
}

/// `S` elements of a row of weights share a scale.
#[inline(always)]
unsafe fn block_of<I: Integers, const S: usize>(b: &Block<'_>, dtype: Dtype) {
    const WIDE: usize = 2 * LANES;
    let (elements, bytes) = dtype.block();
    let row_bytes = b.weights.row_bytes();
    let inner = b.weights.inner();
    // SAFETY: the caller's.
    let x = unsafe { &*b.x.cast::<Eight>() };
    debug_assert_eq!(x.inner, inner);
    #[expect(clippy::large_stack_arrays, reason = "24 KiB, which are used at once")]
    let mut panels = [Panel::EMPTY; 2];
    let mut sums = vec![0f32; b.n * WIDE];
    let tiles = b.n.div_ceil(I::TOKENS).max(1);
    let tokens = b.n.div_ceil(tiles);
    for start in (0..b.out).step_by(WIDE) {
        let out = (b.out - start).min(WIDE);
        sums.fill(0.0);
        for at in (0..inner).step_by(CHUNK) {
            let len = (inner - at).min(CHUNK);
            for (p, panel) in panels.iter_mut().enumerate().take(out.div_ceil(LANES)) {
                let row = b.start + start + p * LANES;
                let columns = at / elements * bytes;
                let first = b.weights.data()[row * row_bytes + columns..].as_ptr();
                // The same share of the rows that come next.
                let next = first.wrapping_sub(columns).wrapping_add(WIDE * row_bytes + LANES * columns);
                let rows = Rows16 { first, stride: row_bytes, there: (out - p * LANES).min(LANES), blocks: len / elements, next };
                // SAFETY: the rows are there.
                unsafe { I::unpack(dtype, rows, panel) };
            }
            let mut row = 0;
            while row < b.n {
                let count = (b.n - row).min(tokens);
                let sums = sums[row * WIDE..].as_mut_ptr();
                // SAFETY: `count` rows of x and of sums are there.
                unsafe {
                    match count {
                        6 => tile::<I, 6, S>(b, x, &panels, [at, len, row, out], sums),
                        5 => tile::<I, 5, S>(b, x, &panels, [at, len, row, out], sums),
                        4 => tile::<I, 4, S>(b, x, &panels, [at, len, row, out], sums),
                        3 => tile::<I, 3, S>(b, x, &panels, [at, len, row, out], sums),
                        2 => tile::<I, 2, S>(b, x, &panels, [at, len, row, out], sums),
                        _ => tile::<I, 1, S>(b, x, &panels, [at, len, row, out], sums),
                    }
                }
                row += count;
            }
        }
        for (row, sums) in sums.chunks_exact(WIDE).enumerate() {
            // SAFETY: within the block's y.
            let y = unsafe { std::slice::from_raw_parts_mut(b.y.add(row * b.stride + start), out) };
            y.copy_from_slice(&sums[..out]);
        }
    }
}

#[inline(always)]
unsafe fn tile<I: Integers, const T: usize, const S: usize>(
    b: &Block<'_>,
    x: &Eight,
    panels: &[Panel; 2],
    [at, len, row, out]: [usize; 4],
    sums: *mut f32,
) {
    let mut columns = Columns::<T> { levels: [std::ptr::null(); T], scales: [std::ptr::null(); T], sums: [std::ptr::null(); T] };
    for i in 0..T {
        let row = match b.rows {
            Rows::All => b.row + row + i,
            Rows::Listed(rows) => rows[b.row + row + i] as usize,
        };
        let place = row * x.inner + at;
        columns.levels[i] = x.levels[place..].as_ptr();
        columns.scales[i] = x.scales[place / GROUP..].as_ptr();
        columns.sums[i] = x.sums[usize::from(S == GROUP)][place / S..].as_ptr();
    }
    // SAFETY: the caller's.
    unsafe { if out > LANES { I::tile::<2, T, S>(panels, len, columns, sums) } else { I::tile::<1, T, S>(panels, len, columns, sums) } }
}

/// Loops, which the compiler makes of them what it can.
pub(super) struct Plain;

impl Integers for Plain {
    const TOKENS: usize = 2;

    #[inline(always)]
    unsafe fn unpack(dtype: Dtype, rows: Rows16, panel: &mut Panel) {
        // SAFETY: the caller's.
        unsafe { unpack(dtype, rows, panel) }
    }

    #[inline(always)]
    unsafe fn tile<const P: usize, const T: usize, const S: usize>(panels: &[Panel; 2], len: usize, x: Columns<T>, sums: *mut f32) {
        for (p, panel) in panels.iter().enumerate().take(P) {
            for t in 0..T {
                // SAFETY: the caller's.
                let sums = unsafe { std::slice::from_raw_parts_mut(sums.add((2 * t + p) * LANES), LANES) };
                for sub in 0..len / S {
                    let mut dots = [0i32; LANES];
                    for four in 0..S / 4 {
                        // SAFETY: as above.
                        let x = unsafe { x.levels[t].add(sub * S + 4 * four).cast::<[i8; 4]>().read() };
                        let levels = &panel.levels[(sub * S / 4 + four) * 4 * LANES..][..4 * LANES];
                        for (dot, levels) in dots.iter_mut().zip(levels.as_chunks::<4>().0) {
                            for i in 0..4 {
                                *dot += i32::from(levels[i]) * i32::from(x[i]);
                            }
                        }
                    }
                    // SAFETY: as above.
                    let (scale, sum) = unsafe { (*x.scales[t].add(sub * S / GROUP), *x.sums[t].add(sub)) };
                    for lane in 0..LANES {
                        let place = sub * LANES + lane;
                        sums[lane] += dots[lane] as f32 * (panel.scales[place] * scale);
                        sums[lane] -= panel.minima[place] * sum;
                    }
                }
            }
        }
    }
}

/// # Safety
/// The rows are there.
#[inline(always)]
pub(super) unsafe fn unpack(dtype: Dtype, rows: Rows16, panel: &mut Panel) {
    let (elements, bytes) = dtype.block();
    let subs = elements / dtype.sub_block();
    let mut parts = Parts::default();
    for lane in 0..rows.there {
        for block in 0..rows.blocks {
            // SAFETY: the caller's.
            let data = unsafe { std::slice::from_raw_parts(rows.first.add(lane * rows.stride + block * bytes), bytes) };
            parts.of(dtype, data);
            for (four, levels) in parts.levels[..elements].as_chunks::<4>().0.iter().enumerate() {
                panel.levels[((block * elements / 4 + four) * LANES + lane) * 4..][..4].copy_from_slice(levels);
            }
            for sub in 0..subs {
                let place = (block * subs + sub) * LANES + lane;
                (panel.scales[place], panel.minima[place]) = (parts.scales[sub], parts.minima[sub]);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{
        super::product::{Element, Job, Operation, Weights, run},
        *,
    };

    const TYPES: [Dtype; 6] = [Dtype::Q4_0, Dtype::Q5_0, Dtype::Q8_0, Dtype::Q4K, Dtype::Q5K, Dtype::Q6K];

    fn numbers(len: usize, step: f32) -> Vec<f32> {
        (0..len).map(|i| (i as f32 * step).sin() + (i % 7) as f32 * 0.1).collect()
    }

    /// One byte off their alignment.
    fn stored(dtype: Dtype, values: &[f32], inner: usize) -> Vec<u8> {
        [&[0][..], &crate::blocks::encode(dtype, values, inner, None).unwrap()].concat()
    }

    fn product(kernels: Kernels, w: &[u8], dtype: Dtype, [out, inner]: [usize; 2], x: &[f32]) -> Vec<f32> {
        let mut y = vec![f32::NAN; x.len() / inner * out];
        let weights = Weights::new(&w[1..], Element::Blocks(dtype), out, inner).unwrap();
        run(kernels, vec![Job { operation: Operation::Linear(weights, None), x, rows: Rows::All, y: &mut y }]);
        y
    }

    #[test]
    fn products_of_every_type_and_size() {
        for [out, inner] in [[1, 256], [16, 512], [33, 768], [70, 1024], [300, 256], [40, 32], [17, 576]] {
            for dtype in TYPES.into_iter().filter(|dtype| inner % dtype.block().0 == 0) {
                let w = stored(dtype, &numbers(out * inner, 1.3), inner);
                let mut wide = vec![0.0; out * inner];
                crate::blocks::decode(dtype, &w[1..], &mut wide);
                for n in [1, 2, 5, 6, 7, 20, 200] {
                    let x = numbers(n * inner, 0.7);
                    let eight = Eight::of(&x, inner);
                    let rounded: Vec<f64> =
                        eight.levels.iter().enumerate().map(|(i, level)| f64::from(*level) * f64::from(eight.scales[i / GROUP])).collect();
                    let error = x.iter().zip(&rounded).map(|(x, rounded)| (f64::from(*x) - rounded).abs()).fold(0.0, f64::max);
                    assert!(error <= 0.5 * 1.7 / 127.0, "{error}");
                    for kernels in Kernels::available() {
                        let y = product(kernels, &w, dtype, [out, inner], &x);
                        for (i, y) in y.iter().enumerate() {
                            let (x, w) = (&rounded[i / out * inner..][..inner], &wide[i % out * inner..][..inner]);
                            let exact: f64 = x.iter().zip(w).map(|(x, w)| x * f64::from(*w)).sum();
                            assert!(
                                (f64::from(*y) - exact).abs() <= 1e-6 * inner as f64,
                                "{n} {out}x{inner} {dtype} {kernels:?}: {y} {exact}"
                            );
                        }
                    }
                }
            }
        }
    }

    #[test]
    fn neighbours_do_not_change_a_bit() {
        let (out, inner) = (70, 1280);
        let x = numbers(400 * inner, 0.7);
        for dtype in TYPES {
            let w = stored(dtype, &numbers(out * inner, 1.3), inner);
            for kernels in Kernels::available() {
                let together = product(kernels, &w, dtype, [out, inner], &x);
                for row in [0, 5, 191, 192, 399] {
                    let alone = product(kernels, &w, dtype, [out, inner], &x[row * inner..(row + 1) * inner]);
                    assert_eq!(alone, together[row * out..(row + 1) * out], "row {row} {dtype} {kernels:?}");
                }
            }
        }
    }

    /// Vectors unpack what loops unpack, to the bit, whatever the bytes.
    #[test]
    fn any_bytes_unpack_alike() {
        for dtype in TYPES {
            let (inner, (elements, size)) = (512, dtype.block());
            let mut bytes: Vec<u8> = (0..16 * dtype.bytes(inner)).map(|i| (i * 7919 + i / 7 * 31) as u8).collect();
            // f16 scales that are numbers
            for block in bytes.chunks_exact_mut(size) {
                let ends: &[usize] = if dtype == Dtype::Q6K {
                    &[209]
                } else if elements == 256 {
                    &[1, 3]
                } else {
                    &[1]
                };
                ends.iter().for_each(|at| block[*at] &= 0x3f);
            }
            let x = numbers(inner, 0.3);
            let plain = product(Kernels::Plain, &[&[0][..], &bytes].concat(), dtype, [16, inner], &x);
            for kernels in Kernels::available() {
                let y = product(kernels, &[&[0][..], &bytes].concat(), dtype, [16, inner], &x);
                for (y, plain) in y.iter().zip(&plain) {
                    assert!((y - plain).abs() <= 1e-5 * plain.abs().max(1.0), "{dtype} {kernels:?}: {y} {plain}");
                }
            }
        }
    }
}
