//! What training minimises: the router's cross-entropy against the text's expert, the language model's loss, and how uneven the load is.
//!
//! N rows of a forward pass, S of them scored, D hidden, E experts, V vocabulary.

use std::collections::BTreeMap;

use candle_core::{D, Device, Result, Tensor, Var};
use upcycle_architectures::decoder::{Cache, Decoder, DecoderError, Logits, NoProbe, Probe, Site, Step};
use upcycle_routers::route::Routing;

use crate::inspect::perplexity::Window;

/// A piece of text, and what a token of it counts.
pub(super) struct Piece {
    pub window: Window,
    /// of the domain
    pub expert: Option<usize>,
    pub weight: f64,
}

/// What the routers of a forward pass see, layer by layer, and how often they chose each expert.
struct Routers {
    /// only what routers see is wanted: the pass may stop behind this layer
    last: Option<usize>,
    experts: usize,
    inputs: BTreeMap<usize, Tensor>,
    chosen: BTreeMap<usize, Vec<f32>>,
}

impl Routers {
    fn new(decoder: &Decoder) -> Self {
        let experts = decoder.config().moe.as_ref().map_or(0, |moe| moe.experts);
        Self { last: None, experts, inputs: BTreeMap::new(), chosen: BTreeMap::new() }
    }
}

impl Probe for Routers {
    fn wants(&self, site: Site) -> bool {
        site == Site::RouterInput
    }

    fn observe(&mut self, _: Site, layer: usize, x: &Tensor) -> Result<()> {
        self.inputs.insert(layer, x.clone());
        Ok(())
    }

    fn route(&mut self, layer: usize, _: &[f32], routing: &mut Routing) {
        let mut counts = vec![0f32; self.experts];
        routing.experts.iter().for_each(|expert| counts[*expert as usize] += 1.0);
        self.chosen.insert(layer, counts);
    }

    fn go_on(&self, layer: usize) -> bool {
        self.last.is_none_or(|last| layer < last)
    }
}

/// Runs pieces side by side.
fn run(decoder: &Decoder, pieces: &[Piece], logits: Logits, probe: &mut Routers) -> std::result::Result<Tensor, DecoderError> {
    let mut caches: Vec<Cache> = pieces.iter().map(|_| decoder.cache()).collect();
    let steps = pieces.iter().zip(&mut caches);
    let mut steps: Vec<Step<'_>> = steps.map(|(piece, cache)| Step { tokens: &piece.window.tokens, cache, logits }).collect();
    decoder.forward(&mut steps, probe)
}

/// Sum over layers and tokens of the weighted cross-entropy of softmax(x gate^T) against the piece's expert; `decoder` gives the x. Pieces of
/// nobody's text and what the tokenizer puts in front do not count.
pub(super) fn router_loss<'g>(
    decoder: &Decoder,
    gates: impl Iterator<Item = (usize, &'g Var)>,
    pieces: &[Piece],
) -> std::result::Result<Tensor, DecoderError> {
    let gates: Vec<(usize, &Var)> = gates.collect();
    let mut seen = Routers { last: gates.last().map(|(layer, _)| *layer), ..Routers::new(decoder) };
    run(decoder, pieces, Logits::None, &mut seen)?;
    let (mut rows, mut experts, mut weights) = (Vec::new(), Vec::new(), Vec::new());
    let mut start = 0;
    for piece in pieces {
        let len = piece.window.tokens.len();
        if let Some(expert) = piece.expert {
            for row in start + piece.window.prefix..start + len {
                rows.push(row as u32);
                experts.push(expert as u32);
                weights.push(piece.weight as f32);
            }
        }
        start += len;
    }
    let mut sum: Option<Tensor> = None;
    for (layer, gate) in gates {
        let Some(x) = seen.inputs.get(&layer) else { continue };
        let rows = Tensor::new(rows.as_slice(), x.device())?;
        let logits = x.index_select(&rows, 0)?.matmul(&gate.t()?)?; // [S, E]
        let loss = weighted(&logits, &experts, &weights)?;
        sum = Some(sum.map_or(Ok(loss.clone()), |sum| sum + loss)?);
    }
    Ok(sum.map_or_else(|| Tensor::new(0f32, &Device::Cpu), Ok)?)
}

/// Weighted negative log-likelihood of the tokens that [`crate::inspect::perplexity`] scores, or where the piece's expert is among `teachers`
/// the cross-entropy to what that expert expects there; plus, if `balance` is not 0, that times [`uneven`] of the mean layer.
pub(super) fn language_loss<'g>(
    decoder: &Decoder,
    gates: impl Iterator<Item = (usize, &'g Var)>,
    pieces: &[Piece],
    teachers: &BTreeMap<usize, Decoder>,
    balance: f64,
) -> std::result::Result<Losses, DecoderError> {
    let mut seen = Routers::new(decoder);
    let logits = run(decoder, pieces, Logits::All, &mut seen)?; // [N, V]
    let (mut rows, mut next, mut weights) = (Vec::new(), Vec::new(), Vec::new());
    let mut expected = Vec::new();
    let mut start = 0;
    for piece in pieces {
        if let Some(teacher) = piece.expert.and_then(|expert| teachers.get(&expert)) {
            expected.push(expectations(teacher, &piece.window)?);
        }
        for at in piece.window.scored() {
            rows.push((start + at) as u32);
            next.push(piece.window.tokens[at + 1]);
            weights.push(piece.weight as f32);
        }
        start += piece.window.tokens.len();
    }
    let scored = if rows.len() == start { logits } else { logits.index_select(&Tensor::new(rows.as_slice(), logits.device())?, 0)? };
    // Either every piece has a teacher or none.
    let language = if expected.len() == pieces.len() && !rows.is_empty() {
        let nll = (scored.log_sum_exp(D::Minus1)? - (scored * Tensor::cat(&expected, 0)?)?.sum(D::Minus1)?)?;
        (&nll * Tensor::new(weights.as_slice(), nll.device())?)?.sum_all()?
    } else {
        weighted(&scored, &next, &weights)?
    };
    let mut total = language.clone();
    if balance != 0.0 {
        let share: f64 = pieces.iter().map(|piece| piece.weight * piece.window.scored().len() as f64).sum();
        let layers = seen.chosen.len().max(1) as f64;
        for (layer, gate) in gates {
            if let (Some(x), Some(counts)) = (seen.inputs.get(&layer), seen.chosen.get(&layer)) {
                total = (total + (uneven(&x.matmul(&gate.t()?)?, counts)? * (balance * share / layers))?)?;
            }
        }
    }
    Ok(Losses { total, language })
}

/// What a model expects to follow each scored token: probabilities [S, V].
fn expectations(teacher: &Decoder, window: &Window) -> std::result::Result<Tensor, DecoderError> {
    let mut cache = teacher.cache();
    let logits = teacher.forward(&mut [Step { tokens: &window.tokens, cache: &mut cache, logits: Logits::All }], &mut NoProbe)?;
    let scored = window.scored();
    Ok(candle_nn::ops::softmax_last_dim(&logits.narrow(0, scored.start, scored.len())?.contiguous()?)?)
}

/// What is minimised, and the part of it that is told.
pub(super) struct Losses {
    pub total: Tensor,
    pub language: Tensor,
}

/// `E sum_e f_e P_e` with `f_e` the share of the choices that fell on expert e and `P_e` the mean of its probability: the auxiliary loss of the
/// Switch Transformer (arXiv 2101.03961, equations 4 to 6), 1 for an even load. With more than one choice per token it is `transformers`'
/// loss of Mixtral divided by K.
fn uneven(logits: &Tensor, counts: &[f32]) -> Result<Tensor> {
    let total: f32 = counts.iter().sum();
    let shares: Vec<f32> = counts.iter().map(|count| count / total.max(1.0) * counts.len() as f32).collect();
    let probabilities = candle_nn::ops::softmax(logits, D::Minus1)?.mean(0)?; // [E]
    (probabilities * Tensor::new(shares, logits.device())?)?.sum_all()
}

/// Sum over rows of weight times (log sum exp(logits) - logits\[target\]); logits [S, V].
fn weighted(logits: &Tensor, targets: &[u32], weights: &[f32]) -> Result<Tensor> {
    if targets.is_empty() {
        return Tensor::new(0f32, logits.device());
    }
    let index = Tensor::new(targets, logits.device())?.unsqueeze(1)?;
    let nll = (logits.log_sum_exp(D::Minus1)? - logits.gather(&index, 1)?.squeeze(1)?)?;
    (nll * Tensor::new(weights, logits.device())?)?.sum_all()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_even_load_costs_one_and_a_lopsided_one_more() {
        let even = Tensor::zeros((6, 4), candle_core::DType::F32, &Device::Cpu).unwrap();
        let cost = |logits: &Tensor, counts: &[f32]| uneven(logits, counts).unwrap().to_scalar::<f32>().unwrap();
        assert!((cost(&even, &[3.0; 4]) - 1.0).abs() < 1e-6);
        let first = Tensor::new(&[[9f32, 0.0, 0.0, 0.0]], &Device::Cpu).unwrap();
        // softmax of (9, 0, 0, 0) has 0.99963 in front: 4 * 0.99963
        assert!((cost(&first, &[2.0, 0.0, 0.0, 0.0]) - 3.9985).abs() < 1e-3);
    }

    #[test]
    fn rows_count_by_their_weight() {
        let logits = Tensor::new(&[[0f32, 0.0], [0.0, 3f32.ln()]], &Device::Cpu).unwrap();
        let loss = weighted(&logits, &[0, 0], &[1.0, 0.5]).unwrap().to_scalar::<f32>().unwrap();
        assert!((loss - (2f32.ln() + 0.5 * 4f32.ln())).abs() < 1e-6);
        assert!(weighted(&logits, &[], &[]).unwrap().to_scalar::<f32>().unwrap().abs() < f32::EPSILON);
    }
}
