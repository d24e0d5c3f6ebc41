//! Memory maps: the only `unsafe` of this package. A map is handed out as [`Bytes`], whose slices keep it alive.

use std::{io, path::Path};

use bytes::Bytes;
use memmap2::Mmap;

/// Maps a file read-only. Errors name the file.
pub(crate) fn map(path: &Path) -> io::Result<Bytes> {
    let file = fs_err::File::open(path)?;
    // SAFETY: a map is sound as long as nobody truncates or rewrites the file under it. Every loader of these formats asks the same of its
    // users, and our own writers never write under a final name: they write a temporary file and rename it, which leaves old maps intact.
    let map = unsafe { Mmap::map(file.file()) };
    map.map(Bytes::from_owner).map_err(|error| io::Error::new(error.kind(), format!("cannot map `{}`: {error}", path.display())))
}
