//! A plan with its sources and gates: any tensor of the composite can be read from it, without anything being written.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    ops::Range,
    sync::Arc,
};

use bytes::Bytes;
use rand::{Rng as _, SeedableRng as _};
use rand_chacha::ChaCha8Rng;
use serde_json::json;
use sha2::{Digest as _, Sha256};
use upcycle_architectures::{Dtype, TensorInfo, View, Weights, WeightsError};
use upcycle_routers::gate::Gate;

use super::{Fold, Gates, Part, Plan, Sources};
use crate::source::Extent;

/// A composite that may not exist on disk. Cheap to clone.
#[derive(Clone)]
pub struct Composite {
    /// What it is made of.
    pub plan: Arc<Plan>,
    /// The models it reads.
    pub sources: Arc<Sources>,
    /// The source that is an earlier state of this composite on disk, which it may be written over.
    pub(crate) earlier: Option<usize>,
    gates: Arc<Gates>,
    fitted: Option<Arc<dyn Weights>>,
    tuned: Arc<BTreeMap<String, View>>,
    index: Arc<HashMap<String, usize>>,
    seed: u64,
}

impl Composite {
    pub(super) fn new(plan: Arc<Plan>, sources: Arc<Sources>, gates: Gates, fitted: Option<Arc<dyn Weights>>) -> Self {
        let index = plan.tensors.iter().enumerate().map(|(i, tensor)| (tensor.name.clone(), i)).collect();
        Self {
            seed: plan.seed,
            plan,
            sources,
            earlier: None,
            gates: Arc::new(gates),
            fitted,
            tuned: Arc::default(),
            index: Arc::new(index),
        }
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

    /// The same as a change of what that source is an earlier state of.
    pub(super) fn over(self, earlier: usize) -> Self {
        Self { earlier: Some(earlier), ..self }
    }

    /// The same with these gates.
    #[must_use]
    pub fn gated(&self, gates: Gates) -> Self {
        Self { gates: Arc::new(gates), ..self.clone() }
    }

    /// Of everything that decides the tensors' bytes: the plan, the gates, and which files the sources were when they were opened.
    pub fn fingerprint(&self) -> String {
        let plan = &self.plan;
        let mut hash = Sha256::new();
        hash.update(json!([plan.tensors, plan.config_json, plan.dtype.torch_name(), plan.seed]).to_string());
        for gate in self.gates.routed.iter().chain(&self.gates.shared) {
            gate.weight.iter().for_each(|value| hash.update(value.to_le_bytes()));
        }
        for source in &self.sources.all {
            source.files.iter().for_each(|file| hash.update(file.stamp()));
        }
        hex(&hash.finalize())
    }

    /// Of everything that decides the bytes of tensor `tensor`. `fingerprint` is the composite's, which decides what is fitted.
    pub(crate) fn key(&self, tensor: usize, fingerprint: &str) -> String {
        let planned = &self.plan.tensors[tensor];
        let mut hash = Sha256::new();
        hash.update(json!([planned, planned.info.dtype.torch_name(), planned.info.shape, self.seed]).to_string());
        let mut models = BTreeSet::new();
        for part in &planned.parts {
            let gate = |gates: &[Gate], layer: usize| gates.get(layer).map_or_else(Vec::new, |gate| gate.weight.clone());
            match part {
                Part::Fitted { .. } => hash.update(fingerprint),
                Part::Gate { layer } => gate(&self.gates.routed, *layer).iter().for_each(|value| hash.update(value.to_le_bytes())),
                Part::SharedGate { layer } => gate(&self.gates.shared, *layer).iter().for_each(|value| hash.update(value.to_le_bytes())),
                _ => models.extend(part.sources()),
            }
        }
        for source in models {
            self.sources.all[source].files.iter().for_each(|file| hash.update(file.stamp()));
        }
        hex(&hash.finalize())
    }

    /// The gates.
    pub fn gates(&self) -> &Gates {
        &self.gates
    }

    /// Number of elements of each part of tensor `tensor`.
    pub fn elements(&self, tensor: usize) -> usize {
        let planned = &self.plan.tensors[tensor];
        planned.info.elements() / planned.parts.len().max(1)
    }

    /// Where the bytes of a part lie, if it is to be had by copying them.
    pub fn copied(&self, tensor: usize, part: usize) -> Option<&Extent> {
        let planned = &self.plan.tensors[tensor];
        let Part::Tensor { source, tensor: name, noise: None, scale: None, fold: None } = &planned.parts[part] else { return None };
        let extent = self.sources.all[*source].extents.get(name)?;
        (extent.info.dtype == planned.info.dtype && extent.info.elements() == self.elements(tensor)).then_some(extent)
    }

    /// Whether a block of a part costs no more than its share of the whole.
    pub fn divisible(&self, tensor: usize, part: usize) -> bool {
        self.plan.tensors[tensor].parts[part].divisible(&self.sources)
    }

    /// The bytes of one part of tensor `tensor`, in the plan's type; borrowed from its source's map where they can be.
    pub fn part(&self, tensor: usize, part: usize) -> Result<Bytes, WeightsError> {
        let planned = &self.plan.tensors[tensor];
        match &planned.parts[part] {
            Part::Tensor { source, tensor: name, noise: None, scale: None, fold: None } => {
                Ok(self.sources.all[*source].weights.read(name)?.cast(planned.info.dtype)?.data)
            }
            _ => self.block(tensor, part, 0..self.elements(tensor)),
        }
    }

    /// The bytes of some elements of one part of tensor `tensor`, in the plan's type. What lies in files is read, not mapped, so that a
    /// source that is cut short meanwhile is an error. Elements do not depend on the block that they are asked for in.
    pub fn block(&self, tensor: usize, part: usize, elements: Range<usize>) -> Result<Bytes, WeightsError> {
        let planned = &self.plan.tensors[tensor];
        let dtype = planned.info.dtype;
        let flat = |values: &[f32]| Ok(View::from_f32(values, dtype, vec![values.len()])?.data);
        let piece = |source, name| self.piece(source, name, self.elements(tensor), elements.clone());
        match &planned.parts[part] {
            Part::Tensor { source, tensor: name, noise, scale, fold } => {
                let mut view = piece(*source, name)?;
                if let Some(fold) = fold {
                    view = self.fold(*source, &view, fold, dtype, elements.start)?;
                }
                if noise.is_some() || scale.is_some() {
                    view = edit(&view, *noise, *scale, self.rng(&planned.name, part, elements.start))?;
                }
                Ok(view.cast(dtype)?.data)
            }
            Part::Mean { of } => flat(&mean(of.iter().map(|(source, name)| piece(*source, name)))?),
            Part::Fitted { tensor: name } => match &self.fitted {
                Some(fitted) => Ok(slice(&fitted.read(name)?, name, &elements)?.cast(dtype)?.data),
                None => Err(WeightsError::Missing { tensor: name.clone() }),
            },
            Part::Tuned { .. } => match self.tuned.get(&planned.name) {
                Some(view) => Ok(slice(view, &planned.name, &elements)?.cast(dtype)?.data),
                None => Err(WeightsError::Missing { tensor: planned.name.clone() }),
            },
            Part::Gate { layer } => flat(weight(&self.gates.routed, *layer, &planned.name, elements)?),
            Part::SharedGate { layer } => flat(weight(&self.gates.shared, *layer, &planned.name, elements)?),
            Part::Zeros { .. } => Ok(vec![0; dtype.bytes(elements.len())].into()),
        }
    }

    /// Some elements of a source's tensor, which must have `all`, in its own type.
    fn piece(&self, source: usize, name: &str, all: usize, elements: Range<usize>) -> Result<View, WeightsError> {
        let source = &self.sources.all[source];
        let misfit = |info: &TensorInfo| WeightsError::Shape { tensor: name.to_owned(), expected: vec![all], found: info.shape.clone() };
        let fits = |info: &TensorInfo| if info.elements() == all { Ok(()) } else { Err(misfit(info)) };
        let Some(extent) = source.extents.get(name) else {
            let view = source.weights.read(name)?;
            fits(&view.info)?;
            return slice(&view, name, &elements);
        };
        fits(&extent.info)?;
        let dtype = extent.info.dtype;
        let mut data = vec![0; dtype.bytes(elements.len())];
        let read = extent.file.open().and_then(|file| extent.read(&file, dtype.bytes(elements.start) as u64, &mut data));
        read.map_err(|error| WeightsError::Read { tensor: name.to_owned(), reason: error.to_string() })?;
        Ok(View { info: TensorInfo { dtype, shape: vec![elements.len()] }, data: data.into() })
    }

    /// A tensor of a source, all of it.
    fn whole(&self, source: usize, name: &str) -> Result<View, WeightsError> {
        let missing = || WeightsError::Missing { tensor: name.to_owned() };
        let all = self.sources.all[source].weights.info(name).ok_or_else(missing)?.elements();
        self.piece(source, name, all, 0..all)
    }

    /// Columns times own norm over shared norm, in f32; the shared one as it is written. The view begins at element `start` of the tensor.
    fn fold(&self, source: usize, view: &View, fold: &Fold, dtype: Dtype, start: usize) -> Result<View, WeightsError> {
        let own = self.whole(source, &fold.own)?.to_f32();
        let mean = mean(fold.shared.iter().map(|(source, name)| self.whole(*source, name)))?;
        let shared = View::from_f32(&mean, dtype, vec![mean.len()])?.to_f32();
        let factors: Vec<f32> = own.iter().zip(&shared).map(|(own, shared)| if *shared == 0.0 { 1.0 } else { own / shared }).collect();
        let mut values = view.to_f32();
        let columns = factors.iter().cycle().skip(start % factors.len().max(1));
        values.iter_mut().zip(columns).for_each(|(value, factor)| *value *= factor);
        View::from_f32(&values, Dtype::F32, view.info.shape.clone())
    }

    /// Which models a tensor's bytes come from, for messages.
    pub fn origin(&self, tensor: usize) -> String {
        let sources = self.plan.tensors[tensor].parts.iter().flat_map(Part::sources);
        let names: Vec<String> = sources.collect::<BTreeSet<_>>().into_iter().map(|s| self.sources.all[s].reference.to_string()).collect();
        if names.is_empty() { "the calibration".into() } else { names.join(", ") }
    }

    /// A generator that depends on nothing but the seed and what it is for, so that threads and order do not matter, at the number that
    /// element `start` of a part takes.
    fn rng(&self, name: &str, part: usize, start: usize) -> ChaCha8Rng {
        let mut hash = Sha256::new();
        hash.update(self.seed.to_le_bytes());
        hash.update(name);
        hash.update((part as u64).to_le_bytes());
        let mut rng = ChaCha8Rng::from_seed(hash.finalize().into());
        // `standard_normal` takes two numbers of 64 bits, which are two words each.
        rng.set_word_pos(4 * start as u128);
        rng
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

/// Some elements of a tensor.
fn slice(view: &View, name: &str, elements: &Range<usize>) -> Result<View, WeightsError> {
    // Of blocks the whole is taken: what has them is not divisible.
    let (start, end) = (view.info.dtype.bytes(elements.start), view.info.dtype.bytes(elements.end));
    if end > view.data.len() {
        return Err(WeightsError::Shape { tensor: name.to_owned(), expected: vec![elements.end], found: view.info.shape.clone() });
    }
    let info = TensorInfo { dtype: view.info.dtype, shape: vec![elements.len()] };
    Ok(View { info, data: view.data.slice(start..end) })
}

/// Some elements of a layer's gate.
fn weight<'a>(gates: &'a [Gate], layer: usize, name: &str, elements: Range<usize>) -> Result<&'a [f32], WeightsError> {
    let missing = || WeightsError::Missing { tensor: name.to_owned() };
    gates.get(layer).and_then(|gate| gate.weight.get(elements)).ok_or_else(missing)
}

/// The mean of tensors of one size, summed in f64.
fn mean(of: impl ExactSizeIterator<Item = Result<View, WeightsError>>) -> Result<Vec<f32>, WeightsError> {
    let count = of.len() as f64;
    let mut sum: Vec<f64> = Vec::new();
    for view in of {
        let values = view?.to_f32().into_iter().map(f64::from);
        if sum.is_empty() {
            sum = values.collect();
        } else {
            sum.iter_mut().zip(values).for_each(|(sum, value)| *sum += value);
        }
    }
    Ok(sum.iter().map(|sum| (sum / count) as f32).collect())
}

pub(crate) fn hex(bytes: &[u8]) -> String {
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
