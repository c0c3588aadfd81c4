//! A layer with a low-rank adapter on it.

use super::{
    cpu::{self, add_product, product},
    linear::{self, Fused, plain, transposed},
};
use candle_core::{CpuStorage, CustomOp3, Layout, Result, Shape, Tensor};

/// `x W^T + bias + scale * (x A^T) B^T` (LoRA, arXiv 2106.09685): `x` is `(.., in)`, `weight` is `(out, in)`, `bias` is `(out)`,
/// `a` is `(rank, in)`, `b` is `(out, rank)`; the result is `(.., out)`. `precision` is that of the layer's own product.
///
/// On frozen weights, which is what adapters are for, it is one operation on the CPU, which keeps no part of the sum; its
/// backward computes `x A^T` again.
pub fn linear_low_rank(
    precision: linear::Precision,
    x: &Tensor,
    (weight, bias): (&Tensor, Option<&Tensor>),
    (a, b, scale): (&Tensor, &Tensor, f64),
) -> Result<Tensor> {
    let frozen = !weight.track_op() && bias.is_none_or(|bias| !bias.track_op());
    if frozen && cpu::fused(&[x, weight, a, b]) {
        let (weight, bias) = (weight.contiguous()?, bias.map(Tensor::contiguous).transpose()?);
        let op = Adapted { layer: Fused(precision), weight, bias, scale: scale as f32 };
        return x.contiguous()?.apply_op3(&a.contiguous()?, &b.contiguous()?, op);
    }
    linear::linear_in(precision, x, weight, bias)? + low_rank(x, a, b, scale)?
}

/// What an adapter adds to a layer, `scale * (x A^T) B^T`, in the format of `x`.
pub fn low_rank(x: &Tensor, a: &Tensor, b: &Tensor, scale: f64) -> Result<Tensor> {
    let low = linear::linear(&linear::linear(&x.to_dtype(a.dtype())?, a, None)?, b, None)?;
    (low * scale)?.to_dtype(x.dtype())
}

/// An operation on `x`, `a` and `b`. Weight and bias get no gradient, and candle's operations have three operands at most.
struct Adapted {
    layer: Fused,
    weight: Tensor,
    bias: Option<Tensor>,
    scale: f32,
}

impl CustomOp3 for Adapted {
    fn name(&self) -> &'static str {
        "linear with an adapter"
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        xl: &Layout,
        a: &CpuStorage,
        al: &Layout,
        b: &CpuStorage,
        bl: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let ((out, k), (rank, inner), dims) = (self.weight.dims2()?, al.shape().dims2()?, bl.dims());
        if inner != k || dims != [out, rank] {
            candle_core::bail!("an adapter of {rank} x {inner} and {dims:?} on a linear layer {out} x {k}");
        }
        let (x, a, b) = (cpu::slice(x, xl)?, cpu::slice(a, al)?, cpu::slice(b, bl)?);
        let bias = self.bias.as_ref().map(cpu::floats).transpose()?;
        let mut y = self.layer.apply(x, xl.dims(), &cpu::floats(&self.weight)?, (out, k), bias.as_deref())?;
        let m = x.len() / k;
        let low = product([m, rank, k], plain(x, k), transposed(a, k));
        add_product(&mut y, [m, out, rank], plain(&low, rank), transposed(b, rank), self.scale);
        Ok((CpuStorage::F32(y), Shape::from(linear::with_last(xl.dims(), out))))
    }

    fn bwd(
        &self,
        x: &Tensor,
        a: &Tensor,
        b: &Tensor,
        _: &Tensor,
        grad: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let ((out, k), rank, grad) = (self.weight.dims2()?, a.dim(0)?, grad.contiguous()?);
        let (g, xs, af, bf) = (cpu::floats(&grad)?, cpu::floats(x)?, cpu::floats(a)?, cpu::floats(b)?);
        let m = g.len() / out;
        // The gradient of `x A^T`, with the scale in it.
        let mut grad_low = vec![0.0; m * rank];
        add_product(&mut grad_low, [m, rank, out], plain(&g, out), plain(&bf, rank), self.scale);
        let grad_a = if a.track_op() {
            let values = product([rank, k, m], transposed(&grad_low, rank), plain(&xs, k));
            Some(Tensor::from_vec(values, a.shape(), a.device())?)
        } else {
            None
        };
        let grad_b = if b.track_op() {
            let low = product([m, rank, k], plain(&xs, k), transposed(&af, k));
            let mut values = vec![0.0; out * rank];
            add_product(&mut values, [out, rank, m], transposed(&g, out), plain(&low, rank), self.scale);
            Some(Tensor::from_vec(values, b.shape(), b.device())?)
        } else {
            None
        };
        let grad_x = if x.track_op() {
            let mut values = self.layer.product([m, k, out], plain(&g, out), plain(&cpu::floats(&self.weight)?, k));
            add_product(&mut values, [m, k, rank], plain(&grad_low, rank), plain(&af, k), 1.0);
            Some(Tensor::from_vec(values, x.shape(), x.device())?)
        } else {
            None
        };
        Ok((grad_x, grad_a, grad_b))
    }
}
