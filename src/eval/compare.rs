//! Two runs on the same prompts: the paired difference of every metric, with its interval and p-value.

use super::{
    bootstrap::{Difference, Estimate, Resamples, difference},
    line::{Cost, Line},
    metrics::Metrics,
    modes::Mode,
};
use crate::rig::roles::Claim;
use serde::Serialize;
use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
};

/// Whose results are compared: a mode's, after all rounds or after so many.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Side {
    pub mode: Mode,
    pub rounds: Option<usize>,
}

impl From<Mode> for Side {
    fn from(mode: Mode) -> Self {
        Self { mode, rounds: None }
    }
}

impl fmt::Display for Side {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let rounds = self.rounds.map_or(String::new(), |rounds| format!("@{rounds}"));
        write!(f, "{}{rounds}", self.mode.name())
    }
}

/// One metric, or cost, of two modes.
#[derive(Clone, Debug, Serialize)]
pub struct Compared {
    /// The mode, and behind an `@` the rounds.
    pub a: String,
    pub b: String,
    pub metric: String,
    /// Over the prompts that both have.
    pub mean_a: Estimate,
    pub mean_b: Estimate,
    /// `b` less `a`.
    pub difference: Difference,
}

/// Compares the results of `b` with those of `a`, by the prompts (and seeds) that both have: of the same id, and
/// with the same claims, since a world's scenes are numbered alike under another `--subset-seed`.
pub fn compare((a, of_a): (Side, &[Line]), (b, of_b): (Side, &[Line])) -> Vec<Compared> {
    let (of_a, of_b) = (results(a, of_a), results(b, of_b));
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
        let is_cost = Cost::default().named().iter().any(|(name, _)| name == metric);
        let [mean_a, mean_b] = [mean(|p| p.0)?, mean(|p| p.1)?].map(|e| if is_cost { e } else { e.of_shares() });
        let difference = difference(&pairs.iter().map(|(x, y)| y - x).collect::<Vec<_>>())?;
        Some(Compared { a: a.to_string(), b: b.to_string(), metric: (*metric).clone(), mean_a, mean_b, difference })
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

/// The most rounds after which a mode has results; 0 without any.
pub fn most_rounds(mode: Mode, lines: &[Line]) -> usize {
    let of_mode = lines.iter().filter(|line| line.mode == mode);
    of_mode.flat_map(|line| &line.result_after).max().copied().unwrap_or_default()
}

/// The metrics of each prompt's result, and what it cost until then, for each seed.
fn results(side: Side, lines: &[Line]) -> BTreeMap<(Prompt<'_>, u64), Metrics> {
    let of_mode = || lines.iter().filter(|line| line.mode == side.mode);
    let last = side.rounds.unwrap_or_else(|| most_rounds(side.mode, lines));
    let mut found: BTreeMap<_, Metrics> = BTreeMap::new();
    for line in of_mode().filter(|line| line.round <= last) {
        let values = found.entry((prompt(line), line.seed)).or_default();
        for (name, cost) in line.cost.named() {
            *values.entry(name.to_owned()).or_default() += cost;
        }
        if line.result_after.contains(&last) {
            values.extend(line.metrics.clone());
        }
    }
    found
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
            |a: (Side, &[Line]), b: (Side, &[Line])| compare(a, b).into_iter().find(|c| c.metric == "ent_iou").unwrap();
        let [diffuser, rewrite, of_loop] = [Mode::Diffuser, Mode::Rewrite, Mode::Loop].map(Side::from);
        let better = found((diffuser, &drawn), (of_loop, &looped));
        assert_eq!((better.mean_a.mean, better.mean_b.mean, better.difference.estimate.n), (0.0, 1.0, 20));
        let a = found((of_loop, &looped), (of_loop, &looped)).mean_a;
        assert!(a.lo <= a.mean && a.mean <= a.hi && a.n == 30, "{a:?}");
        assert!(better.difference.p < 0.001 && better.difference.estimate.lo == 1.0, "{better:?}");
        let same = found((of_loop, &looped), (of_loop, &looped)).difference;
        assert_eq!((same.p, same.estimate.mean, same.estimate.n), (1.0, 0.0, 30));
        assert!(compare((rewrite, &drawn), (of_loop, &looped)).is_empty());

        // What the second round is worth, and costs.
        let at = |rounds| Side { rounds: Some(rounds), ..of_loop };
        let second = compare((at(1), &looped), (at(2), &looped));
        let difference = |name: &str| second.iter().find(|c| c.metric == name).unwrap().difference.estimate.mean;
        assert_eq!((difference("ent_iou"), difference("rounds"), difference("evaluations")), (1.0, 1.0, 40.0));
        assert_eq!((second[0].a.as_str(), second[0].b.as_str()), ("loop@1", "loop@2"));
        assert_eq!((most_rounds(Mode::Loop, &looped), most_rounds(Mode::Rewrite, &looped)), (3, 0));
    }

    #[test]
    fn prompts_are_one_if_their_scenes_are_whether_or_not_more_may_be_there() {
        let looped: Vec<Line> = (0..30).flat_map(|i| mended(i, Mode::Loop)).collect();
        let common = |others: &[Line]| {
            let found = compare((Mode::Loop.into(), &looped), (Mode::Loop.into(), others));
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
