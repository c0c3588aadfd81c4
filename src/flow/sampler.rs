//! Solvers of the flow's ordinary differential equation `dx/dsigma = v(x, sigma)`.
//!
//! Each runs over any list of levels, downwards to draw a picture or upwards to find the noise of one, and over any
//! velocity field, so that all of them can be tested on fields whose flow is known.
//!
//! - Euler: one evaluation a step; what diffusers' pipelines do.
//! - RF-Solver (arXiv 2411.04746): the midpoint rule written as a Taylor step; two evaluations a step.
//! - FireFlow (arXiv 2412.07517): the midpoint rule that predicts with the last midpoint's velocity; `N + 1` evaluations.

use candle_core::{DType, Result, Tensor};
use clap::ValueEnum;
use serde::{Deserialize, Serialize};

/// A velocity field. `x` is `(B, ..)` in f32; so is the result, or it is brought there.
pub trait Velocity {
    /// `v(x, sigma)`; `step` counts the steps of the run, for fields that change during it.
    fn velocity(&self, x: &Tensor, sigma: f64, step: usize) -> Result<Tensor>;
}

impl<F: Fn(&Tensor, f64, usize) -> Result<Tensor>> Velocity for F {
    fn velocity(&self, x: &Tensor, sigma: f64, step: usize) -> Result<Tensor> {
        self(x, sigma, step)
    }
}

/// The velocity in f32 and without its graph: no run needs gradients, and with them it would keep the activations of every
/// step. What is trained is evaluated again, at the states that a run went through.
pub fn evaluate(field: &impl Velocity, x: &Tensor, sigma: f64, step: usize) -> Result<Tensor> {
    Ok(field.velocity(x, sigma, step)?.to_dtype(DType::F32)?.detach())
}

/// `x + d v` in f32.
pub fn advance(x: &Tensor, v: &Tensor, d: f64) -> Result<Tensor> {
    x + (v.to_dtype(DType::F32)? * d)?
}

/// The steps of a run: `(index, sigma, next)`.
pub fn steps(sigmas: &[f64]) -> impl Iterator<Item = (usize, f64, f64)> + '_ {
    sigmas.windows(2).enumerate().map(|(i, pair)| (i, pair[0], pair[1]))
}

/// The solvers that take one evaluation a step, so that pictures are drawn by them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Solver {
    /// Euler's rule, as in diffusers' pipelines
    #[default]
    Euler,
    /// FireFlow: of second order, for one evaluation more in all
    #[value(name = "fireflow")]
    FireFlow,
}

impl Solver {
    pub fn solve(self, field: &impl Velocity, x: &Tensor, sigmas: &[f64]) -> Result<Tensor> {
        match self {
            Self::Euler => euler(field, x, sigmas),
            Self::FireFlow => fireflow(field, x, sigmas),
        }
    }

    /// The evaluations of so many steps.
    pub fn evaluations(self, steps: usize) -> usize {
        match self {
            Self::Euler => steps,
            Self::FireFlow => steps + 1,
        }
    }

    /// The name, as other programs show it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Euler => "Euler",
            Self::FireFlow => "FireFlow",
        }
    }
}

/// Euler's rule.
pub fn euler(field: &impl Velocity, x: &Tensor, sigmas: &[f64]) -> Result<Tensor> {
    let mut x = x.to_dtype(DType::F32)?;
    for (i, sigma, next) in steps(sigmas) {
        x = advance(&x, &evaluate(field, &x, sigma, i)?, next - sigma)?;
    }
    Ok(x)
}

/// RF-Solver: `x + d v + d^2/2 v'`, the derivative of the velocity along the path taken over half a step.
pub fn rf_solver(field: &impl Velocity, x: &Tensor, sigmas: &[f64]) -> Result<Tensor> {
    let mut x = x.to_dtype(DType::F32)?;
    for (i, sigma, next) in steps(sigmas) {
        let d = next - sigma;
        let v = evaluate(field, &x, sigma, i)?;
        let half = evaluate(field, &advance(&x, &v, d / 2.0)?, sigma + d / 2.0, i)?;
        let derivative = ((half - &v)? * (2.0 / d))?;
        x = advance(&advance(&x, &v, d)?, &derivative, d * d / 2.0)?;
    }
    Ok(x)
}

/// FireFlow: the midpoint rule, whose first half of a step follows the velocity of the last step's midpoint.
pub fn fireflow(field: &impl Velocity, x: &Tensor, sigmas: &[f64]) -> Result<Tensor> {
    let mut x = x.to_dtype(DType::F32)?;
    let mut last: Option<Tensor> = None;
    for (i, sigma, next) in steps(sigmas) {
        let d = next - sigma;
        let v = match last {
            Some(v) => v,
            None => evaluate(field, &x, sigma, i)?,
        };
        let v = evaluate(field, &advance(&x, &v, d / 2.0)?, sigma + d / 2.0, i)?;
        x = advance(&x, &v, d)?;
        last = Some(v);
    }
    Ok(x)
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use crate::tensor::rng::Stream;
    use candle_core::Device;
    use std::cell::Cell;

    /// A velocity field that counts its evaluations.
    pub struct Counted<V> {
        field: V,
        count: Cell<usize>,
    }

    impl<V: Velocity> Counted<V> {
        pub fn new(field: V) -> Self {
            Self { field, count: Cell::new(0) }
        }

        /// How often the field was evaluated.
        pub fn count(&self) -> usize {
            self.count.get()
        }
    }

    impl<V: Velocity> Velocity for Counted<V> {
        fn velocity(&self, x: &Tensor, sigma: f64, step: usize) -> Result<Tensor> {
            self.count.set(self.count.get() + 1);
            self.field.velocity(x, sigma, step)
        }
    }

    /// The midpoint rule, which RF-Solver is another form of.
    pub fn midpoint(field: &impl Velocity, x: &Tensor, sigmas: &[f64]) -> Result<Tensor> {
        let mut x = x.to_dtype(DType::F32)?;
        for (i, sigma, next) in steps(sigmas) {
            let d = next - sigma;
            let half = advance(&x, &evaluate(field, &x, sigma, i)?, d / 2.0)?;
            x = advance(&x, &evaluate(field, &half, sigma + d / 2.0, i)?, d)?;
        }
        Ok(x)
    }

    /// The flow of data with variance 1/4: its exact velocity is linear in `x`.
    pub fn gaussian(x: &Tensor, t: f64, _: usize) -> Result<Tensor> {
        x * slope(t)
    }

    pub fn slope(t: f64) -> f64 {
        (t - (1.0 - t) * 0.25) / ((1.0 - t).powi(2) * 0.25 + t * t)
    }

    /// `n` even steps from `from` to `to`.
    pub fn even(n: usize, from: f64, to: f64) -> Vec<f64> {
        (0..=n).map(|i| from + (to - from) * i as f64 / n as f64).collect()
    }

    pub fn noise(index: u64) -> Tensor {
        Stream::new(3, "test", index).normal(&[2, 5, 4], &Device::Cpu).expect("a small tensor")
    }

    /// The largest absolute difference.
    pub fn gap(a: &Tensor, b: &Tensor) -> f32 {
        (a - b).and_then(|d| d.abs()?.max_all()?.to_scalar()).expect("tensors of one shape")
    }

    type Solver = fn(&Counted<fn(&Tensor, f64, usize) -> Result<Tensor>>, &Tensor, &[f64]) -> Result<Tensor>;

    fn run(solver: Solver, n: usize, x: &Tensor) -> (Tensor, usize) {
        let field = Counted::new(gaussian as fn(&Tensor, f64, usize) -> Result<Tensor>);
        let out = solver(&field, x, &even(n, 1.0, 0.0)).expect("a run");
        (out, field.count())
    }

    const SOLVERS: [(Solver, i32); 4] = [(euler, 1), (midpoint, 2), (rf_solver, 2), (fireflow, 2)];

    #[test]
    fn a_solver_takes_as_many_evaluations_as_it_says() -> Result<()> {
        use super::Solver::{Euler, FireFlow};
        let x = Tensor::ones((1, 2), DType::F32, &Device::Cpu)?;
        let sigmas = [1.0, 0.7, 0.4, 0.0];
        for solver in [Euler, FireFlow] {
            let field = Counted::new(|x: &Tensor, _: f64, _: usize| x.clone() * 0.5);
            let drawn = solver.solve(&field, &x, &sigmas)?;
            assert_eq!(field.count(), solver.evaluations(3));
            // exp(-0.5) is the flow's own end: the rule of second order comes nearer to it.
            let off = (drawn.get(0)?.get(0)?.to_scalar::<f32>()? - (-0.5f32).exp()).abs();
            assert!(if solver == Euler { (0.01..0.1).contains(&off) } else { off < 0.01 }, "{solver:?}: {off}");
        }
        Ok(())
    }

    #[test]
    fn each_solver_has_its_order() -> Result<()> {
        let x = noise(0);
        let exact = (&x * 0.5)?; // this flow maps a standard deviation of 1 to one of 1/2
        for (solver, order) in SOLVERS {
            let coarse = gap(&run(solver, 20, &x).0, &exact);
            let fine = gap(&run(solver, 40, &x).0, &exact);
            let observed = (coarse / fine).log2();
            // The midpoint rule gains an order on this field.
            assert!(observed > order as f32 - 0.3, "order {observed} where {order} is due");
        }
        Ok(())
    }

    #[test]
    fn evaluations_are_counted() {
        let counts: Vec<usize> = SOLVERS.iter().map(|(solver, _)| run(*solver, 8, &noise(0)).1).collect();
        assert_eq!(counts, [8, 16, 16, 9]);
    }

    #[test]
    fn rf_solver_is_the_midpoint_rule() {
        let x = noise(1);
        assert!(gap(&run(rf_solver, 7, &x).0, &run(midpoint, 7, &x).0) < 2e-6);
    }

    #[test]
    fn a_constant_velocity_makes_an_exact_round_trip() -> Result<()> {
        // Numbers of few bits, so that no step rounds.
        let constant = |x: &Tensor, _: f64, _: usize| x.ones_like()? * 0.75;
        let x = ((noise(2) * 64.0)?.round()? / 64.0)?;
        let (up, down) = (even(8, 0.0, 1.0), even(8, 1.0, 0.0));
        assert_eq!(gap(&euler(&constant, &euler(&constant, &x, &up)?, &down)?, &x), 0.0);
        assert_eq!(gap(&midpoint(&constant, &midpoint(&constant, &x, &up)?, &down)?, &x), 0.0);
        assert_eq!(gap(&rf_solver(&constant, &rf_solver(&constant, &x, &up)?, &down)?, &x), 0.0);
        assert_eq!(gap(&fireflow(&constant, &fireflow(&constant, &x, &up)?, &down)?, &x), 0.0);
        Ok(())
    }

    #[test]
    fn states_stay_in_f32_whatever_the_network_computes_in() -> Result<()> {
        let half = |x: &Tensor, t: f64, i: usize| gaussian(x, t, i)?.to_dtype(DType::BF16);
        for out in [euler(&half, &noise(3), &even(4, 1.0, 0.0))?, rf_solver(&half, &noise(3), &even(4, 1.0, 0.0))?] {
            assert_eq!(out.dtype(), DType::F32);
        }
        Ok(())
    }
}
