//! Group normalisation of `(B, C, H, W)`.

use candle_core::{D, Result, Tensor};

/// Group normalisation of `(B, C, H, W)` with `weight` and `bias` of `(C)`, followed by SiLU if `silu`.
pub fn group_norm(x: &Tensor, groups: usize, weight: &Tensor, bias: &Tensor, eps: f64, silu: bool) -> Result<Tensor> {
    let (b, c, h, w) = x.dims4()?;
    let y = {
        let x = x.reshape((b, groups, ()))?;
        let x = x.broadcast_sub(&x.mean_keepdim(D::Minus1)?)?;
        x.broadcast_mul(&(x.sqr()?.mean_keepdim(D::Minus1)? + eps)?.sqrt()?.recip()?)?.reshape((b, c, h, w))?
    };
    let y = y.broadcast_mul(&weight.reshape((1, c, 1, 1))?)?.broadcast_add(&bias.reshape((1, c, 1, 1))?)?;
    if silu { super::silu(&y) } else { Ok(y) }
}
