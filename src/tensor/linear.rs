//! Matrix products of a layer.

use candle_core::{Result, Tensor};

/// `x W^T + b`: `x` is `(.., in)`, `weight` is `(out, in)`, `bias` is `(out)`; the result is `(.., out)`.
pub fn linear(x: &Tensor, weight: &Tensor, bias: Option<&Tensor>) -> Result<Tensor> {
    let (out, inner) = weight.dims2()?;
    let mut shape = x.dims().to_vec();
    let y = x.reshape(((), inner))?.matmul(&weight.t()?)?;
    let y = match bias {
        Some(bias) => y.broadcast_add(bias)?,
        None => y,
    };
    if let Some(last) = shape.last_mut() {
        *last = out;
    }
    y.reshape(shape)
}
