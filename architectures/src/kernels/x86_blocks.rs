//! Products of weights in blocks for AVX-512 with VNNI, and for AVX2.

#![allow(clippy::needless_range_loop, reason = "arrays that are indexed by constants are registers")]

use std::arch::x86_64 as arch;

use super::{
    blocks::{self, Columns, GROUP, Integers, LANES, Panel, Rows16},
    product::Block,
    x86,
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

struct Avx512;

impl Integers for Avx512 {
    const TOKENS: usize = 6;

    #[inline(always)]
    unsafe fn unpack(dtype: Dtype, rows: Rows16, panel: &mut Panel) {
        unsafe {
            if rows.there < LANES {
                return blocks::unpack(dtype, rows, panel);
            }
            let (elements, bytes) = dtype.block();
            let subs = elements / dtype.sub_block();
            let mut fetched = 0;
            for block in 0..rows.blocks {
                while fetched < (block + 1) * bytes * LANES {
                    arch::_mm_prefetch::<{ arch::_MM_HINT_T0 }>(rows.next.wrapping_add(fetched).cast());
                    fetched += 64;
                }
                let from = From { data: rows.first.add(block * bytes), stride: rows.stride };
                let to = To {
                    levels: panel.levels.as_mut_ptr().add(block * elements * LANES),
                    scales: panel.scales.as_mut_ptr().add(block * subs * LANES),
                    minima: panel.minima.as_mut_ptr().add(block * subs * LANES),
                };
                match dtype {
                    Dtype::Q4_0 => q4_0(from, to),
                    Dtype::Q5_0 => q5_0(from, to),
                    Dtype::Q8_0 => q8_0(from, to),
                    Dtype::Q4K => k::<false>(from, to),
                    Dtype::Q5K => k::<true>(from, to),
                    _ => q6_k(from, to),
                }
            }
        }
    }

    #[inline(always)]
    unsafe fn tile<const P: usize, const T: usize, const S: usize>(panels: &[Panel; 2], len: usize, x: Columns<T>, sums: *mut f32) {
        unsafe {
            let mut totals = [[arch::_mm512_setzero_ps(); T]; P];
            for p in 0..P {
                for t in 0..T {
                    totals[p][t] = arch::_mm512_loadu_ps(sums.add((2 * t + p) * LANES));
                }
            }
            for sub in 0..len / S {
                let mut dots = [[arch::_mm512_setzero_si512(); T]; P];
                for four in 0..S / 4 {
                    let at = (sub * S / 4 + four) * 4 * LANES;
                    let mut levels = [arch::_mm512_setzero_si512(); P];
                    for p in 0..P {
                        levels[p] = arch::_mm512_load_si512(panels[p].levels.as_ptr().add(at).cast());
                    }
                    for t in 0..T {
                        let x = arch::_mm512_set1_epi32(x.levels[t].add(sub * S + 4 * four).cast::<i32>().read_unaligned());
                        for p in 0..P {
                            dots[p][t] = arch::_mm512_dpbusd_epi32(dots[p][t], levels[p], x);
                        }
                    }
                }
                for p in 0..P {
                    let scales = arch::_mm512_load_ps(panels[p].scales.as_ptr().add(sub * LANES));
                    let minima = arch::_mm512_load_ps(panels[p].minima.as_ptr().add(sub * LANES));
                    for t in 0..T {
                        let scale = arch::_mm512_mul_ps(scales, arch::_mm512_set1_ps(*x.scales[t].add(sub * S / GROUP)));
                        let total = arch::_mm512_fmadd_ps(arch::_mm512_cvtepi32_ps(dots[p][t]), scale, totals[p][t]);
                        totals[p][t] = arch::_mm512_fnmadd_ps(minima, arch::_mm512_set1_ps(*x.sums[t].add(sub)), total);
                    }
                }
            }
            for p in 0..P {
                for t in 0..T {
                    arch::_mm512_storeu_ps(sums.add((2 * t + p) * LANES), totals[p][t]);
                }
            }
        }
    }
}

/// A block of each of sixteen rows.
#[derive(Clone, Copy)]
struct From {
    data: *const u8,
    stride: usize,
}

impl From {
    #[inline(always)]
    fn at(self, offset: usize) -> Self {
        Self { data: self.data.wrapping_add(offset), stride: self.stride }
    }

    /// Sixteen bytes of each row; vector i holds each row's bytes 4i to 4i + 3.
    #[inline(always)]
    unsafe fn columns(self) -> [arch::__m512i; 4] {
        unsafe {
            let (a, b, c, d) = (self.four(0), self.four(1), self.four(2), self.four(3));
            let (ab, cd) = (arch::_mm512_unpacklo_epi32(a, b), arch::_mm512_unpacklo_epi32(c, d));
            let (ab_high, cd_high) = (arch::_mm512_unpackhi_epi32(a, b), arch::_mm512_unpackhi_epi32(c, d));
            [
                arch::_mm512_unpacklo_epi64(ab, cd),
                arch::_mm512_unpackhi_epi64(ab, cd),
                arch::_mm512_unpacklo_epi64(ab_high, cd_high),
                arch::_mm512_unpackhi_epi64(ab_high, cd_high),
            ]
        }
    }

    /// Sixteen bytes of rows r, r + 4, r + 8 and r + 12.
    #[inline(always)]
    unsafe fn four(self, row: usize) -> arch::__m512i {
        unsafe {
            let x = arch::_mm512_castsi128_si512(self.sixteen(row));
            let x = arch::_mm512_inserti32x4::<1>(x, self.sixteen(row + 4));
            let x = arch::_mm512_inserti32x4::<2>(x, self.sixteen(row + 8));
            arch::_mm512_inserti32x4::<3>(x, self.sixteen(row + 12))
        }
    }

    #[inline(always)]
    unsafe fn sixteen(self, row: usize) -> arch::__m128i {
        unsafe { arch::_mm_loadu_si128(self.data.add(row * self.stride).cast()) }
    }

    /// An f16 of each row.
    #[inline(always)]
    unsafe fn halves(self) -> arch::__m512 {
        unsafe {
            let mut halves = [0i16; LANES];
            for (row, half) in halves.iter_mut().enumerate() {
                *half = self.data.add(row * self.stride).cast::<i16>().read_unaligned();
            }
            arch::_mm512_cvtph_ps(std::mem::transmute::<[i16; LANES], arch::__m256i>(halves))
        }
    }
}

/// The place of a block in a panel.
#[derive(Clone, Copy)]
struct To {
    levels: *mut u8,
    scales: *mut f32,
    minima: *mut f32,
}

impl To {
    /// Elements 4 `four` to 4 `four` + 3 of each row.
    #[inline(always)]
    unsafe fn levels(self, four: usize, levels: arch::__m512i) {
        unsafe { arch::_mm512_store_si512(self.levels.add(four * 4 * LANES).cast(), levels) }
    }

    #[inline(always)]
    unsafe fn scale(self, sub: usize, scale: arch::__m512, minimum: arch::__m512) {
        unsafe {
            arch::_mm512_store_ps(self.scales.add(sub * LANES), scale);
            arch::_mm512_store_ps(self.minima.add(sub * LANES), minimum);
        }
    }

    /// The one scale of a type whose level `zero` means 0.
    #[inline(always)]
    unsafe fn one_scale(self, d: arch::__m512, zero: f32) {
        unsafe { self.scale(0, d, arch::_mm512_mul_ps(d, arch::_mm512_set1_ps(zero))) }
    }
}

#[inline(always)]
unsafe fn and(x: arch::__m512i, mask: i32) -> arch::__m512i {
    unsafe { arch::_mm512_and_si512(x, arch::_mm512_set1_epi32(mask)) }
}

#[inline(always)]
unsafe fn right(x: arch::__m512i, bits: i32) -> arch::__m512i {
    unsafe { arch::_mm512_srlv_epi32(x, arch::_mm512_set1_epi32(bits)) }
}

/// Bit 0 of every byte, and so on, to bit 4.
#[inline(always)]
unsafe fn to_fifth(x: arch::__m512i) -> arch::__m512i {
    unsafe { arch::_mm512_slli_epi32::<4>(x) }
}

const LOW: i32 = 0x0f0f_0f0f;

// Inlined into the loop over blocks, each of these became dozens of pointers that step along on the stack: half the speed.

#[inline(never)]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c")]
unsafe fn q4_0(from: From, to: To) {
    unsafe {
        to.one_scale(from.halves(), 8.0);
        let halves = from.at(2).columns();
        for i in 0..4 {
            to.levels(i, and(halves[i], LOW));
            to.levels(4 + i, and(right(halves[i], 4), LOW));
        }
    }
}

#[inline(never)]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c")]
unsafe fn q5_0(from: From, to: To) {
    unsafe {
        to.one_scale(from.halves(), 16.0);
        let fifth = from.at(2).columns()[0];
        let halves = from.at(6).columns();
        for i in 0..8 {
            // Four bits, one to each byte.
            let bits = and(right(fifth, 4 * i as i32), 15);
            let bits = and(arch::_mm512_mullo_epi32(bits, arch::_mm512_set1_epi32(0x0020_4081)), 0x0101_0101);
            let half = and(right(halves[i % 4], 4 * (i / 4) as i32), LOW);
            to.levels(i, arch::_mm512_or_si512(half, to_fifth(bits)));
        }
    }
}

#[inline(never)]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c")]
unsafe fn q8_0(from: From, to: To) {
    unsafe {
        to.one_scale(from.halves(), 128.0);
        let sign = arch::_mm512_set1_epi8(-128);
        for half in 0..2 {
            let levels = from.at(2 + 16 * half).columns();
            for i in 0..4 {
                to.levels(4 * half + i, arch::_mm512_xor_si512(levels[i], sign));
            }
        }
    }
}

/// `Q5_K` if there are fifth bits, else `Q4_K`.
#[inline(never)]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c")]
unsafe fn k<const FIFTH: bool>(from: From, to: To) {
    unsafe {
        let [both, low_scales, low_minima, high] = from.columns();
        let d = arch::_mm512_cvtph_ps(arch::_mm512_cvtepi32_epi16(both));
        let dmin = arch::_mm512_cvtph_ps(arch::_mm512_cvtepi32_epi16(right(both, 16)));
        const SIX: i32 = 0x3f3f_3f3f;
        const UPPER: i32 = 0x3030_3030;
        let packed = [
            [and(low_scales, SIX), and(low_minima, SIX)],
            [
                arch::_mm512_or_si512(and(high, LOW), and(right(low_scales, 2), UPPER)),
                arch::_mm512_or_si512(and(right(high, 4), LOW), and(right(low_minima, 2), UPPER)),
            ],
        ];
        for sub in 0..8 {
            let [scale, minimum] = packed[sub / 4];
            let bits = 8 * (sub % 4) as i32;
            let scale = arch::_mm512_cvtepi32_ps(and(right(scale, bits), 63));
            let minimum = arch::_mm512_cvtepi32_ps(and(right(minimum, bits), 63));
            to.scale(sub, arch::_mm512_mul_ps(d, scale), arch::_mm512_mul_ps(dmin, minimum));
        }
        let mut fifth = [arch::_mm512_setzero_si512(); 8];
        if FIFTH {
            let (first, second) = (from.at(16).columns(), from.at(32).columns());
            for i in 0..4 {
                (fifth[i], fifth[4 + i]) = (first[i], second[i]);
            }
        }
        let halves = from.at(if FIFTH { 48 } else { 16 });
        for pair in 0..4 {
            for part in 0..2 {
                let columns = halves.at(32 * pair + 16 * part).columns();
                for i in 0..4 {
                    let four = 4 * part + i;
                    let (mut low, mut high) = (and(columns[i], LOW), and(right(columns[i], 4), LOW));
                    if FIFTH {
                        let bits = right(fifth[four], 2 * pair as i32);
                        low = arch::_mm512_or_si512(low, to_fifth(and(bits, 0x0101_0101)));
                        high = arch::_mm512_or_si512(high, to_fifth(and(right(bits, 1), 0x0101_0101)));
                    }
                    to.levels(16 * pair + four, low);
                    to.levels(16 * pair + 8 + four, high);
                }
            }
        }
    }
}

#[inline(never)]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c")]
unsafe fn q6_k(from: From, to: To) {
    unsafe {
        let d = from.at(208).halves();
        let scales = from.at(192).columns();
        for sub in 0..16 {
            let bits = arch::_mm512_set1_epi32(24 - 8 * (sub % 4) as i32);
            let scale = arch::_mm512_srai_epi32::<24>(arch::_mm512_sllv_epi32(scales[sub / 4], bits));
            let scale = arch::_mm512_mul_ps(d, arch::_mm512_cvtepi32_ps(scale));
            to.scale(sub, scale, arch::_mm512_mul_ps(scale, arch::_mm512_set1_ps(32.0)));
        }
        for half in 0..2 {
            let pairs = from.at(128 + 32 * half);
            let pairs = [pairs.columns(), pairs.at(16).columns()];
            for part in 0..4 {
                let halves = from.at(64 * half + 16 * part).columns();
                for i in 0..4 {
                    let pairs = pairs[part % 2][i];
                    for high in 0..2 {
                        let run = part / 2 + 2 * high;
                        let low = and(right(halves[i], 4 * high as i32), LOW);
                        let upper = and(right(pairs, 2 * run as i32), 0x0303_0303);
                        to.levels(32 * half + 8 * run + 4 * (part % 2) + i, arch::_mm512_or_si512(low, to_fifth(upper)));
                    }
                }
            }
        }
    }
}

struct Avx2;

impl Integers for Avx2 {
    const TOKENS: usize = 4;

    #[inline(always)]
    unsafe fn unpack(dtype: Dtype, rows: Rows16, panel: &mut Panel) {
        unsafe { blocks::unpack(dtype, rows, panel) }
    }

    #[inline(always)]
    unsafe fn tile<const P: usize, const T: usize, const S: usize>(panels: &[Panel; 2], len: usize, x: Columns<T>, sums: *mut f32) {
        unsafe {
            for half in 0..2 * P {
                let (panel, lanes) = (&panels[half / 2], half % 2 * 8);
                let mut totals = [arch::_mm256_setzero_ps(); T];
                for t in 0..T {
                    totals[t] = arch::_mm256_loadu_ps(sums.add((2 * t + half / 2) * LANES + lanes));
                }
                for sub in 0..len / S {
                    let mut dots = [arch::_mm256_setzero_si256(); T];
                    for four in 0..S / 4 {
                        let at = ((sub * S / 4 + four) * LANES + lanes) * 4;
                        let levels = arch::_mm256_loadu_si256(panel.levels.as_ptr().add(at).cast());
                        // The sum of two products fits 16 bits only for levels below 128.
                        let top = arch::_mm256_and_si256(levels, arch::_mm256_set1_epi8(-128));
                        let rest = arch::_mm256_andnot_si256(arch::_mm256_set1_epi8(-128), levels);
                        for t in 0..T {
                            let x = arch::_mm256_set1_epi32(x.levels[t].add(sub * S + 4 * four).cast::<i32>().read_unaligned());
                            let ones = arch::_mm256_set1_epi16(1);
                            let rest = arch::_mm256_madd_epi16(arch::_mm256_maddubs_epi16(rest, x), ones);
                            let top = arch::_mm256_madd_epi16(arch::_mm256_maddubs_epi16(top, x), ones);
                            dots[t] = arch::_mm256_add_epi32(dots[t], arch::_mm256_add_epi32(rest, top));
                        }
                    }
                    let scales = arch::_mm256_loadu_ps(panel.scales.as_ptr().add(sub * LANES + lanes));
                    let minima = arch::_mm256_loadu_ps(panel.minima.as_ptr().add(sub * LANES + lanes));
                    for t in 0..T {
                        let scale = arch::_mm256_mul_ps(scales, arch::_mm256_set1_ps(*x.scales[t].add(sub * S / GROUP)));
                        let total = arch::_mm256_fmadd_ps(arch::_mm256_cvtepi32_ps(dots[t]), scale, totals[t]);
                        totals[t] = arch::_mm256_fnmadd_ps(minima, arch::_mm256_set1_ps(*x.sums[t].add(sub)), total);
                    }
                }
                for t in 0..T {
                    arch::_mm256_storeu_ps(sums.add((2 * t + half / 2) * LANES + lanes), totals[t]);
                }
            }
        }
    }
}
