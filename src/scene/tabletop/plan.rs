//! What would mend a picture: edits worked out from what is seen and what is asked for.
//!
//! The teacher of the Actor, and the strongest Actor there can be when the view is exact: a baseline for it.

use super::{
    edit::{self, Edit},
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
pub fn edits(view: &View, graph: &SceneGraph) -> Vec<Edit> {
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
                    let place = anchor(graph, &matching, i);
                    let place = place.and_then(|(relation, at)| Some((relation, name(at)?)));
                    let anywhere = place.is_some().then(|| Edit::Add { what: wanted.clone(), place: None });
                    edits.push(Edit::Add { what: wanted.clone(), place });
                    // There may be no room at the right place.
                    edits.extend(anywhere);
                }
            }
            _ => {}
        }
    }
    let mut swapped = BTreeSet::new();
    for (r, ok) in graph.relations.iter().zip(&truth.relations) {
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
        edits.push(Edit::Move { what: first.clone(), relation, anchor: second.clone() });
        edits.extend(relation.inverse().map(|inverse| Edit::Move { what: second, relation: inverse, anchor: first }));
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

/// A relation of the graph from object `i` to one that is in the picture.
fn anchor(graph: &SceneGraph, matching: &[Option<usize>], i: usize) -> Option<(Spatial, usize)> {
    graph.relations.iter().find_map(|r| {
        let relation = Spatial::from_name(&r.predicate)?;
        if r.subject == i {
            Some((relation, matching[r.object]?))
        } else if r.object == i {
            Some((relation.inverse()?, matching[r.subject]?))
        } else {
            None
        }
    })
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
                let next = edits(&scene.view(), &graph).into_iter().find_map(|e| {
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
    fn nothing_is_planned_for_a_right_picture() {
        for index in 0..100 {
            let rng = &mut Stream::new(22, "plan right", index);
            let (scene, graph) = sample::draw(rng, Split::Train, 1, 3);
            assert!(edits(&scene.view(), &graph).is_empty());
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
            let edits = edits(&View { objects, in_front: Vec::new() }, &graph);
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
        let edits = edits(&View { objects, in_front: Vec::new() }, &graph);
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
            let edits = edits(&scene.view(), &graph);
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
