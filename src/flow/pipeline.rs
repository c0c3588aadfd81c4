//! FLUX.2-klein: prompts to pictures, and pictures to edited pictures; `Flux2KleinPipeline` of diffusers.
//!
//! A folder has `model_index.json`, `transformer/`, `vae/`, `text_encoder/`, `tokenizer/` and `scheduler/`. Two numbers that
//! diffusers takes as arguments of each call are properties of the model: the length that prompts are padded to and the text
//! encoder's layers whose states are used. They are read from an extra key of `text_encoder/config.json`,
//!
//! ```json
//! "prompt_embedding": {"max_length": 48, "layers": [1, 2, 3]}
//! ```
//!
//! which transformers keeps as an attribute of its config, so the folder still loads with `from_pretrained`; klein's own
//! (512; 9, 18, 27) hold where it is absent. A picture's size is `sample_size` of the autoencoder unless asked otherwise.
//!
//! Pictures are latents here, `(C, h, w)` in f32 as the transformer sees them: an edit needs no encoding of what was drawn,
//! and pixels are made when someone looks. Every picture begins with noise of its own stream and is the same alone or in any
//! batch.

use super::{
    field::{Field, Given, Guidance, unpack},
    schedule::Schedule,
};
use crate::{
    models::{
        Adapter, Folder, Params, autoencoder, flux2,
        pixels::{to_pictures, to_tensor},
    },
    tensor::rng::Stream,
    usage,
    vlm::text_encoder::TextEncoder,
};
use anyhow::{Context, Result, ensure};
use candle_core::{DType, Device, Tensor};
use image::{RgbImage, imageops};
use serde::{Deserialize, Serialize};
use std::{
    borrow::Cow,
    collections::{HashMap, VecDeque},
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
};

/// How prompts become embeddings; the defaults are klein's.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PromptEmbedding {
    /// Prompts are padded or cut to this many tokens.
    pub max_length: usize,
    /// The hidden states that are used, as transformers numbers them.
    pub layers: Vec<usize>,
}

impl Default for PromptEmbedding {
    fn default() -> Self {
        Self { max_length: 512, layers: vec![9, 18, 27] }
    }
}

/// Prompt embeddings made before, the oldest of them dropped first.
#[derive(Default)]
struct Embeddings {
    made: HashMap<String, Tensor>,
    order: VecDeque<String>,
}

/// How many prompt embeddings are kept.
const KEPT_EMBEDDINGS: usize = 64;
/// How many pixels are decoded together, which bounds the memory that takes.
const DECODED_PIXELS: usize = 1 << 20;
/// A prompt of more tokens is none: memory is taken for all of them.
const LONGEST_PROMPT: usize = 1 << 15;
/// A reference with more pixels than this is scaled down to it, as klein does.
const REFERENCE_PIXELS: u32 = 1 << 20;

/// The pipeline.
pub struct Klein {
    pub transformer: flux2::Flux2,
    pub autoencoder: autoencoder::Autoencoder,
    pub text: TextEncoder,
    pub schedule: Schedule,
    pub prompt_embedding: PromptEmbedding,
    /// Whether guidance is distilled into the weights.
    pub distilled: bool,
    /// What the transformer computes in.
    dtype: DType,
    device: Device,
    embeddings: Mutex<Embeddings>,
    evaluations: AtomicU64,
}

#[derive(Deserialize)]
struct Index {
    #[serde(rename = "_class_name")]
    class_name: String,
    #[serde(default)]
    is_distilled: bool,
}

#[derive(Deserialize)]
struct TextConfig {
    #[serde(default)]
    prompt_embedding: PromptEmbedding,
}

impl Klein {
    /// Opens a pipeline's folder. `adapters` are for the transformer.
    pub fn open(folder: &Folder, dtype: DType, device: &Device, adapters: Vec<Adapter>) -> Result<Self> {
        Ok(Self::open_with(folder, dtype, device, adapters, Vec::new())?.0)
    }

    /// Opens a pipeline's folder, and for each of `others` a transformer on the same weights with these adapters instead.
    pub fn open_with(
        folder: &Folder,
        dtype: DType,
        device: &Device,
        adapters: Vec<Adapter>,
        others: Vec<Vec<Adapter>>,
    ) -> Result<(Self, Vec<flux2::Flux2>)> {
        let index: Index = folder.json("model_index.json")?;
        ensure!(
            index.class_name == "Flux2KleinPipeline",
            "{} is a {}, but only Flux2KleinPipeline is supported",
            folder.name(),
            index.class_name
        );
        let part = |name: &str| folder.require(name);
        let sub = |name: &str| format!("the model in {}", folder.file(name));
        let stem = "diffusion_pytorch_model";
        let params = Params::open(&part("transformer")?, stem, dtype, device)?.adapted(adapters);
        let config = part("transformer")?.json("config.json")?;
        let transformer = flux2::Flux2::new(&config, &params).with_context(|| sub("transformer"))?;
        params.finish(|_| false)?;
        let others = others.into_iter().map(|adapters| flux2::Flux2::new(&config, &params.again(adapters)));
        let others = others.collect::<Result<_>>()?;
        // The autoencoder is small, and half precision shows in its pictures.
        let params = Params::open(&part("vae")?, stem, DType::F32, device)?;
        let autoencoder =
            autoencoder::Autoencoder::new(&part("vae")?.json("config.json")?, &params).with_context(|| sub("vae"))?;
        let text = TextEncoder::open(&part("text_encoder")?, &part("tokenizer")?, dtype, device)?;
        let TextConfig { prompt_embedding } = part("text_encoder")?.json("config.json")?;
        let schedule = Schedule::open(&part("scheduler")?)?;
        let parts = Parts { transformer, autoencoder, text, schedule, prompt_embedding, distilled: index.is_distilled };
        let this = Self::new(parts, dtype, device);
        Ok((this.with_context(|| format!("the parts of {} do not fit together", folder.name()))?, others))
    }

    /// A pipeline of parts at hand, such as those that are being trained. `dtype` is what the transformer computes in.
    pub fn new(parts: Parts, dtype: DType, device: &Device) -> Result<Self> {
        let Parts { transformer, autoencoder, text, schedule, prompt_embedding, distilled } = parts;
        let config = transformer.config();
        let (got, want) = (config.in_channels, autoencoder.config.token_channels());
        ensure!(
            got == want,
            "the transformer's in_channels is {got}, but the autoencoder's tokens have {want} channels"
        );
        let states = text.model.decoder.config();
        let (got, want) = (config.joint_attention_dim, states.hidden_size * prompt_embedding.layers.len());
        ensure!(got == want, "the transformer's joint_attention_dim is {got}, but prompts have {want} channels");
        ensure!(
            prompt_embedding.layers.iter().all(|l| *l <= states.num_hidden_layers)
                && (1..=states.max_position_embeddings).contains(&prompt_embedding.max_length),
            "the text encoder has no states {prompt_embedding:?}"
        );
        ensure!(
            prompt_embedding.max_length <= LONGEST_PROMPT,
            "prompts of {} tokens: prompt_embedding.max_length is at most {LONGEST_PROMPT}",
            prompt_embedding.max_length
        );
        Ok(Self {
            transformer,
            autoencoder,
            text,
            schedule,
            prompt_embedding,
            distilled,
            dtype,
            device: device.clone(),
            embeddings: Mutex::default(),
            evaluations: AtomicU64::new(0),
        })
    }

    /// What the transformer computes in.
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    pub fn device(&self) -> &Device {
        &self.device
    }

    /// Evaluations of the transformer so far, counted for each picture and each branch of guidance.
    pub fn evaluations(&self) -> u64 {
        self.evaluations.load(Ordering::Relaxed)
    }

    /// Width and height that a picture has unless asked otherwise.
    pub fn default_size(&self) -> (u32, u32) {
        (self.autoencoder.config.sample_size as u32, self.autoencoder.config.sample_size as u32)
    }

    /// Tokens `(h, w)` of a picture of `width x height` pixels; what is not a whole token is cut off.
    pub fn tokens(&self, width: u32, height: u32) -> Result<(usize, usize)> {
        let side = self.autoencoder.config.pixels_per_token() as u32;
        if width < side || height < side || width > 1 << 14 || height > 1 << 14 {
            usage!("a picture of this model has sides of {side} to {} pixels, not {width}x{height}", 1 << 14);
        }
        Ok(((height / side) as usize, (width / side) as usize))
    }

    /// The noise `(C, h, w)` that picture `index` of `seed` begins with.
    pub fn noise(&self, seed: u64, index: u64, (h, w): (usize, usize)) -> candle_core::Result<Tensor> {
        Stream::new(seed, "noise", index).normal(&[self.transformer.config().in_channels, h, w], &self.device)
    }

    /// Noise from a file, one `(C, h, w)` for each picture: `(B, C, h, w)`, the `latents` of diffusers' pipelines, or packed
    /// into tokens `(B, h w, C)`, for pictures of `size` tokens. The first dimension may lack where one picture is meant.
    pub fn given_noise(&self, noise: &Tensor, size: (usize, usize)) -> Result<Vec<Tensor>> {
        let channels = self.transformer.config().in_channels;
        let (h, w) = size;
        let noise = noise.to_dtype(DType::F32)?.to_device(&self.device)?;
        let all = match *noise.dims() {
            [c, y, x] if (c, y, x) == (channels, h, w) => vec![noise.clone()],
            [n, c] if (n, c) == (h * w, channels) => vec![unpack(&noise, h, w)?],
            [b, c, y, x] if (c, y, x) == (channels, h, w) => (0..b).map(|i| noise.get(i)).collect::<Result<_, _>>()?,
            [b, n, c] if (n, c) == (h * w, channels) => {
                (0..b).map(|i| unpack(&noise.get(i)?, h, w)).collect::<Result<_, _>>()?
            }
            ref other => usage!(
                "noise for pictures of {h}x{w} tokens is (B, {channels}, {h}, {w}) or (B, {}, {channels}), not {other:?}",
                h * w
            ),
        };
        let sum = noise.sqr()?.sum_all()?.to_scalar::<f32>()?;
        if !sum.is_finite() {
            usage!("the given noise holds numbers that are not finite");
        }
        Ok(all)
    }

    /// The embeddings `(L, D)` of prompts, without gradients; those of prompts seen lately are kept.
    pub fn embed(&self, prompts: &[&str]) -> Result<Vec<Tensor>> {
        let store = || self.embeddings.lock().unwrap_or_else(PoisonError::into_inner);
        let made =
            |store: &Embeddings| prompts.iter().filter_map(|p| Some((*p, store.made.get(*p)?.clone()))).collect();
        let mut found: HashMap<&str, Tensor> = made(&store());
        let mut new: Vec<&str> = Vec::new();
        for prompt in prompts {
            if !found.contains_key(prompt) && !new.contains(prompt) {
                new.push(prompt);
            }
        }
        if !new.is_empty() {
            let PromptEmbedding { max_length, layers } = &self.prompt_embedding;
            for prompt in &new {
                if !self.reads(prompt)? {
                    let start: String = prompt.chars().take(60).collect();
                    tracing::warn!("the prompt \"{start}...\" is cut: the model reads {max_length} tokens");
                }
            }
            // Not under the lock: a thread that waits within this parallel work may take up a task that asks here too.
            let made = self.text.prompt_embeds(&new, *max_length, layers)?.detach();
            let mut store = store();
            for (i, prompt) in new.into_iter().enumerate() {
                let embedding = made.get(i)?;
                found.insert(prompt, embedding.clone());
                if store.made.insert(prompt.to_owned(), embedding).is_none() {
                    store.order.push_back(prompt.to_owned());
                }
            }
            while store.order.len() > KEPT_EMBEDDINGS {
                if let Some(oldest) = store.order.pop_front() {
                    store.made.remove(&oldest);
                }
            }
        }
        prompts.iter().map(|p| found.get(p).cloned().context("a prompt without an embedding")).collect()
    }

    /// Whether a prompt is read to its end.
    pub fn reads(&self, prompt: &str) -> Result<bool> {
        let most = self.prompt_embedding.max_length;
        Ok(self.text.prompt_ids(prompt, most + 1)?.len() <= most)
    }

    /// Forgets all embeddings: the text encoder has changed.
    pub fn forget(&self) {
        *self.embeddings.lock().unwrap_or_else(PoisonError::into_inner) = Embeddings::default();
    }

    /// Whether guidance does anything: by the prompt above 1, as in diffusers, and by references where there are any.
    fn guided(&self, guidance: Guidance, references: &[Vec<Tensor>]) -> bool {
        let by_references = guidance.image != 1.0 && references.iter().any(|of_one| !of_one.is_empty());
        (guidance.text > 1.0 || by_references) && !self.distilled
    }

    /// The velocity field of pictures of `size` tokens under prompts, with references for each; it counts into
    /// [`Klein::evaluations`]. Its states are `(B, h w, C)`.
    pub fn field(
        &self,
        prompts: &[&str],
        references: &[Vec<Tensor>],
        size: (usize, usize),
        guidance: impl Into<Guidance>,
    ) -> Result<Field<'_>> {
        self.field_of(&self.transformer, prompts, references, size, guidance)
    }

    /// The same by another transformer of the same shape, such as one with adapters.
    pub fn field_of<'a>(
        &'a self,
        transformer: &'a flux2::Flux2,
        prompts: &[&str],
        references: &[Vec<Tensor>],
        size: (usize, usize),
        guidance: impl Into<Guidance>,
    ) -> Result<Field<'a>> {
        let (text, guidance) = (self.embed(prompts)?, guidance.into());
        let negative = if self.guided(guidance, references) { self.embed(&[""])?.pop() } else { None };
        let given = Given { text: &text, guidance: negative.as_ref().map(|n| (n, guidance)), references, size };
        Field::new(transformer, (self.dtype, &self.device), &given, &self.evaluations)
    }

    /// The latents `(C, h, w)` of a picture, which is cut to whole tokens around its middle; larger pictures than klein reads
    /// are scaled down first.
    pub fn encode(&self, picture: &RgbImage) -> Result<Tensor> {
        let picture = scaled(picture);
        let (width, height) = picture.dimensions();
        let (h, w) = self.tokens(width, height)?;
        let side = self.autoencoder.config.pixels_per_token();
        let (w, h) = ((w * side) as u32, (h * side) as u32);
        let cut = imageops::crop_imm(&*picture, (width - w) / 2, (height - h) / 2, w, h).to_image();
        Ok(self.autoencoder.latents(&to_tensor(&[cut], &self.device)?)?.squeeze(0)?.detach())
    }

    /// The pixels of latents `(C, h, w)`, decoded together where their sizes agree.
    pub fn decode(&self, latents: &[Tensor]) -> Result<Vec<RgbImage>> {
        let side = self.autoencoder.config.pixels_per_token();
        let mut pictures = Vec::with_capacity(latents.len());
        for same in latents.chunk_by(|a, b| a.dims() == b.dims()) {
            let (_, h, w) = same[0].dims3()?;
            let together = (DECODED_PIXELS / (h * w * side * side)).max(1);
            for batch in same.chunks(together) {
                pictures.extend(self.decode_together(batch)?);
            }
        }
        Ok(pictures)
    }

    /// The pixels of latents of one size.
    fn decode_together(&self, latents: &[Tensor]) -> Result<Vec<RgbImage>> {
        let pixels = self.autoencoder.pixels(&Tensor::stack(latents, 0)?)?; // (B, 3, H, W)
        let finite = pixels.sqr()?.sum_all()?.to_scalar::<f32>()?.is_finite();
        ensure!(finite, "the autoencoder gave numbers that are not finite: its weights are broken");
        to_pictures(&pixels)
    }
}

/// The parts of a pipeline.
pub struct Parts {
    pub transformer: flux2::Flux2,
    pub autoencoder: autoencoder::Autoencoder,
    pub text: TextEncoder,
    pub schedule: Schedule,
    pub prompt_embedding: PromptEmbedding,
    pub distilled: bool,
}

/// A picture of at most [`REFERENCE_PIXELS`], in its own proportions.
fn scaled(picture: &RgbImage) -> Cow<'_, RgbImage> {
    let (width, height) = picture.dimensions();
    let (w, h) = (f64::from(width), f64::from(height));
    if w * h <= f64::from(REFERENCE_PIXELS) {
        return Cow::Borrowed(picture);
    }
    let scale = (f64::from(REFERENCE_PIXELS) / (w * h)).sqrt();
    let side = |length: f64| ((length * scale) as u32).max(1);
    Cow::Owned(imageops::resize(picture, side(w), side(h), imageops::FilterType::Lanczos3))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn references_are_scaled_down_to_what_klein_reads() {
        let of = |w, h| scaled(&RgbImage::new(w, h)).dimensions();
        assert_eq!(of(1024, 1024), (1024, 1024));
        assert_eq!(of(2000, 700), (1730, 605)); // as int(side * sqrt(2^20 / area)) is in Python
        assert_eq!(of(1025, 1024), (1024, 1023));
    }
}
