//! `upcycle_manifest.json`: what every tensor of a composite is made of, and the checksums of its bytes.
//!
//! It depends on recipe and sources alone, like the weights. `verify` holds a directory against it, and a shard whose key it still has
//! need not be written again.

use std::{
    collections::{BTreeMap, BTreeSet},
    io::ErrorKind,
    path::Path,
};

use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};
use upcycle_architectures::Dtype;

use super::{WriteError, fill::Job, shard::Shard, state::JobId};
use crate::plan::{Composite, Part, hex};

/// Its name.
pub const MANIFEST: &str = "upcycle_manifest.json";

/// What a finished composite says of itself.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) struct Manifest {
    /// The version that wrote it.
    pub(super) upcycle: String,
    /// Of the recipe beside it: SHA-256.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) recipe: Option<String>,
    /// Of everything drawn.
    pub(super) seed: u64,
    /// The models, as the recipe names them; parts name them by their place here.
    pub(super) sources: Vec<String>,
    /// By file name.
    pub(super) shards: BTreeMap<String, ShardEntry>,
    /// By name.
    pub(super) tensors: BTreeMap<String, TensorEntry>,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) struct ShardEntry {
    /// Length of the file.
    pub(super) bytes: u64,
    /// Of everything that decides its bytes: SHA-256.
    pub(super) key: String,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) struct TensorEntry {
    /// The shard that it is in.
    pub(super) file: String,
    /// The name of its type in a safetensors header.
    pub(super) dtype: String,
    pub(super) shape: Vec<usize>,
    /// Of its bytes, as `zlib` computes it, in hexadecimal.
    pub(super) crc32: String,
    pub(super) parts: Vec<Part>,
}

impl Manifest {
    /// That of a composite whose jobs have these checksums.
    pub(super) fn of(composite: &Composite, shards: &[Shard], keys: &[String], jobs: &[Vec<Job>], crcs: &BTreeMap<JobId, u32>) -> Self {
        let mut sums: BTreeMap<usize, crc32fast::Hasher> = BTreeMap::new();
        for job in jobs.iter().flatten() {
            let crc = crcs.get(&job.id).copied().unwrap_or_default();
            sums.entry(job.tensor).or_default().combine(&crc32fast::Hasher::new_with_initial_len(crc, job.bytes));
        }
        let tensor = |t: usize, shard: &Shard| {
            let planned = &composite.plan.tensors[t];
            let entry = TensorEntry {
                file: shard.file.clone(),
                dtype: planned.info.dtype.safetensors_name().to_owned(),
                shape: planned.info.shape.clone(),
                crc32: format!("{:08x}", sums.get(&t).cloned().unwrap_or_default().finalize()),
                parts: planned.parts.clone(),
            };
            (planned.name.clone(), entry)
        };
        Self {
            upcycle: env!("CARGO_PKG_VERSION").to_owned(),
            recipe: None,
            seed: composite.plan.seed,
            sources: composite.sources.all.iter().map(|source| source.reference.to_string()).collect(),
            shards: shards.iter().zip(keys).map(|(s, key)| (s.file.clone(), ShardEntry { bytes: s.bytes(), key: key.clone() })).collect(),
            tensors: shards.iter().flat_map(|shard| shard.tensors.iter().map(|&t| tensor(t, shard))).collect(),
        }
    }

    /// That of a directory.
    pub(super) fn read(directory: &Path) -> Result<Self, WriteError> {
        let wrong = |reason: String| WriteError::Manifest { out: directory.to_owned(), reason };
        let bytes = match fs_err::read(directory.join(MANIFEST)) {
            Err(error) if error.kind() == ErrorKind::NotFound => {
                return Err(wrong("there is none: upcycle did not write this model".into()));
            }
            other => other?,
        };
        serde_json::from_slice(&bytes).map_err(|error| wrong(error.to_string()))
    }

    /// The shards of an earlier composite in the directory that are what they would be written as.
    pub(super) fn kept(&self, directory: &Path, shards: &[Shard], keys: &[String]) -> Vec<bool> {
        let modified = |name: &str| fs_err::metadata(directory.join(name)).and_then(|meta| Ok((meta.len(), meta.modified()?)));
        let Ok((_, written)) = modified(MANIFEST) else { return vec![false; shards.len()] };
        let same = |(shard, key): (&Shard, &String)| {
            let entry = self.shards.get(&shard.file).is_some_and(|entry| entry.key == *key && entry.bytes == shard.bytes());
            // What was changed after the manifest is not what it tells of.
            entry && modified(&shard.file).is_ok_and(|(bytes, changed)| bytes == shard.bytes() && changed <= written)
        };
        shards.iter().zip(keys).map(same).collect()
    }

    /// Takes over what an earlier manifest says of files that were kept, and of the tensors in them.
    pub(super) fn keep<'a>(&mut self, earlier: &Self, files: impl Iterator<Item = &'a str>) {
        for file in files {
            if let Some(entry) = earlier.shards.get(file) {
                self.shards.insert(file.to_owned(), entry.clone());
            }
            for (name, entry) in earlier.tensors.iter().filter(|(_, entry)| entry.file == file) {
                if let Some(tensor) = self.tensors.get_mut(name) {
                    tensor.crc32.clone_from(&entry.crc32);
                }
            }
        }
    }

    /// Takes over what an earlier manifest says of the origin of what is copied from the composite that it tells of, which is source `own`.
    pub(super) fn inherit(&mut self, earlier: &Self, own: usize) {
        let mut sources = earlier.sources.clone();
        let mut numbers = BTreeMap::new();
        for (number, name) in self.sources.iter().enumerate().filter(|(number, _)| *number != own) {
            let known = sources.iter().position(|other| other == name);
            numbers.insert(number, known.unwrap_or(sources.len()));
            if known.is_none() {
                sources.push(name.clone());
            }
        }
        // What nobody knows the origin of was made for this composite, like what is fitted.
        let origin = |tensor: &String| {
            earlier.tensors.get(tensor).map_or_else(|| vec![Part::Fitted { tensor: tensor.clone() }], |entry| entry.parts.clone())
        };
        for entry in self.tensors.values_mut() {
            entry.parts = entry.parts.drain(..).flat_map(|part| inherited(part, own, &numbers, &origin)).collect();
        }
        let used: BTreeSet<usize> = self.tensors.values().flat_map(|entry| &entry.parts).flat_map(Part::sources).collect();
        let compact: BTreeMap<usize, usize> = used.iter().copied().zip(0..).collect();
        for part in self.tensors.values_mut().flat_map(|entry| &mut entry.parts) {
            part.renumber(&compact);
        }
        self.sources = used.into_iter().filter_map(|number| sources.get(number).cloned()).collect();
    }

    /// Which models a tensor's bytes are from.
    pub(super) fn models(&self, tensor: &str) -> Vec<String> {
        let parts = self.tensors.get(tensor).map_or(&[][..], |entry| &entry.parts);
        parts.iter().flat_map(Part::sources).filter_map(|number| self.sources.get(number).cloned()).collect()
    }

    /// Length of a tensor's bytes.
    pub(super) fn bytes(entry: &TensorEntry) -> Option<u64> {
        entry.shape.iter().try_fold(Dtype::parse(&entry.dtype)?.bytes(1) as u64, |bytes, dim| bytes.checked_mul(*dim as u64))
    }
}

/// Whether experts of the composite in a directory stand behind another norm than their own, as they do with `shared: fit`.
pub fn folded(directory: &Path) -> Result<bool, WriteError> {
    let manifest = Manifest::read(directory)?;
    Ok(manifest.tensors.values().flat_map(|entry| &entry.parts).any(|part| matches!(part, Part::Tensor { fold: Some(_), .. })))
}

/// A part by the sources of the composite's manifest: `origin` says what the earlier one has of a tensor, `numbers` where other models are.
fn inherited(mut part: Part, own: usize, numbers: &BTreeMap<usize, usize>, origin: &dyn Fn(&String) -> Vec<Part>) -> Vec<Part> {
    match &mut part {
        Part::Tensor { source, tensor, .. } if *source == own => return origin(tensor),
        Part::Tensor { source, fold: Some(fold), tensor, .. } => {
            *source = numbers.get(source).copied().unwrap_or(*source);
            let norms = fold.shared.iter().flat_map(|(_, norm)| origin(norm));
            let of = norms.map(|norm| match norm {
                Part::Tensor { source, tensor, noise: None, scale: None, fold: None } => Some(vec![(source, tensor)]),
                Part::Mean { of } => Some(of),
                _ => None,
            });
            match of.collect::<Option<Vec<_>>>() {
                Some(of) => fold.shared = of.concat(),
                None => return vec![Part::Fitted { tensor: tensor.clone() }],
            }
        }
        _ => drop(part.renumber(numbers)),
    }
    vec![part]
}

/// Of everything that decides a shard's bytes.
pub(super) fn key(composite: &Composite, shard: &Shard, fingerprint: &str) -> String {
    let mut hash = Sha256::new();
    hash.update(&shard.header);
    shard.tensors.iter().for_each(|&tensor| hash.update(composite.key(tensor, fingerprint)));
    hex(&hash.finalize())
}
