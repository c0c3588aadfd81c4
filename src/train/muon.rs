//! Muon (Keller Jordan, 2024): momentum whose matrix is replaced by the nearest one with all singular values about 1.
//!
//! `B = mu B + (1 - mu) g; O = NS((1 - mu) g + mu B); W -= lr 0.2 sqrt(max(rows, cols)) O`, where `NS` is five quintic
//! Newton-Schulz iterations `X <- a X + (b X X^T + c (X X^T)^2) X`. The factor makes the update as large as AdamW's
//! (arXiv 2502.16982), so that one learning rate serves both. Unlike the reference, the iterations are in f32.

use super::slices::{CHUNK, edit};
use crate::tensor::cpu::floats;
use candle_core::{Device, Result, Tensor, Var};
use gemm::{Parallelism, gemm};
use rayon::prelude::*;

const COEFFICIENTS: (f32, f32, f32) = (3.4445, -4.7750, 2.0315);
const ITERATIONS: usize = 5;
const EPSILON: f32 = 1e-7;

/// Muon with one step's numbers.
pub struct Muon {
    /// Factor on the gradient.
    pub clip: f64,
    pub lr: f64,
    pub decay: f64,
    pub momentum: f64,
}

impl Muon {
    /// Updates `var`, of which all dimensions but the first count as columns, and its momentum.
    pub fn update(&self, var: &Var, buffer: &mut Tensor, gradient: &Tensor) -> Result<()> {
        if !matches!(var.device(), Device::Cpu) {
            return self.composed(var, buffer, gradient);
        }
        let (rows, cols, rate) = self.rate(var)?;
        let mut update = vec![0.0; rows * cols];
        let gradient = floats(gradient)?;
        edit(buffer, |buffer| {
            self.accumulate(buffer, &gradient, &mut update);
            Ok(())
        })?;
        let update = orthogonal(update, rows, cols);
        edit(var, |weight| {
            apply(weight, &update, rate as f32, self.decay as f32);
            Ok(())
        })
    }

    fn rate(&self, var: &Var) -> Result<(usize, usize, f64)> {
        let rows = var.dim(0)?;
        let cols = var.elem_count() / rows.max(1);
        Ok((rows, cols, self.lr * 0.2 * (rows.max(cols) as f64).sqrt()))
    }

    /// Takes the gradient into the momentum and writes what is to be made orthogonal into `update`.
    fn accumulate(&self, buffer: &mut [f32], gradient: &[f32], update: &mut [f32]) {
        let (clip, mu) = (self.clip as f32, self.momentum as f32);
        let chunks = (update.par_chunks_mut(CHUNK), buffer.par_chunks_mut(CHUNK), gradient.par_chunks(CHUNK));
        chunks.into_par_iter().for_each(|(update, buffer, gradient)| {
            for ((update, buffer), gradient) in update.iter_mut().zip(buffer).zip(gradient) {
                let gradient = gradient * clip;
                *buffer += (1.0 - mu) * (gradient - *buffer);
                *update = gradient + mu * (*buffer - gradient);
            }
        });
    }

    /// The same by candle's operations.
    fn composed(&self, var: &Var, buffer: &mut Tensor, gradient: &Tensor) -> Result<()> {
        let (_, _, rate) = self.rate(var)?;
        let (gradient, mu) = ((gradient * self.clip)?, self.momentum);
        *buffer = ((&*buffer * mu)? + (&gradient * (1.0 - mu))?)?;
        let update = ((&gradient * (1.0 - mu))? + (&*buffer * mu)?)?;
        let update = orthogonal_composed(&update.flatten_from(1)?)?.reshape(var.dims())?;
        var.set(&((var.as_tensor().detach() * (1.0 - self.decay))? - (update * rate)?)?)
    }
}

/// `W <- (1 - decay) W - rate O`.
fn apply(weight: &mut [f32], update: &[f32], rate: f32, decay: f32) {
    weight.par_chunks_mut(CHUNK).zip(update.par_chunks(CHUNK)).for_each(|(weight, update)| {
        for (weight, update) in weight.iter_mut().zip(update) {
            *weight = *weight * (1.0 - decay) - rate * update;
        }
    });
}

/// A matrix in memory, or the transpose of one: only the steps between neighbours differ.
#[derive(Clone, Copy)]
struct View<'a> {
    data: &'a [f32],
    rows: usize,
    cols: usize,
    row_step: usize,
    col_step: usize,
}

impl<'a> View<'a> {
    fn square(data: &'a [f32], n: usize) -> Self {
        Self { data, rows: n, cols: n, row_step: n, col_step: 1 }
    }

    /// A row-major matrix with its short side first, which keeps the products in between small.
    fn short(data: &'a [f32], rows: usize, cols: usize) -> Self {
        let view = Self { data, rows, cols, row_step: cols, col_step: 1 };
        if rows > cols { view.transposed() } else { view }
    }

    fn transposed(self) -> Self {
        Self { rows: self.cols, cols: self.rows, row_step: self.col_step, col_step: self.row_step, ..self }
    }
}

/// `out <- alpha out + beta left right`, where `out` is laid out as `shape`.
fn multiply(out: &mut [f32], shape: View, alpha: f32, left: View, right: View, beta: f32) {
    let View { rows, cols, row_step, col_step, .. } = shape;
    assert!(left.rows == rows && right.cols == cols && left.cols == right.rows);
    for (view, len) in [(shape, out.len()), (left, left.data.len()), (right, right.data.len())] {
        assert!((view.rows - 1) * view.row_step + (view.cols - 1) * view.col_step < len);
    }
    // SAFETY: the largest index of each of the three matrices was checked against its slice just above, `out` is
    // borrowed mutably, and `read_dst` is set so that it is read as initialised memory.
    unsafe {
        gemm(
            rows,
            cols,
            left.cols,
            out.as_mut_ptr(),
            col_step as isize,
            row_step as isize,
            true,
            left.data.as_ptr(),
            left.col_step as isize,
            left.row_step as isize,
            right.data.as_ptr(),
            right.col_step as isize,
            right.row_step as isize,
            alpha,
            beta,
            false,
            false,
            false,
            Parallelism::None,
        );
    }
}

/// Newton-Schulz on a row-major matrix of `rows` by `cols`, single-threaded: matrices are worked on side by side.
fn orthogonal(mut x: Vec<f32>, rows: usize, cols: usize) -> Vec<f32> {
    if x.is_empty() {
        return x;
    }
    let (a, b, c) = COEFFICIENTS;
    let norm = x.iter().map(|v| f64::from(*v).powi(2)).sum::<f64>().sqrt() as f32;
    let inverse = 1.0 / norm.max(EPSILON);
    x.iter_mut().for_each(|v| *v *= inverse);
    let n = rows.min(cols);
    let (mut gram, mut poly) = (vec![0.0; n * n], vec![0.0; n * n]);
    let mut next = vec![0.0; x.len()];
    for _ in 0..ITERATIONS {
        multiply(
            &mut gram,
            View::square(&[], n),
            0.0,
            View::short(&x, rows, cols),
            View::short(&x, rows, cols).transposed(),
            1.0,
        );
        poly.copy_from_slice(&gram);
        multiply(&mut poly, View::square(&[], n), b, View::square(&gram, n), View::square(&gram, n), c);
        next.copy_from_slice(&x);
        multiply(&mut next, View::short(&[], rows, cols), a, View::square(&poly, n), View::short(&x, rows, cols), 1.0);
        std::mem::swap(&mut x, &mut next);
    }
    x
}

/// The same by candle's operations.
fn orthogonal_composed(x: &Tensor) -> Result<Tensor> {
    let (rows, cols) = x.dims2()?;
    let mut x = if rows > cols { x.t()?.contiguous()? } else { x.clone() };
    let (a, b, c) = COEFFICIENTS;
    let norm = x.sqr()?.sum_all()?.sqrt()?.clamp(EPSILON, f32::MAX)?;
    x = x.broadcast_div(&norm)?;
    for _ in 0..ITERATIONS {
        let gram = x.matmul(&x.t()?)?;
        let poly = ((&gram * f64::from(b))? + (gram.matmul(&gram)? * f64::from(c))?)?;
        x = ((&x * f64::from(a))? + poly.matmul(&x)?)?;
    }
    if rows > cols { x.t()?.contiguous() } else { Ok(x) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tensor::rng::Stream;

    fn matrix(rows: usize, cols: usize, index: u64) -> Tensor {
        Stream::new(0, "muon", index).normal(&[rows, cols], &Device::Cpu).unwrap()
    }

    fn distance(a: &Tensor, b: &Tensor) -> f32 {
        (a - b).unwrap().abs().unwrap().max_all().unwrap().to_scalar().unwrap()
    }

    #[test]
    fn singular_values_come_near_one() {
        for (rows, cols) in [(40, 40), (16, 90), (90, 16), (1, 50), (50, 1)] {
            let x = matrix(rows, cols, 0).flatten_all().unwrap().to_vec1().unwrap();
            let o = Tensor::from_vec(orthogonal(x, rows, cols), (rows, cols), &Device::Cpu).unwrap();
            let o = if rows > cols { o.t().unwrap() } else { o };
            // The trace of O O^T is the sum of the squared singular values; the iterations leave them within 0.68 and 1.14.
            let trace = o.sqr().unwrap().sum_all().unwrap().to_scalar::<f32>().unwrap();
            let mean = (trace / rows.min(cols) as f32).sqrt();
            assert!((0.68..1.14).contains(&mean), "{rows} x {cols}: {mean}");
        }
    }

    #[test]
    fn the_fused_loops_equal_candles_operations() {
        let muon = Muon { clip: 0.5, lr: 0.01, decay: 0.1, momentum: 0.95 };
        for (rows, cols) in [(5, 9), (9, 5)] {
            let start = || Var::from_tensor(&matrix(rows, cols, 0)).unwrap();
            let (a, b) = (start(), start());
            let (mut ma, mut mb) = (a.zeros_like().unwrap(), b.zeros_like().unwrap());
            for step in 1..5 {
                muon.update(&a, &mut ma, &matrix(rows, cols, step)).unwrap();
                muon.composed(&b, &mut mb, &matrix(rows, cols, step)).unwrap();
            }
            assert!(distance(&a, &b) < 1e-5 && distance(&ma, &mb) < 1e-5);
        }
    }
}
