//! Rotary position embedding: a rotation, whose gradient is turned back by the same angles.

use super::{
    node1,
    norm::{rms_norm, widen},
};
use crate::tensor::Rotation;
use candle_core::{Result, Tensor};

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
///
/// Candle's kernel rotates `(B, heads, tokens, D)`; with the heads of a token counted as tokens of the same angles, it
/// rotates `(B, T, H, D)` as it is.
pub(super) fn turn(x: &Tensor, cos: &Tensor, sin: &Tensor, rotation: Rotation) -> Result<Tensor> {
    let (b, t, h, d) = x.dims4()?;
    let wide = widen(x)?.contiguous()?.reshape((b, 1, t * h, d))?;
    let angle = |a: &Tensor| -> Result<Tensor> {
        let mut shape = a.dims().to_vec(); // (T, D / 2) or (B, T, D / 2)
        let end = shape.len() - 1;
        shape.insert(end, h);
        let each = a.to_dtype(wide.dtype())?.unsqueeze(end)?.broadcast_as(shape.as_slice())?;
        each.contiguous()?.flatten(end - 1, end)
    };
    let rotate = match rotation {
        Rotation::Interleaved => candle_nn::rotary_emb::rope_i,
        Rotation::Half => candle_nn::rotary_emb::rope,
    };
    rotate(&wide, &angle(cos)?, &angle(sin)?)?.reshape((b, t, h, d))?.to_dtype(x.dtype())
}
