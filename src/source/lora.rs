//! PEFT LoRA adapters, merged on the fly: W + s B A is computed when a tensor is read, in f32, and rounded once to the base's type.
//!
//! What an adapter changes is settled from headers when it is opened, and every one of its tensors must find its place. What the adapter
//! does not touch passes through without a copy. Names: r rank, s scale, W `[out, in]`, A `[r, in]`, B `[out, r]`, m `[out]`.

use std::{
    collections::{BTreeMap, HashMap},
    path::{Path, PathBuf},
    sync::Arc,
};

use rayon::prelude::*;
use regex::Regex;
use serde::Deserialize;
use serde_json::{Map, Value};
use upcycle_architectures::{Role, TensorInfo, View, Weights, WeightsError};

use super::{Sidecar, Source, SourceError, place, read_json, safetensors::Checkpoint};
use crate::recipe::ModelRef;

/// An adapter's directory, with its config read.
pub(super) struct Adapter {
    directory: PathBuf,
    config: AdapterConfig,
}

/// What of `adapter_config.json` bears on the merged weights. `fan_in_fan_out` does not: PEFT ignores it for every layer that our families
/// have (`nn.Linear`).
#[derive(Deserialize)]
struct AdapterConfig {
    peft_type: String,
    #[serde(default)]
    base_model_name_or_path: Option<String>,
    #[serde(default)]
    revision: Option<String>,
    #[serde(default = "default_rank")]
    r: usize,
    #[serde(default = "default_alpha")]
    lora_alpha: f64,
    #[serde(default)]
    rank_pattern: Option<Map<String, Value>>,
    #[serde(default)]
    alpha_pattern: Option<Map<String, Value>>,
    #[serde(default)]
    use_rslora: bool,
    #[serde(default)]
    layer_replication: Value,
    #[serde(default)]
    alora_invocation_tokens: Value,
    #[serde(default)]
    init_lora_weights: Value,
}

/// PEFT's defaults.
const fn default_rank() -> usize {
    8
}
const fn default_alpha() -> f64 {
    8.0
}

impl Adapter {
    /// Reads the config of the adapter in a directory.
    pub(super) fn open(directory: &Path) -> Result<Self, SourceError> {
        let file = directory.join(place::ADAPTER_CONFIG);
        let config: AdapterConfig = serde_json::from_value(read_json(&file)?)
            .map_err(|error| SourceError::Adapter { file: file.clone(), reason: error.to_string() })?;
        let adapter = Self { directory: directory.to_owned(), config };
        adapter.check().map_err(|reason| SourceError::Adapter { file, reason })?;
        Ok(adapter)
    }

    /// Refuses what cannot be merged into a base.
    fn check(&self) -> Result<(), String> {
        let config = &self.config;
        if config.peft_type != "LORA" {
            return Err(format!("`peft_type` is {}, only LORA adapters are merged; merge it with PEFT first", config.peft_type));
        }
        if !config.layer_replication.is_null() {
            return Err("`layer_replication` makes a model with other layers; merge it with PEFT first".into());
        }
        if !config.alora_invocation_tokens.is_null() {
            return Err("it is an activated LoRA (`alora_invocation_tokens`): it acts on some tokens only and cannot be merged".into());
        }
        // These start from a base whose weights they have changed: what is stored is relative to that, not to the base on disk.
        if let Some(init) = config.init_lora_weights.as_str()
            && ["pissa", "olora", "corda", "loftq"].iter().any(|changed| init.to_ascii_lowercase().starts_with(changed))
        {
            return Err(format!(
                "`init_lora_weights` is {init}, which changed the base it was trained on; save it with \
                 `path_initial_model_for_weight_conversion`, or merge it with PEFT first"
            ));
        }
        Ok(())
    }

    /// The base that the adapter names.
    pub(super) fn base(&self) -> Option<ModelRef> {
        let path = self.config.base_model_name_or_path.clone().filter(|path| !path.is_empty())?;
        Some(ModelRef { path, revision: self.config.revision.clone(), lora: None })
    }

    /// The base with this adapter merged into it.
    pub(super) fn merge(self, base: Source) -> Result<Source, SourceError> {
        let file = self.directory.join(place::ADAPTER_WEIGHTS);
        let weights = Checkpoint::open(&file)?;
        let tied_head = base.family.name(Role::Head).filter(|_| base.config.tied);
        let mut modules: BTreeMap<String, Parts> = BTreeMap::new();
        for name in weights.names() {
            let error = |reason: String| SourceError::AdapterTensor { file: file.clone(), tensor: name.clone(), reason };
            let (module, part) = parse(&name).ok_or_else(|| error("its name is none that PEFT gives to a LoRA".into()))?;
            let view = weights.read(&name).map_err(|source| error(source.to_string()))?;
            if modules.entry(module).or_default().insert(part, (name.clone(), view)).is_some() {
                return Err(error("the adapter has this part of the module twice".into()));
            }
        }
        let mut changes: HashMap<String, (String, Vec<Change>)> = HashMap::new();
        for (module, parts) in modules {
            for (target, change, name) in self.changes(&module, parts, &file)? {
                let error = |reason: String| SourceError::AdapterTensor { file: file.clone(), tensor: name.clone(), reason };
                // A head that the base ties to its embedding starts as the embedding.
                let of = match (base.weights.info(&target), &tied_head) {
                    (None, Some(head)) if *head == target => base.family.name(Role::Embedding).unwrap_or_default(),
                    _ => target.clone(),
                };
                let info =
                    base.weights.info(&of).ok_or_else(|| error(format!("the base has no tensor `{target}`; is it for another model?")))?;
                change
                    .check(&info.shape)
                    .map_err(|reason| error(format!("{reason} (base tensor `{target}` {:?}); is it for another base?", info.shape)))?;
                changes.entry(target).or_insert_with(|| (of, Vec::new())).1.push(change);
            }
        }
        let untied = tied_head.is_some_and(|head| changes.contains_key(&head));
        let mut source = base;
        if untied {
            source.config.tied = false;
            source.config_json["tie_word_embeddings"] = Value::Bool(false);
        }
        source.extents.retain(|name, _| !changes.contains_key(name));
        source.files.extend(weights.files());
        source.weights = Arc::new(Merged { base: source.weights, changes });
        source.location.clone_from(&self.directory);
        self.overlay_sidecars(&mut source)?;
        Ok(source)
    }

    /// The changes that one module's parts make, in their order: target, change, and the adapter's tensor to name in an error.
    fn changes(&self, module: &str, mut parts: Parts, file: &Path) -> Result<Vec<(String, Change, String)>, SourceError> {
        let mut changes = Vec::new();
        for (part, suffix) in [(Part::Weight, "weight"), (Part::Bias, "bias")] {
            if let Some((name, view)) = parts.remove(&part) {
                changes.push((format!("{module}.{suffix}"), Change::Replace(view), name));
            }
        }
        let incomplete = |name: &str, other: &str| SourceError::AdapterTensor {
            file: file.to_owned(),
            tensor: name.to_owned(),
            reason: format!("its counterpart `{other}` is missing"),
        };
        for (a, b, names, embedding) in [
            (Part::A, Part::B, ["lora_A", "lora_B"], false),
            (Part::EmbeddingA, Part::EmbeddingB, ["lora_embedding_A", "lora_embedding_B"], true),
        ] {
            let ((name, a), b) = match (parts.remove(&a), parts.remove(&b)) {
                (Some(a), Some((_, b))) => (a, b),
                (Some((name, _)), None) => return Err(incomplete(&name, names[1])),
                (None, Some((name, _))) => return Err(incomplete(&name, names[0])),
                (None, None) => continue,
            };
            let error = |reason: String| SourceError::AdapterTensor { file: file.to_owned(), tensor: name.clone(), reason };
            let (rank, scale) = self.scale(module).map_err(error)?;
            let bias = parts.remove(&Part::LoraBias);
            if let Some((name, bias)) = bias {
                changes.push((format!("{module}.bias"), Change::Add { delta: bias, scale }, name));
            }
            let magnitude = parts.remove(&Part::Magnitude).map(|(_, view)| view);
            if embedding && magnitude.is_some() {
                return Err(error("DoRA on an embedding is not supported; merge it with PEFT first".into()));
            }
            // An embedding's A is [r, V] and B [D, r], while W is [V, D]: the factors change sides.
            let change = LowRank { a, b, rank, scale, transposed: embedding, magnitude };
            changes.push((format!("{module}.weight"), Change::LowRank(change), name));
        }
        match parts.into_values().next() {
            Some((name, _)) => Err(incomplete(&name, "lora_A")),
            None => Ok(changes),
        }
    }

    /// Rank and scale of a module: the first pattern that fits it, as PEFT picks it (`get_pattern_key`).
    fn scale(&self, module: &str) -> Result<(usize, f32), String> {
        let config = &self.config;
        let rank = match find_pattern(config.rank_pattern.as_ref(), "rank_pattern", module)? {
            Some(value) => {
                value.as_u64().and_then(|r| usize::try_from(r).ok()).ok_or_else(|| format!("`rank_pattern` has {value} as a rank"))?
            }
            None => config.r,
        };
        let alpha = match find_pattern(config.alpha_pattern.as_ref(), "alpha_pattern", module)? {
            Some(value) => value.as_f64().ok_or_else(|| format!("`alpha_pattern` has {value} as an alpha"))?,
            None => config.lora_alpha,
        };
        if rank == 0 {
            return Err("its rank is 0 in adapter_config.json".into());
        }
        let divisor = if config.use_rslora { (rank as f64).sqrt() } else { rank as f64 };
        Ok((rank, (alpha / divisor) as f32))
    }

    /// An adapter that brings a tokenizer was trained with it: its tokenizer files then stand for all of the base's.
    fn overlay_sidecars(&self, source: &mut Source) -> Result<(), SourceError> {
        let names = place::list(&self.directory)?;
        let own: Vec<&String> = place::sidecar_names(&names).filter(|name| !name.starts_with("LICENSE")).collect();
        if own.iter().any(|name| name.starts_with("tokenizer")) {
            source.sidecars.retain(|name, _| name == "generation_config.json" || name.starts_with("LICENSE"));
            source.sidecars.extend(own.into_iter().map(|name| (name.clone(), Sidecar::File(self.directory.join(name)))));
        }
        Ok(())
    }
}

/// What a tensor of an adapter is to its module.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Part {
    A,
    B,
    EmbeddingA,
    EmbeddingB,
    LoraBias,
    Magnitude,
    /// Saved whole (`modules_to_save`).
    Weight,
    /// Trained whole (`bias`), or saved whole.
    Bias,
}

/// A module's tensors with their names in the adapter.
type Parts = BTreeMap<Part, (String, View)>;

/// Endings that PEFT writes, after the adapter's name and `modules_to_save` are taken out.
const ENDINGS: [(&str, Part); 11] = [
    (".lora_A.weight", Part::A),
    (".lora_B.weight", Part::B),
    (".lora_B.bias", Part::LoraBias),
    (".lora_embedding_A", Part::EmbeddingA),
    (".lora_embedding_B", Part::EmbeddingB),
    (".lora_magnitude_vector.weight", Part::Magnitude),
    (".lora_magnitude_vector", Part::Magnitude),
    // The layer below the LoRA, saved with it (`save_embedding_layers`, `bias`).
    (".base_layer.weight", Part::Weight),
    (".base_layer.bias", Part::Bias),
    (".weight", Part::Weight),
    (".bias", Part::Bias),
];

/// Module and part of an adapter's tensor.
fn parse(name: &str) -> Option<(String, Part)> {
    let name = name.strip_prefix("base_model.model.").unwrap_or(name);
    // `default` is the adapter's name, which old versions of PEFT and some trainers leave in.
    let name = name.replace(".modules_to_save.", ".").replace(".default.", ".");
    let name = name.strip_suffix(".default").unwrap_or(&name);
    let (module, part) = ENDINGS.iter().find_map(|(ending, part)| Some((name.strip_suffix(ending)?, *part)))?;
    (!module.contains("lora_")).then(|| (module.to_owned(), part))
}

/// The value of the first pattern that fits the module: `^(.*\.)?(KEY)$`, as in PEFT.
fn find_pattern<'a>(patterns: Option<&'a Map<String, Value>>, kind: &str, module: &str) -> Result<Option<&'a Value>, String> {
    for (key, value) in patterns.into_iter().flatten() {
        let regex = Regex::new(&format!(r"^(?:.*\.)?(?:{key})$"))
            .map_err(|_| format!("`{kind}` has the key `{key}`, which is no regular expression"))?;
        if regex.is_match(module) {
            return Ok(Some(value));
        }
    }
    Ok(None)
}

/// How an adapter changes one tensor.
enum Change {
    /// W' = V
    Replace(View),
    /// W' = W + s V
    Add { delta: View, scale: f32 },
    /// W' = W + s B A, with `DoRA` (arXiv 2402.09353) rows scaled to length m
    LowRank(LowRank),
}

struct LowRank {
    a: View,
    b: View,
    rank: usize,
    scale: f32,
    transposed: bool,
    magnitude: Option<View>,
}

impl Change {
    /// Whether it fits a tensor of this shape; says what does not.
    fn check(&self, shape: &[usize]) -> Result<(), String> {
        let fits = |name: &str, view: &View, expected: &[usize]| {
            let found = &view.info.shape;
            if found == expected { Ok(()) } else { Err(format!("{name} has shape {found:?}, expected {expected:?}")) }
        };
        match self {
            Self::Replace(view) => fits("it", view, shape),
            Self::Add { delta, .. } => fits("it", delta, shape),
            Self::LowRank(LowRank { a, b, rank, transposed, magnitude, .. }) => {
                let &[rows, columns] = shape else { return Err("LoRA changes matrices only".into()) };
                let (out, inner) = if *transposed { (columns, rows) } else { (rows, columns) };
                fits("its A", a, &[*rank, inner])?;
                fits("its B", b, &[out, *rank])?;
                magnitude.as_ref().map_or(Ok(()), |view| fits("its magnitude", view, &[out]))
            }
        }
    }

    fn apply(&self, w: &View) -> Result<View, WeightsError> {
        let dtype = w.info.dtype.decoded();
        let values = match self {
            Self::Replace(view) => return view.cast(dtype),
            Self::Add { delta, scale } => w.to_f32().into_iter().zip(delta.to_f32()).map(|(w, v)| w + scale * v).collect(),
            Self::LowRank(low_rank) => low_rank.apply(w.to_f32()),
        };
        View::from_f32(&values, dtype, w.info.shape.clone())
    }
}

impl LowRank {
    /// W' from W `[rows, columns]`. Every row is summed over the rank in one order, so the result does not depend on threads.
    fn apply(&self, mut w: Vec<f32>) -> Vec<f32> {
        let (a, b, r) = (self.a.to_f32(), self.b.to_f32(), self.rank);
        // left [rows, r], right [r, columns]
        let (left, right) = if self.transposed { (transpose(&a, r), transpose(&b, b.len() / r)) } else { (b, a) };
        let columns = right.len() / r;
        let magnitude = self.magnitude.as_ref().map(View::to_f32);
        w.par_chunks_mut(columns.max(1)).zip(left.par_chunks(r)).enumerate().for_each_init(
            || vec![0f32; columns],
            |delta, (row, (w, factors))| {
                delta.fill(0.0);
                for (factor, right) in factors.iter().zip(right.chunks_exact(columns.max(1))) {
                    delta.iter_mut().zip(right).for_each(|(d, v)| *d += factor * v);
                }
                w.iter_mut().zip(&*delta).for_each(|(w, d)| *w += self.scale * d);
                if let Some(magnitude) = &magnitude {
                    let norm = w.iter().map(|&w| f64::from(w) * f64::from(w)).sum::<f64>().sqrt();
                    let factor = (f64::from(magnitude[row]) / norm) as f32;
                    for w in w.iter_mut() {
                        *w *= factor;
                    }
                }
            },
        );
        w
    }
}

/// `[rows, columns]` to `[columns, rows]`.
fn transpose(values: &[f32], rows: usize) -> Vec<f32> {
    let columns = values.len() / rows;
    (0..columns).flat_map(|c| (0..rows).map(move |r| values[r * columns + c])).collect()
}

/// The base's tensors with the changes applied on read.
struct Merged {
    base: Arc<dyn Weights>,
    /// target: the base tensor it starts from, and the changes in their order
    changes: HashMap<String, (String, Vec<Change>)>,
}

impl Weights for Merged {
    fn names(&self) -> Vec<String> {
        let mut names = self.base.names();
        names.extend(self.changes.iter().filter(|(target, (of, _))| *target != of).map(|(target, _)| target.clone()));
        names
    }

    fn info(&self, name: &str) -> Option<TensorInfo> {
        match self.changes.get(name) {
            Some((of, _)) => self.base.info(of).map(|info| TensorInfo { dtype: info.dtype.decoded(), ..info }),
            None => self.base.info(name),
        }
    }

    fn read(&self, name: &str) -> Result<View, WeightsError> {
        match self.changes.get(name) {
            Some((of, changes)) => changes.iter().try_fold(self.base.read(of)?, |w, change| change.apply(&w)),
            None => self.base.read(name),
        }
    }
}
