//! The truth about pictures of the tabletop world, in the words of the Checker.
//!
//! Training teaches it, and both training and evaluation measure by it; the loop never knows it.

use super::roles::{Claim, Verdict};
use crate::scene::{
    graph::{Object, SceneGraph},
    tabletop::{
        oracle::Reading,
        tasks,
        view::{Seen, View},
        world::{Colour, SIDE},
    },
};

/// Whether a claim is of some kind.
pub type OfKind = fn(&Claim) -> bool;

/// The kinds of claims.
pub const KINDS: [(&str, OfKind); 3] = [
    ("objects", |claim| matches!(claim, Claim::Object(_))),
    ("relations", |claim| matches!(claim, Claim::Relation { .. })),
    ("nothing else", |claim| matches!(claim, Claim::Only(_))),
];

/// A claim of the world in the words of the loop.
fn claim(claim: &tasks::Claim) -> Claim {
    match claim {
        tasks::Claim::Object(object) => Claim::Object(object.phrase()),
        tasks::Claim::Relation { subject, predicate, object } => {
            Claim::Relation { subject: subject.phrase(), relation: predicate.clone(), object: object.phrase() }
        }
    }
}

/// An object in full, and its centre in percent of the picture, to 5.
fn place(seen: &Seen) -> String {
    let percent = |x: f32| ((x * 20.0 / SIDE as f32).round() * 5.0).clamp(0.0, 95.0);
    let (x, y) = seen.bounds.centre();
    format!("{} {} {}", seen.object().phrase(), percent(x), percent(y))
}

/// What is seen of an object: the one meant, or what comes nearest, by shape before colour.
fn evidence(view: &View, object: &Object, meant: Option<usize>) -> String {
    let by = |fits: &dyn Fn(&Seen) -> bool| {
        let left = |a: &&Seen, b: &&Seen| a.bounds.centre().0.total_cmp(&b.bounds.centre().0);
        view.objects.iter().filter(|o| fits(o)).min_by(left)
    };
    let colour = object.attributes.iter().find_map(|a| Colour::from_name(a));
    let seen = meant
        .map(|i| &view.objects[i])
        .or_else(|| by(&|o| o.shape.name() == object.label))
        .or_else(|| by(&|o| Some(o.colour) == colour));
    seen.map_or_else(|| NOTHING.to_owned(), place)
}

const NOTHING: &str = "nothing";

/// What is no shape of the world.
pub const UNCLEAR: &str = "unclear";

/// Objects that are told of a picture at most.
const TOLD: usize = 6;

/// What is in a picture and where, from left to right.
pub fn inventory(view: &View) -> Vec<String> {
    view.left_to_right().into_iter().take(TOLD).map(|i| place(&view.objects[i])).collect()
}

fn verdict(claim: Claim, yes: bool, reflection: String) -> Verdict {
    Verdict { claim, yes, p_yes: f64::from(u8::from(yes)), reflection }
}

/// The verdicts on all claims of a graph about what is seen, and on there being nothing else, each with what is seen of
/// it.
pub fn verdicts(view: &View, graph: &SceneGraph) -> Vec<Verdict> {
    let mut verdicts = stated(view, graph);
    if !graph.objects.is_empty() {
        let only = Claim::Only(graph.objects.iter().map(Object::phrase).collect());
        let seen = if view.objects.is_empty() { NOTHING.to_owned() } else { inventory(view).join(", ") };
        verdicts.push(verdict(only, view.judge(graph).extra == 0, seen));
    }
    verdicts
}

/// Those on what the graph states.
pub fn stated(view: &View, graph: &SceneGraph) -> Vec<Verdict> {
    let matching = view.matching(graph);
    let truth = view.judge(graph);
    let seen = |i: usize| evidence(view, &graph.objects[i], matching[i]);
    let objects = graph
        .objects
        .iter()
        .enumerate()
        .map(|(i, object)| verdict(Claim::Object(object.phrase()), truth.objects[i], seen(i)));
    let relations = graph.relations.iter().zip(&truth.relations).map(|(relation, holds)| {
        let claimed = tasks::Claim::Relation {
            subject: graph.objects[relation.subject].clone(),
            predicate: relation.predicate.clone(),
            object: graph.objects[relation.object].clone(),
        };
        verdict(claim(&claimed), *holds, format!("{}, {}", seen(relation.subject), seen(relation.object)))
    });
    objects.chain(relations).collect()
}

/// The verdicts on all claims of a graph about what the oracle read. What is no known shape is something else than what
/// a graph names, and is told as [`UNCLEAR`].
pub fn drawn_verdicts(reading: &Reading, graph: &SceneGraph) -> Vec<Verdict> {
    let mut verdicts = verdicts(&reading.view, graph);
    if let Some(last) = verdicts.last_mut().filter(|last| matches!(last.claim, Claim::Only(_)) && reading.unclear > 0) {
        (last.yes, last.p_yes) = (false, 0.0);
        if reading.view.objects.len() < TOLD {
            last.reflection += ", ";
            last.reflection += UNCLEAR;
        }
    }
    verdicts
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::scene::tabletop::split::Split;

    #[test]
    fn verdicts_are_those_of_the_world_and_say_what_is_wrong() {
        for index in 0..200 {
            let sample = tasks::check(5, Split::Train, index, 1, 3);
            let verdicts = verdicts(&sample.scene.view(), &sample.graph);
            let mut truth: Vec<(Claim, bool)> = sample.claims().iter().map(|(c, yes)| (claim(c), *yes)).collect();
            let phrases = sample.graph.objects.iter().map(Object::phrase).collect();
            truth.push((Claim::Only(phrases), sample.truth.extra == 0));
            assert_eq!(verdicts.iter().map(|v| (v.claim.clone(), v.yes)).collect::<Vec<_>>(), truth);
            for v in verdicts.iter().filter(|v| v.yes) {
                // What holds is seen: every word of it is in the reflection.
                let named = |phrase: &String| phrase.split(' ').all(|word| v.reflection.contains(word));
                assert!(match &v.claim {
                    Claim::Object(object) => named(object),
                    Claim::Relation { subject, object, .. } =>
                        [subject, object].iter().all(|o| o.split(' ').skip(1).all(|word| v.reflection.contains(word))),
                    Claim::Only(_) => v.reflection.split(", ").count() == sample.scene.items.len(),
                });
            }
        }
    }
}
