//! How good the VLM under training is: verdicts and edits on renders as it answers them, and on drawn pictures as the loop's
//! Checker and Actor do.

use super::{Metrics, drawn::Drawn, objective_vlm::VlmObjective, pixels::write_sheet, vlm_tasks};
use crate::{
    rig::{
        calibration::calibration_error,
        prompts,
        roles::{Actor, Checker, Claim, Picture, Reflection, Situation, Target, Verdict},
        truth::{self, KINDS},
        vlm_roles::{Critic, EDIT, VERDICT},
    },
    scene::{
        graph::SceneGraph,
        tabletop::{
            caption::plain,
            render::render,
            split::Split,
            tasks::{self, CheckSample},
        },
    },
    tensor::rng::Stream,
    vlm::{
        Vlm,
        decode::Sampling,
        prefix::{Looked, Question},
    },
};
use anyhow::Result;
use image::RgbImage;
use serde_json::Value;
use std::path::Path;

/// Verdicts beside the truth: of each the claim, P(yes) as it was said, and whether it is so.
#[derive(Clone, Debug, Default)]
struct Judged(Vec<(Claim, f64, bool)>);

impl Judged {
    /// Adds the verdict that the claim of `truth` holds with probability `p_yes`.
    fn add(&mut self, truth: &Verdict, p_yes: f64) {
        self.0.push((truth.claim.clone(), p_yes, truth.yes));
    }

    fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// How many verdicts on claims of a kind are right, and how many there are.
    fn right(&self, of_kind: impl Fn(&Claim) -> bool) -> (usize, usize) {
        let (mut right, mut all) = (0, 0);
        for (_, p_yes, truth) in self.0.iter().filter(|(claim, ..)| of_kind(claim)) {
            right += usize::from((*p_yes >= 0.5) == *truth);
            all += 1;
        }
        (right, all)
    }

    /// The expected calibration error of all.
    fn calibration_error(&self) -> f64 {
        calibration_error(&self.0.iter().map(|(_, p_yes, truth)| (*p_yes, *truth)).collect::<Vec<_>>())
    }
}

impl VlmObjective {
    /// Verdicts and edits on `count` clean pictures of a split.
    pub fn measure(&self, split: Split, count: usize, objects: usize) -> Result<Metrics> {
        const AT_ONCE: usize = 16;
        let seed = self.seed ^ 0x5eed;
        let sampling = Sampling { temperature: 0.0, max_tokens: EDIT };
        let mut judged = Judged::default();
        let (mut edits, mut formed, mut helped) = (0.0, 0.0, 0.0);
        for start in (0..count).step_by(AT_ONCE) {
            let indices = start as u64..(start + AT_ONCE).min(count) as u64;
            let samples: Vec<CheckSample> = indices.clone().map(|i| tasks::check(seed, split, i, 1, objects)).collect();
            let pictures: Vec<RgbImage> = samples.iter().map(|s| render(&s.scene)).collect();
            let looked = self.checker.look(&pictures.iter().collect::<Vec<_>>())?;
            ask(
                &self.checker,
                &looked,
                samples.iter().map(|s| truth::verdicts(&s.scene.view(), &s.graph)),
                &mut judged,
            )?;

            // Held-out edits are as they come, whatever training makes frequent.
            let in_plain = self.config.plain();
            let repairs: Vec<vlm_tasks::Repair> =
                indices.map(|i| vlm_tasks::repair(seed, split, i, objects, in_plain, 0.0, 1)).collect();
            let pictures: Vec<RgbImage> = repairs.iter().map(|r| render(&r.sample.scene)).collect();
            let looked = self.vlm.look(&pictures.iter().collect::<Vec<_>>())?;
            let questions: Vec<Question> =
                repairs.iter().enumerate().map(|(i, r)| Question { picture: Some(i), text: &r.question }).collect();
            let streams: Vec<Stream> = (0..repairs.len()).map(|i| Stream::new(0, "greedy", i as u64)).collect();
            let answers = self.vlm.answer(&looked, &questions, &prompts::reflect_schema(), sampling, &streams)?;
            for (repair, answer) in repairs.iter().zip(answers) {
                let answer: Value = serde_json::from_str(&self.vlm.chat.decode(&answer.ids)?)?;
                let instruction = answer["edit"].as_str().unwrap_or_default();
                let (ok, mends) = vlm_tasks::mends(instruction, &repair.sample.scene, &repair.sample.graph);
                edits += 1.0;
                formed += f64::from(u8::from(ok));
                helped += f64::from(u8::from(mends));
            }
        }
        let mut metrics = metrics(&judged, "");
        metrics.push(("edits/well_formed".to_owned(), formed / f64::max(edits, 1.0)));
        metrics.push(("edits/mend".to_owned(), helped / f64::max(edits, 1.0)));
        Ok(metrics)
    }

    /// Objects of a prompt at most in an evaluation.
    pub(super) fn objects(&self) -> usize {
        if self.config.adapter.is_some() { self.config.act_objects } else { 3 }
    }

    /// What a prompt asks for; an Actor's adapter learns from plain words.
    fn target(&self, prompt: &str, graph: &SceneGraph) -> Target {
        let target = Target::new(prompt, graph).and_nothing_else();
        if self.config.plain() { target.drawn_as(plain(graph)) } else { target }
    }

    /// Verdicts on what the prompts of held-out drawn pictures claim, and edits of those that miss something, which the Actor
    /// writes from the model's own verdicts, as in the loop.
    pub(super) fn measure_drawn(&self) -> Result<Metrics> {
        let drawn = &self.drawn.1[..self.config.evaluation.min(self.drawn.1.len())];
        let critic = Critic::new(self.checker.clone()).with_actor(Some(self.vlm.clone()));
        let ask = |d: &Drawn| (Picture::from_pixels(d.picture.clone()), self.target(&d.prompt, &d.graph));
        let asked: Vec<(Picture, Target)> = drawn.iter().map(ask).collect();
        let heard = critic.check(&asked.iter().map(|(picture, target)| (picture, target)).collect::<Vec<_>>())?;
        let mut judged = Judged::default();
        let mut wrong: Vec<(&Drawn, Situation)> = Vec::new();
        for ((drawn, (picture, target)), verdicts) in drawn.iter().zip(&asked).zip(&heard) {
            let Drawn { graph, reading, .. } = drawn;
            let truths = truth::drawn_verdicts(reading, graph);
            verdicts.iter().zip(&truths).for_each(|(heard, truth)| judged.add(truth, heard.p_yes));
            if verdicts.iter().any(|verdict| !verdict.yes) && !vlm_tasks::mending(reading, graph, 1).is_empty() {
                wrong.push((drawn, Situation { target, picture, verdicts, earlier: &[], seed: 0, round: 1 }));
            }
        }
        if judged.is_empty() {
            return Ok(Vec::new());
        }
        let (wrong, situations): (Vec<&Drawn>, Vec<Situation>) = wrong.into_iter().unzip();
        let edits = critic.reflect(&situations)?;
        let helps =
            |(edit, drawn): &(&Reflection, &&Drawn)| vlm_tasks::mends(&edit.edit, &drawn.reading.scene, &drawn.graph).1;
        let helped = edits.iter().zip(&wrong).filter(helps).count();
        let mut metrics = metrics(&judged, "drawn/");
        metrics.push(("drawn/mend".to_owned(), helped as f64 / edits.len().max(1) as f64));
        Ok(metrics)
    }

    /// Some held-out pictures that miss their prompts, and in words what the loop makes of them: the verdict on each claim
    /// beside the truth, and the edit.
    pub(super) fn write_samples(&self, folder: &Path) -> Result<()> {
        const SHOWN: u64 = 16;
        let critic = Critic::new(self.checker.clone()).with_actor(Some(self.vlm.clone()));
        let samples: Vec<tasks::ActSample> =
            (0..SHOWN).map(|i| tasks::act(self.seed ^ 0x5eed, Split::Val, i, 1, self.objects())).collect();
        let pictures: Vec<Picture> = samples.iter().map(|s| Picture::from_pixels(render(&s.scene))).collect();
        let targets: Vec<Target> = samples.iter().map(|s| self.target(&s.prompt, &s.graph)).collect();
        let verdicts = critic.check(&pictures.iter().zip(&targets).collect::<Vec<_>>())?;
        let situation =
            |((picture, target), verdicts)| Situation { target, picture, verdicts, earlier: &[], seed: 0, round: 1 };
        let situations: Vec<Situation> =
            pictures.iter().zip(&targets).zip(verdicts.iter().map(Vec::as_slice)).map(situation).collect();
        let edits = critic.reflect(&situations)?;
        let mut words = String::new();
        for ((sample, verdicts), edit) in samples.iter().zip(&verdicts).zip(&edits) {
            words += &format!("{}\n", sample.prompt);
            for (verdict, truth) in verdicts.iter().zip(truth::verdicts(&sample.scene.view(), &sample.graph)) {
                let said = |yes: bool| if yes { "yes" } else { "no" };
                words += &format!("    {:.2} ({}) {}\n", verdict.p_yes, said(truth.yes), verdict.claim);
            }
            words += &format!("    edit: {}\n", edit.edit);
        }
        let shown: Vec<RgbImage> = pictures.iter().map(|p| p.pixels().cloned()).collect::<Result<_>>()?;
        write_sheet(folder, "answers", &shown, &words)
    }
}

/// Asks for the true verdicts on each picture.
fn ask(vlm: &Vlm, looked: &Looked, truths: impl Iterator<Item = Vec<Verdict>>, judged: &mut Judged) -> Result<()> {
    let of = |(i, verdicts): (usize, Vec<Verdict>)| {
        verdicts.into_iter().map(move |truth| (i, prompts::check(&truth.claim), truth))
    };
    let asked: Vec<(usize, String, Verdict)> = truths.enumerate().flat_map(of).collect();
    let questions: Vec<Question> = asked.iter().map(|(i, text, _)| Question { picture: Some(*i), text }).collect();
    let decisions = vlm.decide(looked, &questions, &prompts::check_schema(), prompts::VERDICTS, VERDICT)?;
    for ((.., truth), decision) in asked.iter().zip(decisions) {
        judged.add(truth, decision.probability);
    }
    Ok(())
}

/// The shares of verdicts that are right, of all and by kind, and their calibration.
fn metrics(judged: &Judged, prefix: &str) -> Metrics {
    let share = |(right, all): (usize, usize)| right as f64 / all.max(1) as f64;
    let mut metrics = vec![(format!("{prefix}verdicts"), share(judged.right(|_| true)))];
    let kinds = ["objects", "relations", "others"].into_iter().zip(KINDS);
    metrics.extend(kinds.map(|(name, (_, of))| (format!("{prefix}verdicts/{name}"), share(judged.right(of)))));
    metrics.push((format!("{prefix}calibration_error"), judged.calibration_error()));
    metrics
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn verdicts_are_counted_by_kind_as_right_or_wrong() {
        let sample = tasks::check(5, Split::Train, 0, 2, 3);
        let truths = truth::verdicts(&sample.scene.view(), &sample.graph);
        let (mut right, mut wrong) = (Judged::default(), Judged::default());
        assert!(right.is_empty() && right.right(|_| true) == (0, 0));
        for truth in &truths {
            right.add(truth, truth.p_yes);
            wrong.add(truth, 1.0 - truth.p_yes);
        }
        let counts = [sample.graph.objects.len(), sample.graph.relations.len(), 1];
        assert_eq!(KINDS.map(|(_, of_kind)| right.right(of_kind)), counts.map(|n| (n, n)));
        assert_eq!(KINDS.map(|(_, of_kind)| wrong.right(of_kind)), counts.map(|n| (0, n)));
        assert_eq!((right.calibration_error(), wrong.calibration_error()), (0.0, 1.0));
    }
}
