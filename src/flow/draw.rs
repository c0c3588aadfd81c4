//! What the pipeline does with pictures of many jobs at once: drawing, reference editing, and editing by way of noise.

use super::{
    field::{Guidance, pack, unpack},
    inversion::{FlowEdit, Inversion},
    pipeline::Klein,
    sampler::Solver,
    watch::{Progress, Watch},
};
use crate::{models::flux2::Flux2, tensor::rng::Stream, usage};
use anyhow::{Context, Result, bail, ensure};
use candle_core::Tensor;

/// How pictures are drawn.
#[derive(Clone, Copy)]
pub struct Options<'a> {
    pub steps: usize,
    /// How pictures are drawn and, by reference, edited; the methods of [`Klein::change`] have solvers of their own.
    pub solver: Solver,
    /// By a text strength of 1 and less, and with a distilled model, pictures are not guided at all.
    pub guidance: Guidance,
    /// How many pictures run through the network together, at most.
    pub batch: usize,
    pub watch: &'a dyn Watch,
}

impl Options<'_> {
    fn check(&self) -> Result<()> {
        if self.steps == 0 || self.steps > 1000 {
            usage!("the number of steps is 1 to 1000, not {}", self.steps);
        }
        self.guidance.check()?;
        ensure!(self.batch > 0, "a batch has at least one picture");
        Ok(())
    }
}

/// A picture to draw: a prompt, or an instruction and the latents of the pictures that it speaks of.
#[derive(Clone)]
pub struct Job<'a> {
    pub prompt: &'a str,
    /// Where it begins, `(C, h, w)`: see [`Klein::noise`]. Its size is the picture's.
    pub noise: Tensor,
    pub references: Vec<Tensor>,
}

/// A picture to change by way of its noise.
#[derive(Clone)]
pub struct Change<'a> {
    /// Latents `(C, h, w)`.
    pub source: Tensor,
    /// What the picture shows, and what it is to show.
    pub source_prompt: &'a str,
    pub prompt: &'a str,
    /// Of the noise it needs.
    pub seed: u64,
}

/// A picture to draw over.
#[derive(Clone)]
pub struct Over<'a> {
    pub prompt: &'a str,
    /// Latents `(C, h, w)`, and noise of their size.
    pub source: Tensor,
    pub noise: Tensor,
}

/// The method of a [`Change`].
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Method {
    Inversion(Inversion),
    /// With the strength of guidance of the source's prompt.
    FlowEdit(FlowEdit, f64),
}

impl Klein {
    /// Draws pictures; the latents `(C, h, w)` of each, in the order of `jobs`.
    pub fn draw(&self, jobs: &[Job], options: &Options) -> Result<Vec<Tensor>> {
        self.draw_by(&self.transformer, jobs, options)
    }

    /// The same by another transformer of the same shape, such as one with adapters.
    pub fn draw_by(&self, transformer: &Flux2, jobs: &[Job], options: &Options) -> Result<Vec<Tensor>> {
        options.check()?;
        let shape = |job: &Job| [&job.noise].into_iter().chain(&job.references).map(|t| t.dims().to_vec()).collect();
        let evaluations = options.solver.evaluations(options.steps);
        self.in_batches(jobs, options, evaluations, shape, |progress, batch| {
            let (_, h, w) = batch[0].noise.dims3()?;
            let prompts: Vec<&str> = batch.iter().map(|j| j.prompt).collect();
            let references: Vec<Vec<Tensor>> = batch.iter().map(|j| j.references.clone()).collect();
            let noise = stack(batch.iter().map(|j| &j.noise))?;
            let sigmas = self.schedule.sigmas(options.steps, h * w);
            let field = self.field_of(transformer, &prompts, &references, (h, w), options.guidance)?;
            progress.finish(options.solver.solve(&field.watched(progress), &noise, &sigmas))
        })
    }

    /// Draws over pictures (SDEdit, arXiv 2108.01073): each is mixed with noise up to `level`, and drawn from there in even
    /// steps; the latents of each, in the order of `jobs`.
    pub fn draw_over(&self, transformer: &Flux2, jobs: &[Over], level: f64, options: &Options) -> Result<Vec<Tensor>> {
        options.check()?;
        ensure!((0.0..=1.0).contains(&level), "a noise level is 0 to 1, not {level}");
        let steps = options.steps;
        let levels: Vec<f64> = (0..=steps).map(|i| level * (steps - i) as f64 / steps as f64).collect();
        let shape = |job: &Over| vec![job.source.dims().to_vec()];
        self.in_batches(jobs, options, options.solver.evaluations(steps), shape, |progress, batch| {
            let (_, h, w) = batch[0].source.dims3()?;
            let prompts: Vec<&str> = batch.iter().map(|j| j.prompt).collect();
            let (source, noise) = (stack(batch.iter().map(|j| &j.source))?, stack(batch.iter().map(|j| &j.noise))?);
            let x = ((source * (1.0 - level))? + (noise * level)?)?;
            let none = vec![Vec::new(); batch.len()];
            let field = self.field_of(transformer, &prompts, &none, (h, w), options.guidance)?;
            progress.finish(options.solver.solve(&field.watched(progress), &x, &levels))
        })
    }

    /// Changes pictures by way of their noise; the latents of each, in the order of `jobs`.
    pub fn change(&self, jobs: &[Change], method: Method, options: &Options) -> Result<Vec<Tensor>> {
        options.check()?;
        let steps = options.steps;
        let evaluations = match method {
            Method::Inversion(Inversion::RfInversion) => 2 * steps,
            Method::Inversion(Inversion::RfSolver) => 4 * steps,
            Method::Inversion(Inversion::FireFlow) => 2 * (steps + 1),
            Method::FlowEdit(edit, _) => {
                edit.check(steps)?;
                2 * edit.n_avg * (edit.n_max - edit.n_min) + edit.n_min
            }
        };
        let shape = |job: &Change| vec![job.source.dims().to_vec()];
        self.in_batches(jobs, options, evaluations, shape, |progress, batch| {
            let (_, h, w) = batch[0].source.dims3()?;
            let sigmas = self.schedule.sigmas(steps, h * w);
            let source = stack(batch.iter().map(|j| &j.source))?;
            let prompts: Vec<&str> = batch.iter().map(|j| j.prompt).collect();
            let sources: Vec<&str> = batch.iter().map(|j| j.source_prompt).collect();
            let none = vec![Vec::new(); batch.len()];
            let field = |prompts: &[&str], guidance: Guidance| self.field(prompts, &none, (h, w), guidance);
            let noise = |index: u64| -> candle_core::Result<Tensor> {
                let draw =
                    |j: &&Change| Stream::new(j.seed, "change", index).normals(source.elem_count() / batch.len());
                Tensor::from_vec(batch.iter().flat_map(draw).collect::<Vec<_>>(), source.dims(), self.device())
            };
            let target = field(&prompts, options.guidance)?.watched(progress);
            match method {
                Method::Inversion(inversion) => {
                    let up = match inversion {
                        Inversion::RfInversion => field(&vec![""; batch.len()], 1.0.into())?,
                        _ => field(&sources, 1.0.into())?,
                    };
                    let up = up.watched(progress);
                    progress.finish(inversion.edit(&up, &target, &source, &noise(0)?, &sigmas))
                }
                Method::FlowEdit(edit, guidance) => {
                    let from = field(&sources, guidance.into())?.watched(progress);
                    let noise = |step: usize, k: usize| noise((step * edit.n_avg + k) as u64);
                    progress.finish(edit.run(&from, &target, &source, &sigmas, noise))
                }
            }
        })
    }

    /// Runs `jobs` in batches of equal shape, and brings the results into their order. A batch's result is `(B, h w, C)`.
    fn in_batches<J>(
        &self,
        jobs: &[J],
        options: &Options,
        evaluations: usize,
        shape: impl Fn(&J) -> Vec<Vec<usize>>,
        run: impl Fn(&Progress, &[&J]) -> Result<Tensor>,
    ) -> Result<Vec<Tensor>> {
        let mut groups: Vec<(Vec<Vec<usize>>, Vec<usize>)> = Vec::new();
        for (i, job) in jobs.iter().enumerate() {
            let shape = shape(job);
            match groups.iter_mut().find(|(s, _)| *s == shape) {
                Some((_, members)) => members.push(i),
                None => groups.push((shape, vec![i])),
            }
        }
        let batches: Vec<(&[usize], &[usize])> = groups
            .iter()
            .flat_map(|(shape, members)| members.chunks(options.batch).map(|m| (&shape[0][..], m)))
            .collect();
        let progress = Progress::new(options.watch, batches.len() * evaluations);
        let mut results: Vec<Option<Tensor>> = vec![None; jobs.len()];
        for (shape, members) in batches {
            let &[channels, h, w] = shape else { bail!("latents are (C, h, w), not {shape:?}") };
            ensure!(channels == self.transformer.config().in_channels, "latents of another model: {shape:?}");
            let batch: Vec<&J> = members.iter().map(|i| &jobs[*i]).collect();
            let tokens = run(&progress, &batch)?;
            if !tokens.sqr()?.sum_all()?.to_scalar::<f32>()?.is_finite() {
                bail!(
                    "the transformer gave numbers that are not finite: its weights are broken, or --dtype is too narrow"
                );
            }
            for (row, i) in members.iter().enumerate() {
                results[*i] = Some(unpack(&tokens.get(row)?, h, w)?);
            }
        }
        results.into_iter().collect::<Option<_>>().context("a picture was not drawn")
    }
}

/// `(C, h, w)` latents of one size as tokens `(B, h w, C)`.
fn stack<'a>(latents: impl Iterator<Item = &'a Tensor>) -> candle_core::Result<Tensor> {
    Tensor::stack(&latents.map(pack).collect::<candle_core::Result<Vec<_>>>()?, 0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{flow::Unwatched, models::Folder};
    use candle_core::{DType, Device};
    use std::path::Path;

    #[test]
    fn what_is_drawn_over_is_kept_without_noise_and_forgotten_at_full_noise() {
        let folder = Folder::from(Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/klein"));
        let klein = Klein::open(&folder, DType::F32, &Device::Cpu, Vec::new()).unwrap();
        let tensor = |index: u64| klein.noise(0, index, (4, 4)).unwrap();
        let over = |source: u64, level: f64| {
            let job = Over { prompt: "a ball", source: tensor(source), noise: tensor(0) };
            let options =
                Options { steps: 2, solver: Solver::Euler, guidance: 3.0.into(), batch: 1, watch: &Unwatched };
            klein.draw_over(&klein.transformer, &[job], level, &options).map(|mut drawn| drawn.remove(0))
        };
        let gap =
            |a: &Tensor, b: &Tensor| (a - b).unwrap().abs().unwrap().max_all().unwrap().to_scalar::<f32>().unwrap();
        let of = |source, level| over(source, level).unwrap();
        assert_eq!(gap(&of(1, 0.0), &tensor(1)), 0.0);
        assert_eq!(gap(&of(1, 1.0), &of(2, 1.0)), 0.0);
        assert!(gap(&of(1, 0.5), &of(2, 0.5)) > 0.01 && gap(&of(1, 0.5), &tensor(1)) > 0.01);
        assert!(over(1, 1.5).unwrap_err().to_string().contains("noise level"));
    }
}
