//! The Inverse Diffuser: editing a picture by way of its noise, or of the difference of two flows.
//!
//! - [`RfInversion`] (arXiv 2410.10792): the inversion is drawn towards one sample of noise, the new picture at first towards
//!   the source.
//! - [`Inversion::RfSolver`] (arXiv 2411.04746) and [`Inversion::FireFlow`] (arXiv 2412.07517): a second-order solver up to the
//!   source's noise and down again under the new prompt. The papers' sharing of attention features is not part of it.
//! - [`FlowEdit`] (arXiv 2412.08629): no inversion; the picture moves by the difference of the two prompts' velocities.
//!
//! With the velocity `v = x1 - x0` of this project, the field that leads from `x` at level `t` to the noise `y1` at 1 is
//! `(y1 - x) / (1 - t)`, and the one that leads back to the picture `y0` at 0 is `(x - y0) / t`.

use super::sampler::{Velocity, advance, evaluate, fireflow, rf_solver, steps};
use crate::usage;
use anyhow::Result;
use candle_core::{DType, Tensor};
use clap::ValueEnum;

/// By which method a picture is inverted and drawn again.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum Inversion {
    #[default]
    RfInversion,
    RfSolver,
    #[value(name = "fireflow")]
    FireFlow,
}

impl Inversion {
    /// Edits `source` over the falling levels `sigmas`: inverts it under the field `up`, draws it again under `down`.
    /// `up` is unguided, with an empty prompt for RF-Inversion and the source's prompt else; `noise` is a sample of `N(0, I)`,
    /// which RF-Inversion is drawn to.
    pub fn edit(
        self,
        up: &impl Velocity,
        down: &impl Velocity,
        source: &Tensor,
        noise: &Tensor,
        sigmas: &[f64],
    ) -> candle_core::Result<Tensor> {
        let rising: Vec<f64> = sigmas.iter().rev().copied().collect();
        match self {
            Self::RfInversion => {
                let method = RfInversion::default();
                let found = method.invert(up, source, noise, &rising)?;
                method.draw(down, &found, source, sigmas)
            }
            Self::RfSolver => rf_solver(down, &rf_solver(up, source, &rising)?, sigmas),
            Self::FireFlow => fireflow(down, &fireflow(up, source, &rising)?, sigmas),
        }
    }
}

/// RF-Inversion's controls.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct RfInversion {
    /// How much the inversion follows the line to the given noise instead of the flow.
    pub gamma: f64,
    /// How much the new picture follows the line to the source instead of the flow, at first.
    pub eta: f64,
    /// The share of the steps, from the first, during which `eta` holds; it is 0 afterwards.
    pub until: f64,
}

impl Default for RfInversion {
    fn default() -> Self {
        Self { gamma: 0.5, eta: 0.9, until: 0.25 }
    }
}

impl RfInversion {
    /// From the picture `source` over the rising levels `sigmas`, which end at 1, to structured noise near `noise`.
    pub fn invert(
        &self,
        field: &impl Velocity,
        source: &Tensor,
        noise: &Tensor,
        sigmas: &[f64],
    ) -> candle_core::Result<Tensor> {
        let mut x = source.to_dtype(DType::F32)?;
        for (i, sigma, next) in steps(sigmas) {
            let line = ((noise - &x)? / (1.0 - sigma))?;
            let v = mix(&evaluate(field, &x, sigma, i)?, &line, self.gamma)?;
            x = advance(&x, &v, next - sigma)?;
        }
        Ok(x)
    }

    /// From noise over the falling levels `sigmas` to a picture that keeps to `source` at first.
    pub fn draw(
        &self,
        field: &impl Velocity,
        noise: &Tensor,
        source: &Tensor,
        sigmas: &[f64],
    ) -> candle_core::Result<Tensor> {
        let mut x = noise.to_dtype(DType::F32)?;
        let held = (self.until * sigmas.len().saturating_sub(1) as f64).round() as usize;
        for (i, sigma, next) in steps(sigmas) {
            let mut v = evaluate(field, &x, sigma, i)?;
            if i < held {
                v = mix(&v, &((&x - source)? / sigma)?, self.eta)?;
            }
            x = advance(&x, &v, next - sigma)?;
        }
        Ok(x)
    }
}

/// `v + share (line - v)`.
fn mix(v: &Tensor, line: &Tensor, share: f64) -> candle_core::Result<Tensor> {
    (v * (1.0 - share))? + (line * share)?
}

/// FlowEdit's controls; the levels are those of a run of `sigmas.len() - 1` steps (28 for FLUX, which guides the source with
/// 1.5 and the target with 5.5).
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct FlowEdit {
    /// How many of the last steps are run at all: the more, the further the picture may go from its source.
    pub n_max: usize,
    /// How many of the last steps are plain sampling under the target.
    pub n_min: usize,
    /// How many samples of noise a step averages over.
    pub n_avg: usize,
}

impl FlowEdit {
    /// The published controls for FLUX (24 of 28 steps), in proportion for any number of steps.
    pub fn for_steps(steps: usize) -> Self {
        Self { n_max: (steps * 6).div_ceil(7), n_min: 0, n_avg: 1 }
    }

    pub fn check(&self, steps: usize) -> Result<()> {
        if self.n_avg == 0 || self.n_max > steps || self.n_min > self.n_max {
            usage!(
                "FlowEdit needs n_avg >= 1 and n_min <= n_max <= steps, not n_avg {}, n_min {}, n_max {}, steps {steps}",
                self.n_avg,
                self.n_min,
                self.n_max
            );
        }
        Ok(())
    }

    /// Edits the picture `x`, which `source` describes, towards what `target` describes. `noise(step, k)` is the `k`-th sample
    /// of a step.
    pub fn run(
        &self,
        source: &impl Velocity,
        target: &impl Velocity,
        x: &Tensor,
        sigmas: &[f64],
        mut noise: impl FnMut(usize, usize) -> candle_core::Result<Tensor>,
    ) -> candle_core::Result<Tensor> {
        let x = x.to_dtype(DType::F32)?;
        let total = sigmas.len().saturating_sub(1);
        let noised = |e: Tensor, sigma: f64| (&x * (1.0 - sigma))? + (e * sigma)?;
        let mut z = x.clone();
        // Drawn and uploaded before the loop, where a device would have to be waited for.
        let mut fresh = Vec::new();
        for left in (self.n_min..=self.n_max.min(total)).rev().filter(|left| *left > 0) {
            let count = if left > self.n_min { self.n_avg } else { 1 };
            fresh.push((0..count).map(|k| noise(total - left, k)).collect::<candle_core::Result<Vec<_>>>()?);
        }
        let mut fresh = fresh.into_iter();
        for (i, sigma, next) in steps(sigmas) {
            let left = total - i;
            if left > self.n_max {
                continue;
            }
            if left > self.n_min {
                let mut sum: Option<Tensor> = None;
                for e in fresh.next().unwrap_or_default() {
                    let z_source = noised(e, sigma)?;
                    // In this order z == x gives z_source itself, so equal prompts leave the picture as it is.
                    let z_target = (&z_source + (&z - &x)?)?;
                    let v = evaluate(target, &z_target, sigma, i)?;
                    let v = (v - evaluate(source, &z_source, sigma, i)?)?;
                    sum = Some(match sum {
                        Some(sum) => (sum + v)?,
                        None => v,
                    });
                }
                if let Some(sum) = sum {
                    z = advance(&z, &sum, (next - sigma) / self.n_avg as f64)?;
                }
            } else {
                if let Some(e) = fresh.next().into_iter().flatten().next() {
                    z = (noised(e, sigma)? + (&z - &x)?)?;
                }
                z = advance(&z, &evaluate(target, &z, sigma, i)?, next - sigma)?;
            }
        }
        Ok(z)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::flow::sampler::{
        euler,
        tests::{Counted, even, gap, gaussian, midpoint, noise},
    };
    use candle_core::Result;

    const SIGMAS: [f64; 6] = [1.0, 0.9, 0.78, 0.6, 0.36, 0.0];

    fn rising() -> Vec<f64> {
        SIGMAS.iter().rev().copied().collect()
    }

    /// A field that is far from linear, and leads elsewhere than [`gaussian`].
    fn other(x: &Tensor, t: f64, _: usize) -> Result<Tensor> {
        ((x * (2.0 + t))?.sin()? + 0.3)? * 1.5
    }

    #[test]
    fn full_eta_gives_the_source_back() -> Result<()> {
        let method = RfInversion { eta: 1.0, until: 1.0, ..RfInversion::default() };
        assert!(gap(&method.draw(&other, &noise(0), &noise(1), &SIGMAS)?, &noise(1)) < 1e-6);
        Ok(())
    }

    #[test]
    fn full_gamma_gives_the_noise() -> Result<()> {
        let method = RfInversion { gamma: 1.0, ..RfInversion::default() };
        assert!(gap(&method.invert(&other, &noise(0), &noise(1), &rising())?, &noise(1)) < 1e-6);
        Ok(())
    }

    #[test]
    fn without_controls_rf_inversion_is_euler() -> Result<()> {
        let method = RfInversion { gamma: 0.0, eta: 0.0, until: 1.0 };
        let up = method.invert(&other, &noise(0), &noise(1), &rising())?;
        assert_eq!(gap(&up, &euler(&other, &noise(0), &rising())?), 0.0);
        assert_eq!(gap(&method.draw(&other, &up, &noise(1), &SIGMAS)?, &euler(&other, &up, &SIGMAS)?), 0.0);
        Ok(())
    }

    #[test]
    fn eta_holds_on_the_first_quarter_only() -> Result<()> {
        let seen = std::cell::RefCell::new(Vec::new());
        let still = |x: &Tensor, _: f64, i: usize| {
            seen.borrow_mut().push((i, x.flatten_all()?.to_vec1::<f32>()?[0]));
            x.zeros_like()
        };
        RfInversion::default().draw(&still, &noise(0), &noise(1), &even(8, 1.0, 0.0))?;
        let moved: Vec<bool> = seen.borrow().windows(2).map(|w| w[0].1 != w[1].1).collect();
        assert_eq!(moved, [true, true, false, false, false, false, false]);
        Ok(())
    }

    #[test]
    fn inversion_and_drawing_under_one_prompt_is_near_the_source() -> Result<()> {
        let x = (noise(0) * 0.5)?;
        let sigmas = even(60, 1.0, 0.0);
        let edit = |method: Inversion| method.edit(&gaussian, &gaussian, &x, &noise(1), &sigmas);
        for method in [Inversion::RfSolver, Inversion::FireFlow] {
            assert!(gap(&edit(method)?, &x) < 2e-3);
        }
        // RF-Inversion trades exactness for freedom, but stays nearer than a drawing from the same noise.
        let distance = |y: &Tensor| -> Result<f32> { (y - &x)?.sqr()?.mean_all()?.to_scalar() };
        assert!(distance(&edit(Inversion::RfInversion)?)? < 0.9 * distance(&euler(&gaussian, &noise(1), &sigmas)?)?);
        Ok(())
    }

    #[test]
    fn a_constant_velocity_is_inverted_exactly() -> Result<()> {
        let constant = |x: &Tensor, _: f64, _: usize| x.ones_like()? * 0.75;
        let x = ((noise(2) * 64.0)?.round()? / 64.0)?;
        for method in [Inversion::RfSolver, Inversion::FireFlow] {
            assert_eq!(gap(&method.edit(&constant, &constant, &x, &noise(1), &even(8, 1.0, 0.0))?, &x), 0.0);
        }
        Ok(())
    }

    #[test]
    fn rf_solver_edits_by_the_midpoint_rule() -> Result<()> {
        let edited = Inversion::RfSolver.edit(&gaussian, &other, &noise(0), &noise(1), &SIGMAS)?;
        let by_midpoint = midpoint(&other, &midpoint(&gaussian, &noise(0), &rising())?, &SIGMAS)?;
        assert!(gap(&edited, &by_midpoint) < 2e-5);
        Ok(())
    }

    #[test]
    fn flow_edit_with_equal_prompts_changes_nothing() -> Result<()> {
        let edit = FlowEdit { n_max: 4, n_min: 0, n_avg: 3 };
        let out = edit.run(&other, &other, &noise(0), &SIGMAS, |i, k| Ok(noise((10 * i + k) as u64)))?;
        assert_eq!(gap(&out, &noise(0)), 0.0);
        Ok(())
    }

    #[test]
    fn flow_edit_moves_by_the_difference_of_the_fields() -> Result<()> {
        // Two constant fields: the picture moves by their difference times the noise level of the first step that is run.
        let source = |x: &Tensor, _: f64, _: usize| x.ones_like()? * 0.5;
        let target = |x: &Tensor, _: f64, _: usize| x.ones_like()? * 2.0;
        let edit = FlowEdit { n_max: 4, n_min: 0, n_avg: 2 };
        let out = edit.run(&source, &target, &noise(0), &SIGMAS, |i, k| Ok(noise((10 * i + k) as u64)))?;
        assert!(gap(&out, &(noise(0) - 1.5 * SIGMAS[1])?) < 1e-6);
        Ok(())
    }

    #[test]
    fn flow_edit_ends_with_plain_sampling() -> Result<()> {
        // All steps plain: the picture is noised and drawn again under the target, the source is never asked.
        let source = |_: &Tensor, _: f64, _: usize| unreachable!("no step compares");
        let edit = FlowEdit { n_max: 3, n_min: 3, n_avg: 1 };
        let out = edit.run(&source, &other, &noise(0), &SIGMAS, |_, _| Ok(noise(1)))?;
        let start = ((noise(0) * (1.0 - SIGMAS[2]))? + (noise(1) * SIGMAS[2])?)?;
        assert!(gap(&out, &euler(&other, &start, &SIGMAS[2..])?) < 1e-6);
        Ok(())
    }

    #[test]
    fn flow_edit_evaluates_each_field_once_a_sample() -> Result<()> {
        let (source, target) = (Counted::new(other), Counted::new(gaussian));
        let edit = FlowEdit { n_max: 4, n_min: 1, n_avg: 2 };
        edit.run(&source, &target, &noise(0), &SIGMAS, |_, _| Ok(noise(1)))?;
        assert_eq!((source.count(), target.count()), (6, 7));
        assert_eq!(FlowEdit::for_steps(28).n_max, 24);
        assert!(edit.check(5).is_ok() && edit.check(3).is_err());
        assert!(FlowEdit { n_avg: 0, ..edit }.check(5).is_err());
        Ok(())
    }
}
