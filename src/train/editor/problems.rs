//! What the Editor is trained on, and the Diffuser.
//!
//! The edits are the world's own, on renders, or, as in the loop, what the Actor asks for on pictures of the Diffuser that
//! miss their prompts. What is asked of the Editor is the edit, be it the right one or not, as the tabletop's oracle
//! reads the picture and the words. Where the words cannot be read, or say nothing of this picture, one of the world's
//! own edits stands in; where it sees nothing in the picture (as in those of other worlds), the whole prompt is asked.
//! The Diffuser's are the world's prompts, with no picture to begin with.

use super::{
    super::{
        pose::{self, Poser, TOGETHER},
        replay::Writing,
        rollout::through_latents,
    },
    Editor, EditorConfig,
};
use crate::{
    rig::roles::{Picture, Target},
    scene::{
        graph::SceneGraph,
        tabletop::{oracle, render::render, split::Split, tasks},
    },
    tensor::rng::Stream,
};
use anyhow::{Context, Result};

/// A picture, how it is to be edited, and what it should show in the end; without a picture, what is to be drawn.
pub(super) struct Problem {
    pub(super) source: Option<Picture>,
    pub(super) instruction: String,
    pub(super) target: Target,
    pub(super) graph: SceneGraph,
}

impl Editor {
    /// Problems by number.
    pub(super) fn problems(&self, split: Split, seed: u64, indices: &[u64]) -> Result<Vec<Problem>> {
        if self.draws {
            return Ok(indices.iter().map(|index| self.prompt(split, seed, *index)).collect());
        }
        let drawn = |index: &u64| Stream::new(seed, "editor problems", *index).chance(self.config.drawn);
        let asked: Vec<u64> = indices.iter().copied().filter(drawn).collect();
        let mut asked = self.asked(split, seed, &asked)?.into_iter();
        let problem = |index: &u64| match drawn(index) {
            true => asked.next().context("a problem for each number"),
            false => self.given(split, seed, *index),
        };
        indices.iter().map(problem).collect()
    }

    /// One of the world's prompts.
    fn prompt(&self, split: Split, seed: u64, index: u64) -> Problem {
        let EditorConfig { min_objects, max_objects, .. } = self.config;
        let tasks::TextToImage { prompt, graph, .. } =
            tasks::text_to_image(seed, split, index, min_objects, max_objects);
        let target = self.poser.target(prompt, &graph);
        Problem { source: None, instruction: target.words().to_owned(), target, graph }
    }

    /// One of the world's own edits, on a render.
    fn given(&self, split: Split, seed: u64, index: u64) -> Result<Problem> {
        let EditorConfig { min_objects, max_objects, .. } = self.config;
        let Poser { klein, decode, size, .. } = &self.poser;
        let sample = tasks::edit(seed, split, index, min_objects, max_objects);
        let source = through_latents(klein, decode, &render(&sample.source), *size)?;
        let target = Target::new(sample.after.triple_text(), &sample.after).and_nothing_else();
        Ok(Problem { source: Some(source), instruction: sample.instruction, target, graph: sample.after })
    }

    /// What the Actor asks for first on pictures that miss their prompts.
    fn asked(&self, split: Split, seed: u64, indices: &[u64]) -> Result<Vec<Problem>> {
        let missed = self.poser.problems(split, seed, indices)?;
        let mut edits = Vec::with_capacity(missed.len());
        for some in missed.chunks(TOGETHER) {
            let pictures = some.iter().map(|p| p.picture.clone()).collect();
            let questions = some.iter().map(pose::Problem::question).enumerate().collect();
            let unused: Vec<Stream> = some.iter().map(|p| Stream::new(p.seed, "edit", 0)).collect();
            let writing = Writing::draw(&self.poser.critic.actor, (pictures, questions), 0.0, &unused)?;
            edits.extend(writing.written.into_iter().map(|written| written.edit));
        }
        let problem = |((missed, edit), index): ((pose::Problem, Option<String>), &u64)| {
            // An answer that cannot be read costs its own problem alone.
            let Some(instruction) = edit else { return self.given(split, seed, *index) };
            let pose::Problem { picture, target, graph, .. } = missed;
            let shown = oracle::read(picture.pixels()?);
            let (target, graph) = match tasks::after(seed, *index, &shown.scene, &instruction) {
                Some(after) => {
                    let named = Target::new(after.triple_text(), &after);
                    // What else an unclear picture shows is not known.
                    (if shown.unclear == 0 { named.and_nothing_else() } else { named }, after)
                }
                None if shown.scene.items.is_empty() => (target, graph),
                None => return self.given(split, seed, *index),
            };
            Ok(Problem { source: Some(picture), instruction, target, graph })
        };
        missed.into_iter().zip(edits).zip(indices).map(problem).collect()
    }
}
