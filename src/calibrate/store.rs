//! Tensors that calibration made: kept in a file, not in memory, so that a model larger than memory can be calibrated.

use std::{
    collections::BTreeMap,
    io::{BufWriter, Write as _},
    path::{Path, PathBuf},
};

use serde::{Deserialize, Serialize};
use upcycle_architectures::{Dtype, TensorInfo, View, Weights, WeightsError};
use upcycle_routers::gate::Gate;

use crate::source;

/// Where a tensor lies in the file.
#[derive(Debug, Clone, Serialize, Deserialize)]
struct Entry {
    dtype: String,
    shape: Vec<usize>,
    offset: u64,
}

/// A file of tensors being written, one behind the other.
pub(super) struct Writer {
    path: PathBuf,
    file: BufWriter<fs_err::File>,
    entries: BTreeMap<String, Entry>,
    end: u64,
}

/// What stands beside the tensors, as JSON.
#[derive(Debug, Clone, Serialize, Deserialize)]
struct Index {
    entries: BTreeMap<String, Entry>,
    found: Found,
}

/// What a calibration found besides tensors.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct Found {
    /// one per layer, [E, D]
    pub gates: Vec<Gate>,
    /// what the user may want to know, a line each
    pub notes: Vec<String>,
    /// share of tokens, not seen when the gates were fitted, whose expert is among the K with the largest logits, for K from 1; the mean over
    /// the layers [E]
    pub right: Vec<f64>,
}

/// Share of tokens that must have their expert first for one expert per token to be as good as several.
const FIRST: f64 = 0.99;

impl Found {
    /// How many of `most` experts per token do.
    pub fn top_k(&self, most: usize) -> usize {
        if self.right.first().is_some_and(|first| *first >= FIRST) { 1 } else { most }
    }
}

/// What a calibration found: tensors by their name in the composite, read from the file, and the gates.
pub struct Store {
    entries: BTreeMap<String, Entry>,
    data: bytes::Bytes,
    /// the gates, and what is to be said
    pub found: Found,
}

impl Writer {
    /// Starts the file `path`, whose directory exists.
    pub fn create(path: &Path) -> std::io::Result<Self> {
        let file = BufWriter::new(fs_err::File::create(path)?);
        Ok(Self { path: path.to_owned(), file, entries: BTreeMap::new(), end: 0 })
    }

    /// Appends a tensor.
    pub fn put(&mut self, name: String, view: &View) -> std::io::Result<()> {
        self.file.write_all(&view.data)?;
        let entry = Entry { dtype: view.info.dtype.torch_name().to_owned(), shape: view.info.shape.clone(), offset: self.end };
        self.entries.insert(name, entry);
        self.end += view.data.len() as u64;
        Ok(())
    }

    /// Ends the file and gives it its final name, with an index beside it, so that [`Store::open`] finds it again.
    pub fn finish(mut self, found: Found, path: &Path) -> std::io::Result<Store> {
        self.file.flush()?;
        drop(self.file);
        let index = Index { entries: self.entries.clone(), found: found.clone() };
        fs_err::rename(&self.path, path)?;
        let partial = path.with_extension("partial");
        fs_err::write(&partial, serde_json::to_vec(&index)?)?;
        fs_err::rename(&partial, index_path(path))?;
        let data = if self.end == 0 { bytes::Bytes::new() } else { source::map(path)? };
        Ok(Store { entries: self.entries, data, found })
    }
}

fn index_path(data: &Path) -> PathBuf {
    data.with_extension("json")
}

impl Store {
    /// A calibration that was kept; `None` if there is none, or it is damaged.
    pub fn open(path: &Path) -> Option<Self> {
        let index: Index = serde_json::from_slice(&fs_err::read(index_path(path)).ok()?).ok()?;
        let data = if index.entries.is_empty() { bytes::Bytes::new() } else { source::map(path).ok()? };
        let store = Self { entries: index.entries, data, found: index.found };
        store.names().iter().all(|name| store.read(name).is_ok()).then_some(store)
    }
}

impl Weights for Store {
    fn names(&self) -> Vec<String> {
        self.entries.keys().cloned().collect()
    }

    fn info(&self, name: &str) -> Option<TensorInfo> {
        let entry = self.entries.get(name)?;
        Some(TensorInfo { dtype: Dtype::parse(&entry.dtype)?, shape: entry.shape.clone() })
    }

    fn read(&self, name: &str) -> Result<View, WeightsError> {
        let missing = || WeightsError::Missing { tensor: name.to_owned() };
        let info = self.info(name).ok_or_else(missing)?;
        let start = self.entries[name].offset as usize;
        let range = start..start.saturating_add(info.bytes());
        if range.end > self.data.len() {
            return Err(WeightsError::Read { tensor: name.to_owned(), reason: "the calibration file is too short".into() });
        }
        Ok(View { info, data: self.data.slice(range) })
    }
}

/// Some tensors in place of others.
pub(super) struct Overlay<'a> {
    /// by name
    pub over: BTreeMap<String, View>,
    /// the rest
    pub under: &'a dyn Weights,
}

impl Weights for Overlay<'_> {
    fn names(&self) -> Vec<String> {
        self.under.names()
    }

    fn info(&self, name: &str) -> Option<TensorInfo> {
        self.over.get(name).map(|view| view.info.clone()).or_else(|| self.under.info(name))
    }

    fn read(&self, name: &str) -> Result<View, WeightsError> {
        self.over.get(name).map_or_else(|| self.under.read(name), |view| Ok(view.clone()))
    }
}
