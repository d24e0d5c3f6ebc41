//! How far the experts' attention has gone from the base's, looked up in a few tensors before anything is composed: it decides whether the base's
//! shared weights can stand for the experts', and what to say if they cannot.

use rayon::prelude::*;
use upcycle_architectures::{AttentionPart, LayerRole, Role, View, WeightsError};

use crate::{
    plan::Sources,
    recipe::{Recipe, Shared},
};

/// Elements of a tensor that are looked at: fine-tuning that changes a tensor changes all of it.
const ELEMENTS: usize = 1 << 18;

/// Beyond it, shared weights fitted in closed form no longer hold what the experts' own do: of the loss gap to the experts, fitted composites of
/// experts that had drifted by up to 0.06 and 0.17 kept 79 and 74 % where those of untouched attention kept 91 % (docs/log.md).
const FAR: f64 = 0.03;

/// ‖τ‖ / ‖W‖ of each expert's attention [E], τ being what was added to the base's W; in three layers, as a fine-tune that leaves those as they are
/// leaves all. Infinite where shapes differ.
pub fn drift(recipe: &Recipe, sources: &Sources) -> Result<Vec<f64>, WeightsError> {
    use AttentionPart::{K, O, Q, V};
    let base = sources.base();
    let last = base.config.layers.saturating_sub(1);
    let roles = [0, last / 2, last].into_iter().flat_map(|l| {
        let attention = [Q, K, V, O].map(|part| Role::Layer(l, LayerRole::Attention(part)));
        attention.into_iter().chain([Role::Layer(l, LayerRole::InputNorm)])
    });
    let names: Vec<String> = roles.filter_map(|role| base.family.name(role)).collect();
    // Of each tensor ‖W‖² and each expert's ‖τ‖².
    let squares = names.par_iter().map(|name| {
        let view = base.weights.read(name)?;
        let base = head(&view);
        let added = recipe.experts.iter().map(|expert| {
            let other = sources.get(&expert.source_model).weights.read(name)?;
            Ok(if other.info.shape == view.info.shape {
                base.iter().zip(head(&other)).map(|(a, b)| f64::from((a - b) * (a - b))).sum()
            } else {
                f64::INFINITY
            })
        });
        Ok((base.iter().map(|w| f64::from(w * w)).sum::<f64>(), added.collect::<Result<Vec<f64>, WeightsError>>()?))
    });
    let squares = squares.collect::<Result<Vec<_>, WeightsError>>()?;
    let own: f64 = squares.iter().map(|(own, _)| own).sum();
    let added = (0..recipe.experts.len()).map(|e| squares.iter().map(|(_, added)| added[e]).sum::<f64>());
    Ok(added.map(|added| if added > 0.0 { (added / own).sqrt() } else { 0.0 }).collect())
}

/// The first elements.
fn head(view: &View) -> Vec<f32> {
    let count = view.info.elements().min(ELEMENTS);
    let info = upcycle_architectures::TensorInfo { shape: vec![count], ..view.info.clone() };
    View { data: view.data.slice(..info.dtype.bytes(count)), info }.to_f32()
}

/// What `shared: auto` means for experts that have drifted so: `Fit` where the gates are fitted and an expert's attention is not the base's,
/// else `Base`.
pub fn settle(recipe: &Recipe, drift: &[f64]) -> Shared {
    match recipe.shared {
        Shared::Auto if recipe.fitted() && drift.iter().any(|drift| *drift > 0.0) => Shared::Fit,
        Shared::Auto => Shared::Base,
        shared => shared,
    }
}

/// What to say of such experts in a composite that shares attention so; `None` if all is well. `names` are the experts'.
pub fn advice(shared: Shared, drift: &[f64], names: &[String]) -> Option<String> {
    let (farthest, most) = drift.iter().enumerate().max_by(|a, b| a.1.total_cmp(b.1))?;
    let whose = format!("attention of expert `{}` has drifted by {:.1} % from the base's", names.get(farthest)?, 100.0 * most);
    match shared {
        Shared::Base if *most > 0.0 => Some(format!(
            "{whose}, which the composite uses: what attention learned is lost; `shared: fit` with `gate_mode: auto` keeps most of it"
        )),
        Shared::Average | Shared::Fit | Shared::Auto if *most > FAR => Some(format!(
            "{whose}, too far for shared weights to keep all that it learned: compare with `upcycle eval`, or serve whole experts \
             (`gate_mode: sequence`)"
        )),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn advice_is_for_those_who_need_it() {
        let names = ["code", "math"].map(str::to_owned);
        let said = |shared, drift: [f64; 2]| advice(shared, &drift, &names);
        assert_eq!(said(Shared::Base, [0.0, 0.0]), None);
        assert_eq!(said(Shared::Fit, [0.01, 0.02]), None);
        assert!(
            said(Shared::Base, [0.0, 0.002])
                .is_some_and(|line| line.contains("`math` has drifted by 0.2 %") && line.contains("shared: fit"))
        );
        assert!(
            said(Shared::Fit, [0.2, 0.1]).is_some_and(|line| line.contains("`code` has drifted by 20.0 %") && line.contains("sequence"))
        );
    }
}
