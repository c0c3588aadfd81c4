//! What is measured of one picture. Every metric is a number in 0..=1, and all but `render_distance`, for which the pixels
//! are looked at once more, follow from what the judges say.
//!
//! | names | what |
//! |---|---|
//! | `sg_iou`, `ent_iou`, `rel_iou` | LAION-SG's IoU of triples, objects and predicates between the graph and that of the picture, `strict` as the authors' code has it |
//! | `.._derived`, `.._multiset` | the same as the paper's text has it; counting what occurs twice |
//! | `.._attributes` | the strict IoU naming objects with their attributes, always of what the judge confirms: what it lists has none |
//! | `judge_mean`, `judge_all` | VLM as a judge: the mean P(yes) of the triples, each at most that of its two objects; whether each has at least one half |
//! | `judge_no_others` | whether it finds nothing else in the picture, nor anything broken |
//! | `oracle_sg_iou`, .. | the strict IoU by the pixel oracle |
//! | `oracle_mean`, `oracle_all` | the share of triples that hold by the oracle; whether all do |
//! | `oracle_objects`, `no_others`, `oracle_perfect` | the share of objects; whether nothing else is in the picture, nor anything broken; whether all of it is right |
//! | `render_distance` | how far the picture is from a render of what the oracle reads in it (root mean square; less is better) |
//! | `position` | GenEval's: whether all directions (left, right, above, below) hold |
//! | `visor_oa`, `visor_unconditional`, `visor_conditional` | VISOR over the directions: both objects are there, with label and colour; the relation holds; it holds given both (of prompts with one relation, as VISOR's are, and one seed the mean is VISOR's) |
//!
//! IoUs compare what triples name: an object without a relation is none of their objects, as in the authors' code.
//!
//! The graph of a picture is what the judge lists of it in the words of the one that was asked for (as the authors' code has
//! it; the default of LAION-SG), or what it confirms of that graph claim by claim (the default of the tabletop world, whose
//! VLM has not learned to list). The latter is a part of it: these IoUs are then shares that are met, and what is too much
//! in a picture costs nothing by them, as other things than those asked for never do; for that there are `judge_no_others` and
//! `no_others`.

mod judge;
mod oracle;
mod position;
mod visor;

use crate::{
    rig::roles::Claim,
    scene::{
        graph::{Object, SceneGraph},
        iou::{self, Iou, Lists},
        relation::Spatial,
        tabletop::{
            oracle::{Reading, read},
            view::Judgement,
        },
    },
};
use image::RgbImage;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// Names and values; a metric that is not defined for a picture is absent.
pub type Metrics = BTreeMap<String, f64>;

/// The metrics of one family; `None` where one is not defined.
type Named<const N: usize> = [(&'static str, Option<f64>); N];

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
        let reading = read(image);
        let present = reading.view.matching(graph).iter().map(Option::is_some).collect();
        Self { judgement: reading.judge(graph), present, distance: reading.render_distance(image), reading }
    }
}

/// A direction (left, right, above, below) that was asked for.
struct Direction {
    /// Whether both objects are there.
    present: bool,
    held: bool,
}

impl Direction {
    fn all(graph: &SceneGraph, Oracle { judgement, present, .. }: &Oracle) -> Vec<Self> {
        let is_there = |i: usize| present.get(i) == Some(&true);
        let relations = graph.relations.iter().zip(&judgement.relations);
        relations
            .filter(|(r, _)| Spatial::from_name(&r.predicate).is_some_and(Spatial::is_direction))
            .map(|(r, &held)| Self { present: is_there(r.subject) && is_there(r.object), held })
            .collect()
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
    let phrases = (extracted(graph, Object::phrase, &yes), Lists::of(graph, Object::phrase));
    add(&mut metrics, "", "_attributes", iou::strict(&phrases.0, &phrases.1));
    let triples = judge.get(graph.objects.len()..).unwrap_or_default();
    let (triples, others) = triples.split_at(triples.len().min(graph.relations.len()));
    put(&mut metrics, judge::metrics(triples, others.first().copied()));

    let Some(oracle) = oracle else { return metrics };
    let Judgement { objects, relations, .. } = &oracle.judgement;
    let truths: Vec<bool> = objects.iter().chain(relations).copied().collect();
    add(&mut metrics, "oracle_", "", iou::strict(&extracted(graph, iou::label, &truths), &wanted));
    put(&mut metrics, oracle::metrics(&oracle.judgement, oracle.distance));
    let directions = Direction::all(graph, oracle);
    put(&mut metrics, position::metrics(&directions));
    put(&mut metrics, visor::metrics(&directions));
    metrics
}

fn add(metrics: &mut Metrics, prefix: &str, suffix: &str, iou: Iou) {
    for (name, value) in [("sg_iou", iou.graph), ("ent_iou", iou.entities), ("rel_iou", iou.relations)] {
        metrics.insert(format!("{prefix}{name}{suffix}"), value);
    }
}

fn put<const N: usize>(metrics: &mut Metrics, named: Named<N>) {
    metrics.extend(named.into_iter().filter_map(|(name, value)| Some((name.to_owned(), value?))));
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
    use crate::scene::{
        parse::parse,
        tabletop::{
            view::{
                View,
                tests::{reordered, reorderings},
            },
            world::{Background, Scene},
        },
    };
    use proptest::{collection::vec, option, prelude::any};

    /// Four objects, two of them balls, and two relations.
    fn graph() -> SceneGraph {
        parse("red ball left of blue cube; green ball inside blue ring").unwrap()
    }

    /// What the metrics take of an oracle, with a reading that none of them looks at.
    fn oracle(judgement: Judgement, present: Vec<bool>, distance: f64) -> Oracle {
        let background = Background { rgb: [0.0; 3], slope: [0.0; 2] };
        let scene = Scene { background, items: vec![] };
        Oracle {
            judgement,
            present,
            distance,
            reading: Reading { view: View::default(), fit: vec![], unclear: 0, scene },
        }
    }

    #[test]
    fn a_judges_answers_give_the_numbers_worked_out_by_hand() {
        let graph = graph();
        assert_eq!((graph.objects.len(), graph.relations.len()), (4, 2));
        // Ball, cube and ring are seen, and the first triple.
        let m = metrics(&graph, &[0.9, 0.6, 0.2, 0.5, 0.75, 0.25, 0.125], None, None);
        // By label {ball, cube, ring}: all three of three; with attributes three of four.
        assert_eq!((m["sg_iou"], m["ent_iou"], m["rel_iou"]), (0.5, 1.0, 0.5));
        assert_eq!((m["ent_iou_multiset"], m["ent_iou_attributes"]), (0.75, 0.75));
        // The seen triple names ball and cube; the wanted ones ball, cube, ring.
        assert_eq!(m["ent_iou_derived"], 2.0 / 3.0);
        assert_eq!((m["judge_mean"], m["judge_all"], m["judge_no_others"]), (0.5, 0.0, 0.0));
        assert!(!m.contains_key("oracle_mean") && !m.contains_key("no_others"));
    }

    #[test]
    fn a_wrong_triple_in_a_list_costs_something() {
        let wanted = Lists::of(&graph(), iou::label);
        let mut seen = wanted.clone();
        seen.triples.push(("ring".into(), "left of".into(), "ball".into()));
        let listed = |lists: &Lists| metrics(&graph(), &[0.9, 0.6, 0.2, 0.5, 0.75, 0.25], Some(lists), None);
        assert_eq!((listed(&seen)["sg_iou"], listed(&wanted)["sg_iou"]), (2.0 / 3.0, 1.0));
        // With attributes it is what the judge confirms, whatever it lists.
        let m = listed(&wanted);
        assert_eq!((m["ent_iou"], m["ent_iou_multiset"], m["ent_iou_attributes"]), (1.0, 1.0, 0.75));
        assert_eq!(m["sg_iou_attributes"], 0.5);
    }

    #[test]
    fn the_oracles_findings_give_the_numbers_worked_out_by_hand() {
        let graph = parse("red ball left of blue cube; green ring left of pink star").unwrap();
        let judgement = Judgement { objects: vec![true, true, true, false], relations: vec![true, false], extra: 1 };
        let m = metrics(&graph, &[0.0; 6], None, Some(&oracle(judgement, vec![true; 4], 0.25)));
        assert_eq!((m["sg_iou"], m["judge_all"]), (0.0, 0.0));
        // Both triples have the same predicate.
        assert_eq!((m["oracle_sg_iou"], m["oracle_ent_iou"], m["oracle_rel_iou"]), (0.5, 0.75, 1.0));
        assert_eq!((m["oracle_mean"], m["oracle_objects"], m["render_distance"]), (0.5, 0.75, 0.25));
    }

    #[test]
    fn only_directions_count_for_position_and_visor() {
        let graph =
            parse("red ball left of blue cube; green ball above pink star; yellow cone inside cyan ring").unwrap();
        let found = |present: [bool; 6], relations: [bool; 3]| {
            let judgement = Judgement { objects: vec![true; 6], relations: relations.to_vec(), extra: 0 };
            let m = metrics(&graph, &[1.0; 9], None, Some(&oracle(judgement, present.to_vec(), 0.0)));
            ["position", "visor_oa", "visor_unconditional", "visor_conditional"].map(|name| m[name])
        };
        let no_star = [true, true, true, false, true, true];
        assert_eq!(found([true; 6], [true, true, false]), [1.0, 1.0, 1.0, 1.0]);
        assert_eq!(found(no_star, [false, false, true]), [0.0, 0.5, 0.0, 0.0]);
        assert_eq!(found(no_star, [true, false, false]), [0.0, 0.5, 0.5, 1.0]);
    }

    #[test]
    fn what_is_not_defined_is_absent() {
        let judgement = Judgement { objects: vec![false; 4], relations: vec![false; 2], extra: 0 };
        let m = metrics(&graph(), &[1.0; 6], None, Some(&oracle(judgement, vec![false; 4], 0.0)));
        assert!(!m.contains_key("visor_conditional") && !m.contains_key("judge_no_others"));
        assert_eq!((m["sg_iou"], m["judge_all"], m["no_others"]), (1.0, 1.0, 1.0));
        let alone = metrics(&parse("red ball").unwrap(), &[1.0], None, None);
        assert!(!alone.contains_key("judge_mean") && alone["sg_iou"] == 0.0 && alone["ent_iou"] == 1.0);
    }

    proptest::proptest! {
        /// Of graphs with five objects and five relations at most: what is said of more is not used.
        #[test]
        fn metrics_are_bounded_and_blind_to_order(
            (graph, objects, relations) in reorderings(),
            of_objects in vec((0.0..=1.0f64, any::<bool>(), any::<bool>()), 5),
            of_relations in vec((0.0..=1.0f64, any::<bool>()), 5),
            (others, extra, distance) in (option::of(0.0..=1.0f64), 0usize..3, 0.0..=1.0f64),
            lists in any::<bool>(),
        ) {
            let found = |objects: &[usize], relations: &[usize]| {
                let graph = reordered(&graph, objects, relations);
                let of_objects: Vec<(f64, bool, bool)> = objects.iter().map(|i| of_objects[*i]).collect();
                let of_relations: Vec<(f64, bool)> = relations.iter().map(|i| of_relations[*i]).collect();
                let (p, q) = (of_objects.iter().map(|said| said.0), of_relations.iter().map(|said| said.0));
                let judge: Vec<f64> = p.chain(q).chain(others).collect();
                let right: Vec<bool> = of_objects.iter().map(|said| said.1).collect();
                let held: Vec<bool> = of_relations.iter().map(|said| said.1).collect();
                let present = of_objects.iter().map(|said| said.2).collect();
                let listed = lists.then(|| Lists::held(&graph, iou::label, |i| right[i], |i| held[i]));
                let judgement = Judgement { objects: right, relations: held, extra };
                metrics(&graph, &judge, listed.as_ref(), Some(&oracle(judgement, present, distance)))
            };
            let as_they_are = |n: usize| (0..n).collect::<Vec<_>>();
            let m = found(&as_they_are(objects.len()), &as_they_are(relations.len()));
            let other = found(&objects, &relations);
            proptest::prop_assert!(m.values().all(|x| (0.0..=1.0).contains(x)), "{m:?}");
            proptest::prop_assert!(m.keys().eq(other.keys()), "{m:?} {other:?}");
            // A mean is rounded in the order of its terms.
            let is_close = m.values().zip(other.values()).all(|(x, y)| (x - y).abs() < 1e-12);
            proptest::prop_assert!(is_close, "{m:?} {other:?}");
        }
    }
}
