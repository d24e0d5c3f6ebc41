//! `upcycle bench`: how fast a model reads and writes here, and what of the machine that takes.

use anstream::{print, println};
use candle_core::Device;
use serde_json::json;
use upcycle::engine::bench::{self, Load};
use upcycle_architectures::{
    decoder::Decoder,
    kernels::{Kernels, peak},
};

use super::{
    model::{self, DeviceArgs, KvArgs, MemoryArgs, Precision, QuantizeArgs},
    recipe,
};

/// Arguments of `bench`.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// A recipe, a directory, a .gguf file, or owner/name
    model: String,
    /// Tokens of the prompt
    #[arg(long, short = 'p', value_name = "N", default_value_t = 512)]
    prompt: usize,
    /// Tokens that each sequence writes
    #[arg(long, short = 'n', value_name = "N", default_value_t = 64)]
    tokens: usize,
    /// Sequences that write together (repeatable)
    #[arg(long, value_name = "N", default_values_t = [1, 8])]
    parallel: Vec<usize>,
    /// Times that each is done; medians are shown
    #[arg(long, value_name = "N", default_value_t = 3)]
    repeat: usize,
    /// Kernels of this CPU's: amx, avx512-bf16, avx512, avx2, neon or plain; the fastest that it has if not given
    #[arg(long, value_name = "KIND")]
    kernels: Option<Kernels>,
    /// Print JSON
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    options: recipe::Options,
    #[command(flatten)]
    quantize: QuantizeArgs,
    #[command(flatten)]
    kv: KvArgs,
    #[command(flatten)]
    memory: MemoryArgs,
    #[command(flatten)]
    device: DeviceArgs,
}

pub(crate) fn run(args: &Args) -> anyhow::Result<()> {
    args.device.set_threads()?;
    let loaded = args.quantize.apply(model::open(&args.model, &args.options, &args.device)?);
    let bytes = bench::bytes(loaded.family, &loaded.config, &*loaded.weights);
    let decoder = match args.kernels {
        Some(kernels) => {
            let dtype = args.device.dtype(Precision::Fast, &Device::Cpu, &loaded.config);
            Decoder::load_with(loaded.family, &loaded.config, &*loaded.weights, dtype, kernels)?
        }
        None => model::load_decoder(&loaded, &args.device, Precision::Fast)?,
    };
    let decoder = args.kv.decoder(decoder, Precision::Fast)?;
    args.memory.settle(&decoder)?;
    let kernels = decoder.kernels().unwrap_or_else(Kernels::best);
    let (bandwidth, products) = (peak::read_bandwidth(kernels), peak::products(kernels));
    let mut rows = Vec::new();
    for &parallel in &args.parallel {
        let load = Load { prompt: args.prompt, tokens: args.tokens, parallel, repeat: args.repeat };
        rows.push((parallel, bench::speed(&decoder, &load)?));
    }
    if args.json {
        let rows: Vec<_> = rows.iter().map(|(n, speed)| json!({"parallel": n, "prefill": speed.prefill, "decode": speed.decode})).collect();
        let json = json!({
            "model": loaded.name, "bytes": bytes.total, "bytes_per_token": bytes.token, "bandwidth": bandwidth, "peak": products, "speed": rows,
        });
        println!("{json}");
        return Ok(());
    }
    println!("{}: {:.0} MB of weights, {:.0} MB read per token", loaded.name, bytes.total as f64 / 1e6, bytes.token as f64 / 1e6);
    println!("cpu: {}, reads {:.1} GB/s, multiplies {:.0} GFLOP/s", kernels.name(), bandwidth / 1e9, products / 1e9);
    for (parallel, speed) in rows {
        let prefill = 2.0 * bytes.products as f64 * speed.prefill / products;
        print!("prefill {} tokens: {:.1} tokens/s ({:.0} % of the peak)", args.prompt, speed.prefill, 100.0 * prefill);
        print!(" · decode {parallel}: {:.1} tokens/s", speed.decode);
        if parallel == 1 {
            print!(" ({:.0} % of the bandwidth)", 100.0 * speed.decode * bytes.token as f64 / bandwidth);
        }
        println!();
    }
    Ok(())
}
