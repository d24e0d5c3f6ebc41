//! One safetensors file, laid out before a byte of it is written.
//!
//! The format: u64 length of the header, the header (JSON, padded with spaces), then the tensors without gaps.

use std::{collections::BTreeMap, ops::Range};

use serde_json::{Map, json};

use crate::plan::Composite;

/// What file systems share extents by.
pub(super) const BLOCK: u64 = 4096;

/// One file of a composite.
#[derive(Debug)]
pub(super) struct Shard {
    /// Its name.
    pub(super) file: String,
    /// Its tensors, as indices into the plan.
    pub(super) tensors: Range<usize>,
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

/// Cuts the tensors, in order, into shards of at most `limit` bytes.
pub(super) fn layout(composite: &Composite, limit: u64) -> Vec<Shard> {
    let mut ranges: Vec<(Range<usize>, u64)> = Vec::new();
    for (i, tensor) in composite.plan.tensors.iter().enumerate() {
        let bytes = tensor.info.bytes() as u64;
        match ranges.last_mut() {
            Some((range, size)) if *size + bytes <= limit => {
                range.end = i + 1;
                *size += bytes;
            }
            _ => ranges.push((i..i + 1, bytes)),
        }
    }
    let count = ranges.len();
    let name = |i: usize| match count {
        1 => "model.safetensors".to_owned(),
        _ => format!("model-{:05}-of-{count:05}.safetensors", i + 1),
    };
    let shards = ranges.into_iter().enumerate();
    shards.map(|(i, (tensors, data))| Shard { file: name(i), header: header(composite, tensors.clone()), tensors, data }).collect()
}

fn header(composite: &Composite, tensors: Range<usize>) -> Vec<u8> {
    let mut json = Map::new();
    json.insert("__metadata__".into(), json!({"format": "pt"}));
    let mut offset = 0;
    let mut phases: BTreeMap<u64, u64> = BTreeMap::new();
    for t in tensors {
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
