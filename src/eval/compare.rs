//! Two runs on the same prompts: the paired difference of every metric, with its interval and p-value.

use super::{
    bootstrap::{Difference, Estimate, Resamples, difference},
    line::Line,
    modes::Mode,
};
use crate::rig::roles::Claim;
use serde::Serialize;
use std::collections::{BTreeMap, BTreeSet};

/// One metric of two modes.
#[derive(Clone, Debug, Serialize)]
pub struct Compared {
    pub a: Mode,
    pub b: Mode,
    pub metric: String,
    /// Over the prompts that both have.
    pub mean_a: Estimate,
    pub mean_b: Estimate,
    /// `b` less `a`.
    pub difference: Difference,
}

/// Compares the results of mode `b` with those of mode `a`, by the prompts (and seeds) that both have: of the same id, and
/// with the same claims, since a world's scenes are numbered alike under another `--subset-seed`.
pub fn compare((a, of_a): (Mode, &[Line]), (b, of_b): (Mode, &[Line])) -> Vec<Compared> {
    let (of_a, of_b) = (final_metrics(a, of_a), final_metrics(b, of_b));
    let metrics: BTreeSet<&String> = of_a.values().flat_map(|values| values.keys()).collect();
    let compared = |metric: &&String| {
        // Seeds of one prompt are one value.
        let mut prompts: BTreeMap<&Prompt, (f64, f64, usize)> = BTreeMap::new();
        for (key, values) in &of_a {
            let other = of_b.get(key).and_then(|other| other.get(*metric));
            let Some((x, y)) = values.get(*metric).zip(other) else { continue };
            let (sum_x, sum_y, n) = prompts.entry(&key.0).or_default();
            (*sum_x, *sum_y, *n) = (*sum_x + x, *sum_y + y, *n + 1);
        }
        let pairs: Vec<(f64, f64)> = prompts.values().map(|(x, y, n)| (x / *n as f64, y / *n as f64)).collect();
        let resamples = Resamples::new(pairs.len());
        let mean =
            |side: fn(&(f64, f64)) -> f64| resamples.estimate(&pairs.iter().map(side).map(Some).collect::<Vec<_>>());
        let (mean_a, mean_b) = (mean(|p| p.0)?, mean(|p| p.1)?);
        let difference = difference(&pairs.iter().map(|(x, y)| y - x).collect::<Vec<_>>())?;
        Some(Compared { a, b, metric: (*metric).clone(), mean_a, mean_b, difference })
    };
    metrics.iter().filter_map(compared).collect()
}

/// Split, id, and what is claimed: unlike the reference graph it has the attributes, by which a world's scenes differ.
type Prompt<'a> = (&'a str, &'a str, Vec<String>);

fn prompt(line: &Line) -> Prompt<'_> {
    // Whether nothing else may be there is the run's choice.
    let of_scene = line.claims.iter().filter(|answer| !matches!(answer.claim, Claim::Only(_)));
    (&line.split, &line.id, of_scene.map(|answer| answer.claim.to_string()).collect())
}

/// The metrics of each prompt's result after all rounds, for each seed.
fn final_metrics(mode: Mode, lines: &[Line]) -> BTreeMap<(Prompt<'_>, u64), &super::metrics::Metrics> {
    let of_mode = || lines.iter().filter(|line| line.mode == mode);
    let last = of_mode().flat_map(|line| &line.result_after).max();
    let results = of_mode().filter(|line| last.is_some_and(|last| line.result_after.contains(last)));
    results.map(|line| ((prompt(line), line.seed), &line.metrics)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::eval::line::tests::mended;

    #[test]
    fn a_run_that_mends_is_surely_better_and_a_run_equals_itself() {
        let drawn: Vec<Line> = (0..20).flat_map(|i| mended(i, Mode::Diffuser)).collect();
        let looped: Vec<Line> = (0..30).flat_map(|i| mended(i, Mode::Loop)).collect();
        let found =
            |a: (Mode, &[Line]), b: (Mode, &[Line])| compare(a, b).into_iter().find(|c| c.metric == "ent_iou").unwrap();
        let better = found((Mode::Diffuser, &drawn), (Mode::Loop, &looped));
        assert_eq!((better.mean_a.mean, better.mean_b.mean, better.difference.estimate.n), (0.0, 1.0, 20));
        let a = found((Mode::Loop, &looped), (Mode::Loop, &looped)).mean_a;
        assert!(a.lo <= a.mean && a.mean <= a.hi && a.n == 30, "{a:?}");
        assert!(better.difference.p < 0.001 && better.difference.estimate.lo == 1.0, "{better:?}");
        let same = found((Mode::Loop, &looped), (Mode::Loop, &looped)).difference;
        assert_eq!((same.p, same.estimate.mean, same.estimate.n), (1.0, 0.0, 30));
        assert!(compare((Mode::Rewrite, &drawn), (Mode::Loop, &looped)).is_empty());
    }

    #[test]
    fn prompts_are_one_if_their_scenes_are_whether_or_not_more_may_be_there() {
        let looped: Vec<Line> = (0..30).flat_map(|i| mended(i, Mode::Loop)).collect();
        let common = |others: &[Line]| {
            let found = compare((Mode::Loop, &looped), (Mode::Loop, others));
            found.iter().find(|c| c.metric == "ent_iou").unwrap().difference.estimate.n
        };
        // From the eleventh prompt on scenes of other colours, which the graph by labels does not tell.
        let mut others = looped.clone();
        for answer in others.iter_mut().skip(20).flat_map(|line| &mut line.claims) {
            if let Claim::Object(object) = &mut answer.claim {
                object.insert_str(0, "brown ");
            }
        }
        assert!(others.iter().zip(&looped).all(|(other, line)| other.reference == line.reference));
        assert_eq!(common(&others), 10);
        let mut open = looped.clone();
        open.iter_mut().for_each(|line| line.claims.retain(|answer| !matches!(answer.claim, Claim::Only(_))));
        assert_ne!(open, looped);
        assert_eq!(common(&open), 30);
    }
}
