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

/// That a sidecar is not what its name says.
pub(super) fn invalid(sidecars: &BTreeMap<String, Sidecar>, file: &str, reason: impl std::fmt::Display) -> SidecarError {
    let place = match sidecars.get(file) {
        Some(Sidecar::File(path)) => path.display().to_string(),
        _ => file.to_owned(),
    };
    SidecarError::Invalid { file: place, reason: format!("{reason}; fetch it again") }
}

/// A sidecar's text.
pub(super) fn text(sidecars: &BTreeMap<String, Sidecar>, file: &str) -> Result<Option<String>, SidecarError> {
    bytes(sidecars, file)?.map(String::from_utf8).transpose().map_err(|error| invalid(sidecars, file, error))
}

/// A sidecar's JSON.
pub(super) fn json(sidecars: &BTreeMap<String, Sidecar>, file: &str) -> Result<Option<Value>, SidecarError> {
    bytes(sidecars, file)?.map(|bytes| serde_json::from_slice(&bytes)).transpose().map_err(|error| invalid(sidecars, file, error))
}
