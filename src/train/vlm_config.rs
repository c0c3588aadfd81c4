//! The section `[vlm]` of a pretraining config: what is taught, and the model's sizes.

use super::grpo_config::AdapterConfig;
use crate::{
    models::{
        qwen3::{self, RopeParameters},
        qwen3_vl::{self, VisionConfig},
    },
    scene::tabletop::{edit::PLACES, world::SIDE},
    tensor::Precision,
    usage,
    vlm::chat::Chat,
};
use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use std::path::PathBuf;

/// The section `vlm` of a pretraining config.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct VlmConfig {
    /// A model folder to go on from; `shape` then counts for nothing.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub init: Option<PathBuf>,
    /// A new adapter on the model of `init`, which is trained instead of its own weights: the Actor's, so all that is taught
    /// are edits, of prompts in the plain words that it gets in the loop. A picture that needs no edit gives way to a render.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub adapter: Option<AdapterConfig>,
    /// Claims about a picture at most, of those that a graph makes.
    pub claims: usize,
    /// Further claims about a picture, half of which hold.
    pub probes: usize,
    /// The share of pictures that are given with an edit.
    pub act: f64,
    /// Objects at most of a prompt that an edit is given for: what more than that ask for is left to Reflection-GRPO.
    pub act_objects: usize,
    /// At least this share of edits move something: where all is there and a relation fails, the loop needs them most. A picture
    /// of one thing has none.
    pub moves: f64,
    /// Relations at most by which an edit tells the place of what it adds or moves, as many as the prompt asks for. An Editor
    /// has to know such edits ([`super::diffuser_config::Stage::several_places`]).
    pub places: usize,
    /// The share of pictures that come with a caption to parse.
    pub parse: f64,
    /// From which step on pictures have up to how many objects.
    pub curriculum: Vec<(u64, usize)>,
    /// Runs of `rlrig eval` on the world's train split, whose pictures are shown too.
    pub drawn: Vec<PathBuf>,
    /// Their share of all pictures.
    pub drawn_share: f64,
    /// Share of imperfect pictures ([`super::imperfect`]) among the others.
    pub imperfect: f64,
    /// Pictures of an evaluation.
    pub evaluation: usize,
    /// Precision of the matrix products.
    pub precision: Precision,
    pub shape: Shape,
}

/// The size of the model.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Shape {
    pub patch: usize,
    pub merge: usize,
    pub vision_hidden: usize,
    pub vision_layers: usize,
    pub vision_heads: usize,
    pub vision_mlp: usize,
    /// Layers of the vision tower whose features are added to the first decoder layers.
    pub deepstack: Vec<usize>,
    pub hidden: usize,
    pub layers: usize,
    pub heads: usize,
    pub key_value_heads: usize,
    pub head_dim: usize,
    pub mlp: usize,
    /// Tokens of the vocabulary at most.
    pub vocabulary: usize,
}

impl VlmConfig {
    /// The share of pictures that are given with an edit: all that an adapter is taught.
    pub fn act(&self) -> f64 {
        if self.adapter.is_some() { 1.0 } else { self.act }
    }

    /// Whether prompts that an edit is asked for are in plain words alone, as in the loop.
    pub fn plain(&self) -> bool {
        self.adapter.is_some()
    }

    /// Refuses what cannot be taught.
    pub fn check(&self) -> Result<()> {
        let shares = [self.act, self.moves, self.parse, self.drawn_share, self.imperfect];
        if shares.iter().any(|share| !(0.0..=1.0).contains(share)) {
            usage!("[vlm] act, moves, parse, drawn_share and imperfect are shares, from 0 to 1");
        }
        if self.act_objects == 0 {
            usage!("[vlm] act_objects is 1 or more; with act = 0 no edits are taught");
        }
        if self.moves > 0.0 && self.act_objects < 2 {
            usage!("[vlm] moves are edits of two objects or more, and act_objects is {}", self.act_objects);
        }
        if !(1..=PLACES).contains(&self.places) {
            usage!("[vlm] places is 1 to {PLACES}, not {}", self.places);
        }
        if self.adapter.is_some() && self.init.is_none() {
            usage!("[vlm] adapter is for an Actor on the model of init");
        }
        Ok(())
    }
}

impl Default for VlmConfig {
    fn default() -> Self {
        Self {
            init: None,
            adapter: None,
            claims: 2,
            probes: 5,
            act: 0.25,
            act_objects: 3,
            moves: 0.0,
            places: 1,
            parse: 0.1,
            curriculum: vec![(0, 1), (200, 2), (500, 3)],
            drawn: Vec::new(),
            drawn_share: 0.4,
            imperfect: 0.0,
            evaluation: 100,
            precision: Precision::F32,
            shape: Shape::default(),
        }
    }
}

impl Default for Shape {
    fn default() -> Self {
        Self {
            patch: 8,
            merge: 2,
            vision_hidden: 128,
            vision_layers: 4,
            vision_heads: 4,
            vision_mlp: 512,
            deepstack: vec![1, 2],
            hidden: 192,
            layers: 4,
            heads: 6,
            key_value_heads: 2,
            head_dim: 32,
            mlp: 512,
            vocabulary: 768,
        }
    }
}

impl Shape {
    /// Whether a model of this shape can look at the world's pictures.
    pub fn check(&self) -> Result<()> {
        let vision = [self.vision_hidden, self.vision_layers, self.vision_heads, self.vision_mlp];
        let text = [self.hidden, self.layers, self.heads, self.key_value_heads, self.head_dim, self.mlp];
        if vision.iter().chain(&text).any(|size| !(1..=4096).contains(size)) {
            usage!("[vlm.shape] hidden, layers, heads, key_value_heads, head_dim, mlp and vision_* are 1 to 4096");
        }
        let block = self.patch.saturating_mul(self.merge);
        if !(SIDE as usize).is_multiple_of(block) {
            usage!("[vlm.shape] patch times merge must divide a picture's side of {SIDE}, and is {block}");
        }
        Ok(())
    }

    /// The config of a model of this shape over a vocabulary of `size` tokens.
    pub fn config(&self, chat: &Chat) -> Result<qwen3_vl::Config> {
        let token = |name: &str| chat.token(name).with_context(|| format!("the vocabulary lacks {name}"));
        let rope = |theta: f64| RopeParameters { rope_theta: Some(theta), ..RopeParameters::default() };
        let pairs = self.head_dim / 2;
        // Height and width get a third of the frequencies each, time the rest.
        let section = [pairs - 2 * (pairs / 3), pairs / 3, pairs / 3];
        Ok(qwen3_vl::Config {
            text_config: qwen3::Config {
                vocab_size: chat.tokenizer().get_vocab_size(true),
                hidden_size: self.hidden,
                intermediate_size: self.mlp,
                num_hidden_layers: self.layers,
                num_attention_heads: self.heads,
                num_key_value_heads: Some(self.key_value_heads),
                head_dim: self.head_dim,
                rms_norm_eps: 1e-6,
                tie_word_embeddings: true,
                attention_bias: false,
                hidden_act: "silu".to_owned(),
                max_position_embeddings: 1024,
                use_sliding_window: false,
                // Positions are few: a small base spreads the frequencies over them.
                rope_parameters: Some(RopeParameters {
                    rope_type: Some("default".to_owned()),
                    mrope_section: Some(section),
                    mrope_interleaved: Some(true),
                    ..rope(1000.0)
                }),
                rope_scaling: None,
                rope_theta: None,
            },
            vision_config: VisionConfig {
                depth: self.vision_layers,
                hidden_size: self.vision_hidden,
                intermediate_size: self.vision_mlp,
                num_heads: self.vision_heads,
                in_channels: 3,
                patch_size: self.patch,
                spatial_merge_size: self.merge,
                temporal_patch_size: 2,
                out_hidden_size: self.hidden,
                num_position_embeddings: (SIDE as usize / self.patch).pow(2),
                deepstack_visual_indexes: self.deepstack.clone(),
                hidden_act: "gelu_pytorch_tanh".to_owned(),
                rope_parameters: Some(RopeParameters { rope_type: Some("axial".to_owned()), ..rope(100.0) }),
            },
            image_token_id: token("<|image_pad|>")?,
            video_token_id: token("<|video_pad|>")?,
            vision_start_token_id: token("<|vision_start|>")?,
            vision_end_token_id: token("<|vision_end|>")?,
            tie_word_embeddings: true,
        })
    }

    /// `preprocessor_config.json`: pictures of the tabletop world are looked at as they are, others near their size.
    pub fn processor(&self) -> Value {
        json!({
            "image_processor_type": "Qwen2VLImageProcessor",
            "do_convert_rgb": true,
            "do_resize": true,
            "do_rescale": true,
            "do_normalize": true,
            "size": { "shortest_edge": SIDE * SIDE, "longest_edge": SIDE * SIDE },
            "patch_size": self.patch,
            "merge_size": self.merge,
            "temporal_patch_size": 2,
            "image_mean": [0.5, 0.5, 0.5],
            "image_std": [0.5, 0.5, 0.5],
            "rescale_factor": 1.0 / 255.0,
            "resample": 3,
        })
    }
}
