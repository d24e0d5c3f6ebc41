//! Statistics as a safetensors file: for expert e and fold f `e.f.keys`, u64 `[n]`, and `e.f.rows`, f16 [n, L, D]; the rest is JSON in the
//! metadata. Files come from strangers: nothing is believed that the file does not show.

use std::{collections::HashMap, path::Path};

use bytes::Bytes;
use half::f16;
use safetensors::{Dtype, SafeTensors, tensor::TensorView};
use serde::{Deserialize, Serialize};

use super::{Domain, ExpertId, Part, Routing, Stats, StatsError};
use crate::{calibrate::FOLDS, source};

/// Key of the metadata.
const KEY: &str = "upcycle_stats";
/// Counts changes of the format.
const VERSION: u32 = 1;

#[derive(Serialize, Deserialize)]
struct Header {
    version: u32,
    routing: Routing,
    composite: String,
    layers: usize,
    hidden: usize,
    experts: Vec<Entry>,
}

#[derive(Serialize, Deserialize)]
struct Entry {
    #[serde(flatten)]
    expert: ExpertId,
    /// tokens of each fold
    seen: Vec<u64>,
}

pub(super) fn write(stats: &Stats, path: &Path) -> Result<(), StatsError> {
    let entry = |domain: &Domain| Entry { expert: domain.expert.clone(), seen: domain.folds.iter().map(|part| part.seen).collect() };
    let Stats { routing, composite, layers, hidden, experts } = stats;
    let header = Header {
        version: VERSION,
        routing: *routing,
        composite: composite.clone(),
        layers: *layers,
        hidden: *hidden,
        experts: experts.iter().map(entry).collect(),
    };
    let header = serde_json::to_string(&header).map_err(std::io::Error::from)?;
    let parts = || experts.iter().enumerate().flat_map(|(e, domain)| (0..).zip(&domain.folds).map(move |(f, part)| (e, f, part)));
    let keys: Vec<Vec<u8>> = parts().map(|(_, _, part)| part.keys.iter().flat_map(|key| key.to_le_bytes()).collect()).collect();
    let mut tensors = Vec::new();
    let refused = |error: safetensors::SafeTensorError| std::io::Error::other(format!("cannot write {}: {error}", path.display()));
    for ((e, fold, part), keys) in parts().zip(&keys) {
        let n = part.keys.len();
        tensors.push((name(e, fold, "keys"), TensorView::new(Dtype::U64, vec![n], keys).map_err(refused)?));
        tensors.push((name(e, fold, "rows"), TensorView::new(Dtype::F16, vec![n, *layers, *hidden], &part.rows).map_err(refused)?));
    }
    let partial = path.with_extension(format!("{}.partial", std::process::id()));
    let metadata = HashMap::from([(KEY.to_owned(), header)]);
    let written = safetensors::serialize_to_file(tensors, Some(metadata), &partial).map_err(refused);
    if written.is_err() {
        // What could not be finished is of no use.
        let _ = fs_err::remove_file(&partial);
    }
    written?;
    Ok(fs_err::rename(partial, path)?)
}

fn name(expert: usize, fold: usize, what: &str) -> String {
    format!("{expert}.{fold}.{what}")
}

/// Opens a file of statistics. The sample stays in the file's map until it is needed.
pub fn read(path: &Path) -> Result<Stats, StatsError> {
    parse(&source::map(path)?).map_err(|reason| StatsError::File { file: path.to_owned(), reason })
}

fn parse(bytes: &Bytes) -> Result<Stats, String> {
    let (_, metadata) =
        SafeTensors::read_metadata(bytes).map_err(|error| format!("it is no safetensors file, or it was cut short ({error})"))?;
    let tensors = SafeTensors::deserialize(bytes).map_err(|error| error.to_string())?;
    let header = metadata.metadata().as_ref().and_then(|all| all.get(KEY)).ok_or("it is a safetensors file without statistics")?;
    let version = serde_json::from_str(header).ok().and_then(|json: serde_json::Value| json["version"].as_u64());
    if version.is_some_and(|version| version > u64::from(VERSION)) {
        return Err("a newer upcycle wrote it: get that one".to_owned());
    }
    let header: Header = serde_json::from_str(header).map_err(|error| format!("its metadata is damaged ({error})"))?;
    let Header { routing, composite, layers, hidden, experts, .. } = header;
    let width = layers.checked_mul(hidden).and_then(|size| size.checked_mul(2)).filter(|width| *width > 0);
    if width.is_none() {
        return Err(format!("{layers} routers of width {hidden} cannot be"));
    }
    let mut domains: Vec<Domain> = Vec::new();
    for (e, Entry { expert, seen }) in experts.into_iter().enumerate() {
        if expert.name.chars().any(char::is_control) || domains.iter().any(|domain| domain.expert.name == expert.name) {
            return Err(format!("the name of expert {e}, {:?}, is no name, or another's", expert.name));
        }
        if seen.len() != FOLDS {
            return Err(format!("expert `{}` has {} folds, not {FOLDS}", expert.name, seen.len()));
        }
        let mut folds = Vec::new();
        for (fold, seen) in seen.into_iter().enumerate() {
            let tensor = |what: &str, dtype: Dtype, shape: &dyn Fn(usize) -> Vec<usize>| {
                let name = name(e, fold, what);
                let view = tensors.tensor(&name).map_err(|_| format!("tensor `{name}` is missing"))?;
                let n = view.shape().first().copied().unwrap_or(0);
                let (found, expected) = (view.shape(), shape(n));
                if view.dtype() != dtype || found != expected {
                    return Err(format!("tensor `{name}` is {:?} of {found:?}, not {dtype:?} of {expected:?}", view.dtype()));
                }
                Ok(bytes.slice_ref(view.data()))
            };
            let keys = tensor("keys", Dtype::U64, &|n| vec![n])?;
            let keys: Vec<u64> = keys.as_chunks().0.iter().map(|key| u64::from_le_bytes(*key)).collect();
            let rows = tensor("rows", Dtype::F16, &|_| vec![keys.len(), layers, hidden])?;
            if (keys.len() as u64) > seen || (keys.is_empty() && seen > 0) {
                return Err(format!("expert `{}` keeps {} of {seen} tokens in fold {fold}", expert.name, keys.len()));
            }
            if !rows.as_chunks().0.iter().all(|value| f16::from_le_bytes(*value).is_finite()) {
                return Err(format!("rows of expert `{}` are not finite", expert.name));
            }
            folds.push(Part { seen, keys, rows });
        }
        domains.push(Domain { expert, folds });
    }
    Ok(Stats { routing, composite, layers, hidden, experts: domains })
}
