//! Products of weights in blocks for AVX-512 with VNNI, and for AVX2. What the bytes of a block mean is written once, over [`Lanes`].

#![allow(clippy::needless_range_loop, reason = "arrays that are indexed by constants are registers")]

use std::mem::MaybeUninit;

use super::{
    blocks::{self, Columns, GROUP, Integers, LANES, Panel, Rows16},
    product::Block,
    x86,
    x86_lanes::{Avx2, Avx512, From, Lanes},
};
use crate::weights::Dtype;

pub(super) fn has_avx512() -> bool {
    x86::has_avx512() && is_x86_feature_detected!("avx512vnni")
}

/// # Safety
/// [`has_avx512`], and as for [`blocks::multiply`]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c")]
pub(super) unsafe fn run_avx512(b: &Block<'_>, dtype: Dtype) {
    // SAFETY: the caller's promise.
    unsafe { blocks::block::<Avx512>(b, dtype) }
}

/// # Safety
/// [`x86::has_avx2`], and as for [`blocks::multiply`]
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) unsafe fn run_avx2(b: &Block<'_>, dtype: Dtype) {
    // SAFETY: the caller's promise.
    unsafe { blocks::block::<Avx2>(b, dtype) }
}

// SAFETY of everything below: callers promise the instructions and that what pointers point to is there; all accesses are unaligned.

/// Takes what is unpacked of a block: of each sub-block first the levels, then, in their order, scale and minimum.
trait Sink<L: Lanes> {
    /// Elements 4i to 4i + 3 of each row in vector i.
    unsafe fn levels<F: Format, const N: usize>(&mut self, sub: usize, levels: [L::Ints; N]);

    unsafe fn scale(&mut self, sub: usize, scale: L::Floats, minimum: L::Floats);

    /// The block, of so many sub-blocks of so many elements, is complete.
    unsafe fn next(&mut self, subs: usize, elements: usize);
}

/// The place of a block in a panel.
struct To {
    levels: *mut u8,
    scales: *mut f32,
    minima: *mut f32,
}

impl<L: Lanes> Sink<L> for To {
    #[inline(always)]
    unsafe fn levels<F: Format, const N: usize>(&mut self, sub: usize, levels: [L::Ints; N]) {
        unsafe {
            for i in 0..N {
                L::store_ints(self.levels.add((sub * N + i) * 4 * LANES), levels[i]);
            }
        }
    }

    #[inline(always)]
    unsafe fn scale(&mut self, sub: usize, scale: L::Floats, minimum: L::Floats) {
        unsafe {
            L::store(self.scales.add(sub * LANES), scale);
            L::store(self.minima.add(sub * LANES), minimum);
        }
    }

    #[inline(always)]
    unsafe fn next(&mut self, subs: usize, elements: usize) {
        unsafe {
            self.levels = self.levels.add(subs * elements * LANES);
            self.scales = self.scales.add(subs * LANES);
            self.minima = self.minima.add(subs * LANES);
        }
    }
}

/// Multiplies with T rows of x at once.
struct Products<L: Lanes, const T: usize, const S: usize> {
    /// from the block's column on
    x: Columns<T>,
    /// of the sub-blocks that wait for their scales; the others are of no meaning, and are not cleared for each sixteen rows of weights
    dots: [[MaybeUninit<L::Ints>; T]; 16],
    totals: [L::Floats; T],
}

impl<L: Lanes, const T: usize, const S: usize> Sink<L> for Products<L, T, S> {
    #[inline(always)]
    unsafe fn levels<F: Format, const N: usize>(&mut self, sub: usize, levels: [L::Ints; N]) {
        unsafe {
            let mut dots = [L::zero(); T];
            for i in 0..N {
                for t in 0..T {
                    let x = self.x.levels[t].add(sub * S + 4 * i).cast::<i32>().read_unaligned();
                    dots[t] = L::dot(F::DTYPE, dots[t], levels[i], x);
                }
            }
            self.dots[sub] = dots.map(MaybeUninit::new);
        }
    }

    #[inline(always)]
    unsafe fn scale(&mut self, sub: usize, scale: L::Floats, minimum: L::Floats) {
        unsafe {
            for t in 0..T {
                let scale = L::mul(scale, L::splat(*self.x.scales[t].add(sub * S / GROUP)));
                let total = L::mul_add(L::floats(self.dots[sub][t].assume_init()), scale, self.totals[t]);
                self.totals[t] = L::mul_sub(minimum, L::splat(*self.x.sums[t].add(sub)), total);
            }
        }
    }

    #[inline(always)]
    unsafe fn next(&mut self, subs: usize, elements: usize) {
        unsafe {
            for t in 0..T {
                self.x.levels[t] = self.x.levels[t].add(subs * elements);
                self.x.scales[t] = self.x.scales[t].add(subs * elements / GROUP);
                self.x.sums[t] = self.x.sums[t].add(subs);
            }
        }
    }
}

/// What a type's blocks are.
trait Format {
    const DTYPE: Dtype;

    unsafe fn unpack<L: Lanes, S: Sink<L>>(from: From, to: &mut S);
}

struct Q4Of32;
struct Q5Of32;
struct Q8Of32;
struct K<const FIFTH: bool>;
struct Q6Of256;

const LOW: i32 = 0x0f0f_0f0f;

impl Format for Q4Of32 {
    const DTYPE: Dtype = Dtype::Q4_0;

    #[inline(always)]
    unsafe fn unpack<L: Lanes, S: Sink<L>>(from: From, to: &mut S) {
        unsafe {
            from.fetch::<L>(0, 1, 18);
            let halves = L::columns(from.at(2));
            let mut levels = [L::zero(); 8];
            for i in 0..4 {
                levels[i] = L::and(halves[i], LOW);
                levels[4 + i] = L::and(L::right(halves[i], 4), LOW);
            }
            to.levels::<Self, 8>(0, levels);
            one_scale::<L, S>(to, from, 8.0);
        }
    }
}

/// The one scale, at the beginning, of a type whose level `zero` means 0.
#[inline(always)]
unsafe fn one_scale<L: Lanes, S: Sink<L>>(to: &mut S, from: From, zero: f32) {
    unsafe {
        let d = L::one_half(from);
        to.scale(0, d, L::mul(d, L::splat(zero)));
    }
}

impl Format for Q5Of32 {
    const DTYPE: Dtype = Dtype::Q5_0;

    #[inline(always)]
    unsafe fn unpack<L: Lanes, S: Sink<L>>(from: From, to: &mut S) {
        unsafe {
            from.fetch::<L>(0, 1, 22);
            let fifth = L::columns(from.at(2))[0];
            let halves = L::columns(from.at(6));
            let mut levels = [L::zero(); 8];
            for i in 0..8 {
                // Four bits, one to each byte.
                let bits = L::and(L::right(fifth, 4 * i as i32), 15);
                let bits = L::and(L::times(bits, 0x0020_4081), 0x0101_0101);
                let half = L::and(L::right(halves[i % 4], 4 * (i / 4) as i32), LOW);
                levels[i] = L::or(half, L::left(bits, 4));
            }
            to.levels::<Self, 8>(0, levels);
            one_scale::<L, S>(to, from, 16.0);
        }
    }
}

impl Format for Q8Of32 {
    const DTYPE: Dtype = Dtype::Q8_0;

    #[inline(always)]
    unsafe fn unpack<L: Lanes, S: Sink<L>>(from: From, to: &mut S) {
        unsafe {
            let mut levels = [L::zero(); 8];
            for half in 0..2 {
                from.fetch::<L>(half, 2, 34);
                let columns = L::columns(from.at(2 + 16 * half));
                for i in 0..4 {
                    levels[4 * half + i] = L::xor(columns[i], 0x8080_8080u32.cast_signed());
                }
            }
            to.levels::<Self, 8>(0, levels);
            one_scale::<L, S>(to, from, 128.0);
        }
    }
}

impl<const FIFTH: bool> Format for K<FIFTH> {
    const DTYPE: Dtype = if FIFTH { Dtype::Q5K } else { Dtype::Q4K };

    #[inline(always)]
    unsafe fn unpack<L: Lanes, S: Sink<L>>(from: From, to: &mut S) {
        const SIX: i32 = 0x3f3f_3f3f;
        const UPPER: i32 = 0x3030_3030;
        unsafe {
            let [both, low_scales, low_minima, high] = L::columns(from);
            let packed = [
                [L::and(low_scales, SIX), L::and(low_minima, SIX)],
                [
                    L::or(L::and(high, LOW), L::and(L::right(low_scales, 2), UPPER)),
                    L::or(L::and(L::right(high, 4), LOW), L::and(L::right(low_minima, 2), UPPER)),
                ],
            ];
            let mut fifth = [L::zero(); 8];
            if FIFTH {
                let (first, second) = (L::columns(from.at(16)), L::columns(from.at(32)));
                for i in 0..4 {
                    (fifth[i], fifth[4 + i]) = (first[i], second[i]);
                }
            }
            let scales = [L::halves(both), L::halves(L::right(both, 16))];
            let block = OfK::<L> { from, scales, packed, fifth };
            block.pair::<FIFTH, 0, S>(to);
            block.pair::<FIFTH, 1, S>(to);
            block.pair::<FIFTH, 2, S>(to);
            block.pair::<FIFTH, 3, S>(to);
        }
    }
}

/// A block of `Q4_K` or `Q5_K` whose scales have been read.
#[derive(Clone, Copy)]
struct OfK<L: Lanes> {
    from: From,
    /// d and dmin
    scales: [L::Floats; 2],
    /// scales and minima of sub-blocks 0 to 3, a byte each, and of 4 to 7
    packed: [[L::Ints; 2]; 2],
    fifth: [L::Ints; 8],
}

impl<L: Lanes> OfK<L> {
    /// Two sub-blocks. Which two they are is known to the compiler, which then shifts by constants and keeps nothing in memory.
    #[inline(always)]
    unsafe fn pair<const FIFTH: bool, const PAIR: usize, S: Sink<L>>(self, to: &mut S) {
        unsafe {
            self.from.fetch::<L>(PAIR, 4, if FIFTH { 176 } else { 144 });
            let (mut low, mut high) = ([L::zero(); 8], [L::zero(); 8]);
            for part in 0..2 {
                let columns = L::columns(self.from.at(if FIFTH { 48 } else { 16 } + 32 * PAIR + 16 * part));
                for i in 0..4 {
                    let four = 4 * part + i;
                    (low[four], high[four]) = (L::and(columns[i], LOW), L::and(L::right(columns[i], 4), LOW));
                    if FIFTH {
                        let bits = L::right(self.fifth[four], 2 * PAIR as i32);
                        low[four] = L::or(low[four], L::left(L::and(bits, 0x0101_0101), 4));
                        high[four] = L::or(high[four], L::left(L::and(L::right(bits, 1), 0x0101_0101), 4));
                    }
                }
            }
            to.levels::<K<FIFTH>, 8>(2 * PAIR, low);
            to.levels::<K<FIFTH>, 8>(2 * PAIR + 1, high);
            for sub in 2 * PAIR..2 * PAIR + 2 {
                let [scale, minimum] = self.packed[sub / 4];
                let bits = 8 * (sub % 4) as i32;
                let scale = L::floats(L::and(L::right(scale, bits), 63));
                let minimum = L::floats(L::and(L::right(minimum, bits), 63));
                to.scale(sub, L::mul(self.scales[0], scale), L::mul(self.scales[1], minimum));
            }
        }
    }
}

impl Format for Q6Of256 {
    const DTYPE: Dtype = Dtype::Q6K;

    #[inline(always)]
    unsafe fn unpack<L: Lanes, S: Sink<L>>(from: From, to: &mut S) {
        unsafe {
            let d = L::one_half(from.at(208));
            let scales = L::columns(from.at(192));
            half_of_q6_k::<0, L, S>(from, d, scales, to);
            half_of_q6_k::<1, L, S>(from, d, scales, to);
        }
    }
}

/// Sub-blocks 8 `HALF` to 8 `HALF` + 7.
#[inline(always)]
unsafe fn half_of_q6_k<const HALF: usize, L: Lanes, S: Sink<L>>(from: From, d: L::Floats, scales: [L::Ints; 4], to: &mut S) {
    unsafe {
        for part in 0..2 {
            from.fetch::<L>(2 * HALF + part, 4, 210);
            let pairs = L::columns(from.at(128 + 32 * HALF + 16 * part));
            for odd in 0..2 {
                let halves = L::columns(from.at(64 * HALF + 32 * odd + 16 * part));
                for high in 0..2 {
                    let run = odd + 2 * high;
                    let mut levels = [L::zero(); 4];
                    for i in 0..4 {
                        let low = L::and(L::right(halves[i], 4 * high as i32), LOW);
                        let upper = L::and(L::right(pairs[i], 2 * run as i32), 0x0303_0303);
                        levels[i] = L::or(low, L::left(upper, 4));
                    }
                    to.levels::<Q6Of256, 4>(8 * HALF + 2 * run + part, levels);
                }
            }
        }
        for sub in 8 * HALF..8 * HALF + 8 {
            let scale = L::signed_right(L::left(scales[sub / 4], 24 - 8 * (sub % 4) as i32), 24);
            let scale = L::mul(d, L::floats(scale));
            to.scale(sub, scale, L::mul(scale, L::splat(32.0)));
        }
    }
}

macro_rules! integers {
    ($lanes:ident, $module:ident, $features:literal, $tokens:literal, $few:literal) => {
        mod $module {
            use super::{Dtype, Format, From, K, Q4Of32, Q5Of32, Q6Of256, Q8Of32, Sink, $lanes};

            #[target_feature(enable = $features)]
            pub(super) unsafe fn unpack<S: Sink<$lanes>>(dtype: Dtype, from: From, blocks: usize, to: &mut S) {
                unsafe {
                    match dtype {
                        Dtype::Q4_0 => each::<Q4Of32, S>(from, blocks, to),
                        Dtype::Q5_0 => each::<Q5Of32, S>(from, blocks, to),
                        Dtype::Q8_0 => each::<Q8Of32, S>(from, blocks, to),
                        Dtype::Q4K => each::<K<false>, S>(from, blocks, to),
                        Dtype::Q5K => each::<K<true>, S>(from, blocks, to),
                        _ => each::<Q6Of256, S>(from, blocks, to),
                    }
                }
            }

            #[target_feature(enable = $features)]
            unsafe fn each<F: Format, S: Sink<$lanes>>(from: From, blocks: usize, to: &mut S) {
                let ((elements, bytes), sub) = (F::DTYPE.block(), F::DTYPE.sub_block());
                for block in 0..blocks {
                    unsafe {
                        one::<F, S>(from.at(block * bytes), to);
                        to.next(elements / sub, sub);
                    }
                }
            }

            // Inlined into the loop it becomes dozens of pointers that step along on the stack: half the speed. (rustc heeds this at calls from
            // functions for the same instructions only.)
            #[inline(never)]
            #[target_feature(enable = $features)]
            unsafe fn one<F: Format, S: Sink<$lanes>>(from: From, to: &mut S) {
                unsafe { F::unpack::<$lanes, S>(from, to) }
            }
        }

        impl Integers for $lanes {
            const TOKENS: usize = $tokens;
            const FEW: usize = $few;

            #[inline(always)]
            unsafe fn unpack(dtype: Dtype, rows: Rows16, panel: &mut Panel) {
                unsafe {
                    if rows.there < LANES {
                        return blocks::unpack(dtype, rows, panel);
                    }
                    for lane in (0..LANES).step_by(<$lanes>::ROWS) {
                        let from = From { data: rows.first.add(lane * rows.stride), stride: rows.stride };
                        let levels = panel.levels.as_mut_ptr().add(4 * lane);
                        let (scales, minima) = (panel.scales.as_mut_ptr().add(lane), panel.minima.as_mut_ptr().add(lane));
                        $module::unpack(dtype, from, rows.blocks, &mut To { levels, scales, minima });
                    }
                }
            }

            #[inline(always)]
            unsafe fn few<const T: usize, const S: usize>(dtype: Dtype, rows: Rows16, x: Columns<T>, sums: &mut [[f32; LANES]; T]) {
                unsafe {
                    for lane in (0..LANES).step_by(<$lanes>::ROWS) {
                        let from = From { data: rows.first.add(lane * rows.stride), stride: rows.stride };
                        let dots = [[MaybeUninit::uninit(); T]; 16];
                        let mut products = Products::<$lanes, T, S> { x, dots, totals: [<$lanes>::splat(0.0); T] };
                        $module::unpack(dtype, from, rows.blocks, &mut products);
                        for t in 0..T {
                            <$lanes>::store(sums[t].as_mut_ptr().add(lane), products.totals[t]);
                        }
                    }
                }
            }

            #[inline(always)]
            unsafe fn tile<const P: usize, const T: usize, const S: usize>(
                dtype: Dtype,
                panels: &[Panel; 2],
                len: usize,
                x: Columns<T>,
                sums: *mut f32,
            ) {
                unsafe { tile::<$lanes, P, T, S>(dtype, panels, len, x, sums) }
            }
        }
    };
}

integers!(Avx512, avx512, "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c", 6, 8);
integers!(Avx2, avx2, "avx2,fma,f16c", 4, 4);

/// As [`Integers::tile`].
#[inline(always)]
unsafe fn tile<L: Lanes, const P: usize, const T: usize, const S: usize>(
    dtype: Dtype,
    panels: &[Panel; 2],
    len: usize,
    x: Columns<T>,
    sums: *mut f32,
) {
    unsafe {
        if L::ROWS < LANES {
            // As many sums as there are registers for.
            for p in 0..P {
                for lane in (0..LANES).step_by(L::ROWS) {
                    lanes::<L, 1, T, S>(dtype, [&panels[p]], [lane, len], x, sums.add(p * LANES + lane));
                }
            }
        } else if P == 2 {
            lanes::<L, 2, T, S>(dtype, [&panels[0], &panels[1]], [0, len], x, sums);
        } else {
            lanes::<L, 1, T, S>(dtype, [&panels[0]], [0, len], x, sums);
        }
    }
}

#[inline(always)]
unsafe fn lanes<L: Lanes, const P: usize, const T: usize, const S: usize>(
    dtype: Dtype,
    panels: [&Panel; P],
    [lane, len]: [usize; 2],
    x: Columns<T>,
    sums: *mut f32,
) {
    unsafe {
        let mut totals = [[L::splat(0.0); T]; P];
        for p in 0..P {
            for t in 0..T {
                totals[p][t] = L::load(sums.add((2 * t + p) * LANES));
            }
        }
        for sub in 0..len / S {
            let mut dots = [[L::zero(); T]; P];
            for four in 0..S / 4 {
                let at = ((sub * S / 4 + four) * LANES + lane) * 4;
                let mut levels = [L::zero(); P];
                for p in 0..P {
                    levels[p] = L::load_ints(panels[p].levels.as_ptr().add(at));
                }
                for t in 0..T {
                    let x = x.levels[t].add(sub * S + 4 * four).cast::<i32>().read_unaligned();
                    for p in 0..P {
                        dots[p][t] = L::dot(dtype, dots[p][t], levels[p], x);
                    }
                }
            }
            for p in 0..P {
                let scales = L::load(panels[p].scales.as_ptr().add(sub * LANES + lane));
                let minima = L::load(panels[p].minima.as_ptr().add(sub * LANES + lane));
                for t in 0..T {
                    let scale = L::mul(scales, L::splat(*x.scales[t].add(sub * S / GROUP)));
                    let total = L::mul_add(L::floats(dots[p][t]), scale, totals[p][t]);
                    totals[p][t] = L::mul_sub(minima, L::splat(*x.sums[t].add(sub)), total);
                }
            }
        }
        for p in 0..P {
            for t in 0..T {
                L::store(sums.add((2 * t + p) * LANES), totals[p][t]);
            }
        }
    }
}
