//! Muon (Keller Jordan, 2024): momentum whose matrix is replaced by the nearest one with all singular values about 1.
//!
//! `B = mu B + (1 - mu) g; O = NS((1 - mu) g + mu B); W -= lr 0.2 sqrt(max(rows, cols)) O`, where `NS` is five quintic
//! Newton-Schulz iterations `X <- a X + (b X X^T + c (X X^T)^2) X`. The factor makes the update as large as AdamW's
//! (arXiv 2502.16982), so that one learning rate serves both. Unlike the reference, the iterations are in f32.

use super::slices::{CHUNK, edit};
use crate::tensor::cpu::{View, floats, gemm};
use candle_core::{Result, Tensor, Var};
use rayon::prelude::*;
use std::collections::BTreeMap;

const COEFFICIENTS: (f32, f32, f32) = (3.4445, -4.7750, 2.0315);
const ITERATIONS: usize = 5;
const EPSILON: f32 = 1e-7;

/// Muon with one step's numbers.
#[derive(Clone, Copy)]
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
        let (rows, cols, rate) = self.rate(var)?;
        let mut update = vec![0.0; rows * cols];
        let gradient = floats(gradient)?;
        edit(buffer, |buffer| {
            self.accumulate(buffer, &gradient, &mut update);
            Ok(())
        })?;
        let update = orthogonal(&update, rows, cols);
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
}

/// One variable that candle's operations update: its rule, and its momentum.
pub struct Composed<'a> {
    pub muon: Muon,
    pub var: &'a Var,
    pub buffer: &'a mut Tensor,
}

/// Numbers that are made orthogonal together, at most.
const STACKED: usize = 1 << 26;

/// Updates variables by candle's operations, given their gradients: all of one shape go through the iterations together,
/// since on a device small matrices cost the start of a kernel more than their numbers.
pub fn composed(params: &mut [Composed], gradients: &[Tensor]) -> Result<()> {
    let mut shapes: BTreeMap<(usize, usize), Vec<(usize, Tensor)>> = BTreeMap::new();
    for (i, (param, gradient)) in params.iter_mut().zip(gradients).enumerate() {
        let (gradient, mu) = ((gradient * param.muon.clip)?, param.muon.momentum);
        *param.buffer = ((&*param.buffer * mu)? + (&gradient * (1.0 - mu))?)?;
        let update = ((&gradient * (1.0 - mu))? + (&*param.buffer * mu)?)?.flatten_from(1)?;
        let (rows, cols) = update.dims2()?;
        let short = if rows > cols { update.t()? } else { update };
        shapes.entry(short.dims2()?).or_default().push((i, short));
    }
    for ((n, m), updates) in shapes {
        for some in updates.chunks((STACKED / (n * m).max(1)).max(1)) {
            let stacked = Tensor::stack(&some.iter().map(|(_, update)| update).collect::<Vec<_>>(), 0)?;
            let orthogonal = orthogonal_composed(&stacked)?;
            for (place, (i, _)) in some.iter().enumerate() {
                let Composed { muon, var, .. } = &params[*i];
                let (rows, cols, rate) = muon.rate(var)?;
                let update = orthogonal.get(place)?;
                let update = if rows > cols { update.t()? } else { update }.reshape(var.dims())?;
                var.set(&((var.as_tensor().detach() * (1.0 - muon.decay))? - (update * rate)?)?)?;
            }
        }
    }
    Ok(())
}

/// `W <- (1 - decay) W - rate O`.
fn apply(weight: &mut [f32], update: &[f32], rate: f32, decay: f32) {
    weight.par_chunks_mut(CHUNK).zip(update.par_chunks(CHUNK)).for_each(|(weight, update)| {
        for (weight, update) in weight.iter_mut().zip(update) {
            *weight = *weight * (1.0 - decay) - rate * update;
        }
    });
}

/// Newton-Schulz on a row-major matrix of `rows` by `cols`, single-threaded: matrices are worked on side by side.
///
/// With its short side first, `X` is `(n, m)`. All iterations multiply `X` by a polynomial in its Gram matrix, so they
/// are done on `(n, n)` matrices, which commute and are symmetric, and `X` is multiplied once at the end: less than half
/// of the work for the usual shapes.
fn orthogonal(x: &[f32], rows: usize, cols: usize) -> Vec<f32> {
    let (a, b, c) = COEFFICIENTS;
    let (n, m) = (rows.min(cols), rows.max(cols));
    let (row, col) = if rows > cols { (1, cols) } else { (cols, 1) };
    let norm = x.iter().map(|v| f64::from(*v).powi(2)).sum::<f64>().sqrt() as f32;
    let inverse = 1.0 / norm.max(EPSILON);
    let short = View { values: x, row, col };
    let mut gram = vec![0.0; n * n];
    symmetric(&mut gram, n, m, short, View { row: col, col: row, ..short });
    gram.iter_mut().for_each(|v| *v *= inverse * inverse);
    let (mut poly, mut next) = (vec![0.0; n * n], vec![0.0; n * n]);
    let mut transform: Vec<f32> = Vec::new();
    for iteration in 0..ITERATIONS {
        symmetric(&mut poly, n, n, square(n, &gram), square(n, &gram));
        for (poly, gram) in poly.iter_mut().zip(&gram) {
            *poly = b * gram + c * *poly;
        }
        poly.iter_mut().step_by(n + 1).for_each(|diagonal| *diagonal += a);
        if iteration == 0 {
            transform = poly.iter().map(|v| v * inverse).collect();
        } else {
            symmetric(&mut next, n, n, square(n, &poly), square(n, &transform));
            std::mem::swap(&mut transform, &mut next);
        }
        if iteration + 1 < ITERATIONS {
            symmetric(&mut next, n, n, square(n, &poly), square(n, &gram));
            symmetric(&mut gram, n, n, square(n, &poly), square(n, &next));
        }
    }
    let mut out = vec![0.0; x.len()];
    multiply(&mut out, [row, col], [n, m, n], square(n, &transform), short);
    out
}

fn square(n: usize, values: &[f32]) -> View<'_> {
    View { values, row: n, col: 1 }
}

/// Smaller blocks of a symmetric product are computed as a whole.
const BLOCK: usize = 64;

/// `out = left right`, `(n, n)`, of which it is known that it is symmetric: the upper triangle is a copy of the lower one.
fn symmetric(out: &mut [f32], n: usize, k: usize, left: View, right: View) {
    fn lower(out: &mut [f32], (n, k): (usize, usize), start: usize, size: usize, left: View, right: View) {
        let half = if size <= BLOCK { 0 } else { (size / 2).next_multiple_of(16) };
        if half > 0 {
            lower(out, (n, k), start, half, left, right);
            lower(out, (n, k), start + half, size - half, left, right);
        }
        let (top, width) = (start + half, if half > 0 { half } else { size });
        let left = View { values: &left.values[top * left.row..], ..left };
        let right = View { values: &right.values[start * right.col..], ..right };
        multiply(&mut out[top * n + start..], [n, 1], [size - half, width, k], left, right);
    }
    lower(out, (n, k), 0, n, left, right);
    for i in 0..n {
        for j in 0..i {
            out[j * n + i] = out[i * n + j];
        }
    }
}

/// `out = left right`, where `out` is `(m, n)` with the given distances of rows and columns.
fn multiply(out: &mut [f32], [row, col]: [usize; 2], [m, n, k]: [usize; 3], left: View, right: View) {
    assert!(left.holds(m, k) && right.holds(k, n) && View { values: out, row, col }.holds(m, n));
    let (dst, lhs, rhs) = (out.as_mut_ptr(), left.values.as_ptr(), right.values.as_ptr());
    // SAFETY: all three were checked, and `out` is borrowed mutably.
    unsafe { gemm([m, n, k], dst, [col, row], lhs, [left.col, left.row], rhs, [right.col, right.row], 0.0, 1.0, false) }
}

/// The same by candle's operations, for `x` of `(matrices, short side, long side)`.
fn orthogonal_composed(x: &Tensor) -> Result<Tensor> {
    let (a, b, c) = COEFFICIENTS;
    let norm = x.sqr()?.sum_keepdim((1, 2))?.sqrt()?.clamp(EPSILON, f32::MAX)?;
    let mut x = x.broadcast_div(&norm)?;
    for _ in 0..ITERATIONS {
        let gram = x.matmul(&x.t()?)?;
        let poly = ((&gram * f64::from(b))? + (gram.matmul(&gram)? * f64::from(c))?)?;
        x = ((&x * f64::from(a))? + poly.matmul(&x)?)?;
    }
    Ok(x)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tensor::rng::Stream;
    use candle_core::Device;

    fn matrix(rows: usize, cols: usize, index: u64) -> Tensor {
        Stream::new(0, "muon", index).normal(&[rows, cols], &Device::Cpu).unwrap()
    }

    fn distance(a: &Tensor, b: &Tensor) -> f32 {
        (a - b).unwrap().abs().unwrap().max_all().unwrap().to_scalar().unwrap()
    }

    #[test]
    fn singular_values_come_near_one() {
        for (rows, cols) in [(40, 40), (16, 90), (90, 16), (1, 50), (50, 1)] {
            let x: Vec<f32> = matrix(rows, cols, 0).flatten_all().unwrap().to_vec1().unwrap();
            let o = Tensor::from_vec(orthogonal(&x, rows, cols), (rows, cols), &Device::Cpu).unwrap();
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
        // Two of one shape, one of it turned, and one of another.
        let shapes = [(5, 9), (9, 5), (5, 9), (4, 4)];
        let start = || shapes.map(|(rows, cols)| Var::from_tensor(&matrix(rows, cols, 0)).unwrap());
        let momenta = |vars: &[Var; 4]| vars.clone().map(|var| var.zeros_like().unwrap());
        let (a, b) = (start(), start());
        let (mut ma, mut mb) = (momenta(&a), momenta(&b));
        for step in 1..5 {
            let gradients: Vec<Tensor> =
                shapes.iter().zip(0..).map(|((rows, cols), i)| matrix(*rows, *cols, 10 * step + i)).collect();
            for ((var, buffer), gradient) in a.iter().zip(&mut ma).zip(&gradients) {
                muon.update(var, buffer, gradient).unwrap();
            }
            let mut params: Vec<Composed> =
                b.iter().zip(&mut mb).map(|(var, buffer)| Composed { muon, var, buffer }).collect();
            composed(&mut params, &gradients).unwrap();
        }
        for i in 0..shapes.len() {
            assert!(distance(&a[i], &b[i]) < 1e-5 && distance(&ma[i], &mb[i]) < 1e-5);
        }
    }

    #[test]
    fn iterating_on_the_gram_matrix_is_as_good_as_on_the_matrix() {
        // Singular values fall over seven orders of magnitude, below what f32 can tell in the Gram matrix.
        for (rows, cols) in [(130, 130), (70, 200), (200, 70)] {
            let decay: Vec<f32> = (0..cols).map(|i| 10f32.powf(-7.0 * i as f32 / cols as f32)).collect();
            let decay = Tensor::from_vec(decay, (1, cols), &Device::Cpu).unwrap();
            let x = matrix(rows, cols, 7).broadcast_mul(&decay).unwrap().matmul(&matrix(cols, cols, 8)).unwrap();
            let values: Vec<f32> = x.flatten_all().unwrap().to_vec1().unwrap();
            let got = Tensor::from_vec(orthogonal(&values, rows, cols), (rows, cols), &Device::Cpu).unwrap();
            let turned = |x: &Tensor| if rows > cols { x.t().unwrap() } else { x.clone() };
            let want = orthogonal_composed(&turned(&x).unsqueeze(0).unwrap()).unwrap().squeeze(0).unwrap();
            let apart = distance(&turned(&got), &want);
            assert!(apart < 1e-3, "{rows} x {cols}: {apart}");
        }
    }
}
