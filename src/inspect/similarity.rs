//! How far fine-tunes have gone from their base, and whether in the same direction: read off the weights alone.
//!
//! τ is what fine-tuning added to a weight W of the base. Tensors are read one role at a time, of all models together.
//! E experts, L layers.

use std::collections::BTreeMap;

use rayon::prelude::*;
use serde::Serialize;
use upcycle_architectures::{AttentionPart, LayerRole, Role, TensorInfo, View, WeightsError};

use super::average::name_in;
use crate::source::Source;

/// Elements that are widened at a time, of each model.
const BLOCK: usize = 1 << 18;

/// Modules in the order in which they are shown.
const MODULES: [&str; 8] = ["embedding", "q", "k", "v", "o", "norms", "mlp", "head"];

/// How experts compare. Cosines are null where an expert has not moved.
#[derive(Debug, Clone, Serialize)]
pub struct Similarity {
    /// cosines of what was added to the MLPs, over all layers [E][E]
    pub mlp: Vec<Vec<f64>>,
    /// the same layer by layer [L][E][E]
    pub mlp_by_layer: Vec<Vec<Vec<f64>>>,
    /// cosines of what was added to everything outside the MLPs [E][E]
    pub shared: Vec<Vec<f64>>,
    /// by module
    pub drift: Vec<Drift>,
}

/// How far a module has moved.
#[derive(Debug, Clone, Serialize)]
pub struct Drift {
    /// what it is
    pub module: &'static str,
    /// ‖τ‖ / ‖W‖ of each expert [E]
    pub experts: Vec<f64>,
}

/// Inner products.
#[derive(Debug, Clone)]
struct Sums {
    /// ‖W‖²
    base: f64,
    /// τₐ·τᵦ, row-major [E, E]
    products: Vec<f64>,
}

impl Sums {
    fn new(experts: usize) -> Self {
        Self { base: 0.0, products: vec![0.0; experts * experts] }
    }

    fn add(&mut self, other: &Self) {
        self.base += other.base;
        self.products.iter_mut().zip(&other.products).for_each(|(a, b)| *a += b);
    }

    fn norm(&self, e: usize, experts: usize) -> f64 {
        self.products[e * experts + e].sqrt()
    }

    fn cosines(&self, experts: usize) -> Vec<Vec<f64>> {
        let cosine = |a: usize, b: usize| self.products[a * experts + b] / (self.norm(a, experts) * self.norm(b, experts));
        (0..experts).map(|a| (0..experts).map(|b| cosine(a, b)).collect()).collect()
    }
}

/// Compares dense models of one family with their base. Where vocabularies differ in size, the rows that all have are compared.
/// `done` is told of every tensor: how many of how many.
pub fn similarity(base: &Source, experts: &[&Source], done: &dyn Fn(usize, usize)) -> Result<Similarity, WeightsError> {
    let count = experts.len();
    let mut by_layer = vec![Sums::new(count); base.config.layers];
    let mut by_module: BTreeMap<usize, Sums> = BTreeMap::new();
    let tensors = base.family.tensors(&base.config);
    for (at, (role, _)) in tensors.iter().enumerate() {
        let read = |source: &Source| source.weights.read(&name_in(source, *role)?);
        let fine = experts.iter().map(|expert| read(expert)).collect::<Result<Vec<View>, _>>()?;
        let sums = inner_products(&read(base)?, &fine);
        let module = module(*role);
        if let (Role::Layer(l, _), "mlp") = (role, MODULES[module]) {
            by_layer[*l].add(&sums);
        }
        by_module.entry(module).or_insert_with(|| Sums::new(count)).add(&sums);
        done(at + 1, tensors.len());
    }
    let total = |mlp: bool| {
        let mut total = Sums::new(count);
        for (_, sums) in by_module.iter().filter(|(module, _)| (MODULES[**module] == "mlp") == mlp) {
            total.add(sums);
        }
        total.cosines(count)
    };
    let drift = by_module.iter().map(|(&module, sums)| Drift {
        module: MODULES[module],
        experts: (0..count).map(|e| sums.norm(e, count) / sums.base.sqrt()).collect(),
    });
    Ok(Similarity {
        mlp: total(true),
        mlp_by_layer: by_layer.iter().map(|sums| sums.cosines(count)).collect(),
        shared: total(false),
        drift: drift.collect(),
    })
}

/// Index into [`MODULES`].
fn module(role: Role) -> usize {
    use AttentionPart::{K, KBias, KNorm, O, OBias, Q, QBias, QNorm, V, VBias};
    match role {
        Role::Embedding => 0,
        Role::Layer(_, LayerRole::Attention(Q | QBias)) => 1,
        Role::Layer(_, LayerRole::Attention(K | KBias)) => 2,
        Role::Layer(_, LayerRole::Attention(V | VBias)) => 3,
        Role::Layer(_, LayerRole::Attention(O | OBias)) => 4,
        Role::FinalNorm | Role::Layer(_, LayerRole::InputNorm | LayerRole::PostNorm | LayerRole::Attention(QNorm | KNorm)) => 5,
        Role::Layer(..) => 6,
        Role::Head => 7,
    }
}

fn inner_products(base: &View, fine: &[View]) -> Sums {
    let elements = fine.iter().map(|view| view.info.elements()).fold(base.info.elements(), usize::min);
    let experts = fine.len();
    let blocks: Vec<usize> = (0..elements).step_by(BLOCK).collect();
    let one = |&start: &usize| {
        let end = (start + BLOCK).min(elements);
        let weights = part(base, start, end);
        let added = |view: &View| part(view, start, end).iter().zip(&weights).map(|(v, w)| v - w).collect();
        let deltas: Vec<Vec<f32>> = fine.iter().map(added).collect();
        let mut sums = Sums::new(experts);
        sums.base = dot(&weights, &weights);
        for a in 0..experts {
            for b in a..experts {
                let product = dot(&deltas[a], &deltas[b]);
                sums.products[a * experts + b] = product;
                sums.products[b * experts + a] = product;
            }
        }
        sums
    };
    // Collected before they are added, so that the order, and with it the result, is the same on any number of threads.
    let parts: Vec<Sums> = blocks.par_iter().map(one).collect();
    let mut total = Sums::new(experts);
    for part in &parts {
        total.add(part);
    }
    total
}

fn part(view: &View, start: usize, end: usize) -> Vec<f32> {
    let dtype = view.info.dtype;
    let info = TensorInfo { dtype, shape: vec![end - start] };
    View { info, data: view.data.slice(dtype.bytes(start)..dtype.bytes(end)) }.to_f32()
}

fn dot(a: &[f32], b: &[f32]) -> f64 {
    a.iter().zip(b).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum()
}
