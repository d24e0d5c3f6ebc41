//! Vectors of f32 lanes and how stored weights become them: what a kernel may ask of a CPU, and its plain form.

use half::f16;

/// Work that can be done with any kind of vectors.
pub(super) trait Kernel {
    type Output;

    /// Must be `#[inline(always)]`, so that it is compiled for the instructions of `S`.
    ///
    /// # Safety
    /// The CPU has the instructions of `S`; whatever else a kernel needs stands where it is made.
    unsafe fn run<S: Simd>(self) -> Self::Output;
}

/// f32 lanes of some CPU's vectors. Every method is unsafe for one reason: the CPU must have the instructions. Those that take a pointer
/// read or write [`Simd::LANES`] elements there, at any alignment.
pub(super) trait Simd: Copy + 'static {
    type Vector: Copy;
    /// How it multiplies weights that are bf16.
    type Bf16: Multiply<Self>;

    const LANES: usize;
    /// Rows of activations that a tile of a product holds beside four rows of weights, at most six: as many sums as there are registers for.
    const ROWS: usize;

    unsafe fn splat(x: f32) -> Self::Vector;
    unsafe fn load(from: *const f32) -> Self::Vector;
    unsafe fn load_bf16(from: *const u8) -> Self::Vector;
    unsafe fn load_f16(from: *const u8) -> Self::Vector;
    unsafe fn load_i8(from: *const u8) -> Self::Vector;
    unsafe fn store(to: *mut f32, x: Self::Vector);
    unsafe fn max(a: Self::Vector, b: Self::Vector) -> Self::Vector;
    /// a b + c
    unsafe fn mul_add(a: Self::Vector, b: Self::Vector, c: Self::Vector) -> Self::Vector;
    /// The sums of four vectors' lanes; what one vector's is does not depend on the others.
    unsafe fn sums(x: [Self::Vector; 4]) -> [f32; 4];
    /// Asks for the cache line of an address, which need not be valid.
    unsafe fn prefetch(from: *const u8, fetch: Fetch);
}

/// How a stream of weights is best fetched ahead: a property of the CPU, whatever its vectors.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Fetch {
    #[cfg_attr(not(target_arch = "x86_64"), expect(dead_code, reason = "only x86 CPUs are known to differ"))]
    /// past the outer caches, which then keep what is used again: a fifth faster on AMD's, half as fast on Intel's
    Once,
    /// into all caches
    Soon,
}

impl Fetch {
    /// As this CPU likes it.
    pub fn here() -> Self {
        #[cfg(target_arch = "x86_64")]
        return super::x86::fetch();
        #[cfg(not(target_arch = "x86_64"))]
        return Self::Soon;
    }
}

/// How stored weights are multiplied with elements of x.
pub(super) trait Multiply<S: Simd>: Copy + 'static {
    /// x as it is multiplied
    type X: Copy + Into<f32>;
    /// [`Self::LANES`] weights, or as many elements of x
    type Vector: Copy;

    /// Bytes of a stored weight.
    const SIZE: usize;
    /// Weights that are multiplied at once.
    const LANES: usize;

    /// # Safety
    /// [`Self::LANES`] weights lie at `from`, and the CPU has the instructions.
    unsafe fn load(from: *const u8) -> Self::Vector;

    /// # Safety
    /// [`Self::LANES`] elements lie at `from`, and the CPU has the instructions.
    unsafe fn load_x(from: *const Self::X) -> Self::Vector;

    /// w x + c, in a fixed order of the sums that share a lane
    ///
    /// # Safety
    /// The CPU has the instructions.
    unsafe fn mul_add(w: Self::Vector, x: Self::Vector, c: S::Vector) -> S::Vector;

    /// # Safety
    /// A weight lies at `from`.
    unsafe fn one(from: *const u8) -> f32;
}

#[derive(Clone, Copy)]
pub(super) struct F32;
#[derive(Clone, Copy)]
pub(super) struct Bf16;
#[derive(Clone, Copy)]
pub(super) struct F16;

/// Products of weights that become f32 lanes as they are loaded.
macro_rules! widened {
    ($type:ident, $size:literal, |$from:ident| $load:expr, $one:expr) => {
        // SAFETY: callers give addresses of whole elements, and every read is unaligned.
        impl<S: Simd> Multiply<S> for $type {
            type X = f32;
            type Vector = S::Vector;

            const SIZE: usize = $size;
            const LANES: usize = S::LANES;

            #[inline(always)]
            unsafe fn load($from: *const u8) -> S::Vector {
                unsafe { $load }
            }

            #[inline(always)]
            unsafe fn load_x(from: *const f32) -> S::Vector {
                unsafe { S::load(from) }
            }

            #[inline(always)]
            unsafe fn mul_add(w: S::Vector, x: S::Vector, c: S::Vector) -> S::Vector {
                unsafe { S::mul_add(w, x, c) }
            }

            #[inline(always)]
            unsafe fn one($from: *const u8) -> f32 {
                unsafe { $one }
            }
        }
    };
}

widened!(F32, 4, |from| S::load(from.cast()), from.cast::<f32>().read_unaligned());
widened!(Bf16, 2, |from| S::load_bf16(from), half::bf16::from_bits(from.cast::<u16>().read_unaligned()).to_f32());
widened!(F16, 2, |from| S::load_f16(from), f16::from_bits(from.cast::<u16>().read_unaligned()).to_f32());

/// Arrays, which the compiler puts into whatever vectors every CPU of the architecture has, given loops without closures.
#[derive(Clone, Copy)]
pub(super) struct Plain;

const PLAIN: usize = 8;

impl Simd for Plain {
    type Vector = [f32; PLAIN];
    type Bf16 = Bf16;

    const LANES: usize = PLAIN;
    const ROWS: usize = if cfg!(target_arch = "aarch64") { 3 } else { 1 };

    #[inline(always)]
    unsafe fn splat(x: f32) -> Self::Vector {
        [x; PLAIN]
    }

    #[inline(always)]
    unsafe fn load(from: *const f32) -> Self::Vector {
        unsafe { from.cast::<Self::Vector>().read_unaligned() }
    }

    #[inline(always)]
    unsafe fn load_bf16(from: *const u8) -> Self::Vector {
        let bits = unsafe { from.cast::<[u16; PLAIN]>().read_unaligned() };
        let mut x = [0.0; PLAIN];
        for i in 0..PLAIN {
            x[i] = f32::from_bits(u32::from(bits[i]) << 16);
        }
        x
    }

    #[inline(always)]
    unsafe fn load_f16(from: *const u8) -> Self::Vector {
        let bits = unsafe { from.cast::<[u16; PLAIN]>().read_unaligned() };
        let mut x = [0.0; PLAIN];
        for i in 0..PLAIN {
            x[i] = f16::from_bits(bits[i]).to_f32();
        }
        x
    }

    #[inline(always)]
    unsafe fn load_i8(from: *const u8) -> Self::Vector {
        let bytes = unsafe { from.cast::<[i8; PLAIN]>().read_unaligned() };
        let mut x = [0.0; PLAIN];
        for i in 0..PLAIN {
            x[i] = f32::from(bytes[i]);
        }
        x
    }

    #[inline(always)]
    unsafe fn store(to: *mut f32, x: Self::Vector) {
        unsafe { to.cast::<Self::Vector>().write_unaligned(x) };
    }

    #[inline(always)]
    unsafe fn max(a: Self::Vector, b: Self::Vector) -> Self::Vector {
        let mut c = a;
        for i in 0..PLAIN {
            c[i] = if a[i] > b[i] { a[i] } else { b[i] };
        }
        c
    }

    #[inline(always)]
    unsafe fn mul_add(a: Self::Vector, b: Self::Vector, mut c: Self::Vector) -> Self::Vector {
        // Without an instruction for it, `mul_add` is a call of a function.
        let fused = cfg!(any(target_arch = "aarch64", target_feature = "fma"));
        for i in 0..PLAIN {
            c[i] = if fused { a[i].mul_add(b[i], c[i]) } else { a[i] * b[i] + c[i] };
        }
        c
    }

    #[inline(always)]
    unsafe fn sums(x: [Self::Vector; 4]) -> [f32; 4] {
        let mut sums = [0.0; 4];
        for (sum, [a, b, c, d, e, f, g, h]) in sums.iter_mut().zip(x) {
            *sum = ((a + e) + (b + f)) + ((c + g) + (d + h));
        }
        sums
    }

    #[inline(always)]
    unsafe fn prefetch(_: *const u8, _: Fetch) {}
}

/// Adding and taking away 1.5 * 2^23 rounds to a whole number, ties to even, without a branch or a call.
pub(super) const ROUND: f32 = 12_582_912.0;

/// e to the x, to 2 units in the last place; 0 below -87. Without branches, so that loops over it become vectors.
#[inline(always)]
pub(super) fn exp(x: f32) -> f32 {
    // Cephes' expf: x = n ln 2 + r with ln 2 in two parts, then a polynomial in r.
    let bounded = x.clamp(-87.0, 88.0);
    let rounded = bounded * std::f32::consts::LOG2_E + ROUND;
    let n = rounded - ROUND;
    let r = bounded - n * 0.693_359_4 + n * 2.121_944_4e-4;
    let p = 1.987_569_1e-4;
    let p = p * r + 1.398_2e-3;
    let p = p * r + 8.333_452e-3;
    let p = p * r + 4.166_579_6e-2;
    let p = p * r + 0.166_666_65;
    let p = p * r + 0.5;
    // n stands in the low bits, too; a conversion that saturates is none of vectors.
    let scale = f32::from_bits(rounded.to_bits().wrapping_sub(ROUND.to_bits()).wrapping_add(127) << 23);
    let y = (p * r * r + r + 1.0) * scale;
    if x < -87.0 { 0.0 } else { y }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    #[allow(clippy::float_cmp, reason = "these are exact")]
    fn exp_is_that_of_the_library() {
        for i in -2000..2000 {
            let x = i as f32 * 0.0417;
            let (own, exact) = (f64::from(exp(x)), f64::from(x).exp());
            assert!((own - exact).abs() <= 2.5e-7 * exact, "{x}: {own} {exact}");
        }
        assert!(exp(0.0) == 1.0 && exp(f32::NEG_INFINITY) == 0.0 && exp(-1e30) == 0.0);
        assert!(exp(1e30) > 1e38);
    }
}
