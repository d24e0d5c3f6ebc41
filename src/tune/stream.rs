//! A domain's text: pieces held out, and any number of others drawn from the rest.
//!
//! A piece is read where it lies in the file, so a text of any size takes no memory; and which pieces a step is given is decided by the seed
//! and the number of the step alone, so training that was interrupted goes on with those that it would have seen.

use std::{
    io::{Read as _, Seek as _, SeekFrom},
    ops::Range,
    path::{Path, PathBuf},
};

use fs_err::File;
use rand::Rng as _;
use rand_chacha::ChaCha8Rng;

use super::TuneError;
use crate::{engine::tokenizer::Tokenizer, inspect::perplexity::Window};

/// Bytes that are read for each token wanted.
const BYTES_PER_TOKEN: usize = 16;
/// At most this part of a text is held out.
const HELD_OUT: usize = 10;
/// Pieces that a text must have room for.
const LEAST: usize = 8;
/// Places that are tried for a piece as long as it should be.
const TRIES: usize = 16;

/// How texts are cut.
pub(super) struct Cutter<'a> {
    pub tokenizer: &'a Tokenizer,
    /// what the tokenizer puts in front of a text
    pub prefix: Vec<u32>,
    /// tokens of a piece
    pub window: usize,
}

/// A text of one domain.
pub(super) struct Stream {
    path: PathBuf,
    size: u64,
    modified: String,
    /// bytes that are not trained on, in order
    held: Vec<Range<u64>>,
}

impl Stream {
    /// The text, and at most `most` pieces of it that are held out, spread evenly over it.
    pub fn open(name: &str, path: &Path, most: usize, cutter: &Cutter<'_>) -> Result<(Self, Vec<Window>), TuneError> {
        let metadata = fs_err::metadata(path)?;
        let size = metadata.len();
        let modified = metadata.modified().map(|time| format!("{time:?}")).unwrap_or_default();
        let mut stream = Self { path: path.to_owned(), size, modified, held: Vec::new() };
        let (tokens, bytes) = stream.piece(0, cutter)?.unwrap_or_default();
        let length = (bytes.end - bytes.start).max(1);
        let pieces = size / length;
        if tokens.len() < cutter.window || pieces < LEAST as u64 {
            let found = (tokens.len() as u64).saturating_mul(size) / length;
            return Err(TuneError::Short { name: name.to_owned(), tokens: found, window: cutter.window, least: LEAST });
        }
        let count = most.min(usize::try_from(pieces).unwrap_or(usize::MAX) / HELD_OUT).max(1) as u64;
        let mut windows = Vec::new();
        for i in 0..count {
            let spot = u128::from(size) * u128::from(2 * i + 1) / u128::from(2 * count);
            if let Some((tokens, bytes)) = stream.piece(spot as u64, cutter)? {
                windows.push(cutter.window(&tokens));
                stream.held.push(bytes);
            }
        }
        Ok((stream, windows))
    }

    /// Of the file as it is.
    pub fn stamp(&self) -> String {
        format!("{} {}", self.size, self.modified)
    }

    /// A piece from anywhere but what is held out.
    pub fn draw(&self, rng: &mut ChaCha8Rng, cutter: &Cutter<'_>) -> Result<Window, TuneError> {
        let mut longest = Vec::new();
        for _ in 0..TRIES {
            let tokens = self.piece(rng.random_range(0..self.size), cutter)?.unwrap_or_default().0;
            if tokens.len() > longest.len() {
                longest = tokens;
            }
            if longest.len() == cutter.window {
                break;
            }
        }
        Ok(cutter.window(&longest))
    }

    /// The tokens from about `at` on, at most a window of them, up to what is held out, and the bytes that they stand for.
    fn piece(&self, at: u64, cutter: &Cutter<'_>) -> Result<Option<(Vec<u32>, Range<u64>)>, TuneError> {
        let mut file = File::open(&self.path)?;
        file.seek(SeekFrom::Start(at))?;
        let mut bytes = Vec::new();
        (&file).take((cutter.window * BYTES_PER_TOKEN) as u64).read_to_end(&mut bytes)?;
        let mut start = at + if at == 0 { 0 } else { beginning(&bytes) as u64 };
        let mut end = at + bytes.len() as u64;
        for held in &self.held {
            if held.contains(&start) {
                start = held.end;
            } else if start < held.start {
                end = end.min(held.start);
            }
        }
        if start >= end {
            return Ok(None);
        }
        let text = self.text(&bytes[(start - at) as usize..(end - at) as usize], start)?;
        let tokens = cutter.tokenizer.encode_with_offsets(text)?;
        let taken = &tokens[..cutter.window.min(tokens.len())];
        let Some((_, last)) = taken.last() else { return Ok(None) };
        Ok(Some((taken.iter().map(|(token, _)| *token).collect(), start..start + last.end as u64)))
    }

    /// What is cut off at the end is no mistake.
    fn text<'b>(&self, bytes: &'b [u8], at: u64) -> Result<&'b str, TuneError> {
        match std::str::from_utf8(bytes) {
            Ok(text) => Ok(text),
            Err(error) if error.error_len().is_none() => Ok(std::str::from_utf8(&bytes[..error.valid_up_to()]).unwrap_or_default()),
            Err(error) => Err(TuneError::NotText { file: self.path.clone(), byte: at + error.valid_up_to() as u64 }),
        }
    }
}

impl Cutter<'_> {
    fn window(&self, tokens: &[u32]) -> Window {
        Window { tokens: [&self.prefix, tokens].concat(), prefix: self.prefix.len() }
    }
}

/// Where a passage cut out of a text starts: at a line, if one starts soon, or else at a character.
fn beginning(bytes: &[u8]) -> usize {
    let line = bytes[..bytes.len() / 4].iter().position(|byte| *byte == b'\n').map(|at| at + 1);
    line.unwrap_or_else(|| bytes.iter().take_while(|byte| **byte & 0xC0 == 0x80).take(3).count())
}

#[cfg(test)]
mod tests {
    use rand::SeedableRng as _;

    use super::*;
    use crate::source::{self, OpenOptions};

    /// Numbered lines, some with characters of several bytes, so that every token of the text can be told from every other.
    fn text() -> String {
        (0..600).map(|i| format!("{i} äöü line number {i} of the text\n")).collect()
    }

    fn with_cutter<T>(window: usize, check: impl FnOnce(&Cutter<'_>) -> T) -> T {
        let demo = Path::new(env!("CARGO_MANIFEST_DIR")).join("demo/base");
        let source = source::open(&demo.to_str().unwrap().parse().unwrap(), &OpenOptions::default()).unwrap();
        let tokenizer = Tokenizer::open(&source.sidecars, &source.config).unwrap();
        check(&Cutter { tokenizer: &tokenizer, prefix: vec![7], window })
    }

    #[test]
    fn what_is_held_out_is_not_drawn() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("text.txt");
        fs_err::write(&path, text()).unwrap();
        with_cutter(48, |cutter| {
            let (stream, held_out) = Stream::open("text", &path, 6, cutter).unwrap();
            assert_eq!((held_out.len(), stream.held.len()), (6, 6));
            assert!(held_out.iter().all(|window| window.prefix == 1 && window.tokens.len() == 49));
            let bytes = fs_err::read(&path).unwrap();
            for (window, held) in held_out.iter().zip(&stream.held) {
                let text = std::str::from_utf8(&bytes[held.start as usize..held.end as usize]).unwrap();
                assert_eq!(cutter.tokenizer.decode(&window.tokens[1..]).unwrap(), text);
            }
            let mut rng = ChaCha8Rng::seed_from_u64(1);
            let (mut full, mut starts) = (0, std::collections::BTreeSet::new());
            for _ in 0..200 {
                let at = rng.random_range(0..stream.size);
                if let Some((tokens, bytes)) = stream.piece(at, cutter).unwrap() {
                    assert!(stream.held.iter().all(|held| bytes.end <= held.start || held.end <= bytes.start), "{bytes:?}");
                    full += usize::from(tokens.len() == 48);
                    starts.insert(bytes.start);
                }
            }
            assert!(full > 120 && starts.len() > 100, "{full} whole pieces from {} places", starts.len());
            for _ in 0..50 {
                assert_eq!(stream.draw(&mut rng, cutter).unwrap().tokens.len(), 49);
            }
        });
    }

    #[test]
    fn a_text_must_have_room() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("text.txt");
        fs_err::write(&path, text()).unwrap();
        with_cutter(2000, |cutter| {
            let error = Stream::open("text", &path, 6, cutter).err().unwrap();
            assert!(matches!(error, TuneError::Short { tokens: 5000..20000, window: 2000, .. }), "{error}");
        });
        fs_err::write(&path, "").unwrap();
        with_cutter(8, |cutter| {
            assert!(matches!(Stream::open("text", &path, 6, cutter), Err(TuneError::Short { tokens: 0, .. })));
        });
    }
}
