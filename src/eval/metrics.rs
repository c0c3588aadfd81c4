//! What is measured of one picture. Every metric is a number in 0..=1, and all but `render_distance`, for which the pixels
//! are looked at once more, follow from what the judges say.
//!
//! | names | what |
//! |---|---|
//! | `sg_iou`, `ent_iou`, `rel_iou` | LAION-SG's IoU of triples, objects and predicates between the graph and that of the picture, `strict` as the authors' code has it |
//! | `.._derived`, `.._multiset`, `.._attributes` | the same as the paper's text has it; counting what occurs twice; naming objects with their attributes |
//! | `judge_mean`, `judge_all` | VLM as a judge: the mean P(yes) of the triples, each at most that of its two objects; whether each has at least one half |
//! | `judge_no_others` | its P(yes) of nothing else being in the picture, where that is asked for |
//! | `oracle_sg_iou`, .. | the strict IoU by the pixel oracle |
//! | `oracle_mean`, `oracle_all` | the share of triples that hold by the oracle; whether all do |
//! | `oracle_objects`, `no_others`, `oracle_perfect` | the share of objects; whether nothing else is in the picture; whether all of it is right |
//! | `render_distance` | how far the picture is from a render of what the oracle reads in it (root mean square; less is better) |
//! | `position` | GenEval's: whether all directions (left, right, above, below) hold |
//! | `visor_oa`, `visor_unconditional`, `visor_conditional` | VISOR over the directions: both objects are there, with label and colour; the relation holds; it holds given both (of prompts with one relation, as VISOR's are, the mean is VISOR's) |
//!
//! The graph of a picture is what the judge lists of it in the words of the one that was asked for (as the authors' code has
//! it; the default of LAION-SG), or what it confirms of that graph claim by claim (the default of the tabletop world, whose
//! VLM has not learned to list). The latter is a part of it: these IoUs are then shares that are met, and what is too much
//! in a picture costs nothing by them, as other things than those asked for never do; for that there are `judge_no_others` and
//! `no_others`.

use crate::{
    rig::roles::Claim,
    scene::{
        graph::{Object, SceneGraph},
        iou::{self, Iou, Lists},
        relation::Spatial,
        tabletop::{
            oracle::{self, Reading},
            view::Judgement,
        },
    },
};
use image::RgbImage;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// Names and values; a metric that is not defined for a picture is absent.
pub type Metrics = BTreeMap<String, f64>;

/// What each judge says of one claim.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Answer {
    pub claim: Claim,
    /// P(yes) of the loop's Checker.
    pub checker: f64,
    /// P(yes) of the judge.
    pub judge: f64,
    /// The pixel oracle's truth, where there is one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub oracle: Option<bool>,
}

/// What the pixel oracle found of a graph.
pub struct Oracle {
    pub judgement: Judgement,
    /// For each object whether something with its label and colour is there.
    pub present: Vec<bool>,
    /// Distance from the nearest render, in 0..=1.
    pub distance: f64,
    pub reading: Reading,
}

impl Oracle {
    pub fn new(image: &RgbImage, graph: &SceneGraph) -> Self {
        let reading = oracle::read(image);
        let present = reading.view.matching(graph).iter().map(Option::is_some).collect();
        Self { judgement: reading.judge(graph), present, distance: reading.render_distance(image), reading }
    }
}

/// The graph that `confirmed` leaves: one truth for each object, then one for each relation.
pub fn extracted(graph: &SceneGraph, name: impl Fn(&Object) -> String, confirmed: &[bool]) -> Lists {
    let (objects, relations) = confirmed.split_at(graph.objects.len().min(confirmed.len()));
    let at = |truths: &[bool], i: usize| truths.get(i).copied().unwrap_or(false);
    Lists::held(graph, name, |i| at(objects, i), |i| at(relations, i))
}

/// The metrics of a picture of `graph` by the judge's P(yes) of each claim, in the order of [`Target`]'s, by what it lists of
/// the picture if it does, and by the oracle.
///
/// [`Target`]: crate::rig::roles::Target
pub fn metrics(graph: &SceneGraph, judge: &[f64], listed: Option<&Lists>, oracle: Option<&Oracle>) -> Metrics {
    let mut metrics = Metrics::new();
    let yes: Vec<bool> = judge.iter().map(|p| *p >= 0.5).collect();
    let confirmed = || extracted(graph, iou::label, &yes);
    let (seen, wanted) = (listed.cloned().unwrap_or_else(confirmed), Lists::of(graph, iou::label));
    add(&mut metrics, "", "", iou::strict(&seen, &wanted));
    add(&mut metrics, "", "_derived", iou::derived(&seen, &wanted));
    add(&mut metrics, "", "_multiset", iou::multiset(&seen, &wanted));
    if listed.is_none() {
        let phrases = (extracted(graph, Object::phrase, &yes), Lists::of(graph, Object::phrase));
        add(&mut metrics, "", "_attributes", iou::strict(&phrases.0, &phrases.1));
    }
    let triples = judge.get(graph.objects.len()..).unwrap_or_default();
    let (triples, others) = triples.split_at(triples.len().min(graph.relations.len()));
    put(&mut metrics, "judge_mean", mean(triples.iter().copied()));
    put(&mut metrics, "judge_all", all(triples.iter().map(|p| *p >= 0.5)));
    put(&mut metrics, "judge_no_others", others.first().copied());

    let Some(Oracle { judgement, present, distance, .. }) = oracle else { return metrics };
    let truths: Vec<bool> = judgement.objects.iter().chain(&judgement.relations).copied().collect();
    add(&mut metrics, "oracle_", "", iou::strict(&extracted(graph, iou::label, &truths), &wanted));
    put(&mut metrics, "oracle_mean", share(judgement.relations.iter().copied()));
    put(&mut metrics, "oracle_all", all(judgement.relations.iter().copied()));
    put(&mut metrics, "oracle_objects", share(judgement.objects.iter().copied()));
    put(&mut metrics, "no_others", Some(truth(judgement.extra == 0)));
    put(&mut metrics, "oracle_perfect", Some(truth(judgement.perfect())));
    put(&mut metrics, "render_distance", Some(*distance));
    let held = graph.relations.iter().zip(judgement.relations.iter().copied());
    let directions = held.filter(|(r, _)| Spatial::from_name(&r.predicate).is_some_and(Spatial::is_direction));
    put(&mut metrics, "position", all(directions.clone().map(|(_, held)| held)));
    let both = |i: usize, j: usize| present.get(i) == Some(&true) && present.get(j) == Some(&true);
    let pairs: Vec<(bool, bool)> = directions.map(|(r, held)| (both(r.subject, r.object), held)).collect();
    put(&mut metrics, "visor_oa", share(pairs.iter().map(|p| p.0)));
    put(&mut metrics, "visor_unconditional", share(pairs.iter().map(|p| p.0 && p.1)));
    put(&mut metrics, "visor_conditional", share(pairs.iter().filter(|p| p.0).map(|p| p.1)));
    metrics
}

fn add(metrics: &mut Metrics, prefix: &str, suffix: &str, iou: Iou) {
    for (name, value) in [("sg_iou", iou.graph), ("ent_iou", iou.entities), ("rel_iou", iou.relations)] {
        metrics.insert(format!("{prefix}{name}{suffix}"), value);
    }
}

fn put(metrics: &mut Metrics, name: &str, value: Option<f64>) {
    metrics.extend(value.map(|value| (name.to_owned(), value)));
}

/// 1 or 0.
pub fn truth(yes: bool) -> f64 {
    f64::from(u8::from(yes))
}

fn mean(values: impl Iterator<Item = f64>) -> Option<f64> {
    let (sum, n) = values.fold((0.0, 0usize), |(sum, n), v| (sum + v, n + 1));
    (n > 0).then(|| sum / n as f64)
}

/// The share of truths; `None` of none.
pub fn share(truths: impl Iterator<Item = bool>) -> Option<f64> {
    mean(truths.map(truth))
}

fn all(truths: impl Iterator<Item = bool>) -> Option<f64> {
    share(truths).map(|share| truth(share == 1.0))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::scene::parse::parse;

    /// Four objects, two of them balls, and two relations.
    fn graph() -> SceneGraph {
        parse("red ball left of blue cube; green ball inside blue ring").unwrap()
    }

    /// What the metrics take of an oracle, with a reading that none of them looks at.
    fn oracle(judgement: Judgement, present: bool, distance: f64) -> Oracle {
        let reading = oracle::read(&RgbImage::new(8, 8));
        Oracle { judgement, present: vec![present; 4], distance, reading }
    }

    #[test]
    fn a_judges_answers_give_the_numbers_worked_out_by_hand() {
        let graph = graph();
        assert_eq!((graph.objects.len(), graph.relations.len()), (4, 2));
        // Ball, cube and ring are seen, and the first triple.
        let m = metrics(&graph, &[0.9, 0.6, 0.2, 0.5, 0.8, 0.4], None, None);
        // By label {ball, cube, ring}: all three of three; with attributes three of four.
        assert_eq!((m["sg_iou"], m["ent_iou"], m["rel_iou"]), (0.5, 1.0, 0.5));
        assert_eq!((m["ent_iou_multiset"], m["ent_iou_attributes"]), (0.75, 0.75));
        // The seen triple names ball and cube; the wanted ones ball, cube, ring.
        assert_eq!(m["ent_iou_derived"], 2.0 / 3.0);
        assert!((m["judge_mean"] - 0.6).abs() < 1e-12 && m["judge_all"] == 0.0);
        assert!(!m.contains_key("oracle_mean") && !m.contains_key("no_others"));
    }

    #[test]
    fn a_wrong_triple_in_a_list_costs_something() {
        let wanted = Lists::of(&graph(), iou::label);
        let mut seen = wanted.clone();
        seen.triples.push(("ring".into(), "left of".into(), "ball".into()));
        let listed = |lists: &Lists| metrics(&graph(), &[1.0; 6], Some(lists), None);
        assert_eq!((listed(&seen)["sg_iou"], listed(&wanted)["sg_iou"]), (2.0 / 3.0, 1.0));
        assert!(!listed(&seen).contains_key("sg_iou_attributes"), "labels are listed, not attributes");
    }

    #[test]
    fn the_oracles_findings_give_the_numbers_worked_out_by_hand() {
        let judgement = Judgement { objects: vec![true, true, false, false], relations: vec![true, false], extra: 1 };
        let m = metrics(&graph(), &[0.0; 6], None, Some(&oracle(judgement, true, 0.25)));
        assert_eq!((m["sg_iou"], m["judge_all"]), (0.0, 0.0));
        assert_eq!((m["oracle_mean"], m["oracle_all"], m["oracle_objects"]), (0.5, 0.0, 0.5));
        assert_eq!((m["no_others"], m["oracle_perfect"], m["oracle_sg_iou"]), (0.0, 0.0, 0.5));
        assert_eq!(m["render_distance"], 0.25);
        // "Inside" is no direction.
        assert_eq!(m["position"], 1.0);
        assert_eq!((m["visor_oa"], m["visor_unconditional"], m["visor_conditional"]), (1.0, 1.0, 1.0));
    }

    #[test]
    fn what_is_not_defined_is_absent() {
        let judgement = Judgement { objects: vec![false; 4], relations: vec![false; 2], extra: 0 };
        let m = metrics(&graph(), &[1.0; 6], None, Some(&oracle(judgement, false, 0.0)));
        assert!(!m.contains_key("visor_conditional"));
        assert_eq!((m["sg_iou"], m["judge_all"], m["no_others"]), (1.0, 1.0, 1.0));
        let closed = metrics(&graph(), &[1.0, 1.0, 1.0, 1.0, 0.25, 0.75, 0.125], None, None);
        assert_eq!((closed["judge_mean"], closed["judge_no_others"]), (0.5, 0.125));
        let alone = metrics(&parse("red ball").unwrap(), &[1.0], None, None);
        assert!(!alone.contains_key("judge_mean") && alone["sg_iou"] == 0.0 && alone["ent_iou"] == 1.0);
        assert!(m.values().all(|v| (0.0..=1.0).contains(v)));
    }
}
