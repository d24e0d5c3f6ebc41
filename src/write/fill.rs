//! Fills laid-out shards: every worker takes the next job, at most 16 MiB of a tensor, and writes it where it belongs.
//!
//! What is copied goes through a buffer that stays in a core's cache, where its check and its checksum cost next to nothing; file systems
//! that share extents between files are asked to do that instead. What is computed is computed in blocks.

use std::{
    ops::Range,
    path::Path,
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicUsize, Ordering},
        mpsc,
    },
    thread,
};

use fs_err::File;
use upcycle_architectures::Dtype;

use super::{
    Options, Progress, WriteError,
    shard::{BLOCK, Shard},
    state::{JobId, State},
};
use crate::{plan::Composite, source::Extent};

/// Bytes of a job, unless a part of a tensor is only to be had as a whole.
const JOB: usize = 16 << 20;
/// Jobs before it is due, the system is told to read what a job copies: a disk that is slow to answer has other work meanwhile.
const AHEAD: usize = 8;
/// Bytes that are copied at a time: two of them fit in a core's second-level cache.
const BUFFER: usize = 256 << 10;
/// Elements that are computed at a time.
pub(super) const ELEMENTS: usize = 64 << 10;

/// Some elements of one part of a tensor, and their place.
#[derive(Debug)]
pub(super) struct Job {
    pub(super) id: JobId,
    pub(super) tensor: usize,
    part: usize,
    elements: Range<usize>,
    /// In the file.
    at: u64,
    pub(super) bytes: u64,
}

/// The jobs of a shard, in the order of its bytes.
pub(super) fn jobs(composite: &Composite, number: usize, shard: &Shard) -> Vec<Job> {
    let mut jobs = Vec::new();
    let mut at = shard.header.len() as u64;
    for &tensor in &shard.tensors {
        let planned = &composite.plan.tensors[tensor];
        let (all, size) = (composite.elements(tensor), planned.info.dtype.bytes(1));
        for part in 0..planned.parts.len() {
            let step = if composite.divisible(tensor, part) { JOB / size } else { all.max(1) };
            for start in (0..all).step_by(step) {
                let elements = start..all.min(start + step);
                let bytes = (elements.len() * size) as u64;
                jobs.push(Job { id: (number, jobs.len()), tensor, part, elements, at, bytes });
                at += bytes;
            }
        }
    }
    jobs
}

/// What is written but not yet synced and recorded of a shard.
#[derive(Default)]
struct Pending {
    jobs: Vec<(JobId, u32)>,
    bytes: u64,
    left: usize,
}

/// Does the jobs, on all threads of the current pool, and records those whose bytes are on disk: every `options.checkpoint` bytes of a
/// shard, at its end, and when something fails. One more thread waits for the disk, so that it works while others do.
pub(super) fn fill(
    composite: &Composite,
    shards: &[Shard],
    jobs: &[&Job],
    out: &Path,
    state: &State,
    options: &Options,
    progress: &dyn Progress,
) -> Result<Vec<(JobId, u32)>, WriteError> {
    let pending: Vec<Mutex<Pending>> = shards.iter().map(|_| Mutex::default()).collect();
    for job in jobs {
        lock(&pending[job.id.0]).left += 1;
    }
    let partial = |shard: usize| out.join(shards[shard].partial());
    let sync = |shard: usize, jobs: &[(JobId, u32)]| -> Result<(), WriteError> {
        if options.sync {
            fs_err::OpenOptions::new().write(true).open(partial(shard))?.sync_data()?;
        }
        Ok(state.record(jobs.iter().map(|(id, crc)| (id, crc)))?)
    };
    let sharing = shares_extents(out);
    let next = AtomicUsize::new(0);
    let (failed, finished) = (Mutex::new(None::<WriteError>), Mutex::new(Vec::new()));
    let work = |buffer: &mut [u8], job: &Job, due: &mpsc::Sender<usize>| -> Result<(), WriteError> {
        let shard = job.id.0;
        let file = fs_err::OpenOptions::new().write(true).open(partial(shard))?;
        let crc = perform(composite, job, &file, sharing, buffer, options, progress)?;
        lock(&finished).push((job.id, crc));
        let mut open = lock(&pending[shard]);
        open.jobs.push((job.id, crc));
        open.bytes += job.bytes;
        open.left -= 1;
        if open.left == 0 || open.bytes >= options.checkpoint {
            open.bytes = 0;
            // Whoever takes it lives as long as the loop.
            let _ = due.send(shard);
        }
        Ok(())
    };
    thread::scope(|scope| {
        let (due, dues) = mpsc::channel::<usize>();
        scope.spawn(|| {
            for shard in dues {
                let (jobs, last) = {
                    let mut open = lock(&pending[shard]);
                    (std::mem::take(&mut open.jobs), open.left == 0)
                };
                if jobs.is_empty() {
                    continue;
                }
                match sync(shard, &jobs) {
                    Ok(()) if last => progress.shard(&shards[shard].file, shards[shard].bytes()),
                    Ok(()) => {}
                    Err(error) => _ = lock(&failed).get_or_insert(error),
                }
            }
        });
        rayon::broadcast(|_| {
            let mut buffer = vec![0; BUFFER];
            while lock(&failed).is_none() {
                let at = next.fetch_add(1, Ordering::Relaxed);
                let Some(job) = jobs.get(at) else { break };
                if let Some(later) = jobs.get(at + AHEAD) {
                    announce(composite, later);
                }
                if let Err(error) = work(&mut buffer, job, &due) {
                    lock(&failed).get_or_insert(error);
                }
            }
        });
    });
    if let Some(error) = failed.into_inner().unwrap_or_else(PoisonError::into_inner) {
        for (shard, pending) in pending.iter().enumerate() {
            let jobs = std::mem::take(&mut lock(pending).jobs);
            if !jobs.is_empty() {
                // The first error is the one to tell; what cannot be recorded is done again.
                let _ = sync(shard, &jobs);
            }
        }
        return Err(error);
    }
    Ok(finished.into_inner().unwrap_or_else(PoisonError::into_inner))
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    // Nothing is left half done in these between lines that may panic.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Has the system begin to read what a job copies, where it takes hints.
#[cfg(target_os = "linux")]
fn announce(composite: &Composite, job: &Job) {
    if let Some(extent) = composite.copied(job.tensor, job.part)
        && let Ok(source) = extent.file.open()
    {
        let at = extent.offset + composite.plan.tensors[job.tensor].info.dtype.bytes(job.elements.start) as u64;
        // What is wrong with the file, reading it will say.
        let _ = rustix::fs::fadvise(source.file(), at, job.bytes.try_into().ok(), rustix::fs::Advice::WillNeed);
    }
}

#[cfg(not(target_os = "linux"))]
fn announce(_: &Composite, _: &Job) {}

/// Writes a job's bytes and gives their CRC-32.
fn perform(
    composite: &Composite,
    job: &Job,
    file: &File,
    sharing: bool,
    buffer: &mut [u8],
    options: &Options,
    progress: &dyn Progress,
) -> Result<u32, WriteError> {
    let planned = &composite.plan.tensors[job.tensor];
    let mut crc = crc32fast::Hasher::new();
    let mut take = |bytes: &[u8]| {
        if !options.allow_non_finite && !finite(bytes, planned.info.dtype) {
            return Err(WriteError::NonFinite { tensor: planned.name.clone(), origin: composite.origin(job.tensor) });
        }
        crc.update(bytes);
        progress.advance(bytes.len() as u64);
        Ok(())
    };
    if let Some(extent) = composite.copied(job.tensor, job.part) {
        let source = extent.file.open()?;
        let start = planned.info.dtype.bytes(job.elements.start) as u64;
        let shared = if sharing { share(extent, &source, start, file, job)? } else { 0..0 };
        for run in [0..shared.start, shared.clone(), shared.end..job.bytes] {
            for at in run.clone().step_by(BUFFER) {
                let bytes = &mut buffer[..BUFFER.min((run.end - at) as usize)];
                extent.read(&source, start + at, bytes)?;
                take(bytes)?;
                if run != shared {
                    write_at(file, bytes, job.at + at)?;
                }
            }
        }
    } else {
        let whole = !composite.divisible(job.tensor, job.part);
        let step = if whole { job.elements.len().max(1) } else { ELEMENTS };
        let mut at = job.at;
        for start in job.elements.clone().step_by(step) {
            let elements = start..job.elements.end.min(start + step);
            let weights = |error| WriteError::Weights { origin: composite.origin(job.tensor), error };
            let bytes = composite.block(job.tensor, job.part, elements).map_err(weights)?;
            take(&bytes)?;
            write_at(file, &bytes, at)?;
            at += bytes.len() as u64;
        }
    }
    Ok(crc.finalize())
}

/// Has the file system share those blocks of the job's bytes that lie whole in source and output, and says which bytes of the job they are;
/// none where it cannot.
#[cfg(target_os = "linux")]
fn share(extent: &Extent, source: &File, start: u64, file: &File, job: &Job) -> std::io::Result<Range<u64>> {
    let from = extent.offset + start;
    let first = job.at.next_multiple_of(BLOCK) - job.at;
    let end = ((job.at + job.bytes) / BLOCK * BLOCK).saturating_sub(job.at);
    if from % BLOCK != job.at % BLOCK || first >= end {
        return Ok(0..0);
    }
    let (mut input, mut output) = (from + first, job.at + first);
    while output < job.at + end {
        let left = (job.at + end - output) as usize;
        match rustix::fs::copy_file_range(source.file(), Some(&mut input), file.file(), Some(&mut output), left) {
            Ok(1..) => {}
            // Another file system, or one that would rather not: what is left is copied by hand.
            Ok(0) | Err(rustix::io::Errno::XDEV | rustix::io::Errno::INVAL | rustix::io::Errno::OPNOTSUPP | rustix::io::Errno::NOSYS) => {
                break;
            }
            Err(error) => return Err(error.into()),
        }
    }
    Ok(first..(output - job.at).max(first))
}

#[cfg(not(target_os = "linux"))]
fn share(_: &Extent, _: &File, _: u64, _: &File, _: &Job) -> std::io::Result<Range<u64>> {
    Ok(0..0)
}

/// Whether files in this directory can have the bytes of others without a copy. Elsewhere copying inside the kernel was no faster than
/// through a buffer, where bytes are also checked.
#[cfg(target_os = "linux")]
fn shares_extents(directory: &Path) -> bool {
    // Magic numbers of statfs(2): btrfs, XFS, bcachefs, and NFS and SMB, whose servers copy.
    const SHARING: [u64; 5] = [0x9123_683e, 0x5846_5342, 0xca45_1a4e, 0x6969, 0xff53_4d42];
    rustix::fs::statfs(directory).is_ok_and(|found| SHARING.contains(&(found.f_type as u64 & 0xffff_ffff)))
}

#[cfg(not(target_os = "linux"))]
fn shares_extents(_: &Path) -> bool {
    false
}

/// Makes the file of a shard: its length, its blocks where the file system reserves them, and its header.
pub(super) fn preallocate(shard: &Shard, out: &Path) -> std::io::Result<()> {
    let file = fs_err::OpenOptions::new().write(true).create(true).truncate(true).open(out.join(shard.partial()))?;
    reserve(&file, shard.bytes(), shares_extents(out))?;
    write_at(&file, &shard.header, 0)
}

/// Shared blocks need no room, so none is asked for where there may be some.
#[cfg(target_os = "linux")]
fn reserve(file: &File, bytes: u64, sharing: bool) -> std::io::Result<()> {
    use rustix::{fs::FallocateFlags, io::Errno};
    if !sharing {
        match rustix::fs::fallocate(file.file(), FallocateFlags::empty(), 0, bytes) {
            Err(Errno::OPNOTSUPP | Errno::NOSYS) => {}
            other => return Ok(other?),
        }
    }
    file.set_len(bytes)
}

#[cfg(not(target_os = "linux"))]
fn reserve(file: &File, bytes: u64, _: bool) -> std::io::Result<()> {
    file.set_len(bytes)
}

/// Whether every element's exponent is below all ones.
fn finite(bytes: &[u8], dtype: Dtype) -> bool {
    // No early exit inside a block: a loop without branches is as fast as memory.
    let all = |width: usize, test: fn(&[u8]) -> bool| {
        bytes.chunks(width * 4096).all(|block| block.chunks_exact(width).fold(true, |ok, element| ok & test(element)))
    };
    match dtype {
        Dtype::Bf16 => all(2, |b| u16::from_le_bytes([b[0], b[1]]) & 0x7f80 != 0x7f80),
        Dtype::F16 => all(2, |b| u16::from_le_bytes([b[0], b[1]]) & 0x7c00 != 0x7c00),
        Dtype::F32 => all(4, |b| u32::from_le_bytes([b[0], b[1], b[2], b[3]]) & 0x7f80_0000 != 0x7f80_0000),
        Dtype::F64 => all(8, |b| u16::from_le_bytes([b[6], b[7]]) & 0x7ff0 != 0x7ff0),
        Dtype::F8E4M3 => all(1, |b| b[0] & 0x7f != 0x7f),
        // A plan has none of these.
        Dtype::Q4_0 | Dtype::Q5_0 | Dtype::Q8_0 | Dtype::Q4K | Dtype::Q5K | Dtype::Q6K => true,
    }
}

#[cfg(unix)]
pub(super) fn write_at(file: &File, bytes: &[u8], offset: u64) -> std::io::Result<()> {
    use std::os::unix::fs::FileExt as _;
    let named = |error: std::io::Error| std::io::Error::new(error.kind(), format!("cannot write `{}`: {error}", file.path().display()));
    file.file().write_all_at(bytes, offset).map_err(named)
}

#[cfg(windows)]
pub(super) fn write_at(file: &File, mut bytes: &[u8], mut offset: u64) -> std::io::Result<()> {
    use std::os::windows::fs::FileExt as _;
    while !bytes.is_empty() {
        let written = file.file().seek_write(bytes, offset)?;
        bytes = &bytes[written..];
        offset += written as u64;
    }
    Ok(())
}
