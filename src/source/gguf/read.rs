//! The GGUF container, versions 2 and 3: metadata and tensor infos, read from a map.
//!
//! Nothing is decoded before it is asked for: strings and arrays stay slices of the map, so a hostile file cannot make us allocate more
//! than its own length. Every offset is checked here, once.

use std::{borrow::Cow, collections::BTreeMap, path::Path};

use bytes::Bytes;
use candle_core::quantized::GgmlDType;

use crate::source::{SourceError, map::map};

/// An opened file.
pub(crate) struct Gguf {
    pub(super) metadata: BTreeMap<String, Value>,
    pub(crate) tensors: BTreeMap<String, Stored>,
}

/// A metadata value.
#[derive(Clone)]
pub(crate) enum Value {
    Integer(i64),
    /// f32 values are widened by way of their shortest decimal form: 1e-5 stays 1e-5.
    Float(f64),
    Bool(bool),
    Text(Bytes),
    Array(Array),
}

/// An array of scalars or strings.
#[derive(Clone)]
pub(crate) struct Array {
    kind: u32,
    pub(super) len: usize,
    data: Bytes,
}

/// A tensor as it lies in the file.
#[derive(Clone)]
pub(crate) struct Stored {
    /// `Err` is the name of a type that is not read.
    pub(super) dtype: Result<GgmlDType, String>,
    /// Row-major: the file's order reversed.
    pub(super) shape: Vec<usize>,
    /// Empty for a type that is not read.
    pub(super) data: Bytes,
}

type Result<T, E = String> = std::result::Result<T, E>;

const MAGIC: &[u8] = b"GGUF";
const STRING: u32 = 8;
const ARRAY: u32 = 9;
/// `GGML_MAX_DIMS`
const MAX_DIMS: u32 = 4;

/// Whether a file says that it is one.
pub(super) fn has_magic(file: &Path) -> std::io::Result<bool> {
    use std::io::Read as _;
    let mut start = Vec::with_capacity(MAGIC.len());
    fs_err::File::open(file)?.take(MAGIC.len() as u64).read_to_end(&mut start)?;
    Ok(start == MAGIC)
}

/// For messages: short, whatever the file holds.
impl std::fmt::Display for Value {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Integer(value) => write!(f, "{value}"),
            Self::Float(value) => write!(f, "{value}"),
            Self::Bool(value) => write!(f, "{value}"),
            Self::Text(_) => f.write_str("a string"),
            Self::Array(_) => f.write_str("a list"),
        }
    }
}

impl Gguf {
    /// Maps a file and reads its headers.
    pub(crate) fn open(file: &Path) -> Result<Self, SourceError> {
        Self::parse(map(file)?).map_err(|reason| SourceError::Gguf { file: file.to_owned(), reason })
    }

    fn parse(bytes: Bytes) -> Result<Self> {
        let mut reader = Reader { bytes, at: 0 };
        if reader.take(4)? != MAGIC {
            return Err("it does not begin with `GGUF`: it is something else under this name; fetch it again".into());
        }
        match reader.u32()? {
            2 | 3 => {}
            version if version.swap_bytes() < 16 => return Err("it is for big-endian machines; convert it for little-endian ones".into()),
            version => return Err(format!("GGUF version {version} is not read, only 2 and 3; convert it anew with llama.cpp")),
        }
        let (tensor_count, metadata_count) = (reader.u64()?, reader.u64()?);
        let mut metadata = BTreeMap::new();
        for _ in 0..metadata_count {
            let key = reader.string()?;
            let kind = reader.u32()?;
            let value = reader.value(kind).map_err(|reason| format!("metadata `{key}`: {reason}"))?;
            if metadata.insert(key.clone(), value).is_some() {
                return Err(format!("metadata `{key}` is there twice"));
            }
        }
        let mut infos = Vec::new();
        for _ in 0..tensor_count {
            infos.push(reader.info()?);
        }
        let alignment = match metadata.get("general.alignment") {
            None => 32,
            // A multiple of 8 is the format's rule; with it every block of every type is aligned in the map.
            Some(Value::Integer(n)) if *n > 0 && n % 8 == 0 => *n as u64,
            Some(other) => return Err(format!("`general.alignment` is {other}, not a multiple of 8")),
        };
        let start = (reader.at as u64).next_multiple_of(alignment);
        let mut tensors = BTreeMap::new();
        for (name, shape, kind, offset) in infos {
            let stored =
                stored(&reader.bytes, start, alignment, shape, kind, offset).map_err(|reason| format!("tensor `{name}`: {reason}"))?;
            if tensors.insert(name.clone(), stored).is_some() {
                return Err(format!("tensor `{name}` is there twice"));
            }
        }
        Ok(Self { metadata, tensors })
    }

    pub(super) fn integer(&self, key: &str) -> Result<Option<usize>> {
        match self.metadata.get(key) {
            None => Ok(None),
            Some(Value::Integer(n)) => usize::try_from(*n).map(Some).map_err(|_| format!("metadata `{key}` is {n}, which is negative")),
            // One value per layer: fine if all are the same.
            Some(Value::Array(array)) => {
                let mut values = array.integers().ok_or_else(|| format!("metadata `{key}` is no list of integers"))?;
                let first = values.next();
                if values.any(|value| Some(value) != first) {
                    return Err(format!("metadata `{key}` differs between layers, which is not supported"));
                }
                Ok(first.and_then(|n| usize::try_from(n).ok()))
            }
            Some(other) => Err(format!("metadata `{key}` is {other}, not an integer")),
        }
    }

    pub(super) fn float(&self, key: &str) -> Result<Option<f64>> {
        match self.metadata.get(key) {
            None => Ok(None),
            Some(Value::Float(x)) if x.is_finite() => Ok(Some(*x)),
            Some(Value::Integer(n)) => Ok(Some(*n as f64)),
            Some(other) => Err(format!("metadata `{key}` is {other}, not a number")),
        }
    }

    pub(super) fn flag(&self, key: &str) -> Result<Option<bool>> {
        match self.metadata.get(key) {
            None => Ok(None),
            Some(Value::Bool(flag)) => Ok(Some(*flag)),
            Some(other) => Err(format!("metadata `{key}` is {other}, not true or false")),
        }
    }

    pub(super) fn text(&self, key: &str) -> Result<Option<&str>> {
        match self.metadata.get(key) {
            None => Ok(None),
            Some(Value::Text(text)) => std::str::from_utf8(text).map(Some).map_err(|_| format!("metadata `{key}` is not UTF-8")),
            Some(other) => Err(format!("metadata `{key}` is {other}, not a string")),
        }
    }

    /// A list of strings that must be there.
    pub(super) fn strings(&self, key: &str) -> Result<impl Iterator<Item = Cow<'_, str>>> {
        self.array(key)?.and_then(Array::strings).ok_or_else(|| format!("metadata `{key}` is missing, or not a list of strings"))
    }

    pub(super) fn array(&self, key: &str) -> Result<Option<&Array>> {
        match self.metadata.get(key) {
            None => Ok(None),
            Some(Value::Array(array)) => Ok(Some(array)),
            Some(other) => Err(format!("metadata `{key}` is {other}, not a list")),
        }
    }
}

impl Array {
    /// Its strings; `None` if it is of another kind. (Some files have tokens that are no UTF-8.)
    fn strings(&self) -> Option<impl Iterator<Item = Cow<'_, str>>> {
        let mut rest = &self.data[..];
        let next = move |_| {
            let (length, after) = rest.split_first_chunk::<8>()?;
            let (text, after) = after.split_at_checked(usize::try_from(u64::from_le_bytes(*length)).ok()?)?;
            rest = after;
            Some(String::from_utf8_lossy(text))
        };
        (self.kind == STRING).then(|| (0..self.len).map_while(next))
    }

    /// Its integers; `None` if it is of another kind.
    pub(super) fn integers(&self) -> Option<impl Iterator<Item = i64>> {
        let kind = self.kind;
        let scalars = scalar_size(kind)?;
        matches!(kind, 0..=5 | 10 | 11).then(|| {
            self.data.chunks_exact(scalars).map_while(move |bytes| match scalar(kind, bytes) {
                Ok(Value::Integer(n)) => Some(n),
                _ => None,
            })
        })
    }

    /// Its floats; `None` if it is of another kind.
    pub(super) fn floats(&self) -> Option<impl Iterator<Item = f32>> {
        (self.kind == 6).then(|| self.data.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])))
    }
}

/// Bytes of a scalar kind.
const fn scalar_size(kind: u32) -> Option<usize> {
    Some(match kind {
        0 | 1 | 7 => 1,
        2 | 3 => 2,
        4..=6 => 4,
        10..=12 => 8,
        _ => return None,
    })
}

/// Reads a scalar from exactly its bytes.
fn scalar(kind: u32, bytes: &[u8]) -> Result<Value> {
    let mut wide = [0; 8];
    wide[..bytes.len()].copy_from_slice(bytes);
    let unsigned = u64::from_le_bytes(wide);
    Ok(match kind {
        0 | 2 | 4 | 11 => Value::Integer(unsigned as i64),
        1 => Value::Integer(i64::from(unsigned as i8)),
        3 => Value::Integer(i64::from(unsigned as i16)),
        5 => Value::Integer(i64::from(unsigned as i32)),
        6 => {
            let value = f32::from_bits(unsigned as u32);
            Value::Float(value.to_string().parse().unwrap_or_else(|_| f64::from(value)))
        }
        7 => Value::Bool(unsigned != 0),
        10 => Value::Integer(i64::try_from(unsigned).map_err(|_| format!("{unsigned} is too large"))?),
        12 => Value::Float(f64::from_bits(unsigned)),
        _ => return Err(format!("value type {kind} is unknown")),
    })
}

/// Takes from the front; every take is checked against the end.
struct Reader {
    bytes: Bytes,
    at: usize,
}

impl Reader {
    fn take(&mut self, length: usize) -> Result<Bytes> {
        let end = self.at.checked_add(length).filter(|end| *end <= self.bytes.len());
        let end = end.ok_or_else(|| {
            format!(
                "its header claims {length} bytes at {}, but the file has {}; it was cut short: fetch it again",
                self.at,
                self.bytes.len()
            )
        })?;
        let taken = self.bytes.slice(self.at..end);
        self.at = end;
        Ok(taken)
    }

    fn u32(&mut self) -> Result<u32> {
        self.take(4).map(|b| u32::from_le_bytes([b[0], b[1], b[2], b[3]]))
    }

    fn u64(&mut self) -> Result<u64> {
        self.take(8).map(|b| u64::from_le_bytes([b[0], b[1], b[2], b[3], b[4], b[5], b[6], b[7]]))
    }

    fn length(&mut self) -> Result<usize> {
        let length = self.u64()?;
        usize::try_from(length).map_err(|_| format!("its header claims a length of {length}"))
    }

    fn text(&mut self) -> Result<Bytes> {
        let length = self.length()?;
        self.take(length)
    }

    fn string(&mut self) -> Result<String> {
        String::from_utf8(self.text()?.to_vec()).map_err(|_| format!("a name before byte {} is not UTF-8", self.at))
    }

    fn value(&mut self, kind: u32) -> Result<Value> {
        match kind {
            STRING => Ok(Value::Text(self.text()?)),
            ARRAY => {
                let (kind, len) = (self.u32()?, self.length()?);
                let data = match (kind, scalar_size(kind)) {
                    (_, Some(size)) => self.take(len.checked_mul(size).ok_or_else(|| format!("a list of {len} values"))?)?,
                    (STRING, _) => {
                        let start = self.at;
                        for _ in 0..len {
                            self.text()?;
                        }
                        self.bytes.slice(start..self.at)
                    }
                    _ => return Err(format!("a list of type {kind} is not supported")),
                };
                Ok(Value::Array(Array { kind, len, data }))
            }
            kind => {
                let size = scalar_size(kind).ok_or_else(|| format!("value type {kind} is unknown"))?;
                scalar(kind, &self.take(size)?)
            }
        }
    }

    /// Name, row-major shape, type and offset of a tensor.
    fn info(&mut self) -> Result<(String, Vec<usize>, u32, u64)> {
        let name = self.string()?;
        let dims = self.u32()?;
        if dims > MAX_DIMS {
            return Err(format!("tensor `{name}` has {dims} dimensions, at most {MAX_DIMS} are possible"));
        }
        let mut shape = (0..dims).map(|_| self.length()).collect::<Result<Vec<_>>>()?;
        shape.reverse();
        Ok((name, shape, self.u32()?, self.u64()?))
    }
}

/// Checks a tensor against the file and slices its bytes.
fn stored(bytes: &Bytes, start: u64, alignment: u64, shape: Vec<usize>, kind: u32, offset: u64) -> Result<Stored> {
    let dtype = match dtype(kind) {
        Ok(dtype) => dtype,
        Err(name) => return Ok(Stored { dtype: Err(name), shape, data: Bytes::new() }),
    };
    let (block, block_bytes) = (dtype.block_size(), dtype.type_size());
    if shape.last().is_none_or(|row| !row.is_multiple_of(block)) {
        return Err(format!("shape {shape:?} has rows that are no multiple of {dtype:?}'s block of {block}"));
    }
    let elements = shape.iter().try_fold(1usize, |product, dim| product.checked_mul(*dim));
    let length = elements.and_then(|elements| (elements / block).checked_mul(block_bytes));
    let length = length.ok_or_else(|| format!("shape {shape:?} is too large"))?;
    if !offset.is_multiple_of(alignment) {
        return Err(format!("offset {offset} is not a multiple of the alignment {alignment}"));
    }
    let begin = start.checked_add(offset).and_then(|at| usize::try_from(at).ok());
    let range = begin.and_then(|begin| Some(begin..begin.checked_add(length)?)).filter(|range| range.end <= bytes.len());
    let range = range.ok_or_else(|| format!("it ends after the file's {} bytes; the file was cut short: fetch it again", bytes.len()))?;
    Ok(Stored { dtype: Ok(dtype), shape, data: bytes.slice(range) })
}

/// `ggml_type`, as far as candle decodes it; else the type's name.
fn dtype(kind: u32) -> Result<GgmlDType, String> {
    use GgmlDType as T;
    Ok(match kind {
        0 => T::F32,
        1 => T::F16,
        2 => T::Q4_0,
        3 => T::Q4_1,
        6 => T::Q5_0,
        7 => T::Q5_1,
        8 => T::Q8_0,
        10 => T::Q2K,
        11 => T::Q3K,
        12 => T::Q4K,
        13 => T::Q5K,
        14 => T::Q6K,
        30 => T::BF16,
        other => {
            let names = [
                (16, "IQ2_XXS"),
                (17, "IQ2_XS"),
                (18, "IQ3_XXS"),
                (19, "IQ1_S"),
                (20, "IQ4_NL"),
                (21, "IQ3_S"),
                (22, "IQ2_S"),
                (23, "IQ4_XS"),
                (29, "IQ1_M"),
                (34, "TQ1_0"),
                (35, "TQ2_0"),
                (39, "MXFP4"),
            ];
            let name = names.iter().find(|(kind, _)| *kind == other).map(|(_, name)| (*name).to_owned());
            return Err(name.unwrap_or_else(|| format!("type {other}")));
        }
    })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// A small valid file: two metadata entries, one f32 tensor `[2, 4]`.
    fn small() -> Vec<u8> {
        let mut file = Vec::new();
        let text = |file: &mut Vec<u8>, text: &str| {
            file.extend((text.len() as u64).to_le_bytes());
            file.extend(text.as_bytes());
        };
        file.extend(b"GGUF\x03\0\0\0");
        file.extend(1u64.to_le_bytes());
        file.extend(3u64.to_le_bytes());
        text(&mut file, "epsilon");
        file.extend(6u32.to_le_bytes());
        file.extend(1e-5f32.to_le_bytes());
        text(&mut file, "tokens");
        file.extend(ARRAY.to_le_bytes());
        file.extend(STRING.to_le_bytes());
        file.extend(2u64.to_le_bytes());
        text(&mut file, "one");
        text(&mut file, "zwei");
        text(&mut file, "ids");
        file.extend(ARRAY.to_le_bytes());
        file.extend(5u32.to_le_bytes());
        file.extend(2u64.to_le_bytes());
        file.extend(7i32.to_le_bytes());
        file.extend((-7i32).to_le_bytes());
        text(&mut file, "t");
        file.extend(2u32.to_le_bytes());
        file.extend(4u64.to_le_bytes());
        file.extend(2u64.to_le_bytes());
        file.extend(0u32.to_le_bytes());
        file.extend(0u64.to_le_bytes());
        file.resize(file.len().next_multiple_of(32), 0);
        file.extend((0..8u8).flat_map(|i| f32::from(i).to_le_bytes()));
        file
    }

    #[test]
    fn reads_what_is_there() {
        let gguf = Gguf::parse(small().into()).unwrap();
        assert_eq!(gguf.float("epsilon").unwrap(), Some(1e-5));
        assert_eq!(gguf.array("tokens").unwrap().unwrap().strings().unwrap().collect::<Vec<_>>(), ["one", "zwei"]);
        assert_eq!(gguf.array("ids").unwrap().unwrap().integers().unwrap().collect::<Vec<_>>(), [7, -7]);
        let tensor = &gguf.tensors["t"];
        assert_eq!(
            (tensor.shape.as_slice(), tensor.data.len(), tensor.data[28..].to_vec()),
            (&[2, 4][..], 32, 7f32.to_le_bytes().to_vec())
        );
    }

    #[test]
    fn every_cut_is_an_error() {
        let file = small();
        for length in 0..file.len() {
            assert!(Gguf::parse(Bytes::copy_from_slice(&file[..length])).is_err(), "cut at {length}");
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(2000))]
        #[test]
        fn mutated_files_never_panic(changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..8)) {
            let mut file = small();
            for (at, byte) in changes {
                let at = at.index(file.len());
                file[at] = byte;
            }
            if let Ok(gguf) = Gguf::parse(file.into()) {
                for value in gguf.metadata.values() {
                    if let Value::Array(array) = value {
                        array.strings().map(Iterator::count);
                        array.integers().map(Iterator::count);
                        array.floats().map(Iterator::count);
                    }
                }
            }
        }
    }
}
