//! `AdamW` and its schedule. The optimiser's state lies open, so that a checkpoint can hold it.
//!
//! Decoupled weight decay (arXiv 1711.05101), but towards the values that a weight started from (L2-SP, arXiv 1802.01483): a gate pulled
//! towards zero would be a less certain gate, not a simpler one.

use candle_core::{Tensor, Var, backprop::GradStore};

use super::TuneError;

const BETA_1: f64 = 0.9;
const BETA_2: f64 = 0.99;
const EPSILON: f64 = 1e-10;
/// Of the rate, per step.
const DECAY: f64 = 0.02;
/// Part of the steps over which the rate rises.
const WARM_UP: f64 = 0.05;

/// A variable with what the optimiser knows of it.
pub(super) struct Slot {
    /// unique
    pub name: String,
    pub var: Var,
    /// what it decays towards
    start: Tensor,
    /// running means of gradients and of their squares
    pub moments: [Tensor; 2],
    /// factor on the rate
    rate: f64,
    gradient: Option<Tensor>,
}

impl Slot {
    pub fn new(name: String, start: &Tensor, rate: f32) -> candle_core::Result<Self> {
        let zeros = start.zeros_like()?;
        let var = Var::from_tensor(start)?;
        Ok(Self { name, var, start: start.clone(), moments: [zeros.clone(), zeros], rate: f64::from(rate), gradient: None })
    }

    /// Adds a gradient to those of this step.
    pub fn accumulate(&mut self, gradients: &GradStore) -> candle_core::Result<()> {
        if let Some(new) = gradients.get(&self.var) {
            self.gradient = Some(self.gradient.take().map_or_else(|| Ok(new.clone()), |sum| sum + new)?);
        }
        Ok(())
    }

    /// As if no step had been made.
    pub fn reset(&mut self) -> candle_core::Result<()> {
        let zeros = self.var.zeros_like()?.detach();
        self.moments = [zeros.clone(), zeros];
        self.gradient = None;
        Ok(())
    }
}

/// Step `step` (from 1 on) with the gradients gathered, which are forgotten. Slots without one stay as they are.
pub(super) fn step(slots: &mut [Slot], step: usize, rate: f64) -> Result<(), TuneError> {
    let correction = [BETA_1, BETA_2].map(|beta| 1.0 - beta.powi(i32::try_from(step).unwrap_or(i32::MAX)));
    for slot in slots {
        let Some(gradient) = slot.gradient.take() else { continue };
        let first = ((&slot.moments[0] * BETA_1)? + (&gradient * (1.0 - BETA_1))?)?;
        let second = ((&slot.moments[1] * BETA_2)? + (gradient.sqr()? * (1.0 - BETA_2))?)?;
        let direction = ((&first / correction[0])? / ((&second / correction[1])?.sqrt()? + EPSILON)?)?;
        let value = slot.var.as_detached_tensor();
        let decay = ((&value - &slot.start)? * (rate * DECAY))?;
        slot.var.set(&((&value - (direction * (rate * slot.rate))?)? - decay)?)?;
        slot.moments = [first, second];
    }
    Ok(())
}

/// The rate of step `step` of `steps`, from 1 on: up over the first steps, then down along a cosine to nothing.
pub(super) fn scheduled(rate: f64, step: usize, steps: usize) -> f64 {
    let warm = (steps as f64 * WARM_UP).ceil();
    let (step, steps) = (step as f64, steps as f64);
    if step <= warm {
        return rate * step / warm;
    }
    let gone = (step - warm) / (steps - warm).max(1.0);
    rate * 0.5 * (1.0 + (std::f64::consts::PI * gone).cos())
}

#[cfg(test)]
mod tests {
    use candle_core::{Device, Tensor};

    use super::*;

    #[test]
    fn the_rate_rises_and_falls() {
        let rates: Vec<f64> = (1..=100).map(|step| scheduled(2.0, step, 100)).collect();
        assert!((rates[0] - 0.4).abs() < 1e-12 && (rates[4] - 2.0).abs() < 1e-12);
        assert!(rates[4..].is_sorted_by(|a, b| a > b));
        assert!(rates[99].abs() < 1e-12);
        assert!(scheduled(1.0, 1, 1).is_finite());
    }

    /// sum (w - target)^2 is brought to its minimum, by steps of the rate at first.
    #[test]
    fn a_bowl_is_walked_down() {
        let (device, target) = (Device::Cpu, Tensor::new(&[3f32, -1.0], &Device::Cpu).unwrap());
        let mut slots = vec![Slot::new("w".into(), &Tensor::zeros(2, candle_core::DType::F32, &device).unwrap(), 0.5).unwrap()];
        for at in 1..=400 {
            let loss = (slots[0].var.as_tensor() - &target).unwrap().sqr().unwrap().sum_all().unwrap();
            let gradients = loss.backward().unwrap();
            slots[0].accumulate(&gradients).unwrap();
            step(&mut slots, at, scheduled(0.1, at, 400)).unwrap();
            if at == 1 {
                let first = slots[0].var.to_vec1::<f32>().unwrap();
                let expected = (scheduled(0.1, 1, 400) * 0.5) as f32;
                assert!((first[0] - expected).abs() < 1e-6 && (first[1] + expected).abs() < 1e-6, "{first:?}");
            }
        }
        let end = slots[0].var.to_vec1::<f32>().unwrap();
        // A little of it is decay's.
        assert!((end[0] - 3.0).abs() < 0.1 && (end[1] + 1.0).abs() < 0.05, "{end:?}");
    }

    #[test]
    fn gradients_of_parts_add_up() {
        let start = Tensor::new(&[1f32], &Device::Cpu).unwrap();
        let mut slot = Slot::new("w".into(), &start, 1.0).unwrap();
        for factor in [2.0, 3.0] {
            let gradients = (slot.var.as_tensor() * factor).unwrap().sum_all().unwrap().backward().unwrap();
            slot.accumulate(&gradients).unwrap();
        }
        assert_eq!(slot.gradient.unwrap().to_vec1::<f32>().unwrap(), [5.0]);
    }
}
