//! Normalisations over the last dimension. With `n` the normalised row and `s` the reciprocal deviation (or root mean
//! square), the gradient of a row is `s (g - mean(g) - n mean(g n))`, without `mean(g)` where no mean was taken away.

use super::{linear, node2, node3};
#[cfg(feature = "cuda")]
use crate::tensor::cuda;
use candle_core::{D, DType, Result, Tensor};

/// `x` in f32 where it is in half precision, whose sums of squares overflow and whose angles are coarse.
pub fn widen(x: &Tensor) -> Result<Tensor> {
    match x.dtype() {
        DType::F16 | DType::BF16 => x.to_dtype(DType::F32),
        _ => Ok(x.clone()),
    }
}

/// What candle's fused norms know.
fn has_kernel(x: &Tensor) -> bool {
    x.dtype() != DType::F64
}

/// `1 / sqrt(mean(x^2) + eps)` of each row.
fn inverse_rms(x: &Tensor, eps: f64) -> Result<Tensor> {
    (x.sqr()?.mean_keepdim(D::Minus1)? + eps)?.sqrt()?.recip()
}

pub fn rms_norm(x: &Tensor, weight: &Tensor, eps: f64) -> Result<Tensor> {
    let value = rms_value(&x.detach(), &weight.detach(), eps)?;
    node2([x, weight], value, move |[x, weight], _, grad| rms_gradients(x, weight, eps, grad))
}

pub(super) fn rms_value(x: &Tensor, weight: &Tensor, eps: f64) -> Result<Tensor> {
    if has_kernel(x) {
        return candle_nn::ops::rms_norm(&x.contiguous()?, &weight.contiguous()?, eps as f32);
    }
    x.broadcast_mul(&inverse_rms(x, eps)?)?.broadcast_mul(weight)
}

pub(super) fn rms_gradients(x: &Tensor, weight: &Tensor, eps: f64, grad: &Tensor) -> Result<[Tensor; 2]> {
    #[cfg(feature = "cuda")]
    if let Some([to_x, parts]) = cuda::rms_backward(x, weight, eps, grad)? {
        return Ok([to_x, linear::sum_rows(&parts)?]);
    }
    let (wide, g) = (widen(x)?, widen(grad)?);
    let scale = inverse_rms(&wide, eps)?;
    let n = wide.broadcast_mul(&scale)?;
    let to_weight = linear::sum_rows(&linear::rows(&(&g * &n)?)?)?;
    let g = g.broadcast_mul(&widen(weight)?)?;
    let along = (&g * &n)?.mean_keepdim(D::Minus1)?;
    let to_x = (g - n.broadcast_mul(&along)?)?.broadcast_mul(&scale)?;
    Ok([to_x.to_dtype(x.dtype())?, to_weight.to_dtype(weight.dtype())?])
}

/// `(x - mean) / sqrt(variance + eps)`, without a graph.
fn standard(x: &Tensor, eps: f64) -> Result<Tensor> {
    let x = x.contiguous()?;
    if has_kernel(&x) {
        let d = x.dim(D::Minus1)?;
        let (one, zero) = (Tensor::ones(d, x.dtype(), x.device())?, Tensor::zeros(d, x.dtype(), x.device())?);
        candle_nn::ops::layer_norm(&x, &one, &zero, eps as f32)
    } else {
        let x = centred(&x)?;
        x.broadcast_mul(&inverse_rms(&x, eps)?)
    }
}

/// The gradient of a standardised row `n`, which was scaled by `scale`.
fn standard_gradient(n: &Tensor, scale: &Tensor, grad: &Tensor) -> Result<Tensor> {
    let along = (grad * n)?.mean_keepdim(D::Minus1)?;
    (centred(grad)? - n.broadcast_mul(&along)?)?.broadcast_mul(scale)
}

fn centred(x: &Tensor) -> Result<Tensor> {
    x.broadcast_sub(&x.mean_keepdim(D::Minus1)?)
}

pub fn layer_norm(x: &Tensor, weight: &Tensor, bias: &Tensor, eps: f64) -> Result<Tensor> {
    if has_kernel(x) && ![x, weight, bias].iter().any(|t| t.track_op()) {
        return candle_nn::ops::layer_norm(&x.contiguous()?, &weight.contiguous()?, &bias.contiguous()?, eps as f32);
    }
    let d = weight.dim(0)?;
    let rows = x.reshape((1, (), d))?;
    layer_norm_modulate(&rows, &bias.unsqueeze(0)?, &(weight - 1.0)?.unsqueeze(0)?, eps)?.reshape(x.shape())
}

pub fn layer_norm_modulate(x: &Tensor, shift: &Tensor, scale: &Tensor, eps: f64) -> Result<Tensor> {
    let value = modulated(&x.detach(), &shift.detach(), &scale.detach(), eps)?;
    node3([x, shift, scale], value, move |[x, _, scale], _, grad| {
        #[cfg(feature = "cuda")]
        if let Some([to_x, to_scale]) = cuda::modulate_backward(x, scale, eps, grad)? {
            return Ok([to_x, sum_tokens(grad)?, sum_tokens(&to_scale)?]);
        }
        let (wide, g) = (centred(&widen(x)?)?, widen(grad)?);
        let deviation = inverse_rms(&wide, eps)?;
        let n = wide.broadcast_mul(&deviation)?;
        let (to_shift, to_scale) = (sum_tokens(&g)?, sum_tokens(&(&g * &n)?)?);
        let g = g.broadcast_mul(&(widen(scale)?.unsqueeze(1)? + 1.0)?)?;
        let to_x = standard_gradient(&n, &deviation, &g)?;
        let dtype = x.dtype();
        Ok([to_x.to_dtype(dtype)?, to_shift.to_dtype(dtype)?, to_scale.to_dtype(dtype)?])
    })
}

fn modulated(x: &Tensor, shift: &Tensor, scale: &Tensor, eps: f64) -> Result<Tensor> {
    #[cfg(feature = "cuda")]
    if let Some(value) = cuda::modulate(x, shift, scale, eps)? {
        return Ok(value);
    }
    standard(x, eps)?.broadcast_mul(&(scale.unsqueeze(1)? + 1.0)?)?.broadcast_add(&shift.unsqueeze(1)?)
}

/// The sum over the tokens of `x (B, T, D)`, `(B, D)`.
pub(super) fn sum_tokens(x: &Tensor) -> Result<Tensor> {
    let (b, t, _) = x.dims3()?;
    Tensor::ones((b, 1, t), x.dtype(), x.device())?.matmul(x)?.squeeze(1)
}
