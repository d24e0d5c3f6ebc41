//! What a model is made of, from headers and gates.

use std::collections::BTreeMap;

use serde::Serialize;
use upcycle_architectures::{Config, Family, LayerRole, Role, Weights, WeightsError};
use upcycle_routers::gate::Gate;

/// Family, sizes and parameter counts of a model.
#[derive(Debug, Clone, Serialize)]
pub struct Summary {
    /// `model_type`
    pub family: &'static str,
    /// L
    pub layers: usize,
    /// D
    pub hidden: usize,
    /// H
    pub heads: usize,
    /// key/value heads
    pub kv_heads: usize,
    /// size of a head
    pub head_dim: usize,
    /// F of an expert, or of the dense MLP
    pub ffn: usize,
    /// V
    pub vocabulary: usize,
    /// E; 0 if dense
    pub experts: usize,
    /// K; 0 if dense
    pub experts_per_token: usize,
    /// whether there is a shared expert, and its F
    pub shared_expert_ffn: Option<usize>,
    /// parameters in all
    pub parameters: u64,
    /// parameters that one token uses
    pub active_parameters: u64,
    /// bytes by part of the model
    pub bytes: BTreeMap<&'static str, u64>,
    /// element types
    pub dtypes: BTreeMap<&'static str, usize>,
}

/// Adds up what the family's tensors are, by what they are for.
pub fn summary(family: &Family, config: &Config, weights: &dyn Weights) -> Summary {
    let mut summary = Summary {
        family: family.model_type,
        layers: config.layers,
        hidden: config.hidden,
        heads: config.heads,
        kv_heads: config.kv_heads,
        head_dim: config.head_dim,
        ffn: config.moe.as_ref().map_or(config.ffn, |moe| moe.ffn),
        vocabulary: config.vocab,
        experts: config.moe.as_ref().map_or(0, |moe| moe.experts),
        experts_per_token: config.moe.as_ref().map_or(0, |moe| moe.top_k),
        shared_expert_ffn: config.moe.as_ref().and_then(|moe| moe.shared_ffn),
        parameters: 0,
        active_parameters: 0,
        bytes: BTreeMap::new(),
        dtypes: BTreeMap::new(),
    };
    let share = config.moe.as_ref().map_or(1.0, |moe| moe.top_k as f64 / moe.experts as f64);
    for (role, shape) in family.tensors(config) {
        let elements = shape.iter().product::<usize>() as u64;
        let expert = matches!(role, Role::Layer(_, LayerRole::Expert(..)));
        summary.parameters += elements;
        summary.active_parameters += if expert { (elements as f64 * share) as u64 } else { elements };
        let part = match role {
            Role::Embedding => "embedding",
            Role::Head => "head",
            Role::FinalNorm | Role::Layer(_, LayerRole::InputNorm | LayerRole::PostNorm) => "norms",
            Role::Layer(_, LayerRole::Attention(_)) => "attention",
            Role::Layer(_, LayerRole::Mlp(_) | LayerRole::MlpBias(_)) => "mlp",
            Role::Layer(_, LayerRole::Router | LayerRole::SharedGate) => "gates",
            Role::Layer(_, LayerRole::Expert(..)) => "experts",
            Role::Layer(_, LayerRole::SharedExpert(_)) => "shared expert",
        };
        // In the fused layout an expert has no tensor of its own; its share has the type of the stack.
        let info = family.name(role).and_then(|name| weights.info(&name)).or_else(|| match role {
            Role::Layer(l, LayerRole::Expert(..)) => weights.info(&family.fused_names(l)?[1]),
            Role::Layer(l, LayerRole::Router) => weights.info(&family.fused_names(l)?[0]),
            _ => None,
        });
        if let Some(info) = info {
            *summary.bytes.entry(part).or_default() += info.dtype.bytes(elements as usize) as u64;
            *summary.dtypes.entry(info.dtype.torch_name()).or_default() += 1;
        }
    }
    summary
}

/// Whole models of which each sequence is answered by one: sizes add up, and a token uses the largest. The other figures are the first one's.
pub fn together(whole: &[Summary]) -> Option<Summary> {
    let (first, others) = whole.split_first()?;
    let mut all = Summary { experts: whole.len(), experts_per_token: 1, ..first.clone() };
    for one in others {
        all.parameters += one.parameters;
        all.active_parameters = all.active_parameters.max(one.active_parameters);
        one.bytes.iter().for_each(|(part, bytes)| *all.bytes.entry(part).or_default() += bytes);
        one.dtypes.iter().for_each(|(dtype, tensors)| *all.dtypes.entry(dtype).or_default() += tensors);
    }
    Some(all)
}

/// The gates of a sparse model, layer by layer; none if it is dense, or has routers that are no gates.
pub fn gates(family: &Family, config: &Config, weights: &dyn Weights) -> Result<Vec<Gate>, WeightsError> {
    let Some(moe) = config.moe.as_ref().filter(|moe| moe.directions.is_none()) else { return Ok(Vec::new()) };
    let sparse = (0..config.layers).filter(|&l| moe.sparse[l]);
    sparse
        .map(|l| {
            let classic = family.name(Role::Layer(l, LayerRole::Router)).unwrap_or_default();
            let name = match (weights.info(&classic), family.fused_names(l)) {
                (None, Some([fused, ..])) => fused,
                _ => classic,
            };
            let weight = weights.read(&name)?.to_f32();
            Ok(Gate { experts: moe.experts, hidden: config.hidden, weight })
        })
        .collect()
}
