//! The prompt embedding of FLUX.2-klein: hidden states of a Qwen3 language model, some layers side by side.
//!
//! The prompt is the one user message of a conversation, rendered with the answer opened and thinking switched off,
//! cut or padded on the right to a fixed length (`Flux2KleinPipeline._get_qwen3_prompt_embeds` of diffusers).

use super::chat::{Chat, Message, Rendering};
use crate::{
    models::{Folder, Params, qwen3},
    tensor::Mask,
};
use anyhow::Result;
use candle_core::{D, DType, Device, Tensor};

/// A language model whose states condition a diffusion model.
pub struct TextEncoder {
    pub model: qwen3::Qwen3,
    pub chat: Chat,
}

/// A batch of prompts of one length.
pub struct Tokens {
    /// `(B, L)`.
    pub ids: Tensor,
    /// The prompts without their padding.
    pub mask: Mask,
}

impl TextEncoder {
    /// `model` is the folder `text_encoder`, `tokenizer` the folder `tokenizer` of a pipeline.
    pub fn open(model: &Folder, tokenizer: &Folder, dtype: DType, device: &Device) -> Result<Self> {
        Self::of(qwen3::Qwen3::open(model, dtype, device)?, Chat::open(tokenizer)?)
    }

    /// One to be trained, with its tensors at the root of `params`.
    pub fn new(config: &qwen3::Config, params: &Params, chat: Chat) -> Result<Self> {
        Self::of(qwen3::Qwen3::new(config, params)?, chat)
    }

    fn of(model: qwen3::Qwen3, chat: Chat) -> Result<Self> {
        chat.expect_within(model.decoder.config().vocab_size)?;
        Ok(Self { model, chat })
    }

    /// The ids of one prompt before padding: at most `max_length`.
    pub fn prompt_ids(&self, prompt: &str, max_length: usize) -> Result<Vec<u32>> {
        let mut ids = self.chat.encode(&self.chat.render(&[Message::user(prompt)], Rendering::default())?)?;
        ids.truncate(max_length);
        Ok(ids)
    }

    /// Renders, tokenizes, and pads every prompt to `max_length`.
    pub fn tokens(&self, prompts: &[&str], max_length: usize) -> Result<Tokens> {
        let rows = prompts.iter().map(|prompt| self.prompt_ids(prompt, max_length)).collect::<Result<Vec<_>>>()?;
        self.padded(&rows, max_length)
    }

    /// Pads the ids of every prompt to `length`.
    pub fn padded(&self, rows: &[Vec<u32>], length: usize) -> Result<Tokens> {
        let (mut ids, mut keys) = (Vec::with_capacity(rows.len() * length), Vec::with_capacity(rows.len()));
        for row in rows {
            keys.push(0..row.len());
            ids.extend_from_slice(row);
            ids.resize(keys.len() * length, self.chat.pad());
        }
        let ids = Tensor::from_vec(ids, (rows.len(), length), self.model.decoder.device())?;
        Ok(Tokens { ids, mask: Mask { causal: true, keys: Some(keys) } })
    }

    /// The hidden states `layers` side by side: `(B, L, layers * hidden)`. Gradients reach the model.
    pub fn embeds(&self, tokens: &Tokens, layers: &[usize]) -> Result<Tensor> {
        let states = self.model.decoder.hidden_states_at(&tokens.ids, &tokens.mask, layers)?;
        Ok(Tensor::cat(&states, D::Minus1)?)
    }

    /// [`Self::tokens`] and [`Self::embeds`] in one.
    pub fn prompt_embeds(&self, prompts: &[&str], max_length: usize, layers: &[usize]) -> Result<Tensor> {
        self.embeds(&self.tokens(prompts, max_length)?, layers)
    }
}
