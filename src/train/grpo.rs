//! Group-relative policy optimisation (GRPO, arXiv 2402.03300): advantages and losses as pure functions.
//!
//! The Actor is a language model: [`token_loss`] has the variants that TRL names. The Editor is a flow: its policy is
//! [`crate::flow::policy`], its losses [`flow_loss`] and [`guard_loss`] over that policy's log-probabilities, or
//! [`nft_loss`], which needs no trajectory. All of them are minimised.

use anyhow::Result;
use candle_core::{DType, Result as TensorResult, Tensor};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// What is added to a standard deviation before it divides.
const STD_FLOOR: f64 = 1e-4;
/// Advantages are kept within this.
pub const ADVANTAGE_BOUND: f64 = 5.0;
/// Log-ratios to the reference are kept within this before they are exponentiated.
const LOG_RATIO_BOUND: f64 = 20.0;

/// By which standard deviation the rewards of a group are divided.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Scale {
    #[default]
    Group,
    /// That of the whole batch.
    Batch,
    /// None (Dr. GRPO).
    None,
}

/// Advantages of a batch, and what is worth logging about it.
#[derive(Clone, Debug, PartialEq)]
pub struct Advantages {
    /// One for each reward; 0 where the reward is missing.
    pub values: Vec<f32>,
    /// Whether a reward is missing (not finite): its sample must be masked out of every loss.
    pub missing: Vec<bool>,
    /// The number of groups, and of those in which all rewards are equal and nothing can be learnt.
    pub groups: usize,
    pub zero_std: usize,
    /// The mean over all rewards, and the mean over groups of their standard deviation.
    pub reward: f64,
    pub reward_std: f64,
}

impl Advantages {
    pub fn frac_reward_zero_std(&self) -> f64 {
        self.zero_std as f64 / self.groups.max(1) as f64
    }

    pub fn missing_count(&self) -> usize {
        self.missing.iter().filter(|m| **m).count()
    }
}

/// Mean and (sample) standard deviation.
fn moments(values: &[f64]) -> (f64, f64) {
    let n = values.len() as f64;
    let mean = values.iter().sum::<f64>() / n.max(1.0);
    let variance = values.iter().map(|v| (v - mean).powi(2)).sum::<f64>() / (n - 1.0).max(1.0);
    (mean, variance.sqrt())
}

/// `A = (r - mean) / (max(std, min_std) + 1e-4)`, kept within [`ADVANTAGE_BOUND`]. `groups[i]` names the group of
/// `rewards[i]`. Rewards that differ by less than `min_std` differ by noise, which would be blown up to full size.
pub fn advantages(rewards: &[f64], groups: &[u64], scale: Scale, min_std: f64) -> Result<Advantages> {
    anyhow::ensure!(rewards.len() == groups.len(), "{} rewards have {} groups", rewards.len(), groups.len());
    let missing: Vec<bool> = rewards.iter().map(|r| !r.is_finite()).collect();
    let mut members: BTreeMap<u64, Vec<usize>> = BTreeMap::new();
    for (i, group) in groups.iter().enumerate() {
        members.entry(*group).or_default().extend((!missing[i]).then_some(i));
    }
    let known: Vec<f64> = rewards.iter().copied().filter(|r| r.is_finite()).collect();
    let (reward, batch_std) = moments(&known);
    let mut values = vec![0.0; rewards.len()];
    let (mut zero_std, mut std_sum) = (0, 0.0);
    for indices in members.values() {
        let of_group: Vec<f64> = indices.iter().map(|i| rewards[*i]).collect();
        let (mean, std) = moments(&of_group);
        std_sum += std;
        if std < 1e-8 {
            zero_std += 1;
            continue;
        }
        let divisor = match scale {
            Scale::Group => std.max(min_std) + STD_FLOOR,
            Scale::Batch => batch_std.max(min_std) + STD_FLOOR,
            Scale::None => 1.0,
        };
        for i in indices {
            values[*i] = ((rewards[*i] - mean) / divisor).clamp(-ADVANTAGE_BOUND, ADVANTAGE_BOUND) as f32;
        }
    }
    let groups = members.len();
    Ok(Advantages { values, missing, groups, zero_std, reward, reward_std: std_sum / groups.max(1) as f64 })
}

/// The loss over tokens, named as TRL names it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum TokenLossKind {
    /// The mean over sequences of each one's mean over tokens.
    #[default]
    Grpo,
    /// The mean over the tokens of the update. (TRL's is over those of each micro-batch, and depends on their size.)
    Bnpo,
    /// The sum over tokens, divided by batch times the greatest length: no bias to short answers (arXiv 2503.20783).
    DrGrpo,
    /// As `Bnpo`, with a wider upper clip (arXiv 2503.14476).
    Dapo,
    /// As `Dapo`, but the ratio is capped at `1 + eps_high`, detached, and weighs every token's log-probability, so that no
    /// token loses its gradient (arXiv 2506.13585).
    Cispo,
    /// One ratio for each sequence, the geometric mean of its tokens' (arXiv 2507.18071).
    Gspo,
}

impl TokenLossKind {
    /// `eps_low` and `eps_high` where a config gives none: the papers'.
    pub fn clip(self) -> (f64, f64) {
        match self {
            Self::Grpo | Self::Bnpo | Self::DrGrpo => (0.2, 0.2),
            Self::Dapo => (0.2, 0.28),
            // A cap of 5, as ScaleRL has it (arXiv 2510.13786); the paper of CISPO gives no number.
            Self::Cispo => (0.2, 4.0),
            Self::Gspo => (3e-4, 4e-4),
        }
    }

    /// The scale of advantages where a config gives none.
    pub fn scale(self) -> Scale {
        if self == Self::DrGrpo { Scale::None } else { Scale::Group }
    }
}

/// The parameters of [`token_loss`].
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct TokenLoss {
    pub kind: TokenLossKind,
    pub eps_low: f64,
    pub eps_high: f64,
    /// The weight of the divergence from the reference; 0 needs no reference.
    pub beta: f64,
    /// The greatest length of an answer, for `DrGrpo`.
    pub max_length: usize,
}

impl Default for TokenLoss {
    fn default() -> Self {
        Self { kind: TokenLossKind::Grpo, eps_low: 0.2, eps_high: 0.2, beta: 0.0, max_length: 1 }
    }
}

/// A batch of answers: log-probabilities `(B, T)` of their tokens under the policy, the policy that drew them and, where
/// `beta` is not 0, the reference; `mask (B, T)` is 1 for tokens that count; `advantages (B)`.
pub struct TokenBatch<'a> {
    pub log_probs: &'a Tensor,
    pub old: &'a Tensor,
    pub reference: Option<&'a Tensor>,
    pub mask: &'a Tensor,
    pub advantages: &'a Tensor,
    /// What the sum is divided by where a loss is a mean over tokens: this batch's share, by its rows, of the counting tokens
    /// of the whole update. This batch's own tokens if `None`.
    pub active: Option<f64>,
}

/// A loss, and what is worth logging about it.
pub struct Loss {
    pub loss: Tensor,
    /// The mean divergence from the reference, not weighted.
    pub kl: f64,
    /// The share of ratios that are clipped from below and from above.
    pub clip_low: f64,
    pub clip_high: f64,
}

/// The unbiased, positive estimate `e^(ref - theta) - (ref - theta) - 1` of the divergence from the reference, for each token.
pub fn k3(log_probs: &Tensor, reference: &Tensor) -> TensorResult<Tensor> {
    let log_ratio = (reference - log_probs)?.clamp(-LOG_RATIO_BOUND, LOG_RATIO_BOUND)?;
    (log_ratio.exp()? - &log_ratio)? - 1.0
}

/// `max(-A rho, -A clip(rho, 1 - low, 1 + high))`, element by element; `advantages` is broadcast.
fn clipped(ratio: &Tensor, advantages: &Tensor, low: f64, high: f64) -> TensorResult<Tensor> {
    let cost = advantages.neg()?;
    ratio.broadcast_mul(&cost)?.maximum(&ratio.clamp(1.0 - low, 1.0 + high)?.broadcast_mul(&cost)?)
}

/// The shares, among the elements that `mask` weighs, of ratios whose gradient the clip stops below and above.
fn clip_shares(ratio: &Tensor, a: &Tensor, mask: &Tensor, low: f64, high: f64) -> TensorResult<(f64, f64)> {
    let total = scalar(&mask.sum_all()?)?.max(1.0);
    let share = |out: Tensor, side: Tensor| -> TensorResult<f64> {
        let hit = out.to_dtype(DType::F32)?.broadcast_mul(&side.to_dtype(DType::F32)?)?;
        Ok(scalar(&hit.broadcast_mul(mask)?.sum_all()?)? / total)
    };
    Ok((share(ratio.lt(1.0 - low)?, a.lt(0.0)?)?, share(ratio.gt(1.0 + high)?, a.gt(0.0)?)?))
}

fn scalar(x: &Tensor) -> TensorResult<f64> {
    Ok(f64::from(x.to_scalar::<f32>()?))
}

/// The loss of a language model's answers.
pub fn token_loss(config: &TokenLoss, batch: &TokenBatch) -> Result<Loss> {
    let TokenLoss { kind, eps_low, eps_high, beta, max_length } = *config;
    let TokenBatch { log_probs, old, reference, mask, advantages, active } = *batch;
    let advantages = advantages.unsqueeze(1)?; // (B, 1)
    let lengths = mask.sum_keepdim(1)?.clamp(1.0, f64::from(f32::MAX))?; // (B, 1)
    // What is missing counts for nothing, whatever it holds: a factor of 0 would let NaN through.
    let (counts, nothing) = (mask.ne(0.0)?, mask.zeros_like()?);
    let kept = |x: &Tensor| counts.where_cond(x, &nothing);
    let (log_probs, old) = (&kept(log_probs)?, &kept(old)?); // (B, T)
    let mut log_ratio = (log_probs - old)?;
    if kind == TokenLossKind::Gspo {
        log_ratio = (log_ratio.sum_keepdim(1)? / &lengths)?.broadcast_as(mask.shape())?;
    }
    let ratio = log_ratio.exp()?;
    let mut cost = if kind == TokenLossKind::Cispo {
        let weight = ratio.detach().minimum(1.0 + eps_high)?;
        (weight.broadcast_mul(&advantages)?.neg()? * log_probs)?
    } else {
        clipped(&ratio, &advantages, eps_low, eps_high)?
    };
    let mut kl = 0.0;
    if beta != 0.0 {
        let Some(reference) = reference else {
            anyhow::bail!("a divergence of weight {beta} needs the reference's log-probabilities");
        };
        let divergence = k3(log_probs, &kept(reference)?)?;
        kl = scalar(&(&divergence * mask)?.sum_all()?)? / scalar(&mask.sum_all()?)?.max(1.0);
        cost = (cost + (divergence * beta)?)?;
    }
    let cost = (cost * mask)?;
    let loss = match kind {
        TokenLossKind::Grpo | TokenLossKind::Gspo => (cost.sum_keepdim(1)? / lengths)?.mean_all()?,
        TokenLossKind::Bnpo | TokenLossKind::Dapo | TokenLossKind::Cispo => {
            let total = match active {
                Some(active) => active,
                None => scalar(&mask.sum_all()?)?,
            };
            // Without tokens the sum is 0 as well.
            (cost.sum_all()? / if total > 0.0 { total } else { 1.0 })?
        }
        TokenLossKind::DrGrpo => (cost.sum_all()? / (mask.dim(0)? * max_length.max(1)) as f64)?,
    };
    // Nothing is clipped from below in CISPO.
    let low = if kind == TokenLossKind::Cispo { 1.0 } else { eps_low };
    let (clip_low, clip_high) = clip_shares(&ratio.detach(), &advantages, mask, low, eps_high)?;
    Ok(Loss { loss, kl, clip_low, clip_high })
}

/// Flow-GRPO's loss of one step: log-probabilities `(B)` under the policy and the one that drew, `advantages (B)`.
pub fn flow_loss(log_probs: &Tensor, old: &Tensor, advantages: &Tensor, eps: f64) -> TensorResult<Loss> {
    ratio_loss(&(log_probs - old)?.exp()?, advantages, eps)
}

fn ratio_loss(ratio: &Tensor, advantages: &Tensor, eps: f64) -> TensorResult<Loss> {
    let loss = clipped(ratio, advantages, eps, eps)?.mean_all()?;
    let (clip_low, clip_high) = clip_shares(&ratio.detach(), advantages, &ratio.ones_like()?, eps, eps)?;
    Ok(Loss { loss, kl: 0.0, clip_low, clip_high })
}

/// GRPO-Guard's loss of one step (arXiv 2510.22319). The mean log-ratio of a Gaussian policy is negative and differs from
/// step to step, so that a clip acts on one side only; here it is brought to 0 by `b = mean((mu - mu_old)^2) / (2 std^2)` and
/// to one scale by `std`, and the steps' gradients to one scale by their `length = -d`. `means` and `old_means` are `(B, ..)`.
pub fn guard_loss(
    (log_probs, old): (&Tensor, &Tensor),
    (means, old_means): (&Tensor, &Tensor),
    (std, length): (f64, f64),
    advantages: &Tensor,
    eps: f64,
) -> TensorResult<Loss> {
    let shift = (means - old_means)?.sqr()?.flatten_from(1)?.mean(1)?; // (B)
    let log_ratio = (((log_probs - old)? + (shift / (2.0 * std * std))?)? * std)?;
    let loss = ratio_loss(&log_ratio.exp()?, advantages, eps)?;
    Ok(Loss { loss: (&loss.loss / length)?, ..loss })
}

/// `weight * mean |v - v_ref|^2`, the divergence of two flow policies; [`crate::flow::policy::Step::kl_weight`] has the weight.
/// `counts (B)` is 1, or 0 for rows that count as 0.
pub fn velocity_kl(v: &Tensor, reference: &Tensor, counts: &Tensor, weight: f64) -> TensorResult<Tensor> {
    let apart = (v - reference.detach())?.sqr()?.flatten_from(1)?.mean(1)?; // (B)
    (apart * counts)?.mean_all()? * weight
}

/// What DiffusionNFT compares: velocities of the policy and of the old policy at `x_t = (1 - t) x0 + t x1`, all of them
/// `(B, ..)`, with `t`, `advantages` and `counts` of `(B)`; `counts` is 1, or 0 for rows whose reward is missing.
pub struct NftBatch<'a> {
    pub v: &'a Tensor,
    pub old: &'a Tensor,
    pub x_t: &'a Tensor,
    pub x0: &'a Tensor,
    pub t: &'a Tensor,
    pub advantages: &'a Tensor,
    pub counts: &'a Tensor,
}

/// DiffusionNFT's loss (arXiv 2509.16117): the policy is fitted to good samples, and an implicit negative policy, its mirror
/// image in the old one, to bad samples. `beta` is how far the mirror lies.
pub fn nft_loss(batch: &NftBatch, beta: f64) -> TensorResult<Tensor> {
    let NftBatch { v, old, x_t, x0, t, advantages, counts } = batch;
    let old = old.detach();
    let rank = v.rank();
    let column = |x: &Tensor| (1..rank).try_fold(x.clone(), |x, _| x.unsqueeze(x.rank())); // (B, 1, ..)
    let t = column(t)?;
    let reward = (advantages.clamp(-ADVANTAGE_BOUND, ADVANTAGE_BOUND)? / (2.0 * ADVANTAGE_BOUND))?.affine(1.0, 0.5)?; // (B)
    let per_sample = |x: Tensor| x.flatten_from(1)?.mean(1); // (B)
    let fit = |v: Tensor| -> TensorResult<Tensor> {
        let error = ((*x_t - v.broadcast_mul(&t)?)? - *x0)?;
        let weight = per_sample(error.detach().abs()?)?.clamp(1e-5, f64::from(f32::MAX))?;
        per_sample(error.sqr()?)? / weight
    };
    let positive = fit(((*v * beta)? + (&old * (1.0 - beta))?)?)?;
    let negative = fit(((&old * (1.0 + beta))? - (*v * beta)?)?)?;
    let loss = ((&reward * positive)? + (reward.affine(-1.0, 1.0)? * negative)?)?;
    // Without `counts` a missing reward, whose advantage is 0, would be a sample half good and half bad.
    (loss * *counts)?.mean_all()? / beta
}

/// How much DiffusionNFT's old policy keeps of itself at an update.
pub fn nft_decay(update: usize) -> f64 {
    (0.001 * update as f64).min(0.5)
}

#[cfg(test)]
mod tests;
