//! What the user asks for: a mergekit-moe recipe with our additions, parsed and checked without opening a model.
//!
//! Text becomes a tree ([`yaml`]), the tree a [`Recipe`] ([`schema`]), and the recipe is checked ([`lints`]). What depends on the models,
//! such as whether their family takes a shared expert, is the plan's to check.

mod edit;
mod lints;
mod model_ref;
mod problem;
mod prompts;
mod schema;
mod yaml;

use std::path::{Path, PathBuf};

use serde_json::{Value, json};
use upcycle_architectures::Dtype;
use upcycle_routers::init::{Method, Needs};

pub use self::{
    edit::{Change, EditError, NewExpert, edit, without_texts},
    lints::{LINTS, Level, Lint},
    model_ref::{ModelRef, ModelRefError},
    problem::{Problem, Severity},
};

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
    /// Whether K is left to the fit of the gates, which may find that fewer experts do.
    pub choose_experts_per_token: bool,
    /// Output family by a prefix of mergekit's names (`Mixtral`, `Qwen MoE`, `Qwen3 MoE`, `DeepSeek MoE`) or a `model_type`.
    pub architecture: Option<String>,
    /// How the weights outside the experts are obtained.
    pub shared: Shared,
    /// Whether the experts' down projections are fitted to the shared weights and the routing; `None`: where the gates are.
    pub repair: Option<bool>,
    /// Whether prompts are wrapped in the base's chat template. Not given, mergekit's gate modes take them as they are, and the text that experts
    /// write is a chat where prompts are requests and the expert answers them.
    pub chat_template: Option<bool>,
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
    /// Text of its kind: `.txt` or `.jsonl`. It may be large and is not read with the recipe.
    pub text_file: Option<PathBuf>,
    /// Standard deviation of noise added to its MLP weights.
    pub noise_scale: Option<f64>,
    /// Factor on its down projection.
    pub residual_scale: Option<f64>,
}

/// How shared weights are obtained.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Shared {
    /// `Fit` where the experts' differ from the base's, `Base` where they do not, and `Base` under mergekit's gate modes. Settled before
    /// anything is planned.
    #[default]
    Auto,
    /// The base's.
    Base,
    /// The mean of the experts'.
    Average,
    /// Fitted to what they do in each expert's own model.
    Fit,
}

impl Shared {
    const ALL: [(&'static str, Self); 4] = [("auto", Self::Auto), ("base", Self::Base), ("average", Self::Average), ("fit", Self::Fit)];
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

impl Layout {
    const ALL: [(&'static str, Self); 2] = [("classic", Self::Classic), ("fused", Self::Fused)];
}

/// Why a recipe cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum RecipeError {
    /// The file cannot be read; the message names it.
    #[error(transparent)]
    Read(#[from] std::io::Error),
    /// It is not UTF-8.
    #[error("{}:{line}: this is not UTF-8; save the recipe in that encoding", file.display())]
    Encoding {
        /// the recipe
        file: PathBuf,
        /// from 1
        line: usize,
    },
    /// Everything wrong with the recipe, and its warnings, in the order of the checks. Each is rendered with `error:` or `warning:` in front.
    #[error("{}", .0.iter().map(Problem::to_string).collect::<Vec<_>>().join("\n\n"))]
    Invalid(Vec<Problem>),
}

/// Reads and checks a recipe; what it warns of comes with it. `allow` names the lints that are waived.
pub fn read(file: &Path, allow: &[String]) -> Result<(Recipe, Vec<Problem>), RecipeError> {
    let text = String::from_utf8(fs_err::read(file)?).map_err(|error| {
        let line = error.as_bytes()[..error.utf8_error().valid_up_to()].split(|byte| *byte == b'\n').count();
        RecipeError::Encoding { file: file.to_owned(), line }
    })?;
    parse(&text, file, allow)
}

/// The same from text. `file` is shown in messages, and `prompts_file` and `text_file` paths are relative to its directory.
pub fn parse(text: &str, file: &Path, allow: &[String]) -> Result<(Recipe, Vec<Problem>), RecipeError> {
    let mut reader = schema::Reader::new(text, file);
    let failed = |problems: &[Problem]| problems.iter().any(|problem| problem.severity == Severity::Error);
    match reader.recipe() {
        // What could not be read would only be found missing.
        Some((recipe, places)) if !failed(&reader.problems) => {
            reader.problems.extend(lints::check(&recipe, &places, allow, &reader.file));
            if failed(&reader.problems) { Err(RecipeError::Invalid(reader.problems)) } else { Ok((recipe, reader.problems)) }
        }
        _ => Err(RecipeError::Invalid(reader.problems)),
    }
}

/// The experts of a recipe, whatever else is wrong with it: beside a composite it may name prompts and texts that are not there any more.
pub fn experts(text: &str) -> Vec<Expert> {
    schema::Reader::new(text, Path::new("")).recipe().map(|(recipe, _)| recipe.experts).unwrap_or_default()
}

impl Recipe {
    /// Whether the gates are fitted to the router's true inputs, rather than made from prompts or drawn.
    pub fn fitted(&self) -> bool {
        self.gate_mode.needs().is_none()
    }

    /// Whose gates are set: the routed experts, then the shared expert if it has prompts or the method needs none.
    pub fn gated(&self) -> impl Iterator<Item = &Expert> {
        let shared = self
            .shared_experts
            .iter()
            .filter(|shared| self.gate_mode.needs() == Some(Needs::Nothing) || !shared.positive_prompts.is_empty());
        self.experts.iter().chain(shared)
    }

    /// What was understood, for `plan --json`: every key of a recipe with its value, defaults filled in.
    pub fn to_json(&self) -> Value {
        let expert = |expert: &Expert| {
            json!({
                "source_model": expert.source_model.to_string(),
                "positive_prompts": expert.positive_prompts,
                "negative_prompts": expert.negative_prompts,
                "text_file": expert.text_file,
                "noise_scale": expert.noise_scale,
                "residual_scale": expert.residual_scale,
            })
        };
        json!({
            "base_model": self.base_model.to_string(),
            "experts": self.experts.iter().map(expert).collect::<Vec<_>>(),
            "shared_experts": self.shared_experts.iter().map(expert).collect::<Vec<_>>(),
            "gate_mode": self.gate_mode.name,
            "dtype": self.dtype.map(Dtype::torch_name),
            "experts_per_token": if self.choose_experts_per_token { "auto".into() } else { Value::from(self.experts_per_token) },
            "architecture": self.architecture,
            "shared": name_of(&Shared::ALL, self.shared),
            "repair": self.repair,
            "chat_template": self.chat_template.map_or_else(|| "auto".into(), Value::Bool),
            "tokenizer": self.tokenizer.as_ref().map(ModelRef::to_string),
            "layout": name_of(&Layout::ALL, self.layout),
            "seed": self.seed,
        })
    }
}

fn name_of<T: Copy + PartialEq>(all: &[(&'static str, T)], value: T) -> Option<&'static str> {
    all.iter().find(|(_, one)| *one == value).map(|(name, _)| *name)
}
