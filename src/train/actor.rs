//! Reflection-GRPO, stage 1: the Actor learns to write edits that the Checker, once they are carried out, likes.
//!
//! For each prompt and a picture that misses it:
//!
//! 1. the Checker says what is wrong;
//! 2. the Actor writes a group of edits at temperature 1;
//! 3. the Editor carries each out, from the noise of the problem (so that the same words are carried out once);
//! 4. the Checker answers the prompt's claims again: the rewards;
//! 5. one update on the advantages within the group ([`super::grpo`]).
//!
//! Trained is a low-rank adapter on the VLM's decoder, or a whole copy of the VLM; Checker, Editor and Diffuser stay as
//! they are. The picture is drawn by the Diffuser, as in the loop, or rendered, which is cheaper. Where one update is made
//! of each batch, the old policy is the present one. Where several are, the rollouts are read again before the first of
//! them, and the ratios of the later ones are clipped. Either way the log-probabilities of the replay are held to those of
//! the rollout at every step. Answers are decoded under a schema, but the ratio is of the model's own probabilities, as is
//! common.

use super::{
    Batch, Metrics, Objective, Step, Work,
    grpo::{TokenBatch, TokenLoss, TokenLossKind, token_loss},
    grpo_config::{GroupConfig, GrpoConfig},
    pixels::tiled,
    pose::{Poser, Posing, Problem, RENDERED_SHARE, Source, TOGETHER, rendered_share},
    replay::{Asked, Written, drawn, replay, write},
    rollout::{self, Judges, Kept, Reward, check_ratio, judge},
    run::TOKENS,
    trained::Trained,
};
use crate::{
    models::built_in,
    rig::{
        roles::{Edit, Editor, Picture, Target, Verdict},
        vlm_roles::EDIT,
    },
    scene::{
        graph::SceneGraph,
        tabletop::{edit, split::Split},
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
use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::Path,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

/// The section `[actor]`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ActorConfig {
    pub source: Source,
    /// Objects of a prompt at least and at most.
    pub min_objects: usize,
    pub max_objects: usize,
    /// Size of a fixed set of problems to train on, each with a cache of its edits' outcomes (some 60 kB for a picture of
    /// 128 x 128, as long as the run lasts); 0 poses new ones in every step. A resumed run fills the caches anew.
    pub pool: u64,
    /// Steps of the edits that are learned from.
    pub steps: usize,
    /// Steps of drawings and of an evaluation's edits: those of the loop.
    pub evaluation_steps: usize,
    pub guidance: f64,
    pub loss: TokenLossKind,
    /// The clip range; the loss's own ([`TokenLossKind::clip`]) if not given.
    pub eps_low: Option<f64>,
    pub eps_high: Option<f64>,
    /// Weight of the divergence from the untrained Actor.
    pub kl: f64,
    /// Held-out prompts of an evaluation.
    pub evaluation: usize,
}

impl Default for ActorConfig {
    fn default() -> Self {
        Self {
            source: Source::Draw,
            min_objects: 2,
            max_objects: 3,
            pool: 0,
            steps: 8,
            evaluation_steps: 20,
            guidance: 3.0,
            loss: TokenLossKind::Grpo,
            eps_low: None,
            eps_high: None,
            kl: 0.0,
            evaluation: 64,
        }
    }
}

impl ActorConfig {
    pub fn posing(&self) -> Posing {
        let Self { source, min_objects, max_objects, evaluation_steps, guidance, .. } = *self;
        Posing { source, objects: [min_objects, max_objects], steps: evaluation_steps, guidance }
    }

    /// The loss of answers of at most [`EDIT`] tokens.
    pub fn token_loss(&self) -> TokenLoss {
        let (low, high) = self.loss.clip();
        TokenLoss {
            kind: self.loss,
            eps_low: self.eps_low.unwrap_or(low),
            eps_high: self.eps_high.unwrap_or(high),
            beta: self.kl,
            max_length: EDIT,
        }
    }
}

/// The decoder's layers that get an adapter.
pub const TARGETS: &[&str] = &["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"];
/// Edits on a sample sheet.
const SHOWN: usize = 16;
/// The seed of held-out prompts.
const HELD_OUT: u64 = 1;

/// A problem, and the outcomes of its edits so far. Editor and Checker stay as they are and the noise is the problem's, so the
/// same words come to the same.
struct CachedProblem {
    problem: Problem,
    outcomes: Mutex<BTreeMap<String, Outcome>>,
}

/// A picture after an edit, and the verdicts on it.
type Outcome = (Picture, Vec<Verdict>);

impl CachedProblem {
    fn new(problem: Problem) -> Arc<Self> {
        Arc::new(Self { problem, outcomes: Mutex::default() })
    }

    fn cache(&self) -> MutexGuard<'_, BTreeMap<String, Outcome>> {
        self.outcomes.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// An edit written for a problem, and what became of it.
struct Attempt {
    answer: Answer,
    instruction: String,
    picture: Picture,
    verdicts: Vec<Verdict>,
    /// Of question and answer.
    tokens: usize,
    /// Whether the answer could be read; what could not is no instruction.
    read: bool,
}

/// What the updates of a step are computed from.
struct Rollouts {
    problems: Vec<Arc<CachedProblem>>,
    attempts: Vec<Attempt>,
    advantages: Vec<f32>,
    /// 1, or 0 for what no update may use.
    counts: Vec<f32>,
    /// Log-probabilities under the policy that drew, read again in the shape of the updates; `None` where the only update's
    /// own are these. And those under the untrained policy, where the divergence from it counts.
    old: Option<Tensor>,
    reference: Option<Tensor>,
}

/// Tokens that the updates see of answers, of which `counts` says which ones count.
pub fn seen<'a>(answers: impl Iterator<Item = &'a Answer>, counts: &[f32]) -> f64 {
    let chosen = |answer: &Answer| answer.chosen.iter().filter(|chosen| **chosen).count() as f64;
    answers.zip(counts).map(|(answer, counts)| chosen(answer) * f64::from(*counts)).sum()
}

impl Rollouts {
    fn questions(&self) -> Vec<String> {
        self.problems.iter().map(|p| p.problem.question()).collect()
    }

    /// Reads the answers again.
    fn replay(&self, vlm: &Vlm) -> Result<super::replay::Replay> {
        let (texts, size) = (self.questions(), self.attempts.len() / self.problems.len().max(1));
        let pictures: Vec<&RgbImage> =
            self.problems.iter().map(|p| p.problem.picture.pixels()).collect::<Result<_>>()?;
        let rows = self.attempts.iter().enumerate();
        let asked: Vec<Asked> =
            rows.map(|(r, a)| Asked { picture: r / size, question: &texts[r / size], answer: &a.answer }).collect();
        replay(vlm, &pictures, &asked)
    }
}

pub struct Actor {
    config: ActorConfig,
    group: GroupConfig,
    seed: u64,
    poser: Poser,
    judges: Judges,
    policy: Vlm,
    trained: Trained,
    frozen: usize,
    kept: Kept<Rollouts>,
    /// The problems of the pool so far.
    pool: Mutex<BTreeMap<u64, Arc<CachedProblem>>>,
    held_out: Vec<Arc<CachedProblem>>,
}

impl Actor {
    pub fn new(config: &GrpoConfig, device: &Device) -> Result<Self> {
        let GrpoConfig { actor, group, models, seed, .. } = config;
        group.check(&["format", "brevity"])?;
        if actor.steps == 0 {
            usage!("[actor] steps is 1 or more");
        }
        let scale = group.scale.or(Some(actor.loss.scale()));
        let at = (models.dtype.dtype(), device);
        let (critic, policy, trained) = rollout::actor(models, at, config.learned(built_in::ACTOR, TARGETS)?)?;
        let editor = models.adapter(built_in::EDITOR)?.map(|peft| peft.adapter(1.0));
        let (klein, mut editors) = rollout::pipeline(&models.pipeline()?, at, editor.as_slice())?;
        Ok(Self {
            config: actor.clone(),
            group: GroupConfig { scale, ..group.clone() },
            seed: *seed,
            poser: Poser::new((klein, editors.pop()), critic, actor.posing(), models)?,
            judges: Judges::open(config, device)?,
            policy,
            trained,
            frozen: models.bytes()?,
            kept: Kept::default(),
            pool: Mutex::default(),
            held_out: Vec::new(),
        })
    }

    /// The problems of these numbers, out of the pool if there is one.
    fn problems(&self, indices: &[u64]) -> Result<Vec<Arc<CachedProblem>>> {
        let pose = |indices: &[u64]| self.poser.problems(Split::Train, self.seed, indices);
        if self.config.pool == 0 {
            return Ok(pose(indices)?.into_iter().map(CachedProblem::new).collect());
        }
        let pool = || self.pool.lock().unwrap_or_else(PoisonError::into_inner);
        let numbers: Vec<u64> = indices.iter().map(|index| index % self.config.pool).collect();
        let new: BTreeSet<u64> = numbers.iter().copied().filter(|number| !pool().contains_key(number)).collect();
        let new: Vec<u64> = new.into_iter().collect();
        // Without the lock: a thread that waits within may be given the work of another micro-batch.
        let posed = pose(&new)?.into_iter().map(CachedProblem::new);
        for (number, problem) in new.into_iter().zip(posed) {
            pool().entry(number).or_insert(problem);
        }
        numbers.iter().map(|number| pool().get(number).cloned().context("a problem for each number")).collect()
    }

    /// `size` edits for each problem, problem by problem, carried out in `steps` steps and checked.
    fn attempts(
        &self,
        problems: &[Arc<CachedProblem>],
        (size, temperature, steps): (usize, f64, usize),
        first: u64,
    ) -> Result<Vec<Attempt>> {
        let pictures: Vec<&RgbImage> = problems.iter().map(|p| p.problem.picture.pixels()).collect::<Result<_>>()?;
        let texts: Vec<String> = problems.iter().map(|p| p.problem.question()).collect();
        let rows = 0..problems.len() * size;
        let asked: Vec<(usize, &str)> = rows.clone().map(|r| (r / size, texts[r / size].as_str())).collect();
        let stream = |r: usize| Stream::new(self.seed, "actor edits", first * size as u64 + r as u64);
        let streams: Vec<Stream> = rows.map(stream).collect();
        let written = write(&self.policy, &pictures, &asked, temperature, &streams)?;
        let words = |w: &Written| w.edit.clone().unwrap_or_default();
        self.fill_caches(problems, written.iter().enumerate().map(|(r, w)| (r / size, words(w))).collect(), steps)?;
        let attempt = |(r, written): (usize, Written)| {
            let instruction = words(&written);
            let outcome = problems[r / size].cache().get(&instruction).cloned();
            let (picture, verdicts) = outcome.context("an edit that was not carried out")?;
            let Written { answer, edit, tokens } = written;
            Ok(Attempt { answer, read: edit.is_some(), instruction, picture, verdicts, tokens })
        };
        written.into_iter().enumerate().map(attempt).collect()
    }

    /// Makes those of the edits, each of the problem of its number, that have not been made before.
    fn fill_caches(
        &self,
        problems: &[Arc<CachedProblem>],
        edits: BTreeSet<(usize, String)>,
        steps: usize,
    ) -> Result<()> {
        let new: Vec<(usize, String)> =
            edits.into_iter().filter(|(p, instruction)| !problems[*p].cache().contains_key(instruction)).collect();
        let jobs = new.iter().map(|(p, instruction)| {
            let Problem { target, picture, verdicts, seed, .. } = &problems[*p].problem;
            Edit { target, picture, verdicts, instruction, seed: *seed, round: 1 }
        });
        let jobs: Vec<Edit> = jobs.collect();
        let edited = self.poser.painter(steps).edit(&jobs)?;
        Picture::develop(&edited.iter().collect::<Vec<_>>())?;
        let asked: Vec<(&Picture, &Target)> = edited.iter().zip(&jobs).map(|(p, job)| (p, job.target)).collect();
        let verdicts = rollout::check(&self.poser.critic, &asked);
        for (((p, instruction), picture), verdicts) in new.into_iter().zip(edited).zip(verdicts) {
            problems[p].cache().entry(instruction).or_insert((picture, verdicts));
        }
        Ok(())
    }

    fn rewards(&self, problems: &[Arc<CachedProblem>], attempts: &[Attempt]) -> Result<Vec<Reward>> {
        let problem = |r: usize| &problems[r / self.group.size].problem;
        let before: Vec<&[Verdict]> = (0..attempts.len()).map(|r| problem(r).verdicts.as_slice()).collect();
        let after: Vec<Vec<Verdict>> = attempts.iter().map(|a| a.verdicts.clone()).collect();
        let mut rewards = rollout::by_verdicts(&self.group, &before, &after);
        let mut add = |name: &str, value: &dyn Fn(&Attempt) -> f64| {
            if self.group.asks(name) {
                rewards.push((name.to_owned(), attempts.iter().map(value).collect()));
            }
        };
        add("format", &|a| well_formed(&a.instruction));
        // From 1 for no words down to 0 for as many as there may be.
        add("brevity", &|a| 1.0 - (a.answer.ids.len() as f64 / EDIT as f64).min(1.0));
        let judged: Vec<(&Picture, &Target, &SceneGraph)> =
            attempts.iter().enumerate().map(|(r, a)| (&a.picture, &problem(r).target, &problem(r).graph)).collect();
        rewards.extend(self.judges.rewards(&self.group, &judged)?);
        rollout::withhold(&mut rewards, attempts.iter().map(|a| a.read && rollout::known(&a.verdicts)));
        Ok(rewards)
    }

    /// The first held-out problems' greedy edits. The problems do not depend on what is trained.
    fn held_out(&mut self, count: usize) -> Result<Vec<Attempt>> {
        if self.held_out.is_empty() {
            let indices: Vec<u64> = (0..self.config.evaluation as u64).collect();
            let problems = self.poser.problems(Split::Val, HELD_OUT, &indices)?;
            self.held_out = problems.into_iter().map(CachedProblem::new).collect();
        }
        let some = &self.held_out[..count.min(self.held_out.len())];
        let greedy = (1, 0.0, self.config.evaluation_steps);
        let parts = some.chunks(TOGETHER).map(|some| self.attempts(some, greedy, 0));
        let attempts: Vec<Attempt> = parts.collect::<Result<Vec<_>>>()?.into_iter().flatten().collect();
        // The next evaluation mostly asks for the same; what it does not is not kept for ever.
        for (problem, attempt) in some.iter().zip(&attempts) {
            problem.cache().retain(|instruction, _| *instruction == attempt.instruction);
        }
        Ok(attempts)
    }
}

/// Whether the Editor has learned to read such an edit.
pub fn well_formed(instruction: &str) -> f64 {
    f64::from(u8::from(edit::Edit::parse(instruction).is_ok()))
}

impl Objective for Actor {
    fn vars(&self) -> BTreeMap<String, Var> {
        self.trained.vars()
    }

    fn frozen(&self) -> usize {
        self.frozen
    }

    fn work(&self) -> Work {
        Work { epochs: self.group.epochs, minibatches: self.group.minibatches, pieces: 1 }
    }

    fn collect(&self, batch: &Batch) -> Result<Metrics> {
        let indices: Vec<u64> = batch.indices().collect();
        let problems = self.problems(&indices)?;
        let attempts = self.attempts(&problems, (self.group.size, 1.0, self.config.steps), indices[0])?;
        let judged = judge(&self.group, &self.rewards(&problems, &attempts)?, &self.group.numbers(attempts.len()))?;
        let mean = |value: &dyn Fn(&Attempt) -> f64| attempts.iter().map(value).sum::<f64>() / attempts.len() as f64;
        let mut metrics = judged.metrics;
        let distinct = |group: &[Attempt]| group.iter().map(|a| &a.instruction).collect::<BTreeSet<_>>().len() as f64;
        let more = [
            (RENDERED_SHARE, rendered_share(problems.iter().map(|p| &p.problem))),
            ("edits/distinct", attempts.chunks(self.group.size).map(distinct).sum::<f64>() / problems.len() as f64),
            ("completions/mean_length", mean(&|a| a.answer.ids.len() as f64)),
            ("completions/clipped_ratio", mean(&|a| f64::from(u8::from(a.answer.ids.len() >= EDIT)))),
            (TOKENS, mean(&|a| a.tokens as f64) * self.group.size as f64),
        ];
        metrics.extend(more.map(|(name, value)| (name.to_owned(), value)));
        let (advantages, counts) = (judged.advantages, judged.counts);
        let mut rollouts = Rollouts { problems, attempts, advantages, counts, old: None, reference: None };
        if self.group.updates() > 1 {
            rollouts.old = Some(rollouts.replay(&self.policy)?.log_probs.detach());
        }
        if self.config.kl != 0.0 {
            rollouts.reference = Some(rollouts.replay(&self.poser.critic.checker)?.log_probs.detach());
        }
        self.kept.keep(batch, rollouts);
        Ok(metrics)
    }

    fn accept(&self, collected: &Metrics) -> Result<()> {
        rollout::accept(&self.group, collected)
    }

    fn loss(&self, batch: &Batch) -> Result<Step> {
        let rollouts = self.kept.of(batch)?;
        let seen = |r: &Rollouts| seen(r.attempts.iter().map(|a| &a.answer), &r.counts);
        let share = batch.rows.len() as f64 / batch.together.len().max(1) as f64;
        let active = share * self.kept.together(batch).iter().map(|rollouts| seen(rollouts)).sum::<f64>();
        let replayed = rollouts.replay(&self.policy)?;
        let answers: Vec<&Answer> = rollouts.attempts.iter().map(|a| &a.answer).collect();
        let device = replayed.log_probs.device();
        let (drawn, mask) = drawn(&answers, device)?;
        let old = rollouts.old.clone().unwrap_or_else(|| replayed.log_probs.detach());
        let off = check_ratio(&old, &drawn, &mask, rollout::token_ratio(&self.policy))?;
        if batch.update == 0 && rollouts.old.is_some() {
            // Both were read in one shape, so this holds in any number format.
            check_ratio(&replayed.log_probs, &old, &mask, rollout::TOKEN_RATIO)?;
        }
        let counts = Tensor::from_slice(&rollouts.counts, (answers.len(), 1), device)?;
        let mask = mask.broadcast_mul(&counts)?;
        let tokens = TokenBatch {
            log_probs: &replayed.log_probs,
            old: &old,
            reference: rollouts.reference.as_ref(),
            mask: &mask,
            advantages: &Tensor::new(rollouts.advantages.as_slice(), device)?,
            active: Some(active),
        };
        let loss = token_loss(&self.config.token_loss(), &tokens)?;
        let metrics = [
            ("entropy", replayed.entropy),
            ("kl", loss.kl),
            ("clip_ratio/low_mean", loss.clip_low),
            ("clip_ratio/high_mean", loss.clip_high),
            ("ratio_off", off),
        ];
        Ok(Step { loss: loss.loss, metrics: metrics.map(|(name, value)| (name.to_owned(), value)).into() })
    }

    fn evaluate(&mut self, _: u64) -> Result<Metrics> {
        let attempts = self.held_out(self.config.evaluation)?;
        let pairs: Vec<(&Problem, &Attempt)> = self.held_out.iter().map(|p| &p.problem).zip(&attempts).collect();
        let pictures = pairs.par_iter().map(|(p, attempt)| (&p.picture, &attempt.picture, &p.graph));
        let mut metrics = rollout::before_and_after(pictures)?;
        let formed: f64 = attempts.iter().map(|a| well_formed(&a.instruction)).sum();
        let named = [
            ("eval/checker_before", rollout::mean_score(pairs.iter().map(|(p, _)| p.verdicts.as_slice()))),
            ("eval/checker", rollout::mean_score(attempts.iter().map(|a| a.verdicts.as_slice()))),
            ("eval/format", formed / attempts.len().max(1) as f64),
        ];
        metrics.extend(named.map(|(name, value)| (name.to_owned(), value)));
        Ok(metrics)
    }

    /// Pictures before and after the edits, side by side, with the prompts and the edits in words.
    fn samples(&mut self, _: u64, folder: &Path) -> Result<()> {
        let attempts = self.held_out(SHOWN)?;
        let (mut pictures, mut words) = (Vec::new(), String::new());
        for (CachedProblem { problem, .. }, attempt) in self.held_out.iter().map(Arc::as_ref).zip(&attempts) {
            pictures.extend([problem.picture.pixels()?.clone(), attempt.picture.pixels()?.clone()]);
            words += &format!("{} | {}\n", problem.target.prompt, attempt.instruction);
        }
        tiled(&pictures, 8).save(folder.join("edits.png"))?;
        Ok(fs::write(folder.join("edits.txt"), words)?)
    }

    fn save(&self, folder: &Path, dtype: DType) -> Result<()> {
        self.trained.save(folder, dtype)
    }
}
