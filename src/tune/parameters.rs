//! What is trained: which weights, from which values, how they stand in a decoder, and the tensors that they become.
//!
//! Gates and norms are variables themselves. A matrix of attention keeps its bytes and gets a change of low rank beside it (arXiv 2106.09685),
//! which is added to it when it is written. E experts, D hidden, r rank.

use std::collections::BTreeMap;

use candle_core::{DType, Device, Tensor, Var, backprop::GradStore};
use rand::{Rng as _, SeedableRng as _};
use rand_chacha::ChaCha8Rng;
use sha2::{Digest as _, Sha256};
use upcycle_architectures::{
    AttentionPart, Family, LayerRole, Role, View, Weights, WeightsError,
    decoder::{Decoder, DecoderError, Substitute},
};

use super::{TuneError, optimiser::Slot};
use crate::plan::Composite;

/// What is trained.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Scope {
    /// the gates of routers and of shared experts
    Gates,
    /// those, every norm, and a change of this rank to q, k, v and o
    Attention {
        /// r
        rank: usize,
    },
}

/// A weight that is trained.
struct Trained {
    role: Role,
    /// its tensor's name in the checkpoint
    name: String,
    /// as it was given
    given: View,
    form: Form,
}

enum Form {
    /// its slot
    Whole(usize),
    /// slots of [r, in] and [out, r]
    LowRank(usize, usize),
}

/// Everything that is trained.
pub(super) struct Parameters {
    trained: Vec<Trained>,
    /// the variables with their optimiser's state
    pub slots: Vec<Slot>,
}

impl Parameters {
    /// The given model's values; changes start at nothing, their directions drawn by the seed.
    pub fn new(composite: &Composite, scope: Scope, seed: u64, device: &Device) -> Result<Self, TuneError> {
        use AttentionPart::{K, KNorm, O, Q, QNorm, V};
        use LayerRole::{Attention, InputNorm, PostNorm, Router, SharedGate};
        let mut all = Self { trained: Vec::new(), slots: Vec::new() };
        let family = composite.plan.family();
        for (role, shape) in family.tensors(&composite.plan.config) {
            let rank = match (role, scope) {
                (Role::Layer(_, Router | SharedGate), _)
                | (Role::Layer(_, InputNorm | PostNorm | Attention(QNorm | KNorm)) | Role::FinalNorm, Scope::Attention { .. }) => None,
                (Role::Layer(_, Attention(Q | K | V | O)), Scope::Attention { rank }) => Some(rank),
                _ => continue,
            };
            let name = name(family, role, composite)?;
            let given = composite.read(&name)?;
            let values = given.to_tensor(DType::F32, device)?;
            let rms = values.sqr()?.mean_all()?.to_scalar::<f32>()?.sqrt();
            let form = match rank {
                // A step of rate h changes a weight by h of its size (as Adafactor's do, arXiv 1804.04235, section 8), whatever its scale. A
                // gate of zeros has none.
                None => Form::Whole(all.add(name.clone(), &values, if rms > 0.0 { rms } else { 1.0 })?),
                Some(rank) => {
                    let (inner, scale) = (shape[1] as f32, 1.0 / (shape[1] as f32).sqrt());
                    let down = drawn(&[rank, shape[1]], 3f32.sqrt() * scale, seed, &name, device)?;
                    let up = Tensor::zeros((shape[0], rank), DType::F32, device)?;
                    // The same for their product: its elements are sums over r.
                    let up_rate = rms * (inner / rank as f32).sqrt();
                    Form::LowRank(all.add(format!("{name}.down"), &down, scale)?, all.add(format!("{name}.up"), &up, up_rate)?)
                }
            };
            all.trained.push(Trained { role, name, given, form });
        }
        Ok(all)
    }

    fn add(&mut self, name: String, start: &Tensor, rate: f32) -> Result<usize, TuneError> {
        self.slots.push(Slot::new(name, start, rate)?);
        Ok(self.slots.len() - 1)
    }

    /// The decoder with the variables in it; `frozen`: with their values as they are at any time, and no gradients.
    pub fn placed(&self, decoder: &Decoder, frozen: Frozen) -> Result<Decoder, DecoderError> {
        let tensor = |slot: usize| {
            let var: &Var = &self.slots[slot].var;
            if frozen == Frozen::Yes { var.as_detached_tensor() } else { var.as_tensor().clone() }
        };
        let mut decoder = decoder.clone();
        for trained in &self.trained {
            let substitute = match trained.form {
                Form::Whole(slot) => Substitute::Whole(tensor(slot)),
                Form::LowRank(down, up) => Substitute::LowRank { down: tensor(down), up: tensor(up) },
            };
            decoder.substitute(trained.role, &substitute)?;
        }
        Ok(decoder)
    }

    /// The decoder with the weights that would be written now, rounded as they would be.
    pub fn written(&self, decoder: &Decoder) -> Result<Decoder, TuneError> {
        let mut decoder = decoder.clone();
        for trained in &self.trained {
            let tensor = self.view(trained)?.to_tensor(DType::F32, self.device())?;
            decoder.substitute(trained.role, &Substitute::Whole(tensor))?;
        }
        Ok(decoder)
    }

    /// The tensors that differ from what was given, by name.
    pub fn changed(&self) -> Result<BTreeMap<String, View>, TuneError> {
        let mut changed = BTreeMap::new();
        for trained in &self.trained {
            let view = self.view(trained)?;
            if view.data != trained.given.data {
                changed.insert(trained.name.clone(), view);
            }
        }
        Ok(changed)
    }

    fn view(&self, trained: &Trained) -> Result<View, TuneError> {
        let host = |tensor: &Tensor| tensor.to_device(&Device::Cpu)?.flatten_all()?.to_vec1::<f32>();
        let slot = |slot: usize| self.slots[slot].var.as_detached_tensor();
        let values = match trained.form {
            Form::Whole(whole) => host(&slot(whole))?,
            Form::LowRank(down, up) => {
                let given = trained.given.to_tensor(DType::F32, self.device())?;
                host(&(given + slot(up).matmul(&slot(down))?)?)?
            }
        };
        Ok(View::from_f32(&values, trained.given.info.dtype, trained.given.info.shape.clone())?)
    }

    fn device(&self) -> &Device {
        self.slots.first().map_or(&Device::Cpu, |slot| slot.var.device())
    }

    /// The routers' gates [E, D] with their layers.
    pub fn gates(&self) -> impl Iterator<Item = (usize, &Var)> {
        self.trained.iter().filter_map(|trained| match (trained.role, &trained.form) {
            (Role::Layer(layer, LayerRole::Router), Form::Whole(slot)) => Some((layer, &self.slots[*slot].var)),
            _ => None,
        })
    }

    /// Gradients of every slot added to those that were there.
    pub fn accumulate(&mut self, gradients: &GradStore) -> Result<(), TuneError> {
        for slot in &mut self.slots {
            slot.accumulate(gradients)?;
        }
        Ok(())
    }

    /// How many numbers are trained.
    pub fn count(&self) -> usize {
        self.slots.iter().map(|slot| slot.var.elem_count()).sum()
    }
}

/// Whether a decoder's variables get gradients.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Frozen {
    No,
    Yes,
}

/// A role's tensor in a checkpoint of either layout.
fn name(family: &Family, role: Role, weights: &dyn Weights) -> Result<String, WeightsError> {
    let classic = family.name(role).ok_or_else(|| WeightsError::Missing { tensor: format!("{role:?}") })?;
    if weights.info(&classic).is_none()
        && let Role::Layer(layer, LayerRole::Router) = role
        && let Some([router, ..]) = family.fused_names(layer)
    {
        return Ok(router);
    }
    Ok(classic)
}

/// Uniform in -bound..bound, by the seed and what it is for.
fn drawn(shape: &[usize], bound: f32, seed: u64, name: &str, device: &Device) -> candle_core::Result<Tensor> {
    let digest = Sha256::new().chain_update(seed.to_le_bytes()).chain_update(name).finalize();
    let mut rng = ChaCha8Rng::from_seed(digest.into());
    let values: Vec<f32> = (0..shape.iter().product()).map(|_| rng.random_range(-bound..bound)).collect();
    Tensor::from_vec(values, shape, device)
}
