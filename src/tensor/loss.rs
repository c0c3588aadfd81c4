//! Losses.

use candle_core::{D, Result, Tensor};

/// Cross entropy of each token: `logits` is `(N, V)`, `targets` is `(N)` of `u32`; the result is `(N)` and not averaged.
pub fn cross_entropy(logits: &Tensor, targets: &Tensor) -> Result<Tensor> {
    let shifted = logits.broadcast_sub(&logits.detach().max_keepdim(D::Minus1)?)?;
    let normaliser = shifted.exp()?.sum(D::Minus1)?.log()?;
    normaliser - shifted.gather(&targets.unsqueeze(1)?, 1)?.squeeze(1)?
}
