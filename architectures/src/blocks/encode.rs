//! Floats to blocks: for every block the scales that lose least, weighted by what the values are multiplied with.
//!
//! Scales are found as in ggml's k-quants: a few roundings are tried, each with the least-squares scale (and minimum) of its integers. The
//! weight of value x is its importance (the mean square of the activations that meet it, 1 if unknown) times sqrt(s + x²), s being the
//! mean square around it: large values matter more to what a model says than the square error alone would have it.

use std::array;

use half::f16;
use rayon::prelude::*;

use crate::weights::Dtype;

/// Roundings tried on either side of the plain one, a tenth of a level apart.
const TRIES: i32 = 10;

/// Encodes rows of `row` values, whole blocks, in parallel. `importance` is one row's; `None` weighs all columns alike. The caller has seen to it
/// that `dtype` is one of blocks and fits the rows.
pub(super) fn encode(dtype: Dtype, values: &[f32], row: usize, importance: Option<&[f32]>) -> Vec<u8> {
    let mut out = vec![0; dtype.bytes(values.len())];
    let one_row = |values: &[f32], out: &mut [u8]| match dtype {
        Dtype::Q4_0 => each(values, importance, out, q4_0),
        Dtype::Q5_0 => each(values, importance, out, q5_0),
        Dtype::Q8_0 => each(values, importance, out, q8_0),
        Dtype::Q4K => each(values, importance, out, q4_k),
        Dtype::Q5K => each(values, importance, out, q5_k),
        Dtype::Q6K => each(values, importance, out, q6_k),
        Dtype::F8E4M3 | Dtype::Bf16 | Dtype::F16 | Dtype::F32 | Dtype::F64 => {}
    };
    let rows = values.par_chunks_exact(row.max(1)).zip(out.par_chunks_exact_mut(dtype.bytes(row).max(1)));
    rows.for_each(|(values, out)| one_row(values, out));
    out
}

fn each<const ELEMENTS: usize, const BYTES: usize>(
    row: &[f32],
    importance: Option<&[f32]>,
    out: &mut [u8],
    encode: fn(&[f32; ELEMENTS], &[f32; ELEMENTS], &mut [u8; BYTES]),
) {
    for (block, (x, out)) in row.as_chunks::<ELEMENTS>().0.iter().zip(out.as_chunks_mut::<BYTES>().0).enumerate() {
        let mean = sum(|i: usize| x[i] * x[i], ELEMENTS) / ELEMENTS as f32;
        let mut weights = array::from_fn(|i| (mean + x[i] * x[i]).sqrt());
        if let Some(importance) = importance.and_then(|all| all[block * ELEMENTS..].first_chunk::<ELEMENTS>()) {
            weights.iter_mut().zip(importance).for_each(|(weight, importance)| *weight *= importance);
        }
        encode(x, &weights, out);
    }
}

/// In eight lanes, which the compiler turns into vectors; `n` is a multiple of eight.
fn sum(value: impl Fn(usize) -> f32, n: usize) -> f32 {
    let mut lanes = [0f32; 8];
    for start in (0..n).step_by(8) {
        for (i, lane) in lanes.iter_mut().enumerate() {
            *lane += value(start + i);
        }
    }
    lanes.iter().sum()
}

/// To the nearest integer, halves to even, for |x| below 2^22; without a call where the CPU has no instruction for it.
fn nearest(x: f32) -> f32 {
    const SHIFT: f32 = 12_582_912.0;
    x + SHIFT - SHIFT
}

/// The scale of q in [-n, n - 1] for x ≈ scale q: greatest (Σ w x q)² / Σ w q², which leaves the least error.
fn symmetric<const N: usize>(x: &[f32; N], w: &[f32; N], n: f32) -> f32 {
    let peak = x.iter().fold(0f32, |peak, x| if x.abs() > peak.abs() { *x } else { peak });
    let (mut best, mut scale) = (0.0, 0.0);
    if peak == 0.0 {
        return scale;
    }
    let wx: [f32; N] = array::from_fn(|i| w[i] * x[i]);
    for step in -TRIES..=TRIES {
        let inverse = -(n + 0.1 * step as f32) / peak;
        let q: [f32; N] = array::from_fn(|i| nearest(inverse * x[i]).max(-n).min(n - 1.0));
        let (xq, qq) = (sum(|i| wx[i] * q[i], N), sum(|i| w[i] * q[i] * q[i], N));
        if qq > 0.0 && xq * xq > best * qq {
            (best, scale) = (xq * xq / qq, xq / qq);
        }
    }
    scale
}

/// Scale and minimum of q in [0, levels] for x ≈ scale q - minimum, neither of them negative.
fn affine<const N: usize>(x: &[f32; N], w: &[f32; N], levels: f32) -> (f32, f32) {
    let low = x.iter().fold(0f32, |low, x| low.min(*x));
    let high = x.iter().fold(f32::MIN, |high, x| high.max(*x));
    if high <= low {
        return (0.0, -low);
    }
    let wx: [f32; N] = array::from_fn(|i| w[i] * x[i]);
    let (w1, x1) = (sum(|i| w[i], N), sum(|i| wx[i], N));
    let (mut best, mut found) = (f32::MIN, (0.0, 0.0));
    for step in -TRIES..=TRIES {
        let inverse = (levels + 0.1 * step as f32) / (high - low);
        let q: [f32; N] = array::from_fn(|i| nearest(inverse * (x[i] - low)).min(levels));
        let (q1, q2, xq) = (sum(|i| w[i] * q[i], N), sum(|i| w[i] * q[i] * q[i], N), sum(|i| wx[i] * q[i], N));
        let determinant = w1 * q2 - q1 * q1;
        let mut scale = (w1 * xq - x1 * q1) / determinant;
        let mut offset = (q2 * x1 - q1 * xq) / determinant;
        // No minimum above zero; and no sense in a line through one point.
        if determinant <= 0.0 || offset > 0.0 {
            (scale, offset) = (if q2 > 0.0 { xq / q2 } else { 0.0 }, 0.0);
        }
        // Σ w x² less the weighted error.
        let gain = scale * xq + offset * x1;
        if gain > best {
            (best, found) = (gain, (scale.max(0.0), -offset));
        }
    }
    found
}

/// The integers of x in units of `scale`.
fn integers<const N: usize>(x: &[f32; N], scale: f32, low: f32, high: f32) -> [u8; N] {
    let inverse = if scale == 0.0 { 0.0 } else { scale.recip() };
    x.map(|x| (nearest(x * inverse).clamp(low, high) - low) as u8)
}

/// `scale` as it will be read.
fn store(scale: f32, out: &mut [u8]) -> f32 {
    let half = f16::from_f32(scale);
    out.copy_from_slice(&half.to_le_bytes());
    half.to_f32()
}

fn q4_0(x: &[f32; 32], w: &[f32; 32], out: &mut [u8; 18]) {
    let d = store(symmetric(x, w, 8.0), &mut out[..2]);
    let q = integers(x, d, -8.0, 7.0);
    for i in 0..16 {
        out[2 + i] = q[i] | q[16 + i] << 4;
    }
}

fn q5_0(x: &[f32; 32], w: &[f32; 32], out: &mut [u8; 22]) {
    let d = store(symmetric(x, w, 16.0), &mut out[..2]);
    let q = integers(x, d, -16.0, 15.0);
    let fifth = (0..32).fold(0, |bits, i| bits | u32::from(q[i] >> 4) << i);
    out[2..6].copy_from_slice(&fifth.to_le_bytes());
    for i in 0..16 {
        out[6 + i] = q[i] & 15 | q[16 + i] << 4;
    }
}

/// The scale that keeps the largest value: with 255 levels there is nothing to search for.
fn q8_0(x: &[f32; 32], _: &[f32; 32], out: &mut [u8; 34]) {
    let d = x.iter().fold(0f32, |peak, x| peak.max(x.abs())) / 127.0;
    store(d, &mut out[..2]);
    let inverse = if d == 0.0 { 0.0 } else { d.recip() };
    for (x, out) in x.iter().zip(&mut out[2..]) {
        // ggml rounds halves away from zero.
        *out = (x * inverse).round() as i8 as u8;
    }
}

/// The integers of a block of eight runs of 32 with scales and minima, whose d, dmin and twelve packed bytes go to `out`.
fn scaled_runs(x: &[f32; 256], w: &[f32; 256], levels: f32, out: &mut [u8]) -> [[u8; 32]; 8] {
    let (x, w) = (x.as_chunks::<32>().0, w.as_chunks::<32>().0);
    let found: [(f32, f32); 8] = array::from_fn(|j| affine(&x[j], &w[j], levels));
    let largest = found.iter().fold((0f32, 0f32), |(s, m), run| (s.max(run.0), m.max(run.1)));
    let (d, dmin) = (store(largest.0 / 63.0, &mut out[..2]), store(largest.1 / 63.0, &mut out[2..4]));
    let packed = &mut out[4..16];
    packed.fill(0);
    array::from_fn(|j| {
        let in_units = |value: f32, unit: f32| if unit == 0.0 { 0 } else { nearest(value / unit).min(63.0) as u8 };
        let (scale, minimum) = (in_units(found[j].0, d), in_units(found[j].1, dmin));
        if j < 4 {
            packed[j] |= scale;
            packed[j + 4] |= minimum;
        } else {
            packed[j + 4] = scale & 15 | minimum << 4;
            packed[j - 4] |= scale >> 4 << 6;
            packed[j] |= minimum >> 4 << 6;
        }
        let minimum = dmin * f32::from(minimum);
        integers(&x[j].map(|x| x + minimum), d * f32::from(scale), 0.0, levels)
    })
}

fn q4_k(x: &[f32; 256], w: &[f32; 256], out: &mut [u8; 144]) {
    let q = scaled_runs(x, w, 15.0, &mut out[..16]);
    for j in 0..4 {
        for i in 0..32 {
            out[16 + 32 * j + i] = q[2 * j][i] | q[2 * j + 1][i] << 4;
        }
    }
}

fn q5_k(x: &[f32; 256], w: &[f32; 256], out: &mut [u8; 176]) {
    let q = scaled_runs(x, w, 31.0, &mut out[..16]);
    for i in 0..32 {
        out[16 + i] = (0..8).fold(0, |bits, j| bits | q[j][i] >> 4 << j);
        for j in 0..4 {
            out[48 + 32 * j + i] = q[2 * j][i] & 15 | q[2 * j + 1][i] << 4;
        }
    }
}

fn q6_k(x: &[f32; 256], w: &[f32; 256], out: &mut [u8; 210]) {
    let (x, w) = (x.as_chunks::<16>().0, w.as_chunks::<16>().0);
    let found: [f32; 16] = array::from_fn(|j| symmetric(&x[j], &w[j], 32.0));
    let peak = found.iter().fold(0f32, |peak, scale| if scale.abs() > peak.abs() { *scale } else { peak });
    let d = store(peak / -128.0, &mut out[208..]);
    let mut q = [0; 256];
    for j in 0..16 {
        let scale = if d == 0.0 { 0.0 } else { nearest(found[j] / d).clamp(-128.0, 127.0) };
        out[192 + j] = scale as i8 as u8;
        q[16 * j..][..16].copy_from_slice(&integers(&x[j], d * scale, -32.0, 31.0));
    }
    for n in 0..2 {
        let run = |r: usize, i: usize| q[128 * n + 32 * r + i];
        for i in 0..32 {
            out[64 * n + i] = run(0, i) & 15 | run(2, i) << 4;
            out[64 * n + 32 + i] = run(1, i) & 15 | run(3, i) << 4;
            out[128 + 32 * n + i] = (0..4).fold(0, |bits, r| bits | run(r, i) >> 4 << (2 * r));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::blocks::decode;

    const BLOCKS: [Dtype; 6] = [Dtype::Q4_0, Dtype::Q5_0, Dtype::Q8_0, Dtype::Q4K, Dtype::Q5K, Dtype::Q6K];

    /// Bell-shaped, as weights are: sums of twelve uniform numbers.
    fn bell(n: usize) -> Vec<f32> {
        let mut state = 1u64;
        let mut uniform = || {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (state >> 40) as f32 / (1 << 24) as f32
        };
        (0..n).map(|_| 0.02 * ((0..12).map(|_| uniform()).sum::<f32>() - 6.0)).collect()
    }

    /// Root mean square of what is lost, relative to the values'; of column 0 of each row alone, and of the others.
    fn lost(dtype: Dtype, values: &[f32], row: usize, importance: Option<&[f32]>) -> (f64, f64) {
        let mut back = vec![0.0; values.len()];
        decode(dtype, &encode(dtype, values, row, importance), &mut back);
        let (mut first, mut others, mut all) = (0.0, 0.0, 0.0);
        for (i, (a, b)) in values.iter().zip(&back).enumerate() {
            let error = f64::from(a - b).powi(2);
            *(if i % row == 0 { &mut first } else { &mut others }) += error;
            all += f64::from(*a).powi(2);
        }
        ((first * row as f64 / all).sqrt(), (others / all).sqrt())
    }

    #[test]
    fn little_is_lost() {
        let values = bell(64 * 512);
        let bounds = [0.085, 0.042, 0.006, 0.074, 0.037, 0.019];
        for (dtype, bound) in BLOCKS.into_iter().zip(bounds) {
            let (_, lost) = lost(dtype, &values, 512, None);
            assert!(lost < bound, "{dtype}: {lost}");
            assert!(lost > bound / 1.5, "{dtype}: {lost}, the bound {bound} could be sharper");
        }
    }

    #[test]
    fn what_is_important_loses_less() {
        let values = bell(64 * 512);
        let mut importance = vec![1.0; 512];
        importance[0] = 1000.0;
        for dtype in BLOCKS.into_iter().filter(|dtype| *dtype != Dtype::Q8_0) {
            let ((plain, _), (weighted, _)) = (lost(dtype, &values, 512, None), lost(dtype, &values, 512, Some(&importance)));
            assert!(weighted < 0.8 * plain, "{dtype}: {weighted} against {plain}");
        }
    }

    #[test]
    fn odd_blocks_stay_what_they_are() {
        for value in [0.0, -0.25, 0.5] {
            for dtype in BLOCKS {
                let (values, mut back) = ([value; 256], [f32::NAN; 256]);
                decode(dtype, &encode(dtype, &values, 256, None), &mut back);
                let furthest = back.iter().map(|back| (back - value).abs()).fold(0.0, f32::max);
                assert!(furthest <= 0.004 * value.abs(), "{dtype}: {value} became {furthest} else");
            }
        }
        // One value far from the others, nothing that is not finite.
        let mut values = bell(256);
        values[7] = 30.0;
        for dtype in BLOCKS {
            let mut back = [f32::NAN; 256];
            decode(dtype, &encode(dtype, &values, 256, Some(&[0.0; 256])), &mut back);
            assert!(back.iter().all(|back| back.is_finite()), "{dtype}");
        }
    }
}
