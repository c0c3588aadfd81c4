//! How good the VLM under training is: verdicts and edits on renders as it answers them, and on drawn pictures as the loop's
//! Checker and Actor do.

use super::{Metrics, drawn::Drawn, objective_vlm::VlmObjective, pixels::tiled, vlm_tasks};
use crate::{
    rig::{
        calibration::calibration_error,
        prompts,
        roles::{Actor, Checker, Claim, Picture, Reflection, Situation, Target, Verdict},
        vlm_roles::{Critic, EDIT, VERDICT},
    },
    scene::tabletop::{
        render::render,
        split::Split,
        tasks::{self, CheckSample},
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
use std::{fs, path::Path};

impl VlmObjective {
    /// Verdicts and edits on `count` clean pictures of a split.
    pub fn measure(&self, split: Split, count: usize, objects: usize) -> Result<Metrics> {
        const AT_ONCE: usize = 16;
        let seed = self.seed ^ 0x5eed;
        let sampling = Sampling { temperature: 0.0, max_tokens: EDIT };
        let mut tally = Verdicts::default();
        let (mut edits, mut formed, mut helped) = (0.0, 0.0, 0.0);
        for start in (0..count).step_by(AT_ONCE) {
            let indices = start as u64..(start + AT_ONCE).min(count) as u64;
            let samples: Vec<CheckSample> = indices.clone().map(|i| tasks::check(seed, split, i, objects)).collect();
            let pictures: Vec<RgbImage> = samples.iter().map(|s| render(&s.scene)).collect();
            let looked = self.vlm.look(&pictures.iter().collect::<Vec<_>>())?;
            tally.ask(&self.vlm, &looked, samples.iter().map(|s| vlm_tasks::verdicts(&s.scene.view(), &s.graph)))?;

            let repairs: Vec<vlm_tasks::Repair> = indices.map(|i| vlm_tasks::repair(seed, split, i, objects)).collect();
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
        let mut metrics = tally.metrics("");
        metrics.push(("edits/well_formed".to_owned(), formed / f64::max(edits, 1.0)));
        metrics.push(("edits/mend".to_owned(), helped / f64::max(edits, 1.0)));
        Ok(metrics)
    }

    /// Verdicts on what the prompts of held-out drawn pictures claim, and edits of those that miss something, which the Actor
    /// writes from the model's own verdicts, as in the loop.
    pub(super) fn measure_drawn(&self) -> Result<Metrics> {
        let drawn = &self.drawn.1[..self.config.evaluation.min(self.drawn.1.len())];
        let critic = Critic::new(self.vlm.clone());
        let ask =
            |d: &Drawn| (Picture::from_pixels(d.picture.clone()), Target::new(&d.prompt, &d.graph).and_nothing_else());
        let asked: Vec<(Picture, Target)> = drawn.iter().map(ask).collect();
        let heard = critic.check(&asked.iter().map(|(picture, target)| (picture, target)).collect::<Vec<_>>())?;
        let mut tally = Verdicts::default();
        let mut wrong: Vec<(&Drawn, Situation)> = Vec::new();
        for ((drawn, (picture, target)), verdicts) in drawn.iter().zip(&asked).zip(&heard) {
            let Drawn { graph, reading, .. } = drawn;
            let truths = vlm_tasks::drawn_verdicts(reading, graph);
            verdicts.iter().zip(&truths).for_each(|(heard, truth)| tally.add(truth, heard.p_yes));
            if verdicts.iter().any(|verdict| !verdict.yes) && !vlm_tasks::mending(reading, graph).is_empty() {
                wrong.push((drawn, Situation { target, picture, verdicts, earlier: &[], seed: 0, round: 1 }));
            }
        }
        if tally.odds.is_empty() {
            return Ok(Vec::new());
        }
        let (wrong, situations): (Vec<&Drawn>, Vec<Situation>) = wrong.into_iter().unzip();
        let edits = critic.reflect(&situations)?;
        let helps =
            |(edit, drawn): &(&Reflection, &&Drawn)| vlm_tasks::mends(&edit.edit, &drawn.reading.scene, &drawn.graph).1;
        let helped = edits.iter().zip(&wrong).filter(helps).count();
        let mut metrics = tally.metrics("drawn/");
        metrics.push(("drawn/mend".to_owned(), helped as f64 / edits.len().max(1) as f64));
        Ok(metrics)
    }

    /// Some held-out pictures that miss their prompts, and in words what the loop makes of them: the verdict on each claim
    /// beside the truth, and the edit.
    pub(super) fn write_samples(&self, folder: &Path) -> Result<()> {
        const SHOWN: u64 = 16;
        let critic = Critic::new(self.vlm.clone());
        let samples: Vec<tasks::ActSample> =
            (0..SHOWN).map(|i| tasks::act(self.seed ^ 0x5eed, Split::Val, i, 1, 3)).collect();
        let pictures: Vec<Picture> = samples.iter().map(|s| Picture::from_pixels(render(&s.scene))).collect();
        let targets: Vec<Target> =
            samples.iter().map(|s| Target::new(&s.prompt, &s.graph).and_nothing_else()).collect();
        let verdicts = critic.check(&pictures.iter().zip(&targets).collect::<Vec<_>>())?;
        let situation =
            |((picture, target), verdicts)| Situation { target, picture, verdicts, earlier: &[], seed: 0, round: 1 };
        let situations: Vec<Situation> =
            pictures.iter().zip(&targets).zip(verdicts.iter().map(Vec::as_slice)).map(situation).collect();
        let edits = critic.reflect(&situations)?;
        let mut words = String::new();
        for ((sample, verdicts), edit) in samples.iter().zip(&verdicts).zip(&edits) {
            words += &format!("{}\n", sample.prompt);
            for (verdict, truth) in verdicts.iter().zip(vlm_tasks::verdicts(&sample.scene.view(), &sample.graph)) {
                let said = |yes: bool| if yes { "yes" } else { "no" };
                words += &format!("    {:.2} ({}) {}\n", verdict.p_yes, said(truth.yes), verdict.claim);
            }
            words += &format!("    edit: {}\n", edit.edit);
        }
        let shown: Vec<RgbImage> = pictures.iter().map(|p| p.pixels().cloned()).collect::<Result<_>>()?;
        tiled(&shown, 8).save(folder.join("answers.png"))?;
        Ok(fs::write(folder.join("answers.txt"), words)?)
    }
}

/// How verdicts compare with the truth.
#[derive(Default)]
struct Verdicts {
    objects: Vec<f64>,
    relations: Vec<f64>,
    /// Of nothing else being there.
    others: Vec<f64>,
    /// P(yes), and whether it is so.
    odds: Vec<(f64, bool)>,
}

impl Verdicts {
    /// Asks for the true verdicts on each picture.
    fn ask(&mut self, vlm: &Vlm, looked: &Looked, truths: impl Iterator<Item = Vec<Verdict>>) -> Result<()> {
        let of = |(i, verdicts): (usize, Vec<Verdict>)| {
            verdicts.into_iter().map(move |truth| (i, prompts::check(&truth.claim), truth))
        };
        let asked: Vec<(usize, String, Verdict)> = truths.enumerate().flat_map(of).collect();
        let questions: Vec<Question> = asked.iter().map(|(i, text, _)| Question { picture: Some(*i), text }).collect();
        let decisions = vlm.decide(looked, &questions, &prompts::check_schema(), prompts::VERDICTS, VERDICT)?;
        for ((.., truth), decision) in asked.iter().zip(decisions) {
            self.add(truth, decision.probability);
        }
        Ok(())
    }

    /// Counts a verdict that holds the claim of `truth` for true with probability `p`.
    fn add(&mut self, truth: &Verdict, p: f64) {
        let kind = match truth.claim {
            Claim::Object(_) => &mut self.objects,
            Claim::Relation { .. } => &mut self.relations,
            Claim::Only(_) => &mut self.others,
        };
        kind.push(f64::from(u8::from((p >= 0.5) == truth.yes)));
        self.odds.push((p, truth.yes));
    }

    fn metrics(&self, prefix: &str) -> Metrics {
        let mean = |values: &[f64]| values.iter().sum::<f64>() / values.len().max(1) as f64;
        let all: Vec<f64> = [&self.objects, &self.relations, &self.others].into_iter().flatten().copied().collect();
        let named = |(name, value): (&str, f64)| (format!("{prefix}{name}"), value);
        [
            ("verdicts", mean(&all)),
            ("verdicts/objects", mean(&self.objects)),
            ("verdicts/relations", mean(&self.relations)),
            ("verdicts/others", mean(&self.others)),
            ("calibration_error", calibration_error(&self.odds)),
        ]
        .map(named)
        .to_vec()
    }
}
