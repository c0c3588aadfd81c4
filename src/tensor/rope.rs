//! Rotary position embedding.

use candle_core::{D, Result, Tensor};

/// Which two numbers of a head form a pair that is rotated together.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rotation {
    /// Neighbours `(2i, 2i + 1)`, as FLUX does.
    Interleaved,
    /// `(i, i + D/2)`, as Qwen does.
    Half,
}

/// Rotates `x` of `(B, T, H, D)` by the angles whose cosines and sines are `cos` and `sin`, each `(T, D/2)`, or
/// `(B, T, D/2)` where positions differ within a batch. No gradient flows to the angles.
pub fn rope(x: &Tensor, cos: &Tensor, sin: &Tensor, rotation: Rotation) -> Result<Tensor> {
    let (_, _, _, d) = x.dims4()?;
    let (cos, sin) = (cos.unsqueeze(D::Minus2)?, sin.unsqueeze(D::Minus2)?);
    let turn = |a: &Tensor, b: &Tensor| -> Result<(Tensor, Tensor)> {
        let first = (a.broadcast_mul(&cos)? - b.broadcast_mul(&sin)?)?;
        let second = (a.broadcast_mul(&sin)? + b.broadcast_mul(&cos)?)?;
        Ok((first, second))
    };
    match rotation {
        Rotation::Interleaved => {
            let (b, t, h, _) = x.dims4()?;
            let pairs = x.reshape((b, t, h, d / 2, 2))?;
            let (first, second) = turn(&pairs.narrow(4, 0, 1)?.squeeze(4)?, &pairs.narrow(4, 1, 1)?.squeeze(4)?)?;
            Tensor::stack(&[first, second], 4)?.reshape((b, t, h, d))
        }
        Rotation::Half => {
            let (first, second) = turn(&x.narrow(3, 0, d / 2)?, &x.narrow(3, d / 2, d / 2)?)?;
            Tensor::cat(&[first, second], 3)
        }
    }
}
