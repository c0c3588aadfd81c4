//! Matrix products of a layer.

use super::{
    bf16, composed,
    cpu::{self, View},
};
use candle_core::{CpuStorage, CustomOp2, CustomOp3, Layout, Result, Shape, Tensor};

/// How a layer multiplies f32 matrices.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Precision {
    #[default]
    F32,
    /// Factors rounded to bfloat16, sums in f32, forward and backward: mixed precision as on accelerators.
    Bf16,
}

/// `x W^T + b`: `x` is `(.., in)`, `weight` is `(out, in)`, `bias` is `(out)`; the result is `(.., out)`.
pub fn linear(x: &Tensor, weight: &Tensor, bias: Option<&Tensor>) -> Result<Tensor> {
    linear_in(Precision::F32, x, weight, bias)
}

/// [`linear`] in a precision of choice.
pub fn linear_in(precision: Precision, x: &Tensor, weight: &Tensor, bias: Option<&Tensor>) -> Result<Tensor> {
    if cpu::fused(&[x, weight]) {
        let (x, weight) = (x.contiguous()?, weight.contiguous()?);
        return match bias {
            Some(bias) => x.apply_op3(&weight, &bias.contiguous()?, Fused(precision)),
            None => x.apply_op2(&weight, Fused(precision)),
        };
    }
    let y = composed::linear(precision, x, weight)?;
    match bias {
        Some(bias) => y.broadcast_add(bias),
        None => Ok(y),
    }
}

/// `dims` with another last one.
pub(super) fn with_last(dims: &[usize], last: usize) -> Vec<usize> {
    let mut dims = dims.to_vec();
    if let Some(d) = dims.last_mut() {
        *d = last;
    }
    dims
}

/// The layer as one operation on the CPU.
pub(super) struct Fused(pub(super) Precision);

/// A dense row-major matrix of rows of `width`, as it is.
pub(super) fn plain(values: &[f32], width: usize) -> View<'_> {
    View { values, col: 1, row: width }
}

/// The same, transposed.
pub(super) fn transposed(values: &[f32], width: usize) -> View<'_> {
    View { values, col: width, row: 1 }
}

impl Fused {
    /// `lhs (m, k) * rhs (k, n)`, dense.
    pub(super) fn product(&self, [m, n, k]: [usize; 3], lhs: View, rhs: View) -> Vec<f32> {
        match self.0 {
            Precision::F32 => cpu::product([m, n, k], lhs, rhs),
            Precision::Bf16 => bf16::product([m, n, k], lhs, rhs),
        }
    }

    /// `x W^T + b`, `(.., n)`, for `x (.., k)` of `dims` and `w (n, k)`.
    pub(super) fn apply(
        &self,
        x: &[f32],
        dims: &[usize],
        w: &[f32],
        (n, k): (usize, usize),
        b: Option<&[f32]>,
    ) -> Result<Vec<f32>> {
        if dims.last() != Some(&k) || b.is_some_and(|b| b.len() != n) {
            candle_core::bail!("linear layer {n} x {k} got an input of {dims:?}");
        }
        let mut y = self.product([x.len() / k, n, k], plain(x, k), transposed(w, k));
        if let Some(b) = b {
            cpu::rows(&mut y, n, |_, y| cpu::add(y, b));
        }
        Ok(y)
    }

    fn forward(
        &self,
        x: &[f32],
        xl: &Layout,
        w: &[f32],
        wl: &Layout,
        b: Option<&[f32]>,
    ) -> Result<(CpuStorage, Shape)> {
        let (n, k) = wl.shape().dims2()?;
        let y = self.apply(x, xl.dims(), w, (n, k), b)?;
        Ok((CpuStorage::F32(y), Shape::from(with_last(xl.dims(), n))))
    }

    fn backward(&self, x: &Tensor, w: &Tensor, grad: &Tensor) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let (n, k) = w.dims2()?;
        let grad = grad.contiguous()?;
        let g = cpu::floats(&grad)?;
        let m = g.len() / n;
        let grad_x = if x.track_op() {
            let out = self.product([m, k, n], plain(&g, n), plain(&cpu::floats(w)?, k));
            Some(Tensor::from_vec(out, x.shape(), x.device())?)
        } else {
            None
        };
        let grad_w = if w.track_op() {
            let out = self.product([n, k, m], transposed(&g, n), plain(&cpu::floats(x)?, k));
            Some(Tensor::from_vec(out, (n, k), w.device())?)
        } else {
            None
        };
        Ok((grad_x, grad_w))
    }
}

impl CustomOp2 for Fused {
    fn name(&self) -> &'static str {
        "linear"
    }

    fn cpu_fwd(&self, x: &CpuStorage, xl: &Layout, w: &CpuStorage, wl: &Layout) -> Result<(CpuStorage, Shape)> {
        self.forward(cpu::slice(x, xl)?, xl, cpu::slice(w, wl)?, wl, None)
    }

    fn bwd(&self, x: &Tensor, w: &Tensor, _: &Tensor, grad: &Tensor) -> Result<(Option<Tensor>, Option<Tensor>)> {
        self.backward(x, w, grad)
    }
}

impl CustomOp3 for Fused {
    fn name(&self) -> &'static str {
        "linear with bias"
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        xl: &Layout,
        w: &CpuStorage,
        wl: &Layout,
        b: &CpuStorage,
        bl: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        self.forward(cpu::slice(x, xl)?, xl, cpu::slice(w, wl)?, wl, Some(cpu::slice(b, bl)?))
    }

    fn bwd(
        &self,
        x: &Tensor,
        w: &Tensor,
        b: &Tensor,
        _: &Tensor,
        grad: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let (grad_x, grad_w) = self.backward(x, w, grad)?;
        let grad_b = if b.track_op() {
            let grad = grad.contiguous()?;
            let g = cpu::floats(&grad)?;
            let n = b.elem_count();
            let sum = cpu::sum_rows(g.len() / n, n, 256, |row, sum| cpu::add(sum, &g[row * n..][..n]));
            Some(Tensor::from_vec(sum, n, b.device())?)
        } else {
            None
        };
        Ok((grad_x, grad_w, grad_b))
    }
}
