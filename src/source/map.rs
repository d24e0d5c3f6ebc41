//! Memory maps: the only `unsafe` outside of the CPU's kernels. A map is handed out as [`Bytes`], whose slices keep it alive.

use std::{io, path::Path};

use bytes::Bytes;
use fs_err::File;
use memmap2::Mmap;

/// Opens a file to read it. Errors name the file.
pub(super) fn open(path: &Path) -> io::Result<File> {
    File::open(path).map_err(|error| dangling(path).unwrap_or(error))
}

/// Maps a file read-only. Errors name the file.
pub(crate) fn map(path: &Path) -> io::Result<Bytes> {
    map_opened(&open(path)?)
}

/// The same of an open file.
pub(super) fn map_opened(file: &File) -> io::Result<Bytes> {
    // SAFETY: a map is sound as long as nobody truncates or rewrites the file under it. Every loader of these formats asks the same of its
    // users, and our own writers never write under a final name: they write a temporary file and rename it, which leaves old maps intact.
    let map = unsafe { Mmap::map(file.file()) };
    map.map(Bytes::from_owner).map_err(|error| io::Error::new(error.kind(), format!("cannot map `{}`: {error}", file.path().display())))
}

/// Keeps in memory what has been read of all maps, until the process ends.
pub fn lock() -> io::Result<()> {
    #[cfg(target_os = "linux")]
    return Ok(rustix::mm::mlockall(rustix::mm::MlockAllFlags::CURRENT | rustix::mm::MlockAllFlags::ONFAULT)?);
    #[cfg(not(target_os = "linux"))]
    return Err(io::Error::from(io::ErrorKind::Unsupported));
}

/// A link to nothing, as in a cache of the Hub that was copied in part.
fn dangling(path: &Path) -> Option<io::Error> {
    let target = fs_err::read_link(path).ok().filter(|_| !path.exists())?;
    let message = format!("`{}` is a link to `{}`, which is not there; fetch the model again", path.display(), target.display());
    Some(io::Error::new(io::ErrorKind::NotFound, message))
}
