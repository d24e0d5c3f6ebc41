//! What the user asks for: a mergekit-moe recipe with our additions, parsed and checked without opening a model.

use std::path::PathBuf;

use upcycle_architectures::Dtype;
use upcycle_routers::init::Method;

/// A recipe, complete: defaults filled in, prompt files read.
#[derive(Debug, Clone)]
pub struct Recipe {
    /// The model whose shared weights and tokenizer are used.
    pub base_model: ModelRef,
    /// In the order of their index.
    pub experts: Vec<Expert>,
    /// At most one; runs for every token beside the chosen experts.
    pub shared_experts: Vec<Expert>,
    /// How the gates are set.
    pub gate_mode: &'static Method,
    /// Type of every output tensor; the base's if not given.
    pub dtype: Option<Dtype>,
    /// K
    pub experts_per_token: usize,
    /// Output family by a prefix of mergekit's names (`Mixtral`, `Qwen MoE`, `Qwen3 MoE`, `DeepSeek MoE`) or a `model_type`.
    pub architecture: Option<String>,
    /// How the weights outside the experts are obtained.
    pub shared: Shared,
    /// Whether prompts are wrapped in the base's chat template before their states are taken.
    pub chat_template: bool,
    /// Where the tokenizer files come from; the base if not given.
    pub tokenizer: Option<ModelRef>,
    /// Tensor layout on disk.
    pub layout: Layout,
    /// Seed of everything drawn.
    pub seed: Option<u64>,
    /// The recipe's text, verbatim.
    pub text: String,
    /// Where it was read from; relative model paths are relative to the working directory, as in mergekit.
    pub file: PathBuf,
}

/// A fine-tune whose MLPs become one expert.
#[derive(Debug, Clone)]
pub struct Expert {
    /// Where it is.
    pub source_model: ModelRef,
    /// What it is for.
    pub positive_prompts: Vec<String>,
    /// What it is not for.
    pub negative_prompts: Vec<String>,
    /// Standard deviation of noise added to its MLP weights.
    pub noise_scale: Option<f64>,
    /// Factor on its down projection.
    pub residual_scale: Option<f64>,
}

/// A model: `PATH_OR_REPO[@REVISION][+LORA[@REVISION]]`.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ModelRef {
    /// A directory, a file, or `owner/name`.
    pub path: String,
    /// Branch, tag or commit on the Hub.
    pub revision: Option<String>,
    /// A PEFT adapter merged into it.
    pub lora: Option<Box<ModelRef>>,
}

impl std::fmt::Display for ModelRef {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.path)?;
        if let Some(revision) = &self.revision {
            write!(f, "@{revision}")?;
        }
        if let Some(lora) = &self.lora {
            write!(f, "+{lora}")?;
        }
        Ok(())
    }
}

/// How shared weights are obtained.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Shared {
    /// The base's.
    #[default]
    Base,
    /// The mean of the experts'.
    Average,
}

/// Tensor layout of a composite on disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Layout {
    /// One tensor per expert and projection: what every engine loads.
    #[default]
    Classic,
    /// Experts stacked, gate and up joined: what transformers 5 holds in memory.
    Fused,
}
