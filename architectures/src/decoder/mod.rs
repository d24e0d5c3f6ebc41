//! The one forward pass: dense and sparse, every device and dtype, calibration, evaluation and serving.
//!
//! Sequences of any length run together: their tokens are laid end to end as rows [N, D] (N = all new tokens of all sequences), so that
//! linear layers and experts see one matrix; only attention looks at each sequence by itself.
//!
//! A sequence's results do not depend on its neighbours, nor on how it is cut into calls (two rope kinds apart: see `rope.rs`): to rounding on
//! devices, to the last bit on the CPU, whose products and attention sum every row in the same order whatever stands beside it (`kernels`).
//!
//! Where a layer can be computed by the CPU's kernels, `direct` says so, and there alone: weights that are mapped bytes, activations that no
//! gradient follows. Everything else is candle's.

mod attention;
mod block;
mod cache;
mod ensemble;
mod load;
mod matrix;
mod mlp;
mod moe;
mod norm;
mod rope;
mod train;

use std::sync::Arc;

use candle_core::{DType, Device, Result, Tensor};
use rayon::prelude::*;
use upcycle_routers::route::{Routing, Steering};

use self::{
    attention::Attention,
    cache::Caches,
    load::Model,
    matrix::{Matrix, Placement},
    mlp::Mlp,
    moe::Sparse,
    norm::Norm,
    rope::Table,
};
pub use self::{
    block::{Block, Sequences},
    cache::Cache,
    ensemble::{Ensemble, EnsembleCache},
    load::tensor,
    train::Substitute,
};
pub use crate::kernels::attention::KvType;
use crate::{
    config::Config,
    family::{Family, LayerRole, Projection, Role},
    kernels::Kernels,
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

    /// Returns false to leave attention out of this layer, as if every token attended to nothing: what o sees is zero. The call then leaves no
    /// token in the caches.
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

/// What gives the next tokens' logits: a [`Decoder`], or an [`Ensemble`] of whole ones.
pub trait LanguageModel: Sync {
    /// What is remembered of one sequence.
    type Cache: Memory + Send;

    /// Dimensions and switches.
    fn config(&self) -> &Config;

    /// An empty cache for one sequence.
    fn cache(&self) -> Self::Cache {
        self.steered(None)
    }

    /// A cache for a sequence that one pass reads to its end: it may forget a layer's keys and values when the pass has left the layer, and be as
    /// empty after the pass as before it.
    fn scratch(&self) -> Self::Cache {
        self.cache()
    }

    /// An empty cache for a sequence whose experts are chosen under this steering.
    fn steered(&self, steering: Option<Arc<Steering>>) -> Self::Cache;

    /// Who can be chosen; `None` where there is no choice.
    fn choice(&self) -> Option<Choice>;

    /// Bytes that all its caches hold, what several share counted once.
    fn held(&self) -> usize;

    /// Runs the new tokens of all sequences. Returns the wanted logits as f32 [rows, V], in the order of `steps`.
    fn forward(&self, steps: &mut [Step<'_, Self::Cache>], probe: &mut dyn Probe) -> std::result::Result<Tensor, DecoderError>;

    /// Reads all weights that are memory maps, so that no token waits for a disk.
    fn preload(&self);

    /// The expert that answers a sequence as a whole, or is most likely to; `None` where there is no such choice.
    fn answering(&self, _cache: &Self::Cache) -> Option<usize> {
        None
    }
}

/// The experts that a model chooses among.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Choice {
    /// E
    pub experts: usize,
    /// K
    pub top_k: usize,
    /// the layers that have a router; 0 alone where experts answer whole sequences
    pub layers: Vec<usize>,
    /// whether an expert answers whole sequences
    pub whole: bool,
}

/// What a model remembers of one sequence.
pub trait Memory: Sized {
    /// How the experts of its tokens are chosen, if not by the routers alone.
    fn steering(&self) -> Option<&Arc<Steering>>;

    /// Tokens remembered.
    fn len(&self) -> usize;

    /// Whether there are none.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Forgets the tokens from position `len` on, and more than that where it must: [`Memory::len`] says where to go on.
    fn truncate(&mut self, len: usize);

    /// Whether the newest tokens can be forgotten alone.
    fn rewinds(&self) -> bool;

    /// Another memory of the first `len` tokens, or of fewer: [`Memory::len`] says how many. What can be shared is.
    fn fork(&self, len: usize) -> Result<Self>;

    /// Bytes that so many tokens more would take.
    fn growth(&self, tokens: usize) -> usize;
}

impl Memory for Cache {
    fn steering(&self) -> Option<&Arc<Steering>> {
        self.steering()
    }

    fn len(&self) -> usize {
        self.len()
    }

    fn truncate(&mut self, len: usize) {
        self.truncate(len);
    }

    fn rewinds(&self) -> bool {
        true
    }

    fn fork(&self, len: usize) -> Result<Self> {
        self.fork(len)
    }

    fn growth(&self, tokens: usize) -> usize {
        self.growth(tokens)
    }
}

impl LanguageModel for Decoder {
    type Cache = Cache;

    fn config(&self) -> &Config {
        &self.config
    }

    fn steered(&self, steering: Option<Arc<Steering>>) -> Cache {
        Cache::steered(&self.caches, steering)
    }

    fn scratch(&self) -> Cache {
        Cache::new(&self.caches.scratch())
    }

    fn choice(&self) -> Option<Choice> {
        let moe = self.config.moe.as_ref()?;
        let layers = moe.sparse.iter().enumerate().filter(|(_, sparse)| **sparse).map(|(layer, _)| layer).collect();
        Some(Choice { experts: moe.experts, top_k: moe.top_k, layers, whole: false })
    }

    fn held(&self) -> usize {
        self.caches.held()
    }

    fn preload(&self) {
        self.matrices().into_iter().for_each(Matrix::preload);
    }

    fn forward(&self, steps: &mut [Step<'_>], probe: &mut dyn Probe) -> std::result::Result<Tensor, DecoderError> {
        self.forward(steps, probe)
    }
}

/// One sequence's share of a forward pass.
#[derive(Debug)]
pub struct Step<'a, C = Cache> {
    /// new tokens, at the positions behind those that the cache holds
    pub tokens: &'a [u32],
    /// what is remembered of the tokens before; the new ones are appended
    pub cache: &'a mut C,
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

impl Logits {
    /// Of how many rows, of so many tokens.
    fn rows(self, tokens: usize) -> usize {
        match self {
            Self::None => 0,
            Self::Last => tokens.min(1),
            Self::All => tokens,
        }
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
    /// a type that is not computed in
    #[error("cannot compute in {dtype:?}, only in f32, f16 or bf16")]
    Dtype {
        /// the type asked for
        dtype: DType,
    },
    /// a cache of another model
    #[error("the cache is another model's: it has {found} layers (of an ensemble: experts), the model {expected}")]
    Cache {
        /// L, or E
        expected: usize,
        /// of the cache
        found: usize,
    },
    /// a cache of a model with other heads
    #[error("the cache is another model's: its keys are of another shape")]
    Keys,
    /// heads that a type does not fit
    #[error("keys and values cannot be kept as q8_0: heads of {head_dim} are no multiple of 32; f16 and f32 take any")]
    KvType {
        /// hd
        head_dim: usize,
    },
    /// models that do not make an ensemble
    #[error("an ensemble needs experts")]
    NoExperts,
    /// a probe left a routing that is none
    #[error("the routing of layer {layer} does not give each of {tokens} tokens some of {experts} experts")]
    Routing {
        /// the layer
        layer: usize,
        /// N
        tokens: usize,
        /// E
        experts: usize,
    },
    /// a substitute of the wrong shape or for a weight that takes none
    #[error("nothing of this kind and shape can stand in for {role:?}")]
    Substitute {
        /// the weight
        role: Role,
    },
}

/// A loaded model. A clone shares its weights.
#[derive(Debug, Clone)]
pub struct Decoder {
    config: Config,
    device: Device,
    embedding: Matrix,
    layers: Vec<Layer>,
    final_norm: Norm,
    head: Matrix,
    caches: Caches,
}

#[derive(Debug, Clone)]
struct Layer {
    input_norm: Norm,
    attention: Attention,
    post_norm: Norm,
    mlp: LayerMlp,
}

#[derive(Debug, Clone)]
enum LayerMlp {
    Dense(Mlp),
    Sparse(Sparse),
}

impl Decoder {
    /// Reads every tensor of `family.tensors(config)` from `weights` (classic or fused layout) onto `device`, computing in `dtype`: f32, f16
    /// or bf16.
    ///
    /// On the CPU, weights stay the bytes that `weights` gives where `dtype` holds them exactly, and activations are f32 for every `dtype`;
    /// but in bf16, on CPUs that multiply it, they are rounded to bf16 for products.
    pub fn load(
        family: &Family,
        config: &Config,
        weights: &dyn Weights,
        dtype: DType,
        device: &Device,
    ) -> std::result::Result<Self, DecoderError> {
        if device.is_cpu() {
            let kernels = if dtype == DType::BF16 { Kernels::fastest() } else { Kernels::best() };
            return Self::load_with(family, config, weights, dtype, kernels);
        }
        let placement = Placement { device: device.clone(), weights: dtype, activations: dtype, mapped: None };
        Self::load_at(family, config, weights, &placement)
    }

    /// As [`Decoder::load`] on the CPU, with kernels of one's choice.
    pub fn load_with(
        family: &Family,
        config: &Config,
        weights: &dyn Weights,
        dtype: DType,
        kernels: Kernels,
    ) -> std::result::Result<Self, DecoderError> {
        let placement = Placement { device: Device::Cpu, weights: dtype, activations: DType::F32, mapped: Some(kernels) };
        Self::load_at(family, config, weights, &placement)
    }

    fn load_at(family: &Family, config: &Config, weights: &dyn Weights, placement: &Placement) -> std::result::Result<Self, DecoderError> {
        if !matches!(placement.weights, DType::F32 | DType::F16 | DType::BF16) {
            return Err(DecoderError::Dtype { dtype: placement.weights });
        }
        let model = Model { family, config, weights, placement };
        model.check()?;
        let mut reader = model.reader();
        let embedding = reader.matrix(Role::Embedding, [config.vocab, config.hidden])?;
        let head = if config.tied { embedding.clone() } else { reader.matrix(Role::Head, [config.vocab, config.hidden])? };
        Ok(Self {
            config: config.clone(),
            device: placement.device.clone(),
            embedding,
            layers: (0..config.layers).into_par_iter().map(|layer| model.reader().layer(layer)).collect::<std::result::Result<_, _>>()?,
            final_norm: reader.norm(Role::FinalNorm, config.hidden)?,
            head,
            caches: Caches::new(config, config.layers, placement.mapped.map(|_| KvType::F32)),
        })
    }

    /// The same with keys and values of another type in its caches, f32 if not said. On devices they are of the computing type whatever is
    /// said here.
    pub fn with_kv_type(self, kv_type: KvType) -> std::result::Result<Self, DecoderError> {
        Ok(Self { caches: self.caches.of_type(kv_type)?, ..self })
    }

    /// The model's config.
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// All weight matrices, in the order in which a pass reads them.
    fn matrices(&self) -> Vec<&Matrix> {
        let mut all = vec![&self.embedding];
        for Layer { attention: Attention { q, k, v, o, .. }, mlp, .. } in &self.layers {
            all.extend([q, k, v, o].map(|linear| &linear.weight));
            match mlp {
                LayerMlp::Dense(mlp) => all.extend(mlp.matrices()),
                LayerMlp::Sparse(sparse) => all.extend(sparse.matrices()),
            }
        }
        all.push(&self.head);
        all
    }

    /// The CPU's kernels that it multiplies with; `None` where candle does.
    pub fn kernels(&self) -> Option<Kernels> {
        match &self.embedding {
            Matrix::Mapped(weight) => Some(weight.kernels),
            Matrix::Held(_) => None,
        }
    }

    /// An empty cache for one sequence.
    pub fn cache(&self) -> Cache {
        Cache::new(&self.caches)
    }

    /// What an expert of a sparse layer makes of router inputs x [N, D], whoever is chosen for them: [N, D]. `None` if there is no such expert.
    pub fn expert(&self, layer: usize, expert: usize, x: &Tensor) -> Result<Option<Tensor>> {
        match self.layers.get(layer).map(|layer| &layer.mlp) {
            Some(LayerMlp::Sparse(sparse)) => sparse.experts.get(expert).map(|expert| expert.forward(x)).transpose(),
            _ => Ok(None),
        }
    }

    /// What the down projection `role` of a layer is multiplied with, [N, F], when its MLP sees x [N, D]. `None` if there is no such projection.
    pub fn hidden(&self, layer: usize, role: LayerRole, x: &Tensor) -> Result<Option<Tensor>> {
        let mlp = match (self.layers.get(layer).map(|layer| &layer.mlp), role) {
            (Some(LayerMlp::Dense(mlp)), LayerRole::Mlp(Projection::Down)) => Some(mlp),
            (Some(LayerMlp::Sparse(sparse)), LayerRole::Expert(e, Projection::Down)) => sparse.experts.get(e),
            (Some(LayerMlp::Sparse(sparse)), LayerRole::SharedExpert(Projection::Down)) => sparse.shared.as_ref().map(|(mlp, _)| mlp),
            _ => None,
        };
        mlp.map(|mlp| mlp.hidden(x)).transpose()
    }

    /// Runs the new tokens of all sequences. Returns the wanted logits as f32 [rows, V], in the order of `steps`.
    ///
    /// If the probe stops the pass or an error does, there are no logits and every cache keeps the tokens that it had.
    pub fn forward(&self, steps: &mut [Step<'_>], probe: &mut dyn Probe) -> std::result::Result<Tensor, DecoderError> {
        for step in steps.iter() {
            if step.cache.layers() != self.layers.len() {
                return Err(DecoderError::Cache { expected: self.layers.len(), found: step.cache.layers() });
            }
            if !step.cache.fits(&self.caches) {
                return Err(DecoderError::Keys);
            }
        }
        let tokens = new_tokens(steps, self.config.vocab)?;
        let nothing = || Ok(Tensor::zeros((0, self.config.vocab), DType::F32, &self.device)?);
        if tokens.is_empty() {
            return nothing();
        }
        let spans: Vec<_> = steps.iter().map(|step| (step.cache.len(), step.tokens.len())).collect();
        let rope = Table::new(&self.config.rope, self.config.head_dim, &spans, &self.device)?;

        let steering = row_steering(steps);
        let mut remembered = true;
        let mut x = self.embedding.gather(&tokens)?; // [N, D]
        for (l, layer) in self.layers.iter().enumerate() {
            look(probe, Site::LayerInput, l, &x)?;
            let normed = layer.input_norm.forward(&x)?;
            look(probe, Site::AttentionInput, l, &normed)?;
            let attends = probe.attends(l);
            remembered &= attends;
            let mixed = if attends { layer.attention.forward(&normed, &rope, l, steps)? } else { layer.attention.nothing(&normed)? }; // [N, H hd]
            look(probe, Site::AttentionOutput, l, &mixed)?;
            x = (x + layer.attention.o.forward(&mixed)?)?;
            look(probe, Site::AfterAttention, l, &x)?;
            let normed = layer.post_norm.forward(&x)?;
            look(probe, Site::RouterInput, l, &normed)?;
            let y = match &layer.mlp {
                LayerMlp::Dense(mlp) => mlp.forward(&normed)?,
                LayerMlp::Sparse(sparse) => sparse.forward(&normed, l, &steering, probe)?,
            };
            x = (x + y)?;
            look(probe, Site::LayerOutput, l, &x)?;
            if !probe.go_on(l) {
                return nothing();
            }
        }

        remembered &= !x.track_op();
        let wanted = wanted_rows(steps);
        if probe.wants(Site::FinalNorm) {
            probe.observe(Site::FinalNorm, self.layers.len(), &self.final_norm.forward(&x)?)?;
        }
        let logits = if wanted.is_empty() {
            nothing()?
        } else {
            let x = if wanted.len() == tokens.len() { x } else { x.index_select(&Tensor::new(wanted, &self.device)?, 0)? };
            self.head.times(&self.final_norm.forward(&x)?)?.to_dtype(DType::F32)?
        };
        for step in steps.iter_mut().filter(|_| remembered) {
            step.cache.advance(step.tokens.len());
        }
        Ok(logits)
    }
}

fn look(probe: &mut dyn Probe, site: Site, layer: usize, x: &Tensor) -> Result<()> {
    if probe.wants(site) { probe.observe(site, layer, x) } else { Ok(()) }
}

/// The new tokens of all sequences, each of them in the vocabulary.
fn new_tokens<C>(steps: &[Step<'_, C>], vocab: usize) -> std::result::Result<Vec<u32>, DecoderError> {
    let tokens: Vec<u32> = steps.iter().flat_map(|step| step.tokens).copied().collect();
    match tokens.iter().find(|token| **token as usize >= vocab) {
        Some(&token) => Err(DecoderError::Token { token, vocab }),
        None => Ok(tokens),
    }
}

/// The steering of each row of the call; none where no sequence is steered.
fn row_steering(steps: &[Step<'_>]) -> Vec<Arc<Steering>> {
    if steps.iter().all(|step| step.cache.steering().is_none()) {
        return Vec::new();
    }
    let own = |step: &Step<'_>| std::iter::repeat_n(step.cache.steering().cloned().unwrap_or_default(), step.tokens.len());
    steps.iter().flat_map(own).collect()
}

/// Rows of the call whose logits are wanted.
fn wanted_rows(steps: &[Step<'_>]) -> Vec<u32> {
    let mut wanted = Vec::new();
    let mut start = 0u32;
    for step in steps {
        let end = start + step.tokens.len() as u32;
        wanted.extend(end - step.logits.rows(step.tokens.len()) as u32..end);
        start = end;
    }
    wanted
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::weights::{Dtype, TensorInfo, View};

    /// Weights of a model, each made when it is read.
    struct Made(Vec<(String, Vec<usize>)>);

    impl Weights for Made {
        fn names(&self) -> Vec<String> {
            self.0.iter().map(|(name, _)| name.clone()).collect()
        }

        fn info(&self, name: &str) -> Option<TensorInfo> {
            let (_, shape) = self.0.iter().find(|(own, _)| own == name)?;
            Some(TensorInfo { dtype: Dtype::Bf16, shape: shape.clone() })
        }

        fn read(&self, name: &str) -> std::result::Result<View, WeightsError> {
            let info = self.info(name).ok_or_else(|| WeightsError::Missing { tensor: name.to_owned() })?;
            let (center, seed) = (if name.contains("norm") { 1.0 } else { 0.0 }, name.bytes().map(usize::from).sum::<usize>());
            let values: Vec<f32> = (0..info.elements()).map(|i| center + ((seed + 1) as f32 * (i + 1) as f32 * 0.7).sin() * 0.4).collect();
            View::from_f32(&values, info.dtype, info.shape)
        }
    }

    /// A text in one pass needs no memory of it.
    #[test]
    fn scratch_caches_change_nothing() {
        let (family, config) = crate::detect(&json!({
            "model_type": "qwen2", "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 3, "num_attention_heads": 4,
            "num_key_value_heads": 2, "vocab_size": 50,
        }))
        .unwrap();
        let made = Made(family.tensors(&config).into_iter().map(|(role, shape)| (family.name(role).unwrap(), shape)).collect());
        let placement = Placement { device: Device::Cpu, weights: DType::F32, activations: DType::F32, mapped: None };
        for decoder in
            [Decoder::load(family, &config, &made, DType::F32, &Device::Cpu), Decoder::load_at(family, &config, &made, &placement)]
        {
            let decoder = decoder.unwrap();
            let mut scratch = decoder.scratch();
            for tokens in [&[3, 1, 4, 1, 5, 9, 2, 6][..], &[2; 40], &[7]] {
                let logits = |cache: &mut Cache| {
                    let logits = decoder.forward(&mut [Step { tokens, cache, logits: Logits::All }], &mut NoProbe).unwrap();
                    logits.to_vec2::<f32>().unwrap()
                };
                assert_eq!(logits(&mut scratch), logits(&mut decoder.cache()));
                assert!(scratch.is_empty());
            }
        }
    }

    /// The ways to hold weights and activations give the same answers: what a device does, done on the CPU.
    #[test]
    fn placements_agree() {
        let (family, config) = crate::detect(&json!({
            "model_type": "qwen2_moe", "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 3, "num_attention_heads": 4,
            "num_key_value_heads": 2, "vocab_size": 50, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24,
            "shared_expert_intermediate_size": 16, "mlp_only_layers": [1], "use_sliding_window": true, "sliding_window": 5,
        }))
        .unwrap();
        let made = Made(family.tensors(&config).into_iter().map(|(role, shape)| (family.name(role).unwrap(), shape)).collect());
        let tokens: Vec<u32> = (0..12).map(|i| i * 11 % 50).collect();
        let logits = |decoder: &Decoder| {
            let mut cache = decoder.cache();
            let mut all = Vec::new();
            for tokens in [&tokens[..9], &tokens[9..11], &tokens[11..]] {
                let logits = decoder.forward(&mut [Step { tokens, cache: &mut cache, logits: Logits::All }], &mut NoProbe).unwrap();
                assert_eq!(logits.dtype(), DType::F32);
                all.extend(logits.flatten_all().unwrap().to_vec1::<f32>().unwrap());
            }
            all
        };
        let reference = logits(&Decoder::load(family, &config, &made, DType::F32, &Device::Cpu).unwrap());
        for (dtype, tolerance) in [(DType::F32, 1e-5), (DType::F16, 2e-2), (DType::BF16, 1e-1)] {
            let placement = Placement { device: Device::Cpu, weights: dtype, activations: dtype, mapped: None };
            let held = logits(&Decoder::load_at(family, &config, &made, &placement).unwrap());
            let difference = held.iter().zip(&reference).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
            let largest = reference.iter().fold(0.0, |largest: f32, x| largest.max(x.abs()));
            assert!(difference <= tolerance * largest, "{dtype:?}: {difference} of {largest}");
        }
    }
}
