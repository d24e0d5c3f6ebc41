//! Products of stored weight matrices [out, in] with f32 rows [N, in]: x W^T, weights read where they lie.
//!
//! A tile holds the sums of four rows of weights with a few rows of x, a vector of lanes each, and runs along the inner dimension, so both are
//! read in the order in which they lie and nothing is packed. With few rows of x every weight is read once, at the speed of memory; with
//! many, a block of weights stays in the second-level cache while tiles of x, which fit the first, pass by.
//!
//! All products of a step that do not need each other ([`Job`]) are one parallel loop: q, k and v; the gate and up projections of all chosen
//! experts; their down projections.

use std::cell::Cell;

use half::bf16;

#[cfg(target_arch = "x86_64")]
use super::amx::{self, Pairs, has_amx};
use super::{
    Kernels,
    blocks::{self, Eight},
    parallel,
    simd::{F16, F32, Fetch, Kernel, Multiply, Simd, exp},
};
use crate::{config::Activation, weights::Dtype};

/// Inner elements that are summed in lanes before the lanes are added up: a tile's rows of x fit the first-level cache. Part of the order of
/// every sum, so the same for any number of rows.
pub(crate) const CHUNK: usize = 1024;
/// Bytes of weights that a task goes through, at least: a few of them fit the second-level cache, and reading one takes some microseconds.
const TASK: usize = 128 << 10;
/// The same, at most, where weights are read but once: the beginning of a task is not foreseen, neither by the CPU nor by what fetches ahead.
const LONG_TASK: usize = 1 << 20;
/// As many tasks of weights that are read but once should come to each thread.
const SHARE: usize = 6;
/// With so many rows of x the weights, not the products, are what takes time.
const FEW: usize = 16;
/// Rows of x in a task.
const ROWS: usize = 192;
/// Bytes by which a stream of weights is fetched ahead of its use.
const AHEAD: usize = 2048;
/// The same where whole tiles are multiplied: they take so little time that what a task reads must be used often. Its sums, and the part of x that
/// it is at, fit the second-level cache.
const TILED_ROWS: usize = 320;
/// Rows of weights in such a task, at most, and at least.
const TILED_BLOCK: [usize; 2] = [64, 256];
/// Rows of weights in a tile.
const TILE: usize = 4;

/// How an element of a matrix is stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Element {
    F32,
    Bf16,
    F16,
    /// of ggml's: one of [`Dtype`]'s types of blocks
    Blocks(Dtype),
}

impl Element {
    /// Bytes of so many elements of a row.
    pub const fn bytes(self, elements: usize) -> usize {
        match self {
            Self::F32 => 4 * elements,
            Self::Bf16 | Self::F16 => 2 * elements,
            Self::Blocks(dtype) => dtype.bytes(elements),
        }
    }
}

/// A matrix [out, in] where it lies: row-major, little endian, at any alignment.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Weights<'a> {
    data: &'a [u8],
    element: Element,
    /// out
    rows: usize,
    /// in
    inner: usize,
}

impl<'a> Weights<'a> {
    /// `None` if `data` is not `rows` times `inner` elements, there are none, or a row is no whole number of blocks.
    pub fn new(data: &'a [u8], element: Element, rows: usize, inner: usize) -> Option<Self> {
        let whole = if let Element::Blocks(dtype) = element { inner.is_multiple_of(dtype.block().0) } else { true };
        let bytes = rows.checked_mul(element.bytes(inner))?;
        (whole && data.len() == bytes && bytes > 0).then_some(Self { data, element, rows, inner })
    }

    pub fn data(&self) -> &'a [u8] {
        self.data
    }

    pub fn inner(&self) -> usize {
        self.inner
    }

    pub fn row_bytes(&self) -> usize {
        self.element.bytes(self.inner)
    }
}

/// What is computed of each row x.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Operation<'a> {
    /// x W^T + b
    Linear(Weights<'a>, Option<&'a [f32]>),
    /// act(x G^T + g) * (x U^T + u); both matrices of one shape
    Gated([(Weights<'a>, Option<&'a [f32]>); 2], Activation),
}

impl<'a> Operation<'a> {
    fn weights(&self) -> Weights<'a> {
        match self {
            Self::Linear(weights, _) | Self::Gated([(weights, _), _], _) => *weights,
        }
    }

    fn matrices(&self) -> usize {
        if let Self::Gated(..) = self { 2 } else { 1 }
    }
}

/// Which rows of a matrix x [.., in] are multiplied.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Rows<'a> {
    All,
    /// these, in this order
    Listed(&'a [u32]),
}

#[cfg(target_arch = "x86_64")]
impl Rows<'_> {
    /// Whether they are the same list.
    fn are(self, other: Rows<'_>) -> bool {
        match (self, other) {
            (Self::All, Rows::All) => true,
            (Self::Listed(rows), Rows::Listed(other)) => std::ptr::eq(rows, other),
            _ => false,
        }
    }
}

/// One product.
pub(crate) struct Job<'a> {
    pub operation: Operation<'a>,
    /// row-major [.., in]
    pub x: &'a [f32],
    pub rows: Rows<'a>,
    /// [N, out], as many rows as are multiplied
    pub y: &'a mut [f32],
}

/// A job's part of the loop: its place in the list of tasks and the raw form of its output, of which each task writes another part.
struct Part<'a> {
    operation: Operation<'a>,
    /// of the type that the weights are multiplied with
    x: *const (),
    rows: Rows<'a>,
    y: *mut f32,
    n: usize,
    /// rows of weights in a task
    block: usize,
    /// rows of x in a task
    height: usize,
    /// tasks along the rows of x
    across: usize,
    /// the first of its tasks
    first: usize,
}

// SAFETY: `x` is only read; `y` is a job's exclusive slice, of which tasks write disjoint parts.
unsafe impl Sync for Part<'_> {}

/// The x of some jobs as they are multiplied, where that is not f32. Jobs share their x: q, k and v, the experts of a layer.
#[derive(Default)]
struct Prepared<'a>(Vec<(&'a [f32], Rows<'a>, Form)>);

/// Rows of x in another form.
enum Form {
    Bf16(Vec<bf16>),
    Eight(Box<Eight>),
    /// those that a job chooses, for tiles
    #[cfg(target_arch = "x86_64")]
    Pairs(Box<Pairs>),
}

impl<'a> Prepared<'a> {
    fn of(kernels: Kernels, jobs: &[Job<'a>]) -> Self {
        let mut prepared = Self::default();
        for job in jobs {
            let weights = job.operation.weights();
            let form = match weights.element {
                _ if prepared.get(job).is_some() => continue,
                #[cfg(target_arch = "x86_64")]
                Element::Bf16 if kernels == Kernels::Amx && has_amx() => Form::Pairs(Box::new(Pairs::of(job.x, weights.inner, job.rows))),
                Element::Bf16 if kernels == Kernels::Avx512Bf16 => Form::Bf16(kernels.run(Round(job.x))),
                Element::Blocks(_) => Form::Eight(Box::new(Eight::of(kernels, job.x, weights.inner))),
                Element::F32 | Element::F16 | Element::Bf16 => continue,
            };
            prepared.0.push((job.x, job.rows, form));
        }
        prepared
    }

    /// The job's x in the form that its weights call for, if there is one.
    fn get(&self, job: &Job<'_>) -> Option<*const ()> {
        let same = self.0.iter().filter(|(x, ..)| std::ptr::eq(*x, job.x));
        let mut pointers = same.filter_map(|prepared| match (&prepared.2, job.operation.weights().element) {
            (Form::Bf16(rows), Element::Bf16) => Some(rows.as_ptr().cast()),
            #[cfg(target_arch = "x86_64")]
            (Form::Pairs(pairs), Element::Bf16) if prepared.1.are(job.rows) => Some((&raw const **pairs).cast()),
            (Form::Eight(rows), Element::Blocks(_)) => Some((&raw const **rows).cast()),
            _ => None,
        });
        pointers.next()
    }
}

/// To the nearest, ties to even.
struct Round<'a>(&'a [f32]);

impl Kernel for Round<'_> {
    type Output = Vec<bf16>;

    #[inline(always)]
    unsafe fn run<S: Simd>(self) -> Vec<bf16> {
        let mut rounded = vec![bf16::ZERO; self.0.len()];
        for (rounded, x) in rounded.iter_mut().zip(self.0) {
            let bits = x.to_bits();
            // Without a branch; infinity stays, and what is no number stays none.
            let up = if x.is_nan() { 0 } else { 0x7fff + ((bits >> 16) & 1) };
            let quiet = u32::from(x.is_nan()) << 22;
            *rounded = bf16::from_bits((((bits + up) | quiet) >> 16) as u16);
        }
        rounded
    }
}

/// Does all jobs in one parallel loop.
///
/// # Panics
/// If a job's slices are not of the shapes that its operation asks for, or a listed row is not in x.
pub(crate) fn run(kernels: Kernels, jobs: Vec<Job<'_>>) {
    let mut tasks = 0;
    let prepared = Prepared::of(kernels, &jobs);
    let bytes: usize = jobs.iter().map(|job| job.operation.matrices() * job.operation.weights().data.len()).sum();
    let long = (bytes / (SHARE * rayon::current_num_threads())).clamp(TASK, LONG_TASK);
    let parts: Vec<Part<'_>> = jobs
        .into_iter()
        .map(|job| {
            let weights = job.operation.weights();
            let there = job.x.len() / weights.inner;
            let n = match job.rows {
                Rows::All => there,
                Rows::Listed(rows) => {
                    assert!(rows.iter().all(|row| (*row as usize) < there), "a row that is not there");
                    rows.len()
                }
            };
            assert_eq!(job.y.len(), n * weights.rows, "output of another shape");
            if let Operation::Gated([(gate, _), (up, _)], _) = job.operation {
                assert_eq!((gate.rows, gate.inner), (up.rows, up.inner), "gate and up of different shapes");
            }
            let tiled = weights.element == Element::Bf16 && kernels == Kernels::Amx;
            let (multiple, once) = match weights.element {
                Element::Blocks(_) => (2 * blocks::LANES, true),
                _ => (if tiled { 2 * blocks::LANES } else { TILE }, n <= FEW),
            };
            let (block, height) = if tiled && !once {
                let height = n.div_ceil(n.div_ceil(TILED_ROWS)).next_multiple_of(2 * blocks::LANES);
                let share = weights.rows * n.div_ceil(height) / (SHARE * rayon::current_num_threads());
                (share.clamp(TILED_BLOCK[0], TILED_BLOCK[1]), height)
            } else {
                (if once { long } else { TASK } / weights.row_bytes(), ROWS)
            };
            let block = block.max(1).next_multiple_of(multiple);
            let across = n.div_ceil(height);
            let first = tasks;
            tasks += weights.rows.div_ceil(block) * across;
            let x = prepared.get(&job).unwrap_or(job.x.as_ptr().cast());
            Part { operation: job.operation, x, rows: job.rows, y: job.y.as_mut_ptr(), n, block, height, across, first }
        })
        .collect();
    parallel(tasks, |task| {
        let part = &parts[parts.partition_point(|part| part.first <= task) - 1];
        let task = task - part.first;
        // The tasks of one block of weights follow each other.
        part.task(kernels, task / part.across * part.block, task % part.across * part.height);
    });
}

impl Part<'_> {
    /// Rows of weights from `start` on, rows of x from `row` on.
    fn task(&self, kernels: Kernels, start: usize, row: usize) {
        let weights = self.operation.weights();
        let (n, out) = ((self.n - row).min(self.height), (weights.rows - start).min(self.block));
        let block = |weights: Weights<'_>, y: *mut f32, stride: usize| {
            // SAFETY: the shapes have been checked by `run`; `y` has room for n rows of `out`, `stride` apart, and nobody else writes there.
            let block = Block { weights, start, out, x: self.x, rows: self.rows, row, n, y, stride, fetch: Fetch::here() };
            match weights.element {
                // SAFETY: as above.
                Element::Blocks(dtype) => unsafe { blocks::multiply(kernels, &block, dtype) },
                // SAFETY: as above; x is in the form for it.
                #[cfg(target_arch = "x86_64")]
                Element::Bf16 if kernels == Kernels::Amx && has_amx() => unsafe { amx::multiply(&block) },
                _ => kernels.run(block),
            }
        };
        // SAFETY: within the job's y [N, out], and no other task's part of it.
        let y = unsafe { self.y.add(row * weights.rows + start) };
        match &self.operation {
            Operation::Linear(weights, bias) => {
                block(*weights, y, weights.rows);
                if let Some(bias) = bias {
                    for i in 0..n {
                        // SAFETY: as above.
                        let y = unsafe { std::slice::from_raw_parts_mut(y.add(i * weights.rows), out) };
                        y.iter_mut().zip(&bias[start..]).for_each(|(y, bias)| *y += bias);
                    }
                }
            }
            Operation::Gated([gate, up], activation) => {
                let mut both = BOTH.take();
                both.resize(both.len().max(2 * n * out), 0.0);
                let (gates, ups) = both[..2 * n * out].split_at_mut(n * out);
                for ((weights, bias), z) in [(gate, &mut *gates), (up, &mut *ups)] {
                    block(*weights, z.as_mut_ptr(), out);
                    if let Some(bias) = bias {
                        z.chunks_exact_mut(out).for_each(|z| z.iter_mut().zip(&bias[start..]).for_each(|(z, bias)| *z += bias));
                    }
                }
                for (i, (gates, ups)) in gates.chunks_exact(out).zip(ups.chunks_exact(out)).enumerate() {
                    // SAFETY: as above.
                    let y = unsafe { std::slice::from_raw_parts_mut(y.add(i * weights.rows), out) };
                    kernels.run(Activate { gates, ups, y, activation: *activation });
                }
                BOTH.set(both);
            }
        }
    }
}

thread_local! {
    /// Room for what gate and up projections give.
    static BOTH: Cell<Vec<f32>> = const { Cell::new(Vec::new()) };
}

/// y = act(gates) * ups
struct Activate<'a> {
    gates: &'a [f32],
    ups: &'a [f32],
    y: &'a mut [f32],
    activation: Activation,
}

impl Kernel for Activate<'_> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        /// sqrt(2 / pi)
        const SLOPE: f32 = 0.797_884_6;
        let all = self.y.iter_mut().zip(self.gates.iter().zip(self.ups));
        match self.activation {
            Activation::Silu => all.for_each(|(y, (gate, up))| *y = gate / (1.0 + exp(-gate)) * up),
            Activation::Relu => all.for_each(|(y, (gate, up))| *y = gate.max(0.0) * up),
            Activation::Gelu => all.for_each(|(y, (gate, up))| {
                let x = gate * std::f32::consts::FRAC_1_SQRT_2;
                *y = 0.5 * gate * (1.0 + candle_core::cpu::erf::erf_f32(x)) * up;
            }),
            // (1 + tanh(x)) / 2 is 1 / (1 + exp(-2 x)).
            Activation::GeluTanh => all.for_each(|(y, (gate, up))| {
                let x = SLOPE * gate * (1.0 + 0.044_715 * gate * gate);
                *y = gate / (1.0 + exp(-2.0 * x)) * up;
            }),
        }
    }
}

/// y [n, out] = the rows of x from `row` on times the rows of weights `start..start + out`.
///
/// Made only where: `start + out` rows of weights are there; `row + n` rows are listed or are in x, and the listed ones are in x; and n rows of
/// `out` may be written at `y`, `stride` elements apart.
pub(super) struct Block<'a> {
    pub weights: Weights<'a>,
    pub start: usize,
    pub out: usize,
    /// of the type that the weights are multiplied with
    pub x: *const (),
    pub rows: Rows<'a>,
    pub row: usize,
    pub n: usize,
    pub y: *mut f32,
    pub stride: usize,
    pub fetch: Fetch,
}

impl Kernel for Block<'_> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        // SAFETY: what stands at `Block`.
        unsafe {
            match self.weights.element {
                Element::F32 => block::<S, F32>(&self),
                Element::Bf16 => block::<S, S::Bf16>(&self),
                Element::F16 => block::<S, F16>(&self),
                // Not multiplied in floats: see `blocks`.
                Element::Blocks(_) => {}
            }
        }
    }
}

#[inline(always)]
unsafe fn block<S: Simd, M: Multiply<S>>(b: &Block<'_>) {
    let tiles = b.n.div_ceil(S::ROWS).max(1);
    let rows = b.n.div_ceil(tiles);
    let groups = b.out.div_ceil(TILE);
    // SAFETY: the caller's.
    unsafe {
        if tiles == 1 {
            // Weights are read once, in the order in which they lie.
            for group in 0..groups {
                let mut at = 0;
                while at < b.weights.inner {
                    tiles_of::<S, M>(b, group..group + 1, at, 0, rows);
                    at += CHUNK;
                }
            }
        } else {
            let mut at = 0;
            while at < b.weights.inner {
                let mut row = 0;
                while row < b.n {
                    tiles_of::<S, M>(b, 0..groups, at, row, (b.n - row).min(rows));
                    row += rows;
                }
                at += CHUNK;
            }
        }
    }
}

#[inline(always)]
unsafe fn tiles_of<S: Simd, M: Multiply<S>>(b: &Block<'_>, groups: std::ops::Range<usize>, at: usize, row: usize, rows: usize) {
    // SAFETY: the caller's.
    unsafe {
        match rows {
            6 => tiles::<S, M, 6>(b, groups, at, row),
            5 => tiles::<S, M, 5>(b, groups, at, row),
            4 => tiles::<S, M, 4>(b, groups, at, row),
            3 => tiles::<S, M, 3>(b, groups, at, row),
            2 => tiles::<S, M, 2>(b, groups, at, row),
            _ => tiles::<S, M, 1>(b, groups, at, row),
        }
    }
}

/// N rows of x from `row` on times groups of four rows of the block, elements from `at` on.
///
/// The rows of a group lie a quarter of the block apart: each of the four then is a long stream through memory, which CPUs foresee.
#[inline(always)]
unsafe fn tiles<S: Simd, M: Multiply<S>, const N: usize>(b: &Block<'_>, groups: std::ops::Range<usize>, at: usize, row: usize) {
    let inner = b.weights.inner;
    let len = (inner - at).min(CHUNK);
    let x: [*const M::X; N] = std::array::from_fn(|i| {
        let row = match b.rows {
            Rows::All => b.row + row + i,
            Rows::Listed(rows) => rows[b.row + row + i] as usize,
        };
        // SAFETY: the row is in x.
        unsafe { b.x.cast::<M::X>().add(row * inner + at) }
    });
    let row_bytes = b.weights.row_bytes();
    let stride = b.out.div_ceil(TILE);
    for group in groups {
        // Beyond the last row stands the last row again.
        let place: [usize; TILE] = std::array::from_fn(|i| (group + i * stride).min(b.out - 1));
        let w: [*const u8; TILE] = std::array::from_fn(|i| {
            let weights = &b.weights.data[(b.start + place[i]) * row_bytes..];
            // SAFETY: `at` is within the row.
            unsafe { weights.as_ptr().add(at * M::SIZE) }
        });
        // SAFETY: `len` elements are left in each row.
        let sums = unsafe { tile::<S, M, N>(w, x, len, b.fetch) };
        let valid = (b.out - group).div_ceil(stride);
        for (i, sums) in sums.iter().enumerate() {
            for (place, sum) in place.iter().zip(sums).take(valid) {
                // SAFETY: within the block's y.
                let y = unsafe { &mut *b.y.add((row + i) * b.stride + place) };
                *y = if at == 0 { *sum } else { *y + sum };
            }
        }
    }
}

/// The sums of products of `len` elements of each row of x with each of four rows of weights.
#[inline(always)]
unsafe fn tile<S: Simd, M: Multiply<S>, const N: usize>(
    w: [*const u8; TILE],
    x: [*const M::X; N],
    len: usize,
    fetch: Fetch,
) -> [[f32; TILE]; N] {
    // SAFETY: the caller's.
    unsafe {
        let mut lanes = [[S::splat(0.0); TILE]; N];
        let whole = len - len % M::LANES;
        let mut at = 0;
        while at < whole {
            let weights: [M::Vector; TILE] = [
                M::load(w[0].add(at * M::SIZE)),
                M::load(w[1].add(at * M::SIZE)),
                M::load(w[2].add(at * M::SIZE)),
                M::load(w[3].add(at * M::SIZE)),
            ];
            for w in w {
                S::prefetch(w.wrapping_add(at * M::SIZE + AHEAD), fetch);
            }
            for (x, lanes) in x.iter().zip(&mut lanes) {
                let x = M::load_x(x.add(at));
                for (weight, lanes) in weights.iter().zip(lanes) {
                    *lanes = M::mul_add(*weight, x, *lanes);
                }
            }
            at += M::LANES;
        }
        let mut sums = [[0.0; TILE]; N];
        for (sums, lanes) in sums.iter_mut().zip(lanes) {
            *sums = S::sums(lanes);
        }
        for at in whole..len {
            for (x, sums) in x.iter().zip(&mut sums) {
                for (w, sum) in w.iter().zip(sums) {
                    *sum += M::one(w.add(at * M::SIZE)) * (*x.add(at)).into();
                }
            }
        }
        sums
    }
}

#[cfg(test)]
mod tests {
    use half::{bf16, f16};

    use super::*;

    /// Values that a bf16 and an f16 hold exactly.
    fn numbers(len: usize) -> Vec<f32> {
        (0..len).map(|i| ((i * 7919 + i / 13) % 97) as f32 / 32.0 - 1.5).collect()
    }

    /// Stored one byte off their alignment.
    fn stored(values: &[f32], element: Element) -> Vec<u8> {
        let mut bytes = vec![0];
        for value in values {
            match element {
                Element::F32 => bytes.extend(value.to_le_bytes()),
                Element::Bf16 => bytes.extend(bf16::from_f32(*value).to_le_bytes()),
                Element::F16 => bytes.extend(f16::from_f32(*value).to_le_bytes()),
                Element::Blocks(_) => unreachable!("tested in `blocks`"),
            }
        }
        bytes
    }

    fn product(kernels: Kernels, w: &[u8], element: Element, [out, inner]: [usize; 2], x: &[f32]) -> Vec<f32> {
        let mut y = vec![f32::NAN; x.len() / inner * out];
        let weights = Weights::new(&w[1..], element, out, inner).unwrap();
        run(kernels, vec![Job { operation: Operation::Linear(weights, None), x, rows: Rows::All, y: &mut y }]);
        y
    }

    #[test]
    fn products_of_every_type_and_size() {
        for [out, inner] in [[1, 1], [3, 15], [5, 16], [4, 33], [2, 1023], [3, 1024], [2, 1041], [70, 2100], [9, 4096]] {
            for n in [1, 2, 5, 6, 7, 13, 200] {
                let (w, x) = (numbers(out * inner), numbers(n * inner + 5)[5..].to_vec());
                let exact = |x: &[f32], w: &[f32]| x.iter().zip(w).map(|(x, w)| f64::from(*x) * f64::from(*w)).sum::<f64>();
                let expected: Vec<f64> = x.chunks(inner).flat_map(|x| w.chunks(inner).map(move |w| exact(x, w))).collect();
                for element in [Element::F32, Element::Bf16, Element::F16] {
                    let w = stored(&w, element);
                    for kernels in Kernels::available() {
                        let y = product(kernels, &w, element, [out, inner], &x);
                        for (y, expected) in y.iter().zip(&expected) {
                            let error = (f64::from(*y) - expected).abs();
                            assert!(error <= 2e-7 * inner as f64, "{n} {out}x{inner} {element:?} {kernels:?}: {y} {expected}");
                        }
                    }
                }
            }
        }
    }

    #[test]
    fn neighbours_do_not_change_a_bit() {
        let (out, inner) = (70, 2100);
        let (w, x): (Vec<f32>, Vec<f32>) =
            ((0..out * inner).map(|i| (i as f32).sin()).collect(), (0..400 * inner).map(|i| (i as f32 * 0.7).cos()).collect());
        for (element, kernels) in [(Element::Bf16, Kernels::available()), (Element::F32, Kernels::available())] {
            let w = stored(&w, element);
            for kernels in kernels {
                let together = product(kernels, &w, element, [out, inner], &x);
                for (row, n) in [(0, 1), (5, 2), (191, 3), (192, 4), (20, 8), (40, 20), (399, 1)] {
                    let alone = product(kernels, &w, element, [out, inner], &x[row * inner..(row + n) * inner]);
                    assert_eq!(alone, together[row * out..(row + n) * out], "row {row} of {n} {element:?} {kernels:?}");
                }
            }
        }
    }

    #[test]
    fn jobs_choose_rows_and_apply_activations() {
        let (out, inner) = (130, 40);
        let w = [numbers(out * inner), numbers(out * inner + 3)[3..].to_vec()];
        let bias = numbers(out + 50)[50..].to_vec();
        let x = numbers(9 * inner);
        let stored = w.each_ref().map(|w| stored(w, Element::Bf16));
        let [gate, up] = stored.each_ref().map(|w| Weights::new(&w[1..], Element::Bf16, out, inner).unwrap());
        let dot = |w: &[f32], row: usize, o: usize| {
            w[o * inner..][..inner].iter().zip(&x[row * inner..]).map(|(w, x)| f64::from(*w) * f64::from(*x)).sum::<f64>()
        };
        let rows = [7, 0, 7, 3];
        for activation in [Activation::Silu, Activation::Gelu, Activation::GeluTanh, Activation::Relu] {
            let act = |x: f64| match activation {
                Activation::Silu => x / (1.0 + (-x).exp()),
                Activation::Gelu => 0.5 * x * (1.0 + candle_core::cpu::erf::erf_f64(x / 2f64.sqrt())),
                Activation::GeluTanh => 0.5 * x * (1.0 + ((2.0 / std::f64::consts::PI).sqrt() * (x + 0.044_715 * x.powi(3))).tanh()),
                Activation::Relu => x.max(0.0),
            };
            for kernels in Kernels::available() {
                let (mut gated, mut linear) = (vec![0f32; 4 * out], vec![0f32; 9 * out]);
                let both = Operation::Gated([(gate, Some(&bias)), (up, None)], activation);
                run(
                    kernels,
                    vec![
                        Job { operation: both, x: &x, rows: Rows::Listed(&rows), y: &mut gated },
                        Job { operation: Operation::Linear(up, Some(&bias)), x: &x, rows: Rows::All, y: &mut linear },
                    ],
                );
                for (i, row) in rows.iter().enumerate() {
                    for o in 0..out {
                        let expected = act(dot(&w[0], *row as usize, o) + f64::from(bias[o])) * dot(&w[1], *row as usize, o);
                        let y = f64::from(gated[i * out + o]);
                        assert!((y - expected).abs() <= 1e-5 * expected.abs().max(10.0), "{activation:?} {kernels:?}: {y} {expected}");
                        let expected = dot(&w[1], *row as usize, o) + f64::from(bias[o]);
                        assert!((f64::from(linear[*row as usize * out + o]) - expected).abs() <= 1e-4);
                    }
                }
            }
        }
    }
}
