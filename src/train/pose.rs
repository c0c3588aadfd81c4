//! Prompts with pictures that miss them: what the Actor, the Editor and the whole loop are trained on.

use super::{
    grpo_config::ModelsConfig,
    rollout::{self, decoder, through_latents},
};
use crate::{
    flow::{Klein, Solver, Unwatched},
    models::built_in,
    rig::{
        klein::{Adapted, Editing, Painter, Painting},
        prompts,
        roles::{Decode, Diffuser, Draw, Picture, Target, Verdict},
        vlm_roles::Critic,
    },
    scene::{
        graph::SceneGraph,
        tabletop::{
            caption::plain,
            render::render,
            split::{MOST, Split},
            tasks,
        },
    },
    tensor::rng::Stream,
    usage,
};
use anyhow::Result;
use serde::{Deserialize, Serialize};
use std::sync::Arc;

/// Where the picture that misses its prompt comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Source {
    /// The Diffuser draws it; where it gets prompt after prompt right, a render that does not stands in.
    Draw,
    Render,
}

/// How problems are posed.
#[derive(Clone, Copy, Debug)]
pub struct Posing {
    pub source: Source,
    /// Objects of a prompt at least and at most.
    pub objects: [usize; 2],
    /// Of the drawings.
    pub steps: usize,
    pub guidance: f64,
}

/// Prompts tried for a problem until the Checker finds something wrong with a picture: so many pictures are drawn, and then so
/// many rendered.
const DRAWN: u64 = 10;
const RENDERED: u64 = 3;
const ATTEMPTS: u64 = DRAWN + RENDERED;
/// Pictures that run through a network together.
pub const TOGETHER: usize = 32;

/// A prompt and a picture that misses it.
pub struct Problem {
    pub target: Target,
    pub graph: SceneGraph,
    pub picture: Picture,
    pub verdicts: Vec<Verdict>,
    /// Of all noise in its pictures.
    pub seed: u64,
    /// Whether a render stands in for a drawing.
    pub rendered: bool,
}

impl Problem {
    /// What the Actor is asked first.
    pub fn question(&self) -> String {
        prompts::reflect(self.target.words(), &self.verdicts, &[])
    }
}

/// Who poses problems: the frozen Diffuser and Checker.
pub struct Poser {
    pub klein: Arc<Klein>,
    /// Who draws and edits in place of the pipeline's own transformer.
    adapted: Adapted,
    pub critic: Critic,
    pub decode: Decode,
    /// Whether prompts are read in plain words.
    plain: bool,
    posing: Posing,
    /// Width and height of pictures.
    pub size: (u32, u32),
}

impl Poser {
    pub fn new(
        (klein, adapted): (Arc<Klein>, Adapted),
        critic: Critic,
        posing: Posing,
        models: &ModelsConfig,
    ) -> Result<Self> {
        let [min, max] = posing.objects;
        if min == 0 || max > MOST || min > max {
            usage!("min_objects and max_objects lie in 1 to {MOST} and in order, unlike {min} and {max}");
        }
        if posing.steps == 0 {
            usage!("evaluation_steps is 1 or more");
        }
        let (decode, size) = (decoder(&klein), models.size(&klein));
        let plain = built_in::are_named(models.model.as_deref().map(|path| path.to_string_lossy()).as_deref());
        Ok(Self { klein, adapted, critic, decode, plain, posing, size })
    }

    /// What a prompt of the world asks for. The built-in Diffuser and Actor read it in plain words, as they do in the loop.
    pub fn target(&self, prompt: String, graph: &SceneGraph) -> Target {
        let target = Target::new(prompt, graph).and_nothing_else();
        if self.plain { target.drawn_as(plain(graph)) } else { target }
    }

    /// Who draws and edits in so many steps.
    pub fn painter(&self, steps: usize) -> Painter {
        let (guidance, size) = (self.posing.guidance, self.size);
        let painting =
            Painting { steps, solver: Solver::Euler, guidance, editing: Editing::Reference, size, batch: TOGETHER };
        Painter::new(self.klein.clone(), painting, Box::new(Unwatched)).with_adapted(self.adapted.clone())
    }

    /// Problems by number. What the Checker finds nothing wrong with, or cannot tell, is replaced as long as [`ATTEMPTS`] last.
    pub fn problems(&self, split: Split, seed: u64, indices: &[u64]) -> Result<Vec<Problem>> {
        let mut problems: Vec<Problem> = Vec::with_capacity(indices.len());
        let first = if self.posing.source == Source::Draw { 0 } else { DRAWN };
        for attempt in first..ATTEMPTS {
            let teaches = |p: &Problem| rollout::known(&p.verdicts) && !p.verdicts.iter().all(|v| v.yes);
            let open: Vec<usize> = (0..indices.len()).filter(|i| !problems.get(*i).is_some_and(teaches)).collect();
            if open.is_empty() {
                break;
            }
            let new = self.pose(split, seed, &open.iter().map(|i| indices[*i]).collect::<Vec<_>>(), attempt)?;
            for (i, problem) in open.into_iter().zip(new) {
                match problems.get_mut(i) {
                    Some(old) => *old = problem,
                    None => problems.push(problem),
                }
            }
        }
        Ok(problems)
    }

    fn pose(&self, split: Split, seed: u64, indices: &[u64], attempt: u64) -> Result<Vec<Problem>> {
        let ([min, max], drawn) = (self.posing.objects, attempt < DRAWN);
        let noise = |number: u64| Stream::new(seed, "actor pictures", number).next_u64();
        let (mut problems, mut pictures) = (Vec::with_capacity(indices.len()), Vec::with_capacity(indices.len()));
        for number in indices.iter().map(|index| index * ATTEMPTS + attempt) {
            let (prompt, graph) = if drawn {
                let sample = tasks::text_to_image(seed, split, number, min, max);
                (sample.prompt, sample.graph)
            } else {
                let sample = tasks::act(seed, split, number, min, max);
                pictures.push(through_latents(&self.klein, &self.decode, &render(&sample.scene), self.size)?);
                (sample.prompt, sample.graph)
            };
            problems.push((self.target(prompt, &graph), graph, noise(number)));
        }
        if drawn {
            let jobs: Vec<Draw> = problems.iter().map(|(target, _, seed)| Draw { target, seed: *seed }).collect();
            pictures = self.painter(self.posing.steps).draw(&jobs)?;
        }
        Picture::develop(&pictures.iter().collect::<Vec<_>>())?;
        let asked: Vec<(&Picture, &Target)> = pictures.iter().zip(&problems).map(|(p, (t, ..))| (p, t)).collect();
        let verdicts = rollout::check(&self.critic, &asked);
        let all = problems.into_iter().zip(pictures.iter().cloned()).zip(verdicts);
        Ok(all
            .map(|(((target, graph, seed), picture), verdicts)| Problem {
                target,
                graph,
                picture,
                verdicts,
                seed,
                rendered: !drawn,
            })
            .collect())
    }
}

/// The metric of [`rendered_share`].
pub const RENDERED_SHARE: &str = "problems/rendered";

/// The share of problems whose picture is a render.
pub fn rendered_share<'a>(problems: impl ExactSizeIterator<Item = &'a Problem>) -> f64 {
    let n = problems.len().max(1) as f64;
    problems.filter(|p| p.rendered).count() as f64 / n
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::{DType, Device};

    #[test]
    fn the_built_in_models_read_prompts_as_the_loop_words_them() -> Result<()> {
        let (built_in, at) = (ModelsConfig::default(), (DType::F32, &Device::Cpu));
        let posed = |models: &ModelsConfig| -> Result<Vec<(String, Problem)>> {
            let (klein, _) = rollout::pipeline(&built_in.pipeline()?, at, &[])?;
            let (critic, _) = rollout::critic(&built_in, at, None)?;
            let posing = Posing { source: Source::Render, objects: [3, 3], steps: 1, guidance: 1.0 };
            let poser = Poser::new((klein, Adapted::default()), critic, posing, models)?;
            let problems = poser.problems(Split::Train, 0, &[0, 1, 2, 3])?;
            Ok(problems.into_iter().map(|problem| (plain(&problem.graph), problem)).collect())
        };
        for (plain, problem) in posed(&built_in)? {
            assert!(problem.target.words() == plain && problem.question().contains(&plain), "{plain}");
        }
        let others = posed(&ModelsConfig { model: Some("elsewhere".into()), ..ModelsConfig::default() })?;
        assert!(others.iter().all(|(_, problem)| problem.target.words() == problem.target.prompt));
        assert!(others.iter().any(|(plain, problem)| problem.target.prompt != *plain));
        Ok(())
    }
}
