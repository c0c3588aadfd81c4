//! AdamW (arXiv 1711.05101): `m = b1 m + (1 - b1) g; v = b2 v + (1 - b2) g^2; w <- (1 - decay) w - lr m^ / (sqrt(v^) + eps)`,
//! where `m^` and `v^` are corrected for their beginning at zero.

use super::slices::{CHUNK, edit};
use crate::tensor::cpu::floats;
use candle_core::{Device, Result, Tensor, Var, bail};
use rayon::prelude::*;

/// AdamW with one step's numbers.
pub struct AdamW {
    /// Factor on the gradient.
    clip: f32,
    beta1: f32,
    beta2: f32,
    /// The learning rate over the first moment's bias correction.
    rate: f32,
    /// `1 / sqrt(1 - beta2^t)`.
    second: f32,
    eps: f32,
    decay: f32,
}

impl AdamW {
    /// For update number `update`, counted from 1.
    pub fn new(betas: (f64, f64), eps: f64, clip: f64, lr: f64, decay: f64, update: u64) -> Self {
        let correction = |beta: f64| 1.0 - beta.powf(update as f64);
        Self {
            clip: clip as f32,
            beta1: betas.0 as f32,
            beta2: betas.1 as f32,
            rate: (lr / correction(betas.0)) as f32,
            second: (1.0 / correction(betas.1).sqrt()) as f32,
            eps: eps as f32,
            decay: decay as f32,
        }
    }

    /// Updates `var` and its two moments.
    pub fn update(&self, var: &Var, moments: &mut [Tensor], gradient: &Tensor) -> Result<()> {
        let [first, second] = moments else { bail!("AdamW keeps two moments") };
        if !matches!(var.device(), Device::Cpu) {
            return self.composed(var, first, second, gradient);
        }
        let gradient = floats(gradient)?;
        edit(var, |w| {
            edit(first, |m| {
                edit(second, |v| {
                    self.slices(w, m, v, &gradient);
                    Ok(())
                })
            })
        })
    }

    fn slices(&self, weight: &mut [f32], first: &mut [f32], second: &mut [f32], gradient: &[f32]) {
        let chunks = (
            weight.par_chunks_mut(CHUNK),
            first.par_chunks_mut(CHUNK),
            second.par_chunks_mut(CHUNK),
            gradient.par_chunks(CHUNK),
        );
        chunks.into_par_iter().for_each(|(weight, first, second, gradient)| {
            for (((w, m), v), g) in weight.iter_mut().zip(first).zip(second).zip(gradient) {
                let g = g * self.clip;
                *m += (1.0 - self.beta1) * (g - *m);
                *v = self.beta2 * *v + (1.0 - self.beta2) * g * g;
                *w = *w * (1.0 - self.decay) - self.rate * *m / (v.sqrt() * self.second + self.eps);
            }
        });
    }

    /// The same by candle's operations.
    fn composed(&self, var: &Var, first: &mut Tensor, second: &mut Tensor, gradient: &Tensor) -> Result<()> {
        let gradient = (gradient * f64::from(self.clip))?;
        let (b1, b2) = (f64::from(self.beta1), f64::from(self.beta2));
        *first = ((&*first * b1)? + (&gradient * (1.0 - b1))?)?;
        *second = ((&*second * b2)? + (gradient.sqr()? * (1.0 - b2))?)?;
        let scale = ((second.sqrt()? * f64::from(self.second))? + f64::from(self.eps))?;
        let update = ((&*first / scale)? * f64::from(self.rate))?;
        var.set(&((var.as_tensor().detach() * (1.0 - f64::from(self.decay)))? - update)?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tensor::rng::Stream;

    #[test]
    fn the_fused_loop_equals_candles_operations() {
        let draw = |index| Stream::new(0, "adamw", index).normal(&[5, 9], &Device::Cpu).unwrap();
        let (a, b) = (Var::from_tensor(&draw(0)).unwrap(), Var::from_tensor(&draw(0)).unwrap());
        let moments = || vec![draw(0).zeros_like().unwrap(), draw(0).zeros_like().unwrap()];
        let (mut ma, mut mb) = (moments(), moments());
        for update in 1..5 {
            let rule = AdamW::new((0.9, 0.95), 1e-8, 0.5, 0.01, 0.1, update);
            rule.update(&a, &mut ma, &draw(update)).unwrap();
            let [first, second] = mb.as_mut_slice() else { panic!("two moments") };
            rule.composed(&b, first, second, &draw(update)).unwrap();
        }
        let distance: f32 =
            (a.as_tensor() - b.as_tensor()).unwrap().abs().unwrap().max_all().unwrap().to_scalar().unwrap();
        assert!(distance < 1e-5, "{distance}");
    }
}
