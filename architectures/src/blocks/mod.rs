//! The block types of ggml: a scale or two beside the small integers of 32 or 256 neighbours in a row. What the bytes mean, and how to find them;
//! the layouts are those of llama.cpp's `ggml-common.h`.

mod encode;

use half::f16;

use crate::weights::Dtype;

/// The blocks of a tensor [..., row] of f32 values, in parallel; `importance` says how much each column matters (one row of it, none negative).
/// `None` if `dtype` has no blocks or a row is no whole number of them.
pub fn encode(dtype: Dtype, values: &[f32], row: usize, importance: Option<&[f32]>) -> Option<Vec<u8>> {
    let importance = importance.filter(|importance| importance.len() == row);
    (dtype.is_blocks() && row.is_multiple_of(dtype.block().0)).then(|| encode::encode(dtype, values, row, importance))
}

/// Decodes whole blocks of `dtype`, as many as `out` holds. For types without blocks it does nothing.
pub(crate) fn decode(dtype: Dtype, data: &[u8], out: &mut [f32]) {
    let (elements, bytes) = dtype.block();
    if dtype.is_blocks() {
        let mut parts = Parts::default();
        for (block, out) in data.chunks_exact(bytes).zip(out.chunks_exact_mut(elements)) {
            parts.of(dtype, block);
            for (i, (out, level)) in out.iter_mut().zip(&parts.levels).enumerate() {
                let sub = i / dtype.sub_block();
                *out = parts.scales[sub] * f32::from(*level) - parts.minima[sub];
            }
        }
    }
}

/// A block taken apart: element = scale level - minimum of its [sub-block](Dtype::sub_block).
pub(crate) struct Parts {
    pub levels: [u8; 256],
    pub scales: [f32; 16],
    pub minima: [f32; 16],
}

impl Default for Parts {
    fn default() -> Self {
        Self { levels: [0; 256], scales: [0.0; 16], minima: [0.0; 16] }
    }
}

impl Parts {
    /// Takes one block of `dtype` apart. For types without blocks it does nothing.
    #[inline]
    pub fn of(&mut self, dtype: Dtype, block: &[u8]) {
        match dtype {
            Dtype::Q4_0 => self.q4_0(block),
            Dtype::Q5_0 => self.q5_0(block),
            Dtype::Q8_0 => self.q8_0(block),
            Dtype::Q4K => self.k(block, &[0; 32], &block[16..]),
            Dtype::Q5K => self.k(block, &block[16..48], &block[48..]),
            Dtype::Q6K => self.q6_k(block),
            Dtype::F8E4M3 | Dtype::Bf16 | Dtype::F16 | Dtype::F32 | Dtype::F64 => {}
        }
    }

    /// The one scale of a type whose level `zero` means 0.
    fn scale(&mut self, d: f32, zero: f32) {
        (self.scales[0], self.minima[0]) = (d, d * zero);
    }

    /// d, then 16 bytes: element i in the low halves, i + 16 in the high ones.
    fn q4_0(&mut self, block: &[u8]) {
        self.scale(half(block, 0), 8.0);
        for (i, q) in block[2..18].iter().enumerate() {
            (self.levels[i], self.levels[i + 16]) = (q & 15, q >> 4);
        }
    }

    /// d, four bytes with the fifth bits of all elements, then 16 bytes as in `Q4_0`.
    fn q5_0(&mut self, block: &[u8]) {
        self.scale(half(block, 0), 16.0);
        let fifth = u32::from_le_bytes([block[2], block[3], block[4], block[5]]);
        let bit = |i: usize| (fifth >> i & 1) as u8 * 16;
        for (i, q) in block[6..22].iter().enumerate() {
            (self.levels[i], self.levels[i + 16]) = (q & 15 | bit(i), q >> 4 | bit(i + 16));
        }
    }

    /// d, then 32 signed bytes.
    fn q8_0(&mut self, block: &[u8]) {
        self.scale(half(block, 0), 128.0);
        for (level, q) in self.levels.iter_mut().zip(&block[2..34]) {
            *level = q ^ 0x80;
        }
    }

    /// d, dmin, 12 bytes of scales and minima; 128 bytes: of every 64 elements the first 32 in the low halves, the others in the high ones; and
    /// of `Q5_K` 32 bytes of fifth bits: bit j of byte i is that of element i of sub-block j.
    fn k(&mut self, block: &[u8], fifth: &[u8], halves: &[u8]) {
        let (d, dmin, packed) = (half(block, 0), half(block, 2), &block[4..16]);
        for j in 0..8 {
            // Six bits each.
            let (scale, minimum) = if j < 4 {
                (packed[j] & 63, packed[j + 4] & 63)
            } else {
                (packed[j + 4] & 15 | packed[j - 4] >> 6 << 4, packed[j + 4] >> 4 | packed[j] >> 6 << 4)
            };
            (self.scales[j], self.minima[j]) = (d * f32::from(scale), dmin * f32::from(minimum));
            for ((level, q), fifth) in self.levels[32 * j..][..32].iter_mut().zip(&halves[32 * (j / 2)..][..32]).zip(fifth) {
                *level = q >> (4 * (j % 2)) & 15 | (fifth >> j & 1) << 4;
            }
        }
    }

    /// 128 bytes of low halves, 64 of upper pairs of bits, 16 signed scales, d. Each half of the block is four runs of 32 elements: runs 0 and 1
    /// in the low halves of its 64 bytes, 2 and 3 in the high ones, and run r in bits 2r and 2r + 1 of its 32 bytes of pairs.
    fn q6_k(&mut self, block: &[u8]) {
        let d = half(block, 208);
        for (sub, scale) in block[192..208].iter().enumerate() {
            self.scales[sub] = d * f32::from(*scale as i8);
            self.minima[sub] = 32.0 * self.scales[sub];
        }
        for (run, levels) in self.levels.chunks_exact_mut(32).enumerate() {
            let (low, pairs) = (&block[64 * (run / 4) + 32 * (run % 2)..][..32], &block[128 + 32 * (run / 4)..][..32]);
            for ((level, low), pairs) in levels.iter_mut().zip(low).zip(pairs) {
                *level = low >> (4 * (run % 4 / 2)) & 15 | (pairs >> (2 * (run % 4)) & 3) << 4;
            }
        }
    }
}

fn half(block: &[u8], at: usize) -> f32 {
    f16::from_le_bytes([block[at], block[at + 1]]).to_f32()
}

#[cfg(test)]
mod tests {
    use candle_core::{
        Device,
        quantized::{GgmlDType, ggml_file::qtensor_from_ggml},
    };

    use super::*;

    /// Every bit pattern that matters, the scales small.
    fn bytes(dtype: Dtype, blocks: usize) -> Vec<u8> {
        let (_, size) = dtype.block();
        let mut bytes: Vec<u8> = (0..blocks * size).map(|i| (i * 7919 + i / 7 * 31) as u8).collect();
        let scales: &[usize] = match dtype {
            Dtype::Q6K => &[208],
            Dtype::Q4K | Dtype::Q5K => &[0, 2],
            _ => &[0],
        };
        for (i, block) in bytes.chunks_exact_mut(size).enumerate() {
            for at in scales {
                block[*at..at + 2].copy_from_slice(&f16::from_f32(0.01 * (i + at) as f32 - 0.02).to_le_bytes());
            }
        }
        bytes
    }

    #[test]
    fn agrees_with_candle() {
        let types = [
            (Dtype::Q4_0, GgmlDType::Q4_0),
            (Dtype::Q5_0, GgmlDType::Q5_0),
            (Dtype::Q8_0, GgmlDType::Q8_0),
            (Dtype::Q4K, GgmlDType::Q4K),
            (Dtype::Q5K, GgmlDType::Q5K),
            (Dtype::Q6K, GgmlDType::Q6K),
        ];
        for (dtype, theirs) in types {
            let (elements, size) = dtype.block();
            assert_eq!((elements, size), (theirs.block_size(), theirs.type_size()), "{dtype}");
            let (bytes, mut ours) = (bytes(dtype, 5), vec![f32::NAN; 5 * elements]);
            decode(dtype, &bytes, &mut ours);
            let theirs = qtensor_from_ggml(theirs, &bytes, vec![5, elements], &Device::Cpu).unwrap();
            let theirs: Vec<f32> = theirs.dequantize(&Device::Cpu).unwrap().flatten_all().unwrap().to_vec1().unwrap();
            let furthest = ours.iter().zip(&theirs).map(|(a, b)| (a - b).abs() / (1.0 + b.abs())).fold(0.0, f32::max);
            assert!(furthest < 1e-6, "{dtype}: {furthest}");
        }
    }
}
