//! A round of the trajectories: the Actor writes, the Editor carries out, the Checker answers.

use super::{
    super::{
        Batch,
        flow_steps::{Carried, Edits, carry_out, window_of},
        grpo_config::GrpoConfig,
        pixels::{preserved, still},
        pose::Problem,
        replay::{Rollouts, Writing},
        rollout::{self, Judged, Reward, judge},
    },
    Joint,
};
use crate::{
    flow::field::{pack, unpack},
    rig::{
        prompts,
        roles::{Picture, Target, Verdict, score},
    },
    scene::graph::SceneGraph,
    tensor::rng::Stream,
};
use anyhow::{Context, Result};
use candle_core::Tensor;

/// A round of all trajectories that had not ended before, as it was played.
pub(super) struct Played {
    /// The trajectories, by their numbers, and the group of each.
    pub(super) rows: Vec<usize>,
    pub(super) groups: Vec<u64>,
    /// Where each stood before.
    pub(super) entered: Vec<Standing>,
    pub(super) writing: Writing,
    pub(super) carried: Carried,
    /// What the turns are worth for themselves.
    pub(super) judged: Judged,
}

/// The same with what came of it: what updates are computed from.
pub(super) struct Turn {
    pub(super) answers: Rollouts,
    pub(super) carried: Carried,
    /// As those of the answers, but 0 where none could be read: what nobody asked for teaches the Editor nothing.
    pub(super) advantages: Tensor,
    pub(super) counts: Tensor,
}

impl Turn {
    pub(super) fn rows(&self) -> usize {
        self.answers.writing.written.len()
    }
}

/// What a trajectory has come to.
#[derive(Clone, Copy, Debug)]
pub(super) struct Standing {
    /// Of the best picture, which may pass.
    pub(super) score: f64,
    pub(super) passes: bool,
    pub(super) turns: usize,
    pub(super) idle: usize,
    pub(super) broken: f64,
}

/// What came of a trajectory from one of its rounds on.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Course {
    /// How much better the best picture became, and whether it passes.
    pub(super) improvement: f64,
    pub(super) success: f64,
    /// The share of the turns that changed nothing.
    pub(super) idle: f64,
    /// By how much the turns made the picture that they edited worse.
    pub(super) broken: f64,
    pub(super) turns: f64,
}

impl Standing {
    /// What came since `entered`.
    pub(super) fn since(&self, entered: &Self) -> Course {
        let turns = self.turns - entered.turns;
        Course {
            improvement: self.score - entered.score,
            success: f64::from(u8::from(self.passes)),
            idle: (self.idle - entered.idle) as f64 / turns.max(1) as f64,
            broken: self.broken - entered.broken,
            turns: turns as f64,
        }
    }
}

/// A trajectory that goes on.
pub(super) struct State<'a> {
    problem: &'a Problem,
    best: Picture,
    verdicts: Vec<Verdict>,
    /// Edits of the best picture that did not help.
    failed: Vec<String>,
    pub(super) standing: Standing,
}

/// Whether every claim holds, and the score: the better picture has more of the first, then of the second.
fn rank(verdicts: &[Verdict]) -> (bool, f64) {
    (verdicts.iter().all(|v| v.yes), score(verdicts).unwrap_or(1.0))
}

impl<'a> State<'a> {
    pub(super) fn new(problem: &'a Problem) -> Self {
        let (best, verdicts) = (problem.picture.clone(), problem.verdicts.clone());
        let (passes, score) = rank(&verdicts);
        let standing = Standing { score, passes, turns: 0, idle: 0, broken: 0.0 };
        Self { problem, best, verdicts, failed: Vec::new(), standing }
    }

    /// Takes in what an edit made, and the verdicts on it.
    fn advance(&mut self, instruction: &str, picture: &Picture, after: Vec<Verdict>) -> Result<()> {
        let standing = &mut self.standing;
        // A small thing that was put right moves few pixels. (By the score itself any noise could be a gain.)
        let held = |verdicts: &[Verdict]| verdicts.iter().filter(|v| v.yes).count();
        let idle = held(&after) <= held(&self.verdicts) && still(self.best.pixels()?, picture.pixels()?);
        standing.idle += usize::from(idle);
        let (passes, score) = rank(&after);
        standing.broken += (standing.score - score).max(0.0);
        if (passes, score) > (standing.passes, standing.score) {
            (standing.passes, standing.score) = (passes, score);
            (self.best, self.verdicts) = (picture.clone(), after);
            self.failed.clear();
        } else {
            self.failed.push(instruction.to_owned());
        }
        Ok(())
    }
}

impl Joint {
    /// Plays round `round` of the trajectories `rows`, and moves them on.
    pub(super) fn play(&self, states: &mut [State], rows: Vec<usize>, round: usize, batch: &Batch) -> Result<Played> {
        let group = &self.config.group;
        let groups: Vec<u64> = rows.iter().map(|r| (r / group.size) as u64).collect();
        let entered = rows.iter().map(|r| states[*r].standing).collect();
        let writing = self.ask(states, &rows, round, batch)?;
        let (carried, pictures) = self.paint(states, &rows, &writing, round, batch)?;
        let targets = rows.iter().map(|r| &states[*r].problem.target);
        let asked: Vec<(&Picture, &Target)> = pictures.iter().zip(targets).collect();
        let after = rollout::check(&self.poser.critic, &asked);
        let mut rewards = self.rewards(states, &rows, &pictures, &after)?;
        rollout::withhold(&mut rewards, after.iter().map(|after| rollout::known(after)));
        rewards.extend(writing.rewards(group));
        rollout::rank_last(&mut rewards, &groups, writing.read());
        let judged = judge(group, &rewards, &groups)?;
        for (((r, written), picture), after) in rows.iter().zip(&writing.written).zip(&pictures).zip(after) {
            states[*r].standing.turns += 1;
            // What cannot be read changes nothing; nothing follows from what is not known.
            states[*r].standing.idle += usize::from(written.edit.is_none());
            if let Some(edit) = written.edit.as_ref().filter(|_| rollout::known(&after)) {
                states[*r].advance(edit, picture, after)?;
            }
        }
        Ok(Played { rows, groups, entered, writing, carried, judged })
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
            prompts::reflect(problem.target.words(), verdicts, &failed.iter().map(String::as_str).collect::<Vec<_>>())
        };
        let asked = source_of.into_iter().zip(rows.iter().map(question)).collect();
        let stream = |r: &usize| Stream::new(*seed, &format!("joint edits {round}"), first + *r as u64);
        let streams: Vec<Stream> = rows.iter().map(stream).collect();
        Writing::draw(&self.actor, (sources, asked), 1.0, &streams)
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
        let instructions = writing.written.iter().map(|w| w.instruction().to_owned()).collect();
        let klein = &*self.poser.klein;
        let (h, w) = klein.tokens(self.poser.size.0, self.poser.size.1)?;
        let sources = rows.iter().map(latents).map(|source| source.map(Some)).collect::<Result<_>>()?;
        let edits = Edits { instructions, sources, size: (h, w) };
        let noise = |r: &usize| {
            let own = if editor.shared_noise { 0 } else { (*r % group.size) as u64 };
            pack(&klein.noise(states[*r].problem.seed.wrapping_add(own), round as u64, (h, w))?)
        };
        let noise = Tensor::stack(&rows.iter().map(noise).collect::<candle_core::Result<Vec<_>>>()?, 0)?;
        let window = window_of(editor, *seed, batch.step * joint.rounds as u64 + round as u64)?;
        // The trajectories' own, whichever others are left.
        let numbers: Vec<u64> = rows.iter().map(|r| first + *r as u64).collect();
        let fresh = (*seed, &*format!("joint {round}"), numbers.as_slice());
        let carried = carry_out(editor, (klein, &self.editor.still), edits, &noise, window, fresh)?;
        let picture =
            |i: usize| Ok(Picture::from_latents(unpack(&carried.states.get(i)?, h, w)?, self.poser.decode.clone()));
        let pictures: Vec<Picture> = (0..rows.len()).map(picture).collect::<Result<_>>()?;
        Picture::develop(&pictures.iter().collect::<Vec<_>>())?;
        Ok((carried, pictures))
    }

    /// What each row's picture is worth, by the names of the rewards.
    fn rewards(
        &self,
        states: &[State],
        rows: &[usize],
        pictures: &[Picture],
        after: &[Vec<Verdict>],
    ) -> Result<Vec<Reward>> {
        let group = &self.config.group;
        let before: Vec<&[Verdict]> = rows.iter().map(|r| states[*r].verdicts.as_slice()).collect();
        let mut rewards = rollout::by_verdicts(group, &before, after);
        if group.asks("preserve") {
            let kept = |(picture, r): (&Picture, &usize)| Ok(preserved(states[*r].best.pixels()?, picture.pixels()?));
            rewards.push(("preserve".to_owned(), pictures.iter().zip(rows).map(kept).collect::<Result<_>>()?));
        }
        let problems = rows.iter().map(|r| states[*r].problem);
        let judged: Vec<(&Picture, &Target, &SceneGraph)> =
            pictures.iter().zip(problems).map(|(picture, p)| (picture, &p.target, &p.graph)).collect();
        rewards.extend(self.judges.rewards(group, &judged)?);
        Ok(rewards)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rig::roles::Claim;
    use image::{Rgb, RgbImage};

    #[test]
    fn a_turn_is_idle_if_the_picture_stays_and_no_more_of_it_is_right() -> Result<()> {
        let picture = |spot: u8| {
            let pixel = |x, y| Rgb([if (x, y) == (0, 0) { spot } else { 100 }; 3]);
            Picture::from_pixels(RgbImage::from_fn(16, 16, pixel))
        };
        let verdicts = |p: [f64; 2]| {
            let of = |p_yes: f64| Verdict {
                claim: Claim::Object("ball".into()),
                yes: p_yes >= 0.5,
                p_yes,
                reflection: String::new(),
            };
            p.map(of).to_vec()
        };
        let target = Target::words_alone("");
        let problem = Problem {
            target,
            graph: SceneGraph::default(),
            picture: picture(100),
            verdicts: verdicts([0.9, 0.2]),
            seed: 0,
            rendered: true,
        };
        let mut state = State::new(&problem);
        let start = state.standing;
        // A little more certain of the same: the best picture now, but not for anything that was done to it.
        state.advance("nothing", &picture(101), verdicts([0.9, 0.3]))?;
        let course = state.standing.since(&start);
        let gain = (0.9f64 * 0.3).sqrt() - (0.9f64 * 0.2).sqrt();
        assert!(course.idle == 1.0 && (course.improvement - gain).abs() < 1e-9, "{course:?}");
        // A single pixel puts it right.
        let middle = state.standing;
        state.advance("mend it", &picture(200), verdicts([0.9, 0.8]))?;
        state.standing.turns = 2;
        let course = state.standing.since(&middle);
        assert_eq!((course.idle, course.success, course.broken, course.turns), (0.0, 1.0, 0.0, 2.0));
        // What an edit breaks is counted, though the best picture stays as it was.
        let mended = state.standing;
        state.advance("break it", &picture(0), verdicts([0.4, 0.8]))?;
        let course = state.standing.since(&mended);
        let loss = (0.9f64 * 0.8).sqrt() - (0.4f64 * 0.8).sqrt();
        assert!((course.broken - loss).abs() < 1e-9 && course.improvement == 0.0, "{course:?}");
        assert_eq!((course.success, state.failed.as_slice()), (1.0, ["break it".to_owned()].as_slice()));
        Ok(())
    }
}
