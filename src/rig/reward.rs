//! Rewards by the Checker's verdicts: what training makes more likely.
//!
//! The paper's reward is `satisfied`, the share of the claims that hold after the edit. `kept` is its counterweight: an
//! editor that is only paid for what was asked learns to repaint everything.

use super::roles::{Verdict, mean_probability, score};

/// What a reward looks at: the Checker's verdicts on a picture and on the one it was made from, claim by claim.
#[derive(Clone, Copy, Debug)]
pub struct Sample<'a> {
    pub before: &'a [Verdict],
    pub after: &'a [Verdict],
}

/// The rewards that need nothing but verdicts, each by the name under which a config gives it a weight.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ByVerdicts {
    /// The share of the claims that hold.
    Satisfied,
    /// The mean P(yes): as `satisfied`, without its steps.
    Probability,
    /// The Checker's score, by which the loop tells the better picture: one doubtful claim counts for more than in the mean.
    Score,
    /// 1 if every claim holds.
    Passed,
    /// What the edit added to the mean P(yes).
    Gain,
    /// Of the claims that held before, the share that still holds.
    Kept,
    /// Of the claims that failed before, the share that now holds.
    Fixed,
}

impl ByVerdicts {
    pub const ALL: [Self; 7] =
        [Self::Satisfied, Self::Probability, Self::Score, Self::Passed, Self::Gain, Self::Kept, Self::Fixed];

    pub fn name(self) -> &'static str {
        match self {
            Self::Satisfied => "satisfied",
            Self::Probability => "probability",
            Self::Score => "score",
            Self::Passed => "passed",
            Self::Gain => "gain",
            Self::Kept => "kept",
            Self::Fixed => "fixed",
        }
    }

    /// What an edit is worth; in 0..=1 but for `gain`, which is in -1..=1.
    pub fn of(self, Sample { before, after }: Sample) -> f64 {
        let of_those = |held: bool| before.iter().zip(after).filter(move |(v, _)| v.yes == held).map(|(_, v)| v.yes);
        match self {
            Self::Satisfied => share(after.iter().map(|v| v.yes)),
            Self::Probability => mean_probability(after).unwrap_or(1.0),
            Self::Score => score(after).unwrap_or(1.0),
            Self::Passed => f64::from(u8::from(after.iter().all(|v| v.yes))),
            Self::Gain => {
                mean_probability(after).zip(mean_probability(before)).map_or(0.0, |(after, before)| after - before)
            }
            Self::Kept => share(of_those(true)),
            Self::Fixed => share(of_those(false)),
        }
    }
}

/// The share that holds. Where there was nothing to keep or to fix, nothing was lost.
fn share(held: impl Iterator<Item = bool>) -> f64 {
    let (n, yes) = held.fold((0, 0), |(n, yes), held| (n + 1, yes + u32::from(held)));
    if n == 0 { 1.0 } else { f64::from(yes) / f64::from(n) }
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
        let (before, after) = (verdicts(&[0.9, 0.8, 0.7, 0.1, 0.2]), verdicts(&[0.9, 0.4, 0.6, 0.7, 0.2]));
        let of = |reward: ByVerdicts| reward.of(Sample { before: &before, after: &after });
        assert_eq!(of(ByVerdicts::Satisfied), 0.6);
        assert!((of(ByVerdicts::Probability) - 0.56).abs() < 1e-12);
        assert!((of(ByVerdicts::Score) - (0.9f64 * 0.4 * 0.6 * 0.7 * 0.2).powf(0.2)).abs() < 1e-12);
        assert_eq!(of(ByVerdicts::Passed), 0.0);
        assert!((of(ByVerdicts::Gain) - 0.02).abs() < 1e-12);
        assert_eq!(of(ByVerdicts::Kept), 2.0 / 3.0);
        assert_eq!(of(ByVerdicts::Fixed), 0.5);
    }

    #[test]
    fn where_nothing_failed_there_is_nothing_to_fix() {
        let (right, wrong) = (verdicts(&[0.9, 0.9]), verdicts(&[0.9, 0.1]));
        let of = |reward: ByVerdicts, before, after| reward.of(Sample { before, after });
        assert_eq!((of(ByVerdicts::Fixed, &right, &wrong), of(ByVerdicts::Kept, &right, &wrong)), (1.0, 0.5));
        assert_eq!((of(ByVerdicts::Passed, &wrong, &right), of(ByVerdicts::Passed, &right, &wrong)), (1.0, 0.0));
    }
}
