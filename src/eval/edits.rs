//! What became of the edits of pictures that were wrong: whether an edit could have helped, whether the Actor asked for one
//! that does, and whether the Editor carried it out. Of the tabletop world alone, where the pixel oracle tells.

use super::metrics::{Metrics, Oracle, truth};
use crate::{
    rig::roles::Claim,
    scene::{
        graph::SceneGraph,
        tabletop::{
            edit::{Edit, PLACES},
            plan,
        },
    },
};
use serde::{Deserialize, Serialize};

/// What the oracle says of an edit of a picture that was not right.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Review {
    /// There is an edit that brings the picture nearer to its prompt.
    pub mendable: bool,
    /// This one can be read, and is about what the Checker denied: it names such a thing, or removes one where something is
    /// too much. (Older runs do not say.)
    #[serde(default)]
    pub addressed: bool,
    /// It would bring the picture nearer, carried out as it says.
    pub helpful: bool,
    /// The picture came nearer, or farther from it.
    pub better: bool,
    pub worse: bool,
}

/// Reviews an edit of a picture of which the Checker denied some claims; nothing if the picture was right before.
pub fn review(
    instruction: &str,
    (before, after): (&Oracle, &Oracle),
    graph: &SceneGraph,
    denied: &[&Claim],
) -> Option<Review> {
    let Oracle { reading, judgement, .. } = before;
    let mends = |edit: &Edit| plan::mends(edit, &reading.scene, graph);
    if judgement.perfect() {
        return None;
    }
    let edit = Edit::parse(instruction).ok();
    let helpful = edit.as_ref().is_some_and(mends);
    Some(Review {
        mendable: helpful || plan::edits(&reading.view, graph, PLACES).iter().any(mends),
        addressed: edit.is_some_and(|edit| denied.iter().any(|claim| is_about(&edit, claim))),
        helpful,
        better: after.judgement.better_than(judgement),
        worse: judgement.better_than(&after.judgement),
    })
}

/// Whether an edit names something of what a claim is about, or removes what is too much.
pub(super) fn is_about(edit: &Edit, claim: &Claim) -> bool {
    // The last word of a phrase is its label.
    let names = |phrase: &str| edit.named().iter().any(|named| phrase.split(' ').next_back() == Some(&named.label));
    match claim {
        Claim::Object(object) => names(object),
        Claim::Relation { subject, object, .. } => names(subject) || names(object),
        Claim::Only(_) => matches!(edit, Edit::Remove { .. }),
    }
}

impl Review {
    /// The names under which `results.json` has the shares of each.
    pub const NAMES: [&'static str; 5] = ["mendable", "addressed", "helpful", "better", "worse"];

    pub fn metrics(&self) -> Metrics {
        let truths = [self.mendable, self.addressed, self.helpful, self.better, self.worse];
        Self::NAMES.iter().zip(truths).map(|(name, yes)| ((*name).to_owned(), truth(yes))).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::scene::{
        parse::parse,
        tabletop::{
            render::render,
            world::{Background, Colour, Item, Scene, Shape, Size},
        },
    };

    /// What the oracle says of a picture of these, beside each other.
    fn picture(graph: &SceneGraph, things: &[(Colour, Shape)]) -> Oracle {
        let item = |(i, (colour, shape)): (usize, &(Colour, Shape))| {
            let (colour, shape, x) = (*colour, *shape, 32.0 + 64.0 * i as f32);
            Item { shape, colour, size: Size::Large, x, y: 64.0, radius: 20.0, depth: 0 }
        };
        let items = things.iter().enumerate().map(item).collect();
        let background = Background { rgb: [230.0; 3], slope: [0.0; 2] };
        Oracle::new(&render(&Scene { background, items }), graph)
    }

    #[test]
    fn an_edit_may_be_right_and_not_carried_out_and_the_reverse() {
        let graph = parse("a red ball").unwrap();
        let [red, blue, cube] = [(Colour::Red, Shape::Ball), (Colour::Blue, Shape::Ball), (Colour::Blue, Shape::Cube)];
        let both = picture(&graph, &[blue, cube]);
        let [red, blue, cube] = [red, blue, cube].map(|thing| picture(&graph, &[thing]));
        let (ball, nothing_else) = (Claim::Object("red ball".into()), Claim::Only(vec!["red ball".into()]));
        let denied = [&ball, &nothing_else];
        let reviewed = |edit: &str, before: &Oracle, after: &Oracle| {
            let review = review(edit, (before, after), &graph, &denied).unwrap();
            [review.mendable, review.addressed, review.helpful, review.better, review.worse]
        };
        assert_eq!(reviewed("make the blue ball red", &blue, &red), [true, true, true, true, false]);
        assert_eq!(reviewed("make the blue ball red", &blue, &cube), [true, true, true, false, false]);
        assert_eq!(reviewed("make the green ball red", &blue, &red), [true, true, false, true, false]);
        assert_eq!(reviewed("paint it nicer", &cube, &cube), [true, false, false, false, false]);
        assert_eq!(reviewed("add a blue cube", &blue, &both), [true, false, false, false, true]);
        assert_eq!(review("make the red ball blue", (&red, &blue), &graph, &denied), None);
        assert!(is_about(&Edit::parse("remove the green star").unwrap(), &nothing_else));
    }
}
