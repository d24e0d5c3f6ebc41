//! A plan with its sources and gates: any tensor of the composite can be read from it, without anything being written.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    sync::Arc,
};

use bytes::Bytes;
use rand::{Rng as _, SeedableRng as _};
use rand_chacha::ChaCha8Rng;
use serde_json::json;
use sha2::{Digest as _, Sha256};
use upcycle_architectures::{Dtype, TensorInfo, View, Weights, WeightsError};

use super::{Fold, Gates, Part, Plan, Sources};

/// A composite that may not exist on disk. Cheap to clone.
#[derive(Clone)]
pub struct Composite {
    /// What it is made of.
    pub plan: Arc<Plan>,
    /// The models it reads.
    pub sources: Arc<Sources>,
    gates: Arc<Gates>,
    fitted: Option<Arc<dyn Weights>>,
    tuned: Arc<BTreeMap<String, View>>,
    index: Arc<HashMap<String, usize>>,
    seed: u64,
}

impl Composite {
    pub(super) fn new(plan: Arc<Plan>, sources: Arc<Sources>, gates: Gates, fitted: Option<Arc<dyn Weights>>) -> Self {
        let index = plan.tensors.iter().enumerate().map(|(i, tensor)| (tensor.name.clone(), i)).collect();
        Self { seed: plan.seed, plan, sources, gates: Arc::new(gates), fitted, tuned: Arc::default(), index: Arc::new(index) }
    }

    /// The same with these tensors, of the same types and shapes, in place of its own; names that it does not have are left out.
    #[must_use]
    pub fn replacing(&self, tensors: BTreeMap<String, View>) -> Self {
        let mut plan = (*self.plan).clone();
        for planned in &mut plan.tensors {
            if let Some(view) = tensors.get(&planned.name) {
                planned.parts = vec![Part::Tuned { sha256: hex(&Sha256::digest(&view.data)) }];
            }
        }
        Self { plan: Arc::new(plan), tuned: Arc::new(tensors), ..self.clone() }
    }

    /// Of everything that decides the tensors' bytes: the plan, the gates, and which files the sources are at this moment.
    pub fn fingerprint(&self) -> String {
        let plan = &self.plan;
        let mut hash = Sha256::new();
        hash.update(json!([plan.tensors, plan.config_json, plan.dtype.torch_name(), plan.seed]).to_string());
        for gate in self.gates.routed.iter().chain(&self.gates.shared) {
            gate.weight.iter().for_each(|value| hash.update(value.to_le_bytes()));
        }
        for source in &self.sources.all {
            source.stamps().iter().for_each(|stamp| hash.update(stamp));
        }
        hex(&hash.finalize())
    }

    /// The gates.
    pub fn gates(&self) -> &Gates {
        &self.gates
    }

    /// The bytes of one part of tensor `tensor`, in the plan's type.
    pub fn part(&self, tensor: usize, part: usize) -> Result<Bytes, WeightsError> {
        let planned = &self.plan.tensors[tensor];
        let dtype = planned.info.dtype;
        let flat = |values: &[f32]| Ok(View::from_f32(values, dtype, vec![values.len()])?.data);
        match &planned.parts[part] {
            Part::Tensor { source, tensor: name, noise, scale, fold } => {
                let mut view = self.sources.all[*source].weights.read(name)?;
                if let Some(fold) = fold {
                    view = self.fold(*source, &view, fold, dtype)?;
                }
                let edited =
                    if noise.is_some() || scale.is_some() { edit(&view, *noise, *scale, self.rng(&planned.name, part))? } else { view };
                Ok(edited.cast(dtype)?.data)
            }
            Part::Mean { of } => flat(&self.mean(of)?),
            Part::Fitted { tensor: name } => match &self.fitted {
                Some(fitted) => Ok(fitted.read(name)?.cast(dtype)?.data),
                None => Err(WeightsError::Missing { tensor: name.clone() }),
            },
            Part::Tuned { .. } => match self.tuned.get(&planned.name) {
                Some(view) => Ok(view.cast(dtype)?.data),
                None => Err(WeightsError::Missing { tensor: planned.name.clone() }),
            },
            Part::Gate { layer } => flat(self.gates.routed.get(*layer).map_or(&[][..], |gate| &gate.weight)),
            Part::SharedGate { layer } => flat(self.gates.shared.get(*layer).map_or(&[][..], |gate| &gate.weight)),
            Part::Zeros { elements } => Ok(vec![0; dtype.bytes(*elements)].into()),
        }
    }

    fn mean(&self, of: &[(usize, String)]) -> Result<Vec<f32>, WeightsError> {
        let mut sum: Vec<f64> = Vec::new();
        for (source, name) in of {
            let values = self.sources.all[*source].weights.read(name)?.to_f32();
            if sum.is_empty() {
                sum = values.into_iter().map(f64::from).collect();
            } else {
                sum.iter_mut().zip(values).for_each(|(sum, value)| *sum += f64::from(value));
            }
        }
        Ok(sum.iter().map(|sum| (sum / of.len() as f64) as f32).collect())
    }

    /// Columns times own norm over shared norm, in f32; the shared one as it is written.
    fn fold(&self, source: usize, view: &View, fold: &Fold, dtype: Dtype) -> Result<View, WeightsError> {
        let own = self.sources.all[source].weights.read(&fold.own)?.to_f32();
        let mean = self.mean(&fold.shared)?;
        let shared = View::from_f32(&mean, dtype, vec![mean.len()])?.to_f32();
        let factors: Vec<f32> = own.iter().zip(&shared).map(|(own, shared)| if *shared == 0.0 { 1.0 } else { own / shared }).collect();
        let mut values = view.to_f32();
        values.chunks_exact_mut(factors.len()).for_each(|row| row.iter_mut().zip(&factors).for_each(|(value, factor)| *value *= factor));
        View::from_f32(&values, Dtype::F32, view.info.shape.clone())
    }

    /// Which models a tensor's bytes come from, for messages.
    pub fn origin(&self, tensor: usize) -> String {
        let sources = self.plan.tensors[tensor].parts.iter().flat_map(|part| match part {
            Part::Tensor { source, .. } => vec![*source],
            Part::Mean { of } => of.iter().map(|(source, _)| *source).collect(),
            Part::Gate { .. } | Part::SharedGate { .. } | Part::Zeros { .. } | Part::Fitted { .. } | Part::Tuned { .. } => Vec::new(),
        });
        let names: Vec<String> = sources.collect::<BTreeSet<_>>().into_iter().map(|s| self.sources.all[s].reference.to_string()).collect();
        if names.is_empty() { "the calibration".into() } else { names.join(", ") }
    }

    /// A generator that depends on nothing but the seed and what it is for, so that threads and order do not matter.
    fn rng(&self, name: &str, part: usize) -> ChaCha8Rng {
        let mut hash = Sha256::new();
        hash.update(self.seed.to_le_bytes());
        hash.update(name);
        hash.update((part as u64).to_le_bytes());
        ChaCha8Rng::from_seed(hash.finalize().into())
    }
}

impl Weights for Composite {
    fn names(&self) -> Vec<String> {
        self.plan.tensors.iter().map(|tensor| tensor.name.clone()).collect()
    }

    fn info(&self, name: &str) -> Option<TensorInfo> {
        Some(self.plan.tensors[*self.index.get(name)?].info.clone())
    }

    fn read(&self, name: &str) -> Result<View, WeightsError> {
        let tensor = *self.index.get(name).ok_or_else(|| WeightsError::Missing { tensor: name.to_owned() })?;
        let planned = &self.plan.tensors[tensor];
        let data = if planned.parts.len() == 1 {
            self.part(tensor, 0)?
        } else {
            let mut all = Vec::with_capacity(planned.info.bytes());
            for part in 0..planned.parts.len() {
                all.extend_from_slice(&self.part(tensor, part)?);
            }
            all.into()
        };
        if data.len() != planned.info.bytes() {
            let reason = format!("{} bytes, expected {}", data.len(), planned.info.bytes());
            return Err(WeightsError::Read { tensor: name.to_owned(), reason });
        }
        Ok(View { info: planned.info.clone(), data })
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Noise, then scale, each rounded to the tensor's own type (f32 for blocks), as mergekit does it. mergekit draws from torch's generator in write order; this
/// draws from ChaCha by tensor, so that the values differ but do not depend on order.
fn edit(view: &View, noise: Option<f64>, scale: Option<f64>, mut rng: ChaCha8Rng) -> Result<View, WeightsError> {
    let dtype: Dtype = view.info.dtype.decoded();
    let round = |values: &[f32]| Ok(View::from_f32(values, dtype, vec![values.len()])?.to_f32());
    let mut values = view.to_f32();
    if let Some(noise) = noise {
        let drawn: Vec<f32> = (0..values.len()).map(|_| standard_normal(&mut rng) as f32).collect();
        let drawn: Vec<f32> = round(&drawn)?.into_iter().map(|z| z * noise as f32).collect();
        values.iter_mut().zip(round(&drawn)?).for_each(|(value, z)| *value += z);
        values = round(&values)?;
    }
    if let Some(scale) = scale {
        values.iter_mut().for_each(|value| *value *= scale as f32);
    }
    View::from_f32(&values, dtype, view.info.shape.clone())
}

/// Box-Muller, one of the pair.
fn standard_normal(rng: &mut ChaCha8Rng) -> f64 {
    let (u, v): (f64, f64) = (1.0 - rng.random::<f64>(), rng.random());
    (-2.0 * u.ln()).sqrt() * (std::f64::consts::TAU * v).cos()
}
