//! Vectors of the CPU's, as products of blocks want them: of AVX-512 with VNNI and of AVX2 under one trait.

#![allow(clippy::needless_range_loop, reason = "arrays that are indexed by constants are registers")]

use std::arch::x86_64 as arch;

use super::blocks::AHEAD;
use crate::weights::Dtype;

// SAFETY of everything below: callers promise the instructions and that what pointers point to is there; all accesses are unaligned.

/// Vectors of lanes of 32 bits, of which each is for another row of weights.
pub(super) trait Lanes: Copy + 'static {
    type Ints: Copy;
    type Floats: Copy;

    const ROWS: usize;

    unsafe fn zero() -> Self::Ints;
    unsafe fn and(x: Self::Ints, mask: i32) -> Self::Ints;
    unsafe fn or(a: Self::Ints, b: Self::Ints) -> Self::Ints;
    unsafe fn xor(x: Self::Ints, mask: i32) -> Self::Ints;
    unsafe fn times(x: Self::Ints, factor: i32) -> Self::Ints;
    unsafe fn left(x: Self::Ints, bits: i32) -> Self::Ints;
    unsafe fn right(x: Self::Ints, bits: i32) -> Self::Ints;
    /// keeping the sign
    unsafe fn signed_right(x: Self::Ints, bits: i32) -> Self::Ints;
    /// Adds the products of each lane's four levels, which are of `dtype`, with the four signed bytes of x.
    unsafe fn dot(dtype: Dtype, sums: Self::Ints, levels: Self::Ints, x: i32) -> Self::Ints;
    unsafe fn floats(x: Self::Ints) -> Self::Floats;
    /// The lower half of each lane as an f16.
    unsafe fn halves(x: Self::Ints) -> Self::Floats;
    unsafe fn splat(x: f32) -> Self::Floats;
    unsafe fn mul(a: Self::Floats, b: Self::Floats) -> Self::Floats;
    /// a b + c
    unsafe fn mul_add(a: Self::Floats, b: Self::Floats, c: Self::Floats) -> Self::Floats;
    /// c - a b
    unsafe fn mul_sub(a: Self::Floats, b: Self::Floats, c: Self::Floats) -> Self::Floats;
    unsafe fn load(from: *const f32) -> Self::Floats;
    unsafe fn load_ints(from: *const u8) -> Self::Ints;
    unsafe fn store(to: *mut f32, x: Self::Floats);
    unsafe fn store_ints(to: *mut u8, x: Self::Ints);

    /// Sixteen bytes of each row; vector i holds each row's bytes 4i to 4i + 3.
    unsafe fn columns(from: From) -> [Self::Ints; 4];
    /// Two bytes of each row as an f16.
    unsafe fn one_half(from: From) -> Self::Floats;
}

/// A block of each of some rows.
#[derive(Clone, Copy)]
pub(super) struct From {
    pub data: *const u8,
    pub stride: usize,
}

impl From {
    #[inline(always)]
    pub fn at(self, offset: usize) -> Self {
        Self { data: self.data.wrapping_add(offset), stride: self.stride }
    }

    #[inline(always)]
    pub unsafe fn sixteen(self, row: usize) -> arch::__m128i {
        unsafe { arch::_mm_loadu_si128(self.data.add(row * self.stride).cast()) }
    }

    #[inline(always)]
    pub unsafe fn two(self, row: usize) -> i16 {
        unsafe { self.data.add(row * self.stride).cast::<i16>().read_unaligned() }
    }

    /// Asks for what lies [`AHEAD`] of the block in each row that is this part of all: a few at a time, for a CPU remembers a dozen requests.
    #[inline(always)]
    pub unsafe fn fetch<L: Lanes>(self, part: usize, parts: usize, bytes: usize) {
        unsafe {
            for row in part * L::ROWS / parts..(part + 1) * L::ROWS / parts {
                for line in 0..bytes.div_ceil(64) {
                    arch::_mm_prefetch::<{ arch::_MM_HINT_T0 }>(self.data.wrapping_add(row * self.stride + 64 * line + AHEAD).cast());
                }
            }
        }
    }
}

#[derive(Clone, Copy)]
pub(super) struct Avx512;

impl Lanes for Avx512 {
    type Ints = arch::__m512i;
    type Floats = arch::__m512;

    const ROWS: usize = 16;

    #[inline(always)]
    unsafe fn zero() -> Self::Ints {
        unsafe { arch::_mm512_setzero_si512() }
    }

    #[inline(always)]
    unsafe fn and(x: Self::Ints, mask: i32) -> Self::Ints {
        unsafe { arch::_mm512_and_si512(x, arch::_mm512_set1_epi32(mask)) }
    }

    #[inline(always)]
    unsafe fn or(a: Self::Ints, b: Self::Ints) -> Self::Ints {
        unsafe { arch::_mm512_or_si512(a, b) }
    }

    #[inline(always)]
    unsafe fn xor(x: Self::Ints, mask: i32) -> Self::Ints {
        unsafe { arch::_mm512_xor_si512(x, arch::_mm512_set1_epi32(mask)) }
    }

    #[inline(always)]
    unsafe fn times(x: Self::Ints, factor: i32) -> Self::Ints {
        unsafe { arch::_mm512_mullo_epi32(x, arch::_mm512_set1_epi32(factor)) }
    }

    #[inline(always)]
    unsafe fn left(x: Self::Ints, bits: i32) -> Self::Ints {
        unsafe { arch::_mm512_sllv_epi32(x, arch::_mm512_set1_epi32(bits)) }
    }

    #[inline(always)]
    unsafe fn right(x: Self::Ints, bits: i32) -> Self::Ints {
        unsafe { arch::_mm512_srlv_epi32(x, arch::_mm512_set1_epi32(bits)) }
    }

    #[inline(always)]
    unsafe fn signed_right(x: Self::Ints, bits: i32) -> Self::Ints {
        unsafe { arch::_mm512_srav_epi32(x, arch::_mm512_set1_epi32(bits)) }
    }

    #[inline(always)]
    unsafe fn dot(_: Dtype, sums: Self::Ints, levels: Self::Ints, x: i32) -> Self::Ints {
        unsafe { arch::_mm512_dpbusd_epi32(sums, levels, arch::_mm512_set1_epi32(x)) }
    }

    #[inline(always)]
    unsafe fn floats(x: Self::Ints) -> Self::Floats {
        unsafe { arch::_mm512_cvtepi32_ps(x) }
    }

    #[inline(always)]
    unsafe fn halves(x: Self::Ints) -> Self::Floats {
        unsafe { arch::_mm512_cvtph_ps(arch::_mm512_cvtepi32_epi16(x)) }
    }

    #[inline(always)]
    unsafe fn splat(x: f32) -> Self::Floats {
        unsafe { arch::_mm512_set1_ps(x) }
    }

    #[inline(always)]
    unsafe fn mul(a: Self::Floats, b: Self::Floats) -> Self::Floats {
        unsafe { arch::_mm512_mul_ps(a, b) }
    }

    #[inline(always)]
    unsafe fn mul_add(a: Self::Floats, b: Self::Floats, c: Self::Floats) -> Self::Floats {
        unsafe { arch::_mm512_fmadd_ps(a, b, c) }
    }

    #[inline(always)]
    unsafe fn mul_sub(a: Self::Floats, b: Self::Floats, c: Self::Floats) -> Self::Floats {
        unsafe { arch::_mm512_fnmadd_ps(a, b, c) }
    }

    #[inline(always)]
    unsafe fn load(from: *const f32) -> Self::Floats {
        unsafe { arch::_mm512_loadu_ps(from) }
    }

    #[inline(always)]
    unsafe fn load_ints(from: *const u8) -> Self::Ints {
        unsafe { arch::_mm512_loadu_si512(from.cast()) }
    }

    #[inline(always)]
    unsafe fn store(to: *mut f32, x: Self::Floats) {
        unsafe { arch::_mm512_storeu_ps(to, x) }
    }

    #[inline(always)]
    unsafe fn store_ints(to: *mut u8, x: Self::Ints) {
        unsafe { arch::_mm512_storeu_si512(to.cast(), x) }
    }

    #[inline(always)]
    unsafe fn columns(from: From) -> [Self::Ints; 4] {
        unsafe {
            let mut rows = [Self::zero(); 4];
            for row in 0..4 {
                let x = arch::_mm512_castsi128_si512(from.sixteen(row));
                let x = arch::_mm512_inserti32x4::<1>(x, from.sixteen(row + 4));
                let x = arch::_mm512_inserti32x4::<2>(x, from.sixteen(row + 8));
                rows[row] = arch::_mm512_inserti32x4::<3>(x, from.sixteen(row + 12));
            }
            let [a, b, c, d] = rows;
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

    #[inline(always)]
    unsafe fn one_half(from: From) -> Self::Floats {
        unsafe {
            let mut halves = [0i16; 16];
            for (row, half) in halves.iter_mut().enumerate() {
                *half = from.two(row);
            }
            arch::_mm512_cvtph_ps(std::mem::transmute::<[i16; 16], arch::__m256i>(halves))
        }
    }
}

#[derive(Clone, Copy)]
pub(super) struct Avx2;

impl Lanes for Avx2 {
    type Ints = arch::__m256i;
    type Floats = arch::__m256;

    const ROWS: usize = 8;

    #[inline(always)]
    unsafe fn zero() -> Self::Ints {
        unsafe { arch::_mm256_setzero_si256() }
    }

    #[inline(always)]
    unsafe fn and(x: Self::Ints, mask: i32) -> Self::Ints {
        unsafe { arch::_mm256_and_si256(x, arch::_mm256_set1_epi32(mask)) }
    }

    #[inline(always)]
    unsafe fn or(a: Self::Ints, b: Self::Ints) -> Self::Ints {
        unsafe { arch::_mm256_or_si256(a, b) }
    }

    #[inline(always)]
    unsafe fn xor(x: Self::Ints, mask: i32) -> Self::Ints {
        unsafe { arch::_mm256_xor_si256(x, arch::_mm256_set1_epi32(mask)) }
    }

    #[inline(always)]
    unsafe fn times(x: Self::Ints, factor: i32) -> Self::Ints {
        unsafe { arch::_mm256_mullo_epi32(x, arch::_mm256_set1_epi32(factor)) }
    }

    #[inline(always)]
    unsafe fn left(x: Self::Ints, bits: i32) -> Self::Ints {
        unsafe { arch::_mm256_sllv_epi32(x, arch::_mm256_set1_epi32(bits)) }
    }

    #[inline(always)]
    unsafe fn right(x: Self::Ints, bits: i32) -> Self::Ints {
        unsafe { arch::_mm256_srlv_epi32(x, arch::_mm256_set1_epi32(bits)) }
    }

    #[inline(always)]
    unsafe fn signed_right(x: Self::Ints, bits: i32) -> Self::Ints {
        unsafe { arch::_mm256_srav_epi32(x, arch::_mm256_set1_epi32(bits)) }
    }

    #[inline(always)]
    unsafe fn dot(dtype: Dtype, sums: Self::Ints, levels: Self::Ints, x: i32) -> Self::Ints {
        unsafe {
            let (x, ones) = (arch::_mm256_set1_epi32(x), arch::_mm256_set1_epi16(1));
            if dtype != Dtype::Q8_0 {
                return arch::_mm256_add_epi32(sums, arch::_mm256_madd_epi16(arch::_mm256_maddubs_epi16(levels, x), ones));
            }
            // The sum of two products fits 16 bits only for levels below 128.
            let top = arch::_mm256_and_si256(levels, arch::_mm256_set1_epi8(-128));
            let rest = arch::_mm256_andnot_si256(arch::_mm256_set1_epi8(-128), levels);
            let rest = arch::_mm256_madd_epi16(arch::_mm256_maddubs_epi16(rest, x), ones);
            let top = arch::_mm256_madd_epi16(arch::_mm256_maddubs_epi16(top, x), ones);
            arch::_mm256_add_epi32(sums, arch::_mm256_add_epi32(rest, top))
        }
    }

    #[inline(always)]
    unsafe fn floats(x: Self::Ints) -> Self::Floats {
        unsafe { arch::_mm256_cvtepi32_ps(x) }
    }

    #[inline(always)]
    unsafe fn halves(x: Self::Ints) -> Self::Floats {
        unsafe {
            let packed = arch::_mm256_packus_epi32(Self::and(x, 0xffff), Self::zero());
            arch::_mm256_cvtph_ps(arch::_mm256_castsi256_si128(arch::_mm256_permute4x64_epi64::<0b1000>(packed)))
        }
    }

    #[inline(always)]
    unsafe fn splat(x: f32) -> Self::Floats {
        unsafe { arch::_mm256_set1_ps(x) }
    }

    #[inline(always)]
    unsafe fn mul(a: Self::Floats, b: Self::Floats) -> Self::Floats {
        unsafe { arch::_mm256_mul_ps(a, b) }
    }

    #[inline(always)]
    unsafe fn mul_add(a: Self::Floats, b: Self::Floats, c: Self::Floats) -> Self::Floats {
        unsafe { arch::_mm256_fmadd_ps(a, b, c) }
    }

    #[inline(always)]
    unsafe fn mul_sub(a: Self::Floats, b: Self::Floats, c: Self::Floats) -> Self::Floats {
        unsafe { arch::_mm256_fnmadd_ps(a, b, c) }
    }

    #[inline(always)]
    unsafe fn load(from: *const f32) -> Self::Floats {
        unsafe { arch::_mm256_loadu_ps(from) }
    }

    #[inline(always)]
    unsafe fn load_ints(from: *const u8) -> Self::Ints {
        unsafe { arch::_mm256_loadu_si256(from.cast()) }
    }

    #[inline(always)]
    unsafe fn store(to: *mut f32, x: Self::Floats) {
        unsafe { arch::_mm256_storeu_ps(to, x) }
    }

    #[inline(always)]
    unsafe fn store_ints(to: *mut u8, x: Self::Ints) {
        unsafe { arch::_mm256_storeu_si256(to.cast(), x) }
    }

    #[inline(always)]
    unsafe fn columns(from: From) -> [Self::Ints; 4] {
        unsafe {
            let mut rows = [Self::zero(); 4];
            for row in 0..4 {
                rows[row] = arch::_mm256_inserti128_si256::<1>(arch::_mm256_castsi128_si256(from.sixteen(row)), from.sixteen(row + 4));
            }
            let [a, b, c, d] = rows;
            let (ab, cd) = (arch::_mm256_unpacklo_epi32(a, b), arch::_mm256_unpacklo_epi32(c, d));
            let (ab_high, cd_high) = (arch::_mm256_unpackhi_epi32(a, b), arch::_mm256_unpackhi_epi32(c, d));
            [
                arch::_mm256_unpacklo_epi64(ab, cd),
                arch::_mm256_unpackhi_epi64(ab, cd),
                arch::_mm256_unpacklo_epi64(ab_high, cd_high),
                arch::_mm256_unpackhi_epi64(ab_high, cd_high),
            ]
        }
    }

    #[inline(always)]
    unsafe fn one_half(from: From) -> Self::Floats {
        unsafe {
            let mut halves = [0i16; 8];
            for (row, half) in halves.iter_mut().enumerate() {
                *half = from.two(row);
            }
            arch::_mm256_cvtph_ps(std::mem::transmute::<[i16; 8], arch::__m128i>(halves))
        }
    }
}
