//! Rotary position embedding: a rotation, whose gradient is turned back by the same angles.

use super::{
    node1,
    norm::{rms_norm, widen},
};
use crate::tensor::Rotation;
use candle_core::{D, Result, Tensor};

pub fn rope(x: &Tensor, cos: &Tensor, sin: &Tensor, rotation: Rotation) -> Result<Tensor> {
    let (cos, sin) = (cos.detach(), sin.detach());
    let value = turn(&x.detach(), &cos, &sin, rotation)?;
    node1(x, value, move |_, _, grad| Ok([turn(grad, &cos, &sin.neg()?, rotation)?]))
}

pub fn norm_rope(
    x: &Tensor,
    weight: &Tensor,
    eps: f64,
    cos: &Tensor,
    sin: &Tensor,
    rotation: Rotation,
) -> Result<Tensor> {
    rope(&rms_norm(x, weight, eps)?, cos, sin, rotation)
}

/// In f32 where `x` is in half precision, as the reference implementations rotate.
pub(super) fn turn(x: &Tensor, cos: &Tensor, sin: &Tensor, rotation: Rotation) -> Result<Tensor> {
    let (b, t, h, d) = x.dims4()?;
    let dtype = x.dtype();
    let x = widen(x)?;
    let angle = |a: &Tensor| a.to_dtype(x.dtype())?.unsqueeze(D::Minus2);
    let (cos, sin) = (angle(cos)?, angle(sin)?);
    let turn = |a: &Tensor, b: &Tensor| -> Result<(Tensor, Tensor)> {
        let first = (a.broadcast_mul(&cos)? - b.broadcast_mul(&sin)?)?;
        let second = (a.broadcast_mul(&sin)? + b.broadcast_mul(&cos)?)?;
        Ok((first, second))
    };
    let y = match rotation {
        Rotation::Interleaved => {
            let pairs = x.reshape((b, t, h, d / 2, 2))?;
            let (first, second) = turn(&pairs.narrow(4, 0, 1)?.squeeze(4)?, &pairs.narrow(4, 1, 1)?.squeeze(4)?)?;
            Tensor::stack(&[first, second], 4)?.reshape((b, t, h, d))
        }
        Rotation::Half => {
            let (first, second) = turn(&x.narrow(3, 0, d / 2)?, &x.narrow(3, d / 2, d / 2)?)?;
            Tensor::cat(&[first, second], 3)
        }
    };
    y?.to_dtype(dtype)
}
