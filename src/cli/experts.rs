//! `upcycle add-expert`, `replace-expert`, `remove-expert`: the experts of a composite on disk, by its own recipe.
//!
//! With the statistics that its gates were fitted to (`compose --keep-stats`) the composite keeps its shared weights and its other experts as they
//! lie there, and gates are fitted anew to those statistics and to the new expert's. Without them it is composed again in its place, from its
//! recipe with that one change. Either way shards that stay the same are not written, and until everything new is on disk the composite stays
//! what it was.

use std::path::{Path, PathBuf};

use anyhow::{Context as _, anyhow, bail};
use upcycle::{
    calibrate::{
        self,
        stats::{ExpertId, Fingerprint, Routing, Stats},
    },
    plan::{self, Composite},
    recipe::{self as recipes, Change, ModelRef, NewExpert, Recipe, Shared},
    source, write,
};

use super::{compose, model::DeviceArgs, recipe, stats, ui};

/// What the commands share.
#[derive(Debug, clap::Args)]
struct Common {
    /// Most bytes of one shard, with suffix K, M, G or B
    #[arg(long, value_name = "SIZE", default_value = "5B", value_parser = compose::size)]
    out_shard_size: u64,
    #[command(flatten)]
    options: recipe::Options,
    #[command(flatten)]
    device: DeviceArgs,
}

/// A model and what it is for.
#[derive(Debug, clap::Args)]
struct Model {
    /// The fine-tune: a directory, owner/name, or BASE+ADAPTER
    #[arg(value_name = "MODEL")]
    place: String,
    /// What it is for (repeatable)
    #[arg(long = "prompt", value_name = "TEXT")]
    prompts: Vec<String>,
    /// A file of such prompts
    #[arg(long, value_name = "FILE")]
    prompts_file: Option<String>,
    /// Text of its kind
    #[arg(long, value_name = "FILE")]
    text_file: Option<String>,
}

/// Arguments of `add-expert`.
#[derive(Debug, clap::Args)]
pub(crate) struct Add {
    /// The directory that `compose` wrote; paths in its recipe are taken from the working directory
    composite: PathBuf,
    #[command(flatten)]
    model: Model,
    #[command(flatten)]
    common: Common,
}

/// Arguments of `replace-expert`.
#[derive(Debug, clap::Args)]
pub(crate) struct Replace {
    /// The directory that `compose` wrote; paths in its recipe are taken from the working directory
    composite: PathBuf,
    /// Which expert: its number from 0, or its name
    expert: String,
    #[command(flatten)]
    model: Model,
    #[command(flatten)]
    common: Common,
}

/// Arguments of `remove-expert`.
#[derive(Debug, clap::Args)]
pub(crate) struct Remove {
    /// The directory that `compose` wrote; paths in its recipe are taken from the working directory
    composite: PathBuf,
    /// Which expert: its number from 0, or its name
    expert: String,
    #[command(flatten)]
    common: Common,
}

pub(crate) fn add(args: &Add) -> anyhow::Result<()> {
    change(&args.composite, &args.common, |_| Ok(Change::Add(described(&args.model))))
}

pub(crate) fn replace(args: &Replace) -> anyhow::Result<()> {
    change(&args.composite, &args.common, |text| Ok(Change::Replace(find(text, &args.expert)?, described(&args.model))))
}

pub(crate) fn remove(args: &Remove) -> anyhow::Result<()> {
    change(&args.composite, &args.common, |text| Ok(Change::Remove(find(text, &args.expert)?)))
}

fn described(model: &Model) -> NewExpert {
    NewExpert {
        source_model: model.place.clone(),
        positive_prompts: model.prompts.clone(),
        prompts_file: model.prompts_file.clone(),
        text_file: model.text_file.clone(),
    }
}

/// The number of an expert that is named by it, or as `eval` and `inspect` name it.
fn find(recipe: &str, expert: &str) -> anyhow::Result<usize> {
    let names = calibrate::names(&recipes::experts(recipe).iter().collect::<Vec<_>>());
    let number = expert.parse().ok().filter(|number| *number < names.len());
    number
        .or_else(|| names.iter().position(|name| name == expert))
        .ok_or_else(|| anyhow!("there is no expert `{expert}`; there are {}, numbered from 0", names.join(", ")))
}

fn change(out: &Path, common: &Common, change: impl FnOnce(&str) -> anyhow::Result<Change>) -> anyhow::Result<()> {
    let file = out.join(write::RECIPE);
    if !out.join("config.json").exists() {
        bail!("{} is no finished composite; `upcycle compose {} {} --overwrite` finishes it", out.display(), file.display(), out.display());
    }
    let before = fs_err::read_to_string(&file).context("a composite is changed by the recipe beside it")?;
    let change = change(&before)?;
    let text = recipes::edit(&before, &change)?;
    common.device.set_threads()?;
    let options = write::Options {
        shard_size: common.out_shard_size,
        by_expert: write::is_by_expert(out),
        overwrite: true,
        allow_non_finite: common.options.allow.iter().any(|name| name == recipe::NON_FINITE),
        ..write::Options::default()
    };
    let progress = ui::WriteProgress::new();
    if out.join(write::STATS).exists() {
        let stays = stays(&change, recipes::experts(&before).len());
        let (composite, stats, recipe) = kept(text, out, &stays, common)?;
        return compose::write(&composite, Some(&stats), &recipe, (out, &options), &progress);
    }
    // Where it stands is not where its paths were written.
    let (mut recipe, warnings) = recipes::parse(&text, Path::new(write::RECIPE), &common.options.allow)?;
    warnings.iter().for_each(ui::doubt);
    recipe.seed = common.options.random_seed.or(recipe.seed);
    write::check_recipe(&recipe)?;
    let composite = recipe::composite(&mut recipe, &common.options, &common.device)?;
    compose::write(&composite, None, &recipe, (out, &options), &progress)
}

/// Of each expert after a change of `experts`: which it was.
fn stays(change: &Change, experts: usize) -> Vec<Option<usize>> {
    let before = (0..experts).map(Some);
    match change {
        Change::Add(_) => before.chain([None]).collect(),
        Change::Replace(e, _) => before.map(|old| old.filter(|old| old != e)).collect(),
        Change::Remove(e) => before.filter(|old| *old != Some(*e)).collect(),
    }
}

/// The composite in `out` by the recipe `text`, with all that stays as it is there and with gates fitted to the statistics beside it.
fn kept(text: String, out: &Path, stays: &[Option<usize>], common: &Common) -> anyhow::Result<(Composite, Stats, Recipe)> {
    let new = stays.iter().position(Option::is_none);
    // What it warns of beside the new expert was said before.
    let (recipe, _) = recipes::parse(&recipes::without_texts(&text, new)?, Path::new(write::RECIPE), &common.options.allow)?;
    let place = ModelRef { path: out.display().to_string(), revision: None, lora: None };
    let written = source::open(&place, &ui::open_options(None))?;
    let top_k = written.config.moe.as_ref().map_or(1, |moe| moe.top_k);
    let shared = match recipe.shared {
        Shared::Auto if write::folded(out)? => Shared::Fit,
        Shared::Auto => Shared::Base,
        given => given,
    };
    let seed = common.options.random_seed.or(recipe.seed);
    let recipe = Recipe { text, shared, seed, repair: Some(false), experts_per_token: top_k.min(stays.len()), ..recipe };
    let sources = recipe::open(&recipe)?;
    let plan = plan::plan(&recipe, &sources, &common.options.allow)?;
    plan.warnings.iter().for_each(ui::warn);
    let corpus = match new {
        Some(e) => {
            recipe::corpus(&Recipe { experts: vec![recipe.experts[e].clone()], ..recipe.clone() }, &sources, &common.device)?.experts
        }
        None => Vec::new(),
    };
    let composite = plan::changed(plan, sources, written, stays)?;
    let names = calibrate::names(&recipe.experts.iter().collect::<Vec<_>>());
    let texts: Vec<_> = new.into_iter().zip(corpus).collect();
    let gathered = stats::gather(&composite, &names, &texts, (Routing::Forced, stats::KEEP), &common.device)?;
    let file = out.join(write::STATS);
    let mut all = calibrate::stats::read(&file)?;
    all.check(&gathered, &file.display().to_string(), &out.display().to_string())?;
    gathered.experts.into_iter().for_each(|domain| all.replace(domain));
    let plan = &composite.plan;
    let fingerprint = Fingerprint::of(plan.family(), &plan.config, &composite)?;
    let ids: Vec<ExpertId> = names.into_iter().zip(fingerprint.experts).map(|(name, weights)| ExpertId { name, weights }).collect();
    let all = all.of(&ids)?;
    let composite = composite.gated(stats::gates(&all, recipe.gate_mode)?);
    Ok((composite, all, recipe))
}
