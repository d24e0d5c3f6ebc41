//! Where tensors lie in files, and positioned reads of them: a file that is cut short or rewritten under a reader is an error here, where
//! reading its map would be a crash or a mixture of two files.

use std::{
    io,
    path::{Path, PathBuf},
    sync::Arc,
    time::SystemTime,
};

use fs_err::File;
use upcycle_architectures::{TensorInfo, View, Weights, WeightsError};

use super::{Source, map};

/// A file of weights as it was when its model was opened.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DataFile {
    path: PathBuf,
    stamp: Stamp,
}

/// What changes when a file is written to or replaced.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Stamp {
    bytes: u64,
    modified: Option<SystemTime>,
    inode: u64,
}

impl Stamp {
    fn of(file: &File) -> io::Result<Self> {
        let meta = file.metadata()?;
        #[cfg(unix)]
        let inode = std::os::unix::fs::MetadataExt::ino(&meta);
        #[cfg(not(unix))]
        let inode = 0;
        Ok(Self { bytes: meta.len(), modified: meta.modified().ok(), inode })
    }
}

impl DataFile {
    /// A file as it is now.
    pub fn of(path: &Path) -> io::Result<Self> {
        Self::opened(path, &map::open(path)?)
    }

    pub(super) fn opened(path: &Path, file: &File) -> io::Result<Self> {
        Ok(Self { path: path.to_owned(), stamp: Stamp::of(file)? })
    }

    /// Opens the file again, if it is still the same.
    pub fn open(&self) -> io::Result<File> {
        let file = map::open(&self.path)?;
        if Stamp::of(&file)? == self.stamp { Ok(file) } else { Err(self.changed()) }
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    fn changed(&self) -> io::Error {
        io::Error::other(format!("`{}` changed while it was being read; run the command again", self.path.display()))
    }

    /// Length and time of the last change: equal stamps of equal paths, equal bytes.
    pub(crate) fn stamp(&self) -> String {
        let time = self.stamp.modified.and_then(|time| time.duration_since(SystemTime::UNIX_EPOCH).ok());
        format!("{} {} {}", self.path.display(), self.stamp.bytes, time.map_or(0, |time| time.as_nanos()))
    }
}

/// The bytes of a tensor that lies in a file as it is read, row-major and little endian.
#[derive(Debug, Clone)]
pub struct Extent {
    /// The file.
    pub file: Arc<DataFile>,
    /// Of the tensor's first byte.
    pub offset: u64,
    /// Type and shape, and so its length.
    pub info: TensorInfo,
}

impl Extent {
    /// Fills the buffer from byte `at` of the tensor. `file` is the extent's own, opened.
    pub fn read(&self, file: &File, at: u64, buffer: &mut [u8]) -> io::Result<()> {
        read_at(file, buffer, self.offset + at).map_err(|error| match error.kind() {
            io::ErrorKind::UnexpectedEof => self.file.changed(),
            _ => error,
        })
    }
}

/// A model's weights read by position, not from its maps: for whoever reads for long while files may change. Each reading is a copy.
pub(crate) struct Positioned<'a>(pub(crate) &'a Source);

impl Weights for Positioned<'_> {
    fn names(&self) -> Vec<String> {
        self.0.weights.names()
    }

    fn info(&self, name: &str) -> Option<TensorInfo> {
        self.0.weights.info(name)
    }

    fn read(&self, name: &str) -> Result<View, WeightsError> {
        let Some(extent) = self.0.extents.get(name) else { return self.0.weights.read(name) };
        let mut data = vec![0; extent.info.bytes()];
        let read = extent.file.open().and_then(|file| extent.read(&file, 0, &mut data));
        read.map_err(|error| WeightsError::Read { tensor: name.to_owned(), reason: error.to_string() })?;
        Ok(View { info: extent.info.clone(), data: data.into() })
    }
}

#[cfg(unix)]
fn read_at(file: &File, buffer: &mut [u8], offset: u64) -> io::Result<()> {
    use std::os::unix::fs::FileExt as _;
    let named = |error: io::Error| match error.kind() {
        io::ErrorKind::UnexpectedEof => error,
        kind => io::Error::new(kind, format!("cannot read `{}`: {error}", file.path().display())),
    };
    file.file().read_exact_at(buffer, offset).map_err(named)
}

#[cfg(windows)]
fn read_at(file: &File, mut buffer: &mut [u8], mut offset: u64) -> io::Result<()> {
    use std::os::windows::fs::FileExt as _;
    while !buffer.is_empty() {
        match file.file().seek_read(buffer, offset)? {
            0 => return Err(io::ErrorKind::UnexpectedEof.into()),
            read => {
                buffer = &mut buffer[read..];
                offset += read as u64;
            }
        }
    }
    Ok(())
}
