//! SwiGLU.

use super::node1;
use candle_core::{D, Result, Tensor};

pub fn swiglu(x: &Tensor) -> Result<Tensor> {
    node1(x, value(&x.detach())?, |[x], _, grad| Ok([gradient(x, grad)?]))
}

fn halves(x: &Tensor) -> Result<(Tensor, Tensor)> {
    let half = x.dim(D::Minus1)? / 2;
    Ok((x.narrow(D::Minus1, 0, half)?, x.narrow(D::Minus1, half, half)?))
}

pub(super) fn value(x: &Tensor) -> Result<Tensor> {
    let (gate, up) = halves(x)?;
    gate.silu()? * up
}

pub(super) fn gradient(x: &Tensor, grad: &Tensor) -> Result<Tensor> {
    let (gate, up) = halves(x)?;
    let gate = gate.contiguous()?;
    let sigmoid = candle_nn::ops::sigmoid(&gate)?;
    let silu = (&gate * &sigmoid)?;
    // silu' = s + silu (1 - s)
    let slope = (&sigmoid + (&silu - (&silu * &sigmoid)?)?)?;
    Tensor::cat(&[((grad * up)? * slope)?, (grad * silu)?], D::Minus1)
}
