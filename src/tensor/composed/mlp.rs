//! Element-wise parts of a transformer block.

use super::{
    node1, node3,
    norm::{sum_tokens, widen},
};
#[cfg(feature = "cuda")]
use crate::tensor::cuda;
use candle_core::{D, Result, Tensor};

pub fn swiglu(x: &Tensor) -> Result<Tensor> {
    node1(x, value(&x.detach(), 0)?, |[x], _, grad| Ok([gradient(x, 0, grad)?]))
}

pub fn gelu_tanh(x: &Tensor) -> Result<Tensor> {
    node1(x, x.detach().gelu()?, |[x], _, grad| {
        #[cfg(feature = "cuda")]
        if let Some(gradient) = cuda::gelu_tanh_backward(x, grad)? {
            return Ok([gradient]);
        }
        // s + x s (1 - s) u' with s = sigmoid(u), u = k (x + c x^3), as (1 + tanh(u / 2)) / 2 = s
        let (k, c) = (2.0 * (2.0 / std::f64::consts::PI).sqrt(), 0.044_715);
        let (wide, grad) = (widen(x)?, widen(grad)?);
        let square = wide.sqr()?;
        let s = candle_nn::ops::sigmoid(&((&wide * ((&square * c)? + 1.0)?)? * k)?)?;
        let slope = ((square * (3.0 * c * k))? + k)?;
        let inner = ((&wide * (&s - s.sqr()?)?)? * slope)?;
        Ok([(grad * (s + inner)?)?.to_dtype(x.dtype())?])
    })
}

pub fn gate_residual(x: &Tensor, gate: &Tensor, y: &Tensor) -> Result<Tensor> {
    let value = gated(&x.detach(), &gate.detach(), &y.detach())?;
    node3([x, gate, y], value, |[_, gate, y], _, grad| {
        #[cfg(feature = "cuda")]
        if let Some([to_y, to_gate]) = cuda::gate_backward(gate, y, grad)? {
            return Ok([grad.clone(), sum_tokens(&to_gate)?, to_y]);
        }
        let to_gate = sum_tokens(&(widen(grad)? * widen(y)?)?)?.to_dtype(gate.dtype())?;
        Ok([grad.clone(), to_gate, grad.broadcast_mul(&gate.unsqueeze(1)?)?])
    })
}

fn gated(x: &Tensor, gate: &Tensor, y: &Tensor) -> Result<Tensor> {
    #[cfg(feature = "cuda")]
    if let Some(value) = cuda::gate(x, gate, y)? {
        return Ok(value);
    }
    x + y.broadcast_mul(&gate.unsqueeze(1)?)?
}

/// Gate and up: the two halves of the columns of `x` from `from` on.
fn halves(x: &Tensor, from: usize) -> Result<(Tensor, Tensor)> {
    let half = (x.dim(D::Minus1)? - from) / 2;
    Ok((x.narrow(D::Minus1, from, half)?, x.narrow(D::Minus1, from + half, half)?))
}

/// SwiGLU of the columns of `x` from `from` on.
pub(super) fn value(x: &Tensor, from: usize) -> Result<Tensor> {
    #[cfg(feature = "cuda")]
    if let Some(value) = cuda::swiglu(x, from)? {
        return Ok(value);
    }
    let (gate, up) = halves(x, from)?;
    gate.silu()? * up
}

/// The gradient of those columns; that of the result is in the last columns of `grad`.
pub(super) fn gradient(x: &Tensor, from: usize, grad: &Tensor) -> Result<Tensor> {
    #[cfg(feature = "cuda")]
    if let Some(gradient) = cuda::swiglu_backward(x, from, grad)? {
        return Ok(gradient);
    }
    let (gate, up) = halves(x, from)?;
    let half = gate.dim(D::Minus1)?;
    let grad = &grad.narrow(D::Minus1, grad.dim(D::Minus1)? - half, half)?;
    let gate = gate.contiguous()?;
    let sigmoid = candle_nn::ops::sigmoid(&gate)?;
    let silu = (&gate * &sigmoid)?;
    // silu' = s + silu (1 - s)
    let slope = (&sigmoid + (&silu - (&silu * &sigmoid)?)?)?;
    Tensor::cat(&[((grad * up)? * slope)?, (grad * silu)?], D::Minus1)
}
