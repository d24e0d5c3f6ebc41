//! The marker of a directory that is being written: a lock, and the journal of what is on disk.
//!
//! Its first line says what is written (a digest of everything that decides the bytes), every other line one job that is done: shard, job
//! and CRC-32 of the bytes. A line is written after its bytes are synced, so that the journal never claims what is not there; a line that
//! was cut short counts for nothing.

use std::{
    collections::HashMap,
    fmt::Write as _,
    fs::TryLockError,
    io::{Read as _, Seek as _, SeekFrom, Write as _},
    path::{Path, PathBuf},
    sync::Mutex,
};

use fs_err::File;

use super::{Progress, UNFINISHED, WriteError};
use crate::source::CONFIG;

/// A job of a write, by shard and by its number there.
pub(super) type JobId = (usize, usize);

/// A directory that is ours to write into, until this is dropped.
pub(super) struct State {
    path: PathBuf,
    digest: String,
    file: Mutex<File>,
    /// Jobs that earlier runs did, with the CRC-32 of their bytes.
    pub(super) done: HashMap<JobId, u32>,
}

/// Makes the directory ours: empty, or left unfinished, or to be overwritten.
pub(super) fn claim(out: &Path, digest: &str, overwrite: bool, progress: &dyn Progress) -> Result<State, WriteError> {
    fs_err::create_dir_all(out)?;
    let path = out.join(UNFINISHED);
    let entries: Vec<PathBuf> = fs_err::read_dir(out)?.map(|entry| Ok(entry?.path())).collect::<std::io::Result<_>>()?;
    let unfinished = entries.contains(&path);
    let occupied = || WriteError::Occupied(out.to_owned());
    if !unfinished && !entries.is_empty() && !overwrite {
        return Err(occupied());
    }
    let mut file = fs_err::OpenOptions::new().read(true).write(true).create(true).truncate(false).open(&path)?;
    match file.file().try_lock() {
        Err(TryLockError::WouldBlock) => return Err(WriteError::Locked(out.to_owned())),
        Err(TryLockError::Error(error)) if error.kind() != std::io::ErrorKind::Unsupported => return Err(error.into()),
        _ => {}
    }
    // Whoever had the lock may have finished, and taken the marker away with it.
    if !same_file(&file, &path) {
        return Err(WriteError::Locked(out.to_owned()));
    }
    let mut bytes = Vec::new();
    file.read_to_end(&mut bytes)?;
    let journal = String::from_utf8_lossy(&bytes);
    let (before, lines) = journal.split_once('\n').unwrap_or((&journal, ""));
    let mut state = State { path, digest: digest.to_owned(), file: Mutex::new(file), done: HashMap::new() };
    if before == digest {
        state.done = lines.split_inclusive('\n').filter_map(parse).collect();
        return Ok(state);
    }
    if unfinished && !overwrite && out.join(CONFIG).exists() {
        return Err(occupied());
    }
    if unfinished && !before.is_empty() {
        progress.note("the recipe or a source changed since the unfinished run: starting over");
    }
    for partial in entries.iter().filter(|path| is_partial(path)) {
        fs_err::remove_file(partial)?;
    }
    state.rewrite()?;
    Ok(state)
}

fn is_partial(path: &Path) -> bool {
    path.file_name().is_some_and(|name| name.to_string_lossy().starts_with(".model") && name.to_string_lossy().ends_with(".partial"))
}

#[cfg(unix)]
fn same_file(file: &File, path: &Path) -> bool {
    use std::os::unix::fs::MetadataExt as _;
    matches!((file.metadata(), fs_err::metadata(path)), (Ok(a), Ok(b)) if (a.dev(), a.ino()) == (b.dev(), b.ino()))
}

/// An open file cannot be replaced.
#[cfg(not(unix))]
fn same_file(_: &File, path: &Path) -> bool {
    path.exists()
}

fn parse(line: &str) -> Option<(JobId, u32)> {
    let mut words = line.strip_suffix('\n')?.split(' ');
    let id = (words.next()?.parse().ok()?, words.next()?.parse().ok()?);
    let crc = words.next().filter(|word| word.len() == 8)?;
    words.next().is_none().then_some(())?;
    Some((id, u32::from_str_radix(crc, 16).ok()?))
}

fn lines<'a>(jobs: impl IntoIterator<Item = (&'a JobId, &'a u32)>) -> String {
    let mut text = String::new();
    for ((shard, job), crc) in jobs {
        let _ = writeln!(text, "{shard} {job} {crc:08x}");
    }
    text
}

impl State {
    /// Forgets the jobs of shards whose file is not what the journal was about.
    pub(super) fn retain(&mut self, valid: impl Fn(usize) -> bool) -> std::io::Result<()> {
        let before = self.done.len();
        self.done.retain(|(shard, _), _| valid(*shard));
        if self.done.len() < before { self.rewrite() } else { Ok(()) }
    }

    /// The journal as it should be. Killed on the way, it claims less than there is.
    fn rewrite(&self) -> std::io::Result<()> {
        let mut file = self.lock();
        file.set_len(0)?;
        file.seek(SeekFrom::Start(0))?;
        file.write_all(format!("{}\n{}", self.digest, lines(&self.done)).as_bytes())?;
        file.sync_all()
    }

    /// Adds jobs whose bytes are synced. The lines are not: were the machine to fail now, they would be missing, and nothing worse.
    pub(super) fn record<'a>(&self, jobs: impl IntoIterator<Item = (&'a JobId, &'a u32)>) -> std::io::Result<()> {
        let mut file = self.lock();
        file.seek(SeekFrom::End(0))?;
        file.write_all(lines(jobs).as_bytes())
    }

    /// Nothing is left to do: the marker goes before the lock does.
    pub(super) fn finish(self) -> std::io::Result<()> {
        fs_err::remove_file(&self.path)
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, File> {
        // Whoever panicked left at worst a line cut short.
        self.file.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::parse;

    #[test]
    fn a_line_cut_short_counts_for_nothing() {
        let line = "0 12 00ab34ff\n";
        assert_eq!(parse(line), Some(((0, 12), 0x00ab_34ff)));
        for end in 0..line.len() {
            assert_eq!(parse(&line[..end]), None, "{:?}", &line[..end]);
        }
        assert_eq!(parse("0 12 00ab34ff 1\n"), None);
        assert_eq!(parse("\0\0\0\0\n"), None);
    }
}
