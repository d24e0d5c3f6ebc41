//! Models named `owner/name[@revision]`: looked up in the Hub's cache as Python's `huggingface_hub` lays it out, then fetched into it.
//!
//! What the cache has whole is used without asking the Hub. The environment is not read here: see [`crate::env::hub`].

#[cfg(feature = "hub")]
mod download;

use std::{
    fmt,
    path::{Path, PathBuf},
};

use super::{
    Progress, SourceError,
    place::{self, Files},
    safetensors::{is_plain_name, read_index, shards},
};
use crate::recipe::ModelRef;

/// The Hub: its cache on this machine, and how it is reached.
#[derive(Clone)]
pub struct Hub {
    /// Directory of `models--owner--name` directories.
    pub cache: PathBuf,
    /// `https://huggingface.co` or a mirror, without a slash at the end.
    pub endpoint: String,
    /// Sent to the endpoint, and nowhere else.
    pub token: Option<String>,
    /// The cache alone is used.
    pub offline: bool,
}

impl fmt::Debug for Hub {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { cache, endpoint, token, offline } = self;
        let token = token.as_ref().map(|_| "***");
        f.debug_struct("Hub").field("cache", cache).field("endpoint", endpoint).field("token", &token).field("offline", offline).finish()
    }
}

/// A model repository at a revision, and the one file that is meant, if one is.
#[derive(Debug, Clone)]
pub(super) struct Repo {
    pub(super) id: String,
    pub(super) revision: String,
    /// `owner/name/file.gguf`
    pub(super) file: Option<String>,
}

impl Repo {
    /// `owner/name` or `owner/name/file.gguf`; `None` if the reference can be no such name.
    pub(super) fn parse(reference: &ModelRef) -> Option<Self> {
        let mut parts = reference.path.splitn(3, '/');
        let (owner, name, file) = (parts.next()?, parts.next()?, parts.next());
        let is_name = |part: &str| {
            !part.is_empty() && !part.starts_with('.') && part.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.'))
        };
        let is_file = |file: &str| is_plain_name(file) && file.to_ascii_lowercase().ends_with(".gguf");
        if !is_name(owner) || !is_name(name) || !file.is_none_or(is_file) {
            return None;
        }
        let revision = reference.revision.as_deref().unwrap_or("main");
        // A revision becomes part of paths and addresses: `refs/pr/1` is one, `../..` is none.
        if revision.split('/').any(|part| !is_name(part)) {
            return None;
        }
        Some(Self { id: format!("{owner}/{name}"), revision: revision.to_owned(), file: file.map(str::to_owned) })
    }
}

impl fmt::Display for Repo {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}@{}", self.id, self.revision)
    }
}

impl Hub {
    /// The directory that holds the repository's files, fetched where they are missing.
    pub(super) fn fetch(&self, repo: &Repo, progress: Option<&dyn Progress>) -> Result<PathBuf, SourceError> {
        let cached = self.snapshot(repo);
        let missing = match &cached {
            Some(snapshot) => match missing_from(snapshot, repo)? {
                Some(missing) => missing,
                None => return Ok(snapshot.clone()),
            },
            None => "snapshot".to_owned(),
        };
        let why = if self.offline {
            "HF_HUB_OFFLINE forbids to fetch it: unset it, or fetch the model first"
        } else {
            "this build cannot fetch it: build with `--features hub`, or fetch the model with another tool"
        };
        #[cfg(feature = "hub")]
        if !self.offline {
            return download::download(self, repo, progress);
        }
        #[cfg(not(feature = "hub"))]
        let _ = progress;
        Err(SourceError::NotCached { model: repo.to_string(), missing, cache: self.cache.clone(), why })
    }

    /// `models--owner--name`
    fn directory(&self, repo: &Repo) -> PathBuf {
        self.cache.join(format!("models--{}", repo.id.replace('/', "--")))
    }

    /// The cached snapshot of the revision: a branch or tag by way of `refs/`, or a commit itself.
    fn snapshot(&self, repo: &Repo) -> Option<PathBuf> {
        let directory = self.directory(repo);
        let commit = match fs_err::read_to_string(directory.join("refs").join(&repo.revision)) {
            Ok(commit) => commit.trim().to_owned(),
            Err(_) => repo.revision.clone(),
        };
        let snapshot = directory.join("snapshots").join(&commit);
        (is_plain_name(&commit) && snapshot.is_dir()).then_some(snapshot)
    }
}

/// What a snapshot lacks to be opened: downloads that were broken off leave parts. `None`: it has everything.
fn missing_from(snapshot: &Path, repo: &Repo) -> Result<Option<String>, SourceError> {
    if let Some(file) = &repo.file {
        return Ok((!snapshot.join(file).exists()).then(|| file.clone()));
    }
    let names = place::list(snapshot)?;
    Ok(match place::files(&repo.to_string(), &names) {
        // Somebody fetched other files of it.
        Err(SourceError::NoWeights { .. } | SourceError::NoConfig { .. } | SourceError::Pickle { .. }) => Some("model".into()),
        Err(error) => return Err(error),
        Ok(Files::Sharded) => {
            let index = read_index(&snapshot.join(place::INDEX))?;
            shards(&index).into_iter().find(|shard| !snapshot.join(shard).exists()).map(str::to_owned)
        }
        Ok(_) => None,
    })
}
