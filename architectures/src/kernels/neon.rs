//! NEON, which every 64-bit ARM has: two vectors of four lanes at a time, in the order of plain code, whose sums these are to the bit.

use std::arch::{aarch64 as arch, asm};

use super::simd::{Bf16, Fetch, Simd};

#[derive(Clone, Copy)]
pub(super) struct Neon;

// SAFETY of everything below: callers promise that what pointers point to is there; all accesses are unaligned.
impl Simd for Neon {
    type Vector = [arch::float32x4_t; 2];
    type Bf16 = Bf16;

    const LANES: usize = 8;
    const ROWS: usize = 3;

    #[inline(always)]
    unsafe fn splat(x: f32) -> Self::Vector {
        unsafe { [arch::vdupq_n_f32(x); 2] }
    }

    #[inline(always)]
    unsafe fn load(from: *const f32) -> Self::Vector {
        unsafe { from.cast::<Self::Vector>().read_unaligned() }
    }

    #[inline(always)]
    unsafe fn load_bf16(from: *const u8) -> Self::Vector {
        unsafe {
            let bits = from.cast::<arch::uint16x8_t>().read_unaligned();
            let [low, high] = [arch::vshll_n_u16::<16>(arch::vget_low_u16(bits)), arch::vshll_high_n_u16::<16>(bits)];
            [arch::vreinterpretq_f32_u32(low), arch::vreinterpretq_f32_u32(high)]
        }
    }

    #[inline(always)]
    unsafe fn load_f16(from: *const u8) -> Self::Vector {
        unsafe {
            let bits = from.cast::<arch::uint16x8_t>().read_unaligned();
            let low: arch::float32x4_t;
            let high: arch::float32x4_t;
            // The intrinsics for these two take a type that is not stable yet.
            asm!(
                "fcvtl {low:v}.4s, {bits:v}.4h",
                "fcvtl2 {high:v}.4s, {bits:v}.8h",
                bits = in(vreg) bits,
                low = out(vreg) low,
                high = out(vreg) high,
                options(pure, nomem, nostack, preserves_flags),
            );
            [low, high]
        }
    }

    #[inline(always)]
    unsafe fn load_i8(from: *const u8) -> Self::Vector {
        unsafe {
            let wide = arch::vmovl_s8(from.cast::<arch::int8x8_t>().read_unaligned());
            let [low, high] = [arch::vmovl_s16(arch::vget_low_s16(wide)), arch::vmovl_high_s16(wide)];
            [arch::vcvtq_f32_s32(low), arch::vcvtq_f32_s32(high)]
        }
    }

    #[inline(always)]
    unsafe fn store(to: *mut f32, x: Self::Vector) {
        unsafe { to.cast::<Self::Vector>().write_unaligned(x) };
    }

    #[inline(always)]
    unsafe fn max(a: Self::Vector, b: Self::Vector) -> Self::Vector {
        unsafe { [0, 1].map(|i| arch::vbslq_f32(arch::vcgtq_f32(a[i], b[i]), a[i], b[i])) }
    }

    #[inline(always)]
    unsafe fn mul_add(a: Self::Vector, b: Self::Vector, c: Self::Vector) -> Self::Vector {
        unsafe { [arch::vfmaq_f32(c[0], a[0], b[0]), arch::vfmaq_f32(c[1], a[1], b[1])] }
    }

    #[inline(always)]
    unsafe fn sums(x: [Self::Vector; 4]) -> [f32; 4] {
        unsafe {
            let halves = x.map(|[low, high]| arch::vaddq_f32(low, high));
            let pairs = [arch::vpaddq_f32(halves[0], halves[1]), arch::vpaddq_f32(halves[2], halves[3])];
            std::mem::transmute::<arch::float32x4_t, [f32; 4]>(arch::vpaddq_f32(pairs[0], pairs[1]))
        }
    }

    #[inline(always)]
    unsafe fn prefetch(from: *const u8, fetch: Fetch) {
        // A prefetch of any address is none of a fault.
        unsafe {
            match fetch {
                Fetch::Once => asm!("prfm pldl1strm, [{}]", in(reg) from, options(readonly, nostack, preserves_flags)),
                Fetch::Soon => asm!("prfm pldl1keep, [{}]", in(reg) from, options(readonly, nostack, preserves_flags)),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{super::simd::Plain, *};

    /// All that loads and computes, of bytes at any alignment, as bits.
    unsafe fn bits<S: Simd>(bytes: &[u8]) -> Vec<u32> {
        let mut out = Vec::new();
        let mut keep = |x: S::Vector| {
            let mut values = [0f32; 8];
            unsafe { S::store(values.as_mut_ptr(), x) };
            out.extend(values.map(f32::to_bits));
        };
        for at in 0..bytes.len() - 64 {
            unsafe {
                let (a, b) = (S::load(bytes[at..].as_ptr().cast()), S::load(bytes[at + 32..].as_ptr().cast()));
                let (c, d) = (S::load_bf16(bytes[at..].as_ptr()), S::load_i8(bytes[at..].as_ptr()));
                let all = [c, d, S::load_f16(bytes[at..].as_ptr()), S::max(a, b), S::mul_add(d, S::splat(0.7), c), S::mul_add(a, b, d)];
                all.into_iter().for_each(&mut keep);
                S::prefetch(bytes[at..].as_ptr(), Fetch::Soon);
                let sums = S::sums([d, S::mul_add(d, d, S::splat(0.1)), S::splat(1.5), S::load_i8(bytes[at + 8..].as_ptr())]);
                keep(S::load([sums, sums].as_flattened().as_ptr()));
            }
        }
        out
    }

    #[test]
    fn every_operation_is_that_of_plain_code_to_the_bit() {
        let bytes: Vec<u8> = (0..4096u32).map(|i| (i.wrapping_mul(2_654_435_761) >> 13) as u8).collect();
        // SAFETY: the CPU is an ARM; there are 64 bytes behind each place.
        let (neon, plain) = unsafe { (bits::<Neon>(&bytes), bits::<Plain>(&bytes)) };
        for (i, (neon, plain)) in neon.into_iter().zip(plain).enumerate() {
            let nan = f32::from_bits(neon).is_nan() && f32::from_bits(plain).is_nan();
            assert!(neon == plain || nan, "{i}: {} {}", f32::from_bits(neon), f32::from_bits(plain));
        }
    }
}
