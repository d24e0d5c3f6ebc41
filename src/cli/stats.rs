//! `upcycle stats`: what the routers of a composite see in text of its experts' domains, gathered into a file, or merged from several.

use std::path::{Path, PathBuf};

use anstream::println;
use anyhow::{Context as _, bail};
use candle_core::DType;
use indicatif::HumanBytes;
use upcycle::{
    calibrate::{
        stats::{self, ExpertId, Fingerprint, Routing, Stats, StatsError},
        text::{self, Sequence, TextOptions},
    },
    engine::device::DtypeChoice,
    plan::{Composite, Gates},
    source::Source,
};
use upcycle_architectures::decoder::Decoder;
use upcycle_routers::init::Method;

use super::{
    composite::{self, Given},
    model::{DeviceArgs, Precision},
    recipe, texts, ui,
};

/// Tokens of each expert that are kept.
pub(crate) const KEEP: u32 = 2048;

/// Arguments of `stats`.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// A composite (a recipe, a directory, or owner/name) to gather statistics of, or .stats files to merge
    #[arg(required = true, value_name = "MODEL|FILE")]
    from: Vec<String>,
    /// Text of one expert's domain (.txt, or .jsonl with chats or texts; repeatable). Of a recipe, without any: its experts' own texts
    #[arg(long = "text", value_name = "EXPERT=FILE", value_parser = texts::named_file)]
    texts: Vec<texts::NamedFile>,
    /// The file to write; without it, .stats files are described
    #[arg(short, long, value_name = "FILE")]
    out: Option<PathBuf>,
    /// Tokens of each text that are read, spread evenly over it
    #[arg(long, value_name = "N", default_value_t = 8192, value_parser = clap::value_parser!(u32).range(1..))]
    tokens: u32,
    /// Tokens of each expert that are kept, drawn from those that were read
    #[arg(long, value_name = "N", default_value_t = KEEP, value_parser = clap::value_parser!(u32).range(1..))]
    keep: u32,
    /// Let the composite's own gates route, rather than force each text's expert: gates come out better, but what is gathered counts only as
    /// long as no expert changes
    #[arg(long)]
    own_routing: bool,
    #[command(flatten)]
    options: recipe::Options,
    #[command(flatten)]
    device: DeviceArgs,
}

pub(crate) fn run(args: &Args) -> anyhow::Result<()> {
    args.device.set_threads()?;
    let is_file = |from: &String| Path::new(from).extension().is_some_and(|end| end == "stats");
    let mut stats = if args.from.iter().all(is_file) {
        if !args.texts.is_empty() {
            bail!("`--text` needs the composite that it is to run through, not files of statistics");
        }
        merged(&args.from.iter().map(PathBuf::from).collect::<Vec<_>>())?
    } else {
        let [model] = &args.from[..] else { bail!("give one model, or only .stats files") };
        if args.out.is_none() {
            bail!("`--out FILE` says where the statistics go");
        }
        gathered(model, args)?
    };
    stats.limit(args.keep as usize);
    if let Some(out) = &args.out {
        stats.write(out)?;
        tracing::info!("wrote {}  {}", out.display(), HumanBytes(fs_err::metadata(out)?.len()));
    }
    println!("| expert | tokens | kept |\n|---|---:|---:|");
    for domain in &stats.experts {
        println!("| {} | {} | {} |", domain.expert.name, domain.seen(), domain.kept());
    }
    let (how, of) = match stats.routing {
        Routing::Forced => ("experts forced", "shared weights"),
        Routing::Own => ("the composite's own routing", "composite"),
    };
    let id: String = stats.composite.chars().filter(char::is_ascii_alphanumeric).take(12).collect();
    println!("\n{} routers of width {}, {how}; {of} {id}", stats.layers, stats.hidden);
    Ok(())
}

/// All files as one.
pub(crate) fn merged(files: &[PathBuf]) -> Result<Stats, StatsError> {
    let mut all: Option<Stats> = None;
    for file in files {
        let stats = stats::read(file)?;
        match &mut all {
            None => all = Some(stats),
            Some(all) => all.merge(&stats, &files[0].display().to_string(), &file.display().to_string())?,
        }
    }
    all.ok_or_else(|| std::io::Error::other("there are no files of statistics").into())
}

fn gathered(model: &str, args: &Args) -> anyhow::Result<Stats> {
    let dense = || StatsError::Dense { model: model.to_owned() };
    let given = composite::open(model, &args.options, &args.device)?.ok_or_else(dense)?;
    if given.composite.plan.config.moe.is_none() {
        return Err(dense().into());
    }
    let corpus = corpus(&given, args)?;
    let routing = if args.own_routing { Routing::Own } else { Routing::Forced };
    gather(&given.composite, &given.experts, &corpus, (routing, args.keep), &args.device)
}

/// Statistics of a composite, whose experts are called so, from texts of some of them; of each at most about so many tokens are kept.
pub(crate) fn gather(
    composite: &Composite,
    names: &[String],
    corpus: &[(usize, Vec<Sequence>)],
    (routing, keep): (Routing, u32),
    device: &DeviceArgs,
) -> anyhow::Result<Stats> {
    let plan = &composite.plan;
    let fingerprint = Fingerprint::of(plan.family(), &plan.config, composite)?;
    let mut stats = Stats {
        routing,
        composite: fingerprint.of_routing(routing),
        layers: plan.config.moe.iter().flat_map(|moe| &moe.sparse).filter(|sparse| **sparse).count(),
        hidden: plan.config.hidden,
        experts: Vec::new(),
    };
    if corpus.is_empty() {
        return Ok(stats);
    }
    let place = device.open()?;
    let dtype = match device.dtype {
        DtypeChoice::Auto => DType::F32,
        DtypeChoice::Exactly(dtype) => dtype,
    };
    let decoder = Decoder::load(plan.family(), &plan.config, composite, dtype, &place)?;
    let bar = ui::steps();
    for (e, sequences) in corpus {
        let expert = ExpertId { name: names[*e].clone(), weights: fingerprint.experts[*e].clone() };
        let forced = (routing == Routing::Forced).then_some(*e);
        bar.set_message(expert.name.clone());
        bar.set_length(sequences.iter().map(|sequence| sequence.tokens.len() as u64).sum());
        stats.experts.push(stats::gather(&decoder, (expert, forced), sequences, keep as usize, &|done| bar.set_position(done as u64))?);
    }
    bar.finish_and_clear();
    Ok(stats)
}

/// The gates of a composite all of whose layers are sparse, fitted to statistics of its experts, in their order.
pub(crate) fn gates(stats: &Stats, method: &Method) -> anyhow::Result<Gates> {
    let order: Vec<usize> = (0..stats.experts.len()).collect();
    let bar = ui::steps();
    bar.set_length(stats.layers as u64);
    let fitted = stats.gates(&order, method.candidates(), &|done| bar.set_position(done as u64))?;
    bar.finish_and_clear();
    Ok(Gates { routed: fitted.into_iter().map(|fitted| fitted.gate).collect(), shared: Vec::new() })
}

/// The texts, each with its expert: those of the command line, or else the recipe's.
fn corpus(given: &Given, args: &Args) -> anyhow::Result<Vec<(usize, Vec<Sequence>)>> {
    let options = TextOptions { tokens: args.tokens as usize, cache: Some(upcycle::env::cache()), ..TextOptions::default() };
    let composite = &given.composite;
    if let (Some(recipe), true) = (&given.recipe, args.texts.is_empty()) {
        let device = args.device.open()?;
        let decoder = |source: &Source| {
            let dtype = args.device.dtype(Precision::Fast, &device, &source.config);
            Decoder::load(source.family, &source.config, &*source.weights, dtype, &device)
        };
        let bar = ui::steps();
        let corpus = text::corpus(recipe, &composite.sources, &options, &decoder, &|doing| bar.set_message(doing.to_owned()))?;
        corpus.warnings.iter().for_each(|warning| bar.suspend(|| ui::warn(warning)));
        bar.finish_and_clear();
        return Ok(corpus.experts.into_iter().enumerate().collect());
    }
    let known = given.experts.iter().map(|name| format!("`{name}`")).collect::<Vec<_>>().join(", ");
    if args.texts.is_empty() {
        bail!("give text of at least one expert's domain: `--text EXPERT=FILE`; the experts are {known}");
    }
    let names: Vec<&str> = args.texts.iter().map(|text| text.name.as_str()).collect();
    let (matched, note) = texts::matched(&names, &given.experts);
    note.iter().for_each(ui::warn);
    let mut corpus: Vec<(usize, Vec<Sequence>)> = Vec::new();
    for (text, expert) in args.texts.iter().zip(matched) {
        let name = &text.name;
        let expert = expert.with_context(|| format!("text `{name}` belongs to no expert: name it after one of {known}"))?;
        if corpus.iter().any(|(other, _)| *other == expert) {
            bail!("there are two texts of expert `{}`: join the files, or merge their statistics", given.experts[expert]);
        }
        corpus.push((expert, text::read(&text.file, &composite.sources.base().sidecars, &composite.plan.config, &options)?));
    }
    Ok(corpus)
}
