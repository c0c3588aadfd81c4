//! The training loop: what happens in a step, and what a run's folder holds.
//!
//! ```text
//! RUN/config.toml      the resolved config
//!     built_on.json    the revisions of the models that it does not train
//!     metrics.jsonl    a line for each logged step and each evaluation
//!     events.out.*     the same for TensorBoard, with the sample pictures
//!     samples/STEP/    pictures of fixed prompts
//!     checkpoints/     the last few and the best
//!     model/           the moving average at the last checkpoint, in the Hugging Face layout
//!     best/            the same at the best evaluation, where the config names a metric for it
//! ```
//!
//! An interrupted run (Ctrl-C, or killed at any point) that is resumed ends bit for bit as an uninterrupted one.

use super::{
    Batch, Metrics, Objective, Work,
    checkpoint::{self, Checkpoint},
    ema::Ema,
    log::Log,
    means::Means,
    optim::{self, Gradients, OptimConfig, OptimState, Optimizer, Outcome},
    train_config::{Format, TrainConfig},
};
use crate::{io, tensor::recompute::Tape, usage};
use anyhow::{Context, Result, anyhow, bail};
use candle_core::{Tensor, Var};
use rayon::prelude::*;
use serde::{Deserialize, Serialize};
use std::{
    collections::{BTreeMap, HashMap},
    fs::{self, File},
    ops::Range,
    path::{Path, PathBuf},
    sync::atomic::{AtomicBool, Ordering},
    time::Instant,
};

/// The metric, TRL's, of the tokens that were read and written so far. An objective gives a step's mean over its rows.
pub const TOKENS: &str = "num_tokens";

/// Samples of a step at most.
const MOST: usize = 1 << 20;

/// What a run is about to do.
#[derive(Clone, Debug)]
pub struct Plan {
    pub tensors: usize,
    pub parameters: usize,
    /// Parameters trained by Muon; AdamW trains the others.
    pub muon: usize,
    /// Bytes of variables, gradients, moments and average, and of the frozen models beside them; activations come on top.
    pub memory: usize,
    /// Bytes of the frozen models alone.
    pub frozen: usize,
    pub done: u64,
    pub steps: u64,
    pub batch: usize,
    pub micro_batch: usize,
    /// Whether blocks are computed again for their gradients.
    pub recompute: bool,
}

/// What a run tells while it goes on.
pub enum Event<'a> {
    Plan(&'a Plan),
    /// A step was done; the metrics are those of this step.
    Step(u64, &'a Metrics),
    Evaluated(u64, &'a Metrics),
    /// A step changed nothing, for this reason and with this gradient norm.
    Skipped(u64, Outcome, f64),
    Saved(u64),
}

/// How a run ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    Done,
    /// Stopped on request after this many steps.
    Stopped(u64),
    /// Ended after this many steps, as it got no better any more.
    NoBetter(u64),
}

/// The outside world of a run.
pub struct Hooks<'a> {
    /// Set when the run should finish its step, save and return.
    pub stop: &'a AtomicBool,
    pub report: &'a mut dyn FnMut(Event),
}

/// The best evaluation so far.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
struct Best {
    step: u64,
    value: f64,
}

#[derive(Serialize, Deserialize)]
struct State {
    optim: OptimState,
    ema_updates: u64,
    best: Option<Best>,
    /// Tokens that were read and written so far, where an objective counts them.
    #[serde(default)]
    tokens: u64,
}

/// A run that can begin: what can be wrong with it is known, its folder is locked, and it stands where it was left.
pub struct Training<'a> {
    run: Run<'a>,
    folder: &'a Path,
    checkpoints: PathBuf,
    /// Whether there was no checkpoint.
    new: bool,
    _lock: File,
}

/// Opens the run folder `folder` for the training of `objective`, from its last checkpoint if it has one.
pub fn open<'a>(
    objective: &'a mut dyn Objective,
    config: &'a TrainConfig,
    optim: &'a OptimConfig,
    folder: &'a Path,
) -> Result<Training<'a>> {
    let mut run = Run::new(objective, config, optim)?;
    let checkpoints = folder.join("checkpoints");
    fs::create_dir_all(&checkpoints).with_context(|| format!("cannot create {}", checkpoints.display()))?;
    let _lock = io::lock(folder, "trains")?;
    let new = !run.resume(&checkpoints)?;
    if run.step > config.steps {
        usage!("train.steps is {}, and the run in {} has done {}", config.steps, folder.display(), run.step);
    }
    Ok(Training { run, folder, checkpoints, new, _lock })
}

impl Training<'_> {
    /// Trains to the end, or until it is told to stop.
    pub fn train(self, hooks: Hooks) -> Result<End> {
        let Self { mut run, folder, checkpoints, new, _lock } = self;
        let config = run.config;
        let resumed = run.step;
        let mut log = Log::open(folder, (!new).then_some(resumed))?;
        (hooks.report)(Event::Plan(&run.plan()));
        // What training starts from is what it has to better.
        if new && config.evaluate_every > 0 && !hooks.stop.load(Ordering::Relaxed) {
            let due = (true, config.samples_every > 0);
            let metrics = run.averaged(|run| run.look(due, folder, &mut log, hooks.report))?;
            if run.judge(metrics)? {
                run.export(folder, "best")?;
            }
            log.sync()?;
            run.save(folder, &checkpoints)?;
            (hooks.report)(Event::Saved(run.step));
        }
        while run.step < config.steps && !run.exhausted() && !hooks.stop.load(Ordering::Relaxed) {
            let start = Instant::now();
            let (mut metrics, norm, outcome) = run.advance()?;
            metrics.push(("step_time".into(), start.elapsed().as_secs_f64()));
            let due = |every: u64| run.step == config.steps || every > 0 && run.step.is_multiple_of(every);
            if due(config.log_every) {
                log.metrics(run.step, &metrics)?;
            }
            (hooks.report)(Event::Step(run.step, &metrics));
            if outcome != Outcome::Updated {
                (hooks.report)(Event::Skipped(run.step, outcome, norm));
            }
            let (due, save) = ((due(config.evaluate_every), due(config.samples_every)), due(config.checkpoint_every));
            let metrics = match due {
                (false, false) => None,
                // What fails here is done again from the last checkpoint.
                _ => run.averaged(|run| run.look(due, folder, &mut log, hooks.report))?,
            };
            let improved = match run.judge(metrics) {
                Ok(improved) => improved,
                Err(error) => {
                    // A wrong name in the config is no reason to lose what was learned.
                    log.sync()?;
                    run.save(folder, &checkpoints)?;
                    return Err(error);
                }
            };
            if improved {
                // Before the checkpoint that knows of it: what is killed in between finds the same best again.
                run.export(folder, "best")?;
            }
            if save || improved || run.exhausted() || hooks.stop.load(Ordering::Relaxed) {
                log.sync()?;
                run.save(folder, &checkpoints)?;
                (hooks.report)(Event::Saved(run.step));
            }
        }
        if resumed == run.step {
            // The run may have been killed after its last checkpoint, but before its model was written.
            run.export(folder, "model")?;
        }
        Ok(match run.step {
            step if step == config.steps => End::Done,
            step if run.exhausted() => End::NoBetter(step),
            step => End::Stopped(step),
        })
    }
}

/// What a rehearsal found.
#[derive(Clone, Debug)]
pub struct Rehearsal {
    pub plan: Plan,
    pub metrics: Metrics,
    /// Time of one batch forward and backward.
    pub seconds: f64,
}

/// Everything but training, from the last checkpoint of `folder` if it has one: the first update of the next step forward and
/// backward, and one evaluation.
pub fn rehearse(
    objective: &mut dyn Objective,
    config: &TrainConfig,
    optim: &OptimConfig,
    folder: &Path,
) -> Result<Rehearsal> {
    let mut run = Run::new(objective, config, optim)?;
    let checkpoints = folder.join("checkpoints");
    if checkpoints.is_dir() {
        run.resume(&checkpoints)?;
    }
    let start = Instant::now();
    let mut means = run.collect()?;
    let gradients = run.gradients(0, &run.updates()[0], &mut means)?;
    run.check(&gradients)?;
    let mut metrics = means.metrics();
    metrics.push(("grad_norm".into(), optim::norm(gradients.values())?));
    let seconds = start.elapsed().as_secs_f64();
    metrics.extend(run.averaged(|run| run.objective.evaluate(run.step))?);
    Ok(Rehearsal { plan: run.plan(), metrics, seconds })
}

struct Run<'a> {
    objective: &'a mut dyn Objective,
    config: &'a TrainConfig,
    vars: BTreeMap<String, Var>,
    optimizer: Optimizer,
    schedule: &'a super::schedule::Schedule,
    lr: f64,
    ema: Ema,
    best: Option<Best>,
    /// Steps done.
    step: u64,
    /// As in [`State`].
    tokens: u64,
}

impl<'a> Run<'a> {
    fn new(objective: &'a mut dyn Objective, config: &'a TrainConfig, optim: &'a OptimConfig) -> Result<Self> {
        if !(1..=MOST).contains(&config.batch) || config.steps == 0 {
            usage!("train.batch is 1 to {MOST}, and train.steps is positive");
        }
        if !(0.0..1.0).contains(&config.ema) {
            usage!("train.ema must be in [0, 1), not {}", config.ema);
        }
        if config.patience > 0 && config.best.is_none() {
            usage!("train.patience waits for a new best: say by train.best which metric that goes by");
        }
        if config.patience > 0 && config.evaluate_every == 0 {
            usage!("train.patience counts evaluations: say by train.evaluate_every how often there is one");
        }
        candle_core::cuda::set_gemm_reduced_precision_f32(config.tf32);
        let vars = objective.vars();
        if vars.is_empty() {
            bail!("the objective has nothing to train");
        }
        let optimizer = Optimizer::new(optim, &vars, |name, shape| objective.group(name, shape))?;
        let ema = Ema::new(&vars, config.ema)?;
        let (schedule, lr) = (&optim.schedule, optim.lr);
        Ok(Self { objective, config, vars, optimizer, schedule, lr, ema, best: None, step: 0, tokens: 0 })
    }

    /// Takes the last of the checkpoints, if there is one.
    fn resume(&mut self, checkpoints: &Path) -> Result<bool> {
        let Some(path) = checkpoint::last(checkpoints)? else { return Ok(false) };
        let context = || format!("cannot resume from {}", path.display());
        self.restore(Checkpoint::read(&path)?).with_context(context)?;
        Ok(true)
    }

    fn plan(&self) -> Plan {
        let parameters = self.vars.values().map(|v| v.elem_count()).sum();
        let (muon, moments) = self.optimizer.sizes();
        let frozen = self.objective.frozen();
        Plan {
            tensors: self.vars.len(),
            parameters,
            muon,
            memory: 4 * (3 * parameters + moments) + frozen,
            frozen,
            done: self.step,
            steps: self.config.steps,
            batch: self.config.batch,
            micro_batch: self.config.micro_batch(),
            recompute: self.config.recompute,
        }
    }

    /// Those of each update of a step: as even parts as whole micro-batches make.
    fn updates(&self) -> Vec<Vec<Range<usize>>> {
        let Work { epochs, minibatches, .. } = self.objective.work();
        let all = self.config.micro_batches();
        let parts = minibatches.min(all.len()).max(1);
        let part = |i: usize| all[i * all.len() / parts..(i + 1) * all.len() / parts].to_vec();
        (0..epochs.max(1)).flat_map(|_| (0..parts).map(part)).collect()
    }

    /// A batch of its own, as rollouts are collected.
    fn batch(&self, rows: &Range<usize>) -> Batch {
        let together = 0..self.config.batch;
        Batch { step: self.step, rows: rows.clone(), size: self.config.batch, together, update: 0, piece: 0 }
    }

    fn on_cpu(&self) -> bool {
        self.vars.values().all(|var| var.device().is_cpu())
    }

    /// The results of `work`, side by side on the CPU, one after the other elsewhere: there one alone fills the device.
    fn each<T: Sync, R: Send>(&self, items: &[T], work: impl Fn(&T) -> R + Sync + Send) -> Vec<R> {
        if self.on_cpu() { items.par_iter().map(work).collect() } else { items.iter().map(work).collect() }
    }

    /// Lets the objective prepare the step.
    fn collect(&self) -> Result<Means> {
        let objective: &dyn Objective = &*self.objective;
        let batches: Vec<Batch> = self.config.micro_batches().iter().map(|rows| self.batch(rows)).collect();
        let parts = self.each(&batches, |batch| objective.collect(batch));
        let mut means = Means::default();
        for (batch, metrics) in batches.iter().zip(parts) {
            metrics?.into_iter().for_each(|metric| means.add(metric, batch.rows.len() as f64));
        }
        objective.accept(&means.metrics())?;
        Ok(means)
    }

    /// The gradients of one update. Micro-batches run side by side, which keeps all cores busy where one operation alone
    /// would not; their gradients are added in order, so the result is the same on any number of threads.
    fn gradients(&self, update: usize, micro: &[Range<usize>], means: &mut Means) -> Result<Gradients> {
        let (objective, vars): (&dyn Objective, _) = (&*self.objective, &self.vars);
        let (pieces, size) = (objective.work().pieces.max(1), micro.iter().map(Range::len).sum::<usize>() as f64);
        let together = micro.first().map_or(0, |rows| rows.start)..micro.last().map_or(0, |rows| rows.end);
        let work = |rows: &Range<usize>| -> Result<(Metrics, Gradients)> {
            let weight = rows.len() as f64 / size;
            let (mut loss, mut more, mut total) = (0.0, Means::default(), Gradients::new());
            for piece in 0..pieces {
                let compute =
                    || objective.loss(&Batch { together: together.clone(), update, piece, ..self.batch(rows) });
                let (step, tape) = Tape::record(self.config.recompute, compute);
                let step = step?;
                loss += f64::from(step.loss.to_scalar::<f32>()?);
                step.metrics.into_iter().for_each(|metric| more.add(metric, 1.0));
                optim::add(&mut total, optim::named(vars, tape.backward(&(step.loss * weight)?)?))?;
            }
            let mut metrics = more.metrics();
            metrics.insert(0, ("loss".into(), loss));
            Ok((metrics, total))
        };
        let parts = self.each(micro, work);
        let mut total = Gradients::new();
        for (rows, part) in micro.iter().zip(parts) {
            let (metrics, gradients) = part?;
            metrics.into_iter().for_each(|metric| means.add(metric, rows.len() as f64));
            optim::add(&mut total, gradients)?;
        }
        Ok(total)
    }

    /// The gradients of the first update. While another device computes them, the host prepares the next step.
    fn gradients_and_next(&self, micro: &[Range<usize>], means: &mut Means) -> Result<Gradients> {
        if self.on_cpu() || self.step + 1 >= self.config.steps {
            return self.gradients(0, micro, means);
        }
        std::thread::scope(|scope| {
            let (objective, next): (&dyn Objective, _) = (&*self.objective, self.step + 1);
            let batches: Vec<Batch> =
                self.config.micro_batches().iter().map(|rows| Batch { step: next, ..self.batch(rows) }).collect();
            let prepare = move || batches.iter().try_for_each(|batch| objective.prepare(batch));
            let prepared = scope.spawn(prepare);
            let gradients = self.gradients(0, micro, means);
            prepared.join().map_err(|_| anyhow!("the next step could not be prepared"))??;
            gradients
        })
    }

    /// A variable without a gradient is a mistake in the objective or a break in the graph: say so before hours go by.
    fn check(&self, gradients: &Gradients) -> Result<()> {
        let missing: Vec<_> = self.vars.keys().filter(|name| !gradients.contains_key(*name)).collect();
        match missing.as_slice() {
            [] => Ok(()),
            [first, ..] => bail!("the loss gives {} variable(s) no gradient, the first is {first}", missing.len()),
        }
    }

    /// One step with all its updates. Returns the first norm and outcome that is no update, or the last.
    fn advance(&mut self) -> Result<(Metrics, f64, Outcome)> {
        let factor = self.schedule.factor(self.step, self.config.steps);
        let mut means = self.collect()?;
        let mut told = (0.0, Outcome::Updated);
        for (update, micro) in self.updates().iter().enumerate() {
            let gradients = match update {
                0 => self.gradients_and_next(micro, &mut means)?,
                _ => self.gradients(update, micro, &mut means)?,
            };
            self.check(&gradients)?;
            let (norm, outcome) = self.optimizer.step(&gradients, factor)?;
            if outcome == Outcome::Updated {
                self.ema.update(&self.vars)?;
            }
            means.add(("grad_norm".into(), norm), 1.0);
            for (role, norm) in optim::norms_by_role(&gradients)? {
                means.add((format!("{role}/grad_norm"), norm), 1.0);
            }
            if told.1 == Outcome::Updated {
                told = (norm, outcome);
            }
        }
        self.step += 1;
        let mut metrics = means.metrics();
        self.objective.observe(&metrics)?;
        if let Some((_, tokens)) = metrics.iter_mut().find(|(name, _)| name == TOKENS) {
            self.tokens += (*tokens * self.config.batch as f64).round() as u64;
            *tokens = self.tokens as f64;
        }
        let OptimState { spikes, bad, .. } = self.optimizer.state;
        metrics.extend([
            ("learning_rate".into(), self.lr * factor),
            ("spikes".into(), spikes as f64),
            ("skipped".into(), (spikes + bad) as f64),
        ]);
        Ok((metrics, told.0, told.1))
    }

    /// Does `work` with the moving average in place of the variables.
    fn averaged<T>(&mut self, work: impl FnOnce(&mut Self) -> Result<T>) -> Result<T> {
        self.ema.swap(&self.vars)?;
        let done = work(self);
        self.ema.swap(&self.vars)?;
        done
    }

    /// Has sample pictures made and evaluates, as far as they are due; what was measured.
    fn look(
        &mut self,
        (evaluate, samples): (bool, bool),
        folder: &Path,
        log: &mut Log,
        report: &mut dyn FnMut(Event),
    ) -> Result<Option<Metrics>> {
        if samples {
            let folder = folder.join("samples").join(format!("{:08}", self.step));
            fs::create_dir_all(&folder)?;
            self.objective.samples(self.step, &folder)?;
            log.pictures(self.step, &folder)?;
        }
        if !evaluate {
            return Ok(None);
        }
        let metrics = self.objective.evaluate(self.step)?;
        log.metrics(self.step, &metrics)?;
        report(Event::Evaluated(self.step, &metrics));
        Ok(Some(metrics))
    }

    /// Whether an evaluation, if there was one, is the best so far.
    fn judge(&mut self, metrics: Option<Metrics>) -> Result<bool> {
        let (Some(name), Some(metrics)) = (&self.config.best, metrics) else { return Ok(false) };
        let Some((_, value)) = metrics.iter().find(|(known, _)| known == name) else {
            let known: Vec<_> = metrics.iter().map(|(name, _)| name.as_str()).collect();
            usage!("train.best = {name:?} is no metric of the evaluation; it has {}", known.join(", "));
        };
        let sign = if self.config.best_is_lowest { -1.0 } else { 1.0 };
        let better = value.is_finite() && self.best.is_none_or(|best| sign * value > sign * best.value);
        if better {
            self.best = Some(Best { step: self.step, value: *value });
        }
        Ok(better)
    }

    fn save(&mut self, folder: &Path, checkpoints: &Path) -> Result<()> {
        let mut tensors = BTreeMap::new();
        let mut add =
            |prefix: &str, name: &str, tensor: &Tensor| tensors.insert(format!("{prefix}/{name}"), tensor.clone());
        for (name, var) in &self.vars {
            add("vars", name, &var.as_tensor().detach());
        }
        for (name, average) in &self.ema.average {
            add("ema", name, average);
        }
        for (name, moment) in self.optimizer.moments() {
            add("optim", &name, moment);
        }
        for (name, tensor) in self.objective.state()? {
            add("objective", &name, &tensor);
        }
        let state = State {
            optim: self.optimizer.state.clone(),
            ema_updates: self.ema.updates,
            best: self.best,
            tokens: self.tokens,
        };
        Checkpoint { step: self.step, state: serde_json::to_value(state)?, tensors }.write(checkpoints)?;
        checkpoint::prune(checkpoints, self.config.keep, self.best.map(|best| best.step))?;
        self.export(folder, "model")
    }

    /// Whether the run has waited for a new best long enough.
    fn exhausted(&self) -> bool {
        let patience = self.config.patience * self.config.evaluate_every;
        patience > 0 && self.best.is_some_and(|best| self.step >= best.step + patience)
    }

    /// Writes the moving average as a model of this name.
    fn export(&mut self, folder: &Path, name: &str) -> Result<()> {
        self.averaged(|run| export(run.objective, folder, name, run.config.precision))
    }

    fn restore(&mut self, mut checkpoint: Checkpoint) -> Result<()> {
        let state: State =
            serde_json::from_value(checkpoint.state.take()).context("its state is of another version")?;
        for (name, var) in &self.vars {
            let device = var.device();
            var.set(&checkpoint.take(&format!("vars/{name}"), var.dims())?.to_device(device)?)?;
            let average = checkpoint.take(&format!("ema/{name}"), var.dims())?.to_device(device)?;
            self.ema.average.insert(name.clone(), average);
        }
        self.ema.updates = state.ema_updates;
        let vars = &self.vars;
        self.optimizer.restore(state.optim, |name| {
            let var = name.rsplit_once('.').and_then(|(var, _)| vars.get(var));
            checkpoint.take(&format!("optim/{name}"), var.map(|v| v.dims()).unwrap_or_default())
        })?;
        (self.best, self.tokens) = (state.best, state.tokens);
        self.step = checkpoint.step;
        let mut rest = HashMap::new();
        for (name, tensor) in checkpoint.tensors {
            match name.strip_prefix("objective/") {
                Some(name) => rest.insert(name.to_owned(), tensor),
                None => bail!("it has {name}, which the model does not have"),
            };
        }
        self.objective.restore(rest)
    }
}

/// Replaces `folder/name` by the objective's current model.
fn export(objective: &dyn Objective, folder: &Path, name: &str, precision: Format) -> Result<()> {
    let (new, old, model): (PathBuf, PathBuf, PathBuf) =
        (folder.join(format!("{name}.new")), folder.join(format!("{name}.old")), folder.join(name));
    for left in [&new, &old] {
        if left.exists() {
            fs::remove_dir_all(left).with_context(|| format!("cannot delete {}", left.display()))?;
        }
    }
    fs::create_dir(&new).with_context(|| format!("cannot create {}", new.display()))?;
    objective.save(&new, precision.dtype())?;
    if model.exists() {
        fs::rename(&model, &old)?;
    }
    fs::rename(&new, &model)?;
    if old.exists() {
        fs::remove_dir_all(&old)?;
    }
    Ok(())
}
