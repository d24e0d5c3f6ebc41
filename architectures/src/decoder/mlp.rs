//! The gated MLP: a dense layer's, an expert's, a shared expert's.

use candle_core::{Result, Tensor};

use super::matrix::Linear;
use crate::config::Activation;

#[derive(Debug)]
pub(super) struct Mlp {
    /// in the order of [`crate::Projection`]: [F, D], [F, D], [D, F]
    pub projections: [Linear; 3],
    pub activation: Activation,
}

impl Mlp {
    /// x [N, D] -> [N, D]
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let [gate, up, down] = &self.projections;
        let gate = gate.forward(x)?; // [N, F]
        let gate = match self.activation {
            Activation::Silu => gate.silu(),
            Activation::Gelu => gate.gelu_erf(),
            Activation::GeluTanh => gate.gelu(),
            Activation::Relu => gate.relu(),
        }?;
        down.forward(&(gate * up.forward(x)?)?)
    }
}
