//! What FLUX.2's single-stream block does between its two projections: attention and SwiGLU side by side.
//!
//! The projection holds query, key, value, gate and up next to each other, and so does its gradient: cutting them apart
//! and joining the results with general operations would copy each of them several times.

use super::{
    Rotation,
    attention::{Head, HeadShape},
    composed,
    cpu::{self, Shared},
    mlp, norm,
    rope::{Angles, Turn},
};
use candle_core::{CpuStorage, CustomOp3, Layout, Result, Shape, Tensor};
use rayon::prelude::*;

/// Takes `x` of `(B, T, 3 H D + 2 F)` apart into query, key, value of `H` heads and gate, up; normalises (RMS with
/// `q_norm` and `k_norm` of `(D)`) and rotates queries and keys; returns attention and `silu(gate) * up` side by side,
/// `(B, T, H D + F)`.
#[allow(clippy::too_many_arguments)]
pub fn attention_swiglu(
    x: &Tensor,
    q_norm: &Tensor,
    k_norm: &Tensor,
    eps: f64,
    heads: usize,
    cos: &Tensor,
    sin: &Tensor,
    rotation: Rotation,
) -> Result<Tensor> {
    if cpu::fused(&[x, q_norm, k_norm, cos, sin]) {
        let op = Fused { angles: Angles::new(cos, sin, rotation)?, eps: eps as f32, heads, d: q_norm.dim(0)? };
        return x.contiguous()?.apply_op3(&q_norm.contiguous()?, &k_norm.contiguous()?, op);
    }
    composed::attention_swiglu(x, q_norm, k_norm, eps, heads, cos, sin, rotation)
}

struct Fused {
    angles: Angles,
    eps: f32,
    heads: usize,
    d: usize,
}

#[derive(Clone, Copy)]
struct Dims {
    b: usize,
    t: usize,
    /// Width of `x`, of the attention part of the result, and of the SwiGLU part.
    width: usize,
    inner: usize,
    hidden: usize,
}

impl Fused {
    fn dims(&self, x: &[usize]) -> Result<Dims> {
        let inner = self.heads * self.d;
        match *x {
            [b, t, width] if width >= 3 * inner && (width - 3 * inner).is_multiple_of(2) => {
                Ok(Dims { b, t, width, inner, hidden: (width - 3 * inner) / 2 })
            }
            _ => candle_core::bail!("{} heads of {} do not fit into {x:?}", self.heads, self.d),
        }
    }

    /// One head's queries (`part` 0) or keys (`part` 1), normalised and rotated: dense `(T, D)`.
    fn normed(
        &self,
        x: &[f32],
        dims: Dims,
        (row, head, part): (usize, usize, usize),
        weight: &[f32],
        turn: Turn,
    ) -> Vec<f32> {
        let d = self.d;
        let mut out = vec![0.0; dims.t * d];
        for (t, out) in out.chunks_exact_mut(d).enumerate() {
            let x = &x[(row * dims.t + t) * dims.width + part * dims.inner + head * d..][..d];
            let r = norm::inverse_rms(x, self.eps);
            for ((o, &x), &w) in out.iter_mut().zip(x).zip(weight) {
                *o = x * r * w;
            }
            turn(row, t, false, out);
        }
        out
    }
}

impl CustomOp3 for Fused {
    fn name(&self) -> &'static str {
        "attention-swiglu"
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        xl: &Layout,
        q_norm: &CpuStorage,
        ql: &Layout,
        k_norm: &CpuStorage,
        kl: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let dims = self.dims(xl.dims())?;
        let Dims { b, t, width, inner, hidden } = dims;
        let (heads, d, row_out) = (self.heads, self.d, inner + hidden);
        let (x, q_norm, k_norm) = (cpu::slice(x, xl)?, cpu::slice(q_norm, ql)?, cpu::slice(k_norm, kl)?);
        let mut out = vec![0.0; b * t * row_out];
        cpu::rows(&mut out, row_out, |row, out| {
            let (gate, up) = x[row * width + 3 * inner..][..2 * hidden].split_at(hidden);
            mlp::swiglu_row(gate, up, &mut out[inner..]);
        });
        let shared = Shared::new(&mut out);
        self.angles.with((b, t, d), |turn| {
            (0..b * heads).into_par_iter().for_each(|task| {
                let (row, head) = (task / heads, task % heads);
                let q = self.normed(x, dims, (row, head, 0), q_norm, turn);
                let k = self.normed(x, dims, (row, head, 1), k_norm, turn);
                let v = Head::of(x, row * t * width + 2 * inner + head * d, width);
                let shape = HeadShape { tq: t, tk: t, d, visible: &|_| 0..t };
                // SAFETY: each head writes its own columns of the attention part.
                unsafe {
                    let out = Head { start: shared.at(row * t * row_out + head * d), stride: row_out };
                    shape.forward(Head::of(&q, 0, d), Head::of(&k, 0, d), v, out);
                }
            });
        })?;
        Ok((CpuStorage::F32(out), Shape::from((b, t, row_out))))
    }

    fn bwd(
        &self,
        x: &Tensor,
        q_norm: &Tensor,
        k_norm: &Tensor,
        _: &Tensor,
        grad: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let dims = self.dims(x.dims())?;
        let Dims { b, t, width, inner, hidden } = dims;
        let (heads, d, row_out) = (self.heads, self.d, inner + hidden);
        let grad = grad.contiguous()?;
        let (xs, qn, kn, gs) = (cpu::floats(x)?, cpu::floats(q_norm)?, cpu::floats(k_norm)?, cpu::floats(&grad)?);
        let (xs, qn, kn, gs): (&[f32], &[f32], &[f32], &[f32]) = (&xs, &qn, &kn, &gs);
        let mut out = vec![0.0; xs.len()];
        cpu::rows(&mut out, width, |row, out| {
            let (gate, up) = xs[row * width + 3 * inner..][..2 * hidden].split_at(hidden);
            let (grad_gate, grad_up) = out[3 * inner..].split_at_mut(hidden);
            mlp::swiglu_row_backward(gate, up, &gs[row * row_out + inner..][..hidden], grad_gate, grad_up);
        });
        let shared = Shared::new(&mut out);
        let norms = self.angles.with((b, t, d), |turn| {
            cpu::sum_rows(b * heads, 2 * d, 1, |task, sums| {
                let (row, head) = (task / heads, task % heads);
                let q = self.normed(xs, dims, (row, head, 0), qn, turn);
                let k = self.normed(xs, dims, (row, head, 1), kn, turn);
                let start = row * t * width + head * d;
                let v = Head::of(xs, start + 2 * inner, width);
                let g = Head::of(gs, row * t * row_out + head * d, row_out);
                let mut grads = [vec![0.0; t * d], vec![0.0; t * d], vec![0.0; t * d]];
                let shape = HeadShape { tq: t, tk: t, d, visible: &|_| 0..t };
                let [grad_q, grad_k, grad_v] = &mut grads;
                // SAFETY: the dimensions were checked.
                unsafe { shape.backward(Head::of(&q, 0, d), Head::of(&k, 0, d), v, g, [grad_q, grad_k, grad_v]) };
                let (sum_q, sum_k) = sums.split_at_mut(d);
                for (part, grad, weight, sum) in [(0, grad_q, qn, sum_q), (1, grad_k, kn, sum_k)] {
                    for (t, g) in grad.chunks_exact_mut(d).enumerate() {
                        turn(row, t, true, g);
                        let at = start + t * width + part * inner;
                        // SAFETY: each head writes its own columns.
                        let out = unsafe { shared.slice(at, d) };
                        norm::rms_row_backward(&xs[at..][..d], weight, g, self.eps, out, sum);
                    }
                }
                for (t, g) in grad_v.chunks_exact(d).enumerate() {
                    // SAFETY: as above.
                    unsafe { shared.slice(start + t * width + 2 * inner, d) }.copy_from_slice(g);
                }
            })
        })?;
        let (grad_q_norm, grad_k_norm) = norms.split_at(d);
        Ok((
            Some(Tensor::from_vec(out, x.shape(), x.device())?),
            Some(Tensor::from_slice(grad_q_norm, d, q_norm.device())?),
            Some(Tensor::from_slice(grad_k_norm, d, k_norm.device())?),
        ))
    }
}
