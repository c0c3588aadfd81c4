//! Training: pretraining and Reflection-GRPO.
//!
//! An [`Objective`] says what is learned: its variables and its loss on a batch. [`run`] drives it: optimiser, moving
//! average, evaluation, samples, checkpoints, logs. A run is a folder and resumes exactly.

pub mod actor;
pub mod adamw;
pub mod ahead;
pub mod checkpoint;
pub mod diffuser_config;
pub mod drawn;
pub mod editor;
pub mod ema;
pub mod flow_steps;
pub mod frozen;
pub mod grpo;
pub mod grpo_config;
mod imperfect;
pub mod joint;
pub mod layout;
pub mod log;
mod means;
pub mod muon;
pub mod objective_diffuser;
pub mod objective_vae;
pub mod objective_vlm;
pub mod optim;
#[cfg(test)]
mod parity;
mod pixels;
pub mod pose;
pub mod pretrain;
pub mod replay;
pub mod request;
pub mod rollout;
pub mod run;
pub mod schedule;
mod slices;
pub mod train_config;
pub mod trained;
pub mod vlm_config;
mod vlm_measure;
pub mod vlm_tasks;

use anyhow::Result;
use candle_core::{DType, Tensor, Var};
use std::{
    collections::{BTreeMap, HashMap},
    ops::Range,
    path::Path,
};

pub use optim::{Group, Rule};

/// Named numbers of a step or an evaluation, by the names that they have in `metrics.jsonl` and TensorBoard.
pub type Metrics = Vec<(String, f64)>;

/// What one call of [`Objective::loss`] works on: a part of the batch of a step.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Batch {
    /// Counted from 0.
    pub step: u64,
    /// Which of the step's samples: `0..batch`, or a part of it when the batch is worked off in micro-batches.
    pub rows: Range<usize>,
    /// Samples in the whole batch.
    pub size: usize,
    /// The rows of all micro-batches of the update, `rows` among them.
    pub together: Range<usize>,
    /// Which of the step's updates, counted from 0.
    pub update: usize,
    /// Which piece of the loss, counted from 0.
    pub piece: usize,
}

impl Batch {
    /// The number of each sample in the endless sequence of training samples. Random draws keyed by it (and the seed)
    /// are the same for any split into micro-batches and after any interruption. (What rows are padded to may depend on
    /// the others of their micro-batch.)
    pub fn indices(&self) -> Range<u64> {
        let start = self.step * self.size as u64;
        start + self.rows.start as u64..start + self.rows.end as u64
    }
}

/// How a step is worked off.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Work {
    /// How often each sample is used, and into how many updates it is split each time.
    pub epochs: usize,
    pub minibatches: usize,
    /// Pieces that the loss is the sum of. Each goes backward before the next goes forward, so they share no memory.
    pub pieces: usize,
}

impl Default for Work {
    fn default() -> Self {
        Self { epochs: 1, minibatches: 1, pieces: 1 }
    }
}

/// The loss of a batch.
pub struct Step {
    /// A scalar, the mean over the batch's rows.
    pub loss: Tensor,
    /// What else to log; means over the rows too.
    pub metrics: Metrics,
}

/// Something to be learned.
///
/// All randomness is drawn from [`crate::tensor::rng::Stream`] keyed by the seed and the indices of the batch; an
/// objective that has no other state resumes exactly without doing anything for it.
pub trait Objective: Sync {
    /// The trained variables by their names in the saved model, in f32.
    fn vars(&self) -> BTreeMap<String, Var>;

    /// Bytes of the models that are used but not trained.
    fn frozen(&self) -> usize {
        0
    }

    /// How a step is worked off.
    fn work(&self) -> Work {
        Work::default()
    }

    /// Prepares what all updates on `batch` are computed from, such as rollouts of the policy as it is before them, and
    /// keeps it by [`Batch::rows`] until the next step. Micro-batches run in parallel. Returns what to log, means over the
    /// rows.
    fn collect(&self, batch: &Batch) -> Result<Metrics> {
        let _ = batch;
        Ok(Vec::new())
    }

    /// Is shown what the micro-batches of a step have collected together, before its first update. An error ends the run.
    fn accept(&self, collected: &Metrics) -> Result<()> {
        let _ = collected;
        Ok(())
    }

    /// Makes on the host what [`Objective::loss`] needs for `batch`, and keeps it until then. Where a device computes, this is
    /// done for the next step meanwhile; a loss that finds nothing made makes it itself.
    fn prepare(&self, batch: &Batch) -> Result<()> {
        let _ = batch;
        Ok(())
    }

    /// The mean loss of `batch`, or its piece. Micro-batches of one update run in parallel; together, and over all pieces,
    /// they must give every variable a gradient.
    fn loss(&self, batch: &Batch) -> Result<Step>;

    /// Is told the metrics of each step once it is done, for running statistics.
    fn observe(&mut self, metrics: &Metrics) -> Result<()> {
        let _ = metrics;
        Ok(())
    }

    /// Held-out metrics. The variables hold the moving average when it is called, as they do for `samples` and `save`.
    fn evaluate(&mut self, step: u64) -> Result<Metrics> {
        let _ = step;
        Ok(Vec::new())
    }

    /// Writes pictures (`*.png`) of fixed prompts into `folder`; they appear in TensorBoard under their names.
    fn samples(&mut self, step: u64, folder: &Path) -> Result<()> {
        let _ = (step, folder);
        Ok(())
    }

    /// Writes the model in the Hugging Face layout into the empty `folder`, tensors in `dtype`.
    fn save(&self, folder: &Path, dtype: DType) -> Result<()>;

    /// Which rule trains a variable; see [`optim::default_group`].
    fn group(&self, name: &str, shape: &[usize]) -> Group {
        optim::default_group(name, shape)
    }

    /// What a checkpoint must keep beside variables (running statistics).
    fn state(&self) -> Result<HashMap<String, Tensor>> {
        Ok(HashMap::new())
    }

    /// Takes back what [`Objective::state`] gave.
    fn restore(&mut self, state: HashMap<String, Tensor>) -> Result<()> {
        let _ = state;
        Ok(())
    }
}
