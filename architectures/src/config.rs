//! One model's dimensions and switches, read from `config.json` in either spelling (transformers 4 and 5).
//!
//! [`Config`] holds only what the forward pass, the planner and the writer act on. What it does not know stays in the JSON, which is
//! carried along whole.

use crate::weights::Dtype;

/// One model: dimensions and switches. Letters as in the rest of the project: L layers, D hidden, H heads, F ffn, V vocabulary, E experts.
#[derive(Debug, Clone, PartialEq)]
#[allow(clippy::struct_excessive_bools, reason = "independent switches of a family, not states")]
pub struct Config {
    /// `model_type`
    pub model_type: String,
    /// D
    pub hidden: usize,
    /// L
    pub layers: usize,
    /// H
    pub heads: usize,
    /// key/value heads (divides H)
    pub kv_heads: usize,
    /// size of one head; H * `head_dim` need not be D
    pub head_dim: usize,
    /// F of a dense MLP
    pub ffn: usize,
    /// V, as the config states it (rows of the embedding)
    pub vocab: usize,
    /// epsilon of every RMS norm
    pub norm_eps: f64,
    /// activation of the MLP's gate branch
    pub activation: Activation,
    /// rotary position embedding
    pub rope: Rope,
    /// `max_position_embeddings`
    pub max_positions: usize,
    /// biases on q, k, v
    pub qkv_bias: bool,
    /// bias on o
    pub o_bias: bool,
    /// biases on the dense MLP's three projections
    pub mlp_bias: bool,
    /// RMS norm over each head of q and k
    pub qk_norm: bool,
    /// the head is the embedding
    pub tied: bool,
    /// sliding window of each layer (L entries): a token sees itself and the `window - 1` tokens before it
    pub windows: Vec<Option<usize>>,
    /// the sparse part, if there is one
    pub moe: Option<Moe>,
    /// `torch_dtype` or `dtype`
    pub dtype: Option<Dtype>,
    /// `bos_token_id`
    pub bos: Option<u32>,
    /// every `eos_token_id`
    pub eos: Vec<u32>,
}

/// The sparse part of a model.
#[derive(Debug, Clone, PartialEq)]
pub struct Moe {
    /// E
    pub experts: usize,
    /// K, experts per token
    pub top_k: usize,
    /// whether the K weights are normalised to sum to one
    pub normalise: bool,
    /// F of one expert
    pub ffn: usize,
    /// F of the gated shared expert; `None` if there is none
    pub shared_ffn: Option<usize>,
    /// whether each layer (L entries) is sparse; the others have a dense MLP
    pub sparse: Vec<bool>,
    /// R of a router by subspaces ([`upcycle_routers::init::subspace`]), which has R rows per expert; `None`: it is a linear gate, as in every
    /// config.json
    pub directions: Option<usize>,
}

impl Moe {
    /// Rows of a layer's router.
    pub fn router_rows(&self) -> usize {
        self.experts * self.directions.unwrap_or(1)
    }
}

/// Activation of the MLP's gate branch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Activation {
    /// x * sigmoid(x)
    Silu,
    /// exact GELU
    Gelu,
    /// GELU, tanh approximation
    GeluTanh,
    /// max(x, 0)
    Relu,
}

/// Rotary position embedding.
#[derive(Debug, Clone, PartialEq)]
pub struct Rope {
    /// base of the frequencies
    pub theta: f64,
    /// share of the head that is rotated
    pub partial: f64,
    /// how positions beyond the original length are treated
    pub scaling: RopeScaling,
}

/// The rope kinds of transformers (`modeling_rope_utils`).
#[derive(Debug, Clone, PartialEq)]
pub enum RopeScaling {
    /// plain
    Default,
    /// positions divided by `factor`
    Linear {
        /// divisor
        factor: f64,
    },
    /// NTK-aware: theta grows with the sequence beyond the original length
    Dynamic {
        /// growth
        factor: f64,
        /// original length
        original: usize,
    },
    /// `YaRN` (arXiv 2309.00071)
    Yarn {
        /// stretch
        factor: f64,
        /// original length
        original: usize,
        /// `beta_fast`
        beta_fast: f64,
        /// `beta_slow`
        beta_slow: f64,
        /// factor on cos and sin, resolved from `attention_factor`, `mscale`, `mscale_all_dim` or the paper's default
        attention_factor: f64,
        /// whether the correction range is truncated to whole dimensions
        truncate: bool,
    },
    /// `LongRoPE` (arXiv 2402.13753): a divisor per frequency, other ones beyond the original length
    LongRope {
        /// divisors up to the original length
        short: Vec<f64>,
        /// divisors beyond it
        long: Vec<f64>,
        /// original length
        original: usize,
        /// factor on cos and sin
        attention_factor: f64,
    },
    /// Llama 3.1: low frequencies divided, high ones kept, smooth between
    Llama3 {
        /// divisor of the low frequencies
        factor: f64,
        /// `low_freq_factor`
        low: f64,
        /// `high_freq_factor`
        high: f64,
        /// original length
        original: usize,
    },
}

/// What is wrong with a `config.json`.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// A key that the family needs is not there.
    #[error("config.json: `{key}` is missing; copy config.json from the model that was fine-tuned")]
    Missing {
        /// the key
        key: String,
    },
    /// A value that makes no sense.
    #[error("config.json: `{key}` is {found}, expected {expected}")]
    Invalid {
        /// the key
        key: String,
        /// what stands there
        found: String,
        /// what could stand there
        expected: String,
    },
    /// A family that is not in the list.
    #[error("config.json: model type `{model_type}` is not supported (supported: {supported})")]
    Unsupported {
        /// as in the config
        model_type: String,
        /// comma-separated list
        supported: String,
    },
}
