//! `upcycle add-expert`, `replace-expert`, `remove-expert`: the experts of a composite on disk, by its own recipe.
//!
//! The composite is composed again in its place, from its recipe with that one change. Shards that stay the same are not written, and until
//! everything new is on disk the composite stays what it was.

use std::path::{Path, PathBuf};

use anyhow::{Context as _, anyhow, bail};
use upcycle::{
    calibrate,
    recipe::{self as recipes, Change, NewExpert},
    write,
};

use super::{compose, model::DeviceArgs, recipe, ui};

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
    let text = fs_err::read_to_string(&file).context("a composite is changed by the recipe beside it")?;
    let text = recipes::edit(&text, &change(&text)?)?;
    common.device.set_threads()?;
    // Where it stands is not where its paths were written.
    let (mut recipe, warnings) = recipes::parse(&text, Path::new(write::RECIPE), &common.options.allow)?;
    warnings.iter().for_each(ui::doubt);
    recipe.seed = common.options.random_seed.or(recipe.seed);
    let options = write::Options {
        shard_size: common.out_shard_size,
        overwrite: true,
        allow_non_finite: common.options.allow.iter().any(|name| name == recipe::NON_FINITE),
        ..write::Options::default()
    };
    compose::compose(recipe, out, &options, &common.options, &common.device, &ui::WriteProgress::new())
}
