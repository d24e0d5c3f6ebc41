//! The sparse MLP: a router chooses K of E experts for each token, a shared expert may stand beside them.
//!
//! Tokens are sorted by expert once, so each chosen expert's weights are used once per call, however many sequences it serves. A token's
//! result is the sum over its own choices in its own order: it does not depend on who else chose those experts.

use candle_core::{D, DType, Result, Tensor};
use upcycle_routers::{
    init::subspace::SCALE,
    route::{Routing, Rule, route},
};

use super::{DecoderError, Probe, matrix::Matrix, mlp::Mlp};

/// What gives a token's logits, in f32 on every device.
#[derive(Debug)]
pub(super) enum Router {
    /// a gate [E, D]
    Linear(Matrix),
    /// of each expert R orthonormal directions, [E R, D]
    Subspace(Matrix),
}

impl Router {
    /// x [N, D] -> [N, E]
    fn logits(&self, x: &Tensor, experts: usize) -> Result<Tensor> {
        match self {
            Self::Linear(gate) => gate.times(x),
            Self::Subspace(directions) => {
                let along = directions.times(x)?.sqr()?; // [N, E R]
                let (n, rows) = along.dims2()?;
                let within = along.reshape((n, experts, rows / experts))?.sum(D::Minus1)?; // [N, E]
                within.broadcast_div(&x.sqr()?.sum_keepdim(D::Minus1)?)? * SCALE
            }
        }
    }
}

#[derive(Debug)]
pub(super) struct Sparse {
    pub router: Router,
    pub experts: Vec<Mlp>,
    pub rule: Rule,
    /// the shared expert and its gate [1, D]
    pub shared: Option<(Mlp, Matrix)>,
}

impl Sparse {
    /// x [N, D] -> [N, D]
    pub fn forward(&self, x: &Tensor, layer: usize, probe: &mut dyn Probe) -> std::result::Result<Tensor, DecoderError> {
        let wide = x.to_dtype(DType::F32)?;
        let logits = self.router.logits(&wide, self.experts.len())?.flatten_all()?.to_vec1::<f32>()?; // [N, E]
        let mut routing = route(&logits, self.experts.len(), self.rule);
        probe.route(layer, &logits, &mut routing);
        self.check(&routing, x.dim(0)?, layer)?;
        let mut y = self.mix(x, &routing)?;
        if let Some((expert, gate)) = &self.shared {
            let gate = candle_nn::ops::sigmoid(&gate.times(&wide)?)?.to_dtype(x.dtype())?; // [N, 1]
            y = (y + expert.forward(x)?.broadcast_mul(&gate)?)?;
        }
        Ok(y)
    }

    /// A probe may have changed the routing to anything.
    fn check(&self, routing: &Routing, tokens: usize, layer: usize) -> std::result::Result<(), DecoderError> {
        let choices = tokens * routing.top_k;
        let experts = self.experts.len();
        if choices > 0
            && [routing.experts.len(), routing.weights.len()] == [choices; 2]
            && routing.experts.iter().all(|e| (*e as usize) < experts)
        {
            return Ok(());
        }
        Err(DecoderError::Routing { layer, tokens, experts })
    }

    /// The chosen experts' outputs, weighted and summed: [N, D] -> [N, D]
    fn mix(&self, x: &Tensor, routing: &Routing) -> Result<Tensor> {
        let (n, d) = x.dims2()?;
        let k = routing.top_k;
        // Choice i is of token i / K. `order` lists the choices expert by expert, `place` says where a choice stands in that list.
        let mut order: Vec<u32> = (0..(n * k) as u32).collect();
        order.sort_by_key(|choice| routing.experts[*choice as usize]);
        let mut place = vec![0u32; n * k];
        (0u32..).zip(&order).for_each(|(at, choice)| place[*choice as usize] = at);
        let tokens: Vec<u32> = order.iter().map(|choice| choice / k as u32).collect();
        let sorted = x.index_select(&Tensor::new(tokens, x.device())?, 0)?; // [N K, D]

        let mut outputs = Vec::new();
        let mut start = 0;
        for same in order.chunk_by(|a, b| routing.experts[*a as usize] == routing.experts[*b as usize]) {
            let expert = &self.experts[routing.experts[same[0] as usize] as usize];
            outputs.push(expert.forward(&sorted.narrow(0, start, same.len())?)?);
            start += same.len();
        }
        let outputs = Tensor::cat(&outputs, 0)?.index_select(&Tensor::new(place, x.device())?, 0)?; // [N K, D]
        let weights = Tensor::new(routing.weights.as_slice(), x.device())?.reshape((n, k, 1))?;
        outputs.to_dtype(DType::F32)?.reshape((n, k, d))?.broadcast_mul(&weights)?.sum(D::Minus2)?.to_dtype(x.dtype())
    }
}
