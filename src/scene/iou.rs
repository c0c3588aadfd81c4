//! Intersection over union of scene graphs: SG-IoU, Ent-IoU and Rel-IoU of LAION-SG (arXiv 2412.08580).
//!
//! The paper derives entities and predicates from the extracted triples ([`derived`]); its authors' code takes three
//! separate lists, compares them as sets by exact text, and gives 0 for an empty union ([`strict`]). Both collapse equal
//! names; [`multiset`] counts them, and [`with_attributes`] names objects by their whole phrase.

use super::graph::{Object, SceneGraph};
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
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Lists {
    pub triples: Vec<(String, String, String)>,
    pub objects: Vec<String>,
    pub predicates: Vec<String>,
}

impl Lists {
    /// All triples, all objects (also those without a relation) and all predicates, with objects named by `name`.
    pub fn of(graph: &SceneGraph, name: impl Fn(&Object) -> String) -> Self {
        let objects: Vec<String> = graph.objects.iter().map(name).collect();
        let triples = graph.relations.iter().filter_map(|r| {
            let (subject, object) = (objects.get(r.subject)?.clone(), objects.get(r.object)?.clone());
            Some((subject, r.predicate.clone(), object))
        });
        let triples: Vec<(String, String, String)> = triples.collect();
        let predicates = triples.iter().map(|t| t.1.clone()).collect();
        Self { triples, objects, predicates }
    }

    /// Only what the triples name.
    fn of_triples(self) -> Self {
        let objects = self.triples.iter().flat_map(|t| [t.0.clone(), t.2.clone()]).collect();
        Self { objects, ..self }
    }
}

fn label(object: &Object) -> String {
    object.label.clone()
}

/// As the authors' code: sets of triples, objects and predicates by exact text, objects by their label.
pub fn strict(seen: &SceneGraph, wanted: &SceneGraph) -> Iou {
    compare(&Lists::of(seen, label), &Lists::of(wanted, label), set_iou, set_iou)
}

/// As the paper: objects and predicates are those that the triples name.
pub fn derived(seen: &SceneGraph, wanted: &SceneGraph) -> Iou {
    compare(&Lists::of(seen, label).of_triples(), &Lists::of(wanted, label).of_triples(), set_iou, set_iou)
}

/// As [`strict`], but what occurs twice counts twice.
pub fn multiset(seen: &SceneGraph, wanted: &SceneGraph) -> Iou {
    compare(&Lists::of(seen, label), &Lists::of(wanted, label), multiset_iou, multiset_iou)
}

/// As [`multiset`], with objects named by attributes and label.
pub fn with_attributes(seen: &SceneGraph, wanted: &SceneGraph) -> Iou {
    compare(&Lists::of(seen, Object::phrase), &Lists::of(wanted, Object::phrase), multiset_iou, multiset_iou)
}

type Triple = (String, String, String);

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

    #[test]
    fn the_four_variants_differ_where_they_should() {
        let wanted = parse("red ball left of blue cube; green ball above blue cube; star").unwrap();
        let seen = parse("red ball left of blue cube; yellow ring above blue cube").unwrap();
        // Triples: {ball left cube, ball above cube} against {ball left cube, ring above cube}.
        let s = strict(&seen, &wanted);
        assert_eq!((s.graph, s.entities, s.relations), (1.0 / 3.0, 0.5, 1.0));
        // Without the star, which no triple names: {ball, cube} against {ball, cube, ring}.
        assert_eq!(derived(&seen, &wanted).entities, 2.0 / 3.0);
        // {ball, ball, cube, star} against {ball, cube, ring}.
        assert_eq!(multiset(&seen, &wanted).entities, 2.0 / 5.0);
        // {red ball, green ball, blue cube, star} against {red ball, blue cube, yellow ring}.
        assert_eq!(with_attributes(&seen, &wanted).entities, 2.0 / 5.0);
    }

    #[test]
    fn bounds_hold_and_empty_graphs_score_zero() {
        let graph = parse("a red ball left of a blue cube, and a star inside a ring").unwrap();
        let empty = SceneGraph::default();
        for iou in [strict, derived, multiset, with_attributes] {
            let same = iou(&graph, &graph);
            assert_eq!((same.graph, same.entities, same.relations), (1.0, 1.0, 1.0));
            for (a, b) in [(&graph, &empty), (&empty, &graph), (&empty, &empty)] {
                assert_eq!(iou(a, b).graph + iou(a, b).entities + iou(a, b).relations, 0.0);
            }
        }
    }
}
