//! One safetensors file, laid out before a byte of it is written.
//!
//! The format: u64 length of the header, the header (JSON, padded with spaces), then the tensors without gaps.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    path::Path,
};

use serde_json::{Map, Value, json};
use upcycle_architectures::{LayerRole, Role};

use super::{MANIFEST, Options, manifest::Manifest};
use crate::plan::{Composite, Part, Plan};

/// What file systems share extents by.
pub(super) const BLOCK: u64 = 4096;

/// One file of a composite.
#[derive(Debug)]
pub(super) struct Shard {
    /// Its name.
    pub(super) file: String,
    /// Its tensors, as indices into the plan.
    pub(super) tensors: Vec<usize>,
    /// Bytes of the tensors.
    pub(super) data: u64,
    /// With its length in front.
    pub(super) header: Vec<u8>,
}

impl Shard {
    /// Length of the file.
    pub(super) fn bytes(&self) -> u64 {
        self.header.len() as u64 + self.data
    }

    /// Its name while it is written.
    pub(super) fn partial(&self) -> String {
        format!(".{}.partial", self.file)
    }
}

/// The files of a composite and what is in each. `earlier` tells of the one that it is a change of, if it is.
pub(super) fn layout(composite: &Composite, earlier: Option<&Manifest>, options: &Options) -> Vec<Shard> {
    let plan = &composite.plan;
    let files = if options.by_expert { by_expert(plan) } else { by_size(plan, options.shard_size) };
    let shard = |(file, tensors): (String, Vec<usize>)| Shard {
        file,
        data: tensors.iter().map(|t| plan.tensors[*t].info.bytes() as u64).sum(),
        header: header(composite, &tensors, &metadata(composite, earlier, &tensors)),
        tensors,
    };
    files.into_iter().map(shard).collect()
}

/// The tensors, in order, in files of at most `limit` bytes.
fn by_size(plan: &Plan, limit: u64) -> Vec<(String, Vec<usize>)> {
    let mut runs: Vec<(Vec<usize>, u64)> = Vec::new();
    for (t, tensor) in plan.tensors.iter().enumerate() {
        let bytes = tensor.info.bytes() as u64;
        match runs.last_mut() {
            Some((run, size)) if *size + bytes <= limit => {
                run.push(t);
                *size += bytes;
            }
            _ => runs.push((vec![t], bytes)),
        }
    }
    let count = runs.len();
    let name = |i: usize| match count {
        1 => "model.safetensors".to_owned(),
        _ => format!("model-{:05}-of-{count:05}.safetensors", i + 1),
    };
    runs.into_iter().enumerate().map(|(i, (run, _))| (name(i), run)).collect()
}

/// A file for each expert, one for what chooses among them, and one for what they share. (Experts that are stacked in one tensor are in that.)
fn by_expert(plan: &Plan) -> Vec<(String, Vec<usize>)> {
    let family = plan.family();
    let place = |role: Role| match role {
        Role::Layer(_, LayerRole::Expert(e, _)) => format!("expert-{e:03}"),
        Role::Layer(_, LayerRole::Router | LayerRole::SharedGate) => GATES.to_owned(),
        _ => SHARED.to_owned(),
    };
    let places: HashMap<String, String> =
        family.tensors(&plan.config).into_iter().filter_map(|(role, _)| Some((family.name(role)?, place(role)))).collect();
    let mut files: BTreeMap<String, Vec<usize>> = BTreeMap::new();
    for (t, tensor) in plan.tensors.iter().enumerate() {
        let place = places.get(&tensor.name).map_or(SHARED, String::as_str);
        files.entry(named(place)).or_default().push(t);
    }
    files.into_iter().collect()
}

/// In the names of the files of what chooses among the experts, and of what no expert has for itself.
const GATES: &str = "gates";
const SHARED: &str = "shared";

fn named(place: &str) -> String {
    format!("model-{place}.safetensors")
}

/// Whether the composite in a directory has a file for each expert.
pub fn is_by_expert(directory: &Path) -> bool {
    directory.join(named(GATES)).exists()
}

/// What a file says of itself, wherever it comes to lie: which models its bytes are from.
fn metadata(composite: &Composite, earlier: Option<&Manifest>, tensors: &[usize]) -> Value {
    let name = |source: usize| composite.sources.all[source].reference.to_string();
    let names = |part: &Part| match (part, earlier) {
        (Part::Tensor { source, tensor, .. }, Some(earlier)) if Some(*source) == composite.earlier => earlier.models(tensor),
        _ => part.sources().into_iter().filter(|source| Some(*source) != composite.earlier).map(name).collect(),
    };
    let models: BTreeSet<String> = tensors.iter().flat_map(|t| &composite.plan.tensors[*t].parts).flat_map(names).collect();
    let models: Vec<String> = models.into_iter().collect();
    json!({"format": "pt", "upcycle": env!("CARGO_PKG_VERSION"), "models": models.join(", "), "manifest": MANIFEST})
}

fn header(composite: &Composite, tensors: &[usize], metadata: &Value) -> Vec<u8> {
    let mut json = Map::new();
    json.insert("__metadata__".into(), metadata.clone());
    let mut offset = 0;
    let mut phases: BTreeMap<u64, u64> = BTreeMap::new();
    for &t in tensors {
        let tensor = &composite.plan.tensors[t];
        let end = offset + tensor.info.bytes();
        let entry = json!({"dtype": tensor.info.dtype.safetensors_name(), "shape": tensor.info.shape, "data_offsets": [offset, end]});
        json.insert(tensor.name.clone(), entry);
        if let Some(extent) = composite.copied(t, 0).filter(|_| tensor.parts.len() == 1) {
            *phases.entry((extent.offset + BLOCK - offset as u64 % BLOCK) % BLOCK).or_default() += (end - offset) as u64;
        }
        offset = end;
    }
    let mut text = serde_json::Value::Object(json).to_string().into_bytes();
    text.resize(text.len().next_multiple_of(8), b' ');
    // Most of what is copied gets the place within a block of the file system that it has in its source: only such blocks can be shared.
    let phase = phases.into_iter().filter(|(phase, _)| phase % 8 == 0).max_by_key(|(_, bytes)| *bytes).map_or(0, |(phase, _)| phase);
    let data = 8 + text.len() as u64;
    text.resize(text.len() + ((phase + BLOCK - data % BLOCK) % BLOCK) as usize, b' ');
    [(text.len() as u64).to_le_bytes().as_slice(), &text].concat()
}
