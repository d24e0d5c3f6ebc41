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
    match dtype {
        Dtype::Q4_0 => each(data, out, q4_0),
        Dtype::Q5_0 => each(data, out, q5_0),
        Dtype::Q8_0 => each(data, out, q8_0),
        Dtype::Q4K => each(data, out, q4_k),
        Dtype::Q5K => each(data, out, q5_k),
        Dtype::Q6K => each(data, out, q6_k),
        Dtype::F8E4M3 | Dtype::Bf16 | Dtype::F16 | Dtype::F32 | Dtype::F64 => {}
    }
}

fn each<const BYTES: usize, const ELEMENTS: usize>(data: &[u8], out: &mut [f32], decode: impl Fn(&[u8; BYTES], &mut [f32; ELEMENTS])) {
    for (block, out) in data.as_chunks::<BYTES>().0.iter().zip(out.as_chunks_mut::<ELEMENTS>().0) {
        decode(block, out);
    }
}

fn half(block: &[u8], at: usize) -> f32 {
    f16::from_le_bytes([block[at], block[at + 1]]).to_f32()
}

/// d, then 16 bytes: element i in the low halves, i + 16 in the high ones.
fn q4_0(block: &[u8; 18], out: &mut [f32; 32]) {
    let d = half(block, 0);
    let (low, high) = out.split_at_mut(16);
    for ((q, low), high) in block[2..].iter().zip(low).zip(high) {
        *low = d * f32::from((q & 15) as i8 - 8);
        *high = d * f32::from((q >> 4) as i8 - 8);
    }
}

/// d, four bytes with the fifth bits of all elements, then 16 bytes as in `Q4_0`.
fn q5_0(block: &[u8; 22], out: &mut [f32; 32]) {
    let (d, fifth) = (half(block, 0), u32::from_le_bytes([block[2], block[3], block[4], block[5]]));
    let bit = |i: usize| (fifth >> i & 1) as u8 * 16;
    let (low, high) = out.split_at_mut(16);
    for (i, ((q, low), high)) in block[6..].iter().zip(low).zip(high).enumerate() {
        *low = d * f32::from((q & 15 | bit(i)) as i8 - 16);
        *high = d * f32::from((q >> 4 | bit(i + 16)) as i8 - 16);
    }
}

/// d, then 32 signed bytes.
fn q8_0(block: &[u8; 34], out: &mut [f32; 32]) {
    let d = half(block, 0);
    for (q, out) in block[2..].iter().zip(out) {
        *out = d * f32::from(*q as i8);
    }
}

/// Scale and minimum of sub-block `j` of 8, six bits each in twelve bytes.
fn scale_and_minimum(packed: &[u8], j: usize) -> (f32, f32) {
    let (scale, minimum) = if j < 4 {
        (packed[j] & 63, packed[j + 4] & 63)
    } else {
        (packed[j + 4] & 15 | packed[j - 4] >> 6 << 4, packed[j + 4] >> 4 | packed[j] >> 6 << 4)
    };
    (f32::from(scale), f32::from(minimum))
}

/// d, dmin, 12 bytes of scales and minima, 128 bytes: of every 64 elements the first 32 in the low halves, the others in the high ones.
fn q4_k(block: &[u8; 144], out: &mut [f32; 256]) {
    let (d, dmin, packed) = (half(block, 0), half(block, 2), &block[4..16]);
    for (j, (qs, out)) in block[16..].chunks_exact(32).zip(out.chunks_exact_mut(64)).enumerate() {
        let (low, high) = out.split_at_mut(32);
        let ((s1, m1), (s2, m2)) = (scale_and_minimum(packed, 2 * j), scale_and_minimum(packed, 2 * j + 1));
        for ((q, low), high) in qs.iter().zip(low).zip(high) {
            *low = d * s1 * f32::from(q & 15) - dmin * m1;
            *high = d * s2 * f32::from(q >> 4) - dmin * m2;
        }
    }
}

/// As `Q4_K` with 32 bytes of fifth bits before the halves: bit j of byte i is that of element i of sub-block j.
fn q5_k(block: &[u8; 176], out: &mut [f32; 256]) {
    let (d, dmin, packed, fifth) = (half(block, 0), half(block, 2), &block[4..16], &block[16..48]);
    for (j, (qs, out)) in block[48..].chunks_exact(32).zip(out.chunks_exact_mut(64)).enumerate() {
        let (low, high) = out.split_at_mut(32);
        let ((s1, m1), (s2, m2)) = (scale_and_minimum(packed, 2 * j), scale_and_minimum(packed, 2 * j + 1));
        for (((q, fifth), low), high) in qs.iter().zip(fifth).zip(low).zip(high) {
            let bits = fifth >> (2 * j);
            *low = d * s1 * f32::from(q & 15 | (bits & 1) << 4) - dmin * m1;
            *high = d * s2 * f32::from(q >> 4 | (bits & 2) << 3) - dmin * m2;
        }
    }
}

/// 128 bytes of low halves, 64 of upper pairs of bits, 16 signed scales, d. Each half of the block is four runs of 32 elements: runs 0 and 1 in
/// the low halves of its 64 bytes, 2 and 3 in the high ones, and run r in bits 2r and 2r + 1 of its 32 bytes of pairs.
fn q6_k(block: &[u8; 210], out: &mut [f32; 256]) {
    let (d, scales) = (half(block, 208), &block[192..208]);
    for (n, out) in out.chunks_exact_mut(128).enumerate() {
        let (low, pairs, scales) = (&block[64 * n..][..64], &block[128 + 32 * n..][..32], &scales[8 * n..][..8]);
        for (run, out) in out.chunks_exact_mut(32).enumerate() {
            let (low, high) = (&low[32 * (run % 2)..][..32], 4 * (run / 2));
            for (i, out) in out.iter_mut().enumerate() {
                let q = low[i] >> high & 15 | (pairs[i] >> (2 * run) & 3) << 4;
                *out = d * f32::from(scales[2 * run + i / 16] as i8) * f32::from(q as i8 - 32);
            }
        }
    }
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
