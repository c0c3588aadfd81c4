//! What would mend a picture: edits worked out from what is seen and what is asked for.
//!
//! The teacher of the Actor, and the strongest Actor there can be when the view is exact: a baseline for it.

use super::{
    edit::{self, Edit, Place},
    view::{Judgement, View},
    world::{Colour, Scene, Size},
};
use crate::{
    scene::{graph::SceneGraph, relation::Spatial},
    tensor::rng::Stream,
};
use std::collections::BTreeSet;

/// A picture held against a graph.
struct Comparison {
    /// The seen object of each of the graph's.
    matching: Vec<Option<usize>>,
    truth: Judgement,
    /// What the graph does not ask for, from left to right.
    spare: Vec<usize>,
}

impl Comparison {
    fn of(view: &View, graph: &SceneGraph) -> Self {
        let matching = view.matching(graph);
        let spare = view.left_to_right().into_iter().filter(|i| !matching.contains(&Some(*i))).collect();
        Self { truth: view.judge(graph), matching, spare }
    }
}

/// Edits each of which would mend something that `view` gets wrong of `graph`: objects that are wrong or missing,
/// relations that fail between objects that are there, and objects too many. Empty if nothing is wrong.
///
/// They come in the order of the graph, the surest for each fault first, and name objects by colour and shape, and by
/// more where that fits several: the first that helps is the same for the same picture, which makes it a rule to learn.
/// What they add or move goes where the graph wants it to be beside up to `places` things, or else beside one.
pub fn edits(view: &View, graph: &SceneGraph, places: usize) -> Vec<Edit> {
    let Comparison { matching, truth, mut spare } = Comparison::of(view, graph);
    let name = |i: usize| edit::name(view, i);
    spare.retain(|i| name(*i).is_some());
    let mut edits = Vec::new();
    for (i, wanted) in graph.objects.iter().enumerate() {
        let colour = wanted.attributes.iter().find_map(|a| Colour::from_name(a));
        let size = wanted.attributes.iter().find_map(|a| Size::from_name(a));
        match (matching[i], truth.objects[i], size) {
            (Some(at), false, Some(size)) => {
                edits.extend(name(at).map(|what| Edit::Resize { what, size }));
            }
            (None, ..) => {
                // Without a colour there is nothing exact to ask for.
                let Some(colour) = colour else { continue };
                // A spare object of the right shape needs paint; any other can be replaced, best one of this colour.
                let same_shape = spare.iter().position(|&s| view.objects[s].shape.name() == wanted.label);
                let same_colour = spare.iter().position(|&s| view.objects[s].colour == colour);
                if let Some(k) = same_shape {
                    edits.extend(name(spare.remove(k)).map(|what| Edit::Recolour { what, colour }));
                    continue;
                }
                let any = (!spare.is_empty()).then_some(0);
                if let Some(k) = same_colour.or(any) {
                    edits.extend(name(spare.remove(k)).map(|what| Edit::Replace { what, by: wanted.clone() }));
                }
                if same_colour.is_none() {
                    let all = wanted_places(view, graph, &matching, (i, None), places);
                    // There may be no room at the right place.
                    let fewer: BTreeSet<usize> = [all.len(), all.len().min(1), 0].into();
                    let add = |n: &usize| Edit::Add { what: wanted.clone(), places: all[..*n].to_vec() };
                    edits.extend(fewer.iter().rev().map(add));
                }
            }
            _ => {}
        }
    }
    let mut swapped = BTreeSet::new();
    for (number, (r, ok)) in graph.relations.iter().zip(&truth.relations).enumerate() {
        let (Some(a), Some(b), Some(relation)) =
            (matching[r.subject], matching[r.object], Spatial::from_name(&r.predicate))
        else {
            continue;
        };
        if *ok {
            continue;
        }
        // Swaps first, which Editors do better: what moves has to find room. The two with each other, or one of them with what is
        // where it should be.
        let others = view.left_to_right().into_iter().filter(|c| ![a, b].contains(c));
        let mut pairs = Vec::new();
        if relation.is_direction() {
            pairs.extend(relation.inverse().filter(|inverse| view.holds(a, *inverse, b)).map(|_| (a, b)));
            pairs.extend(others.clone().filter(|c| view.holds(*c, relation, b)).map(|c| (a, c)));
            pairs.extend(others.filter(|c| view.holds(a, relation, *c)).map(|c| (b, c)));
        }
        // Another relation may ask for the same swap.
        pairs.retain(|(one, other)| swapped.insert([*one.min(other), *one.max(other)]));
        let swap = |(one, other)| Some(Edit::Swap { first: name(one)?, second: name(other)? });
        edits.extend(pairs.into_iter().filter_map(swap));
        let (Some(first), Some(second)) = (name(a), name(b)) else { continue };
        let moves = [(r.subject, first), (r.object, second)]
            .map(|(i, what)| (what, wanted_places(view, graph, &matching, (i, Some(number)), places)));
        let all_at_once = moves.iter().filter(|(_, places)| places.len() > 1);
        edits.extend(all_at_once.map(|(what, places)| Edit::Move { what: what.clone(), places: places.clone() }));
        let one = moves.into_iter().filter_map(|(what, places)| Some((what, vec![places.into_iter().next()?])));
        edits.extend(one.map(|(what, places)| Edit::Move { what, places }));
    }
    edits.extend(spare.into_iter().filter_map(name).map(|what| Edit::Remove { what }));
    edits
}

/// Whether an edit that is carried out on a scene brings it nearer to what a graph asks for.
pub fn mends(edit: &Edit, scene: &Scene, graph: &SceneGraph) -> bool {
    let target = edit.apply(&mut Stream::new(0, "mends", 0), scene);
    target.is_some_and(|target| target.view().judge(graph).better_than(&scene.view().judge(graph)))
}

/// All that `view` gets wrong of `graph`, in words: what is missing, what is too much, what has a wrong size, and which
/// relations fail between objects that are there. Of each kind the first few, in the order that [`edits`] takes.
pub fn faults(view: &View, graph: &SceneGraph) -> String {
    const TOLD: usize = 3;
    let Comparison { matching, truth, spare } = Comparison::of(view, graph);
    let phrase = |i: usize| edit::name(view, i).unwrap_or_else(|| view.objects[i].object()).phrase();
    let wanted = || graph.objects.iter().zip(&matching).zip(&truth.objects);
    let placed = graph.relations.iter().zip(&truth.relations).filter_map(|(r, ok)| {
        let (a, b) = (matching[r.subject]?, matching[r.object]?);
        (!ok).then(|| format!("{} {} {}", phrase(a), r.predicate, phrase(b)))
    });
    let kinds: [(&str, Vec<String>); 4] = [
        ("missing", wanted().filter(|((_, at), _)| at.is_none()).map(|((o, _), _)| o.phrase()).collect()),
        ("too much", spare.into_iter().map(phrase).collect()),
        ("wrong size", wanted().filter(|(_, ok)| !**ok).filter_map(|((_, at), _)| at.map(phrase)).collect()),
        ("misplaced", placed.collect()),
    ];
    let told = kinds.iter().filter(|(_, all)| !all.is_empty());
    let told = told.map(|(kind, all)| format!("{kind} {}", all[..all.len().min(TOLD)].join(", ")));
    told.collect::<Vec<_>>().join("; ")
}

/// Where the graph wants its object `i`: beside `most` things at most that are in the picture and have a name. With a relation
/// `first` that one comes first, and without it there is no place.
fn wanted_places(
    view: &View,
    graph: &SceneGraph,
    matching: &[Option<usize>],
    (i, first): (usize, Option<usize>),
    most: usize,
) -> Vec<Place> {
    let place = |r: usize| {
        let r = &graph.relations[r];
        let relation = Spatial::from_name(&r.predicate)?;
        let (relation, at) = match i {
            i if i == r.subject => (relation, matching[r.object]?),
            i if i == r.object => (relation.inverse()?, matching[r.subject]?),
            _ => return None,
        };
        Some((relation, edit::name(view, at)?))
    };
    let mut places: Vec<Place> = Vec::new();
    if let Some(first) = first {
        let Some(place) = place(first) else { return places };
        places.push(place);
    }
    for place in (0..graph.relations.len()).filter_map(place) {
        if places.len() < most && !places.contains(&place) {
            places.push(place);
        }
    }
    places
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::scene::tabletop::{sample, split::Split, view::Seen};

    #[test]
    fn planned_edits_mend_one_picture_after_another() {
        let (mut mended, mut all) = (0, 0);
        for index in 0..300 {
            let rng = &mut Stream::new(21, "plan", index);
            let (mut scene, _) = sample::draw(rng, Split::Train, 2, 3);
            let (_, graph) = sample::draw(rng, Split::Train, 2, 3);
            // From any scene to any other prompt: greedy, as the loop goes, for at most a dozen rounds.
            for _ in 0..12 {
                let judgement = scene.view().judge(&graph);
                let next = edits(&scene.view(), &graph, 1).into_iter().find_map(|e| {
                    let next = e.apply(rng, &scene)?;
                    next.view().judge(&graph).better_than(&judgement).then_some(next)
                });
                match next {
                    Some(next) => scene = next,
                    None => break,
                }
            }
            all += 1;
            mended += usize::from(scene.view().judge(&graph).perfect());
        }
        assert!(mended * 100 >= all * 70, "{mended} of {all}");
    }

    #[test]
    fn places_are_all_that_the_graph_wants_then_one() {
        use crate::scene::{parse::parse, relation::BoundingBox, tabletop::world::Shape};
        let seen = |shape, colour, x: f32, y: f32| {
            let bounds = BoundingBox { x0: x, y0: y, x1: x + 20.0, y1: y + 20.0 };
            Seen { shape, colour, size: Size::Small, bounds }
        };
        let view = |objects| View { objects, in_front: Vec::new() };
        let graph = parse("red ball left of blue cone; red ball below green cube").unwrap();
        let (ball, cone) = (seen(Shape::Ball, Colour::Red, 10.0, 10.0), seen(Shape::Cone, Colour::Blue, 90.0, 50.0));
        let cube = seen(Shape::Cube, Colour::Green, 14.0, 60.0);
        let planned =
            |view: &View, places: usize| edits(view, &graph, places).iter().map(Edit::plain).collect::<Vec<_>>();
        let moves = planned(&view(vec![ball, cone, cube]), 3);
        let moves: Vec<&str> = moves.iter().map(String::as_str).filter(|edit| edit.starts_with("move")).collect();
        assert_eq!(
            moves,
            [
                "move the red ball below the green cube and to the left of the blue cone",
                "move the red ball below the green cube",
                "move the green cube above the red ball",
            ]
        );
        let missing = view(vec![cone, cube]);
        let both = "add a red ball to the left of the blue cone and below the green cube";
        let one = "add a red ball to the left of the blue cone";
        assert_eq!(planned(&missing, 3), [both, one, "add a red ball"]);
        assert_eq!(planned(&missing, 1), [one, "add a red ball"]);
        // Said twice it is one place, and a ring cannot be asked to be around something.
        let graph =
            parse("red ball inside blue ring; blue ring left of green cube; green cube right of blue ring").unwrap();
        let ring = seen(Shape::Ring, Colour::Blue, 50.0, 90.0);
        let within: Vec<String> = [1, 3]
            .map(|places| edits(&view(vec![ball, ring, seen(Shape::Cube, Colour::Green, 99.0, 90.0)]), &graph, places))
            .concat()
            .iter()
            .map(Edit::plain)
            .collect();
        assert_eq!(within, ["move the red ball inside the blue ring"; 2]);
        let ring = view(vec![ball, ring, seen(Shape::Cube, Colour::Green, 10.0, 90.0)]);
        let apart = edits(&ring, &graph, 3).iter().map(Edit::plain).find(|edit| edit.starts_with("move the blue ring"));
        assert_eq!(apart.as_deref(), Some("move the blue ring to the left of the green cube"));
    }

    #[test]
    fn nothing_is_planned_for_a_right_picture() {
        for index in 0..100 {
            let rng = &mut Stream::new(22, "plan right", index);
            let (scene, graph) = sample::draw(rng, Split::Train, 1, 3);
            assert!(edits(&scene.view(), &graph, 1).is_empty());
            assert_eq!(faults(&scene.view(), &graph), "");
        }
    }

    #[test]
    fn faults_are_told_by_kind() {
        use crate::scene::{parse::parse, relation::BoundingBox, tabletop::world::Shape};
        let seen = |shape, colour, size, x: f32| {
            let bounds = BoundingBox { x0: x, y0: 50.0, x1: x + 20.0, y1: 70.0 };
            Seen { shape, colour, size, bounds }
        };
        let objects = vec![
            seen(Shape::Cube, Colour::Green, Size::Small, 90.0),
            seen(Shape::Ball, Colour::Red, Size::Small, 60.0),
            seen(Shape::Cone, Colour::Blue, Size::Large, 10.0),
        ];
        let view = View { objects, in_front: Vec::new() };
        let graph = parse("large red ball left of blue cone; large red ball left of yellow star").unwrap();
        assert_eq!(
            faults(&view, &graph),
            "missing yellow star; too much green cube; wrong size red ball; misplaced red ball left of blue cone"
        );
    }

    #[test]
    fn two_that_stand_the_wrong_way_round_are_swapped_and_others_moved() {
        use crate::scene::{parse::parse, relation::BoundingBox, tabletop::world::Shape};
        let seen = |shape, colour, x: f32, y: f32| {
            let bounds = BoundingBox { x0: x, y0: y, x1: x + 20.0, y1: y + 20.0 };
            Seen { shape, colour, size: Size::Small, bounds }
        };
        let graph = parse("red ball left of blue cone; green cube").unwrap();
        let planned = |cone: (f32, f32), cube: (f32, f32)| {
            let objects = vec![
                seen(Shape::Ball, Colour::Red, 60.0, 50.0),
                seen(Shape::Cone, Colour::Blue, cone.0, cone.1),
                seen(Shape::Cube, Colour::Green, cube.0, cube.1),
            ];
            let edits = edits(&View { objects, in_front: Vec::new() }, &graph, 1);
            edits.iter().map(Edit::plain).collect::<Vec<_>>()
        };
        let moves =
            ["move the red ball to the left of the blue cone", "move the blue cone to the right of the red ball"];
        assert_eq!(planned((10.0, 50.0), (60.0, 10.0))[0], "swap the red ball and the blue cone");
        assert_eq!(planned((10.0, 50.0), (60.0, 10.0))[1..], moves);
        // What is in the right place gives it up.
        assert_eq!(planned((60.0, 90.0), (20.0, 90.0))[0], "swap the red ball and the green cube");
        assert_eq!(planned((60.0, 90.0), (60.0, 10.0)), moves);

        // Each swap once, also where two relations ask for it.
        let graph = parse("red ball left of blue cone; green cube left of blue cone").unwrap();
        let objects = vec![
            seen(Shape::Ball, Colour::Red, 60.0, 50.0),
            seen(Shape::Cone, Colour::Blue, 10.0, 50.0),
            seen(Shape::Cube, Colour::Green, 100.0, 50.0),
        ];
        let edits = edits(&View { objects, in_front: Vec::new() }, &graph, 1);
        let swaps: Vec<String> = edits.iter().map(Edit::plain).filter(|edit| edit.starts_with("swap")).collect();
        assert_eq!(swaps, ["swap the red ball and the blue cone", "swap the blue cone and the green cube"]);
    }

    #[test]
    fn of_a_thing_drawn_twice_one_is_removed() {
        let mut found = 0;
        for index in 0..60 {
            let rng = &mut Stream::new(25, "plan twice", index);
            let (scene, graph) = sample::draw(rng, Split::Train, 1, 3);
            let Some(scene) = edit::doubled(rng, &scene) else { continue };
            let edits = edits(&scene.view(), &graph, 1);
            let [remove @ Edit::Remove { .. }] = edits.as_slice() else { panic!("{edits:?}") };
            let once = remove.apply(rng, &scene);
            assert!(once.is_some_and(|once| once.view().judge(&graph).perfect()), "{edits:?}");
            found += 1;
        }
        assert!(found > 30, "{found}");
    }

    #[test]
    fn what_is_missing_and_too_much_is_told_of_every_picture_that_misses_its_prompt() {
        for index in 0..100 {
            let rng = &mut Stream::new(24, "plan faults", index);
            let (scene, own) = sample::draw(rng, Split::Train, 1, 3);
            let (_, other) = sample::draw(rng, Split::Train, 1, 3);
            let (scene, graph) = match edit::doubled(rng, &scene).filter(|_| index % 2 == 0) {
                Some(twice) => (twice, own),
                None => (scene, other),
            };
            let (view, told) = (scene.view(), faults(&scene.view(), &graph));
            assert_eq!(told.is_empty(), view.judge(&graph).perfect(), "{told}");
            assert!(told.len() <= 240, "{told}");
        }
    }
}
