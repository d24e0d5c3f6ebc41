//! A set of named tensors that can be read on demand: the one interface between whoever has weights and whoever needs them.
//!
//! An opened checkpoint, a `LoRA` adapter over its base, a GGUF file and a composite that exists only as a plan are all [`Weights`].
//! Nothing here opens a file: the bytes come in as [`Bytes`], which may borrow a memory map.

use bytes::Bytes;
use candle_core::{DType, Device, Tensor};
use half::{bf16, f16, slice::HalfFloatSliceExt as _};

use crate::blocks;

/// Element types of the tensors that models are made of, as they lie on disk (little endian, no padding).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Dtype {
    /// 8-bit float, 4 exponent bits
    F8E4M3,
    /// bfloat16
    Bf16,
    /// IEEE half
    F16,
    /// IEEE single
    F32,
    /// IEEE double
    F64,
    /// ggml's blocks of 32: 4-bit integers and one scale
    Q4_0,
    /// ggml's blocks of 32: 5-bit integers and one scale
    Q5_0,
    /// ggml's blocks of 32: 8-bit integers and one scale
    Q8_0,
    /// ggml's blocks of 256: 4-bit integers, a scale and a minimum for every 32
    Q4K,
    /// ggml's blocks of 256: 5-bit integers, a scale and a minimum for every 32
    Q5K,
    /// ggml's blocks of 256: 6-bit integers and a scale for every 16
    Q6K,
}

impl Dtype {
    /// Elements and bytes of what is stored together, neighbours in a row: one element, or a block of them.
    pub const fn block(self) -> (usize, usize) {
        match self {
            Self::F8E4M3 => (1, 1),
            Self::Bf16 | Self::F16 => (1, 2),
            Self::F32 => (1, 4),
            Self::F64 => (1, 8),
            Self::Q4_0 => (32, 18),
            Self::Q5_0 => (32, 22),
            Self::Q8_0 => (32, 34),
            Self::Q4K => (256, 144),
            Self::Q5K => (256, 176),
            Self::Q6K => (256, 210),
        }
    }

    /// Whether elements are stored in blocks that share scales.
    pub const fn is_blocks(self) -> bool {
        self.block().0 > 1
    }

    /// Elements of a block that share a scale.
    pub const fn sub_block(self) -> usize {
        match self {
            Self::Q6K => 16,
            _ => 32,
        }
    }

    /// Bytes of so many elements, which are whole blocks.
    pub const fn bytes(self, elements: usize) -> usize {
        let (block, bytes) = self.block();
        elements / block * bytes
    }

    /// The type itself, or for blocks the type of what they decode to.
    #[must_use]
    pub const fn decoded(self) -> Self {
        if self.is_blocks() { Self::F32 } else { self }
    }

    /// The name in a safetensors header; ggml's for blocks, which no such file holds.
    pub const fn safetensors_name(self) -> &'static str {
        match self {
            Self::F8E4M3 => "F8_E4M3",
            Self::Bf16 => "BF16",
            Self::F16 => "F16",
            Self::F32 => "F32",
            Self::F64 => "F64",
            Self::Q4_0 | Self::Q5_0 | Self::Q8_0 | Self::Q4K | Self::Q5K | Self::Q6K => self.torch_name(),
        }
    }

    /// The name in `config.json` (`torch_dtype`, `dtype`); ggml's for blocks.
    pub const fn torch_name(self) -> &'static str {
        match self {
            Self::F8E4M3 => "float8_e4m3fn",
            Self::Bf16 => "bfloat16",
            Self::F16 => "float16",
            Self::F32 => "float32",
            Self::F64 => "float64",
            Self::Q4_0 => "Q4_0",
            Self::Q5_0 => "Q5_0",
            Self::Q8_0 => "Q8_0",
            Self::Q4K => "Q4_K",
            Self::Q5K => "Q5_K",
            Self::Q6K => "Q6_K",
        }
    }

    /// Reads `float32`, `torch.bfloat16`, `bf16`, `F16`, `half` ...; `None` if the name is none of a float type.
    pub fn parse(name: &str) -> Option<Self> {
        let name = name.strip_prefix("torch.").unwrap_or(name).to_ascii_lowercase();
        Some(match name.as_str() {
            "float8_e4m3fn" | "f8_e4m3" => Self::F8E4M3,
            "bfloat16" | "bf16" => Self::Bf16,
            "float16" | "f16" | "fp16" | "half" => Self::F16,
            "float32" | "f32" | "fp32" | "float" => Self::F32,
            "float64" | "f64" | "fp64" | "double" => Self::F64,
            _ => return None,
        })
    }

    /// candle's name for the same type; for blocks, of what they decode to.
    pub const fn candle(self) -> DType {
        match self {
            Self::F8E4M3 => DType::F8E4M3,
            Self::Bf16 => DType::BF16,
            Self::F16 => DType::F16,
            Self::F32 | Self::Q4_0 | Self::Q5_0 | Self::Q8_0 | Self::Q4K | Self::Q5K | Self::Q6K => DType::F32,
            Self::F64 => DType::F64,
        }
    }
}

impl std::fmt::Display for Dtype {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.torch_name())
    }
}

/// What a tensor is without its bytes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TensorInfo {
    /// Element type.
    pub dtype: Dtype,
    /// Row-major shape. A row, the last dimension, is a whole number of [blocks](Dtype::block).
    pub shape: Vec<usize>,
}

impl TensorInfo {
    /// Number of elements.
    pub fn elements(&self) -> usize {
        self.shape.iter().product()
    }

    /// Number of bytes.
    pub fn bytes(&self) -> usize {
        self.dtype.bytes(self.elements())
    }

    /// Fails if a row is no whole number of blocks.
    pub fn check(&self, tensor: &str) -> Result<(), WeightsError> {
        let (dtype, row) = (self.dtype, self.shape.last().copied().unwrap_or(1));
        if row.is_multiple_of(dtype.block().0) { Ok(()) } else { Err(WeightsError::Blocks { tensor: tensor.to_owned(), dtype, row }) }
    }
}

/// A tensor's bytes, borrowed from a memory map where that is possible.
#[derive(Debug, Clone)]
pub struct View {
    /// Type and shape.
    pub info: TensorInfo,
    /// `info.bytes()` bytes, row-major, little endian; not necessarily aligned to the element size.
    pub data: Bytes,
}

impl View {
    /// The elements as f32 (exact for every type but f64).
    pub fn to_f32(&self) -> Vec<f32> {
        let data = &self.data;
        match self.info.dtype {
            Dtype::F32 => data.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect(),
            Dtype::Bf16 => data.chunks_exact(2).map(|b| bf16::from_le_bytes([b[0], b[1]]).to_f32()).collect(),
            Dtype::F16 => f16_to_f32(data),
            Dtype::F64 => {
                data.chunks_exact(8).map(|b| f64::from_le_bytes([b[0], b[1], b[2], b[3], b[4], b[5], b[6], b[7]]) as f32).collect()
            }
            Dtype::F8E4M3 => {
                let all: [f32; 256] = std::array::from_fn(|bits| f8e4m3_to_f32(bits as u8));
                data.iter().map(|&b| all[usize::from(b)]).collect()
            }
            Dtype::Q4_0 | Dtype::Q5_0 | Dtype::Q8_0 | Dtype::Q4K | Dtype::Q5K | Dtype::Q6K => {
                let mut values = vec![0.0; self.info.elements()];
                blocks::decode(self.info.dtype, data, &mut values);
                values
            }
        }
    }

    /// A view that owns `values` cast to `dtype` (round to nearest even; blocks as [`encode`](blocks::encode) finds them). `values.len()` is the product of `shape`.
    pub fn from_f32(values: &[f32], dtype: Dtype, shape: Vec<usize>) -> Result<Self, WeightsError> {
        if dtype.is_blocks() {
            let row = shape.last().copied().unwrap_or(1);
            let data = blocks::encode(dtype, values, row, None).ok_or(WeightsError::Cast { dtype })?;
            return Ok(Self { info: TensorInfo { dtype, shape }, data: data.into() });
        }
        // Written in place: a push per element would keep the loops from being vectorised.
        let mut data = vec![0; dtype.bytes(values.len())];
        match dtype {
            Dtype::F32 => data.chunks_exact_mut(4).zip(values).for_each(|(b, v)| b.copy_from_slice(&v.to_le_bytes())),
            Dtype::Bf16 => data.chunks_exact_mut(2).zip(values).for_each(|(b, v)| b.copy_from_slice(&bf16::from_f32(*v).to_le_bytes())),
            Dtype::F16 => f32_to_f16(values, &mut data),
            Dtype::F64 => data.chunks_exact_mut(8).zip(values).for_each(|(b, v)| b.copy_from_slice(&f64::from(*v).to_le_bytes())),
            Dtype::F8E4M3 | Dtype::Q4_0 | Dtype::Q5_0 | Dtype::Q8_0 | Dtype::Q4K | Dtype::Q5K | Dtype::Q6K => {
                return Err(WeightsError::Cast { dtype });
            }
        }
        Ok(Self { info: TensorInfo { dtype, shape }, data: data.into() })
    }

    /// The same values in another type; without a copy if it is the same type.
    pub fn cast(&self, dtype: Dtype) -> Result<Self, WeightsError> {
        if dtype == self.info.dtype {
            return Ok(self.clone());
        }
        Self::from_f32(&self.to_f32(), dtype, self.info.shape.clone())
    }

    /// A candle tensor of the given type on the given device.
    pub fn to_tensor(&self, dtype: DType, device: &Device) -> candle_core::Result<Tensor> {
        let shape = self.info.shape.as_slice();
        let tensor = match self.info.dtype {
            own if own == Dtype::F8E4M3 || own.is_blocks() => Tensor::from_vec(self.to_f32(), shape, &Device::Cpu)?,
            own => Tensor::from_raw_buffer(&self.data, own.candle(), shape, &Device::Cpu)?,
        };
        tensor.to_dtype(dtype)?.to_device(device)
    }
}

/// Elements that `half` converts at a time, with the CPU's own instructions where it has them.
const HALVES: usize = 1024;

fn f16_to_f32(data: &[u8]) -> Vec<f32> {
    let mut values = vec![0.0; data.len() / 2];
    let mut halves = [f16::ZERO; HALVES];
    for (bytes, values) in data.chunks(2 * HALVES).zip(values.chunks_mut(HALVES)) {
        halves.iter_mut().zip(bytes.chunks_exact(2)).for_each(|(half, b)| *half = f16::from_le_bytes([b[0], b[1]]));
        halves[..values.len()].convert_to_f32_slice(values);
    }
    values
}

fn f32_to_f16(values: &[f32], data: &mut [u8]) {
    let mut halves = [f16::ZERO; HALVES];
    for (values, bytes) in values.chunks(HALVES).zip(data.chunks_mut(2 * HALVES)) {
        halves[..values.len()].convert_from_f32_slice(values);
        bytes.chunks_exact_mut(2).zip(&halves).for_each(|(b, half)| b.copy_from_slice(&half.to_le_bytes()));
    }
}

fn f8e4m3_to_f32(bits: u8) -> f32 {
    let sign = if bits & 0x80 == 0 { 1.0 } else { -1.0 };
    let (exponent, mantissa) = (i32::from((bits >> 3) & 0xf), f32::from(bits & 7));
    match (exponent, bits & 7) {
        (15, 7) => f32::NAN,
        (0, _) => sign * mantissa * 2f32.powi(-9),
        _ => sign * (1.0 + mantissa / 8.0) * 2f32.powi(exponent - 7),
    }
}

/// Named tensors, read on demand.
pub trait Weights: Send + Sync {
    /// Every tensor's name, in no particular order.
    fn names(&self) -> Vec<String>;

    /// Type and shape of a tensor, from headers alone; `None` if there is no such tensor.
    fn info(&self, name: &str) -> Option<TensorInfo>;

    /// A tensor's bytes. Fails with [`WeightsError::Missing`] for an unknown name.
    fn read(&self, name: &str) -> Result<View, WeightsError>;
}

/// Why a tensor could not be had.
#[derive(Debug, thiserror::Error)]
pub enum WeightsError {
    /// No tensor of that name.
    #[error("tensor `{tensor}` is missing")]
    Missing {
        /// its name
        tensor: String,
    },
    /// A shape other than the config says.
    #[error("tensor `{tensor}` has shape {found:?}, but the config makes it {expected:?}")]
    Shape {
        /// its name
        tensor: String,
        /// from the config
        expected: Vec<usize>,
        /// from the header
        found: Vec<usize>,
    },
    /// Rows that are no whole number of blocks.
    #[error("tensor `{tensor}` has rows of {row} elements, which {dtype} cannot hold: its blocks are of {}", dtype.block().0)]
    Blocks {
        /// its name
        tensor: String,
        /// the type of the blocks
        dtype: Dtype,
        /// elements of a row
        row: usize,
    },
    /// Nothing is written in this type.
    #[error("cannot convert a tensor to {dtype}")]
    Cast {
        /// the type asked for
        dtype: Dtype,
    },
    /// The bytes could not be read or computed.
    #[error("cannot read tensor `{tensor}`: {reason}")]
    Read {
        /// its name
        tensor: String,
        /// what went wrong, with the file
        reason: String,
    },
}
