//! Where a family's tensors lie in a GGUF file, and how they are read: one place knows llama.cpp's names.

use std::collections::HashMap;

use bytes::Bytes;
use candle_core::{
    Device,
    quantized::{GgmlDType, ggml_file::qtensor_from_ggml},
};
use upcycle_architectures::{AttentionPart, Config, Dtype, Family, LayerRole, Projection, Role, TensorInfo, View, Weights, WeightsError};

use super::read::{Gguf, Stored};

/// The tensors of a GGUF file by their family's names.
pub(super) struct Tensors(HashMap<String, Tensor>);

struct Tensor {
    stored: Stored,
    dtype: GgmlDType,
    /// Heads whose rows llama.cpp has put in another order.
    interleaved: Option<usize>,
}

/// Finds every tensor that the config calls for; every tensor in the file must be one of them.
pub(super) fn find(gguf: &Gguf, family: &Family, config: &Config) -> Result<Tensors, String> {
    // Read by `config` already, or nothing at all: a divisor for each frequency.
    let mut unused: std::collections::BTreeSet<&str> =
        gguf.tensors.keys().map(String::as_str).filter(|name| *name != "rope_freqs.weight").collect();
    let interleaves = gguf.text("general.architecture")? == Some("llama");
    if interleaves && config.head_dim % 2 == 1 {
        return Err(format!("heads of {} dimensions cannot be rotated in pairs", config.head_dim));
    }
    let mut tensors = HashMap::new();
    for (role, shape) in family.tensors(config) {
        let Some(target) = family.name(role) else { continue };
        let (name, stored) = locate(gguf, role).ok_or_else(|| format!("tensor `{}` is missing", names(role).join("` or `")))?;
        unused.remove(name.as_str());
        let dtype = stored.dtype.clone().map_err(|dtype| {
            format!("tensor `{name}` is stored as {dtype}, which is not read; use a file quantised as Q8_0, Q4_K_M, Q6_K or the like")
        })?;
        // The gate of a shared expert, [1, D], is stored as [D].
        if stored.shape != shape && shape.strip_prefix(&[1]) != Some(&stored.shape) {
            return Err(format!("tensor `{name}` has shape {:?}, but the metadata makes it {shape:?}", stored.shape));
        }
        let interleaved = match role {
            Role::Layer(_, LayerRole::Attention(AttentionPart::Q | AttentionPart::QBias)) if interleaves => Some(config.heads),
            Role::Layer(_, LayerRole::Attention(AttentionPart::K | AttentionPart::KBias)) if interleaves => Some(config.kv_heads),
            _ => None,
        };
        tensors.insert(target, Tensor { stored: Stored { shape, ..stored }, dtype, interleaved });
    }
    match unused.first() {
        Some(name) => Err(format!("tensor `{name}` has no place in a {} model", family.model_type)),
        None => Ok(Tensors(tensors)),
    }
}

/// The first of a role's names that the file has, with the tensor or the expert's share of it.
fn locate(gguf: &Gguf, role: Role) -> Option<(String, Stored)> {
    names(role).into_iter().find_map(|name| {
        let stored = gguf.tensors.get(&name)?;
        let share = match role {
            Role::Layer(_, LayerRole::Expert(expert, _)) if name.ends_with("_exps.weight") => share(stored, expert)?,
            _ => stored.clone(),
        };
        Some((name, share))
    })
}

/// Expert e of a stack `[E, ...]`: rows are whole blocks, so the bytes divide evenly.
fn share(stack: &Stored, expert: usize) -> Option<Stored> {
    let (&experts, shape) = stack.shape.split_first()?;
    let length = stack.data.len().checked_div(experts)?;
    let data =
        if stack.dtype.is_ok() && expert < experts { stack.data.slice(expert * length..(expert + 1) * length) } else { Bytes::new() };
    (expert < experts).then(|| Stored { dtype: stack.dtype.clone(), shape: shape.to_vec(), data })
}

/// llama.cpp's names of a role, the present one first.
pub(crate) fn names(role: Role) -> Vec<String> {
    let projection = |projection| match projection {
        Projection::Gate => "ffn_gate",
        Projection::Up => "ffn_up",
        Projection::Down => "ffn_down",
    };
    let (layer, names) = match role {
        Role::Embedding => return vec!["token_embd.weight".into()],
        Role::FinalNorm => return vec!["output_norm.weight".into()],
        Role::Head => return vec!["output.weight".into()],
        Role::Layer(layer, role) => (
            layer,
            match role {
                LayerRole::InputNorm => vec!["attn_norm.weight".to_owned()],
                LayerRole::PostNorm => vec!["ffn_norm.weight".into()],
                LayerRole::Attention(part) => vec![
                    match part {
                        AttentionPart::Q => "attn_q.weight",
                        AttentionPart::K => "attn_k.weight",
                        AttentionPart::V => "attn_v.weight",
                        AttentionPart::O => "attn_output.weight",
                        AttentionPart::QBias => "attn_q.bias",
                        AttentionPart::KBias => "attn_k.bias",
                        AttentionPart::VBias => "attn_v.bias",
                        AttentionPart::OBias => "attn_output.bias",
                        AttentionPart::QNorm => "attn_q_norm.weight",
                        AttentionPart::KNorm => "attn_k_norm.weight",
                    }
                    .into(),
                ],
                LayerRole::Mlp(p) => vec![format!("{}.weight", projection(p))],
                LayerRole::MlpBias(p) => vec![format!("{}.bias", projection(p))],
                LayerRole::Router => vec!["ffn_gate_inp.weight".into()],
                // Until April 2024 every expert had tensors of its own.
                LayerRole::Expert(e, p) => vec![format!("{}_exps.weight", projection(p)), format!("{}.{e}.weight", projection(p))],
                LayerRole::SharedExpert(p) => vec![format!("{}_shexp.weight", projection(p))],
                LayerRole::SharedGate => vec!["ffn_gate_inp_shexp.weight".into()],
            },
        ),
    };
    names.into_iter().map(|name| format!("blk.{layer}.{name}")).collect()
}

/// The type in which a tensor is handed out: its own if [`Dtype`] has it, else f32. `None` if it is not read.
pub(super) fn dtype(stored: &Stored) -> Option<Dtype> {
    stored.dtype.as_ref().ok().map(|dtype| match dtype {
        GgmlDType::F16 => Dtype::F16,
        GgmlDType::BF16 => Dtype::Bf16,
        GgmlDType::Q4_0 => Dtype::Q4_0,
        GgmlDType::Q5_0 => Dtype::Q5_0,
        GgmlDType::Q8_0 => Dtype::Q8_0,
        GgmlDType::Q4K => Dtype::Q4K,
        GgmlDType::Q5K => Dtype::Q5K,
        GgmlDType::Q6K => Dtype::Q6K,
        _ => Dtype::F32,
    })
}

/// The values of a tensor outside the families' own.
pub(crate) fn floats(gguf: &Gguf, name: &str) -> Result<Vec<f32>, String> {
    let stored = gguf.tensors.get(name).ok_or_else(|| format!("tensor `{name}` is missing"))?;
    let dtype = stored.dtype.clone().map_err(|dtype| format!("tensor `{name}` is stored as {dtype}, which is not read"))?;
    let view = Tensor { stored: stored.clone(), dtype, interleaved: None }.read(name).map_err(|error| error.to_string())?;
    Ok(view.to_f32())
}

impl Tensor {
    fn info(&self) -> TensorInfo {
        TensorInfo { dtype: dtype(&self.stored).unwrap_or(Dtype::F32), shape: self.stored.shape.clone() }
    }

    fn read(&self, name: &str) -> Result<View, WeightsError> {
        let TensorInfo { dtype, shape } = self.info();
        let mut view = match self.dtype {
            own if own == GgmlDType::F32 || dtype != Dtype::F32 => {
                View { info: TensorInfo { dtype, shape }, data: self.stored.data.clone() }
            }
            other => {
                let values = dequantise(other, &self.stored.data, &shape);
                let values = values.map_err(|error| WeightsError::Read { tensor: name.to_owned(), reason: error.to_string() })?;
                View::from_f32(&values, dtype, shape)?
            }
        };
        if let (Some(heads), Some(rows)) = (self.interleaved, view.info.shape.first()) {
            view.data = half_split_order(&view.data, heads, *rows);
        }
        Ok(view)
    }
}

/// The values of a quantised tensor. candle casts the bytes to its blocks without a check of its own: `read` has seen to it that they are
/// as many as the shape needs and lie at a multiple of 8 in the map, or a whole number of blocks behind one. (Blocks are of even size, and
/// no field of one is wider than two bytes.)
fn dequantise(dtype: GgmlDType, data: &[u8], shape: &[usize]) -> candle_core::Result<Vec<f32>> {
    qtensor_from_ggml(dtype, data, shape.to_vec(), &Device::Cpu)?.dequantize(&Device::Cpu)?.flatten_all()?.to_vec1()
}

/// llama.cpp turns neighbouring rows (2i, 2i+1) of a head; transformers turns (i, i + hd/2). This is the order of transformers. A row is whole
/// elements or blocks, so its bytes move as they are.
fn half_split_order(data: &[u8], heads: usize, rows: usize) -> Bytes {
    let (row, half) = (data.len() / rows.max(1), rows / heads.max(1) / 2);
    let mut out = Vec::with_capacity(data.len());
    for head in 0..heads {
        for part in 0..2 {
            for i in 0..half {
                let at = (head * half * 2 + i * 2 + part) * row;
                out.extend_from_slice(&data[at..at + row]);
            }
        }
    }
    out.into()
}

impl Weights for Tensors {
    fn names(&self) -> Vec<String> {
        self.0.keys().cloned().collect()
    }

    fn info(&self, name: &str) -> Option<TensorInfo> {
        self.0.get(name).map(Tensor::info)
    }

    fn read(&self, name: &str) -> Result<View, WeightsError> {
        self.0.get(name).ok_or_else(|| WeightsError::Missing { tensor: name.to_owned() })?.read(name)
    }
}
