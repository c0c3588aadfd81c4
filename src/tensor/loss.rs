//! Losses.

use super::{composed, cpu};
use candle_core::{CpuStorage, CustomOp2, D, Layout, Result, Shape, Tensor};

/// Cross entropy of each token: `logits` is `(N, V)`, `targets` is `(N)` of `u32`; the result is `(N)` and not averaged.
pub fn cross_entropy(logits: &Tensor, targets: &Tensor) -> Result<Tensor> {
    if cpu::fused(&[logits]) {
        return logits.contiguous()?.apply_op2(&targets.contiguous()?, CrossEntropy);
    }
    let logits = composed::widen(logits)?;
    let shifted = logits.broadcast_sub(&logits.detach().max_keepdim(D::Minus1)?)?;
    let normaliser = shifted.exp()?.sum(D::Minus1)?.log()?;
    normaliser - shifted.gather(&targets.unsqueeze(1)?, 1)?.squeeze(1)?
}

struct CrossEntropy;

impl CustomOp2 for CrossEntropy {
    fn name(&self) -> &'static str {
        "cross-entropy"
    }

    fn cpu_fwd(&self, x: &CpuStorage, xl: &Layout, targets: &CpuStorage, tl: &Layout) -> Result<(CpuStorage, Shape)> {
        let (n, v) = xl.shape().dims2()?;
        let x = cpu::slice(x, xl)?;
        let Some((start, end)) = tl.contiguous_offsets().filter(|(start, end)| end - start == n) else {
            candle_core::bail!("cross entropy of {n} tokens got targets of {:?}", tl.shape())
        };
        let targets = &targets.as_slice::<u32>()?[start..end];
        if let Some(bad) = targets.iter().find(|t| **t as usize >= v) {
            candle_core::bail!("cross entropy got the target {bad} in a vocabulary of {v}");
        }
        let mut out = vec![0.0; n];
        cpu::rows(&mut out, 1, |row, out| {
            let x = &x[row * v..][..v];
            let (max, total) = normaliser(x);
            out[0] = total.ln() - (x[targets[row] as usize] - max);
        });
        Ok((CpuStorage::F32(out), Shape::from(n)))
    }

    fn bwd(
        &self,
        logits: &Tensor,
        targets: &Tensor,
        _: &Tensor,
        grad: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let (_, v) = logits.dims2()?;
        let targets: Vec<u32> = targets.to_vec1()?;
        let grad = grad.contiguous()?;
        let (x, g) = (cpu::floats(logits)?, cpu::floats(&grad)?);
        let mut out = vec![0.0; x.len()];
        cpu::rows(&mut out, v, |row, out| {
            let x = &x[row * v..][..v];
            let (max, total) = normaliser(x);
            for (o, &x) in out.iter_mut().zip(x) {
                *o = cpu::exp(x - max) / total * g[row];
            }
            out[targets[row] as usize] -= g[row];
        });
        Ok((Some(Tensor::from_vec(out, logits.shape(), logits.device())?), None))
    }
}

/// The maximum of `x` and the sum of its exponentials relative to it.
fn normaliser(x: &[f32]) -> (f32, f32) {
    let max = x.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    (max, x.iter().map(|x| cpu::exp(x - max)).sum())
}
