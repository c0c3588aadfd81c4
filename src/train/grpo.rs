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

/// `A = (r - mean) / (std + 1e-4)`, kept within [`ADVANTAGE_BOUND`]. `groups[i]` names the group of `rewards[i]`.
pub fn advantages(rewards: &[f64], groups: &[u64], scale: Scale) -> Result<Advantages> {
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
            Scale::Group => std + STD_FLOOR,
            Scale::Batch => batch_std + STD_FLOOR,
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
    /// The mean over the tokens of this batch.
    Bnpo,
    /// The sum over tokens, divided by batch times the greatest length: no bias to short answers (arXiv 2503.20783).
    DrGrpo,
    /// The mean over the tokens of the whole accumulated batch (arXiv 2503.14476); asks for a wider upper clip, 0.28.
    Dapo,
    /// As `Dapo`, but the ratio is capped at `1 + eps_high`, detached, and weighs every token's log-probability, so that no
    /// token loses its gradient (arXiv 2506.13585); asks for an `eps_high` of several.
    Cispo,
    /// One ratio for each sequence, the geometric mean of its tokens' (arXiv 2507.18071); asks for a clip near 3e-4.
    Gspo,
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
    /// The counting tokens of the whole accumulated batch, for `Dapo` and `Cispo`; of this one if `None`.
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
    let mut log_ratio = ((log_probs - old)? * mask)?; // (B, T); what is masked out may hold anything
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
        let divergence = k3(log_probs, reference)?;
        kl = scalar(&(&divergence * mask)?.sum_all()?)? / scalar(&mask.sum_all()?)?.max(1.0);
        cost = (cost + (divergence * beta)?)?;
    }
    let cost = (cost * mask)?;
    let total = match active {
        Some(active) if matches!(kind, TokenLossKind::Dapo | TokenLossKind::Cispo) => active.max(1.0),
        _ => scalar(&mask.sum_all()?)?.max(1.0),
    };
    let loss = match kind {
        TokenLossKind::Grpo | TokenLossKind::Gspo => (cost.sum_keepdim(1)? / lengths)?.mean_all()?,
        TokenLossKind::Bnpo | TokenLossKind::Dapo | TokenLossKind::Cispo => (cost.sum_all()? / total)?,
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
pub fn velocity_kl(v: &Tensor, reference: &Tensor, weight: f64) -> TensorResult<Tensor> {
    (v - reference.detach())?.sqr()?.mean_all()? * weight
}

/// What DiffusionNFT compares: velocities of the policy and of the old policy at `x_t = (1 - t) x0 + t x1`, all of them
/// `(B, ..)`, with `t` and `advantages` of `(B)`.
pub struct NftBatch<'a> {
    pub v: &'a Tensor,
    pub old: &'a Tensor,
    pub x_t: &'a Tensor,
    pub x0: &'a Tensor,
    pub t: &'a Tensor,
    pub advantages: &'a Tensor,
}

/// DiffusionNFT's loss (arXiv 2509.16117): the policy is fitted to good samples, and an implicit negative policy, its mirror
/// image in the old one, to bad samples. `beta` is how far the mirror lies.
pub fn nft_loss(batch: &NftBatch, beta: f64) -> TensorResult<Tensor> {
    let NftBatch { v, old, x_t, x0, t, advantages } = batch;
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
    loss.mean_all()? / beta
}

/// How much DiffusionNFT's old policy keeps of itself at an update.
pub fn nft_decay(update: usize) -> f64 {
    (0.001 * update as f64).min(0.5)
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::{Device, Var};
    use serde_json::Value;

    /// Numbers that PyTorch computed: scripts/make_grpo_fixtures.py.
    fn golden() -> Value {
        serde_json::from_str(include_str!("../../tests/fixtures/grpo.json")).expect("the fixture")
    }

    fn numbers(value: &Value) -> Vec<f64> {
        value.as_array().expect("a list").iter().map(|v| v.as_f64().expect("a number")).collect()
    }

    fn tensor(value: &Value, shape: &[usize]) -> Tensor {
        let numbers: Vec<f32> = numbers(value).into_iter().map(|v| v as f32).collect();
        Tensor::from_vec(numbers, shape, &Device::Cpu).expect("a tensor")
    }

    fn close(got: f64, want: f64, what: &str) {
        assert!((got - want).abs() < 2e-5 * (1.0 + want.abs()), "{what}: {got} where {want} is due");
    }

    /// Compares a loss and its gradient with `case`.
    fn check(name: &str, loss: &Tensor, leaf: &Tensor, case: &Value) {
        close(scalar(loss).expect("a scalar"), case["loss"].as_f64().expect("a number"), name);
        let grads = loss.backward().expect("gradients");
        let grad: Vec<f32> = grads.get(leaf).expect("a gradient").flatten_all().and_then(|g| g.to_vec1()).expect("it");
        for (got, want) in grad.iter().zip(numbers(&case["grad"])) {
            close(f64::from(*got), want, name);
        }
    }

    #[test]
    fn advantages_are_those_of_pytorch() -> Result<()> {
        let golden = &golden()["advantages"];
        let rewards = numbers(&golden["rewards"]);
        let groups = [7, 7, 7, 7, 3, 3, 3, 3, 5, 5, 5, 5];
        for (name, scale) in [("group", Scale::Group), ("batch", Scale::Batch), ("none", Scale::None)] {
            let got = advantages(&rewards, &groups, scale)?;
            for (got, want) in got.values.iter().zip(numbers(&golden[name])) {
                close(f64::from(*got), want, name);
            }
            assert_eq!((got.groups, got.zero_std), (3, 1));
            close(got.frac_reward_zero_std(), 1.0 / 3.0, "share of groups without spread");
            close(got.reward_std, golden["reward_std"].as_f64().expect("a number"), "reward_std");
        }
        Ok(())
    }

    #[test]
    fn groups_are_told_apart_by_their_id_alone() -> Result<()> {
        let sorted = advantages(&[0.0, 1.0, 5.0, 9.0], &[1, 1, 2, 2], Scale::Group)?;
        let mixed = advantages(&[5.0, 0.0, 9.0, 1.0], &[2, 1, 2, 1], Scale::Group)?;
        assert_eq!([2, 0, 3, 1].map(|i| sorted.values[i]), mixed.values[..]);
        Ok(())
    }

    #[test]
    fn missing_rewards_are_counted_and_change_nothing_else() -> Result<()> {
        let with = advantages(&[0.0, f64::NAN, 1.0, f64::INFINITY], &[1; 4], Scale::Group)?;
        let without = advantages(&[0.0, 1.0], &[1; 2], Scale::Group)?;
        assert_eq!(with.values, [without.values[0], 0.0, without.values[1], 0.0]);
        assert_eq!((with.missing_count(), &with.missing), (2, &vec![false, true, false, true]));
        close(with.reward, 0.5, "reward");
        assert!(advantages(&[0.0], &[1, 2], Scale::Group).is_err());
        assert_eq!(advantages(&[], &[], Scale::Batch)?.reward, 0.0);
        Ok(())
    }

    #[test]
    fn advantages_are_bounded() -> Result<()> {
        let mut rewards = vec![0.0; 100];
        rewards[0] = 1.0;
        assert_eq!(advantages(&rewards, &[0; 100], Scale::Group)?.values[0], 5.0);
        Ok(())
    }

    #[test]
    fn token_losses_are_those_of_pytorch() -> Result<()> {
        use TokenLossKind::*;
        let golden = golden();
        let tokens = &golden["tokens"];
        let get = |name: &str| tensor(&tokens[name], &[4, 6]);
        let advantages = tensor(&golden["sample_advantages"], &[4]);
        for (name, kind) in
            [("grpo", Grpo), ("bnpo", Bnpo), ("dr_grpo", DrGrpo), ("dapo", Dapo), ("cispo", Cispo), ("gspo", Gspo)]
        {
            let case = &tokens["cases"][name];
            let eps = numbers(&case["eps"]);
            let beta = case["beta"].as_f64().expect("a number");
            let config = TokenLoss { kind, eps_low: eps[0], eps_high: eps[1], beta, max_length: 9 };
            let log_probs = Var::from_tensor(&get("log_probs"))?;
            let (old, reference, mask) = (get("old"), get("reference"), get("mask"));
            let batch = TokenBatch {
                log_probs: &log_probs,
                old: &old,
                reference: Some(&reference),
                mask: &mask,
                advantages: &advantages,
                active: Some(30.0),
            };
            let loss = token_loss(&config, &batch)?;
            check(name, &loss.loss, &log_probs, case);
            if beta != 0.0 {
                close(loss.kl, case["kl"].as_f64().expect("a number"), "kl");
            }
            assert_eq!(serde_json::to_value(kind)?, name);
            if kind == Grpo {
                let count = |side: &dyn Fn(f64, f64) -> bool| -> f64 {
                    let (new, old, mask) =
                        (numbers(&tokens["log_probs"]), numbers(&tokens["old"]), numbers(&tokens["mask"]));
                    let a = numbers(&golden["sample_advantages"]);
                    let hits = (0..24).filter(|i| mask[*i] > 0.0 && side((new[*i] - old[*i]).exp(), a[i / 6]));
                    hits.count() as f64 / mask.iter().sum::<f64>()
                };
                close(loss.clip_low, count(&|ratio, a| ratio < 0.8 && a < 0.0), "clip_low");
                close(loss.clip_high, count(&|ratio, a| ratio > 1.2 && a > 0.0), "clip_high");
            }
        }
        Ok(())
    }

    #[test]
    fn masked_tokens_may_hold_anything() -> Result<()> {
        let row = |x: [f32; 3]| Tensor::new(&[x], &Device::Cpu);
        let (old, mask, advantages) = (row([-1.0; 3])?, row([1.0, 1.0, 0.0])?, Tensor::new(&[1f32], &Device::Cpu)?);
        let loss = |last: f32| -> Result<f64> {
            let log_probs = row([-0.9, -1.1, last])?;
            let reference = None;
            let batch = TokenBatch {
                log_probs: &log_probs,
                old: &old,
                reference,
                mask: &mask,
                advantages: &advantages,
                active: None,
            };
            Ok(scalar(&token_loss(&TokenLoss::default(), &batch)?.loss)?)
        };
        assert_eq!(loss(-1.0)?, loss(-60.0)?);
        let config = TokenLoss { beta: 0.1, ..TokenLoss::default() };
        let batch = TokenBatch {
            log_probs: &old,
            old: &old,
            reference: None,
            mask: &mask,
            advantages: &advantages,
            active: None,
        };
        assert!(token_loss(&config, &batch).is_err());
        Ok(())
    }

    #[test]
    fn flow_losses_are_those_of_pytorch() -> Result<()> {
        let golden = golden();
        let flow = &golden["flow"];
        let shape = [4, 3, 2];
        let get = |name: &str| tensor(&flow[name], &shape);
        let number = |name: &str| flow[name].as_f64().expect("a number");
        let advantages = tensor(&golden["sample_advantages"], &[4]);
        let (std, length, eps) = (number("std"), number("length"), number("eps"));
        let step = crate::flow::policy::Step { sigma: 0.5, d: -length, pull: 0.0, std };
        let (next, old_means) = (get("next"), get("old_means"));
        let means = Var::from_tensor(&get("means"))?;
        let (log_probs, old) = (step.log_prob(&means, &next)?, step.log_prob(&old_means, &next)?);
        let grpo = flow_loss(&log_probs, &old, &advantages, eps)?;
        check("grpo", &grpo.loss, &means, &flow["cases"]["grpo"]);
        assert!(grpo.clip_low + grpo.clip_high > 0.0);
        let guard = guard_loss((&log_probs, &old), (&means, &old_means), (std, length), &advantages, eps)?;
        check("guard", &guard.loss, &means, &flow["cases"]["guard"]);
        check("kl", &velocity_kl(&means, &old_means, 0.7)?, &means, &flow["cases"]["kl"]);
        let v = Var::from_tensor(&get("v"))?;
        let (old, x_t, x0, t) = (get("old"), get("x_t"), get("x0"), tensor(&flow["t"], &[4]));
        let batch = NftBatch { v: &v, old: &old, x_t: &x_t, x0: &x0, t: &t, advantages: &advantages };
        check("nft", &nft_loss(&batch, number("nft_beta"))?, &v, &flow["cases"]["nft"]);
        Ok(())
    }

    #[test]
    fn before_the_first_update_every_ratio_is_one() -> Result<()> {
        let log_probs = Tensor::new(&[-1.3f32, 0.4], &Device::Cpu)?;
        let advantages = Tensor::new(&[0.5f32, -2.0], &Device::Cpu)?;
        let loss = flow_loss(&log_probs, &log_probs, &advantages, 1e-5)?;
        assert_eq!((scalar(&loss.loss)?, loss.clip_low, loss.clip_high), (0.75, 0.0, 0.0));
        let means = Tensor::zeros((2, 3), DType::F32, &Device::Cpu)?;
        let guard = guard_loss((&log_probs, &log_probs), (&means, &means), (0.3, 0.25), &advantages, 2e-6)?;
        assert_eq!(scalar(&guard.loss)?, 3.0);
        Ok(())
    }

    #[test]
    fn the_old_policy_follows_slower_and_slower() {
        assert_eq!([0, 100, 500, 900].map(nft_decay), [0.0, 0.1, 0.5, 0.5]);
    }
}
