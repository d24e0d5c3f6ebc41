//! The importance of a model's columns from text: a forward pass that sums the squares of what each matrix is multiplied with.
//!
//! An expert's are those of the tokens that chose it. The head's are not gathered: as in llama.cpp, it is quantised by its values alone.

use std::collections::BTreeMap;

use candle_core::{DType, Result, Tensor};
use upcycle_architectures::{
    AttentionPart, LayerRole, Projection, Role,
    decoder::{Decoder, DecoderError, LanguageModel as _, Logits, Probe, Site, Step},
};
use upcycle_routers::route::Routing;

use super::{Importance, importance::Entry};
use crate::{inspect::perplexity::Window, source};

/// Reads the windows. `done` is told of each that is finished.
pub fn gather(decoder: &Decoder, windows: &[Window], done: &mut dyn FnMut()) -> std::result::Result<Importance, DecoderError> {
    let mut squares = Squares { decoder, sums: BTreeMap::new(), input: None, routing: None };
    for window in windows {
        let mut cache = decoder.scratch();
        decoder.forward(&mut [Step { tokens: &window.tokens, cache: &mut cache, logits: Logits::None }], &mut squares)?;
        done();
    }
    let entry = |sums: Vec<Sum>| {
        let row = sums.iter().map(|sum| sum.squares.len()).max().unwrap_or(0);
        let padded =
            |sum: &Sum| sum.squares.iter().copied().chain(std::iter::repeat(0.0)).take(row).map(|sum| sum as f32).collect::<Vec<_>>();
        Entry::new(sums.iter().flat_map(padded).collect(), sums.iter().map(|sum| sum.rows as f32).collect())
    };
    Ok(Importance { entries: squares.sums.into_iter().map(|(name, sums)| (name, entry(sums))).collect() })
}

/// Of one matrix; empty where no token has met it.
#[derive(Debug, Clone, Default)]
struct Sum {
    squares: Vec<f64>,
    rows: usize,
}

struct Squares<'a> {
    decoder: &'a Decoder,
    /// by the name in GGUF files: one, or one per expert
    sums: BTreeMap<String, Vec<Sum>>,
    /// of this layer's experts [N, D]
    input: Option<Tensor>,
    routing: Option<Routing>,
}

impl Squares<'_> {
    /// x [N, row] is what the matrix of this role is multiplied with.
    fn add(&mut self, layer: usize, role: LayerRole, x: &Tensor) -> Result<()> {
        let experts = self.decoder.config().moe.as_ref().map_or(1, |moe| moe.experts);
        let (at, count) = if let LayerRole::Expert(e, _) = role { (e, experts) } else { (0, 1) };
        let name = source::gguf::names(Role::Layer(layer, role)).swap_remove(0);
        let sum = &mut self.sums.entry(name).or_insert_with(|| vec![Sum::default(); count])[at];
        let (rows, row) = x.dims2()?;
        sum.squares.resize(row, 0.0);
        sum.rows += rows;
        for x in x.to_dtype(DType::F32)?.to_vec2::<f32>()? {
            sum.squares.iter_mut().zip(x).for_each(|(sum, x)| *sum += f64::from(x) * f64::from(x));
        }
        Ok(())
    }

    /// x [N, D] is what an MLP sees; `mlp` names its projections.
    fn add_mlp(&mut self, layer: usize, mlp: impl Fn(Projection) -> LayerRole, x: &Tensor) -> Result<()> {
        let Some(hidden) = self.decoder.hidden(layer, mlp(Projection::Down), x)? else { return Ok(()) };
        self.add(layer, mlp(Projection::Gate), x)?;
        self.add(layer, mlp(Projection::Up), x)?;
        self.add(layer, mlp(Projection::Down), &hidden)
    }

    /// What each expert of a layer sees of x [N, D].
    fn add_experts(&mut self, layer: usize, x: &Tensor, routing: &Routing) -> Result<()> {
        let experts = self.decoder.config().moe.as_ref().map_or(0, |moe| moe.experts);
        for e in 0..experts {
            let chose = routing.experts.chunks_exact(routing.top_k).zip(0u32..);
            let tokens: Vec<u32> = chose.filter(|(experts, _)| experts.contains(&(e as u32))).map(|(_, token)| token).collect();
            if !tokens.is_empty() {
                let x = x.index_select(&Tensor::new(tokens, x.device())?, 0)?;
                self.add_mlp(layer, |p| LayerRole::Expert(e, p), &x)?;
            }
        }
        Ok(())
    }
}

impl Probe for Squares<'_> {
    fn wants(&self, site: Site) -> bool {
        matches!(site, Site::AttentionInput | Site::AttentionOutput | Site::RouterInput | Site::LayerOutput)
    }

    fn observe(&mut self, site: Site, layer: usize, x: &Tensor) -> Result<()> {
        use AttentionPart::{K, O, Q, V};
        match site {
            Site::AttentionInput => [Q, K, V].into_iter().try_for_each(|part| self.add(layer, LayerRole::Attention(part), x)),
            Site::AttentionOutput => self.add(layer, LayerRole::Attention(O), x),
            Site::RouterInput => {
                self.input = Some(x.clone());
                self.add_mlp(layer, LayerRole::Mlp, x)?;
                self.add_mlp(layer, LayerRole::SharedExpert, x)
            }
            Site::LayerOutput => match (self.input.take(), self.routing.take()) {
                (Some(x), Some(routing)) => self.add_experts(layer, &x, &routing),
                _ => Ok(()),
            },
            _ => Ok(()),
        }
    }

    fn route(&mut self, _: usize, _: &[f32], routing: &mut Routing) {
        self.routing = Some(routing.clone());
    }
}
