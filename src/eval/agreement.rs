//! Whether two judges say the same: accuracy, Cohen's kappa, and calibration of the one's probabilities by the other.

use super::stats::Share;
use crate::rig::calibration::calibration_error;
use serde::Serialize;

/// How one judge's probabilities agree with another's truths.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Agreement {
    /// Claims on whose truth both agree, with Wilson's interval.
    pub accuracy: Share,
    /// 1 for full agreement, 0 for that of chance.
    pub kappa: f64,
    pub calibration_error: f64,
}

/// Of claims with a probability and a truth.
pub fn agreement(claims: &[(f64, bool)]) -> Agreement {
    let mut accuracy = Share::default();
    let said: Vec<(bool, bool)> = claims.iter().map(|(p, truth)| (*p >= 0.5, *truth)).collect();
    said.iter().for_each(|(a, b)| accuracy.count(a == b));
    Agreement { accuracy, kappa: kappa(&said), calibration_error: calibration_error(claims) }
}

/// Cohen's kappa: agreement beyond that of two judges who say yes as often, but at random. 0 where chance alone would give
/// full agreement.
pub fn kappa(pairs: &[(bool, bool)]) -> f64 {
    let n = pairs.len().max(1) as f64;
    let share = |count: usize| count as f64 / n;
    let agree = share(pairs.iter().filter(|(a, b)| a == b).count());
    let (yes_a, yes_b) = (share(pairs.iter().filter(|p| p.0).count()), share(pairs.iter().filter(|p| p.1).count()));
    let chance = yes_a * yes_b + (1.0 - yes_a) * (1.0 - yes_b);
    if pairs.is_empty() || 1.0 - chance < 1e-12 { 0.0 } else { (agree - chance) / (1.0 - chance) }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// `yes_yes`, `yes_no`, `no_yes`, `no_no` pairs.
    fn table(counts: [usize; 4]) -> Vec<(bool, bool)> {
        let kinds = [(true, true), (true, false), (false, true), (false, false)];
        kinds.into_iter().zip(counts).flat_map(|(pair, n)| vec![pair; n]).collect()
    }

    #[test]
    fn kappa_is_that_of_the_textbook() {
        // 20 and 15 of 50 agree: 0.7; chance 0.5 * 0.6 + 0.5 * 0.4 = 0.5; so 0.4.
        assert!((kappa(&table([20, 5, 10, 15])) - 0.4).abs() < 1e-12);
        assert_eq!(kappa(&table([10, 0, 0, 10])), 1.0);
        assert!(kappa(&table([5, 5, 5, 5])).abs() < 1e-12);
        assert_eq!(kappa(&table([0, 10, 10, 0])), -1.0);
        assert_eq!((kappa(&table([7, 0, 0, 0])), kappa(&[])), (0.0, 0.0));
        // Symmetric.
        assert!((kappa(&table([20, 5, 10, 15])) - kappa(&table([20, 10, 5, 15]))).abs() < 1e-12);
    }

    #[test]
    fn agreement_counts_from_one_half_on() {
        let found = agreement(&[(0.9, true), (0.5, true), (0.4, true), (0.1, false)]);
        assert_eq!((found.accuracy.good, found.accuracy.all), (3, 4));
        // (0.1 + 0.5 + 0.6 + 0.1) / 4
        assert!((found.calibration_error - 0.325).abs() < 1e-12);
    }
}
