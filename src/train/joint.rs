//! Reflection-GRPO, both at once: Actor and Editor learn from whole trajectories of the loop.
//!
//! For each prompt and a picture that misses it, a group of trajectories begins. In every round the Actor writes an edit of
//! the best picture so far, at temperature 1; the Editor carries it out by stochastic steps; the Checker answers the prompt's
//! claims. A trajectory ends when all of them hold, or when the rounds are spent.
//!
//! A turn is worth what it changed: the rewards of `[group]`, compared among the turns of this round in the group. A trajectory
//! is worth what came of it: how much better its best picture is than its first, whether it passes, how many of its turns left
//! the picture as it was, which is what stopping too early is where only the Checker stops, and how much they broke. Both
//! advantages are fused,
//!
//! ```text
//! A = turn * A_turn + whole * A_trajectory
//! ```
//!
//! and given to all tokens of the turn's edit and to all stochastic steps of its picture (as MT-EditFlow broadcasts them). One
//! update moves both adapters. How the Actor's answers are weighed is written in `[actor]`, as are the steps of drawings and of
//! an evaluation, and the Editor's steps in `[editor]`; each is what it is in its own stage.

use super::{
    Batch, Group, Metrics, Objective, Step, Work,
    actor::{self, well_formed},
    editor::{self, LossKind},
    flow_steps::{Carried, Edits, Learned, carry_out, window_of},
    grpo::{ADVANTAGE_BOUND, Advantages, TokenBatch, token_loss},
    grpo_config::GrpoConfig,
    means::Means,
    optim,
    pixels::{preserved, still, tiled},
    pose::{Poser, Problem, RENDERED_SHARE, TOGETHER, rendered_share},
    replay::{Asked, Replay, drawn, replay, write},
    rollout::{self, Judges, Kept, Reward, check_ratio, judge},
    run::TOKENS,
    trained::Trained,
};
use crate::{
    flow::field::{pack, unpack},
    models::built_in,
    rig::{
        cycle::{self, Cast},
        prompts,
        roles::{Picture, Target, Verdict, score},
        vlm_roles::EDIT,
    },
    scene::{
        graph::SceneGraph,
        tabletop::{split::Split, tasks},
    },
    tensor::rng::Stream,
    usage,
    vlm::{Vlm, decode::Answer},
};
use anyhow::{Context, Result};
use candle_core::{DType, Device, Tensor, Var};
use image::RgbImage;
use rayon::prelude::*;
use serde::{Deserialize, Serialize};
use std::{collections::BTreeMap, fs, path::Path, sync::Arc};

/// The section `[joint]`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct JointConfig {
    /// Rounds at most, the drawing included.
    pub rounds: usize,
    /// Weights of a turn's own advantage and of its trajectory's.
    pub turn: f64,
    pub whole: f64,
    /// Weights of what a trajectory is worth: how much better its best picture is than its first, whether it passes, the share
    /// of its turns that changed nothing, and by how much its turns made the picture they edited worse, which the best picture
    /// does not show.
    pub improvement: f64,
    pub success: f64,
    pub idle: f64,
    pub broken: f64,
    /// Weights of the two losses.
    pub actor: f64,
    pub editor: f64,
    /// Factor on the learning rate of the Actor's adapter.
    pub actor_lr: f64,
    /// Held-out prompts of an evaluation.
    pub evaluation: usize,
}

impl Default for JointConfig {
    fn default() -> Self {
        Self {
            rounds: 3,
            turn: 0.5,
            whole: 0.5,
            improvement: 1.0,
            success: 1.0,
            idle: -0.25,
            broken: -0.25,
            actor: 1.0,
            editor: 1.0,
            actor_lr: 0.3,
            evaluation: 64,
        }
    }
}

/// Prompts on a sample sheet.
const SHOWN: usize = 16;
/// The seed of held-out prompts.
const HELD_OUT: u64 = 1;

/// The edits that the Actor wrote in a round, by row.
struct Writing {
    /// The pictures that the edits are about, and for each row which of them it is.
    sources: Vec<Picture>,
    source_of: Vec<usize>,
    questions: Vec<String>,
    answers: Vec<Answer>,
    /// `None` where an answer cannot be read.
    instructions: Vec<Option<String>>,
    /// Of questions and answers.
    tokens: usize,
}

impl Writing {
    fn replay(&self, vlm: &Vlm) -> Result<Replay> {
        let pictures: Vec<&RgbImage> = self.sources.iter().map(Picture::pixels).collect::<Result<_>>()?;
        let rows = self.source_of.iter().zip(&self.questions).zip(&self.answers);
        let asked: Vec<Asked> =
            rows.map(|((picture, question), answer)| Asked { picture: *picture, question, answer }).collect();
        replay(vlm, &pictures, &asked)
    }

    /// The mean over the rows.
    fn mean(&self, of_length: impl Fn(usize) -> f64) -> f64 {
        self.answers.iter().map(|a| of_length(a.ids.len())).sum::<f64>() / self.answers.len() as f64
    }
}

/// One round of all trajectories that had not ended before.
struct Turn {
    writing: Writing,
    carried: Carried,
    /// For each row, and what of it counts.
    advantages: Tensor,
    counts: Tensor,
    /// Tokens that count.
    seen: f64,
    /// As in the Actor's stage.
    old: Option<Tensor>,
    reference: Option<Tensor>,
}

impl Turn {
    fn rows(&self) -> usize {
        self.writing.answers.len()
    }
}

/// Where a trajectory stands.
struct State<'a> {
    problem: &'a Problem,
    best: Picture,
    verdicts: Vec<Verdict>,
    /// Edits of the best picture that did not help.
    failed: Vec<String>,
    turns: usize,
    idle: usize,
    broken: f64,
}

impl State<'_> {
    fn passes(&self) -> bool {
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

pub struct Joint {
    config: GrpoConfig,
    poser: Poser,
    judges: Judges,
    actor: Arc<Vlm>,
    editor: Learned,
    /// Of the Actor and of the Editor.
    trained: [Trained; 2],
    frozen: usize,
    kept: Kept<Vec<Turn>>,
}

impl Joint {
    pub fn new(config: &GrpoConfig, device: &Device) -> Result<Self> {
        let GrpoConfig { actor, editor, joint, group, models, seed, .. } = config;
        group.check(&["format", "brevity", "preserve"])?;
        editor.check(*seed)?;
        if editor.loss == LossKind::DiffusionNft {
            usage!("[editor] loss is grpo or grpo-guard here: diffusion-nft has an old policy of its own");
        }
        if actor.pool != 0 {
            usage!("[actor] pool is for the Actor's own stage: a trajectory's later pictures are new ones");
        }
        if joint.rounds < 2 {
            usage!("joint.rounds is at least 2: the drawing and an edit");
        }
        let at = (models.dtype.dtype(), device);
        let (critic, policy, of_actor) = rollout::actor(models, at, config.learned(built_in::ACTOR, actor::TARGETS)?)?;
        let adapter = || config.learned(built_in::EDITOR, editor::TARGETS);
        let (klein, mut flows) = rollout::editors(&models.pipeline()?, at, adapter, 1)?;
        let (learned, of_editor) = flows.pop().context("an Editor to be trained")?;
        let (objects, size) = ([actor.min_objects, actor.max_objects], models.size(&klein));
        Ok(Self {
            config: config.clone(),
            poser: Poser::new(
                (klein, None),
                critic,
                actor.source,
                objects,
                (actor.evaluation_steps, actor.guidance),
                size,
            )?,
            judges: Judges::open(config, device)?,
            actor: Arc::new(policy),
            editor: learned,
            trained: [of_actor, of_editor],
            frozen: models.bytes()?,
            kept: Kept::default(),
        })
    }

    /// Plays round `round` of the trajectories `rows`, and moves them on. The turn has no advantages yet.
    fn play(&self, states: &mut [State], rows: &[usize], round: usize, batch: &Batch) -> Result<(Turn, Vec<Reward>)> {
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

    /// The advantages of whole trajectories, and what to log of them.
    fn whole(&self, states: &[State]) -> Result<(Advantages, Metrics)> {
        let GrpoConfig { joint, group, .. } = &self.config;
        let better = |s: &State| score(&s.verdicts).unwrap_or(1.0) - score(&s.problem.verdicts).unwrap_or(1.0);
        let success = |s: &State| f64::from(u8::from(s.passes()));
        let idle = |s: &State| s.idle as f64 / s.turns.max(1) as f64;
        let worth = |s: &State| {
            let came = joint.improvement * better(s) + joint.success * success(s);
            came + joint.idle * idle(s) + joint.broken * s.broken
        };
        let worths: Vec<f64> = states.iter().map(worth).collect();
        let found = group.advantages(&worths, &group.numbers(states.len()))?;
        let mean = |of: &dyn Fn(&State) -> f64| states.iter().map(of).sum::<f64>() / states.len().max(1) as f64;
        let metrics = [
            ("trajectory/reward", found.reward),
            ("trajectory/reward_std", found.reward_std),
            ("trajectory/frac_reward_zero_std", found.frac_reward_zero_std()),
            ("trajectory/improvement", mean(&better)),
            ("trajectory/success", mean(&success)),
            ("trajectory/idle", mean(&idle)),
            ("trajectory/broken", mean(&|s| s.broken)),
            ("trajectory/turns", mean(&|s| s.turns as f64)),
        ];
        Ok((found, metrics.map(|(name, value)| (name.to_owned(), value)).into()))
    }

    /// The Actor's loss on a turn, with the turn's share of the tokens of the update, which may be the first of the step.
    fn actor_loss(&self, turn: &Turn, active: f64, first: bool) -> Result<Step> {
        let replayed = turn.writing.replay(&self.actor)?;
        let answers: Vec<&Answer> = turn.writing.answers.iter().collect();
        let (drawn, mask) = drawn(&answers, replayed.log_probs.device())?;
        let old = turn.old.clone().unwrap_or_else(|| replayed.log_probs.detach());
        let off = check_ratio(&old, &drawn, &mask, rollout::token_ratio(&self.actor))?;
        if first && turn.old.is_some() {
            check_ratio(&replayed.log_probs, &old, &mask, rollout::TOKEN_RATIO)?;
        }
        let tokens = TokenBatch {
            log_probs: &replayed.log_probs,
            old: &old,
            reference: turn.reference.as_ref(),
            mask: &mask.broadcast_mul(&turn.counts.unsqueeze(1)?)?,
            advantages: &turn.advantages,
            active: Some(active),
        };
        let loss = token_loss(&self.config.actor.token_loss(), &tokens)?;
        let metrics = [
            ("entropy", replayed.entropy),
            ("actor/kl", loss.kl),
            ("actor/clip_ratio/low_mean", loss.clip_low),
            ("actor/clip_ratio/high_mean", loss.clip_high),
            ("actor/ratio_off", off),
        ];
        Ok(Step { loss: loss.loss, metrics: metrics.map(|(name, value)| (name.to_owned(), value)).into() })
    }

    /// Runs the loop over the first held-out prompts.
    fn held_out(&self, count: usize) -> Result<Vec<(SceneGraph, String, cycle::Outcome)>> {
        let GrpoConfig { actor, joint, .. } = &self.config;
        let samples: Vec<_> = (0..count as u64)
            .map(|i| tasks::text_to_image(HELD_OUT, Split::Val, i, actor.min_objects, actor.max_objects))
            .collect();
        let job = |(i, sample): (u64, &tasks::TextToImage)| cycle::Job {
            target: Target::new(sample.prompt.clone(), &sample.graph).and_nothing_else(),
            seed: i,
        };
        let jobs: Vec<cycle::Job> = (0..).zip(&samples).map(job).collect();
        let painter = self.poser.painter(actor.evaluation_steps).with_editor(Some(self.editor.still.clone()));
        let critic = self.poser.critic.clone().with_actor(Some(self.actor.clone()));
        let cast = Cast { diffuser: &painter, checker: &critic, actor: &critic, editor: &painter };
        // What is trained are edits, so they come first, and one after the other.
        let options = cycle::Options {
            rounds: joint.rounds,
            draws: 1,
            redraw: false,
            width: TOGETHER,
            ..cycle::Options::default()
        };
        let outcomes = cycle::run(cast, &jobs, &options, &|| false, &mut |_| Ok(()))?;
        let whole = samples.into_iter().zip(outcomes);
        whole.map(|(s, outcome)| Ok((s.graph, s.prompt, outcome.context("a prompt without an outcome")?))).collect()
    }
}

impl Objective for Joint {
    fn vars(&self) -> BTreeMap<String, Var> {
        let of = |role: &'static str, trained: &Trained| {
            trained.vars().into_iter().map(move |(name, var)| (format!("{role}.{name}"), var))
        };
        of(built_in::ACTOR, &self.trained[0]).chain(of(built_in::EDITOR, &self.trained[1])).collect()
    }

    fn group(&self, name: &str, shape: &[usize]) -> Group {
        let group = optim::default_group(name, shape);
        if name.starts_with(built_in::ACTOR) { Group { lr: self.config.joint.actor_lr, ..group } } else { group }
    }

    fn frozen(&self) -> usize {
        self.frozen
    }

    /// The Actor's loss and each of the Editor's steps, turn by turn.
    fn work(&self) -> Work {
        let GrpoConfig { group, joint, .. } = &self.config;
        let pieces = (joint.rounds - 1) * (1 + self.config.pieces().count());
        Work { epochs: group.epochs, minibatches: group.minibatches, pieces }
    }

    fn collect(&self, batch: &Batch) -> Result<Metrics> {
        let GrpoConfig { group, joint, actor, seed, .. } = &self.config;
        let indices: Vec<u64> = batch.indices().collect();
        let problems = self.poser.problems(Split::Train, *seed, &indices)?;
        let mut states: Vec<State> = problems
            .iter()
            .flat_map(|p| std::iter::repeat_n(p, group.size))
            .map(|problem| State {
                best: problem.picture.clone(),
                verdicts: problem.verdicts.clone(),
                problem,
                failed: Vec::new(),
                turns: 0,
                idle: 0,
                broken: 0.0,
            })
            .collect();
        let (mut turns, mut worth, mut means) = (Vec::new(), Vec::new(), Means::default());
        for round in 1..joint.rounds {
            let rows: Vec<usize> = (0..states.len()).filter(|r| round == 1 || !states[*r].passes()).collect();
            if rows.is_empty() {
                break;
            }
            let (turn, rewards) = self.play(&mut states, &rows, round, batch)?;
            let groups: Vec<u64> = rows.iter().map(|r| (r / group.size) as u64).collect();
            let judged = judge(group, &rewards, &groups)?;
            judged.metrics.into_iter().for_each(|metric| means.add(metric, rows.len() as f64));
            let clipped = turn.writing.mean(|length| f64::from(u8::from(length >= EDIT)));
            means.add(
                ("completions/mean_length".to_owned(), turn.writing.mean(|length| length as f64)),
                rows.len() as f64,
            );
            means.add(("completions/clipped_ratio".to_owned(), clipped), rows.len() as f64);
            worth.push((rows, judged.advantages, judged.counts));
            turns.push(turn);
        }
        let (whole, more) = self.whole(&states)?;
        for (turn, (rows, of_turn, counts)) in turns.iter_mut().zip(worth) {
            let bound = ADVANTAGE_BOUND as f32;
            let known = |(counts, r): (&f32, &usize)| if whole.missing[*r] { 0.0 } else { *counts };
            let counts: Vec<f32> = counts.iter().zip(&rows).map(known).collect();
            let fuse = |((of_turn, counts), r): ((&f32, &f32), &usize)| {
                let fused = joint.turn as f32 * of_turn + joint.whole as f32 * whole.values[*r];
                counts * fused.clamp(-bound, bound)
            };
            let fused: Vec<f32> = of_turn.iter().zip(&counts).zip(&rows).map(fuse).collect();
            turn.seen = actor::seen(turn.writing.answers.iter(), &counts);
            let device = self.poser.klein.device();
            (turn.advantages, turn.counts) = (Tensor::new(fused, device)?, Tensor::new(counts, device)?);
            if group.updates() > 1 {
                let models = (&*self.poser.klein, &*self.editor.still);
                turn.carried.reread(models, self.config.pieces(), self.config.editor.guidance)?;
                turn.old = Some(turn.writing.replay(&self.actor)?.log_probs.detach());
            }
            if actor.kl != 0.0 {
                turn.reference = Some(turn.writing.replay(&self.poser.critic.checker)?.log_probs.detach());
            }
        }
        let mut metrics = means.metrics();
        metrics.extend(more);
        let tokens = turns.iter().map(|turn| turn.writing.tokens).sum::<usize>() as f64;
        metrics.push((RENDERED_SHARE.to_owned(), rendered_share(problems.iter())));
        metrics.push((TOKENS.to_owned(), tokens / batch.rows.len().max(1) as f64));
        self.kept.keep(batch, turns);
        Ok(metrics)
    }

    fn accept(&self, collected: &Metrics) -> Result<()> {
        rollout::accept(&self.config.group, collected)
    }

    fn loss(&self, batch: &Batch) -> Result<Step> {
        let GrpoConfig { joint, editor, .. } = &self.config;
        let turns = self.kept.of(batch)?;
        let pieces = self.config.pieces();
        let (number, part) = (batch.piece / (1 + pieces.count()), batch.piece % (1 + pieces.count()));
        let Some(turn) = turns.get(number) else {
            let loss = Tensor::zeros((), DType::F32, self.poser.klein.device())?;
            return Ok(Step { loss, metrics: Metrics::new() });
        };
        // Every row of every turn of the update weighs the same.
        let together = self.kept.together(batch);
        let all = || together.iter().flat_map(|turns| turns.iter());
        let share = turn.rows() as f64 / all().map(Turn::rows).sum::<usize>().max(1) as f64;
        let first = batch.update == 0;
        let (Step { loss, metrics }, weight) = match part {
            0 => (self.actor_loss(turn, share * all().map(|turn| turn.seen).sum::<f64>(), first)?, joint.actor),
            _ => {
                let models = (&*self.poser.klein, &self.editor);
                let step =
                    turn.carried.loss(editor, models, (pieces, part - 1), (&turn.advantages, &turn.counts), first)?;
                let named = step.metrics.into_iter().map(|(name, value)| (format!("editor/{name}"), value));
                (Step { loss: step.loss, metrics: named.collect() }, joint.editor)
            }
        };
        // Of the update; the mean over the batch's rows is asked for.
        let share = share * batch.together.len() as f64 / batch.rows.len().max(1) as f64;
        Ok(Step { loss: (loss * (weight * share))?, metrics })
    }

    fn evaluate(&mut self, _: u64) -> Result<Metrics> {
        let played = self.held_out(self.config.joint.evaluation)?;
        let pictures = played.par_iter().map(|(graph, _, o)| (&o.turns[0].picture, &o.best().picture, graph));
        let mut metrics = rollout::before_and_after(pictures)?;
        let n = played.len().max(1) as f64;
        let mean = |values: &mut dyn Iterator<Item = f64>| values.sum::<f64>() / n;
        let named = [
            ("eval/checker_before", rollout::mean_score(played.iter().map(|(.., o)| o.turns[0].verdicts.as_slice()))),
            ("eval/checker", rollout::mean_score(played.iter().map(|(.., o)| o.best().verdicts.as_slice()))),
            ("eval/turns", mean(&mut played.iter().map(|(.., o)| o.turns.len() as f64))),
        ];
        metrics.extend(named.map(|(name, value)| (name.to_owned(), value)));
        Ok(metrics)
    }

    /// The first and the best picture of each prompt, side by side, with the edits in words.
    fn samples(&mut self, _: u64, folder: &Path) -> Result<()> {
        let (mut pictures, mut words) = (Vec::new(), String::new());
        for (_, prompt, outcome) in self.held_out(SHOWN.min(self.config.joint.evaluation))? {
            pictures.extend([outcome.turns[0].picture.pixels()?.clone(), outcome.best().picture.pixels()?.clone()]);
            words += &prompt;
            for turn in &outcome.turns {
                if let cycle::Action::Edit { instruction, .. } = &turn.action {
                    words += &format!(" | {instruction}");
                }
            }
            words.push('\n');
        }
        tiled(&pictures, 8).save(folder.join("loops.png"))?;
        Ok(fs::write(folder.join("loops.txt"), words)?)
    }

    /// Both, each in a folder of its role.
    fn save(&self, folder: &Path, dtype: DType) -> Result<()> {
        for (role, trained) in [built_in::ACTOR, built_in::EDITOR].into_iter().zip(&self.trained) {
            let folder = folder.join(role);
            fs::create_dir(&folder).with_context(|| format!("cannot create {}", folder.display()))?;
            trained.save(&folder, dtype)?;
        }
        Ok(())
    }
}
