//! `rlrig train`.

use super::{interrupt, open, print};
use crate::{
    cli::{self, Train},
    train::{
        Metrics,
        grpo_config::GrpoConfig,
        log::peak_memory,
        optim::Outcome,
        pretrain::PretrainConfig,
        request::{Request, RunConfig},
        run::{End, Event, Plan, Rehearsal},
    },
};
use anyhow::{Result, bail};
use indicatif::{ProgressBar, ProgressStyle};
use std::time::{Duration, Instant};

pub fn run(command: &Train) -> Result<()> {
    match command {
        Train::Pretrain(args) => train::<PretrainConfig>("pretrain", args),
        Train::Grpo(args) => train::<GrpoConfig>("grpo", args),
    }
}

fn train<C: RunConfig>(command: &str, args: &cli::Run) -> Result<()> {
    let request = Request {
        config: args.config.clone(),
        resume: args.resume.clone(),
        out: args.out.clone(),
        set: args.set.clone(),
    };
    let prepared = request.prepare_on::<C>(&open::device_of(args.device)?)?;
    let folder = prepared.folder.display().to_string();
    if args.dry_run {
        let Rehearsal { plan, metrics, seconds } = prepared.rehearse()?;
        print_plan(&plan);
        print(&listed(&metrics))?;
        print_cost(seconds, plan.steps.saturating_sub(plan.done));
        return Ok(());
    }
    let stop = interrupt()?;
    let mut progress = Progress::new(&folder);
    let end = prepared.train(stop, &mut |event| progress.show(event))?;
    progress.bar.finish_and_clear();
    match end {
        End::Done => print(&format!("{folder}/model"))?,
        End::NoBetter(step) => {
            note!("ended after step {step}: train.patience is spent; the best is in {folder}/best");
            print(&format!("{folder}/best"))?;
        }
        // No success: a script must not take the run for a finished one.
        End::Stopped(step) => bail!("stopped after step {step}; go on with: rlrig train {command} --resume {folder}"),
    }
    Ok(())
}

/// Progress on stderr: a bar on a terminal, else a line every few seconds.
struct Progress {
    bar: ProgressBar,
    folder: String,
    start: Instant,
    first: u64,
    said: Instant,
}

const SECONDS_BETWEEN_LINES: u64 = 10;

impl Progress {
    fn new(folder: &str) -> Self {
        let now = Instant::now();
        Self { bar: ProgressBar::hidden(), folder: folder.to_owned(), start: now, first: 0, said: now }
    }

    fn show(&mut self, event: Event) {
        match event {
            Event::Plan(plan) => {
                print_plan(plan);
                note!("run folder {}", self.folder);
                self.bar = ProgressBar::new(plan.steps).with_position(plan.done);
                if let Ok(style) = ProgressStyle::with_template("{bar:24} {pos}/{len} {per_sec} {eta} left {msg}") {
                    self.bar.set_style(style);
                }
                self.first = plan.done;
                self.begin();
            }
            Event::Step(step, metrics) => {
                if step == self.first + 1 {
                    let length = self.bar.length().unwrap_or(step);
                    self.bar.suspend(|| print_cost(self.start.elapsed().as_secs_f64(), length - self.first));
                }
                self.bar.set_message(listed(metrics));
                self.bar.set_position(step);
                if self.bar.is_hidden() && self.said.elapsed() > Duration::from_secs(SECONDS_BETWEEN_LINES) {
                    self.said = Instant::now();
                    let length = self.bar.length().unwrap_or(step);
                    let each = self.start.elapsed().as_secs_f64() / (step - self.first).max(1) as f64;
                    let left = clock(each * (length - step) as f64);
                    note!("step {step}/{length} {each:.3} s a step, {left} left: {}", listed(metrics));
                }
            }
            Event::Evaluated(step, metrics) => self.line(&format!("step {step} evaluation: {}", listed(metrics))),
            Event::Skipped(step, Outcome::Spike, norm) => {
                self.line(&format!("step {step} skipped: the gradient's norm {norm:.3} is a spike"));
            }
            Event::Skipped(step, _, _) => self.line(&format!("step {step} skipped: the gradient is not finite")),
            Event::Saved(step) => {
                self.line(&format!("step {step} saved"));
                if step == self.first {
                    self.begin();
                }
            }
        }
    }

    /// Steps are timed from here on.
    fn begin(&mut self) {
        self.start = Instant::now();
        self.bar.reset_eta();
    }

    fn line(&self, text: &str) {
        self.bar.suspend(|| note!("{text}"));
    }
}

fn print_plan(plan: &Plan) {
    let millions = |n: usize| n as f64 / 1e6;
    let frozen = match plan.frozen {
        0 => String::new(),
        bytes => format!(", {:.0} MB of it of models that stay as they are", millions(bytes)),
    };
    note!(
        "{:.2} M parameters in {} tensors ({:.2} M by Muon), {:.0} MB with gradients, moments and average{frozen}; activations on top",
        millions(plan.parameters),
        plan.tensors,
        millions(plan.muon),
        millions(plan.memory),
    );
    let twice = if plan.recompute { ", blocks computed twice to keep less" } else { "" };
    note!("steps {} to {} of {} samples, {} at once{twice}", plan.done, plan.steps, plan.batch, plan.micro_batch);
}

fn print_cost(seconds: f64, steps: u64) {
    let memory = peak_memory().map(|bytes| format!(", {:.0} MB of memory at most so far", bytes as f64 / 1e6));
    let whole = clock(seconds * steps as f64);
    note!("one step took {seconds:.2} s, {steps} take about {whole}{}", memory.unwrap_or_default());
}

fn listed(metrics: &Metrics) -> String {
    let number =
        |value: f64| if value != 0.0 && value.abs() < 1e-3 { format!("{value:.2e}") } else { format!("{value:.4}") };
    metrics.iter().map(|(name, value)| format!("{name} {}", number(*value))).collect::<Vec<_>>().join(", ")
}

fn clock(seconds: f64) -> String {
    let seconds = seconds as u64;
    format!("{}:{:02}:{:02}", seconds / 3600, seconds / 60 % 60, seconds % 60)
}
