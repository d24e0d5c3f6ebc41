//! `upcycle gates`: sets the gates of a composite anew, from statistics of what its routers see.

use std::{collections::BTreeMap, path::PathBuf};

use anyhow::bail;
use clap::builder::PossibleValuesParser;
use indicatif::HumanBytes;
use upcycle::{
    calibrate::stats::{ExpertId, Fingerprint, Stats, StatsError},
    write,
};
use upcycle_architectures::{View, WeightsError};
use upcycle_routers::init::{self, Fitted, METHODS};

use super::{
    compose,
    composite::{self, Given},
    model::DeviceArgs,
    recipe, stats, ui,
};

/// Arguments of `gates`.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// The composite: a directory, a recipe, or owner/name
    composite: String,
    /// Statistics of all its experts, in one file or several (`upcycle stats` makes them)
    #[arg(long, required = true, num_args = 1.., value_name = "FILE")]
    stats: Vec<PathBuf>,
    /// The directory to write: the composite as it is, with the new gates
    #[arg(short, long, value_name = "DIR")]
    out: PathBuf,
    /// How the gates are fitted
    #[arg(long, value_name = "METHOD", default_value = "auto", value_parser = methods())]
    method: String,
    /// Most bytes of one shard, with suffix K, M, G or B
    #[arg(long, value_name = "SIZE", default_value = "5B", value_parser = compose::size)]
    out_shard_size: u64,
    /// Write into a directory that is not empty
    #[arg(long)]
    overwrite: bool,
    #[command(flatten)]
    options: recipe::Options,
    #[command(flatten)]
    device: DeviceArgs,
}

/// Those that are fitted.
fn methods() -> PossibleValuesParser {
    PossibleValuesParser::new(METHODS.iter().filter(|method| method.needs().is_none()).map(|method| method.name))
}

pub(crate) fn run(args: &Args) -> anyhow::Result<()> {
    args.device.set_threads()?;
    let options = write::Options {
        shard_size: args.out_shard_size,
        overwrite: args.overwrite,
        allow_non_finite: args.options.allow.iter().any(|name| name == recipe::NON_FINITE),
        ..write::Options::default()
    };
    write::check_directory(&args.out, &options)?;
    let statistics = stats::merged(&args.stats)?;
    let Some(given) = composite::open(&args.composite, &args.options, &args.device)? else {
        return Err(StatsError::Dense { model: args.composite.clone() }.into());
    };
    let Given { composite, experts, .. } = &given;
    let plan = &composite.plan;
    let fingerprint = Fingerprint::of(plan.family(), &plan.config, composite)?;
    let sparse: Vec<usize> = plan.config.moe.iter().flat_map(|moe| (0..plan.config.layers).filter(|&l| moe.sparse[l])).collect();
    let own = Stats {
        routing: statistics.routing,
        composite: fingerprint.of_routing(statistics.routing),
        layers: sparse.len(),
        hidden: plan.config.hidden,
        experts: Vec::new(),
    };
    statistics.check(&own, &args.stats[0].display().to_string(), &args.composite)?;
    let ids = experts.iter().zip(&fingerprint.experts).map(|(name, weights)| ExpertId { name: name.clone(), weights: weights.clone() });
    let order = statistics.find(&ids.collect::<Vec<_>>())?;
    let Some(method) = init::find(&args.method) else { bail!("there is no gate method `{}`", args.method) };

    let bar = ui::steps();
    bar.set_length(sparse.len() as u64);
    let fitted = statistics.gates(&order, method.candidates(), &|done| bar.set_position(done as u64))?;
    bar.finish_and_clear();
    let mut gates = BTreeMap::new();
    for (&layer, Fitted { gate, report, .. }) in sparse.iter().zip(&fitted) {
        tracing::debug!("layer {layer}: {}", report.why);
        let missing = || WeightsError::Missing { tensor: format!("router of layer {layer}") };
        let planned = plan.router(layer).ok_or_else(missing)?;
        gates.insert(planned.name.clone(), View::from_f32(&gate.weight, planned.info.dtype, planned.info.shape.clone())?);
    }
    let mean = |of: fn(&Fitted) -> f64| fitted.iter().map(of).sum::<f64>() / fitted.len().max(1) as f64;
    let (nll, right) = (mean(|f| f.report.nll), mean(|f| f.report.accuracy.first().copied().unwrap_or(1.0)));
    let tokens: u64 = order.iter().map(|&at| statistics.experts[at].seen()).sum();
    let found = format!(
        "`{}` gates from statistics of {tokens} tokens: {:.1} % of tokens find their expert first, {nll:.3} nats",
        method.name,
        100.0 * right
    );
    tracing::info!("{found} (mean over layers, on what was left out)");

    let papers = composite::papers(&given, &format!("\n## Gates\n\nSet anew by `upcycle gates`. {found}.\n"));
    let written = write::write_with(&composite.replacing(gates), &papers, &args.out, &options, &ui::WriteProgress::new())?;
    let bytes: u64 = written.shards.iter().map(|(_, bytes)| bytes).sum();
    tracing::info!("wrote {} to {}", HumanBytes(bytes), args.out.display());
    Ok(())
}
