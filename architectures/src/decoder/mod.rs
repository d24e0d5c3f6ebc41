//! The one forward pass: dense and sparse, every device and dtype, calibration, evaluation and serving.
//!
//! Sequences of any length run together: their tokens are laid end to end as rows [N, D] (N = all new tokens of all sequences), so that
//! linear layers and experts see one matrix; only attention looks at each sequence by itself.

use candle_core::{DType, Device, Result, Tensor};
use upcycle_routers::route::Routing;

use crate::{
    config::Config,
    family::Family,
    weights::{Weights, WeightsError},
};

/// Places in the forward pass where a [`Probe`] can look. Shapes are of all rows N of the call.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Site {
    /// residual stream entering the layer [N, D]
    LayerInput,
    /// after the input norm: what q, k, v see [N, D]
    AttentionInput,
    /// what o sees [N, H hd]
    AttentionOutput,
    /// residual stream after attention [N, D]
    AfterAttention,
    /// after the post-attention norm: what router and experts see [N, D]
    RouterInput,
    /// residual stream leaving the layer [N, D]
    LayerOutput,
    /// after the final norm: what the head sees [N, D] (layer = L)
    FinalNorm,
}

/// Looks into, and may steer, a forward pass.
pub trait Probe {
    /// Whether [`Probe::observe`] should be called for this site.
    fn wants(&self, _site: Site) -> bool {
        false
    }

    /// Sees the activations at a site that it wants.
    fn observe(&mut self, _site: Site, _layer: usize, _x: &Tensor) -> Result<()> {
        Ok(())
    }

    /// Sees, and may change, the routing of a sparse layer; `logits` is row-major [N, E].
    fn route(&mut self, _layer: usize, _logits: &[f32], _routing: &mut Routing) {}

    /// Returns false to leave attention out of this layer, as if every token attended to nothing (its output is zero, before the o projection).
    fn attends(&self, _layer: usize) -> bool {
        true
    }

    /// Returns false to stop after this layer (the call then returns no logits).
    fn go_on(&self, _layer: usize) -> bool {
        true
    }
}

/// A probe that looks at nothing.
#[derive(Debug, Clone, Copy, Default)]
pub struct NoProbe;

impl Probe for NoProbe {}

/// One sequence's share of a forward pass.
#[derive(Debug)]
pub struct Step<'a> {
    /// new tokens, at positions `cache.len()..`
    pub tokens: &'a [u32],
    /// keys and values of the tokens before; the new ones are appended
    pub cache: &'a mut Cache,
    /// of which new tokens the logits are wanted
    pub logits: Logits,
}

/// Of which tokens logits are wanted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Logits {
    /// of none
    None,
    /// of the last
    Last,
    /// of all
    All,
}

/// Keys and values of one sequence.
#[derive(Debug)]
pub struct Cache {
    len: usize,
}

impl Cache {
    /// Tokens held.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether it holds nothing.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Forgets all tokens from position `len` on.
    pub fn truncate(&mut self, len: usize) {
        self.len = self.len.min(len);
    }
}

/// Why a decoder could not be made or run.
#[derive(Debug, thiserror::Error)]
pub enum DecoderError {
    /// from the weights
    #[error(transparent)]
    Weights(#[from] WeightsError),
    /// from candle
    #[error(transparent)]
    Tensor(#[from] candle_core::Error),
    /// a token beyond the vocabulary
    #[error("token {token} is not in the vocabulary of {vocab}")]
    Token {
        /// the id
        token: u32,
        /// V
        vocab: usize,
    },
}

/// A loaded model.
#[derive(Debug)]
pub struct Decoder {
    config: Config,
}

impl Decoder {
    /// Reads every tensor of `family.tensors(config)` from `weights` (classic or fused layout) onto `device`, computing in `dtype`.
    pub fn load(
        _family: &Family,
        config: &Config,
        _weights: &dyn Weights,
        _dtype: DType,
        _device: &Device,
    ) -> std::result::Result<Self, DecoderError> {
        Ok(Self { config: config.clone() })
    }

    /// The model's config.
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// An empty cache for one sequence.
    pub fn cache(&self) -> Cache {
        Cache { len: 0 }
    }

    /// Runs the new tokens of all sequences. Returns the wanted logits as f32 [rows, V], in the order of `steps`.
    pub fn forward(&self, _steps: &mut [Step<'_>], _probe: &mut dyn Probe) -> std::result::Result<Tensor, DecoderError> {
        Err(candle_core::Error::Msg("skeleton".into()).into())
    }
}
