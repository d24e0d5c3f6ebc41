//! A composite on disk with other experts: what stays is taken from it as it lies there, and only what is new from models.
//!
//! Shared weights, fitted ones too, and the experts that stay keep their bytes. The new expert's are its model's, as they are or behind the norm
//! that the others share; nothing is fitted to it but the gates.

use std::collections::HashMap;

use upcycle_architectures::{Config, LayerRole, Role};
use upcycle_routers::gate::Gate;

use super::{Composite, Gates, Part, Plan, PlanError, Problem, Sources, composite};
use crate::source::Source;

/// The composite of `plan`, in which expert e is expert `stays[e]` of `written` or, without one, new. `plan` is in the classic layout and fits
/// nothing; its gates are still to be set, and are zeros until then.
pub fn changed(mut plan: Plan, mut sources: Sources, written: Source, stays: &[Option<usize>]) -> Result<Composite, PlanError> {
    let own = sources.all.len();
    let family = plan.family();
    let name = |role| family.name(role).unwrap_or_default();
    let roles: HashMap<String, Role> = family.tensors(&plan.config).into_iter().map(|(role, _)| (name(role), role)).collect();
    let mut problems = Vec::new();
    for planned in &mut plan.tensors {
        let there = match roles.get(&planned.name) {
            None => {
                let message = format!("tensor `{}` stacks experts; they come and go one by one in `layout: classic` only", planned.name);
                return Err(PlanError::Problems(vec![Problem { lint: None, message }]));
            }
            Some(Role::Layer(_, LayerRole::Router)) => continue,
            Some(Role::Layer(l, LayerRole::Expert(e, projection))) => {
                let Some(old) = stays.get(*e).copied().flatten() else {
                    behind(&mut planned.parts, &(own, name(Role::Layer(*l, LayerRole::PostNorm))));
                    continue;
                };
                name(Role::Layer(*l, LayerRole::Expert(old, *projection)))
            }
            _ => planned.name.clone(),
        };
        let found = written.weights.info(&there);
        if found.as_ref().is_none_or(|found| *found != planned.info) {
            let (location, wanted) = (written.location.display(), &planned.info);
            let found = found.map_or("missing".into(), |found| format!("{} {:?}", found.dtype, found.shape));
            let message = format!(
                "`{location}`: tensor `{there}` is {found}, the recipe beside it makes it {} {:?}: compose it anew",
                wanted.dtype, wanted.shape
            );
            problems.push(Problem { lint: None, message });
        }
        planned.parts = vec![Part::Tensor { source: own, tensor: there, noise: None, scale: None, fold: None }];
    }
    if !problems.is_empty() {
        problems.truncate(4);
        return Err(PlanError::Problems(problems));
    }
    let gates = zeros(&plan.config);
    sources.all.push(written);
    Ok(composite(plan, sources, gates, None).over(own))
}

/// Has what is folded stand behind this norm.
fn behind(parts: &mut [Part], norm: &(usize, String)) {
    for part in parts {
        if let Part::Tensor { fold: Some(fold), .. } = part {
            fold.shared = vec![norm.clone()];
        }
    }
}

/// Gates that say nothing.
fn zeros(config: &Config) -> Gates {
    let experts = config.moe.as_ref().map_or(0, |moe| moe.experts);
    let gate = Gate { experts, hidden: config.hidden, weight: vec![0.0; experts * config.hidden] };
    Gates { routed: vec![gate; config.layers], shared: Vec::new() }
}
