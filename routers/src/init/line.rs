//! How likely the right experts are along a line through the space of logits: what fits of gates and of their scale come down to.
//!
//! Most of the time is that of exponentials, so they are computed many at a time. N rows, E experts.

/// log of the product of so many sums of E exponentials does not overflow for any E that a model has.
const ROWS: usize = 16;

/// -log p(right expert), summed over rows, as a function of a step along a line, where it is convex.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Loss {
    /// in nats
    pub value: f64,
    /// first derivative
    pub slope: f64,
    /// second derivative
    pub curvature: f64,
}

/// Of logits `at + step * along`, both [N, E] (no `at`: zeros), in all of which the right expert is `right`.
pub(super) fn loss(at: Option<&[f32]>, along: &[f32], experts: usize, right: usize, step: f64) -> Loss {
    pulp::Arch::new().dispatch(
        #[inline(always)]
        || {
            let mut powers: Vec<f64> = match at {
                Some(at) => at.iter().zip(along).map(|(&z, &d)| f64::from(z) + step * f64::from(d)).collect(),
                None => along.iter().map(|&d| step * f64::from(d)).collect(),
            };
            let (mut loss, mut product) = (Loss::default(), 1.0);
            for powers in powers.chunks_exact_mut(experts) {
                let most = powers.iter().copied().fold(f64::MIN, f64::max);
                loss.value += most - powers[right];
                powers.iter_mut().for_each(|power| *power -= most);
            }
            powers.iter_mut().for_each(|power| *power = exp(*power));
            for (row, (powers, along)) in powers.chunks_exact(experts).zip(along.chunks_exact(experts)).enumerate() {
                let (mut total, mut first, mut second) = (0.0, 0.0, 0.0);
                for (&p, &d) in powers.iter().zip(along) {
                    let d = f64::from(d);
                    (total, first, second) = (total + p, first + p * d, second + p * d * d);
                }
                let mean = first / total;
                loss.slope += mean - f64::from(along[right]);
                loss.curvature += second / total - mean * mean;
                product *= total;
                if row % ROWS == ROWS - 1 {
                    loss.value += product.ln();
                    product = 1.0;
                }
            }
            loss.value += product.ln();
            loss
        },
    )
}

/// p - \[right expert\] of logits [N, E]: the slope of the loss in each of them.
pub(super) fn excess(logits: &[f32], experts: usize, right: usize) -> Vec<f32> {
    pulp::Arch::new().dispatch(
        #[inline(always)]
        || {
            let mut powers: Vec<f64> = logits.iter().map(|&z| f64::from(z)).collect();
            for powers in powers.chunks_exact_mut(experts) {
                let most = powers.iter().copied().fold(f64::MIN, f64::max);
                powers.iter_mut().for_each(|power| *power -= most);
            }
            powers.iter_mut().for_each(|power| *power = exp(*power));
            for powers in powers.chunks_exact_mut(experts) {
                let share = 1.0 / powers.iter().sum::<f64>();
                powers.iter_mut().for_each(|power| *power *= share);
                powers[right] -= 1.0;
            }
            powers.iter().map(|&p| p as f32).collect()
        },
    )
}

/// e to the x, which is not above zero, to a few units in the last place. Without branches or calls, so that loops over it become vectors.
#[inline(always)]
fn exp(x: f64) -> f64 {
    /// Adding it rounds to a whole number, which then stands in the lowest bits.
    const ROUND: f64 = 6_755_399_441_055_744.0;
    /// 1 / k!
    const TERMS: [f64; 13] = [
        1.0 / 479_001_600.0,
        1.0 / 39_916_800.0,
        1.0 / 3_628_800.0,
        1.0 / 362_880.0,
        1.0 / 40_320.0,
        1.0 / 5040.0,
        1.0 / 720.0,
        1.0 / 120.0,
        1.0 / 24.0,
        1.0 / 6.0,
        0.5,
        1.0,
        1.0,
    ];
    // x = n ln 2 + r, ln 2 in two parts (fdlibm's).
    let x = x.max(-700.0);
    let shifted = x * std::f64::consts::LOG2_E + ROUND;
    let n = shifted - ROUND;
    let r = x - n * 6.931_471_803_691_238e-1 - n * 1.908_214_929_270_587_7e-10;
    let power = TERMS.into_iter().fold(0.0, |sum, term| sum * r + term);
    let scale = f64::from_bits((shifted.to_bits() << 52).wrapping_add(1.0f64.to_bits()));
    power * scale
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exp_is_that_of_the_library() {
        for i in 0..100_000 {
            let x = -f64::from(i) * 0.007;
            assert!((exp(x) - x.exp()).abs() <= 2e-15 * x.exp(), "{x}: {} {}", exp(x), x.exp());
        }
        assert!(exp(f64::NEG_INFINITY) < 1e-300 && exp(-1e300) < 1e-300);
    }

    #[test]
    fn losses_and_their_derivatives_are_those_of_the_definition() {
        let values = |len: usize, seed: f32| (0..len).map(|i| (i as f32 * 0.37 + seed).sin() * 3.0).collect::<Vec<f32>>();
        for (experts, rows) in [(1, 3), (2, 40), (4, 100), (7, 16)] {
            let (at, along) = (values(experts * rows, 1.0), values(experts * rows, 2.0));
            let right = experts / 2;
            let plain = |at: Option<&[f32]>, step: f64| -> f64 {
                let z = |i: usize| at.map_or(0.0, |at| f64::from(at[i])) + step * f64::from(along[i]);
                let row = |r: usize| (0..experts).map(|e| z(r * experts + e).exp()).sum::<f64>().ln() - z(r * experts + right);
                (0..rows).map(row).sum()
            };
            for (at, step) in [(Some(&at[..]), 0.7), (Some(&at[..]), -2.0), (None, 1.3)] {
                let found = loss(at, &along, experts, right, step);
                let near = |h: f64| loss(at, &along, experts, right, step + h);
                assert!((found.value - plain(at, step)).abs() < 1e-9 * rows as f64);
                assert!((found.slope - (near(1e-5).value - near(-1e-5).value) / 2e-5).abs() < 1e-5 * rows as f64);
                if let Some(at) = at {
                    // Of each logit's slope, times how far it moves.
                    let moved: Vec<f32> = along.iter().enumerate().map(|(i, d)| at[i] + step as f32 * d).collect();
                    let slope: f64 = excess(&moved, experts, right).iter().zip(&along).map(|(e, d)| f64::from(e * d)).sum();
                    assert!((found.slope - slope).abs() < 1e-5 * rows as f64);
                }
                assert!((found.curvature - (near(1e-5).slope - near(-1e-5).slope) / 2e-5).abs() < 1e-5 * rows as f64);
            }
        }
    }
}
