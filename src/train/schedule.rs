//! Learning-rate schedules: a linear warmup, then constant, cosine, or constant with a linear decay at the end.

use serde::{Deserialize, Serialize};
use std::f64::consts::PI;

/// How the learning rate goes on after the warmup.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Shape {
    /// As it is.
    Constant,
    /// Half a period of a cosine, down to what is left at the end.
    Cosine,
    /// Constant, then linear over the last `decay` part of the steps ("trapezoidal", "warmup-stable-decay").
    Linear,
}

/// The section `optim.schedule`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Schedule {
    /// Steps until the full rate.
    pub warmup: u64,
    pub shape: Shape,
    /// The last part of the steps, over which `linear` decays.
    pub decay: f64,
    /// What is left of the rate at the end.
    pub last: f64,
}

impl Default for Schedule {
    fn default() -> Self {
        Self { warmup: 100, shape: Shape::Linear, decay: 0.3, last: 0.02 }
    }
}

impl Schedule {
    /// The factor on the learning rate at `step` of `steps`, both counted from 0.
    pub fn factor(&self, step: u64, steps: u64) -> f64 {
        if step < self.warmup {
            return (step + 1) as f64 / self.warmup as f64;
        }
        let after = |start: f64| ((step as f64 - start) / (steps as f64 - start).max(1.0)).clamp(0.0, 1.0);
        let left = match self.shape {
            Shape::Constant => return 1.0,
            Shape::Cosine => 0.5 + 0.5 * (PI * after(self.warmup as f64)).cos(),
            Shape::Linear => 1.0 - after((steps as f64 * (1.0 - self.decay)).max(self.warmup as f64)),
        };
        self.last + (1.0 - self.last) * left
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn close(a: f64, b: f64) {
        assert!((a - b).abs() < 1e-12, "{a} is not {b}");
    }

    #[test]
    fn warmup_is_linear_and_never_zero() {
        let schedule = Schedule { warmup: 4, ..Schedule::default() };
        for (step, factor) in [(0, 0.25), (1, 0.5), (3, 1.0), (4, 1.0)] {
            close(schedule.factor(step, 1000), factor);
        }
    }

    #[test]
    fn cosine_falls_from_the_warmup_to_the_end() {
        let schedule = Schedule { warmup: 10, shape: Shape::Cosine, last: 0.1, ..Schedule::default() };
        close(schedule.factor(10, 110), 1.0);
        close(schedule.factor(60, 110), 0.55);
        close(schedule.factor(110, 110), 0.1);
        close(schedule.factor(500, 110), 0.1);
    }

    #[test]
    fn linear_decays_over_its_last_part_only() {
        let schedule = Schedule { warmup: 0, shape: Shape::Linear, decay: 0.2, last: 0.0 };
        close(schedule.factor(80, 100), 1.0);
        close(schedule.factor(90, 100), 0.5);
        close(schedule.factor(100, 100), 0.0);
        close(Schedule { shape: Shape::Constant, ..schedule }.factor(90, 100), 1.0);
    }
}
