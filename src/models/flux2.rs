//! `Flux2Transformer2DModel`, the rectified-flow transformer of FLUX.2 (reference: diffusers).
//!
//! Text and image tokens first run in two streams that share one attention (double-stream blocks), then joined in one
//! (single-stream blocks, where attention and MLP run side by side, as in ViT-22B). All blocks of a kind share their
//! modulation. A reference picture is more image tokens, told apart by the first of four rotary axes (T, H, W, L).

use super::{Init, Linear, Params};
use crate::tensor::{
    Mask, Rotation, attention, attention_swiglu, gate_residual, layer_norm_modulate, norm_rope,
    recompute::{self, cut},
    silu, swiglu,
};
use anyhow::{Result, bail};
use candle_core::{D, DType, Device, Tensor};
use serde::{Deserialize, Serialize};
use std::sync::Arc;

/// `transformer/config.json`.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(default)]
pub struct Config {
    #[serde(rename = "_class_name")]
    pub class_name: String,
    pub patch_size: usize,
    pub in_channels: usize,
    pub out_channels: Option<usize>,
    pub num_layers: usize,
    pub num_single_layers: usize,
    pub attention_head_dim: usize,
    pub num_attention_heads: usize,
    pub joint_attention_dim: usize,
    pub timestep_guidance_channels: usize,
    pub mlp_ratio: f64,
    pub axes_dims_rope: Vec<usize>,
    pub rope_theta: f64,
    pub eps: f64,
    pub guidance_embeds: bool,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            class_name: "Flux2Transformer2DModel".into(),
            patch_size: 1,
            in_channels: 128,
            out_channels: None,
            num_layers: 8,
            num_single_layers: 48,
            attention_head_dim: 128,
            num_attention_heads: 48,
            joint_attention_dim: 15360,
            timestep_guidance_channels: 256,
            mlp_ratio: 3.0,
            axes_dims_rope: vec![32, 32, 32, 32],
            rope_theta: 2000.0,
            eps: 1e-6,
            guidance_embeds: true,
        }
    }
}

impl Config {
    /// The width of a token.
    pub fn dim(&self) -> usize {
        self.num_attention_heads * self.attention_head_dim
    }

    fn hidden(&self) -> usize {
        (self.dim() as f64 * self.mlp_ratio) as usize
    }

    fn check(&self) -> Result<()> {
        let counts = [
            self.in_channels,
            self.num_attention_heads,
            self.attention_head_dim,
            self.joint_attention_dim,
            self.timestep_guidance_channels,
        ];
        if counts.contains(&0) || counts.iter().any(|c| *c > 1 << 20) || self.num_layers + self.num_single_layers > 4096
        {
            bail!("the transformer's config.json asks for impossible sizes: {self:?}");
        }
        if self.patch_size != 1 {
            bail!("the transformer's config.json has patch_size {}; FLUX.2 packs its latents before", self.patch_size);
        }
        let rotary = self.axes_dims_rope.iter().try_fold(0usize, |sum, d| sum.checked_add(*d));
        if rotary != Some(self.attention_head_dim) || self.axes_dims_rope.iter().any(|d| d % 2 == 1) {
            bail!(
                "the transformer's axes_dims_rope {:?} must be even and add up to attention_head_dim {}",
                self.axes_dims_rope,
                self.attention_head_dim
            );
        }
        Ok(())
    }
}

/// The rotary position of a token: picture (0, or 10 times the number of the reference), row, column, place in the text.
pub type Position = [u32; 4];

/// The positions of `n` text tokens.
pub fn text_positions(n: usize) -> Vec<Position> {
    (0..n as u32).map(|l| [0, 0, 0, l]).collect()
}

/// The positions of an `h x w` picture: the drawn one is `picture` 0, references are 10, 20, ...
pub fn image_positions(picture: u32, h: usize, w: usize) -> Vec<Position> {
    (0..h as u32).flat_map(|y| (0..w as u32).map(move |x| [picture, y, x, 0])).collect()
}

/// Cosines and sines of the rotary angles of a whole sequence, `(T, head_dim / 2)` each.
#[derive(Clone)]
pub struct Angles {
    cos: Tensor,
    sin: Tensor,
}

/// What a forward pass is given beside the image tokens.
pub struct Conditioning<'a> {
    /// The text, `(B, L, joint_attention_dim)`.
    pub text: &'a Tensor,
    /// Noise level in [0, 1], `(B)`; or `(1)` where all rows have the same, so that what is computed of it does not depend
    /// on the size of the batch to the last bit.
    pub sigma: &'a Tensor,
    /// Guidance strength for models distilled with one, `(B)`.
    pub guidance: Option<&'a Tensor>,
    /// Of text and image tokens, in this order; see [`Flux2::angles`].
    pub angles: &'a Angles,
}

/// The transformer.
pub struct Flux2 {
    config: Config,
    time: TimeEmbedding,
    guidance: Option<TimeEmbedding>,
    modulation_image: Linear,
    modulation_text: Linear,
    modulation_single: Linear,
    embed_image: Linear,
    embed_text: Linear,
    double: Vec<Arc<DoubleBlock>>,
    single: Vec<Arc<SingleBlock>>,
    norm_out: Linear,
    out: Linear,
}

impl Flux2 {
    pub fn new(config: &Config, params: &Params) -> Result<Self> {
        config.check()?;
        let dim = config.dim();
        let embedding = params.at("time_guidance_embed");
        let channels = config.timestep_guidance_channels;
        let guidance = config
            .guidance_embeds
            .then(|| TimeEmbedding::new(channels, dim, &embedding.at("guidance_embedder")))
            .transpose()?;
        // A fresh model starts as the identity: no block adds anything until its modulation has learned to (adaLN-Zero,
        // arXiv 2212.09748).
        let zero = |out: usize, params: Params| Linear::with(dim, out, false, Init::Zeros, &params);
        let modulation = |name: &str, sets: usize| zero(3 * sets * dim, params.at(name).at("linear"));
        let out = config.out_channels.unwrap_or(config.in_channels);
        Ok(Self {
            time: TimeEmbedding::new(channels, dim, &embedding.at("timestep_embedder"))?,
            guidance,
            modulation_image: modulation("double_stream_modulation_img", 2)?,
            modulation_text: modulation("double_stream_modulation_txt", 2)?,
            modulation_single: modulation("single_stream_modulation", 1)?,
            embed_image: Linear::new(config.in_channels, dim, &params.at("x_embedder"))?,
            embed_text: Linear::new(config.joint_attention_dim, dim, &params.at("context_embedder"))?,
            double: (0..config.num_layers)
                .map(|i| Ok(Arc::new(DoubleBlock::new(config, &params.at("transformer_blocks").at(i))?)))
                .collect::<Result<_>>()?,
            single: (0..config.num_single_layers)
                .map(|i| Ok(Arc::new(SingleBlock::new(config, &params.at("single_transformer_blocks").at(i))?)))
                .collect::<Result<_>>()?,
            norm_out: zero(2 * dim, params.at("norm_out").at("linear"))?,
            out: zero(out, params.at("proj_out"))?,
            config: config.clone(),
        })
    }

    pub fn config(&self) -> &Config {
        &self.config
    }

    /// The rotary angles of a sequence of `positions`, text first.
    pub fn angles(&self, positions: &[Position], device: &Device) -> Result<Angles> {
        let half = self.config.attention_head_dim / 2;
        let (mut cos, mut sin) = (Vec::new(), Vec::new());
        for position in positions {
            for (axis, &dim) in self.config.axes_dims_rope.iter().enumerate() {
                let place = f64::from(position.get(axis).copied().unwrap_or(0));
                for i in 0..dim / 2 {
                    let angle = place * self.config.rope_theta.powf(-2.0 * i as f64 / dim as f64);
                    cos.push(angle.cos() as f32);
                    sin.push(angle.sin() as f32);
                }
            }
        }
        let shape = (positions.len(), half);
        Ok(Angles { cos: Tensor::from_vec(cos, shape, device)?, sin: Tensor::from_vec(sin, shape, device)? })
    }

    /// The velocity of every image token: `image` is `(B, N, in_channels)`, the result is `(B, N, out_channels)`.
    pub fn forward(&self, image: &Tensor, given: &Conditioning) -> Result<Tensor> {
        Ok(self.forward_drawn(image, given, image.dim(1)?)?.0)
    }

    /// The velocity of the first `drawn` image tokens, as what follows them are references, and all image tokens as they are
    /// halfway through the single-stream blocks, `(B, N, D)`.
    pub fn forward_drawn(&self, image: &Tensor, given: &Conditioning, drawn: usize) -> Result<(Tensor, Tensor)> {
        let mut temb = self.time.forward(given.sigma, image.dtype())?;
        if let (Some(guidance), Some(embedding)) = (given.guidance, &self.guidance) {
            temb = (temb + embedding.forward(guidance, image.dtype())?)?;
        }
        let temb = silu(&temb)?; // (B, D)
        let rows = image.dim(0)?;
        let modulation = |layer: &Linear| -> candle_core::Result<Tensor> {
            let x = layer.forward(&temb)?;
            if x.dim(0)? == rows { Ok(x) } else { x.broadcast_as((rows, x.dim(1)?))?.contiguous() }
        };
        let mod_image = cut(&modulation(&self.modulation_image)?)?;
        let mod_text = cut(&modulation(&self.modulation_text)?)?;
        let mod_single = cut(&modulation(&self.modulation_single)?)?;

        let mut image = self.embed_image.forward(image)?;
        let mut text = self.embed_text.forward(given.text)?;
        for block in &self.double {
            let (own, angles) = (block.clone(), given.angles.clone());
            let run = move |x: &[Tensor]| own.forward(&x[0], &x[1], &x[2], &x[3], &angles).map(Vec::from);
            let mut new = recompute::block(&[&text, &image, &mod_text, &mod_image], run)?;
            (image, text) = (new.remove(1), new.remove(0));
        }
        let (length, n) = (text.dim(1)?, image.dim(1)?);
        let mut x = Tensor::cat(&[text, image], 1)?; // (B, L + N, D)
        let single = |x: &Tensor, block: &Arc<SingleBlock>| -> Result<Tensor> {
            let (own, angles) = (block.clone(), given.angles.clone());
            let run = move |x: &[Tensor]| Ok(vec![own.forward(&x[0], &x[1], &angles)?]);
            Ok(recompute::block(&[x, &mod_single], run)?.remove(0))
        };
        let (first, rest) = self.single.split_at(self.single.len() / 2);
        for block in first {
            x = single(&x, block)?;
        }
        let hidden = x.narrow(1, length, n)?;
        // Of what the last block makes only the drawn tokens are read.
        let x = match rest.split_last() {
            Some((end, rest)) => {
                for block in rest {
                    x = single(&x, block)?;
                }
                let (own, angles) = (end.clone(), given.angles.clone());
                let run = move |x: &[Tensor]| Ok(vec![own.forward_part(&x[0], &x[1], &angles, (length, drawn))?]);
                recompute::block(&[&x, &mod_single], run)?.remove(0)
            }
            None => x.narrow(1, length, drawn)?,
        };
        let last = modulation(&self.norm_out)?.chunk(2, D::Minus1)?;
        let x = layer_norm_modulate(&x, &last[1], &last[0], self.config.eps)?;
        Ok((self.out.forward(&x)?, hidden))
    }
}

/// Sinusoids of 1000 times a noise level (or guidance strength), then a two-layer perceptron.
struct TimeEmbedding {
    /// `(1, channels / 2)`.
    frequencies: Tensor,
    first: Linear,
    second: Linear,
}

impl TimeEmbedding {
    fn new(channels: usize, dim: usize, params: &Params) -> Result<Self> {
        let half = channels / 2;
        let frequencies: Vec<f32> = (0..half).map(|i| (-(10_000f32.ln()) * i as f32 / half as f32).exp()).collect();
        Ok(Self {
            frequencies: Tensor::from_vec(frequencies, (1, half), params.device())?,
            first: Linear::new(channels, dim, &params.at("linear_1"))?,
            second: Linear::new(dim, dim, &params.at("linear_2"))?,
        })
    }

    fn forward(&self, value: &Tensor, dtype: DType) -> candle_core::Result<Tensor> {
        let value = (value.to_dtype(DType::F32)? * 1000.0)?.unsqueeze(1)?;
        let angle = value.broadcast_mul(&self.frequencies)?;
        let waves = Tensor::cat(&[angle.cos()?, angle.sin()?], 1)?.to_dtype(dtype)?;
        self.second.forward(&silu(&self.first.forward(&waves)?)?)
    }
}

/// How a noise level bends one sub-block: each `(B, D)`.
struct Modulation {
    shift: Tensor,
    scale: Tensor,
    gate: Tensor,
}

impl Modulation {
    fn all(x: &Tensor, sets: usize) -> candle_core::Result<Vec<Self>> {
        let dim = x.dim(1)? / (3 * sets);
        let part = |i: usize| x.narrow(1, i * dim, dim);
        (0..sets).map(|s| Ok(Self { shift: part(3 * s)?, scale: part(3 * s + 1)?, gate: part(3 * s + 2)? })).collect()
    }
}

/// Query, key and value of one stream.
struct Qkv {
    q: Linear,
    k: Linear,
    v: Linear,
    q_norm: Tensor,
    k_norm: Tensor,
    heads: usize,
    eps: f64,
}

impl Qkv {
    fn new(config: &Config, params: &Params, [q, k, v, q_norm, k_norm]: [&str; 5]) -> Result<Self> {
        let (dim, head) = (config.dim(), config.attention_head_dim);
        let norm = |name: &str| params.at(name).get("weight", &[head], Init::Ones);
        Ok(Self {
            q: Linear::new(dim, dim, &params.at(q))?,
            k: Linear::new(dim, dim, &params.at(k))?,
            v: Linear::new(dim, dim, &params.at(v))?,
            q_norm: norm(q_norm)?,
            k_norm: norm(k_norm)?,
            heads: config.num_attention_heads,
            eps: config.eps,
        })
    }

    /// Each `(B, T, H, D/H)`, queries and keys normalised and rotated by the angles from `start` on.
    fn forward(&self, x: &Tensor, angles: &Angles, start: usize) -> candle_core::Result<[Tensor; 3]> {
        let (b, t, _) = x.dims3()?;
        let split = |y: Tensor| y.reshape((b, t, self.heads, ()));
        let (cos, sin) = (angles.cos.narrow(0, start, t)?, angles.sin.narrow(0, start, t)?);
        let turned = |y: Tensor, norm: &Tensor| norm_rope(&y, norm, self.eps, &cos, &sin, Rotation::Interleaved);
        Ok([
            turned(split(self.q.forward(x)?)?, &self.q_norm)?,
            turned(split(self.k.forward(x)?)?, &self.k_norm)?,
            split(self.v.forward(x)?)?,
        ])
    }
}

struct FeedForward {
    first: Linear,
    second: Linear,
}

impl FeedForward {
    fn new(config: &Config, params: &Params) -> Result<Self> {
        let (dim, hidden) = (config.dim(), config.hidden());
        Ok(Self {
            first: Linear::new(dim, 2 * hidden, &params.at("linear_in"))?,
            second: Linear::new(hidden, dim, &params.at("linear_out"))?,
        })
    }

    fn forward(&self, x: &Tensor) -> candle_core::Result<Tensor> {
        self.second.forward(&swiglu(&self.first.forward(x)?)?)
    }
}

/// Text and image, each with its own weights, in one attention.
struct DoubleBlock {
    image: Qkv,
    text: Qkv,
    image_out: Linear,
    text_out: Linear,
    image_mlp: FeedForward,
    text_mlp: FeedForward,
    eps: f64,
}

impl DoubleBlock {
    fn new(config: &Config, params: &Params) -> Result<Self> {
        let (dim, attn) = (config.dim(), params.at("attn"));
        Ok(Self {
            image: Qkv::new(config, &attn, ["to_q", "to_k", "to_v", "norm_q", "norm_k"])?,
            text: Qkv::new(config, &attn, ["add_q_proj", "add_k_proj", "add_v_proj", "norm_added_q", "norm_added_k"])?,
            image_out: Linear::new(dim, dim, &attn.at("to_out.0"))?,
            text_out: Linear::new(dim, dim, &attn.at("to_add_out"))?,
            image_mlp: FeedForward::new(config, &params.at("ff"))?,
            text_mlp: FeedForward::new(config, &params.at("ff_context"))?,
            eps: config.eps,
        })
    }

    /// The new text `(B, L, D)` and image `(B, N, D)`.
    fn forward(
        &self,
        text: &Tensor,
        image: &Tensor,
        mod_text: &Tensor,
        mod_image: &Tensor,
        angles: &Angles,
    ) -> candle_core::Result<[Tensor; 2]> {
        let (mod_text, mod_image) = (&Modulation::all(mod_text, 2)?, &Modulation::all(mod_image, 2)?);
        let (length, n) = (text.dim(1)?, image.dim(1)?);
        let bend = |x: &Tensor, m: &Modulation| layer_norm_modulate(x, &m.shift, &m.scale, self.eps);
        let of_text = self.text.forward(&bend(text, &mod_text[0])?, angles, 0)?;
        let of_image = self.image.forward(&bend(image, &mod_image[0])?, angles, length)?;
        let [q, k, v] = [0, 1, 2].map(|i| Tensor::cat(&[&of_text[i], &of_image[i]], 1));
        let y = attention(&q?, &k?, &v?, &Mask::default())?.flatten_from(2)?; // (B, L + N, D)

        let finish = |x: &Tensor, y: Tensor, out: &Linear, mlp: &FeedForward, m: &[Modulation]| {
            let x = gate_residual(x, &m[0].gate, &out.forward(&y)?)?;
            gate_residual(&x, &m[1].gate, &mlp.forward(&bend(&x, &m[1])?)?)
        };
        let new_text = finish(text, y.narrow(1, 0, length)?, &self.text_out, &self.text_mlp, mod_text)?;
        let new_image = finish(image, y.narrow(1, length, n)?, &self.image_out, &self.image_mlp, mod_image)?;
        Ok([new_text, new_image])
    }
}

/// Attention and MLP side by side over the joined sequence.
struct SingleBlock {
    project: Linear,
    q_norm: Tensor,
    k_norm: Tensor,
    out: Linear,
    heads: usize,
    hidden: usize,
    eps: f64,
}

impl SingleBlock {
    fn new(config: &Config, params: &Params) -> Result<Self> {
        let (dim, hidden, attn) = (config.dim(), config.hidden(), params.at("attn"));
        let norm = |name: &str| attn.at(name).get("weight", &[config.attention_head_dim], Init::Ones);
        Ok(Self {
            project: Linear::new(dim, 3 * dim + 2 * hidden, &attn.at("to_qkv_mlp_proj"))?,
            q_norm: norm("norm_q")?,
            k_norm: norm("norm_k")?,
            out: Linear::new(dim + hidden, dim, &attn.at("to_out"))?,
            heads: config.num_attention_heads,
            hidden,
            eps: config.eps,
        })
    }

    fn forward(&self, x: &Tensor, modulation: &Tensor, angles: &Angles) -> candle_core::Result<Tensor> {
        let m = &Modulation::all(modulation, 1)?[0];
        let y = self.project.forward(&layer_norm_modulate(x, &m.shift, &m.scale, self.eps)?)?;
        let (q_norm, k_norm, Angles { cos, sin }) = (&self.q_norm, &self.k_norm, angles);
        let y = attention_swiglu(&y, q_norm, k_norm, self.eps, self.heads, cos, sin, Rotation::Interleaved)?;
        gate_residual(x, &m.gate, &self.out.forward(&y)?)
    }

    /// [`SingleBlock::forward`] of the tokens `from..from + n` alone, `(B, n, D)`: of the others only keys and values are
    /// computed. For the last block, of which nothing else is read.
    fn forward_part(
        &self,
        x: &Tensor,
        modulation: &Tensor,
        angles: &Angles,
        (from, n): (usize, usize),
    ) -> candle_core::Result<Tensor> {
        let m = &Modulation::all(modulation, 1)?[0];
        let (b, t, dim) = x.dims3()?;
        let all = layer_norm_modulate(x, &m.shift, &m.scale, self.eps)?;
        let own = all.narrow(1, from, n)?.contiguous()?;
        let (cos, sin) = (angles.cos.narrow(0, from, n)?, angles.sin.narrow(0, from, n)?);
        let heads = |x: &Tensor, t: usize, part: usize| {
            self.project.outputs(part * dim, dim)?.forward(x)?.reshape((b, t, self.heads, ()))
        };
        let q = norm_rope(&heads(&own, n, 0)?, &self.q_norm, self.eps, &cos, &sin, Rotation::Interleaved)?;
        let (k, v) = (heads(&all, t, 1)?, heads(&all, t, 2)?);
        let k = norm_rope(&k, &self.k_norm, self.eps, &angles.cos, &angles.sin, Rotation::Interleaved)?;
        let y = attention(&q, &k, &v, &Mask::default())?.flatten_from(2)?;
        let gated = swiglu(&self.project.outputs(3 * dim, 2 * self.hidden)?.forward(&own)?)?;
        let y = self.out.forward(&Tensor::cat(&[y, gated], 2)?)?;
        gate_residual(&x.narrow(1, from, n)?, &m.gate, &y)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        models::Adapter,
        tensor::{
            parity::{composed, difference},
            rng::Stream,
        },
    };
    use candle_core::Var;

    fn random(name: &str, shape: &[usize]) -> Tensor {
        Stream::new(0, name, 0).normal(shape, &Device::Cpu).unwrap()
    }

    /// A model whose every part says something, its variables and those of an adapter on its single-stream blocks.
    fn model(single: usize) -> (Flux2, Vec<(String, Var)>) {
        let config = Config {
            in_channels: 4,
            num_layers: 1,
            num_single_layers: single,
            attention_head_dim: 8,
            num_attention_heads: 2,
            joint_attention_dim: 6,
            axes_dims_rope: vec![2, 2, 2, 2],
            guidance_embeds: false,
            ..Config::default()
        };
        let adapter = Adapter::fresh(2, 4.0, vec!["to_qkv_mlp_proj".into(), "attn.to_out".into()], 1);
        let params = Params::fresh(0, DType::F32, &Device::Cpu).adapted(vec![adapter.clone()]);
        let model = Flux2::new(&config, &params).unwrap();
        let vars: Vec<(String, Var)> = params.vars().into_iter().chain(adapter.vars()).collect();
        for (name, var) in &vars {
            // A fresh model adds nothing to its tokens.
            if name.contains("modulation") || name.contains("lora_B") || name.contains("_out") {
                var.set(&(random(name, var.dims()) * 0.2).unwrap()).unwrap();
            }
        }
        (model, vars)
    }

    #[test]
    fn what_is_drawn_is_the_same_without_the_rest() {
        for single in [0, 1, 3] {
            let (model, mut vars) = model(single);
            let (image, text) = (random("image", &[2, 10, 4]), random("text", &[2, 5, 6]));
            vars.extend([("image", image), ("text", text)].map(|(n, x)| (n.into(), Var::from_tensor(&x).unwrap())));
            let mut positions = text_positions(5);
            positions.extend(image_positions(0, 3, 2));
            positions.extend(image_positions(10, 2, 2));
            let angles = model.angles(&positions, &Device::Cpu).unwrap();
            let sigma = Tensor::new(&[0.3f32, 0.8], &Device::Cpu).unwrap();
            // The velocity of six tokens, a state in the middle, and all gradients of both together.
            let run = |recorded: bool, drawn: usize| -> Result<Vec<Tensor>> {
                let var = |i: usize| vars[vars.len() - i].1.as_tensor();
                let given = Conditioning { text: var(1), sigma: &sigma, guidance: None, angles: &angles };
                let (found, tape) = recompute::Tape::record(recorded, || model.forward_drawn(var(2), &given, drawn));
                let (v, hidden) = found?;
                assert_eq!((v.dims(), hidden.dims()), (&[2, drawn, 4][..], &[2, 10, 16][..]));
                let v = v.narrow(1, 0, 6)?;
                let sum =
                    ((&v * random("v", v.dims()))?.sum_all()? + (&hidden * random("h", hidden.dims()))?.sum_all()?)?;
                let grads = tape.backward(&sum)?;
                // What only the references' velocity would need has none.
                let grads = vars.iter().map(|(_, var)| match grads.get(var) {
                    Some(grad) => Ok(grad.clone()),
                    None => var.zeros_like(),
                });
                Ok([Ok(v), Ok(hidden)].into_iter().chain(grads).collect::<candle_core::Result<_>>()?)
            };
            let want = run(false, 10).unwrap();
            let others = [run(false, 6), run(true, 6), composed(|| run(false, 6)), composed(|| run(false, 10))];
            for got in others {
                for (i, (got, want)) in got.unwrap().iter().zip(&want).enumerate() {
                    let name = i.checked_sub(2).map_or("a value", |i| vars[i].0.as_str());
                    assert!(difference(got, want) < 1e-4, "{single} single-stream blocks: {name} differs");
                }
            }
        }
    }

    #[test]
    fn a_part_of_a_block_is_that_of_the_whole() {
        let (model, vars) = model(1);
        let block = &model.single[0];
        let inputs = [random("x", &[2, 9, 16]), random("modulation", &[2, 48])];
        let [x, modulation] = inputs.each_ref().map(|x| Var::from_tensor(x).unwrap());
        let mut positions = text_positions(3);
        positions.extend(image_positions(0, 3, 2));
        let angles = model.angles(&positions, &Device::Cpu).unwrap();
        for (from, n) in [(3, 4), (0, 9), (8, 1)] {
            let run = |y: candle_core::Result<Tensor>| {
                let y = y.unwrap();
                let grads = (&y * random("direction", y.dims())).unwrap().sum_all().unwrap().backward().unwrap();
                let of_block = vars.iter().filter(|(name, _)| name.starts_with("single_transformer_blocks"));
                let asked = of_block.map(|(_, var)| var).chain([&x, &modulation]);
                let mut all: Vec<Tensor> = asked.map(|var| grads.get(var).expect("a gradient").clone()).collect();
                // Both projections with their two factors, two norms and the inputs.
                assert_eq!(all.len(), 10);
                all.push(y);
                all
            };
            let got = run(block.forward_part(&x, &modulation, &angles, (from, n)));
            let want = run(block.forward(&x, &modulation, &angles).and_then(|y| y.narrow(1, from, n)));
            for (got, want) in got.iter().zip(&want) {
                assert!(difference(got, want) < 1e-5, "tokens {from}..{}", from + n);
            }
        }
        let short = model.angles(&positions[1..], &Device::Cpu).unwrap();
        assert!(block.forward_part(&x, &modulation, &short, (3, 4)).is_err());
    }
}
