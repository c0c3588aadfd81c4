//! The Actor's answers: drawn, rewarded for their words, and read again with gradients, which gives the
//! log-probabilities of their tokens under the present weights, and so the loss.
//!
//! As when they were drawn, a picture is read once and shared by all questions about it. The temperature is that of the
//! rollouts, 1. Tokens that the answer's schema left no choice about are no actions of the policy and are left out.

use super::{
    Metrics, Step,
    grpo::{TokenBatch, TokenLoss, token_loss},
    grpo_config::GroupConfig,
    rollout::{Reward, TOKEN_RATIO, check_ratio, token_ratio},
};
use crate::{
    models::qwen3_vl::rope_positions,
    rig::{prompts, roles::Picture, vlm_roles::EDIT},
    scene::tabletop::edit,
    tensor::{Mask, cross_entropy, rng::Stream, select_rows},
    vlm::{
        Vlm,
        decode::{Answer, Sampling},
        prefix::Question,
    },
};
use anyhow::{Context, Result, ensure};
use candle_core::{D, DType, Device, Tensor};
use image::RgbImage;
use serde::Deserialize;

/// An answer of the Actor.
pub struct Written {
    pub answer: Answer,
    /// The edit in words; `None` if the answer cannot be read.
    pub edit: Option<String>,
    /// Tokens of the question and of the answer.
    pub tokens: usize,
}

impl Written {
    /// What the Editor is told; what cannot be read is no instruction.
    pub fn instruction(&self) -> &str {
        self.edit.as_deref().unwrap_or_default()
    }

    /// How many of the answer's tokens were chosen.
    pub fn chosen(&self) -> usize {
        self.answer.chosen.iter().filter(|chosen| **chosen).count()
    }
}

/// Whether the Editor has learned to read such an edit.
pub fn well_formed(instruction: &str) -> f64 {
    f64::from(u8::from(edit::Edit::parse(instruction).is_ok()))
}

/// What the Actor was asked about pictures, and what it answered.
pub struct Writing {
    /// Of one size.
    pictures: Vec<Picture>,
    /// For each row the number of its picture, and the question.
    asked: Vec<(usize, String)>,
    pub written: Vec<Written>,
}

impl Writing {
    /// Draws an edit for each question, that of row `i` from `streams[i]`.
    pub fn draw(
        vlm: &Vlm,
        (pictures, asked): (Vec<Picture>, Vec<(usize, String)>),
        temperature: f64,
        streams: &[Stream],
    ) -> Result<Self> {
        #[derive(Deserialize)]
        struct Read {
            edit: String,
        }
        let pixels = pixels(&pictures)?;
        let questions: Vec<Question> =
            asked.iter().map(|(picture, text)| Question { picture: Some(*picture), text }).collect();
        let sampling = Sampling { temperature, max_tokens: EDIT };
        let answers = vlm.answer(&vlm.look(&pixels)?, &questions, &prompts::reflect_schema(), sampling, streams)?;
        let read = |answer: &Answer| -> Result<Read> {
            let text = vlm.chat.decode(&answer.ids)?;
            serde_json::from_str(&text).with_context(|| format!("the Actor's answer is no edit: {text}"))
        };
        let device = vlm.model.decoder.device();
        let first = pixels.first().map(|picture| vlm.images.patches([*picture], device)).transpose()?;
        let grid = first.and_then(|patches| patches.grids.first().copied());
        let written = |(answer, (_, question)): (Answer, &(usize, String))| {
            let edit = read(&answer).inspect_err(|error| tracing::warn!("{error:#}")).ok().map(|read| read.edit);
            let tokens = vlm.question(question, grid)?.len() + answer.ids.len();
            Ok(Written { answer, edit, tokens })
        };
        let written = answers.into_iter().zip(&asked).map(written).collect::<Result<_>>()?;
        Ok(Self { pictures, asked, written })
    }

    /// Whether each answer could be read.
    pub fn read(&self) -> impl Iterator<Item = bool> + Clone {
        self.written.iter().map(|w| w.edit.is_some())
    }

    /// Tokens of all questions and answers.
    pub fn tokens(&self) -> f64 {
        self.written.iter().map(|w| w.tokens).sum::<usize>() as f64
    }

    /// The rewards of the words alone, as far as `config` asks for them.
    pub fn rewards(&self, config: &GroupConfig) -> Vec<Reward> {
        // From 1 for no words down to 0 for as many as there may be.
        let brief = |w: &Written| 1.0 - (w.answer.ids.len() as f64 / EDIT as f64).min(1.0);
        let named: [(&str, Vec<f64>); 2] = [
            ("format", self.written.iter().map(|w| well_formed(w.instruction())).collect()),
            ("brevity", self.written.iter().map(brief).collect()),
        ];
        let asked = named.into_iter().filter(|(name, _)| config.asks(name));
        asked.map(|(name, values)| (name.to_owned(), values)).collect()
    }

    /// What to log of the answers, by TRL's names; means over the rows.
    pub fn metrics(&self) -> Metrics {
        let lengths = || self.written.iter().map(|w| w.answer.ids.len());
        let n = self.written.len() as f64;
        let named = [
            ("completions/mean_length", lengths().sum::<usize>() as f64 / n),
            ("completions/clipped_ratio", lengths().filter(|length| *length >= EDIT).count() as f64 / n),
        ];
        named.map(|(name, value)| (name.to_owned(), value)).into()
    }

    /// The most chosen tokens of an answer.
    fn width(&self) -> usize {
        self.written.iter().map(Written::chosen).max().unwrap_or(0).max(1)
    }

    /// What was drawn of each answer: its chosen tokens' log-probabilities and a mask of where there are any, `(B, C)`.
    fn drawn(&self, device: &Device) -> Result<(Tensor, Tensor)> {
        let width = self.width();
        let (mut log_probs, mut mask) = (Vec::new(), Vec::new());
        for Written { answer, .. } in &self.written {
            let chosen = answer.logprobs.iter().zip(&answer.chosen).filter(|(_, chosen)| **chosen).map(|(p, _)| *p);
            let row: Vec<f32> = chosen.collect();
            mask.extend((0..width).map(|i| f32::from(u8::from(i < row.len()))));
            log_probs.extend((0..width).map(|i| row.get(i).copied().unwrap_or(0.0)));
        }
        let shape = (self.written.len(), width);
        Ok((Tensor::from_vec(log_probs, shape, device)?, Tensor::from_vec(mask, shape, device)?))
    }

    /// Reads the answers again.
    pub fn replay(&self, vlm: &Vlm) -> Result<Replay> {
        let (Self { pictures, asked, written }, Vlm { model, images, .. }) = (self, vlm);
        let (config, device) = (model.config(), model.decoder.device());
        let patches = images.patches(pixels(pictures)?, device)?;
        let grid = *patches.grids.first().context("nothing to read")?;
        ensure!(patches.grids.iter().all(|g| *g == grid), "pictures of one batch have one size");
        let features = model.vision.forward(&patches)?;
        let prefix = vlm.prefix(grid)?;
        let merge = config.vision_config.spatial_merge_size;
        let (positions, next) = rope_positions(&prefix, config.image_token_id, merge, 0, &mut [grid].into_iter())?;
        let angles = model.decoder.angles(&vec![positions; pictures.len()])?;
        let mut cache = model.decoder.cache();
        let rows = vec![prefix.clone(); pictures.len()];
        model.forward(&rows, Some(&features), &angles, &Mask::causal(), Some(&mut cache))?;

        // Behind the prefix: the rest of the question and the answer, padded with what no token sees.
        let mut rows = Vec::with_capacity(asked.len());
        let mut begins = Vec::with_capacity(asked.len());
        for ((_, question), Written { answer, .. }) in asked.iter().zip(written) {
            let question = vlm.question(question, Some(grid))?;
            let rest = question.strip_prefix(&*prefix).context("the chat template writes text before the picture")?;
            begins.push(rest.len());
            rows.push([rest, &answer.ids].concat());
        }
        let longest = rows.iter().map(Vec::len).max().unwrap_or(0);
        let keys = rows.iter().map(|row| 0..prefix.len() + row.len()).collect();
        rows.iter_mut().for_each(|row| row.resize(longest, config.vision_end_token_id));
        let index: Vec<u32> = asked.iter().map(|(picture, _)| *picture as u32).collect();
        let angles = model.decoder.text_angles(next as usize, longest)?;
        let mask = Mask { causal: true, keys: Some(keys) };
        // (B, longest, hidden)
        let states = model.forward(&rows, None, &angles, &mask, Some(&mut cache.rows(&index)?))?;

        // The states in front of chosen tokens, and where each token goes in the padded rows; 0 is the padding.
        let width = self.width();
        let (mut places, mut targets, mut spread) = (Vec::new(), Vec::new(), vec![0u32; asked.len() * width]);
        for (row, (Written { answer, .. }, begin)) in written.iter().zip(&begins).enumerate() {
            let chosen = answer.ids.iter().enumerate().filter(|(i, _)| answer.chosen[*i]);
            for (column, (i, id)) in chosen.enumerate() {
                places.push((row * longest + begin + i - 1) as u32);
                targets.push(*id);
                spread[row * width + column] = targets.len() as u32;
            }
        }
        let logits = model.head.forward(&select_rows(&states.flatten(0, 1)?, &places)?)?.to_dtype(DType::F32)?;
        let log_probs = cross_entropy(&logits, &Tensor::new(targets, device)?)?.neg()?;
        let padded = Tensor::cat(&[&Tensor::zeros(1, DType::F32, device)?, &log_probs], 0)?;
        let log_probs = padded.index_select(&Tensor::new(spread, device)?, 0)?.reshape((asked.len(), width))?;
        Ok(Replay { log_probs, entropy: entropy(&logits.detach())? })
    }
}

fn pixels(pictures: &[Picture]) -> Result<Vec<&RgbImage>> {
    pictures.iter().map(Picture::pixels).collect()
}

/// Each answer's chosen tokens, in rows padded to one length.
pub struct Replay {
    /// `(B, C)`, differentiable.
    pub log_probs: Tensor,
    /// The mean entropy of the model's distributions over the whole vocabulary where tokens were chosen; the
    /// constraints that they were drawn under leave less.
    pub entropy: f64,
}

/// Answers, and what else the updates of a step are computed from.
pub struct Rollouts {
    pub writing: Writing,
    /// `(B)`, as are the counts: 1, or 0 for what no update may use.
    pub advantages: Tensor,
    pub counts: Tensor,
    /// Tokens that count.
    pub seen: f64,
    /// Log-probabilities under the policy that drew, read again in the shape of the updates; `None` where the only
    /// update's own are these. And those under the untrained policy, where the divergence from it counts.
    old: Option<Tensor>,
    reference: Option<Tensor>,
}

impl Rollouts {
    /// Of answers that `policy` drew, for one update or for `several`.
    pub fn new(
        writing: Writing,
        (advantages, counts): (&[f32], &[f32]),
        policy: &Vlm,
        several: bool,
        reference: Option<&Vlm>,
    ) -> Result<Self> {
        let device = policy.model.decoder.device();
        let seen = writing.written.iter().zip(counts).map(|(w, counts)| w.chosen() as f64 * f64::from(*counts)).sum();
        let read = |vlm: &Vlm| -> Result<Tensor> { Ok(writing.replay(vlm)?.log_probs.detach()) };
        let old = several.then(|| read(policy)).transpose()?;
        let reference = reference.map(read).transpose()?;
        let (advantages, counts) = (Tensor::new(advantages, device)?, Tensor::new(counts, device)?);
        Ok(Self { writing, advantages, counts, seen, old, reference })
    }

    /// The loss of an update, which may be the first of the step; `active` is these rollouts' share of the tokens that
    /// count in it.
    pub fn loss(&self, policy: &Vlm, config: &TokenLoss, active: f64, first: bool) -> Result<Step> {
        let replayed = self.writing.replay(policy)?;
        let (drawn, mask) = self.writing.drawn(replayed.log_probs.device())?;
        let old = self.old.clone().unwrap_or_else(|| replayed.log_probs.detach());
        let off = check_ratio(&old, &drawn, &mask, token_ratio(policy))?;
        if first && self.old.is_some() {
            // Both were read in one shape, so this holds in any number format.
            check_ratio(&replayed.log_probs, &old, &mask, TOKEN_RATIO)?;
        }
        let tokens = TokenBatch {
            log_probs: &replayed.log_probs,
            old: &old,
            reference: self.reference.as_ref(),
            mask: &mask.broadcast_mul(&self.counts.unsqueeze(1)?)?,
            advantages: &self.advantages,
            active: Some(active),
        };
        let loss = token_loss(config, &tokens)?;
        let metrics = [
            ("entropy", replayed.entropy),
            ("kl", loss.kl),
            ("clip_ratio/low_mean", loss.clip_low),
            ("clip_ratio/high_mean", loss.clip_high),
            ("ratio_off", off),
        ];
        Ok(Step { loss: loss.loss, metrics: metrics.map(|(name, value)| (name.to_owned(), value)).into() })
    }
}

/// The mean entropy of softmax distributions `(N, V)`.
fn entropy(logits: &Tensor) -> Result<f64> {
    let shifted = logits.broadcast_sub(&logits.max_keepdim(D::Minus1)?)?;
    let mass = shifted.exp()?;
    let total = mass.sum_keepdim(D::Minus1)?;
    let mean = ((mass * shifted)?.sum_keepdim(D::Minus1)? / &total)?;
    Ok(f64::from((total.log()? - mean)?.mean_all()?.to_scalar::<f32>()?))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::train::optim::{self, OptimConfig, Optimizer};
    use candle_core::Var;
    use std::collections::BTreeMap;

    #[test]
    fn the_entropy_is_that_of_the_distributions_in_the_mean() -> Result<()> {
        // Half and half, and three to one.
        let logits = Tensor::new(&[[5.0f32, 5.0], [3.0 + 3f32.ln(), 3.0]], &Device::Cpu)?;
        let of = [0.5f64, 0.5].map(|p| -p * p.ln()).iter().sum::<f64>();
        let other = [0.75f64, 0.25].map(|p| -p * p.ln()).iter().sum::<f64>();
        assert!((entropy(&logits)? - (of + other) / 2.0).abs() < 1e-6);
        Ok(())
    }

    #[test]
    fn what_the_editor_has_not_learned_to_read_has_no_form() {
        assert_eq!(well_formed("move the red ball to the left of the blue cube"), 1.0);
        assert!(["", "make it nice", "move the red ball to the left of"].map(well_formed).iter().all(|f| *f == 0.0));
    }

    impl Rollouts {
        /// How far one update of `vars` by `loss` goes towards the short answers of each group: the sum over answers of
        /// the advantage, made here of lengths alone, times what the update adds to the tokens' mean log-probability.
        pub fn shortened(
            &self,
            policy: &Vlm,
            group: &GroupConfig,
            vars: &BTreeMap<String, Var>,
            loss: &Tensor,
        ) -> Result<f64> {
            let written = &self.writing.written;
            let brief: Vec<f64> = written.iter().map(|w| -(w.answer.ids.len() as f64)).collect();
            let advantages = group.advantages(&brief, &group.numbers(brief.len()))?.values;
            ensure!(advantages.iter().any(|a| *a != 0.0), "the answers of each group are of one length");
            let log_probs = || -> Result<Vec<f32>> { Ok(self.writing.replay(policy)?.log_probs.sum(1)?.to_vec1()?) };
            let before = log_probs()?;
            let config = OptimConfig { muon: false, lr: 1e-3, ..OptimConfig::default() };
            let gradients = optim::named(vars, loss.backward()?);
            Optimizer::new(&config, vars, optim::default_group)?.step(&gradients, 1.0)?;
            let added = log_probs()?.into_iter().zip(before).zip(written);
            let added = added.map(|((after, before), w)| f64::from(after - before) / w.chosen().max(1) as f64);
            Ok(added.zip(advantages).map(|(added, advantage)| added * f64::from(advantage)).sum())
        }
    }
}
