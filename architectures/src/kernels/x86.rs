//! AVX2 and AVX-512.

use std::{arch::x86_64 as arch, sync::LazyLock};

use half::bf16;

use super::simd::{Bf16, Fetch, Kernel, Multiply, Simd};

pub(super) fn has_avx512() -> bool {
    is_x86_feature_detected!("avx512f")
        && is_x86_feature_detected!("avx512bw")
        && is_x86_feature_detected!("avx512dq")
        && is_x86_feature_detected!("avx512vl")
        && has_avx2()
}

pub(super) fn has_avx512_bf16() -> bool {
    has_avx512() && is_x86_feature_detected!("avx512bf16")
}

pub(super) fn has_avx2() -> bool {
    is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") && is_x86_feature_detected!("f16c")
}

/// See [`Fetch`].
pub(super) fn fetch() -> Fetch {
    static FETCH: LazyLock<Fetch> = LazyLock::new(|| {
        let vendor = arch::__cpuid(0);
        let amd = [vendor.ebx, vendor.edx, vendor.ecx].map(u32::to_le_bytes).concat() == b"AuthenticAMD";
        if amd { Fetch::Once } else { Fetch::Soon }
    });
    *FETCH
}

#[inline(always)]
unsafe fn prefetch(from: *const u8, fetch: Fetch) {
    // SAFETY: a prefetch of any address is none of a fault.
    unsafe {
        match fetch {
            Fetch::Once => arch::_mm_prefetch::<{ arch::_MM_HINT_NTA }>(from.cast()),
            Fetch::Soon => arch::_mm_prefetch::<{ arch::_MM_HINT_T0 }>(from.cast()),
        }
    }
}

/// # Safety
/// [`has_avx512`]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
pub(super) unsafe fn run_avx512<K: Kernel>(kernel: K) -> K::Output {
    // SAFETY: the caller's promise.
    unsafe { kernel.run::<Avx512>() }
}

/// # Safety
/// [`has_avx512_bf16`]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma,f16c")]
pub(super) unsafe fn run_avx512_bf16<K: Kernel>(kernel: K) -> K::Output {
    // SAFETY: the caller's promise.
    unsafe { kernel.run::<Avx512Bf16>() }
}

/// # Safety
/// [`has_avx2`]
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) unsafe fn run_avx2<K: Kernel>(kernel: K) -> K::Output {
    // SAFETY: the caller's promise.
    unsafe { kernel.run::<Avx2>() }
}

// SAFETY of everything below: callers promise the instructions and that what pointers point to is there; all accesses are unaligned.

/// Products of two bf16 each are added to a lane by one instruction; x is rounded to bf16 for it.
#[derive(Clone, Copy)]
pub(super) struct Pairs;

impl Multiply<Avx512Bf16> for Pairs {
    type X = bf16;
    type Vector = arch::__m512i;

    const SIZE: usize = 2;
    const LANES: usize = 32;

    #[inline(always)]
    unsafe fn load(from: *const u8) -> Self::Vector {
        unsafe { arch::_mm512_loadu_si512(from.cast()) }
    }

    #[inline(always)]
    unsafe fn load_x(from: *const bf16) -> Self::Vector {
        unsafe { arch::_mm512_loadu_si512(from.cast()) }
    }

    #[inline(always)]
    unsafe fn mul_add(w: Self::Vector, x: Self::Vector, c: arch::__m512) -> arch::__m512 {
        unsafe {
            arch::_mm512_dpbf16_ps(
                c,
                std::mem::transmute::<Self::Vector, arch::__m512bh>(w),
                std::mem::transmute::<Self::Vector, arch::__m512bh>(x),
            )
        }
    }

    #[inline(always)]
    unsafe fn one(from: *const u8) -> f32 {
        unsafe { <Bf16 as Multiply<Avx512>>::one(from) }
    }
}

#[derive(Clone, Copy)]
pub(super) struct Avx512;
#[derive(Clone, Copy)]
pub(super) struct Avx512Bf16;

macro_rules! avx512 {
    ($type:ident, $bf16:ident) => {
        impl Simd for $type {
            type Vector = arch::__m512;
            type Bf16 = $bf16;

            const LANES: usize = 16;
            const ROWS: usize = 6;

            #[inline(always)]
            unsafe fn splat(x: f32) -> Self::Vector {
                unsafe { arch::_mm512_set1_ps(x) }
            }

            #[inline(always)]
            unsafe fn load(from: *const f32) -> Self::Vector {
                unsafe { arch::_mm512_loadu_ps(from) }
            }

            #[inline(always)]
            unsafe fn load_bf16(from: *const u8) -> Self::Vector {
                unsafe {
                    arch::_mm512_castsi512_ps(arch::_mm512_slli_epi32::<16>(arch::_mm512_cvtepu16_epi32(arch::_mm256_loadu_si256(
                        from.cast(),
                    ))))
                }
            }

            #[inline(always)]
            unsafe fn load_f16(from: *const u8) -> Self::Vector {
                unsafe { arch::_mm512_cvtph_ps(arch::_mm256_loadu_si256(from.cast())) }
            }

            #[inline(always)]
            unsafe fn load_i8(from: *const u8) -> Self::Vector {
                unsafe { arch::_mm512_cvtepi32_ps(arch::_mm512_cvtepi8_epi32(arch::_mm_loadu_si128(from.cast()))) }
            }

            #[inline(always)]
            unsafe fn store(to: *mut f32, x: Self::Vector) {
                unsafe { arch::_mm512_storeu_ps(to, x) };
            }

            #[inline(always)]
            unsafe fn max(a: Self::Vector, b: Self::Vector) -> Self::Vector {
                unsafe { arch::_mm512_max_ps(a, b) }
            }

            #[inline(always)]
            unsafe fn mul_add(a: Self::Vector, b: Self::Vector, c: Self::Vector) -> Self::Vector {
                unsafe { arch::_mm512_fmadd_ps(a, b, c) }
            }

            #[inline(always)]
            unsafe fn sums(x: [Self::Vector; 4]) -> [f32; 4] {
                unsafe {
                    // Without a closure: one is not compiled for the instructions of its caller.
                    sums_of_halves([half_sums(x[0]), half_sums(x[1]), half_sums(x[2]), half_sums(x[3])])
                }
            }

            #[inline(always)]
            unsafe fn prefetch(from: *const u8, fetch: Fetch) {
                unsafe { prefetch(from, fetch) };
            }
        }
    };
}

avx512!(Avx512, Bf16);
avx512!(Avx512Bf16, Pairs);

/// Lane i plus lane i + 8.
#[inline(always)]
unsafe fn half_sums(x: arch::__m512) -> arch::__m256 {
    unsafe { arch::_mm256_add_ps(arch::_mm512_castps512_ps256(x), arch::_mm512_extractf32x8_ps::<1>(x)) }
}

/// Four vectors' sums through two levels of horizontal adds.
#[inline(always)]
unsafe fn sums_of_halves([a, b, c, d]: [arch::__m256; 4]) -> [f32; 4] {
    unsafe {
        let four = arch::_mm256_hadd_ps(arch::_mm256_hadd_ps(a, b), arch::_mm256_hadd_ps(c, d));
        let sums = arch::_mm_add_ps(arch::_mm256_castps256_ps128(four), arch::_mm256_extractf128_ps::<1>(four));
        std::mem::transmute(sums)
    }
}

#[derive(Clone, Copy)]
pub(super) struct Avx2;

impl Simd for Avx2 {
    type Vector = arch::__m256;
    type Bf16 = Bf16;

    const LANES: usize = 8;
    const ROWS: usize = 2;

    #[inline(always)]
    unsafe fn splat(x: f32) -> Self::Vector {
        unsafe { arch::_mm256_set1_ps(x) }
    }

    #[inline(always)]
    unsafe fn load(from: *const f32) -> Self::Vector {
        unsafe { arch::_mm256_loadu_ps(from) }
    }

    #[inline(always)]
    unsafe fn load_bf16(from: *const u8) -> Self::Vector {
        unsafe { arch::_mm256_castsi256_ps(arch::_mm256_slli_epi32::<16>(arch::_mm256_cvtepu16_epi32(arch::_mm_loadu_si128(from.cast())))) }
    }

    #[inline(always)]
    unsafe fn load_f16(from: *const u8) -> Self::Vector {
        unsafe { arch::_mm256_cvtph_ps(arch::_mm_loadu_si128(from.cast())) }
    }

    #[inline(always)]
    unsafe fn load_i8(from: *const u8) -> Self::Vector {
        unsafe { arch::_mm256_cvtepi32_ps(arch::_mm256_cvtepi8_epi32(arch::_mm_loadl_epi64(from.cast()))) }
    }

    #[inline(always)]
    unsafe fn store(to: *mut f32, x: Self::Vector) {
        unsafe { arch::_mm256_storeu_ps(to, x) };
    }

    #[inline(always)]
    unsafe fn max(a: Self::Vector, b: Self::Vector) -> Self::Vector {
        unsafe { arch::_mm256_max_ps(a, b) }
    }

    #[inline(always)]
    unsafe fn mul_add(a: Self::Vector, b: Self::Vector, c: Self::Vector) -> Self::Vector {
        unsafe { arch::_mm256_fmadd_ps(a, b, c) }
    }

    #[inline(always)]
    unsafe fn sums(x: [Self::Vector; 4]) -> [f32; 4] {
        unsafe { sums_of_halves(x) }
    }

    #[inline(always)]
    unsafe fn prefetch(from: *const u8, fetch: Fetch) {
        unsafe { prefetch(from, fetch) };
    }
}
