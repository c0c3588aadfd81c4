//! The Editor's stochastic steps: taken once, and evaluated again with gradients at every update.

use super::{
    Metrics, Step,
    editor::{EditorConfig, LossKind},
    grpo::{self, flow_loss, guard_loss, velocity_kl},
    rollout::{check_ratio, expect_finite, flow_ratio},
};
use crate::{
    flow::{
        Field, Guidance, Klein,
        policy::{Taken, rollout, spread, window},
        sampler::Velocity,
    },
    models::flux2::Flux2,
    tensor::rng::Stream,
};
use anyhow::{Context, Result, ensure};
use candle_core::{DType, Tensor};
use std::{ops::Range, sync::Arc};

/// Edits to carry out: an instruction and the latents `(C, h, w)` of the picture it is about, for each row; or, without
/// sources, prompts to draw.
pub struct Edits {
    pub instructions: Vec<String>,
    /// All or none.
    pub sources: Vec<Option<Tensor>>,
    /// Of the pictures in tokens, `(h, w)`.
    pub size: (usize, usize),
}

impl Edits {
    /// Those of `heads`, of which each stands for `each` rows that are alike.
    fn of(&self, heads: Range<usize>, each: usize) -> Self {
        let rows = || heads.clone().map(|head| head * each);
        Self {
            instructions: rows().map(|row| self.instructions[row].clone()).collect(),
            sources: rows().map(|row| self.sources[row].clone()).collect(),
            size: self.size,
        }
    }

    /// The velocity field of these edits by `transformer`.
    pub fn field<'a>(&self, klein: &'a Klein, transformer: &'a Flux2, guidance: Guidance) -> Result<Field<'a>> {
        let prompts: Vec<&str> = self.instructions.iter().map(String::as_str).collect();
        let references: Vec<Vec<Tensor>> = self.sources.iter().map(|source| source.iter().cloned().collect()).collect();
        klein.field_of(transformer, &prompts, &references, self.size, guidance)
    }
}

/// Edits carried out by stochastic steps: the final states `(B, h w, C)` and the steps of the window.
pub struct Carried {
    pub edits: Edits,
    pub states: Tensor,
    pub taken: Vec<Taken>,
}

/// The transformers of a policy: with gradients, and the same without.
pub struct Learned {
    pub policy: Arc<Flux2>,
    pub still: Arc<Flux2>,
}

/// Carries edits out from `noise (B, h w, C)`, with stochastic steps in `window`. The fresh noise of row `r` is that of
/// `numbers[r]` in streams of `purpose`.
///
/// Where `noise` is `(B / n, h w, C)`, `n` rows each are the same edit from one noise. They part only in the window's
/// first step, and up to its velocity they are evaluated as one.
pub fn carry_out(
    config: &EditorConfig,
    (klein, transformer): (&Klein, &Flux2),
    edits: Edits,
    noise: &Tensor,
    window: Range<usize>,
    (seed, purpose, numbers): (u64, &str, &[u64]),
) -> Result<Carried> {
    let (h, w) = edits.size;
    let (heads, tokens, channels) = noise.dims3()?;
    let sigmas = klein.schedule.sigmas(config.steps, h * w);
    let fresh = |step: usize| {
        let stream = |number: &u64| Stream::new(seed, &format!("{purpose} step {step}"), *number);
        let all: Vec<f32> = numbers.iter().flat_map(|number| stream(number).normals(tokens * channels)).collect();
        Tensor::from_vec(all, (numbers.len(), tokens, channels), noise.device())
    };
    let width = window.len();
    let of = |edits: &Edits| edits.field(klein, transformer, config.edit_guidance());
    let (as_one, apart) = (of(&edits.of(0..heads, numbers.len() / heads))?, of(&edits)?);
    let field = |x: &Tensor, sigma: f64, step: usize| {
        let field = if x.dim(0)? == heads { &as_one } else { &apart };
        field.velocity(x, sigma, step)
    };
    let (states, taken) = rollout(&field, noise, &sigmas, config.policy, window, fresh)?;
    ensure!(taken.len() == width, "not every step of the window is stochastic");
    expect_finite(&states)?;
    Ok(Carried { edits, states, taken })
}

/// The window of a step's updates, which all its rollouts share.
pub fn window_of(config: &EditorConfig, seed: u64, step: u64) -> Result<Range<usize>> {
    window(seed, step, config.steps, config.window)
}

/// How the loss over a window is cut into pieces: step by step, and so many rows at once.
#[derive(Clone, Copy, Debug)]
pub struct Pieces {
    pub window: usize,
    /// At most so many rows of `all`.
    pub rows: usize,
    pub all: usize,
}

impl Pieces {
    pub fn count(&self) -> usize {
        self.window * self.all.div_ceil(self.rows).max(1)
    }

    /// Which step of the window a piece is about.
    fn step(&self, piece: usize) -> usize {
        piece % self.window
    }

    /// The rows of a piece; of `all` rows a turn, a micro-batch or the window's first step may have less.
    fn of(&self, piece: usize, all: usize) -> Range<usize> {
        let start = (piece / self.window * self.rows).min(all);
        start..(start + self.rows).min(all)
    }
}

impl Carried {
    /// The velocity in step `taken` at the states `heads`, and the policy's mean and log-probability there, for each of
    /// the rows that come of them.
    fn evaluate(
        &self,
        taken: &Taken,
        heads: &Range<usize>,
        (klein, policy, still): (&Klein, &Flux2, &Flux2),
        guidance: Guidance,
    ) -> Result<(Tensor, Tensor, Tensor)> {
        let (Taken { index, step, x, next, .. }, each) = (taken, taken.each()?);
        let x = x.narrow(0, heads.start, heads.len())?;
        let next = next.narrow(0, heads.start * each, heads.len() * each)?;
        let field = self.edits.of(heads.clone(), each).field(klein, policy, guidance)?.apart(still);
        let v = field.velocity(&x, step.sigma, *index)?;
        let mean = spread(&step.mean(&x, &v)?, next.dim(0)?)?;
        let log_prob = step.log_prob(&mean, &next)?;
        Ok((spread(&v, next.dim(0)?)?, mean, log_prob))
    }

    /// Takes means and log-probabilities anew in the shapes of the updates, where these are others or where the model computes
    /// below f32: there they differ from those of the rollout by as much as a clip range. Call before the first update.
    pub fn reread(&mut self, (klein, still): (&Klein, &Flux2), pieces: Pieces, guidance: Guidance) -> Result<()> {
        for i in 0..self.taken.len() {
            let all = self.taken[i].x.dim(0)?;
            if klein.dtype() == DType::F32 && pieces.rows >= all {
                continue;
            }
            let (mut means, mut log_probs) = (Vec::new(), Vec::new());
            for start in (0..all).step_by(pieces.rows.min(all)) {
                let heads = start..(start + pieces.rows.min(all)).min(all);
                let (_, mean, log_prob) = self.evaluate(&self.taken[i], &heads, (klein, still, still), guidance)?;
                means.push(mean);
                log_probs.push(log_prob);
            }
            let (mean, log_prob) = (Tensor::cat(&means, 0)?, Tensor::cat(&log_probs, 0)?);
            let drawn = &self.taken[i].log_prob;
            check_ratio(&log_prob, drawn, &drawn.ones_like()?, flow_ratio(klein, true))?;
            (self.taken[i].mean, self.taken[i].log_prob) = (mean, log_prob);
        }
        Ok(())
    }

    /// A piece of the mean over the window's stochastic steps of each one's loss, evaluated again with gradients;
    /// `advantages` and `counts (B)`, of which the latter is 0 where a reward is missing. Before the first update the policy is
    /// the one that drew, and held to it.
    pub fn loss(
        &self,
        config: &EditorConfig,
        (klein, learned): (&Klein, &Learned),
        (pieces, piece): (Pieces, usize),
        (advantages, counts): (&Tensor, &Tensor),
        first_update: bool,
    ) -> Result<Step> {
        let taken = self.taken.get(pieces.step(piece)).context("no such step in the window")?;
        let (all, each) = (taken.x.dim(0)?, taken.each()?);
        let heads = pieces.of(piece, all);
        if heads.is_empty() {
            return Ok(Step { loss: advantages.zeros_like()?.sum_all()?, metrics: Metrics::new() });
        }
        let some = |tensor: &Tensor| tensor.narrow(0, heads.start * each, heads.len() * each);
        let EditorConfig { loss: kind, kl, kl_form, .. } = *config;
        let (eps, guidance) = (config.clip(), config.edit_guidance());
        let (v, mean, new) = self.evaluate(taken, &heads, (klein, &learned.policy, &learned.still), guidance)?;
        let (step, advantages, counts) = (&taken.step, some(advantages)?, some(counts)?);
        let (mut old_mean, mut old) = (some(&taken.mean)?, some(&taken.log_prob)?);
        let mut metrics = Metrics::new();
        if first_update {
            let off = check_ratio(&new, &old, &old.ones_like()?, flow_ratio(klein, heads.len() < all))?;
            metrics.push(("ratio_off".to_owned(), off));
            (old_mean, old) = (mean.detach(), new.detach());
        }
        let found = match kind {
            LossKind::GrpoGuard => guard_loss((&new, &old), (&mean, &old_mean), (step.std, -step.d), &advantages, eps)?,
            _ => flow_loss(&new, &old, &advantages, eps)?,
        };
        let grpo::Loss { mut loss, clip_low, clip_high, .. } = found;
        let mut divergence = 0.0;
        if kl != 0.0 {
            let frozen = &klein.transformer;
            let (reference, ..) = self.evaluate(taken, &heads, (klein, frozen, frozen), guidance)?;
            let kept = velocity_kl(&v, &reference, &counts, step.kl_weight(kl_form))?;
            divergence = f64::from(kept.to_scalar::<f32>()?);
            loss = (loss + (kept * kl)?)?;
        }
        let share = heads.len() as f64 / (all * self.taken.len()) as f64;
        // What is logged is the mean over the pieces, which are not of one size.
        let pieces_of = |taken: &Taken| Ok(taken.x.dim(0)?.div_ceil(pieces.rows));
        let weight = share * self.taken.iter().map(pieces_of).sum::<Result<usize>>()? as f64;
        let more = [("kl", divergence), ("clip_ratio/low_mean", clip_low), ("clip_ratio/high_mean", clip_high)];
        metrics.extend(more.map(|(name, value)| (name.to_owned(), weight * value)));
        Ok(Step { loss: (loss * share)?, metrics })
    }
}

#[cfg(test)]
mod tests {
    use super::{
        super::{
            editor::TARGETS,
            means::Means,
            optim::{self, Gradients, OptimConfig, Optimizer},
            rollout::editors,
        },
        *,
    };
    use crate::models::{Adapter, built_in};
    use candle_core::{Device, Var};
    use std::collections::BTreeMap;

    #[test]
    fn pieces_cover_every_row_of_every_step_once() {
        let pieces = Pieces { window: 2, rows: 3, all: 8 };
        assert_eq!(pieces.count(), 6);
        for all in [8, 5, 1] {
            let mut seen = vec![0; 2 * all];
            for piece in 0..pieces.count() {
                pieces.of(piece, all).for_each(|row| seen[pieces.step(piece) * all + row] += 1);
            }
            assert!(seen.iter().all(|n| *n == 1), "{seen:?}");
        }
        assert_eq!(Pieces { window: 2, rows: usize::MAX, all: 8 }.count(), 2);
    }

    type Policies = (Arc<Klein>, Learned, BTreeMap<String, Var>);

    /// The shipped pipeline, an adapter on its transformer that is not nothing, and its variables.
    fn policies(dtype: DType) -> Result<Policies> {
        let targets: Vec<String> = TARGETS.iter().map(|target| (*target).to_owned()).collect();
        let adapter = || Ok(Some(Adapter::fresh(4, 8.0, targets.clone(), 0)));
        let (klein, mut both, _) = editors(&built_in::tabletop(), (dtype, &Device::Cpu), adapter, 1, None)?;
        let (learned, trained) = both.pop().context("an Editor")?;
        let vars = trained.vars();
        // It is not its reference, and all of it has a gradient.
        for var in vars.values() {
            var.set(&(var.as_tensor() + 0.01)?.detach())?;
        }
        Ok((klein, learned, vars))
    }

    fn normal(name: &str, number: u64, shape: &[usize]) -> candle_core::Result<Tensor> {
        Stream::new(0, name, number).normal(shape, &Device::Cpu)
    }

    /// Two groups of three, of pictures of `side` x `side` tokens.
    fn edits(klein: &Klein, side: usize) -> Result<Edits> {
        let channels = klein.transformer.config().in_channels;
        let source = |row: u64| normal("source", row / 3, &[channels, side, side]).map(Some);
        let words = |row: usize| ["make the red ball blue", "remove the cube"][row / 3].to_owned();
        Ok(Edits {
            instructions: (0..6).map(words).collect(),
            sources: (0..6).map(source).collect::<candle_core::Result<_>>()?,
            size: (side, side),
        })
    }

    /// Their rollouts bit for bit, losses and gradients to rounding.
    #[test]
    fn groups_that_begin_as_one_come_to_the_same_as_apart() -> Result<()> {
        let (klein, learned, vars) = policies(DType::F32)?;
        let channels = klein.transformer.config().in_channels;
        let advantages = Tensor::new(&[1f32, -0.5, 0.25, 2.0, 0.0, 0.5], &Device::Cpu)?;
        let counts = Tensor::new(&[1f32, 1.0, 1.0, 1.0, 0.0, 1.0], &Device::Cpu)?;
        // Not fewer tokens: of small matrices gemm sums the products in another order.
        let noise = normal("noise", 0, &[2, 64, channels])?;
        for kind in [LossKind::Grpo, LossKind::GrpoGuard] {
            let config = EditorConfig { loss: kind, kl: 0.1, steps: 6, guidance: 2.0, ..EditorConfig::default() };
            // The rollouts and their evaluations, the loss, what is logged, and all gradients.
            let run = |noise: &Tensor| -> Result<(Carried, u64, f64, Metrics, Tensor)> {
                let before = klein.evaluations();
                let models = (&*klein, &*learned.still);
                let carried =
                    carry_out(&config, models, edits(&klein, 8)?, noise, 1..3, (0, "test", &[0, 1, 2, 3, 4, 5]))?;
                let evaluations = klein.evaluations() - before;
                let (pieces, worth) = (Pieces { window: 2, rows: 2, all: 6 }, (&advantages, &counts));
                let (mut loss, mut means, mut gradients) = (0.0, Means::default(), Gradients::new());
                for piece in 0..pieces.count() {
                    let step = carried.loss(&config, (&klein, &learned), (pieces, piece), worth, true)?;
                    loss += f64::from(step.loss.to_scalar::<f32>()?);
                    step.metrics.into_iter().for_each(|metric| means.add(metric, 1.0));
                    optim::add(&mut gradients, optim::named(&vars, step.loss.backward()?))?;
                }
                assert_eq!(gradients.len(), vars.len());
                let flat = gradients.values().map(Tensor::flatten_all).collect::<candle_core::Result<Vec<_>>>()?;
                Ok((carried, evaluations, loss, means.metrics(), Tensor::cat(&flat, 0)?))
            };
            let (one, few, loss, logged, gradients) = run(&noise)?;
            let (other, many, wanted, wanted_logged, wanted_gradients) = run(&spread(&noise, 6)?)?;
            // Both branches of guidance, of two heads in two steps and of six rows in four.
            assert_eq!((few, many), (2 * (2 * 2 + 4 * 6), 2 * 6 * 6));
            let off = |a: &Tensor, b: &Tensor| -> Result<f64> {
                Ok(f64::from((a - b)?.sqr()?.sum_all()?.sqrt()?.to_scalar::<f32>()?))
            };
            assert_eq!(off(&one.states, &other.states)?, 0.0);
            for (a, b) in one.taken.iter().zip(&other.taken) {
                assert_eq!((off(&a.mean, &b.mean)?, off(&a.log_prob, &b.log_prob)?), (0.0, 0.0));
            }
            let near = |a: f64, b: f64| (a - b).abs() <= 1e-5 * b.abs();
            assert!(near(loss, wanted) && wanted != 0.0, "{loss} {wanted}");
            let kl = |logged: &Metrics| logged.iter().find(|(name, _)| name == "kl").map_or(f64::NAN, |(_, kl)| *kl);
            assert!(near(kl(&logged), kl(&wanted_logged)) && kl(&logged) > 0.0, "{logged:?} {wanted_logged:?}");
            let length = off(&wanted_gradients, &wanted_gradients.zeros_like()?)?;
            assert!(off(&gradients, &wanted_gradients)? <= 1e-5 * length && length > 0.0);
        }
        Ok(())
    }

    /// The edits carried out on small pictures.
    fn carried(config: &EditorConfig, klein: &Klein, learned: &Learned) -> Result<Carried> {
        let noise = normal("noise", 0, &[2, 16, klein.transformer.config().in_channels])?;
        carry_out(config, (klein, &learned.still), edits(klein, 4)?, &noise, 1..3, (0, "test", &[0, 1, 2, 3, 4, 5]))
    }

    #[test]
    fn an_update_makes_steps_likelier_by_their_advantage() -> Result<()> {
        let worth = [1f32, -1.0, 0.5, -0.5, 1.0, -1.0];
        let (advantages, counts) = (Tensor::new(&worth, &Device::Cpu)?, Tensor::new(&[1f32; 6], &Device::Cpu)?);
        for kind in [LossKind::Grpo, LossKind::GrpoGuard] {
            let (klein, learned, vars) = policies(DType::F32)?;
            let config = EditorConfig { loss: kind, steps: 6, guidance: 2.0, ..EditorConfig::default() };
            let carried = carried(&config, &klein, &learned)?;
            let log_probs = || -> Result<Vec<f32>> {
                let of = |taken: &Taken| -> Result<Tensor> {
                    let heads = 0..taken.x.dim(0)?;
                    Ok(carried
                        .evaluate(taken, &heads, (&klein, &learned.still, &learned.still), config.edit_guidance())?
                        .2)
                };
                let all = carried.taken.iter().map(of).collect::<Result<Vec<_>>>()?;
                Ok(Tensor::stack(&all, 0)?.sum(0)?.to_vec1()?)
            };
            let (pieces, mut gradients) = (Pieces { window: 2, rows: 6, all: 6 }, Gradients::new());
            for piece in 0..pieces.count() {
                let models = (&*klein, &learned);
                let step = carried.loss(&config, models, (pieces, piece), (&advantages, &counts), true)?;
                optim::add(&mut gradients, optim::named(&vars, step.loss.backward()?))?;
            }
            let before = log_probs()?;
            let optimizer = OptimConfig { muon: false, lr: 1e-4, eps: 1e-12, ..OptimConfig::default() };
            Optimizer::new(&optimizer, &vars, optim::default_group)?.step(&gradients, 1.0)?;
            let gained: f32 =
                log_probs()?.iter().zip(before).zip(worth).map(|((after, b), worth)| worth * (after - b)).sum();
            assert!(gained > 0.0, "{kind:?}: {gained}");
        }
        Ok(())
    }

    #[test]
    fn a_policy_that_has_come_apart_is_named() -> Result<()> {
        let (klein, learned, vars) = policies(DType::F32)?;
        vars.values().try_for_each(|var| var.set(&(var.ones_like()? * 1e30)?))?;
        let config = EditorConfig { steps: 6, guidance: 2.0, ..EditorConfig::default() };
        assert!(
            carried(&config, &klein, &learned)
                .err()
                .is_some_and(|error| error.to_string().contains("the policy draws is not finite"))
        );
        Ok(())
    }

    /// Below f32, too, where the bound is wide.
    #[test]
    fn steps_that_are_not_the_policys_own_are_refused() -> Result<()> {
        let (advantages, counts) = (Tensor::new(&[1f32; 6], &Device::Cpu)?, Tensor::new(&[1f32; 6], &Device::Cpu)?);
        for dtype in [DType::F32, DType::BF16] {
            let (klein, learned, _) = policies(dtype)?;
            let config = EditorConfig { steps: 6, guidance: 2.0, ..EditorConfig::default() };
            let mut carried = carried(&config, &klein, &learned)?;
            let pieces = Pieces { window: 2, rows: 6, all: 6 };
            let loss = |carried: &Carried| {
                carried.loss(&config, (&klein, &learned), (pieces, 0), (&advantages, &counts), true).map(|_| ())
            };
            loss(&carried)?;
            carried.edits.sources.reverse();
            carried.edits.instructions.reverse();
            let error = loss(&carried).expect_err("other pictures' steps").to_string();
            assert!(error.contains("must be 1, but it is off by"), "{dtype:?}: {error}");
            let models = (&*klein, &*learned.still);
            let error =
                carried.reread(models, Pieces { rows: 1, ..pieces }, config.edit_guidance()).expect_err("the same");
            assert!(error.to_string().contains("must be 1, but it is off by"), "{dtype:?}: {error}");
        }
        Ok(())
    }
}
