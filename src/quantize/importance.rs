//! Importance matrices: how much each column of each matrix matters, as the mean square of the activations that it is multiplied with.
//!
//! On disk they are llama.cpp's (`llama-imatrix`): a GGUF file with `NAME.in_sum2` [E, row] and `NAME.counts` [E, 1] for each matrix, so that
//! either program uses the other's.

use std::{collections::BTreeMap, path::Path};

use upcycle_architectures::Dtype;

use crate::{
    source::{
        SourceError,
        gguf::{Gguf, floats},
    },
    write::gguf::file::{Info, Value, layout},
};

/// Sums over the tokens that met a matrix, by the matrix's name in a GGUF file.
#[derive(Debug, Clone, Default)]
pub struct Importance {
    pub(super) entries: BTreeMap<String, Entry>,
}

/// Of a matrix, or of each of a stack of them.
#[derive(Debug, Clone)]
pub(super) struct Entry {
    /// mean squares [E, row]
    pub(super) means: Vec<f32>,
    /// tokens [E]
    pub(super) counts: Vec<f32>,
}

/// Why there is no importance matrix.
#[derive(Debug, thiserror::Error)]
pub enum ImportanceError {
    /// Not a GGUF file.
    #[error(transparent)]
    Source(#[from] SourceError),
    /// A GGUF file of something else.
    #[error("{file}: {reason}; an importance matrix is what `llama-imatrix` or `upcycle quantize --imatrix-out` writes (GGUF)")]
    Invalid {
        /// its name
        file: String,
        /// what is wrong
        reason: String,
    },
    /// A file operation failed; the message names the file.
    #[error(transparent)]
    Io(#[from] std::io::Error),
}

impl Importance {
    /// Reads a file of `llama-imatrix` or of ours.
    pub fn read(file: &Path) -> Result<Self, ImportanceError> {
        let gguf = Gguf::open(file)?;
        let invalid = |reason: String| ImportanceError::Invalid { file: file.display().to_string(), reason };
        let mut entries = BTreeMap::new();
        for name in gguf.tensors.keys().filter_map(|name| name.strip_suffix(".in_sum2")) {
            let sums = floats(&gguf, &format!("{name}.in_sum2")).map_err(invalid)?;
            let counts = floats(&gguf, &format!("{name}.counts")).map_err(invalid)?;
            if counts.is_empty() || !sums.len().is_multiple_of(counts.len()) || sums.iter().any(|sum| !sum.is_finite() || *sum < 0.0) {
                return Err(invalid(format!(
                    "`{name}` has {} sums for {} counts, or some that are no sums of squares",
                    sums.len(),
                    counts.len()
                )));
            }
            entries.insert(name.to_owned(), Entry::new(sums, counts));
        }
        if entries.is_empty() {
            return Err(invalid("it holds no `in_sum2`".into()));
        }
        Ok(Self { entries })
    }

    /// Writes such a file. `chunks` windows of `window` tokens of the texts called `texts` were read.
    pub fn write(&self, file: &Path, texts: &[String], chunks: usize, window: usize) -> Result<(), ImportanceError> {
        let metadata = vec![
            ("general.type".to_owned(), Value::Text("imatrix".into())),
            ("imatrix.datasets".to_owned(), Value::Texts(texts.to_vec())),
            ("imatrix.chunk_count".to_owned(), Value::U32(chunks as u32)),
            ("imatrix.chunk_size".to_owned(), Value::U32(window as u32)),
        ];
        let mut tensors: Vec<(String, Vec<usize>, Vec<f32>)> = Vec::new();
        for (name, entry) in &self.entries {
            let (count, row) = (entry.counts.len(), entry.row());
            let sums =
                entry.means.chunks_exact(row).zip(&entry.counts).flat_map(|(means, count)| means.iter().map(move |mean| mean * count));
            tensors.push((format!("{name}.in_sum2"), vec![count, row], sums.collect()));
            tensors.push((format!("{name}.counts"), vec![count, 1], entry.counts.clone()));
        }
        let infos: Vec<Info<'_>> = tensors.iter().map(|(name, shape, _)| Info { name, shape, dtype: Dtype::F32 }).collect();
        let layout = layout(&metadata, &infos);
        let mut bytes = layout.header;
        for ((.., values), offset) in tensors.iter().zip(&layout.offsets) {
            bytes.resize(*offset as usize, 0);
            bytes.extend(values.iter().flat_map(|value| value.to_le_bytes()));
        }
        bytes.resize(layout.end as usize, 0);
        Ok(fs_err::write(file, bytes)?)
    }

    /// The mean squares of a matrix's columns, of the matrix `part` of a stack; `None` if nothing is known of it, or no token met it.
    pub(crate) fn of(&self, name: &str, part: usize, row: usize) -> Option<&[f32]> {
        let entry = self.entries.get(name).filter(|entry| entry.row() == row)?;
        let means = entry.means.get(part * row..(part + 1) * row)?;
        means.iter().any(|mean| *mean > 0.0).then_some(means)
    }
}

impl Entry {
    /// From sums [E, row] and counts [E].
    pub(super) fn new(mut sums: Vec<f32>, counts: Vec<f32>) -> Self {
        let row = (sums.len() / counts.len().max(1)).max(1);
        for (sums, count) in sums.chunks_mut(row).zip(&counts) {
            sums.iter_mut().for_each(|sum| *sum /= count.max(1.0));
        }
        Self { means: sums, counts }
    }

    fn row(&self) -> usize {
        (self.means.len() / self.counts.len().max(1)).max(1)
    }
}
