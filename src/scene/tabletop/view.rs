//! What is true of a picture: its objects, where they are, and which lies in front of which.
//!
//! A scene has a view by construction; the oracle makes one from pixels. Both are judged by the same rules, so "does
//! this relation hold" has one definition.

use super::world::{Colour, Scene, Shape, Size};
use crate::scene::{
    graph::{Object, SceneGraph},
    relation::{BoundingBox, Spatial, direction_score, inside},
};
use serde::{Deserialize, Serialize};

/// An object in a picture.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Seen {
    pub shape: Shape,
    pub colour: Colour,
    pub size: Size,
    #[serde(rename = "box")]
    pub bounds: BoundingBox,
}

impl Seen {
    /// What it is called in full: `large red ball`.
    pub fn object(&self) -> Object {
        Object::new(self.shape.name(), vec![self.size.name().into(), self.colour.name().into()])
    }

    /// Whether this can be called `object` (an attribute left out is free). With `strict` false the size is ignored.
    fn is(&self, object: &Object, strict: bool) -> bool {
        object.label == self.shape.name()
            && object.attributes.iter().all(|a| {
                *a == self.colour.name() || *a == self.size.name() || (!strict && Size::from_name(a).is_some())
            })
    }
}

/// All objects of a picture.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct View {
    pub objects: Vec<Seen>,
    /// Pairs `(a, b)`: `a` overlaps `b` and lies in front of it.
    pub in_front: Vec<(usize, usize)>,
}

/// Which requirements of a graph a picture meets.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Judgement {
    /// One truth for each object of the graph.
    pub objects: Vec<bool>,
    /// One truth for each relation of the graph.
    pub relations: Vec<bool>,
    /// Objects in the picture that the graph does not ask for.
    pub extra: usize,
}

impl Judgement {
    /// Every requirement met, and nothing else in the picture.
    pub fn perfect(&self) -> bool {
        self.extra == 0 && self.satisfied() == self.objects.len() + self.relations.len()
    }

    /// How many requirements are met.
    pub fn satisfied(&self) -> usize {
        self.objects.iter().chain(&self.relations).filter(|&&ok| ok).count()
    }

    /// Whether more requirements are met than in `other`, or as many and fewer objects are too many.
    pub fn better_than(&self, other: &Self) -> bool {
        (self.satisfied(), other.extra) > (other.satisfied(), self.extra)
    }

    /// The fraction of the requirements that are met, where it is one of them that there be nothing else.
    pub fn score(&self) -> f64 {
        (self.satisfied() + usize::from(self.extra == 0)) as f64
            / (self.objects.len() + self.relations.len() + 1) as f64
    }
}

impl View {
    /// Whether `a relation b` holds.
    pub fn holds(&self, a: usize, relation: Spatial, b: usize) -> bool {
        self.certainty(a, relation, b) > 0.0
    }

    /// How far `a relation b` is from the border between true and false: positive if it holds, in -1..1. Directions
    /// give their distance from GenEval's threshold; the others are all or nothing.
    pub fn certainty(&self, a: usize, relation: Spatial, b: usize) -> f32 {
        let (Some(first), Some(second)) = (self.objects.get(a), self.objects.get(b)) else { return -1.0 };
        let sure = |yes: bool| if yes { 1.0 } else { -1.0 };
        match relation {
            Spatial::Inside => sure(second.shape == Shape::Ring && inside(&first.bounds, &second.bounds)),
            Spatial::InFrontOf => sure(self.in_front.contains(&(a, b))),
            Spatial::Behind => sure(self.in_front.contains(&(b, a))),
            direction => direction_score(&first.bounds, direction, &second.bounds).map_or(-1.0, |s| s - 0.5),
        }
    }

    /// The numbers of the objects from left to right.
    pub fn left_to_right(&self) -> Vec<usize> {
        let x = |i: &usize| self.objects[*i].bounds.centre().0;
        let mut numbers: Vec<usize> = (0..self.objects.len()).collect();
        numbers.sort_by(|a, b| x(a).total_cmp(&x(b)));
        numbers
    }

    /// Whether every direction between these two objects clearly holds or clearly does not.
    pub fn unambiguous(&self, a: usize, b: usize, margin: f32) -> bool {
        Spatial::DIRECTIONS.iter().all(|&r| self.certainty(a, r, b).abs() >= margin)
    }

    /// The whole truth about the picture as a graph: every object in full, every relation that holds.
    pub fn graph(&self) -> SceneGraph {
        let objects = self.objects.iter().map(Seen::object).collect();
        let mut relations = Vec::new();
        for subject in 0..self.objects.len() {
            for object in (0..self.objects.len()).filter(|&o| o != subject) {
                let held = Spatial::ALL.into_iter().filter(|&r| self.holds(subject, r, object));
                relations.extend(held.map(|r| crate::scene::graph::Relation {
                    subject,
                    predicate: r.name().into(),
                    object,
                }));
            }
        }
        SceneGraph { objects, relations }
    }

    /// Which of the graph's objects and relations this picture shows, and how many objects are left over.
    ///
    /// Objects are assigned one to one so that as many requirements as possible are met. An object is right if label
    /// and all attributes are; a relation is right if it holds between the objects with the right label and colour
    /// (a wrong size fails the object alone).
    pub fn judge(&self, graph: &SceneGraph) -> Judgement {
        self.judge_assigned(graph, &self.matching(graph))
    }

    /// The seen object that each of the graph's objects is assigned to by [`Self::judge`]: right label and colour.
    ///
    /// This is a quadratic assignment (a relation depends on two choices), hence a search and not the Hungarian algorithm.
    pub fn matching(&self, graph: &SceneGraph) -> Vec<Option<usize>> {
        let mut best = (0, vec![None; graph.objects.len()]);
        let mut chosen = best.1.clone();
        self.assign(graph, 0, &mut chosen, &mut best, &mut 20_000);
        best.1
    }

    /// Tries every assignment of seen objects to the graph's objects from `next` on, and to leave one without where others
    /// could have all that fits it; only such names branch, so the search is short, and `budget` bounds it for graphs that
    /// repeat a name many times. Within the budget (enough for any five names and five objects) the best is found, so that
    /// the score does not depend on any order.
    fn assign(
        &self,
        graph: &SceneGraph,
        next: usize,
        chosen: &mut Vec<Option<usize>>,
        best: &mut (usize, Vec<Option<usize>>),
        budget: &mut usize,
    ) {
        let Some(object) = graph.objects.get(next) else {
            // An assigned object is worth something even if its size is wrong, less than any requirement.
            let assigned = chosen.iter().flatten().count();
            let score = self.judge_assigned(graph, chosen).satisfied() * (chosen.len() + 1) + assigned;
            if score > best.0 {
                *best = (score, chosen.clone());
            }
            return;
        };
        let fits = |i: usize, object: &Object| self.objects[i].is(object, false);
        let mut spare = 0;
        for i in 0..self.objects.len() {
            if fits(i, object) && !chosen.contains(&Some(i)) && *budget > 0 {
                *budget -= 1;
                spare += 1;
                chosen[next] = Some(i);
                self.assign(graph, next + 1, chosen, best, budget);
                chosen[next] = None;
            }
        }
        let rivals =
            graph.objects[next + 1..].iter().filter(|o| (0..self.objects.len()).any(|i| fits(i, object) && fits(i, o)));
        let is_free = spare == 0;
        if is_free || spare <= rivals.count() && *budget > 0 {
            *budget = budget.saturating_sub(usize::from(!is_free));
            self.assign(graph, next + 1, chosen, best, budget);
        }
    }

    fn judge_assigned(&self, graph: &SceneGraph, chosen: &[Option<usize>]) -> Judgement {
        let objects = graph.objects.iter().zip(chosen);
        let objects = objects.map(|(o, &c)| c.is_some_and(|i| self.objects[i].is(o, true))).collect();
        let relation = |r: &crate::scene::graph::Relation| {
            let at = |i: usize| chosen.get(i).copied().flatten();
            let (Some(a), Some(b), Some(spatial)) = (at(r.subject), at(r.object), Spatial::from_name(&r.predicate))
            else {
                return false;
            };
            self.holds(a, spatial, b)
        };
        let relations = graph.relations.iter().map(relation).collect();
        Judgement { objects, relations, extra: self.objects.len() - chosen.iter().flatten().count() }
    }
}

impl Scene {
    /// The scene as it is seen: exact boxes, and who covers whom.
    pub fn view(&self) -> View {
        let seen =
            |i: &super::world::Item| Seen { shape: i.shape, colour: i.colour, size: i.size, bounds: i.bounding_box() };
        let mut in_front = Vec::new();
        for (a, first) in self.items.iter().enumerate() {
            for (b, second) in self.items.iter().enumerate() {
                if first.depth > second.depth && super::sample::overlap(first, second) >= super::sample::MIN_OVERLAP {
                    in_front.push((a, b));
                }
            }
        }
        View { objects: self.items.iter().map(seen).collect(), in_front }
    }
}

#[cfg(test)]
pub mod tests {
    use super::*;
    use crate::scene::{graph::Relation, parse::parse};
    use proptest::{
        collection::vec,
        option,
        sample::select,
        strategy::{Just, Strategy},
    };

    fn seen(shape: Shape, colour: Colour, size: Size, x: f32, y: f32) -> Seen {
        let r = if size == Size::Small { 11.0 } else { 20.0 };
        Seen { shape, colour, size, bounds: BoundingBox { x0: x - r, y0: y - r, x1: x + r, y1: y + r } }
    }

    #[test]
    fn what_fits_two_names_goes_where_more_then_holds() {
        let ball = seen(Shape::Ball, Colour::Red, Size::Small, 30.0, 60.0);
        let cube = seen(Shape::Cube, Colour::Blue, Size::Small, 90.0, 60.0);
        let view = View { objects: vec![ball, cube], in_front: vec![] };
        let graph = parse("a ball above a star, and a red ball left of a blue cube").unwrap();
        let found = view.judge(&graph);
        assert_eq!(found.relations, [false, true], "{found:?}");
        // Many names for few things end soon.
        let many = "a red ball, ".repeat(20) + "a blue cube";
        assert_eq!(view.judge(&parse(&many).unwrap()).satisfied(), 2);
    }

    /// A small red ball left of a large blue cube, and a small green star in front of the cube.
    fn view() -> View {
        View {
            objects: vec![
                seen(Shape::Ball, Colour::Red, Size::Small, 25.0, 60.0),
                seen(Shape::Cube, Colour::Blue, Size::Large, 90.0, 60.0),
                seen(Shape::Star, Colour::Green, Size::Small, 72.0, 74.0),
            ],
            in_front: vec![(2, 1)],
        }
    }

    fn judged(prompt: &str) -> (Vec<bool>, Vec<bool>, usize) {
        let j = view().judge(&parse(prompt).unwrap());
        (j.objects, j.relations, j.extra)
    }

    #[test]
    fn each_requirement_is_judged_by_itself() {
        let all = "a red ball left of a blue cube, and a green star in front of the cube";
        assert_eq!(judged(all), (vec![true; 3], vec![true; 2], 0));
        // A wrong size fails the object, not the relation; a wrong colour fails both.
        assert_eq!(judged("a large red ball left of a blue cube"), (vec![false, true], vec![true], 1));
        assert_eq!(judged("a pink ball left of a blue cube"), (vec![false, true], vec![false], 2));
        assert_eq!(judged("a cube left of a ball"), (vec![true, true], vec![false], 1));
        assert_eq!(judged("the cube behind the star"), (vec![true, true], vec![true], 1));
        assert_eq!(judged("a ball inside a cube"), (vec![true, true], vec![false], 1));
    }

    #[test]
    fn equal_names_need_as_many_objects() {
        assert_eq!(judged("a red ball and a red ball").0.iter().filter(|ok| **ok).count(), 1);
        let mut two = view();
        two.objects.push(seen(Shape::Ball, Colour::Red, Size::Small, 90.0, 20.0));
        // Only the assignment that puts the second ball above the cube meets both relations.
        let graph = parse("a red ball above a blue cube, and a red ball left of the blue cube").unwrap();
        assert!(two.judge(&graph).relations.iter().all(|ok| *ok));
        assert_eq!(two.judge(&graph).extra, 1);
    }

    #[test]
    fn the_graph_of_a_view_holds_for_it() {
        let graph = view().graph();
        assert!(view().judge(&graph).perfect());
        assert!(graph.triples().contains(&"small green star in front of large blue cube".to_string()));
        assert!(graph.triples().contains(&"large blue cube behind small green star".to_string()));
    }

    fn place(order: &[usize], old: usize) -> usize {
        order.iter().position(|o| *o == old).unwrap()
    }

    /// The graph with its objects and its relations in these orders of their old indices.
    pub fn reordered(graph: &SceneGraph, objects: &[usize], relations: &[usize]) -> SceneGraph {
        let relation = |i: &usize| {
            let Relation { subject, predicate, object } = graph.relations[*i].clone();
            Relation { subject: place(objects, subject), predicate, object: place(objects, object) }
        };
        SceneGraph {
            objects: objects.iter().map(|i| graph.objects[*i].clone()).collect(),
            relations: relations.iter().map(relation).collect(),
        }
    }

    fn shuffled(n: usize) -> impl Strategy<Value = Vec<usize>> {
        Just((0..n).collect::<Vec<_>>()).prop_shuffle()
    }

    /// Graphs of few words, so that names repeat, each with an order of its objects and one of its relations. Of either
    /// there are five at most, which is within the budget of [`View::assign`].
    pub fn reorderings() -> impl Strategy<Value = (SceneGraph, Vec<usize>, Vec<usize>)> {
        let (size, colour) = (option::of(select(vec!["small", "large"])), option::of(select(vec!["red", "blue"])));
        let object = (select(vec!["ball", "ring"]), size, colour).prop_map(|(label, size, colour)| {
            Object::new(label, size.into_iter().chain(colour).map(str::to_owned).collect())
        });
        let predicates: Vec<&str> = Spatial::ALL.iter().map(|r| r.name()).chain(["adorn"]).collect();
        (1usize..6, 0usize..6).prop_flat_map(move |(n, m)| {
            let relation = (0..n, select(predicates.clone()), 0..n).prop_map(|(subject, predicate, object)| Relation {
                subject,
                predicate: predicate.to_owned(),
                object,
            });
            let graph = (vec(object.clone(), n), vec(relation, m));
            let graph = graph.prop_map(|(objects, relations)| SceneGraph { objects, relations });
            (graph, shuffled(n), shuffled(m))
        })
    }

    /// Pictures of what such graphs name, at few places, each with an order of its objects.
    fn reordered_views() -> impl Strategy<Value = (View, Vec<usize>)> {
        let at = || select(vec![30.0f32, 64.0, 98.0]);
        let (shape, colour) = (select(vec![Shape::Ball, Shape::Ring]), select(vec![Colour::Red, Colour::Blue]));
        let object = (shape, colour, select(Size::ALL), at(), at());
        let object = object.prop_map(|(shape, colour, size, x, y)| seen(shape, colour, size, x, y));
        (1usize..6).prop_flat_map(move |n| {
            let view = (vec(object.clone(), n), vec((0..n, 0..n), 0..4));
            (view.prop_map(|(objects, in_front)| View { objects, in_front }), shuffled(n))
        })
    }

    proptest::proptest! {
        #[test]
        fn a_judgement_is_blind_to_order(
            (graph, objects, relations) in reorderings(),
            (view, order) in reordered_views(),
        ) {
            let in_front = view.in_front.iter().map(|(a, b)| (place(&order, *a), place(&order, *b))).collect();
            let other = View { objects: order.iter().map(|i| view.objects[*i]).collect(), in_front };
            let (found, again) = (view.judge(&graph), other.judge(&reordered(&graph, &objects, &relations)));
            proptest::prop_assert_eq!((found.satisfied(), found.extra), (again.satisfied(), again.extra));
        }
    }
}
