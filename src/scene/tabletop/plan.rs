//! What would mend a picture: edits worked out from what is seen and what is asked for.
//!
//! The teacher of the Actor, and the strongest Actor there can be when the view is exact: a baseline for it.

use super::{
    caption::reference,
    edit::Edit,
    view::View,
    world::{Colour, Size},
};
use crate::scene::{
    graph::{Object, SceneGraph},
    relation::Spatial,
};
use crate::tensor::rng::Stream;

/// Edits each of which would mend something that `view` gets wrong of `graph`: objects that are wrong or missing,
/// relations that fail between objects that are there, and objects too many. Empty if nothing is wrong.
pub fn edits(rng: &mut Stream, view: &View, graph: &SceneGraph) -> Vec<Edit> {
    let matching = view.matching(graph);
    let truth = view.judge(graph);
    let seen: Vec<Object> = view.objects.iter().map(super::view::Seen::object).collect();
    let mut spare: Vec<usize> = (0..seen.len()).filter(|i| !matching.contains(&Some(*i))).collect();
    let mut edits = Vec::new();
    for (i, wanted) in graph.objects.iter().enumerate() {
        let colour = wanted.attributes.iter().find_map(|a| Colour::from_name(a));
        let size = wanted.attributes.iter().find_map(|a| Size::from_name(a));
        match (matching[i], truth.objects[i], size) {
            (Some(at), false, Some(size)) => {
                edits.push(Edit::Resize { what: reference(rng, &seen, at, false), size });
            }
            (None, ..) => {
                // A spare object of the right shape needs paint, one of the right colour a new shape.
                let shape = spare.iter().position(|&s| seen[s].label == wanted.label);
                let painted = spare.iter().position(|&s| Some(view.objects[s].colour) == colour);
                match (shape, painted, colour) {
                    (Some(k), _, Some(colour)) => {
                        let at = spare.remove(k);
                        edits.push(Edit::Recolour { what: reference(rng, &seen, at, false), colour });
                    }
                    (None, Some(k), Some(_)) => {
                        let at = spare.remove(k);
                        edits.push(Edit::Replace { what: reference(rng, &seen, at, false), by: wanted.clone() });
                    }
                    (_, _, Some(_)) => {
                        let place = anchor(graph, &matching, i);
                        let place = place.map(|(relation, at)| (relation, reference(rng, &seen, at, false)));
                        edits.push(Edit::Add { what: wanted.clone(), place });
                    }
                    // Without a colour there is nothing exact to ask for.
                    (_, _, None) => {}
                }
            }
            _ => {}
        }
    }
    for (r, ok) in graph.relations.iter().zip(&truth.relations) {
        let (Some(a), Some(b), Some(relation)) =
            (matching[r.subject], matching[r.object], Spatial::from_name(&r.predicate))
        else {
            continue;
        };
        if *ok {
            continue;
        }
        let (first, second) = (reference(rng, &seen, a, false), reference(rng, &seen, b, false));
        edits.push(Edit::Move { what: first.clone(), relation, anchor: second.clone() });
        if let Some(inverse) = relation.inverse() {
            edits.push(Edit::Move { what: second.clone(), relation: inverse, anchor: first.clone() });
            if relation.is_direction() && view.holds(a, inverse, b) {
                edits.push(Edit::Swap { first, second });
            }
        }
    }
    edits.extend(spare.into_iter().map(|at| Edit::Remove { what: reference(rng, &seen, at, false) }));
    edits
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
