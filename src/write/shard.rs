//! One safetensors file: laid out first, then filled at disjoint ranges by all threads.
//!
//! The format: u64 length of the header, the header (JSON, padded with spaces to eight bytes), then the tensors without gaps.

use std::{ops::Range, path::Path};

use rayon::prelude::*;
use serde_json::{Map, json};
use upcycle_architectures::Dtype;

use super::{Options, Progress, WriteError};
use crate::plan::{Composite, PlannedTensor};

/// One file of a composite.
#[derive(Debug)]
pub(super) struct Shard {
    /// Its name.
    pub(super) file: String,
    /// Its tensors, as indices into the plan.
    pub(super) tensors: Range<usize>,
    /// Bytes of the tensors.
    pub(super) data: u64,
    header: Vec<u8>,
}

impl Shard {
    /// Length of the file.
    pub(super) fn bytes(&self) -> u64 {
        self.header.len() as u64 + self.data
    }
}

/// Cuts the tensors, in order, into shards of at most `limit` bytes.
pub(super) fn layout(tensors: &[PlannedTensor], limit: u64) -> Vec<Shard> {
    let mut ranges: Vec<(Range<usize>, u64)> = Vec::new();
    for (i, tensor) in tensors.iter().enumerate() {
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
    shards.map(|(i, (range, data))| Shard { file: name(i), header: header(&tensors[range.clone()]), tensors: range, data }).collect()
}

fn header(tensors: &[PlannedTensor]) -> Vec<u8> {
    let mut json = Map::new();
    json.insert("__metadata__".into(), json!({"format": "pt"}));
    let mut offset = 0;
    for tensor in tensors {
        let end = offset + tensor.info.bytes();
        let entry = json!({"dtype": tensor.info.dtype.safetensors_name(), "shape": tensor.info.shape, "data_offsets": [offset, end]});
        json.insert(tensor.name.clone(), entry);
        offset = end;
    }
    let mut text = serde_json::Value::Object(json).to_string().into_bytes();
    text.resize(text.len().next_multiple_of(8), b' ');
    [(text.len() as u64).to_le_bytes().as_slice(), &text].concat()
}

/// Writes the shard to `path` and syncs it. Holds at most one part of a tensor per thread.
pub(super) fn fill(
    composite: &Composite,
    shard: &Shard,
    path: &Path,
    options: &Options,
    progress: &dyn Progress,
) -> Result<(), WriteError> {
    let file = fs_err::OpenOptions::new().write(true).create(true).truncate(true).open(path)?;
    file.set_len(shard.bytes())?;
    write_at(&file, &shard.header, 0)?;

    let mut jobs: Vec<(usize, Range<u64>)> = Vec::new();
    let mut offset = shard.header.len() as u64;
    for tensor in shard.tensors.clone() {
        let end = offset + composite.plan.tensors[tensor].info.bytes() as u64;
        jobs.push((tensor, offset..end));
        offset = end;
    }
    jobs.into_par_iter().try_for_each(|(tensor, range)| {
        let planned = &composite.plan.tensors[tensor];
        let mut at = range.start;
        for part in 0..planned.parts.len() {
            let weights = |error| WriteError::Weights { origin: composite.origin(tensor), error };
            let bytes = composite.part(tensor, part).map_err(weights)?;
            if !options.allow_non_finite && !finite(&bytes, planned.info.dtype) {
                return Err(WriteError::NonFinite { tensor: planned.name.clone(), origin: composite.origin(tensor) });
            }
            let end = at + bytes.len() as u64;
            if end > range.end {
                return Err(length(composite, tensor, &range, end));
            }
            write_at(&file, &bytes, at)?;
            progress.advance(bytes.len() as u64);
            at = end;
        }
        if at == range.end { Ok(()) } else { Err(length(composite, tensor, &range, at)) }
    })?;
    Ok(file.sync_all()?)
}

fn length(composite: &Composite, tensor: usize, range: &Range<u64>, end: u64) -> WriteError {
    WriteError::Length {
        tensor: composite.plan.tensors[tensor].name.clone(),
        origin: composite.origin(tensor),
        expected: range.end - range.start,
        found: end - range.start,
    }
}

/// Whether every element's exponent is below all ones.
fn finite(bytes: &[u8], dtype: Dtype) -> bool {
    // No early exit inside a block: a loop without branches is as fast as memory.
    let all = |width: usize, test: fn(&[u8]) -> bool| {
        bytes.chunks(width * 4096).all(|block| block.chunks_exact(width).fold(true, |ok, element| ok & test(element)))
    };
    match dtype {
        Dtype::Bf16 => all(2, |b| u16::from_le_bytes([b[0], b[1]]) & 0x7f80 != 0x7f80),
        Dtype::F16 => all(2, |b| u16::from_le_bytes([b[0], b[1]]) & 0x7c00 != 0x7c00),
        Dtype::F32 => all(4, |b| u32::from_le_bytes([b[0], b[1], b[2], b[3]]) & 0x7f80_0000 != 0x7f80_0000),
        Dtype::F64 => all(8, |b| u16::from_le_bytes([b[6], b[7]]) & 0x7ff0 != 0x7ff0),
        Dtype::F8E4M3 => all(1, |b| b[0] & 0x7f != 0x7f),
        // A plan has none of these.
        Dtype::Q4_0 | Dtype::Q5_0 | Dtype::Q8_0 | Dtype::Q4K | Dtype::Q5K | Dtype::Q6K => true,
    }
}

#[cfg(unix)]
pub(super) fn write_at(file: &fs_err::File, bytes: &[u8], offset: u64) -> std::io::Result<()> {
    use std::os::unix::fs::FileExt as _;
    file.file().write_all_at(bytes, offset)
}

#[cfg(windows)]
pub(super) fn write_at(file: &fs_err::File, mut bytes: &[u8], mut offset: u64) -> std::io::Result<()> {
    use std::os::windows::fs::FileExt as _;
    while !bytes.is_empty() {
        let written = file.file().seek_write(bytes, offset)?;
        bytes = &bytes[written..];
        offset += written as u64;
    }
    Ok(())
}
