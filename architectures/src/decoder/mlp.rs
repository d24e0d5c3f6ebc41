//! The gated MLP: a dense layer's, an expert's, a shared expert's.

use candle_core::{Device, Result, Tensor};

use super::matrix::{Direct, Linear, Matrix, Values};
use crate::{
    config::Activation,
    kernels::product::{self, Job, Operation, Rows},
};

#[derive(Debug, Clone)]
pub(super) struct Mlp {
    /// in the order of [`crate::Projection`]: [F, D], [F, D], [D, F]
    pub projections: [Linear; 3],
    pub activation: Activation,
}

impl Mlp {
    pub fn matrices(&self) -> impl Iterator<Item = &Matrix> {
        self.projections.iter().map(|linear| &linear.weight)
    }

    /// Lets the CPU round activations to the type of the weights where that is faster.
    pub fn hasten(&mut self) {
        self.projections.iter_mut().for_each(|linear| linear.weight.hasten());
    }

    /// x [N, D] -> [N, D]
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        self.output(&self.hidden(x)?)
    }

    /// What the down projection sees: x [N, D] -> [N, F]
    pub fn hidden(&self, x: &Tensor) -> Result<Tensor> {
        if !x.track_op()
            && let Some([gate, up]) = self.direct()?
        {
            let (n, ffn) = (x.dim(0)?, self.projections[0].weight.shape()[0]);
            let mut y = vec![0f32; n * ffn];
            let operation = Operation::Gated([gate.operand(), up.operand()], self.activation);
            let x = x.contiguous()?;
            product::run(gate.kernels, vec![Job { operation, x: Values::of(&x)?.slice()?, rows: Rows::All, y: &mut y }]);
            return Tensor::from_vec(y, (n, ffn), &Device::Cpu);
        }
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

    /// Gate and up as the CPU's kernels take them.
    pub fn direct(&self) -> Result<Option<[Direct<'_>; 2]>> {
        let [gate, up, _] = &self.projections;
        Ok(gate.direct()?.zip(up.direct()?).map(|(gate, up)| [gate, up]))
    }

    /// hidden [N, F] -> [N, D]
    pub fn output(&self, hidden: &Tensor) -> Result<Tensor> {
        self.projections[2].forward(hidden)
    }
}
