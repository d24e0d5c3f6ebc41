//! Files of text, of any size: a small one is read whole, of a large one as much as is needed, evenly spread over it.
//!
//! `.txt` is plain text. A line of `.jsonl` is a chat (`{"messages": [..]}`) or plain text (a string, `{"text": ..}` or `{"prompt": ..}`).

use std::{
    io::{BufRead as _, BufReader, Read as _, Seek as _, SeekFrom},
    path::Path,
};

use fs_err::File;
use serde_json::Value;

use super::{Sequence, TextError, TextOptions, encode::Encoder};

/// A file of more bytes per token wanted is not read whole: no text has tokens so long.
const BYTES_PER_TOKEN: usize = 64;

/// Bytes that hold a token of all but the oddest text.
const BYTES_OF_TOKEN: usize = 32;

/// Tokens of a line of which a place in a large file is looked up: with shorter lines there is less text than there could be.
const SHORT_LINE: usize = 8;

/// Windows of one chat; the rest of a longer one is left out, to have more different ones.
const CHAT: usize = 2;

/// Bytes of one line. A file without line ends is not a `.jsonl`, and should not be held in memory to find out.
const LINE: u64 = 1 << 22;

/// The file's text, about `options.tokens` that count.
pub(super) fn read(path: &Path, encoder: &Encoder, options: &TextOptions) -> Result<Vec<Sequence>, TextError> {
    let size = fs_err::metadata(path)?.len();
    let whole = size <= (options.tokens * BYTES_PER_TOKEN) as u64;
    let spots = |n: usize| (0..n as u64).map(move |i| (u128::from(size) * u128::from(i) / n as u128) as u64);
    let mut sequences = Vec::new();
    if path.extension().is_some_and(|end| end == "jsonl") {
        let mut lines = Lines::open(path)?;
        let mut add = |at: u64, line: &str| -> Result<(), TextError> {
            let broken = |reason: String| TextError::File { place: place(path, at), reason };
            sequences.extend(parse(line, encoder, options).map_err(|error| match error {
                Line::Broken(reason) => broken(reason),
                Line::Text(error) => error,
            })?);
            Ok(())
        };
        if whole {
            while let Some((at, line)) = lines.next()? {
                add(at, &line)?;
            }
        } else {
            for spot in spots(options.tokens.div_ceil(SHORT_LINE)) {
                // A long line holds many spots.
                if spot >= lines.at || spot == 0 {
                    lines.seek(spot)?;
                    if let Some((at, line)) = lines.next()? {
                        add(at, &line)?;
                    }
                }
            }
        }
    } else if whole {
        let bytes = fs_err::read(path)?;
        sequences = encoder.windows(utf8(path, 0, &bytes)?, options.window)?;
    } else {
        let mut file = File::open(path)?;
        for spot in spots(options.tokens.div_ceil(options.window.max(1))) {
            let mut bytes = Vec::new();
            file.seek(SeekFrom::Start(spot))?;
            (&file).take((options.window * BYTES_OF_TOKEN) as u64).read_to_end(&mut bytes)?;
            let start = if spot == 0 { 0 } else { start(&bytes) };
            sequences.extend(encoder.windows(utf8(path, spot + start as u64, &bytes[start..])?, options.window)?.into_iter().next());
        }
    }
    Ok(thinned(sequences, options.tokens))
}

/// About `room` tokens that count, from all parts alike.
fn thinned(mut sequences: Vec<Sequence>, room: usize) -> Vec<Sequence> {
    let total: usize = sequences.iter().map(Sequence::counted).sum();
    let (mut seen, mut kept) = (0, 0);
    sequences.retain(|sequence| {
        let counted = sequence.counted();
        seen += counted;
        // At each place as large a share is kept as of the whole, to half a sequence.
        let keep = counted > 0 && (total <= room || kept + counted / 2 <= (seen as f64 / total as f64 * room as f64) as usize);
        kept += if keep { counted } else { 0 };
        keep
    });
    sequences
}

/// Where a passage cut out of a text starts: at a line, if one starts soon, or else at a character.
fn start(bytes: &[u8]) -> usize {
    let line = bytes[..bytes.len() / 4].iter().position(|byte| *byte == b'\n').map(|at| at + 1);
    line.unwrap_or_else(|| bytes.iter().take_while(|byte| **byte & 0xC0 == 0x80).take(3).count())
}

/// The text of bytes whose last character may be cut off. `at` is where they stand in the file.
fn utf8<'b>(path: &Path, at: u64, bytes: &'b [u8]) -> Result<&'b str, TextError> {
    let error = match std::str::from_utf8(bytes) {
        Ok(text) => return Ok(text),
        Err(error) => error,
    };
    let place = || place(path, at + error.valid_up_to() as u64);
    match std::str::from_utf8(&bytes[..error.valid_up_to()]) {
        Ok(text) if error.error_len().is_none() => Ok(text),
        _ => Err(TextError::File { place: place(), reason: "it is not UTF-8".to_owned() }),
    }
}

/// `file:line` of a byte, counted only when there is something to complain of.
fn place(path: &Path, at: u64) -> String {
    let count = || Some(1 + BufReader::new(File::open(path).ok()?).take(at).bytes().flatten().filter(|byte| *byte == b'\n').count());
    count().map_or_else(|| path.display().to_string(), |line| format!("{}:{line}", path.display()))
}

struct Lines<'p> {
    path: &'p Path,
    reader: BufReader<File>,
    /// where the next line begins
    at: u64,
}

impl<'p> Lines<'p> {
    fn open(path: &'p Path) -> Result<Self, TextError> {
        Ok(Self { path, reader: BufReader::new(File::open(path)?), at: 0 })
    }

    /// Goes to the first line that begins at `at` or behind it.
    fn seek(&mut self, at: u64) -> Result<(), TextError> {
        self.at = self.reader.seek(SeekFrom::Start(at.saturating_sub(1)))?;
        if at > 0 {
            self.line()?;
        }
        Ok(())
    }

    /// The next line that is not empty, and where it begins.
    fn next(&mut self) -> Result<Option<(u64, String)>, TextError> {
        loop {
            let at = self.at;
            let bytes = self.line()?;
            let line = utf8(self.path, at, &bytes)?;
            if bytes.is_empty() || !line.trim().is_empty() {
                return Ok((!bytes.is_empty()).then(|| (at, line.to_owned())));
            }
        }
    }

    fn line(&mut self) -> Result<Vec<u8>, TextError> {
        let mut bytes = Vec::new();
        (&mut self.reader).take(LINE).read_until(b'\n', &mut bytes)?;
        if bytes.len() as u64 == LINE {
            return Err(TextError::File { place: place(self.path, self.at), reason: format!("the line is longer than {LINE} bytes") });
        }
        self.at += bytes.len() as u64;
        Ok(bytes)
    }
}

/// Why a line gives no text.
enum Line {
    Broken(String),
    Text(TextError),
}

impl<E: Into<TextError>> From<E> for Line {
    fn from(error: E) -> Self {
        Self::Text(error.into())
    }
}

fn parse(line: &str, encoder: &Encoder, options: &TextOptions) -> Result<Vec<Sequence>, Line> {
    let value: Value = serde_json::from_str(line).map_err(|error| Line::Broken(error.to_string()))?;
    if let Some(messages) = value.get("messages") {
        let messages = messages.as_array().filter(|messages| !messages.is_empty());
        let messages = messages.ok_or_else(|| Line::Broken("`messages` must be a list of messages".to_owned()))?;
        let no_template = || Line::Broken("it is a chat, but the base model has no chat template: use `{\"text\": ..}`".to_owned());
        let chat = encoder.chat(messages).map_err(|error| match error {
            TextError::Template(error) => Line::Broken(error.to_string()),
            error => Line::Text(error),
        });
        let mut chat = chat?.ok_or_else(no_template)?;
        chat.truncate((CHAT * options.window).min(encoder.context));
        return Ok(vec![chat]);
    }
    let text = value.get("text").or_else(|| value.get("prompt")).unwrap_or(&value).as_str();
    let text = text.ok_or_else(|| Line::Broken("it is neither a string nor an object with `messages`, `text` or `prompt`".to_owned()))?;
    Ok(encoder.windows(text, options.window)?)
}
