//! The gated MLP: a dense layer's, an expert's, a shared expert's.

use candle_core::{Result, Tensor};

use super::matrix::Linear;
use crate::config::Activation;

#[derive(Debug, Clone)]
pub(super) struct Mlp {
    /// in the order of [`crate::Projection`]: [F, D], [F, D], [D, F]
    pub projections: [Linear; 3],
    pub activation: Activation,
}

impl Mlp {
    /// x [N, D] -> [N, D]
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        self.output(&self.hidden(x)?)
    }

    /// What the down projection sees: x [N, D] -> [N, F]
    pub fn hidden(&self, x: &Tensor) -> Result<Tensor> {
        let [gate, up, _] = &self.projections;
        let gate = gate.forward(x)?; // [N, F]
        let gate = match self.activation {
            Activation::Silu => gate.silu(),
            Activation::Gelu => gate.gelu_erf(),
            Activation::GeluTanh => gate.gelu(),
            Activation::Relu => gate.relu(),
        }?;
        gate * up.forward(x)?
    }

    /// hidden [N, F] -> [N, D]
    pub fn output(&self, hidden: &Tensor) -> Result<Tensor> {
        self.projections[2].forward(hidden)
    }
}
