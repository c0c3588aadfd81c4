//! Noise levels of a sampling run: diffusers' `FlowMatchEulerDiscreteScheduler`, read from `scheduler_config.json`.
//!
//! Evenly spaced levels are shifted towards noise, the more the larger the picture:
//! `e^mu / (e^mu + 1/sigma - 1)` where `mu` comes from the number of tokens and steps (FLUX.2's [`empirical_mu`]), or a fixed
//! `shift * sigma / (1 + (shift - 1) * sigma)`.

use crate::models::Folder;
use anyhow::{Result, bail};
use serde::Deserialize;

/// FLUX.2's fit of the time shift to the number of picture tokens and of steps, as its pipelines in diffusers have it.
pub fn empirical_mu(tokens: usize, steps: usize) -> f64 {
    let tokens = tokens as f64;
    let at_200 = 0.00016927 * tokens + 0.45666666;
    if tokens > 4300.0 {
        return at_200;
    }
    let at_10 = 8.73809524e-05 * tokens + 1.89833333;
    let slope = (at_200 - at_10) / 190.0;
    slope * steps as f64 + at_200 - 200.0 * slope
}

/// How a dynamic shift maps a level.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum TimeShift {
    #[default]
    Exponential,
    Linear,
}

/// The scheduler's configuration; what diffusers has beside these and is not at its default is refused.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(default)]
pub struct Schedule {
    pub num_train_timesteps: usize,
    /// The fixed shift, for models without a dynamic one.
    pub shift: f64,
    pub use_dynamic_shifting: bool,
    pub time_shift_type: TimeShift,
    /// The levels are stretched so that the last of them before 0 is this.
    pub shift_terminal: Option<f64>,
    invert_sigmas: bool,
    use_karras_sigmas: bool,
    use_exponential_sigmas: bool,
    use_beta_sigmas: bool,
    stochastic_sampling: bool,
}

impl Default for Schedule {
    fn default() -> Self {
        Self {
            num_train_timesteps: 1000,
            shift: 1.0,
            use_dynamic_shifting: false,
            time_shift_type: TimeShift::Exponential,
            shift_terminal: None,
            invert_sigmas: false,
            use_karras_sigmas: false,
            use_exponential_sigmas: false,
            use_beta_sigmas: false,
            stochastic_sampling: false,
        }
    }
}

impl Schedule {
    /// The schedule of the `scheduler/` folder of a model.
    pub fn open(folder: &Folder) -> Result<Self> {
        let schedule: Self = folder.json("scheduler_config.json")?;
        let unsupported = [
            ("invert_sigmas", schedule.invert_sigmas),
            ("use_karras_sigmas", schedule.use_karras_sigmas),
            ("use_exponential_sigmas", schedule.use_exponential_sigmas),
            ("use_beta_sigmas", schedule.use_beta_sigmas),
            ("stochastic_sampling", schedule.stochastic_sampling),
        ];
        let file = folder.file("scheduler_config.json");
        if let Some((key, _)) = unsupported.iter().find(|(_, on)| *on) {
            bail!("{file} asks for {key}, which FLUX.2 does not use and rlrig does not have");
        }
        if schedule.num_train_timesteps == 0 || schedule.shift <= 0.0 {
            bail!("{file}: num_train_timesteps and shift must be positive");
        }
        if schedule.shift_terminal.is_some_and(|t| !(0.0..1.0).contains(&t)) {
            bail!("{file}: shift_terminal must be in [0, 1)");
        }
        Ok(schedule)
    }

    /// The `steps + 1` levels of a run over a picture of `tokens` tokens, from 1 down to 0, as FLUX.2's pipelines ask for
    /// them: evenly from 1 to `1 / steps`, shifted, then 0.
    pub fn sigmas(&self, steps: usize, tokens: usize) -> Vec<f64> {
        let even: Vec<f64> = (0..steps).map(|i| (steps - i) as f64 / steps as f64).collect();
        self.shifted(even, empirical_mu(tokens, steps))
    }

    /// Shifts the levels `sigmas`, which go down and stay above 0, and appends 0. `mu` is used with a dynamic shift only.
    ///
    /// In f32, as the reference: the network turns a level into angles of up to 1000 radians, where the last bit shows.
    pub fn shifted(&self, sigmas: Vec<f64>, mu: f64) -> Vec<f64> {
        let fixed = self.shift as f32;
        let shift = |sigma: f32| {
            if !self.use_dynamic_shifting {
                return fixed * sigma / (1.0 + (self.shift - 1.0) as f32 * sigma);
            }
            let scale = match self.time_shift_type {
                TimeShift::Exponential => mu.exp(),
                TimeShift::Linear => mu,
            } as f32;
            scale / (scale + (1.0 / sigma - 1.0))
        };
        let mut sigmas: Vec<f32> = sigmas.into_iter().map(|sigma| shift(sigma as f32)).collect();
        // As in diffusers, a terminal of 0 means none; so does a schedule of one level, which has nothing to stretch.
        if let (Some(terminal), Some(&last)) = (self.shift_terminal.filter(|t| *t > 0.0), sigmas.last())
            && last < 1.0
        {
            let scale = (1.0 - last) / (1.0 - terminal) as f32;
            for sigma in &mut sigmas {
                *sigma = 1.0 - (1.0 - *sigma) / scale;
            }
        }
        sigmas.push(0.0);
        sigmas.into_iter().map(f64::from).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(json: &str) -> Result<Schedule> {
        let dir = tempfile::tempdir()?;
        std::fs::write(dir.path().join("scheduler_config.json"), json)?;
        Schedule::open(&Folder::from(dir.path()))
    }

    // The expected numbers of this module are diffusers 0.42.1's.

    #[test]
    fn mu_is_that_of_the_reference() {
        for (tokens, steps, mu) in [
            (64, 4, 1.9492865247731874),
            (64, 28, 1.767843269494838),
            (256, 50, 1.6216074698534737),
            (4096, 8, 2.2678904387254573),
            (4300, 28, 2.170851489658105),
            (4301, 4, 1.18469693),
            (8000, 50, 1.81082666),
        ] {
            assert!((empirical_mu(tokens, steps) - mu).abs() < 1e-12);
        }
    }

    #[test]
    fn sigmas_are_those_of_the_reference() -> Result<()> {
        let dynamic = parse(
            r#"{"_class_name": "FlowMatchEulerDiscreteScheduler", "_diffusers_version": "0.42.1", "base_shift": 0.5,
                "use_dynamic_shifting": true, "max_shift": 1.15, "time_shift_type": "exponential", "shift": 3.0,
                "shift_terminal": null, "num_train_timesteps": 1000, "use_karras_sigmas": false}"#,
        )?;
        assert_eq!(dynamic.sigmas(4, 64), [1.0, 0.9546917080879211, 0.8753688931465149, 0.7007085680961609, 0.0]);
        let linear = Schedule { time_shift_type: TimeShift::Linear, ..dynamic.clone() };
        assert_eq!(
            linear.sigmas(5, 4096),
            [1.0, 0.9013945460319519, 0.7741662859916687, 0.6037362217903137, 0.3636002242565155, 0.0],
        );
        let terminal = Schedule { shift_terminal: Some(0.02), ..dynamic };
        assert_eq!(terminal.sigmas(4, 5000), [1.0, 0.818766713142395, 0.5337435007095337, 0.019999980926513672, 0.0]);
        let fixed = Schedule { shift: 3.0, ..Schedule::default() };
        assert_eq!(fixed.sigmas(4, 64), [1.0, 0.8999999761581421, 0.75, 0.5, 0.0]);
        assert_eq!(Schedule::default().sigmas(3, 64), [1.0, 0.6666666865348816, 0.3333333432674408, 0.0]);
        Ok(())
    }

    #[test]
    fn one_step_goes_from_noise_to_the_picture() {
        let schedule = Schedule { shift_terminal: Some(0.1), use_dynamic_shifting: true, ..Schedule::default() };
        assert_eq!(schedule.sigmas(1, 64), [1.0, 0.0]);
    }

    #[test]
    fn what_is_not_supported_is_refused_by_name() {
        let refused = |json: &str, word: &str| {
            let error = parse(json).expect_err(json).to_string();
            assert!(error.contains(word), "{error}");
        };
        refused(r#"{"use_karras_sigmas": true}"#, "use_karras_sigmas");
        refused(r#"{"stochastic_sampling": true}"#, "stochastic_sampling");
        refused(r#"{"shift": 0.0}"#, "shift");
        refused(r#"{"shift_terminal": 1.0}"#, "shift_terminal");
        assert!(parse(r#"{"time_shift_type": "cubic"}"#).is_err());
    }
}
