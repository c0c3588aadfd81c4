//! Prompts with pictures that miss them: what the Actor, the Editor and the whole loop are trained on.

use super::{
    grpo_config::ModelsConfig,
    rollout::{self, decoder, through_latents},
};
use crate::{
    flow::{Guidance, Klein, Solver, Unwatched},
    models::built_in,
    rig::{
        cycle::{rank, seed_of_drawing},
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
    /// Drawings of a prompt, of which the best is the problem's picture, as in the loop.
    pub draws: usize,
    /// Of the drawings.
    pub steps: usize,
    pub guidance: f64,
    /// Of the edits that a painter makes.
    pub edit_guidance: Guidance,
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
    /// What the Actor is asked.
    pub fn question(&self) -> String {
        prompts::reflect(self.target.words(), &self.verdicts, &[])
    }
}

/// Whether there is something to mend in a picture of these verdicts, and the Checker could tell.
fn teaches(verdicts: &[Verdict]) -> bool {
    rollout::known(verdicts) && !verdicts.iter().all(|v| v.yes)
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
        if posing.steps == 0 || posing.draws == 0 {
            usage!("evaluation_steps and draws are 1 or more");
        }
        [posing.guidance.into(), posing.edit_guidance].into_iter().try_for_each(Guidance::check)?;
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
        let (Posing { guidance, edit_guidance, .. }, size) = (self.posing, self.size);
        let (solver, editing) = (Solver::Euler, Editing::Reference);
        let painting = Painting { steps, solver, guidance, edit_guidance, editing, size, batch: TOGETHER };
        Painter::new(self.klein.clone(), painting, Box::new(Unwatched)).with_adapted(self.adapted.clone())
    }

    /// Problems by number. What the Checker finds nothing wrong with, or cannot tell, is replaced as long as [`ATTEMPTS`] last.
    pub fn problems(&self, split: Split, seed: u64, indices: &[u64]) -> Result<Vec<Problem>> {
        let mut problems: Vec<Problem> = Vec::with_capacity(indices.len());
        let first = if self.posing.source == Source::Draw { 0 } else { DRAWN };
        for attempt in first..ATTEMPTS {
            let open: Vec<usize> =
                (0..indices.len()).filter(|i| !problems.get(*i).is_some_and(|p| teaches(&p.verdicts))).collect();
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
        let (mut asked, mut renders) = (Vec::with_capacity(indices.len()), Vec::new());
        for number in indices.iter().map(|index| index * ATTEMPTS + attempt) {
            let (prompt, graph) = if drawn {
                let sample = tasks::text_to_image(seed, split, number, min, max);
                (sample.prompt, sample.graph)
            } else {
                let sample = tasks::act(seed, split, number, min, max);
                renders.push(through_latents(&self.klein, &self.decode, &render(&sample.scene), self.size)?);
                (sample.prompt, sample.graph)
            };
            asked.push((self.target(prompt, &graph), graph, noise(number)));
        }
        let targets = || asked.iter().map(|(target, ..)| target);
        let draw = |turn| {
            let seeds = asked.iter().map(|(.., seed)| seed_of_drawing(*seed, turn));
            let jobs: Vec<Draw> = targets().zip(seeds).map(|(target, seed)| Draw { target, seed }).collect();
            self.checked(self.painter(self.posing.steps).draw(&jobs)?, targets())
        };
        let mut best = if drawn { draw(0)? } else { self.checked(renders, targets())? };
        for turn in 1..if drawn { self.posing.draws } else { 1 } {
            let better = best.iter_mut().zip(draw(turn)?).filter(|(best, new)| rank(&new.1) > rank(&best.1));
            better.for_each(|(best, new)| *best = new);
        }
        let problem = |((target, graph, seed), (picture, verdicts))| Problem {
            target,
            graph,
            picture,
            verdicts,
            seed,
            rendered: !drawn,
        };
        Ok(asked.into_iter().zip(best).map(problem).collect())
    }

    /// Pictures with the Checker's verdicts on what their targets ask for.
    fn checked<'a>(
        &self,
        pictures: Vec<Picture>,
        targets: impl Iterator<Item = &'a Target>,
    ) -> Result<Vec<(Picture, Vec<Verdict>)>> {
        Picture::develop(&pictures.iter().collect::<Vec<_>>())?;
        let verdicts = rollout::check(&self.critic, &pictures.iter().zip(targets).collect::<Vec<_>>());
        Ok(pictures.into_iter().zip(verdicts).collect())
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

    fn posed(models: &ModelsConfig, posing: Posing) -> Result<Vec<Problem>> {
        let (built_in, at) = (ModelsConfig::default(), (DType::F32, &Device::Cpu));
        let (klein, _) = rollout::pipeline(&built_in.pipeline()?, at, &[])?;
        let (critic, _) = rollout::critic(&built_in, at, None)?;
        let poser = Poser::new((klein, Adapted::default()), critic, posing, models)?;
        poser.problems(Split::Train, 0, &[0, 1, 2, 3])
    }

    const POSING: Posing = Posing {
        source: Source::Render,
        objects: [3, 3],
        draws: 1,
        steps: 1,
        guidance: 1.0,
        edit_guidance: Guidance { text: 1.0, image: 1.0 },
    };

    #[test]
    fn the_built_in_models_read_prompts_as_the_loop_words_them() -> Result<()> {
        for problem in posed(&ModelsConfig::default(), POSING)? {
            let plain = plain(&problem.graph);
            assert!(problem.target.words() == plain && problem.question().contains(&plain), "{plain}");
        }
        let others = posed(&ModelsConfig { model: Some("elsewhere".into()), ..ModelsConfig::default() }, POSING)?;
        assert!(others.iter().all(|problem| problem.target.words() == problem.target.prompt));
        assert!(others.iter().any(|problem| problem.target.prompt != plain(&problem.graph)));
        Ok(())
    }

    #[test]
    fn of_several_drawings_the_problem_has_the_best() -> Result<()> {
        let drawn = |draws| posed(&ModelsConfig::default(), Posing { source: Source::Draw, draws, steps: 2, ..POSING });
        let pairs: Vec<(Problem, Problem)> = drawn(1)?.into_iter().zip(drawn(3)?).collect();
        // Two steps are too few for a picture that passes, in whose place another prompt would be drawn.
        assert!(pairs.iter().all(|(one, best)| one.target.prompt == best.target.prompt));
        assert!(pairs.iter().all(|(one, best)| rank(&best.verdicts) >= rank(&one.verdicts)));
        assert!(pairs.iter().any(|(one, best)| rank(&best.verdicts) > rank(&one.verdicts)));
        Ok(())
    }
}
