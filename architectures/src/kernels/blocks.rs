//! Products of weights in ggml's blocks with rows of x in eight bits, scaled for every 32 of them.
//!
//! A lane is a row of weights, so no sum crosses lanes and scales are whole vectors. Whatever the type, weight = scale level - minimum with
//! levels from 0 to 255, so one inner loop serves all: the levels' products with x are exact integers, and
//! y = sum over sub-blocks of scale (scale of x) (levels . x) - minimum (sum of x). These sums run along the inner dimension for any number of
//! rows and any kind of instructions.
//!
//! With few rows of x the levels of sixteen rows are multiplied as they are unpacked, in registers; with more they go into a [`Panel`], which stays
//! in the first-level cache while all rows of x pass by.

use super::{
    Kernels, parallel,
    product::{Block, Rows},
    simd::{Kernel, ROUND, Simd},
};
use crate::{blocks::Parts, weights::Dtype};

/// Rows of weights in a panel.
pub(super) const LANES: usize = 16;
/// Inner elements in a panel: a whole number of blocks of any type.
pub(super) const CHUNK: usize = 512;
/// Bytes by which each row of weights is fetched ahead.
#[cfg(target_arch = "x86_64")]
pub(super) const AHEAD: usize = 768;
/// Elements of x that share a scale.
pub(super) const GROUP: usize = 32;
/// Elements of x that are worth a parallel loop.
const MANY: usize = 1 << 12;
/// With more rows of x than this the products, not the weights, are what takes time.
const FAR: usize = 16;
/// The sign of an f32.
const SIGN: u32 = 1 << 31;

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
    pub fn of(kernels: Kernels, x: &[f32], inner: usize) -> Self {
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
            // SAFETY: as above.
            let eight = unsafe { &mut *shared.at() };
            let [halves, sums] = &mut eight.sums;
            let groups = row * inner / GROUP..(row + 1) * inner / GROUP;
            kernels.run(Quantise {
                x: &x[row * inner..][..inner],
                levels: &mut eight.levels[row * inner..][..inner],
                scales: &mut eight.scales[groups.clone()],
                halves: &mut halves[2 * groups.start..2 * groups.end],
                sums: &mut sums[groups],
            });
        };
        let rows = x.len() / inner;
        if x.len() < MANY {
            (0..rows).for_each(row);
        } else {
            parallel(rows, row);
        }
        eight
    }
}

/// A row's part of [`Eight`].
struct Quantise<'a> {
    x: &'a [f32],
    levels: &'a mut [i8],
    scales: &'a mut [f32],
    halves: &'a mut [f32],
    sums: &'a mut [f32],
}

impl Kernel for Quantise<'_> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        let groups = self.x.as_chunks::<GROUP>().0.iter().zip(self.levels.as_chunks_mut::<GROUP>().0);
        // SAFETY: the CPU has the instructions.
        let (one, zero) = unsafe { (S::splat(1.0), S::splat(0.0)) };
        for (group, (x, levels)) in groups.enumerate() {
            // Of numbers without a sign the bits have the same order, and the largest of integers is found in any order.
            let mut max = 0;
            for x in x {
                max = max.max(x.to_bits() & !SIGN);
            }
            let max = f32::from_bits(max);
            let (scale, inverse) = if max > 0.0 { (max / 127.0, 127.0 / max) } else { (0.0, 0.0) };
            let mut whole = [0i32; GROUP];
            for (whole, x) in whole.iter_mut().zip(x) {
                // What ROUND has rounded stands in the low bits.
                *whole = (x * inverse + ROUND).to_bits().wrapping_sub(ROUND.to_bits()).cast_signed();
            }
            for (level, whole) in levels.iter_mut().zip(&whole) {
                *level = *whole as i8;
            }
            // Once more in f32, where sums of so small numbers are exact: integers would be taken out of their vectors one by one.
            let mut sums = [zero; 4];
            for (sum, x) in sums.iter_mut().zip(x.as_chunks::<16>().0) {
                for at in (0..16).step_by(S::LANES) {
                    // SAFETY: the CPU has the instructions, and so many elements follow.
                    unsafe {
                        let scaled = S::mul_add(S::load(x[at..].as_ptr()), S::splat(inverse), zero);
                        let whole = S::mul_add(one, S::mul_add(one, scaled, S::splat(ROUND)), S::splat(-ROUND));
                        *sum = S::mul_add(one, whole, *sum);
                    }
                }
            }
            // SAFETY: the CPU has the instructions.
            let [first, second, ..] = unsafe { S::sums(sums) };
            self.scales[group] = scale;
            self.halves[2 * group] = scale * first;
            self.halves[2 * group + 1] = scale * second;
            self.sums[group] = scale * (first + second);
        }
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
    /// With at most so many rows of x, eight at the most, what is unpacked of weights is multiplied in registers.
    const FEW: usize;

    /// Products of sixteen rows of weights, which are all there, with T rows of x: what `tile` adds up from panels, to the bit.
    unsafe fn few<const T: usize, const S: usize>(_: Dtype, _: Rows16, _: Columns<T>, _: &mut [[f32; LANES]; T]) {}

    unsafe fn unpack(dtype: Dtype, rows: Rows16, panel: &mut Panel);

    /// Adds to `sums` [T][P][16] the products of the panels' first `len` elements, in sub-blocks of `S`, with T rows of x.
    /// The levels are those of `dtype`.
    unsafe fn tile<const P: usize, const T: usize, const S: usize>(
        dtype: Dtype,
        panels: &[Panel; 2],
        len: usize,
        x: Columns<T>,
        sums: *mut f32,
    );
}

/// As [`Block`] promises; its x is an [`Eight`] with as many inner elements as the weights, which are blocks of `dtype`.
pub(super) unsafe fn multiply(kernels: Kernels, b: &Block<'_>, dtype: Dtype) {
    // SAFETY: the caller's promise, and the CPU has what is asked for.
    unsafe {
        match kernels {
            Kernels::Plain => block::<Plain>(b, dtype),
            #[cfg(target_arch = "x86_64")]
            _ if kernels != Kernels::Avx2 && super::x86_blocks::has_avx512() => super::x86_blocks::run_avx512(b, dtype),
            #[cfg(target_arch = "x86_64")]
            _ if super::x86::has_avx2() => super::x86_blocks::run_avx2(b, dtype),
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

/// Up to sixteen rows of a block of weights, a lane each.
#[derive(Clone, Copy)]
pub(super) struct Group {
    /// the first of them in the block
    pub start: usize,
    /// how far one is from the next
    pub apart: usize,
    /// how many
    pub there: usize,
}

impl Group {
    /// All rows of a block of so many. Those of a group lie as far apart as can be: each lane then is a long stream through memory of its own,
    /// which CPUs foresee.
    pub fn all(out: usize, n: usize) -> Vec<Self> {
        let whole = out / LANES;
        let rest = Self { start: whole * LANES, apart: 1, there: out % LANES };
        let group =
            |i| if n > FAR { Self { start: i * LANES, apart: 1, there: LANES } } else { Self { start: i, apart: whole, there: LANES } };
        (0..whole).map(group).chain((rest.there > 0).then_some(rest)).collect()
    }

    /// `len` elements of each row from `at` on.
    fn rows(self, b: &Block<'_>, dtype: Dtype, at: usize, len: usize) -> Rows16 {
        let ((elements, bytes), row_bytes) = (dtype.block(), b.weights.row_bytes());
        let first = b.weights.data()[(b.start + self.start) * row_bytes + at / elements * bytes..].as_ptr();
        Rows16 { first, stride: self.apart * row_bytes, there: self.there, blocks: len / elements }
    }

    /// Writes the sums [..][16] of the block's rows of x from `row` on, `wide` elements apart.
    ///
    /// # Safety
    /// As the block promises.
    pub unsafe fn write(self, b: &Block<'_>, row: usize, sums: &[f32], wide: usize) {
        for (row, sums) in (row..).zip(sums.chunks(wide)) {
            // SAFETY: the caller's.
            unsafe {
                let y = b.y.add(row * b.stride + self.start);
                match sums.first_chunk::<LANES>() {
                    Some(sums) if self.apart == 1 && self.there == LANES => y.cast::<[f32; LANES]>().write_unaligned(*sums),
                    _ => sums[..self.there].iter().enumerate().for_each(|(lane, sum)| *y.add(lane * self.apart) = *sum),
                }
            }
        }
    }
}

/// `S` elements of a row of weights share a scale.
#[inline(always)]
unsafe fn block_of<I: Integers, const S: usize>(b: &Block<'_>, dtype: Dtype) {
    // SAFETY: the caller's.
    let x = unsafe { &*b.x.cast::<Eight>() };
    debug_assert_eq!(x.inner, b.weights.inner());
    let groups = Group::all(b.out, b.n);
    let whole = groups.partition_point(|group| b.n <= I::FEW && group.there == LANES);
    for group in &groups[..whole] {
        // SAFETY: the caller's; there are as many rows of x.
        unsafe {
            match b.n {
                8 if I::FEW >= 8 => few::<I, 8, S>(b, x, dtype, *group),
                7 if I::FEW >= 7 => few::<I, 7, S>(b, x, dtype, *group),
                6 if I::FEW >= 6 => few::<I, 6, S>(b, x, dtype, *group),
                5 if I::FEW >= 5 => few::<I, 5, S>(b, x, dtype, *group),
                4 => few::<I, 4, S>(b, x, dtype, *group),
                3 => few::<I, 3, S>(b, x, dtype, *group),
                2 => few::<I, 2, S>(b, x, dtype, *group),
                _ => few::<I, 1, S>(b, x, dtype, *group),
            }
        }
    }
    if whole < groups.len() {
        // SAFETY: the caller's.
        unsafe { many::<I, S>(b, x, dtype, &groups[whole..]) };
    }
}

/// Sixteen rows of weights and all T rows of x, whose sums stay in registers.
#[inline(always)]
unsafe fn few<I: Integers, const T: usize, const S: usize>(b: &Block<'_>, x: &Eight, dtype: Dtype, group: Group) {
    let mut sums = [[0f32; LANES]; T];
    // SAFETY: the caller's.
    unsafe {
        I::few::<T, S>(dtype, group.rows(b, dtype, 0, x.inner), columns::<T, S>(b, x, 0, 0), &mut sums);
        group.write(b, 0, sums.as_flattened(), LANES);
    }
}

/// Panels of two groups at a time, which all rows of x pass by.
#[inline(always)]
unsafe fn many<I: Integers, const S: usize>(b: &Block<'_>, x: &Eight, dtype: Dtype, groups: &[Group]) {
    const WIDE: usize = 2 * LANES;
    #[expect(clippy::large_stack_arrays, reason = "24 KiB, which are used at once")]
    let mut panels = [Panel::EMPTY; 2];
    let mut sums = vec![0f32; b.n * WIDE];
    let tiles = b.n.div_ceil(I::TOKENS).max(1);
    let tokens = b.n.div_ceil(tiles);
    for groups in groups.chunks(2) {
        sums.fill(0.0);
        for at in (0..x.inner).step_by(CHUNK) {
            let len = (x.inner - at).min(CHUNK);
            for (group, panel) in groups.iter().zip(&mut panels) {
                // SAFETY: the rows are there.
                unsafe { I::unpack(dtype, group.rows(b, dtype, at, len), panel) };
            }
            let mut row = 0;
            while row < b.n {
                let count = (b.n - row).min(tokens);
                let sums = sums[row * WIDE..].as_mut_ptr();
                let place = [at, len, row, groups.len()];
                // SAFETY: `count` rows of x and of sums are there.
                unsafe {
                    match count {
                        6 => tile::<I, 6, S>(b, x, dtype, &panels, place, sums),
                        5 => tile::<I, 5, S>(b, x, dtype, &panels, place, sums),
                        4 => tile::<I, 4, S>(b, x, dtype, &panels, place, sums),
                        3 => tile::<I, 3, S>(b, x, dtype, &panels, place, sums),
                        2 => tile::<I, 2, S>(b, x, dtype, &panels, place, sums),
                        _ => tile::<I, 1, S>(b, x, dtype, &panels, place, sums),
                    }
                }
                row += count;
            }
        }
        for (p, group) in groups.iter().enumerate() {
            // SAFETY: the caller's.
            unsafe { group.write(b, 0, &sums[p * LANES..], WIDE) };
        }
    }
}

#[inline(always)]
unsafe fn tile<I: Integers, const T: usize, const S: usize>(
    b: &Block<'_>,
    x: &Eight,
    dtype: Dtype,
    panels: &[Panel; 2],
    [at, len, row, count]: [usize; 4],
    sums: *mut f32,
) {
    let columns = columns::<T, S>(b, x, row, at);
    // SAFETY: the caller's.
    unsafe {
        if count > 1 {
            I::tile::<2, T, S>(dtype, panels, len, columns, sums);
        } else {
            I::tile::<1, T, S>(dtype, panels, len, columns, sums);
        }
    }
}

/// Of T rows of the block's x from `row` on, elements from `at` on.
#[inline(always)]
fn columns<const T: usize, const S: usize>(b: &Block<'_>, x: &Eight, row: usize, at: usize) -> Columns<T> {
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
    columns
}

/// Loops, which the compiler makes of them what it can.
pub(super) struct Plain;

impl Integers for Plain {
    const TOKENS: usize = 2;
    const FEW: usize = 0;

    #[inline(always)]
    unsafe fn unpack(dtype: Dtype, rows: Rows16, panel: &mut Panel) {
        // SAFETY: the caller's.
        unsafe { unpack(dtype, rows, panel) }
    }

    #[inline(always)]
    unsafe fn tile<const P: usize, const T: usize, const S: usize>(
        _: Dtype,
        panels: &[Panel; 2],
        len: usize,
        x: Columns<T>,
        sums: *mut f32,
    ) {
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
                    let eight = Eight::of(Kernels::Plain, &x, inner);
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
                for (row, n) in
                    [(0, 1), (5, 1), (190, 2), (7, 3), (200, 4), (33, 5), (50, 6), (70, 7), (90, 8), (33, 9), (60, 16), (80, 17), (399, 1)]
                {
                    let alone = product(kernels, &w, dtype, [out, inner], &x[row * inner..(row + n) * inner]);
                    assert_eq!(alone, together[row * out..(row + n) * out], "row {row} of {n} {dtype} {kernels:?}");
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
