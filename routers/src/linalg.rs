//! Solving symmetric positive definite systems, in f64: what closed-form fits come down to.
//!
//! Matrices are row-major slices. Blocks are worked on by faer, each on one thread, and cut the same way on any number of threads: so the
//! result does not depend on that number.

use faer::{
    Accum, MatMut, MatRef, Par, Spec,
    dyn_stack::{MemBuffer, MemStack},
    linalg::{
        cholesky::llt::factor::{LltError, LltRegularization, cholesky_in_place, cholesky_in_place_scratch},
        matmul::matmul,
        triangular_solve::{solve_lower_triangular_in_place, solve_upper_triangular_in_place},
    },
};
use rayon::prelude::*;

/// Rows or columns that one task works on.
const BLOCK: usize = 128;

/// A matrix that has no Cholesky factorisation.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("a matrix of size {size} is not positive definite (row {row}): there is too little data, or the regulariser is too small")]
pub struct Singular {
    /// n
    pub size: usize,
    /// where the factorisation stopped
    pub row: usize,
}

/// A factorised symmetric positive definite matrix.
#[derive(Debug)]
pub struct Cholesky {
    /// n
    size: usize,
    /// [n, n], the factor in the lower triangle
    factor: Vec<f64>,
}

impl Cholesky {
    /// Factorises `a`, [n, n]. Cost: n³/3 multiplications.
    pub fn new(mut a: Vec<f64>, n: usize) -> Result<Self, Singular> {
        factorise(&mut a, n)?;
        Ok(Self { size: n, factor: a })
    }

    /// Solves for `rhs`, [n, m], in place.
    pub fn solve(&self, rhs: &mut [f64], m: usize) {
        substitute(&self.factor, self.size, rhs, m);
    }
}

/// Solves a · x = rhs. `a` is [n, n] and is destroyed; `rhs`, [n, m], becomes x.
pub fn solve_spd(a: &mut [f64], n: usize, rhs: &mut [f64], m: usize) -> Result<(), Singular> {
    factorise(a, n)?;
    substitute(a, n, rhs, m);
    Ok(())
}

/// Adds `lambda` times the mean of the diagonal to the diagonal of `a`, [n, n]: a regulariser that does not depend on the data's scale.
pub fn add_ridge(a: &mut [f64], n: usize, lambda: f64) {
    let ridge = lambda * mean_diagonal(a, n);
    a.iter_mut().step_by(n + 1).for_each(|v| *v += ridge);
}

/// The mean of the diagonal of `a`, [n, n].
pub fn mean_diagonal(a: &[f64], n: usize) -> f64 {
    a.iter().step_by(n + 1).sum::<f64>() / n.max(1) as f64
}

/// out = a · b for [n, k] and [k, m], on one thread.
pub(crate) fn product(out: MatMut<'_, f32>, a: MatRef<'_, f32>, b: MatRef<'_, f32>) {
    matmul(out, Accum::Replace, a, b, 1.0, Par::Seq);
}

/// Rounds of orthogonal iteration: directions whose singular values differ by a third are told apart to 1e-5.
const ROUNDS: usize = 20;

/// The leading `count` right singular vectors of `a`, [n, m]: row-major [count, m], orthonormal, rows of zeros beyond the rank of `a`. By
/// orthogonal iteration (Golub & Van Loan, Matrix Computations, section 8.2.4) on one thread: vectors of nearly equal singular values come out
/// mixed, their span does not.
pub(crate) fn right_singular_vectors(a: &[f32], m: usize, count: usize) -> Vec<f32> {
    let (n, count) = (a.len() / m.max(1), count.min(m));
    let a = MatRef::from_row_major_slice(&a[..n * m], n, m);
    // A start without a pattern, the same each time.
    let mut v: Vec<f32> = (0..count * m).map(|i| ((i as f32 + 1.0) * 12.9898).sin()).collect(); // [count, m]
    let mut u = vec![0.0; n * count];
    orthonormalise(&mut v, m);
    for _ in 0..ROUNDS {
        product(MatMut::from_row_major_slice_mut(&mut u, n, count), a, MatRef::from_row_major_slice(&v, count, m).transpose());
        product(MatMut::from_row_major_slice_mut(&mut v, count, m), MatRef::from_row_major_slice(&u, n, count).transpose(), a);
        orthonormalise(&mut v, m);
    }
    v
}

/// Makes the rows of `v`, [.., m], orthonormal, from the first on; what is left of a row that depends on those before it are zeros.
fn orthonormalise(v: &mut [f32], m: usize) {
    for at in (0..v.len()).step_by(m) {
        let (before, rest) = v.split_at_mut(at);
        let mut row: Vec<f64> = rest[..m].iter().map(|x| f64::from(*x)).collect();
        let norm = |row: &[f64]| row.iter().map(|x| x * x).sum::<f64>().sqrt();
        let length = norm(&row);
        // Twice is enough against cancellation.
        for _ in 0..2 {
            for other in before.chunks_exact(m) {
                let along: f64 = row.iter().zip(other).map(|(x, y)| x * f64::from(*y)).sum();
                row.iter_mut().zip(other).for_each(|(x, y)| *x -= along * f64::from(*y));
            }
        }
        let left = norm(&row);
        let factor = if left > length * 1e-6 { 1.0 / left } else { 0.0 };
        rest[..m].iter_mut().zip(row).for_each(|(x, new)| *x = (new * factor) as f32);
    }
}

/// The Cholesky factor takes the place of the lower triangle of `a`, [n, n]. The upper one is not looked at. Block columns from the left:
/// each is finished, then subtracted from what is to its right.
fn factorise(a: &mut [f64], n: usize) -> Result<(), Singular> {
    for start in (0..n).step_by(BLOCK) {
        let end = (start + BLOCK).min(n);
        let width = end - start;
        let (above, below) = a.split_at_mut(end * n);
        let diagonal = MatMut::from_row_major_slice_mut(above, end, n).submatrix_mut(start, start, width, width);
        let corner = pivot(diagonal).map_err(|row| Singular { size: n, row: start + row })?;
        let corner = MatRef::from_row_major_slice(&corner, width, width);
        // [n - end, width]
        let mut panel = vec![0.0; (n - end) * width];
        panel.par_chunks_mut(BLOCK * width).zip(below.par_chunks_mut(BLOCK * n)).for_each(|(panel, rows)| {
            for (panel, row) in panel.chunks_exact_mut(width).zip(rows.chunks_exact(n)) {
                panel.copy_from_slice(&row[start..end]);
            }
            let height = panel.len() / width;
            solve_lower_triangular_in_place(corner, MatMut::from_row_major_slice_mut(panel, height, width).transpose_mut(), Par::Seq);
            for (panel, row) in panel.chunks_exact(width).zip(rows.chunks_exact_mut(n)) {
                row[start..end].copy_from_slice(panel);
            }
        });
        let panel = MatRef::from_row_major_slice(&panel, n - end, width);
        below.par_chunks_mut(BLOCK * n).enumerate().for_each(|(i, rows)| {
            let (first, height) = (i * BLOCK, rows.len() / n);
            let left = first + height;
            let rest = MatMut::from_row_major_slice_mut(rows, height, n).submatrix_mut(0, end, height, left);
            matmul(rest, Accum::Add, panel.subrows(first, height), panel.subrows(0, left).transpose(), -1.0, Par::Seq);
        });
    }
    Ok(())
}

/// Factorises a block on the diagonal and returns a copy, or the row that cannot be.
fn pivot(mut block: MatMut<'_, f64>) -> Result<Vec<f64>, usize> {
    let n = block.nrows();
    let mut memory = MemBuffer::new(cholesky_in_place_scratch::<f64>(n, Par::Seq, Spec::default()));
    cholesky_in_place(block.as_mut(), LltRegularization::default(), Par::Seq, MemStack::new(&mut memory), Spec::default())
        .map_err(|LltError::NonPositivePivot { index }| index)?;
    match (0..n).find(|&i| !block[(i, i)].is_finite()) {
        Some(row) => Err(row),
        None => Ok((0..n * n).map(|i| block[(i / n, i % n)]).collect()),
    }
}

/// Solves L Lᵀ x = rhs, blocks of columns of rhs at once.
fn substitute(factor: &[f64], n: usize, rhs: &mut [f64], m: usize) {
    let factor = MatRef::from_row_major_slice(factor, n, n);
    let mut rest = MatMut::from_row_major_slice_mut(rhs, n, m);
    let mut blocks = Vec::new();
    while rest.ncols() > BLOCK {
        let (block, others) = rest.split_at_col_mut(BLOCK);
        blocks.push(block);
        rest = others;
    }
    blocks.push(rest);
    blocks.into_par_iter().for_each(|mut block| {
        solve_lower_triangular_in_place(factor, block.as_mut(), Par::Seq);
        solve_upper_triangular_in_place(factor.transpose(), block, Par::Seq);
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Positive definite and reproducible: B Bᵀ + I with entries of B in ±1.
    fn positive(n: usize) -> Vec<f64> {
        let b: Vec<f64> = (0..n * n).map(|i| ((i * i + 7 * i) as f64 * 0.618).sin()).collect();
        let entry = |i: usize, j: usize| (0..n).map(|k| b[i * n + k] * b[j * n + k]).sum::<f64>() + f64::from(u8::from(i == j));
        (0..n * n).map(|i| entry(i / n, i % n)).collect()
    }

    #[test]
    fn the_solution_solves() {
        for n in [1, 3, 40, 128, 300] {
            let (a, m) = (positive(n), 130);
            let rhs: Vec<f64> = (0..n * m).map(|i| (i as f64).cos()).collect();
            let mut x = rhs.clone();
            solve_spd(&mut a.clone(), n, &mut x, m).unwrap();
            let mut same = rhs.clone();
            Cholesky::new(a.clone(), n).unwrap().solve(&mut same, m);
            assert_eq!(x, same);
            for (i, expected) in rhs.iter().enumerate() {
                let found: f64 = (0..n).map(|k| a[i / m * n + k] * x[k * m + i % m]).sum();
                assert!((found - expected).abs() < 1e-9, "{n}: {found} {expected}");
            }
        }
    }

    #[test]
    fn threads_do_not_change_the_solution() {
        let n = 300;
        let solve = |threads| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            pool.install(|| {
                let mut x = vec![1.0; n * 200];
                solve_spd(&mut positive(n), n, &mut x, 200).unwrap();
                x
            })
        };
        let alone = solve(1);
        assert!([2, 3, 8].into_iter().all(|threads| solve(threads) == alone));
    }

    #[test]
    fn what_is_not_positive_definite_is_refused() {
        let outcome = solve_spd(&mut [1.0, 2.0, 2.0, 1.0], 2, &mut [0.0; 2], 1);
        assert_eq!(outcome, Err(Singular { size: 2, row: 1 }));
        assert!(solve_spd(&mut [0.0; 4], 2, &mut [0.0; 2], 1).is_err());
        assert!(solve_spd(&mut [f64::NAN; 4], 2, &mut [0.0; 2], 1).is_err());
        assert!(solve_spd(&mut [1.0, 0.0, 0.0, f64::INFINITY], 2, &mut [0.0; 2], 1).is_err());
    }

    #[test]
    fn singular_vectors_are_found_in_their_order() {
        // rows of an orthogonal matrix (a discrete cosine transform), stretched by 8, 4, 2 and 0
        let (n, m) = (40, 12);
        let basis = |size: usize, k: usize| {
            let norm = (2.0 / size as f64).sqrt();
            (0..size).map(|i| norm * (std::f64::consts::PI * (i as f64 + 0.5) * (k as f64 + 1.0) / size as f64).cos()).collect::<Vec<_>>()
        };
        let parts: Vec<(f64, Vec<f64>, Vec<f64>)> = [(8.0, 0), (4.0, 3), (2.0, 1)].map(|(s, k)| (s, basis(n, k), basis(m, k))).into();
        let a: Vec<f32> = (0..n * m).map(|i| parts.iter().map(|(s, u, v)| s * u[i / m] * v[i % m]).sum::<f64>() as f32).collect();
        let found = right_singular_vectors(&a, m, 5);
        for (row, (_, _, v)) in found.chunks_exact(m).zip(&parts) {
            let cosine: f64 = row.iter().zip(v).map(|(a, b)| f64::from(*a) * b).sum();
            assert!((cosine.abs() - 1.0).abs() < 1e-5, "{cosine}");
        }
        assert!(right_singular_vectors(&vec![0.0; n * m], m, 2).iter().all(|v| v.abs() < f32::EPSILON), "nothing has no direction");
        assert_eq!(right_singular_vectors(&a, m, 20).len(), m * m);
    }

    #[test]
    fn the_ridge_is_relative() {
        let mut a = [1.0, 5.0, 5.0, 3.0];
        add_ridge(&mut a, 2, 0.5);
        assert_eq!(a.map(f64::to_bits), [2.0, 5.0, 5.0, 4.0].map(f64::to_bits));
    }
}
