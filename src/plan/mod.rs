//! Recipe and opened sources to a plan: for every output tensor, where its bytes come from.
//!
//! Planning reads headers and configs only. Whatever cannot be composed is found here, before a weight is read; what a plan says is all that
//! [`Composite`] and the writer act on. Symbols: L layers, E experts, D hidden, F ffn, V vocabulary.

mod change;
mod check;
mod composite;
mod sequence;

use std::{collections::BTreeMap, sync::Arc};

use serde::{Deserialize, Serialize};
use upcycle_architectures::{
    AttentionPart, Config, Dtype, Family, LayerRole, Projection, Role, TensorInfo, Weights,
    upcycle::{Request, TARGETS, Target},
};
use upcycle_routers::{
    gate::Gate,
    init::{DEFAULT_SEED, Runtime, subspace},
};

pub use change::changed;
pub use composite::Composite;
pub(crate) use composite::hex;
pub use sequence::{Sequence, sequence};

use crate::{
    recipe::{Expert, Layout, ModelRef, Recipe, Shared},
    source::{self, Source},
};

/// The opened models of a recipe, each once however often it is named.
pub struct Sources {
    /// In the order in which the recipe names them, the base first.
    pub all: Vec<Source>,
    by_reference: BTreeMap<ModelRef, usize>,
}

impl Sources {
    /// Opens every model of the recipe with `open`, which is given the reference and the base once that is open.
    pub fn open<E>(recipe: &Recipe, mut open: impl FnMut(&ModelRef, Option<&Source>) -> Result<Source, E>) -> Result<Self, E> {
        let mut sources = Self { all: Vec::new(), by_reference: BTreeMap::new() };
        let experts = recipe.experts.iter().chain(&recipe.shared_experts).map(|expert| &expert.source_model);
        for reference in std::iter::once(&recipe.base_model).chain(experts).chain(&recipe.tokenizer) {
            if !sources.by_reference.contains_key(reference) {
                let source = open(reference, sources.all.first())?;
                sources.by_reference.insert(reference.clone(), sources.all.len());
                sources.all.push(source);
            }
        }
        Ok(sources)
    }

    /// Models that a plan names by number alone.
    pub(crate) fn numbered(all: Vec<Source>) -> Self {
        Self { all, by_reference: BTreeMap::new() }
    }

    /// The base.
    pub fn base(&self) -> &Source {
        &self.all[0]
    }

    /// The source of a reference of the recipe that these sources were opened for.
    pub fn get(&self, reference: &ModelRef) -> &Source {
        &self.all[self.index(reference)]
    }

    fn index(&self, reference: &ModelRef) -> usize {
        self.by_reference.get(reference).copied().unwrap_or(0)
    }
}

/// What will be written.
#[derive(Debug, Clone)]
pub struct Plan {
    /// Name of the output family among [`TARGETS`].
    pub target: &'static Target,
    /// The composite's config, as the decoder reads it.
    pub config: Config,
    /// The composite's config.json.
    pub config_json: serde_json::Value,
    /// Type of every tensor.
    pub dtype: Dtype,
    /// Every tensor, in the order in which it is written.
    pub tensors: Vec<PlannedTensor>,
    /// Whether the shared expert's gate is set from prompts too.
    pub gated_shared_expert: bool,
    /// Whether the experts' down projections are fitted.
    pub repaired: bool,
    /// Seed of everything drawn.
    pub seed: u64,
    /// What the user should know, though nothing is wrong.
    pub warnings: Vec<String>,
}

/// One output tensor.
#[derive(Debug, Clone, Serialize)]
pub struct PlannedTensor {
    /// Name on disk.
    pub name: String,
    /// Type and shape; never a type of blocks.
    #[serde(skip)]
    pub info: TensorInfo,
    /// Laid end to end they are the tensor's bytes.
    pub parts: Vec<Part>,
}

/// Where a run of bytes comes from. Sources are indices into [`Sources::all`].
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "from", rename_all = "snake_case")]
pub enum Part {
    /// A source's tensor; copied if the type is the same and nothing is to be done to it.
    Tensor {
        /// which source
        source: usize,
        /// its name there
        tensor: String,
        /// standard deviation of the noise added
        #[serde(skip_serializing_if = "Option::is_none")]
        noise: Option<f64>,
        /// factor on the result
        #[serde(skip_serializing_if = "Option::is_none")]
        scale: Option<f64>,
        /// the norm in front of it is folded into its columns
        #[serde(skip_serializing_if = "Option::is_none")]
        fold: Option<Fold>,
    },
    /// What calibration made, by its name in the classic layout.
    Fitted {
        /// its name
        tensor: String,
    },
    /// The mean of several sources' tensors.
    Mean {
        /// source and name there
        of: Vec<(usize, String)>,
    },
    /// The router's gate of a layer [E, D].
    Gate {
        /// l
        layer: usize,
    },
    /// The shared expert's gate of a layer [1, D].
    SharedGate {
        /// l
        layer: usize,
    },
    /// What training made of the tensor.
    Tuned {
        /// of its bytes
        sha256: String,
    },
    /// Zeros.
    Zeros {
        /// how many elements
        elements: usize,
    },
}

impl Part {
    /// The sources that its bytes are made of.
    pub(crate) fn sources(&self) -> Vec<usize> {
        match self {
            Self::Tensor { source, fold, .. } => {
                let shared = fold.iter().flat_map(|fold| fold.shared.iter().map(|(source, _)| *source));
                std::iter::once(*source).chain(shared).collect()
            }
            Self::Mean { of } => of.iter().map(|(source, _)| *source).collect(),
            Self::Gate { .. } | Self::SharedGate { .. } | Self::Zeros { .. } | Self::Fitted { .. } | Self::Tuned { .. } => Vec::new(),
        }
    }

    /// Whether some elements of it can be had without computing all of them: not where an adapter is merged, or a GGUF file decoded.
    pub(crate) fn divisible(&self, sources: &Sources) -> bool {
        let stored = |source: &usize, name: &String| sources.all[*source].extents.contains_key(name);
        match self {
            Self::Tensor { source, tensor, .. } => stored(source, tensor),
            Self::Mean { of } => of.iter().all(|(source, name)| stored(source, name)),
            Self::Gate { .. } | Self::SharedGate { .. } | Self::Zeros { .. } | Self::Fitted { .. } | Self::Tuned { .. } => true,
        }
    }

    /// Gives its sources other numbers; whether all of them have one.
    pub(crate) fn renumber(&mut self, numbers: &BTreeMap<usize, usize>) -> bool {
        let renumber = |source: &mut usize| numbers.get(source).map(|number| *source = *number).is_some();
        match self {
            Self::Tensor { source, fold, .. } => {
                renumber(source) && fold.iter_mut().all(|fold| fold.shared.iter_mut().all(|(source, _)| renumber(source)))
            }
            Self::Mean { of } => of.iter_mut().all(|(source, _)| renumber(source)),
            Self::Gate { .. } | Self::SharedGate { .. } | Self::Zeros { .. } | Self::Fitted { .. } | Self::Tuned { .. } => true,
        }
    }
}

/// A norm's weight that a source's tensor expects in front of it, and the one that it gets: column j is multiplied by own\[j\] / shared\[j\], so
/// that behind the shared norm the tensor does what it did behind its own.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Fold {
    /// name in the tensor's source
    pub own: String,
    /// the composite's is the mean of these: source and name
    pub shared: Vec<(usize, String)>,
}

impl Plan {
    /// The family of the composite.
    pub fn family(&self) -> &'static Family {
        self.target.family
    }

    /// K
    pub fn top_k(&self) -> usize {
        self.config.moe.as_ref().map_or(1, |moe| moe.top_k)
    }

    /// The gate of a layer's router, whichever layout it is written in.
    pub fn router(&self, layer: usize) -> Option<&PlannedTensor> {
        let classic = self.family().name(Role::Layer(layer, LayerRole::Router));
        let fused = self.family().fused_names(layer).map(|[router, ..]| router);
        self.tensors.iter().find(|tensor| [&classic, &fused].into_iter().flatten().any(|name| *name == tensor.name))
    }

    /// Bytes of all tensors.
    pub fn bytes(&self) -> u64 {
        self.tensors.iter().map(|tensor| tensor.info.bytes() as u64).sum()
    }

    /// Number of parameters: in all, and of those one token uses.
    pub fn parameters(&self) -> (u64, u64) {
        let all = self.tensors.iter().map(|tensor| tensor.info.elements() as u64).sum::<u64>();
        let idle = self.config.moe.as_ref().map_or(0, |moe| {
            let expert = (3 * self.config.hidden * moe.ffn) as u64;
            expert * (moe.experts - moe.top_k.min(moe.experts)) as u64 * moe.sparse.iter().filter(|s| **s).count() as u64
        });
        (all, all - idle)
    }
}

/// Why there is no plan.
#[derive(Debug, thiserror::Error)]
pub enum PlanError {
    /// No output family can hold these experts.
    #[error("no output family fits: {reasons}")]
    NoTarget {
        /// each family with its reason
        reasons: String,
    },
    /// `architecture` names none.
    #[error("`architecture: {given}` is none of {known}")]
    UnknownTarget {
        /// what stands in the recipe
        given: String,
        /// the names
        known: String,
    },
    /// Models that do not fit together.
    #[error("{}", check::list(.0))]
    Problems(Vec<Problem>),
    /// The composite's own config does not read back.
    #[error("the composite's config: {0}")]
    Config(#[from] upcycle_architectures::ConfigError),
}

/// One reason why models do not fit together.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Problem {
    /// Name for `--allow`, if it can be waived.
    pub lint: Option<&'static str>,
    /// What, where, and the values.
    pub message: String,
}

/// Every lint of the plan, for `--allow` and its help: name and what it is about.
pub const LINTS: &[(&str, &str)] = check::LINTS;

/// Plans the composite. `allow` names the lints that are waived (they become warnings).
pub fn plan(recipe: &Recipe, sources: &Sources, allow: &[String]) -> Result<Plan, PlanError> {
    let base = sources.base();
    let mut warnings = Vec::new();
    let problems = check::problems(recipe, sources, &mut warnings);
    check::waive(problems, allow, &mut warnings)?;
    let target = choose(recipe, sources)?;

    let dtype = recipe.dtype.or(base.config.dtype).unwrap_or(Dtype::Bf16);
    let experts: Vec<usize> = recipe.experts.iter().map(|expert| sources.index(&expert.source_model)).collect();
    let shared_expert = recipe.shared_experts.first();
    let tied = match recipe.shared {
        Shared::Auto | Shared::Base => base.config.tied,
        // The head is fitted to other states than the embedding.
        Shared::Fit => false,
        Shared::Average => experts.iter().all(|&e| sources.all[e].config.tied),
    };
    let request = Request {
        experts: experts.len(),
        top_k: recipe.experts_per_token,
        shared_ffn: shared_expert.map(|expert| sources.get(&expert.source_model).config.ffn),
        dtype,
        tied,
    };
    let mut config_json = target.config_json(&base.config_json, &base.config, request);
    let eos = eos_ids(sources);
    if let Some(object) = config_json.as_object_mut() {
        match eos.as_slice() {
            [] => {}
            [one] => drop(object.insert("eos_token_id".into(), (*one).into())),
            many => drop(object.insert("eos_token_id".into(), many.into())),
        }
    }
    let mut config = (target.family.read)(&config_json)?;
    if let (Some(Runtime::Subspace), Some(moe)) = (recipe.gate_mode.runtime(), &mut config.moe) {
        moe.directions = Some(subspace::DIRECTIONS);
    }
    let gated_shared_expert = recipe.gated().count() > recipe.experts.len();
    // What is noisy or scaled on purpose is not mended.
    let plain = recipe.experts.iter().all(|expert| expert.noise_scale.is_none() && expert.residual_scale.is_none());
    let repaired = recipe.fitted() && recipe.repair.unwrap_or(true) && plain;
    let planner = Planner { recipe, sources, experts: &experts, target, gated_shared_expert, repaired };
    let tensors = match recipe.layout {
        Layout::Classic => planner.classic(&config, dtype),
        Layout::Fused => planner.fused(&config, dtype),
    };
    let missing = check::missing(sources, &tensors);
    if !missing.is_empty() {
        return Err(PlanError::Problems(missing));
    }
    Ok(Plan {
        target,
        config,
        config_json,
        dtype,
        tensors,
        gated_shared_expert,
        repaired,
        seed: recipe.seed.unwrap_or(DEFAULT_SEED),
        warnings,
    })
}

/// Every id that ends a text in the base or an expert, the base's first.
fn eos_ids(sources: &Sources) -> Vec<u32> {
    let mut ids: Vec<u32> = Vec::new();
    for id in sources.all.iter().flat_map(source::eos_ids) {
        if !ids.contains(&id) {
            ids.push(id);
        }
    }
    ids
}

fn choose(recipe: &Recipe, sources: &Sources) -> Result<&'static Target, PlanError> {
    let wanted = recipe.architecture.as_deref().map(str::to_ascii_lowercase);
    let named = |target: &&Target| {
        wanted.as_deref().is_none_or(|w| target.name.to_ascii_lowercase().starts_with(w) || target.family.model_type == w)
    };
    let candidates: Vec<&'static Target> = TARGETS.iter().filter(named).collect();
    if candidates.is_empty() {
        let known = TARGETS.iter().map(|target| format!("`{}`", target.name)).collect::<Vec<_>>().join(", ");
        return Err(PlanError::UnknownTarget { given: recipe.architecture.clone().unwrap_or_default(), known });
    }
    let mut reasons = Vec::new();
    let experts = recipe.experts.iter().chain(&recipe.shared_experts).map(|expert| &expert.source_model);
    let models: Vec<&Source> = std::iter::once(&recipe.base_model).chain(experts).map(|model| sources.get(model)).collect();
    for target in candidates {
        let shared = !recipe.shared_experts.is_empty();
        match models.iter().find_map(|source| Some((source, target.refuses(&source.config, shared)?))) {
            None => return Ok(target),
            Some((source, reason)) => reasons.push(format!("{} cannot hold `{}`: {reason}", target.name, source.reference)),
        }
    }
    Err(PlanError::NoTarget { reasons: reasons.join("; ") })
}

struct Planner<'a> {
    recipe: &'a Recipe,
    sources: &'a Sources,
    experts: &'a [usize],
    target: &'static Target,
    gated_shared_expert: bool,
    repaired: bool,
}

impl Planner<'_> {
    fn classic(&self, config: &Config, dtype: Dtype) -> Vec<PlannedTensor> {
        let family = self.target.family;
        let tensors = family.tensors(config).into_iter();
        tensors
            .filter_map(|(role, shape)| {
                let info = TensorInfo { dtype, shape };
                Some(PlannedTensor { name: family.name(role)?, parts: vec![self.part(role, &info)], info })
            })
            .collect()
    }

    /// The same tensors with each layer's experts stacked: [E, 2F, D] (gate rows, then up rows, expert by expert) and [E, D, F].
    fn fused(&self, config: &Config, dtype: Dtype) -> Vec<PlannedTensor> {
        let family = self.target.family;
        let (d, e) = (config.hidden, self.experts.len());
        let ffn = config.moe.as_ref().map_or(config.ffn, |moe| moe.ffn);
        let mut out = Vec::new();
        for (role, shape) in family.tensors(config) {
            let info = TensorInfo { dtype, shape };
            match role {
                Role::Layer(l, LayerRole::Router) => {
                    let Some([router, gate_up, down]) = family.fused_names(l) else { continue };
                    let parts = vec![self.part(role, &info)];
                    out.push(PlannedTensor { name: router, info, parts });
                    let stack = |projections: &[Projection], shape: Vec<usize>, name: String| PlannedTensor {
                        name,
                        parts: (0..e)
                            .flat_map(|e| projections.iter().map(move |&p| Role::Layer(l, LayerRole::Expert(e, p))))
                            .map(|role| self.part(role, &TensorInfo { dtype, shape: Vec::new() }))
                            .collect(),
                        info: TensorInfo { dtype, shape },
                    };
                    out.push(stack(&[Projection::Gate, Projection::Up], vec![e, 2 * ffn, d], gate_up));
                    out.push(stack(&[Projection::Down], vec![e, d, ffn], down));
                }
                Role::Layer(_, LayerRole::Expert(..)) => {}
                _ => {
                    let Some(name) = family.name(role) else { continue };
                    let parts = vec![self.part(role, &info)];
                    out.push(PlannedTensor { name, info, parts });
                }
            }
        }
        out
    }

    fn part(&self, role: Role, info: &TensorInfo) -> Part {
        let zeros = Part::Zeros { elements: info.elements() };
        match role {
            Role::Layer(layer, LayerRole::Router) => Part::Gate { layer },
            Role::Layer(layer, LayerRole::SharedGate) if self.gated_shared_expert => Part::SharedGate { layer },
            Role::Layer(_, LayerRole::SharedGate) => zeros,
            Role::Layer(_, LayerRole::Expert(_, Projection::Down)) if self.repaired => self.fitted(role).unwrap_or(zeros),
            Role::Layer(layer, LayerRole::Expert(e, p)) => self.mlp(&self.recipe.experts[e], layer, p),
            Role::Layer(layer, LayerRole::SharedExpert(p)) => {
                self.recipe.shared_experts.first().map_or(zeros, |expert| self.mlp(expert, layer, p))
            }
            role => self.shared(role).unwrap_or(zeros),
        }
    }

    fn mlp(&self, expert: &Expert, layer: usize, projection: Projection) -> Part {
        let source = self.sources.index(&expert.source_model);
        let scale = expert.residual_scale.filter(|_| projection == Projection::Down);
        let role = Role::Layer(layer, LayerRole::Mlp(projection));
        let family = self.sources.all[source].family;
        let fold = (self.recipe.shared == Shared::Fit && projection != Projection::Down).then(|| {
            let norm = Role::Layer(layer, LayerRole::PostNorm);
            let shared = self.experts.iter().map(|&e| (e, self.sources.all[e].family.name(norm).unwrap_or_default()));
            Fold { own: family.name(norm).unwrap_or_default(), shared: shared.collect() }
        });
        Part::Tensor { source, tensor: family.name(role).unwrap_or_default(), noise: expert.noise_scale, scale, fold }
    }

    fn fitted(&self, role: Role) -> Option<Part> {
        Some(Part::Fitted { tensor: self.target.family.name(role)? })
    }

    /// A tensor outside the experts; `None` where the dense model has none (a bias that the target adds).
    fn shared(&self, role: Role) -> Option<Part> {
        let name_in = |source: usize| {
            let source = &self.sources.all[source];
            // A tied model's head is its embedding.
            let role = if role == Role::Head && source.config.tied { Role::Embedding } else { role };
            let present = source.family.tensors(&source.config).iter().any(|(r, _)| *r == role);
            present.then(|| source.family.name(role))?
        };
        let matrix = matches!(
            role,
            Role::Embedding
                | Role::Head
                | Role::Layer(_, LayerRole::Attention(AttentionPart::Q | AttentionPart::K | AttentionPart::V | AttentionPart::O))
        );
        match self.recipe.shared {
            Shared::Auto | Shared::Base => Some(Part::Tensor { source: 0, tensor: name_in(0)?, noise: None, scale: None, fold: None }),
            Shared::Fit if matrix => self.fitted(role),
            Shared::Average | Shared::Fit => {
                let of: Option<Vec<_>> = self.experts.iter().map(|&e| Some((e, name_in(e)?))).collect();
                Some(Part::Mean { of: of? })
            }
        }
    }
}

/// A plan with its sources and gates: a set of weights.
pub fn composite(plan: Plan, sources: Sources, gates: Gates, fitted: Option<Arc<dyn Weights>>) -> Composite {
    Composite::new(Arc::new(plan), Arc::new(sources), gates, fitted)
}

/// A composite that lies on disk, as a plan of copies; what lies there in blocks is decoded. `None` for a dense model.
pub fn opened(source: Source) -> Option<Composite> {
    let target = TARGETS.iter().find(|target| target.family.model_type == source.family.model_type)?;
    let place: BTreeMap<String, usize> = source
        .family
        .tensors(&source.config)
        .iter()
        .zip(0..)
        .filter_map(|((role, _), at)| Some((source.family.name(*role)?, at)))
        .collect();
    let mut names = source.weights.names();
    // In the order of use; what stacks experts or is nobody's behind it.
    names.sort_by_cached_key(|name| (place.get(name).copied().unwrap_or(usize::MAX), name.clone()));
    let tensors: Vec<PlannedTensor> = names
        .into_iter()
        .filter_map(|name| {
            let mut info = source.weights.info(&name)?;
            info.dtype = info.dtype.decoded();
            let part = Part::Tensor { source: 0, tensor: name.clone(), noise: None, scale: None, fold: None };
            Some(PlannedTensor { name, info, parts: vec![part] })
        })
        .collect();
    let plan = Plan {
        target,
        config: source.config.clone(),
        config_json: source.config_json.clone(),
        dtype: source.config.dtype.or_else(|| tensors.first().map(|tensor| tensor.info.dtype)).unwrap_or(Dtype::Bf16),
        tensors,
        gated_shared_expert: false,
        repaired: false,
        seed: DEFAULT_SEED,
        warnings: Vec::new(),
    };
    let by_reference = BTreeMap::from([(source.reference.clone(), 0)]);
    Some(composite(plan, Sources { all: vec![source], by_reference }, Gates::default(), None))
}

/// A composite on disk as the plan that it was written by, as far as it is known: these tensors of these sources. `None` for a dense model.
pub(crate) fn recorded(written: Source, tensors: Vec<PlannedTensor>, sources: Sources, seed: u64) -> Option<Composite> {
    let opened = opened(written)?;
    let plan = Plan { tensors, seed, ..(*opened.plan).clone() };
    Some(composite(plan, sources, Gates::default(), None))
}

/// The gates of a composite.
#[derive(Debug, Clone, Default)]
pub struct Gates {
    /// [L] of [E, D]
    pub routed: Vec<Gate>,
    /// [L] of [1, D]; empty if the shared expert has no gate of its own
    pub shared: Vec<Gate>,
}
