//! `upcycle eval`: how well models predict texts of several domains, and a recipe beside everything that it competes with.

use std::{
    path::{Path, PathBuf},
    sync::Mutex,
    time::Instant,
};

use anstream::{print, println};
use anyhow::Context as _;
use candle_core::DType;
use indicatif::{ProgressBar, ProgressStyle};
use upcycle::{
    calibrate,
    engine::{device::DtypeChoice, tokenizer::Tokenizer},
    inspect::{
        evaluate::{self, Setting, Text},
        report::{Domain, Report},
    },
    plan::{self, Composite},
    recipe::{Recipe, Shared},
    source::Source,
    write,
};
use upcycle_architectures::{Dtype, decoder::Decoder};
use upcycle_routers::init::{self, Runtime};

use super::{
    model::{self, DeviceArgs, Precision, QuantizeArgs},
    recipe,
    texts::{self, TextArgs},
};

/// Arguments of `eval`.
#[derive(Debug, clap::Args)]
#[command(mut_arg("texts", |texts| texts.required(true)))]
pub(crate) struct Args {
    /// A recipe, a directory, a .gguf file, or owner/name; a recipe that comes first is compared with its base, experts, average and oracle
    #[arg(required = true)]
    models: Vec<String>,
    #[command(flatten)]
    texts: TextArgs,
    /// Print JSON
    #[arg(long)]
    json: bool,
    /// Put the table on the card of the composite in this directory, too
    #[arg(long, value_name = "DIR")]
    write_card: Option<PathBuf>,
    #[command(flatten)]
    options: recipe::Options,
    #[command(flatten)]
    quantize: QuantizeArgs,
    #[command(flatten)]
    device: DeviceArgs,
}

pub(crate) fn run(args: &Args) -> anyhow::Result<()> {
    args.device.set_threads()?;
    let texts = args.texts.read()?;
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
        // What a recipe is compared with is not quantised.
        if at == 0 && model::is_recipe(model) && args.quantize.quantize.is_none() {
            let mut recipe = recipe::read(Path::new(model), &args.options)?;
            reference = Some(if recipe.gate_mode.runtime() == Some(Runtime::Sequence) {
                sequence(&recipe, &texts, args, &setting, &mut report)?
            } else {
                composite(&mut recipe, &texts, args, &setting, &mut report)?
            });
        } else {
            let loaded = args.quantize.apply(model::open(model, &args.options, &args.device)?);
            let tokenizer = Tokenizer::open(&loaded.sidecars, &loaded.config).with_context(|| loaded.name.clone())?;
            let windows = args.texts.cut(&texts, &tokenizer)?;
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
        if count < args.texts.windows as usize {
            report.notes.push(format!("`{name}` has text for {count} windows of {} tokens, not {}", args.texts.window, args.texts.windows));
        }
    }
    if let Some(composite) = &args.write_card {
        write::evaluated(composite, &report.markdown())?;
    }
    if args.json {
        let mut json = report.json();
        json["window"] = args.texts.window.into();
        json["windows"] = args.texts.windows.into();
        println!("{json:#}");
    } else {
        print!("{}", report.markdown());
    }
    Ok(())
}

/// The rows of a recipe with a composite; gives what was read.
fn composite(
    recipe: &mut Recipe,
    texts: &[(String, String)],
    args: &Args,
    setting: &Setting<'_>,
    report: &mut Report,
) -> anyhow::Result<Vec<Text>> {
    // mergekit would not choose another number of experts per token, as the fit may.
    let experts_per_token = recipe.experts_per_token;
    let composite = recipe::composite(recipe, &args.options, &args.device)?;
    let windows = cut(recipe, composite.sources.base(), texts, args, report)?;
    let hidden = hidden(&Recipe { experts_per_token, ..recipe.clone() }, args, report)?;
    report.shared = recipe.shared;
    report.fitted = recipe.fitted();
    report.add(evaluate::recipe(recipe, &composite, hidden.as_ref(), &report.experts, &windows, setting)?);
    Ok(windows)
}

/// The rows of a recipe whose experts answer whole sequences; gives what was read.
fn sequence(
    recipe: &Recipe,
    texts: &[(String, String)],
    args: &Args,
    setting: &Setting<'_>,
    report: &mut Report,
) -> anyhow::Result<Vec<Text>> {
    let (sources, plan) = recipe::sequence(recipe, &args.options)?;
    let windows = cut(recipe, sources.base(), texts, args, report)?;
    let dtype = recipe.dtype.or(sources.base().config.dtype).unwrap_or(Dtype::Bf16);
    let ensemble = {
        let precise = DeviceArgs { dtype: DtypeChoice::Exactly(setting.dtype), ..args.device.clone() };
        model::load_ensemble(&model::sequence(&recipe.file, recipe, &sources, plan), &precise, Precision::Full)?
    };
    report.sequence = true;
    report.add(evaluate::sequence(recipe, (&sources, dtype), &ensemble, &report.experts, &windows, setting)?);
    if let Some(hidden) = hidden(recipe, args, report)? {
        report.rows.push(evaluate::mergekit(&hidden, &windows, setting)?);
        report.rows.sort_by_key(|row| row.kind);
    }
    Ok(windows)
}

/// The windows of each text in the base's tokens, and which expert each text belongs to.
fn cut(recipe: &Recipe, base: &Source, texts: &[(String, String)], args: &Args, report: &mut Report) -> anyhow::Result<Vec<Text>> {
    let mut windows = args.texts.cut(texts, &Tokenizer::open(&base.sidecars, &base.config)?)?;
    assign(&mut windows, report, recipe);
    Ok(windows)
}

/// Finds out which expert each text belongs to.
fn assign(windows: &mut [Text], report: &mut Report, recipe: &Recipe) {
    report.experts = calibrate::names(&recipe.experts.iter().collect::<Vec<_>>());
    report.notes.extend(texts::assign(windows, &report.experts));
    for (text, domain) in windows.iter().zip(&mut report.domains) {
        domain.index = text.expert;
        domain.expert = text.expert.map(|e| report.experts[e].clone());
        if text.expert.is_none() {
            report.notes.push(format!("`{}` belongs to no expert (it is named after none): it does not count for the mean", domain.name));
        }
    }
}

/// The composite that mergekit's `hidden` makes of the recipe, where that is another.
fn hidden(recipe: &Recipe, args: &Args, report: &mut Report) -> anyhow::Result<Option<Composite>> {
    let Some(method) = init::find("hidden") else { return Ok(None) };
    let theirs = Recipe { gate_mode: method, shared: Shared::Base, repair: None, chat_template: None, ..recipe.clone() };
    let same = recipe.gate_mode.name == method.name && recipe.shared == Shared::Base;
    if same && recipe.repair != Some(true) && recipe.chat_template != Some(true) {
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
    let decoder =
        || Decoder::load(base.family, &base.config, &*base.weights, args.device.dtype(Precision::Full, &device, &base.config), &device);
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
