//! Written text kept in files, so that an expert writes once.
//!
//! A file's name is the digest of everything that decides the text; the file begins with the digest of its own content. One that is not as it
//! was written is as good as none.

use std::path::{Path, PathBuf};

use serde_json::json;
use sha2::{Digest as _, Sha256};

use super::{
    Form, Sequence,
    write::{Author, Written},
};
use crate::source::Source;

/// Counts changes of how text is written.
const VERSION: u32 = 1;

/// The file of what an author writes. The base is part of an expert that is an adapter.
pub(super) fn file(cache: &Path, author: &Author<'_>, base: &Source, starts: &[(Form, Vec<Sequence>)]) -> PathBuf {
    let model = json!([author.source.reference.to_string(), author.source.stamps(), base.stamps()]);
    let options = author.options;
    let how = json!([VERSION, author.name, author.seed, options.continuations, options.length]);
    cache.join(format!("text-{}.json", digest(&json!([model, how, starts]).to_string())))
}

pub(super) fn load(file: &Path) -> Option<Written> {
    let content = fs_err::read_to_string(file).ok()?;
    let (sum, written) = content.split_once('\n')?;
    if sum == digest(written) { serde_json::from_str(written).ok() } else { None }
}

pub(super) fn store(file: &Path, written: &Written) -> std::io::Result<()> {
    fs_err::create_dir_all(file.parent().unwrap_or_else(|| Path::new("")))?;
    let content = serde_json::to_string(written)?;
    // Under its name it is whole, even if two runs write it at once.
    let partial = file.with_extension(format!("{}.partial", std::process::id()));
    fs_err::write(&partial, format!("{}\n{content}", digest(&content)))?;
    fs_err::rename(partial, file)
}

fn digest(text: &str) -> String {
    format!("{:x}", Sha256::digest(text))
}
