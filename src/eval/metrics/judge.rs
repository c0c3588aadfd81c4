//! VLM as a judge: what its P(yes) of the triples say together.

use super::{Named, all, mean, truth};

/// Of the P(yes) of each triple, and of that of nothing else being in the picture.
pub(super) fn metrics(triples: &[f64], others: Option<f64>) -> Named<3> {
    [
        ("judge_mean", mean(triples.iter().copied())),
        ("judge_all", all(triples.iter().map(|p| *p >= 0.5))),
        ("judge_no_others", others.map(|p| truth(p >= 0.5))),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mean_is_not_a_verdict_and_other_things_are_judged_apart() {
        let expected = |mean, all, others| [("judge_mean", mean), ("judge_all", all), ("judge_no_others", others)];
        let (sure, unsure) = (metrics(&[0.75, 0.5], Some(0.125)), metrics(&[1.0, 0.25], None));
        assert_eq!(sure, expected(Some(0.625), Some(1.0), Some(0.0)));
        assert_eq!(unsure, expected(Some(0.625), Some(0.0), None));
        assert_eq!(metrics(&[], Some(0.5)), expected(None, None, Some(1.0)));
    }
}
