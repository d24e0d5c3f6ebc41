//! `upcycle eval`: how well models predict texts of several domains, and a recipe beside everything that it competes with.

use std::{
    path::{Path, PathBuf},
    sync::Mutex,
    time::Instant,
};

use anstream::{print, println};
use anyhow::{Context as _, bail};
use candle_core::DType;
use indicatif::{ProgressBar, ProgressStyle};
use upcycle::{
    calibrate,
    engine::{
        device::DtypeChoice,
        tokenizer::{Specials, Tokenizer},
    },
    inspect::{
        evaluate::{self, Evaluation, Setting, Text},
        perplexity,
        report::{Domain, Report},
    },
    plan::{self, Composite},
    recipe::{Recipe, Shared},
};
use upcycle_architectures::decoder::Decoder;
use upcycle_routers::init;

use super::{
    model::{self, DeviceArgs},
    recipe,
};

/// Arguments of `eval`.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// A recipe, a directory, a .gguf file, or owner/name; a recipe that comes first is compared with its base, experts, average and oracle
    #[arg(required = true)]
    models: Vec<String>,
    /// A text of one domain, held out from all training (repeatable); name it after its expert
    #[arg(long = "text", value_name = "DOMAIN=FILE", required = true, value_parser = named_file)]
    texts: Vec<NamedFile>,
    /// Tokens read in one piece
    #[arg(long, value_name = "TOKENS", default_value_t = 256, value_parser = clap::value_parser!(u32).range(2..))]
    window: u32,
    /// Pieces of each text, spread evenly over it
    #[arg(long, value_name = "N", default_value_t = 24, value_parser = clap::value_parser!(u32).range(1..))]
    windows: u32,
    /// Print JSON
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    options: recipe::Options,
    #[command(flatten)]
    device: DeviceArgs,
}

/// A text and its domain's name.
#[derive(Debug, Clone)]
pub(crate) struct NamedFile {
    pub(crate) name: String,
    pub(crate) file: PathBuf,
}

/// `NAME=FILE`, or `FILE`, whose name without its ending then names the domain.
pub(crate) fn named_file(text: &str) -> Result<NamedFile, String> {
    let (name, file) = match text.split_once('=') {
        Some((name, file)) => (name.trim().to_owned(), PathBuf::from(file)),
        None => (Path::new(text).file_stem().map(|stem| stem.to_string_lossy().into_owned()).unwrap_or_default(), PathBuf::from(text)),
    };
    if name.is_empty() || file.as_os_str().is_empty() { Err("write DOMAIN=FILE".into()) } else { Ok(NamedFile { name, file }) }
}

pub(crate) fn run(args: &Args) -> anyhow::Result<()> {
    args.device.set_threads()?;
    let texts = read(&args.texts)?;
    let dtype = match args.device.dtype {
        // Quality is measured in full precision unless another is asked for.
        DtypeChoice::Auto => DType::F32,
        DtypeChoice::Exactly(dtype) => dtype,
    };
    let progress = Progress::new();
    let setting = Setting { device: args.device.open()?, dtype, progress: &progress };
    let mut report = Report {
        domains: texts.iter().map(|(name, _)| Domain { name: name.clone(), expert: None, index: None }).collect(),
        ..Report::default()
    };
    let mut reference: Option<Vec<Text>> = None;
    for (at, model) in args.models.iter().enumerate() {
        if at == 0 && model::is_recipe(model) {
            let mut recipe = recipe::read(Path::new(model), &args.options)?;
            let composite = recipe::composite(&mut recipe, &args.options, &args.device)?;
            let base = composite.sources.base();
            let tokenizer = Tokenizer::open(&base.sidecars, &base.config)?;
            let mut windows = cut(&texts, &tokenizer, &args)?;
            assign(&mut windows, &mut report, &recipe);
            let hidden = hidden(&recipe, &args, &mut report)?;
            let evaluation = evaluate::recipe(&recipe, &composite, hidden.as_ref(), &report.experts, &windows, &setting)?;
            let Evaluation { rows, choices, notes } = evaluation;
            report.rows = rows;
            report.choices = choices;
            report.shared = recipe.shared;
            report.notes.extend(notes);
            reference = Some(windows);
        } else {
            let loaded = model::open(model, &args.options, &args.device)?;
            let tokenizer = Tokenizer::open(&loaded.sidecars, &loaded.config).with_context(|| loaded.name.clone())?;
            let windows = cut(&texts, &tokenizer, &args)?;
            let (row, choices) = evaluate::model(&loaded.name, (loaded.family, &loaded.config), &*loaded.weights, &windows, &setting)?;
            report.rows.push(row);
            if args.models.len() == 1
                && let Some(moe) = &loaded.config.moe
            {
                report.experts = (0..moe.experts).map(|e| e.to_string()).collect();
                report.choices = choices;
            }
            let first = reference.get_or_insert_with(|| windows.clone());
            if first.iter().zip(&windows).any(|(a, b)| a.windows != b.windows) {
                let note = "cuts the texts into other tokens than the first model: its perplexities cannot be compared";
                report.notes.push(format!("`{}` {note}", loaded.name));
            }
        }
    }
    progress.end();
    for (text, (name, _)) in reference.iter().flatten().zip(&texts) {
        let count = text.windows.len();
        if count < args.windows as usize {
            report.notes.push(format!("`{name}` has text for {count} windows of {} tokens, not {}", args.window, args.windows));
        }
    }
    if args.json {
        let mut json = report.json();
        json["window"] = args.window.into();
        json["windows"] = args.windows.into();
        println!("{json:#}");
    } else {
        print!("{}", report.markdown());
    }
    Ok(())
}

/// Names and contents.
fn read(files: &[NamedFile]) -> anyhow::Result<Vec<(String, String)>> {
    let mut texts: Vec<(String, String)> = Vec::new();
    for NamedFile { name, file } in files {
        let text = fs_err::read_to_string(file)?;
        if texts.iter().any(|(other, _)| other == name) {
            bail!("there are two texts named `{name}`: join the files, or name them apart (`--text NAME=FILE`)");
        }
        texts.push((name.clone(), text));
    }
    Ok(texts)
}

fn cut(texts: &[(String, String)], tokenizer: &Tokenizer, args: &Args) -> anyhow::Result<Vec<Text>> {
    let prefix: Vec<u32> = tokenizer.prefix()?.into_iter().collect();
    let cut = |(name, text): &(String, String)| {
        let tokens = tokenizer.encode(text, Specials::Written)?;
        let windows = perplexity::windows(&tokens, &prefix, args.window as usize, args.windows as usize);
        if windows.is_empty() {
            let (found, window) = (tokens.len(), args.window);
            bail!("text `{name}` has {found} tokens, too few for a window of {window}: give more text, or a smaller `--window`");
        }
        Ok(Text { name: name.clone(), windows, expert: None })
    };
    texts.iter().map(cut).collect()
}

/// Finds out which expert each text belongs to.
fn assign(texts: &mut [Text], report: &mut Report, recipe: &Recipe) {
    report.experts = calibrate::names(&recipe.experts.iter().collect::<Vec<_>>());
    let domains: Vec<&str> = report.domains.iter().map(|domain| domain.name.as_str()).collect();
    let (experts, by_order) = evaluate::match_experts(&domains, &report.experts);
    if by_order {
        let pairs: Vec<String> = domains.iter().zip(&report.experts).map(|(domain, expert)| format!("`{domain}` to `{expert}`")).collect();
        report.notes.push(format!("no text is named after an expert, so they were assigned in their order: {}", pairs.join(", ")));
    }
    for ((text, domain), expert) in texts.iter_mut().zip(&mut report.domains).zip(experts) {
        text.expert = expert;
        domain.index = expert;
        domain.expert = expert.map(|e| report.experts[e].clone());
        if expert.is_none() {
            report.notes.push(format!("`{}` belongs to no expert (it is named after none): it does not count for the mean", domain.name));
        }
    }
}

/// The composite that mergekit's `hidden` makes of the recipe, where that is another.
fn hidden(recipe: &Recipe, args: &Args, report: &mut Report) -> anyhow::Result<Option<Composite>> {
    let Some(method) = init::find("hidden") else { return Ok(None) };
    let theirs = Recipe { gate_mode: method, shared: Shared::Base, chat_template: None, ..recipe.clone() };
    if recipe.gate_mode.name == method.name && recipe.shared == Shared::Base && recipe.chat_template != Some(true) {
        report.notes.push("this recipe is mergekit's `hidden`, which therefore has no row of its own".into());
        return Ok(None);
    }
    if recipe.experts.iter().any(|expert| expert.positive_prompts.is_empty()) {
        report.notes.push("there is no row for mergekit's `hidden`, which needs prompts for every expert".into());
        return Ok(None);
    }
    let sources = recipe::open(&theirs)?;
    let plan = plan::plan(&theirs, &sources, &args.options.allow)?;
    let base = sources.base();
    let device = args.device.open()?;
    let decoder = || Decoder::load(base.family, &base.config, &*base.weights, args.device.dtype(&device, &base.config), &device);
    // What is to be said about these gates is not about the recipe's.
    let gates = calibrate::gates(&theirs, base, decoder)?.gates;
    Ok(Some(plan::composite(plan, sources, gates, None)))
}

/// A bar over the windows of a row on a terminal, a line per row elsewhere.
struct Progress {
    bar: ProgressBar,
    row: Mutex<Option<(String, Instant)>>,
}

impl Progress {
    fn new() -> Self {
        let style = ProgressStyle::with_template("{msg:24!} {wide_bar} {pos}/{len} windows {eta} left");
        let bar = ProgressBar::new(0).with_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()));
        Self { bar, row: Mutex::new(None) }
    }

    /// Says what the last row took.
    fn end(&self) {
        if let Some((row, start)) = self.row.lock().ok().and_then(|mut row| row.take()) {
            self.bar.suspend(|| tracing::info!("{row}: {:.1} s", start.elapsed().as_secs_f64()));
        }
        self.bar.finish_and_clear();
    }
}

impl evaluate::Progress for Progress {
    fn begin(&self, row: &str, windows: usize) {
        self.end();
        if let Ok(mut current) = self.row.lock() {
            *current = Some((row.to_owned(), Instant::now()));
        }
        self.bar.reset();
        self.bar.set_length(windows as u64);
        self.bar.set_message(row.to_owned());
    }

    fn advance(&self, windows: usize) {
        self.bar.inc(windows as u64);
    }
}
