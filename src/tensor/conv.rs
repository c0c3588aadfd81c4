//! Convolution and upsampling of `(B, C, H, W)`.

use candle_core::{Result, Tensor};

/// Convolution with `weight` of `(out, in, k, k)` and `bias` of `(out)`. `padding` is (top and left, bottom and right),
/// which differ where a stride-2 convolution pads one side only.
pub fn conv2d(x: &Tensor, weight: &Tensor, bias: &Tensor, stride: usize, padding: (usize, usize)) -> Result<Tensor> {
    let x = x.pad_with_zeros(2, padding.0, padding.1)?.pad_with_zeros(3, padding.0, padding.1)?;
    let y = x.conv2d(weight, 0, stride, 1, 1)?;
    y.broadcast_add(&bias.reshape((1, (), 1, 1))?)
}

/// Nearest-neighbour upsampling by two.
pub fn upsample2x(x: &Tensor) -> Result<Tensor> {
    let (b, c, h, w) = x.dims4()?;
    x.reshape((b, c, h, 1, w, 1))?.broadcast_as((b, c, h, 2, w, 2))?.reshape((b, c, 2 * h, 2 * w))
}
