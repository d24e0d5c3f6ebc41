//! `upcycle plan`: what would be written, and every problem, without writing.

use std::path::PathBuf;

use anstream::println;
use indicatif::HumanBytes;
use serde_json::json;
use upcycle::{inspect, recipe::Recipe, write};
use upcycle_routers::init::Runtime;

use super::recipe;

/// Arguments of `plan`.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// The recipe (mergekit-moe YAML)
    recipe: PathBuf,
    /// Check the recipe alone: no model is opened
    #[arg(long)]
    recipe_only: bool,
    /// Print JSON
    #[arg(long)]
    json: bool,
    /// List every tensor with its origin
    #[arg(long)]
    tensors: bool,
    #[command(flatten)]
    options: recipe::Options,
}

pub(crate) fn run(args: &Args) -> anyhow::Result<()> {
    let mut recipe = recipe::read(&args.recipe, &args.options)?;
    if args.recipe_only {
        if args.json {
            println!("{:#}", recipe.to_json());
        } else {
            println!("{} is a good recipe: {} experts, gate mode {}", args.recipe.display(), recipe.experts.len(), recipe.gate_mode.name);
        }
        return Ok(());
    }
    if recipe.gate_mode.runtime() == Some(Runtime::Sequence) {
        return sequence(&recipe, args);
    }
    let sources = recipe::open(&recipe)?;
    let plan = recipe::plan(&mut recipe, &sources, &args.options)?;
    let memory = write::memory(&plan, &sources);
    if args.json {
        let sources: Vec<String> = sources.all.iter().map(|source| source.reference.to_string()).collect();
        let tensors: Vec<_> = plan
            .tensors
            .iter()
            .map(|t| json!({"name": t.name, "dtype": t.info.dtype.torch_name(), "shape": t.info.shape, "parts": t.parts}))
            .collect();
        let (parameters, active) = plan.parameters();
        println!(
            "{:#}",
            json!({
                "architecture": plan.family().architecture, "dtype": plan.dtype.torch_name(), "bytes": plan.bytes(),
                "parameters": parameters, "active_parameters": active, "memory": memory, "sources": sources,
                "warnings": plan.warnings, "config": plan.config_json, "tensors": tensors,
            })
        );
        return Ok(());
    }
    let (parameters, active) = plan.parameters();
    let written = recipe.gate_mode.runtime().is_none();
    if written {
        println!("output      {} ({}), {}", plan.family().architecture, plan.target.name, plan.dtype);
    } else {
        println!("output      none: {} is served from the models' own files", args.recipe.display());
    }
    println!("experts     {}, {} per token", recipe.experts.len(), recipe.experts_per_token);
    println!("parameters  {:.2} B, {:.2} B active per token", parameters as f64 / 1e9, active as f64 / 1e9);
    println!("tensors     {}", plan.tensors.len());
    if written {
        println!("disk        {}", HumanBytes(plan.bytes()));
        println!("memory      {} while writing", HumanBytes(memory));
    }
    println!("gates       {}: {}", recipe.gate_mode.name, recipe.gate_mode.about);
    if args.tensors {
        for tensor in &plan.tensors {
            let parts: Vec<String> = tensor.parts.iter().map(|part| recipe::describe(part, &sources)).collect();
            println!("{}  {:?}  {}", tensor.name, tensor.info.shape, parts.join(" + "));
        }
    }
    Ok(())
}

/// Nothing would be written: what would be served, and from where.
fn sequence(recipe: &Recipe, args: &Args) -> anyhow::Result<()> {
    let (sources, plan) = recipe::sequence(recipe, &args.options)?;
    let models: Vec<_> = sources
        .experts(recipe)
        .into_iter()
        .map(|source| (source.reference.to_string(), inspect::summary(source.family, &source.config, &*source.weights)))
        .collect();
    if args.json {
        let experts: Vec<_> = models
            .iter()
            .map(|(name, summary)| json!({"source": name, "parameters": summary.parameters, "bytes": summary.bytes.values().sum::<u64>()}))
            .collect();
        println!("{:#}", json!({"gate_mode": recipe.gate_mode.name, "bytes": 0, "experts": experts, "warnings": plan.warnings}));
        return Ok(());
    }
    println!("output      none: {} is served from the experts' own files", args.recipe.display());
    println!("experts     {}, one per sequence", models.len());
    for (name, summary) in models {
        let bytes = HumanBytes(summary.bytes.values().sum());
        println!("            {name}: {:.1} M parameters, {bytes}", summary.parameters as f64 / 1e6);
    }
    println!("gates       {}: {}", recipe.gate_mode.name, recipe.gate_mode.about);
    Ok(())
}
