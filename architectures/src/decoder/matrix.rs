//! Weight matrices [out, in] and the linear layers made of them.
//!
//! On a device a matrix is a candle tensor. On the CPU it stays the bytes that the checkpoint holds, usually a memory map: candle would
//! copy them, and its bf16 matmul widens the whole matrix to f32 on every call. Our own kernels multiply it where it lies.

use std::{
    hint::black_box,
    ops::{Deref, Range},
};

use bytes::Bytes;
use candle_core::{DType, Device, Result, Storage, Tensor};
use half::{f16, slice::HalfFloatSliceExt};
use rayon::prelude::*;

use super::train;
use crate::{
    blocks,
    kernels::{
        Kernels,
        product::{self, Element, Job, Operation, Rows, Weights},
    },
    weights::{Dtype, View, WeightsError},
};

/// Elements that are widened at a time, on the stack: whole blocks of any type.
const CHUNK: usize = 1024;
/// Bytes that are preloaded in a row, and the smallest that a system reads from a file.
const PIECE: usize = 4 << 20;
const PAGE: usize = 4096;
/// Elements of the matrix that are one task of a parallel loop.
const TASK: usize = 1 << 16;

/// Where weights go and in what types.
#[derive(Debug, Clone)]
pub(super) struct Placement {
    pub device: Device,
    /// Type of the weights; on the CPU, stored weights that this type holds exactly stay in their own type.
    pub weights: DType,
    /// Type of activations, keys and values.
    pub activations: DType,
    /// Where matrices stay the bytes that they were read as: the CPU's kernels that multiply them.
    pub mapped: Option<Kernels>,
}

/// A weight matrix [out, in].
#[derive(Clone)]
pub(super) enum Matrix {
    Mapped(Mapped),
    Held(Tensor),
}

impl Matrix {
    /// `view` is two-dimensional and has as many bytes as its shape says.
    pub fn new(view: &View, placement: &Placement) -> std::result::Result<Self, crate::decoder::DecoderError> {
        match placement.mapped {
            Some(kernels) => Ok(Self::Mapped(Mapped::new(view, placement.weights, kernels)?)),
            None => Ok(Self::Held(view.to_tensor(placement.weights, &placement.device)?)),
        }
    }

    /// x [N, in] -> x W^T [N, out], in the type of the activations.
    pub fn times(&self, x: &Tensor) -> Result<Tensor> {
        match self {
            Self::Held(weight) => x.matmul(&weight.t()?),
            Self::Mapped(weight) if x.track_op() => train::times(weight, x),
            Self::Mapped(weight) => weight.times(x),
        }
    }

    /// [out, in]
    pub fn shape(&self) -> [usize; 2] {
        match self {
            Self::Held(weight) => [weight.dims()[0], weight.dims()[1]],
            Self::Mapped(weight) => weight.shape(),
        }
    }

    /// Lets the CPU round x to the type of the weights where that is faster.
    pub fn hasten(&mut self) {
        if let Self::Mapped(weight) = self {
            weight.kernels = Kernels::fastest();
        }
    }

    /// Reads every page of a memory map, so that the system has it at hand.
    pub fn preload(&self) {
        if let Self::Mapped(weight) = self {
            weight.data.par_chunks(PIECE).for_each(|piece| _ = black_box(piece.iter().step_by(PAGE).fold(0, |sum, byte| sum ^ byte)));
        }
    }

    /// Rows `ids` [n, in]; the ids are below the number of rows.
    pub fn gather(&self, ids: &[u32]) -> Result<Tensor> {
        match self {
            Self::Held(weight) => weight.index_select(&Tensor::new(ids, weight.device())?, 0),
            Self::Mapped(weight) => {
                let mut rows = vec![0f32; ids.len() * weight.inner];
                for (id, row) in ids.iter().zip(rows.chunks_exact_mut(weight.inner)) {
                    weight.widen_row(*id as usize, row);
                }
                Tensor::from_vec(rows, (ids.len(), weight.inner), &Device::Cpu)
            }
        }
    }
}

impl std::fmt::Debug for Matrix {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Mapped(weight) => write!(f, "Matrix[{}, {}] {:?}, mapped", weight.rows, weight.inner, weight.element),
            Self::Held(weight) => write!(f, "Matrix{:?} {:?}", weight.dims(), weight.dtype()),
        }
    }
}

/// The bytes of a matrix, row-major, little endian, at any alignment.
#[derive(Clone)]
pub(super) struct Mapped {
    pub kernels: Kernels,
    element: Element,
    rows: usize,
    inner: usize,
    data: Bytes,
}

impl Mapped {
    fn new(view: &View, dtype: DType, kernels: Kernels) -> std::result::Result<Self, WeightsError> {
        let (target, element) = match (dtype, view.info.dtype) {
            (_, own) if own.is_blocks() => (own, Element::Blocks(own)),
            (DType::BF16, _) | (DType::F32, Dtype::Bf16) => (Dtype::Bf16, Element::Bf16),
            (DType::F16, _) | (DType::F32, Dtype::F16) => (Dtype::F16, Element::F16),
            _ => (Dtype::F32, Element::F32),
        };
        let view = view.cast(target)?;
        let inner = view.info.shape.last().copied().unwrap_or(1);
        Ok(Self { kernels, element, rows: view.info.elements() / inner, inner, data: view.data })
    }

    /// [out, in]
    pub fn shape(&self) -> [usize; 2] {
        [self.rows, self.inner]
    }

    /// As the kernels take it.
    pub fn weights(&self) -> Result<Weights<'_>> {
        let weights = Weights::new(&self.data, self.element, self.rows, self.inner);
        weights.ok_or_else(|| candle_core::Error::Msg(format!("{} bytes are no matrix {:?}", self.data.len(), self.shape())))
    }

    fn row(&self, row: usize) -> &[u8] {
        let bytes = self.element.bytes(self.inner);
        &self.data[row * bytes..(row + 1) * bytes]
    }

    fn widen_row(&self, row: usize, out: &mut [f32]) {
        for (bytes, out) in self.row(row).chunks(self.element.bytes(CHUNK)).zip(out.chunks_mut(CHUNK)) {
            widen(self.element, bytes, out);
        }
    }

    /// x [N, in] -> [N, out]
    fn times(&self, x: &Tensor) -> Result<Tensor> {
        let n = x.dim(0)?;
        let mut y = vec![0f32; n * self.rows];
        let operation = Operation::Linear(self.weights()?, None);
        let x = x.contiguous()?;
        product::run(self.kernels, vec![Job { operation, x: Values::of(&x)?.slice()?, rows: Rows::All, y: &mut y }]);
        Tensor::from_vec(y, (n, self.rows), &Device::Cpu)
    }

    /// A block of rows in f32, row-major.
    pub fn widen_rows(&self, rows: Range<usize>) -> Vec<f32> {
        let mut wide = vec![0f32; rows.len() * self.inner];
        wide.par_chunks_mut(self.inner).with_min_len((TASK / self.inner).max(1)).zip(rows).for_each(|(out, row)| self.widen_row(row, out));
        wide
    }
}

/// At most [`CHUNK`] elements.
fn widen(element: Element, bytes: &[u8], out: &mut [f32]) {
    match element {
        Element::Blocks(dtype) => blocks::decode(dtype, bytes, out),
        Element::F32 => {
            for (bytes, out) in bytes.as_chunks::<4>().0.iter().zip(out) {
                *out = f32::from_le_bytes(*bytes);
            }
        }
        Element::Bf16 => {
            for (bytes, out) in bytes.as_chunks::<2>().0.iter().zip(out) {
                *out = f32::from_bits(u32::from(u16::from_le_bytes(*bytes)) << 16);
            }
        }
        Element::F16 => {
            // `half` uses the CPU's conversion on slices, which want alignment.
            let mut aligned = [f16::ZERO; CHUNK];
            let aligned = &mut aligned[..out.len()];
            for (bytes, aligned) in bytes.as_chunks::<2>().0.iter().zip(aligned.iter_mut()) {
                *aligned = f16::from_le_bytes(*bytes);
            }
            aligned.convert_to_f32_slice(out);
        }
    }
}

/// The f32 values of a contiguous tensor in the CPU's memory, row-major.
pub(super) struct Values<'a> {
    storage: Box<dyn Deref<Target = Storage> + 'a>,
    range: Range<usize>,
}

impl<'a> Values<'a> {
    pub fn of(x: &'a Tensor) -> Result<Self> {
        let (storage, layout) = x.storage_and_layout();
        let Some((start, end)) = layout.contiguous_offsets() else { candle_core::bail!("the values do not lie side by side") };
        Ok(Self { storage: Box::new(storage), range: start..end })
    }

    pub fn slice(&self) -> Result<&[f32]> {
        match &**self.storage {
            Storage::Cpu(storage) => Ok(&storage.as_slice::<f32>()?[self.range.clone()]),
            _ => candle_core::bail!("the values are not in the CPU's memory"),
        }
    }
}

/// A linear layer.
#[derive(Debug, Clone)]
pub(super) struct Linear {
    pub weight: Matrix,
    /// `[out]`
    pub bias: Option<Tensor>,
    /// a change being trained: [r, in] and [out, r], f32
    pub low_rank: Option<(Tensor, Tensor)>,
}

/// A linear layer as the CPU's kernels take it.
pub(super) struct Direct<'a> {
    pub weights: Weights<'a>,
    pub bias: Option<Vec<f32>>,
    pub kernels: Kernels,
}

impl Direct<'_> {
    pub fn operand(&self) -> (Weights<'_>, Option<&[f32]>) {
        (self.weights, self.bias.as_deref())
    }
}

impl Linear {
    /// `None` where candle computes: on devices, and where gradients are wanted.
    pub fn direct(&self) -> Result<Option<Direct<'_>>> {
        let Matrix::Mapped(weight) = &self.weight else { return Ok(None) };
        if self.low_rank.is_some() || self.bias.as_ref().is_some_and(Tensor::track_op) {
            return Ok(None);
        }
        let bias = self.bias.as_ref().map(Tensor::to_vec1).transpose()?;
        Ok(Some(Direct { weights: weight.weights()?, bias, kernels: weight.kernels }))
    }

    /// x [N, in] -> [N, out]
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let mut y = self.weight.times(x)?;
        if let Some((down, up)) = &self.low_rank {
            let change = x.to_dtype(DType::F32)?.matmul(&down.t()?)?.matmul(&up.t()?)?;
            y = (y + change.to_dtype(x.dtype())?)?;
        }
        match &self.bias {
            Some(bias) => y.broadcast_add(bias),
            None => Ok(y),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::weights::TensorInfo;

    /// Values that a bf16 and an f16 hold exactly.
    fn numbers(len: usize) -> Vec<f32> {
        (0..len).map(|i| ((i * 7919 + i / 13) % 97) as f32 / 32.0 - 1.5).collect()
    }

    /// The matrix of these values, stored as `stored` one byte off its alignment.
    fn mapped(values: &[f32], shape: [usize; 2], stored: Dtype, dtype: DType) -> Mapped {
        let aligned = View::from_f32(values, stored, shape.to_vec()).unwrap();
        let shifted = Bytes::from([&[0][..], &aligned.data].concat()).slice(1..);
        Mapped::new(&View { info: TensorInfo { dtype: stored, shape: shape.to_vec() }, data: shifted }, dtype, Kernels::best()).unwrap()
    }

    #[test]
    fn exact_types_are_not_copied() {
        let view = View::from_f32(&numbers(6), Dtype::Bf16, vec![2, 3]).unwrap();
        for dtype in [DType::BF16, DType::F32] {
            assert_eq!(Mapped::new(&view, dtype, Kernels::best()).unwrap().data.as_ptr(), view.data.as_ptr());
        }
        assert_ne!(Mapped::new(&view, DType::F16, Kernels::best()).unwrap().data.as_ptr(), view.data.as_ptr());
    }

    #[test]
    fn gathers_rows() {
        let values = numbers(3 * 1030);
        let rows = Matrix::Mapped(mapped(&values, [3, 1030], Dtype::F16, DType::F16)).gather(&[2, 0, 2]).unwrap().to_vec2::<f32>().unwrap();
        let row = |i: usize| &values[i * 1030..(i + 1) * 1030];
        assert_eq!([&rows[0][..], &rows[1], &rows[2]], [row(2), row(0), row(2)]);
    }
}
