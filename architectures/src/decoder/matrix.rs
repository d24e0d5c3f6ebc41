//! Weight matrices [out, in] and the linear layers made of them.
//!
//! On a device a matrix is a candle tensor. On the CPU it stays the bytes that the checkpoint holds, usually a memory map: candle would
//! copy them, and its bf16 matmul widens the whole matrix to f32 on every call. Here a few rows are multiplied straight from the bytes,
//! and many rows through blocks of the matrix widened to f32 and candle's gemm. Both accumulate in f32.

use std::ops::Range;

use bytes::Bytes;
use candle_core::{D, DType, Device, Result, Tensor};
use half::{f16, slice::HalfFloatSliceExt};
use rayon::prelude::*;

use super::train;
use crate::weights::{Dtype, View, WeightsError};

/// Up to this many rows are multiplied without gemm: decoding is bound by reading the weights, which this does once for all rows.
const FEW_ROWS: usize = 8;
/// Elements that are widened at a time, on the stack.
const CHUNK: usize = 1024;
/// Elements of the matrix that are one task of a parallel loop.
const TASK: usize = 1 << 16;
/// Elements of the matrix that are widened at a time for gemm (4 MiB).
const BLOCK: usize = 1 << 20;

/// Where weights go and in what types.
#[derive(Debug, Clone)]
pub(super) struct Placement {
    pub device: Device,
    /// Type of the weights; on the CPU, stored weights that this type holds exactly stay in their own type.
    pub weights: DType,
    /// Type of activations, keys and values.
    pub activations: DType,
    /// Whether matrices stay the bytes that they were read as.
    pub mapped: bool,
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
        if placement.mapped {
            Ok(Self::Mapped(Mapped::new(view, placement.weights)?))
        } else {
            Ok(Self::Held(view.to_tensor(placement.weights, &placement.device)?))
        }
    }

    /// x [N, in] -> x W^T [N, out], in the type of the activations.
    pub fn times(&self, x: &Tensor) -> Result<Tensor> {
        match self {
            Self::Held(weight) => x.matmul(&weight.t()?),
            Self::Mapped(weight) if x.track_op() => train::times(weight, x),
            Self::Mapped(weight) if x.dim(0)? <= FEW_ROWS => weight.few_rows(x),
            Self::Mapped(weight) => weight.many_rows(x),
        }
    }

    /// [out, in]
    pub fn shape(&self) -> [usize; 2] {
        match self {
            Self::Held(weight) => [weight.dims()[0], weight.dims()[1]],
            Self::Mapped(weight) => weight.shape(),
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

#[derive(Debug, Clone, Copy)]
enum Element {
    F32,
    Bf16,
    F16,
}

/// The bytes of a matrix, row-major, little endian, at any alignment.
#[derive(Clone)]
pub(super) struct Mapped {
    element: Element,
    rows: usize,
    inner: usize,
    data: Bytes,
}

impl Mapped {
    fn new(view: &View, dtype: DType) -> std::result::Result<Self, WeightsError> {
        let (target, element) = match (dtype, view.info.dtype) {
            (DType::BF16, _) | (DType::F32, Dtype::Bf16) => (Dtype::Bf16, Element::Bf16),
            (DType::F16, _) | (DType::F32, Dtype::F16) => (Dtype::F16, Element::F16),
            _ => (Dtype::F32, Element::F32),
        };
        let view = view.cast(target)?;
        let inner = view.info.shape.last().copied().unwrap_or(1);
        Ok(Self { element, rows: view.info.elements() / inner, inner, data: view.data })
    }

    /// [out, in]
    pub fn shape(&self) -> [usize; 2] {
        [self.rows, self.inner]
    }

    fn size(&self) -> usize {
        match self.element {
            Element::F32 => 4,
            Element::Bf16 | Element::F16 => 2,
        }
    }

    fn row(&self, row: usize) -> &[u8] {
        let bytes = self.inner * self.size();
        &self.data[row * bytes..(row + 1) * bytes]
    }

    fn widen_row(&self, row: usize, out: &mut [f32]) {
        for (bytes, out) in self.row(row).chunks(CHUNK * self.size()).zip(out.chunks_mut(CHUNK)) {
            widen(self.element, bytes, out);
        }
    }

    /// Each weight is read once; a row of x gives the same sums whatever rows stand beside it.
    fn few_rows(&self, x: &Tensor) -> Result<Tensor> {
        let n = x.dim(0)?;
        let x = x.flatten_all()?.to_vec1::<f32>()?;
        // [out, N]
        let mut y = vec![0f32; self.rows * n];
        let rows_per_task = (TASK / self.inner).max(1);
        let task = |(task, y): (usize, &mut [f32])| {
            let mut buffer = [0f32; CHUNK];
            for (row, y) in (task * rows_per_task..).zip(y.chunks_exact_mut(n)) {
                for (start, bytes) in (0..).step_by(CHUNK).zip(self.row(row).chunks(CHUNK * self.size())) {
                    let w = &mut buffer[..bytes.len() / self.size()];
                    widen(self.element, bytes, w);
                    for (x, y) in x.chunks_exact(self.inner).zip(y.iter_mut()) {
                        *y += dot(w, &x[start..start + w.len()]);
                    }
                }
            }
        };
        if self.rows <= rows_per_task {
            task((0, &mut y));
        } else {
            y.par_chunks_mut(rows_per_task * n).enumerate().for_each(task);
        }
        Tensor::from_vec(y, (self.rows, n), &Device::Cpu)?.t()?.contiguous()
    }

    fn many_rows(&self, x: &Tensor) -> Result<Tensor> {
        let block = (BLOCK / self.inner).max(1);
        let blocks = (0..self.rows).step_by(block).map(|start| {
            let rows = start..(start + block).min(self.rows);
            let shape = (rows.len(), self.inner);
            x.matmul(&Tensor::from_vec(self.widen_rows(rows), shape, &Device::Cpu)?.t()?)
        });
        Tensor::cat(&blocks.collect::<Result<Vec<_>>>()?, D::Minus1)
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

fn dot(a: &[f32], b: &[f32]) -> f32 {
    // Independent sums, so that the compiler may use vectors.
    let mut lanes = [0f32; 16];
    let ((a, a_rest), (b, b_rest)) = (a.as_chunks::<16>(), b.as_chunks::<16>());
    for (a, b) in a.iter().zip(b) {
        for ((lane, a), b) in lanes.iter_mut().zip(a).zip(b) {
            *lane += a * b;
        }
    }
    lanes.iter().sum::<f32>() + a_rest.iter().zip(b_rest).map(|(a, b)| a * b).sum::<f32>()
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

impl Linear {
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
        Mapped::new(&View { info: TensorInfo { dtype: stored, shape: shape.to_vec() }, data: shifted }, dtype).unwrap()
    }

    #[test]
    fn products_of_every_type_and_size() {
        for (out, inner) in [(1, 1), (3, 15), (5, 16), (2, 1023), (3, 1024), (2, 1041), (70, 2100)] {
            let (w, x) = (numbers(out * inner), numbers(9 * inner + 5)[5..].to_vec());
            let expected: Vec<f32> =
                x.chunks(inner).flat_map(|x| w.chunks(inner).map(|w| x.iter().zip(w).map(|(x, w)| x * w).sum())).collect();
            let x = Tensor::from_vec(x, (9, inner), &Device::Cpu).unwrap();
            for stored in [Dtype::F32, Dtype::Bf16, Dtype::F16, Dtype::F64] {
                for dtype in [DType::F32, DType::BF16, DType::F16] {
                    let matrix = mapped(&w, [out, inner], stored, dtype);
                    for rows in [1, 2, 8, 9] {
                        let y = Matrix::Mapped(matrix.clone()).times(&x.narrow(0, 0, rows).unwrap()).unwrap();
                        assert_eq!(y.dims(), [rows, out]);
                        for (y, expected) in y.flatten_all().unwrap().to_vec1::<f32>().unwrap().iter().zip(&expected) {
                            assert!((y - expected).abs() <= 1e-5 * inner as f32, "{out}x{inner} {stored:?} in {dtype:?}: {y} {expected}");
                        }
                    }
                }
            }
        }
    }

    #[test]
    fn neighbours_do_not_change_a_row() {
        let matrix = Matrix::Mapped(mapped(&numbers(70 * 2100), [70, 2100], Dtype::Bf16, DType::BF16));
        let x = Tensor::from_vec(numbers(8 * 2100), (8, 2100), &Device::Cpu).unwrap();
        let together = matrix.times(&x).unwrap().to_vec2::<f32>().unwrap();
        for (row, together) in together.iter().enumerate() {
            let alone = matrix.times(&x.narrow(0, row, 1).unwrap()).unwrap().to_vec2::<f32>().unwrap();
            assert_eq!(&alone[0], together);
        }
    }

    #[test]
    fn exact_types_are_not_copied() {
        let view = View::from_f32(&numbers(6), Dtype::Bf16, vec![2, 3]).unwrap();
        for dtype in [DType::BF16, DType::F32] {
            assert_eq!(Mapped::new(&view, dtype).unwrap().data.as_ptr(), view.data.as_ptr());
        }
        assert_ne!(Mapped::new(&view, DType::F16).unwrap().data.as_ptr(), view.data.as_ptr());
    }

    #[test]
    fn gathers_rows() {
        let values = numbers(3 * 1030);
        let rows = Matrix::Mapped(mapped(&values, [3, 1030], Dtype::F16, DType::F16)).gather(&[2, 0, 2]).unwrap().to_vec2::<f32>().unwrap();
        let row = |i: usize| &values[i * 1030..(i + 1) * 1030];
        assert_eq!([&rows[0][..], &rows[1], &rows[2]], [row(2), row(0), row(2)]);
    }
}
