//! A model as one GGUF file, in the types of a [`Scheme`], which llama.cpp loads as well as we do.
//!
//! The file is laid out before a byte is written, then filled tensor by tensor, a few rows per thread at a time, under another name that ends
//! in `.partial`; it gets its own when it is complete. What lies in the wanted type already is copied.

pub(crate) mod file;
mod metadata;
mod tokenizer;

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
};

use bytes::Bytes;
use rayon::prelude::*;
use upcycle_architectures::{Config, Dtype, Family, LayerRole, Role, View, Weights, WeightsError, blocks, decoder::tensor};

use self::{
    file::{Info, Value},
    metadata::Architecture,
};
use super::{Progress, fill::write_at};
use crate::{
    quantize::{self, Importance, Mix, Scheme},
    source::{self, Sidecar},
};

/// What is written.
#[derive(Clone, Copy)]
pub struct Model<'a> {
    /// `general.name`
    pub name: &'a str,
    /// its family
    pub family: &'static Family,
    /// its config
    pub config: &'a Config,
    /// its tensors, in either layout
    pub weights: &'a dyn Weights,
    /// its tokenizer and chat template among them
    pub sidecars: &'a BTreeMap<String, Sidecar>,
}

/// Why there is no file.
#[derive(Debug, thiserror::Error)]
pub enum GgufError {
    /// There is a file of that name.
    #[error("{} is there already; give another name, or `--overwrite`", .0.display())]
    Occupied(PathBuf),
    /// The model has no place in a GGUF file.
    #[error("this model cannot be written to GGUF: {0}")]
    Unsupported(String),
    /// A tensor could not be read.
    #[error(transparent)]
    Weights(#[from] WeightsError),
    /// A tensor with NaN or infinity in it.
    #[error("tensor `{tensor}` has NaN or infinite values; the model is damaged: fetch it or compose it again")]
    NonFinite {
        /// its name in the file
        tensor: String,
    },
    /// A file operation failed; the message names the file.
    #[error(transparent)]
    Io(#[from] std::io::Error),
}

/// What was written.
#[derive(Debug, Clone)]
pub struct Written {
    /// length of the file
    pub bytes: u64,
    /// elements of all tensors
    pub elements: u64,
    /// how many tensors are of each type
    pub types: BTreeMap<Dtype, usize>,
    /// matrices that importance could have helped, and of which it is not known
    pub unknown: usize,
}

/// A tensor of the file.
struct Planned {
    name: String,
    /// as it is written
    shape: Vec<usize>,
    dtype: Dtype,
    /// what lies in it end to end: one tensor, or all experts'
    parts: Vec<Role>,
    /// of one part
    part: Vec<usize>,
    /// heads whose rows are put in another order
    heads: Option<usize>,
}

/// Writes the model to `out`. `importance` says how much each column of a matrix matters.
pub fn write(
    model: &Model<'_>,
    out: &Path,
    scheme: Scheme,
    importance: Option<&Importance>,
    progress: &dyn Progress,
) -> Result<Written, GgufError> {
    let unsupported = GgufError::Unsupported;
    let architecture = Architecture::of(model).map_err(unsupported)?;
    architecture.warnings.iter().for_each(|warning| progress.note(warning));
    let (mut metadata, divisors) = metadata::make(model, &architecture).map_err(unsupported)?;
    metadata.push(("general.file_type".into(), Value::U32(file_type(scheme.mix))));
    metadata.extend(tokenizer::metadata(model.sidecars, model.config).map_err(unsupported)?);
    let tensors = plan(model, &architecture, scheme, progress);

    let divisors_shape = divisors.as_ref().map(|divisors| [divisors.len()]);
    let mut infos: Vec<Info<'_>> = tensors.iter().map(|t| Info { name: &t.name, shape: &t.shape, dtype: t.dtype }).collect();
    infos.extend(divisors_shape.as_ref().map(|shape| Info { name: "rope_freqs.weight", shape, dtype: Dtype::F32 }));
    let layout = file::layout(&metadata, &infos);

    let name = out.file_name().unwrap_or_default().to_string_lossy();
    let partial = out.with_file_name(format!(".{name}.partial"));
    let written = || {
        let target = fs_err::OpenOptions::new().write(true).create(true).truncate(true).open(&partial)?;
        target.set_len(layout.end)?;
        write_at(&target, &layout.header, 0)?;
        progress.begin(layout.end, 0);
        for (planned, offset) in tensors.iter().zip(&layout.offsets) {
            fill_tensor(model, planned, (&target, *offset), importance, progress)?;
        }
        if let (Some(divisors), Some(at)) = (divisors, layout.offsets.last()) {
            write_at(&target, &divisors.iter().flat_map(|divisor| divisor.to_le_bytes()).collect::<Vec<_>>(), *at)?;
        }
        Ok(target.sync_all()?)
    };
    match written() {
        Ok(()) => fs_err::rename(&partial, out)?,
        Err(error) => {
            // What stopped the writing is what is to be said.
            let _ = fs_err::remove_file(&partial);
            return Err(error);
        }
    }
    let mut types = BTreeMap::new();
    tensors.iter().for_each(|tensor| *types.entry(tensor.dtype).or_default() += 1);
    let elements = tensors.iter().map(|tensor| tensor.shape.iter().product::<usize>() as u64).sum();
    let known = |tensor: &&Planned| {
        let row = tensor.part.last().copied().unwrap_or(1);
        importance.is_some_and(|importance| (0..tensor.parts.len()).any(|part| importance.of(&tensor.name, part, row).is_some()))
    };
    let weighed = |tensor: &&Planned| {
        let plain = matches!(tensor.parts[0], Role::Embedding | Role::Head) || tensor.dtype == Dtype::Q8_0;
        tensor.dtype.is_blocks() && !plain
    };
    let unknown = tensors.iter().filter(weighed).filter(|tensor| !known(tensor)).count();
    Ok(Written { bytes: layout.end, elements, types, unknown })
}

/// `llama_ftype`
const fn file_type(mix: Mix) -> u32 {
    match mix {
        Mix::F32 => 0,
        Mix::F16 => 1,
        Mix::Q4_0 => 2,
        Mix::Q8_0 => 7,
        Mix::Q4KS => 14,
        Mix::Q4KM => 15,
        Mix::Q5KS => 16,
        Mix::Q5KM => 17,
        Mix::Q6K => 18,
        Mix::Bf16 => 32,
    }
}

/// Every tensor of the file, experts stacked. Says which types did not fit.
fn plan(model: &Model<'_>, architecture: &Architecture, scheme: Scheme, progress: &dyn Progress) -> Vec<Planned> {
    let config = model.config;
    let mut fallbacks: BTreeMap<(usize, Dtype, Dtype), usize> = BTreeMap::new();
    let mut roles = model.family.tensors(config);
    if architecture.needs_head && config.tied {
        roles.push((Role::Head, vec![config.vocab, config.hidden]));
    }
    let mut tensors = Vec::new();
    for (role, part) in roles {
        let (mut shape, mut parts) = (part.clone(), vec![role]);
        match role {
            Role::Layer(_, LayerRole::SharedExpert(_) | LayerRole::SharedGate) if architecture.without_shared => continue,
            Role::Layer(_, LayerRole::SharedGate) => shape = vec![config.hidden],
            Role::Layer(layer, LayerRole::Expert(0, projection)) => {
                let experts = config.moe.as_ref().map_or(0, |moe| moe.experts);
                shape.insert(0, experts);
                parts = (0..experts).map(|e| Role::Layer(layer, LayerRole::Expert(e, projection))).collect();
            }
            Role::Layer(_, LayerRole::Expert(..)) => continue,
            // The embedding stands in for a head that is tied to it.
            Role::Head if config.tied => parts = vec![Role::Embedding],
            _ => {}
        }
        let row = shape.last().copied().unwrap_or(1);
        let (dtype, wanted) = (scheme.dtype(config, role, row), scheme.wanted(config, role));
        if dtype != wanted {
            *fallbacks.entry((row, wanted, dtype)).or_default() += 1;
        }
        let name = source::gguf::names(role).into_iter().next().unwrap_or_default();
        let heads = if architecture.interleaved { metadata::interleaved(config, role) } else { None };
        tensors.push(Planned { name, shape, dtype, parts, part, heads });
    }
    for ((row, wanted, dtype), count) in fallbacks {
        let block = wanted.block().0;
        progress.note(&format!("{count} tensors have rows of {row}, no multiple of {wanted}'s {block}: they become {dtype}"));
    }
    tensors
}

/// Reads a tensor's parts, one after another, and writes them from `offset` on.
fn fill_tensor(
    model: &Model<'_>,
    planned: &Planned,
    (target, offset): (&fs_err::File, u64),
    importance: Option<&Importance>,
    progress: &dyn Progress,
) -> Result<(), GgufError> {
    let row = planned.part.last().copied().unwrap_or(1);
    let mut at = offset;
    for (i, role) in planned.parts.iter().enumerate() {
        let mut view = tensor(model.family, model.config, model.weights, *role, &planned.part)?;
        if let Some(heads) = planned.heads {
            view.data = interleaved_order(&view.data, heads, planned.part[0]);
        }
        let columns = importance.and_then(|importance| importance.of(&planned.name, i, row));
        fill(target, at, &view, planned, columns, progress)?;
        at += planned.dtype.bytes(view.info.elements()) as u64;
    }
    Ok(())
}

/// Encodes a part and writes it, some rows per thread at a time.
fn fill(
    target: &fs_err::File,
    offset: u64,
    view: &View,
    planned: &Planned,
    importance: Option<&[f32]>,
    progress: &dyn Progress,
) -> Result<(), GgufError> {
    let row = planned.part.last().copied().unwrap_or(1).max(1);
    let (count, step) = (view.info.elements() / row, (quantize::CHUNK / row).max(1));
    (0..count.div_ceil(step)).into_par_iter().try_for_each(|i| {
        let rows = quantize::rows(view, i * step..count.min((i + 1) * step));
        let bytes = if rows.info.dtype == planned.dtype && planned.dtype.is_blocks() {
            rows.data
        } else {
            encode(&rows, planned.dtype, row, importance).ok_or_else(|| GgufError::NonFinite { tensor: planned.name.clone() })??
        };
        write_at(target, &bytes, offset + planned.dtype.bytes(i * step * row) as u64)?;
        progress.advance(bytes.len() as u64);
        Ok(())
    })
}

/// `None` if a value is not finite, before or after.
fn encode(rows: &View, dtype: Dtype, row: usize, importance: Option<&[f32]>) -> Option<Result<Bytes, WeightsError>> {
    let values = rows.to_f32();
    // f16 ends at 65504.
    let limit = if dtype == Dtype::F16 { 65504.0 } else { f32::MAX };
    if !values.iter().all(|value| value.abs() <= limit) {
        return None;
    }
    Some(match blocks::encode(dtype, &values, row, importance) {
        Some(bytes) => Ok(bytes.into()),
        None => View::from_f32(&values, dtype, rows.info.shape.clone()).map(|view| view.data),
    })
}

/// transformers turns the rows (i, i + hd/2) of a head; llama.cpp turns neighbours. This is the order of llama.cpp.
fn interleaved_order(data: &[u8], heads: usize, rows: usize) -> Bytes {
    let (row, half) = (data.len() / rows.max(1), rows / heads.max(1) / 2);
    let mut out = Vec::with_capacity(data.len());
    for head in 0..heads {
        for i in 0..half {
            for part in 0..2 {
                let at = (head * half * 2 + part * half + i) * row;
                out.extend_from_slice(&data[at..at + row]);
            }
        }
    }
    out.into()
}

/// Whether `out` may be written.
pub fn check(out: &Path, overwrite: bool) -> Result<(), GgufError> {
    if out.exists() && !overwrite { Err(GgufError::Occupied(out.to_owned())) } else { Ok(()) }
}
