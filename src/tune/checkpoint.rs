//! Training as it stands, in one file: the variables, what the optimiser knows, the best values so far, and where it is.

use std::{collections::HashMap, path::Path};

use candle_core::{Device, Tensor};
use safetensors::{Dtype, SafeTensors, tensor::TensorView};
use serde::{Deserialize, Serialize};

use super::{Stage, TuneError, parameters::Parameters};

/// Where training is.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(super) struct State {
    /// of everything that decides the outcome
    pub key: String,
    pub stage: Stage,
    /// steps made in this stage
    pub step: usize,
    /// held-out loss of each domain at the start, and the best
    pub start: Vec<f64>,
    pub best: Vec<f64>,
    /// when that was
    pub best_at: Option<(Stage, usize)>,
    /// evaluations since then, in this stage
    pub stale: usize,
    /// tokens trained on
    pub tokens: u64,
}

const METADATA: &str = "state";
const PARTS: [&str; 4] = ["value", "best", "first moment", "second moment"];

/// Writes the file, whole or not at all. `best` are the best values of the slots.
pub(super) fn save(path: &Path, state: &State, parameters: &Parameters, best: &[Tensor]) -> Result<(), TuneError> {
    let mut data: Vec<(String, Vec<usize>, Vec<u8>)> = Vec::new();
    for (slot, best) in parameters.slots.iter().zip(best) {
        let parts = [slot.var.as_tensor(), best, &slot.moments[0], &slot.moments[1]];
        for (part, tensor) in PARTS.iter().zip(parts) {
            let values = tensor.to_device(&Device::Cpu)?.flatten_all()?.to_vec1::<f32>()?;
            let bytes = values.iter().flat_map(|value| value.to_le_bytes()).collect();
            data.push((format!("{} {part}", slot.name), tensor.dims().to_vec(), bytes));
        }
    }
    let failed = |error: &dyn std::fmt::Display| std::io::Error::other(format!("{}: {error}", path.display()));
    let views = data.iter().map(|(name, shape, bytes)| Ok((name, TensorView::new(Dtype::F32, shape.clone(), bytes)?)));
    let views = views.collect::<Result<Vec<_>, safetensors::SafeTensorError>>().map_err(|error| failed(&error))?;
    let metadata = HashMap::from([(METADATA.to_owned(), serde_json::to_string(state).map_err(|error| failed(&error))?)]);
    let bytes = safetensors::serialize(views, Some(metadata)).map_err(|error| failed(&error))?;
    let partial = path.with_extension("partial");
    fs_err::write(&partial, bytes)?;
    Ok(fs_err::rename(&partial, path)?)
}

/// What stands in the file: the state, and the values for [`restore`]. `None` if there is none, or it is damaged.
pub(super) fn open(path: &Path) -> Option<(State, Vec<u8>)> {
    let bytes = fs_err::read(path).ok()?;
    let (_, metadata) = SafeTensors::read_metadata(&bytes).ok()?;
    let state = serde_json::from_str(metadata.metadata().as_ref()?.get(METADATA)?).ok()?;
    Some((state, bytes))
}

/// Puts the values of a checkpoint of the same key into the parameters and gives the best ones.
pub(super) fn restore(bytes: &[u8], parameters: &mut Parameters) -> Result<Vec<Tensor>, TuneError> {
    let damaged = |what: String| TuneError::Checkpoint { reason: what };
    let tensors = SafeTensors::deserialize(bytes).map_err(|error| damaged(error.to_string()))?;
    let mut best = Vec::new();
    for slot in &mut parameters.slots {
        let read = |part: &str| {
            let name = format!("{} {part}", slot.name);
            let view = tensors.tensor(&name).map_err(|error| damaged(format!("{name}: {error}")))?;
            let values: Vec<f32> = view.data().as_chunks::<4>().0.iter().map(|bytes| f32::from_le_bytes(*bytes)).collect();
            if view.shape() != slot.var.dims() {
                return Err(damaged(format!("{name} has shape {:?}, expected {:?}", view.shape(), slot.var.dims())));
            }
            Ok(Tensor::from_vec(values, slot.var.shape(), slot.var.device())?)
        };
        slot.var.set(&read(PARTS[0])?)?;
        best.push(read(PARTS[1])?);
        slot.moments = [read(PARTS[2])?, read(PARTS[3])?];
    }
    Ok(best)
}
