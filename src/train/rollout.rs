//! What the trainers of Actor and Editor share: the frozen models, their adapted copies, and what a group's members are
//! worth.

use super::{
    Batch, Metrics,
    flow_steps::Learned,
    grpo_config::{CHECKER, Combine, GroupConfig, GrpoConfig, ModelsConfig},
    trained::{Trained, Whole},
};
use crate::{
    flow::Klein,
    models::{
        Adapter, Folder, Params,
        flux2::Flux2,
        qwen3_vl::{self, Qwen3VL},
    },
    rig::{
        reward::{ByVerdicts, Sample},
        roles::{Checker, Claim, Decode, Picture, Target, Verdict, mean_probability},
        vlm_roles::{Critic, LOOKS},
    },
    scene::{graph::SceneGraph, tabletop::oracle},
    usage,
    vlm::Vlm,
};
use anyhow::{Context, Result, bail, ensure};
use candle_core::{DType, Device, Tensor};
use image::{RgbImage, imageops};
use rayon::prelude::*;
use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, PoisonError},
};

/// The largest difference from 1 that the ratio of a token's probabilities, replayed and as drawn, may have: decoding word
/// by word and reading at once round differently.
pub const TOKEN_RATIO: f64 = 1e-3;
/// The same below f32.
const COARSE_RATIO: f64 = 0.5;
/// As [`TOKEN_RATIO`] for a step of the flow, which is replayed in the shape it was taken in. Clip ranges are of this order.
const FLOW_RATIO: f64 = 1e-6;
/// And one that is computed in another: a few more bits of what is summed.
const RESHAPED_RATIO: f64 = 1e-4;
/// And one that is computed below f32. A mean over thousands of numbers moves little even where all of them are wrong: a velocity
/// of the wrong sign, in the steps of FLUX.2-klein, by 0.05 at most, an unrelated one by 0.004 and 0.03.
const COARSE_FLOW_RATIO: f64 = 1e-3;

/// The largest difference that a token's ratio may have in the number format of the model. Below f32 it says only that
/// nothing is badly wrong; the updates compare replays with replays.
pub fn token_ratio(vlm: &Vlm) -> f64 {
    if vlm.model.decoder.dtype() == DType::F32 { TOKEN_RATIO } else { COARSE_RATIO }
}

/// The same for a step of the flow; `reshaped` if it is computed in another shape than it was taken in, which rounds otherwise.
pub fn flow_ratio(klein: &Klein, reshaped: bool) -> f64 {
    match (klein.dtype(), reshaped) {
        (DType::F32, false) => FLOW_RATIO,
        (DType::F32, true) => RESHAPED_RATIO,
        _ => COARSE_FLOW_RATIO,
    }
}

/// Refuses what a policy draws that has come apart, which the autoencoder would be blamed for.
pub fn expect_finite(states: &Tensor) -> Result<()> {
    let sum = states.to_dtype(DType::F32)?.abs()?.sum_all()?.to_scalar::<f32>()?;
    ensure!(
        sum.is_finite(),
        "what the policy draws is not finite any more: lower optim.lr, and begin anew or go on from an earlier checkpoint"
    );
    Ok(())
}

/// What the oracle says of held-out pictures, as they were and as they came to be, as means to log.
pub fn before_and_after<'a>(
    pictures: impl IndexedParallelIterator<Item = (&'a Picture, &'a Picture, &'a SceneGraph)>,
) -> Result<Metrics> {
    let judged = pictures.map(|(before, after, graph)| {
        let of = |picture: &Picture| anyhow::Ok(oracle::judge(picture.pixels()?, graph));
        Ok((of(before)?, of(after)?))
    });
    let judged: Vec<_> = judged.collect::<Result<_>>()?;
    let n = judged.len().max(1) as f64;
    let mean = |values: &mut dyn Iterator<Item = f64>| values.sum::<f64>() / n;
    let share = |yes: bool| f64::from(u8::from(yes));
    let named = [
        ("eval/oracle_before", mean(&mut judged.iter().map(|(before, _)| before.score()))),
        ("eval/oracle", mean(&mut judged.iter().map(|(_, after)| after.score()))),
        ("eval/perfect_before", mean(&mut judged.iter().map(|(before, _)| share(before.perfect())))),
        ("eval/perfect", mean(&mut judged.iter().map(|(_, after)| share(after.perfect())))),
    ];
    Ok(named.map(|(name, value)| (name.to_owned(), value)).into())
}

/// Checker and Actor as the config has them, and a copy of the VLM with an adapter on the same weights, if asked for.
pub fn critic(models: &ModelsConfig, at: (DType, &Device), adapter: Option<&Adapter>) -> Result<(Critic, Option<Vlm>)> {
    if !(1..=LOOKS).contains(&models.looks) {
        usage!("models.looks is 1 to {LOOKS}, not {}", models.looks);
    }
    let (critic, adapted) = vlm(&models.vlm()?, at, adapter)?;
    Ok((critic.with_looks(models.looks), adapted))
}

fn vlm(folder: &Folder, (dtype, device): (DType, &Device), adapter: Option<&Adapter>) -> Result<(Critic, Option<Vlm>)> {
    let config: qwen3_vl::Config = folder.json("config.json")?;
    let params = Params::open(folder, "model", dtype, device)?;
    let frozen = Qwen3VL::new(&config, &params)?;
    params.finish(|name| config.tie_word_embeddings && name == "lm_head.weight")?;
    let adapted = |adapter: &Adapter| Vlm::of(Qwen3VL::new(&config, &params.again(vec![adapter.clone()]))?, folder);
    let adapted = adapter.map(adapted).transpose()?;
    adapter.map(Adapter::check).transpose()?;
    Ok((Critic::of(Vlm::of(frozen, folder)?, folder)?, adapted))
}

/// Transformers with adapters, each where there is an adapter.
pub type Transformers = Vec<Option<Arc<Flux2>>>;

/// The frozen pipeline, and for each adapter that there is a copy of its transformer on the same weights.
pub fn pipeline(
    folder: &Folder,
    (dtype, device): (DType, &Device),
    adapters: &[Option<Adapter>],
) -> Result<(Arc<Klein>, Transformers)> {
    let others = adapters.iter().flatten().map(|adapter| vec![adapter.clone()]).collect();
    let (klein, adapted) = Klein::open_with(folder, dtype, device, Vec::new(), others)?;
    adapters.iter().flatten().try_for_each(Adapter::check)?;
    let mut adapted = adapted.into_iter().map(Arc::new);
    Ok((Arc::new(klein), adapters.iter().map(|adapter| adapter.as_ref().and_then(|_| adapted.next())).collect()))
}

/// Checker and Actor as the config has them, both frozen, and the Actor that is trained: by the adapter, or, without one, in
/// all its weights.
pub fn actor(models: &ModelsConfig, at: (DType, &Device), adapter: Option<Adapter>) -> Result<(Critic, Vlm, Trained)> {
    let (critic, policy) = critic(models, at, adapter.as_ref())?;
    match adapter.zip(policy) {
        Some((adapter, policy)) => Ok((critic, policy, Trained::Adapter(adapter))),
        None => {
            let folder = models.vlm()?;
            let whole = Whole::open(&folder, "model", at.1)?;
            let policy = Vlm::of(Qwen3VL::new(&folder.json("config.json")?, &whole.params)?, &folder)?;
            Ok((critic, policy, Trained::Whole(whole)))
        }
    }
}

/// Policies, each with what is trained of it.
pub type Editors = Vec<(Learned, Trained)>;

/// The frozen pipeline, and `count` policies that are trained: each by an adapter that `adapter` makes, or, if it makes none,
/// in all weights of the transformer. And the Diffuser, if it has an adapter.
pub fn editors(
    folder: &Folder,
    at: (DType, &Device),
    adapter: impl Fn() -> Result<Option<Adapter>>,
    count: usize,
    diffuser: Option<Adapter>,
) -> Result<(Arc<Klein>, Editors, Option<Arc<Flux2>>)> {
    let adapters = (0..count).map(|_| adapter()).collect::<Result<Vec<_>>>()?;
    let both = |adapter: &Adapter| [Some(adapter.clone()), Some(adapter.still())];
    let mut all: Vec<Option<Adapter>> = adapters.iter().flatten().flat_map(both).collect();
    all.push(diffuser);
    let (klein, mut adapted) = pipeline(folder, at, &all)?;
    let diffuser = adapted.pop().flatten();
    let mut adapted = adapted.into_iter().flatten();
    let learner = |adapter: Option<Adapter>| {
        let (policy, still, trained) = match adapter {
            Some(adapter) => {
                let (policy, still) = adapted.next().zip(adapted.next()).context("a transformer for each adapter")?;
                (policy, still, Trained::Adapter(adapter))
            }
            None => {
                let folder = folder.require("transformer")?;
                let whole = Whole::open(&folder, "diffusion_pytorch_model", at.1)?;
                let config = folder.json("config.json")?;
                let policy = Arc::new(Flux2::new(&config, &whole.params)?);
                (policy, Arc::new(Flux2::new(&config, &whole.still())?), Trained::Whole(whole))
            }
        };
        Ok((Learned { policy, still }, trained))
    };
    let learners = adapters.into_iter().map(learner).collect::<Result<_>>()?;
    Ok((klein, learners, diffuser))
}

/// The metric of the share of rewards that are missing.
const MISSING: &str = "rewards/missing";

/// What one step's micro-batches have collected, each by its rows.
pub struct Kept<T>(Mutex<BTreeMap<usize, Arc<T>>>);

impl<T> Default for Kept<T> {
    fn default() -> Self {
        Self(Mutex::default())
    }
}

impl<T> Kept<T> {
    pub fn keep(&self, batch: &Batch, collected: T) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).insert(batch.rows.start, Arc::new(collected));
    }

    pub fn of(&self, batch: &Batch) -> Result<Arc<T>> {
        let kept = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        kept.get(&batch.rows.start).cloned().context("an update before its rollouts")
    }

    /// What all micro-batches of the update have collected.
    pub fn together(&self, batch: &Batch) -> Vec<Arc<T>> {
        let kept = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        kept.range(batch.together.clone()).map(|(_, collected)| collected.clone()).collect()
    }
}

/// Who judges pictures beside the Checker.
pub struct Judges {
    /// Another VLM.
    judge: Option<Critic>,
}

impl Judges {
    pub fn open(config: &GrpoConfig, device: &Device) -> Result<Self> {
        let GrpoConfig { models, group, .. } = config;
        let judge = match models.judge()? {
            Some(folder) => Some(vlm(&folder, (models.dtype.dtype(), device), None)?.0),
            None if group.asks("judge") => {
                usage!("group.rewards has judge, which is a VLM of its own: set models.judge")
            }
            None => None,
        };
        Ok(Self { judge })
    }

    /// Their rewards, as far as they are asked for, of pictures that should show a target, which is also known as a graph.
    pub fn rewards(&self, group: &GroupConfig, pictures: &[(&Picture, &Target, &SceneGraph)]) -> Result<Vec<Reward>> {
        let mut rewards = Vec::new();
        if let Some(judge) = self.judge.as_ref().filter(|_| group.asks("judge")) {
            let asked: Vec<(&Picture, &Target)> =
                pictures.iter().map(|(picture, target, _)| (*picture, *target)).collect();
            let of = |verdicts: &Vec<Verdict>| mean_probability(verdicts).unwrap_or(1.0);
            rewards.push(("judge".to_owned(), check(judge, &asked).iter().map(of).collect()));
        }
        if group.asks("oracle") {
            let of = |(picture, _, graph): &(&Picture, &Target, &SceneGraph)| {
                Ok(oracle::judge(picture.pixels()?, graph).score())
            };
            rewards.push(("oracle".to_owned(), pictures.par_iter().map(of).collect::<Result<_>>()?));
        }
        Ok(rewards)
    }
}

/// The decoder of pictures that are kept as latents.
pub fn decoder(klein: &Arc<Klein>) -> Decode {
    let klein = klein.clone();
    Arc::new(move |latents: &[Tensor]| klein.decode(latents))
}

/// A picture as the pipeline would have drawn it in `size`: its latents, and the pixels they stand for.
pub fn through_latents(klein: &Klein, decode: &Decode, pixels: &RgbImage, size: (u32, u32)) -> Result<Picture> {
    let (width, height) = size;
    let latents = if pixels.dimensions() == size {
        klein.encode(pixels)?
    } else {
        klein.encode(&imageops::resize(pixels, width, height, imageops::FilterType::CatmullRom))?
    };
    Ok(Picture::from_latents(latents, decode.clone()))
}

/// The Checker's verdicts on pictures. Where it fails on one, they have no probability, and are not [`known`].
pub fn check(checker: &impl Checker, jobs: &[(&Picture, &Target)]) -> Vec<Vec<Verdict>> {
    match (checker.check(jobs), jobs) {
        (Ok(verdicts), _) => verdicts,
        (Err(error), [(_, target)]) => {
            tracing::warn!("the Checker fails on a picture: {error:#}");
            let unknown = |claim: &Claim| Verdict { p_yes: f64::NAN, ..Verdict::denied(claim) };
            vec![target.claims.iter().map(unknown).collect()]
        }
        // The others are not to blame.
        (Err(_), jobs) => {
            let (some, rest) = jobs.split_at(jobs.len() / 2);
            [some, rest].into_iter().filter(|jobs| !jobs.is_empty()).flat_map(|jobs| check(checker, jobs)).collect()
        }
    }
}

/// Whether the Checker gave every claim a probability.
pub fn known(verdicts: &[Verdict]) -> bool {
    verdicts.iter().all(|verdict| verdict.p_yes.is_finite())
}

/// The mean over some pictures of the share of their claims that the Checker expects to hold, as far as it is known; not a
/// number if none is.
pub fn mean_score<'a>(verdicts: impl Iterator<Item = &'a [Verdict]>) -> f64 {
    let scores: Vec<f64> = verdicts.filter_map(mean_probability).filter(|score| score.is_finite()).collect();
    scores.iter().sum::<f64>() / scores.len() as f64
}

/// A reward by name, one number for each rollout; one that is not finite is missing.
pub type Reward = (String, Vec<f64>);

/// Takes back the rewards of rollouts about which not all is known.
pub fn withhold(rewards: &mut [Reward], known: impl Iterator<Item = bool> + Clone) {
    for (_, values) in rewards {
        values.iter_mut().zip(known.clone()).filter(|(_, known)| !known).for_each(|(value, _)| *value = f64::NAN);
    }
}

/// Takes the means over every rollout's `tries`, which come one after the other, as far as they are known.
pub fn average(rewards: &mut [Reward], tries: usize) {
    let mean = |tries: &[f64]| {
        let known: Vec<f64> = tries.iter().copied().filter(|value| value.is_finite()).collect();
        // Not a number, which is missing, where none is known.
        known.iter().sum::<f64>() / known.len() as f64
    };
    rewards.iter_mut().for_each(|(_, values)| *values = values.chunks(tries).map(mean).collect());
}

/// Gives rollouts whose answer could not be read, by each reward, the least that any of their group has: to leave them
/// out would teach nothing, and what was made of no instruction may by chance be worth more.
pub fn rank_last(rewards: &mut [Reward], groups: &[u64], read: impl Iterator<Item = bool> + Clone) {
    for (_, values) in rewards {
        let mut least = BTreeMap::new();
        for (group, value) in groups.iter().zip(values.iter()) {
            let least = least.entry(*group).or_insert(f64::NAN);
            // Of a number and none this is the number.
            *least = least.min(*value);
        }
        let unread = values.iter_mut().zip(groups).zip(read.clone()).filter(|(_, read)| !read);
        unread.for_each(|((value, group), _)| *value = least[group]);
    }
}

/// The rewards by verdicts that `config` asks for: `before` and `after` are those on the picture before and after each
/// rollout.
pub fn by_verdicts(config: &GroupConfig, before: &[&[Verdict]], after: &[Vec<Verdict>]) -> Vec<Reward> {
    let find = |name: &str| match name {
        CHECKER => Some(ByVerdicts::Satisfied),
        name => ByVerdicts::ALL.into_iter().find(|reward| reward.name() == name),
    };
    let weights = config.weights();
    let named = weights.keys().filter_map(|name| Some(((*name).to_owned(), find(name)?)));
    let samples = || before.iter().zip(after).map(|(before, after)| Sample { before, after });
    let mut rewards: Vec<Reward> =
        named.map(|(name, reward)| (name, samples().map(|sample| reward.of(sample)).collect())).collect();
    withhold(&mut rewards, before.iter().zip(after).map(|(before, after)| known(before) && known(after)));
    rewards
}

/// What the rollouts of some groups are worth.
pub struct Judged {
    /// One for each rollout; 0 where its reward is missing.
    pub advantages: Vec<f32>,
    /// 1, or 0 where the reward is missing.
    pub counts: Vec<f32>,
    pub metrics: Metrics,
}

/// Ends a run in which too many of a step's rewards are missing.
pub fn accept(config: &GroupConfig, collected: &Metrics) -> Result<()> {
    match collected.iter().find(|(name, _)| name == MISSING) {
        Some((_, missing)) if *missing > config.max_missing => {
            bail!("{:.0}% of a step's rewards are missing (group.max_missing allows less)", 100.0 * missing)
        }
        _ => Ok(()),
    }
}

/// Weighs the rewards of rollouts, of which `groups` names each one's group. The metrics have TRL's names.
pub fn judge(config: &GroupConfig, rewards: &[Reward], groups: &[u64]) -> Result<Judged> {
    let count = groups.len();
    let weights = config.weights();
    let weight = |name: &str| weights.get(name).copied().unwrap_or(0.0);
    let mut total = vec![0.0; count];
    for (name, values) in rewards.iter().filter(|(name, _)| weight(name) != 0.0) {
        total.iter_mut().zip(values).for_each(|(total, value)| *total += weight(name) * value);
    }
    let summed = config.advantages(&total, groups)?;
    let missing = summed.missing_count() as f64 / count.max(1) as f64;
    let mut metrics = vec![(MISSING.to_owned(), missing)];
    // Where all are missing, there is no mean.
    if missing < 1.0 {
        metrics.extend([
            ("reward".to_owned(), summed.reward),
            ("reward_std".to_owned(), summed.reward_std),
            ("frac_reward_zero_std".to_owned(), summed.frac_reward_zero_std()),
        ]);
    }
    let mut apart = vec![0.0; count];
    for (name, values) in rewards {
        let alone = config.advantages(values, groups)?;
        apart.iter_mut().zip(&alone.values).for_each(|(sum, value)| *sum += weight(name) as f32 * value);
        if alone.missing_count() < count {
            metrics.push((format!("rewards/{name}/mean"), alone.reward));
            metrics.push((format!("rewards/{name}/std"), alone.reward_std));
        }
    }
    let chosen = match config.combine {
        Combine::SumThenNormalise => summed.values,
        Combine::NormaliseThenSum => apart,
    };
    let counts: Vec<f32> = summed.missing.iter().map(|missing| f32::from(u8::from(!missing))).collect();
    let advantages = chosen.iter().zip(&counts).map(|(advantage, counts)| advantage * counts).collect();
    Ok(Judged { advantages, counts, metrics })
}

/// Holds the replayed log-probabilities to those of the rollout: before an update both are the same policy's, so their
/// ratios are 1. Returns the largest difference from it.
pub fn check_ratio(replayed: &Tensor, drawn: &Tensor, mask: &Tensor, limit: f64) -> Result<f64> {
    let log_ratio = ((replayed.detach() - drawn)? * mask)?;
    let differences: Vec<f32> = (log_ratio.exp()? - 1.0)?.abs()?.flatten_all()?.to_vec1()?;
    let not_a_number = differences.iter().any(|d| d.is_nan());
    let off = f64::from(if not_a_number { f32::NAN } else { differences.into_iter().fold(0.0, f32::max) });
    if off.is_nan() || off > limit {
        bail!(
            "before the update the policy's ratio to the one that drew must be 1, but it is off by {off:.2e} (at most \
             {limit:.0e} is rounding): rollout and replay do not compute the same"
        );
    }
    Ok(off)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeMap;

    fn config(combine: Combine) -> GroupConfig {
        let rewards =
            BTreeMap::from([("gain".to_owned(), 1.0), ("format".to_owned(), 0.5), ("oracle".to_owned(), 0.0)]);
        GroupConfig { size: 2, min_std: 0.0, combine, rewards, ..GroupConfig::default() }
    }

    fn rewards(gain: [f64; 4]) -> Vec<Reward> {
        vec![
            ("gain".into(), gain.to_vec()),
            ("format".into(), vec![1.0, 0.0, 1.0, 1.0]),
            ("oracle".into(), vec![0.0, 9.0, 9.0, 0.0]),
        ]
    }

    fn metric(judged: &Judged, name: &str) -> f64 {
        judged.metrics.iter().find(|(known, _)| known == name).expect("the metric").1
    }

    #[test]
    fn rewards_are_weighed_in_either_order_and_logged_apart() -> Result<()> {
        let rewards = rewards([0.0, 0.5, 0.25, 0.25]);
        let summed = judge(&config(Combine::SumThenNormalise), &rewards, &[0, 0, 1, 1])?;
        // In the first group what one loses the other gains: 0 + 0.5 against 0.5 + 0.
        assert_eq!(summed.advantages, [0.0; 4]);
        assert_eq!(metric(&summed, "frac_reward_zero_std"), 1.0);
        assert_eq!(metric(&summed, "reward"), 0.5 + 0.125);
        assert_eq!(metric(&summed, "rewards/oracle/mean"), 4.5);
        let apart = judge(&config(Combine::NormaliseThenSum), &rewards, &[0, 0, 1, 1])?;
        assert!(apart.advantages[1] > 0.3 && apart.advantages[0] < -0.3, "{:?}", apart.advantages);
        assert_eq!(apart.advantages[2..], [0.0, 0.0]);
        Ok(())
    }

    #[test]
    fn missing_rewards_are_masked_and_too_many_are_fatal() -> Result<()> {
        let one = judge(&config(Combine::SumThenNormalise), &rewards([0.0, 1.0, f64::NAN, 0.5]), &[0, 0, 1, 1])?;
        assert_eq!((one.counts.as_slice(), one.advantages[2]), (&[1.0, 1.0, 0.0, 1.0][..], 0.0));
        assert_eq!(metric(&one, "rewards/missing"), 0.25);
        let config = config(Combine::SumThenNormalise);
        accept(&config, &one.metrics)?;
        let two = judge(&config, &rewards([0.0, f64::NAN, f64::NAN, 0.5]), &[0, 0, 1, 1])?;
        assert!(accept(&config, &two.metrics).expect_err("an error").to_string().contains("50%"));
        let none = judge(&config, &rewards([f64::NAN; 4]), &[0, 0, 1, 1])?;
        assert!(none.counts.iter().chain(&none.advantages).all(|x| *x == 0.0));
        assert!(!none.metrics.iter().any(|(name, _)| name == "rewards/gain/mean"));
        Ok(())
    }

    #[test]
    fn tries_are_averaged_as_far_as_they_are_known() {
        let mut rewards = vec![("gain".to_owned(), vec![1.0, 2.0, f64::NAN, 4.0, f64::NAN, f64::NAN])];
        average(&mut rewards, 2);
        assert_eq!((rewards[0].1[..2].to_vec(), rewards[0].1[2].is_nan()), (vec![1.5, 4.0], true));
    }

    #[test]
    fn an_answer_that_cannot_be_read_is_worth_no_more_than_any_of_its_group() {
        let (none, groups) = (f64::NAN, [0, 0, 0, 0, 1, 1, 2, 2]);
        let mut rewards = vec![
            ("gain".to_owned(), vec![0.5, -0.25, none, none, 0.9, 0.2, none, none]),
            ("format".to_owned(), vec![1.0, 1.0, 0.0, 1.0, 0.0, 1.0, 1.0, 0.0]),
        ];
        let read = [true, true, false, true, false, true, true, false];
        rank_last(&mut rewards, &groups, read.into_iter());
        assert_eq!(rewards[0].1[..3], [0.5, -0.25, -0.25]);
        assert_eq!(rewards[0].1[4..6], [0.2, 0.2]);
        // What is not known of others stays so, and where nothing is, there is no least.
        assert!([3, 6, 7].iter().all(|r| rewards[0].1[*r].is_nan()));
        assert_eq!(rewards[1].1, [1.0, 1.0, 0.0, 1.0, 0.0, 1.0, 1.0, 0.0]);
    }

    /// Fails on pictures of one pixel, alone or among others, and is not sure of those of two.
    struct Moody;

    impl Checker for Moody {
        fn check(&self, jobs: &[(&Picture, &Target)]) -> Result<Vec<Vec<Verdict>>> {
            let of = |(picture, target): &(&Picture, &Target)| {
                let p_yes = match picture.pixels()?.width() {
                    1 => bail!("no answer"),
                    2 => f64::NAN,
                    _ => 0.75,
                };
                let verdict =
                    |c: &Claim| Verdict { claim: c.clone(), yes: p_yes >= 0.5, p_yes, reflection: String::new() };
                Ok(target.claims.iter().map(verdict).collect())
            };
            jobs.iter().map(of).collect()
        }
    }

    #[test]
    fn what_the_checker_fails_on_is_missing_and_takes_nothing_along() -> Result<()> {
        let pictures = [9, 1, 2, 9, 9].map(|width| Picture::from_pixels(RgbImage::new(width, 1)));
        let target = Target { claims: vec![Claim::Object("ball".into())], ..Target::words_alone("") };
        let jobs: Vec<(&Picture, &Target)> = pictures.iter().map(|picture| (picture, &target)).collect();
        let after = check(&Moody, &jobs);
        assert_eq!(after.iter().map(|v| known(v)).collect::<Vec<_>>(), [true, false, false, true, true]);
        assert_eq!(mean_score(after.iter().map(Vec::as_slice)), 0.75);
        assert!(check(&Moody, &[]).is_empty());
        let before = vec![after[0].as_slice(); 5];
        let config = GroupConfig { size: 5, ..GroupConfig::default() };
        let rewards = by_verdicts(&config, &before, &after);
        assert_eq!(rewards[0].0, CHECKER);
        let judged = judge(&config, &rewards, &[0; 5])?;
        assert_eq!(judged.counts, [1.0, 0.0, 0.0, 1.0, 1.0]);
        assert_eq!((metric(&judged, "rewards/checker/mean"), metric(&judged, MISSING)), (1.0, 0.4));
        Ok(())
    }

    #[test]
    fn a_ratio_that_is_not_one_is_refused_with_its_size() -> Result<()> {
        let tensor = |x: [f32; 2]| Tensor::new(&[x], &Device::Cpu);
        let (drawn, all, first) = (tensor([-1.0, -2.0])?, tensor([1.0, 1.0])?, tensor([1.0, 0.0])?);
        assert_eq!(check_ratio(&drawn, &drawn, &all, 0.0)?, 0.0);
        let other = tensor([-1.0, -1.9])?;
        assert_eq!(check_ratio(&other, &drawn, &first, 0.0)?, 0.0);
        let error = check_ratio(&other, &drawn, &all, 1e-3).expect_err("an error").to_string();
        assert!(error.contains("off by 1.05e-1"), "{error}");
        assert!(check_ratio(&tensor([f32::NAN, -2.0])?, &drawn, &all, 1e-3).is_err());
        Ok(())
    }
}
