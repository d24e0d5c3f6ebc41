//! `upcycle quantize`: any model as one GGUF file, in blocks of a few bits, for llama.cpp and for us.

use std::path::PathBuf;

use anyhow::bail;
use indicatif::{HumanBytes, HumanDuration};
use upcycle::{
    engine::tokenizer::Tokenizer,
    quantize::{self, Importance, Mix, Scheme},
    write::gguf::{self, Model},
};

use super::{
    model::{self, DeviceArgs, Loaded, Precision},
    recipe,
    texts::TextArgs,
    ui,
};

/// Arguments of `quantize`.
#[derive(Debug, clap::Args)]
#[command(mut_arg("texts", |texts| texts.help("A text of the kind that the model will meet (repeatable): columns are weighed by what it multiplies them with")))]
pub(crate) struct Args {
    /// A recipe, a directory, a .gguf file, or owner/name
    model: String,
    /// The file to write
    out: PathBuf,
    /// What most matrices become
    #[arg(long = "type", short = 't', value_name = "TYPE", default_value = "q4_k_m", value_parser = model::mixes())]
    mix: Mix,
    /// Quantise the experts alone; everything else stays bf16 (or f16, where the model is)
    #[arg(long)]
    experts_only: bool,
    /// Weigh columns by an importance matrix (of `llama-imatrix`, or `--imatrix-out`)
    #[arg(long, value_name = "FILE", conflicts_with = "texts")]
    imatrix: Option<PathBuf>,
    #[command(flatten)]
    texts: TextArgs,
    /// Keep the importance matrix of the texts, for the next time or for `llama-quantize`
    #[arg(long, value_name = "FILE", requires = "texts")]
    imatrix_out: Option<PathBuf>,
    /// Write over a file that is there
    #[arg(long)]
    overwrite: bool,
    #[command(flatten)]
    options: recipe::Options,
    #[command(flatten)]
    device: DeviceArgs,
}

pub(crate) fn run(args: &Args) -> anyhow::Result<()> {
    let start = std::time::Instant::now();
    gguf::check(&args.out, args.overwrite)?;
    args.device.set_threads()?;
    let loaded = model::open(&args.model, &args.options, &args.device)?;
    if !loaded.experts.is_empty() {
        bail!(
            "the experts of `gate_mode: sequence` are whole models, which one GGUF file cannot hold; quantise each, or set `gate_mode: auto`"
        );
    }
    let importance = match &args.imatrix {
        Some(file) => Some(Importance::read(file)?),
        None if args.texts.texts.is_empty() => None,
        None => Some(gather(&loaded, args)?),
    };
    let scheme = Scheme { mix: args.mix, experts_only: args.experts_only };
    let model =
        Model { name: &loaded.name, family: loaded.family, config: &loaded.config, weights: &*loaded.weights, sidecars: &loaded.sidecars };
    let written = gguf::write(&model, &args.out, scheme, importance.as_ref(), &ui::WriteProgress::new())?;
    let types: Vec<String> = written.types.iter().map(|(dtype, count)| format!("{count} {dtype}")).collect();
    if written.unknown > 0 && importance.is_some() {
        ui::warn(format!("of {} matrices the importance is not known: their columns weigh alike", written.unknown));
    }
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

/// The importance of the model's columns to the texts.
fn gather(loaded: &Loaded, args: &Args) -> anyhow::Result<Importance> {
    let texts = args.texts.read()?;
    let windows: Vec<_> =
        args.texts.cut(&texts, &Tokenizer::open(&loaded.sidecars, &loaded.config)?)?.into_iter().flat_map(|t| t.windows).collect();
    let decoder = model::load_decoder(loaded, &args.device, Precision::Full)?;
    let bar = ui::steps();
    bar.set_length(windows.len() as u64);
    bar.set_message("weighing columns");
    let importance = quantize::gather(&decoder, &windows, &mut || bar.inc(1))?;
    bar.finish_and_clear();
    if let Some(file) = &args.imatrix_out {
        let names: Vec<String> = texts.into_iter().map(|(name, _)| name).collect();
        importance.write(file, &names, windows.len(), args.texts.window as usize)?;
    }
    Ok(importance)
}
