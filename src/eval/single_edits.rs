//! Single edits of renders of the tabletop world, judged by its pixel oracle.

use super::stats::Share;
use crate::scene::{
    graph::SceneGraph,
    tabletop::{
        edit::Kind,
        oracle,
        split::Split,
        tasks::{self, EditSample},
    },
};
use image::RgbImage;
use serde::Serialize;
use std::collections::BTreeMap;

/// A thing that an edit does not speak of may move by this many pixels.
const IN_PLACE: f32 = 8.0;
/// Things that change places may come to lie this many pixels beside them.
const SWAPPED: f32 = 16.0;

/// `count` single edits of a split, with at least `objects` objects before.
pub fn edits(split: Split, seed: u64, count: usize, objects: usize) -> Vec<EditSample> {
    let (fewest, most) = split.objects();
    (0..count as u64).map(|i| tasks::edit(seed, split, i, fewest.max(objects).min(most), most)).collect()
}

/// How single edits went.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Edited {
    /// What was asked holds, and nothing came or went beside it.
    pub done: Share,
    /// What the edit does not speak of is as and where it was.
    pub kept: Share,
    /// Both.
    pub success: Share,
}

/// By kind of edit, and `all`.
#[derive(Debug, Default, Serialize)]
pub struct EditResults(pub BTreeMap<String, Edited>);

/// One edit's line.
#[derive(Debug, Serialize)]
pub struct EditLine {
    pub instruction: String,
    pub kind: &'static str,
    pub done: bool,
    pub kept: bool,
}

impl EditResults {
    /// Counts one edited picture.
    pub fn count(&mut self, sample: &EditSample, picture: &RgbImage) -> EditLine {
        let reading = oracle::read(picture);
        let (done, kept) = (done(sample, &reading), placed(sample, &reading, true, IN_PLACE));
        for name in [sample.kind.name(), "all"] {
            let edited = self.0.entry(name.to_owned()).or_default();
            edited.done.count(done);
            edited.kept.count(kept);
            edited.success.count(done && kept);
        }
        EditLine { instruction: sample.instruction.clone(), kind: sample.kind.name(), done, kept }
    }

    /// The kinds in their order, then all.
    pub fn rows(&self) -> impl Iterator<Item = (&str, &Edited)> {
        let names = Kind::ALL.iter().map(|kind| kind.name()).chain(["all"]);
        names.filter_map(|name| self.0.get(name).map(|edited| (name, edited)))
    }
}

/// Everything that is on the table after an edit, in full.
fn objects_after(sample: &EditSample) -> SceneGraph {
    SceneGraph { objects: sample.target.view().objects.iter().map(|o| o.object()).collect(), relations: Vec::new() }
}

/// Whether the edit was carried out: exactly the right things, in the relations that were asked for; what was to be
/// swapped is about where the other was.
fn done(sample: &EditSample, reading: &oracle::Reading) -> bool {
    reading.judge(&objects_after(sample)).perfect()
        && reading.judge(&sample.after).relations.iter().all(|holds| *holds)
        && (sample.kind != Kind::Swap || placed(sample, reading, false, SWAPPED))
}

/// Whether the target's things that the edit left alone (`same`), or the others, are in the picture as they should be, and
/// where they should be up to `within` pixels.
fn placed(sample: &EditSample, reading: &oracle::Reading, same: bool, within: f32) -> bool {
    let target = sample.target.view();
    let asked = |i: &usize| sample.source.items.contains(&sample.target.items[*i]) == same;
    (0..target.objects.len()).filter(asked).all(|i| {
        let wanted = &target.objects[i];
        let (x, y) = wanted.bounds.centre();
        reading.view.objects.iter().filter(|seen| seen.object() == wanted.object()).any(|seen| {
            let (a, b) = seen.bounds.centre();
            (x - a).hypot(y - b) <= within
        })
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::scene::tabletop::render::render;

    #[test]
    fn a_render_of_the_target_is_a_perfect_edit_and_one_of_the_source_is_none() {
        let samples = edits(Split::Test, 1, 30, 2);
        let (mut good, mut bad) = (EditResults::default(), EditResults::default());
        for sample in &samples {
            good.count(sample, &render(&sample.target));
            bad.count(sample, &render(&sample.source));
        }
        let (good, bad) = (&good.0["all"], &bad.0["all"]);
        assert!(good.success.value() >= 0.9, "{good:?}");
        assert!(bad.done.value() <= 0.1 && bad.kept.value() >= 0.9, "{bad:?}");
    }
}
