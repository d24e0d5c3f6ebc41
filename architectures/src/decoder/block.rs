//! One layer of a dense model by itself, its forward pass taken apart: for working through a model layer by layer, with many texts at once,
//! when the whole need not fit into memory. The parts are those that [`super::Decoder`] is made of.
//!
//! N rows of all sequences laid end to end, D hidden, F ffn, H heads of hd.

use candle_core::{DType, Device, Result, Tensor};

use super::{Cache, DecoderError, KvType, Layer, LayerMlp, Logits, Step, cache::Caches, load::Model, matrix::Placement, rope::Table};
use crate::{
    config::Config,
    family::{AttentionPart, Family},
    kernels::Kernels,
    weights::Weights,
};

/// Texts laid end to end, each beginning at position 0.
pub struct Sequences {
    /// of each sequence
    tokens: Vec<Vec<u32>>,
    rope: Table,
}

impl Sequences {
    /// For models of this config (its rope).
    pub fn new(tokens: Vec<Vec<u32>>, config: &Config, device: &Device) -> Result<Self> {
        let spans: Vec<_> = tokens.iter().map(|tokens| (0, tokens.len())).collect();
        Ok(Self { rope: Table::new(&config.rope, config.head_dim, &spans, device)?, tokens })
    }

    /// The tokens of all sequences, [N].
    pub fn tokens(&self) -> impl Iterator<Item = u32> {
        self.tokens.iter().flatten().copied()
    }
}

/// One layer of a dense model.
pub struct Block {
    layer: Layer,
    caches: Caches,
}

impl Block {
    /// Reads layer `layer` of a dense model, computing in f32; only the MLP, which is most of the work and which no matrix is
    /// fitted to, may round activations to bf16 where the CPU multiplies those faster. Its tensors' shapes are checked as they are read.
    pub fn load(
        family: &Family,
        config: &Config,
        weights: &dyn Weights,
        layer: usize,
        device: &Device,
    ) -> std::result::Result<Self, DecoderError> {
        let placement =
            Placement { device: device.clone(), weights: DType::F32, activations: DType::F32, mapped: device.is_cpu().then(Kernels::best) };
        let model = Model { family, config, weights, placement: &placement };
        let caches = Caches::new(config, 1, device.is_cpu().then_some(KvType::F32));
        let mut layer = model.reader().layer(layer)?;
        if let LayerMlp::Dense(mlp) = &mut layer.mlp {
            mlp.hasten();
        }
        Ok(Self { layer, caches })
    }

    /// Residual stream [N, D] -> what q, k and v see [N, D].
    pub fn attention_input(&self, x: &Tensor) -> Result<Tensor> {
        self.layer.input_norm.forward(x)
    }

    /// What q, k and v see [N, D] -> queries, keys or values [N, heads hd], before norms and rotation.
    pub fn project(&self, part: AttentionPart, normed: &Tensor) -> Result<Tensor> {
        let attention = &self.layer.attention;
        match part {
            AttentionPart::K | AttentionPart::KBias | AttentionPart::KNorm => attention.k.forward(normed),
            AttentionPart::V | AttentionPart::VBias => attention.v.forward(normed),
            AttentionPart::O | AttentionPart::OBias => attention.o.forward(normed),
            AttentionPart::Q | AttentionPart::QBias | AttentionPart::QNorm => attention.q.forward(normed),
        }
    }

    /// What q, k and v see [N, D] -> what o sees [N, H hd].
    pub fn attend(&self, normed: &Tensor, sequences: &Sequences) -> Result<Tensor> {
        let mut caches: Vec<Cache> = sequences.tokens.iter().map(|_| Cache::new(&self.caches)).collect();
        let tokens = sequences.tokens.iter().zip(&mut caches);
        let mut steps: Vec<Step<'_>> = tokens.map(|(tokens, cache)| Step { tokens, cache, logits: Logits::None }).collect();
        self.layer.attention.forward(normed, &sequences.rope, 0, &mut steps)
    }

    /// Residual stream after attention [N, D] -> what the MLP sees [N, D].
    pub fn mlp_input(&self, x: &Tensor) -> Result<Tensor> {
        self.layer.post_norm.forward(x)
    }

    /// What the MLP sees [N, D] -> what its down projection sees [N, F]; `None` for a sparse layer.
    pub fn mlp_hidden(&self, normed: &Tensor) -> Option<Result<Tensor>> {
        match &self.layer.mlp {
            LayerMlp::Dense(mlp) => Some(mlp.hidden(normed)),
            LayerMlp::Sparse(_) => None,
        }
    }

    /// What the down projection sees [N, F] -> what the MLP adds to the residual stream [N, D]; `None` for a sparse layer.
    pub fn mlp_output(&self, hidden: &Tensor) -> Option<Result<Tensor>> {
        match &self.layer.mlp {
            LayerMlp::Dense(mlp) => Some(mlp.output(hidden)),
            LayerMlp::Sparse(_) => None,
        }
    }
}
