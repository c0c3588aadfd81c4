//! A round of the trajectories: the Actor writes, the Editor carries out, the Checker answers.

use super::{
    super::{
        Batch,
        actor::well_formed,
        flow_steps::{Carried, Edits, carry_out, window_of},
        grpo_config::GrpoConfig,
        pixels::{preserved, still},
        pose::Problem,
        replay::{Asked, Replay, replay, write},
        rollout::{self, Reward},
    },
    Joint,
};
use crate::{
    flow::field::{pack, unpack},
    rig::{
        prompts,
        roles::{Picture, Target, Verdict, score},
        vlm_roles::EDIT,
    },
    scene::graph::SceneGraph,
    tensor::rng::Stream,
    vlm::{Vlm, decode::Answer},
};
use anyhow::{Context, Result};
use candle_core::{DType, Tensor};
use image::RgbImage;

/// The edits that the Actor wrote in a round, by row.
pub(super) struct Writing {
    /// The pictures that the edits are about, and for each row which of them it is.
    sources: Vec<Picture>,
    source_of: Vec<usize>,
    questions: Vec<String>,
    pub(super) answers: Vec<Answer>,
    /// `None` where an answer cannot be read.
    instructions: Vec<Option<String>>,
    /// Of questions and answers.
    pub(super) tokens: usize,
}

impl Writing {
    pub(super) fn replay(&self, vlm: &Vlm) -> Result<Replay> {
        let pictures: Vec<&RgbImage> = self.sources.iter().map(Picture::pixels).collect::<Result<_>>()?;
        let rows = self.source_of.iter().zip(&self.questions).zip(&self.answers);
        let asked: Vec<Asked> =
            rows.map(|((picture, question), answer)| Asked { picture: *picture, question, answer }).collect();
        replay(vlm, &pictures, &asked)
    }

    /// The mean over the rows.
    pub(super) fn mean(&self, of_length: impl Fn(usize) -> f64) -> f64 {
        self.answers.iter().map(|a| of_length(a.ids.len())).sum::<f64>() / self.answers.len() as f64
    }
}

/// One round of all trajectories that had not ended before.
pub(super) struct Turn {
    pub(super) writing: Writing,
    pub(super) carried: Carried,
    /// For each row, and what of it counts.
    pub(super) advantages: Tensor,
    pub(super) counts: Tensor,
    /// Tokens that count.
    pub(super) seen: f64,
    /// As in the Actor's stage.
    pub(super) old: Option<Tensor>,
    pub(super) reference: Option<Tensor>,
}

impl Turn {
    pub(super) fn rows(&self) -> usize {
        self.writing.answers.len()
    }
}

/// Where a trajectory stands.
pub(super) struct State<'a> {
    pub(super) problem: &'a Problem,
    best: Picture,
    pub(super) verdicts: Vec<Verdict>,
    /// Edits of the best picture that did not help.
    failed: Vec<String>,
    pub(super) turns: usize,
    pub(super) idle: usize,
    pub(super) broken: f64,
}

impl<'a> State<'a> {
    pub(super) fn new(problem: &'a Problem) -> Self {
        let (best, verdicts) = (problem.picture.clone(), problem.verdicts.clone());
        Self { problem, best, verdicts, failed: Vec::new(), turns: 0, idle: 0, broken: 0.0 }
    }

    pub(super) fn passes(&self) -> bool {
        self.verdicts.iter().all(|v| v.yes)
    }

    /// Takes in what an edit made, and the verdicts on it.
    fn advance(&mut self, instruction: &str, picture: &Picture, after: Vec<Verdict>) -> Result<()> {
        self.idle += usize::from(still(self.best.pixels()?, picture.pixels()?));
        self.broken += (score(&self.verdicts).unwrap_or(1.0) - score(&after).unwrap_or(1.0)).max(0.0);
        let rank = |verdicts: &[Verdict]| (verdicts.iter().all(|v| v.yes), score(verdicts));
        if rank(&after) > rank(&self.verdicts) {
            (self.best, self.verdicts) = (picture.clone(), after);
            self.failed.clear();
        } else {
            self.failed.push(instruction.to_owned());
        }
        Ok(())
    }
}

impl Joint {
    /// Plays round `round` of the trajectories `rows`, and moves them on. The turn has no advantages yet.
    pub(super) fn play(
        &self,
        states: &mut [State],
        rows: &[usize],
        round: usize,
        batch: &Batch,
    ) -> Result<(Turn, Vec<Reward>)> {
        let writing = self.ask(states, rows, round, batch)?;
        let (carried, pictures) = self.paint(states, rows, &writing, round, batch)?;
        let targets = rows.iter().map(|r| &states[*r].problem.target);
        let asked: Vec<(&Picture, &Target)> = pictures.iter().zip(targets).collect();
        let after = rollout::check(&self.poser.critic, &asked);
        let mut rewards = self.rewards(states, rows, &writing, &pictures, &after)?;
        let answered = writing.instructions.iter().zip(&after);
        let known: Vec<bool> = answered.map(|(edit, after)| edit.is_some() && rollout::known(after)).collect();
        rollout::withhold(&mut rewards, known.iter().copied());
        for ((((r, edit), picture), after), known) in
            rows.iter().zip(&writing.instructions).zip(&pictures).zip(after).zip(known)
        {
            states[*r].turns += 1;
            // Nothing follows from what is not known.
            if let Some(edit) = edit.as_ref().filter(|_| known) {
                states[*r].advance(edit, picture, after)?;
            }
        }
        let none = Tensor::zeros(rows.len(), DType::F32, self.poser.klein.device())?;
        let (advantages, counts) = (none.clone(), none);
        Ok((Turn { writing, carried, advantages, counts, seen: 0.0, old: None, reference: None }, rewards))
    }

    /// The Actor writes an edit of each trajectory's best picture.
    fn ask(&self, states: &[State], rows: &[usize], round: usize, batch: &Batch) -> Result<Writing> {
        let GrpoConfig { group, seed, .. } = &self.config;
        let first = batch.indices().start * group.size as u64;
        // In the first round all of a group read the same picture.
        let (sources, source_of): (Vec<Picture>, Vec<usize>) = if round == 1 {
            let heads = rows.iter().step_by(group.size).map(|r| states[*r].best.clone()).collect();
            (heads, rows.iter().map(|r| r / group.size).collect())
        } else {
            (rows.iter().map(|r| states[*r].best.clone()).collect(), (0..rows.len()).collect())
        };
        let question = |r: &usize| {
            let State { problem, verdicts, failed, .. } = &states[*r];
            prompts::reflect(&problem.target.prompt, verdicts, &failed.iter().map(String::as_str).collect::<Vec<_>>())
        };
        let questions: Vec<String> = rows.iter().map(question).collect();
        let asked: Vec<(usize, &str)> = source_of.iter().copied().zip(questions.iter().map(String::as_str)).collect();
        let stream = |r: &usize| Stream::new(*seed, &format!("joint edits {round}"), first + *r as u64);
        let streams: Vec<Stream> = rows.iter().map(stream).collect();
        let pixels: Vec<&RgbImage> = sources.iter().map(Picture::pixels).collect::<Result<_>>()?;
        let written = write(&self.actor, &pixels, &asked, 1.0, &streams)?;
        let tokens = written.iter().map(|w| w.tokens).sum();
        let (answers, instructions) = written.into_iter().map(|w| (w.answer, w.edit)).unzip();
        Ok(Writing { sources, source_of, questions, answers, instructions, tokens })
    }

    /// The Editor carries the edits out, by stochastic steps.
    fn paint(
        &self,
        states: &[State],
        rows: &[usize],
        writing: &Writing,
        round: usize,
        batch: &Batch,
    ) -> Result<(Carried, Vec<Picture>)> {
        let GrpoConfig { editor, group, joint, seed, .. } = &self.config;
        let first = batch.indices().start * group.size as u64;
        let latents = |r: &usize| states[*r].best.latents().cloned().context("a picture without latents");
        let instructions = writing.instructions.iter().map(|edit| edit.clone().unwrap_or_default()).collect();
        let edits = Edits { instructions, sources: rows.iter().map(latents).collect::<Result<_>>()? };
        let (h, w) = edits.shape()?;
        let klein = &*self.poser.klein;
        let noise = |r: &usize| {
            let own = if editor.shared_noise { 0 } else { (*r % group.size) as u64 };
            pack(&klein.noise(states[*r].problem.seed.wrapping_add(own), round as u64, (h, w))?)
        };
        let noise = Tensor::stack(&rows.iter().map(noise).collect::<candle_core::Result<Vec<_>>>()?, 0)?;
        let window = window_of(editor, *seed, batch.step * joint.rounds as u64 + round as u64)?;
        let fresh = (*seed, &*format!("joint {round}"), first);
        let carried = carry_out(editor, (klein, &self.editor.still), edits, &noise, window, fresh)?;
        let picture =
            |i: usize| Ok(Picture::from_latents(unpack(&carried.states.get(i)?, h, w)?, self.poser.decode.clone()));
        let pictures: Vec<Picture> = (0..rows.len()).map(picture).collect::<Result<_>>()?;
        Picture::develop(&pictures.iter().collect::<Vec<_>>())?;
        Ok((carried, pictures))
    }

    /// What each row's turn is worth, by the names of the rewards.
    fn rewards(
        &self,
        states: &[State],
        rows: &[usize],
        writing: &Writing,
        pictures: &[Picture],
        after: &[Vec<Verdict>],
    ) -> Result<Vec<Reward>> {
        let group = &self.config.group;
        let before: Vec<&[Verdict]> = rows.iter().map(|r| states[*r].verdicts.as_slice()).collect();
        let mut rewards = rollout::by_verdicts(group, &before, after);
        let kept = |(picture, r): (&Picture, &usize)| Ok(preserved(states[*r].best.pixels()?, picture.pixels()?));
        let kept: Vec<f64> = pictures.iter().zip(rows).map(kept).collect::<Result<_>>()?;
        let formed = |edit: &Option<String>| well_formed(edit.as_deref().unwrap_or_default());
        let brief = |a: &Answer| 1.0 - (a.ids.len() as f64 / EDIT as f64).min(1.0);
        for (name, values) in [
            ("format", writing.instructions.iter().map(formed).collect()),
            ("brevity", writing.answers.iter().map(brief).collect()),
            ("preserve", kept),
        ] {
            if group.asks(name) {
                rewards.push((name.to_owned(), values));
            }
        }
        let problems = rows.iter().map(|r| states[*r].problem);
        let judged: Vec<(&Picture, &Target, &SceneGraph)> =
            pictures.iter().zip(problems).map(|(picture, p)| (picture, &p.target, &p.graph)).collect();
        rewards.extend(self.judges.rewards(group, &judged)?);
        Ok(rewards)
    }
}
