//! Normalisations.

use candle_core::{D, Result, Tensor};

/// `x / sqrt(mean(x^2) + eps) * weight` over the last dimension.
pub fn rms_norm(x: &Tensor, weight: &Tensor, eps: f64) -> Result<Tensor> {
    let scale = (x.sqr()?.mean_keepdim(D::Minus1)? + eps)?.sqrt()?.recip()?;
    x.broadcast_mul(&scale)?.broadcast_mul(weight)
}

fn standardise(x: &Tensor, eps: f64) -> Result<Tensor> {
    let x = x.broadcast_sub(&x.mean_keepdim(D::Minus1)?)?;
    let scale = (x.sqr()?.mean_keepdim(D::Minus1)? + eps)?.sqrt()?.recip()?;
    x.broadcast_mul(&scale)
}

/// Layer normalisation over the last dimension with an affine map.
pub fn layer_norm(x: &Tensor, weight: &Tensor, bias: &Tensor, eps: f64) -> Result<Tensor> {
    standardise(x, eps)?.broadcast_mul(weight)?.broadcast_add(bias)
}

/// `norm(x) * (1 + scale) + shift`, the adaptive layer norm of diffusion transformers: `x` is `(B, T, D)`, `shift` and
/// `scale` are `(B, D)`.
pub fn layer_norm_modulate(x: &Tensor, shift: &Tensor, scale: &Tensor, eps: f64) -> Result<Tensor> {
    let scale = (scale.unsqueeze(1)? + 1.0)?;
    standardise(x, eps)?.broadcast_mul(&scale)?.broadcast_add(&shift.unsqueeze(1)?)
}
