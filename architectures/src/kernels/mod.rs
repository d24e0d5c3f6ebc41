//! The CPU's own kernels: products of stored weights with rows, and attention over a cache, for the instructions that the CPU has.
//!
//! They know bytes, rows and threads, and nothing of models: the decoder calls them where a tensor lies in the CPU's memory and no gradient is
//! wanted, and candle everywhere else. Weights are read where they lie, at any alignment, and are never copied or converted as a whole.
//!
//! *A row's result is the same to the last bit whatever rows stand beside it*, and however many: every product sums in the same order (lanes
//! along the inner dimension, [`product::CHUNK`] elements at a time; for blocks one sub-block after the other), whether it multiplies one row
//! or a thousand, and attention walks blocks of keys that begin at multiples of a fixed number. It differs between [`Kernels`], whose vectors
//! are of different lengths.
//!
//! Weights in ggml's blocks meet rows in eight bits ([`blocks`]), bf16 weights meet rows in bf16 where the caller asks for speed
//! ([`Kernels::Avx512Bf16`], [`Kernels::Amx`]), and all else is multiplied in f32.
//!
//! `unsafe` code of this crate stands here alone. Every kernel is one generic function over [`simd::Simd`] (for blocks [`blocks::Integers`]), so
//! that what is tested for one kind of instructions is what runs with another. Tiles (`amx`) are a kernel of their own, under the same tests.

#![allow(clippy::inline_always, reason = "what is not inlined is not compiled for the instructions of its caller")]

#[cfg(target_arch = "x86_64")]
mod amx;
pub(crate) mod attention;
mod blocks;
#[cfg(target_arch = "aarch64")]
mod neon;
pub mod peak;
pub(crate) mod product;
mod simd;
mod team;
#[cfg(target_arch = "x86_64")]
mod x86;
#[cfg(target_arch = "x86_64")]
mod x86_blocks;
#[cfg(target_arch = "x86_64")]
mod x86_lanes;

use self::simd::{Kernel, Plain};
pub use self::team::parallel_map;
pub(crate) use self::team::{parallel, parallel_pieces};

/// Which instructions the kernels use.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kernels {
    /// AVX-512 (F, BW, DQ, VL)
    Avx512,
    /// the same, but what is multiplied with bf16 weights is rounded to bf16, as other engines do: twice as many products a second
    Avx512Bf16,
    /// the same, with tiles (AMX) for bf16 weights
    Amx,
    /// AVX2 with FMA and F16C
    Avx2,
    /// NEON, on 64-bit ARM
    Neon,
    /// what every CPU of the architecture has, as the compiler puts it into vectors
    Plain,
}

/// A name that is no kernels', or of kernels that this CPU has no instructions for.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{name}` is none of the kernels that this CPU has: {}", .available.iter().map(|kernels| kernels.name()).collect::<Vec<_>>().join(", "))]
pub struct KernelsError {
    name: String,
    available: Vec<Kernels>,
}

impl std::str::FromStr for Kernels {
    type Err = KernelsError;

    fn from_str(name: &str) -> Result<Self, KernelsError> {
        let available = Self::available();
        let found = available.iter().copied().find(|kernels| kernels.name() == name);
        found.ok_or_else(|| KernelsError { name: name.to_owned(), available })
    }
}

impl Kernels {
    /// What it is called on a command line.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Avx512 => "avx512",
            Self::Avx512Bf16 => "avx512-bf16",
            Self::Amx => "amx",
            Self::Avx2 => "avx2",
            Self::Neon => "neon",
            Self::Plain => "plain",
        }
    }

    /// The fastest that multiply in f32.
    pub fn best() -> Self {
        Self::available()[0]
    }

    /// The fastest, among them those that round activations to the type of the weights: for serving, where speed counts more than the
    /// last digits.
    pub fn fastest() -> Self {
        Self::available().into_iter().rfind(|kernels| kernels.rounds()).unwrap_or_else(Self::best)
    }

    /// Whether activations are rounded to the type of the weights.
    pub const fn rounds(self) -> bool {
        matches!(self, Self::Avx512Bf16 | Self::Amx)
    }

    /// All that this CPU has: those that multiply in f32, the fastest first, then those that round, the fastest last.
    pub fn available() -> Vec<Self> {
        let mut available = Vec::new();
        #[cfg(target_arch = "x86_64")]
        {
            if x86::has_avx512() {
                available.push(Self::Avx512);
            }
            if x86::has_avx2() {
                available.push(Self::Avx2);
            }
        }
        #[cfg(target_arch = "aarch64")]
        available.push(Self::Neon);
        available.push(Self::Plain);
        #[cfg(target_arch = "x86_64")]
        {
            if x86::has_avx512_bf16() {
                available.push(Self::Avx512Bf16);
            }
            if amx::has_amx() {
                available.push(Self::Amx);
            }
        }
        available
    }

    /// Runs a kernel with these instructions, or with plain ones if the CPU lacks them.
    #[inline]
    fn run<K: Kernel>(self, kernel: K) -> K::Output {
        match self {
            // SAFETY: the CPU has the instructions that the function is compiled for.
            #[cfg(target_arch = "x86_64")]
            Self::Avx512 if x86::has_avx512() => unsafe { x86::run_avx512(kernel) },
            // SAFETY: as above.
            #[cfg(target_arch = "x86_64")]
            Self::Avx512Bf16 | Self::Amx if x86::has_avx512_bf16() => unsafe { x86::run_avx512_bf16(kernel) },
            // SAFETY: as above.
            #[cfg(target_arch = "x86_64")]
            Self::Avx2 if x86::has_avx2() => unsafe { x86::run_avx2(kernel) },
            // SAFETY: every CPU of the architecture has the instructions.
            #[cfg(target_arch = "aarch64")]
            Self::Neon => unsafe { kernel.run::<neon::Neon>() },
            // SAFETY: plain code runs on every CPU.
            _ => unsafe { kernel.run::<Plain>() },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kernels_are_known_by_their_names() {
        for kernels in Kernels::available() {
            assert_eq!(kernels.name().parse(), Ok(kernels));
        }
        let message = "fast".parse::<Kernels>().unwrap_err().to_string();
        assert!(message.starts_with("`fast` is none of the kernels") && message.contains("plain"), "{message}");
    }
}
