//! Scaled dot-product attention.

use candle_core::{D, Result, Tensor};
use std::ops::Range;

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
        if self.causal { range.start..range.end.min(query + keys + 1 - queries) } else { range }
    }
}

/// `softmax(q k^T / sqrt(D)) v`: `q` is `(B, Tq, H, D)`, `k` and `v` are `(B, Tk, Hkv, D)` where `Hkv` divides `H` (grouped
/// queries share a key head); the result is `(B, Tq, H, D)`. A query that sees no key (padding) gets zeros.
pub fn attention(q: &Tensor, k: &Tensor, v: &Tensor, mask: &Mask) -> Result<Tensor> {
    let (b, tq, h, d) = q.dims4()?;
    let (_, tk, hkv, _) = k.dims4()?;
    let repeat = |x: &Tensor| -> Result<Tensor> {
        let x = x.transpose(1, 2)?.unsqueeze(2)?.broadcast_as((b, hkv, h / hkv, tk, d))?;
        x.reshape((b, h, tk, d))
    };
    let q = q.transpose(1, 2)?.contiguous()?;
    let (k, v) = (repeat(k)?, repeat(v)?);
    let mut scores = (q.matmul(&k.t()?)? * (d as f64).powf(-0.5))?; // (B, H, Tq, Tk)
    if *mask != Mask::default() {
        let mut bias = vec![f32::NEG_INFINITY; b * tq * tk];
        for row in 0..b {
            for query in 0..tq {
                let start = (row * tq + query) * tk;
                let visible = mask.visible(row, query, tq, tk);
                if visible.is_empty() {
                    bias[start..start + tk].fill(0.0); // no padding row may hold NaN
                } else {
                    bias[start + visible.start..start + visible.end].fill(0.0);
                }
            }
        }
        let bias = Tensor::from_vec(bias, (b, 1, tq, tk), q.device())?.to_dtype(q.dtype())?;
        scores = scores.broadcast_add(&bias)?;
    }
    let scores = scores.broadcast_sub(&scores.detach().max_keepdim(D::Minus1)?)?.exp()?;
    let weights = scores.broadcast_div(&scores.sum_keepdim(D::Minus1)?)?;
    weights.matmul(&v)?.transpose(1, 2)?.contiguous()
}
