//! A model whose matrices are encoded when they are read: for use straight away, without a file.

use std::{collections::HashMap, ops::Range, sync::Arc};

use rayon::prelude::*;
use upcycle_architectures::{Config, Dtype, Family, LayerRole, Projection, Role, TensorInfo, View, Weights, WeightsError};

use super::Scheme;

/// Elements that a thread encodes at a time: what bounds the memory that takes.
pub(crate) const CHUNK: usize = 1 << 18;

/// The weights of a model in the types of a scheme. What is stored in blocks already stays as it is.
pub struct Quantised {
    weights: Arc<dyn Weights>,
    types: HashMap<String, Dtype>,
}

impl Quantised {
    /// `weights` are those of a model of this family and config, in either layout.
    pub fn new(weights: Arc<dyn Weights>, family: &Family, config: &Config, scheme: Scheme) -> Self {
        let mut types = HashMap::new();
        for (role, shape) in family.tensors(config) {
            let is_gate = matches!(role, Role::Layer(_, LayerRole::Router | LayerRole::SharedGate));
            let &[_, row] = shape.as_slice() else { continue };
            if is_gate {
                continue;
            }
            let fused = match role {
                Role::Layer(l, LayerRole::Expert(0, Projection::Gate)) => family.fused_names(l).map(|[_, gate_up, _]| gate_up),
                Role::Layer(l, LayerRole::Expert(0, Projection::Down)) => family.fused_names(l).map(|[_, _, down]| down),
                _ => None,
            };
            let dtype = scheme.dtype(config, role, row);
            types.extend([family.name(role), fused].into_iter().flatten().map(|name| (name, dtype)));
        }
        Self { weights, types }
    }

    /// The type that a tensor is to have, if it is to be changed.
    fn wanted(&self, name: &str, own: Dtype) -> Option<Dtype> {
        self.types.get(name).copied().filter(|wanted| *wanted != own && !own.is_blocks())
    }
}

impl Weights for Quantised {
    fn names(&self) -> Vec<String> {
        self.weights.names()
    }

    fn info(&self, name: &str) -> Option<TensorInfo> {
        let info = self.weights.info(name)?;
        Some(TensorInfo { dtype: self.wanted(name, info.dtype).unwrap_or(info.dtype), ..info })
    }

    fn read(&self, name: &str) -> Result<View, WeightsError> {
        let view = self.weights.read(name)?;
        let Some(dtype) = self.wanted(name, view.info.dtype) else { return Ok(view) };
        let row = view.info.shape.last().copied().unwrap_or(1).max(1);
        let (count, step) = (view.info.elements() / row, (CHUNK / row).max(1));
        let mut data = vec![0; dtype.bytes(count * row)];
        data.par_chunks_mut(dtype.bytes(step * row)).enumerate().try_for_each(|(i, out)| {
            let part = rows(&view, i * step..count.min((i + 1) * step)).cast(dtype)?;
            out.copy_from_slice(&part.data);
            Ok::<_, WeightsError>(())
        })?;
        Ok(View { info: TensorInfo { dtype, shape: view.info.shape }, data: data.into() })
    }
}

/// Rows of a tensor, of its last dimension.
pub(crate) fn rows(view: &View, rows: Range<usize>) -> View {
    let (dtype, row) = (view.info.dtype, view.info.shape.last().copied().unwrap_or(1));
    let data = view.data.slice(dtype.bytes(rows.start * row)..dtype.bytes(rows.end * row));
    View { info: TensorInfo { dtype, shape: vec![rows.len(), row] }, data }
}
