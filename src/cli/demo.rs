//! `upcycle demo`: composes the bundled experts, shows which takes which domain, answers a prompt.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
};

use anstream::println;
use anyhow::Context as _;
use upcycle::{
    engine::{Engine, Options, Text},
    inspect, write,
};

use super::{
    model::{self, DeviceArgs, Precision},
    recipe, ui,
};

/// Arguments of `demo`.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// The directory to write the composite into (replaced if it is there)
    #[arg(default_value = "upcycle-demo")]
    out: PathBuf,
    #[command(flatten)]
    device: DeviceArgs,
}

/// What the demo asks: the start of a text in each expert's manner.
const PROMPTS: [&str; 2] = ["Problem: Compute 12 + 30.\n", "And God said unto Moses, "];

pub(crate) fn run(args: &Args) -> anyhow::Result<()> {
    args.device.set_threads()?;
    let bundle = bundle()?;
    // That these experts' attention has drifted is known, and nothing that a first look should begin with.
    let options = recipe::Options { allow: vec!["drift".to_owned()], ..recipe::Options::default() };
    let mut recipe = recipe::read(&bundle.join("recipe.yml"), &options)?;
    let names: Vec<String> = recipe.experts.iter().map(|expert| expert.source_model.path.trim_start_matches("./").to_owned()).collect();

    println!("Composing four fine-tunes of one tiny base ({}) into one model.", names.join(", "));
    let composite = recipe::composite(&mut recipe, &options, &args.device)?;
    let overwrite = write::Options { overwrite: true, ..write::Options::default() };
    write::write(&composite, &recipe, &args.out, &overwrite, &ui::WriteProgress::new())?;
    let (all, active) = composite.plan.parameters();
    println!("Wrote {}: {:.1} M parameters, {:.1} M active per token.\n", args.out.display(), all as f64 / 1e6, active as f64 / 1e6);

    let loaded = model::open(&args.out.to_string_lossy(), &options, &args.device)?;
    let decoder = model::load_decoder(&loaded, &args.device, Precision::Fast)?;
    let text = Text::open(&loaded.sidecars, &loaded.config)?;
    let most = 100 / composite.plan.top_k();
    println!("Which expert takes which text (share of the choices, mean over layers; {most}% is every token's):\n");
    println!("{:<10}{}", "text", names.iter().map(|name| format!("{name:>9}")).collect::<String>());
    for (domain, sample) in samples(&bundle)? {
        let load = inspect::load(&decoder, &text.prompt(&sample)?)?;
        let shares: String = (0..names.len())
            .map(|e| load.iter().map(|layer| layer.shares()[e]).sum::<f64>() / load.len() as f64)
            .map(|share| format!("{:>8.0}%", share * 100.0))
            .collect();
        println!("{domain:<10}{shares}");
    }
    let engine = Engine::start(decoder, text, Options::default())?;
    for prompt in PROMPTS {
        let text = engine.generate(prompt, 48)?;
        println!("\n> {}\n{}", prompt.trim_end(), text.trim());
    }
    println!("\nServe it:   upcycle serve {}", args.out.display());
    println!("Talk to it: upcycle run {} \"Problem: Compute 7 * 6.\" --raw", args.out.display());
    Ok(())
}

/// The folder `demo/` of the repository: above the binary, above the working directory, or where it was when this was built.
fn bundle() -> anyhow::Result<PathBuf> {
    let binary = std::env::current_exe()?;
    let here = std::env::current_dir()?;
    let built = Path::new(env!("CARGO_MANIFEST_DIR"));
    let places = binary.ancestors().chain(here.ancestors()).chain([built]).map(|place| place.join("demo"));
    places
        .into_iter()
        .find(|place| place.join("recipe.yml").exists() && place.join("samples.json").exists())
        .context("the bundled experts (folder `demo/` of the repository) are not beside this binary; run it inside a clone")
}

fn samples(bundle: &Path) -> anyhow::Result<BTreeMap<String, String>> {
    let file = bundle.join("samples.json");
    serde_json::from_slice(&fs_err::read(&file)?).with_context(|| file.display().to_string())
}
