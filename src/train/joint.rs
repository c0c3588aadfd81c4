//! Reflection-GRPO, both at once: Actor and Editor learn from whole trajectories of the loop.
//!
//! For each prompt and a picture that misses it, a group of trajectories begins. In every round the Actor writes an
//! edit of the best picture so far, at temperature 1; the Editor carries it out by stochastic steps; the Checker answers
//! the prompt's claims. A trajectory ends when all of them hold, or when the rounds are spent.
//!
//! A turn is worth what it changed: the rewards of `[group]`, compared among the turns of this round in the group. It is
//! also worth what came of its trajectory from then on (the reward to go): how much better the best picture became,
//! whether it passes in the end, how many turns left the picture as it was, which is what stopping too early is where
//! only the Checker stops, and how much they broke. This is compared among those of the group that were in the round
//! too: a trajectory that had passed before says nothing about it. Both advantages are fused,
//!
//! ```text
//! A = turn * A_turn + whole * A_trajectory
//! ```
//!
//! and given to all tokens of the turn's edit and to all stochastic steps of its picture (as MT-EditFlow broadcasts
//! them). One update moves both adapters. How the Actor's answers are weighed is written in `[actor]`, as are the steps
//! of drawings and of an evaluation, and the Editor's steps in `[editor]`; each is what it is in its own stage.

mod round;

use self::round::{Course, Played, Standing, State, Turn};
use super::{
    Batch, Group, Metrics, Objective, Step, Work, actor,
    editor::{self, LossKind},
    flow_steps::Learned,
    grpo::{ADVANTAGE_BOUND, Advantages},
    grpo_config::{GroupConfig, GrpoConfig},
    means::Means,
    optim,
    pixels::write_sheet,
    pose::{Poser, Posing, RENDERED_SHARE, TOGETHER, rendered_share},
    replay::Rollouts,
    rollout::{self, Judged, Judges, Kept},
    run::TOKENS,
    trained::Trained,
};
use crate::{
    models::built_in,
    rig::{
        cycle::{self, Cast},
        klein::Adapted,
    },
    scene::{
        graph::SceneGraph,
        tabletop::{split::Split, tasks},
    },
    usage,
    vlm::Vlm,
};
use anyhow::{Context, Result};
use candle_core::{DType, Device, Tensor, Var};
use rayon::prelude::*;
use serde::{Deserialize, Serialize};
use std::{collections::BTreeMap, fs, path::Path, sync::Arc, time::Instant};

/// The section `[joint]`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct JointConfig {
    /// Rounds at most, the drawing included.
    pub rounds: usize,
    /// Weights of a turn's own advantage and of its trajectory's.
    pub turn: f64,
    pub whole: f64,
    /// Weights of what a trajectory is worth from one of its turns on: how much better its best picture became, whether
    /// it passes, the share of the turns that changed nothing, and by how much they made the picture they edited worse,
    /// which the best picture does not show.
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

impl JointConfig {
    /// What a trajectory that took this course is worth.
    fn worth(&self, course: &Course) -> f64 {
        let Course { improvement, success, idle, broken, .. } = course;
        self.improvement * improvement + self.success * success + self.idle * idle + self.broken * broken
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
        actor.check()?;
        editor.check(*seed)?;
        if editor.loss == LossKind::DiffusionNft {
            usage!("[editor] loss is grpo or grpo-guard here: diffusion-nft has an old policy of its own");
        }
        if actor.pool != 0 || actor.tries != 1 {
            usage!("[actor] pool and tries are for the Actor's own stage: a trajectory's later pictures are new ones");
        }
        let JointConfig {
            turn,
            whole,
            improvement,
            success,
            idle,
            broken,
            actor: by_actor,
            editor: by_editor,
            actor_lr,
            ..
        } = joint;
        let weights = [turn, whole, improvement, success, idle, broken, by_actor, by_editor, actor_lr];
        if !weights.into_iter().all(|weight| weight.is_finite()) || *actor_lr < 0.0 {
            usage!("the weights of [joint] are numbers, and actor_lr is 0 or more");
        }
        if joint.rounds < 2 {
            usage!("joint.rounds is at least 2: the drawing and an edit");
        }
        let at = (models.dtype.dtype(), device);
        let (critic, policy, of_actor) = rollout::actor(models, at, config.learned(built_in::ACTOR, actor::TARGETS)?)?;
        let adapter = || config.learned(built_in::EDITOR, editor::TARGETS);
        let diffuser = models.frozen(built_in::DIFFUSER)?;
        let (klein, mut flows, diffuser) = rollout::editors(&models.pipeline()?, at, adapter, 1, diffuser)?;
        let (learned, of_editor) = flows.pop().context("an Editor to be trained")?;
        let adapted = Adapted { diffuser, editor: Some(learned.still.clone()) };
        // Edits are the Editor's affair, also those of an evaluation.
        let posing = Posing { edit_guidance: editor.edit_guidance(), ..actor.posing() };
        Ok(Self {
            config: config.clone(),
            poser: Poser::new((klein, adapted), critic, posing, models)?,
            judges: Judges::open(config, device)?,
            actor: Arc::new(policy),
            editor: learned,
            trained: [of_actor, of_editor],
            frozen: models.bytes()?,
            kept: Kept::default(),
        })
    }

    /// Runs the loop over the first held-out prompts.
    fn held_out(&self, count: usize) -> Result<Vec<(SceneGraph, String, cycle::Outcome)>> {
        let GrpoConfig { actor, joint, .. } = &self.config;
        let samples: Vec<_> = (0..count as u64)
            .map(|i| tasks::text_to_image(HELD_OUT, Split::Val, i, actor.min_objects, actor.max_objects))
            .collect();
        let job = |(i, sample): (u64, &tasks::TextToImage)| cycle::Job {
            target: self.poser.target(sample.prompt.clone(), &sample.graph),
            seed: i,
        };
        let jobs: Vec<cycle::Job> = (0..).zip(&samples).map(job).collect();
        let painter = self.poser.painter(actor.evaluation_steps);
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

/// The advantages, in `groups`, of what came of trajectories since each was in a round.
fn to_go(joint: &JointConfig, group: &GroupConfig, groups: &[u64], courses: &[Course]) -> Result<Advantages> {
    let worths: Vec<f64> = courses.iter().map(|course| joint.worth(course)).collect();
    group.advantages(&worths, groups)
}

/// Both advantages of each turn as one, and what of it counts: nothing where either is not known.
fn fused(joint: &JointConfig, turn: &Judged, to_go: &Advantages) -> (Vec<f32>, Vec<f32>) {
    let known = |(counts, missing): (&f32, &bool)| if *missing { 0.0 } else { *counts };
    let counts: Vec<f32> = turn.counts.iter().zip(&to_go.missing).map(known).collect();
    let bound = ADVANTAGE_BOUND as f32;
    let fuse = |((turn, to_go), counts): ((&f32, &f32), &f32)| {
        counts * (joint.turn as f32 * turn + joint.whole as f32 * to_go).clamp(-bound, bound)
    };
    let advantages = turn.advantages.iter().zip(&to_go.values).zip(&counts).map(fuse).collect();
    (advantages, counts)
}

/// What to log of whole trajectories.
fn trajectories(courses: &[Course], whole: &Advantages) -> Metrics {
    let mean = |of: &dyn Fn(&Course) -> f64| courses.iter().map(of).sum::<f64>() / courses.len().max(1) as f64;
    let metrics = [
        ("trajectory/reward", whole.reward),
        ("trajectory/reward_std", whole.reward_std),
        ("trajectory/frac_reward_zero_std", whole.frac_reward_zero_std()),
        ("trajectory/improvement", mean(&|c| c.improvement)),
        ("trajectory/success", mean(&|c| c.success)),
        ("trajectory/idle", mean(&|c| c.idle)),
        ("trajectory/broken", mean(&|c| c.broken)),
        ("trajectory/turns", mean(&|c| c.turns)),
    ];
    metrics.map(|(name, value)| (name.to_owned(), value)).into()
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
        let start = Instant::now();
        let GrpoConfig { group, joint, actor, seed, .. } = &self.config;
        let indices: Vec<u64> = batch.indices().collect();
        let problems = self.poser.problems(Split::Train, *seed, &indices)?;
        let mut states: Vec<State> =
            problems.iter().flat_map(|p| std::iter::repeat_n(p, group.size)).map(State::new).collect();
        let (mut played, mut means) = (Vec::new(), Means::default());
        for round in 1..joint.rounds {
            let rows: Vec<usize> = (0..states.len()).filter(|r| round == 1 || !states[*r].standing.passes).collect();
            if rows.is_empty() {
                break;
            }
            let turn = self.play(&mut states, rows, round, batch)?;
            let metrics = turn.judged.metrics.iter().cloned().chain(turn.writing.metrics());
            metrics.for_each(|metric| means.add(metric, turn.rows.len() as f64));
            played.push(turn);
        }
        let mut metrics = means.metrics();
        let claims =
            |turn: &Played| turn.rows.iter().map(|r| problems[r / group.size].target.claims.len()).sum::<usize>();
        let claims: usize = played.iter().map(claims).sum();
        let (mut turns, several) = (Vec::with_capacity(played.len()), group.updates() > 1);
        for Played { rows, groups, entered, writing, mut carried, judged } in played {
            let course = |(r, entered): (&usize, &Standing)| states[*r].standing.since(entered);
            let courses: Vec<Course> = rows.iter().zip(&entered).map(course).collect();
            let to_go = to_go(joint, group, &groups, &courses)?;
            if turns.is_empty() {
                // From the first round on they are whole.
                metrics.extend(trajectories(&courses, &to_go));
            }
            let (advantages, counts) = fused(joint, &judged, &to_go);
            let read: Vec<f32> = writing.read().map(|read| f32::from(u8::from(read))).collect();
            let read = Tensor::new(read, self.poser.klein.device())?;
            if several {
                let models = (&*self.poser.klein, &*self.editor.still);
                carried.reread(models, self.config.pieces(), self.config.editor.edit_guidance())?;
            }
            let reference = (actor.kl != 0.0).then_some(&*self.poser.critic.checker);
            let answers = Rollouts::new(writing, (&advantages, &counts), &self.actor, several, reference)?;
            let (advantages, counts) = ((&answers.advantages * &read)?, (&answers.counts * &read)?);
            turns.push(Turn { answers, carried, advantages, counts });
        }
        let tokens: f64 = turns.iter().map(|turn| turn.answers.writing.tokens()).sum();
        metrics.extend([
            (RENDERED_SHARE.to_owned(), rendered_share(problems.iter())),
            (TOKENS.to_owned(), tokens / batch.rows.len().max(1) as f64),
            ("claims".to_owned(), claims as f64 / problems.len().max(1) as f64),
            ("time/rollout".to_owned(), start.elapsed().as_secs_f64()),
        ]);
        self.kept.keep(batch, turns);
        Ok(metrics)
    }

    fn accept(&self, collected: &Metrics) -> Result<()> {
        rollout::accept(&self.config.group, collected)
    }

    fn loss(&self, batch: &Batch) -> Result<Step> {
        let GrpoConfig { joint, actor, editor, .. } = &self.config;
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
        let (Step { loss, metrics }, role, weight) = match part {
            0 => {
                let active = share * all().map(|turn| turn.answers.seen).sum::<f64>();
                let step = turn.answers.loss(&self.actor, &actor.token_loss(), active, first)?;
                (step, built_in::ACTOR, joint.actor)
            }
            _ => {
                let (models, weights) = ((&*self.poser.klein, &self.editor), (&turn.advantages, &turn.counts));
                let step = turn.carried.loss(editor, models, (pieces, part - 1), weights, first)?;
                (step, built_in::EDITOR, joint.editor)
            }
        };
        let metrics = metrics.into_iter().map(|(name, value)| (format!("{role}/{name}"), value)).collect();
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
        write_sheet(folder, "loops", &pictures, &words)
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::train::grpo::Scale;

    fn at(score: f64, [turns, idle]: [usize; 2], broken: f64) -> Standing {
        Standing { score, passes: score > 0.9, turns, idle, broken }
    }

    #[test]
    fn a_later_round_answers_for_what_came_after_it() -> Result<()> {
        let joint = JointConfig::default();
        let group = GroupConfig { size: 4, min_std: 0.0, ..GroupConfig::default() };
        // Where trajectories stood before the first round, the second, and in the end.
        let trajectories = [
            [at(0.5, [0, 0], 0.0), at(0.5, [1, 0], 0.4), at(1.0, [2, 0], 0.4)],
            [at(0.5, [0, 0], 0.0), at(0.8, [1, 0], 0.0), at(0.8, [2, 1], 0.0)],
            [at(0.5, [0, 0], 0.0), at(0.5, [1, 0], 0.0), at(0.6, [2, 0], 0.0)],
            [at(0.2, [0, 0], 0.0), at(0.3, [1, 1], 0.0), at(0.3, [2, 1], 0.1)],
        ];
        let since = |round: usize| trajectories.map(|t| t[2].since(&t[round]));
        let course = Course { improvement: 0.5, success: 1.0, idle: 0.0, broken: 0.0, turns: 1.0 };
        assert_eq!(since(1)[0], course);
        assert_eq!(since(0)[0], Course { broken: 0.4, turns: 2.0, ..course });
        assert_eq!(since(0)[1].idle, 0.5);
        let of = |round: usize| to_go(&joint, &group, &[0, 0, 0, 1], &since(round));
        // What was gained in the first round is none of the second's doing.
        let (first, second) = (of(0)?.values, of(1)?.values);
        assert!(first[0] > first[1] && first[1] > first[2], "{first:?}");
        assert!(second[0] > second[2] && second[2] > second[1], "{second:?}");
        // The others of the group are the measure, not those who were done before; alone there is none.
        assert!(second[..3].iter().sum::<f32>().abs() < 1e-5);
        assert_eq!([first[3], second[3]], [0.0; 2]);
        Ok(())
    }

    #[test]
    fn advantages_are_fused_row_by_row_as_far_as_both_are_known() -> Result<()> {
        let joint = JointConfig { turn: 1.0, whole: 0.5, ..JointConfig::default() };
        let group = GroupConfig { size: 4, scale: Some(Scale::None), ..GroupConfig::default() };
        let to_go = group.advantages(&[3.0, 1.0, f64::NAN, 2.0], &[0; 4])?;
        let turn = Judged { advantages: vec![1.0, 20.0, 1.0, 0.0], counts: vec![1.0, 1.0, 1.0, 0.0], metrics: vec![] };
        let (advantages, counts) = fused(&joint, &turn, &to_go);
        assert_eq!((advantages, counts), (vec![1.5, 5.0, 0.0, 0.0], vec![1.0, 1.0, 0.0, 0.0]));
        Ok(())
    }

    #[test]
    fn an_update_makes_an_answer_likelier_by_its_advantage() -> Result<()> {
        // The Editor has no part in such a reward. There is enough in the pictures that the Actor is not of one mind.
        let config: GrpoConfig = toml::from_str(
            "objective = 'joint'
            adapter = { rank = 4, alpha = 8.0 }
            group = { size = 8, min_std = 0.0, rewards = { brevity = 1.0 } }
            actor = { source = 'render', min_objects = 3, guidance = 1.0 }
            editor = { steps = 4, window = 1, guidance = 1.0 }
            joint = { rounds = 2, turn = 1.0, whole = 0.0 }",
        )?;
        let joint = Joint::new(&config, &Device::Cpu)?;
        let batch = Batch { step: 0, rows: 0..3, size: 3, together: 0..3, update: 0, piece: 0 };
        joint.collect(&batch)?;
        let loss = joint.loss(&batch)?.loss;
        let turns = joint.kept.of(&batch)?;
        // The first piece is the Actor's.
        let mut vars = joint.vars();
        vars.retain(|name, _| name.starts_with(built_in::ACTOR));
        let gained = turns[0].answers.shortened(&joint.actor, &config.group, &vars, &loss)?;
        assert!(gained > 0.0, "{gained}");
        Ok(())
    }
}
