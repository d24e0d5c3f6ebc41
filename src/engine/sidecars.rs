//! Reading the small files beside a model's weights, wherever they come from.

use std::collections::BTreeMap;

use serde_json::Value;

use crate::source::Sidecar;

/// Why a sidecar could not be used.
#[derive(Debug, thiserror::Error)]
pub enum SidecarError {
    /// It could not be read.
    #[error(transparent)]
    Read(#[from] std::io::Error),
    /// It is not what its name says.
    #[error("{file}: {reason}")]
    Invalid {
        /// its name
        file: String,
        /// what is wrong
        reason: String,
    },
}

/// A sidecar's bytes, if there is one of that name.
pub(super) fn bytes(sidecars: &BTreeMap<String, Sidecar>, file: &str) -> Result<Option<Vec<u8>>, SidecarError> {
    Ok(sidecars.get(file).map(Sidecar::read).transpose()?)
}

/// A sidecar's text.
pub(super) fn text(sidecars: &BTreeMap<String, Sidecar>, file: &str) -> Result<Option<String>, SidecarError> {
    let invalid = |error: std::string::FromUtf8Error| SidecarError::Invalid { file: file.to_owned(), reason: error.to_string() };
    bytes(sidecars, file)?.map(String::from_utf8).transpose().map_err(invalid)
}

/// A sidecar's JSON.
pub(super) fn json(sidecars: &BTreeMap<String, Sidecar>, file: &str) -> Result<Option<Value>, SidecarError> {
    let invalid = |error: serde_json::Error| SidecarError::Invalid { file: file.to_owned(), reason: error.to_string() };
    bytes(sidecars, file)?.map(|bytes| serde_json::from_slice(&bytes)).transpose().map_err(invalid)
}
