//! Two runs on the same prompts: the paired difference of every metric, with its interval and p-value.

use super::{
    bootstrap::{Difference, difference},
    line::Line,
    modes::Mode,
};
use crate::scene::iou::Lists;
use serde::Serialize;
use std::collections::{BTreeMap, BTreeSet};

/// One metric of two modes.
#[derive(Clone, Debug, Serialize)]
pub struct Compared {
    pub a: Mode,
    pub b: Mode,
    pub metric: String,
    /// Of the prompts that both have.
    pub mean_a: f64,
    pub mean_b: f64,
    /// `b` less `a`.
    pub difference: Difference,
}

/// Compares the results of mode `b` with those of mode `a`, by the prompts (and seeds) that both have: of the same id, and
/// with the same graph, since a world's scenes are numbered alike under another `--subset-seed`.
pub fn compare((a, of_a): (Mode, &[Line]), (b, of_b): (Mode, &[Line])) -> Vec<Compared> {
    let (of_a, of_b) = (final_metrics(a, of_a), final_metrics(b, of_b));
    let metrics: BTreeSet<&String> = of_a.values().flat_map(|values| values.keys()).collect();
    let compared = |metric: &&String| {
        // Seeds of one prompt are one value.
        let mut prompts: BTreeMap<Prompt, (f64, f64, usize)> = BTreeMap::new();
        for ((prompt, seed), values) in &of_a {
            let other = of_b.get(&(*prompt, *seed)).and_then(|other| other.get(*metric));
            let Some((x, y)) = values.get(*metric).zip(other) else { continue };
            let (sum_x, sum_y, n) = prompts.entry(*prompt).or_default();
            (*sum_x, *sum_y, *n) = (*sum_x + x, *sum_y + y, *n + 1);
        }
        let pairs: Vec<(f64, f64)> = prompts.values().map(|(x, y, n)| (x / *n as f64, y / *n as f64)).collect();
        let mean = |side: fn(&(f64, f64)) -> f64| pairs.iter().map(side).sum::<f64>() / pairs.len() as f64;
        let difference = difference(&pairs.iter().map(|(x, y)| y - x).collect::<Vec<_>>())?;
        Some(Compared { a, b, metric: (*metric).clone(), mean_a: mean(|p| p.0), mean_b: mean(|p| p.1), difference })
    };
    metrics.iter().filter_map(compared).collect()
}

/// Split, id and graph.
type Prompt<'a> = (&'a str, &'a str, &'a Lists);

/// The metrics of each prompt's result after all rounds, for each seed.
fn final_metrics(mode: Mode, lines: &[Line]) -> BTreeMap<(Prompt<'_>, u64), &super::metrics::Metrics> {
    let of_mode = || lines.iter().filter(|line| line.mode == mode);
    let last = of_mode().flat_map(|line| &line.result_after).max();
    let results = of_mode().filter(|line| last.is_some_and(|last| line.result_after.contains(last)));
    results.map(|line| (((line.split.as_str(), line.id.as_str(), &line.reference), line.seed), &line.metrics)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::eval::line::tests::mended;

    #[test]
    fn a_run_that_mends_is_surely_better_and_a_run_equals_itself() {
        let drawn: Vec<Line> = (0..20).flat_map(|i| mended(i, Mode::Diffuser)).collect();
        let looped: Vec<Line> = (0..30).flat_map(|i| mended(i, Mode::Loop)).collect();
        let found = compare((Mode::Diffuser, &drawn), (Mode::Loop, &looped));
        let sg = found.iter().find(|c| c.metric == "ent_iou").unwrap();
        assert_eq!((sg.mean_a, sg.mean_b, sg.difference.estimate.n), (0.0, 1.0, 20));
        assert!(sg.difference.p < 0.001 && sg.difference.estimate.lo == 1.0, "{sg:?}");
        let same = compare((Mode::Loop, &looped), (Mode::Loop, &looped));
        assert!(same.iter().all(|c| c.difference.p == 1.0 && c.difference.estimate.mean == 0.0));
        assert!(compare((Mode::Rewrite, &drawn), (Mode::Loop, &looped)).is_empty());
        let mut others = looped.clone();
        for line in others.iter_mut().skip(20) {
            line.reference.predicates.push("of another scene".into());
        }
        let found = compare((Mode::Loop, &looped), (Mode::Loop, &others));
        assert!(found.iter().filter(|c| c.metric == "ent_iou").all(|c| c.difference.estimate.n == 10), "{found:?}");
    }
}
