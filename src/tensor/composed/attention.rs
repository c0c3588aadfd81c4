//! Attention by matrix products over blocks of queries; the backward pass computes the weights again, block by block, as
//! FlashAttention does (arXiv 2205.14135).

use super::{node3, norm::widen};
#[cfg(feature = "cuda")]
use crate::tensor::cuda;
use crate::tensor::{Mask, attention::Dims};
#[cfg(feature = "flash-attn")]
use candle_core::DType;
use candle_core::{D, Device, Result, Tensor};
use std::ops::Range;

/// Attention weights that exist at once, at most: a quarter of a GiB in half precision. Tests are small, and have several
/// blocks too.
const WEIGHTS: usize = if cfg!(test) { 1 << 13 } else { 1 << 27 };

pub fn attention(q: &Tensor, k: &Tensor, v: &Tensor, mask: &Mask) -> Result<Tensor> {
    let value = value(&q.detach(), &k.detach(), &v.detach(), mask)?;
    let mask = mask.clone();
    node3([q, k, v], value, move |[q, k, v], value, grad| gradients([q, k, v], value, grad, &mask))
}

/// The attention of tensors without a graph.
pub(super) fn value(q: &Tensor, k: &Tensor, v: &Tensor, mask: &Mask) -> Result<Tensor> {
    let shape = Dims::new(q.dims(), k.dims(), v.dims())?;
    #[cfg(feature = "flash-attn")]
    if let Some(value) = shape.flash(q, k, v, mask)? {
        return Ok(value);
    }
    #[cfg(feature = "cuda")]
    if let Some(value) = cuda::attention(q, k, v, mask)? {
        return Ok(value);
    }
    let bias = shape.bias(mask, q.device())?;
    let (q, k, v) = (shape.scaled(q)?, heads(k)?, heads(v)?);
    let mut parts = Vec::new();
    for block in shape.blocks() {
        parts.push(shape.ungrouped(&shape.weights(&q, &k, bias.as_ref(), block)?.matmul(&v)?, block.1)?);
    }
    let y = if parts.len() == 1 { parts.remove(0) } else { Tensor::cat(&parts, 2)? }; // (B, H, Tq, D)
    y.transpose(1, 2)?.contiguous()
}

/// With `P` the weights: `dV = P^T dO`, `dS = P (dO V^T - sum(dO O))`, `dQ = dS K` and `dK = dS^T Q`, scaled.
pub(super) fn gradients([q, k, v]: [&Tensor; 3], value: &Tensor, grad: &Tensor, mask: &Mask) -> Result<[Tensor; 3]> {
    let shape = Dims::new(q.dims(), k.dims(), v.dims())?;
    let bias = shape.bias(mask, q.device())?;
    let level = (widen(value)? * widen(grad)?)?.sum_keepdim(D::Minus1)?.to_dtype(q.dtype())?; // (B, Tq, H, 1)
    let (q, k, v) = (shape.scaled(q)?, heads(k)?, heads(v)?);
    let (grad, level) = (heads(grad)?, heads(&level)?);
    let mut to_q = Vec::new();
    let (mut to_k, mut to_v) = (None, None);
    let added = |sum: Option<Tensor>, part: Tensor| match sum {
        Some(sum) => sum + part,
        None => Ok(part),
    };
    for block in shape.blocks() {
        let p = shape.weights(&q, &k, bias.as_ref(), block)?; // (B, Hkv, G n, Tk)
        let (g, level) = (shape.grouped(&grad, block)?, shape.grouped(&level, block)?);
        to_v = Some(added(to_v, p.t()?.matmul(&g)?)?);
        let to_scores = scores_gradient(&p, &g.matmul(&v.t()?)?, &level)?;
        to_k = Some(added(to_k, to_scores.t()?.matmul(&shape.grouped(&q, block)?)?)?);
        to_q.push(shape.ungrouped(&to_scores.matmul(&k)?, block.1)?);
    }
    let (Some(to_k), Some(to_v)) = (to_k, to_v) else { candle_core::bail!("attention without queries") };
    let back = |x: &Tensor| x.transpose(1, 2)?.contiguous();
    Ok([(back(&Tensor::cat(&to_q, 2)?)? * shape.scale())?, back(&to_k)?, back(&to_v)?])
}

/// `P (dP - level)`.
fn scores_gradient(weights: &Tensor, grad: &Tensor, level: &Tensor) -> Result<Tensor> {
    #[cfg(feature = "cuda")]
    if let Some(gradient) = cuda::scores_backward(weights, grad, level)? {
        return Ok(gradient);
    }
    weights * grad.broadcast_sub(level)?
}

/// `(B, T, H, D)` to `(B, H, T, D)`.
fn heads(x: &Tensor) -> Result<Tensor> {
    x.transpose(1, 2)?.contiguous()
}

/// First query and number of queries.
type Block = (usize, usize);

impl Dims {
    fn scale(&self) -> f64 {
        (self.d as f64).powf(-0.5)
    }

    /// The queries, scaled as their products with keys are to be: `(B, H, Tq, D)`.
    fn scaled(&self, q: &Tensor) -> Result<Tensor> {
        heads(&(q * self.scale())?)
    }

    fn blocks(&self) -> impl Iterator<Item = Block> + use<> {
        let (tq, n) = (self.tq, (WEIGHTS / (self.b * self.h * self.tk).max(1)).max(1));
        (0..tq).step_by(n).map(move |from| (from, n.min(tq - from)))
    }

    /// A block of `(B, H, Tq, X)`: heads that share a key head, one after the other, `(B, Hkv, G n, X)`.
    fn grouped(&self, x: &Tensor, (from, n): Block) -> Result<Tensor> {
        x.narrow(2, from, n)?.contiguous()?.reshape((self.b, self.hkv, self.h / self.hkv * n, ()))
    }

    /// The inverse: `(B, H, n, X)`.
    fn ungrouped(&self, x: &Tensor, n: usize) -> Result<Tensor> {
        x.reshape((self.b, self.h, n, ()))
    }

    /// The attention weights of a block of queries, `(B, Hkv, G n, Tk)`.
    fn weights(&self, q: &Tensor, k: &Tensor, bias: Option<&Tensor>, block: Block) -> Result<Tensor> {
        let mut scores = self.grouped(q, block)?.matmul(&k.t()?)?;
        if let Some(bias) = bias {
            let (from, n) = block;
            let bias = bias.narrow(3, from, n)?.to_dtype(scores.dtype())?;
            let apart = scores.reshape((self.b, self.hkv, self.h / self.hkv, n, self.tk))?;
            scores = apart.broadcast_add(&bias)?.reshape(scores.dims())?;
        }
        candle_nn::ops::softmax_last_dim(&scores)
    }

    /// What is added to the scores, `(B or 1, 1, 1, Tq, Tk)`: 0 for keys that are seen, minus infinity for others; nothing if
    /// all are seen. A query that sees no key sees all of them, so that no padding row holds NaN.
    ///
    /// Made on the device, of the first and last keys of each row of the batch.
    fn bias(&self, mask: &Mask, device: &Device) -> Result<Option<Tensor>> {
        let Self { b, tq, tk, .. } = *self;
        let all = 0..tk;
        let keys = mask.keys.as_deref().unwrap_or(std::slice::from_ref(&all));
        let causal = mask.causal && tq > 1;
        if !causal && keys.iter().all(|keys| keys.start == 0 && keys.end >= tk) {
            return Ok(None);
        }
        let rows = keys.len();
        let column = |end: fn(&Range<usize>) -> usize| {
            Tensor::from_vec(keys.iter().map(|keys| end(keys) as f32).collect::<Vec<_>>(), (rows, 1), device)
        };
        let (mut starts, mut ends) = (column(|keys| keys.start)?, column(|keys| keys.end)?);
        if mask.causal {
            let first = tk as f32 - tq as f32 + 1.0;
            let seen = Tensor::arange(first, first + tq as f32, device)?.unsqueeze(0)?;
            (starts, ends) = (starts.broadcast_as((rows, tq))?, ends.broadcast_minimum(&seen)?);
        }
        let sees = starts.lt(&ends)?; // (rows, Tq or 1)
        starts = sees.where_cond(&starts.contiguous()?, &starts.zeros_like()?)?;
        ends = sees.where_cond(&ends, &Tensor::full(tk as f32, ends.shape(), device)?)?;
        let keys = Tensor::arange(0f32, tk as f32, device)?;
        let seen = (keys.broadcast_ge(&starts.unsqueeze(2)?)? * keys.broadcast_lt(&ends.unsqueeze(2)?)?)?;
        let number = |x: f32| Tensor::full(x, seen.shape(), device);
        let bias = seen.where_cond(&number(0.0)?, &number(f32::NEG_INFINITY)?)?;
        debug_assert!(rows == 1 || rows == b);
        bias.unsqueeze(1)?.unsqueeze(1)?.broadcast_as((rows, 1, 1, tq, tk)).map(Some)
    }
}

#[cfg(feature = "flash-attn")]
impl Dims {
    /// FlashAttention's own kernel, where it knows the device, the format and the mask.
    fn flash(&self, q: &Tensor, k: &Tensor, v: &Tensor, mask: &Mask) -> Result<Option<Tensor>> {
        let padded = mask.keys.as_ref().is_some_and(|keys| keys.iter().any(|keys| *keys != (0..self.tk)));
        let half = matches!(q.dtype(), DType::F16 | DType::BF16);
        if !q.device().is_cuda() || !half || padded || self.d > 256 || !self.d.is_multiple_of(8) {
            return Ok(None);
        }
        let (q, k, v) = (q.contiguous()?, k.contiguous()?, v.contiguous()?);
        candle_flash_attn::flash_attn(&q, &k, &v, self.scale() as f32, mask.causal).map(Some)
    }
}
