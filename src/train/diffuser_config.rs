//! The section `[diffuser]` of a pretraining config: the model's sizes, the curriculum, and how it is evaluated.

use super::grpo_config::AdapterConfig;
use crate::{scene::tabletop::sample, tensor::Precision};
use anyhow::Result;
use serde::{Deserialize, Serialize};
use std::path::PathBuf;

/// The section `[diffuser]` of a pretraining config.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct DiffuserConfig {
    /// Folder of the trained autoencoder.
    pub autoencoder: PathBuf,
    /// A pipeline's folder to go on from; its sizes and tokenizer replace those below.
    pub init: Option<PathBuf>,
    /// A new adapter on the transformer of `init`, which is trained instead of the model's own weights. Taught edits alone it is
    /// the Editor's, and what they need costs the Diffuser nothing; taught drawings, too, it is for either or both.
    pub adapter: Option<AdapterConfig>,
    pub heads: usize,
    pub head_dim: usize,
    pub double_blocks: usize,
    pub single_blocks: usize,
    pub text: TextConfig,
    /// Tokens that a prompt is padded to in use.
    pub max_length: usize,
    /// Share of samples whose prompt is emptied, for guidance.
    pub dropout: f64,
    /// Noise levels are `s u / (1 + (s - 1) u)` for uniform `u`: 1 is uniform, more means more noise.
    pub shift: f64,
    /// Noise added to the reference's latents, as generated pictures are not perfect.
    pub reference_noise: f64,
    /// Runs of `rlrig eval` on the world's train split, whose pictures are edited too ([`super::drawn`]).
    pub drawn: Vec<PathBuf>,
    /// Their share of the pictures that are edited.
    pub drawn_share: f64,
    /// Weight of the loss that tells the transformer's middle what lies where ([`super::layout`]).
    pub layout: f64,
    /// Weight of both losses in tokens where two things overlap, without noise; the more noise, the nearer to 1.
    pub overlap: f64,
    pub precision: Precision,
    pub stages: Vec<Stage>,
    pub evaluation: Evaluation,
}

/// The text encoder's sizes.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct TextConfig {
    pub vocabulary: usize,
    pub hidden: usize,
    pub layers: usize,
    pub heads: usize,
}

/// A part of the curriculum.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Stage {
    /// How many steps it lasts; the last stage lasts to the end.
    pub steps: u64,
    pub min_objects: usize,
    pub max_objects: usize,
    /// Share of edits among the samples.
    pub edits: f64,
    /// Share of the scenes of several objects in which two touch: what overlaps is harder to draw than what lies apart.
    #[serde(default = "touching")]
    pub touching: f64,
    /// Share of the edits of renders that move something, above what an even draw of the kinds gives: it is the hardest edit.
    #[serde(default)]
    pub moves: f64,
    /// Share of what is added or moved whose place is told by several relations, as prompts of many objects want it.
    #[serde(default)]
    pub several_places: f64,
}

fn touching() -> f64 {
    sample::TOUCHING
}

/// How held-out prompts are drawn and judged by the pixel oracle.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Evaluation {
    pub prompts: usize,
    pub steps: usize,
    pub guidance: f64,
}

impl Default for DiffuserConfig {
    fn default() -> Self {
        Self {
            autoencoder: "weights/tabletop/vae".into(),
            init: None,
            adapter: None,
            heads: 8,
            head_dim: 32,
            double_blocks: 2,
            single_blocks: 4,
            text: TextConfig::default(),
            max_length: 64,
            dropout: 0.1,
            shift: 2.5,
            reference_noise: 0.1,
            drawn: Vec::new(),
            drawn_share: 0.5,
            layout: 0.2,
            overlap: 1.0,
            precision: Precision::Bf16,
            stages: vec![Stage {
                steps: 0,
                min_objects: 1,
                max_objects: 3,
                edits: 0.4,
                touching: touching(),
                moves: 0.0,
                several_places: 0.0,
            }],
            evaluation: Evaluation::default(),
        }
    }
}

impl Default for TextConfig {
    fn default() -> Self {
        Self { vocabulary: 512, hidden: 128, layers: 3, heads: 4 }
    }
}

impl Default for Evaluation {
    fn default() -> Self {
        Self { prompts: 64, steps: 16, guidance: 3.0 }
    }
}

impl DiffuserConfig {
    /// The stage that a step belongs to.
    pub fn stage(&self, step: u64) -> &Stage {
        let mut end = 0;
        let (last, others) = match self.stages.split_last() {
            Some(split) => split,
            None => unreachable!("the config was checked to have a stage"),
        };
        others
            .iter()
            .find(|stage| {
                end += stage.steps;
                step < end
            })
            .unwrap_or(last)
    }

    /// Whether all of it makes sense.
    pub fn check(&self) -> Result<()> {
        let TextConfig { hidden, layers, heads, .. } = self.text;
        if [self.heads, self.head_dim, hidden, layers, heads].iter().any(|size| !(1..=4096).contains(size)) {
            crate::usage!("[diffuser] heads, head_dim, text.hidden, text.layers and text.heads are 1 to 4096");
        }
        // Rotary positions turn pairs of a head's numbers: those of the transformer along each of four axes.
        if !self.head_dim.is_multiple_of(8) || !hidden.is_multiple_of(2 * heads) {
            crate::usage!("[diffuser] head_dim is a multiple of 8, and text.hidden one of twice text.heads");
        }
        if !(1..=1000).contains(&self.evaluation.steps) {
            crate::usage!("[diffuser] evaluation.steps is 1 to 1000, not {}", self.evaluation.steps);
        }
        if self.stages.is_empty() {
            crate::usage!("[diffuser] has no stages");
        }
        for s in &self.stages {
            let shares = [s.edits, s.touching, s.moves, s.several_places];
            if s.min_objects == 0 || s.min_objects > s.max_objects || shares.iter().any(|s| !(0.0..=1.0).contains(s)) {
                crate::usage!(
                    "[diffuser] stage {s:?}: objects are from 1 on and in order, edits, touching, moves and several_places are shares"
                );
            }
        }
        if self.adapter.is_some() && self.init.is_none() {
            crate::usage!("[diffuser] adapter is for the model of init, which is missing");
        }
        if !(0.0..=1.0).contains(&self.dropout) || self.shift <= 0.0 || self.layout < 0.0 {
            crate::usage!("[diffuser] dropout is a share, shift is positive and layout is not negative");
        }
        if !self.overlap.is_finite() || self.overlap <= 0.0 {
            crate::usage!("[diffuser] overlap is positive, not {}", self.overlap);
        }
        if !(0.0..=1.0).contains(&self.drawn_share) {
            crate::usage!("[diffuser] drawn_share is a share, not {}", self.drawn_share);
        }
        Ok(())
    }
}
