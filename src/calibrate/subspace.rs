//! Routers from weights alone: of each expert and layer, the directions in which fine-tuning changed what its MLP reads.
//!
//! E experts, R directions, D hidden, F ffn.

use rayon::prelude::*;
use upcycle_architectures::{LayerRole, Projection, Role, Weights as _, WeightsError};
use upcycle_routers::{gate::Gate, init::subspace::directions};

use super::CalibrateError;
use crate::{
    plan::{Gates, Sources},
    recipe::Recipe,
    source::{Positioned, Source},
};

/// The directions of every layer's experts, [E R, D], in place of a gate. Experts and base are dense, as their plan has found. One change of
/// [2F, D] f32 is held per thread.
pub fn subspace(recipe: &Recipe, sources: &Sources) -> Result<Gates, CalibrateError> {
    let (base, experts) = (sources.base(), sources.experts(recipe));
    let hidden = base.config.hidden;
    let one = |at: usize| Ok(directions(&change(base, experts[at % experts.len()], at / experts.len())?, hidden));
    let all = (0..base.config.layers * experts.len()).into_par_iter().map(one).collect::<Result<Vec<_>, WeightsError>>()?;
    let gate = |layer: &[Vec<f32>]| {
        let weight = layer.concat();
        Gate { experts: weight.len() / hidden, hidden, weight }
    };
    Ok(Gates { routed: all.chunks(experts.len().max(1)).map(gate).collect(), shared: Vec::new() })
}

/// What fine-tuning added to the gate and up projections of a layer, [2F, D].
fn change(base: &Source, expert: &Source, layer: usize) -> Result<Vec<f32>, WeightsError> {
    let mut change = Vec::new();
    for projection in [Projection::Gate, Projection::Up] {
        let role = Role::Layer(layer, LayerRole::Mlp(projection));
        let read = |source: &Source| Positioned(source).read(&source.family.name(role).unwrap_or_default());
        let (before, after) = (read(base)?, read(expert)?);
        if before.info.shape != after.info.shape {
            let tensor = format!("{}: {}", expert.reference, expert.family.name(role).unwrap_or_default());
            return Err(WeightsError::Shape { tensor, expected: before.info.shape, found: after.info.shape });
        }
        let (before, after) = (before.to_f32(), after.to_f32());
        change.extend(after.iter().zip(&before).map(|(after, before)| after - before));
    }
    Ok(change)
}
