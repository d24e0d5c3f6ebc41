//! Safetensors checkpoints: one file or shards with an index, memory-mapped.
//!
//! Everything is checked from the headers when a checkpoint is opened: no tensor byte is touched, and nothing is allocated that the file's
//! own length does not bound. Reading a tensor afterwards is a slice of the map.

use std::{
    collections::{BTreeMap, HashMap, hash_map::Entry},
    path::{Component, Path, PathBuf},
    sync::Arc,
};

use bytes::Bytes;
use safetensors::{SafeTensors, tensor::SafeTensorError};
use upcycle_architectures::{Dtype, TensorInfo, View, Weights, WeightsError};

use super::{DataFile, Extent, SourceError, map, read_json};

/// The tensors of one or more safetensors files.
#[derive(Debug)]
pub(super) struct Checkpoint {
    tensors: HashMap<String, Stored>,
    files: Vec<Arc<DataFile>>,
}

#[derive(Debug)]
struct Stored {
    /// Name of the shard, for messages.
    shard: PathBuf,
    /// `Err` is the name of a type that no model computes with.
    dtype: Result<Dtype, String>,
    shape: Vec<usize>,
    data: Bytes,
    /// Index of its file, and where it lies there.
    file: usize,
    offset: u64,
}

impl Checkpoint {
    /// Opens one file.
    pub(super) fn open(file: &Path) -> Result<Self, SourceError> {
        let mut checkpoint = Self { tensors: HashMap::new(), files: Vec::new() };
        checkpoint.add(file)?;
        Ok(checkpoint)
    }

    /// Opens the shards that `model.safetensors.index.json` lists, which lie beside it.
    pub(super) fn open_sharded(index: &Path) -> Result<Self, SourceError> {
        let weight_map = read_index(index)?;
        let mut checkpoint = Self { tensors: HashMap::with_capacity(weight_map.len()), files: Vec::new() };
        for shard in shards(&weight_map) {
            let file = index.with_file_name(shard);
            if !file.exists() {
                return Err(SourceError::MissingShard { index: index.to_owned(), shard: shard.to_owned() });
            }
            checkpoint.add(&file)?;
        }
        for (tensor, shard) in &weight_map {
            match checkpoint.tensors.get(tensor) {
                Some(stored) if stored.shard.file_name().is_some_and(|name| name == shard.as_str()) => {}
                _ => return Err(SourceError::NotInShard { index: index.to_owned(), tensor: tensor.clone(), shard: shard.clone() }),
            }
        }
        Ok(checkpoint)
    }

    /// Fails if a tensor of this name is stored in a type that no model computes with: what a quantised checkpoint looks like.
    pub(super) fn check_dtype(&self, tensor: &str) -> Result<(), SourceError> {
        match self.tensors.get(tensor) {
            Some(Stored { shard, dtype: Err(dtype), .. }) => {
                Err(SourceError::UnsupportedDtype { file: shard.clone(), tensor: tensor.to_owned(), dtype: dtype.clone() })
            }
            _ => Ok(()),
        }
    }

    /// Puts `prefix` before the name of every tensor that `without` does not name: for checkpoints saved from the bare trunk of a model.
    pub(super) fn prefix(&mut self, prefix: &str, without: Option<&str>) {
        let tensors = std::mem::take(&mut self.tensors).into_iter();
        self.tensors = tensors
            .map(|(name, stored)| if Some(&*name) == without { (name, stored) } else { (prefix.to_owned() + &name, stored) })
            .collect();
    }

    /// The files, as they were when they were opened.
    pub(super) fn files(&self) -> Vec<Arc<DataFile>> {
        self.files.clone()
    }

    /// Where every tensor of a known type lies, by name.
    pub(super) fn extents(&self) -> HashMap<String, Extent> {
        let of = |(name, stored): (&String, &Stored)| {
            let info = self.info(name)?;
            Some((name.clone(), Extent { file: self.files[stored.file].clone(), offset: stored.offset, info }))
        };
        self.tensors.iter().filter_map(of).collect()
    }

    fn add(&mut self, file: &Path) -> Result<(), SourceError> {
        let opened = map::open(file)?;
        let bytes = map::map_opened(&opened)?;
        self.files.push(Arc::new(DataFile::opened(file, &opened)?));
        let broken = |reason: String| SourceError::Safetensors { file: file.to_owned(), reason };
        let (header, metadata) = SafeTensors::read_metadata(&bytes).map_err(|error| broken(explain(&bytes, &error)))?;
        // 8 bytes of length, then the header.
        let data = bytes.slice(8 + header..);
        for name in metadata.offset_keys() {
            let Some(info) = metadata.info(&name) else { continue };
            // Old checkpoints carry this buffer; it follows from the config.
            if name.ends_with("rotary_emb.inv_freq") {
                continue;
            }
            let (start, end) = info.data_offsets;
            let dtype = Dtype::parse(&info.dtype.to_string()).ok_or_else(|| info.dtype.to_string());
            let place = (self.files.len() - 1, (8 + header + start) as u64);
            let (shape, data) = (info.shape.clone(), data.slice(start..end));
            let stored = Stored { shard: file.to_owned(), dtype, shape, data, file: place.0, offset: place.1 };
            match self.tensors.entry(name) {
                Entry::Vacant(entry) => drop(entry.insert(stored)),
                Entry::Occupied(entry) => {
                    return Err(SourceError::Duplicate {
                        tensor: entry.key().clone(),
                        first: entry.get().shard.clone(),
                        second: file.to_owned(),
                    });
                }
            }
        }
        Ok(())
    }
}

impl Weights for Checkpoint {
    fn names(&self) -> Vec<String> {
        self.tensors.keys().cloned().collect()
    }

    fn info(&self, name: &str) -> Option<TensorInfo> {
        let stored = self.tensors.get(name)?;
        Some(TensorInfo { dtype: *stored.dtype.as_ref().ok()?, shape: stored.shape.clone() })
    }

    fn read(&self, name: &str) -> Result<View, WeightsError> {
        let stored = self.tensors.get(name).ok_or_else(|| WeightsError::Missing { tensor: name.to_owned() })?;
        match &stored.dtype {
            Ok(dtype) => Ok(View { info: TensorInfo { dtype: *dtype, shape: stored.shape.clone() }, data: stored.data.clone() }),
            Err(dtype) => Err(WeightsError::Read {
                tensor: name.to_owned(),
                reason: format!("its type in `{}` is {dtype}, which is not a float type", stored.shard.display()),
            }),
        }
    }
}

/// The `weight_map` of an index: tensor to shard. Every shard is a plain file name.
pub(super) fn read_index(index: &Path) -> Result<BTreeMap<String, String>, SourceError> {
    let broken = |reason: String| SourceError::Index { index: index.to_owned(), reason };
    let json = read_json(index)?;
    let entries = json.get("weight_map").and_then(|map| map.as_object()).ok_or_else(|| broken("`weight_map` is not an object".into()))?;
    if entries.is_empty() {
        return Err(broken("`weight_map` is empty".into()));
    }
    let mut weight_map = BTreeMap::new();
    for (tensor, shard) in entries {
        let shard = shard.as_str().ok_or_else(|| broken(format!("the shard of tensor `{tensor}` is {shard}, not a file name")))?;
        if !is_plain_name(shard) {
            return Err(broken(format!("the shard of tensor `{tensor}` is `{shard}`; a shard must be a plain file name beside the index")));
        }
        weight_map.insert(tensor.clone(), shard.to_owned());
    }
    Ok(weight_map)
}

/// The distinct shards of an index, sorted.
pub(super) fn shards(weight_map: &BTreeMap<String, String>) -> std::collections::BTreeSet<&str> {
    weight_map.values().map(String::as_str).collect()
}

/// Whether a name stays in its directory, on every platform. (A plain name may still be a symlink: the Hub's cache is made of them.)
pub(super) fn is_plain_name(name: &str) -> bool {
    let mut components = Path::new(name).components();
    matches!((components.next(), components.next()), (Some(Component::Normal(_)), None)) && !name.contains(['/', '\\', ':', '\0'])
}

/// What is wrong with a file, in words that say what to do about it.
fn explain(bytes: &[u8], error: &SafeTensorError) -> String {
    if bytes.starts_with(b"version https://git-lfs") {
        return "it is a Git LFS pointer, not the weights; run `git lfs pull` in its repository, or download the file".into();
    }
    if bytes.starts_with(b"PK\x03\x04") || bytes.starts_with(b"\x80\x02") {
        return "it is a PyTorch pickle under another name; convert it with `safetensors.torch.save_file`".into();
    }
    let length = bytes.len();
    let cut = "it was cut short or is no safetensors file; fetch it again";
    match error {
        SafeTensorError::HeaderTooSmall => format!("it has {length} bytes, too few for a header; {cut}"),
        SafeTensorError::HeaderTooLarge | SafeTensorError::InvalidHeaderLength => {
            let header = bytes.first_chunk().map_or(0, |bytes| u64::from_le_bytes(*bytes));
            format!("its header claims {header} bytes, but the file has {length}; {cut}")
        }
        SafeTensorError::MetadataIncompleteBuffer => {
            format!("its tensors do not end where the file ends, at byte {length}; it was cut short or appended to; fetch it again")
        }
        SafeTensorError::InvalidOffset(tensor) => {
            format!("the bytes of tensor `{tensor}` overlap another's or leave a gap; the file is damaged: fetch it again")
        }
        SafeTensorError::TensorInvalidInfo | SafeTensorError::ValidationOverflow => misfit(bytes).unwrap_or_else(|| error.to_string()),
        other => other.to_string(),
    }
}

/// Names the first tensor whose byte range is not what its shape and type need.
fn misfit(bytes: &[u8]) -> Option<String> {
    let length = usize::try_from(u64::from_le_bytes(*bytes.first_chunk()?)).ok()?;
    let header: serde_json::Map<String, serde_json::Value> = serde_json::from_slice(bytes.get(8..8usize.checked_add(length)?)?).ok()?;
    header.into_iter().filter(|(name, _)| name != "__metadata__").find_map(|(name, info)| {
        let info: safetensors::tensor::TensorInfo = serde_json::from_value(info).ok()?;
        let (start, end) = info.data_offsets;
        let bits = info.shape.iter().try_fold(info.dtype.bitsize(), |bits, dim| bits.checked_mul(*dim));
        if bits.is_some_and(|bits| end.checked_sub(start) == Some(bits / 8)) {
            return None;
        }
        Some(format!(
            "tensor `{name}` has shape {:?} of {}, which does not fit its {} bytes; the file is damaged: fetch it again",
            info.shape,
            info.dtype,
            end.saturating_sub(start)
        ))
    })
}
