//! `upcycle quantize`: any model as one GGUF file, in blocks of a few bits, for llama.cpp and for us.

use std::path::PathBuf;

use anyhow::bail;
use indicatif::{HumanBytes, HumanDuration};
use upcycle::{
    quantize::{Importance, Mix, Scheme},
    write::gguf::{self, Model},
};

use super::{
    model::{self, DeviceArgs},
    recipe, ui,
};

/// Arguments of `quantize`.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// A recipe, a directory, a .gguf file, or owner/name
    model: String,
    /// The file to write
    out: PathBuf,
    #[command(flatten)]
    scheme: SchemeArgs,
    /// Weigh columns by an importance matrix (of `llama-imatrix`, or `--imatrix-out`)
    #[arg(long, value_name = "FILE")]
    imatrix: Option<PathBuf>,
    /// Write over a file that is there
    #[arg(long)]
    overwrite: bool,
    #[command(flatten)]
    options: recipe::Options,
    #[command(flatten)]
    device: DeviceArgs,
}

/// Into what types.
#[derive(Debug, Clone, clap::Args)]
struct SchemeArgs {
    /// f32, f16, bf16, q8_0, q6_k, q5_k_m, q5_k_s, q4_k_m, q4_k_s or q4_0
    #[arg(long = "type", short = 't', value_name = "TYPE", default_value = "q4_k_m")]
    mix: Mix,
    /// Quantise the experts alone; everything else stays bf16 (or f16, where the model is)
    #[arg(long)]
    experts_only: bool,
}

pub(crate) fn run(args: &Args) -> anyhow::Result<()> {
    let start = std::time::Instant::now();
    gguf::check(&args.out, args.overwrite)?;
    args.device.set_threads()?;
    let loaded = model::open(&args.model, &args.options, &args.device)?;
    if !loaded.experts.is_empty() {
        bail!("the experts of `gate_mode: sequence` are whole models, which one GGUF file cannot hold; quantise each, or set `gate_mode: auto`");
    }
    let importance = args.imatrix.as_deref().map(Importance::read).transpose()?;
    let scheme = Scheme { mix: args.scheme.mix, experts_only: args.scheme.experts_only };
    let model =
        Model { name: &loaded.name, family: loaded.family, config: &loaded.config, weights: &*loaded.weights, sidecars: &loaded.sidecars };
    let written = gguf::write(&model, &args.out, &scheme, importance.as_ref(), &ui::WriteProgress::new())?;
    let types: Vec<String> = written.types.iter().map(|(dtype, count)| format!("{count} {dtype}")).collect();
    tracing::info!(
        "wrote {} to {} in {}: {:.2} bits per weight, tensors {}",
        HumanBytes(written.bytes),
        args.out.display(),
        HumanDuration(start.elapsed()),
        8.0 * written.bytes as f64 / written.elements as f64,
        types.join(", ")
    );
    ui::hint(format!("upcycle serve {}", args.out.display()));
    Ok(())
}
