//! Weights to layers: finds each tensor in the classic or the fused layout and checks all shapes before any byte is read.

use std::{collections::HashMap, ops::Range};

use candle_core::{DType, Device};
use upcycle_routers::route::Rule;

use super::{
    DecoderError, Layer, LayerMlp,
    attention::Attention,
    matrix::{Linear, Matrix, Placement},
    mlp::Mlp,
    moe::{Router, Sparse},
    norm::Norm,
};
use crate::{
    config::Config,
    family::{AttentionPart, Family, LayerRole, Projection, Role},
    weights::{TensorInfo, View, Weights, WeightsError},
};

/// Where a role's tensor lies: a tensor of its own, or rows of a fused one.
struct Place {
    name: String,
    /// of the tensor called `name`
    shape: Vec<usize>,
    /// of that tensor, seen as a matrix whose rows are its last dimension
    rows: Range<usize>,
}

/// The bytes of a role's tensor, [`shape`](Family::tensors), whichever layout it lies in. Reading one expert of a fused tensor reads it whole.
pub fn tensor(family: &Family, config: &Config, weights: &dyn Weights, role: Role, shape: &[usize]) -> Result<View, WeightsError> {
    let placement = Placement { device: Device::Cpu, weights: DType::F32, activations: DType::F32, mapped: None };
    let model = Model { family, config, weights, placement: &placement };
    model.reader().view(role, shape)
}

#[derive(Clone, Copy)]
pub(super) struct Model<'a> {
    pub family: &'a Family,
    pub config: &'a Config,
    pub weights: &'a dyn Weights,
    pub placement: &'a Placement,
}

impl Model<'_> {
    /// Compares every tensor's shape with the config's.
    pub fn check(&self) -> Result<(), WeightsError> {
        for (role, shape) in self.family.tensors(self.config) {
            let place = self.place(role, &shape)?;
            match self.weights.info(&place.name) {
                None => return Err(WeightsError::Missing { tensor: place.name }),
                Some(info) if info.shape != place.shape => {
                    return Err(WeightsError::Shape { tensor: place.name, expected: place.shape, found: info.shape });
                }
                Some(info) => info.check(&place.name)?,
            }
        }
        Ok(())
    }

    fn place(&self, role: Role, shape: &[usize]) -> Result<Place, WeightsError> {
        let classic = self.family.name(role).ok_or_else(|| WeightsError::Missing { tensor: format!("{role:?}") })?;
        if let (Role::Layer(layer, part), Some(moe), false) = (role, &self.config.moe, self.weights.info(&classic).is_some())
            && let Some([router, gate_up, down]) = self.family.fused_names(layer)
        {
            let fused = |name: String, shape: [usize; 3], rows| Place { name, shape: shape.into(), rows };
            let (d, f, experts) = (self.config.hidden, moe.ffn, moe.experts);
            let place = match part {
                LayerRole::Router => Place { name: router, shape: shape.to_vec(), rows: 0..moe.router_rows() },
                LayerRole::Expert(e, Projection::Gate) => fused(gate_up, [experts, 2 * f, d], 2 * e * f..(2 * e + 1) * f),
                LayerRole::Expert(e, Projection::Up) => fused(gate_up, [experts, 2 * f, d], (2 * e + 1) * f..(2 * e + 2) * f),
                LayerRole::Expert(e, Projection::Down) => fused(down, [experts, d, f], e * d..(e + 1) * d),
                _ => return Err(WeightsError::Missing { tensor: classic }),
            };
            // A checkpoint that has neither lacks the classic tensor.
            return if self.weights.info(&place.name).is_some() { Ok(place) } else { Err(WeightsError::Missing { tensor: classic }) };
        }
        Ok(Place { name: classic, shape: shape.to_vec(), rows: 0..shape[0] })
    }

    /// A reader of tensors, best one per layer.
    pub fn reader(&self) -> Reader<'_> {
        Reader { model: self, fused: HashMap::new() }
    }
}

/// Reads tensors of a model whose shapes have been checked.
pub(super) struct Reader<'a> {
    model: &'a Model<'a>,
    /// Fused tensors read so far: each is the home of many, and reading one may cost a computation.
    fused: HashMap<String, View>,
}

impl Reader<'_> {
    pub fn layer(&mut self, layer: usize) -> Result<Layer, DecoderError> {
        let config = self.model.config;
        let d = config.hidden;
        let input_norm = self.norm(Role::Layer(layer, LayerRole::InputNorm), d)?;
        let attention = self.attention(layer)?;
        let post_norm = self.norm(Role::Layer(layer, LayerRole::PostNorm), d)?;
        let mlp = match &config.moe {
            Some(moe) if moe.sparse[layer] => {
                let expert = |e| self.mlp(layer, moe.ffn, |p| LayerRole::Expert(e, p), None);
                let experts = (0..moe.experts).map(expert).collect::<Result<_, _>>()?;
                let shared = match moe.shared_ffn {
                    Some(ffn) => Some((self.mlp(layer, ffn, LayerRole::SharedExpert, None)?, self.gate(layer, LayerRole::SharedGate, 1)?)),
                    None => None,
                };
                let rule = Rule { top_k: moe.top_k, normalise: moe.normalise };
                let rows = self.gate(layer, LayerRole::Router, moe.router_rows())?;
                let router = if moe.directions.is_some() { Router::Subspace(rows) } else { Router::Linear(rows) };
                LayerMlp::Sparse(Sparse { router, experts, rule, shared })
            }
            _ => {
                let bias: Option<fn(Projection) -> LayerRole> = config.mlp_bias.then_some(LayerRole::MlpBias);
                LayerMlp::Dense(self.mlp(layer, config.ffn, LayerRole::Mlp, bias)?)
            }
        };
        Ok(Layer { input_norm, attention, post_norm, mlp })
    }

    fn attention(&mut self, layer: usize) -> Result<Attention, DecoderError> {
        use AttentionPart::{K, KBias, KNorm, O, OBias, Q, QBias, QNorm, V, VBias};
        let config = self.model.config;
        let (d, head_dim) = (config.hidden, config.head_dim);
        let (q, kv) = (config.heads * head_dim, config.kv_heads * head_dim);
        let role = |part| Role::Layer(layer, LayerRole::Attention(part));
        let bias = |part, present: bool| present.then(|| role(part));
        Ok(Attention {
            q: self.linear(role(Q), bias(QBias, config.qkv_bias), [q, d])?,
            k: self.linear(role(K), bias(KBias, config.qkv_bias), [kv, d])?,
            v: self.linear(role(V), bias(VBias, config.qkv_bias), [kv, d])?,
            o: self.linear(role(O), bias(OBias, config.o_bias), [d, q])?,
            qk_norm: if config.qk_norm { Some((self.norm(role(QNorm), head_dim)?, self.norm(role(KNorm), head_dim)?)) } else { None },
            heads: config.heads,
            kv_heads: config.kv_heads,
            head_dim,
            window: config.windows[layer],
        })
    }

    fn mlp(
        &mut self,
        layer: usize,
        ffn: usize,
        weight: impl Fn(Projection) -> LayerRole,
        bias: Option<fn(Projection) -> LayerRole>,
    ) -> Result<Mlp, DecoderError> {
        let config = self.model.config;
        let mut linear = |p: Projection| {
            self.linear(Role::Layer(layer, weight(p)), bias.map(|bias| Role::Layer(layer, bias(p))), p.shape(config.hidden, ffn))
        };
        let projections = [linear(Projection::Gate)?, linear(Projection::Up)?, linear(Projection::Down)?];
        Ok(Mlp { projections, activation: config.activation })
    }

    fn linear(&mut self, weight: Role, bias: Option<Role>, shape: [usize; 2]) -> Result<Linear, DecoderError> {
        let placement = self.model.placement;
        let bias = match bias {
            Some(bias) => Some(self.view(bias, &shape[..1])?.to_tensor(placement.activations, &placement.device)?),
            None => None,
        };
        Ok(Linear { weight: self.matrix(weight, shape)?, bias, low_rank: None })
    }

    pub fn matrix(&mut self, role: Role, shape: [usize; 2]) -> Result<Matrix, DecoderError> {
        Matrix::new(&self.view(role, &shape)?, self.model.placement)
    }

    /// A gate [rows, D]: its products are computed in f32.
    fn gate(&mut self, layer: usize, role: LayerRole, rows: usize) -> Result<Matrix, DecoderError> {
        let placement = Placement { weights: DType::F32, ..self.model.placement.clone() };
        let view = self.view(Role::Layer(layer, role), &[rows, self.model.config.hidden])?;
        Matrix::new(&view.cast(view.info.dtype.decoded())?, &placement)
    }

    pub fn norm(&mut self, role: Role, len: usize) -> Result<Norm, DecoderError> {
        let weight = self.view(role, &[len])?.to_tensor(DType::F32, &self.model.placement.device)?;
        Ok(Norm { weight, eps: self.model.config.norm_eps })
    }

    /// The bytes of a tensor, or of its part of a fused one.
    fn view(&mut self, role: Role, shape: &[usize]) -> Result<View, WeightsError> {
        let place = self.model.place(role, shape)?;
        let whole = match self.fused.get(&place.name) {
            Some(view) => view.clone(),
            None => self.model.weights.read(&place.name)?,
        };
        if whole.info.shape != place.shape || whole.data.len() != whole.info.bytes() {
            let reason = format!("got {} bytes of shape {:?}, expected shape {:?}", whole.data.len(), whole.info.shape, place.shape);
            return Err(WeightsError::Read { tensor: place.name, reason });
        }
        if place.shape == shape {
            return Ok(whole);
        }
        let row = whole.info.dtype.bytes(shape[1..].iter().product());
        let data = whole.data.slice(place.rows.start * row..place.rows.end * row);
        let info = TensorInfo { dtype: whole.info.dtype, shape: shape.to_vec() };
        self.fused.insert(place.name, whole);
        Ok(View { info, data })
    }
}
