//! A vision-language decoder: chat templates, images, batched and constrained generation.
//!
//! [`Vlm`] is a model folder opened for use: the model, its tokenizer and template, its image processor. Pictures are
//! looked at once ([`Vlm::look`]) and then asked any number of questions ([`Vlm::answer`], [`Vlm::decide`]).

pub mod chat;
pub mod constrain;
pub mod decode;
pub mod image;
pub mod prefix;
pub mod text_encoder;
pub mod vocabulary;

use crate::models::{Folder, qwen3_vl::Qwen3VL};
use ::image::RgbImage;
use anyhow::{Context, Result, ensure};
use chat::{Chat, Message, Rendering};
use constrain::{Grammar, Vocabulary};
use image::ImageProcessor;
use serde::Deserialize;
use serde_json::Value;
use std::{
    collections::HashMap,
    sync::{Arc, Mutex, PoisonError},
};

/// A vision-language model with all it takes to use it.
pub struct Vlm {
    pub model: Qwen3VL,
    pub chat: Chat,
    pub images: ImageProcessor,
    vocabulary: Arc<Vocabulary>,
    /// Tokens that end an answer.
    ends: Vec<u32>,
    grammars: Mutex<HashMap<String, Arc<Grammar>>>,
}

impl Vlm {
    /// Puts `model` together with the tokenizer and the processor of its folder, as `save_pretrained` of transformers
    /// writes them.
    pub fn of(model: Qwen3VL, folder: &Folder) -> Result<Self> {
        #[derive(Deserialize)]
        #[serde(untagged)]
        enum Ends {
            One(u32),
            Many(Vec<u32>),
        }
        #[derive(Deserialize)]
        struct Generation {
            eos_token_id: Option<Ends>,
        }
        let mut this = Self::new(model, Chat::open(folder)?, ImageProcessor::open(folder)?)
            .with_context(|| format!("the parts of {} do not fit", folder.name()))?;
        if folder.has("generation_config.json") {
            match folder.json::<Generation>("generation_config.json")?.eos_token_id {
                Some(Ends::One(end)) => this.ends = vec![end],
                Some(Ends::Many(ends)) => this.ends = ends,
                None => {}
            }
        }
        Ok(this)
    }

    pub fn new(model: Qwen3VL, chat: Chat, images: ImageProcessor) -> Result<Self> {
        let vision = &model.config().vision_config;
        ensure!(
            (images.patch_size, images.merge_size, images.temporal_patch_size)
                == (vision.patch_size, vision.spatial_merge_size, vision.temporal_patch_size),
            "the image processor cuts pictures otherwise than the vision tower reads them"
        );
        let vocabulary = Arc::new(Vocabulary::new(&chat));
        let ends = chat.special("eos_token").into_iter().collect();
        Ok(Self { model, chat, images, vocabulary, ends, grammars: Mutex::default() })
    }

    /// The grammar of a JSON schema, compiled at its first use.
    pub fn grammar(&self, schema: &Value) -> Result<Arc<Grammar>> {
        let key = schema.to_string();
        let mut grammars = self.grammars.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(grammar) = grammars.get(&key) {
            return Ok(grammar.clone());
        }
        let grammar = Arc::new(Grammar::new(schema, self.vocabulary.clone())?);
        // The words of a schema may be those of one picture.
        const KEPT: usize = 16;
        if grammars.len() >= KEPT {
            grammars.clear();
        }
        grammars.insert(key, grammar.clone());
        Ok(grammar)
    }

    /// The ids of a question up to where its answer begins; behind a picture of `grid` patches if there is one.
    pub fn question(&self, text: &str, grid: Option<[usize; 2]>) -> Result<Vec<u32>> {
        let message = if grid.is_some() { Message::about_image(text) } else { Message::user(text) };
        let ids = self.chat.encode(&self.chat.render(&[message], Rendering::default())?)?;
        let config = self.model.config();
        let count = grid.map_or(0, |[rows, columns]| rows * columns / config.vision_config.spatial_merge_size.pow(2));
        let mut expanded = Vec::with_capacity(ids.len() + count);
        for id in ids {
            let times = if id == config.image_token_id { count } else { 1 };
            expanded.extend(std::iter::repeat_n(id, times));
        }
        Ok(expanded)
    }

    /// The ids of an answer, as they are decoded: what follows [`Vlm::question`], and the token that ends it.
    pub fn reply(&self, text: &str) -> Result<Vec<u32>> {
        let mut ids = self.chat.encode(text)?;
        ids.extend(self.ends.first());
        Ok(ids)
    }

    /// Reads pictures, and the words that come before any question about them.
    pub fn look(&self, pictures: &[&RgbImage]) -> Result<prefix::Looked<'_>> {
        let device = self.model.decoder.device();
        let patches = self.images.patches(pictures.iter().copied(), device)?;
        prefix::Looked::new(self, &patches)
    }
}
