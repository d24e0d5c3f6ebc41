//! `upcycle inspect`: shapes, families, gates and sizes of a model; logits of given tokens for parity checks.

use std::{collections::HashMap, path::PathBuf};

use anstream::println;
use anyhow::Context as _;
use candle_core::DType;
use indicatif::HumanBytes;
use serde_json::json;
use upcycle::inspect::{gates, summary};
use upcycle_architectures::decoder::{Logits, NoProbe, Step};
use upcycle_routers::diagnose;

use super::{
    model::{self, DeviceArgs},
    recipe, ui,
};

/// Arguments of `inspect`.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// A recipe, a directory, a .gguf file, or owner/name
    model: String,
    /// Print JSON
    #[arg(long)]
    json: bool,
    /// List every tensor
    #[arg(long)]
    tensors: bool,
    /// Compute the logits of these token ids (a JSON list of integers) instead
    #[arg(long, value_name = "IDS.json", requires = "out")]
    logits: Option<PathBuf>,
    /// Where the logits go: safetensors, tensor `logits` [T, V] f32
    #[arg(long, value_name = "FILE")]
    out: Option<PathBuf>,
    /// Compute the logits token by token through the cache
    #[arg(long, requires = "logits")]
    decode: bool,
    #[command(flatten)]
    options: recipe::Options,
    #[command(flatten)]
    device: DeviceArgs,
}

pub(crate) fn run(args: &Args) -> anyhow::Result<()> {
    let loaded = model::open(&args.model, &args.options, &args.device)?;
    if let (Some(ids), Some(out)) = (&args.logits, &args.out) {
        return logits(&loaded, args, ids, out);
    }
    let summary = summary(loaded.family, &loaded.config, &*loaded.weights);
    let gates = gates(loaded.family, &loaded.config, &*loaded.weights)?;
    let layers = diagnose::diagnose(&gates);
    if args.json {
        let mut tensors: Vec<_> = loaded.weights.names();
        tensors.sort();
        println!("{:#}", json!({"model": loaded.name, "summary": summary, "gates": layers, "tensors": tensors}));
        return Ok(());
    }
    println!("model       {}", loaded.name);
    println!("family      {} ({})", summary.family, loaded.family.architecture);
    println!("layers      {}, hidden {}, ffn {}", summary.layers, summary.hidden, summary.ffn);
    println!("attention   {} heads of {}, {} for keys and values", summary.heads, summary.head_dim, summary.kv_heads);
    println!("vocabulary  {}", summary.vocabulary);
    println!("parameters  {:.3} B, {:.3} B active per token", summary.parameters as f64 / 1e9, summary.active_parameters as f64 / 1e9);
    for (part, bytes) in &summary.bytes {
        println!("  {part:<14}{}", HumanBytes(*bytes));
    }
    if summary.experts > 0 {
        let shared = summary.shared_expert_ffn.map_or(String::new(), |ffn| format!(", and a shared one of width {ffn}"));
        println!("experts     {}, {} per token{shared}", summary.experts, summary.experts_per_token);
        println!("gates       layer  condition  largest cosine of two experts");
        for (layer, d) in layers.iter().enumerate() {
            let widest = d.pairs.iter().max_by(|x, y| x.cosine.abs().total_cmp(&y.cosine.abs()));
            let pair = widest.map_or(String::new(), |pair| format!("{:>6.3} ({}, {})", pair.cosine, pair.a, pair.b));
            println!("            {layer:>5}  {:>9.2}  {pair}", d.condition);
        }
        let names: Vec<String> = (0..summary.experts).map(|e| e.to_string()).collect();
        let names: Vec<&str> = names.iter().map(String::as_str).collect();
        diagnose::warnings(&layers, &names).iter().for_each(ui::warn);
    }
    if args.tensors {
        let mut names = loaded.weights.names();
        names.sort();
        for name in names {
            if let Some(info) = loaded.weights.info(&name) {
                println!("{name}  {:?}  {}", info.shape, info.dtype);
            }
        }
    }
    Ok(())
}

fn logits(loaded: &model::Loaded, args: &Args, ids: &std::path::Path, out: &std::path::Path) -> anyhow::Result<()> {
    let text = fs_err::read_to_string(ids)?;
    let tokens: Vec<u32> = serde_json::from_str(&text).with_context(|| format!("{} is no JSON list of token ids", ids.display()))?;
    let decoder = model::load_decoder(loaded, &args.device)?;
    let mut cache = decoder.cache();
    let chunks: Vec<&[u32]> = if args.decode { tokens.chunks(1).collect() } else { vec![&tokens] };
    let mut rows = Vec::new();
    for tokens in chunks {
        let step = Step { tokens, cache: &mut cache, logits: Logits::All };
        rows.push(decoder.forward(&mut [step], &mut NoProbe)?);
    }
    let logits = candle_core::Tensor::cat(&rows, 0)?.to_dtype(DType::F32)?;
    candle_core::safetensors::save(&HashMap::from([("logits", logits)]), out)?;
    Ok(())
}
