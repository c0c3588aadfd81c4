//! Group normalisation (arXiv 1803.08494) of `(B, C, H, W)`, with the SiLU that follows it in a residual block.

use super::cpu;
use candle_core::{CpuStorage, CustomOp3, D, Layout, Result, Shape, Tensor, bail};
use rayon::prelude::*;

/// Group normalisation of `(B, C, H, W)` with `weight` and `bias` of `(C)`, followed by SiLU if `silu`.
pub fn group_norm(x: &Tensor, groups: usize, weight: &Tensor, bias: &Tensor, eps: f64, silu: bool) -> Result<Tensor> {
    if cpu::fused(&[x, weight, bias]) {
        let op = GroupNorm { groups, eps, silu };
        return x.contiguous()?.apply_op3(&weight.contiguous()?, &bias.contiguous()?, op);
    }
    #[cfg(feature = "cuda")]
    if ![x, weight, bias].iter().any(|tensor| tensor.track_op())
        && let Some(value) = super::cuda::group_norm(x, groups, weight, bias, eps, silu)?
    {
        return Ok(value);
    }
    composed(x, groups, weight, bias, eps, silu)
}

fn composed(x: &Tensor, groups: usize, weight: &Tensor, bias: &Tensor, eps: f64, silu: bool) -> Result<Tensor> {
    let (b, c, h, w) = x.dims4()?;
    let y = x.reshape((b, groups, ()))?;
    let y = y.broadcast_sub(&y.mean_keepdim(D::Minus1)?)?;
    let scale = (y.sqr()?.mean_keepdim(D::Minus1)? + eps)?.sqrt()?.recip()?;
    let y = y.broadcast_mul(&scale)?.reshape((b, c, h, w))?;
    let y = y.broadcast_mul(&weight.reshape((1, c, 1, 1))?)?.broadcast_add(&bias.reshape((1, c, 1, 1))?)?;
    if silu { super::silu(&y) } else { Ok(y) }
}

#[derive(Clone, Copy)]
struct GroupNorm {
    groups: usize,
    eps: f64,
    silu: bool,
}

impl GroupNorm {
    /// Channels and pixels of one group.
    fn sizes(&self, x: &Shape, weight: &Shape) -> Result<(usize, usize)> {
        let (_, c, h, w) = x.dims4()?;
        if self.groups == 0 || c % self.groups != 0 || weight.dims() != [c] || h * w == 0 {
            bail!("group_norm: {x:?} in {} groups with a weight of {weight:?}", self.groups);
        }
        Ok((c / self.groups, h * w))
    }

    /// Mean and reciprocal deviation of one group.
    fn statistics(&self, x: &[f32]) -> (f32, f32) {
        let mean = cpu::sum(x) / x.len() as f32;
        let (whole, rest) = x.as_chunks();
        let square = |x: f32| (x - mean) * (x - mean);
        let squares = cpu::lanes(whole, whole, |sum, x, _| sum + square(x));
        let var = (squares + rest.iter().map(|x| square(*x)).sum::<f32>()) / x.len() as f32;
        (mean, (f64::from(var) + self.eps).sqrt().recip() as f32)
    }
}

impl CustomOp3 for GroupNorm {
    fn name(&self) -> &'static str {
        "group_norm"
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        x_layout: &Layout,
        weight: &CpuStorage,
        weight_layout: &Layout,
        bias: &CpuStorage,
        bias_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let (channels, pixels) = self.sizes(x_layout.shape(), weight_layout.shape())?;
        let (x, weight, bias) =
            (cpu::slice(x, x_layout)?, cpu::slice(weight, weight_layout)?, cpu::slice(bias, bias_layout)?);
        let mut y = vec![0f32; x.len()];
        let size = channels * pixels;
        y.par_chunks_mut(size).zip(x.par_chunks(size)).enumerate().for_each(|(group, (y, x))| {
            let (mean, scale) = self.statistics(x);
            let first = group % self.groups * channels;
            for (c, (y, x)) in y.chunks_exact_mut(pixels).zip(x.chunks_exact(pixels)).enumerate() {
                let a = scale * weight[first + c];
                let b = bias[first + c] - mean * a;
                for (y, &x) in y.iter_mut().zip(x) {
                    let z = cpu::fma(x, a, b);
                    *y = if self.silu { z * cpu::sigmoid(z) } else { z };
                }
            }
        });
        Ok((CpuStorage::F32(y), x_layout.shape().clone()))
    }

    fn bwd(
        &self,
        x: &Tensor,
        weight: &Tensor,
        bias: &Tensor,
        _y: &Tensor,
        grad: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let grad = grad.contiguous()?;
        let (dx, dw, db) = self.backward(x, weight, bias, &grad)?;
        let (device, c) = (x.device(), weight.elem_count());
        Ok((
            Some(Tensor::from_vec(dx, x.shape(), device)?),
            Some(Tensor::from_vec(dw, c, device)?),
            Some(Tensor::from_vec(db, c, device)?),
        ))
    }
}

impl GroupNorm {
    /// With `n = (x - mean) s` and `z = n w + b`: `dz = dy silu'(z)`, `dw = sum dz n`, `db = sum dz` and
    /// `dx = s (dz w - mean(dz w) - n mean(dz w n))`, the means over the group.
    fn backward(
        &self,
        x: &Tensor,
        weight: &Tensor,
        bias: &Tensor,
        grad: &Tensor,
    ) -> Result<(Vec<f32>, Vec<f32>, Vec<f32>)> {
        let (channels, pixels) = self.sizes(x.shape(), weight.shape())?;
        let (x, weight, bias, grad) = (cpu::floats(x)?, cpu::floats(weight)?, cpu::floats(bias)?, cpu::floats(grad)?);
        let (x, weight, bias, grad): (&[f32], &[f32], &[f32], &[f32]) = (&x, &weight, &bias, &grad);
        let size = channels * pixels;
        let mut dx = vec![0f32; x.len()];
        // Of each group of each picture: dw then db of its channels.
        let mut partial = vec![0f32; x.len() / pixels * 2];
        dx.par_chunks_mut(size).zip(partial.par_chunks_mut(2 * channels)).enumerate().for_each(
            |(group, (dx, partial))| {
                let (x, grad) = (&x[group * size..][..size], &grad[group * size..][..size]);
                let (mean, scale) = self.statistics(x);
                let first = group % self.groups * channels;
                let (mut whole, mut along) = (0f32, 0f32);
                for c in 0..channels {
                    let (w, b) = (weight[first + c], bias[first + c]);
                    let range = c * pixels..(c + 1) * pixels;
                    let (x, grad, dz) = (&x[range.clone()], &grad[range.clone()], &mut dx[range]);
                    for ((dz, &x), &grad) in dz.iter_mut().zip(x).zip(grad) {
                        *dz = if self.silu {
                            let z = cpu::fma((x - mean) * scale, w, b);
                            let s = cpu::sigmoid(z);
                            grad * s * cpu::fma(z, 1.0 - s, 1.0)
                        } else {
                            grad
                        };
                    }
                    let db = cpu::sum(dz);
                    let dw = (cpu::dot(dz, x) - mean * db) * scale;
                    partial[c] = dw;
                    partial[channels + c] = db;
                    whole += db * w;
                    along += dw * w;
                }
                let (whole, along) = (whole / size as f32, along / size as f32);
                // dx = dz (s w) + x p + q
                let p = -along * scale * scale;
                let q = -whole * scale - p * mean;
                for (c, (dx, x)) in dx.chunks_exact_mut(pixels).zip(x.chunks_exact(pixels)).enumerate() {
                    let a = scale * weight[first + c];
                    for (dx, &x) in dx.iter_mut().zip(x) {
                        *dx = cpu::fma(*dx, a, cpu::fma(x, p, q));
                    }
                }
            },
        );
        let c = channels * self.groups;
        let (mut dw, mut db) = (vec![0f32; c], vec![0f32; c]);
        for (group, partial) in partial.chunks_exact(2 * channels).enumerate() {
            let first = group % self.groups * channels;
            cpu::add(&mut dw[first..first + channels], &partial[..channels]);
            cpu::add(&mut db[first..first + channels], &partial[channels..]);
        }
        Ok((dx, dw, db))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tensor::tests::{agrees, draw};

    #[test]
    fn normalisation() {
        for (b, c, groups, h, w, silu) in [(2, 6, 3, 5, 7, true), (3, 8, 2, 4, 4, false), (1, 16, 8, 20, 20, true)] {
            // Far from zero, where a variance by differences of squares would fail.
            let x = (draw("x", &[b, c, h, w]) + 3.0).unwrap();
            let inputs = [x, draw("weight", &[c]), draw("bias", &[c])];
            agrees("group_norm", &inputs, |x| group_norm(&x[0], groups, &x[1], &x[2], 1e-6, silu));
        }
    }

    #[test]
    fn groups_that_do_not_divide_the_channels_are_an_error() {
        let (x, one) = (draw("x", &[1, 6, 2, 2]), draw("weight", &[6]));
        assert!(group_norm(&x, 4, &one, &one, 1e-6, true).is_err());
    }
}
