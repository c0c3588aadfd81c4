//! Rewards: what training makes more likely. Each has a name, works on many samples at once, and adds up with weights.
//!
//! The paper's reward is `satisfied`, the share of the claims that hold after the edit. `kept` is its counterweight: an
//! editor that is only paid for what was asked learns to repaint everything.

use super::roles::{Verdict, expect_each, score};
use anyhow::{Result, bail};

/// What a reward may look at: the Checker's verdicts on a picture and on the one it was made from.
#[derive(Clone, Copy, Debug)]
pub struct Sample<'a> {
    /// `None` for a picture that was drawn, not edited.
    pub before: Option<&'a [Verdict]>,
    pub after: &'a [Verdict],
}

pub trait Reward {
    fn name(&self) -> &str;
    /// One number for each sample.
    fn score(&self, samples: &[Sample]) -> Result<Vec<f64>>;
}

/// The rewards that need nothing but verdicts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ByVerdicts {
    /// The share of the claims that hold.
    Satisfied,
    /// The mean P(yes): as `satisfied`, without its steps.
    Probability,
    /// 1 if every claim holds.
    Passed,
    /// What the edit added to the mean P(yes).
    Gain,
    /// The share of the claims that held before and still hold.
    Kept,
    /// The share of the claims that failed before and now hold.
    Fixed,
}

impl ByVerdicts {
    pub const ALL: [Self; 6] = [Self::Satisfied, Self::Probability, Self::Passed, Self::Gain, Self::Kept, Self::Fixed];

    fn of(self, sample: &Sample) -> f64 {
        let share = |of: &dyn Fn(&Verdict) -> bool| {
            let among = sample.after.iter().zip(sample.before.unwrap_or(sample.after)).filter(|(_, before)| of(before));
            let (n, yes) = among.fold((0, 0), |(n, yes), (after, _)| (n + 1, yes + u32::from(after.yes)));
            // Where there was nothing to keep or to fix, nothing was lost.
            if n == 0 { 1.0 } else { f64::from(yes) / f64::from(n) }
        };
        match self {
            Self::Satisfied => share(&|_| true),
            Self::Probability => score(sample.after).unwrap_or(1.0),
            Self::Passed => f64::from(u8::from(sample.after.iter().all(|v| v.yes))),
            Self::Gain => {
                let before = sample.before.and_then(score);
                score(sample.after).zip(before).map_or(0.0, |(after, before)| after - before)
            }
            Self::Kept => share(&|before| before.yes),
            Self::Fixed => share(&|before| !before.yes),
        }
    }
}

impl Reward for ByVerdicts {
    fn name(&self) -> &str {
        match self {
            Self::Satisfied => "satisfied",
            Self::Probability => "probability",
            Self::Passed => "passed",
            Self::Gain => "gain",
            Self::Kept => "kept",
            Self::Fixed => "fixed",
        }
    }

    fn score(&self, samples: &[Sample]) -> Result<Vec<f64>> {
        Ok(samples.iter().map(|s| self.of(s)).collect())
    }
}

/// A weighted sum of rewards.
pub struct Weighted(Vec<(f64, Box<dyn Reward>)>);

/// The sums, and each part before its weight, by name, for the log.
pub struct Scores {
    pub total: Vec<f64>,
    pub parts: Vec<(String, Vec<f64>)>,
}

impl Weighted {
    pub fn new(parts: Vec<(f64, Box<dyn Reward>)>) -> Self {
        Self(parts)
    }

    /// The built-in rewards by name and weight, as a config lists them.
    pub fn named<'a>(parts: impl IntoIterator<Item = (&'a str, f64)>) -> Result<Self> {
        let mut rewards: Vec<(f64, Box<dyn Reward>)> = Vec::new();
        for (name, weight) in parts {
            let Some(reward) = ByVerdicts::ALL.into_iter().find(|r| r.name() == name) else {
                let known: Vec<String> = ByVerdicts::ALL.iter().map(|r| r.name().to_owned()).collect();
                bail!("there is no reward {name:?}; there are {}", known.join(", "));
            };
            rewards.push((weight, Box::new(reward)));
        }
        Ok(Self(rewards))
    }

    pub fn score(&self, samples: &[Sample]) -> Result<Scores> {
        let mut scores = Scores { total: vec![0.0; samples.len()], parts: Vec::new() };
        for (weight, reward) in &self.0 {
            let part = expect_each(reward.name(), samples.len(), reward.score(samples)?)?;
            for (total, part) in scores.total.iter_mut().zip(&part) {
                *total += weight * part;
            }
            scores.parts.push((reward.name().to_owned(), part));
        }
        Ok(scores)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rig::roles::Claim;

    fn verdicts(p: &[f64]) -> Vec<Verdict> {
        let verdict = |p: &f64| Verdict {
            claim: Claim::Object("ball".into()),
            yes: *p >= 0.5,
            p_yes: *p,
            reflection: String::new(),
        };
        p.iter().map(verdict).collect()
    }

    #[test]
    fn each_reward_is_what_its_name_says() {
        let (before, after) = (verdicts(&[0.9, 0.8, 0.1, 0.2]), verdicts(&[0.9, 0.4, 0.7, 0.0]));
        let sample = Sample { before: Some(&before), after: &after };
        let of = |reward: ByVerdicts| reward.score(&[sample]).unwrap()[0];
        assert_eq!(of(ByVerdicts::Satisfied), 0.5);
        assert!((of(ByVerdicts::Probability) - 0.5).abs() < 1e-12);
        assert_eq!(of(ByVerdicts::Passed), 0.0);
        assert!(of(ByVerdicts::Gain).abs() < 1e-12);
        assert_eq!(of(ByVerdicts::Kept), 0.5);
        assert_eq!(of(ByVerdicts::Fixed), 0.5);
    }

    #[test]
    fn a_drawn_picture_has_nothing_to_keep() {
        let after = verdicts(&[0.9, 0.9]);
        let sample = Sample { before: None, after: &after };
        assert_eq!(ByVerdicts::Gain.score(&[sample]).unwrap(), [0.0]);
        assert_eq!(ByVerdicts::Fixed.score(&[sample]).unwrap(), [1.0]);
    }

    #[test]
    fn rewards_add_up_with_their_weights_and_keep_their_names() {
        let (before, after) = (verdicts(&[0.9, 0.1]), verdicts(&[0.9, 0.9]));
        let samples = [Sample { before: Some(&before), after: &after }, Sample { before: None, after: &before }];
        let scores = Weighted::named([("satisfied", 2.0), ("passed", -1.0)]).unwrap().score(&samples).unwrap();
        assert_eq!(scores.total, [1.0, 1.0]);
        assert_eq!(scores.parts, [("satisfied".to_owned(), vec![1.0, 0.5]), ("passed".to_owned(), vec![1.0, 0.0])]);
        let error = Weighted::named([("statisfied", 1.0)]).err().unwrap().to_string();
        assert!(error.contains("there are satisfied"), "{error}");
    }
}
