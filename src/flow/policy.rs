//! Stochastic samplers: they make the flow a policy whose steps have a density, as reinforcement learning needs.
//!
//! All of them take Euler's step, remove a share `pull` of the noise that the velocity implies, and add as much fresh noise
//! as keeps the level right: `next = x + d v - pull (x + (1 - t) v) + std e`, with `d = t' - t`.
//!
//! | policy | pull | std |
//! |---|---|---|
//! | Flow-SDE (Flow-GRPO, arXiv 2505.05470), `s = a sqrt(t / (1 - t))` | `-s^2 d / 2t` | `s sqrt(-d)` |
//! | Dance-SDE (DanceGRPO, arXiv 2505.07818) | `-a^2 d / 2t` | `a sqrt(-d)` |
//! | CPS (arXiv 2509.05952) | `t' (1 - cos(a pi/2))` | `t' sin(a pi/2)` |
//!
//! The first two keep the marginals of the ODE as steps shrink, CPS does not; over the few long steps of a window it is
//! CPS that keeps nearer to them. With `a = 0` each is Euler's rule, bit for bit.
//! Log-probabilities are means over the numbers of a state, so ratios of policies stay near 1 whatever the picture's size.

use super::sampler::{Velocity, advance, evaluate, steps};
use crate::{tensor::rng::Stream, usage};
use anyhow::Result;
use candle_core::{DType, Tensor};
use serde::{Deserialize, Serialize};
use std::{
    f64::consts::{FRAC_PI_2, TAU},
    ops::Range,
};

/// By which rule noise is removed and added: the rows of the table above.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Kind {
    /// Noise that grows with the level (Flow-GRPO).
    FlowSde,
    /// The same noise at every level (DanceGRPO).
    DanceSde,
    /// A part of the next level's noise is fresh (coefficients-preserving sampling).
    Cps,
}

/// A stochastic sampler and its noise level `a`.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Policy {
    pub kind: Kind,
    /// Its kind's own level if not given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub noise: Option<f64>,
}

impl Default for Policy {
    fn default() -> Self {
        Self { kind: Kind::FlowSde, noise: None }
    }
}

/// How the divergence between two policies that differ in their velocities is weighted; both are used in published work.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum KlForm {
    /// The divergence of the two Gaussians of a step, which shrinks with the step's length.
    #[default]
    Step,
    /// The same per unit of time, as the common implementations have it: ten times larger with ten even steps.
    Rate,
}

impl Policy {
    /// The level `a`; of each kind that which is used for FLUX.
    pub fn noise(&self) -> f64 {
        self.noise.unwrap_or(match self.kind {
            Kind::FlowSde => 0.9,
            Kind::DanceSde => 0.3,
            Kind::Cps => 0.8,
        })
    }

    pub fn check(&self) -> Result<()> {
        let (noise, most) = (self.noise(), if self.kind == Kind::Cps { 1.0 } else { f64::INFINITY });
        if !noise.is_finite() || noise < 0.0 || noise > most {
            usage!("the noise level of a policy is at least 0 (and at most 1 for cps), not {noise}");
        }
        Ok(())
    }

    /// The step from `sigma` to `next < sigma`.
    pub fn step(&self, sigma: f64, next: f64) -> Step {
        let (t, d, a) = (sigma, next - sigma, self.noise());
        let diffusion = |s: f64| (-s * s * d / (2.0 * t), s * (-d).sqrt());
        let (pull, std) = match self.kind {
            // At t = 1 the level is infinite: the next one's denominator stands in.
            Kind::FlowSde => diffusion(a * (t / (1.0 - if t < 1.0 { t } else { next })).sqrt()),
            Kind::DanceSde => diffusion(a),
            Kind::Cps => {
                let (sin, cos) = (a * FRAC_PI_2).sin_cos();
                (next * (1.0 - cos), next * sin)
            }
        };
        Step { sigma, d, pull, std }
    }
}

/// One step of a policy: a Gaussian whose mean is linear in the state and the velocity.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Step {
    pub sigma: f64,
    /// Its signed length `next - sigma`.
    pub d: f64,
    /// The share of the implied noise that is replaced by fresh noise.
    pub pull: f64,
    pub std: f64,
}

impl Step {
    /// `d mean / d v`.
    pub fn gain(&self) -> f64 {
        self.d - self.pull * (1.0 - self.sigma)
    }

    /// The mean of the next state, differentiable in `v`.
    pub fn mean(&self, x: &Tensor, v: &Tensor) -> candle_core::Result<Tensor> {
        if self.pull == 0.0 {
            return advance(x, v, self.d);
        }
        advance(&(x * (1.0 - self.pull))?, v, self.gain())
    }

    /// The mean over a state's numbers of the log-density of `next`, `(B)`; differentiable in `mean`.
    pub fn log_prob(&self, mean: &Tensor, next: &Tensor) -> candle_core::Result<Tensor> {
        let error = (next - mean)?.sqr()?.flatten_from(1)?.mean(1)?; // (B)
        error.affine(-0.5 / (self.std * self.std), -self.std.ln() - 0.5 * TAU.ln())
    }

    /// The weight of `mean |v - v_ref|^2` in the divergence of two policies at this step.
    pub fn kl_weight(&self, form: KlForm) -> f64 {
        let step = (self.gain() / self.std).powi(2) / 2.0;
        match form {
            KlForm::Step => step,
            KlForm::Rate => step / -self.d,
        }
    }
}

/// The steps of a run that are stochastic and trained: `width` consecutive ones within its first half (Flow-GRPO-Fast,
/// MixGRPO), drawn from `(seed, index)`. All members of a group must share a window, so `index` names the group or the
/// update, never the member.
pub fn window(seed: u64, index: u64, steps: usize, width: usize) -> Result<Range<usize>> {
    let half = steps / 2;
    if width == 0 || width > half {
        usage!("a window of {width} steps does not fit the first half of {steps} steps");
    }
    let start = Stream::new(seed, "window", index).below(half - width + 1);
    Ok(start..start + width)
}

/// A stochastic step as it was taken, without gradients: the velocity at `x`, evaluated again, gives the policy's present
/// [`Step::mean`] and [`Step::log_prob`].
pub struct Taken {
    /// Its place in the run.
    pub index: usize,
    pub step: Step,
    /// The state before it: `(B, ..)`, or `(B / n, ..)` where it is the step in which `n` rows each part.
    pub x: Tensor,
    /// The mean of the policy, and the state after it: `(B, ..)`.
    pub mean: Tensor,
    pub next: Tensor,
    /// `(B)`.
    pub log_prob: Tensor,
}

impl Taken {
    /// How many rows come of each state before the step.
    pub fn each(&self) -> candle_core::Result<usize> {
        Ok(self.next.dim(0)? / self.x.dim(0)?)
    }
}

/// `(B, ..)` of `(B / n, ..)`: each row `n` times, one after another.
pub fn spread(x: &Tensor, rows: usize) -> candle_core::Result<Tensor> {
    let heads = x.dim(0)?;
    if heads == rows {
        return Ok(x.clone());
    }
    x.unsqueeze(1)?.broadcast_as([&[heads, rows / heads], &x.dims()[1..]].concat())?.flatten(0, 1)
}

/// Draws a picture with `policy` on the steps of `window` and Euler's rule elsewhere. `noise` gives the fresh noise of a
/// step; the steps in the window are kept for training. A step without noise (the last of CPS) has no density and is not kept.
/// Fresh noise may have more rows than `x`: as many rows each begin as one, and part in the first stochastic step.
pub fn rollout(
    field: &impl Velocity,
    x: &Tensor,
    sigmas: &[f64],
    policy: Policy,
    window: Range<usize>,
    mut noise: impl FnMut(usize) -> candle_core::Result<Tensor>,
) -> candle_core::Result<(Tensor, Vec<Taken>)> {
    let mut x = x.to_dtype(DType::F32)?;
    let mut taken = Vec::with_capacity(window.len());
    // Drawn and uploaded before the loop, where a device would have to be waited for.
    let random =
        |&(index, sigma, next): &(usize, f64, f64)| window.contains(&index) && policy.step(sigma, next).std != 0.0;
    let fresh = steps(sigmas).filter(random).map(|(index, ..)| noise(index));
    let mut fresh = fresh.collect::<candle_core::Result<Vec<Tensor>>>()?.into_iter();
    for (index, sigma, next) in steps(sigmas) {
        let v = evaluate(field, &x, sigma, index)?;
        if !window.contains(&index) {
            x = advance(&x, &v, next - sigma)?;
            continue;
        }
        let step = policy.step(sigma, next);
        let mean = step.mean(&x, &v)?;
        let Some(noise) = (if step.std == 0.0 { None } else { fresh.next() }) else {
            x = mean;
            continue;
        };
        let mean = spread(&mean, noise.dim(0)?)?;
        let next = (&mean + (noise * step.std)?)?;
        let log_prob = step.log_prob(&mean, &next)?;
        taken.push(Taken { index, step, x, mean, next: next.clone(), log_prob });
        x = next;
    }
    Ok((x, taken))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::flow::sampler::{
        euler,
        tests::{even, gap, gaussian, noise, slope},
    };
    use candle_core::Var;

    const ALL: [Kind; 3] = [Kind::FlowSde, Kind::DanceSde, Kind::Cps];

    /// The variance after the last step of a flow whose velocity is linear: propagated exactly.
    fn variance(kind: Kind, level: f64, n: usize) -> f64 {
        let policy = Policy { kind, noise: Some(level) };
        steps(&even(n, 1.0, 0.0)).fold(1.0, |variance, (_, sigma, next)| {
            let step = policy.step(sigma, next);
            let factor = 1.0 - step.pull + step.gain() * slope(sigma);
            factor * factor * variance + step.std * step.std
        })
    }

    #[test]
    fn variances_are_the_exact_ones() {
        for (n, ode, flow, dance, cps) in [
            (10, 0.185574, 0.229962, 0.194974, 0.123754),
            (40, 0.232142, 0.247369, 0.234819, 0.149057),
            (1000, 0.249260, 0.250918, 0.249372, 0.162145),
        ] {
            for kind in ALL {
                assert!((variance(kind, 0.0, n) - ode).abs() < 6e-7);
            }
            assert!((variance(Kind::FlowSde, 0.7, n) - flow).abs() < 6e-7);
            assert!((variance(Kind::DanceSde, 0.3, n) - dance).abs() < 6e-7);
            assert!((variance(Kind::Cps, 0.8, n) - cps).abs() < 6e-7);
        }
    }

    #[test]
    fn a_large_sample_has_the_exact_variance() -> candle_core::Result<()> {
        let draw =
            |index: usize| Stream::new(5, "sample", index as u64).normal(&[1, 40_000], &candle_core::Device::Cpu);
        for kind in ALL {
            let policy = Policy { kind, noise: Some(0.7) };
            let (x, _) = rollout(&gaussian, &draw(100)?, &even(10, 1.0, 0.0), policy, 0..10, draw)?;
            let sampled: f32 = x.sqr()?.mean_all()?.to_scalar()?;
            let exact = variance(kind, 0.7, 10);
            assert!((f64::from(sampled) / exact - 1.0).abs() < 0.03, "{kind:?}: {sampled} where {exact} is exact");
        }
        Ok(())
    }

    #[test]
    fn means_are_those_of_the_papers() -> candle_core::Result<()> {
        let (x, v, a) = (noise(0), noise(1), 0.6);
        for (t, u) in [(1.0, 0.9), (0.8, 0.55), (0.3, 0.1), (0.2, 0.0)] {
            let d: f64 = u - t;
            let mean = |kind| Policy { kind, noise: Some(a) }.step(t, u).mean(&x, &v);
            let data = (&x - (&v * t)?)?;
            let s = a * (t / (1.0 - if t == 1.0 { u } else { t })).sqrt();
            let flow = ((&x * (1.0 + s * s * d / (2.0 * t)))? + (&v * ((1.0 + s * s * (1.0 - t) / (2.0 * t)) * d))?)?;
            assert!(gap(&mean(Kind::FlowSde)?, &flow) < 1e-6);
            let score = (((&x - (&data * (1.0 - t))?)? / -(t * t))? * (-0.5 * a * a * d))?;
            assert!(gap(&mean(Kind::DanceSde)?, &((&x + (&v * d)?)? + score)?) < 1e-6);
            let std = u * (a * FRAC_PI_2).sin();
            let fresh = ((&x + (&v * (1.0 - t))?)? * (u * u - std * std).sqrt())?;
            assert!(gap(&mean(Kind::Cps)?, &((data * (1.0 - u))? + fresh)?) < 1e-6);
        }
        Ok(())
    }

    #[test]
    fn without_noise_every_policy_is_euler_bit_for_bit() -> candle_core::Result<()> {
        let sigmas = [1.0, 0.954, 0.875, 0.7, 0.0];
        let plain = euler(&gaussian, &noise(0), &sigmas)?;
        for kind in ALL {
            let fresh = |_| unreachable!("a policy without noise asks for none");
            let (x, taken) = rollout(&gaussian, &noise(0), &sigmas, Policy { kind, noise: Some(0.0) }, 0..4, fresh)?;
            assert_eq!(gap(&x, &plain), 0.0);
            assert!(taken.is_empty());
        }
        Ok(())
    }

    #[test]
    fn replaying_a_rollout_gives_its_log_probabilities() -> candle_core::Result<()> {
        let policy = Policy::default();
        let draw = |index: usize| Ok(noise(10 + index as u64));
        let (_, taken) = rollout(&gaussian, &noise(0), &even(6, 1.0, 0.0), policy, 1..3, draw)?;
        assert_eq!(taken.iter().map(|t| t.index).collect::<Vec<_>>(), [1, 2]);
        for t in taken {
            let mean = t.step.mean(&t.x, &gaussian(&t.x, t.step.sigma, t.index)?)?;
            assert_eq!(gap(&t.step.log_prob(&mean, &t.next)?, &t.log_prob), 0.0);
            // log N of a standard normal draw: -e^2/2 - log std - log(2 pi)/2.
            let e = noise(10 + t.index as u64).sqr()?.flatten_from(1)?.mean(1)?;
            let direct = (e * -0.5)?.affine(1.0, -t.step.std.ln() - 0.5 * TAU.ln())?;
            assert!(gap(&direct, &t.log_prob) < 1e-5);
        }
        Ok(())
    }

    #[test]
    fn rows_that_begin_as_one_come_to_the_same_as_apart() -> candle_core::Result<()> {
        let draw = |index: usize| Stream::new(3, "parting", index as u64).normal(&[6, 5, 4], &candle_core::Device::Cpu);
        let run = |x: &Tensor| rollout(&gaussian, x, &even(6, 1.0, 0.0), Policy::default(), 1..3, draw);
        let ((one, together), (other, apart)) = (run(&noise(0))?, run(&spread(&noise(0), 6)?)?);
        assert_eq!(gap(&one, &other), 0.0);
        for (t, a) in together.iter().zip(&apart) {
            assert_eq!((gap(&spread(&t.x, 6)?, &a.x), gap(&t.log_prob, &a.log_prob)), (0.0, 0.0));
        }
        assert_eq!((together[0].each()?, together[1].each()?, apart[0].each()?), (3, 1, 1));
        // Members of a group lie side by side.
        for row in 0..6 {
            assert_eq!(gap(&apart[0].x.get(row)?, &together[0].x.get(row / 3)?), 0.0);
        }
        Ok(())
    }

    #[test]
    fn the_gradient_of_the_log_probability_is_that_of_finite_differences() -> candle_core::Result<()> {
        let (x, next) = (noise(0), noise(1));
        for kind in ALL {
            let step = Policy { kind, noise: Some(0.8) }.step(0.7, 0.5);
            let v = Var::from_tensor(&noise(2))?;
            let value = |v: &Tensor| step.log_prob(&step.mean(&x, v)?, &next)?.sum_all();
            let grads = value(&v)?.backward()?;
            let grad: Vec<f32> = grads.get(&v).expect("a gradient").flatten_all()?.to_vec1()?;
            let base: Vec<f32> = v.flatten_all()?.to_vec1()?;
            for i in [0, 7, 39] {
                let at = |h: f32| -> candle_core::Result<f32> {
                    let mut moved = base.clone();
                    moved[i] += h;
                    value(&Tensor::from_vec(moved, v.dims(), v.device())?)?.to_scalar()
                };
                // The log-density is quadratic in v, so wide differences are exact but for rounding.
                let numeric = (at(0.5)? - at(-0.5)?) / 1.0;
                assert!((numeric - grad[i]).abs() < 1e-3 * (1.0 + grad[i].abs()), "{kind:?}: {numeric} {}", grad[i]);
            }
        }
        Ok(())
    }

    #[test]
    fn the_kl_weight_is_the_closed_form_and_the_divergence_of_the_gaussians() {
        let (t, u, a) = (0.7, 0.6, 0.9);
        let step = Policy { kind: Kind::FlowSde, noise: Some(a) }.step(t, u);
        let s = a * f64::sqrt(t / (1.0 - t));
        let rate = 0.5 * (s * (1.0 - t) / (2.0 * t) + 1.0 / s).powi(2);
        assert!((step.kl_weight(KlForm::Rate) / rate - 1.0).abs() < 1e-12);
        assert!((step.kl_weight(KlForm::Step) / (rate * (t - u)) - 1.0).abs() < 1e-12);
        assert!((step.gain().powi(2) / (2.0 * step.std.powi(2)) / step.kl_weight(KlForm::Step) - 1.0).abs() < 1e-12);
    }

    #[test]
    fn windows_lie_in_the_first_half_and_reach_all_of_it() -> Result<()> {
        let starts: std::collections::BTreeSet<usize> =
            (0..100).map(|i| window(1, i, 10, 2).map(|w| w.start)).collect::<Result<_>>()?;
        assert_eq!(starts.into_iter().collect::<Vec<_>>(), [0, 1, 2, 3]);
        assert_eq!(window(1, 5, 10, 3)?, window(1, 5, 10, 3)?);
        assert_eq!(window(9, 0, 6, 3)?, 0..3);
        assert!(window(0, 0, 6, 4).is_err() && window(0, 0, 6, 0).is_err());
        Ok(())
    }

    #[test]
    fn impossible_noise_levels_are_refused() {
        let check = |kind, noise| Policy { kind, noise: Some(noise) }.check();
        assert!(check(Kind::FlowSde, 1.2).is_ok() && check(Kind::Cps, 1.0).is_ok());
        for (kind, noise) in [(Kind::Cps, 1.1), (Kind::FlowSde, -0.1), (Kind::DanceSde, f64::NAN)] {
            assert!(check(kind, noise).is_err());
        }
    }
}
