//! Rotary position embedding (RoFormer, arXiv 2104.09864).

use super::{composed, cpu, norm};
use candle_core::{CpuStorage, CustomOp1, CustomOp2, Layout, Result, Shape, Tensor};

/// Which two numbers of a head form a pair that is rotated together.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rotation {
    /// Neighbours `(2i, 2i + 1)`, as FLUX does.
    Interleaved,
    /// `(i, i + D/2)`, as Qwen does.
    Half,
}

/// Rotates `x` of `(B, T, H, D)` by the angles whose cosines and sines are `cos` and `sin`, each `(T, D/2)`, or
/// `(B, T, D/2)` where positions differ within a batch. No gradient flows to the angles.
pub fn rope(x: &Tensor, cos: &Tensor, sin: &Tensor, rotation: Rotation) -> Result<Tensor> {
    if cpu::fused(&[x, cos, sin]) {
        return x.contiguous()?.apply_op1(Rope(Angles::new(cos, sin, rotation)?));
    }
    composed::rope(x, cos, sin, rotation)
}

/// [`super::rms_norm`] of each head, then [`rope`]: what comes before attention in FLUX.2 and Qwen3.
pub fn norm_rope(
    x: &Tensor,
    weight: &Tensor,
    eps: f64,
    cos: &Tensor,
    sin: &Tensor,
    rotation: Rotation,
) -> Result<Tensor> {
    if cpu::fused(&[x, weight, cos, sin]) {
        let op = NormRope { angles: Angles::new(cos, sin, rotation)?, eps: eps as f32 };
        return x.contiguous()?.apply_op2(&weight.contiguous()?, op);
    }
    composed::norm_rope(x, weight, eps, cos, sin, rotation)
}

/// Turns the head vector at `(batch row, position)` in place; with `true` back by the same angle, as a gradient is.
pub(super) type Turn<'a> = &'a (dyn Fn(usize, usize, bool, &mut [f32]) + Sync);

/// The angles of a fused kernel.
pub(super) struct Angles {
    cos: Tensor,
    sin: Tensor,
    rotation: Rotation,
}

impl Angles {
    pub(super) fn new(cos: &Tensor, sin: &Tensor, rotation: Rotation) -> Result<Self> {
        Ok(Self { cos: cos.detach().contiguous()?, sin: sin.detach().contiguous()?, rotation })
    }

    /// Calls `f` with what turns the head vectors of `b` sequences of `t` positions of `d` numbers.
    pub(super) fn with<R>(&self, (b, t, d): (usize, usize, usize), f: impl FnOnce(Turn) -> R) -> Result<R> {
        let half = d / 2;
        let per_row = match *self.cos.dims() {
            [t2, h2] if t2 == t && h2 == half => false,
            [b2, t2, h2] if b2 == b && t2 == t && h2 == half => true,
            _ => candle_core::bail!("rope over ({b}, {t}, _, {d}) got angles of {:?}", self.cos.shape()),
        };
        let (cos, sin) = (cpu::floats(&self.cos)?, cpu::floats(&self.sin)?);
        let (cos, sin): (&[f32], &[f32]) = (&cos, &sin);
        let rotation = self.rotation;
        Ok(f(&move |row, position, back, x| {
            let start = (if per_row { row * t } else { 0 } + position) * half;
            let (cos, sin) = (&cos[start..][..half], &sin[start..][..half]);
            let sign = if back { -1.0 } else { 1.0 };
            match rotation {
                Rotation::Interleaved => {
                    for (pair, (&c, &s)) in x.chunks_exact_mut(2).zip(cos.iter().zip(sin)) {
                        let (a, b, s) = (pair[0], pair[1], sign * s);
                        pair[0] = a * c - b * s;
                        pair[1] = a * s + b * c;
                    }
                }
                Rotation::Half => {
                    let (first, second) = x.split_at_mut(half);
                    for ((a, b), (&c, &s)) in first.iter_mut().zip(second).zip(cos.iter().zip(sin)) {
                        let (x, y, s) = (*a, *b, sign * s);
                        *a = x * c - y * s;
                        *b = x * s + y * c;
                    }
                }
            }
        }))
    }
}

struct Rope(Angles);

impl Rope {
    fn turn(&self, x: &[f32], dims: (usize, usize, usize, usize), back: bool) -> Result<Vec<f32>> {
        let (b, t, h, d) = dims;
        let mut out = x.to_vec();
        self.0.with((b, t, d), |turn| {
            cpu::rows(&mut out, d, |row, out| turn(row / (t * h), row / h % t, back, out));
        })?;
        Ok(out)
    }
}

impl CustomOp1 for Rope {
    fn name(&self) -> &'static str {
        "rope"
    }

    fn cpu_fwd(&self, x: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let out = self.turn(cpu::slice(x, layout)?, layout.shape().dims4()?, false)?;
        Ok((CpuStorage::F32(out), layout.shape().clone()))
    }

    fn bwd(&self, x: &Tensor, _: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
        let grad = grad.contiguous()?;
        let out = self.turn(&cpu::floats(&grad)?, x.dims4()?, true)?;
        Ok(Some(Tensor::from_vec(out, x.shape(), x.device())?))
    }
}

struct NormRope {
    angles: Angles,
    eps: f32,
}

impl CustomOp2 for NormRope {
    fn name(&self) -> &'static str {
        "norm-rope"
    }

    fn cpu_fwd(&self, x: &CpuStorage, xl: &Layout, w: &CpuStorage, wl: &Layout) -> Result<(CpuStorage, Shape)> {
        let (b, t, h, d) = xl.shape().dims4()?;
        let (x, w) = (cpu::slice(x, xl)?, cpu::slice(w, wl)?);
        let mut out = vec![0.0; x.len()];
        self.angles.with((b, t, d), |turn| {
            cpu::rows(&mut out, d, |row, out| {
                let x = &x[row * d..][..d];
                let r = norm::inverse_rms(x, self.eps);
                for ((o, &x), &w) in out.iter_mut().zip(x).zip(w) {
                    *o = x * r * w;
                }
                turn(row / (t * h), row / h % t, false, out);
            });
        })?;
        Ok((CpuStorage::F32(out), xl.shape().clone()))
    }

    fn bwd(&self, x: &Tensor, w: &Tensor, _: &Tensor, grad: &Tensor) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let (b, t, h, d) = x.dims4()?;
        let grad = grad.contiguous()?;
        let (values, weight, g) = (cpu::floats(x)?, cpu::floats(w)?, cpu::floats(&grad)?);
        let mut out = vec![0.0; values.len()];
        let shared = cpu::Shared::new(&mut out);
        let grad_w = self.angles.with((b, t, d), |turn| {
            cpu::sum_rows(b * t * h, d, 128, |row, sum| {
                let mut g = g[row * d..][..d].to_vec();
                turn(row / (t * h), row / h % t, true, &mut g);
                // SAFETY: each row is written once.
                let out = unsafe { shared.slice(row * d, d) };
                norm::rms_row_backward(&values[row * d..][..d], &weight, &g, self.eps, out, sum);
            })
        })?;
        Ok((Some(Tensor::from_vec(out, x.shape(), x.device())?), Some(Tensor::from_vec(grad_w, d, w.device())?)))
    }
}
