//! Reflection-GRPO, stage 1: the Actor learns to write edits that the Checker, once they are carried out, likes.
//!
//! For each prompt and a picture that misses it:
//!
//! 1. the Checker says what is wrong;
//! 2. the Actor writes a group of edits at temperature 1;
//! 3. the Editor carries each out, from the noises of the problem (so that the same words are carried out once): from
//!    several, as much of what becomes of an edit is the luck of one;
//! 4. the Checker answers the prompt's claims again: the rewards, means over these tries;
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
    grpo::{TokenLoss, TokenLossKind},
    grpo_config::{GroupConfig, GrpoConfig, not_negative},
    pixels::write_sheet,
    pose::{Poser, Posing, Problem, RENDERED_SHARE, Source, TOGETHER, rendered_share},
    replay::{Rollouts, Writing, Written, well_formed},
    rollout::{self, Judges, Kept, Reward, judge},
    run::TOKENS,
    trained::Trained,
};
use crate::{
    flow::Guidance,
    models::built_in,
    rig::{
        klein::Adapted,
        roles::{Edit, Editor, Picture, Target, Verdict},
        vlm_roles::EDIT,
    },
    scene::{graph::SceneGraph, tabletop::split::Split},
    tensor::rng::Stream,
    usage,
    vlm::Vlm,
};
use anyhow::{Context, Result};
use candle_core::{DType, Device, Var};
use rayon::prelude::*;
use serde::{Deserialize, Serialize};
use std::{
    collections::{BTreeMap, BTreeSet},
    path::Path,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Instant,
};

/// The section `[actor]`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ActorConfig {
    pub source: Source,
    /// Objects of a prompt at least and at most.
    pub min_objects: usize,
    pub max_objects: usize,
    /// Drawings of a prompt, of which the Actor is given the best: those of the loop.
    pub draws: usize,
    /// Size of a fixed set of problems to train on, each with a cache of its edits' outcomes (for each try of a picture
    /// of 128 x 128 some 60 kB, as long as the run lasts); 0 poses new ones in every step. A resumed run fills the
    /// caches anew.
    pub pool: u64,
    /// From how many noises each edit is carried out, before its rewards are averaged. An evaluation's are from one.
    pub tries: usize,
    /// Steps of the edits that are learned from.
    pub steps: usize,
    /// Steps of drawings and of an evaluation's edits: those of the loop.
    pub evaluation_steps: usize,
    /// Strength of guidance of drawings, and of edits, unless theirs is said.
    pub guidance: f64,
    pub edit_guidance: Option<Guidance>,
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
            draws: 1,
            pool: 0,
            tries: 1,
            steps: 8,
            evaluation_steps: 20,
            guidance: 3.0,
            edit_guidance: None,
            loss: TokenLossKind::Grpo,
            eps_low: None,
            eps_high: None,
            kl: 0.0,
            evaluation: 64,
        }
    }
}

impl ActorConfig {
    /// How edits are guided.
    pub fn edit_guidance(&self) -> Guidance {
        self.edit_guidance.unwrap_or(self.guidance.into())
    }

    /// Refuses what cannot be learned from.
    pub fn check(&self) -> Result<()> {
        if self.steps == 0 || self.tries == 0 {
            usage!("[actor] steps and tries are 1 or more");
        }
        let limits = [("eps_low", self.eps_low), ("eps_high", self.eps_high), ("kl", Some(self.kl))];
        not_negative("actor", &limits)
    }

    pub fn posing(&self) -> Posing {
        let Self { source, min_objects, max_objects, draws, guidance, .. } = *self;
        let (objects, steps) = ([min_objects, max_objects], self.evaluation_steps);
        Posing { source, objects, draws, steps, guidance, edit_guidance: self.edit_guidance() }
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

/// A problem, and the outcomes of its edits so far, try by try. Editor and Checker stay as they are and the noises are
/// the problem's, so the same words come to the same.
struct CachedProblem {
    problem: Problem,
    outcomes: Mutex<BTreeMap<String, Vec<Outcome>>>,
}

/// A picture after an edit, and the verdicts on it.
#[derive(Clone)]
struct Outcome {
    picture: Picture,
    verdicts: Vec<Verdict>,
}

impl CachedProblem {
    fn new(problem: Problem) -> Arc<Self> {
        Arc::new(Self { problem, outcomes: Mutex::default() })
    }

    fn cache(&self) -> MutexGuard<'_, BTreeMap<String, Vec<Outcome>>> {
        self.outcomes.lock().unwrap_or_else(PoisonError::into_inner)
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
        actor.check()?;
        let scale = group.scale.or(Some(actor.loss.scale()));
        let at = (models.dtype.dtype(), device);
        let (critic, policy, trained) = rollout::actor(models, at, config.learned(built_in::ACTOR, TARGETS)?)?;
        let adapters = [models.frozen(built_in::DIFFUSER)?, models.frozen(built_in::EDITOR)?];
        let (klein, others) = rollout::pipeline(&models.pipeline()?, at, &adapters)?;
        let [diffuser, editor] = <[_; 2]>::try_from(others).ok().context("a transformer for each role")?;
        Ok(Self {
            config: actor.clone(),
            group: GroupConfig { scale, ..group.clone() },
            seed: *seed,
            poser: Poser::new((klein, Adapted { diffuser, editor }), critic, actor.posing(), models)?,
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

    /// `size` edits for each problem, problem by problem, and what becomes of each, try by try, in `steps` steps.
    fn attempts(
        &self,
        problems: &[Arc<CachedProblem>],
        (size, temperature): (usize, f64),
        (steps, tries): (usize, usize),
        first: u64,
    ) -> Result<(Writing, Vec<Vec<Outcome>>)> {
        let pictures = problems.iter().map(|p| p.problem.picture.clone()).collect();
        let question =
            |(p, problem): (usize, &Arc<CachedProblem>)| std::iter::repeat_n((p, problem.problem.question()), size);
        let asked: Vec<(usize, String)> = problems.iter().enumerate().flat_map(question).collect();
        let stream = |r: usize| Stream::new(self.seed, "actor edits", first * size as u64 + r as u64);
        let streams: Vec<Stream> = (0..asked.len()).map(stream).collect();
        let writing = Writing::draw(&self.policy, (pictures, asked), temperature, &streams)?;
        let edits = || writing.written.iter().enumerate().map(move |(r, w)| (r / size, w.instruction()));
        self.fill_caches(problems, edits().collect(), (steps, tries))?;
        let cached = |(p, instruction): (usize, &str)| problems[p].cache().get(instruction).cloned();
        let outcomes = edits().map(|edit| cached(edit).context("an edit that was not carried out"));
        let outcomes = outcomes.collect::<Result<_>>()?;
        Ok((writing, outcomes))
    }

    /// Makes those of the edits, each of the problem of its number, that have not been made before.
    fn fill_caches(
        &self,
        problems: &[Arc<CachedProblem>],
        edits: BTreeSet<(usize, &str)>,
        (steps, tries): (usize, usize),
    ) -> Result<()> {
        let new: Vec<(usize, &str)> =
            edits.into_iter().filter(|(p, instruction)| !problems[*p].cache().contains_key(*instruction)).collect();
        let jobs = new.iter().flat_map(|(p, instruction)| {
            let Problem { target, picture, verdicts, seed, .. } = &problems[*p].problem;
            let round = self.config.draws;
            // The first noise is the one that the loop would take.
            let seeds = (0..tries as u64).map(move |number| seed.wrapping_add(number));
            seeds.map(move |seed| Edit { target, picture, verdicts, instruction, seed, round })
        });
        let jobs: Vec<Edit> = jobs.collect();
        let edited = self.poser.painter(steps).edit(&jobs)?;
        Picture::develop(&edited.iter().collect::<Vec<_>>())?;
        let asked: Vec<(&Picture, &Target)> = edited.iter().zip(&jobs).map(|(p, job)| (p, job.target)).collect();
        let verdicts = rollout::check(&self.poser.critic, &asked);
        let outcomes = edited.into_iter().zip(verdicts).map(|(picture, verdicts)| Outcome { picture, verdicts });
        let outcomes: Vec<Outcome> = outcomes.collect();
        for ((p, instruction), outcomes) in new.iter().zip(outcomes.chunks(tries)) {
            problems[*p].cache().entry((*instruction).to_owned()).or_insert_with(|| outcomes.to_vec());
        }
        Ok(())
    }

    fn rewards(
        &self,
        problems: &[Arc<CachedProblem>],
        writing: &Writing,
        outcomes: &[Vec<Outcome>],
    ) -> Result<Vec<Reward>> {
        let (group, groups) = (&self.group, self.group.numbers(outcomes.len()));
        let tries = outcomes.iter().enumerate().flat_map(|(r, tries)| {
            let problem = &problems[r / group.size].problem;
            tries.iter().map(move |outcome| (problem, outcome))
        });
        let tries: Vec<(&Problem, &Outcome)> = tries.collect();
        let before: Vec<&[Verdict]> = tries.iter().map(|(problem, _)| problem.verdicts.as_slice()).collect();
        let after: Vec<Vec<Verdict>> = tries.iter().map(|(_, outcome)| outcome.verdicts.clone()).collect();
        let mut rewards = rollout::by_verdicts(group, &before, &after);
        let judged: Vec<(&Picture, &Target, &SceneGraph)> =
            tries.iter().map(|(problem, outcome)| (&outcome.picture, &problem.target, &problem.graph)).collect();
        rewards.extend(self.judges.rewards(group, &judged)?);
        rollout::withhold(&mut rewards, after.iter().map(|after| rollout::known(after)));
        rollout::average(&mut rewards, self.config.tries);
        rewards.extend(writing.rewards(group));
        rollout::rank_last(&mut rewards, &groups, writing.read());
        Ok(rewards)
    }

    /// The first held-out problems' greedy edits, and what becomes of them. The problems do not depend on what is
    /// trained.
    fn held_out(&mut self, count: usize) -> Result<Vec<(String, Outcome)>> {
        if self.held_out.is_empty() {
            let indices: Vec<u64> = (0..self.config.evaluation as u64).collect();
            let problems = self.poser.problems(Split::Val, HELD_OUT, &indices)?;
            self.held_out = problems.into_iter().map(CachedProblem::new).collect();
        }
        let some = &self.held_out[..count.min(self.held_out.len())];
        let mut attempts = Vec::with_capacity(some.len());
        for some in some.chunks(TOGETHER) {
            let (writing, outcomes) = self.attempts(some, (1, 0.0), (self.config.evaluation_steps, 1), 0)?;
            let words = writing.written.iter().map(|w| w.instruction().to_owned());
            attempts.extend(words.zip(outcomes.into_iter().flatten()));
        }
        // The next evaluation mostly asks for the same; what it does not is not kept for ever.
        for (problem, (kept, _)) in some.iter().zip(&attempts) {
            problem.cache().retain(|instruction, _| instruction == kept);
        }
        Ok(attempts)
    }
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
        let start = Instant::now();
        let indices: Vec<u64> = batch.indices().collect();
        let problems = self.problems(&indices)?;
        let (ActorConfig { steps, tries, kl, .. }, size) = (&self.config, self.group.size);
        let (writing, outcomes) = self.attempts(&problems, (size, 1.0), (*steps, *tries), indices[0])?;
        let rewards = self.rewards(&problems, &writing, &outcomes)?;
        let judged = judge(&self.group, &rewards, &self.group.numbers(outcomes.len()))?;
        let n = problems.len() as f64;
        let distinct = |group: &[Written]| group.iter().map(Written::instruction).collect::<BTreeSet<_>>().len();
        let distinct: Vec<usize> = writing.written.chunks(size).map(distinct).collect();
        let claims = |(p, edits): (&Arc<CachedProblem>, &usize)| p.problem.target.claims.len() * edits * tries;
        // Edits and claims of a row; the time is that of its whole micro-batch.
        let more = [
            (RENDERED_SHARE, rendered_share(problems.iter().map(|p| &p.problem))),
            ("edits/distinct", distinct.iter().sum::<usize>() as f64 / n),
            ("claims", problems.iter().zip(&distinct).map(claims).sum::<usize>() as f64 / n),
            (TOKENS, writing.tokens() / n),
            ("time/rollout", start.elapsed().as_secs_f64()),
        ];
        let mut metrics = judged.metrics;
        metrics.extend(more.map(|(name, value)| (name.to_owned(), value)));
        metrics.extend(writing.metrics());
        let (weights, several) = ((judged.advantages.as_slice(), judged.counts.as_slice()), self.group.updates() > 1);
        let reference = (*kl != 0.0).then_some(&*self.poser.critic.checker);
        self.kept.keep(batch, Rollouts::new(writing, weights, &self.policy, several, reference)?);
        Ok(metrics)
    }

    fn accept(&self, collected: &Metrics) -> Result<()> {
        rollout::accept(&self.group, collected)
    }

    fn loss(&self, batch: &Batch) -> Result<Step> {
        let share = batch.rows.len() as f64 / batch.together.len().max(1) as f64;
        let active = share * self.kept.together(batch).iter().map(|rollouts| rollouts.seen).sum::<f64>();
        self.kept.of(batch)?.loss(&self.policy, &self.config.token_loss(), active, batch.update == 0)
    }

    fn evaluate(&mut self, _: u64) -> Result<Metrics> {
        let attempts = self.held_out(self.config.evaluation)?;
        let outcomes = attempts.iter().map(|(_, outcome)| outcome);
        let pairs: Vec<(&Problem, &Outcome)> = self.held_out.iter().map(|p| &p.problem).zip(outcomes).collect();
        let pictures = pairs.par_iter().map(|(p, outcome)| (&p.picture, &outcome.picture, &p.graph));
        let mut metrics = rollout::before_and_after(pictures)?;
        let formed: f64 = attempts.iter().map(|(edit, _)| well_formed(edit)).sum();
        let named = [
            ("eval/checker_before", rollout::mean_score(pairs.iter().map(|(p, _)| p.verdicts.as_slice()))),
            ("eval/checker", rollout::mean_score(pairs.iter().map(|(_, outcome)| outcome.verdicts.as_slice()))),
            ("eval/format", formed / attempts.len().max(1) as f64),
        ];
        metrics.extend(named.map(|(name, value)| (name.to_owned(), value)));
        Ok(metrics)
    }

    /// Pictures before and after the edits, side by side, with the prompts and the edits in words.
    fn samples(&mut self, _: u64, folder: &Path) -> Result<()> {
        let attempts = self.held_out(SHOWN)?;
        let (mut pictures, mut words) = (Vec::new(), String::new());
        for (CachedProblem { problem, .. }, (edit, outcome)) in self.held_out.iter().map(Arc::as_ref).zip(&attempts) {
            pictures.extend([problem.picture.pixels()?.clone(), outcome.picture.pixels()?.clone()]);
            words += &format!("{} | {edit}\n", problem.target.prompt);
        }
        write_sheet(folder, "edits", &pictures, &words)
    }

    fn save(&self, folder: &Path, dtype: DType) -> Result<()> {
        self.trained.save(folder, dtype)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_update_makes_an_answer_likelier_by_its_advantage() -> Result<()> {
        // The Editor has no part in such a reward. There is enough in the pictures that the Actor is not of one mind.
        let config: GrpoConfig = toml::from_str(
            "adapter = { rank = 4, alpha = 8.0 }
            group = { size = 8, min_std = 0.0, rewards = { brevity = 1.0 } }
            actor = { source = 'render', min_objects = 3, steps = 1, guidance = 1.0 }",
        )?;
        let actor = Actor::new(&config, &Device::Cpu)?;
        let batch = Batch { step: 0, rows: 0..4, size: 4, together: 0..4, update: 0, piece: 0 };
        actor.collect(&batch)?;
        let loss = actor.loss(&batch)?.loss;
        let gained = actor.kept.of(&batch)?.shortened(&actor.policy, &actor.group, &actor.vars(), &loss)?;
        assert!(gained > 0.0, "{gained}");
        Ok(())
    }
}
