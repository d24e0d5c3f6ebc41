//! `upcycle tune`: trains the gates of a composite, or its attention too, and writes an ordinary composite.

use std::{
    path::{Path, PathBuf},
    sync::Mutex,
    time::Instant,
};

use anstream::println;
use anyhow::bail;
use candle_core::DType;
use clap::ValueEnum;
use indicatif::{HumanBytes, HumanDuration, ProgressBar, ProgressStyle};
use upcycle::{
    engine::{device::DtypeChoice, tokenizer::Tokenizer},
    source::Source,
    tune::{self, Domain, Scope, Settings, Stage, Target, Task, TuneError, Tuned},
    write,
};
use upcycle_routers::init::DEFAULT_SEED;

use super::{
    compose, composite,
    model::DeviceArgs,
    recipe,
    texts::{self, TextArgs},
    ui,
};

/// In the output directory until it is written: what a run that was interrupted goes on with.
const CHECKPOINT: &str = ".upcycle-tune";

/// Arguments of `tune`.
#[derive(Debug, clap::Args)]
#[command(
    mut_arg("texts", |texts| texts.required(true).help("Text of one domain (repeatable); name it after its expert. A part of it is held out")),
    mut_arg("windows", |windows| windows.help("Pieces of each text that are held out, at most a tenth of it"))
)]
pub(crate) struct Args {
    /// A recipe, or a composite: a directory, or owner/name
    model: String,
    /// The directory to write
    #[arg(short, long, value_name = "DIR")]
    out: PathBuf,
    #[command(flatten)]
    texts: TextArgs,
    /// Train this beside the gates
    #[arg(long, value_name = "WHAT")]
    also: Option<Also>,
    /// Rank of the change to each matrix of attention
    #[arg(long, value_name = "N", default_value_t = 16, value_parser = clap::value_parser!(u32).range(1..))]
    rank: u32,
    /// Steps in which routers learn to tell the experts' texts apart, at most
    #[arg(long, value_name = "N", default_value_t = 50)]
    router_steps: u32,
    /// Steps on the language model's loss, at most
    #[arg(long, value_name = "N", default_value_t = 300)]
    steps: u32,
    /// Pieces of each text in a step
    #[arg(long, value_name = "N", default_value_t = 2, value_parser = clap::value_parser!(u32).range(1..))]
    batch: u32,
    /// A step changes a weight by about this part of its size
    #[arg(long, value_name = "RATE", default_value_t = 0.02)]
    learning_rate: f64,
    /// What to learn to expect: what stands in the text, or what the text's expert expects there (needs a recipe)
    #[arg(long, value_name = "WHAT", default_value = "text")]
    learn: Learn,
    /// Factor on the load-balance term: tokens are to spread over the experts
    #[arg(long, value_name = "FACTOR", default_value_t = 0.0)]
    balance: f64,
    /// Steps between evaluations on what is held out
    #[arg(long, value_name = "STEPS", default_value_t = 25, value_parser = clap::value_parser!(u32).range(1..))]
    evaluate_every: u32,
    /// Stop after so many evaluations without a gain
    #[arg(long, value_name = "N", default_value_t = 8, value_parser = clap::value_parser!(u32).range(1..))]
    patience: u32,
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

/// What can be trained beside the gates.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Also {
    /// The norms, and a change of low rank to q, k, v and o
    Attention,
}

/// What the language model's loss is taken against.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Learn {
    /// The text
    Text,
    /// The experts' predictions of it, each by its own model
    Experts,
}

pub(crate) fn run(args: &Args) -> anyhow::Result<()> {
    let start = Instant::now();
    args.device.set_threads()?;
    let files = args.texts.named()?;
    let checkpoint = args.out.join(CHECKPOINT);
    let options = write::Options {
        shard_size: args.out_shard_size,
        // An unfinished run's directory is not empty.
        overwrite: args.overwrite || checkpoint.exists(),
        allow_non_finite: args.options.allow.iter().any(|name| name == recipe::NON_FINITE),
        ..write::Options::default()
    };
    write::check_directory(&args.out, &options)?;
    for (_, file) in &files {
        fs_err::metadata(file)?;
    }
    let given = composite::open(&args.model, &args.options, &args.device)?.ok_or(TuneError::Dense)?;
    let domains = domains(&files, &given.experts, args.router_steps > 0 || args.learn == Learn::Experts)?;
    let teachers: Vec<&Source> =
        given.recipe.iter().flat_map(|recipe| &recipe.experts).map(|expert| given.composite.sources.get(&expert.source_model)).collect();
    if args.learn == Learn::Experts && teachers.is_empty() {
        bail!("`--learn experts` needs the experts' own models: give the recipe instead of `{}`", args.model);
    }
    let base = given.composite.sources.base();
    let device = args.device.open()?;
    let task = Task {
        composite: &given.composite,
        tokenizer: &Tokenizer::open(&base.sidecars, &given.composite.plan.config)?,
        domains: &domains,
        experts: &teachers,
        device,
        dtype: match args.device.dtype {
            DtypeChoice::Auto => DType::F32,
            DtypeChoice::Exactly(dtype) => dtype,
        },
    };
    let settings = Settings {
        scope: match args.also {
            None => Scope::Gates,
            Some(Also::Attention) => Scope::Attention { rank: args.rank as usize },
        },
        router_steps: args.router_steps as usize,
        steps: args.steps as usize,
        batch: args.batch as usize,
        window: args.texts.window as usize,
        held_out: args.texts.windows as usize,
        target: match args.learn {
            Learn::Text => Target::Text,
            Learn::Experts => Target::Experts,
        },
        rate: args.learning_rate,
        balance: args.balance,
        evaluate_every: args.evaluate_every as usize,
        patience: args.patience as usize,
        seed: args.options.random_seed.unwrap_or(DEFAULT_SEED),
    };
    fs_err::create_dir_all(&args.out)?;
    let progress = Progress::new();
    let tuned = tune::tune(&task, &settings, &checkpoint, &progress)?;
    progress.bar.finish_and_clear();
    if tuned.changed.is_empty() {
        ui::warn("nothing was gained on the text held out: the composite is written as it was given");
    }
    let written = write::write_with(
        &given.composite.replacing(tuned.changed.clone()),
        &composite::papers(&given, &note(&tuned, &settings, &domains)),
        &args.out,
        &write::Options { overwrite: true, ..options },
        &ui::WriteProgress::new(),
    )?;
    fs_err::remove_file(&checkpoint)?;
    print(&tuned, &domains);
    let bytes: u64 = written.shards.iter().map(|(_, bytes)| bytes).sum();
    tracing::info!("wrote {} to {} in {}", HumanBytes(bytes), args.out.display(), HumanDuration(start.elapsed()));
    ui::hint(format!("upcycle eval {} --text DOMAIN=FILE: on text that was not used here", args.out.display()));
    Ok(())
}

fn domains(files: &[(&str, &Path)], experts: &[String], labelled: bool) -> anyhow::Result<Vec<Domain>> {
    let (matched, note) = texts::matched(&files.iter().map(|(name, _)| *name).collect::<Vec<_>>(), experts);
    note.iter().for_each(ui::warn);
    let domain = |((name, file), expert): (&(&str, &Path), Option<usize>)| {
        if expert.is_none() && labelled {
            let experts = experts.iter().map(|name| format!("`{name}`")).collect::<Vec<_>>().join(", ");
            bail!(
                "text `{name}` belongs to no expert: name it after its expert ({experts}), or leave out what needs to know it \
                 (`--router-steps 0`, `--learn text`)"
            );
        }
        Ok(Domain { name: (*name).to_owned(), file: (*file).to_owned(), expert })
    };
    files.iter().zip(matched).map(domain).collect()
}

/// What was done, for the card; nothing if nothing was gained.
fn note(tuned: &Tuned, settings: &Settings, domains: &[Domain]) -> String {
    if tuned.changed.is_empty() {
        return String::new();
    }
    let what = match settings.scope {
        Scope::Gates => "the gates".to_owned(),
        Scope::Attention { rank } => format!("the gates, the norms and attention (changes of rank {rank})"),
    };
    let names = domains.iter().map(|domain| domain.name.as_str()).collect::<Vec<_>>().join(", ");
    let [before, after] = [&tuned.start, &tuned.best].map(|losses| tune::mean(losses).exp());
    format!(
        "\n## Tuned\n\n`upcycle tune` then trained {what} on {} tokens ({names}). Perplexity on text held out: {before:.2} before, {after:.2} after.\n",
        tuned.tokens
    )
}

fn print(tuned: &Tuned, domains: &[Domain]) {
    let row = |name: &str, losses: &[f64]| {
        let cells: String = losses.iter().chain([&tune::mean(losses)]).map(|loss| format!(" {:.2} |", loss.exp())).collect();
        println!("| {name} |{cells}");
    };
    println!("| held-out perplexity |{} geomean |", domains.iter().map(|domain| format!(" {} |", domain.name)).collect::<String>());
    println!("|---|{}", "---:|".repeat(domains.len() + 1));
    row("as given", &tuned.start);
    row("tuned", &tuned.best);
}

/// A bar over the steps on a terminal, a line per evaluation elsewhere.
struct Progress {
    bar: ProgressBar,
    since: Mutex<Since>,
}

/// What happened since the last evaluation.
struct Since {
    start: Instant,
    steps: usize,
    tokens: usize,
    loss: f64,
}

impl Since {
    fn now() -> Self {
        Self { start: Instant::now(), steps: 0, tokens: 0, loss: 0.0 }
    }

    /// Mean loss and speed.
    fn words(&self) -> String {
        let speed = self.tokens as f64 / self.start.elapsed().as_secs_f64();
        format!("loss {:.3}, {speed:.0} tokens/s", self.loss / self.steps.max(1) as f64)
    }
}

impl Progress {
    fn new() -> Self {
        let style = ProgressStyle::with_template("{prefix} {wide_bar} {pos}/{len} {msg} {eta} left");
        let bar = ProgressBar::new(0).with_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()));
        Self { bar, since: Mutex::new(Since::now()) }
    }
}

impl tune::Progress for Progress {
    fn begin(&self, stage: Stage, done: usize, steps: usize) {
        self.bar.reset();
        self.bar.set_length(steps as u64);
        self.bar.set_position(done as u64);
        self.bar.set_prefix(stage.to_string());
        if let Ok(mut since) = self.since.lock() {
            *since = Since::now();
        }
    }

    fn step(&self, loss: f64, tokens: usize) {
        self.bar.inc(1);
        if let Ok(mut since) = self.since.lock() {
            since.steps += 1;
            since.tokens += tokens;
            since.loss += loss;
            self.bar.set_message(since.words());
        }
    }

    fn evaluated(&self, stage: Stage, step: usize, loss: f64, best: bool) {
        let Ok(mut since) = self.since.lock() else { return };
        let perplexity = loss.exp();
        let best = if best { " (best)" } else { "" };
        let said = if step == 0 {
            format!("as given: held-out perplexity {perplexity:.3}")
        } else {
            format!("{stage}, step {step}: held-out perplexity {perplexity:.3}{best}; {}", since.words())
        };
        self.bar.suspend(|| tracing::info!("{said}"));
        *since = Since::now();
    }

    fn note(&self, message: &str) {
        self.bar.suspend(|| tracing::info!("{message}"));
    }
}
