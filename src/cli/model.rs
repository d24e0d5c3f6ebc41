//! Opening what a command calls MODEL: a recipe, a directory, a GGUF file, or a name on the Hub.

use std::{collections::BTreeMap, path::Path, sync::Arc};

use anyhow::Context as _;
use candle_core::{DType, Device};
use clap::builder::{PossibleValue, PossibleValuesParser, TypedValueParser};
use upcycle::{
    calibrate,
    engine::device::{self, DeviceChoice, DtypeChoice},
    plan::{Composite, Sequence, Sources},
    quantize::{Mix, Quantised, Scheme},
    recipe::Recipe,
    source::{self, Sidecar},
};
use upcycle_architectures::{
    Config, Family, Weights,
    decoder::{Decoder, Ensemble, KvType, LanguageModel},
};
use upcycle_routers::init::Runtime;

use super::{composite, recipe, ui};

/// Where and how to compute.
#[derive(Debug, Clone, clap::Args)]
pub(crate) struct DeviceArgs {
    /// auto, cpu, cuda, cuda:N or metal
    #[arg(long, default_value = "auto", value_name = "DEVICE")]
    pub(crate) device: DeviceChoice,
    /// Type to compute in: auto, f32, f16 or bf16
    #[arg(long = "compute-dtype", default_value = "auto", value_name = "TYPE")]
    pub(crate) dtype: DtypeChoice,
    /// Threads; all cores if not given
    #[arg(long, short = 'j', alias = "num-threads", value_name = "N")]
    pub(crate) threads: Option<usize>,
}

impl DeviceArgs {
    /// Sets the size of the thread pool. Call before anything runs in parallel.
    pub(crate) fn set_threads(&self) -> anyhow::Result<()> {
        if let Some(threads) = self.threads {
            rayon::ThreadPoolBuilder::new().num_threads(threads).build_global()?;
        }
        Ok(())
    }

    /// The device, with a warning where it is not the one hoped for.
    pub(crate) fn open(&self) -> anyhow::Result<Device> {
        let (device, passed_over) = device::open(self.device)?;
        passed_over.iter().for_each(|reason| tracing::debug!("{reason}"));
        Ok(device)
    }

    /// The type to compute a model of this config in.
    pub(crate) fn dtype(&self, precision: Precision, device: &Device, config: &Config) -> DType {
        match precision {
            Precision::Full => device::dtype(self.dtype, device, config),
            Precision::Fast => device::serving_dtype(self.dtype, device, config),
        }
    }
}

/// What counts, where `--dtype` does not say.
#[derive(Clone, Copy)]
pub(crate) enum Precision {
    /// every digit: to measure a model
    Full,
    /// speed: to generate text
    Fast,
}

/// In which types to hold the weights.
#[derive(Debug, Clone, clap::Args)]
pub(crate) struct QuantizeArgs {
    /// Hold the weights in blocks of a few bits, encoded as they are read; what is in blocks already stays
    #[arg(long, value_name = "TYPE", value_parser = mixes())]
    pub(crate) quantize: Option<Mix>,
}

/// The names of mixes; `q4_k` and `q5_k` are their medium ones, as in llama.cpp.
pub(crate) fn mixes() -> impl TypedValueParser<Value = Mix> {
    let value = |(name, _): (&'static str, Mix)| match name.strip_suffix("_m") {
        Some(short) => PossibleValue::new(name).alias(short),
        None => PossibleValue::new(name),
    };
    PossibleValuesParser::new(Mix::ALL.map(value)).try_map(|name| name.parse::<Mix>())
}

impl QuantizeArgs {
    /// The model with its weights in those types.
    pub(crate) fn apply(&self, mut loaded: Loaded) -> Loaded {
        let Some(mix) = self.quantize else { return loaded };
        let scheme = Scheme { mix, experts_only: false };
        loaded.weights = Arc::new(Quantised::new(loaded.weights, loaded.family, &loaded.config, scheme));
        for expert in &mut loaded.experts {
            expert.weights = Arc::new(Quantised::new(expert.weights.clone(), expert.family, &expert.config, scheme));
        }
        loaded
    }
}

/// How keys and values are kept.
#[derive(Debug, Clone, clap::Args)]
pub(crate) struct KvArgs {
    /// Type that keys and values are kept in on the CPU; f16 to generate text, f32 to measure a model if not given
    #[arg(long, value_enum, value_name = "TYPE")]
    kv_type: Option<KvName>,
}

/// Names of their types.
#[derive(Debug, Clone, Copy, clap::ValueEnum)]
enum KvName {
    F32,
    F16,
    #[value(name = "q8_0")]
    Q8_0,
}

impl KvArgs {
    fn kv_type(&self, precision: Precision) -> KvType {
        match (self.kv_type, precision) {
            (Some(KvName::F32), _) | (None, Precision::Full) => KvType::F32,
            (Some(KvName::F16), _) | (None, Precision::Fast) => KvType::F16,
            (Some(KvName::Q8_0), _) => KvType::Q8_0,
        }
    }

    /// The decoder, keeping them so.
    pub(crate) fn decoder(&self, decoder: Decoder, precision: Precision) -> anyhow::Result<Decoder> {
        Ok(decoder.with_kv_type(self.kv_type(precision))?)
    }

    /// The ensemble, keeping them so.
    pub(crate) fn ensemble(&self, ensemble: Ensemble, precision: Precision) -> anyhow::Result<Ensemble> {
        Ok(ensemble.with_kv_type(self.kv_type(precision))?)
    }
}

/// Where weights are before the first token.
#[derive(Debug, Clone, clap::Args)]
pub(crate) struct MemoryArgs {
    /// Read all weights before anything else, so that no token waits for the disk
    #[arg(long)]
    preload: bool,
    /// The same, and keep them in memory whatever else wants it (Linux)
    #[arg(long)]
    mlock: bool,
}

impl MemoryArgs {
    /// Does so.
    pub(crate) fn settle(&self, model: &impl LanguageModel) -> anyhow::Result<()> {
        if self.preload || self.mlock {
            model.preload();
        }
        if self.mlock {
            source::lock().context("cannot lock the weights in memory (`ulimit -l` is how much may be locked)")?;
        }
        Ok(())
    }
}

/// An opened model.
pub(crate) struct Loaded {
    pub(crate) name: String,
    pub(crate) family: &'static Family,
    pub(crate) config: Config,
    pub(crate) weights: Arc<dyn Weights>,
    pub(crate) sidecars: BTreeMap<String, Sidecar>,
    /// what its experts are called
    pub(crate) names: Vec<String>,
    /// whole models, of which each sequence is answered by one; none where the weights are one model's
    pub(crate) experts: Vec<Whole>,
}

/// An expert that answers whole sequences.
pub(crate) struct Whole {
    pub(crate) family: &'static Family,
    pub(crate) config: Config,
    pub(crate) weights: Arc<dyn Weights>,
}

impl Loaded {
    /// The expert that answered, if one did so as a whole.
    pub(crate) fn expert(&self, index: Option<usize>) -> Option<&str> {
        self.names.get(index?).map(String::as_str)
    }
}

/// Whether what the user calls a model is a recipe.
pub(crate) fn is_recipe(model: &str) -> bool {
    let path = Path::new(model);
    path.is_file() && path.extension().is_some_and(|end| end == "yml" || end == "yaml")
}

/// What a model is called, unless the user has another name for it.
pub(crate) fn name(model: &str) -> String {
    let path = Path::new(model);
    if is_recipe(model) {
        return title(path);
    }
    path.file_name().map_or_else(|| model.to_owned(), |name| name.to_string_lossy().into_owned())
}

/// Opens a model; a recipe is composed in memory.
pub(crate) fn open(model: &str, options: &recipe::Options, device: &DeviceArgs) -> anyhow::Result<Loaded> {
    let path = Path::new(model);
    if is_recipe(model) {
        let mut recipe = recipe::read(path, options)?;
        if recipe.gate_mode.runtime() == Some(Runtime::Sequence) {
            let (sources, plan) = recipe::sequence(&recipe, options)?;
            return Ok(sequence(path, &recipe, &sources, plan));
        }
        let composite = recipe::composite(&mut recipe, options, device)?;
        return Ok(composed(path, &recipe, composite));
    }
    let source = source::open(&model.parse()?, &ui::open_options(None))?;
    Ok(Loaded {
        name: name(model),
        names: composite::names(&source),
        family: source.family,
        config: source.config,
        weights: source.weights,
        sidecars: source.sidecars,
        experts: Vec::new(),
    })
}

/// The composite of the recipe at `path` as a model.
pub(crate) fn composed(path: &Path, recipe: &Recipe, composite: Composite) -> Loaded {
    let sidecars = composite.sources.base().sidecars.clone();
    let name = title(path);
    let (family, config) = (composite.plan.family(), composite.plan.config.clone());
    Loaded { name, family, config, weights: Arc::new(composite), sidecars, names: expert_names(recipe), experts: Vec::new() }
}

/// The experts of the recipe at `path` as a model that each sequence chooses from.
pub(crate) fn sequence(path: &Path, recipe: &Recipe, sources: &Sources, plan: Sequence) -> Loaded {
    let base = sources.base();
    let experts = sources.experts(recipe).into_iter().map(|source| Whole {
        family: source.family,
        config: source.config.clone(),
        weights: source.weights.clone(),
    });
    Loaded {
        name: title(path),
        family: base.family,
        config: plan.config,
        weights: base.weights.clone(),
        sidecars: base.sidecars.clone(),
        names: expert_names(recipe),
        experts: experts.collect(),
    }
}

fn expert_names(recipe: &Recipe) -> Vec<String> {
    calibrate::names(&recipe.experts.iter().collect::<Vec<_>>())
}

fn title(recipe: &Path) -> String {
    recipe.file_stem().map(|stem| stem.to_string_lossy().into_owned()).unwrap_or_default()
}

/// The decoder of an opened model.
pub(crate) fn load_decoder(loaded: &Loaded, args: &DeviceArgs, precision: Precision) -> anyhow::Result<Decoder> {
    let device = args.open()?;
    let dtype = args.dtype(precision, &device, &loaded.config);
    Ok(Decoder::load(loaded.family, &loaded.config, &*loaded.weights, dtype, &device)?)
}

/// The decoders of an opened model's whole experts.
pub(crate) fn load_ensemble(loaded: &Loaded, args: &DeviceArgs, precision: Precision) -> anyhow::Result<Ensemble> {
    let device = args.open()?;
    let decoder = |(expert, name): (&Whole, &String)| {
        let dtype = args.dtype(precision, &device, &expert.config);
        Decoder::load(expert.family, &expert.config, &*expert.weights, dtype, &device).with_context(|| name.clone())
    };
    Ok(Ensemble::new(loaded.experts.iter().zip(&loaded.names).map(decoder).collect::<anyhow::Result<_>>()?)?)
}
