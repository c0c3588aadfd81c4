//! Matrix products of a layer.

use super::cpu;
use candle_core::{CpuStorage, CustomOp2, CustomOp3, Layout, Result, Shape, Tensor};

/// `x W^T + b`: `x` is `(.., in)`, `weight` is `(out, in)`, `bias` is `(out)`; the result is `(.., out)`.
pub fn linear(x: &Tensor, weight: &Tensor, bias: Option<&Tensor>) -> Result<Tensor> {
    if cpu::fused(&[x, weight]) {
        let (x, weight) = (x.contiguous()?, weight.contiguous()?);
        return match bias {
            Some(bias) => x.apply_op3(&weight, &bias.contiguous()?, Fused),
            None => x.apply_op2(&weight, Fused),
        };
    }
    let (out, inner) = weight.dims2()?;
    let y = x.reshape(((), inner))?.matmul(&weight.t()?)?;
    let y = match bias {
        Some(bias) => y.broadcast_add(bias)?,
        None => y,
    };
    y.reshape(with_last(x.dims(), out))
}

fn with_last(dims: &[usize], last: usize) -> Vec<usize> {
    let mut dims = dims.to_vec();
    if let Some(d) = dims.last_mut() {
        *d = last;
    }
    dims
}

struct Fused;

impl Fused {
    fn forward(x: &[f32], xl: &Layout, w: &[f32], wl: &Layout, b: Option<&[f32]>) -> Result<(CpuStorage, Shape)> {
        let (n, k) = wl.shape().dims2()?;
        let dims = xl.dims();
        if dims.last() != Some(&k) || b.is_some_and(|b| b.len() != n) {
            candle_core::bail!("linear layer {n} x {k} got an input of {dims:?}");
        }
        let m = x.len() / k;
        let mut y = match b {
            Some(b) => b.repeat(m),
            None => vec![0.0; m * n],
        };
        let keep = if b.is_some() { 1.0 } else { 0.0 };
        // SAFETY: the sizes were checked; `y` is ours.
        unsafe {
            cpu::gemm([m, n, k], y.as_mut_ptr(), [1, n], x.as_ptr(), [1, k], w.as_ptr(), [k, 1], keep, 1.0, true);
        }
        Ok((CpuStorage::F32(y), Shape::from(with_last(dims, n))))
    }

    fn backward(x: &Tensor, w: &Tensor, grad: &Tensor) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let (n, k) = w.dims2()?;
        let grad = grad.contiguous()?;
        let g = cpu::floats(&grad)?;
        let m = g.len() / n;
        let grad_x = if x.track_op() {
            let w = cpu::floats(w)?;
            let mut out = vec![0.0; m * k];
            // SAFETY: (m, n) times (n, k) into the (m, k) of `out`.
            unsafe {
                cpu::gemm([m, k, n], out.as_mut_ptr(), [1, k], g.as_ptr(), [1, n], w.as_ptr(), [1, k], 0.0, 1.0, true);
            }
            Some(Tensor::from_vec(out, x.shape(), x.device())?)
        } else {
            None
        };
        let grad_w = if w.track_op() {
            let x = cpu::floats(x)?;
            let mut out = vec![0.0; n * k];
            // SAFETY: (n, m) times (m, k) into the (n, k) of `out`.
            unsafe {
                cpu::gemm([n, k, m], out.as_mut_ptr(), [1, k], g.as_ptr(), [n, 1], x.as_ptr(), [1, k], 0.0, 1.0, true);
            }
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
        Self::forward(cpu::slice(x, xl)?, xl, cpu::slice(w, wl)?, wl, None)
    }

    fn bwd(&self, x: &Tensor, w: &Tensor, _: &Tensor, grad: &Tensor) -> Result<(Option<Tensor>, Option<Tensor>)> {
        Self::backward(x, w, grad)
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
        Self::forward(cpu::slice(x, xl)?, xl, cpu::slice(w, wl)?, wl, Some(cpu::slice(b, bl)?))
    }

    fn bwd(
        &self,
        x: &Tensor,
        w: &Tensor,
        b: &Tensor,
        _: &Tensor,
        grad: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let (grad_x, grad_w) = Self::backward(x, w, grad)?;
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
