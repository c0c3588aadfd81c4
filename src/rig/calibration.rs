//! Whether what the Checker says with some probability comes true as often.

/// Ten bins of probability: what was said in sum, how much of it came true, and how often something was said.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Bins([(f64, usize, usize); 10]);

impl Bins {
    pub fn count(&mut self, p: f64, truth: bool) {
        let (said, truths, n) = &mut self.0[((p * 10.0) as usize).min(9)];
        (*said, *truths, *n) = (*said + p, *truths + usize::from(truth), *n + 1);
    }

    pub fn join(&mut self, other: &Self) {
        for ((said, truths, n), more) in self.0.iter_mut().zip(&other.0) {
            (*said, *truths, *n) = (*said + more.0, *truths + more.1, *n + more.2);
        }
    }

    /// Expected calibration error: the mean distance between what was said and what came true, over the bins weighted by
    /// their size (Guo et al., arXiv 1706.04599).
    pub fn error(&self) -> f64 {
        let gaps = self.0.iter().map(|(said, truths, _)| (said - *truths as f64).abs());
        gaps.sum::<f64>() / self.0.iter().map(|bin| bin.2).sum::<usize>().max(1) as f64
    }
}

/// [`Bins::error`] of some claims.
pub fn calibration_error(said: &[(f64, bool)]) -> f64 {
    let mut bins = Bins::default();
    said.iter().for_each(|(p, truth)| bins.count(*p, *truth));
    bins.error()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn calibration_is_perfect_when_what_is_said_comes_true() {
        let said: Vec<(f64, bool)> = (0..100).map(|i| (0.75, i % 4 != 0)).collect();
        assert!(calibration_error(&said) < 1e-12);
        let sure: Vec<(f64, bool)> = (0..100).map(|i| (1.0, i % 4 != 0)).collect();
        assert!((calibration_error(&sure) - 0.25).abs() < 1e-12);
    }
}
