//! What a recipe's composite needs besides its plan: gates, and where it asks for them fitted shared weights and repaired experts.

use std::path::{Path, PathBuf};

use candle_core::Device;
use sha2::{Digest as _, Sha256};

use super::{CalibrateError, store::Store, sweep::Sweep, text::Corpus};
use crate::{
    plan::{Plan, Sources},
    recipe::Recipe,
};

/// Counts changes of how composites are fitted, so that what is kept is not taken for what would be fitted now.
const VERSION: u32 = 5;

/// Runs the sweep, or takes what an earlier one of the same recipe, models and text left in `cache`. `progress` is told the layers done and
/// how many there are.
pub fn fit(
    recipe: &Recipe,
    plan: &Plan,
    sources: &Sources,
    corpus: &Corpus,
    device: &Device,
    cache: &Path,
    progress: &dyn Fn(usize, usize),
) -> Result<Store, CalibrateError> {
    fs_err::create_dir_all(cache)?;
    let kept: PathBuf = cache.join(format!("fit-{}.bin", key(recipe, plan, sources, corpus)));
    if let Some(store) = Store::open(&kept) {
        return Ok(store);
    }
    let experts = recipe.experts.iter().map(|expert| sources.get(&expert.source_model)).collect();
    let sweep = Sweep { recipe, plan, base: sources.base(), experts, device };
    let layers = sources.base().config.layers;
    let partial = kept.with_extension(format!("{}.partial", std::process::id()));
    let store = sweep.run(corpus, &partial, &kept, &|done| progress(done, layers));
    if store.is_err() {
        // What is left of a sweep that failed is of no use; the error says why it failed.
        let _ = fs_err::remove_file(&partial);
    }
    store
}

/// Of everything that decides what the sweep finds.
fn key(recipe: &Recipe, plan: &Plan, sources: &Sources, corpus: &Corpus) -> String {
    let mut parts = vec![VERSION.to_string(), recipe.to_json().to_string(), format!("{:?} {:?}", plan.dtype, recipe.shared)];
    for source in &sources.all {
        parts.extend(source.stamps());
    }
    for sequence in corpus.experts.iter().flatten() {
        parts.push(format!("{:?}{:?}{}", sequence.tokens, sequence.counts, sequence.opening));
    }
    parts.iter().fold(Sha256::new(), Sha256::chain_update).finalize().iter().map(|byte| format!("{byte:02x}")).collect()
}
