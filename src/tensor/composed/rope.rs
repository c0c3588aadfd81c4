//! Rotary position embedding: a rotation, whose gradient is turned back by the same angles.

use super::{
    node1, node2,
    norm::{rms_gradients, rms_value, widen},
};
use crate::tensor::Rotation;
#[cfg(feature = "cuda")]
use crate::tensor::cuda;
use candle_core::{Result, Tensor};

pub fn rope(x: &Tensor, cos: &Tensor, sin: &Tensor, rotation: Rotation) -> Result<Tensor> {
    let turn = Turn::new(cos, sin, rotation);
    let value = turn.of(&x.detach())?;
    node1(x, value, move |_, _, grad| Ok([turn.back(grad)?]))
}

pub fn norm_rope(
    x: &Tensor,
    weight: &Tensor,
    eps: f64,
    cos: &Tensor,
    sin: &Tensor,
    rotation: Rotation,
) -> Result<Tensor> {
    let turn = Turn::new(cos, sin, rotation);
    let value = turn.of_norm(&x.detach(), &weight.detach(), eps)?;
    node2([x, weight], value, move |[x, weight], _, grad| rms_gradients(x, weight, eps, &turn.back(grad)?))
}

/// Rotation by the same angles, of tensors without a graph.
pub(super) struct Turn {
    cos: Tensor,
    sin: Tensor,
    rotation: Rotation,
}

impl Turn {
    pub(super) fn new(cos: &Tensor, sin: &Tensor, rotation: Rotation) -> Self {
        Self { cos: cos.detach(), sin: sin.detach(), rotation }
    }

    fn of(&self, x: &Tensor) -> Result<Tensor> {
        #[cfg(feature = "cuda")]
        if let Some(value) = cuda::rotate(x, None, [&self.cos, &self.sin], self.rotation, false)? {
            return Ok(value);
        }
        turn(x, &self.cos, &self.sin, self.rotation)
    }

    /// Of the heads after an RMS norm.
    pub(super) fn of_norm(&self, x: &Tensor, weight: &Tensor, eps: f64) -> Result<Tensor> {
        #[cfg(feature = "cuda")]
        if let Some(value) = cuda::rotate(x, Some((weight, eps)), [&self.cos, &self.sin], self.rotation, false)? {
            return Ok(value);
        }
        self.of(&rms_value(x, weight, eps)?)
    }

    /// The other way.
    pub(super) fn back(&self, x: &Tensor) -> Result<Tensor> {
        #[cfg(feature = "cuda")]
        if let Some(value) = cuda::rotate(x, None, [&self.cos, &self.sin], self.rotation, true)? {
            return Ok(value);
        }
        turn(x, &self.cos, &self.sin.neg()?, self.rotation)
    }
}

/// In f32 where `x` is in half precision, as the reference implementations rotate.
///
/// Candle's kernel rotates `(B, heads, tokens, D)`; with the heads of a token counted as tokens of the same angles, it
/// rotates `(B, T, H, D)` as it is.
fn turn(x: &Tensor, cos: &Tensor, sin: &Tensor, rotation: Rotation) -> Result<Tensor> {
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
