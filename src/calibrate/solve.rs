//! The sweep's closed forms: a mean of matrices weighted by what each of them sees, and a matrix fitted to targets near such a mean.
//!
//! Moments are summed in f32, systems are solved in f64. N rows, `in` and `out` the sizes of a linear layer.

use candle_core::{DType, Device, Result as TensorResult, Tensor};
use upcycle_routers::linalg::{self, Cholesky};

use super::CalibrateError;

/// How strongly a fitted matrix is held to where it starts, relative to the mean diagonal of its inputs' moments.
const SHARED_RIDGE: f64 = 1e-2;
/// Factor on the off-diagonal of an expert's moments in the weighted mean.
const SHRINK: f64 = 0.95;
/// Keeps the weighted mean defined where there are fewer rows than dimensions, relative like [`SHARED_RIDGE`].
const MEAN_RIDGE: f64 = 1e-6;

/// `sum_i w_i x_i x_i^T`, [in, in], of rows x [N, in] with weights [N, 1].
pub(super) fn gram(x: &Tensor, weight: &Tensor) -> TensorResult<Tensor> {
    x.broadcast_mul(weight)?.t()?.matmul(x)
}

/// `(sum_e W_e G_e)(sum_e G_e)^-1`, [out, in], of models' linear layers `W_e` [out, in], each with the second moments [in, in] of its own inputs, of
/// which `G_e` are shrunk ones (`RegMean`, arXiv 2212.09849).
pub(super) fn weighted_mean<'a>(
    models: impl Iterator<Item = Result<(Tensor, &'a Tensor), CalibrateError>>,
) -> Result<Tensor, CalibrateError> {
    let mut sums: Option<(Tensor, Tensor)> = None;
    for model in models {
        let (matrix, moments) = model?;
        let gram = shrink(moments)?;
        let product = matrix.matmul(&gram)?;
        sums = Some(match sums {
            Some((numerator, denominator)) => ((numerator + product)?, (denominator + gram)?),
            None => (product, gram),
        });
    }
    let (numerator, denominator) = sums.ok_or(CalibrateError::NoExperts)?;
    solve(&denominator, MEAN_RIDGE, &numerator)
}

/// What a linear layer sees of the rows that it is fitted to.
pub(super) struct Seen<'a> {
    /// [N, in]
    pub inputs: &'a Tensor,
    /// [N, 1]
    pub weight: &'a Tensor,
    /// their second moments, [in, in]
    pub gram: Tensor,
}

impl<'a> Seen<'a> {
    pub fn new(inputs: &'a Tensor, weight: &'a Tensor) -> TensorResult<Self> {
        Ok(Self { inputs, weight, gram: gram(inputs, weight)? })
    }

    /// The matrix [out, in] that minimises `sum_i w_i |targets_i - W inputs_i|^2 + ridge |W - start|^2`, for `targets` [N, out].
    pub fn fit_near(&self, start: &Tensor, targets: &Tensor) -> Result<Tensor, CalibrateError> {
        let left = (targets - self.inputs.matmul(&start.t()?)?)?;
        correct(start, &self.gram, &left.broadcast_mul(self.weight)?.t()?.matmul(self.inputs)?)
    }
}

/// The same from moments: `gram` of the inputs, [in, in], and `cross`, [out, in], of what is left of the targets with the inputs.
pub(super) fn correct(start: &Tensor, gram: &Tensor, cross: &Tensor) -> Result<Tensor, CalibrateError> {
    Ok((start + solve(gram, SHARED_RIDGE, cross)?)?)
}

/// b (gram + ridge)^-1 for b [m, n], gram [n, n]; the ridge is relative to the mean diagonal.
fn solve(gram: &Tensor, ridge: f64, b: &Tensor) -> Result<Tensor, CalibrateError> {
    Factor::new(gram, ridge)?.solve(b)
}

/// A gram [n, n] plus its ridge, factorised.
pub(super) struct Factor {
    factor: Cholesky,
    size: usize,
}

impl Factor {
    /// The ridge is relative to the mean diagonal.
    pub fn new(gram: &Tensor, ridge: f64) -> Result<Self, CalibrateError> {
        let size = gram.dim(0)?;
        let mut a = host(gram)?;
        linalg::add_ridge(&mut a, size, ridge);
        Ok(Self { factor: Cholesky::new(a, size)?, size })
    }

    /// b (gram + ridge)^-1 for b [m, n].
    pub fn solve(&self, b: &Tensor) -> Result<Tensor, CalibrateError> {
        let m = b.dim(0)?;
        let mut x = host(&b.t()?)?; // [n, m]
        self.factor.solve(&mut x, m);
        let x: Vec<f32> = x.into_iter().map(|v| v as f32).collect();
        Ok(Tensor::from_vec(x, (self.size, m), &Device::Cpu)?.to_device(b.device())?.t()?.contiguous()?)
    }
}

fn host(tensor: &Tensor) -> TensorResult<Vec<f64>> {
    let values = tensor.to_device(&Device::Cpu)?.contiguous()?.flatten_all()?.to_vec1::<f32>()?;
    Ok(values.into_iter().map(f64::from).collect())
}

/// Off-diagonal elements times [`SHRINK`].
fn shrink(gram: &Tensor) -> TensorResult<Tensor> {
    let n = gram.dim(0)?;
    let diagonal = (Tensor::eye(n, DType::F32, gram.device())? * gram)?;
    (gram * SHRINK)? + (diagonal * (1.0 - SHRINK))?
}

#[cfg(test)]
mod tests {
    use rand::{Rng as _, SeedableRng as _};
    use rand_chacha::ChaCha8Rng;

    use super::*;

    const IN: usize = 12;
    const OUT: usize = 7;

    fn random(rng: &mut ChaCha8Rng, rows: usize, columns: usize) -> Tensor {
        let values: Vec<f32> = (0..rows * columns).map(|_| rng.random::<f32>() - 0.3).collect();
        Tensor::from_vec(values, (rows, columns), &Device::Cpu).unwrap()
    }

    fn f64s(tensor: &Tensor) -> Vec<Vec<f64>> {
        tensor.to_dtype(DType::F64).unwrap().to_vec2().unwrap()
    }

    /// `sum_i w_i a_i b_i^T` in f64, plainly.
    fn moments(a: &[Vec<f64>], b: &[Vec<f64>], w: &[Vec<f64>]) -> Vec<Vec<f64>> {
        let entry = |r: usize, c: usize| a.iter().zip(b).zip(w).map(|((a, b), w)| w[0] * a[r] * b[c]).sum();
        (0..a[0].len()).map(|r| (0..b[0].len()).map(|c| entry(r, c)).collect()).collect()
    }

    fn product(a: &[Vec<f64>], b: &[Vec<f64>]) -> Vec<Vec<f64>> {
        let entry = |row: &Vec<f64>, c: usize| row.iter().zip(b).map(|(v, b)| v * b[c]).sum();
        a.iter().map(|row| (0..b[0].len()).map(|c| entry(row, c)).collect()).collect()
    }

    fn add(a: &mut [Vec<f64>], b: &[Vec<f64>]) {
        a.iter_mut().zip(b).for_each(|(a, b)| a.iter_mut().zip(b).for_each(|(a, b)| *a += b));
    }

    /// a plus `lambda` times its mean diagonal.
    fn ridged(mut a: Vec<Vec<f64>>, lambda: f64) -> (Vec<Vec<f64>>, f64) {
        let ridge = lambda * (0..a.len()).map(|i| a[i][i]).sum::<f64>() / a.len() as f64;
        (0..a.len()).for_each(|i| a[i][i] += ridge);
        (a, ridge)
    }

    /// b a^-1 by Gauss-Jordan elimination with pivots.
    fn divide(b: &[Vec<f64>], a: &[Vec<f64>]) -> Vec<Vec<f64>> {
        let n = a.len();
        let mut rows: Vec<Vec<f64>> = (0..n).map(|i| (0..n).map(|j| a[j][i]).chain(b.iter().map(|b| b[i])).collect()).collect();
        for k in 0..n {
            let pivot = (k..n).max_by(|&i, &j| rows[i][k].abs().total_cmp(&rows[j][k].abs())).unwrap();
            rows.swap(k, pivot);
            let inverse = 1.0 / rows[k][k];
            rows[k].iter_mut().for_each(|v| *v *= inverse);
            let pivot = rows[k].clone();
            for (_, row) in rows.iter_mut().enumerate().filter(|(i, _)| *i != k) {
                let factor = row[k];
                row.iter_mut().zip(&pivot).for_each(|(v, p)| *v -= factor * p);
            }
        }
        (0..b.len()).map(|m| rows.iter().map(|row| row[n + m]).collect()).collect()
    }

    fn assert_close(found: &Tensor, expected: &[Vec<f64>]) {
        let size = expected.iter().flatten().fold(0f64, |most, v| most.max(v.abs()));
        for (found, expected) in f64s(found).iter().flatten().zip(expected.iter().flatten()) {
            assert!((found - expected).abs() < 1e-4 * size, "{found} {expected}");
        }
    }

    #[test]
    fn the_weighted_mean_is_that_of_a_dense_solver() {
        let mut rng = ChaCha8Rng::seed_from_u64(1);
        let models: Vec<[Tensor; 3]> =
            [30, 50, 40].map(|n| [random(&mut rng, OUT, IN), random(&mut rng, n, IN), (random(&mut rng, n, 1) + 0.3).unwrap()]).into();
        let grams: Vec<Tensor> = models.iter().map(|[_, inputs, weight]| gram(inputs, weight).unwrap()).collect();
        let found = weighted_mean(models.iter().zip(&grams).map(|([matrix, ..], gram)| Ok((matrix.clone(), gram)))).unwrap();

        let (mut numerator, mut denominator) = (vec![vec![0.0; IN]; OUT], vec![vec![0.0; IN]; IN]);
        for [matrix, inputs, weight] in &models {
            let x = f64s(inputs);
            let mut gram = moments(&x, &x, &f64s(weight));
            for (i, row) in gram.iter_mut().enumerate() {
                row.iter_mut().enumerate().filter(|(j, _)| *j != i).for_each(|(_, v)| *v *= 0.95);
            }
            add(&mut numerator, &product(&f64s(matrix), &gram));
            add(&mut denominator, &gram);
        }
        assert_close(&found, &divide(&numerator, &ridged(denominator, 1e-6).0));
    }

    #[test]
    fn a_fitted_matrix_is_that_of_a_dense_solver() {
        let mut rng = ChaCha8Rng::seed_from_u64(2);
        // With fewer rows than dimensions, too, the start decides what the rows do not.
        for n in [200, 5] {
            let [start, inputs, targets] = [(OUT, IN), (n, IN), (n, OUT)].map(|(rows, columns)| random(&mut rng, rows, columns));
            let weight = (random(&mut rng, n, 1) + 0.3).unwrap();
            let found = Seen::new(&inputs, &weight).unwrap().fit_near(&start, &targets).unwrap();

            // (sum w t x^T + ridge start)(sum w x x^T + ridge)^-1
            let (x, w) = (f64s(&inputs), f64s(&weight));
            let (gram, ridge) = ridged(moments(&x, &x, &w), 1e-2);
            let mut b = moments(&f64s(&targets), &x, &w);
            let held: Vec<Vec<f64>> = f64s(&start).iter().map(|row| row.iter().map(|v| ridge * v).collect()).collect();
            add(&mut b, &held);
            assert_close(&found, &divide(&b, &gram));
        }
    }
}
