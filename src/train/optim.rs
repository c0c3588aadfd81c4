//! The optimiser: Muon for hidden matrices, AdamW for all else, with global norm clipping, a guard against spikes and
//! one against numbers that are not finite.
//!
//! On the CPU each rule is one pass over its slices, in fixed chunks: the result does not depend on the number of
//! threads. Other devices use candle's operations.

use super::{
    muon,
    schedule::Schedule,
    slices::{CHUNK, edit, read},
};
use anyhow::{Context, Result, bail};
use candle_core::{DType, Device, Tensor, Var, backprop::GradStore};
use rayon::prelude::*;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// Gradients by the names of their variables.
pub type Gradients = BTreeMap<String, Tensor>;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rule {
    /// For matrices whose input and output are both hidden; kernels of more dimensions count as `(out, rest)`.
    Muon,
    AdamW,
}

/// How one variable is trained.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Group {
    pub rule: Rule,
    /// Factor on the learning rate.
    pub lr: f64,
    /// Factor on the weight decay.
    pub decay: f64,
}

/// Muon for matrices; AdamW for vectors (without weight decay), embeddings, the last layer, adapters and kernels.
pub fn default_group(name: &str, shape: &[usize]) -> Group {
    let outer = ["embed", "lm_head", "proj_out", "lora_"].iter().any(|part| name.contains(part));
    match shape.len() {
        0 | 1 => Group { rule: Rule::AdamW, lr: 1.0, decay: 0.0 },
        2 if !outer => Group { rule: Rule::Muon, lr: 1.0, decay: 1.0 },
        _ => Group { rule: Rule::AdamW, lr: 1.0, decay: 1.0 },
    }
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct OptimConfig {
    /// Use Muon where a group asks for it; else AdamW for everything.
    pub muon: bool,
    pub lr: f64,
    /// Muon's learning rate, where it should differ.
    pub muon_lr: Option<f64>,
    pub momentum: f64,
    pub betas: (f64, f64),
    pub eps: f64,
    pub weight_decay: f64,
    /// The gradient's global norm is clipped to this; 0 switches it off.
    pub clip: f64,
    /// A step whose norm is above this multiple of the running mean is skipped; 0 switches it off.
    pub spike: f64,
    /// Training stops after this many steps in a row that were not finite.
    pub max_bad_steps: u64,
    pub schedule: Schedule,
}

impl Default for OptimConfig {
    fn default() -> Self {
        Self {
            muon: true,
            lr: 1e-3,
            muon_lr: None,
            momentum: 0.95,
            betas: (0.9, 0.95),
            eps: 1e-8,
            weight_decay: 0.01,
            clip: 1.0,
            spike: 10.0,
            max_bad_steps: 20,
            schedule: Schedule::default(),
        }
    }
}

/// Weight of a new norm in the running mean, and the updates before the mean is trusted.
const NORM_RATE: f64 = 0.02;
const NORM_WARMUP: u64 = 50;

/// What the optimiser carries from step to step beside its moments.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct OptimState {
    /// Updates made.
    pub updates: u64,
    pub mean_norm: f64,
    /// Steps skipped for a spike, and for numbers that are not finite.
    pub spikes: u64,
    pub bad: u64,
    pub bad_in_a_row: u64,
}

struct Param {
    name: String,
    var: Var,
    group: Group,
    /// AdamW's first and second moment, or Muon's momentum.
    moments: Vec<Tensor>,
}

/// Whether a step changed the variables.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    Updated,
    Spike,
    NotFinite,
}

pub struct Optimizer {
    config: OptimConfig,
    params: Vec<Param>,
    pub state: OptimState,
}

impl Optimizer {
    pub fn new(
        config: &OptimConfig,
        vars: &BTreeMap<String, Var>,
        group: impl Fn(&str, &[usize]) -> Group,
    ) -> Result<Self> {
        let mut params = Vec::with_capacity(vars.len());
        for (name, var) in vars {
            if var.dtype() != DType::F32 || !var.is_contiguous() {
                bail!("{name} is {:?}; variables are trained in contiguous f32", var.dtype());
            }
            let mut group = group(name, var.dims());
            if !config.muon || var.rank() < 2 {
                group.rule = Rule::AdamW;
            }
            let count = if group.rule == Rule::Muon { 1 } else { 2 };
            let moments = (0..count).map(|_| var.as_tensor().detach().zeros_like()).collect::<Result<_, _>>()?;
            params.push(Param { name: name.clone(), var: var.clone(), group, moments });
        }
        Ok(Self { config: config.clone(), params, state: OptimState::default() })
    }

    /// The moments by the names of their variables.
    pub fn moments(&self) -> impl Iterator<Item = (String, &Tensor)> {
        self.params.iter().flat_map(|p| p.moments.iter().enumerate().map(|(i, m)| (format!("{}.{i}", p.name), m)))
    }

    /// Takes moments back from a checkpoint.
    pub fn restore(&mut self, state: OptimState, mut take: impl FnMut(&str) -> Result<Tensor>) -> Result<()> {
        for param in &mut self.params {
            for (i, moment) in param.moments.iter_mut().enumerate() {
                *moment = take(&format!("{}.{i}", param.name))?.to_device(moment.device())?;
            }
        }
        self.state = state;
        Ok(())
    }

    /// Numbers trained by Muon, and in all moments.
    pub fn sizes(&self) -> (usize, usize) {
        let muon = self.params.iter().filter(|p| p.group.rule == Rule::Muon);
        (muon.map(|p| p.var.elem_count()).sum(), self.moments().map(|(_, m)| m.elem_count()).sum())
    }

    /// One update with the learning rate times `factor`. Returns the gradient's norm before clipping.
    pub fn step(&mut self, gradients: &Gradients, factor: f64) -> Result<(f64, Outcome)> {
        let norm = norm(gradients)?;
        let state = &mut self.state;
        if !norm.is_finite() {
            (state.bad, state.bad_in_a_row) = (state.bad + 1, state.bad_in_a_row + 1);
            if state.bad_in_a_row > self.config.max_bad_steps {
                bail!("stopped: the gradient was not finite in {} steps in a row", state.bad_in_a_row);
            }
            return Ok((norm, Outcome::NotFinite));
        }
        state.bad_in_a_row = 0;
        let limit = self.config.spike * state.mean_norm;
        let spike = self.config.spike > 0.0 && state.updates >= NORM_WARMUP && norm > limit;
        // A spike counts as much as the limit: norms that stay high raise the mean until they are accepted.
        let counted = if spike { limit } else { norm };
        let rate = NORM_RATE.max(1.0 / (state.updates + 1) as f64);
        state.mean_norm += rate * (counted - state.mean_norm);
        if spike {
            state.spikes += 1;
            return Ok((norm, Outcome::Spike));
        }
        state.updates += 1;
        let clip = if self.config.clip > 0.0 { (self.config.clip / (norm + 1e-6)).min(1.0) } else { 1.0 };
        let (config, updates) = (&self.config, state.updates);
        // Side by side, one matrix a task: the Newton-Schulz iterations of small matrices do not fill the threads.
        self.params.par_iter_mut().with_max_len(1).try_for_each(|param| {
            let gradient =
                gradients.get(&param.name).with_context(|| format!("the loss gives {} no gradient", param.name))?;
            param.update(&gradient.contiguous()?, clip, factor, config, updates).context(param.name.clone())
        })?;
        Ok((norm, Outcome::Updated))
    }
}

impl Param {
    fn update(&mut self, gradient: &Tensor, clip: f64, factor: f64, config: &OptimConfig, updates: u64) -> Result<()> {
        let base = match self.group.rule {
            Rule::Muon => config.muon_lr.unwrap_or(config.lr),
            Rule::AdamW => config.lr,
        };
        let lr = base * factor * self.group.lr;
        let decay = lr * config.weight_decay * self.group.decay;
        match self.group.rule {
            Rule::Muon => self.muon(gradient, clip, lr, decay, config.momentum),
            Rule::AdamW => self.adamw(gradient, &AdamW::new(config, clip, lr, decay, updates)),
        }
    }

    fn muon(&mut self, gradient: &Tensor, clip: f64, lr: f64, decay: f64, mu: f64) -> Result<()> {
        let rows = self.var.dim(0)?;
        let cols = self.var.elem_count() / rows.max(1);
        let rate = lr * muon::scale(rows, cols);
        let buffer = &mut self.moments[0];
        if matches!(self.var.device(), Device::Cpu) {
            let update =
                read(gradient, |g| edit(buffer, |buffer| Ok(muon::momentum(buffer, g, clip as f32, mu as f32))))??;
            let update = muon::orthogonal(update, rows, cols);
            edit(&self.var, |weight| Ok(muon::apply(weight, &update, rate as f32, decay as f32)))?;
        } else {
            let gradient = (gradient * clip)?;
            *buffer = ((&*buffer * mu)? + (&gradient * (1.0 - mu))?)?;
            let update = ((&gradient * (1.0 - mu))? + (&*buffer * mu)?)?;
            let update = muon::orthogonal_tensor(&update.reshape((rows, cols))?)?.reshape(self.var.dims())?;
            self.var.set(&((self.var.as_tensor().detach() * (1.0 - decay))? - (update * rate)?)?)?;
        }
        Ok(())
    }

    fn adamw(&mut self, gradient: &Tensor, rule: &AdamW) -> Result<()> {
        let [first, second] = self.moments.as_mut_slice() else { bail!("AdamW keeps two moments") };
        if matches!(self.var.device(), Device::Cpu) {
            read(gradient, |g| edit(&self.var, |w| edit(first, |m| edit(second, |v| Ok(rule.slices(w, m, v, g))))))??;
        } else {
            let gradient = (gradient * f64::from(rule.clip))?;
            let (b1, b2) = (f64::from(rule.beta1), f64::from(rule.beta2));
            *first = ((&*first * b1)? + (&gradient * (1.0 - b1))?)?;
            *second = ((&*second * b2)? + (gradient.sqr()? * (1.0 - b2))?)?;
            let scale = ((second.sqrt()? * f64::from(rule.second))? + f64::from(rule.eps))?;
            let update = ((&*first / scale)? * f64::from(rule.rate))?;
            self.var.set(&((self.var.as_tensor().detach() * (1.0 - f64::from(rule.decay)))? - update)?)?;
        }
        Ok(())
    }
}

/// AdamW (arXiv 1711.05101) with this step's numbers: `w <- (1 - decay) w - rate m / (sqrt(v) second + eps)`.
struct AdamW {
    clip: f32,
    beta1: f32,
    beta2: f32,
    /// The learning rate over the first moment's bias correction.
    rate: f32,
    /// `1 / sqrt(1 - beta2^t)`.
    second: f32,
    eps: f32,
    decay: f32,
}

impl AdamW {
    fn new(config: &OptimConfig, clip: f64, lr: f64, decay: f64, updates: u64) -> Self {
        let corrections = |beta: f64| 1.0 - beta.powf(updates as f64);
        Self {
            clip: clip as f32,
            beta1: config.betas.0 as f32,
            beta2: config.betas.1 as f32,
            rate: (lr / corrections(config.betas.0)) as f32,
            second: (1.0 / corrections(config.betas.1).sqrt()) as f32,
            eps: config.eps as f32,
            decay: decay as f32,
        }
    }

    fn slices(&self, weight: &mut [f32], first: &mut [f32], second: &mut [f32], gradient: &[f32]) {
        let chunks = (
            weight.par_chunks_mut(CHUNK),
            first.par_chunks_mut(CHUNK),
            second.par_chunks_mut(CHUNK),
            gradient.par_chunks(CHUNK),
        );
        chunks.into_par_iter().for_each(|(weight, first, second, gradient)| {
            for (((w, m), v), g) in weight.iter_mut().zip(first).zip(second).zip(gradient) {
                let g = g * self.clip;
                *m += (1.0 - self.beta1) * (g - *m);
                *v = self.beta2 * *v + (1.0 - self.beta2) * g * g;
                *w = *w * (1.0 - self.decay) - self.rate * *m / (v.sqrt() * self.second + self.eps);
            }
        });
    }
}

/// The norm of all gradients together, summed in f64 chunk by chunk in a fixed order.
pub fn norm(gradients: &Gradients) -> Result<f64> {
    let mut total = 0.0;
    for gradient in gradients.values() {
        total += if matches!(gradient.device(), Device::Cpu) {
            read(&gradient.contiguous()?, |g| {
                let squares = |chunk: &[f32]| chunk.iter().map(|v| f64::from(*v) * f64::from(*v)).sum::<f64>();
                g.par_chunks(CHUNK).map(squares).collect::<Vec<_>>().iter().sum::<f64>()
            })?
        } else {
            f64::from(gradient.sqr()?.sum_all()?.to_scalar::<f32>()?)
        };
    }
    Ok(total.sqrt())
}

/// Adds the gradients of one micro-batch to those of the batch.
pub fn accumulate(total: &mut Gradients, vars: &BTreeMap<String, Var>, mut store: GradStore) -> Result<()> {
    for (name, var) in vars {
        if let Some(gradient) = store.remove(var) {
            let gradient = match total.remove(name) {
                Some(sum) => (sum + gradient)?,
                None => gradient,
            };
            total.insert(name.clone(), gradient);
        }
    }
    Ok(())
}
