//! `upcycle inspect`: what a model is made of, where its tokens go, how its experts compare; logits of given tokens for parity checks.

use std::{
    collections::HashMap,
    path::{Path, PathBuf},
    sync::Arc,
};

use anstream::println;
use anyhow::Context as _;
use candle_core::DType;
use indicatif::{HumanBytes, ProgressBar, ProgressStyle};
use serde_json::json;
use upcycle::{
    calibrate,
    engine::tokenizer::Tokenizer,
    inspect::{
        self, Similarity,
        inspection::{GateReport, Inspection},
    },
    plan::Sources,
    recipe::Recipe,
    source::Source,
};
use upcycle_architectures::decoder::{LanguageModel, Logits, NoProbe, Step};
use upcycle_routers::{diagnose, init::Runtime};

use super::{
    model::{self, DeviceArgs, KvArgs, Loaded, Precision},
    recipe,
    texts::{self, TextArgs},
    ui,
};

/// Arguments of `inspect`.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// A recipe, a directory, a .gguf file, or owner/name
    model: String,
    /// Print JSON
    #[arg(long)]
    json: bool,
    /// Write a page with everything, to be looked at in a browser
    #[arg(long, value_name = "FILE")]
    html: Option<PathBuf>,
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
    texts: TextArgs,
    #[command(flatten)]
    options: recipe::Options,
    #[command(flatten)]
    kv: KvArgs,
    #[command(flatten)]
    device: DeviceArgs,
}

pub(crate) fn run(args: &Args) -> anyhow::Result<()> {
    args.device.set_threads()?;
    let texts = args.texts.read()?;
    let (loaded, of_recipe) = open(args)?;
    if let (Some(ids), Some(out)) = (&args.logits, &args.out) {
        return if loaded.experts.is_empty() {
            logits(&args.kv.decoder(model::load_decoder(&loaded, &args.device, Precision::Full)?, Precision::Full)?, args, ids, out)
        } else {
            logits(&args.kv.ensemble(model::load_ensemble(&loaded, &args.device, Precision::Full)?, Precision::Full)?, args, ids, out)
        };
    }
    let whole: Vec<_> = loaded.experts.iter().map(|one| inspect::summary(one.family, &one.config, &*one.weights)).collect();
    let summary = inspect::together(&whole).unwrap_or_else(|| inspect::summary(loaded.family, &loaded.config, &*loaded.weights));
    let (names, similarity) = of_recipe.map_or((None, None), |compared| (Some(compared.names), compared.similarity));
    let experts = names.unwrap_or_else(|| (0..summary.experts).map(|e| e.to_string()).collect());
    let gates = if whole.is_empty() { inspect::gates(loaded.family, &loaded.config, &*loaded.weights)? } else { Vec::new() };
    let diagnosis = diagnose::diagnose(&gates);
    let warnings = diagnose::warnings(&diagnosis, &experts.iter().map(String::as_str).collect::<Vec<_>>());
    let sparse = (0..loaded.config.layers).filter(|&l| loaded.config.moe.as_ref().is_some_and(|moe| moe.sparse[l]));
    let gates = sparse.zip(diagnosis).map(|(layer, diagnosis)| GateReport { layer, diagnosis }).collect();
    let model = loaded.name.clone();
    let mut inspection = Inspection { model, summary, experts, gates, warnings, texts: Vec::new(), head_room: Vec::new(), similarity };
    if !texts.is_empty() && loaded.config.moe.is_none() && loaded.experts.is_empty() {
        ui::warn("texts have no effect: a dense model routes nothing (`upcycle eval` says how well it predicts them)");
    } else if !texts.is_empty() {
        follow(&mut inspection, &texts, &loaded, args)?;
    }
    if let Some(file) = &args.html {
        let tokenizer = Arc::new(Tokenizer::open(&loaded.sidecars, &loaded.config)?);
        fs_err::write(file, inspect::page(&inspection, &tokenizer)?)?;
        tracing::info!("wrote {}", file.display());
    }
    if args.json {
        let mut tensors: Vec<_> = loaded.weights.names();
        tensors.sort();
        let mut json = json!(inspection);
        json["tensors"] = json!(tensors);
        println!("{json:#}");
        return Ok(());
    }
    print(&inspection, &loaded);
    inspection.warnings.iter().for_each(ui::warn);
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

/// A recipe's experts.
struct Compared {
    names: Vec<String>,
    /// `None` if it was not asked for, or the models differ in size
    similarity: Option<Similarity>,
}

/// The model; of a recipe also the experts' names and how they compare.
fn open(args: &Args) -> anyhow::Result<(Loaded, Option<Compared>)> {
    if !model::is_recipe(&args.model) {
        return Ok((model::open(&args.model, &args.options, &args.device)?, None));
    }
    let path = Path::new(&args.model);
    let mut recipe = recipe::read(path, &args.options)?;
    if recipe.gate_mode.runtime() == Some(Runtime::Sequence) {
        let (sources, plan) = recipe::sequence(&recipe, &args.options)?;
        let alike = |source: &&Source| source.family.tensors(&source.config) == sources.base().family.tensors(&sources.base().config);
        let compared = args.logits.is_none() && sources.experts(&recipe).iter().all(alike);
        let similarity = if compared { Some(compare(&recipe, &sources)?) } else { None };
        let loaded = model::sequence(path, &recipe, &sources, plan);
        let names = loaded.names.clone();
        return Ok((loaded, Some(Compared { names, similarity })));
    }
    let composite = recipe::composite(&mut recipe, &args.options, &args.device)?;
    let names = calibrate::names(&recipe.experts.iter().collect::<Vec<_>>());
    let similarity = if args.logits.is_none() { Some(compare(&recipe, &composite.sources)?) } else { None };
    Ok((model::composed(path, &recipe, composite), Some(Compared { names, similarity })))
}

fn compare(recipe: &Recipe, sources: &Sources) -> anyhow::Result<Similarity> {
    let bar = bar("comparing experts", "tensors");
    let similarity = inspect::similarity(sources.base(), &sources.experts(recipe), &|done, all| {
        bar.set_length(all as u64);
        bar.set_position(done as u64);
    })?;
    bar.finish_and_clear();
    Ok(similarity)
}

/// Runs the texts through the model.
fn follow(inspection: &mut Inspection, texts: &[(String, String)], loaded: &Loaded, args: &Args) -> anyhow::Result<()> {
    let tokenizer = Tokenizer::open(&loaded.sidecars, &loaded.config)?;
    let mut windows = args.texts.cut(texts, &tokenizer)?;
    if let Some(note) = texts::assign(&mut windows, &inspection.experts) {
        tracing::info!("{note}");
    }
    let bar = bar("reading texts", "windows");
    bar.set_length(windows.iter().map(|text| text.windows.len() as u64).sum());
    let traffic = if loaded.experts.is_empty() {
        inspect::traffic(
            &args.kv.decoder(model::load_decoder(loaded, &args.device, Precision::Full)?, Precision::Full)?,
            &windows,
            &mut || bar.inc(1),
        )?
    } else {
        inspect::answers(
            &args.kv.ensemble(model::load_ensemble(loaded, &args.device, Precision::Full)?, Precision::Full)?,
            &windows,
            &mut || bar.inc(1),
        )?
    };
    inspection.add(&windows, traffic);
    bar.finish_and_clear();
    Ok(())
}

fn bar(doing: &'static str, what: &str) -> ProgressBar {
    let style = ProgressStyle::with_template(&format!("{{msg:20!}} {{wide_bar}} {{pos}}/{{len}} {what} {{eta}} left"));
    ProgressBar::new(0).with_message(doing).with_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()))
}

fn print(inspection: &Inspection, loaded: &Loaded) {
    let (summary, architecture) = (&inspection.summary, loaded.family.architecture);
    let whole = !loaded.experts.is_empty();
    println!("model       {}", inspection.model);
    println!("family      {} ({architecture})", summary.family);
    println!("layers      {}, hidden {}, ffn {}", summary.layers, summary.hidden, summary.ffn);
    println!("attention   {} heads of {}, {} for keys and values", summary.heads, summary.head_dim, summary.kv_heads);
    println!("vocabulary  {}", summary.vocabulary);
    println!("parameters  {:.3} B, {:.3} B active per token", summary.parameters as f64 / 1e9, summary.active_parameters as f64 / 1e9);
    for (part, bytes) in &summary.bytes {
        println!("  {part:<14}{}", HumanBytes(*bytes));
    }
    if summary.experts == 0 {
        return;
    }
    let shared = summary.shared_expert_ffn.map_or(String::new(), |ffn| format!(", and a shared one of width {ffn}"));
    if whole {
        println!("experts     {} whole models, 1 per sequence", summary.experts);
    } else {
        println!("experts     {}, {} per token{shared}", summary.experts, summary.experts_per_token);
    }
    let names = &inspection.experts;
    let gates = inspection.gates.iter().map(|gate| {
        let widest = gate.diagnosis.pairs.iter().max_by(|x, y| x.cosine.abs().total_cmp(&y.cosine.abs()));
        let pair = widest.map_or(String::new(), |pair| format!("{:.3} ({}, {})", pair.cosine, names[pair.a], names[pair.b]));
        vec![gate.layer.to_string(), format!("{:.2}", gate.diagnosis.condition), pair]
    });
    if !inspection.gates.is_empty() {
        table("gates", &["layer", "condition", "largest cosine of two experts"], gates);
    }
    let percents = |shares: &[f64]| shares.iter().map(|share| format!("{:.0} %", share * 100.0)).collect::<Vec<_>>().join("  ");
    for text in &inspection.texts {
        let own = text.expert.map_or(String::new(), |e| format!(", of `{}`", names[e]));
        let rows = text.layers.iter().enumerate().filter_map(|(l, layer)| {
            let layer = layer.as_ref()?;
            let right = text.expert.map_or(String::new(), |e| format!("{:.0} %", layer.first[e] * 100.0));
            let effective = format!("{:.2}", layer.effective_experts);
            let layer_name = if whole { "all".to_owned() } else { l.to_string() };
            Some(vec![layer_name, right, effective, format!("{:.2}", layer.entropy), percents(&layer.load)])
        });
        let load = format!("load of {}", names.join(", "));
        table(
            &format!("text        `{}`{own}, {} tokens", text.name, text.tokens),
            &["layer", "right", "effective", "entropy", &load],
            rows,
        );
    }
    let head_room = inspection.head_room.iter().enumerate().filter_map(|(l, value)| Some(vec![l.to_string(), format!("{:.3}", (*value)?)]));
    if head_room.clone().next().is_some() {
        table("head-room   variance of the experts' outputs over the square of their mean", &["layer", "head-room"], head_room);
    }
    if let Some(Similarity { mlp, shared, drift, .. }) = &inspection.similarity {
        let header: Vec<&str> = std::iter::once("").chain(names.iter().map(String::as_str)).collect();
        for (title, cosines) in [
            ("MLPs        cosines of what fine-tuning added to them", mlp),
            ("shared      cosines of what it added to the shared weights", shared),
        ] {
            let figures = |row: &Vec<f64>| row.iter().map(|cosine| format!("{cosine:.2}")).collect::<Vec<_>>();
            table(title, &header, names.iter().zip(cosines).map(|(name, row)| [vec![name.clone()], figures(row)].concat()));
        }
        let rows = drift.iter().map(|drift| {
            let figures = drift.experts.iter().map(|share| format!("{:.1} %", share * 100.0)).collect();
            [vec![drift.module.to_owned()], figures].concat()
        });
        table("drift       how much it added, relative to the base's weights", &header, rows);
    }
}

/// A title, then columns below it.
fn table(title: &str, header: &[&str], rows: impl Iterator<Item = Vec<String>>) {
    let header = header.iter().map(ToString::to_string).collect();
    let rows: Vec<Vec<String>> = std::iter::once(header).chain(rows).collect();
    let columns = rows[0].len();
    let widths: Vec<usize> = (0..columns).map(|c| rows.iter().map(|row| row[c].chars().count()).max().unwrap_or(0)).collect();
    println!("{title}");
    for row in rows {
        let cells: Vec<String> = row.iter().zip(&widths).map(|(cell, width)| format!("{cell:>width$}")).collect();
        println!("            {}", cells.join("  "));
    }
}

fn logits(model: &impl LanguageModel, args: &Args, ids: &Path, out: &Path) -> anyhow::Result<()> {
    let text = fs_err::read_to_string(ids)?;
    let tokens: Vec<u32> = serde_json::from_str(&text).with_context(|| format!("{} is no JSON list of token ids", ids.display()))?;
    let mut cache = model.cache();
    let chunks: Vec<&[u32]> = if args.decode { tokens.chunks(1).collect() } else { vec![&tokens] };
    let mut rows = Vec::new();
    for tokens in chunks {
        let step = Step { tokens, cache: &mut cache, logits: Logits::All };
        rows.push(model.forward(&mut [step], &mut NoProbe)?);
    }
    let logits = candle_core::Tensor::cat(&rows, 0)?.to_dtype(DType::F32)?;
    candle_core::safetensors::save(&HashMap::from([("logits", logits)]), out)?;
    Ok(())
}
