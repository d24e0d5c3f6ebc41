//! `upcycle compose`: a recipe becomes a checkpoint.

use std::{
    path::{Path, PathBuf},
    time::Instant,
};

use anyhow::anyhow;
use clap::{ArgAction, error::ErrorKind};
use indicatif::{HumanBytes, HumanDuration};
use upcycle::{
    calibrate::stats::Stats,
    engine::device::DeviceChoice,
    plan::Composite,
    recipe::Recipe,
    write::{self, WriteError},
};

use super::{model::DeviceArgs, recipe, ui};

/// Arguments of `compose`. mergekit-moe's flags are taken: those that mean something here do it, the others say why they do not.
#[derive(Debug, clap::Args)]
#[expect(clippy::struct_excessive_bools, reason = "each is a flag of the command line")]
pub(crate) struct Args {
    /// The recipe (mergekit-moe YAML)
    recipe: PathBuf,
    /// The directory to write
    out: PathBuf,
    /// Most bytes of one shard, with suffix K, M, G or B
    #[arg(long, value_name = "SIZE", default_value = "5B", value_parser = size)]
    out_shard_size: u64,
    /// Write a file for each expert, one for the gates, and one for what is shared
    #[arg(long, value_enum, value_name = "WHAT", conflicts_with = "out_shard_size")]
    shard_by: Option<ShardBy>,
    /// Keep what the routers see in upcycle.stats, and fit the gates to that: experts then come and go without the others' texts
    #[arg(long)]
    keep_stats: bool,
    /// Write into a directory that is not empty
    #[arg(long)]
    overwrite: bool,
    /// Leave the tokenizer's files out
    #[arg(long)]
    no_copy_tokenizer: bool,
    /// Leave README.md and the recipe out
    #[arg(long)]
    no_write_model_card: bool,
    /// Do not wait until everything is on the disk, as cp does not: a machine that fails may then leave a damaged composite (`verify` tells)
    #[arg(long)]
    no_sync: bool,
    /// Print what happens as lines of JSON
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    options: recipe::Options,
    #[command(flatten)]
    device: DeviceArgs,
    #[command(flatten)]
    mergekit: Mergekit,
}

/// What is in one file.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum ShardBy {
    /// an expert
    Expert,
}

/// Flags of mergekit-moe that need no counterpart, hidden from the help.
#[derive(Debug, clap::Args)]
#[expect(clippy::struct_excessive_bools, reason = "each is a flag of the command line")]
struct Mergekit {
    #[arg(long, hide = true)]
    copy_tokenizer: bool,
    #[arg(long, hide = true)]
    write_model_card: bool,
    #[arg(long, hide = true)]
    i_understand_this_is_not_useful_without_training: bool,
    #[arg(long, hide = true)]
    trust_remote_code: bool,
    #[arg(long, hide = true, num_args = 0..=1, default_missing_value = "true", action = ArgAction::Set)]
    safe_serialization: Option<bool>,
    #[arg(long, hide = true)]
    no_safe_serialization: bool,
    #[arg(long, hide = true)]
    transformers_cache: Option<PathBuf>,
    #[arg(long, hide = true)]
    lora_merge_cache: Option<PathBuf>,
    #[arg(long, hide = true)]
    lora_merge_dtype: Option<String>,
    #[arg(long, hide = true)]
    write_threads: Option<usize>,
    #[arg(long, hide = true)]
    load_in_4bit: bool,
    #[arg(long, hide = true)]
    load_in_8bit: bool,
    #[arg(long, hide = true)]
    cuda: bool,
    #[arg(long, hide = true)]
    clone_tensors: bool,
    #[arg(long, hide = true)]
    async_write: bool,
    #[arg(long, hide = true)]
    lazy_unpickle: bool,
    #[arg(long, hide = true)]
    low_cpu_memory: bool,
    #[arg(long, hide = true)]
    read_to_gpu: bool,
    #[arg(long, hide = true)]
    multi_gpu: bool,
    #[arg(long, hide = true)]
    gpu_rich: bool,
    #[arg(long, hide = true)]
    allow_crimes: bool,
    #[arg(long, hide = true)]
    unsafe_truncate_embeddings: bool,
}

impl Mergekit {
    /// Refuses what cannot be had, warns of what has no effect.
    fn check(&self) -> anyhow::Result<()> {
        if self.trust_remote_code {
            return Err(refuse(
                "`--trust-remote-code`: upcycle runs no code from a model's repository; families are built in (`upcycle doctor` lists them)",
            ));
        }
        if self.no_safe_serialization || self.safe_serialization == Some(false) {
            return Err(refuse("`--no-safe-serialization`: upcycle writes safetensors only, never pickles"));
        }
        for (given, flag, why) in [
            (self.load_in_4bit || self.load_in_8bit, "--load-in-4bit/8bit", "the base is read from its memory map in its own type"),
            (self.transformers_cache.is_some(), "--transformers-cache", "set HF_HUB_CACHE instead"),
            (
                self.lora_merge_cache.is_some() || self.lora_merge_dtype.is_some(),
                "--lora-merge-cache/dtype",
                "adapters are merged while writing, in f32",
            ),
            (self.write_threads.is_some(), "--write-threads", "use `--threads`"),
            (
                self.clone_tensors || self.async_write || self.lazy_unpickle || self.low_cpu_memory,
                "this flag",
                "tensors are streamed in any case",
            ),
            (
                self.read_to_gpu || self.multi_gpu || self.gpu_rich,
                "--read-to-gpu/--multi-gpu/--gpu-rich",
                "writing needs no GPU; `--device cuda` sets the gates on one",
            ),
            (self.allow_crimes || self.unsafe_truncate_embeddings, "--allow-crimes", "checks are waived by name with `--allow NAME`"),
        ] {
            if given {
                ui::warn(format!("{flag} has no effect: {why}"));
            }
        }
        Ok(())
    }
}

/// A command line that cannot be meant here.
fn refuse(message: &str) -> anyhow::Error {
    super::command().error(ErrorKind::ArgumentConflict, message).into()
}

pub(crate) fn run(mut args: Args) -> anyhow::Result<()> {
    args.mergekit.check()?;
    if args.mergekit.i_understand_this_is_not_useful_without_training {
        args.options.allow.push("same-model-experts".into());
    }
    if args.mergekit.cuda && args.device.device == DeviceChoice::Auto {
        args.device.device = DeviceChoice::Cuda(0);
    }
    let options = write::Options {
        shard_size: args.out_shard_size,
        by_expert: args.shard_by == Some(ShardBy::Expert),
        overwrite: args.overwrite,
        tokenizer: !args.no_copy_tokenizer,
        card: !args.no_write_model_card,
        allow_non_finite: args.options.allow.iter().any(|name| name == recipe::NON_FINITE),
        sync: !args.no_sync,
        ..write::Options::default()
    };
    write::check_directory(&args.out, &options)?;
    args.device.set_threads()?;
    let mut recipe = recipe::read(&args.recipe, &args.options)?;
    write::check_recipe(&recipe)?;
    let (composite, stats) = if args.keep_stats {
        let (composite, stats) = recipe::with_statistics(&mut recipe, &args.options, &args.device)?;
        (composite, Some(stats))
    } else {
        (recipe::composite(&mut recipe, &args.options, &args.device)?, None)
    };
    if args.json {
        write(&composite, stats.as_ref(), &recipe, (&args.out, &options), &ui::JsonProgress::default())
    } else {
        write(&composite, stats.as_ref(), &recipe, (&args.out, &options), &ui::WriteProgress::new())
    }
}

/// Writes a recipe's composite into a directory, with the statistics that its gates were fitted to, and says so.
pub(crate) fn write(
    composite: &Composite,
    stats: Option<&Stats>,
    recipe: &Recipe,
    (out, options): (&Path, &write::Options),
    progress: &dyn write::Progress,
) -> anyhow::Result<()> {
    let start = Instant::now();
    let written = write::write(composite, recipe, out, options, progress).map_err(|error| match error {
        WriteError::Io(_) => anyhow!(error).context(format!("{} is unfinished; the same command goes on from there", out.display())),
        other => other.into(),
    })?;
    let kept = out.join(write::STATS);
    match stats {
        Some(stats) => stats.write(&kept)?,
        // What an earlier composite left tells nothing of this one.
        None if kept.exists() => fs_err::remove_file(&kept)?,
        None => {}
    }
    let bytes: u64 = written.shards.iter().map(|(_, bytes)| bytes).sum();
    tracing::info!("wrote {} to {} in {}", HumanBytes(bytes), out.display(), HumanDuration(start.elapsed()));
    ui::hint(format!("upcycle serve {}", out.display()));
    Ok(())
}

/// `5B`, `200M`, `1500000`: bytes, powers of ten as in mergekit (B is 10^9).
pub(crate) fn size(text: &str) -> Result<u64, String> {
    let text = text.trim();
    let (digits, unit) = match text.char_indices().last() {
        Some((at, suffix)) if suffix.is_ascii_alphabetic() => (&text[..at], suffix.to_ascii_uppercase()),
        _ => (text, ' '),
    };
    let factor = match unit {
        ' ' => 1.0,
        'K' => 1e3,
        'M' => 1e6,
        'G' | 'B' => 1e9,
        _ => return Err(format!("`{unit}` is no unit; use K, M, G or B")),
    };
    let number: f64 = digits.trim().parse().map_err(|_| format!("`{digits}` is no number"))?;
    let bytes = number * factor;
    if bytes >= 1.0 && bytes.is_finite() { Ok(bytes as u64) } else { Err("must be at least one byte".into()) }
}

#[cfg(test)]
mod tests {
    use super::size;

    #[test]
    fn sizes_are_read_as_mergekit_reads_them() {
        assert_eq!(size("5B"), Ok(5_000_000_000));
        assert_eq!(size("200M"), Ok(200_000_000));
        assert_eq!(size("1.5k"), Ok(1500));
        assert_eq!(size("42"), Ok(42));
        assert!(size("5X").is_err() && size("B").is_err() && size("-1").is_err() && size("").is_err());
    }
}
