//! RMS norm, in f32 whatever the type of the activations.

use candle_core::{DType, Result, Tensor};

use super::train;

/// x / rms(x) * weight over the last dimension.
#[derive(Debug, Clone)]
pub(super) struct Norm {
    /// `[D]`, f32
    pub weight: Tensor,
    pub eps: f64,
}

impl Norm {
    /// x [.., D] -> [.., D]
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let wide = x.to_dtype(DType::F32)?.contiguous()?;
        if wide.track_op() || self.weight.track_op() {
            return train::rms_norm(&wide, &self.weight, self.eps)?.to_dtype(x.dtype());
        }
        candle_nn::ops::rms_norm(&wide, &self.weight, self.eps as f32)?.to_dtype(x.dtype())
    }
}
