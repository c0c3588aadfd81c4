//! Intersection over union of scene graphs: SG-IoU, Ent-IoU and Rel-IoU of LAION-SG (arXiv 2412.08580).
//!
//! The paper derives entities and predicates from the extracted triples ([`derived`]); its authors' code takes three
//! separate lists of what is seen, compares them as sets by exact text with what the wanted triples name, and gives 0 for an
//! empty union ([`strict`]). Both collapse equal names; [`multiset`] counts them. Objects are named by their label, or with their attributes by [`Object::phrase`].

use super::graph::{Object, Relation, SceneGraph};
use serde::{Deserialize, Serialize};
use std::collections::HashMap;
use std::hash::Hash;

/// The three scores, each in 0..=1.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Iou {
    /// Of triples.
    pub graph: f64,
    /// Of objects.
    pub entities: f64,
    /// Of predicates.
    pub relations: f64,
}

/// A graph as the three lists that are compared.
#[derive(Debug, Clone, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Lists {
    /// Subject, predicate, object.
    pub triples: Vec<Triple>,
    pub objects: Vec<String>,
    pub predicates: Vec<String>,
}

type Triple = (String, String, String);

impl Lists {
    /// All triples and predicates, and the objects that are related ([`SceneGraph::is_related`]), named by `name`.
    pub fn of(graph: &SceneGraph, name: impl Fn(&Object) -> String) -> Self {
        Self::held(graph, name, |_| true, |_| true)
    }

    /// What a judge confirms of a graph: the related objects and the relations for whose index the answer is true. As in the
    /// authors' code, a triple may be confirmed where one of its objects is not, and what no triple names counts for nothing.
    pub fn held(
        graph: &SceneGraph,
        name: impl Fn(&Object) -> String,
        object: impl Fn(usize) -> bool,
        relation: impl Fn(usize) -> bool,
    ) -> Self {
        let names: Vec<String> = graph.objects.iter().map(name).collect();
        let triple = |(i, r): (usize, &Relation)| {
            let (subject, object) = (names.get(r.subject)?.clone(), names.get(r.object)?.clone());
            relation(i).then(|| (subject, r.predicate.clone(), object))
        };
        let triples: Vec<Triple> = graph.relations.iter().enumerate().filter_map(triple).collect();
        let predicates = triples.iter().map(|t| t.1.clone()).collect();
        let counts = |(i, _): &(usize, String)| graph.is_related(*i) && object(*i);
        let objects = names.into_iter().enumerate().filter(counts).map(|(_, name)| name).collect();
        Self { triples, objects, predicates }
    }

    /// Only what the triples name.
    fn of_triples(&self) -> Self {
        let objects = self.triples.iter().flat_map(|t| [t.0.clone(), t.2.clone()]).collect();
        let predicates = self.triples.iter().map(|t| t.1.clone()).collect();
        Self { triples: self.triples.clone(), objects, predicates }
    }
}

/// An object's name without its attributes.
pub fn label(object: &Object) -> String {
    object.label.clone()
}

/// As the authors' code: sets of triples, objects and predicates by exact text.
pub fn strict(seen: &Lists, wanted: &Lists) -> Iou {
    compare(seen, wanted, set_iou, set_iou)
}

/// As the paper: objects and predicates are those that the triples name.
pub fn derived(seen: &Lists, wanted: &Lists) -> Iou {
    compare(&seen.of_triples(), &wanted.of_triples(), set_iou, set_iou)
}

/// As [`strict`], but what occurs twice counts twice.
pub fn multiset(seen: &Lists, wanted: &Lists) -> Iou {
    compare(seen, wanted, multiset_iou, multiset_iou)
}

fn compare(
    seen: &Lists,
    wanted: &Lists,
    triples: fn(&[Triple], &[Triple]) -> f64,
    names: fn(&[String], &[String]) -> f64,
) -> Iou {
    Iou {
        graph: triples(&seen.triples, &wanted.triples),
        entities: names(&seen.objects, &wanted.objects),
        relations: names(&seen.predicates, &wanted.predicates),
    }
}

/// `|A and B| / |A or B|` of multisets; 0 if both are empty.
pub fn multiset_iou<T: Eq + Hash>(a: &[T], b: &[T]) -> f64 {
    let mut counts: HashMap<&T, (usize, usize)> = HashMap::new();
    a.iter().for_each(|x| counts.entry(x).or_default().0 += 1);
    b.iter().for_each(|x| counts.entry(x).or_default().1 += 1);
    ratio(counts.values().copied())
}

/// `|A and B| / |A or B|` of sets; 0 if both are empty.
pub fn set_iou<T: Eq + Hash>(a: &[T], b: &[T]) -> f64 {
    let mut present: HashMap<&T, (usize, usize)> = HashMap::new();
    a.iter().for_each(|x| present.entry(x).or_default().0 = 1);
    b.iter().for_each(|x| present.entry(x).or_default().1 = 1);
    ratio(present.values().copied())
}

fn ratio(counts: impl Iterator<Item = (usize, usize)>) -> f64 {
    let (both, either) = counts.fold((0, 0), |(i, u), (a, b)| (i + a.min(b), u + a.max(b)));
    if either == 0 { 0.0 } else { both as f64 / either as f64 }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::scene::parse::parse;

    fn lists(text: &str) -> Lists {
        Lists::of(&parse(text).unwrap(), label)
    }

    #[test]
    fn the_variants_differ_where_they_should() {
        let (wanted, seen) = (
            "red ball left of blue cube; green ball above blue cube; star",
            "red ball left of blue cube; yellow ring above blue cube",
        );
        // Triples: {ball left cube, ball above cube} against {ball left cube, ring above cube}.
        let s = strict(&lists(seen), &lists(wanted));
        // Without the star, which no triple names: {ball, cube} against {ball, cube, ring}.
        assert_eq!((s.graph, s.entities, s.relations), (1.0 / 3.0, 2.0 / 3.0, 1.0));
        // {ball, ball, cube} against {ball, cube, ring}.
        assert_eq!(multiset(&lists(seen), &lists(wanted)).entities, 0.5);
        // An object that a judge lists without a triple counts by the code, not by the paper.
        let listed = Lists { objects: vec!["ball".into(), "cube".into()], ..Lists::default() };
        assert_eq!((strict(&listed, &lists(seen)).entities, derived(&listed, &lists(seen)).entities), (2.0 / 3.0, 0.0));
        // Where nothing is related, there are the objects alone.
        assert_eq!(lists("a ball and a cube").objects, ["ball", "cube"]);
        // A predicate that a judge lists without a triple counts by the code, not by the paper.
        let listed = Lists { predicates: vec!["above".into()], ..Lists::default() };
        let asked = lists("a ball above a cube");
        assert_eq!((strict(&listed, &asked).relations, derived(&listed, &asked).relations), (1.0, 0.0));
        // {red ball, green ball, blue cube} against {red ball, blue cube, yellow ring}.
        let phrases = |text| Lists::of(&parse(text).unwrap(), Object::phrase);
        assert_eq!(strict(&phrases(seen), &phrases(wanted)).entities, 0.5);
    }

    #[test]
    fn a_judge_confirms_objects_and_triples_apart() {
        let graph = parse("red ball left of blue cube; star above blue cube").unwrap();
        let seen = Lists::held(&graph, label, |i| i == 0, |i| i == 1);
        assert_eq!(seen.objects, ["ball"]);
        assert_eq!(seen.triples, [("star".to_owned(), "above".to_owned(), "cube".to_owned())]);
        let iou = strict(&seen, &Lists::of(&graph, label));
        assert_eq!((iou.graph, iou.entities, iou.relations), (0.5, 1.0 / 3.0, 0.5));
    }

    #[test]
    fn bounds_hold_both_ways_and_empty_graphs_score_zero() {
        let (graph, other) =
            (lists("a red ball left of a blue cube, and a star inside a ring"), lists("ball above cube"));
        let empty = Lists::default();
        for iou in [strict, derived, multiset] {
            let same = iou(&graph, &graph);
            assert_eq!((same.graph, same.entities, same.relations), (1.0, 1.0, 1.0));
            assert_eq!(iou(&graph, &other), iou(&other, &graph));
            for (a, b) in [(&graph, &empty), (&empty, &graph), (&empty, &empty)] {
                assert_eq!(iou(a, b).graph + iou(a, b).entities + iou(a, b).relations, 0.0);
            }
        }
    }

    /// Lists with few words, so that some are shared and some occur twice.
    fn some_lists() -> impl proptest::strategy::Strategy<Value = Lists> {
        use proptest::{collection::vec, sample::select, strategy::Strategy};
        let word = || select(vec!["a", "b", "c", "d"]).prop_map(str::to_owned);
        let triples = vec((word(), word(), word()), 0..6);
        (triples, vec(word(), 0..6)).prop_map(|(triples, objects)| {
            let predicates = triples.iter().map(|t: &Triple| t.1.clone()).collect();
            Lists { triples, objects, predicates }
        })
    }

    proptest::proptest! {
        #[test]
        fn an_iou_is_symmetric_bounded_and_blind_to_order(a in some_lists(), b in some_lists(), turn in 0usize..6) {
            let mut turned = a.clone();
            turned.triples.rotate_left(turn.min(a.triples.len()));
            turned.objects.rotate_left(turn.min(a.objects.len()));
            turned.predicates.reverse();
            for iou in [strict, derived, multiset] {
                let found = iou(&a, &b);
                proptest::prop_assert_eq!(found, iou(&b, &a));
                proptest::prop_assert_eq!(found, iou(&turned, &b));
                for x in [found.graph, found.entities, found.relations] {
                    proptest::prop_assert!((0.0..=1.0).contains(&x));
                }
                proptest::prop_assert_eq!(iou(&a, &a).graph, if a.triples.is_empty() { 0.0 } else { 1.0 });
            }
        }
    }

    #[test]
    fn a_thousand_random_pairs_agree_with_the_definition_in_python() {
        #[derive(Deserialize)]
        struct Pair {
            a: Lists,
            b: Lists,
            strict: [f64; 3],
            derived: [f64; 3],
            multiset: [f64; 3],
        }
        let pairs: Vec<Pair> = serde_json::from_str(include_str!("../../tests/fixtures/iou.json")).unwrap();
        assert_eq!(pairs.len(), 1000);
        for Pair { a, b, strict: s, derived: d, multiset: m } in &pairs {
            for (found, wanted) in [(strict(a, b), s), (derived(a, b), d), (multiset(a, b), m)] {
                let found = [found.graph, found.entities, found.relations];
                assert!(
                    found.iter().zip(wanted).all(|(x, y)| (x - y).abs() < 1e-9),
                    "{found:?} {wanted:?}: {a:?} {b:?}"
                );
            }
        }
    }
}
