//! Lines of pictures to a document of means: by mode, round, relation, split and number of objects, each with its interval.
//!
//! The unit is the prompt: the values of several seeds are averaged first, and prompts are drawn for the intervals. All
//! sums run in a fixed order, so the same lines in any order give the same numbers.

use super::{
    agreement::{Agreement, Tally, agreement},
    bootstrap::{Estimate, Resamples},
    line::{Key, Line},
    metrics::{Answer, Metrics},
    modes::Mode,
};
use crate::{rig::roles::Claim, scene::relation::Spatial};
use serde::Serialize;
use serde_json::Value;
use std::collections::{BTreeMap, BTreeSet};

/// `results.json`.
#[derive(Clone, Debug, Serialize)]
pub struct Results {
    pub config: Value,
    pub versions: Value,
    /// What was wrong with the data.
    pub flaws: Value,
    pub modes: BTreeMap<Mode, ModeResults>,
    /// Each pair of judges, of all claims, by kind, and by spatial relation (`checker_oracle: behind`). Pictures that several modes share count once.
    pub agreement: BTreeMap<String, Agreement>,
}

/// Metrics with their means and intervals.
pub type Estimates = BTreeMap<String, Estimate>;

/// What one mode came to. Every number is a mean over prompts.
#[derive(Clone, Debug, Default, Serialize)]
pub struct ModeResults {
    /// Of the mode's results.
    pub metrics: Estimates,
    /// Of a prompt: `evaluations`, `seconds`, `rounds`.
    pub cost: Estimates,
    /// The metrics of the results after the first round, after the first two, and so on.
    pub by_round: Vec<Estimates>,
    /// For each predicate the share of its triples that hold, by `judge` and `oracle`, and of the prompts with it that of the
    /// pictures that are all right, `oracle_perfect`.
    pub by_relation: BTreeMap<String, Estimates>,
    pub by_split: BTreeMap<String, Estimates>,
    /// Of the edits of pictures that the oracle finds wrong: see [`super::edits::Review`].
    pub edits: Estimates,
    /// By the number of objects asked for.
    pub by_objects: BTreeMap<usize, Estimates>,
}

/// The document of some lines.
pub fn results(config: Value, versions: Value, flaws: Value, lines: &[Line]) -> Results {
    let mut lines: Vec<&Line> = lines.iter().collect();
    lines.sort_by_cached_key(|line| (line.key(), line.round));
    let modes: BTreeSet<Mode> = lines.iter().map(|line| line.mode).collect();
    let of_mode = |mode: &Mode| lines.iter().copied().filter(|line| line.mode == *mode).collect::<Vec<_>>();
    let modes = modes.iter().map(|mode| (*mode, mode_results(&of_mode(mode)))).collect();
    // Without a judge of its own the Checker's word is the judge's.
    let judged = config.get("judge").is_some_and(|judge| !judge.is_null());
    Results { agreement: agreements(&lines, judged), config, versions, flaws, modes }
}

fn mode_results(lines: &[&Line]) -> ModeResults {
    let rounds = lines.iter().flat_map(|line| line.result_after.iter().copied()).max().unwrap_or(0);
    let after = |round: usize| lines.iter().copied().filter(move |line| line.result_after.contains(&round));
    let metrics = |line: &Line| line.metrics.clone();
    let last: Vec<&Line> = after(rounds).collect();
    let grouped = |by: &dyn Fn(&Line) -> String| -> BTreeMap<String, Estimates> {
        let names: BTreeSet<String> = last.iter().map(|line| by(line)).collect();
        let of = |name: &String| estimates(last.iter().copied().filter(|line| by(line) == *name), metrics);
        names.iter().map(|name| (name.clone(), of(name))).collect()
    };
    // All of them: the reference lists those alone that a relation names.
    let is_object = |answer: &&Answer| matches!(answer.claim, Claim::Object(_));
    let objects = grouped(&|line| line.claims.iter().filter(is_object).count().to_string());
    ModeResults {
        metrics: estimates(last.iter().copied(), metrics),
        cost: costs(lines),
        by_round: (1..=rounds).map(|round| estimates(after(round), metrics)).collect(),
        by_relation: by_relation(&last),
        by_split: grouped(&|line| line.split.clone()),
        edits: edits(lines),
        by_objects: objects.into_iter().filter_map(|(n, e)| Some((n.parse().ok()?, e))).collect(),
    }
}

/// Means over prompts of what `values` gives of their lines, shares all of them.
fn estimates<'a>(lines: impl Iterator<Item = &'a Line>, values: impl Fn(&Line) -> Metrics) -> Estimates {
    means(lines, values).into_iter().map(|(name, mean)| (name, mean.of_shares())).collect()
}

/// Means over prompts.
fn means<'a>(lines: impl Iterator<Item = &'a Line>, values: impl Fn(&Line) -> Metrics) -> Estimates {
    // Of each value its sum, and of how many.
    type Sums = BTreeMap<String, (f64, usize)>;
    let mut prompts: BTreeMap<(&str, &str), Sums> = BTreeMap::new();
    for line in lines {
        let prompt = prompts.entry((&line.split, &line.id)).or_default();
        for (name, value) in values(line) {
            let (sum, n) = prompt.entry(name).or_default();
            (*sum, *n) = (*sum + value, *n + 1);
        }
    }
    let names: BTreeSet<&String> = prompts.values().flat_map(BTreeMap::keys).collect();
    let resamples = Resamples::new(prompts.len());
    let estimate = |name: &&String| {
        let value = |prompt: &Sums| prompt.get(*name).map(|(sum, n)| sum / *n as f64);
        Some(((*name).clone(), resamples.estimate(&prompts.values().map(value).collect::<Vec<_>>())?))
    };
    names.iter().filter_map(estimate).collect()
}

/// What a prompt costs, over all its pictures of one seed.
fn costs(lines: &[&Line]) -> Estimates {
    let mut sums: BTreeMap<Key, Metrics> = BTreeMap::new();
    for line in lines {
        let sum = sums.entry(line.key()).or_default();
        for (name, value) in line.cost.named() {
            *sum.entry(name.to_owned()).or_default() += value;
        }
    }
    let first = lines.iter().copied().filter(|line| line.round == 1);
    means(first, |line| sums.get(&line.key()).cloned().unwrap_or_default())
}

fn edits(lines: &[&Line]) -> Estimates {
    let review = |line: &Line| line.edit.as_ref().and_then(|edit| edit.review);
    let reviewed = lines.iter().copied().filter(|line| review(line).is_some());
    estimates(reviewed, |line| review(line).map(|review| review.metrics()).unwrap_or_default())
}

fn by_relation(lines: &[&Line]) -> BTreeMap<String, Estimates> {
    let mut with: BTreeMap<&String, Vec<&Line>> = BTreeMap::new();
    for line in lines {
        let predicates: BTreeSet<&String> = line.reference.predicates.iter().collect();
        predicates.into_iter().for_each(|predicate| with.entry(predicate).or_default().push(line));
    }
    let of = |(predicate, lines): (&String, Vec<&Line>)| {
        let values = |line: &Line| {
            let named = |claim: &Claim| matches!(claim, Claim::Relation { relation, .. } if relation == predicate);
            let claims = || line.claims.iter().filter(|answer| named(&answer.claim));
            let judge = super::metrics::share(claims().map(|answer| answer.judge >= 0.5));
            let oracle = super::metrics::share(claims().filter_map(|answer| answer.oracle));
            let perfect = line.metrics.get("oracle_perfect").copied();
            let named = [("judge", judge), ("oracle", oracle), ("oracle_perfect", perfect)];
            named.into_iter().filter_map(|(name, value)| Some((name.to_owned(), value?))).collect()
        };
        (predicate.clone(), estimates(lines.into_iter(), values))
    };
    with.into_iter().map(of).collect()
}

/// Each picture once: modes draw the same ones, of which the Checker then says the same, unless one has an adapter that
/// another lacks; and what rewritten prompts draw counts as edited, if there was anything to say otherwise.
fn distinct<'a>(lines: &[&'a Line]) -> Vec<&'a Line> {
    let (mut drawn, mut pictures) = (BTreeSet::new(), Vec::new());
    for line in lines.iter().copied() {
        let said: Vec<u64> = line.claims.iter().map(|answer| answer.checker.to_bits()).collect();
        let words = line.drawn_as.as_ref().unwrap_or(&line.prompt);
        if line.edit.as_ref().is_some_and(|edit| edit.instruction != *words)
            || drawn.insert((&line.split, &line.id, line.seed, line.round, said))
        {
            pictures.push(line);
        }
    }
    pictures
}

/// Checker against oracle and, where there is a judge apart, judge against oracle and Checker against judge.
fn agreements(lines: &[&Line], judged: bool) -> BTreeMap<String, Agreement> {
    let pictures = distinct(lines);
    type OfKind = fn(&Claim) -> bool;
    let kinds: [(&str, OfKind); 4] = [
        ("", |_| true),
        ("_objects", |claim| matches!(claim, Claim::Object(_))),
        ("_relations", |claim| matches!(claim, Claim::Relation { .. })),
        ("_others", |claim| matches!(claim, Claim::Only(_))),
    ];
    let says = |claim: &Claim, name: &str| matches!(claim, Claim::Relation { relation, .. } if relation == name);
    type Said = fn(&Answer) -> Option<(f64, bool)>;
    let pairs: [(&str, Said, bool); 3] = [
        ("checker_oracle", |a| Some((a.checker, a.oracle?)), true),
        ("judge_oracle", |a| Some((a.judge, a.oracle?)), judged),
        ("checker_judge", |a| Some((a.checker, a.judge >= 0.5)), judged),
    ];
    let mut found = BTreeMap::new();
    for (name, said, _) in pairs.into_iter().filter(|(.., wanted)| *wanted) {
        let mut agree = |kind: String, of_kind: &dyn Fn(&Claim) -> bool| {
            let mut prompts: BTreeMap<(&str, &str), Tally> = BTreeMap::new();
            for line in &pictures {
                let tally = prompts.entry((&line.split, &line.id)).or_default();
                let claims = line.claims.iter().filter(|answer| of_kind(&answer.claim));
                claims.filter_map(said).for_each(|(p, truth)| tally.count(p, truth));
            }
            let agreed = agreement(&prompts.into_values().collect::<Vec<_>>());
            found.extend(agreed.map(|agreed| (format!("{name}{kind}"), agreed)));
        };
        kinds.iter().for_each(|(kind, of_kind)| agree((*kind).to_owned(), of_kind));
        for relation in Spatial::ALL.map(Spatial::name) {
            agree(format!(": {relation}"), &|claim| says(claim, relation));
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::eval::{
        edits::Review,
        line::{Edited, tests::mended},
    };

    fn lines() -> Vec<Line> {
        (0..12).flat_map(|i| [mended(i, Mode::Diffuser), mended(i, Mode::Loop)].concat()).collect()
    }

    fn document(lines: &[Line]) -> Results {
        results(Value::Null, Value::Null, Value::Null, lines)
    }

    #[test]
    fn a_loop_that_mends_its_pictures_is_better_from_round_two_on() {
        let results = document(&lines());
        let (diffuser, looped) = (&results.modes[&Mode::Diffuser], &results.modes[&Mode::Loop]);
        assert_eq!((diffuser.metrics["sg_iou"].mean, looped.metrics["sg_iou"].mean), (0.0, 1.0));
        assert_eq!((diffuser.by_round.len(), looped.by_round.len()), (1, 3));
        let by_round: Vec<f64> = looped.by_round.iter().map(|round| round["judge_all"].mean).collect();
        assert_eq!(by_round, [0.0, 1.0, 1.0]);
        let edits = Review::NAMES.map(|name| looped.edits[name].mean);
        assert_eq!((edits, diffuser.edits.len()), ([1.0, 0.0, 0.0, 1.0, 0.0], 0));
        assert_eq!((diffuser.cost["evaluations"].mean, looped.cost["evaluations"].mean), (40.0, 80.0));
        assert_eq!((looped.cost["rounds"].mean, looped.cost["seconds"].mean), (2.0, 2.0));
        assert_eq!(looped.by_split["test"]["sg_iou"], looped.metrics["sg_iou"]);
        assert_eq!(looped.by_objects.values().map(|e| e["sg_iou"].n).sum::<usize>(), 12);
        assert!(looped.by_relation.values().all(|e| e["judge"].mean == 1.0 && e["oracle"].mean > 0.5));
    }

    #[test]
    fn agreement_counts_a_shared_drawing_once() {
        let results = document(&lines());
        let claims: usize =
            lines().iter().filter(|l| l.round > 1 || l.mode == Mode::Diffuser).map(|l| l.claims.len()).sum();
        let found = &results.agreement["checker_oracle"];
        assert_eq!((found.claims, found.accuracy.n), (claims, 12));
        assert!(found.kappa.unwrap().mean > 0.9 && found.accuracy.mean > 0.95, "{found:?}");
        assert!(!results.agreement.contains_key("judge_oracle"));
        // A drawing of a later round is that of best-of-n too.
        let mut redrawn = lines();
        redrawn.iter_mut().for_each(|line| line.edit = None);
        let mut twice = redrawn.clone();
        twice.extend(redrawn.iter().cloned().map(|line| Line { mode: Mode::BestOfN, ..line }));
        assert_eq!(document(&redrawn).agreement, document(&twice).agreement);
        // And that of a prompt in which there was nothing to rewrite.
        let mut rewritten = lines();
        let again = |line: &Line| Edited { from: 1, instruction: line.prompt.clone(), review: None };
        rewritten.iter_mut().for_each(|line| line.edit = line.edit.as_ref().map(|_| again(line)));
        twice.extend(rewritten.into_iter().map(|line| Line { mode: Mode::Rewrite, ..line }));
        assert_eq!(document(&redrawn).agreement, document(&twice).agreement);
    }

    #[test]
    fn a_judge_apart_is_compared_with_oracle_and_checker_even_if_it_agrees() {
        let config = serde_json::json!({ "judge": "another" });
        let agreed = results(config, Value::Null, Value::Null, &lines()).agreement;
        assert_eq!(agreed["judge_oracle"], agreed["checker_oracle"]);
        assert!(agreed["checker_judge"].kappa.unwrap().mean == 1.0 && agreed.contains_key("checker_judge_relations"));
    }

    #[test]
    fn a_prompt_is_one_of_its_split() {
        let mut lines = lines();
        lines.extend(lines.clone().into_iter().map(|line| Line { split: "train".into(), ..line }));
        assert_eq!(document(&lines).modes[&Mode::Loop].metrics["sg_iou"].n, 24);
    }

    #[test]
    fn objects_count_whether_or_not_a_relation_names_them() {
        let mut lines = lines();
        let told = document(&lines).modes[&Mode::Loop].by_objects.clone();
        for line in &mut lines {
            let more = Answer { claim: Claim::Object("pink star".into()), ..line.claims[0].clone() };
            line.claims.push(more);
        }
        let found = document(&lines).modes[&Mode::Loop].by_objects.clone();
        assert!(found.keys().copied().eq(told.keys().map(|n| n + 1)), "{:?}", found.keys());
        assert!(found.values().eq(told.values()));
    }

    #[test]
    fn the_order_of_the_lines_changes_nothing() {
        let (forward, mut backward) = (lines(), lines());
        backward.reverse();
        let text = |lines: &[Line]| serde_json::to_string(&document(lines)).unwrap();
        assert_eq!(text(&forward), text(&backward));
    }

    #[test]
    fn seeds_of_one_prompt_are_averaged_first() {
        let mut lines = lines();
        lines.extend(lines.clone().into_iter().map(|mut line| {
            line.seed = 9;
            line.metrics.values_mut().for_each(|v| *v = 0.0);
            line
        }));
        let sg_iou = document(&lines).modes[&Mode::Loop].metrics["sg_iou"];
        assert_eq!((sg_iou.mean, sg_iou.n), (0.5, 12));
    }
}
