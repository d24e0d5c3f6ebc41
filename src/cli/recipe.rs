//! What every command that takes a recipe does with it: read, open its models, plan, set the gates.

use std::{path::Path, sync::Arc};

use anyhow::bail;
use candle_core::Device;
use clap::builder::{PossibleValue, PossibleValuesParser};
use upcycle::{
    calibrate::{
        self,
        stats::{Routing, Stats},
        text::{Corpus, TextOptions},
    },
    plan::{self, Composite, Gates, Part, Plan, Sources},
    recipe::{self, ModelRef, Recipe},
    source::{self, Source},
};
use upcycle_architectures::decoder::{Decoder, DecoderError};
use upcycle_routers::init::Runtime;

use super::{
    model::{DeviceArgs, Precision},
    stats, ui,
};

/// The check that the writer makes.
pub(crate) const NON_FINITE: &str = "non-finite-weights";

/// Options of every command that takes a recipe.
#[derive(Debug, Clone, Default, clap::Args)]
pub(crate) struct Options {
    /// Waive a check by its name (repeatable)
    #[arg(long, value_name = "NAME", value_parser = lints())]
    pub(crate) allow: Vec<String>,
    /// Seed of everything drawn; overrides the recipe's
    #[arg(long, value_name = "N")]
    pub(crate) random_seed: Option<u64>,
}

/// Reads and checks the recipe; warnings go to stderr.
pub(crate) fn read(path: &Path, options: &Options) -> anyhow::Result<Recipe> {
    let (mut recipe, warnings) = recipe::read(path, &options.allow)?;
    warnings.iter().for_each(ui::doubt);
    recipe.seed = options.random_seed.or(recipe.seed);
    Ok(recipe)
}

/// Every check that can be waived: of recipes, of models, of weights.
fn lints() -> PossibleValuesParser {
    let recipe = recipe::LINTS.iter().map(|lint| (lint.name, lint.about));
    let weights = [(NON_FINITE, "weights that are NaN or infinite are written")];
    let lints = recipe.chain(plan::LINTS.iter().copied()).chain(weights);
    PossibleValuesParser::new(lints.map(|(name, about)| PossibleValue::new(name).help(about)))
}

/// Opens every model of the recipe, headers only. A path that is not there from the working directory is tried from the recipe's.
pub(crate) fn open(recipe: &Recipe) -> anyhow::Result<Sources> {
    let directory = recipe.file.parent().unwrap_or(Path::new("")).to_owned();
    Sources::open(recipe, |reference, base| {
        let place = beside(reference, &directory);
        let source = source::open(&place, &ui::open_options(base.map(|base| beside(&base.reference, &directory))))?;
        Ok(Source { reference: reference.clone(), ..source })
    })
}

/// A path that is not there from the working directory, from another one.
pub(crate) fn beside(reference: &ModelRef, directory: &Path) -> ModelRef {
    let mut place = reference.clone();
    let there = directory.join(&place.path);
    if !Path::new(&place.path).exists() && there.exists() {
        place.path = there.to_string_lossy().into_owned();
    }
    place.lora = place.lora.map(|lora| Box::new(beside(&lora, directory)));
    place
}

/// Decides what the recipe leaves open, and plans; warnings go to stderr.
pub(crate) fn plan(recipe: &mut Recipe, sources: &Sources, options: &Options) -> anyhow::Result<Plan> {
    // What does not fit together at all is said first.
    plan::plan(recipe, sources, &options.allow)?;
    let drift = calibrate::drift(recipe, sources)?;
    recipe.shared = calibrate::settle(recipe, &drift);
    let names = calibrate::names(&recipe.experts.iter().collect::<Vec<_>>());
    if let Some(advice) = calibrate::advice(recipe.shared, &drift, &names).filter(|_| !options.allow.iter().any(|name| name == "drift")) {
        ui::warn(format!("{advice} (`--allow drift` if it is meant)"));
    }
    let plan = plan::plan(recipe, sources, &options.allow)?;
    plan.warnings.iter().for_each(ui::warn);
    Ok(plan)
}

/// Recipe to composite: opens, plans, sets the gates, and fits what the recipe asks for. Nothing is written but the cache.
pub(crate) fn composite(recipe: &mut Recipe, options: &Options, device: &DeviceArgs) -> anyhow::Result<Composite> {
    Ok(composed(recipe, options, device)?.0)
}

/// The same with gates that are fitted to statistics of what its routers see, with an expert forced upon each text, and those statistics.
pub(crate) fn with_statistics(recipe: &mut Recipe, options: &Options, device: &DeviceArgs) -> anyhow::Result<(Composite, Stats)> {
    if !recipe.fitted() {
        bail!("`gate_mode: {}` is not fitted: there are no statistics to keep", recipe.gate_mode.name);
    }
    let (composite, corpus) = composed(recipe, options, device)?;
    let names = calibrate::names(&recipe.experts.iter().collect::<Vec<_>>());
    let texts: Vec<_> = corpus.into_iter().flat_map(|corpus| corpus.experts).enumerate().collect();
    let stats = stats::gather(&composite, &names, &texts, (Routing::Forced, stats::KEEP), device)?;
    Ok((composite.gated(stats::gates(&stats, recipe.gate_mode)?), stats))
}

/// A recipe's composite, and the text that it is fitted to if it is.
fn composed(recipe: &mut Recipe, options: &Options, device: &DeviceArgs) -> anyhow::Result<(Composite, Option<Corpus>)> {
    if recipe.gate_mode.runtime() == Some(Runtime::Sequence) {
        bail!(
            "`gate_mode: sequence` makes no composite, since {}; `upcycle serve`, `chat`, `run`, `eval` and `inspect` take it",
            Runtime::Sequence.reason()
        );
    }
    let sources = open(recipe)?;
    let mut plan = plan(recipe, &sources, options)?;
    let place = device.open()?;
    if recipe.gate_mode.runtime() == Some(Runtime::Subspace) {
        let gates = calibrate::subspace(recipe, &sources)?;
        return Ok((plan::composite(plan, sources, gates, None), None));
    }
    if !recipe.fitted() {
        let calibrated = calibrate::gates(recipe, sources.base(), || load(sources.base(), device, &place))?;
        calibrated.warnings.iter().for_each(ui::warn);
        return Ok((plan::composite(plan, sources, calibrated.gates, None), None));
    }
    let corpus = corpus(recipe, &sources, device)?;
    let (bar, cache) = (ui::steps(), upcycle::env::cache());
    let fitted = calibrate::fit(recipe, &plan, &sources, &corpus, &place, &cache, &|done, layers| {
        bar.set_length(layers as u64);
        bar.set_position(done as u64);
        bar.set_message("fitting layer");
    })?;
    bar.finish_and_clear();
    fitted.found.notes.iter().for_each(|note| tracing::debug!("{note}"));
    let gates = Gates { routed: fitted.found.gates.clone(), shared: Vec::new() };
    let top_k = fitted.found.top_k(recipe.experts_per_token);
    if recipe.choose_experts_per_token && top_k < recipe.experts_per_token {
        let right = 100.0 * fitted.found.right[0];
        tracing::info!("{top_k} expert per token: {right:.1} % of tokens left out of the fit have the right one first");
        recipe.experts_per_token = top_k;
        plan = plan::plan(recipe, &sources, &options.allow)?;
    }
    Ok((plan::composite(plan, sources, gates, Some(Arc::new(fitted))), Some(corpus)))
}

/// The text of a recipe's experts; what they write themselves is kept in the cache.
pub(crate) fn corpus(recipe: &Recipe, sources: &Sources, device: &DeviceArgs) -> anyhow::Result<Corpus> {
    let place = device.open()?;
    let decoder = |source: &Source| load(source, device, &place);
    let options = TextOptions { cache: Some(upcycle::env::cache()), ..TextOptions::default() };
    let bar = ui::steps();
    let corpus = calibrate::text::corpus(recipe, sources, &options, &decoder, &|doing| bar.set_message(doing.to_owned()))?;
    corpus.warnings.iter().for_each(|warning| bar.suspend(|| ui::warn(warning)));
    bar.finish_and_clear();
    Ok(corpus)
}

/// A source's own model, to be run.
fn load(source: &Source, device: &DeviceArgs, place: &Device) -> Result<Decoder, DecoderError> {
    Decoder::load(source.family, &source.config, &*source.weights, device.dtype(Precision::Fast, place, &source.config), place)
}

/// Opens and checks the models of a recipe whose experts answer whole sequences; warnings go to stderr.
pub(crate) fn sequence(recipe: &Recipe, options: &Options) -> anyhow::Result<(Sources, plan::Sequence)> {
    let sources = open(recipe)?;
    let plan = plan::sequence(recipe, &sources, &options.allow)?;
    plan.warnings.iter().for_each(ui::warn);
    Ok((sources, plan))
}

/// One part of a tensor in words.
pub(crate) fn describe(part: &Part, sources: &Sources) -> String {
    let name = |source: &usize| sources.all[*source].reference.to_string();
    match part {
        Part::Tensor { source, tensor, noise, scale, fold } => {
            let fold = if fold.is_some() { " behind its own norm" } else { "" };
            let noise = noise.map_or(String::new(), |n| format!(" + noise {n}"));
            let scale = scale.map_or(String::new(), |s| format!(" x {s}"));
            format!("{}:{tensor}{noise}{scale}{fold}", name(source))
        }
        Part::Mean { of } => format!("mean of {}", of.iter().map(|(source, _)| name(source)).collect::<Vec<_>>().join(", ")),
        Part::Fitted { .. } => "fitted".into(),
        Part::Tuned { .. } => "tuned".into(),
        Part::Gate { .. } => "gate".into(),
        Part::SharedGate { .. } => "gate of the shared expert".into(),
        Part::Zeros { .. } => "zeros".into(),
    }
}
