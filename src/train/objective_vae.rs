//! What the autoencoder learns: pictures of the tabletop world through a narrow Gaussian bottleneck.
//!
//! The loss of a picture `x` with reconstruction `y = decode(mean + deviation * noise)` is
//! `|y - x| + squared (y - x)^2 + edge |D y - D x| + kl KL`, where `D` is the difference of neighbouring pixels (it keeps
//! outlines sharp without a discriminator) and KL is that of the latents to the standard normal. All are means, over pixels
//! or latent numbers. The weight of KL is larger than latent diffusion's: the deviation that it buys makes the decoder
//! forgive the small errors of generated latents, and makes the latents smooth.
//!
//! With `coarse` the first three channels are held to the picture itself at the latents' size, and the statistics give the
//! others, which carry the detail, a smaller deviation. Free latents change twice as fast as pixels do when a thing moves
//! by some pixels, and a Diffuser learns them late; where coarse numbers dominate it learns layout, colour and shape first.

use super::{Batch, Group, Metrics, Objective, Rule, Step, optim};
use crate::{
    models::{
        Folder, Params,
        autoencoder::{Autoencoder, Config},
    },
    scene::tabletop::{
        render::render,
        sample,
        split::Split,
        world::{SIDE, Scene},
    },
    tensor::rng::Stream,
    usage,
};
use anyhow::{Context, Result};
use candle_core::{DType, Device, Tensor, Var};
use image::RgbImage;
use rayon::prelude::*;
use serde::{Deserialize, Serialize};
use std::{
    collections::{BTreeMap, HashMap},
    ops::Range,
    path::{Path, PathBuf},
};

/// Pictures encoded at once where no gradient is needed.
const CHUNK: u64 = 16;
/// Latent channels that hold the small picture: red, green and blue.
const COARSE: usize = 3;
/// The small picture's numbers in the latents: `GAIN (x - BACKGROUND)`, about normal and 0 where nothing is.
const GAIN: f64 = 3.0;
const BACKGROUND: f64 = 0.8;
/// Columns of a sheet of sample pictures.
const SAMPLES: u64 = 8;

/// The `[autoencoder]` section of a pretraining config.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct VaeConfig {
    /// An autoencoder's folder to go on from; its sizes replace those below.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub init: Option<PathBuf>,
    /// Weight of the squared difference between the first three latent channels and the small picture.
    pub coarse: f64,
    /// The deviation that the other channels of the tokens have after normalization; 1 where there is no coarse part.
    pub detail: f64,
    pub block_out_channels: Vec<usize>,
    pub latent_channels: usize,
    pub layers_per_block: usize,
    pub norm_num_groups: usize,
    /// Weight of the squared error.
    pub squared: f64,
    /// Weight of the error of neighbouring pixels' differences.
    pub edge: f64,
    /// Weight of the divergence from the standard normal, per latent number.
    pub kl: f64,
    /// Side of the parts of pictures that training begins with: cheap, and full of things; a multiple of the token's side.
    pub crop: u32,
    /// Steps on parts, before those on whole pictures.
    pub crop_steps: u64,
    /// Part of the pictures that show the things of two scenes together, so that crowded ones are seen too.
    pub crowded: f64,
    /// Pictures that the statistics of the tokens are measured on.
    pub statistics: u64,
    /// Held-out pictures of an evaluation, of each split.
    pub held_out: u64,
}

impl Default for VaeConfig {
    fn default() -> Self {
        Self {
            init: None,
            coarse: 0.0,
            detail: 1.0,
            block_out_channels: vec![12, 24, 48, 64],
            latent_channels: 6,
            layers_per_block: 1,
            norm_num_groups: 4,
            squared: 4.0,
            edge: 0.5,
            kl: 2e-3,
            crop: 64,
            crop_steps: 1000,
            crowded: 0.4,
            statistics: 1024,
            held_out: 32,
        }
    }
}

impl VaeConfig {
    fn model(&self) -> Config {
        let levels = self.block_out_channels.len();
        Config {
            block_out_channels: self.block_out_channels.clone(),
            down_block_types: vec!["DownEncoderBlock2D".to_owned(); levels],
            up_block_types: vec!["UpDecoderBlock2D".to_owned(); levels],
            latent_channels: self.latent_channels,
            layers_per_block: self.layers_per_block,
            norm_num_groups: self.norm_num_groups,
            sample_size: SIDE as usize,
            ..Config::default()
        }
    }
}

/// The pretraining of the autoencoder.
pub struct VaeObjective {
    config: VaeConfig,
    seed: u64,
    params: Params,
    model: Autoencoder,
}

impl VaeObjective {
    pub fn new(config: &VaeConfig, seed: u64, device: &Device) -> Result<Self> {
        let (sizes, params) = match &config.init {
            Some(folder) => {
                let folder = Folder::from(folder);
                let params = Params::open(&folder, "diffusion_pytorch_model", DType::F32, device)?.trained();
                (folder.json("config.json")?, params)
            }
            None => (config.model(), Params::fresh(seed, DType::F32, device)),
        };
        let model = Autoencoder::new(&sizes, &params)?;
        if config.coarse > 0.0 && sizes.latent_channels <= COARSE {
            usage!("autoencoder.coarse needs more than {COARSE} latent_channels");
        }
        let token = model.config.pixels_per_token();
        if !(config.crop as usize).is_multiple_of(token) || !(1..=SIDE).contains(&config.crop) {
            usage!("autoencoder.crop must be a multiple of {token}, at most {SIDE}, not {}", config.crop);
        }
        Ok(Self { config: config.clone(), seed, params, model })
    }

    /// Pictures `indices` of the stream `purpose` of a split, `(B, 3, H, W)` in `[-1, 1]`.
    fn pictures(&self, purpose: &str, split: Split, indices: Range<u64>) -> Result<Tensor> {
        let draw = |i| render(&scene(&mut Stream::new(self.seed, purpose, i), split, self.config.crowded));
        to_tensor(&indices.into_par_iter().map(draw).collect::<Vec<_>>(), self.params.device())
    }

    /// Parts of training pictures, each around one of the picture's things.
    fn crops(&self, indices: Range<u64>) -> Result<Tensor> {
        let side = self.config.crop;
        let draw = |i| {
            let mut rng = Stream::new(self.seed, "autoencoder-crop", i);
            let scene = scene(&mut rng, Split::Train, self.config.crowded);
            let item = rng.choose(&scene.items);
            let mut corner = |centre: f32| {
                let start = f64::from(centre) - f64::from(side) * rng.range(0.1, 0.9);
                start.clamp(0.0, f64::from(SIDE - side)) as u32
            };
            let (x, y) = (corner(item.x), corner(item.y));
            image::imageops::crop_imm(&render(&scene), x, y, side, side).to_image()
        };
        to_tensor(&indices.into_par_iter().map(draw).collect::<Vec<_>>(), self.params.device())
    }

    /// Mean and variance of every channel of the tokens, over pictures that no step sees.
    fn statistics(&self) -> Result<(Tensor, Tensor)> {
        let channels = self.model.config.token_channels();
        let (mut sums, mut squares, mut n) = (vec![0f64; channels], vec![0f64; channels], 0f64);
        for start in (0..self.config.statistics).step_by(CHUNK as usize) {
            let indices = start..(start + CHUNK).min(self.config.statistics);
            let x = self.pictures("autoencoder-statistics", Split::Train, indices)?;
            let tokens = self.model.patchify(&self.model.encode(&x)?.0.detach())?;
            let tokens = tokens.transpose(0, 1)?.flatten_from(1)?.to_vec2::<f32>()?; // (4C, B h w)
            n += tokens.first().map_or(0, Vec::len) as f64;
            for (channel, (sum, square)) in tokens.iter().zip(sums.iter_mut().zip(&mut squares)) {
                for value in channel {
                    *sum += f64::from(*value);
                    *square += f64::from(*value).powi(2);
                }
            }
        }
        let mean: Vec<f64> = sums.iter().map(|sum| sum / n).collect();
        // A channel's four numbers of a token lie side by side.
        let share = |i: usize| if i < 4 * COARSE { 1.0 } else { self.config.detail };
        let unbiased = |(i, (square, mean)): (usize, (&f64, &f64))| {
            ((square / n - mean * mean) * n / (n - 1.0) / share(i).powi(2)) as f32
        };
        let var: Vec<f32> = squares.iter().zip(&mean).enumerate().map(unbiased).collect();
        let mean: Vec<f32> = mean.into_iter().map(|m| m as f32).collect();
        let device = self.params.device();
        Ok((Tensor::from_vec(mean, channels, device)?, Tensor::from_vec(var, channels, device)?))
    }
}

impl Objective for VaeObjective {
    fn vars(&self) -> BTreeMap<String, Var> {
        self.params.vars()
    }

    fn loss(&self, batch: &Batch) -> Result<Step> {
        let x = if batch.step < self.config.crop_steps {
            self.crops(batch.indices())?
        } else {
            self.pictures("autoencoder-picture", Split::Train, batch.indices())?
        };
        let (mean, logvar) = self.model.encode(&x)?;
        let shape = &mean.dims()[1..];
        let noise = |i: u64| Stream::new(self.seed, "autoencoder-noise", i).normal(shape, x.device());
        let noise = Tensor::stack(&batch.indices().map(noise).collect::<candle_core::Result<Vec<_>>>()?, 0)?;
        let z = (&mean + ((&logvar * 0.5)?.exp()? * noise)?)?;
        let error = (self.model.decode(&z)? - &x)?;
        let squared = error.sqr()?.mean_all()?;
        let kl = (((mean.sqr()? + logvar.exp()?)? - (&logvar + 1.0)?)?.mean_all()? * 0.5)?;
        let loss = (error.abs()?.mean_all()? + (&squared * self.config.squared)?)?;
        let loss = ((loss + (edges(&error)? * self.config.edge)?)? + (&kl * self.config.kl)?)?;
        let value = |x: &Tensor| -> Result<f64> { Ok(f64::from(x.to_scalar::<f32>()?)) };
        let mut metrics = vec![("mse".into(), value(&squared)?), ("kl".into(), value(&kl)?)];
        if self.config.coarse == 0.0 {
            return Ok(Step { loss, metrics });
        }
        let small = ((x.avg_pool2d(x.dim(2)? / mean.dim(2)?)? - BACKGROUND)? * GAIN)?;
        let coarse = (mean.narrow(1, 0, COARSE)? - small)?.sqr()?.mean_all()?;
        metrics.push(("coarse".into(), value(&coarse)?));
        Ok(Step { loss: (loss + (coarse * self.config.coarse)?)?, metrics })
    }

    /// PSNR of held-out pictures, from their latents and from latents with noise of a part of their deviation.
    fn evaluate(&mut self, _step: u64) -> Result<Metrics> {
        let parts = [("psnr", 0.0), ("psnr_noise_0.1", 0.1), ("psnr_noise_0.2", 0.2)];
        let (mut errors, mut pictures) = ([0f64; 3], 0f64);
        for split in [Split::Test, Split::TestMany] {
            for start in (0..self.config.held_out).step_by(CHUNK as usize) {
                let indices = start..(start + CHUNK).min(self.config.held_out);
                let x = self.pictures("autoencoder-held-out", split, indices)?;
                let z = self.model.encode(&x)?.0.detach();
                let flat = z.transpose(0, 1)?.flatten_from(1)?;
                let deviation = flat.var_keepdim(1)?.sqrt()?.reshape((1, (), 1, 1))?;
                let noise = Stream::new(self.seed, "autoencoder-held-out-noise", start).normal(z.dims(), z.device())?;
                let noise = noise.broadcast_mul(&deviation)?;
                for (error, (_, part)) in errors.iter_mut().zip(parts) {
                    let y = self.model.decode(&(&z + (&noise * part)?)?)?.detach().clamp(-1f32, 1f32)?;
                    *error += f64::from((y - &x)?.sqr()?.mean((1, 2, 3))?.sum_all()?.to_scalar::<f32>()?);
                }
                pictures += x.dim(0)? as f64;
            }
        }
        Ok(parts.iter().zip(errors).map(|((name, _), error)| ((*name).into(), psnr(error / pictures))).collect())
    }

    /// A sheet of held-out pictures above their reconstructions.
    fn samples(&mut self, _step: u64, folder: &Path) -> Result<()> {
        let mut sheet = RgbImage::new(SIDE * SAMPLES as u32, 4 * SIDE);
        for (row, split) in [Split::Test, Split::TestMany].into_iter().enumerate() {
            let x = self.pictures("autoencoder-held-out", split, 0..SAMPLES)?;
            let y = self.model.decode(&self.model.encode(&x)?.0)?.detach();
            for (i, x) in [x, y].into_iter().enumerate() {
                let pixels = x.permute((2, 0, 3, 1))?.flatten_all()?.to_vec1::<f32>()?; // rows of all pictures
                let bytes = pixels.iter().map(|v| ((v + 1.0) * 127.5).round().clamp(0.0, 255.0) as u8);
                let strip = RgbImage::from_vec(sheet.width(), SIDE, bytes.collect()).context("a sheet of samples")?;
                image::imageops::replace(&mut sheet, &strip, 0, i64::from(SIDE) * (2 * row + i) as i64);
            }
        }
        let path = folder.join("reconstructions.png");
        sheet.save(&path).with_context(|| format!("cannot write {}", path.display()))
    }

    fn save(&self, folder: &Path, dtype: DType) -> Result<()> {
        let (mean, var) = self.statistics()?;
        let mut tensors: HashMap<String, Tensor> = self.params.tensors().into_iter().collect();
        tensors.insert("bn.running_mean".into(), mean);
        tensors.insert("bn.running_var".into(), var);
        for tensor in tensors.values_mut() {
            *tensor = tensor.to_dtype(dtype)?;
        }
        // The reference counts the batches that its statistics come from, and reads the count nowhere.
        let batches = self.config.statistics.div_ceil(CHUNK) as i64;
        tensors.insert("bn.num_batches_tracked".into(), Tensor::new(batches, &Device::Cpu)?);
        let path = folder.join("diffusion_pytorch_model.safetensors");
        candle_core::safetensors::save(&tensors, &path).with_context(|| format!("cannot write {}", path.display()))?;
        let path = folder.join("config.json");
        let json = serde_json::to_string_pretty(&self.model.config)? + "\n";
        std::fs::write(&path, json).with_context(|| format!("cannot write {}", path.display()))
    }

    /// Muon for kernels between hidden channels too.
    fn group(&self, name: &str, shape: &[usize]) -> Group {
        let outer = ["conv_in", "conv_out", "quant_conv"].iter().any(|part| name.contains(part))
            && !name.contains("conv_shortcut");
        match shape.len() {
            4 if !outer => Group { rule: Rule::Muon, lr: 1.0, decay: 1.0 },
            _ => optim::default_group(name, shape),
        }
    }
}

/// A scene of the split; in training, now and then with the things of a second one on top.
fn scene(rng: &mut Stream, split: Split, crowded: f64) -> Scene {
    let (mut scene, _) = sample::draw(rng, split, 1, 5);
    if split == Split::Train && rng.chance(crowded) {
        let (other, _) = sample::draw(rng, split, 1, 2);
        let top = scene.top_depth();
        scene.items.extend(other.items.into_iter().map(|mut item| {
            item.depth += top;
            item
        }));
    }
    scene
}

/// The mean absolute difference between neighbours, down and to the right.
fn edges(x: &Tensor) -> candle_core::Result<Tensor> {
    let along = |dim: usize| {
        let n = x.dim(dim)? - 1;
        (x.narrow(dim, 1, n)? - x.narrow(dim, 0, n)?)?.abs()?.mean_all()
    };
    along(2)? + along(3)?
}

/// The peak signal-to-noise ratio in dB of a mean squared error over `[-1, 1]`.
fn psnr(mse: f64) -> f64 {
    10.0 * (4.0 / mse).log10()
}

/// Pictures of one size to `(B, 3, H, W)` in `[-1, 1]`.
fn to_tensor(images: &[RgbImage], device: &Device) -> Result<Tensor> {
    let (w, h) = images.first().map_or((0, 0), |i| (i.width() as usize, i.height() as usize));
    let mut values = vec![0f32; images.len() * 3 * h * w];
    values.par_chunks_mut((3 * h * w).max(1)).zip(images).for_each(|(values, image)| {
        for (i, pixel) in image.pixels().enumerate() {
            for (c, value) in pixel.0.iter().enumerate() {
                values[c * h * w + i] = f32::from(*value) / 127.5 - 1.0;
            }
        }
    });
    Ok(Tensor::from_vec(values, (images.len(), 3, h, w), device)?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::models::Folder;

    fn small() -> VaeObjective {
        let config = VaeConfig {
            block_out_channels: vec![4, 8],
            latent_channels: 2,
            norm_num_groups: 2,
            crop: 32,
            crop_steps: 1,
            statistics: 8,
            held_out: 2,
            ..VaeConfig::default()
        };
        VaeObjective::new(&config, 0, &Device::Cpu).unwrap()
    }

    #[test]
    fn parts_and_whole_pictures_give_every_variable_a_gradient() {
        let objective = small();
        for step in 0..2 {
            let Step { loss, .. } = objective.loss(&Batch { step, rows: 0..2, size: 2, update: 0, piece: 0 }).unwrap();
            let grads = loss.backward().unwrap();
            assert!(objective.vars().values().all(|var| grads.get(var).is_some()));
        }
    }

    #[test]
    fn a_saved_model_standardises_its_tokens() {
        let objective = small();
        let dir = tempfile::tempdir().unwrap();
        objective.save(dir.path(), DType::F32).unwrap();
        let folder = Folder::from(dir.path());
        let config: Config = folder.json("config.json").unwrap();
        let params = Params::open(&folder, "diffusion_pytorch_model", DType::F32, &Device::Cpu).unwrap();
        let model = Autoencoder::new(&config, &params).unwrap();
        let x = objective.pictures("autoencoder-statistics", Split::Train, 0..8).unwrap();
        let tokens = model.latents(&x).unwrap().transpose(0, 1).unwrap().flatten_from(1).unwrap();
        for channel in tokens.to_vec2::<f32>().unwrap() {
            let n = channel.len() as f32;
            let mean = channel.iter().sum::<f32>() / n;
            let var = channel.iter().map(|v| (v - mean).powi(2)).sum::<f32>() / n;
            // `batch_norm_eps` takes a little from the variance of a model that was not trained.
            assert!(mean.abs() < 1e-3 && (0.9..1.01).contains(&var), "mean {mean}, variance {var}");
        }
    }

    #[test]
    fn the_shipped_autoencoder_gives_unseen_pictures_back() {
        let folder = Folder::from(concat!(env!("CARGO_MANIFEST_DIR"), "/weights/tabletop/vae"));
        let config: Config = folder.json("config.json").unwrap();
        let params = Params::open(&folder, "diffusion_pytorch_model", DType::F32, &Device::Cpu).unwrap();
        let model = Autoencoder::new(&config, &params).unwrap();
        for split in [Split::Test, Split::TestMany] {
            let x = small().pictures("autoencoder-shipped", split, 0..4).unwrap();
            let y = model.pixels(&model.latents(&x).unwrap()).unwrap().clamp(-1f32, 1f32).unwrap();
            let mse = (y - x).unwrap().sqr().unwrap().mean_all().unwrap().to_scalar::<f32>().unwrap();
            assert!(psnr(f64::from(mse)) > 32.0, "{}: {:.2} dB", split.name(), psnr(f64::from(mse)));
        }
    }
}
