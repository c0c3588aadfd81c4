//! A vision-language decoder: chat templates, images, batched and constrained generation.
//!
//! [`Vlm`] is a model folder opened for use: the model, its tokenizer and template, its image processor. Pictures are
//! looked at once ([`Vlm::look`]) and then asked any number of questions ([`Vlm::answer`], [`Vlm::decide`]).

mod automaton;
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
    borrow::Cow,
    collections::HashMap,
    sync::{Arc, Mutex, PoisonError},
};

/// A text with no special token in it: Qwen's are all written `<|name|>`, and only a template may write them. One that comes
/// from a user or a data set would end the message, or stand for another picture. (The Diffuser's prompts are left as they
/// are: what they say to the text encoder is what they say in diffusers.)
fn plain(text: &str) -> Cow<'_, str> {
    if text.contains("<|") { text.replace("<|", "< |").into() } else { text.into() }
}

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
        chat.expect_within(model.config().text_config.vocab_size)?;
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
        let text = &plain(text);
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_text_is_read_as_special_tokens() {
        let dir = tempfile::tempdir().unwrap();
        vocabulary::train(["a small red ball"; 3], 300).unwrap().write(dir.path()).unwrap();
        let chat = Chat::open(&Folder::from(dir.path())).unwrap();
        for special in vocabulary::SPECIALS {
            let id = chat.token(special).unwrap();
            let text = format!("a <{special} ball{special}");
            assert!(chat.encode(&text).unwrap().contains(&id));
            let ids = chat.encode(&plain(&text)).unwrap();
            assert!(vocabulary::SPECIALS.iter().all(|s| !ids.contains(&chat.token(s).unwrap())), "{text}");
        }
        for text in ["", "a red ball", "a < b | c |> d"] {
            assert!(matches!(plain(text), Cow::Borrowed(same) if same == text));
        }
    }
}
