//! Solving symmetric positive definite systems, in f64: what closed-form fits come down to.
//!
//! Matrices are row-major slices; factorisation and products are faer's.

use faer::{
    Accum, MatMut, MatRef, Par,
    dyn_stack::{MemBuffer, MemStack},
    linalg::{
        cholesky::llt::{factor, solve},
        matmul::matmul,
    },
};

/// From this size on, a factorisation is worth the threads.
const LARGE: usize = 512;

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
    /// [n, n], the factor in the lower triangle by columns
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

/// A symmetric matrix is the same by rows and by columns; the routines are made for columns.
fn factorise(a: &mut [f64], n: usize) -> Result<(), Singular> {
    let par = if n < LARGE { Par::Seq } else { Par::rayon(0) };
    let params = Default::default();
    let mut memory = MemBuffer::new(factor::cholesky_in_place_scratch::<f64>(n, par, params));
    let matrix = MatMut::from_column_major_slice_mut(&mut *a, n, n);
    let outcome = factor::cholesky_in_place(matrix, Default::default(), par, MemStack::new(&mut memory), params);
    outcome.map_err(|factor::LltError::NonPositivePivot { index }| Singular { size: n, row: index })?;
    let broken = a.iter().step_by(n + 1).position(|pivot| !pivot.is_finite());
    broken.map_or(Ok(()), |row| Err(Singular { size: n, row }))
}

fn substitute(factor: &[f64], n: usize, rhs: &mut [f64], m: usize) {
    let par = if n < LARGE { Par::Seq } else { Par::rayon(0) };
    let mut memory = MemBuffer::new(solve::solve_in_place_scratch::<f64>(n, m, par));
    let factor = MatRef::from_column_major_slice(factor, n, n);
    let rhs = MatMut::from_row_major_slice_mut(rhs, n, m);
    solve::solve_in_place(factor, rhs, par, MemStack::new(&mut memory));
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
        for n in [1, 3, 40, 130] {
            let (a, m) = (positive(n), 3);
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
        let n = LARGE + 50;
        let solve = |threads| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            pool.install(|| {
                let mut x = vec![1.0; n];
                solve_spd(&mut positive(n), n, &mut x, 1).unwrap();
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
    fn the_ridge_is_relative() {
        let mut a = [1.0, 5.0, 5.0, 3.0];
        add_ridge(&mut a, 2, 0.5);
        assert_eq!(a, [2.0, 5.0, 5.0, 4.0]);
    }
}
