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

use super::{Batch, Group, Metrics, Objective, Rule, Step, optim, pixels::tiled};
use crate::{
    io,
    models::{
        Folder, Params,
        autoencoder::{Autoencoder, Config},
        pixels::{to_pictures, to_tensor},
    },
    scene::tabletop::{
        oracle,
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
/// The stream of held-out scenes.
const HELD_OUT: &str = "autoencoder-held-out";
/// Columns of a sheet of sample pictures.
const SAMPLES: u64 = 8;

/// The `[autoencoder]` section of a pretraining config.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct VaeConfig {
    /// An autoencoder's folder to go on from; its sizes replace those below.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub init: Option<PathBuf>,
    /// Trains the decoder alone: the latents stay what they are, and with them a Diffuser that has learned them.
    pub decoder_only: bool,
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
    /// Share of the scenes of several objects in which two touch: outlines that cross are harder than others.
    pub touching: f64,
    /// Pictures that the statistics of the tokens are measured on.
    pub statistics: u64,
    /// Held-out pictures of an evaluation, of each split.
    pub held_out: u64,
}

impl Default for VaeConfig {
    fn default() -> Self {
        Self {
            init: None,
            decoder_only: false,
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
            touching: sample::TOUCHING,
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
            None => {
                let widths = config.block_out_channels.iter().chain([&config.latent_channels, &config.norm_num_groups]);
                if widths.clone().any(|width| !(1..=4096).contains(width))
                    || !(1..=64).contains(&config.layers_per_block)
                {
                    usage!("autoencoder: channels and groups are 1 to 4096, layers_per_block is 1 to 64");
                }
                (config.model(), Params::fresh(seed, DType::F32, device))
            }
        };
        let model = Autoencoder::new(&sizes, &params)?;
        if config.decoder_only && (config.init.is_none() || config.coarse > 0.0) {
            usage!(
                "autoencoder.decoder_only goes on from an autoencoder (autoencoder.init), and without autoencoder.coarse"
            );
        }
        if !(0.0..=1.0).contains(&config.touching) || !(0.0..=1.0).contains(&config.crowded) {
            usage!("autoencoder.touching and autoencoder.crowded are shares");
        }
        // Of one picture there may be one token, which has no variance.
        if config.statistics < 2 || config.held_out == 0 {
            usage!("autoencoder.statistics is 2 or more, and autoencoder.held_out 1 or more");
        }
        if config.coarse > 0.0 && sizes.latent_channels <= COARSE {
            usage!("autoencoder.coarse needs more than {COARSE} latent_channels");
        }
        let token = model.config.pixels_per_token();
        if !(config.crop as usize).is_multiple_of(token) || !(1..=SIDE).contains(&config.crop) {
            usage!("autoencoder.crop must be a multiple of {token}, at most {SIDE}, not {}", config.crop);
        }
        Ok(Self { config: config.clone(), seed, params, model })
    }

    /// Pictures `indices` of the stream `purpose` of a split, this share of them crowded, `(B, 3, H, W)` in `[-1, 1]`.
    fn pictures(&self, purpose: &str, split: Split, crowded: f64, indices: Range<u64>) -> Result<Tensor> {
        let draw = |i| render(&self.scene(&mut Stream::new(self.seed, purpose, i), split, crowded));
        to_tensor(&indices.into_par_iter().map(draw).collect::<Vec<_>>(), self.params.device())
    }

    /// Parts of training pictures, each around one of the picture's things.
    fn crops(&self, indices: Range<u64>) -> Result<Tensor> {
        let side = self.config.crop;
        let draw = |i| {
            let mut rng = Stream::new(self.seed, "autoencoder-crop", i);
            let scene = self.scene(&mut rng, Split::Train, self.config.crowded);
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

    /// A scene of the split, now and then with the things of a second one on top.
    fn scene(&self, rng: &mut Stream, split: Split, crowded: f64) -> Scene {
        let (mut scene, _) = sample::draw_touching(rng, split, 1, 5, self.config.touching);
        if rng.share(crowded) {
            let (other, _) = sample::draw(rng, split, 1, 2);
            let top = scene.top_depth();
            scene.items.extend(other.items.into_iter().map(|mut item| {
                item.depth += top;
                item
            }));
        }
        scene
    }

    /// Whether the oracle sees in the reconstruction of a held-out picture, not a crowded one, what it was drawn from.
    fn still_shows(&self, reconstruction: &RgbImage, index: u64) -> bool {
        let mut rng = Stream::new(self.seed, HELD_OUT, index);
        let (_, graph) = sample::draw_touching(&mut rng, Split::Val, 1, 5, self.config.touching);
        oracle::judge(reconstruction, &graph).perfect()
    }

    /// Mean and variance of every channel of the tokens, over pictures that no step sees.
    fn statistics(&self) -> Result<(Tensor, Tensor)> {
        let channels = self.model.config.token_channels();
        let (mut sums, mut squares, mut n) = (vec![0f64; channels], vec![0f64; channels], 0f64);
        for start in (0..self.config.statistics).step_by(CHUNK as usize) {
            let indices = start..(start + CHUNK).min(self.config.statistics);
            let x = self.pictures("autoencoder-statistics", Split::Train, self.config.crowded, indices)?;
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
        let mut vars = self.params.vars();
        if self.config.decoder_only {
            vars.retain(|name, _| name.starts_with("decoder.") || name.starts_with("post_quant_conv."));
        }
        vars
    }

    fn loss(&self, batch: &Batch) -> Result<Step> {
        let x = if batch.step < self.config.crop_steps {
            self.crops(batch.indices())?
        } else {
            self.pictures("autoencoder-picture", Split::Train, self.config.crowded, batch.indices())?
        };
        let (mut mean, mut logvar) = self.model.encode(&x)?;
        if self.config.decoder_only {
            (mean, logvar) = (mean.detach(), logvar.detach());
        }
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

    /// PSNR of held-out pictures, half of them crowded, from their latents and from latents with noise of a part of their
    /// deviation; and of those that are not crowded the share in which (from their latents) the oracle still sees all that is
    /// true of them, and nothing else.
    fn evaluate(&mut self, _step: u64) -> Result<Metrics> {
        let parts = [("psnr", 0.0), ("psnr_noise_0.1", 0.1), ("psnr_noise_0.2", 0.2)];
        let (mut errors, mut pictures, mut perfect) = ([0f64; 3], 0f64, 0f64);
        for crowded in [0.0, 1.0] {
            for start in (0..self.config.held_out).step_by(CHUNK as usize) {
                let indices = start..(start + CHUNK).min(self.config.held_out);
                let x = self.pictures(HELD_OUT, Split::Val, crowded, indices.clone())?;
                let z = self.model.encode(&x)?.0.detach();
                let flat = z.transpose(0, 1)?.flatten_from(1)?;
                let deviation = flat.var_keepdim(1)?.sqrt()?.reshape((1, (), 1, 1))?;
                let noise = Stream::new(self.seed, "autoencoder-held-out-noise", start).normal(z.dims(), z.device())?;
                let noise = noise.broadcast_mul(&deviation)?;
                for (error, (_, part)) in errors.iter_mut().zip(parts) {
                    let y = self.model.decode(&(&z + (&noise * part)?)?)?.detach().clamp(-1f32, 1f32)?;
                    *error += f64::from((&y - &x)?.sqr()?.mean((1, 2, 3))?.sum_all()?.to_scalar::<f32>()?);
                    if part == 0.0 && crowded == 0.0 {
                        let shown = to_pictures(&y)?.into_iter().zip(indices.clone());
                        perfect += shown.filter(|(y, i)| self.still_shows(y, *i)).count() as f64;
                    }
                }
                pictures += x.dim(0)? as f64;
            }
        }
        let psnr = parts.iter().zip(errors).map(|((name, _), error)| ((*name).into(), psnr(error / pictures)));
        Ok(psnr.chain([("perfect".into(), perfect / self.config.held_out as f64)]).collect())
    }

    /// A sheet of held-out pictures above their reconstructions.
    fn samples(&mut self, _step: u64, folder: &Path) -> Result<()> {
        let mut pictures = Vec::new();
        for crowded in [0.0, 1.0] {
            let x = self.pictures(HELD_OUT, Split::Val, crowded, 0..SAMPLES)?;
            let y = self.model.decode(&self.model.encode(&x)?.0)?;
            pictures.extend([to_pictures(&x)?, to_pictures(&y)?].concat());
        }
        io::png::write(&folder.join("reconstructions.png"), &tiled(&pictures, SAMPLES as usize), &[], true)
    }

    fn save(&self, folder: &Path, dtype: DType) -> Result<()> {
        let (mean, var) = match self.config.decoder_only {
            true => {
                let (mean, var) = self.model.statistics();
                (mean.clone(), var.clone())
            }
            false => self.statistics()?,
        };
        let mut tensors: HashMap<String, Tensor> = self.params.tensors().into_iter().collect();
        tensors.insert("bn.running_mean".into(), mean);
        tensors.insert("bn.running_var".into(), var);
        for tensor in tensors.values_mut() {
            *tensor = tensor.to_dtype(dtype)?;
        }
        // The reference counts the batches that its statistics come from, and reads the count nowhere.
        let batches = self.config.statistics.div_ceil(CHUNK) as i64;
        tensors.insert("bn.num_batches_tracked".into(), Tensor::new(batches, &Device::Cpu)?);
        let metadata = HashMap::from([("format".to_owned(), "pt".to_owned())]);
        io::write_safetensors(&folder.join("diffusion_pytorch_model.safetensors"), &tensors, metadata)?;
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
            let Step { loss, .. } =
                objective.loss(&Batch { step, rows: 0..2, size: 2, together: 0..2, update: 0, piece: 0 }).unwrap();
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
        let x = objective.pictures("autoencoder-statistics", Split::Train, objective.config.crowded, 0..8).unwrap();
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
            let x = small().pictures("autoencoder-shipped", split, 0.0, 0..4).unwrap();
            let y = model.pixels(&model.latents(&x).unwrap()).unwrap().clamp(-1f32, 1f32).unwrap();
            let mse = (y - x).unwrap().sqr().unwrap().mean_all().unwrap().to_scalar::<f32>().unwrap();
            assert!(psnr(f64::from(mse)) > 32.0, "{}: {:.2} dB", split.name(), psnr(f64::from(mse)));
        }
    }
}
