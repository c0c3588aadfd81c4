//! Reflection-GRPO, stage 2: the Editor learns to make the edits it is asked for, as the Checker sees them.
//!
//! For each source picture, instruction and graph of what the picture should show afterwards:
//!
//! 1. the Editor draws a group of edits: stochastic steps in a window that the whole update shares, Euler's elsewhere
//!    ([`crate::flow::policy`]);
//! 2. the Checker answers the graph's claims on each: what was asked, and what had to stay;
//! 3. one update: every stochastic step's log-probability, evaluated again with gradients, times the advantage
//!    ([`super::grpo`]).
//!
//! DiffusionNFT needs no stochastic steps: its old policy, a slow copy of the adapter, draws by Euler's rule, and the
//! velocity is fitted to good pictures and away from bad ones at any noise level.
//!
//! Trained is a low-rank adapter on the transformer; the reference of the divergence is the transformer without it.
//! Removals are not trained: no claim of a graph says that something is gone.

use super::{
    Batch, Metrics, Objective, Step,
    grpo::{self, NftBatch, flow_loss, guard_loss, nft_decay, nft_loss, velocity_kl},
    grpo_config::{GroupConfig, GrpoConfig},
    objective_diffuser::tiled,
    rollout::{self, FLOW_RATIO, Judged, Reward, check_ratio, judge, through_latents},
};
use crate::{
    flow::{
        Field, KlForm, Klein, Policy,
        field::{pack, unpack},
        policy::{Taken, rollout, window},
        sampler::{Velocity, euler},
    },
    models::{Adapter, flux2::Flux2, peft},
    rig::{
        roles::{Checker, Decode, Picture, Target, Verdict, score},
        vlm_roles::Critic,
    },
    scene::tabletop::{
        edit::Kind,
        oracle,
        render::render,
        split::Split,
        tasks::{self, EditSample},
    },
    tensor::rng::Stream,
    usage,
};
use anyhow::{Context, Result, ensure};
use candle_core::{DType, Device, Tensor, Var};
use image::RgbImage;
use rayon::prelude::*;
use serde::{Deserialize, Serialize};
use std::{
    collections::{BTreeMap, HashMap},
    fs,
    path::Path,
    sync::Arc,
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
    /// Objects of a source picture at least and at most.
    pub min_objects: usize,
    pub max_objects: usize,
    pub loss: LossKind,
    /// Clip range; 1e-5 goes with a window, 2e-6 with GRPO-Guard.
    pub eps: f64,
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
    pub guidance: f64,
    /// Whether a group begins with one noise (so that its members differ by their stochastic steps alone).
    pub shared_noise: bool,
    /// Held-out edits of an evaluation, and its steps.
    pub evaluation: usize,
    pub evaluation_steps: usize,
}

impl Default for EditorConfig {
    fn default() -> Self {
        Self {
            min_objects: 1,
            max_objects: 3,
            loss: LossKind::Grpo,
            eps: 1e-5,
            kl: 0.0,
            kl_form: KlForm::Step,
            beta: 1.0,
            policy: Policy::default(),
            steps: 8,
            window: 2,
            guidance: 3.0,
            shared_noise: true,
            evaluation: 64,
            evaluation_steps: 20,
        }
    }
}

/// The transformer's layers that get an adapter: its attention.
const TARGETS: &[&str] = &[
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
/// Edits that run through the transformer together in an evaluation.
const TOGETHER: usize = 32;
/// Edits on a sample sheet.
const SHOWN: usize = 16;
/// The seed of held-out edits.
const HELD_OUT: u64 = 1;

/// A picture, how it is to be edited, and what it should show afterwards.
struct Problem {
    sample: EditSample,
    target: Target,
    source: Picture,
}

pub struct Editor {
    config: EditorConfig,
    group: GroupConfig,
    seed: u64,
    /// With the frozen transformer, the reference.
    klein: Arc<Klein>,
    decode: Decode,
    critic: Critic,
    policy: Flux2,
    adapter: Adapter,
    /// DiffusionNFT's old policy, and the updates so far.
    old: Option<(Flux2, Adapter)>,
    updates: usize,
    held_out: Vec<Problem>,
}

impl Editor {
    pub fn new(config: &GrpoConfig, device: &Device) -> Result<Self> {
        let GrpoConfig { editor, group, seed, .. } = config;
        group.check(&["preserve", "oracle"])?;
        editor.policy.check()?;
        if editor.min_objects == 0 || editor.min_objects > editor.max_objects {
            usage!("[editor] objects are from 1 on and in order");
        }
        if editor.loss == LossKind::DiffusionNft {
            if editor.window == 0 || editor.window > editor.steps || editor.beta <= 0.0 {
                usage!("[editor] with diffusion-nft, window is 1 to steps, and beta is positive");
            }
        } else {
            window(*seed, 0, editor.steps, editor.window)?;
            if editor.policy.noise == 0.0 {
                usage!("[editor] policy.noise is 0: the members of a group would all be the same");
            }
        }
        let (critic, _) = rollout::vlm(&config.models.vlm()?, device, None)?;
        let adapters = [config.adapter.fresh(TARGETS, *seed)?, config.adapter.fresh(TARGETS, *seed)?];
        let (klein, transformers) =
            rollout::pipeline(&config.models.pipeline()?, device, &adapters.iter().collect::<Vec<_>>())?;
        let mut both = transformers.into_iter().zip(adapters);
        let (policy, adapter) = both.next().context("the Editor has an adapter")?;
        Ok(Self {
            config: editor.clone(),
            group: group.clone(),
            seed: *seed,
            decode: rollout::decoder(&klein),
            klein,
            critic,
            policy,
            adapter,
            old: both.next().filter(|_| editor.loss == LossKind::DiffusionNft),
            updates: 0,
            held_out: Vec::new(),
        })
    }

    fn problems(&self, split: Split, seed: u64, indices: impl Iterator<Item = u64>) -> Result<Vec<Problem>> {
        let EditorConfig { min_objects, max_objects, .. } = self.config;
        indices
            .map(|index| {
                let mut samples = (0..).map(|k| tasks::edit(seed, split, index << 8 | k, min_objects, max_objects));
                let sample = samples.find(|s| s.kind != Kind::Remove).context("there are edits of all kinds")?;
                let source = through_latents(&self.klein, &self.decode, &render(&sample.source))?;
                Ok(Problem { target: Target::new(sample.after.triple_text(), &sample.after), source, sample })
            })
            .collect()
    }

    /// The velocity field of `size` edits of each problem by `transformer`.
    fn field<'a>(&'a self, transformer: &'a Flux2, problems: &[Problem], size: usize) -> Result<Field<'a>> {
        let each = |r: usize| &problems[r / size];
        let rows = 0..problems.len() * size;
        let prompts: Vec<&str> = rows.clone().map(|r| each(r).sample.instruction.as_str()).collect();
        let references: Vec<Vec<Tensor>> =
            rows.map(|r| each(r).source.latents().cloned().into_iter().collect()).collect();
        self.klein.field_of(transformer, &prompts, &references, self.shape(problems)?, self.config.guidance)
    }

    /// The size of the pictures in tokens.
    fn shape(&self, problems: &[Problem]) -> Result<(usize, usize)> {
        let latents = problems.first().and_then(|p| p.source.latents()).context("nothing to edit")?;
        let (_, h, w) = latents.dims3()?;
        Ok((h, w))
    }

    /// Pictures of final states `(B, h w, C)`.
    fn pictures(&self, states: &Tensor, (h, w): (usize, usize)) -> Result<Vec<Picture>> {
        let picture = |r: usize| Ok(Picture::from_latents(unpack(&states.get(r)?, h, w)?, self.decode.clone()));
        let pictures: Vec<Picture> = (0..states.dim(0)?).map(picture).collect::<Result<_>>()?;
        Picture::develop(&pictures.iter().collect::<Vec<_>>())?;
        Ok(pictures)
    }

    /// The Checker's answers on the rollouts' pictures, and all that they are worth.
    fn judge(&self, problems: &[Problem], pictures: &[Picture]) -> Result<Judged> {
        let size = self.group.size;
        let target = |r: usize| &problems[r / size].target;
        let sources: Vec<(&Picture, &Target)> = problems.iter().map(|p| (&p.source, &p.target)).collect();
        let before = self.critic.check(&sources)?;
        let asked: Vec<(&Picture, &Target)> = pictures.iter().enumerate().map(|(r, p)| (p, target(r))).collect();
        let after = self.critic.check(&asked)?;
        let before: Vec<&[Verdict]> = before.iter().map(Vec::as_slice).collect();
        let mut rewards: Vec<Reward> = rollout::by_verdicts(&self.group, &before, &after)?;
        if self.group.asks("preserve") {
            let kept =
                |(r, picture): (usize, &Picture)| Ok(preserved(problems[r / size].source.pixels()?, picture.pixels()?));
            rewards.push(("preserve".to_owned(), pictures.iter().enumerate().map(kept).collect::<Result<_>>()?));
        }
        if self.group.asks("oracle") {
            let right = |(r, picture): (usize, &Picture)| {
                Ok(oracle::judge(picture.pixels()?, &problems[r / size].sample.after).score())
            };
            rewards.push(("oracle".to_owned(), pictures.par_iter().enumerate().map(right).collect::<Result<_>>()?));
        }
        judge(&self.group, &rewards)
    }

    /// Rollouts along stochastic steps, and the loss over these steps.
    fn by_steps(&self, batch: &Batch, problems: &[Problem]) -> Result<Step> {
        let EditorConfig { policy, steps, window: width, .. } = self.config;
        let (size, shape) = (self.group.size, self.shape(problems)?);
        let field = self.field(&self.policy, problems, size)?;
        let x = self.noise(batch, shape)?;
        let sigmas = self.klein.schedule.sigmas(steps, shape.0 * shape.1);
        let window = window(self.seed, batch.step, steps, width)?;
        let first = batch.indices().start * size as u64;
        let fresh = |step: usize| {
            let numbers = x.elem_count() / x.dim(0)?;
            let row = |r: u64| Stream::new(self.seed, &format!("editor step {step}"), first + r).normals(numbers);
            let all: Vec<f32> = (0..x.dim(0)? as u64).flat_map(row).collect();
            Tensor::from_vec(all, x.dims(), x.device())
        };
        let (states, taken) = rollout(&field, &x, &sigmas, policy, window, fresh)?;
        ensure!(!taken.is_empty(), "no step of the window is stochastic");
        let pictures = self.pictures(&states, shape)?;
        let judged = self.judge(problems, &pictures)?;
        let advantages = Tensor::new(judged.advantages.as_slice(), x.device())?;
        let reference = match self.config.kl {
            0.0 => None,
            _ => Some(self.field(&self.klein.transformer, problems, size)?),
        };
        let (mut total, mut sums) = (None, Sums::default());
        for taken in &taken {
            let loss = self.step_loss(&field, reference.as_ref(), taken, &advantages, &mut sums)?;
            total = Some(match total {
                Some(total) => (total + loss)?,
                None => loss,
            });
        }
        let n = taken.len() as f64;
        let loss = (total.context("a window has a step")? / n)?;
        let mut metrics = judged.metrics;
        let more = [
            ("kl", sums.kl / n),
            ("clip_ratio/low_mean", sums.clip_low / n),
            ("clip_ratio/high_mean", sums.clip_high / n),
            ("ratio_off", sums.off),
        ];
        metrics.extend(more.map(|(name, value)| (name.to_owned(), value)));
        Ok(Step { loss, metrics })
    }

    /// The loss of one stochastic step, evaluated again with gradients.
    fn step_loss(
        &self,
        field: &Field,
        reference: Option<&Field>,
        taken: &Taken,
        advantages: &Tensor,
        sums: &mut Sums,
    ) -> Result<Tensor> {
        let Taken { index, step, x, next, log_prob, .. } = taken;
        let EditorConfig { loss: kind, eps, kl, kl_form, .. } = self.config;
        let v = field.velocity(x, step.sigma, *index)?;
        let mean = step.mean(x, &v)?;
        let new = step.log_prob(&mean, next)?; // (B)
        sums.off = sums.off.max(check_ratio(&new, log_prob, &log_prob.ones_like()?, FLOW_RATIO)?);
        let old = new.detach();
        let found = match kind {
            LossKind::GrpoGuard => {
                guard_loss((&new, &old), (&mean, &mean.detach()), (step.std, -step.d), advantages, eps)?
            }
            _ => flow_loss(&new, &old, advantages, eps)?,
        };
        let grpo::Loss { mut loss, clip_low, clip_high, .. } = found;
        if let Some(reference) = reference {
            let divergence = velocity_kl(&v, &reference.velocity(x, step.sigma, *index)?, step.kl_weight(kl_form))?;
            sums.kl += f64::from(divergence.to_scalar::<f32>()?);
            loss = (loss + (divergence * kl)?)?;
        }
        (sums.clip_low, sums.clip_high) = (sums.clip_low + clip_low, sums.clip_high + clip_high);
        Ok(loss)
    }

    /// Rollouts of the old policy by Euler's rule, and DiffusionNFT's loss at a few noise levels.
    fn by_pictures(&self, batch: &Batch, problems: &[Problem], old: &Flux2) -> Result<Step> {
        let EditorConfig { steps, window: levels, beta, kl, .. } = self.config;
        let (size, shape) = (self.group.size, self.shape(problems)?);
        let old = self.field(old, problems, size)?;
        let sigmas = self.klein.schedule.sigmas(steps, shape.0 * shape.1);
        let x0 = euler(&old, &self.noise(batch, shape)?, &sigmas)?;
        let judged = self.judge(problems, &self.pictures(&x0, shape)?)?;
        let advantages = Tensor::new(judged.advantages.as_slice(), x0.device())?;
        let field = self.field(&self.policy, problems, size)?;
        let reference = self.field(&self.klein.transformer, problems, size)?;
        let mut order: Vec<usize> = (0..steps).collect();
        Stream::new(self.seed, "editor levels", batch.step).shuffle(&mut order);
        let (mut total, mut divergences) = (None, 0.0);
        for (k, index) in order.into_iter().take(levels).enumerate() {
            let t = sigmas[index];
            let first = batch.indices().start * size as u64;
            let row = |r: u64| {
                let mut stream = Stream::new(self.seed, &format!("editor level {k}"), first + r);
                stream.normals(x0.elem_count() / advantages.elem_count())
            };
            let noise: Vec<f32> = (0..advantages.elem_count() as u64).flat_map(row).collect();
            let noise = Tensor::from_vec(noise, x0.dims(), x0.device())?;
            let x_t = ((&x0 * (1.0 - t))? + (noise * t)?)?;
            let v = field.velocity(&x_t, t, index)?;
            let mirror = old.velocity(&x_t, t, index)?;
            let levels_of = Tensor::full(t as f32, advantages.dims(), x0.device())?;
            let pair = NftBatch { v: &v, old: &mirror, x_t: &x_t, x0: &x0, t: &levels_of, advantages: &advantages };
            let mut loss = nft_loss(&pair, beta)?;
            if kl != 0.0 {
                let divergence = velocity_kl(&v, &reference.velocity(&x_t, t, index)?, 1.0)?;
                divergences += f64::from(divergence.to_scalar::<f32>()?);
                loss = (loss + (divergence * kl)?)?;
            }
            total = Some(match total {
                Some(total) => (total + loss)?,
                None => loss,
            });
        }
        let mut metrics = judged.metrics;
        metrics.push(("kl".to_owned(), divergences / levels as f64));
        Ok(Step { loss: (total.context("at least one level")? / levels as f64)?, metrics })
    }

    /// What the rollouts of a batch begin with, `(B, h w, C)`.
    fn noise(&self, batch: &Batch, shape: (usize, usize)) -> Result<Tensor> {
        let size = self.group.size as u64;
        let shared = self.config.shared_noise && self.config.loss != LossKind::DiffusionNft;
        let row = |r: u64| pack(&self.klein.noise(self.seed, if shared { r / size * size } else { r }, shape)?);
        let indices = batch.indices();
        let rows = (indices.start * size..indices.end * size).map(row);
        Ok(Tensor::stack(&rows.collect::<candle_core::Result<Vec<_>>>()?, 0)?)
    }

    /// The first held-out problems' edits, without stochastic steps.
    fn held_out(&mut self, count: usize) -> Result<Vec<Picture>> {
        if self.held_out.is_empty() {
            self.held_out = self.problems(Split::Val, HELD_OUT, 0..self.config.evaluation as u64)?;
        }
        let problems = &self.held_out[..count.min(self.held_out.len())];
        let mut pictures = Vec::with_capacity(problems.len());
        for (first, some) in (0..).step_by(TOGETHER).zip(problems.chunks(TOGETHER)) {
            let shape = self.shape(some)?;
            let sigmas = self.klein.schedule.sigmas(self.config.evaluation_steps, shape.0 * shape.1);
            let rows = (first..first + some.len() as u64).map(|i| pack(&self.klein.noise(HELD_OUT, i, shape)?));
            let noise = Tensor::stack(&rows.collect::<candle_core::Result<Vec<_>>>()?, 0)?;
            let states = euler(&self.field(&self.policy, some, 1)?, &noise, &sigmas)?;
            pictures.extend(self.pictures(&states, shape)?);
        }
        Ok(pictures)
    }
}

/// What is logged of the steps of a window.
#[derive(Default)]
struct Sums {
    kl: f64,
    clip_low: f64,
    clip_high: f64,
    off: f64,
}

/// How well an edit left alone what it could: 1 where the half of the pixels that changed least did not change at all,
/// `1/e` where they changed by 8 of 255 on the average.
fn preserved(before: &RgbImage, after: &RgbImage) -> f64 {
    let change = |(a, b): (&[u8], &[u8])| a.iter().zip(b).map(|(a, b)| u32::from(a.abs_diff(*b))).sum::<u32>();
    let mut changes: Vec<u32> =
        before.as_raw().chunks_exact(3).zip(after.as_raw().chunks_exact(3)).map(change).collect();
    changes.sort_unstable();
    let half = &changes[..changes.len() / 2];
    let mean = half.iter().map(|c| f64::from(*c) / 3.0).sum::<f64>() / half.len().max(1) as f64;
    (-mean / 8.0).exp()
}

impl Objective for Editor {
    fn vars(&self) -> BTreeMap<String, Var> {
        self.adapter.vars()
    }

    fn loss(&self, batch: &Batch) -> Result<Step> {
        let problems = self.problems(Split::Train, self.seed, batch.indices())?;
        match &self.old {
            None => self.by_steps(batch, &problems),
            Some((old, _)) => self.by_pictures(batch, &problems, old),
        }
    }

    /// The old policy follows.
    fn observe(&mut self, _: &Metrics) {
        let Some((_, old)) = &self.old else { return };
        let keep = nft_decay(self.updates);
        let new = self.adapter.vars();
        for (name, var) in old.vars() {
            let blend = |new: &Var| var.set(&((var.as_tensor() * keep)? + (new.as_tensor() * (1.0 - keep))?)?.detach());
            if let Some(Err(error)) = new.get(&name).map(blend) {
                tracing::error!("the old policy does not follow: {error}");
            }
        }
        self.updates += 1;
    }

    fn evaluate(&mut self, _: u64) -> Result<Metrics> {
        let pictures = self.held_out(self.config.evaluation)?;
        let asked: Vec<(&Picture, &Target)> =
            pictures.iter().zip(&self.held_out).map(|(p, h)| (p, &h.target)).collect();
        let verdicts = self.critic.check(&asked)?;
        let judged = pictures.par_iter().zip(&self.held_out).map(|(picture, problem)| {
            let kept = preserved(problem.source.pixels()?, picture.pixels()?);
            Ok((oracle::judge(picture.pixels()?, &problem.sample.after), kept))
        });
        let judged: Vec<_> = judged.collect::<Result<_>>()?;
        let n = pictures.len().max(1) as f64;
        let mean = |values: &mut dyn Iterator<Item = f64>| values.sum::<f64>() / n;
        let named = [
            ("eval/oracle", mean(&mut judged.iter().map(|(judged, _)| judged.score()))),
            ("eval/perfect", mean(&mut judged.iter().map(|(judged, _)| f64::from(u8::from(judged.perfect()))))),
            ("eval/preserve", mean(&mut judged.iter().map(|(_, kept)| *kept))),
            ("eval/checker", mean(&mut verdicts.iter().filter_map(|v| score(v)))),
        ];
        Ok(named.map(|(name, value)| (name.to_owned(), value)).into())
    }

    /// Pictures before and after the edits, side by side, with the instructions.
    fn samples(&mut self, _: u64, folder: &Path) -> Result<()> {
        let edited = self.held_out(SHOWN)?;
        let (mut pictures, mut words) = (Vec::new(), String::new());
        for (problem, picture) in self.held_out.iter().zip(&edited) {
            pictures.extend([problem.source.pixels()?.clone(), picture.pixels()?.clone()]);
            words += &format!("{}\n", problem.sample.instruction);
        }
        tiled(&pictures, 8).save(folder.join("edits.png"))?;
        Ok(fs::write(folder.join("edits.txt"), words)?)
    }

    fn save(&self, folder: &Path, dtype: DType) -> Result<()> {
        peft::write(&self.adapter, folder, dtype)
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

#[cfg(test)]
mod tests {
    use super::*;
    use image::Rgb;

    #[test]
    fn an_edit_may_change_half_of_the_picture() {
        let before = RgbImage::from_pixel(8, 8, Rgb([100; 3]));
        let half = RgbImage::from_fn(8, 8, |x, _| Rgb([if x < 4 { 0 } else { 100 }; 3]));
        let all = RgbImage::from_pixel(8, 8, Rgb([108; 3]));
        assert_eq!((preserved(&before, &before), preserved(&before, &half)), (1.0, 1.0));
        assert!((preserved(&before, &all) - (-1f64).exp()).abs() < 1e-12);
    }
}
