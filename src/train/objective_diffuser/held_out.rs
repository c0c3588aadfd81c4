//! What the Diffuser and the Editor make of held-out prompts and instructions, and how right it is.

use super::Diffuser;
use crate::{
    flow::{
        draw::{Job, Options},
        sampler::Solver,
        watch::Unwatched,
    },
    scene::{
        graph::SceneGraph,
        tabletop::{
            oracle,
            render::render,
            split::Split,
            tasks::{self, Emphasis},
            world::SIDE,
        },
    },
    train::{
        Metrics,
        diffuser_config::{Evaluation, Stage},
    },
};
use anyhow::Result;
use image::RgbImage;
use rayon::prelude::*;
use std::collections::BTreeMap;

/// The seed of held-out prompts.
const HELD_OUT: u64 = 1;

/// A held-out picture.
pub struct Made {
    /// The prompt or the instruction, and what the picture should show.
    pub asked: String,
    pub kind: Kind,
    pub graph: SceneGraph,
    /// What was edited.
    pub source: Option<RgbImage>,
    pub picture: RgbImage,
}

#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    Prompt,
    /// With four or five objects.
    PromptOfMany,
    Edit,
    /// To several places, in a scene of four or five objects.
    MoveAmongMany,
    EditOfDrawn,
    /// Of a picture that was drawn over a render, towards what the render shows.
    Mending,
}

impl Diffuser {
    /// Held-out pictures drawn from prompts, or edited, at most `count` of each kind; the same for every evaluation.
    pub fn held_out(&self, count: usize) -> Result<Vec<Made>> {
        let Evaluation { steps, guidance, .. } = self.config.evaluation;
        let size = self.klein.tokens(SIDE, SIDE)?;
        let any = |of: fn(&Stage) -> bool| self.config.stages.iter().any(of);
        // An adapter may be taught edits alone.
        let draws = self.adapter.is_none() || any(|stage| stage.edits < 1.0);
        let many = draws && any(|stage| stage.max_objects > 3);
        let several_places = any(|stage| stage.several_places > 0.0);
        let up_to_count = |wanted: bool| 0..if wanted { count as u64 } else { 0 };
        let mut samples = Vec::new();
        for i in up_to_count(draws) {
            let tasks::TextToImage { prompt, graph, .. } = tasks::text_to_image(HELD_OUT, Split::Val, i, 1, 3);
            samples.push((prompt, Kind::Prompt, graph, None));
        }
        for i in up_to_count(true) {
            let sample = tasks::edit(HELD_OUT, Split::Val, i, 1, 3);
            samples.push((sample.instruction, Kind::Edit, sample.after, Some(render(&sample.source))));
        }
        for i in up_to_count(several_places) {
            let emphasis = Emphasis { moves: 1.0, several_places: 1.0, ..Emphasis::default() };
            let sample = tasks::edit_with(HELD_OUT, Split::ValMany, i, 4, 5, emphasis);
            samples.push((sample.instruction, Kind::MoveAmongMany, sample.after, Some(render(&sample.source))));
        }
        for (i, drawn) in self.drawn_held_out.iter().take(count).enumerate() {
            if drawn.scene.is_some() {
                let asked = tasks::mending(HELD_OUT, i as u64, &drawn.reading.view, &drawn.graph, 1);
                let mend = |asked| (asked, Kind::Mending, drawn.graph.clone(), Some(drawn.picture.clone()));
                samples.extend(asked.map(mend));
                continue;
            }
            let scene = &drawn.reading.scene;
            let Some((asked, _)) = tasks::edit_of(HELD_OUT, i as u64, scene, &drawn.graph, 0.0) else { continue };
            let Some(after) = tasks::after(HELD_OUT, i as u64, scene, &asked) else { continue };
            samples.push((asked, Kind::EditOfDrawn, after, Some(drawn.picture.clone())));
        }
        // Last, as each picture's noise is numbered by its place here.
        for i in up_to_count(many) {
            let tasks::TextToImage { prompt, graph, .. } = tasks::text_to_image(HELD_OUT, Split::ValMany, i, 4, 5);
            samples.push((prompt, Kind::PromptOfMany, graph, None));
        }
        let mut jobs = Vec::with_capacity(samples.len());
        for (i, (asked, _, _, source)) in samples.iter().enumerate() {
            let references = source.iter().map(|source| self.klein.encode(source)).collect::<Result<_>>()?;
            jobs.push(Job { prompt: asked, noise: self.klein.noise(HELD_OUT, i as u64, size)?, references });
        }
        let options = Options { steps, solver: Solver::Euler, guidance: guidance.into(), batch: 32, watch: &Unwatched };
        // What is kept of prompts was made by the text encoder as it was.
        self.klein.forget();
        let pictures = self.klein.decode(&self.klein.draw(&jobs, &options)?)?;
        self.klein.forget();
        let made = samples.into_iter().zip(pictures);
        Ok(made.map(|((asked, kind, graph, source), picture)| Made { asked, kind, graph, source, picture }).collect())
    }
}

/// Shares of what is as it should be, by the pixel oracle.
pub fn metrics(made: &[Made]) -> Metrics {
    let mut sums: BTreeMap<&str, (f64, f64)> = BTreeMap::new();
    let mut count = |name: &'static str, good: usize, all: usize| {
        let sum = sums.entry(name).or_default();
        *sum = (sum.0 + good as f64, sum.1 + all as f64);
    };
    let truth = |t: &[bool]| t.iter().filter(|ok| **ok).count();
    let judged: Vec<_> = made.par_iter().map(|made| oracle::read(&made.picture).judge(&made.graph)).collect();
    for (made, judged) in made.iter().zip(&judged) {
        let perfect = usize::from(judged.perfect());
        match made.kind {
            Kind::Prompt => {
                count("eval/objects", truth(&judged.objects), judged.objects.len());
                count("eval/relations", truth(&judged.relations), judged.relations.len());
                count("eval/no_extra", usize::from(judged.extra == 0), 1);
                count("eval/perfect", perfect, 1);
            }
            Kind::PromptOfMany => count("eval/many_perfect", perfect, 1),
            Kind::Edit => count("eval/edit_perfect", perfect, 1),
            Kind::MoveAmongMany => count("eval/move_among_many_perfect", perfect, 1),
            Kind::EditOfDrawn => count("eval/drawn_edit_perfect", perfect, 1),
            Kind::Mending => count("eval/mended", perfect, 1),
        }
    }
    sums.into_iter().map(|(name, (good, all))| (name.to_owned(), good / all.max(1.0))).collect()
}
