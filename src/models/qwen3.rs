//! `Qwen3ForCausalLM` (arXiv 2505.09388): the text encoder of FLUX.2-klein and the decoder of Qwen3-VL.
//!
//! A pre-norm decoder: `x += attn(norm(x)); x += mlp(norm(x))` with grouped-query attention, RMS norm of every query and
//! key head, rotary positions and a SwiGLU. Follows `modeling_qwen3.py` of transformers, whose folders it reads. Qwen3-VL
//! uses the same [`Decoder`] with three-axis positions and features added after its first layers.

use super::{Folder, Init, Linear, Params};
use crate::tensor::{Mask, Rotation, attention, embedding, norm_rope, recompute, rms_norm, select_rows, swiglu_of};
use anyhow::{Context, Result, bail};
use candle_core::{DType, Device, Tensor};
use serde::{Deserialize, Serialize};
use std::sync::Arc;

/// `config.json`, and the `text_config` of Qwen3-VL.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Config {
    pub vocab_size: usize,
    pub hidden_size: usize,
    pub intermediate_size: usize,
    pub num_hidden_layers: usize,
    pub num_attention_heads: usize,
    pub num_key_value_heads: Option<usize>,
    #[serde(default = "default_head_dim")]
    pub head_dim: usize,
    #[serde(default = "default_eps")]
    pub rms_norm_eps: f64,
    #[serde(default)]
    pub tie_word_embeddings: bool,
    #[serde(default)]
    pub attention_bias: bool,
    #[serde(default = "default_act")]
    pub hidden_act: String,
    #[serde(default = "default_context")]
    pub max_position_embeddings: usize,
    #[serde(default)]
    pub use_sliding_window: bool,
    /// How transformers 5 writes the rotary positions.
    #[serde(default)]
    pub rope_parameters: Option<RopeParameters>,
    /// How older checkpoints write them, together with `rope_theta`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rope_scaling: Option<RopeParameters>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rope_theta: Option<f64>,
}

/// The rotary positions of a config.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct RopeParameters {
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rope_theta: Option<f64>,
    #[serde(alias = "type", skip_serializing_if = "Option::is_none")]
    pub rope_type: Option<String>,
    /// How many frequencies time, height and width get in Qwen3-VL.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub mrope_section: Option<[usize; 3]>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub mrope_interleaved: Option<bool>,
}

fn default_head_dim() -> usize {
    128
}

fn default_eps() -> f64 {
    1e-6
}

fn default_act() -> String {
    "silu".to_owned()
}

fn default_context() -> usize {
    32768
}

impl Config {
    /// The key and value heads; as many as query heads if the config does not say.
    pub fn key_value_heads(&self) -> usize {
        self.num_key_value_heads.unwrap_or(self.num_attention_heads)
    }

    fn theta(&self) -> f64 {
        let written = [&self.rope_parameters, &self.rope_scaling].into_iter().flatten().find_map(|r| r.rope_theta);
        written.or(self.rope_theta).unwrap_or(10_000.0)
    }

    fn mrope_section(&self) -> Option<[usize; 3]> {
        [&self.rope_parameters, &self.rope_scaling].into_iter().flatten().find_map(|r| r.mrope_section)
    }

    /// Whether this file can run what the config describes.
    pub fn validate(&self) -> Result<()> {
        let (heads, shared) = (self.num_attention_heads, self.key_value_heads());
        expect_sizes(&[
            ("vocab_size", self.vocab_size, 1 << 24),
            ("hidden_size", self.hidden_size, LARGEST),
            ("intermediate_size", self.intermediate_size, LARGEST),
            ("num_hidden_layers", self.num_hidden_layers, MOST_LAYERS),
            ("num_attention_heads", heads, LARGEST),
            ("num_key_value_heads", shared, LARGEST),
            ("head_dim", self.head_dim, LARGEST),
        ])?;
        if let Some(section) = self.mrope_section().filter(|section| section.iter().any(|n| *n > LARGEST)) {
            bail!("mrope_section must be up to {LARGEST}, not {section:?}");
        }
        if !heads.is_multiple_of(shared) {
            bail!("{heads} attention heads cannot share {shared} key heads");
        }
        if !self.head_dim.is_multiple_of(2) {
            bail!("head_dim is {}, but rotary positions need an even number", self.head_dim);
        }
        if self.hidden_act != "silu" {
            bail!("hidden_act {:?} is not supported, only \"silu\"", self.hidden_act);
        }
        if self.use_sliding_window {
            bail!("sliding-window attention is not supported");
        }
        for rope in [&self.rope_parameters, &self.rope_scaling].into_iter().flatten() {
            match rope.rope_type.as_deref() {
                None | Some("default" | "mrope") => {}
                Some(other) => bail!("rope_type {other:?} is not supported, only \"default\""),
            }
        }
        Ok(())
    }
}

/// The sizes that a config may ask for: beyond every model, and small enough that products of a few of them are numbers.
pub(super) const LARGEST: usize = 1 << 20;
pub(super) const MOST_LAYERS: usize = 1 << 12;

/// An error if one of `sizes`, each a key of a config with what it says and may say at most, is none.
pub(super) fn expect_sizes(sizes: &[(&str, usize, usize)]) -> Result<()> {
    match sizes.iter().find(|(_, size, most)| !(1..=*most).contains(size)) {
        Some((key, size, most)) => bail!("{key} must be 1 to {most}, not {size}"),
        None => Ok(()),
    }
}

struct Attention {
    q: Linear,
    k: Linear,
    v: Linear,
    o: Linear,
    q_norm: Tensor,
    k_norm: Tensor,
    head_dim: usize,
    eps: f64,
}

impl Attention {
    fn new(config: &Config, params: &Params) -> Result<Self> {
        let Config { hidden_size, head_dim, attention_bias: bias, .. } = *config;
        let (q, kv) = (config.num_attention_heads * head_dim, config.key_value_heads() * head_dim);
        let linear = |name, inner, out, init| Linear::with(inner, out, bias, init, &params.at(name));
        Ok(Self {
            q: linear("q_proj", hidden_size, q, Init::FanIn)?,
            k: linear("k_proj", hidden_size, kv, Init::FanIn)?,
            v: linear("v_proj", hidden_size, kv, Init::FanIn)?,
            o: linear("o_proj", q, hidden_size, residual_init(config, q))?,
            q_norm: params.at("q_norm").get("weight", &[head_dim], Init::Ones)?,
            k_norm: params.at("k_norm").get("weight", &[head_dim], Init::Ones)?,
            head_dim,
            eps: config.rms_norm_eps,
        })
    }

    fn forward(
        &self,
        x: &Tensor,
        angles: &Angles,
        mask: &Mask,
        past: Option<(&Tensor, &Tensor)>,
    ) -> candle_core::Result<[Tensor; 3]> {
        let (b, t, _) = x.dims3()?;
        let heads = |y: Tensor| y.reshape((b, t, (), self.head_dim)); // (B, T, H, D)
        let rotate = |y: &Tensor, norm: &Tensor| norm_rope(y, norm, self.eps, &angles.cos, &angles.sin, Rotation::Half);
        let q = rotate(&heads(self.q.forward(x)?)?, &self.q_norm)?;
        let mut k = rotate(&heads(self.k.forward(x)?)?, &self.k_norm)?;
        let mut v = heads(self.v.forward(x)?)?;
        if let Some((past_k, past_v)) = past {
            k = Tensor::cat(&[past_k, &k], 1)?;
            v = Tensor::cat(&[past_v, &v], 1)?;
        }
        let y = self.o.forward(&attention(&q, &k, &v, mask)?.reshape((b, t, ()))?)?;
        Ok([y, k, v])
    }
}

/// Two matrices a layer write to the residual stream; together they start with its variance.
fn residual_init(config: &Config, inner: usize) -> Init {
    Init::Normal(((inner * 2 * config.num_hidden_layers) as f64).powf(-0.5))
}

struct Layer {
    attention: Attention,
    gate: Linear,
    up: Linear,
    down: Linear,
    input_norm: Tensor,
    post_norm: Tensor,
    eps: f64,
}

impl Layer {
    fn new(config: &Config, params: &Params) -> Result<Self> {
        let Config { hidden_size: hidden, intermediate_size: inner, .. } = *config;
        let mlp = params.at("mlp");
        let norm = |name| params.at(name).get("weight", &[hidden], Init::Ones);
        Ok(Self {
            attention: Attention::new(config, &params.at("self_attn"))?,
            gate: Linear::new(hidden, inner, &mlp.at("gate_proj"))?,
            up: Linear::new(hidden, inner, &mlp.at("up_proj"))?,
            down: Linear::with(inner, hidden, false, residual_init(config, inner), &mlp.at("down_proj"))?,
            input_norm: norm("input_layernorm")?,
            post_norm: norm("post_attention_layernorm")?,
            eps: config.rms_norm_eps,
        })
    }

    /// The new states, and the keys and values of all positions, those of `past` first.
    fn forward(
        &self,
        x: &Tensor,
        angles: &Angles,
        mask: &Mask,
        past: Option<(&Tensor, &Tensor)>,
    ) -> candle_core::Result<[Tensor; 3]> {
        let [y, k, v] = self.attention.forward(&rms_norm(x, &self.input_norm, self.eps)?, angles, mask, past)?;
        let x = (x + y)?;
        let y = rms_norm(&x, &self.post_norm, self.eps)?;
        let y = swiglu_of(&self.gate.forward(&y)?, &self.up.forward(&y)?)?;
        Ok([(x + self.down.forward(&y)?)?, k, v])
    }

    /// [`Layer::forward`] as a block that may be run again; keys and values go into `cache`.
    fn step(
        self: &Arc<Self>,
        x: &Tensor,
        angles: &Angles,
        mask: &Mask,
        cache: Option<&mut Option<(Tensor, Tensor)>>,
    ) -> candle_core::Result<Tensor> {
        let mut inputs = vec![x];
        if let Some(Some((k, v))) = cache.as_deref() {
            inputs.extend([k, v]);
        }
        let (own, angles, mask, keep) = (self.clone(), angles.clone(), mask.clone(), cache.is_some());
        let mut results = recompute::block(&inputs, move |inputs| {
            let past = inputs.get(1).zip(inputs.get(2));
            let [x, k, v] = own.forward(&inputs[0], &angles, &mask, past)?;
            Ok(if keep { vec![x, k, v] } else { vec![x] })
        })?;
        if let Some(slot) = cache {
            let v = results.pop();
            *slot = results.pop().zip(v);
        }
        Ok(results.remove(0))
    }
}

/// The cosines and sines of rotary positions, `(T, D/2)` or `(B, T, D/2)` each.
#[derive(Clone)]
pub struct Angles {
    pub cos: Tensor,
    pub sin: Tensor,
}

/// Keys and values of the positions seen so far, `(B, T, Hkv, D)` for each layer.
#[derive(Clone)]
pub struct Cache(Vec<Option<(Tensor, Tensor)>>);

impl Cache {
    /// The number of positions held.
    pub fn len(&self) -> usize {
        self.0.first().and_then(Option::as_ref).map_or(0, |(k, _)| k.dims()[1])
    }

    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    fn map(&self, f: impl Fn(&Tensor) -> candle_core::Result<Tensor>) -> candle_core::Result<Self> {
        let both = |pair: &Option<(Tensor, Tensor)>| pair.as_ref().map(|(k, v)| Ok((f(k)?, f(v)?))).transpose();
        self.0.iter().map(both).collect::<candle_core::Result<_>>().map(Self)
    }

    /// The same without its graph.
    pub fn detach(&self) -> Self {
        let pair = |pair: &Option<(Tensor, Tensor)>| pair.as_ref().map(|(k, v)| (k.detach(), v.detach()));
        Self(self.0.iter().map(pair).collect())
    }

    /// The rows `rows` of the batch, any of them any number of times: those still decoding, or one prefix for many.
    pub fn rows(&self, rows: &[u32]) -> candle_core::Result<Self> {
        self.map(|x| select_rows(x, rows))
    }

    /// Moves the first `lengths[row]` positions of each row to its end, so that the padding comes first and decoding
    /// may go on behind. Keys are already rotated: where they lie does not matter.
    pub fn align_right(&self, lengths: &[usize]) -> candle_core::Result<Self> {
        let total = self.len();
        if lengths.iter().all(|n| *n == total) {
            return Ok(self.clone());
        }
        let from = |(row, len): (usize, &usize)| {
            let shift = total - len;
            (0..total).map(move |i| (row * total + (i + total - shift) % total) as u32).collect::<Vec<_>>()
        };
        let index: Vec<u32> = lengths.iter().enumerate().flat_map(from).collect();
        self.map(|x| {
            let index = Tensor::new(index.as_slice(), x.device())?;
            x.contiguous()?.flatten(0, 1)?.index_select(&index, 0)?.reshape(x.dims())
        })
    }
}

/// The stack of decoder layers with its embedding, without an output head.
pub struct Decoder {
    config: Config,
    embedding: Tensor,
    layers: Vec<Arc<Layer>>,
    norm: Tensor,
    frequencies: Vec<f32>,
}

impl Decoder {
    pub fn new(config: &Config, params: &Params) -> Result<Self> {
        config.validate()?;
        let Config { vocab_size, hidden_size, head_dim, .. } = *config;
        let embedding = Init::Normal((hidden_size as f64).powf(-0.5));
        // In f32, as transformers does: far positions feel the difference.
        let theta = config.theta() as f32;
        let frequency = |i: usize| 1.0 / theta.powf((2 * i) as f32 / head_dim as f32);
        Ok(Self {
            embedding: params.at("embed_tokens").get("weight", &[vocab_size, hidden_size], embedding)?,
            layers: (0..config.num_hidden_layers)
                .map(|i| Ok(Arc::new(Layer::new(config, &params.at("layers").at(i))?)))
                .collect::<Result<_>>()?,
            norm: params.at("norm").get("weight", &[hidden_size], Init::Ones)?,
            frequencies: (0..head_dim / 2).map(frequency).collect(),
            config: config.clone(),
        })
    }

    pub fn config(&self) -> &Config {
        &self.config
    }

    pub fn device(&self) -> &Device {
        self.embedding.device()
    }

    pub fn dtype(&self) -> DType {
        self.embedding.dtype()
    }

    pub fn cache(&self) -> Cache {
        Cache(vec![None; self.layers.len()])
    }

    /// `(B, T)` token ids to `(B, T, hidden)`.
    pub fn embed(&self, ids: &Tensor) -> candle_core::Result<Tensor> {
        let (b, t) = ids.dims2()?;
        embedding(&self.embedding, &ids.flatten_all()?)?.reshape((b, t, ()))
    }

    /// The angles of text positions `from..from + count`, the same for every row.
    pub fn text_angles(&self, from: usize, count: usize) -> candle_core::Result<Angles> {
        let positions: Vec<[u32; 3]> = (from..from + count).map(|p| [p as u32; 3]).collect();
        let Angles { cos, sin } = self.angles(&[positions])?;
        Ok(Angles { cos: cos.squeeze(0)?, sin: sin.squeeze(0)? })
    }

    /// The angles of (time, height, width) positions for each row of the batch. The frequencies of the axes alternate
    /// (interleaved M-RoPE): number `3i + 1` turns with the height and `3i + 2` with the width while their sections
    /// last, and all others with time, which for text is all three.
    pub fn angles(&self, positions: &[Vec<[u32; 3]>]) -> candle_core::Result<Angles> {
        let section = self.config.mrope_section().unwrap_or_default();
        let axis = |i: usize| match i % 3 {
            axis if i < 3 * section[axis] => axis,
            _ => 0,
        };
        let (b, t, half) = (positions.len(), positions.first().map_or(0, Vec::len), self.frequencies.len());
        let (mut cos, mut sin) = (Vec::with_capacity(b * t * half), Vec::with_capacity(b * t * half));
        for position in positions.iter().flatten() {
            for (i, frequency) in self.frequencies.iter().enumerate() {
                let (s, c) = (position[axis(i)] as f32 * frequency).sin_cos();
                cos.push(c);
                sin.push(s);
            }
        }
        let tensor = |v| Tensor::from_vec(v, (b, t, half), self.device())?.to_dtype(self.dtype());
        Ok(Angles { cos: tensor(cos)?, sin: tensor(sin)? })
    }

    /// Runs the layers over `embeds (B, T, hidden)` and the final norm. `injected[i]`, of the same shape, is added
    /// after layer `i` (DeepStack). With a cache, `embeds` are the positions behind those it holds.
    pub fn forward(
        &self,
        embeds: &Tensor,
        angles: &Angles,
        mask: &Mask,
        injected: &[Tensor],
        mut cache: Option<&mut Cache>,
    ) -> candle_core::Result<Tensor> {
        let mut x = embeds.clone();
        for (i, layer) in self.layers.iter().enumerate() {
            let slot = cache.as_mut().and_then(|c| c.0.get_mut(i));
            x = layer.step(&x, angles, mask, slot)?;
            if let Some(more) = injected.get(i) {
                x = (x + more)?;
            }
        }
        rms_norm(&x, &self.norm, self.config.rms_norm_eps)
    }

    /// The states `layers` of `(B, T)` ids as transformers numbers its `hidden_states`: 0 is the embedding, `i` the
    /// output of the `i`-th layer, and the last one is behind the final norm. Layers beyond the last asked for do not run.
    pub fn hidden_states_at(&self, ids: &Tensor, mask: &Mask, layers: &[usize]) -> Result<Vec<Tensor>> {
        let depth = self.layers.len();
        let last = layers.iter().copied().max().unwrap_or(0);
        if last > depth {
            bail!("hidden state {last} was asked of a model with {depth} layers");
        }
        let angles = self.text_angles(0, ids.dim(1)?)?;
        let mut states = vec![self.embed(ids)?];
        for layer in &self.layers[..last] {
            states.push(layer.step(&states[states.len() - 1], &angles, mask, None)?);
        }
        if last == depth {
            states[last] = rms_norm(&states[last], &self.norm, self.config.rms_norm_eps)?;
        }
        Ok(layers.iter().map(|i| states[*i].clone()).collect())
    }
}

/// The output head: the embedding itself where the weights are tied.
pub struct Head(Linear);

impl Head {
    /// `params` is the root of the model, `tied` the place whose `weight` serves as head too.
    pub fn new(config: &Config, params: &Params, tied: Option<&Params>) -> Result<Self> {
        let head = params.at("lm_head");
        Ok(Self(Linear::new(config.hidden_size, config.vocab_size, tied.unwrap_or(&head))?))
    }

    /// `(.., hidden)` to `(.., vocabulary)`.
    pub fn forward(&self, x: &Tensor) -> candle_core::Result<Tensor> {
        self.0.forward(x)
    }
}

/// The language model.
pub struct Qwen3 {
    pub decoder: Decoder,
    head: Head,
}

impl Qwen3 {
    /// The model at the root of `params`.
    pub fn new(config: &Config, params: &Params) -> Result<Self> {
        let model = params.at("model");
        let decoder = Decoder::new(config, &model)?;
        let tied = config.tie_word_embeddings.then(|| model.at("embed_tokens"));
        Ok(Self { decoder, head: Head::new(config, params, tied.as_ref())? })
    }

    /// Reads a folder as `save_pretrained` writes it.
    pub fn open(folder: &Folder, dtype: DType, device: &Device) -> Result<Self> {
        let config: Config = folder.json("config.json")?;
        let params = Params::open(folder, "model", dtype, device)?;
        let model = Self::new(&config, &params).with_context(|| format!("the model in {}", folder.name()))?;
        params.finish(|name| config.tie_word_embeddings && name == "lm_head.weight")?;
        Ok(model)
    }

    /// All hidden states of `(B, T)` ids, `num_hidden_layers + 1` of them; see [`Decoder::hidden_states_at`].
    pub fn hidden_states(&self, ids: &Tensor, mask: &Mask) -> Result<Vec<Tensor>> {
        let all: Vec<usize> = (0..=self.decoder.config.num_hidden_layers).collect();
        self.decoder.hidden_states_at(ids, mask, &all)
    }

    /// The logits `(B, T, vocabulary)` of `(B, T)` ids at the positions of `angles`; they follow those in the cache.
    pub fn logits(&self, ids: &Tensor, angles: &Angles, mask: &Mask, cache: Option<&mut Cache>) -> Result<Tensor> {
        let x = self.decoder.forward(&self.decoder.embed(ids)?, angles, mask, &[], cache)?;
        Ok(self.head.forward(&x)?)
    }
}
