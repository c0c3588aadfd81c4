//! The exponential moving average of the variables: what is evaluated, sampled from and shipped.
//!
//! `ema += (1 - d) (theta - ema)` with `d = min((1 + s) / (10 + s), decay)` at update `s`, so that a young average forgets
//! its random beginning quickly.

use super::slices::{CHUNK, edit};
use crate::tensor::cpu::floats;
use candle_core::{Device, Result, Tensor, Var};
use rayon::prelude::*;
use std::collections::BTreeMap;

/// The moving average of a set of variables.
pub struct Ema {
    decay: f64,
    /// Updates so far.
    pub updates: u64,
    pub average: BTreeMap<String, Tensor>,
}

impl Ema {
    /// Begins with the values of `vars`.
    pub fn new(vars: &BTreeMap<String, Var>, decay: f64) -> Result<Self> {
        let average = vars.iter().map(|(name, var)| Ok((name.clone(), var.as_tensor().detach().copy()?)));
        Ok(Self { decay, updates: 0, average: average.collect::<Result<_>>()? })
    }

    /// Takes in the values after one optimiser step.
    pub fn update(&mut self, vars: &BTreeMap<String, Var>) -> Result<()> {
        let s = self.updates as f64;
        let rate = 1.0 - ((1.0 + s) / (10.0 + s)).min(self.decay);
        self.updates += 1;
        for (average, var) in self.average.values_mut().zip(vars.values()) {
            if matches!(var.device(), Device::Cpu) {
                let new = floats(var)?;
                edit(average, |average| {
                    blend(average, &new, rate as f32);
                    Ok(())
                })?;
            } else {
                *average = (&*average + ((var.as_tensor().detach() - &*average)? * rate)?)?;
            }
        }
        Ok(())
    }

    /// Exchanges the average and the variables; a second call takes it back, bit for bit.
    pub fn swap(&mut self, vars: &BTreeMap<String, Var>) -> Result<()> {
        for (average, var) in self.average.values_mut().zip(vars.values()) {
            if matches!(var.device(), Device::Cpu) {
                edit(var, |new| {
                    edit(average, |average| {
                        average.swap_with_slice(new);
                        Ok(())
                    })
                })?;
            } else {
                let current = var.as_tensor().detach().copy()?;
                var.set(average)?;
                *average = current;
            }
        }
        Ok(())
    }
}

fn blend(average: &mut [f32], new: &[f32], rate: f32) {
    average.par_chunks_mut(CHUNK).zip(new.par_chunks(CHUNK)).for_each(|(average, new)| {
        for (average, new) in average.iter_mut().zip(new) {
            *average += rate * (new - *average);
        }
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    fn var(values: &[f32]) -> BTreeMap<String, Var> {
        BTreeMap::from([("w".to_owned(), Var::from_slice(values, values.len(), &Device::Cpu).unwrap())])
    }

    #[test]
    fn the_average_follows_its_formula() {
        let vars = var(&[1.0, -2.0]);
        let mut ema = Ema::new(&vars, 0.9).unwrap();
        let mut expected = [1.0f64, -2.0];
        for step in 0..200u32 {
            let now = [f64::from(step), 0.5];
            vars["w"].set(&Tensor::new(&[now[0] as f32, now[1] as f32], &Device::Cpu).unwrap()).unwrap();
            ema.update(&vars).unwrap();
            let s = f64::from(step);
            let decay = ((1.0 + s) / (10.0 + s)).min(0.9);
            for (e, n) in expected.iter_mut().zip(now) {
                *e = decay * *e + (1.0 - decay) * n;
            }
        }
        let got = ema.average["w"].to_vec1::<f32>().unwrap();
        for (got, expected) in got.iter().zip(expected) {
            assert!((f64::from(*got) - expected).abs() < 1e-4 * expected.abs(), "{got} is not {expected}");
        }
    }

    #[test]
    fn a_swap_is_undone_by_the_next() {
        let vars = var(&[1.0, 2.0]);
        let mut ema = Ema::new(&vars, 0.9).unwrap();
        vars["w"].set(&Tensor::new(&[3.0f32, 4.0], &Device::Cpu).unwrap()).unwrap();
        ema.swap(&vars).unwrap();
        assert_eq!(vars["w"].to_vec1::<f32>().unwrap(), [1.0, 2.0]);
        assert_eq!(ema.average["w"].to_vec1::<f32>().unwrap(), [3.0, 4.0]);
        ema.swap(&vars).unwrap();
        assert_eq!(vars["w"].to_vec1::<f32>().unwrap(), [3.0, 4.0]);
    }
}
