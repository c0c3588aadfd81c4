//! The optimiser: Muon for hidden matrices, AdamW for all else, with global norm clipping (apart for each role, where
//! several are trained), a guard against spikes and one against numbers that are not finite.
//!
//! On the CPU each rule is one pass over its slices, in fixed chunks: the result does not depend on the number of
//! threads. Other devices use candle's operations.

use super::{
    adamw::AdamW,
    muon::{self, Composed, Muon},
    schedule::Schedule,
    slices::CHUNK,
};
use crate::{models::built_in, tensor::cpu::floats, usage};
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

/// The section `optim`: AdamW (Loshchilov and Hutter, arXiv 1711.05101), and Muon ([`super::muon`]) for hidden matrices.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct OptimConfig {
    /// Use Muon where a group asks for it; else AdamW for everything.
    pub muon: bool,
    /// The learning rate at its height.
    pub lr: f64,
    /// Muon's learning rate, where it should differ.
    pub muon_lr: Option<f64>,
    /// Muon's momentum.
    pub momentum: f64,
    /// AdamW's decays of the moments' moving averages.
    pub betas: (f64, f64),
    /// What AdamW adds to the root of the second moment.
    pub eps: f64,
    /// Decoupled, of both rules: a step takes this part of the learning rate off a weight.
    pub weight_decay: f64,
    /// The gradient's global norm, or that of each role, is clipped to this; 0 switches it off.
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

impl OptimConfig {
    /// Whether all of it makes sense.
    fn check(&self) -> Result<()> {
        let rates = [("lr", self.lr), ("muon_lr", self.muon_lr.unwrap_or(0.0)), ("eps", self.eps)];
        let limits = [("clip", self.clip), ("spike", self.spike), ("weight_decay", self.weight_decay)];
        let mut limits = rates.iter().chain(&limits);
        if let Some((name, value)) = limits.find(|(_, value)| !(value.is_finite() && *value >= 0.0)) {
            usage!("optim.{name} is 0 or more, not {value}");
        }
        let decays = [("momentum", self.momentum), ("betas", self.betas.0), ("betas", self.betas.1)];
        if let Some((name, value)) = decays.iter().find(|(_, value)| !(0.0..1.0).contains(value)) {
            usage!("optim.{name} is in [0, 1), not {value}");
        }
        let Schedule { decay, last, .. } = self.schedule;
        if !(0.0..=1.0).contains(&decay) || !(0.0..=1.0).contains(&last) {
            usage!("optim.schedule: decay and last are parts of the whole, from 0 to 1");
        }
        Ok(())
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
    /// The running mean of the gradient's norm: of each role's, where the joint training names them, as the one's may be a
    /// hundred times the other's.
    #[serde(default)]
    pub mean_norms: BTreeMap<String, f64>,
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
        config.check()?;
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
        let norm = norm(gradients.values())?;
        let state = &mut self.state;
        if !norm.is_finite() {
            (state.bad, state.bad_in_a_row) = (state.bad + 1, state.bad_in_a_row + 1);
            if state.bad_in_a_row >= self.config.max_bad_steps {
                bail!("stopped: the gradient was not finite in {} steps in a row", state.bad_in_a_row);
            }
            return Ok((norm, Outcome::NotFinite));
        }
        state.bad_in_a_row = 0;
        let mut norms = norms_by_role(gradients)?;
        if norms.is_empty() {
            norms.insert("", norm);
        }
        let (rate, mut spike) = (NORM_RATE.max(1.0 / (state.updates + 1) as f64), false);
        for (role, norm) in &norms {
            let mean = state.mean_norms.entry((*role).to_owned()).or_insert(*norm);
            let limit = self.config.spike * *mean;
            let above = self.config.spike > 0.0 && state.updates >= NORM_WARMUP && *norm > limit;
            // A spike counts as much as the limit: norms that stay high raise the mean until they are accepted.
            let counted = if above { limit } else { *norm };
            *mean += rate * (counted - *mean);
            spike |= above;
        }
        if spike {
            state.spikes += 1;
            return Ok((norm, Outcome::Spike));
        }
        state.updates += 1;
        let (config, updates) = (&self.config, state.updates);
        let clip = |name: &str| {
            let norm = role(name).and_then(|role| norms.get(role)).unwrap_or(&norm);
            if config.clip > 0.0 { (config.clip / (norm + 1e-6)).min(1.0) } else { 1.0 }
        };
        let update = |param: &mut Param| {
            let gradient =
                gradients.get(&param.name).with_context(|| format!("the loss gives {} no gradient", param.name))?;
            let clip = clip(&param.name);
            param.update(&gradient.contiguous()?, clip, factor, config, updates).context(param.name.clone())
        };
        if self.params.iter().all(|param| param.var.device().is_cpu()) {
            // Side by side, one matrix a task: the Newton-Schulz iterations of small matrices do not fill the threads.
            self.params.par_iter_mut().with_max_len(1).try_for_each(update)?;
        } else {
            let muon = |param: &&mut Param| param.group.rule == Rule::Muon;
            let (muon, mut rest): (Vec<_>, Vec<_>) = self.params.iter_mut().partition(muon);
            rest.iter_mut().try_for_each(|param| update(param))?;
            update_composed(muon, gradients, clip, factor, config)?;
        }
        Ok((norm, Outcome::Updated))
    }
}

impl Param {
    /// The learning rate and the weight decay.
    fn rates(&self, factor: f64, config: &OptimConfig) -> (f64, f64) {
        let base = match self.group.rule {
            Rule::Muon => config.muon_lr.unwrap_or(config.lr),
            Rule::AdamW => config.lr,
        };
        let lr = base * factor * self.group.lr;
        (lr, lr * config.weight_decay * self.group.decay)
    }

    fn update(&mut self, gradient: &Tensor, clip: f64, factor: f64, config: &OptimConfig, updates: u64) -> Result<()> {
        let (lr, decay) = self.rates(factor, config);
        match self.group.rule {
            Rule::Muon => {
                Muon { clip, lr, decay, momentum: config.momentum }.update(&self.var, &mut self.moments[0], gradient)?
            }
            Rule::AdamW => {
                AdamW::new(config.betas, config.eps, clip, lr, decay, updates).update(
                    &self.var,
                    &mut self.moments,
                    gradient,
                )?;
            }
        }
        Ok(())
    }
}

/// Muon's updates on a device other than the CPU.
fn update_composed(
    mut params: Vec<&mut Param>,
    gradients: &Gradients,
    clip: impl Fn(&str) -> f64,
    factor: f64,
    config: &OptimConfig,
) -> Result<()> {
    let gradient = |name: &str| gradients.get(name).with_context(|| format!("the loss gives {name} no gradient"));
    let found = params.iter().map(|param| Ok(gradient(&param.name)?.contiguous()?)).collect::<Result<Vec<_>>>()?;
    let rule = |param: &mut Param| -> Muon {
        let (lr, decay) = param.rates(factor, config);
        Muon { clip: clip(&param.name), lr, decay, momentum: config.momentum }
    };
    let mut composed: Vec<Composed> = params
        .iter_mut()
        .map(|param| Composed { muon: rule(param), var: &param.var, buffer: &mut param.moments[0] })
        .collect();
    Ok(muon::composed(&mut composed, &found)?)
}

/// The role whose variable this is, where the joint training names it.
fn role(name: &str) -> Option<&str> {
    let (first, _) = name.split_once('.')?;
    [built_in::ACTOR, built_in::EDITOR].contains(&first).then_some(first)
}

/// The norms of the gradients of each role. They are of different sizes, and in one norm for all the smaller would be
/// scaled by what the larger happens to be.
pub fn norms_by_role(gradients: &Gradients) -> Result<BTreeMap<&str, f64>> {
    let mut of: BTreeMap<&str, Vec<&Tensor>> = BTreeMap::new();
    for (name, gradient) in gradients {
        if let Some(role) = role(name) {
            of.entry(role).or_default().push(gradient);
        }
    }
    of.into_iter().map(|(role, gradients)| Ok((role, norm(gradients)?))).collect()
}

/// The norm of all gradients together: on the CPU summed in f64 chunk by chunk in a fixed order, elsewhere in f32 on the
/// device, which is waited for once.
pub fn norm<'a>(gradients: impl IntoIterator<Item = &'a Tensor>) -> Result<f64> {
    let (mut total, mut elsewhere) = (0.0, Vec::new());
    for gradient in gradients {
        if matches!(gradient.device(), Device::Cpu) {
            let gradient = gradient.contiguous()?;
            let squares = |chunk: &[f32]| chunk.iter().map(|v| f64::from(*v) * f64::from(*v)).sum::<f64>();
            total += floats(&gradient)?.par_chunks(CHUNK).map(squares).collect::<Vec<_>>().iter().sum::<f64>();
        } else {
            elsewhere.push(gradient.sqr()?.sum_all()?);
        }
    }
    if !elsewhere.is_empty() {
        total += f64::from(Tensor::stack(&elsewhere, 0)?.sum_all()?.to_scalar::<f32>()?);
    }
    Ok(total.sqrt())
}

/// The gradients of `vars` by their names, without the graph that candle leaves on some, which would keep activations.
pub fn named(vars: &BTreeMap<String, Var>, mut store: GradStore) -> Gradients {
    vars.iter().filter_map(|(name, var)| Some((name.clone(), store.remove(var)?.detach()))).collect()
}

/// Adds the gradients of one micro-batch to those of the batch.
pub fn add(total: &mut Gradients, part: Gradients) -> Result<()> {
    for (name, gradient) in part {
        let sum = match total.remove(&name) {
            Some(sum) => (sum + gradient)?,
            None => gradient,
        };
        total.insert(name, sum);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn plain() -> OptimConfig {
        OptimConfig { lr: 3e-2, weight_decay: 0.1, clip: 0.0, spike: 0.0, ..OptimConfig::default() }
    }

    fn one(values: &[f32], shape: &[usize]) -> BTreeMap<String, Var> {
        BTreeMap::from([("w".to_owned(), Var::from_slice(values, shape, &Device::Cpu).unwrap())])
    }

    fn gradient(values: &[f32], shape: &[usize]) -> Gradients {
        BTreeMap::from([("w".to_owned(), Tensor::from_slice(values, shape, &Device::Cpu).unwrap())])
    }

    fn everything(rule: Rule) -> impl Fn(&str, &[usize]) -> Group {
        move |_, _| Group { rule, lr: 1.0, decay: 1.0 }
    }

    fn values(vars: &BTreeMap<String, Var>) -> Vec<f32> {
        vars["w"].flatten_all().unwrap().to_vec1().unwrap()
    }

    #[test]
    fn the_rules_follow_pytorch() {
        #[derive(Deserialize)]
        struct Case {
            shape: Vec<usize>,
            start: Vec<f32>,
            gradients: Vec<Vec<f32>>,
            weights: Vec<Vec<f32>>,
        }
        let cases: BTreeMap<String, Case> =
            serde_json::from_str(include_str!("../../tests/fixtures/optim.json")).unwrap();
        assert_eq!(cases.len(), 3);
        for (name, case) in cases {
            let rule = if name == "adamw" { Rule::AdamW } else { Rule::Muon };
            let vars = one(&case.start, &case.shape);
            let mut optimizer = Optimizer::new(&plain(), &vars, everything(rule)).unwrap();
            for (step, (g, expected)) in case.gradients.iter().zip(&case.weights).enumerate() {
                optimizer.step(&gradient(g, &case.shape), 1.0).unwrap();
                for (got, expected) in values(&vars).iter().zip(expected) {
                    assert!((got - expected).abs() < 1e-5, "{name}, step {step}: {got} is not {expected}");
                }
            }
        }
    }

    #[test]
    fn kernels_of_more_dimensions_are_matrices_to_muon() {
        let g = crate::tensor::rng::Stream::new(0, "kernel", 0).normals(4 * 3 * 9);
        let (kernel, matrix) = (one(&[0.0; 108], &[4, 3, 3, 3]), one(&[0.0; 108], &[4, 27]));
        for (vars, shape) in [(&kernel, &[4, 3, 3, 3][..]), (&matrix, &[4, 27])] {
            let mut optimizer = Optimizer::new(&plain(), vars, everything(Rule::Muon)).unwrap();
            optimizer.step(&gradient(&g, shape), 1.0).unwrap();
        }
        assert_eq!(values(&kernel), values(&matrix));
    }

    #[test]
    fn threads_do_not_change_the_result() {
        let run = |threads: usize| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            pool.install(|| {
                let draw = |purpose: &str, n| crate::tensor::rng::Stream::new(0, purpose, 0).normals(n);
                let shapes = [("a", vec![300, 200]), ("b", vec![200, 300]), ("c", vec![50_000]), ("d", vec![64, 1000])];
                let tensor = |purpose: &str, shape: &[usize]| {
                    Tensor::from_vec(draw(purpose, shape.iter().product()), shape, &Device::Cpu).unwrap()
                };
                let vars: BTreeMap<_, _> = shapes
                    .iter()
                    .map(|(name, shape)| ((*name).to_owned(), Var::from_tensor(&tensor(name, shape)).unwrap()))
                    .collect();
                let config = OptimConfig { clip: 1.0, ..plain() };
                let mut optimizer = Optimizer::new(&config, &vars, default_group).unwrap();
                let mut norms = Vec::new();
                for step in 0..3 {
                    let gradients = shapes
                        .iter()
                        .map(|(name, shape)| ((*name).to_owned(), tensor(&format!("{name} gradient {step}"), shape)));
                    norms.push(optimizer.step(&gradients.collect(), 1.0).unwrap().0.to_bits());
                }
                let bits = |var: &Var| var.flatten_all().unwrap().to_vec1::<f32>().unwrap();
                (norms, vars.values().map(bits).collect::<Vec<_>>())
            })
        };
        let single = run(1);
        for threads in [2, 3] {
            assert!(run(threads) == single, "{threads} threads");
        }
    }

    #[test]
    fn the_global_norm_is_clipped() {
        // The first AdamW update has the size of the learning rate whatever the gradient; so look at the moment.
        let vars = one(&[0.0, 0.0], &[2]);
        let config = OptimConfig { clip: 1.0, ..plain() };
        let mut optimizer = Optimizer::new(&config, &vars, default_group).unwrap();
        let (norm, outcome) = optimizer.step(&gradient(&[30.0, 40.0], &[2]), 1.0).unwrap();
        assert_eq!((norm, outcome), (50.0, Outcome::Updated));
        let first = optimizer.moments().next().unwrap().1.to_vec1::<f32>().unwrap();
        assert!((first[0] - 0.06).abs() < 1e-6 && (first[1] - 0.08).abs() < 1e-6, "{first:?}");
    }

    #[test]
    fn each_role_is_clipped_by_its_own_norm() {
        let roles = [("actor.w", [30.0f32, 40.0]), ("editor.w", [0.3, 0.4])];
        let tensor = |numbers: &[f32; 2]| Tensor::new(numbers, &Device::Cpu).unwrap();
        let var = || Var::from_tensor(&tensor(&[0.0; 2])).unwrap();
        let vars: BTreeMap<String, Var> = roles.map(|(name, _)| (name.to_owned(), var())).into();
        let gradients: Gradients = roles.map(|(name, numbers)| (name.to_owned(), tensor(&numbers))).into();
        let config = OptimConfig { clip: 1.0, ..plain() };
        let mut optimizer = Optimizer::new(&config, &vars, default_group).unwrap();
        optimizer.step(&gradients, 1.0).unwrap();
        let norms: Vec<(&str, f64)> = norms_by_role(&gradients).unwrap().into_iter().collect();
        assert!(norms[0] == ("actor", 50.0) && norms[1].0 == "editor" && (norms[1].1 - 0.5).abs() < 1e-6);
        let first = |name: &str| {
            let (_, moment) = optimizer.moments().find(|(known, _)| known == name).unwrap();
            moment.to_vec1::<f32>().unwrap()[0]
        };
        assert!((first("actor.w.0") - 0.06).abs() < 1e-6 && (first("editor.w.0") - 0.03).abs() < 1e-6);
    }

    #[test]
    fn spikes_are_skipped_until_they_are_the_rule() {
        let vars = one(&[0.0], &[1]);
        let config = OptimConfig { spike: 5.0, ..plain() };
        let mut optimizer = Optimizer::new(&config, &vars, default_group).unwrap();
        for _ in 0..NORM_WARMUP {
            assert_eq!(optimizer.step(&gradient(&[1.0], &[1]), 1.0).unwrap().1, Outcome::Updated);
        }
        let before = values(&vars);
        assert_eq!(optimizer.step(&gradient(&[100.0], &[1]), 1.0).unwrap().1, Outcome::Spike);
        assert_eq!((values(&vars), optimizer.state.spikes), (before, 1));
        let outcomes: Vec<_> = (0..60).map(|_| optimizer.step(&gradient(&[100.0], &[1]), 1.0).unwrap().1).collect();
        assert_eq!(outcomes.last(), Some(&Outcome::Updated));
    }

    #[test]
    fn a_spike_of_the_smaller_role_is_one() {
        let tensor = |number: f32| Tensor::new(&[number], &Device::Cpu).unwrap();
        let of = |actor: f32, editor: f32| [("actor.w", actor), ("editor.w", editor)];
        let gradients =
            |actor, editor| -> Gradients { of(actor, editor).map(|(name, g)| (name.to_owned(), tensor(g))).into() };
        let vars: BTreeMap<String, Var> =
            of(0.0, 0.0).map(|(name, zero)| (name.to_owned(), Var::from_tensor(&tensor(zero)).unwrap())).into();
        let config = OptimConfig { spike: 5.0, ..plain() };
        let mut optimizer = Optimizer::new(&config, &vars, default_group).unwrap();
        for _ in 0..NORM_WARMUP {
            assert_eq!(optimizer.step(&gradients(1.0, 1e-3), 1.0).unwrap().1, Outcome::Updated);
        }
        assert_eq!(optimizer.step(&gradients(1.0, 1e-1), 1.0).unwrap().1, Outcome::Spike);
        assert_eq!(optimizer.step(&gradients(1.0, 2e-3), 1.0).unwrap().1, Outcome::Updated);
    }

    #[test]
    fn numbers_that_are_not_finite_change_nothing_and_end_the_run_if_they_stay() {
        let vars = one(&[1.0], &[1]);
        let config = OptimConfig { max_bad_steps: 3, ..plain() };
        let mut optimizer = Optimizer::new(&config, &vars, default_group).unwrap();
        for bad in [f32::NAN, f32::INFINITY] {
            assert_eq!(optimizer.step(&gradient(&[bad], &[1]), 1.0).unwrap().1, Outcome::NotFinite);
        }
        assert_eq!(values(&vars), [1.0]);
        let error = optimizer.step(&gradient(&[f32::NAN], &[1]), 1.0).unwrap_err().to_string();
        assert!(error.contains("3 steps in a row"), "{error}");
    }

    #[test]
    fn numbers_that_make_no_sense_are_refused() {
        let error = |config: OptimConfig| {
            let error = Optimizer::new(&config, &one(&[1.0], &[1]), default_group).err().unwrap();
            assert!(error.is::<crate::error::Usage>());
            error.to_string()
        };
        assert!(error(OptimConfig { lr: f64::NAN, ..plain() }).contains("optim.lr is 0 or more, not NaN"));
        assert!(error(OptimConfig { eps: -1.0, ..plain() }).contains("optim.eps"));
        assert!(error(OptimConfig { spike: f64::INFINITY, ..plain() }).contains("optim.spike"));
        assert!(error(OptimConfig { betas: (0.9, 1.0), ..plain() }).contains("optim.betas"));
        let schedule = Schedule { last: -0.1, ..Schedule::default() };
        assert!(error(OptimConfig { schedule, ..plain() }).contains("optim.schedule"));
    }

    #[test]
    fn groups_follow_names_and_shapes() {
        let rule = |name: &str, shape: &[usize]| default_group(name, shape).rule;
        assert_eq!(rule("transformer_blocks.0.attn.to_q.weight", &[8, 8]), Rule::Muon);
        for (name, shape) in [("embed_tokens.weight", &[9, 4][..]), ("proj_out.weight", &[4, 4]), ("norm.weight", &[4])]
        {
            assert_eq!(rule(name, shape), Rule::AdamW);
        }
        assert_eq!(default_group("norm.weight", &[4]).decay, 0.0);
    }
}
