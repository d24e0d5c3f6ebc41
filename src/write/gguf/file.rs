//! The GGUF container, version 3: metadata, tensor infos, then the tensors, each at a multiple of 32 bytes.

use upcycle_architectures::Dtype;

/// `GGUF_DEFAULT_ALIGNMENT`
const ALIGNMENT: usize = 32;

/// A metadata value, as far as we write them.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Value {
    U32(u32),
    F32(f32),
    Bool(bool),
    Text(String),
    Texts(Vec<String>),
    I32s(Vec<i32>),
    F32s(Vec<f32>),
}

/// A size; those of models fit.
pub(crate) fn size(n: usize) -> Value {
    Value::U32(u32::try_from(n).unwrap_or(u32::MAX))
}

pub(crate) type Metadata = Vec<(String, Value)>;

/// Name, row-major shape and type of a tensor.
pub(crate) struct Info<'a> {
    pub(crate) name: &'a str,
    pub(crate) shape: &'a [usize],
    pub(crate) dtype: Dtype,
}

/// What stands before the tensors, and where each of them goes.
pub(crate) struct Layout {
    pub(crate) header: Vec<u8>,
    /// from the start of the file
    pub(crate) offsets: Vec<u64>,
    /// length of the file
    pub(crate) end: u64,
}

/// Lays a file out.
pub(crate) fn layout(metadata: &Metadata, tensors: &[Info<'_>]) -> Layout {
    let mut header = b"GGUF\x03\0\0\0".to_vec();
    header.extend((tensors.len() as u64).to_le_bytes());
    header.extend((metadata.len() as u64).to_le_bytes());
    for (key, value) in metadata {
        text(&mut header, key);
        header.extend(kind(value).to_le_bytes());
        put(&mut header, value);
    }
    let (mut offset, mut offsets) = (0, Vec::with_capacity(tensors.len()));
    for tensor in tensors {
        text(&mut header, tensor.name);
        header.extend((tensor.shape.len() as u32).to_le_bytes());
        tensor.shape.iter().rev().for_each(|dim| header.extend((*dim as u64).to_le_bytes()));
        header.extend(ggml_type(tensor.dtype).to_le_bytes());
        header.extend((offset as u64).to_le_bytes());
        offsets.push(offset as u64);
        offset = (offset + tensor.dtype.bytes(tensor.shape.iter().product())).next_multiple_of(ALIGNMENT);
    }
    header.resize(header.len().next_multiple_of(ALIGNMENT), 0);
    let start = header.len() as u64;
    offsets.iter_mut().for_each(|at| *at += start);
    Layout { header, offsets, end: start + offset as u64 }
}

fn text(out: &mut Vec<u8>, text: &str) {
    out.extend((text.len() as u64).to_le_bytes());
    out.extend(text.as_bytes());
}

/// `gguf_metadata_value_type`
const fn kind(value: &Value) -> u32 {
    match value {
        Value::U32(_) => 4,
        Value::F32(_) => 6,
        Value::Bool(_) => 7,
        Value::Text(_) => 8,
        Value::Texts(_) | Value::I32s(_) | Value::F32s(_) => 9,
    }
}

fn put(out: &mut Vec<u8>, value: &Value) {
    let list = |out: &mut Vec<u8>, kind: u32, len: usize| {
        out.extend(kind.to_le_bytes());
        out.extend((len as u64).to_le_bytes());
    };
    match value {
        Value::U32(n) => out.extend(n.to_le_bytes()),
        Value::F32(x) => out.extend(x.to_le_bytes()),
        Value::Bool(flag) => out.push(u8::from(*flag)),
        Value::Text(value) => text(out, value),
        Value::Texts(all) => {
            list(out, 8, all.len());
            all.iter().for_each(|one| text(out, one));
        }
        Value::I32s(all) => {
            list(out, 5, all.len());
            all.iter().for_each(|n| out.extend(n.to_le_bytes()));
        }
        Value::F32s(all) => {
            list(out, 6, all.len());
            all.iter().for_each(|x| out.extend(x.to_le_bytes()));
        }
    }
}

/// `ggml_type`. There is none for 8-bit floats, which are never written.
const fn ggml_type(dtype: Dtype) -> u32 {
    match dtype {
        Dtype::F32 | Dtype::F8E4M3 => 0,
        Dtype::F16 => 1,
        Dtype::Q4_0 => 2,
        Dtype::Q5_0 => 6,
        Dtype::Q8_0 => 8,
        Dtype::Q4K => 12,
        Dtype::Q5K => 13,
        Dtype::Q6K => 14,
        Dtype::F64 => 28,
        Dtype::Bf16 => 30,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn header_bytes() {
        let metadata = vec![("a".to_owned(), Value::U32(7)), ("b".to_owned(), Value::Texts(vec!["xy".into()]))];
        let tensors = [Info { name: "t", shape: &[3, 32], dtype: Dtype::Q8_0 }, Info { name: "u", shape: &[2], dtype: Dtype::F32 }];
        let layout = layout(&metadata, &tensors);
        let expected = [
            &b"GGUF\x03\0\0\0\x02\0\0\0\0\0\0\0\x02\0\0\0\0\0\0\0"[..],
            b"\x01\0\0\0\0\0\0\0a\x04\0\0\0\x07\0\0\0",
            b"\x01\0\0\0\0\0\0\0b\x09\0\0\0\x08\0\0\0\x01\0\0\0\0\0\0\0\x02\0\0\0\0\0\0\0xy",
            b"\x01\0\0\0\0\0\0\0t\x02\0\0\0\x20\0\0\0\0\0\0\0\x03\0\0\0\0\0\0\0\x08\0\0\0\0\0\0\0\0\0\0\0",
            b"\x01\0\0\0\0\0\0\0u\x01\0\0\0\x02\0\0\0\0\0\0\0\0\0\0\0\x80\0\0\0\0\0\0\0",
        ]
        .concat();
        assert_eq!(layout.header[..expected.len()], expected);
        assert!(layout.header.len().is_multiple_of(32) && layout.header[expected.len()..].iter().all(|byte| *byte == 0));
        let start = layout.header.len() as u64;
        // 3 rows of one block of 34 bytes end at 102.
        assert_eq!((layout.offsets, layout.end), (vec![start, start + 128], start + 160));
    }
}
