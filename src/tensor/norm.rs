//! Normalisations over the last dimension.

use super::{composed, cpu};
use candle_core::{CpuStorage, CustomOp2, CustomOp3, Layout, Result, Shape, Tensor};

/// `x / sqrt(mean(x^2) + eps) * weight` over the last dimension.
pub fn rms_norm(x: &Tensor, weight: &Tensor, eps: f64) -> Result<Tensor> {
    if cpu::fused(&[x, weight]) {
        return x.contiguous()?.apply_op2(&weight.contiguous()?, RmsNorm(eps as f32));
    }
    composed::rms_norm(x, weight, eps)
}

/// Layer normalisation over the last dimension with an affine map.
pub fn layer_norm(x: &Tensor, weight: &Tensor, bias: &Tensor, eps: f64) -> Result<Tensor> {
    if cpu::fused(&[x, weight, bias]) {
        let op = LayerNorm { eps: eps as f32, modulate: false };
        return x.contiguous()?.apply_op3(&bias.contiguous()?, &weight.contiguous()?, op);
    }
    composed::layer_norm(x, weight, bias, eps)
}

/// `norm(x) * (1 + scale) + shift`, the adaptive layer norm of diffusion transformers: `x` is `(B, T, D)`, `shift` and
/// `scale` are `(B, D)`.
pub fn layer_norm_modulate(x: &Tensor, shift: &Tensor, scale: &Tensor, eps: f64) -> Result<Tensor> {
    if cpu::fused(&[x, shift, scale]) {
        let op = LayerNorm { eps: eps as f32, modulate: true };
        return x.contiguous()?.apply_op3(&shift.contiguous()?, &scale.contiguous()?, op);
    }
    composed::layer_norm_modulate(x, shift, scale, eps)
}

/// `1 / sqrt(mean(x^2) + eps)`.
#[inline]
pub(super) fn inverse_rms(x: &[f32], eps: f32) -> f32 {
    1.0 / (cpu::dot(x, x) / x.len() as f32 + eps).sqrt()
}

/// The gradient of `x * r * weight`, `r` the inverse root mean square of `x`; adds the weight's to `grad_weight`.
#[inline]
pub(super) fn rms_row_backward(
    x: &[f32],
    weight: &[f32],
    grad: &[f32],
    eps: f32,
    out: &mut [f32],
    grad_weight: &mut [f32],
) {
    let r = inverse_rms(x, eps);
    let mut along = 0.0;
    for (((o, &g), &w), (&x, gw)) in out.iter_mut().zip(grad).zip(weight).zip(x.iter().zip(grad_weight)) {
        *gw = cpu::fma(g, x * r, *gw);
        *o = g * w;
    }
    along += cpu::dot(out, x);
    let pull = along * r * r * r / x.len() as f32;
    for (o, &x) in out.iter_mut().zip(x) {
        *o = cpu::fma(*o, r, -pull * x);
    }
}

struct RmsNorm(f32);

impl CustomOp2 for RmsNorm {
    fn name(&self) -> &'static str {
        "rms-norm"
    }

    fn cpu_fwd(&self, x: &CpuStorage, xl: &Layout, w: &CpuStorage, wl: &Layout) -> Result<(CpuStorage, Shape)> {
        let (x, w) = (cpu::slice(x, xl)?, cpu::slice(w, wl)?);
        let d = w.len();
        if xl.dims().last() != Some(&d) {
            candle_core::bail!("rms-norm over {d} got {:?}", xl.shape());
        }
        let mut out = vec![0.0; x.len()];
        cpu::rows(&mut out, d, |row, out| {
            let x = &x[row * d..][..d];
            let r = inverse_rms(x, self.0);
            for ((o, &x), &w) in out.iter_mut().zip(x).zip(w) {
                *o = x * r * w;
            }
        });
        Ok((CpuStorage::F32(out), xl.shape().clone()))
    }

    fn bwd(&self, x: &Tensor, w: &Tensor, _: &Tensor, grad: &Tensor) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let grad = grad.contiguous()?;
        let (values, weight, g) = (cpu::floats(x)?, cpu::floats(w)?, cpu::floats(&grad)?);
        let d = weight.len();
        let mut out = vec![0.0; values.len()];
        let shared = cpu::Shared::new(&mut out);
        let grad_w = cpu::sum_rows(values.len() / d, d, 128, |row, sum| {
            // SAFETY: each row is written once.
            let out = unsafe { shared.slice(row * d, d) };
            rms_row_backward(&values[row * d..][..d], &weight, &g[row * d..][..d], self.0, out, sum);
        });
        Ok((Some(Tensor::from_vec(out, x.shape(), x.device())?), Some(Tensor::from_vec(grad_w, d, w.device())?)))
    }
}

/// `norm(x) * scale + shift` by row; with `modulate` it is `1 + scale`, and each batch element has its own.
struct LayerNorm {
    eps: f32,
    modulate: bool,
}

impl LayerNorm {
    /// Rows that share one shift and scale, and how many times these occur.
    fn groups(&self, dims: &[usize], affine: &[usize]) -> Result<(usize, usize, usize)> {
        let rows = dims.iter().rev().skip(1).product::<usize>();
        match (dims, affine) {
            (&[b, t, d], &[b2, d2]) if self.modulate && b == b2 && d == d2 => Ok((b, t, d)),
            (&[.., d], &[d2]) if !self.modulate && d == d2 => Ok((1, rows, d)),
            _ => candle_core::bail!("layer norm got {dims:?} and {affine:?}"),
        }
    }

    fn moments(&self, x: &[f32]) -> (f32, f32) {
        let n = x.len() as f32;
        let mean = cpu::sum(x) / n;
        let (whole, rest) = x.as_chunks();
        let squares = cpu::lanes(whole, whole, |sum, x, _| cpu::fma(x - mean, x - mean, sum));
        let rest: f32 = rest.iter().map(|x| (x - mean) * (x - mean)).sum();
        let variance = (squares + rest) / n;
        (mean, 1.0 / (variance + self.eps).sqrt())
    }
}

impl CustomOp3 for LayerNorm {
    fn name(&self) -> &'static str {
        "layer-norm"
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        xl: &Layout,
        shift: &CpuStorage,
        shift_layout: &Layout,
        scale: &CpuStorage,
        scale_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let (_, t, d) = self.groups(xl.dims(), scale_layout.dims())?;
        let (x, scale) = (cpu::slice(x, xl)?, cpu::slice(scale, scale_layout)?);
        let shift = cpu::slice(shift, shift_layout)?;
        let one = if self.modulate { 1.0 } else { 0.0 };
        let mut out = vec![0.0; x.len()];
        cpu::rows(&mut out, d, |row, out| {
            let x = &x[row * d..][..d];
            let group = row / t * d;
            let (mean, r) = self.moments(x);
            for (((o, &x), &shift), &scale) in out.iter_mut().zip(x).zip(&shift[group..]).zip(&scale[group..]) {
                *o = cpu::fma((x - mean) * r, one + scale, shift);
            }
        });
        Ok((CpuStorage::F32(out), xl.shape().clone()))
    }

    fn bwd(
        &self,
        x: &Tensor,
        shift: &Tensor,
        scale: &Tensor,
        _: &Tensor,
        grad: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let grad = grad.contiguous()?;
        let (values, s, g) = (cpu::floats(x)?, cpu::floats(scale)?, cpu::floats(&grad)?);
        let (groups, t, d) = self.groups(x.dims(), scale.dims())?;
        let one = if self.modulate { 1.0 } else { 0.0 };
        let mut out = vec![0.0; values.len()];
        let shared = cpu::Shared::new(&mut out);
        // Sums of one group are cut into blocks of rows, so that an affine norm runs in parallel as well.
        let block = if self.modulate { t } else { 128 };
        let mut affine = vec![0.0; groups * 2 * d];
        cpu::rows(&mut affine, 2 * d, |group, sums| {
            let total = cpu::sum_rows(t, 2 * d, block, |row, sums| {
                let (sum_shift, sum_scale) = sums.split_at_mut(d);
                let row = group * t + row;
                let (x, g, s) = (&values[row * d..][..d], &g[row * d..][..d], &s[group * d..][..d]);
                // SAFETY: each row is written once.
                let out = unsafe { shared.slice(row * d, d) };
                let (mean, r) = self.moments(x);
                for i in 0..d {
                    sum_shift[i] += g[i];
                    sum_scale[i] = cpu::fma(g[i], (x[i] - mean) * r, sum_scale[i]);
                    out[i] = g[i] * (one + s[i]);
                }
                let n = d as f32;
                let level = cpu::sum(out) / n;
                let along = (cpu::dot(out, x) - mean * level * n) * r * r / n;
                for (o, &x) in out.iter_mut().zip(x) {
                    *o = (*o - level - (x - mean) * along) * r;
                }
            });
            sums.copy_from_slice(&total);
        });
        let part = |offset: usize| -> Result<Tensor> {
            let values: Vec<f32> = affine.chunks_exact(2 * d).flat_map(|c| c[offset..offset + d].to_vec()).collect();
            Tensor::from_vec(values, scale.shape(), scale.device())
        };
        let grad_x = Tensor::from_vec(out, x.shape(), x.device())?;
        debug_assert_eq!(shift.dims(), scale.dims());
        Ok((Some(grad_x), Some(part(0)?), Some(part(d)?)))
    }
}
