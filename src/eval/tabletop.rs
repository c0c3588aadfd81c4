//! The loop and single edits on scenes of a split of the tabletop world.

use super::stats::{Share, calibration_error};
use crate::{
    rig::{
        cycle::{Job, Outcome, best},
        roles::Target,
    },
    scene::{
        graph::SceneGraph,
        tabletop::{
            edit::Kind,
            oracle,
            split::Split,
            tasks::{self, EditSample},
            view::Judgement,
            world::Size,
        },
    },
};
use anyhow::Result;
use image::RgbImage;
use serde::Serialize;
use std::collections::BTreeMap;

/// A thing that an edit does not speak of may move by this many pixels.
const IN_PLACE: f32 = 8.0;
/// Things that change places may come to lie this many pixels beside them.
const SWAPPED: f32 = 16.0;

/// A prompt of a split, and what it asks for.
pub struct Question {
    pub job: Job,
    pub graph: SceneGraph,
}

/// `count` prompts of a split, with at least `objects` objects each.
pub fn questions(split: Split, seed: u64, count: usize, objects: usize) -> Vec<Question> {
    let (fewest, most) = split.objects();
    let question = |index: u64| {
        let sample = tasks::text_to_image(seed, split, index, fewest.max(objects).min(most), most);
        let target = Target::new(sample.prompt, &sample.graph);
        Question { job: Job { target, seed: seed.wrapping_add(index) }, graph: sample.graph }
    };
    (0..count as u64).map(question).collect()
}

/// How many pictures show what was asked.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Shown {
    /// Objects with the right shape, colour and, where it is named, size.
    pub objects: Share,
    /// Objects with the right shape and colour.
    pub shapes_and_colours: Share,
    pub relations: Share,
    /// Pictures without other objects.
    pub no_extra: Share,
    /// Pictures in which everything is right.
    pub perfect: Share,
}

impl Shown {
    fn count(&mut self, reading: &oracle::Reading, graph: &SceneGraph) -> Judgement {
        let judged = reading.judge(graph);
        let mut sizeless = graph.clone();
        for object in &mut sizeless.objects {
            object.attributes.retain(|a| Size::from_name(a).is_none());
        }
        self.objects.count_all(&judged.objects);
        self.shapes_and_colours.count_all(&reading.judge(&sizeless).objects);
        self.relations.count_all(&judged.relations);
        self.no_extra.count(judged.extra == 0);
        self.perfect.count(judged.perfect());
        judged
    }
}

/// The loop's results.
#[derive(Debug, Default, Serialize)]
pub struct LoopResults {
    /// The best picture of the first round, of the first two, and so on.
    pub by_round: Vec<Shown>,
    /// The Checker's answers that the oracle confirms, over all pictures.
    pub checker: Share,
    /// The same for edited pictures alone.
    pub checker_on_edits: Share,
    pub checker_calibration_error: f64,
    pub accepted: Share,
    pub mean_rounds: f64,
    #[serde(skip)]
    said: Vec<(f64, bool)>,
}

/// One sample's line.
#[derive(Debug, Serialize)]
pub struct LoopSample {
    pub prompt: String,
    pub seed: u64,
    pub accepted: bool,
    pub rounds: usize,
    /// Whether everything is right after each round.
    pub perfect: Vec<bool>,
    pub edits: Vec<String>,
}

impl LoopResults {
    pub fn new(rounds: usize) -> Self {
        Self { by_round: vec![Shown::default(); rounds], ..Self::default() }
    }

    /// Counts one prompt's outcome.
    pub fn count(&mut self, question: &Question, outcome: &Outcome) -> Result<LoopSample> {
        let readings: Vec<oracle::Reading> =
            outcome.turns.iter().map(|turn| Ok(oracle::read(turn.picture.pixels()?))).collect::<Result<_>>()?;
        let mut perfect = Vec::new();
        for (round, shown) in self.by_round.iter_mut().enumerate() {
            let seen = &outcome.turns[..outcome.turns.len().min(round + 1)];
            let Some(best) = best(seen) else { continue };
            perfect.push(shown.count(&readings[best], &question.graph).perfect());
        }
        for (i, (turn, reading)) in outcome.turns.iter().zip(&readings).enumerate() {
            let judged = reading.judge(&question.graph);
            // Claims are the graph's objects, then its relations.
            for (verdict, truth) in turn.verdicts.iter().zip(judged.objects.iter().chain(&judged.relations)) {
                let agrees = (verdict.p_yes >= 0.5) == *truth;
                self.checker.count(agrees);
                if i > 0 {
                    self.checker_on_edits.count(agrees);
                }
                self.said.push((verdict.p_yes, *truth));
            }
        }
        let accepted = outcome.best().passes();
        self.accepted.count(accepted);
        self.mean_rounds += (outcome.turns.len() as f64 - self.mean_rounds) / self.accepted.all as f64;
        self.checker_calibration_error = calibration_error(&self.said);
        let edit = |turn: &crate::rig::cycle::Turn| match &turn.action {
            crate::rig::cycle::Action::Edit { instruction, .. } => Some(instruction.clone()),
            crate::rig::cycle::Action::Draw => None,
        };
        Ok(LoopSample {
            prompt: question.job.target.prompt.clone(),
            seed: question.job.seed,
            accepted,
            rounds: outcome.turns.len(),
            perfect,
            edits: outcome.turns.iter().filter_map(edit).collect(),
        })
    }
}

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
    let (target, graph) = (sample.target.view(), objects_after(sample));
    let (found, judged) = (reading.view.matching(&graph), reading.view.judge(&graph));
    let asked = |i: &usize| sample.source.items.contains(&sample.target.items[*i]) == same;
    (0..target.objects.len()).filter(asked).all(|i| {
        let Some(seen) = found[i].map(|at| &reading.view.objects[at]) else { return false };
        let ((x, y), (a, b)) = (seen.bounds.centre(), target.objects[i].bounds.centre());
        judged.objects[i] && (x - a).hypot(y - b) <= within
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        rig::{
            cycle::{Action, Ending, Seconds, Turn},
            roles::{Picture, Verdict, score},
        },
        scene::tabletop::render::render,
    };

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

    #[test]
    fn a_loop_that_mends_its_picture_is_counted_by_round() {
        let questions = questions(Split::Test, 1, 20, 2);
        let mut results = LoopResults::new(3);
        for (i, question) in questions.iter().enumerate() {
            let scene = tasks::text_to_image(1, Split::Test, i as u64, 2, 3).scene;
            let turn = |action, picture: RgbImage, p_yes: f64| {
                let verdict = |claim: &crate::rig::roles::Claim| Verdict {
                    claim: claim.clone(),
                    yes: p_yes >= 0.5,
                    p_yes,
                    reflection: String::new(),
                };
                let verdicts: Vec<Verdict> = question.job.target.claims.iter().map(verdict).collect();
                Turn {
                    action,
                    picture: Picture::from_pixels(picture),
                    score: score(&verdicts),
                    verdicts,
                    seconds: Seconds::default(),
                }
            };
            let blank = RgbImage::from_pixel(128, 128, image::Rgb([225, 220, 210]));
            let edit = Action::Edit { source: 0, instruction: "add all".into() };
            let turns = vec![turn(Action::Draw, blank, 0.0), turn(edit, render(&scene), 1.0)];
            let sample = results.count(question, &Outcome { turns, best: 1, ending: Ending::Accepted }).unwrap();
            assert_eq!((sample.rounds, sample.edits.len(), sample.perfect.len()), (2, 1, 3));
        }
        let [first, second, third] = results.by_round.as_slice() else { panic!("three rounds") };
        assert_eq!((first.perfect.good, first.objects.good, first.no_extra.good), (0, 0, 20));
        assert!(second.perfect.value() >= 0.9 && second.relations.value() >= 0.9, "{second:?}");
        assert_eq!(second.perfect, third.perfect);
        assert!(results.checker.value() > 0.95 && results.checker_calibration_error < 0.05);
        assert_eq!((results.accepted.good, results.mean_rounds), (20, 2.0));
    }
}
