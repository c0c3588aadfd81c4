//! The Editor's stochastic steps: taken once, and evaluated again with gradients at every update.

use super::{
    Metrics, Step,
    editor::{EditorConfig, LossKind},
    grpo::{self, flow_loss, guard_loss, velocity_kl},
    rollout::{COARSE_RATIO, check_ratio, flow_ratio},
};
use crate::{
    flow::{
        Field, Klein,
        policy::{Taken, rollout, window},
        sampler::Velocity,
    },
    models::flux2::Flux2,
    tensor::rng::Stream,
};
use anyhow::{Context, Result, ensure};
use candle_core::{DType, Tensor};
use std::{ops::Range, sync::Arc};

/// Edits to carry out: an instruction and the latents `(C, h, w)` of the picture it is about, for each row.
pub struct Edits {
    pub instructions: Vec<String>,
    pub sources: Vec<Tensor>,
}

impl Edits {
    /// The size of the pictures in tokens.
    pub fn shape(&self) -> Result<(usize, usize)> {
        let (_, h, w) = self.sources.first().context("nothing to edit")?.dims3()?;
        Ok((h, w))
    }

    fn rows(&self, rows: Range<usize>) -> Self {
        Self { instructions: self.instructions[rows.clone()].to_vec(), sources: self.sources[rows].to_vec() }
    }

    /// The velocity field of these edits by `transformer`.
    pub fn field<'a>(&self, klein: &'a Klein, transformer: &'a Flux2, guidance: f64) -> Result<Field<'a>> {
        let prompts: Vec<&str> = self.instructions.iter().map(String::as_str).collect();
        let references: Vec<Vec<Tensor>> = self.sources.iter().map(|source| vec![source.clone()]).collect();
        klein.field_of(transformer, &prompts, &references, self.shape()?, guidance)
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
    pub policy: Flux2,
    pub still: Arc<Flux2>,
}

/// Carries edits out from `noise (B, h w, C)`, with stochastic steps in `window`. The fresh noise of row `r` has the number
/// `first + r` in streams of `purpose`.
pub fn carry_out(
    config: &EditorConfig,
    (klein, transformer): (&Klein, &Flux2),
    edits: Edits,
    noise: &Tensor,
    window: Range<usize>,
    (seed, purpose, first): (u64, &str, u64),
) -> Result<Carried> {
    let (h, w) = edits.shape()?;
    let sigmas = klein.schedule.sigmas(config.steps, h * w);
    let fresh = |step: usize| {
        let numbers = noise.elem_count() / noise.dim(0)?;
        let row = |r: u64| Stream::new(seed, &format!("{purpose} step {step}"), first + r).normals(numbers);
        let all: Vec<f32> = (0..noise.dim(0)? as u64).flat_map(row).collect();
        Tensor::from_vec(all, noise.dims(), noise.device())
    };
    let width = window.len();
    let field = edits.field(klein, transformer, config.guidance)?;
    let (states, taken) = rollout(&field, noise, &sigmas, config.policy, window, fresh)?;
    ensure!(taken.len() == width, "not every step of the window is stochastic");
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

    /// The step and the rows of a piece; of `all` rows a turn or a micro-batch may have less.
    fn of(&self, piece: usize, all: usize) -> (usize, Range<usize>) {
        let start = (piece / self.window * self.rows).min(all);
        (piece % self.window, start..(start + self.rows).min(all))
    }
}

impl Carried {
    /// The velocity of `rows` in step `taken`, and the policy's mean and log-probability there.
    fn evaluate(
        &self,
        taken: &Taken,
        rows: &Range<usize>,
        (klein, policy, still): (&Klein, &Flux2, &Flux2),
        guidance: f64,
    ) -> Result<(Tensor, Tensor, Tensor)> {
        let Taken { index, step, x, next, .. } = taken;
        let some = |tensor: &Tensor| tensor.narrow(0, rows.start, rows.len());
        let field = self.edits.rows(rows.clone()).field(klein, policy, guidance)?.apart(still);
        let v = field.velocity(&some(x)?, step.sigma, *index)?;
        let mean = step.mean(&some(x)?, &v)?;
        let log_prob = step.log_prob(&mean, &some(next)?)?;
        Ok((v, mean, log_prob))
    }

    /// Takes means and log-probabilities anew in the shapes of the updates, where these are others or where the model computes
    /// below f32: there they differ from those of the rollout by as much as a clip range. Call before the first update.
    pub fn reread(&mut self, (klein, still): (&Klein, &Flux2), pieces: Pieces, guidance: f64) -> Result<()> {
        let all = self.states.dim(0)?;
        if klein.dtype() == DType::F32 && pieces.rows >= all {
            return Ok(());
        }
        for i in 0..self.taken.len() {
            let (mut means, mut log_probs) = (Vec::new(), Vec::new());
            for start in (0..all).step_by(pieces.rows.min(all)) {
                let rows = start..(start + pieces.rows.min(all)).min(all);
                let (_, mean, log_prob) = self.evaluate(&self.taken[i], &rows, (klein, still, still), guidance)?;
                means.push(mean);
                log_probs.push(log_prob);
            }
            let (mean, log_prob) = (Tensor::cat(&means, 0)?, Tensor::cat(&log_probs, 0)?);
            let drawn = &self.taken[i].log_prob;
            check_ratio(&log_prob, drawn, &drawn.ones_like()?, COARSE_RATIO)?;
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
        let all = advantages.dim(0)?;
        let (index, rows) = pieces.of(piece, all);
        if rows.is_empty() {
            return Ok(Step { loss: advantages.zeros_like()?.sum_all()?, metrics: Metrics::new() });
        }
        let some = |tensor: &Tensor| tensor.narrow(0, rows.start, rows.len());
        let taken = self.taken.get(index).context("no such step in the window")?;
        let EditorConfig { loss: kind, kl, kl_form, guidance, .. } = *config;
        let eps = config.clip();
        let (v, mean, new) = self.evaluate(taken, &rows, (klein, &learned.policy, &learned.still), guidance)?;
        let (step, advantages, counts) = (&taken.step, some(advantages)?, some(counts)?);
        let (mut old_mean, mut old) = (some(&taken.mean)?, some(&taken.log_prob)?);
        let mut metrics = Metrics::new();
        if first_update {
            let off = check_ratio(&new, &old, &old.ones_like()?, flow_ratio(klein, rows.len() < all))?;
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
            let (reference, ..) = self.evaluate(taken, &rows, (klein, frozen, frozen), guidance)?;
            let kept = velocity_kl(&v, &reference, &counts, step.kl_weight(kl_form))?;
            divergence = f64::from(kept.to_scalar::<f32>()?);
            loss = (loss + (kept * kl)?)?;
        }
        let more = [("kl", divergence), ("clip_ratio/low_mean", clip_low), ("clip_ratio/high_mean", clip_high)];
        metrics.extend(more.map(|(name, value)| (name.to_owned(), value)));
        let share = rows.len() as f64 / (all * self.taken.len()) as f64;
        Ok(Step { loss: (loss * share)?, metrics })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_cover_every_row_of_every_step_once() {
        let pieces = Pieces { window: 2, rows: 3, all: 8 };
        assert_eq!(pieces.count(), 6);
        for all in [8, 5, 1] {
            let mut seen = vec![0; 2 * all];
            for piece in 0..pieces.count() {
                let (step, rows) = pieces.of(piece, all);
                rows.for_each(|row| seen[step * all + row] += 1);
            }
            assert!(seen.iter().all(|n| *n == 1), "{seen:?}");
        }
        assert_eq!(Pieces { window: 2, rows: usize::MAX, all: 8 }.count(), 2);
    }
}
