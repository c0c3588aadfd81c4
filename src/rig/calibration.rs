//! Whether what the Checker says with some probability comes true as often.

/// Expected calibration error: the mean distance between what was said and what came true, over ten bins of probability
/// weighted by their size (Guo et al., arXiv 1706.04599).
pub fn calibration_error(said: &[(f64, bool)]) -> f64 {
    let mut bins = [(0.0, 0usize, 0usize); 10];
    for (p, truth) in said {
        let bin = &mut bins[((p * 10.0) as usize).min(9)];
        *bin = (bin.0 + p, bin.1 + usize::from(*truth), bin.2 + 1);
    }
    let gaps = bins.iter().map(|(p, truths, _)| (p - *truths as f64).abs());
    gaps.sum::<f64>() / said.len().max(1) as f64
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
