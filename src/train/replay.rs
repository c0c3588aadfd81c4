//! The Actor's answers: drawn, and read again with gradients, which gives the log-probabilities of their tokens under the
//! present weights.
//!
//! As when they were drawn, a picture is read once and shared by all questions about it. The temperature is that of the
//! rollouts, 1. Tokens that the answer's schema left no choice about are no actions of the policy and are left out.

use crate::{
    models::qwen3_vl::rope_positions,
    rig::{prompts, vlm_roles::EDIT},
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

/// Draws an edit for each `(picture, question)`, question `i` from `streams[i]`. The pictures have one size.
pub fn write(
    vlm: &Vlm,
    pictures: &[&RgbImage],
    asked: &[(usize, &str)],
    temperature: f64,
    streams: &[Stream],
) -> Result<Vec<Written>> {
    #[derive(Deserialize)]
    struct Read {
        edit: String,
    }
    let questions: Vec<Question> =
        asked.iter().map(|(picture, text)| Question { picture: Some(*picture), text }).collect();
    let sampling = Sampling { temperature, max_tokens: EDIT };
    let answers = vlm.answer(&vlm.look(pictures)?, &questions, &prompts::reflect_schema(), sampling, streams)?;
    let read = |answer: &Answer| -> Result<Read> {
        let text = vlm.chat.decode(&answer.ids)?;
        serde_json::from_str(&text).with_context(|| format!("the Actor's answer is no edit: {text}"))
    };
    let device = vlm.model.decoder.device();
    let first = pictures.first().map(|picture| vlm.images.patches([*picture], device)).transpose()?;
    let grid = first.and_then(|patches| patches.grids.first().copied());
    let written = |(answer, (_, question)): (Answer, &(usize, &str))| {
        let edit = read(&answer).inspect_err(|error| tracing::warn!("{error:#}")).ok().map(|read| read.edit);
        let tokens = vlm.question(question, grid)?.len() + answer.ids.len();
        Ok(Written { answer, edit, tokens })
    };
    answers.into_iter().zip(asked).map(written).collect()
}

/// An answer to a question about picture `picture`.
pub struct Asked<'a> {
    pub picture: usize,
    pub question: &'a str,
    pub answer: &'a Answer,
}

/// Each answer's chosen tokens, in rows padded to one length.
pub struct Replay {
    /// `(B, C)`, differentiable.
    pub log_probs: Tensor,
    /// The mean entropy of the model's distributions over the whole vocabulary where tokens were chosen; the constraints
    /// that they were drawn under leave less.
    pub entropy: f64,
}

/// What was drawn of each answer: its chosen tokens' log-probabilities and a mask of where there are any, `(B, C)`.
pub fn drawn(answers: &[&Answer], device: &Device) -> Result<(Tensor, Tensor)> {
    let width = width(answers.iter().copied());
    let (mut log_probs, mut mask) = (Vec::new(), Vec::new());
    for answer in answers {
        let chosen = answer.logprobs.iter().zip(&answer.chosen).filter(|(_, chosen)| **chosen).map(|(p, _)| *p);
        let row: Vec<f32> = chosen.collect();
        mask.extend((0..width).map(|i| f32::from(u8::from(i < row.len()))));
        log_probs.extend((0..width).map(|i| row.get(i).copied().unwrap_or(0.0)));
    }
    let shape = (answers.len(), width);
    Ok((Tensor::from_vec(log_probs, shape, device)?, Tensor::from_vec(mask, shape, device)?))
}

/// The most chosen tokens of an answer.
fn width<'a>(answers: impl Iterator<Item = &'a Answer>) -> usize {
    answers.map(|a| a.chosen.iter().filter(|chosen| **chosen).count()).max().unwrap_or(0).max(1)
}

/// Reads the answers again.
pub fn replay(vlm: &Vlm, pictures: &[&RgbImage], asked: &[Asked]) -> Result<Replay> {
    let Vlm { model, images, .. } = vlm;
    let (config, device) = (model.config(), model.decoder.device());
    let patches = images.patches(pictures.iter().copied(), device)?;
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
    for Asked { question, answer, .. } in asked {
        let question = vlm.question(question, Some(grid))?;
        let rest = question.strip_prefix(&*prefix).context("the chat template writes text before the picture")?;
        begins.push(rest.len());
        rows.push([rest, &answer.ids].concat());
    }
    let longest = rows.iter().map(Vec::len).max().unwrap_or(0);
    let keys = rows.iter().map(|row| 0..prefix.len() + row.len()).collect();
    rows.iter_mut().for_each(|row| row.resize(longest, config.vision_end_token_id));
    let index: Vec<u32> = asked.iter().map(|a| a.picture as u32).collect();
    let angles = model.decoder.text_angles(next as usize, longest)?;
    let mask = Mask { causal: true, keys: Some(keys) };
    let states = model.forward(&rows, None, &angles, &mask, Some(&mut cache.rows(&index)?))?; // (B, longest, hidden)

    // The states in front of chosen tokens, and where each token goes in the padded rows; 0 is the padding.
    let width = width(asked.iter().map(|a| a.answer));
    let (mut places, mut targets, mut spread) = (Vec::new(), Vec::new(), vec![0u32; asked.len() * width]);
    for (row, (Asked { answer, .. }, begin)) in asked.iter().zip(&begins).enumerate() {
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
    let log_probs = padded.index_select(&Tensor::new(spread, device)?, 0)?.reshape((asked.len(), width))?; // (B, C)
    Ok(Replay { log_probs, entropy: entropy(&logits.detach())? })
}

/// The mean entropy of softmax distributions `(N, V)`.
fn entropy(logits: &Tensor) -> Result<f64> {
    let shifted = logits.broadcast_sub(&logits.max_keepdim(D::Minus1)?)?;
    let mass = shifted.exp()?;
    let total = mass.sum_keepdim(D::Minus1)?;
    let mean = ((mass * shifted)?.sum_keepdim(D::Minus1)? / &total)?;
    Ok(f64::from((total.log()? - mean)?.mean_all()?.to_scalar::<f32>()?))
}
