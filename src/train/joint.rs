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

mod round;

use self::round::{State, Turn};
use super::{
    Batch, Group, Metrics, Objective, Step, Work, actor,
    editor::{self, LossKind},
    flow_steps::Learned,
    grpo::{ADVANTAGE_BOUND, Advantages, TokenBatch, token_loss},
    grpo_config::GrpoConfig,
    means::Means,
    optim,
    pixels::tiled,
    pose::{Poser, RENDERED_SHARE, TOGETHER, rendered_share},
    replay::drawn,
    rollout::{self, Judges, Kept, check_ratio, judge},
    run::TOKENS,
    trained::Trained,
};
use crate::{
    models::built_in,
    rig::{
        cycle::{self, Cast},
        roles::{Target, score},
        vlm_roles::EDIT,
    },
    scene::{
        graph::SceneGraph,
        tabletop::{split::Split, tasks},
    },
    usage,
    vlm::{Vlm, decode::Answer},
};
use anyhow::{Context, Result};
use candle_core::{DType, Device, Tensor, Var};
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
        Ok(Self {
            config: config.clone(),
            poser: Poser::new((klein, None), critic, actor.posing(), models)?,
            judges: Judges::open(config, device)?,
            actor: Arc::new(policy),
            editor: learned,
            trained: [of_actor, of_editor],
            frozen: models.bytes()?,
            kept: Kept::default(),
        })
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
        let mut states: Vec<State> =
            problems.iter().flat_map(|p| std::iter::repeat_n(p, group.size)).map(State::new).collect();
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
