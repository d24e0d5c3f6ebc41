//! How a model is named: `PATH_OR_REPO[@REVISION][+LORA[@REVISION]]`.

use std::{fmt, path::Path, str::FromStr};

/// A model: `PATH_OR_REPO[@REVISION][+LORA[@REVISION]]`.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ModelRef {
    /// A directory, a file, or `owner/name`.
    pub path: String,
    /// Branch, tag or commit on the Hub.
    pub revision: Option<String>,
    /// A PEFT adapter merged into it.
    pub lora: Option<Box<ModelRef>>,
}

/// Why a text names no model.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ModelRefError {
    /// Nothing before `@` or `+`, or nothing after it.
    #[error("`{0}` has an empty part")]
    Empty(String),
    /// Two `+`.
    #[error("`{0}` has more than one adapter: a model takes one (`MODEL+ADAPTER`)")]
    Adapters(String),
    /// Two `@`.
    #[error("`{0}` has more than one revision: write `MODEL@REVISION`")]
    Revisions(String),
}

impl FromStr for ModelRef {
    type Err = ModelRefError;

    /// A `+` or `@` in the name of a file or directory that exists belongs to that name.
    fn from_str(text: &str) -> Result<Self, ModelRefError> {
        if let Some(model) = existing(text) {
            return Ok(model);
        }
        let mut splits: Vec<_> = text.rmatch_indices('+').map(|(at, _)| (&text[..at], &text[at + 1..])).collect();
        if splits.len() > 1 {
            splits.retain(|(model, adapter)| part(model).is_ok_and(|model| exists(&model.path)) && part(adapter).is_ok());
        }
        let empty = |error| if matches!(error, ModelRefError::Empty(_)) { ModelRefError::Empty(text.to_owned()) } else { error };
        match splits.first() {
            Some((model, adapter)) => {
                let (model, adapter) = (part(model).map_err(empty)?, part(adapter).map_err(empty)?);
                Ok(Self { lora: Some(Box::new(adapter)), ..model })
            }
            None if text.contains('+') => Err(ModelRefError::Adapters(text.to_owned())),
            None => part(text),
        }
    }
}

/// `PATH_OR_REPO[@REVISION]`
fn part(text: &str) -> Result<ModelRef, ModelRefError> {
    if let Some(model) = existing(text) {
        return Ok(model);
    }
    let (path, revision) = text.rsplit_once('@').map_or((text, None), |(path, revision)| (path, Some(revision)));
    if path.trim().is_empty() || revision.is_some_and(|revision| revision.trim().is_empty()) {
        return Err(ModelRefError::Empty(text.to_owned()));
    }
    if path.contains('@') && !exists(path) {
        return Err(ModelRefError::Revisions(text.to_owned()));
    }
    Ok(ModelRef { path: path.to_owned(), revision: revision.map(str::to_owned), lora: None })
}

fn existing(text: &str) -> Option<ModelRef> {
    exists(text).then(|| ModelRef { path: text.to_owned(), revision: None, lora: None })
}

fn exists(path: &str) -> bool {
    Path::new(path).exists()
}

impl fmt::Display for ModelRef {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.path)?;
        if let Some(revision) = &self.revision {
            write!(f, "@{revision}")?;
        }
        if let Some(lora) = &self.lora {
            write!(f, "+{lora}")?;
        }
        Ok(())
    }
}
