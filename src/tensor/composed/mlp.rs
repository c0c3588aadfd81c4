//! Element-wise parts of a transformer block.

use super::{
    node1, node3,
    norm::{sum_tokens, widen},
};
use candle_core::{D, Result, Tensor};

pub fn swiglu(x: &Tensor) -> Result<Tensor> {
    node1(x, value(&x.detach())?, |[x], _, grad| Ok([gradient(x, grad)?]))
}

pub fn gate_residual(x: &Tensor, gate: &Tensor, y: &Tensor) -> Result<Tensor> {
    let value = (x.detach() + y.detach().broadcast_mul(&gate.detach().unsqueeze(1)?)?)?;
    node3([x, gate, y], value, |[_, gate, y], _, grad| {
        let to_gate = sum_tokens(&(widen(grad)? * widen(y)?)?)?.to_dtype(gate.dtype())?;
        Ok([grad.clone(), to_gate, grad.broadcast_mul(&gate.unsqueeze(1)?)?])
    })
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
