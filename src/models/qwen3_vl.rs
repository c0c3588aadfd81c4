//! `Qwen3VLForConditionalGeneration` (arXiv 2511.21631): a vision tower before a Qwen3 decoder.
//!
//! A picture is cut into patches, which a bidirectional transformer reads with learned positions (resampled to the
//! picture's grid) and 2-D rotary ones. Blocks of `spatial_merge_size^2` patches become one token of the decoder each:
//! those of the last layer take the place of `<|image_pad|>`, those of the layers `deepstack_visual_indexes` are added
//! to the first decoder layers (DeepStack, arXiv 2406.04334). In the decoder a token has a position in time, height and
//! width (interleaved M-RoPE). Follows `modeling_qwen3_vl.py` of transformers, for pictures; videos are not read.

use super::{
    Folder, Init, Linear, Params,
    qwen3::{self, Angles, Cache, Decoder, Head},
};
use crate::tensor::{Mask, Rotation, attention, gelu, gelu_tanh, layer_norm, recompute, rope, select_rows};
use anyhow::{Context, Result, bail};
use candle_core::{DType, Device, Tensor};
use serde::{Deserialize, Serialize};
use std::sync::Arc;

/// `config.json`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Config {
    pub text_config: qwen3::Config,
    pub vision_config: VisionConfig,
    pub image_token_id: u32,
    pub video_token_id: u32,
    pub vision_start_token_id: u32,
    pub vision_end_token_id: u32,
    #[serde(default)]
    pub tie_word_embeddings: bool,
}

/// The `vision_config` of it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct VisionConfig {
    pub depth: usize,
    pub hidden_size: usize,
    pub intermediate_size: usize,
    pub num_heads: usize,
    #[serde(default = "default_channels")]
    pub in_channels: usize,
    pub patch_size: usize,
    pub spatial_merge_size: usize,
    pub temporal_patch_size: usize,
    pub out_hidden_size: usize,
    pub num_position_embeddings: usize,
    pub deepstack_visual_indexes: Vec<usize>,
    #[serde(default = "default_act")]
    pub hidden_act: String,
    #[serde(default)]
    pub rope_parameters: Option<qwen3::RopeParameters>,
}

fn default_channels() -> usize {
    3
}

fn default_act() -> String {
    "gelu_pytorch_tanh".to_owned()
}

impl VisionConfig {
    fn validate(&self) -> Result<()> {
        let Self { hidden_size, num_heads, spatial_merge_size: merge, deepstack_visual_indexes: deep, .. } = self;
        // The numbers of a patch are a product of four.
        const PATCH: usize = 1 << 12;
        qwen3::expect_sizes(&[
            ("vision_config.depth", self.depth, qwen3::MOST_LAYERS),
            ("vision_config.hidden_size", *hidden_size, qwen3::LARGEST),
            ("vision_config.intermediate_size", self.intermediate_size, qwen3::LARGEST),
            ("vision_config.num_heads", *num_heads, qwen3::LARGEST),
            ("vision_config.in_channels", self.in_channels, PATCH),
            ("vision_config.patch_size", self.patch_size, PATCH),
            ("vision_config.spatial_merge_size", *merge, PATCH),
            ("vision_config.temporal_patch_size", self.temporal_patch_size, PATCH),
            ("vision_config.out_hidden_size", self.out_hidden_size, qwen3::LARGEST),
            ("vision_config.num_position_embeddings", self.num_position_embeddings, qwen3::LARGEST),
        ])?;
        if !hidden_size.is_multiple_of(4 * num_heads) {
            bail!("the vision tower cannot split {hidden_size} numbers into {num_heads} heads of whole quarters");
        }
        if let Some(index) = deep.iter().find(|i| **i >= self.depth) {
            bail!("deepstack_visual_indexes names layer {index} of {}", self.depth);
        }
        if !["gelu_pytorch_tanh", "gelu"].contains(&self.hidden_act.as_str()) {
            bail!("hidden_act {:?} of the vision tower is not supported", self.hidden_act);
        }
        Ok(())
    }

    /// The numbers of one patch.
    pub fn patch_numbers(&self) -> usize {
        self.in_channels * self.temporal_patch_size * self.patch_size * self.patch_size
    }
}

/// Pictures cut into patches, as the image processor lays them out: block by block of `spatial_merge_size^2`.
#[derive(Clone)]
pub struct Patches {
    /// `(patches of all pictures, numbers of a patch)`.
    pub values: Tensor,
    /// Rows and columns of patches of each picture.
    pub grids: Vec<[usize; 2]>,
}

/// What the decoder sees of pictures, a row for each of their tokens in order.
#[derive(Clone)]
pub struct Features {
    /// `(tokens, hidden of the decoder)`.
    pub tokens: Tensor,
    /// The same shape for each of the first decoder layers.
    pub deep: Vec<Tensor>,
}

/// Layer norm with an affine map.
struct Norm {
    weight: Tensor,
    bias: Tensor,
}

/// The vision tower's layer norms do not read it from the config.
const EPS: f64 = 1e-6;

impl Norm {
    fn new(size: usize, params: &Params) -> Result<Self> {
        Ok(Self { weight: params.get("weight", &[size], Init::Ones)?, bias: params.get("bias", &[size], Init::Zeros)? })
    }

    fn forward(&self, x: &Tensor) -> candle_core::Result<Tensor> {
        layer_norm(x, &self.weight, &self.bias, EPS)
    }
}

struct Block {
    norm1: Norm,
    norm2: Norm,
    qkv: Linear,
    proj: Linear,
    fc1: Linear,
    fc2: Linear,
    heads: usize,
    tanh: bool,
}

impl Block {
    fn new(config: &VisionConfig, params: &Params) -> Result<Self> {
        let VisionConfig { hidden_size: hidden, intermediate_size: inner, .. } = *config;
        let (attn, mlp) = (params.at("attn"), params.at("mlp"));
        let residual = |inner: usize| Init::Normal(((inner * 2 * config.depth) as f64).powf(-0.5));
        Ok(Self {
            norm1: Norm::new(hidden, &params.at("norm1"))?,
            norm2: Norm::new(hidden, &params.at("norm2"))?,
            qkv: Linear::biased(hidden, 3 * hidden, &attn.at("qkv"))?,
            proj: Linear::with(hidden, hidden, true, residual(hidden), &attn.at("proj"))?,
            fc1: Linear::biased(hidden, inner, &mlp.at("linear_fc1"))?,
            fc2: Linear::with(inner, hidden, true, residual(inner), &mlp.at("linear_fc2"))?,
            heads: config.num_heads,
            tanh: config.hidden_act == "gelu_pytorch_tanh",
        })
    }

    fn forward(&self, x: &Tensor, angles: &Angles, mask: &Mask) -> candle_core::Result<Tensor> {
        let (b, n, hidden) = x.dims3()?;
        let qkv = self.qkv.forward(&self.norm1.forward(x)?)?.reshape((b, n, 3, self.heads, hidden / self.heads))?;
        let part = |i| qkv.narrow(2, i, 1)?.squeeze(2); // (B, N, H, D)
        let rotate = |y: Tensor| rope(&y, &angles.cos, &angles.sin, Rotation::Half);
        let y = attention(&rotate(part(0)?)?, &rotate(part(1)?)?, &part(2)?, mask)?;
        let x = (x + self.proj.forward(&y.reshape((b, n, hidden))?)?)?;
        let y = self.fc1.forward(&self.norm2.forward(&x)?)?;
        let y = if self.tanh { gelu_tanh(&y)? } else { gelu(&y)? };
        x + self.fc2.forward(&y)?
    }
}

/// Joins a block of patches into one token of the decoder.
struct Merger {
    norm: Norm,
    fc1: Linear,
    fc2: Linear,
    joined: usize,
    /// Whether the patches are normalised together rather than one by one.
    joined_norm: bool,
}

impl Merger {
    fn new(config: &VisionConfig, joined_norm: bool, params: &Params) -> Result<Self> {
        let joined = config.hidden_size * config.spatial_merge_size.pow(2);
        Ok(Self {
            norm: Norm::new(if joined_norm { joined } else { config.hidden_size }, &params.at("norm"))?,
            fc1: Linear::biased(joined, joined, &params.at("linear_fc1"))?,
            fc2: Linear::biased(joined, config.out_hidden_size, &params.at("linear_fc2"))?,
            joined,
            joined_norm,
        })
    }

    /// `(N, hidden)` to `(N / merge^2, out)`.
    fn forward(&self, x: &Tensor) -> candle_core::Result<Tensor> {
        let x = if self.joined_norm {
            self.norm.forward(&x.reshape(((), self.joined))?)?
        } else {
            self.norm.forward(x)?.reshape(((), self.joined))?
        };
        self.fc2.forward(&gelu(&self.fc1.forward(&x)?)?)
    }
}

/// The vision tower.
pub struct Vision {
    config: VisionConfig,
    patch: Tensor,
    patch_bias: Tensor,
    positions: Tensor,
    blocks: Vec<Arc<Block>>,
    merger: Merger,
    deep: Vec<Merger>,
    frequencies: Vec<f32>,
}

impl Vision {
    fn new(config: &VisionConfig, params: &Params) -> Result<Self> {
        config.validate()?;
        let VisionConfig { hidden_size: hidden, patch_size: p, .. } = *config;
        let kernel = [hidden, config.in_channels, config.temporal_patch_size, p, p];
        let patch = params.at("patch_embed.proj");
        let merger = |name: &str, joined_norm| Merger::new(config, joined_norm, &params.at(name));
        let theta = config.rope_parameters.as_ref().and_then(|r| r.rope_theta).unwrap_or(10_000.0) as f32;
        let axis = hidden / config.num_heads / 2;
        Ok(Self {
            patch: patch.get("weight", &kernel, Init::FanIn)?,
            patch_bias: patch.get("bias", &[hidden], Init::Zeros)?,
            positions: params.at("pos_embed").get(
                "weight",
                &[config.num_position_embeddings, hidden],
                Init::Normal(0.02),
            )?,
            blocks: (0..config.depth)
                .map(|i| Ok(Arc::new(Block::new(config, &params.at("blocks").at(i))?)))
                .collect::<Result<_>>()?,
            merger: merger("merger", false)?,
            deep: (0..config.deepstack_visual_indexes.len())
                .map(|i| merger(&format!("deepstack_merger_list.{i}"), true))
                .collect::<Result<_>>()?,
            frequencies: (0..axis / 2).map(|i| 1.0 / theta.powf((2 * i) as f32 / axis as f32)).collect(),
            config: config.clone(),
        })
    }

    /// The row and column of every patch of a grid, block by block.
    fn places(&self, [rows, columns]: [usize; 2]) -> Vec<[usize; 2]> {
        let m = self.config.spatial_merge_size;
        let block = |i: usize, j: usize| (0..m * m).map(move |k| [i * m + k / m, j * m + k % m]);
        (0..rows / m).flat_map(|i| (0..columns / m).flat_map(move |j| block(i, j))).collect()
    }

    /// The learned positions, stretched over the grid so that corners fall on corners: `(patches, hidden)`.
    fn learned_positions(&self, grid: [usize; 2]) -> candle_core::Result<Tensor> {
        let side = self.config.num_position_embeddings.isqrt();
        // The two neighbours on one axis, and the share of the second.
        let tap = |place: usize, count: usize| {
            let at = (place * (side - 1)) as f32 / (count.max(2) - 1) as f32;
            let low = at.floor();
            (low as usize, (low as usize + 1).min(side - 1), at - low)
        };
        let places = self.places(grid);
        let (mut index, mut weight) = (Vec::with_capacity(4 * places.len()), Vec::with_capacity(4 * places.len()));
        for [row, column] in &places {
            let (top, bottom, down) = tap(*row, grid[0]);
            let (left, right, across) = tap(*column, grid[1]);
            for (r, share_r) in [(top, 1.0 - down), (bottom, down)] {
                for (c, share_c) in [(left, 1.0 - across), (right, across)] {
                    index.push((r * side + c) as u32);
                    weight.push(share_r * share_c);
                }
            }
        }
        let device = self.positions.device();
        let weight = Tensor::from_vec(weight, (places.len(), 4, 1), device)?.to_dtype(self.positions.dtype())?;
        let taps = self.positions.index_select(&Tensor::from_vec(index, 4 * places.len(), device)?, 0)?;
        taps.reshape((places.len(), 4, ()))?.broadcast_mul(&weight)?.sum(1)
    }

    /// The angles of a grid: the first half of the frequencies turns with the row, the second with the column.
    fn angles(&self, grid: [usize; 2]) -> candle_core::Result<Angles> {
        let places = self.places(grid);
        let shape = (places.len(), 2 * self.frequencies.len());
        let angle: Vec<f32> = places
            .iter()
            .flatten()
            .flat_map(|place| self.frequencies.iter().map(move |frequency| *place as f32 * frequency))
            .collect();
        let table = |f: fn(f32) -> f32| {
            let table = angle.iter().map(|a| f(*a)).collect::<Vec<_>>();
            Tensor::from_vec(table, shape, self.positions.device())?.to_dtype(self.positions.dtype())
        };
        Ok(Angles { cos: table(f32::cos)?, sin: table(f32::sin)? })
    }

    /// Runs the tower over all pictures at once; smaller ones are padded with patches that none sees.
    pub fn forward(&self, patches: &Patches) -> Result<Features> {
        let Patches { values, grids } = patches;
        let merge = self.config.spatial_merge_size;
        let counts: Vec<usize> = grids.iter().map(|[rows, columns]| rows * columns).collect();
        let numbers = self.config.patch_numbers();
        if values.dims() != [counts.iter().sum(), numbers] {
            bail!("patches of {:?} do not fit {} numbers a patch and the grids {grids:?}", values.dims(), numbers);
        }
        if grids.iter().flatten().any(|side| *side == 0 || !side.is_multiple_of(merge)) {
            bail!("the grids {grids:?} of patches do not split into blocks of {merge} by {merge}");
        }
        let hidden = self.config.hidden_size;
        let kernel = self.patch.reshape((hidden, numbers))?;
        let x = crate::tensor::linear(&values.to_dtype(kernel.dtype())?, &kernel, Some(&self.patch_bias))?;

        let longest = counts.iter().copied().max().unwrap_or(0);
        let same = grids.windows(2).all(|pair| pair[0] == pair[1]);
        let (mut x, angles, mask) = if same {
            let grid = grids.first().copied().unwrap_or_default();
            let x = x.reshape((grids.len(), longest, hidden))?.broadcast_add(&self.learned_positions(grid)?)?;
            (x, self.angles(grid)?, Mask::default())
        } else {
            let pad = |x: &Tensor| x.pad_with_zeros(0, 0, longest - x.dim(0)?);
            let (mut rows, mut cos, mut sin, mut start) = (Vec::new(), Vec::new(), Vec::new(), 0);
            for (grid, count) in grids.iter().zip(&counts) {
                rows.push(pad(&(x.narrow(0, start, *count)? + self.learned_positions(*grid)?)?)?);
                let angles = self.angles(*grid)?;
                cos.push(pad(&angles.cos)?);
                sin.push(pad(&angles.sin)?);
                start += count;
            }
            let angles = Angles { cos: Tensor::stack(&cos, 0)?, sin: Tensor::stack(&sin, 0)? };
            let keys = counts.iter().map(|n| 0..*n).collect();
            (Tensor::stack(&rows, 0)?, angles, Mask { causal: false, keys: Some(keys) })
        };
        // The patches of all pictures behind each other again, without padding.
        let pack = |x: &Tensor| -> candle_core::Result<Tensor> {
            if same {
                return x.flatten(0, 1);
            }
            let rows = counts.iter().enumerate().map(|(i, n)| x.get(i)?.narrow(0, 0, *n));
            Tensor::cat(&rows.collect::<candle_core::Result<Vec<_>>>()?, 0)
        };
        let mut deep = vec![None; self.deep.len()];
        for (i, block) in self.blocks.iter().enumerate() {
            let (own, angles, mask) = (block.clone(), angles.clone(), mask.clone());
            let run = move |x: &[Tensor]| Ok(vec![own.forward(&x[0], &angles, &mask)?]);
            x = recompute::block(&[&x], run)?.remove(0); // (B, N, hidden)
            if let Some(k) = self.config.deepstack_visual_indexes.iter().position(|index| *index == i) {
                deep[k] = Some(self.deep[k].forward(&pack(&x)?)?);
            }
        }
        Ok(Features { tokens: self.merger.forward(&pack(&x)?)?, deep: deep.into_iter().flatten().collect() })
    }
}

/// The (time, height, width) positions of one unpadded row, and the position that follows it. Text counts on along all
/// three; a picture spans its rows and columns of tokens from where it begins, and what follows it begins behind its
/// longer side. `grids` yields the pictures, in patches.
pub fn rope_positions(
    ids: &[u32],
    image_token: u32,
    merge: usize,
    from: u32,
    grids: &mut impl Iterator<Item = [usize; 2]>,
) -> Result<(Vec<[u32; 3]>, u32)> {
    let mut positions = Vec::with_capacity(ids.len());
    let mut next = from;
    while let Some(id) = ids.get(positions.len()) {
        if *id != image_token {
            positions.push([next; 3]);
            next += 1;
            continue;
        }
        let Some([rows, columns]) = grids.next() else { bail!("the text has more pictures than were given") };
        let (rows, columns) = (rows / merge, columns / merge);
        let (start, count) = (positions.len(), rows * columns);
        if ids.len() < start + count || ids[start..start + count].iter().any(|id| *id != image_token) {
            bail!("a picture of {rows} by {columns} tokens does not fill its place in the text");
        }
        positions.extend((0..count).map(|i| [next, next + (i / columns) as u32, next + (i % columns) as u32]));
        next += rows.max(columns) as u32;
    }
    Ok((positions, next))
}

/// The vision-language model.
pub struct Qwen3VL {
    pub vision: Vision,
    pub decoder: Decoder,
    pub head: Head,
    config: Config,
}

impl Qwen3VL {
    /// The model at the root of `params`.
    pub fn new(config: &Config, params: &Params) -> Result<Self> {
        if config.vision_config.out_hidden_size != config.text_config.hidden_size {
            bail!(
                "the vision tower gives {} numbers a token, but the decoder takes {}",
                config.vision_config.out_hidden_size,
                config.text_config.hidden_size
            );
        }
        let text = params.at("model.language_model");
        let decoder = Decoder::new(&config.text_config, &text)?;
        let tied = config.tie_word_embeddings.then(|| text.at("embed_tokens"));
        Ok(Self {
            vision: Vision::new(&config.vision_config, &params.at("model.visual"))?,
            decoder,
            head: Head::new(&config.text_config, params, tied.as_ref())?,
            config: config.clone(),
        })
    }

    /// Reads a folder as `save_pretrained` writes it.
    pub fn open(folder: &Folder, dtype: DType, device: &Device) -> Result<Self> {
        let config: Config = folder.json("config.json")?;
        let params = Params::open(folder, "model", dtype, device)?;
        let model = Self::new(&config, &params).with_context(|| format!("the model in {}", folder.name()))?;
        params.finish(|name| config.tie_word_embeddings && name == "lm_head.weight")?;
        Ok(model)
    }

    pub fn config(&self) -> &Config {
        &self.config
    }

    /// Runs the decoder over rows of equal length, whose `<|image_pad|>` stand for the tokens of `features` in order.
    /// The result is behind the final norm, `(B, T, hidden)`; [`Head::forward`] makes logits of it.
    pub fn forward(
        &self,
        rows: &[Vec<u32>],
        features: Option<&Features>,
        angles: &Angles,
        mask: &Mask,
        cache: Option<&mut Cache>,
    ) -> Result<Tensor> {
        let (b, t) = (rows.len(), rows.first().map_or(0, Vec::len));
        let device = self.decoder.device();
        let ids: Vec<u32> = rows.iter().flatten().copied().collect();
        let embeds = self.decoder.embed(&Tensor::from_slice(&ids, (b, t), device)?)?;
        let wanted = ids.iter().filter(|id| **id == self.config.image_token_id).count();
        let given = features.map_or(Ok(0), |f| f.tokens.dim(0))?;
        if wanted != given {
            bail!("the text has places for {wanted} picture tokens, but the pictures give {given}");
        }
        let Some(features) = features else {
            return Ok(self.decoder.forward(&embeds, angles, mask, &[], cache)?);
        };
        // The pictures' tokens lie behind those of the text, or behind a zero: a gather puts each in its place, and its
        // backward takes the gradients back.
        let mut seen = 0;
        let number = |id: &u32| {
            let is_image = *id == self.config.image_token_id;
            seen += u32::from(is_image);
            if is_image { seen } else { 0 }
        };
        let gather_deep: Vec<u32> = ids.iter().map(number).collect();
        let text = ids.len() as u32;
        let gather: Vec<u32> =
            (0..text).zip(&gather_deep).map(|(i, k)| if *k == 0 { i } else { text + k - 1 }).collect();
        let hidden = self.config.text_config.hidden_size;
        let embeds = Tensor::cat(&[&embeds.flatten(0, 1)?, &features.tokens], 0)?;
        let embeds = select_rows(&embeds, &gather)?.reshape((b, t, hidden))?;
        let nothing = Tensor::zeros((1, hidden), embeds.dtype(), device)?;
        let inject =
            |deep: &Tensor| select_rows(&Tensor::cat(&[&nothing, deep], 0)?, &gather_deep)?.reshape((b, t, hidden));
        let injected: Vec<Tensor> = features.deep.iter().map(inject).collect::<candle_core::Result<_>>()?;
        Ok(self.decoder.forward(&embeds, angles, mask, &injected, cache)?)
    }
}
