//! Whether two judges say the same: accuracy, Cohen's kappa, and calibration of the one's probabilities by the other.

use super::bootstrap::{Estimate, Resamples};
use crate::rig::calibration::Bins;
use serde::Serialize;

/// How one judge's probabilities agree with another's truths, with intervals over prompts, whose claims are not independent.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Agreement {
    /// The share of claims on whose truth both agree.
    pub accuracy: Estimate,
    /// 1 for full agreement, 0 for that of chance; nothing where all claims have one answer.
    pub kappa: Option<Estimate>,
    pub calibration_error: Estimate,
    pub claims: usize,
}

/// A prompt's claims, or those of many.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Tally {
    /// How often the one and the other said no (0) or yes (1).
    said: [[usize; 2]; 2],
    bins: Bins,
}

impl Tally {
    /// Counts a claim by the one's probability and the other's truth.
    pub fn count(&mut self, p: f64, truth: bool) {
        self.said[usize::from(p >= 0.5)][usize::from(truth)] += 1;
        self.bins.count(p, truth);
    }

    fn join(&mut self, other: &Self) {
        let all = self.said.iter_mut().flatten().zip(other.said.iter().flatten());
        all.for_each(|(n, more)| *n += more);
        self.bins.join(&other.bins);
    }

    fn claims(&self) -> usize {
        self.said.iter().flatten().sum()
    }

    fn accuracy(&self) -> f64 {
        (self.said[0][0] + self.said[1][1]) as f64 / self.claims().max(1) as f64
    }

    /// Cohen's kappa: agreement beyond that of two judges who say yes as often, but at random. Not defined where chance alone
    /// gives full agreement.
    fn kappa(&self) -> Option<f64> {
        let share = |n: usize| n as f64 / self.claims().max(1) as f64;
        let [[_, no_yes], [yes_no, both]] = self.said;
        let (one, other) = (share(yes_no + both), share(no_yes + both));
        let chance = one * other + (1.0 - one) * (1.0 - other);
        (self.claims() > 0 && 1.0 - chance > 1e-12).then(|| (self.accuracy() - chance) / (1.0 - chance))
    }
}

/// The agreement on the claims of all `prompts`; `None` if there are none.
pub fn agreement(prompts: &[Tally]) -> Option<Agreement> {
    let resamples = Resamples::new(prompts.len());
    let joined = |drawn: &mut dyn Iterator<Item = usize>| {
        let mut all = Tally::default();
        drawn.for_each(|i| all.join(&prompts[i]));
        all
    };
    let with_claims = prompts.iter().filter(|tally| tally.claims() > 0).count();
    let of = |value: fn(&Tally) -> Option<f64>| {
        let statistic = |drawn: &mut dyn Iterator<Item = usize>| {
            let all = joined(drawn);
            value(&all).filter(|_| all.claims() > 0)
        };
        resamples.statistic(&statistic, with_claims)
    };
    Some(Agreement {
        accuracy: of(|all| Some(all.accuracy()))?.of_shares(),
        kappa: of(Tally::kappa),
        calibration_error: of(|all| Some(all.bins.error()))?.basic(),
        claims: joined(&mut (0..prompts.len())).claims(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// `yes_yes`, `yes_no`, `no_yes`, `no_no` claims.
    fn table(counts: [usize; 4]) -> Tally {
        let kinds = [(1.0, true), (1.0, false), (0.0, true), (0.0, false)];
        let mut tally = Tally::default();
        for ((p, truth), n) in kinds.into_iter().zip(counts) {
            (0..n).for_each(|_| tally.count(p, truth));
        }
        tally
    }

    #[test]
    fn kappa_is_that_of_the_textbook() {
        let kappa = |counts| table(counts).kappa().unwrap();
        // 20 and 15 of 50 agree: 0.7; chance 0.5 * 0.6 + 0.5 * 0.4 = 0.5; so 0.4.
        assert!((kappa([20, 5, 10, 15]) - 0.4).abs() < 1e-12);
        assert_eq!(kappa([10, 0, 0, 10]), 1.0);
        assert!(kappa([5, 5, 5, 5]).abs() < 1e-12);
        assert_eq!(kappa([0, 10, 10, 0]), -1.0);
        assert_eq!((table([7, 0, 0, 0]).kappa(), Tally::default().kappa()), (None, None));
        // Symmetric.
        assert!((kappa([20, 5, 10, 15]) - kappa([20, 10, 5, 15])).abs() < 1e-12);
    }

    #[test]
    fn agreement_is_that_of_all_claims_and_its_interval_that_of_the_prompts() {
        let claims = [(0.9, true), (0.5, true), (0.4, true), (0.1, false)];
        let one = |(p, truth)| {
            let mut tally = Tally::default();
            tally.count(p, truth);
            tally
        };
        let found = agreement(&claims.map(one)).unwrap();
        assert_eq!((found.accuracy.mean, found.accuracy.n, found.claims), (0.75, 4, 4));
        // (0.1 + 0.5 + 0.6 + 0.1) / 4
        assert!((found.calibration_error.mean - 0.325).abs() < 1e-12);
        assert!(found.accuracy.lo < 0.75 && found.accuracy.hi == 1.0, "{found:?}");
        // Rightly sure of nine tenths: that some resamples look worse says nothing against it.
        let calibrated = agreement(&(0..200).map(|i| one((0.9, i % 10 > 0))).collect::<Vec<_>>()).unwrap();
        assert!(calibrated.calibration_error.lo < 1e-9 && calibrated.calibration_error.hi < 0.05, "{calibrated:?}");
        // Prompts that are all alike leave no doubt.
        let alike = agreement(&[table([3, 1, 0, 2]); 8]).unwrap();
        assert_eq!(
            (alike.accuracy.lo, alike.accuracy.hi, alike.claims),
            (alike.accuracy.mean, alike.accuracy.mean, 48)
        );
        assert_eq!((agreement(&[]), agreement(&[Tally::default()])), (None, None));
    }

    /// What the claims `(P(yes), truth)` come to.
    fn tally(claims: &[(f64, bool)]) -> Tally {
        let mut tally = Tally::default();
        claims.iter().for_each(|(p, truth)| tally.count(*p, *truth));
        tally
    }

    proptest::proptest! {
        #[test]
        fn agreement_is_bounded_symmetric_and_the_same_in_any_order(
            claims in proptest::collection::vec((0.0..=1.0f64, proptest::bool::ANY), 1..60),
            turn in 0..60usize,
            at in 0..60usize,
        ) {
            let is_close = |a: f64, b: f64| (a - b).abs() < 1e-9;
            let all = tally(&claims);
            let (accuracy, error) = (all.accuracy(), all.bins.error());
            proptest::prop_assert!((0.0..=1.0).contains(&accuracy) && (0.0..=1.0).contains(&error));
            if let Some(kappa) = all.kappa() {
                proptest::prop_assert!((-1.0..=1.0 + 1e-9).contains(&kappa) && is_close(kappa, 1.0) == (accuracy == 1.0));
            }

            // Who is asked first does not matter: each by what it says, the other as the truth.
            let said: Vec<(f64, bool)> = claims.iter().map(|(p, truth)| (f64::from(u8::from(*truth)), *p >= 0.5)).collect();
            let other = tally(&said);
            proptest::prop_assert!(is_close(other.accuracy(), accuracy));
            let kappas = [all.kappa(), other.kappa()];
            let same = kappas[0].zip(kappas[1]).map_or(kappas == [None, None], |(a, b)| is_close(a, b));
            proptest::prop_assert!(same, "{:?}", kappas);

            // Nor does the order of the claims, nor which prompt they belong to.
            let mut turned = claims.clone();
            turned.rotate_left(turn % claims.len());
            let (first, second) = turned.split_at(at % claims.len());
            let found = agreement(&[tally(first), tally(second)]).unwrap();
            proptest::prop_assert_eq!(found.claims, claims.len());
            proptest::prop_assert!(is_close(found.accuracy.mean, accuracy) && is_close(found.calibration_error.mean, error));
            for Estimate { mean, lo, hi, .. } in [found.accuracy, found.calibration_error] {
                // By another order of the sum the ends may differ from it in the last digits.
                proptest::prop_assert!(0.0 <= lo && lo <= mean + 1e-9 && mean <= hi + 1e-9 && hi <= 1.0, "{} {} {}", lo, mean, hi);
            }
        }
    }
}
