//! Element-wise parts of a transformer block.

use candle_core::{D, Result, Tensor};

/// `x * sigmoid(x)`.
pub fn silu(x: &Tensor) -> Result<Tensor> {
    x * (x.neg()?.exp()? + 1.0)?.recip()?
}

/// `silu(gate) * up`, where `x` holds `gate` then `up` along its last dimension: `(.., 2F)` to `(.., F)`.
pub fn swiglu(x: &Tensor) -> Result<Tensor> {
    let half = x.dim(D::Minus1)? / 2;
    silu(&x.narrow(D::Minus1, 0, half)?)? * x.narrow(D::Minus1, half, half)?
}

/// The exact Gaussian error linear unit.
pub fn gelu(x: &Tensor) -> Result<Tensor> {
    x.gelu_erf()
}

/// GELU by its tanh approximation (`gelu_pytorch_tanh`).
pub fn gelu_tanh(x: &Tensor) -> Result<Tensor> {
    x.gelu()
}

/// `x + gate * y`: `x` and `y` are `(B, T, D)`, `gate` is `(B, D)`.
pub fn gate_residual(x: &Tensor, gate: &Tensor, y: &Tensor) -> Result<Tensor> {
    x + y.broadcast_mul(&gate.unsqueeze(1)?)?
}
