//! Holds a written composite against its manifest, and against the models that it was made of.

use std::collections::{BTreeMap, BTreeSet};

use rayon::prelude::*;
use sha2::{Digest as _, Sha256};
use upcycle_architectures::{Dtype, TensorInfo};

use super::{
    Progress, RECIPE, WriteError,
    fill::ELEMENTS,
    manifest::{Manifest, TensorEntry},
};
use crate::{
    plan::{self, Composite, Part, PlannedTensor, Sources},
    source::{Extent, Source},
};

/// What was found.
#[derive(Debug, Clone, Default)]
pub struct Verified {
    /// Tensors whose bytes were read.
    pub tensors: usize,
    /// Those of them that were also compared with what the plan makes of the sources.
    pub compared: usize,
    /// What is not as it was written: a line each, in the order of the tensors' names.
    pub differences: Vec<String>,
    /// Models that could not be opened, and why.
    pub absent: Vec<String>,
}

/// Checks sizes, header and checksums of the composite `written`, and the bytes of every tensor that is made of models alone, with `open` for
/// the models of its manifest. (What prompts or text decided has its checksum only.)
pub fn verify<E: std::fmt::Display>(
    written: Source,
    mut open: impl FnMut(&str, Option<&Source>) -> Result<Source, E>,
    progress: &dyn Progress,
) -> Result<Verified, WriteError> {
    let out = written.location.clone();
    let manifest = Manifest::read(&out)?;
    let mut found = Verified::default();
    for (file, entry) in &manifest.shards {
        match fs_err::metadata(out.join(file)) {
            Ok(meta) if meta.len() == entry.bytes => {}
            Ok(meta) => found.differences.push(format!("{file} has {} bytes, written were {}", meta.len(), entry.bytes)),
            Err(error) => found.differences.push(error.to_string()),
        }
    }
    if let Some(recipe) = &manifest.recipe
        && fs_err::read(out.join(RECIPE)).is_ok_and(|bytes| plan::hex(&Sha256::digest(bytes)) != *recipe)
    {
        found.differences.push(format!("{RECIPE} is not the recipe that was composed"));
    }
    let extents = written.extents.clone();
    for name in extents.keys().collect::<BTreeSet<_>>() {
        if !manifest.tensors.contains_key(name) {
            found.differences.push(format!("tensor `{name}` was not written"));
        }
    }

    let mut sources: Vec<Option<Source>> = Vec::new();
    for name in &manifest.sources {
        let base = sources.first().and_then(Option::as_ref);
        sources.push(open(name, base).map_err(|error| found.absent.push(format!("`{name}`: {error}"))).ok());
    }
    let present: BTreeMap<usize, usize> =
        sources.iter().enumerate().filter(|(_, source)| source.is_some()).map(|(i, _)| i).zip(0..).collect();
    let names: Vec<&String> = manifest.tensors.keys().collect();
    let plan = |entry: &TensorEntry, name: &str| {
        let dtype = Dtype::parse(&entry.dtype)?;
        let mut parts = entry.parts.clone();
        // What cannot be compared is nothing that a plan of these sources says.
        let known = parts.iter_mut().all(|part| {
            part.renumber(&present)
                && !matches!(part, Part::Gate { .. } | Part::SharedGate { .. } | Part::Fitted { .. } | Part::Tuned { .. })
        });
        let info = TensorInfo { dtype, shape: entry.shape.clone() };
        Some((PlannedTensor { name: name.to_owned(), info, parts }, known))
    };
    let Some(planned) = manifest.tensors.iter().map(|(name, entry)| plan(entry, name)).collect::<Option<Vec<_>>>() else {
        return Err(WriteError::Manifest { out, reason: "it has a type that no tensor is written in".into() });
    };
    let (tensors, known): (Vec<_>, Vec<bool>) = planned.into_iter().unzip();
    let all = sources.into_iter().flatten().collect();
    let Some(composite) = plan::recorded(written, tensors, Sources::numbered(all), manifest.seed) else {
        return Err(WriteError::Manifest { out, reason: "the model is none of ours".into() });
    };
    let Some(total) = manifest.tensors.values().try_fold(0u64, |total, entry| total.checked_add(Manifest::bytes(entry)?)) else {
        return Err(WriteError::Manifest { out, reason: "its tensors have more bytes than there can be".into() });
    };
    progress.begin(total, 0);
    let checks: Vec<(usize, &String)> = names.into_iter().enumerate().collect();
    let differences: Vec<Vec<String>> = checks
        .into_par_iter()
        .map(|(t, name)| match extents.get(name) {
            Some(extent) => check(&composite, t, known[t], &manifest.tensors[name], extent, progress),
            None => vec![format!("tensor `{name}` is missing")],
        })
        .collect();
    found.tensors = manifest.tensors.keys().filter(|name| extents.contains_key(*name)).count();
    found.compared = manifest.tensors.keys().zip(&known).filter(|(name, known)| **known && extents.contains_key(*name)).count();
    found.differences.extend(differences.into_iter().flatten());
    Ok(found)
}

/// One tensor: type and shape, the checksum of its bytes, and the bytes themselves where they can be made again.
fn check(composite: &Composite, t: usize, known: bool, entry: &TensorEntry, extent: &Extent, progress: &dyn Progress) -> Vec<String> {
    let planned = &composite.plan.tensors[t];
    let name = &planned.name;
    if extent.info != planned.info {
        let show = |info: &TensorInfo| format!("{} {:?}", info.dtype, info.shape);
        return vec![format!("tensor `{name}` is {}, written was {}", show(&extent.info), show(&planned.info))];
    }
    let size = planned.info.dtype.bytes(1);
    let all = composite.elements(t);
    let mut crc = crc32fast::Hasher::new();
    let mut first: Option<String> = None;
    let mut read = |at: usize, elements: usize| -> std::io::Result<Vec<u8>> {
        let mut bytes = vec![0; elements * size];
        extent.read(&extent.file.open()?, (at * size) as u64, &mut bytes)?;
        crc.update(&bytes);
        progress.advance(bytes.len() as u64);
        Ok(bytes)
    };
    for part in 0..planned.parts.len() {
        let step = if known && !composite.divisible(t, part) { all.max(1) } else { ELEMENTS };
        for start in (0..all).step_by(step) {
            let elements = start..all.min(start + step);
            let at = part * all + start;
            let bytes = match read(at, elements.len()) {
                Ok(bytes) => bytes,
                Err(error) => return vec![format!("tensor `{name}`: {error}")],
            };
            if !known || first.is_some() {
                continue;
            }
            match composite.block(t, part, elements) {
                Ok(expected) => {
                    let other = bytes.chunks(size).zip(expected.chunks(size)).position(|(a, b)| a != b);
                    first = other.map(|other| {
                        format!("tensor `{name}` is not what {} makes it, from element {} on", composite.origin(t), at + other)
                    });
                }
                Err(error) => first = Some(format!("tensor `{name}` cannot be compared with {}: {error}", composite.origin(t))),
            }
        }
    }
    let crc = format!("{:08x}", crc.finalize());
    let damaged =
        (crc != entry.crc32).then(|| format!("tensor `{name}` in {} has the checksum {crc}, written was {}", entry.file, entry.crc32));
    damaged.into_iter().chain(first).collect()
}
