//! Reflection-GRPO, stage 2: the Editor learns to make the edits it is asked for, as the Checker sees them; or, in the same
//! way, the Diffuser to draw its prompts.
//!
//! For each source picture, instruction and graph of what the picture should show afterwards:
//!
//! 1. the Editor draws a group of edits: stochastic steps in a window that the whole update shares, Euler's elsewhere
//!    ([`crate::flow::policy`]);
//! 2. the Checker answers the graph's claims on each: what was asked, and what had to stay;
//! 3. one update, or several: every stochastic step's log-probability, evaluated again with gradients, times the advantage
//!    ([`super::grpo`]). Each step goes backward before the next goes forward ([`super::flow_steps`]).
//!
//! DiffusionNFT needs no stochastic steps: its old policy, a slow copy of what is trained, draws by Euler's rule, and the
//! velocity is fitted to good pictures and away from bad ones at any noise level.
//!
//! Trained is a low-rank adapter on the transformer, or a whole copy of it; the reference of the divergence is the transformer
//! as it was.

mod problems;

use self::problems::Problem;
use super::{
    Batch, Metrics, Objective, Step, Work,
    flow_steps::{Carried, Edits, Learned, Pieces, carry_out, window_of},
    grpo::{NftBatch, nft_decay, nft_loss, velocity_kl},
    grpo_config::{GroupConfig, GrpoConfig, Learner, not_negative},
    pixels::{preserved, write_sheet},
    pose::{Poser, Posing, Source, TOGETHER},
    rollout::{self, Judged, Judges, Kept, Reward, judge},
    trained::Trained,
};
use crate::{
    flow::{
        Guidance, KlForm, Policy,
        field::{pack, unpack},
        sampler::{Velocity, euler},
    },
    models::{built_in, flux2::Flux2},
    rig::{
        klein::Adapted,
        roles::{Picture, Target, Verdict},
    },
    scene::{graph::SceneGraph, tabletop::split::Split},
    tensor::rng::Stream,
    usage,
};
use anyhow::{Context, Result};
use candle_core::{DType, Device, Tensor, Var};
use rayon::prelude::*;
use serde::{Deserialize, Serialize};
use std::{
    collections::{BTreeMap, HashMap},
    ops::Range,
    path::Path,
    sync::Arc,
    time::Instant,
};

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum LossKind {
    Grpo,
    GrpoGuard,
    DiffusionNft,
}

/// The section `[editor]`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct EditorConfig {
    /// The share of edits that the Actor asks for on pictures of the Diffuser; the others are the world's own, on renders.
    pub drawn: f64,
    /// Objects of a source picture, or of its prompt, at least and at most.
    pub min_objects: usize,
    pub max_objects: usize,
    /// Drawings of a prompt, of which the best is edited: those of the loop.
    pub draws: usize,
    pub loss: LossKind,
    /// Clip range; if not given 1e-5, as goes with a window, or 2e-6 with GRPO-Guard.
    pub eps: Option<f64>,
    /// Weight of the divergence from the untrained Editor, and how it is counted.
    pub kl: f64,
    pub kl_form: KlForm,
    /// How far DiffusionNFT's mirror lies.
    pub beta: f64,
    /// The stochastic sampler, the steps of a rollout, and how many of them are stochastic, or, with DiffusionNFT, at how
    /// many noise levels the velocity is fitted.
    pub policy: Policy,
    pub steps: usize,
    pub window: usize,
    /// Strength of guidance of drawings, and of edits, unless theirs is said.
    pub guidance: f64,
    pub edit_guidance: Option<Guidance>,
    /// Whether a group begins with one noise (so that its members differ by their stochastic steps alone, and up to the
    /// first of these are evaluated as one).
    pub shared_noise: bool,
    /// Held-out edits of an evaluation, and its steps, which are also those of drawings.
    pub evaluation: usize,
    pub evaluation_steps: usize,
}

impl Default for EditorConfig {
    fn default() -> Self {
        Self {
            drawn: 0.0,
            min_objects: 1,
            max_objects: 3,
            draws: 1,
            loss: LossKind::Grpo,
            eps: None,
            kl: 0.0,
            kl_form: KlForm::Step,
            beta: 1.0,
            policy: Policy::default(),
            steps: 8,
            window: 2,
            guidance: 3.0,
            edit_guidance: None,
            shared_noise: true,
            evaluation: 64,
            evaluation_steps: 20,
        }
    }
}

/// The transformer's layers that get an adapter: its attention.
pub const TARGETS: &[&str] = &[
    "to_q",
    "to_k",
    "to_v",
    "to_out.0",
    "add_q_proj",
    "add_k_proj",
    "add_v_proj",
    "to_add_out",
    "to_qkv_mlp_proj",
    "to_out",
];
/// Edits on a sample sheet.
const SHOWN: usize = 16;
/// The seed of held-out edits.
const HELD_OUT: u64 = 1;

/// What the updates of a step are computed from.
struct Rollouts {
    drawn: Drawn,
    /// `(B)`, as are the counts: 0 where a reward is missing.
    advantages: Tensor,
    counts: Tensor,
}

enum Drawn {
    /// Stochastic steps.
    Steps(Carried),
    /// DiffusionNFT's: final states of the old policy alone.
    Pictures { edits: Edits, x0: Tensor },
}

pub struct Editor {
    config: EditorConfig,
    /// Whether it is the Diffuser: it draws prompts, and edits nothing.
    draws: bool,
    group: GroupConfig,
    seed: u64,
    /// The frozen models: its transformer is the reference.
    poser: Poser,
    judges: Judges,
    learned: Learned,
    trained: Trained,
    /// DiffusionNFT's old policy, and the steps so far.
    old: Option<(Learned, Trained)>,
    updates: usize,
    pieces: Pieces,
    frozen: usize,
    kept: Kept<Rollouts>,
    /// Each with what it begins with, or, where that is nothing, what the untrained model draws.
    held_out: Vec<(Problem, Picture)>,
}

impl EditorConfig {
    /// The clip range.
    pub fn clip(&self) -> f64 {
        self.eps.unwrap_or(if self.loss == LossKind::GrpoGuard { 2e-6 } else { 1e-5 })
    }

    /// How edits are guided.
    pub fn edit_guidance(&self) -> Guidance {
        self.edit_guidance.unwrap_or(self.guidance.into())
    }

    fn posing(&self) -> Posing {
        let Self { min_objects, max_objects, draws, evaluation_steps: steps, guidance, .. } = *self;
        let (source, objects, edit_guidance) = (Source::Draw, [min_objects, max_objects], self.edit_guidance());
        Posing { source, objects, draws, steps, guidance, edit_guidance }
    }

    /// Refuses what cannot be learned from.
    pub fn check(&self, seed: u64) -> Result<()> {
        self.policy.check()?;
        not_negative("editor", &[("eps", self.eps), ("kl", Some(self.kl))])?;
        if !(0.0..=1.0).contains(&self.drawn) {
            usage!("[editor] drawn is a share, from 0 to 1, not {}", self.drawn);
        }
        if self.loss == LossKind::DiffusionNft {
            if self.window == 0 || self.window > self.steps || !(self.beta.is_finite() && self.beta > 0.0) {
                usage!("[editor] with diffusion-nft, window is 1 to steps, and beta is positive");
            }
        } else {
            window_of(self, seed, 0)?;
            if self.policy.noise() == 0.0 {
                usage!("[editor] policy.noise is 0: the members of a group would all be the same");
            }
        }
        Ok(())
    }
}

impl Editor {
    pub fn new(config: &GrpoConfig, device: &Device) -> Result<Self> {
        let GrpoConfig { editor, group, models, seed, .. } = config;
        let draws = config.objective == Learner::Diffuser;
        group.check(if draws { &[] } else { &["preserve"] })?;
        if draws && (editor.drawn != 0.0 || group.asks("kept") || models.actor.is_some() || models.editor.is_some()) {
            usage!(
                "the Diffuser edits nothing: [editor] drawn, the reward kept, models.actor and models.editor are of edits"
            );
        }
        editor.check(*seed)?;
        let at = (models.dtype.dtype(), device);
        let actor = models.frozen(built_in::ACTOR)?;
        let (critic, adapted) = rollout::critic(models, at, actor.as_ref())?;
        let critic = critic.with_actor(adapted.map(Arc::new));
        let nft = editor.loss == LossKind::DiffusionNft;
        if nft && group.rows != 0 {
            usage!("group.rows is for the losses over stochastic steps, not for diffusion-nft");
        }
        let role = if draws { built_in::DIFFUSER } else { built_in::EDITOR };
        let adapter = || config.learned(role, TARGETS);
        let diffuser = if draws { None } else { models.frozen(built_in::DIFFUSER)? };
        let (klein, both, diffuser) =
            rollout::editors(&models.pipeline()?, at, adapter, if nft { 2 } else { 1 }, diffuser)?;
        if nft && klein.distilled {
            usage!("[editor] loss: diffusion-nft would undo this model's distillation; take grpo or grpo-guard");
        }
        let mut both = both.into_iter();
        let (learned, trained) = both.next().context("an Editor to be trained")?;
        let old = both.next();
        let follows = |(_, old): &(Learned, Trained)| old.vars().values().map(|v| 4 * v.elem_count()).sum::<usize>();
        Ok(Self {
            config: editor.clone(),
            draws,
            group: group.clone(),
            seed: *seed,
            poser: Poser::new((klein, Adapted { diffuser, editor: None }), critic, editor.posing(), models)?,
            judges: Judges::open(config, device)?,
            learned,
            trained,
            updates: 0,
            pieces: config.pieces(),
            frozen: models.bytes()? + old.as_ref().map_or(0, follows),
            old,
            kept: Kept::default(),
            held_out: Vec::new(),
        })
    }

    /// `size` edits of each problem.
    fn edits<'a>(&self, problems: impl Iterator<Item = &'a Problem> + Clone, size: usize) -> Result<Edits> {
        let rows = problems.flat_map(|problem| std::iter::repeat_n(problem, size));
        let latents = |source: &Picture| source.latents().cloned().context("a source without latents");
        let sources = rows.clone().map(|p| p.source.as_ref().map(latents).transpose()).collect::<Result<_>>()?;
        let (width, height) = self.poser.size;
        let size = self.poser.klein.tokens(width, height)?;
        Ok(Edits { instructions: rows.map(|p| p.instruction.clone()).collect(), sources, size })
    }

    /// Pictures of final states `(B, h w, C)`.
    fn pictures(&self, states: &Tensor, (h, w): (usize, usize)) -> Result<Vec<Picture>> {
        let picture = |r: usize| Ok(Picture::from_latents(unpack(&states.get(r)?, h, w)?, self.poser.decode.clone()));
        let pictures: Vec<Picture> = (0..states.dim(0)?).map(picture).collect::<Result<_>>()?;
        Picture::develop(&pictures.iter().collect::<Vec<_>>())?;
        Ok(pictures)
    }

    /// The Checker's answers on the rollouts' pictures, and all that they are worth.
    fn judge(&self, problems: &[Problem], pictures: &[Picture]) -> Result<Judged> {
        let size = self.group.size;
        let target = |r: usize| &problems[r / size].target;
        let sources: Vec<(&Picture, &Target)> =
            problems.iter().filter_map(|p| Some((p.source.as_ref()?, &p.target))).collect();
        // What begins with nothing shows nothing.
        let before = match sources.is_empty() {
            true => problems.iter().map(|p| p.target.claims.iter().map(Verdict::denied).collect()).collect(),
            false => rollout::check(&self.poser.critic, &sources),
        };
        let asked: Vec<(&Picture, &Target)> = pictures.iter().enumerate().map(|(r, p)| (p, target(r))).collect();
        let after = rollout::check(&self.poser.critic, &asked);
        let before: Vec<&[Verdict]> = (0..pictures.len()).map(|r| before[r / size].as_slice()).collect();
        let mut rewards: Vec<Reward> = rollout::by_verdicts(&self.group, &before, &after);
        if self.group.asks("preserve") {
            let kept = |(r, picture): (usize, &Picture)| {
                let source = problems[r / size].source.as_ref().context("nothing to preserve")?;
                Ok(preserved(source.pixels()?, picture.pixels()?))
            };
            rewards.push(("preserve".to_owned(), pictures.iter().enumerate().map(kept).collect::<Result<_>>()?));
        }
        let judged: Vec<(&Picture, &Target, &SceneGraph)> =
            pictures.iter().enumerate().map(|(r, p)| (p, target(r), &problems[r / size].graph)).collect();
        rewards.extend(self.judges.rewards(&self.group, &judged)?);
        rollout::withhold(&mut rewards, before.iter().zip(&after).map(|(b, a)| rollout::known(b) && rollout::known(a)));
        judge(&self.group, &rewards, &self.group.numbers(pictures.len()))
    }

    /// DiffusionNFT's loss at the `k`-th of a few noise levels.
    fn at_level(
        &self,
        batch: &Batch,
        (edits, x0): (&Edits, &Tensor),
        (advantages, counts): (&Tensor, &Tensor),
    ) -> Result<Step> {
        let k = batch.piece;
        let EditorConfig { steps, beta, kl, .. } = self.config;
        let guidance = self.config.edit_guidance();
        let (old, _) = self.old.as_ref().context("DiffusionNFT has an old policy")?;
        let (h, w) = edits.size;
        let sigmas = self.poser.klein.schedule.sigmas(steps, h * w);
        let mut order: Vec<usize> = (0..steps).collect();
        // Every update has levels and noise of its own.
        let update = if batch.update == 0 { String::new() } else { format!(" of update {}", batch.update) };
        Stream::new(self.seed, &format!("editor levels{update}"), batch.step).shuffle(&mut order);
        let index = *order.get(k).context("no such level")?;
        let t = sigmas[index];
        // A group shares its noise, of which its advantages, whose sum is 0, leave little.
        let of_group = |group: u64| {
            let mut stream = Stream::new(self.seed, &format!("editor level {k}{update}"), group);
            stream.normals(x0.elem_count() / advantages.elem_count()).repeat(self.group.size)
        };
        let noise: Vec<f32> = batch.indices().flat_map(of_group).collect();
        let noise = Tensor::from_vec(noise, x0.dims(), x0.device())?;
        let x_t = ((x0 * (1.0 - t))? + (noise * t)?)?;
        let Learned { policy, still } = &self.learned;
        let mirror = edits.field(&self.poser.klein, &old.still, guidance)?.velocity(&x_t, t, index)?;
        let v = edits.field(&self.poser.klein, policy, guidance)?.apart(still).velocity(&x_t, t, index)?;
        let levels_of = Tensor::full(t as f32, advantages.dims(), x0.device())?;
        let pair = NftBatch { v: &v, old: &mirror, x_t: &x_t, x0, t: &levels_of, advantages, counts };
        let (mut loss, mut divergence) = (nft_loss(&pair, beta)?, 0.0);
        if kl != 0.0 {
            let reference =
                edits.field(&self.poser.klein, &self.poser.klein.transformer, guidance)?.velocity(&x_t, t, index)?;
            let kept = velocity_kl(&v, &reference, counts, 1.0)?;
            divergence = f64::from(kept.to_scalar::<f32>()?);
            loss = (loss + (kept * kl)?)?;
        }
        Ok(Step { loss: (loss / self.config.window as f64)?, metrics: vec![("kl".to_owned(), divergence)] })
    }

    /// The numbers of a batch's rollouts.
    fn rows(&self, batch: &Batch) -> Range<u64> {
        let (size, indices) = (self.group.size as u64, batch.indices());
        indices.start * size..indices.end * size
    }

    /// What the rollouts of a batch begin with, `(B, h w, C)`; of a group that shares it, only once.
    fn noise(&self, batch: &Batch, shape: (usize, usize)) -> Result<Tensor> {
        let shared = self.config.shared_noise && self.config.loss != LossKind::DiffusionNft;
        let begin = self.rows(batch).step_by(if shared { self.group.size } else { 1 });
        let noise = begin.map(|row| pack(&self.poser.klein.noise(self.seed, row, shape)?));
        Ok(Tensor::stack(&noise.collect::<candle_core::Result<Vec<_>>>()?, 0)?)
    }

    /// The first held-out problems' pictures.
    fn held_out(&mut self, count: usize) -> Result<Vec<Picture>> {
        if self.held_out.is_empty() {
            let indices: Vec<u64> = (0..self.config.evaluation as u64).collect();
            let problems = self.problems(Split::Val, HELD_OUT, &indices)?;
            let before = match problems.iter().map(|p| p.source.clone()).collect() {
                Some(sources) => sources,
                None => self.made(&problems.iter().collect::<Vec<_>>(), &self.poser.klein.transformer)?,
            };
            self.held_out = problems.into_iter().zip(before).collect();
        }
        let problems: Vec<&Problem> = self.held_out.iter().take(count).map(|(problem, _)| problem).collect();
        self.made(&problems, &self.learned.still)
    }

    /// What `transformer` makes of held-out problems, the first ones, without stochastic steps.
    fn made(&self, problems: &[&Problem], transformer: &Flux2) -> Result<Vec<Picture>> {
        let mut pictures = Vec::with_capacity(problems.len());
        for (first, some) in (0..).step_by(TOGETHER).zip(problems.chunks(TOGETHER)) {
            let edits = self.edits(some.iter().copied(), 1)?;
            let shape = edits.size;
            let sigmas = self.poser.klein.schedule.sigmas(self.config.evaluation_steps, shape.0 * shape.1);
            let rows = (first..first + some.len() as u64).map(|i| pack(&self.poser.klein.noise(HELD_OUT, i, shape)?));
            let noise = Tensor::stack(&rows.collect::<candle_core::Result<Vec<_>>>()?, 0)?;
            let states =
                euler(&edits.field(&self.poser.klein, transformer, self.config.edit_guidance())?, &noise, &sigmas)?;
            pictures.extend(self.pictures(&states, shape)?);
        }
        Ok(pictures)
    }
}

impl Objective for Editor {
    fn vars(&self) -> BTreeMap<String, Var> {
        self.trained.vars()
    }

    fn frozen(&self) -> usize {
        self.frozen
    }

    fn work(&self) -> Work {
        Work { epochs: self.group.epochs, minibatches: self.group.minibatches, pieces: self.pieces.count() }
    }

    fn collect(&self, batch: &Batch) -> Result<Metrics> {
        let start = Instant::now();
        let problems = self.problems(Split::Train, self.seed, &batch.indices().collect::<Vec<_>>())?;
        let edits = self.edits(problems.iter(), self.group.size)?;
        let shape = edits.size;
        let noise = self.noise(batch, shape)?;
        let (drawn, states) = match &self.old {
            None => {
                let (models, window) =
                    ((&*self.poser.klein, &*self.learned.still), window_of(&self.config, self.seed, batch.step)?);
                let numbers: Vec<u64> = self.rows(batch).collect();
                let fresh = (self.seed, "editor", &*numbers);
                let mut carried = carry_out(&self.config, models, edits, &noise, window, fresh)?;
                if self.group.updates() > 1 {
                    carried.reread(models, self.pieces, self.config.edit_guidance())?;
                }
                let states = carried.states.clone();
                (Drawn::Steps(carried), states)
            }
            Some((old, _)) => {
                let sigmas = self.poser.klein.schedule.sigmas(self.config.steps, shape.0 * shape.1);
                let x0 =
                    euler(&edits.field(&self.poser.klein, &old.still, self.config.edit_guidance())?, &noise, &sigmas)?;
                rollout::expect_finite(&x0)?;
                (Drawn::Pictures { edits, x0: x0.clone() }, x0)
            }
        };
        let pictures = self.pictures(&states, shape)?;
        let rolled_out = start.elapsed().as_secs_f64();
        let mut judged = self.judge(&problems, &pictures)?;
        let looked_at = usize::from(!self.draws) + self.group.size;
        let claims: usize = problems.iter().map(|p| p.target.claims.len() * looked_at).sum();
        // Claims of a row; the times are those of its whole micro-batch.
        let more = [
            ("claims", claims as f64 / problems.len().max(1) as f64),
            ("time/rollout", rolled_out),
            ("time/judge", start.elapsed().as_secs_f64() - rolled_out),
        ];
        judged.metrics.extend(more.map(|(name, value)| (name.to_owned(), value)));
        let advantages = Tensor::new(judged.advantages.as_slice(), noise.device())?;
        let counts = Tensor::new(judged.counts.as_slice(), noise.device())?;
        self.kept.keep(batch, Rollouts { drawn, advantages, counts });
        Ok(judged.metrics)
    }

    fn accept(&self, collected: &Metrics) -> Result<()> {
        rollout::accept(&self.group, collected)
    }

    fn loss(&self, batch: &Batch) -> Result<Step> {
        let rollouts = self.kept.of(batch)?;
        let Rollouts { drawn, advantages, counts } = &*rollouts;
        match drawn {
            Drawn::Steps(carried) => {
                let (models, piece) = ((&*self.poser.klein, &self.learned), (self.pieces, batch.piece));
                carried.loss(&self.config, models, piece, (advantages, counts), batch.update == 0)
            }
            Drawn::Pictures { edits, x0 } => self.at_level(batch, (edits, x0), (advantages, counts)),
        }
    }

    /// The old policy follows.
    fn observe(&mut self, _: &Metrics) -> Result<()> {
        let Some((_, old)) = &self.old else { return Ok(()) };
        let keep = nft_decay(self.updates);
        let new = self.trained.vars();
        for (name, var) in old.vars() {
            let new = new.get(&name).with_context(|| format!("the new policy has no {name}"))?;
            var.set(&((var.as_tensor() * keep)? + (new.as_tensor() * (1.0 - keep))?)?.detach())?;
        }
        self.updates += 1;
        Ok(())
    }

    fn evaluate(&mut self, _: u64) -> Result<Metrics> {
        let pictures = self.held_out(self.config.evaluation)?;
        let asked: Vec<(&Picture, &Target)> =
            pictures.iter().zip(&self.held_out).map(|(picture, (problem, _))| (picture, &problem.target)).collect();
        let verdicts = rollout::check(&self.poser.critic, &asked);
        let pairs = pictures.par_iter().zip(&self.held_out).map(|(after, (p, before))| (before, after, &p.graph));
        let mut metrics = rollout::before_and_after(pairs)?;
        let kept = |(picture, (_, before)): (&Picture, &(Problem, Picture))| {
            anyhow::Ok(preserved(before.pixels()?, picture.pixels()?))
        };
        let kept: Vec<f64> = pictures.iter().zip(&self.held_out).map(kept).collect::<Result<_>>()?;
        let n = pictures.len().max(1) as f64;
        let checked = rollout::mean_score(verdicts.iter().map(Vec::as_slice));
        metrics.push(("eval/preserve".to_owned(), kept.iter().sum::<f64>() / n));
        metrics.push(("eval/checker".to_owned(), checked));
        Ok(metrics)
    }

    /// Pictures before and after the edits, side by side, with the instructions.
    fn samples(&mut self, _: u64, folder: &Path) -> Result<()> {
        let edited = self.held_out(SHOWN)?;
        let (mut pictures, mut words) = (Vec::new(), String::new());
        for ((problem, before), picture) in self.held_out.iter().zip(&edited) {
            pictures.extend([before.pixels()?.clone(), picture.pixels()?.clone()]);
            words += &format!("{}\n", problem.instruction);
        }
        write_sheet(folder, "edits", &pictures, &words)
    }

    fn save(&self, folder: &Path, dtype: DType) -> Result<()> {
        self.trained.save(folder, dtype)
    }

    fn state(&self) -> Result<HashMap<String, Tensor>> {
        let Some((_, old)) = &self.old else { return Ok(HashMap::new()) };
        let mut state: HashMap<String, Tensor> =
            old.vars().into_iter().map(|(name, var)| (format!("old.{name}"), var.as_tensor().detach())).collect();
        state.insert("updates".to_owned(), Tensor::new(self.updates as u32, &Device::Cpu)?);
        Ok(state)
    }

    fn restore(&mut self, mut state: HashMap<String, Tensor>) -> Result<()> {
        let Some((_, old)) = &self.old else { return Ok(()) };
        let mut take = |name: &str| state.remove(name).with_context(|| format!("the checkpoint lacks {name}"));
        for (name, var) in old.vars() {
            var.set(&take(&format!("old.{name}"))?.to_device(var.device())?)?;
        }
        self.updates = take("updates")?.to_scalar::<u32>()? as usize;
        Ok(())
    }
}
