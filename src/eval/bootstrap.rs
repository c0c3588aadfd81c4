//! How sure a mean is: bootstrap intervals over prompts, and a paired test of a difference.
//!
//! The percentile bootstrap (Efron 1979) draws as many prompts as there are, with replacement, 1,000 times; the interval
//! holds the middle 95% of the means. Shares that are all 0, or all 1, have the interval of [`Estimate::of_shares`]. Prompts are the units, not pictures or claims, which are not independent. The test
//! of a paired difference flips the signs of the prompts' differences at random: under the null hypothesis that the two
//! runs are alike, every flip is as probable as what was seen.

use crate::tensor::rng::Stream;
use serde::{Deserialize, Serialize};

const RESAMPLES: u64 = 1000;
const FLIPS: u64 = 10_000;

/// A mean over prompts with its 95% interval.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Estimate {
    pub mean: f64,
    pub lo: f64,
    pub hi: f64,
    /// Prompts.
    pub n: usize,
}

impl Estimate {
    /// The interval of the basic bootstrap, for an error of at most 1: each resample's estimate is off from the mean as the mean is from
    /// the truth. A sum of absolute values, as a calibration error is, is larger in resamples, and the percentiles' interval
    /// would lie above the truth. It has the estimate in it, also where all resamples' are larger.
    pub fn basic(self) -> Self {
        let (lo, hi) = (2.0 * self.mean - self.hi, 2.0 * self.mean - self.lo);
        Self { lo: lo.clamp(0.0, self.mean), hi: hi.min(1.0).max(self.mean), ..self }
    }

    /// Of numbers from 0 to 1. Where all of them are 0, or all 1, resamples are all the same, which does not mean that there is
    /// no doubt: the interval is then that of Clopper and Pearson (1934) for as many failures or successes.
    pub fn of_shares(self) -> Self {
        let doubt = 1.0 - 0.025f64.powf(1.0 / self.n as f64);
        match (self.lo, self.hi) {
            (0.0, 0.0) => Self { hi: doubt, ..self },
            (1.0, 1.0) => Self { lo: 1.0 - doubt, ..self },
            _ => self,
        }
    }

    /// In percent.
    pub fn percent(self) -> Self {
        let [mean, lo, hi] = [self.mean, self.lo, self.hi].map(|x| 100.0 * x);
        Self { mean, lo, hi, ..self }
    }
}

/// The draws of `n` prompts, the same for every metric.
pub struct Resamples {
    n: usize,
    /// For each resample the prompts that it draws.
    drawn: Vec<Vec<u32>>,
}

impl Resamples {
    pub fn new(n: usize) -> Self {
        let draw = |i: u64| {
            let mut stream = Stream::new(0, "bootstrap", i);
            (0..n).map(|_| stream.below(n) as u32).collect()
        };
        Self { n, drawn: (0..RESAMPLES).map(draw).collect() }
    }

    /// The estimate of one value for each prompt, in a fixed order. Prompts without the value are left out; `None` if
    /// there is none with it.
    pub fn estimate(&self, values: &[Option<f64>]) -> Option<Estimate> {
        debug_assert_eq!(values.len(), self.n);
        let mean = |drawn: &mut dyn Iterator<Item = usize>| {
            let (sum, n) = drawn.filter_map(|i| values[i]).fold((0.0, 0usize), |(sum, n), v| (sum + v, n + 1));
            (n > 0).then(|| sum / n as f64)
        };
        self.statistic(&mean, values.iter().flatten().count())
    }

    /// The estimate of any statistic of the prompts that are drawn, `n` of which have a part in it; `None` if it is not
    /// defined on all of them. Draws on which it is not are left out.
    pub fn statistic(
        &self,
        statistic: &dyn Fn(&mut dyn Iterator<Item = usize>) -> Option<f64>,
        n: usize,
    ) -> Option<Estimate> {
        let mean = statistic(&mut (0..self.n))?;
        let resampled = |drawn: &Vec<u32>| statistic(&mut drawn.iter().map(|i| *i as usize));
        let mut all: Vec<f64> = self.drawn.iter().filter_map(resampled).collect();
        all.sort_by(f64::total_cmp);
        Some(Estimate { mean, lo: quantile(&all, 0.025), hi: quantile(&all, 0.975), n })
    }
}

/// A quantile of sorted values, between the two nearest.
fn quantile(sorted: &[f64], q: f64) -> f64 {
    let at = q * sorted.len().saturating_sub(1) as f64;
    let (low, high) = (at.floor() as usize, at.ceil() as usize);
    match (sorted.get(low), sorted.get(high)) {
        (Some(a), Some(b)) => a + (b - a) * (at - at.floor()),
        _ => f64::NAN,
    }
}

/// A mean difference of pairs with its 95% interval, and the two-sided p-value of the sign-flip test.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Difference {
    #[serde(flatten)]
    pub estimate: Estimate,
    pub p: f64,
}

/// The difference of pairs, one number for each prompt; `None` without any.
pub fn difference(pairs: &[f64]) -> Option<Difference> {
    let values: Vec<Option<f64>> = pairs.iter().copied().map(Some).collect();
    let estimate = Resamples::new(pairs.len()).estimate(&values)?;
    let seen = pairs.iter().sum::<f64>().abs();
    let flipped = |i: u64| {
        let mut stream = Stream::new(0, "sign flips", i);
        let mut bits = 0;
        let sum = pairs.iter().enumerate().fold(0.0, |sum, (k, d)| {
            if k.is_multiple_of(64) {
                bits = stream.next_u64();
            }
            if bits >> (k % 64) & 1 == 1 { sum + d } else { sum - d }
        });
        // A flip that gives the same sum in another order is as extreme.
        sum.abs() >= seen - 1e-9
    };
    let extreme = (0..FLIPS).filter(|i| flipped(*i)).count();
    Some(Difference { estimate, p: (extreme + 1) as f64 / (FLIPS + 1) as f64 })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_interval_is_about_that_of_the_normal_distribution() {
        // 400 prompts, half of them 1: a standard error of 0.025.
        let values: Vec<Option<f64>> = (0..400).map(|i| Some(f64::from(i % 2))).collect();
        let e = Resamples::new(400).estimate(&values).unwrap();
        assert_eq!((e.mean, e.n), (0.5, 400));
        assert!((e.lo - 0.451).abs() < 0.006 && (e.hi - 0.549).abs() < 0.006, "{e:?}");
    }

    #[test]
    fn values_that_are_all_alike_leave_some_doubt() {
        let of = |x: f64| Resamples::new(20).estimate(&[Some(x); 20]).unwrap().of_shares();
        // Clopper and Pearson's for 20 of 20: 0.8316 to 1.
        assert!((of(1.0).lo - 0.8316).abs() < 1e-4 && of(1.0).hi == 1.0);
        assert!((of(0.0).hi - 0.1684).abs() < 1e-4 && of(0.0).lo == 0.0);
        assert_eq!((of(0.5).lo, of(0.5).hi), (0.5, 0.5));
    }

    #[test]
    fn an_interval_has_its_estimate_in_it() {
        let above = Estimate { mean: 0.02, lo: 0.03, hi: 0.08, n: 9 }.basic();
        assert_eq!((above.lo, above.hi), (0.0, 0.02));
        let about = Estimate { mean: 0.5, lo: 0.4, hi: 0.7, n: 9 }.basic();
        assert!((about.lo - 0.3).abs() < 1e-12 && (about.hi - 0.6).abs() < 1e-12);
    }

    #[test]
    fn prompts_without_the_value_are_left_out() {
        let some = Resamples::new(4).estimate(&[Some(1.0), None, Some(1.0), None]).unwrap();
        assert_eq!((some.mean, some.lo, some.hi, some.n), (1.0, 1.0, 1.0, 2));
        assert_eq!(Resamples::new(2).estimate(&[None, None]), None);
        assert_eq!(Resamples::new(0).estimate(&[]), None);
    }

    #[test]
    fn quantiles_lie_between_their_neighbours() {
        assert_eq!(quantile(&[1.0, 2.0, 3.0], 0.5), 2.0);
        assert_eq!(quantile(&[1.0, 2.0], 0.25), 1.25);
    }

    #[test]
    fn differences_that_are_there_are_found_and_others_are_not() {
        let clear: Vec<f64> = (0..40).map(|i| 0.1 + 0.01 * f64::from(i % 3)).collect();
        let found = difference(&clear).unwrap();
        assert!(found.p < 0.001 && found.estimate.lo > 0.0, "{found:?}");
        let balanced: Vec<f64> = (0..40).map(|i| if i % 2 == 0 { 0.2 } else { -0.2 }).collect();
        assert!(difference(&balanced).unwrap().p > 0.9);
        assert_eq!(difference(&[0.0; 10]).unwrap().p, 1.0);
        // All of five signs alike: 2 of the 32 flips are as extreme.
        let p = difference(&[1.0; 5]).unwrap().p;
        assert!((p - 0.0625).abs() < 0.01, "{p}");
    }
}
