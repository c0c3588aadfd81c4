//! Scaled dot-product attention.
//!
//! The CPU kernel works on one head and a block of queries at a time, so the scores of a whole head never exist at once;
//! its backward computes them again (as FlashAttention does, arXiv 2205.14135).

use super::{
    composed,
    cpu::{self, Shared},
};
use candle_core::{CpuStorage, CustomOp3, Layout, Result, Shape, Tensor};
use rayon::prelude::*;
use std::ops::Range;

/// Queries whose scores are computed together.
const BLOCK: usize = 128;

/// Which keys a query may see.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Mask {
    /// Query `i` of `Tq` sees keys up to `i + Tk - Tq`: the queries are the last `Tq` positions.
    pub causal: bool,
    /// For each row of the batch, the keys that are no padding; all of them if `None`.
    pub keys: Option<Vec<Range<usize>>>,
}

impl Mask {
    pub fn causal() -> Self {
        Self { causal: true, keys: None }
    }

    /// The keys that query `i` of batch row `row` sees.
    pub fn visible(&self, row: usize, query: usize, queries: usize, keys: usize) -> Range<usize> {
        let range = self.keys.as_ref().map_or(0..keys, |k| k[row].clone());
        let end = if self.causal { range.end.min((query + keys + 1).saturating_sub(queries)) } else { range.end };
        range.start..end.max(range.start)
    }
}

/// `softmax(q k^T / sqrt(D)) v`: `q` is `(B, Tq, H, D)`, `k` and `v` are `(B, Tk, Hkv, D)` where `Hkv` divides `H` (grouped
/// queries share a key head); the result is `(B, Tq, H, D)`. A query that sees no key (padding) gets zeros on the CPU and
/// the mean of the values elsewhere: nothing may depend on it.
pub fn attention(q: &Tensor, k: &Tensor, v: &Tensor, mask: &Mask) -> Result<Tensor> {
    if cpu::fused(&[q, k, v]) {
        return q.contiguous()?.apply_op3(&k.contiguous()?, &v.contiguous()?, Fused(mask.clone()));
    }
    composed::attention(q, k, v, mask)
}

/// The vectors of one head, `(T, D)`: one every `stride` elements from `start` on.
#[derive(Clone, Copy)]
pub(super) struct Head<P> {
    pub start: P,
    pub stride: usize,
}

impl Head<*const f32> {
    pub(super) fn of(values: &[f32], offset: usize, stride: usize) -> Self {
        Self { start: values[offset..].as_ptr(), stride }
    }

    /// # Safety
    /// The head has a vector `i`.
    unsafe fn from(self, i: usize) -> *const f32 {
        unsafe { self.start.add(i * self.stride) }
    }
}

/// One head of attention: how many queries and keys, of how many dimensions, and who sees whom.
pub(super) struct HeadShape<'a> {
    pub tq: usize,
    pub tk: usize,
    pub d: usize,
    pub visible: &'a (dyn Fn(usize) -> Range<usize> + Sync),
}

impl HeadShape<'_> {
    fn scale(&self) -> f32 {
        (self.d as f32).powf(-0.5)
    }

    /// The attention weights of queries `from..from + n`, as rows of the returned width: no query of the block sees a key
    /// beyond it.
    ///
    /// # Safety
    /// `q` has the queries of the block and `k` has `tk` keys.
    unsafe fn weights(
        &self,
        (from, n): (usize, usize),
        q: Head<*const f32>,
        k: Head<*const f32>,
        weights: &mut Vec<f32>,
    ) -> usize {
        let width = (from..from + n).map(|i| (self.visible)(i).end).max().unwrap_or(0).min(self.tk);
        weights.resize(n * width, 0.0);
        if width == 0 {
            return 0;
        }
        // SAFETY: promised by the caller; `weights` holds `n * width` elements.
        unsafe {
            let (w, q_start) = (weights.as_mut_ptr(), q.from(from));
            let shape = [n, width, self.d];
            cpu::gemm(shape, w, [1, width], q_start, [1, q.stride], k.start, [k.stride, 1], 0.0, self.scale(), false);
        }
        for (i, row) in weights.chunks_exact_mut(width).enumerate() {
            let seen = (self.visible)(from + i);
            let (start, end) = (seen.start.min(width), seen.end.min(width));
            row[..start].fill(0.0);
            row[end..].fill(0.0);
            softmax(&mut row[start..end]);
        }
        width
    }

    /// Writes the attention of one head to `out`.
    ///
    /// # Safety
    /// `q` and `out` have `tq` vectors, `k` and `v` have `tk`, and nobody else touches `out`.
    pub(super) unsafe fn forward(
        &self,
        q: Head<*const f32>,
        k: Head<*const f32>,
        v: Head<*const f32>,
        out: Head<*mut f32>,
    ) {
        let mut weights = Vec::new();
        for from in (0..self.tq).step_by(BLOCK) {
            let n = BLOCK.min(self.tq - from);
            // SAFETY: promised by the caller.
            unsafe {
                let width = self.weights((from, n), q, k, &mut weights);
                let out_start = out.start.add(from * out.stride);
                let (w, shape) = (weights.as_ptr(), [n, self.d, width]);
                cpu::gemm(shape, out_start, [1, out.stride], w, [1, width], v.start, [1, v.stride], 0.0, 1.0, false);
            }
        }
    }

    /// Adds the gradients of one head to `grad_q (tq, d)`, `grad_k (tk, d)` and `grad_v (tk, d)`, all dense.
    ///
    /// # Safety
    /// `q` and `grad` have `tq` vectors, `k` and `v` have `tk`.
    pub(super) unsafe fn backward(
        &self,
        q: Head<*const f32>,
        k: Head<*const f32>,
        v: Head<*const f32>,
        grad: Head<*const f32>,
        [grad_q, grad_k, grad_v]: [&mut [f32]; 3],
    ) {
        let d = self.d;
        let (mut weights, mut grad_scores) = (Vec::new(), Vec::new());
        for from in (0..self.tq).step_by(BLOCK) {
            let n = BLOCK.min(self.tq - from);
            // SAFETY: promised by the caller; the dense gradients are as long as the sizes say.
            unsafe {
                let width = self.weights((from, n), q, k, &mut weights);
                grad_scores.resize(n * width, 0.0);
                let (w, gs, g) = (weights.as_ptr(), grad_scores.as_mut_ptr(), grad.from(from));
                // dV += P^T dO, dP = dO V^T
                let gv = grad_v.as_mut_ptr();
                cpu::gemm([width, d, n], gv, [1, d], w, [width, 1], g, [1, grad.stride], 1.0, 1.0, false);
                cpu::gemm([n, width, d], gs, [1, width], g, [1, grad.stride], v.start, [v.stride, 1], 0.0, 1.0, false);
                // dS = P (dP - sum(P dP))
                if width > 0 {
                    for (gs, w) in grad_scores.chunks_exact_mut(width).zip(weights.chunks_exact(width)) {
                        let along = cpu::dot(gs, w);
                        for (gs, &w) in gs.iter_mut().zip(w) {
                            *gs = w * (*gs - along);
                        }
                    }
                }
                // dQ = dS K, dK += dS^T Q
                let (gs, scale) = (grad_scores.as_ptr(), self.scale());
                let (gq, gk) = (grad_q[from * d..].as_mut_ptr(), grad_k.as_mut_ptr());
                cpu::gemm([n, d, width], gq, [1, d], gs, [1, width], k.start, [1, k.stride], 1.0, scale, false);
                cpu::gemm([width, d, n], gk, [1, d], gs, [width, 1], q.from(from), [1, q.stride], 1.0, scale, false);
            }
        }
    }
}

fn softmax(row: &mut [f32]) {
    let max = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    for x in row.iter_mut() {
        *x = cpu::exp(*x - max);
    }
    let scale = 1.0 / cpu::sum(row);
    for x in row.iter_mut() {
        *x *= scale;
    }
}

struct Fused(Mask);

/// The sizes of queries `(B, Tq, H, D)`, and of keys and values `(B, Tk, Hkv, D)` that fit to them.
#[derive(Clone, Copy)]
pub(super) struct Dims {
    pub b: usize,
    pub tq: usize,
    pub tk: usize,
    pub h: usize,
    pub hkv: usize,
    pub d: usize,
}

impl Dims {
    pub fn new(q: &[usize], k: &[usize], v: &[usize]) -> Result<Self> {
        match (q, k) {
            (&[b, tq, h, d], &[b2, tk, hkv, d2]) if k == v && b == b2 && d == d2 && hkv > 0 && h % hkv == 0 => {
                Ok(Self { b, tq, tk, h, hkv, d })
            }
            _ => candle_core::bail!("attention got queries {q:?}, keys {k:?} and values {v:?}"),
        }
    }

    fn q(&self, row: usize, head: usize) -> usize {
        (row * self.tq * self.h + head) * self.d
    }

    fn k(&self, row: usize, head: usize) -> usize {
        (row * self.tk * self.hkv + head) * self.d
    }
}

impl CustomOp3 for Fused {
    fn name(&self) -> &'static str {
        "attention"
    }

    fn cpu_fwd(
        &self,
        q: &CpuStorage,
        ql: &Layout,
        k: &CpuStorage,
        kl: &Layout,
        v: &CpuStorage,
        vl: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let dims = Dims::new(ql.dims(), kl.dims(), vl.dims())?;
        let (q, k, v) = (cpu::slice(q, ql)?, cpu::slice(k, kl)?, cpu::slice(v, vl)?);
        let Dims { b, tq, tk, h, hkv, d } = dims;
        let mut out = vec![0.0; q.len()];
        let shared = Shared::new(&mut out);
        (0..b * h).into_par_iter().for_each(|task| {
            let (row, head) = (task / h, task % h);
            let shape = HeadShape { tq, tk, d, visible: &|i| self.0.visible(row, i, tq, tk) };
            let (at_q, at_k) = (dims.q(row, head), dims.k(row, head / (h / hkv)));
            // SAFETY: each head writes its own vectors of `out`.
            unsafe {
                let out = Head { start: shared.at(at_q), stride: h * d };
                let (k, v) = (Head::of(k, at_k, hkv * d), Head::of(v, at_k, hkv * d));
                shape.forward(Head::of(q, at_q, h * d), k, v, out);
            }
        });
        Ok((CpuStorage::F32(out), ql.shape().clone()))
    }

    fn bwd(
        &self,
        q: &Tensor,
        k: &Tensor,
        v: &Tensor,
        _: &Tensor,
        grad: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let dims = Dims::new(q.dims(), k.dims(), v.dims())?;
        let Dims { b, tq, tk, h, hkv, d } = dims;
        let grad = grad.contiguous()?;
        let (qs, ks, vs, gs) = (cpu::floats(q)?, cpu::floats(k)?, cpu::floats(v)?, cpu::floats(&grad)?);
        let (qs, ks, vs, gs): (&[f32], &[f32], &[f32], &[f32]) = (&qs, &ks, &vs, &gs);
        let mut out = [vec![0.0; qs.len()], vec![0.0; ks.len()], vec![0.0; vs.len()]];
        let [out_q, out_k, out_v] = out.each_mut().map(|o| Shared::new(o));
        // One task for each key head, because its queries' gradients add up.
        (0..b * hkv).into_par_iter().for_each(|task| {
            let (row, kv) = (task / hkv, task % hkv);
            let shape = HeadShape { tq, tk, d, visible: &|i| self.0.visible(row, i, tq, tk) };
            let at_k = dims.k(row, kv);
            let (mut grad_k, mut grad_v) = (vec![0.0; tk * d], vec![0.0; tk * d]);
            for head in kv * (h / hkv)..(kv + 1) * (h / hkv) {
                let at_q = dims.q(row, head);
                let mut grad_q = vec![0.0; tq * d];
                // SAFETY: the dimensions were checked; each task writes its own heads.
                unsafe {
                    let (k, v) = (Head::of(ks, at_k, hkv * d), Head::of(vs, at_k, hkv * d));
                    let (q, g) = (Head::of(qs, at_q, h * d), Head::of(gs, at_q, h * d));
                    shape.backward(q, k, v, g, [&mut grad_q, &mut grad_k, &mut grad_v]);
                    for (t, from) in grad_q.chunks_exact(d).enumerate() {
                        out_q.slice(at_q + t * h * d, d).copy_from_slice(from);
                    }
                }
            }
            for (out, grad) in [(out_k, &grad_k), (out_v, &grad_v)] {
                for (t, from) in grad.chunks_exact(d).enumerate() {
                    // SAFETY: as above.
                    unsafe { out.slice(at_k + t * hkv * d, d) }.copy_from_slice(from);
                }
            }
        });
        let [out_q, out_k, out_v] = out;
        Ok((
            Some(Tensor::from_vec(out_q, q.shape(), q.device())?),
            Some(Tensor::from_vec(out_k, k.shape(), k.device())?),
            Some(Tensor::from_vec(out_v, v.shape(), v.device())?),
        ))
    }
}
