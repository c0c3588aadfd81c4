use super::*;
use crate::{
    flow::policy::{Kind, Policy},
    models::{Adapter, Linear, Params},
    train::optim::{self, OptimConfig, Optimizer, Outcome},
};
use anyhow::Context;
use candle_core::{Device, Var};
use serde_json::Value;
use std::collections::HashMap;

/// Numbers that PyTorch computed: scripts/make_grpo_fixtures.py.
fn golden() -> Value {
    serde_json::from_str(include_str!("../../../tests/fixtures/grpo.json")).expect("the fixture")
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

/// The losses over tokens by their names in the fixture.
const TOKEN_LOSSES: [(&str, TokenLossKind); 6] = [
    ("grpo", TokenLossKind::Grpo),
    ("bnpo", TokenLossKind::Bnpo),
    ("dr_grpo", TokenLossKind::DrGrpo),
    ("dapo", TokenLossKind::Dapo),
    ("cispo", TokenLossKind::Cispo),
    ("gspo", TokenLossKind::Gspo),
];

/// The loss of a case, of log-probabilities against the old policy and the reference of `tokens`.
fn token_case(
    (kind, case): (TokenLossKind, &Value),
    tokens: &Value,
    log_probs: &Tensor,
    advantages: &Tensor,
) -> Result<Loss> {
    let get = |name: &str| tensor(&tokens[name], &[4, 6]);
    let (old, reference, mask, eps) = (get("old"), get("reference"), get("mask"), numbers(&case["eps"]));
    let beta = case["beta"].as_f64().expect("a number");
    let config = TokenLoss { kind, eps_low: eps[0], eps_high: eps[1], beta, max_length: 9 };
    // The fixture's bnpo divides by the tokens at hand.
    let (reference, active) = (Some(&reference), (kind != TokenLossKind::Bnpo).then_some(30.0));
    token_loss(&config, &TokenBatch { log_probs, old: &old, reference, mask: &mask, advantages, active })
}

#[test]
fn advantages_are_those_of_pytorch() -> Result<()> {
    let golden = &golden()["advantages"];
    let rewards = numbers(&golden["rewards"]);
    let groups = [7, 7, 7, 7, 3, 3, 3, 3, 5, 5, 5, 5];
    for (name, scale) in [("group", Scale::Group), ("batch", Scale::Batch), ("none", Scale::None)] {
        let got = advantages(&rewards, &groups, scale, 0.0)?;
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
    let sorted = advantages(&[0.0, 1.0, 5.0, 9.0], &[1, 1, 2, 2], Scale::Group, 0.0)?;
    let mixed = advantages(&[5.0, 0.0, 9.0, 1.0], &[2, 1, 2, 1], Scale::Group, 0.0)?;
    assert_eq!([2, 0, 3, 1].map(|i| sorted.values[i]), mixed.values[..]);
    Ok(())
}

#[test]
fn missing_rewards_are_counted_and_change_nothing_else() -> Result<()> {
    let with = advantages(&[0.0, f64::NAN, 1.0, f64::INFINITY], &[1; 4], Scale::Group, 0.0)?;
    let without = advantages(&[0.0, 1.0], &[1; 2], Scale::Group, 0.0)?;
    assert_eq!(with.values, [without.values[0], 0.0, without.values[1], 0.0]);
    assert_eq!((with.missing_count(), &with.missing), (2, &vec![false, true, false, true]));
    close(with.reward, 0.5, "reward");
    assert!(advantages(&[0.0], &[1, 2], Scale::Group, 0.0).is_err());
    assert_eq!(advantages(&[], &[], Scale::Batch, 0.0)?.reward, 0.0);
    Ok(())
}

#[test]
fn advantages_are_bounded() -> Result<()> {
    let mut rewards = vec![0.0; 100];
    rewards[0] = 1.0;
    assert_eq!(advantages(&rewards, &[0; 100], Scale::Group, 0.0)?.values[0], 5.0);
    Ok(())
}

#[test]
fn rewards_that_hardly_differ_stay_small() -> Result<()> {
    let largest = |rewards: &[f64], min_std| -> Result<f32> {
        let found = [Scale::Group, Scale::Batch].map(|scale| advantages(rewards, &[0; 4], scale, min_std));
        let found = found.into_iter().collect::<Result<Vec<_>>>()?;
        assert_eq!(found[0].values, found[1].values, "of one group");
        Ok(found[0].values.iter().fold(0.0, |most, a| most.max(a.abs())))
    };
    let noise = [1.0, 1.0005, 1.0, 1.001];
    assert!(largest(&noise, 0.0)? > 1.0 && largest(&noise, 0.02)? < 0.05);
    let spread = [0.0, 0.5, 0.0, 1.0];
    assert_eq!(largest(&spread, 0.02)?, largest(&spread, 0.0)?);
    Ok(())
}

#[test]
fn token_losses_are_those_of_pytorch() -> Result<()> {
    let golden = golden();
    let tokens = &golden["tokens"];
    let get = |name: &str| tensor(&tokens[name], &[4, 6]);
    let advantages = tensor(&golden["sample_advantages"], &[4]);
    for (name, kind) in TOKEN_LOSSES {
        let case = &tokens["cases"][name];
        let log_probs = Var::from_tensor(&get("log_probs"))?;
        let loss = token_case((kind, case), tokens, &log_probs, &advantages)?;
        check(name, &loss.loss, &log_probs, case);
        if case["beta"] != 0.0 {
            close(loss.kl, case["kl"].as_f64().expect("a number"), "kl");
        }
        assert_eq!(serde_json::to_value(kind)?, name);
        if kind == TokenLossKind::Grpo {
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
    let (mask, advantages) = (row([1.0, 1.0, 0.0])?, Tensor::new(&[1f32], &Device::Cpu)?);
    for (_, kind) in TOKEN_LOSSES {
        // Everything that comes of a batch whose masked place holds `last`.
        let loss = |last: f32| -> Result<(f64, f64, Vec<f32>)> {
            let log_probs = Var::from_tensor(&row([-0.9, -1.1, last])?)?;
            let (old, reference) = (row([-1.0, -1.0, last])?, row([-1.2, -0.8, last])?);
            let batch = TokenBatch {
                log_probs: &log_probs,
                old: &old,
                reference: Some(&reference),
                mask: &mask,
                advantages: &advantages,
                active: None,
            };
            let found = token_loss(&TokenLoss { kind, beta: 0.1, ..TokenLoss::default() }, &batch)?;
            let gradient = found.loss.backward()?.get(&log_probs).context("a gradient")?.flatten_all()?.to_vec1()?;
            Ok((scalar(&found.loss)?, found.kl, gradient))
        };
        let plain = loss(-1.0)?;
        assert!(plain.2[0] != 0.0 && plain.2[2] == 0.0, "{kind:?}: {plain:?}");
        for last in [-60.0, f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            assert_eq!(loss(last)?, plain, "{kind:?} with {last}");
        }
    }
    let old = row([-1.0; 3])?;
    let config = TokenLoss { beta: 0.1, ..TokenLoss::default() };
    let batch =
        TokenBatch { log_probs: &old, old: &old, reference: None, mask: &mask, advantages: &advantages, active: None };
    assert!(token_loss(&config, &batch).is_err());
    Ok(())
}

#[test]
fn an_update_is_the_same_in_any_micro_batches() -> Result<()> {
    let golden = golden();
    let tokens = &golden["tokens"];
    let get = |name: &str| tensor(&tokens[name], &[4, 6]);
    let (log_probs, old, reference, mask) = (get("log_probs"), get("old"), get("reference"), get("mask"));
    let advantages = tensor(&golden["sample_advantages"], &[4]);
    let all = scalar(&mask.sum_all()?)?;
    for (name, kind) in TOKEN_LOSSES {
        let (eps_low, eps_high) = kind.clip();
        let config = TokenLoss { kind, eps_low, eps_high, beta: 0.1, max_length: 9 };
        let update = |micro: usize| -> Result<f64> {
            let mut sum = 0.0;
            for start in (0..4).step_by(micro) {
                let some = |x: &Tensor| x.narrow(0, start, micro);
                let share = micro as f64 / 4.0;
                let batch = TokenBatch {
                    log_probs: &some(&log_probs)?,
                    old: &some(&old)?,
                    reference: Some(&some(&reference)?),
                    mask: &some(&mask)?,
                    advantages: &some(&advantages)?,
                    active: Some(all * share),
                };
                sum += share * scalar(&token_loss(&config, &batch)?.loss)?;
            }
            Ok(sum)
        };
        close(update(2)?, update(4)?, name);
        close(update(1)?, update(4)?, name);
    }
    Ok(())
}

#[test]
fn rows_without_a_reward_teach_a_flow_nothing() -> Result<()> {
    let flow = &golden()["flow"];
    let get = |name: &str| tensor(&flow[name], &[4, 3, 2]);
    let v = Var::from_tensor(&get("v"))?;
    let (old, x_t, x0, t) = (get("old"), get("x_t"), get("x0"), tensor(&flow["t"], &[4]));
    let tensor = |x: [f32; 4]| Tensor::new(&x, &Device::Cpu);
    let (advantages, counts) = (tensor([1.0, 0.0, -1.0, 0.0])?, tensor([1.0, 0.0, 1.0, 1.0])?);
    let batch = NftBatch { v: &v, old: &old, x_t: &x_t, x0: &x0, t: &t, advantages: &advantages, counts: &counts };
    for loss in [nft_loss(&batch, 0.5)?, velocity_kl(&v, &old, &counts, 0.7)?] {
        let gradient = loss.backward()?.get(&v).context("a gradient")?.abs()?.flatten_from(1)?.sum(1)?;
        let gradient: Vec<f32> = gradient.to_vec1()?;
        assert!(gradient[1] == 0.0 && [0, 2, 3].iter().all(|row| gradient[*row] > 0.0), "{gradient:?}");
    }
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
    let counts = advantages.ones_like()?;
    check("kl", &velocity_kl(&means, &old_means, &counts, 0.7)?, &means, &flow["cases"]["kl"]);
    let v = Var::from_tensor(&get("v"))?;
    let (old, x_t, x0, t) = (get("old"), get("x_t"), get("x0"), tensor(&flow["t"], &[4]));
    let batch = NftBatch { v: &v, old: &old, x_t: &x_t, x0: &x0, t: &t, advantages: &advantages, counts: &counts };
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

/// A linear layer with an adapter, and an optimiser for the adapter, as the fixture has them.
fn policy(case: &Value) -> Result<(Linear, Adapter, Optimizer)> {
    let matrix = |name: &str| {
        let rows = case[name].as_array().expect("a matrix");
        let flat: Vec<f32> = rows.iter().flat_map(numbers).map(|v| v as f32).collect();
        Tensor::from_vec(flat, (rows.len(), numbers(&rows[0]).len()), &Device::Cpu)
    };
    let weight = matrix("weight")?;
    let (out, inner) = weight.dims2()?;
    let weight = HashMap::from([("lin.weight".into(), weight)]);
    let factors = ["lora_A", "lora_B"].map(|name| Ok((format!("lin.{name}.weight"), matrix(name)?)));
    let factors = factors.into_iter().collect::<Result<HashMap<_, _>>>()?;
    let adapter = Adapter::loaded(2, 4.0, vec!["lin".into()], factors, 1.0, true);
    let params = Params::loaded(weight, "a layer", DType::F32, &Device::Cpu).adapted(vec![adapter.clone()]);
    let layer = Linear::new(inner, out, &params.at("lin"))?;
    let config = OptimConfig {
        muon: false,
        lr: 1e-2,
        betas: (0.9, 0.999),
        weight_decay: 0.1,
        clip: 0.05,
        spike: 0.0,
        ..OptimConfig::default()
    };
    let optimizer = Optimizer::new(&config, &adapter.vars(), optim::default_group)?;
    Ok((layer, adapter, optimizer))
}

/// Whole training steps: each of the case's updates has its loss, the gradients of the adapter, and its new weights.
fn updates(name: &str, case: &Value, loss: impl Fn(&Linear) -> Result<Tensor>) -> Result<()> {
    let (layer, adapter, mut optimizer) = policy(case)?;
    for (number, want) in case["updates"].as_array().expect("updates").iter().enumerate() {
        let loss = loss(&layer)?;
        close(scalar(&loss)?, want["loss"].as_f64().expect("a number"), &format!("{name}, loss {number}"));
        let gradients = optim::named(&adapter.vars(), loss.backward()?);
        let same = |what: &str, got: &Tensor, want: &Value| -> Result<()> {
            let (got, want) = (got.flatten_all()?.to_vec1::<f32>()?, numbers(want));
            assert_eq!(got.len(), want.len());
            let got = got.into_iter().zip(want);
            got.for_each(|(got, want)| close(f64::from(got), want, &format!("{name}, {what} {number}")));
            Ok(())
        };
        for factor in ["lora_A", "lora_B"] {
            same("gradient", &gradients[&format!("lin.{factor}.weight")], &want["gradients"][factor])?;
        }
        assert_eq!(optimizer.step(&gradients, 1.0)?.1, Outcome::Updated);
        for factor in ["lora_A", "lora_B"] {
            same("weight", adapter.vars()[&format!("lin.{factor}.weight")].as_tensor(), &want["weights"][factor])?;
        }
    }
    Ok(())
}

#[test]
fn whole_updates_of_an_actor_are_those_of_pytorch_and_peft() -> Result<()> {
    let golden = golden();
    let steps = &golden["token_steps"];
    let ids = tensor(&steps["ids"], &[4, 6]).to_dtype(DType::U32)?.unsqueeze(2)?;
    let (x, advantages) = (tensor(&steps["x"], &[4, 6, 5]), tensor(&golden["sample_advantages"], &[4]));
    for (name, kind) in TOKEN_LOSSES {
        let case = &steps["cases"][name];
        updates(name, case, |layer| {
            let log_probs = candle_nn::ops::log_softmax(&layer.forward(&x)?, 2)?.gather(&ids, 2)?.squeeze(2)?;
            Ok(token_case((kind, case), steps, &log_probs, &advantages)?.loss)
        })?;
    }
    Ok(())
}

#[test]
fn whole_updates_of_an_editor_are_those_of_pytorch_and_peft() -> Result<()> {
    let golden = golden();
    let steps = &golden["flow_steps"];
    let get = |name: &str| tensor(&steps[name], &[4, 3, 5]);
    let (x, next, old_means, x0, old_v) = (get("x"), get("next"), get("old_means"), get("x0"), get("old_v"));
    let (t, advantages) = (tensor(&steps["t"], &[4]), tensor(&golden["sample_advantages"], &[4]));
    let (eps, beta) = (steps["eps"].as_f64().expect("a number"), steps["nft_beta"].as_f64().expect("a number"));
    let step = Policy { kind: Kind::FlowSde, noise: None }.step(0.7, 0.6);
    let old = step.log_prob(&old_means, &next)?;
    updates("grpo", &steps["cases"]["grpo"], |layer| {
        let log_probs = step.log_prob(&step.mean(&x, &layer.forward(&x)?)?, &next)?;
        Ok(flow_loss(&log_probs, &old, &advantages, eps)?.loss)
    })?;
    updates("grpo-guard", &steps["cases"]["guard"], |layer| {
        let means = step.mean(&x, &layer.forward(&x)?)?;
        let log_probs = step.log_prob(&means, &next)?;
        Ok(guard_loss((&log_probs, &old), (&means, &old_means), (step.std, -step.d), &advantages, eps)?.loss)
    })?;
    updates("diffusion-nft", &steps["cases"]["nft"], |layer| {
        let v = layer.forward(&x)?;
        let (old, counts) = (&old_v, &advantages.ones_like()?);
        let batch = NftBatch { v: &v, old, x_t: &x, x0: &x0, t: &t, advantages: &advantages, counts };
        Ok(nft_loss(&batch, beta)?)
    })
}
