//! The section `[train]` of a config: how long a run is, what it works on at once, and what it writes when.

use candle_core::DType;
use serde::{Deserialize, Serialize};
use std::ops::Range;

/// A floating-point format, by its name in a config.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Format {
    F32,
    F16,
    Bf16,
}

impl Format {
    /// Candle's name of it.
    pub fn dtype(self) -> DType {
        match self {
            Self::F32 => DType::F32,
            Self::F16 => DType::F16,
            Self::Bf16 => DType::BF16,
        }
    }
}

/// The section `train`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct TrainConfig {
    /// Steps of the whole run.
    pub steps: u64,
    /// Samples of a step; of GRPO, groups.
    pub batch: usize,
    /// Samples worked on at once; 0 is the whole batch. Gradients are summed over the micro-batches.
    pub micro_batch: usize,
    /// Whether blocks are computed again for their gradients instead of kept: less memory for more time.
    pub recompute: bool,
    /// Whether an NVIDIA GPU multiplies f32 matrices by its tensor cores, which keep 10 of 23 bits of the factors (TF32).
    pub tf32: bool,
    /// Decay of the moving average of the weights in a step, which is what is evaluated and saved; 0 takes them as they are.
    pub ema: f64,
    /// Steps between log lines, evaluations, sample pictures and checkpoints; 0 switches one off but for the end. Where there
    /// are evaluations, what is trained is evaluated and saved as step 0, and is the first best.
    pub log_every: u64,
    pub evaluate_every: u64,
    pub samples_every: u64,
    pub checkpoint_every: u64,
    /// Checkpoints kept beside the best.
    pub keep: usize,
    /// The evaluation metric that says which checkpoint is the best.
    pub best: Option<String>,
    /// Whether less of it is better.
    pub best_is_lowest: bool,
    /// The run ends after this many evaluations without a new best; 0 lets it go on.
    pub patience: u64,
    /// What saved models are rounded to; checkpoints keep f32.
    pub precision: Format,
}

impl Default for TrainConfig {
    fn default() -> Self {
        Self {
            steps: 10_000,
            batch: 32,
            micro_batch: 0,
            recompute: false,
            tf32: false,
            ema: 0.999,
            log_every: 1,
            evaluate_every: 500,
            samples_every: 500,
            checkpoint_every: 500,
            keep: 2,
            best: None,
            best_is_lowest: false,
            patience: 0,
            precision: Format::F16,
        }
    }
}

impl TrainConfig {
    /// Samples that are worked on at once.
    pub fn micro_batch(&self) -> usize {
        match self.micro_batch {
            0 => self.batch,
            size => size.min(self.batch),
        }
    }

    /// The rows of each micro-batch of a step.
    pub fn micro_batches(&self) -> Vec<Range<usize>> {
        let (size, micro) = (self.batch, self.micro_batch());
        (0..size).step_by(micro.max(1)).map(|start| start..(start + micro).min(size)).collect()
    }
}
