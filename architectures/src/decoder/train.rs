//! What training adds to the one forward pass: gradients where candle's fast forms have none, and variables in the place of weights.
//!
//! A value that depends on a variable is tracked (`Tensor::track_op`). The layers ask for that, and where it is so they take the forms below;
//! everything else runs as it always does. Weights that are no variables get no gradient. A tracked call leaves nothing in a cache.
//!
//! N rows, D hidden, E experts, K chosen, r rank of a change.

use candle_core::{CpuStorage, CustomOp1, D, Device, Layout, Result, Shape, Tensor};
use upcycle_routers::route::{Routing, Rule};

use super::{
    Decoder, DecoderError, LayerMlp,
    matrix::{Linear, Mapped, Matrix},
    moe::{Router, Sparse},
};
use crate::family::{AttentionPart, LayerRole, Role};

/// Elements of a frozen matrix that are widened at a time (4 MiB).
const BLOCK: usize = 1 << 20;

/// What stands in for a weight, or beside it.
#[derive(Debug, Clone)]
pub enum Substitute {
    /// the weight, in f32: a variable, or any tensor of its shape
    Whole(Tensor),
    /// for a matrix [out, in] of attention: `up down` is added to it
    LowRank {
        /// [r, in], f32
        down: Tensor,
        /// [out, r], f32
        up: Tensor,
    },
}

impl Decoder {
    /// Puts a substitute in the place of a gate, a norm, or a matrix of attention; a clone made before keeps what it had.
    ///
    /// Gates and norms are taken whole, matrices either way. What is a variable (`candle_core::Var`) gets gradients.
    pub fn substitute(&mut self, role: Role, substitute: &Substitute) -> std::result::Result<(), DecoderError> {
        let refused = || DecoderError::Substitute { role };
        let Some(place) = self.place(role) else { return Err(refused()) };
        match (place, substitute) {
            (Place::Vector(old), Substitute::Whole(new)) if old.dims() == new.dims() => *old = new.clone(),
            (Place::Gate(old), Substitute::Whole(new)) if old.shape() == new.dims() => *old = Matrix::Held(new.clone()),
            (Place::Linear(old), Substitute::Whole(new)) if old.weight.shape() == new.dims() => {
                old.weight = match &old.weight {
                    Matrix::Held(weight) => Matrix::Held(new.to_dtype(weight.dtype())?),
                    Matrix::Mapped(_) => Matrix::Held(new.clone()),
                };
                old.low_rank = None;
            }
            (Place::Linear(old), Substitute::LowRank { down, up })
                if old.weight.shape() == [up.dim(0)?, down.dim(1)?] && up.dim(1)? == down.dim(0)? =>
            {
                old.low_rank = Some((down.clone(), up.clone()));
            }
            _ => return Err(refused()),
        }
        Ok(())
    }

    fn place(&mut self, role: Role) -> Option<Place<'_>> {
        let Role::Layer(layer, part) = role else {
            return (role == Role::FinalNorm).then_some(Place::Vector(&mut self.final_norm.weight));
        };
        let layer = self.layers.get_mut(layer)?;
        let attention = &mut layer.attention;
        Some(match (part, &mut layer.mlp) {
            (LayerRole::InputNorm, _) => Place::Vector(&mut layer.input_norm.weight),
            (LayerRole::PostNorm, _) => Place::Vector(&mut layer.post_norm.weight),
            (LayerRole::Attention(AttentionPart::Q), _) => Place::Linear(&mut attention.q),
            (LayerRole::Attention(AttentionPart::K), _) => Place::Linear(&mut attention.k),
            (LayerRole::Attention(AttentionPart::V), _) => Place::Linear(&mut attention.v),
            (LayerRole::Attention(AttentionPart::O), _) => Place::Linear(&mut attention.o),
            (LayerRole::Attention(AttentionPart::QNorm), _) => Place::Vector(&mut attention.qk_norm.as_mut()?.0.weight),
            (LayerRole::Attention(AttentionPart::KNorm), _) => Place::Vector(&mut attention.qk_norm.as_mut()?.1.weight),
            (LayerRole::Router, LayerMlp::Sparse(Sparse { router: Router::Linear(gate), .. })) => Place::Gate(gate),
            (LayerRole::SharedGate, LayerMlp::Sparse(sparse)) => Place::Gate(&mut sparse.shared.as_mut()?.1),
            _ => return None,
        })
    }
}

enum Place<'a> {
    Vector(&'a mut Tensor),
    Gate(&'a mut Matrix),
    Linear(&'a mut Linear),
}

/// x times weight over rms(x), last dimension.
pub(super) fn rms_norm(x: &Tensor, weight: &Tensor, eps: f64) -> Result<Tensor> {
    let rms = (x.sqr()?.mean_keepdim(D::Minus1)? + eps)?.sqrt()?;
    x.broadcast_div(&rms)?.broadcast_mul(weight)
}

/// Softmax over the last dimension.
pub(super) fn softmax(x: &Tensor) -> Result<Tensor> {
    // The maximum only keeps the exponentials in range: it needs no gradient.
    let exp = x.broadcast_sub(&x.detach().max_keepdim(D::Minus1)?)?.exp()?;
    exp.broadcast_div(&exp.sum_keepdim(D::Minus1)?)
}

/// The weights of a routing, [N, K], as a function of the logits [N, E]: those that `route` computes. The choice itself is a constant.
pub(super) fn routing_weights(logits: &Tensor, routing: &Routing, rule: Rule) -> Result<Tensor> {
    let shape = (routing.experts.len() / routing.top_k.max(1), routing.top_k);
    let chosen = Tensor::from_slice(&routing.experts, shape, logits.device())?;
    if rule.normalise { softmax(&logits.gather(&chosen, D::Minus1)?) } else { softmax(logits)?.gather(&chosen, D::Minus1) }
}

/// x [N, in] -> x W^T [N, out] for a matrix that stays the bytes it was read as. The gradient goes to x alone.
pub(super) fn times(weight: &Mapped, x: &Tensor) -> Result<Tensor> {
    x.contiguous()?.apply_op1(Frozen(weight.clone()))
}

struct Frozen(Mapped);

impl CustomOp1 for Frozen {
    fn name(&self) -> &'static str {
        "frozen-matrix"
    }

    fn cpu_fwd(&self, storage: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let x = &storage.as_slice::<f32>()?[layout.start_offset()..][..layout.shape().elem_count()];
        let y = Matrix::Mapped(self.0.clone()).times(&Tensor::from_slice(x, layout.shape(), &Device::Cpu)?)?;
        Ok((CpuStorage::F32(y.flatten_all()?.to_vec1()?), y.shape().clone()))
    }

    /// grad [N, out] -> grad W [N, in]
    fn bwd(&self, _: &Tensor, _: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
        let [rows, inner] = self.0.shape();
        let block = (BLOCK / inner).max(1);
        let mut sum: Option<Tensor> = None;
        for start in (0..rows).step_by(block) {
            let len = block.min(rows - start);
            let weight = Tensor::from_vec(self.0.widen_rows(start..start + len), (len, inner), &Device::Cpu)?;
            let part = grad.narrow(1, start, len)?.matmul(&weight)?;
            sum = Some(sum.map_or(Ok(part.clone()), |sum| sum + part)?);
        }
        Ok(sum)
    }
}
