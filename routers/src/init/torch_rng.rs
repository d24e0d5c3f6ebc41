//! `PyTorch`'s CPU generator, so that a seed gives the numbers that it gives there: `torch.manual_seed`, `torch.randn`, `torch.rand`.
//!
//! Sources: `ATen`'s `DistributionsHelper.h`, `DistributionTemplates.h` (`normal_fill`) and `TransformationHelper.h`. Uniform numbers are
//! exact. Normal ones can differ in the last bits, since `PyTorch` itself computes log, sin and cos differently on different processors.

use std::f64::consts::TAU;

use rand_mt::Mt;

/// A Mersenne Twister, drawn from as `PyTorch` does.
pub struct TorchRng(Mt);

impl TorchRng {
    /// `torch.manual_seed(seed)`: only the low 32 bits count.
    pub fn new(seed: u64) -> Self {
        Self(Mt::new(seed as u32))
    }

    /// `torch.rand(n)`: uniform in [0, 1).
    pub fn rand(&mut self, n: usize) -> Vec<f32> {
        (0..n).map(|_| self.uniform_f32()).collect()
    }

    /// `torch.randn(n)`: standard normal. Box-Muller on blocks of 16; a last, incomplete block is drawn anew together with the numbers before it.
    pub fn randn(&mut self, n: usize) -> Vec<f32> {
        if n < 16 {
            return self.randn_small(n);
        }
        let mut values = self.rand(n);
        values.chunks_exact_mut(16).for_each(box_muller);
        if !n.is_multiple_of(16) {
            let last = &mut values[n - 16..];
            last.copy_from_slice(&self.rand(16));
            box_muller(last);
        }
        values
    }

    /// Fewer than 16 numbers are drawn in pairs, in double precision.
    fn randn_small(&mut self, n: usize) -> Vec<f32> {
        let mut values = Vec::with_capacity(n + 1);
        while values.len() < n {
            let (theta, u) = (TAU * self.uniform_f64(), self.uniform_f64());
            let radius = (-2.0 * (-u).ln_1p()).sqrt();
            values.extend([radius * theta.cos(), radius * theta.sin()].map(|v| v as f32));
        }
        values.truncate(n);
        values
    }

    /// 24 random bits.
    fn uniform_f32(&mut self) -> f32 {
        (self.0.next_u32() & 0xff_ffff) as f32 / 2f32.powi(24)
    }

    /// 53 random bits, of which the first draw gives the high ones.
    fn uniform_f64(&mut self) -> f64 {
        let (high, low) = (u64::from(self.0.next_u32()), u64::from(self.0.next_u32()));
        ((high << 32 | low) & ((1 << 53) - 1)) as f64 / 2f64.powi(53)
    }
}

/// 16 uniform numbers become 16 normal ones: the first eight give the radii, the others the angles.
fn box_muller(block: &mut [f32]) {
    let (first, second) = block.split_at_mut(8);
    for (a, b) in first.iter_mut().zip(second) {
        let radius = (-2.0 * (1.0 - *a).ln()).sqrt();
        let (sin, cos) = (TAU as f32 * *b).sin_cos();
        (*a, *b) = (radius * cos, radius * sin);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn assert_close(ours: &[f32], theirs: &[f32]) {
        assert_eq!(ours.len(), theirs.len());
        for (i, (&a, &b)) in ours.iter().zip(theirs).enumerate() {
            assert!((a - b).abs() <= 6e-6, "number {i}: {a}, torch has {b}");
        }
    }

    // The numbers of torch 2.15.0, to five decimals.

    #[test]
    fn randn_of_whole_blocks() {
        let torch = [
            -0.82013, 0.39563, 0.89891, -1.38840, -0.16700, 0.28515, -0.64109, -0.89366, 0.92654, -0.53551, -1.15972, -0.46016, 0.70854,
            1.01276, 0.23040, 1.09017, -1.58266, -0.32457, 1.92637, -0.33001, 0.19845, 0.78207, 1.03911, -0.72451, -0.20934, -0.21534,
            -1.81573, -0.34524, -2.06148, 0.67410, -1.32335, -1.35977,
        ];
        assert_close(&TorchRng::new(7).randn(32), &torch);
    }

    #[test]
    fn randn_draws_the_last_16_anew() {
        let torch = [
            1.92692, 1.48728, 0.90072, -2.10552, 0.67842, -1.23454, -0.04307, -1.60467, -0.75214, 1.64872, -0.39248, -1.40361, -0.72788,
            -0.55943, -0.76884, 0.76245, 1.64232, -0.15960, -0.49740, 0.43959, -0.75813, -0.42452, 0.30572, -0.77459, 0.03491, 0.32110,
            1.57360, -0.84547, 1.31231, 2.12279, -1.23465, -0.48791, -1.41806, 0.89627, 0.04991, 2.26672, 1.17895,
        ];
        assert_close(&TorchRng::new(42).randn(37), &torch);
    }

    #[test]
    fn randn_of_few() {
        assert_close(&TorchRng::new(42).randn(5), &[0.33669, 0.12881, 0.23446, 0.23033, -1.12286]);
        assert_eq!(TorchRng::new(42).randn(0), []);
    }

    #[test]
    fn rand_is_exact_and_uses_32_bits_of_the_seed() {
        let torch = [71_530, 1_771_160, 4_795_641, 452_227, 7_912_376];
        let ours = TorchRng::new((1 << 40) + 3).rand(5);
        assert_eq!(ours, torch.map(|bits| bits as f32 / 2f32.powi(24)));
    }
}
