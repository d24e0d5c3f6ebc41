//! What a recipe's composite needs besides its plan: gates, and where it asks for them fitted shared weights and repaired experts.

use std::path::{Path, PathBuf};

use candle_core::Device;
use sha2::{Digest as _, Sha256};
use upcycle_architectures::{AttentionPart, LayerRole, Role, WeightsError};

use super::{CalibrateError, store::Store, sweep::Sweep, text::Corpus};
use crate::{
    plan::{Plan, Sources},
    recipe::{Recipe, Shared},
};

/// Counts changes of how composites are fitted, so that what is kept is not taken for what would be fitted now.
const VERSION: u32 = 1;

/// What `shared: auto` means for these models: `Fit` where the gates are fitted and an expert's attention is not the base's, else `Base`.
/// Three layers are looked at: a fine-tune that leaves those as they are leaves all.
pub fn settle(recipe: &Recipe, sources: &Sources) -> Result<Shared, WeightsError> {
    use AttentionPart::{K, O, Q, V};
    if recipe.shared != Shared::Auto {
        return Ok(recipe.shared);
    }
    if !recipe.fitted() {
        return Ok(Shared::Base);
    }
    let base = sources.base();
    let last = base.config.layers.saturating_sub(1);
    for l in [0, last / 2, last] {
        let attention = [Q, K, V, O].map(|part| Role::Layer(l, LayerRole::Attention(part)));
        for role in attention.into_iter().chain([Role::Layer(l, LayerRole::InputNorm)]) {
            let Some(name) = base.family.name(role) else { continue };
            let own = base.weights.read(&name)?;
            for expert in &recipe.experts {
                let other = sources.get(&expert.source_model).weights.read(&name)?;
                if own.info != other.info || own.data != other.data {
                    return Ok(Shared::Fit);
                }
            }
        }
    }
    Ok(Shared::Base)
}

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
        parts.push(format!("{:?}{:?}", sequence.tokens, sequence.counts));
    }
    parts.iter().fold(Sha256::new(), Sha256::chain_update).finalize().iter().map(|byte| format!("{byte:02x}")).collect()
}
