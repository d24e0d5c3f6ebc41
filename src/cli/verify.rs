//! `upcycle verify`: is a composite still what was written, and what its recipe's models make?

use std::path::PathBuf;

use anstream::println;
use anyhow::bail;
use serde_json::json;
use upcycle::{
    env,
    recipe::ModelRef,
    source::{self, Hub, OpenOptions, Source},
    write,
};

use super::{recipe, ui};

/// Arguments of `verify`.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// The directory that `compose` wrote
    composite: PathBuf,
    /// Check sizes, headers and checksums alone: the models that it was made of are not read
    #[arg(long)]
    no_sources: bool,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

pub(crate) fn run(args: &Args) -> anyhow::Result<()> {
    let place = args.composite.display();
    let written = source::open(&args.composite.display().to_string().parse()?, &OpenOptions::default())?;
    let open = |name: &str, base: Option<&Source>| -> anyhow::Result<Source> {
        if args.no_sources {
            bail!("not asked for");
        }
        let reference: ModelRef = name.parse()?;
        // What is not on this machine is not fetched to be compared.
        let hub = Some(Hub { offline: true, ..env::hub() });
        let beside = |reference: &ModelRef| recipe::beside(reference, &args.composite);
        let options = OpenOptions { base: base.map(|base| beside(&base.reference)), hub, progress: None };
        Ok(Source { reference: reference.clone(), ..source::open(&beside(&reference), &options)? })
    };
    let progress = ui::WriteProgress::new();
    let found = write::verify(written, open, &progress)?;
    progress.finish();
    if args.json {
        let (differences, absent) = (&found.differences, &found.absent);
        println!("{:#}", json!({"tensors": found.tensors, "compared": found.compared, "differences": differences, "absent": absent}));
    } else {
        found.differences.iter().for_each(|difference| println!("{difference}"));
    }
    if !args.no_sources {
        found.absent.iter().for_each(|absent| ui::warn(format!("not compared with {absent}")));
    }
    match found.differences.len() {
        0 => tracing::info!(
            "{place} is as it was written: {} tensors, {} of them compared with their sources",
            found.tensors,
            found.compared
        ),
        1 => bail!("{place} is not as it was written"),
        n => bail!("{place} is not as it was written: {n} differences"),
    }
    Ok(())
}
