//! The sparse MLP: a router chooses K of E experts for each token, a shared expert may stand beside them.
//!
//! Tokens are sorted by expert once, so each chosen expert's weights are used once per call, however many sequences it serves. A token's
//! result is the sum over its own choices in its own order: it does not depend on who else chose those experts. A choice of weight 0 is not
//! computed: that is how tokens have fewer choices than others beside them.

use std::sync::Arc;

use candle_core::{D, DType, Device, Result, Tensor};
use upcycle_routers::{
    init::subspace::SCALE,
    route::{Routing, Rule, Steering, route, steered},
};

use super::{
    DecoderError, Probe,
    matrix::{Direct, Matrix, Values},
    mlp::Mlp,
    train,
};
use crate::kernels::{
    parallel_pieces,
    product::{self, Job, Operation, Rows},
};

/// Tokens whose experts' outputs are summed in one task.
const TOKENS: usize = 8;

/// What gives a token's logits, in f32 on every device.
#[derive(Debug, Clone)]
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

#[derive(Debug, Clone)]
pub(super) struct Sparse {
    pub router: Router,
    pub experts: Vec<Mlp>,
    pub rule: Rule,
    /// the shared expert and its gate [1, D]
    pub shared: Option<(Mlp, Matrix)>,
}

impl Sparse {
    /// But for the router's, which are small.
    pub fn matrices(&self) -> impl Iterator<Item = &Matrix> {
        self.experts.iter().chain(self.shared.iter().map(|(expert, _)| expert)).flat_map(Mlp::matrices)
    }

    /// x [N, D] -> [N, D]; `steering` is that of each row, or empty where none is steered.
    pub fn forward(
        &self,
        x: &Tensor,
        layer: usize,
        steering: &[Arc<Steering>],
        probe: &mut dyn Probe,
    ) -> std::result::Result<Tensor, DecoderError> {
        let wide = x.to_dtype(DType::F32)?;
        let scores = self.router.logits(&wide, self.experts.len())?; // [N, E]
        let logits = scores.flatten_all()?.to_vec1::<f32>()?;
        let mut routing = match steering {
            [] => route(&logits, self.experts.len(), self.rule),
            _ => steered(&logits, self.experts.len(), self.rule, |row| &steering[row]),
        };
        let own = (scores.track_op() && steering.is_empty()).then(|| routing.clone());
        probe.route(layer, &logits, &mut routing);
        self.check(&routing, x.dim(0)?, layer)?;
        // What a probe or steering has decided does not depend on the gate.
        let weights = match own {
            Some(own) if own == routing => train::routing_weights(&scores, &routing, self.rule)?,
            _ => Tensor::new(routing.weights.as_slice(), x.device())?.reshape((x.dim(0)?, routing.top_k))?,
        };
        let mut y = self.mix(x, &routing, &weights)?;
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

    /// The chosen experts' outputs, weighted with [N, K] and summed: [N, D] -> [N, D]
    fn mix(&self, x: &Tensor, routing: &Routing, weights: &Tensor) -> Result<Tensor> {
        let (n, d) = x.dims2()?;
        let sorted = Sorted::new(routing);
        if !x.track_op()
            && !weights.track_op()
            && let Some(y) = self.mix_direct(x, &sorted, weights)?
        {
            return Ok(y);
        }
        let rows = x.index_select(&Tensor::new(sorted.tokens, x.device())?, 0)?; // [choices, D]
        let mut outputs = Vec::new();
        let mut start = 0;
        for (expert, len) in sorted.experts {
            outputs.push(self.experts[expert].forward(&rows.narrow(0, start, len)?)?);
            start += len;
        }
        let outputs = Tensor::cat(&outputs, 0)?.index_select(&Tensor::new(sorted.place, x.device())?, 0)?; // [N K, D]
        let outputs = outputs.to_dtype(DType::F32)?.reshape((n, routing.top_k, d))?;
        outputs.broadcast_mul(&weights.unsqueeze(2)?)?.sum(D::Minus2)?.to_dtype(x.dtype())
    }

    /// As [`Sparse::mix`], all experts in one product each way, with the CPU's kernels; `None` where candle computes.
    fn mix_direct(&self, x: &Tensor, sorted: &Sorted, weights: &Tensor) -> Result<Option<Tensor>> {
        let direct = |(expert, len): &(usize, usize)| {
            let expert = &self.experts[*expert];
            Ok(expert.direct()?.zip(expert.projections[2].direct()?).map(|layers| (layers, expert.activation, *len)))
        };
        let Some(experts) =
            sorted.experts.iter().map(direct).collect::<Result<Option<Vec<(([Direct<'_>; 2], Direct<'_>), _, usize)>>>>()?
        else {
            return Ok(None);
        };
        let Some(((_, down), ..)) = experts.first() else { return Ok(None) };
        let (n, d) = x.dims2()?;
        let (kernels, choices, ffn) = (down.kernels, sorted.tokens.len(), down.weights.inner());
        let x = x.contiguous()?;
        let x = Values::of(&x)?;

        let mut hidden = vec![0f32; choices * ffn]; // [choices, F]
        let (mut rest, mut tokens) = (hidden.as_mut_slice(), sorted.tokens.as_slice());
        let mut jobs = Vec::with_capacity(experts.len());
        for (([gate, up], _), activation, len) in &experts {
            let (y, listed);
            ((y, rest), (listed, tokens)) = (rest.split_at_mut(len * ffn), tokens.split_at(*len));
            let operation = Operation::Gated([gate.operand(), up.operand()], *activation);
            jobs.push(Job { operation, x: x.slice()?, rows: Rows::Listed(listed), y });
        }
        product::run(kernels, jobs);

        let mut outputs = vec![0f32; choices * d]; // [choices, D]
        let (mut rest, mut inputs) = (outputs.as_mut_slice(), hidden.as_slice());
        let mut jobs = Vec::with_capacity(experts.len());
        for ((_, down), _, len) in &experts {
            let (y, x);
            ((y, rest), (x, inputs)) = (rest.split_at_mut(len * d), inputs.split_at(len * ffn));
            let (weights, bias) = down.operand();
            jobs.push(Job { operation: Operation::Linear(weights, bias), x, rows: Rows::All, y });
        }
        product::run(kernels, jobs);

        let weights = weights.flatten_all()?.to_vec1::<f32>()?;
        let k = weights.len() / n;
        let mut y = vec![0f32; n * d];
        parallel_pieces(&mut y, TOKENS * d, |piece, y| {
            for (y, token) in y.chunks_exact_mut(d).zip(piece * TOKENS..) {
                for choice in (token * k..(token + 1) * k).filter(|&choice| weights[choice] != 0.0) {
                    let output = &outputs[sorted.place[choice] as usize * d..][..d];
                    y.iter_mut().zip(output).for_each(|(y, output)| *y += weights[choice] * output);
                }
            }
        });
        Ok(Some(Tensor::from_vec(y, (n, d), &Device::Cpu)?))
    }
}

/// The choices of a routing, expert by expert: of N K those that have weight, and each token's first.
struct Sorted {
    /// of whom each choice in this order is
    tokens: Vec<u32>,
    /// where choice i K + k of the routing stands in this order, [N K]; one without weight, where its token's first does
    place: Vec<u32>,
    /// the chosen experts and how many choices each has, in this order
    experts: Vec<(usize, usize)>,
}

impl Sorted {
    fn new(routing: &Routing) -> Self {
        let (k, expert) = (routing.top_k as u32, |choice: &u32| routing.experts[*choice as usize] as usize);
        let counts = |choice: &u32| choice.is_multiple_of(k) || routing.weights[*choice as usize] != 0.0;
        let all = 0..routing.experts.len() as u32;
        let mut order: Vec<u32> = all.clone().filter(counts).collect();
        order.sort_by_key(expert);
        let mut place = vec![0u32; all.len()];
        (0u32..).zip(&order).for_each(|(at, choice)| place[*choice as usize] = at);
        all.filter(|choice| !counts(choice)).for_each(|choice| place[choice as usize] = place[(choice - choice % k) as usize]);
        let experts = order.chunk_by(|a, b| expert(a) == expert(b)).map(|same| (expert(&same[0]), same.len())).collect();
        Self { tokens: order.iter().map(|choice| choice / k).collect(), place, experts }
    }
}
