//! Rotary position embeddings: the angles of `transformers`' `modeling_rope_utils`, computed in f64 for the positions at hand.
//!
//! Two kinds depend on the sequence's length: `dynamic` stretches its base with it, and `longrope` has other divisors beyond the original
//! length. As in transformers, the length that counts is the one at the end of the forward call, and keys in the cache keep the rotation
//! that they entered with. So when a sequence crosses the original length, the tokens before and after it are rotated differently, and
//! for these two kinds alone the answer depends on how a long prompt is cut into calls. It never depends on other sequences.

use std::f64::consts::PI;

use candle_core::{DType, Device, Result, Tensor};

use super::matrix::Values;
use crate::config::{Rope, RopeScaling};

/// Cosines and sines of some positions, N rows of one entry per rotated pair of dimensions.
#[derive(Debug)]
pub(super) struct Table {
    /// [N, R / 2], f32
    cos: Tensor,
    /// [N, R / 2], f32
    sin: Tensor,
}

impl Table {
    /// For sequences laid end to end, each `(first position, tokens)`.
    pub fn new(rope: &Rope, head_dim: usize, spans: &[(usize, usize)], device: &Device) -> Result<Self> {
        let (mut cos, mut sin) = (Vec::new(), Vec::new());
        for &(first, tokens) in spans {
            let (frequencies, scale) = frequencies(rope, head_dim, first + tokens);
            for position in first..first + tokens {
                for frequency in &frequencies {
                    let (s, c) = (position as f64 * frequency).sin_cos();
                    cos.push((c * scale) as f32);
                    sin.push((s * scale) as f32);
                }
            }
        }
        let shape = (spans.iter().map(|span| span.1).sum::<usize>(), rotated(rope, head_dim) / 2);
        Ok(Self { cos: Tensor::from_vec(cos, shape, device)?, sin: Tensor::from_vec(sin, shape, device)? })
    }

    /// Rotates x [N, heads, hd] in f32; dimension i of the rotated part pairs with i + R / 2, the rest of the head stays.
    pub fn rotate(&self, x: &Tensor) -> Result<Tensor> {
        let (rotated, head_dim) = (2 * self.cos.dim(1)?, x.dim(2)?);
        let x = x.to_dtype(DType::F32)?.unsqueeze(0)?;
        let turning = x.narrow(3, 0, rotated)?.contiguous()?;
        let turned = if x.track_op() { self.turn(&turning)? } else { candle_nn::rotary_emb::rope_thd(&turning, &self.cos, &self.sin)? };
        let whole = if rotated == head_dim { turned } else { Tensor::cat(&[turned, x.narrow(3, rotated, head_dim - rotated)?], 3)? };
        whole.squeeze(0)
    }

    /// Cosines and sines as they lie, and R / 2.
    pub fn values(&self) -> Result<([Values<'_>; 2], usize)> {
        Ok(([Values::of(&self.cos)?, Values::of(&self.sin)?], self.cos.dim(1)?))
    }

    /// What `rope_thd` does, in steps that have gradients: x [1, N, heads, R].
    fn turn(&self, x: &Tensor) -> Result<Tensor> {
        let half = self.cos.dim(1)?;
        let (cos, sin) = (self.cos.unsqueeze(1)?, self.sin.unsqueeze(1)?); // [N, 1, R / 2]
        let (a, b) = (x.narrow(3, 0, half)?, x.narrow(3, half, half)?);
        let first = (a.broadcast_mul(&cos)? - b.broadcast_mul(&sin)?)?;
        let second = (b.broadcast_mul(&cos)? + a.broadcast_mul(&sin)?)?;
        Tensor::cat(&[first, second], 3)
    }
}

/// R, the number of rotated dimensions.
fn rotated(rope: &Rope, head_dim: usize) -> usize {
    (head_dim as f64 * rope.partial) as usize
}

/// Angle per position of each rotated pair, and the factor on cosine and sine, for a sequence of `length` tokens.
fn frequencies(rope: &Rope, head_dim: usize, length: usize) -> (Vec<f64>, f64) {
    let dim = rotated(rope, head_dim);
    let plain = |theta: f64| (0..dim / 2).map(move |i| theta.powf(-((2 * i) as f64) / dim as f64));
    match &rope.scaling {
        RopeScaling::Default => (plain(rope.theta).collect(), 1.0),
        RopeScaling::Linear { factor } => (plain(rope.theta).map(|f| f / factor).collect(), 1.0),
        RopeScaling::Dynamic { factor, original } => {
            let stretch = factor * (length.max(*original) as f64 / *original as f64) - (factor - 1.0);
            (plain(rope.theta * stretch.powf(dim as f64 / (dim as f64 - 2.0))).collect(), 1.0)
        }
        RopeScaling::Yarn { factor, original, beta_fast, beta_slow, attention_factor, truncate } => {
            // The dimension that turns `rotations` times over the original length.
            let dimension = |rotations: f64| dim as f64 * (*original as f64 / (rotations * 2.0 * PI)).ln() / (2.0 * rope.theta.ln());
            let (mut low, mut high) = (dimension(*beta_fast), dimension(*beta_slow));
            if *truncate {
                (low, high) = (low.floor(), high.ceil());
            }
            let low = low.max(0.0);
            let high = high.min(dim as f64 - 1.0);
            let width = if (high - low).abs() > 0.0 { high - low } else { 0.001 };
            let blend = |(i, f): (usize, f64)| {
                let interpolated = ((i as f64 - low) / width).clamp(0.0, 1.0);
                f / factor * interpolated + f * (1.0 - interpolated)
            };
            (plain(rope.theta).enumerate().map(blend).collect(), *attention_factor)
        }
        RopeScaling::LongRope { short, long, original, attention_factor } => {
            let divisors = if length > *original { long } else { short };
            (plain(rope.theta).zip(divisors).map(|(f, divisor)| f / divisor).collect(), *attention_factor)
        }
        RopeScaling::Llama3 { factor, low, high, original } => {
            let scale = |f: f64| {
                let turns = *original as f64 * f / (2.0 * PI);
                if turns < *low {
                    f / factor
                } else if turns > *high {
                    f
                } else {
                    let smooth = (turns - low) / (high - low);
                    (1.0 - smooth) * f / factor + smooth * f
                }
            };
            (plain(rope.theta).map(scale).collect(), 1.0)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn llama3() -> Rope {
        Rope { theta: 5e5, partial: 1.0, scaling: RopeScaling::Llama3 { factor: 8.0, low: 1.0, high: 4.0, original: 8192 } }
    }

    #[test]
    fn far_positions_keep_apart() {
        let table = Table::new(&llama3(), 8, &[(100_000, 2)], &Device::Cpu).unwrap();
        let cos = table.cos.to_vec2::<f32>().unwrap();
        assert!((cos[0][0] - 100_000f64.cos() as f32).abs() < 1e-7);
        assert!((cos[1][0] - 100_001f64.cos() as f32).abs() < 1e-7);
    }

    #[test]
    fn spans_do_not_see_each_other() {
        let rope = Rope { theta: 1e4, partial: 1.0, scaling: RopeScaling::Dynamic { factor: 2.0, original: 8 } };
        let both = Table::new(&rope, 8, &[(0, 30), (2, 3)], &Device::Cpu).unwrap();
        let alone = Table::new(&rope, 8, &[(2, 3)], &Device::Cpu).unwrap();
        let tail = both.sin.narrow(0, 30, 3).unwrap().to_vec2::<f32>().unwrap();
        assert_eq!(tail, alone.sin.to_vec2::<f32>().unwrap());
    }

    #[test]
    fn partial_rotation_leaves_the_rest() {
        let rope = Rope { theta: 1e4, partial: 0.5, scaling: RopeScaling::Default };
        let x = Tensor::arange(0f32, 16.0, &Device::Cpu).unwrap().reshape((2, 1, 8)).unwrap();
        let y = Table::new(&rope, 8, &[(3, 2)], &Device::Cpu).unwrap().rotate(&x).unwrap().flatten_all().unwrap().to_vec1::<f32>().unwrap();
        assert_eq!(y[4..8], [4.0, 5.0, 6.0, 7.0]);
        let (s, c) = 3f32.sin_cos();
        assert!((y[0] - (0.0 * c - 2.0 * s)).abs() < 1e-6 && (y[2] - (2.0 * c + 0.0 * s)).abs() < 1e-6);
    }
}
