//! Pretraining of the Diffuser and Editor: one FLUX.2 transformer that learns to draw from text and to edit by
//! reference, together with its text encoder, on the tabletop world.
//!
//! Rectified flow (arXiv 2209.03003): `x_t = (1 - t) x_0 + t e` with noise `e`, and the network learns the velocity
//! `e - x_0`. Noise levels are drawn uniformly and shifted to the high end, where a picture's layout is decided. Words are
//! bound best by a curriculum: single objects first, then relations, then edits ([`Stage`]).
//!
//! Instead of all weights an adapter can be trained: on edits alone the Editor's, which the Diffuser draws without, or on
//! drawings, too.

mod held_out;

use self::held_out::Kind;
use super::{
    Batch, Metrics, Objective, Step,
    ahead::Ahead,
    checkpoint::write_model,
    diffuser_config::{DiffuserConfig, Stage, TextConfig},
    drawn, editor,
    layout::{Labels, LayoutHead},
    pixels::write_sheet,
};
use crate::{
    flow::{
        pipeline::{Klein, Parts, PromptEmbedding},
        schedule::Schedule,
    },
    models::{Adapter, Folder, Params, autoencoder, flux2, peft, pixels::planes, qwen3},
    scene::tabletop::{
        edit::PLACES,
        render::render,
        split::Split,
        tasks::{self, Emphasis},
        world::{SIDE, Scene},
    },
    tensor::rng::Stream,
    vlm::{chat::Chat, text_encoder::TextEncoder, vocabulary},
};
use anyhow::{Context, Result, ensure};
use candle_core::{DType, Device, Tensor, Var};
use rayon::prelude::*;
use serde::Deserialize;
use serde_json::json;
use std::{
    collections::{BTreeMap, HashMap},
    fs,
    path::{Path, PathBuf},
};

/// A prompt, the picture it asks for, and the picture it edits.
struct Example {
    prompt: String,
    target: Scene,
    source: Option<Source>,
}

/// A picture to be edited.
struct Source {
    scene: Scene,
    /// Which of the drawn pictures it is, if it is no render of the scene.
    drawn: Option<usize>,
}

/// Rendered pictures.
struct Rendered {
    pixels: Vec<f32>,
    /// What lies in their cells.
    labels: Labels,
    /// For each token 1 if two things overlap in it.
    overlaps: Vec<f32>,
}

/// Samples that all draw, or all edit, as numbers on the host.
struct Part {
    /// The metric of their loss.
    name: &'static str,
    /// The pictures to be drawn.
    targets: Rendered,
    /// Those to be edited, and noise for their latents.
    sources: Option<(Rendered, Vec<f32>)>,
    noise: Vec<f32>,
    /// The noise level of each sample.
    levels: Vec<f32>,
    prompts: Vec<Vec<u32>>,
    /// Tokens that the prompts are padded to.
    length: usize,
}

pub struct Diffuser {
    config: DiffuserConfig,
    seed: u64,
    klein: Klein,
    transformer: Params,
    text: Params,
    /// What is trained of the transformer, if not all of it; the text encoder then stays as it is.
    adapter: Option<Adapter>,
    layout: LayoutHead,
    /// The layout head's, which is not a part of the saved model.
    head: Params,
    tokenizer: vocabulary::Vocabulary,
    /// Drawn pictures to be edited, and held-out ones.
    drawn: Vec<drawn::Drawn>,
    drawn_held_out: Vec<drawn::Drawn>,
    ahead: Ahead<Vec<Part>>,
}

/// How often the edit of a picture which misses what it should show asks for that, instead of for another edit.
const MENDED: f64 = 0.7;
/// Texts that the tokenizer learns from.
const TOKENIZER_TEXTS: u64 = 10_000;

impl Diffuser {
    pub fn new(config: &DiffuserConfig, seed: u64, device: &Device) -> Result<Self> {
        config.check()?;
        let vae = Folder::from(&config.autoencoder);
        let weights = Params::open(&vae, STEM, DType::F32, device)?;
        let autoencoder = autoencoder::Autoencoder::new(&vae.json("config.json")?, &weights)?;
        let adapter = config.adapter.as_ref().map(|a| a.fresh(editor::TARGETS, seed)).transpose()?;
        let open = |params: Result<Params>| {
            let params = params?.multiplied_in(config.precision);
            Ok::<_, anyhow::Error>(if adapter.is_some() { params } else { params.trained() })
        };
        let (transformer, text, sizes, text_sizes, prompt_embedding, tokenizer);
        match &config.init {
            Some(folder) => {
                let folder = Folder::from(folder);
                let (t, e) = (folder.require("transformer")?, folder.require("text_encoder")?);
                transformer =
                    open(Params::open(&t, STEM, DType::F32, device))?.adapted(adapter.iter().cloned().collect());
                text = open(Params::open(&e, "model", DType::F32, device))?;
                sizes = t.json("config.json")?;
                text_sizes = e.json("config.json")?;
                prompt_embedding = e.json::<PromptSection>("config.json")?.prompt_embedding;
                let tokenizer_folder = folder.require("tokenizer")?;
                let read = |name: &str| -> Result<String> {
                    let file = || tokenizer_folder.file(name);
                    String::from_utf8(tokenizer_folder.read(name)?.into_owned())
                        .with_context(|| format!("{} is not UTF-8", file()))
                };
                tokenizer = vocabulary::Vocabulary {
                    tokenizer: read("tokenizer.json")?,
                    config: read("tokenizer_config.json")?,
                };
            }
            None => {
                transformer = open(Ok(Params::fresh(seed, DType::F32, device)))?;
                text = open(Ok(Params::fresh(seed ^ 1, DType::F32, device)))?;
                let texts = (0..TOKENIZER_TEXTS).into_par_iter().flat_map_iter(|i| {
                    let edit = tasks::edit(seed, Split::Train, i, 1, 3);
                    [tasks::text_to_image(seed, Split::Train, i, 1, 3).prompt, edit.instruction]
                });
                tokenizer = vocabulary::train(texts.collect::<Vec<_>>(), config.text.vocabulary)?;
                sizes = transformer_sizes(config, autoencoder.config.token_channels());
                text_sizes = text_encoder_sizes(&config.text)?;
                prompt_embedding =
                    PromptEmbedding { max_length: config.max_length, layers: (1..=config.text.layers).collect() };
            }
        }
        let folder = tempfile::tempdir()?;
        tokenizer.write(folder.path())?;
        let encoder = TextEncoder::new(&text_sizes, &text, Chat::open(&Folder::from(folder.path()))?)?;
        text.finish(|_| false)?;
        let network = flux2::Flux2::new(&sizes, &transformer)?;
        transformer.finish(|_| false)?;
        adapter.as_ref().map(Adapter::check).transpose()?;
        let parts = Parts {
            transformer: network,
            autoencoder,
            text: encoder,
            schedule: schedule()?,
            prompt_embedding,
            distilled: false,
        };
        let klein = Klein::new(parts, DType::F32, device)?;
        let head = Params::fresh(seed ^ 2, DType::F32, device).trained();
        let token = SIDE as usize / klein.tokens(SIDE, SIDE)?.0;
        let layout = LayoutHead::new(sizes.dim(), token, &head)?;
        let (drawn, drawn_held_out) = drawn::open(&config.drawn)?;
        let (config, ahead) = (config.clone(), Ahead::default());
        Ok(Self {
            config,
            seed,
            klein,
            transformer,
            text,
            adapter,
            layout,
            head,
            tokenizer,
            drawn,
            drawn_held_out,
            ahead,
        })
    }

    /// Sample `index` of the endless sequence.
    fn example(&self, stage: &Stage, index: u64) -> Example {
        let mut rng = Stream::new(self.seed, "diffuser example", index);
        let edit = rng.chance(stage.edits);
        let dropped = rng.chance(self.config.dropout);
        let Stage { min_objects: min, max_objects: max, touching, moves, several_places, .. } = *stage;
        let at_hand = if edit { self.edit_of_drawn(&mut rng, index, several_places) } else { None };
        let mut example = if let Some(example) = at_hand {
            example
        } else if edit {
            let emphasis = Emphasis { touching, moves, several_places };
            let sample = tasks::edit_with(self.seed, Split::Train, index, min, max, emphasis);
            let source = Source { scene: sample.source, drawn: None };
            Example { prompt: sample.instruction, target: sample.target, source: Some(source) }
        } else {
            let sample = tasks::text_to_image_touching(self.seed, Split::Train, index, min, max, touching);
            Example { prompt: sample.prompt, target: sample.scene, source: None }
        };
        if dropped {
            example.prompt.clear();
        }
        example
    }

    /// An edit of a drawn picture, if it is the turn of one: what it shows, as the oracle reads it, is to be kept, and what
    /// is broken in it is to be mended. Where it is known what it should show, it is to show that, whichever of its faults is
    /// named.
    fn edit_of_drawn(&self, rng: &mut Stream, index: u64, several_places: f64) -> Option<Example> {
        if self.drawn.is_empty() || !rng.chance(self.config.drawn_share) {
            return None;
        }
        let place = rng.below(self.drawn.len());
        let drawn = &self.drawn[place];
        let scene = drawn.scene.as_ref().unwrap_or(&drawn.reading.scene);
        let mended = drawn.scene.as_ref().and_then(|scene| {
            let named = rng.chance(MENDED);
            let places = if rng.share(several_places) { PLACES } else { 1 };
            let view = &drawn.reading.view;
            let named = named.then(|| tasks::mending(self.seed, index, view, &drawn.graph, places));
            Some((named??, scene.clone()))
        });
        let (prompt, target) =
            mended.or_else(|| tasks::edit_of(self.seed, index, scene, &drawn.graph, several_places))?;
        Some(Example { prompt, target, source: Some(Source { scene: scene.clone(), drawn: Some(place) }) })
    }

    /// The samples of a batch: those that draw, and those that edit.
    fn parts(&self, batch: &Batch) -> Result<Vec<Part>> {
        let stage = self.config.stage(batch.step);
        let examples: Vec<(u64, Example)> =
            batch.indices().into_par_iter().map(|i| (i, self.example(stage, i))).collect();
        let (edits, prompts): (Vec<_>, Vec<_>) = examples.into_iter().partition(|(_, e)| e.source.is_some());
        let some = [("loss/draw", prompts), ("loss/edit", edits)].into_iter().filter(|(_, e)| !e.is_empty());
        some.map(|(name, examples)| self.part(name, &examples, batch.size)).collect()
    }

    fn part(&self, name: &'static str, examples: &[(u64, Example)], batch: usize) -> Result<Part> {
        let (h, w) = self.klein.tokens(SIDE, SIDE)?;
        let numbers = h * w * self.klein.autoencoder.config.token_channels();
        let rendered = |scenes: &[(&Scene, Option<usize>)]| {
            let picture = |(scene, drawn): &(&Scene, Option<usize>)| match drawn {
                Some(place) => planes(&self.drawn[*place].picture),
                None => planes(&render(scene)),
            };
            let pixels: Vec<Vec<f32>> = scenes.par_iter().map(picture).collect();
            let scenes: Vec<&Scene> = scenes.iter().map(|(scene, _)| *scene).collect();
            let (labels, overlaps) = (self.layout.labels(&scenes), self.layout.overlaps(&scenes));
            Rendered { pixels: pixels.concat(), labels, overlaps }
        };
        // Of each sample's stream a uniform number, then noise for a picture.
        let draw = |purpose: &str| -> (Vec<f64>, Vec<Vec<f32>>) {
            let row = |(index, _): &(u64, Example)| {
                let mut rng = Stream::new(self.seed, purpose, *index);
                (rng.uniform(), rng.normals(numbers))
            };
            examples.par_iter().map(row).unzip()
        };
        let (uniform, noise) = draw("diffuser noise");
        let level = |((index, _), uniform): (&(u64, Example), f64)| {
            // The levels of a whole batch are spread evenly, each in a stratum of its own.
            let u = ((index % batch as u64) as f64 + uniform) / batch as f64;
            (self.config.shift * u / (1.0 + (self.config.shift - 1.0) * u)) as f32
        };
        let (levels, noise) = (examples.iter().zip(uniform).map(level).collect(), noise.concat());
        let sources: Option<Vec<_>> =
            examples.iter().map(|(_, e)| e.source.as_ref().map(|source| (&source.scene, source.drawn))).collect();
        let sources = sources.map(|sources| {
            let (uniform, mut blur) = draw("diffuser reference");
            for (row, uniform) in blur.iter_mut().zip(uniform) {
                let strength = (self.config.reference_noise * uniform) as f32;
                row.iter_mut().for_each(|x| *x *= strength);
            }
            (rendered(&sources), blur.concat())
        });
        let max_length = self.klein.prompt_embedding.max_length;
        let ids = |(_, e): &(u64, Example)| self.klein.text.prompt_ids(&e.prompt, max_length);
        let prompts = examples.par_iter().map(ids).collect::<Result<Vec<_>>>()?;
        // The length that prompts are padded to varies, so that it does not matter; short ones cost less.
        let longest = prompts.iter().map(Vec::len).max().unwrap_or(1);
        let full = Stream::new(self.seed, "diffuser padding", examples[0].0).chance(0.25);
        let length = if full { max_length } else { longest.next_multiple_of(8).min(max_length) };
        let targets = rendered(&examples.iter().map(|(_, e)| (&e.target, None)).collect::<Vec<_>>());
        Ok(Part { name, targets, sources, noise, levels, prompts, length })
    }

    /// The latents of pictures as tokens, `(B, N, C)`.
    fn tokens(&self, pixels: &[f32], count: usize) -> Result<Tensor> {
        let shape = (count, 3, SIDE as usize, SIDE as usize);
        let pixels = Tensor::from_slice(pixels, shape, self.klein.device())?;
        Ok(self.klein.autoencoder.latents(&pixels)?.flatten_from(2)?.transpose(1, 2)?.contiguous()?)
    }

    /// The mean squared error of the velocity and the error of what lies where, of each sample, `(B)`.
    fn losses(&self, part: &Part, step: u64) -> Result<(Tensor, Tensor)> {
        let device = self.klein.device();
        let b = part.levels.len();
        let targets = self.tokens(&part.targets.pixels, b)?;
        let (_, n, c) = targets.dims3()?;
        let noise = Tensor::from_slice(&part.noise, (b, n, c), device)?;
        let sigma = Tensor::from_slice(&part.levels, b, device)?;
        let t = sigma.reshape((b, 1, 1))?;
        let velocity = (&noise - &targets)?;
        let mut x = (&targets + velocity.broadcast_mul(&t)?)?;

        let side = (n as f64).sqrt() as usize;
        let mut positions = flux2::image_positions(0, side, side);
        if let Some((sources, blur)) = &part.sources {
            let references = (self.tokens(&sources.pixels, b)? + Tensor::from_slice(blur, (b, n, c), device)?)?;
            x = Tensor::cat(&[x, references], 1)?; // (B, 2 N, C)
            positions.extend(flux2::image_positions(10, side, side));
        }

        let text = self.klein.text.padded(&part.prompts, part.length)?;
        let text = self.klein.text.embeds(&text, &self.klein.prompt_embedding.layers)?;
        let mut sequence = flux2::text_positions(part.length);
        sequence.extend(positions);
        let angles = self.klein.transformer.angles(&sequence, device)?;
        let given = flux2::Conditioning { text: &text, sigma: &sigma, guidance: None, angles: &angles };
        let (predicted, hidden) = self.klein.transformer.forward_drawn(&x, &given, n)?;
        // A trained model is not to be bent towards a head that knows nothing yet.
        let young = self.config.init.is_some() && step < YOUNG;
        let hidden = if young { hidden.detach() } else { hidden };
        // Which of two things hides the other is seen in few tokens. These count more the less noise there is: where the
        // noise leaves open what lies where, the weight would draw things together.
        let overlaps = Tensor::from_slice(&part.targets.overlaps, (b, n), device)?;
        let clear = ((1.0 - sigma.reshape((b, 1))?)? * (self.config.overlap - 1.0))?;
        let weights = (overlaps.broadcast_mul(&clear)? + 1.0)?;
        let error = (predicted - velocity)?.sqr()?;
        let flow = ((error.sum(2)? * &weights)?.sum(1)? / (n * c) as f64)?;
        let layout = self.layout.losses(&hidden.narrow(1, 0, n)?.contiguous()?, &part.targets.labels)?;
        let mut layout = (layout * weights)?.mean(1)?;
        if let Some((sources, _)) = &part.sources {
            let of_source = hidden.narrow(1, n, n)?.contiguous()?;
            layout = ((layout + self.layout.losses(&of_source, &sources.labels)?.mean(1)?)? / 2.0)?;
        }
        Ok((flow, layout))
    }
}

/// Bounds of the noise levels whose losses are logged apart.
const NOISE: [f32; 5] = [0.0, 0.5, 0.8, 0.93, 1.01];
/// Steps in which the layout head, which is new in every training, learns from a trained model without teaching it.
const YOUNG: u64 = 100;
/// Pictures on a sample sheet.
const SHOWN: usize = 16;
/// The name of weights files in diffusers' folders.
const STEM: &str = "diffusion_pytorch_model";

#[derive(Deserialize)]
struct PromptSection {
    #[serde(default)]
    prompt_embedding: PromptEmbedding,
}

fn transformer_sizes(config: &DiffuserConfig, channels: usize) -> flux2::Config {
    flux2::Config {
        in_channels: channels,
        num_layers: config.double_blocks,
        num_single_layers: config.single_blocks,
        attention_head_dim: config.head_dim,
        num_attention_heads: config.heads,
        joint_attention_dim: config.text.layers * config.text.hidden,
        timestep_guidance_channels: 256,
        axes_dims_rope: vec![config.head_dim / 4; 4],
        guidance_embeds: false,
        ..flux2::Config::default()
    }
}

fn text_encoder_sizes(text: &TextConfig) -> Result<qwen3::Config> {
    Ok(serde_json::from_value(json!({
        "vocab_size": text.vocabulary,
        "hidden_size": text.hidden,
        "intermediate_size": 3 * text.hidden,
        "num_hidden_layers": text.layers,
        "num_attention_heads": text.heads,
        "num_key_value_heads": text.heads,
        "head_dim": text.hidden / text.heads,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": true,
        "max_position_embeddings": 1024,
        "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
    }))?)
}

/// klein's scheduler.
fn scheduler() -> serde_json::Value {
    json!({
        "_class_name": "FlowMatchEulerDiscreteScheduler",
        "num_train_timesteps": 1000,
        "shift": 3.0,
        "use_dynamic_shifting": true,
        "base_shift": 0.5,
        "max_shift": 1.15,
        "base_image_seq_len": 256,
        "max_image_seq_len": 4096,
        "time_shift_type": "exponential",
    })
}

fn schedule() -> Result<Schedule> {
    Ok(serde_json::from_value(scheduler())?)
}

impl Objective for Diffuser {
    fn vars(&self) -> BTreeMap<String, Var> {
        let transformer = self.adapter.as_ref().map_or_else(|| self.transformer.vars(), Adapter::vars);
        let parts = [("transformer", transformer), ("text_encoder", self.text.vars()), ("layout", self.head.vars())];
        let named = |(head, vars): (&str, BTreeMap<String, Var>)| {
            vars.into_iter().map(|(name, var)| (format!("{head}.{name}"), var)).collect::<Vec<_>>()
        };
        parts.into_iter().flat_map(named).collect()
    }

    fn prepare(&self, batch: &Batch) -> Result<()> {
        self.ahead.put(batch, self.parts(batch)?);
        Ok(())
    }

    fn loss(&self, batch: &Batch) -> Result<Step> {
        let parts = self.ahead.take(batch).map_or_else(|| self.parts(batch), Ok)?;
        let mut metrics = Metrics::new();
        let mut total: Option<Tensor> = None;
        for part in &parts {
            let Part { name, levels, .. } = part;
            let (flow, layout) = self.losses(part, batch.step)?;
            let values: Vec<f32> = flow.to_vec1()?;
            let mean = |of: &dyn Fn(f32) -> bool| {
                let some: Vec<f64> =
                    levels.iter().zip(&values).filter(|(t, _)| of(**t)).map(|(_, loss)| f64::from(*loss)).collect();
                (!some.is_empty()).then(|| some.iter().sum::<f64>() / some.len() as f64)
            };
            metrics.extend(mean(&|_| true).map(|loss| ((*name).to_owned(), loss)));
            // Layout is decided at the highest levels, shape below, the rest is finish.
            for window in NOISE.windows(2) {
                let inside = mean(&|t| (window[0]..window[1]).contains(&t));
                metrics.extend(inside.map(|loss| (format!("{name}/noise_{:.2}", window[0]), loss)));
            }
            let where_what = layout.mean_all()?.to_scalar::<f32>()?;
            metrics.push((format!("{name}/layout"), f64::from(where_what)));
            let sum = (flow + (layout * self.config.layout)?)?.sum_all()?;
            total = Some(match total {
                Some(total) => (total + sum)?,
                None => sum,
            });
        }
        let total = total.context("a batch has at least one sample")?;
        Ok(Step { loss: (total / batch.rows.len() as f64)?, metrics })
    }

    fn evaluate(&mut self, _: u64) -> Result<Metrics> {
        Ok(held_out::metrics(&self.held_out(self.config.evaluation.prompts)?))
    }

    fn samples(&mut self, _: u64, folder: &Path) -> Result<()> {
        let made = self.held_out(SHOWN)?;
        for (name, kind) in [
            ("draw", Kind::Prompt),
            ("draw_many", Kind::PromptOfMany),
            ("edit", Kind::Edit),
            ("move_among_many", Kind::MoveAmongMany),
            ("edit_of_drawn", Kind::EditOfDrawn),
            ("mended", Kind::Mending),
        ] {
            let (mut pictures, mut asked) = (Vec::new(), String::new());
            for made in made.iter().filter(|made| made.kind == kind) {
                asked += &format!("{}\n", made.asked);
                pictures.extend(made.source.clone());
                pictures.push(made.picture.clone());
            }
            if !pictures.is_empty() {
                write_sheet(folder, name, &pictures, &asked)?;
            }
        }
        Ok(())
    }

    fn save(&self, folder: &Path, dtype: DType) -> Result<()> {
        if let Some(adapter) = &self.adapter {
            return peft::write(adapter, folder, dtype);
        }
        let write = |path: PathBuf, value: serde_json::Value| -> Result<()> {
            fs::write(&path, serde_json::to_string_pretty(&value)? + "\n")
                .with_context(|| format!("cannot write {}", path.display()))
        };
        for part in ["transformer", "text_encoder", "tokenizer", "scheduler", "vae"] {
            let path = folder.join(part);
            fs::create_dir_all(&path).with_context(|| format!("cannot create {}", path.display()))?;
        }
        write(
            folder.join("model_index.json"),
            json!({
                "_class_name": "Flux2KleinPipeline",
                "_diffusers_version": "0.42.1",
                "is_distilled": false,
                "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
                "text_encoder": ["transformers", "Qwen3ForCausalLM"],
                "tokenizer": ["transformers", "Qwen2TokenizerFast"],
                "transformer": ["diffusers", "Flux2Transformer2DModel"],
                "vae": ["diffusers", "AutoencoderKLFlux2"],
            }),
        )?;
        write(folder.join("scheduler/scheduler_config.json"), scheduler())?;
        write(folder.join("transformer/config.json"), serde_json::to_value(self.klein.transformer.config())?)?;
        let stem = format!("{STEM}.safetensors");
        write_model(&folder.join("transformer").join(&stem), &self.transformer.tensors(), dtype)?;
        let mut config = serde_json::to_value(self.klein.text.model.decoder.config())?;
        if let Some(config) = config.as_object_mut() {
            config.insert("architectures".into(), json!(["Qwen3ForCausalLM"]));
            config.insert("model_type".into(), json!("qwen3"));
            config.insert("prompt_embedding".into(), serde_json::to_value(&self.klein.prompt_embedding)?);
        }
        write(folder.join("text_encoder/config.json"), config)?;
        write_model(&folder.join("text_encoder/model.safetensors"), &self.text.tensors(), dtype)?;
        self.tokenizer.write(&folder.join("tokenizer"))?;
        for file in ["config.json", stem.as_str()] {
            let (from, to) = (self.config.autoencoder.join(file), folder.join("vae").join(file));
            fs::copy(&from, &to).with_context(|| format!("cannot copy {} to {}", from.display(), to.display()))?;
        }
        ensure!(folder.join("tokenizer/tokenizer.json").is_file(), "the tokenizer was not written");
        Ok(())
    }

    fn state(&self) -> Result<HashMap<String, Tensor>> {
        vocabulary::state(&self.tokenizer.tokenizer)
    }

    fn restore(&mut self, state: HashMap<String, Tensor>) -> Result<()> {
        vocabulary::expect_state(&state, &self.tokenizer.tokenizer)
    }
}
