//! Diffuser and Editor by one FLUX.2-klein: the same weights draw and, with the source picture as a reference, edit. Each may
//! have adapters of its own on them; the methods by noise do without.

use super::{
    cycle::seed_of_drawing,
    roles::{Claim, Decode, Diffuser, Draw, Edit, Editor, Picture, Verdict},
};
use crate::{
    flow::{Change, FlowEdit, Guidance, Inversion, Job, Klein, Method, Options, Solver, Watch},
    models::flux2::Flux2,
    usage,
};
use anyhow::{Context, Result};
use candle_core::Tensor;
use std::{collections::HashMap, sync::Arc};

/// How a picture is edited.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Editing {
    /// The source's latents join the sequence, the instruction is the prompt (FLUX.2-klein, FLUX.1-Kontext).
    Reference,
    /// Up to noise and down again under the target's prompt.
    Inversion(Inversion),
    /// By the difference of two flows (FlowEdit).
    FlowEdit,
}

/// How pictures are painted.
#[derive(Clone, Debug)]
pub struct Painting {
    pub steps: usize,
    pub solver: Solver,
    /// By the prompt: of drawings, and of edits by way of noise.
    pub guidance: f64,
    /// Of edits by reference: by the instruction and by the picture.
    pub edit_guidance: Guidance,
    pub editing: Editing,
    /// Width and height of drawn pictures in pixels.
    pub size: (u32, u32),
    /// Pictures that run through the network together, at most.
    pub batch: usize,
}

/// FlowEdit's guidance under the source's prompt (its published value for FLUX).
const FLOWEDIT_SOURCE_GUIDANCE: f64 = 1.5;

/// The transformers of those roles that are not played by the pipeline's own: the same weights with adapters.
#[derive(Clone, Default)]
pub struct Adapted {
    pub diffuser: Option<Arc<Flux2>>,
    pub editor: Option<Arc<Flux2>>,
}

/// A FLUX.2-klein in the roles of Diffuser and Editor.
pub struct Painter {
    klein: Arc<Klein>,
    adapted: Adapted,
    painting: Painting,
    decode: Decode,
    watch: Box<dyn Watch>,
    /// The noise of single seeds where a file gave it, and which of the file's it is.
    given: HashMap<u64, (usize, Tensor)>,
}

impl Painter {
    pub fn new(klein: Arc<Klein>, painting: Painting, watch: Box<dyn Watch>) -> Self {
        let decoder = klein.clone();
        let decode: Decode = Arc::new(move |latents: &[Tensor]| decoder.decode(latents));
        Self { klein, adapted: Adapted::default(), painting, decode, watch, given: HashMap::new() }
    }

    /// Lets these transformers play their roles.
    pub fn with_adapted(self, adapted: Adapted) -> Self {
        Self { adapted, ..self }
    }

    /// Lets pictures of these seeds begin with noise from a file: one for each, or one for all, which is that of `row`
    /// if it is told.
    pub fn with_noise(mut self, noise: &Tensor, row: Option<usize>, seeds: &[u64]) -> Result<Self> {
        let mut noise: Vec<_> = self.klein.given_noise(noise, self.tokens()?)?.into_iter().enumerate().collect();
        noise.retain(|(i, _)| row.is_none_or(|row| row == *i));
        if noise.len() != 1 && noise.len() != seeds.len() {
            usage!("the file has noise for {} pictures, but {} are drawn", noise.len(), seeds.len());
        }
        self.given = seeds.iter().copied().zip(noise.iter().cycle().cloned()).collect();
        Ok(self)
    }

    /// Which noise of the file the drawing of `seed` begins with, where a file gave it.
    pub fn noise_row(&self, seed: u64) -> Option<usize> {
        self.given.get(&seed).map(|(row, _)| *row)
    }

    /// The noise `(C, h, w)` that the drawing of `seed` begins with.
    pub fn noise(&self, seed: u64) -> Result<Tensor> {
        match self.given.get(&seed) {
            Some((_, noise)) => Ok(noise.clone()),
            None => Ok(self.klein.noise(seed, 0, self.tokens()?)?),
        }
    }

    fn tokens(&self) -> Result<(usize, usize)> {
        self.klein.tokens(self.painting.size.0, self.painting.size.1)
    }

    fn options(&self, guidance: Guidance) -> Options<'_> {
        let Painting { steps, solver, batch, .. } = self.painting;
        Options { steps, solver, guidance, batch, watch: &*self.watch }
    }

    fn pictures(&self, latents: Vec<Tensor>) -> Vec<Picture> {
        latents.into_iter().map(|latents| Picture::from_latents(latents, self.decode.clone())).collect()
    }

    /// How many tokens of a prompt the Diffuser reads, if it does not read this one whole.
    pub fn is_too_long(&self, prompt: &str) -> Result<Option<usize>> {
        Ok((!self.klein.reads(prompt)?).then_some(self.klein.prompt_embedding.max_length))
    }

    /// A picture's latents: those it was made from, or its pixels encoded.
    fn latents(&self, picture: &Picture) -> Result<Tensor> {
        match picture.latents() {
            Some(latents) => Ok(latents.clone()),
            None => self.klein.encode(picture.pixels()?).context("cannot encode the picture"),
        }
    }
}

impl Diffuser for Painter {
    fn draw(&self, jobs: &[Draw]) -> Result<Vec<Picture>> {
        let jobs: Vec<Job> = jobs
            .iter()
            .map(|job| Ok(Job { prompt: job.target.words(), noise: self.noise(job.seed)?, references: Vec::new() }))
            .collect::<Result<_>>()?;
        let diffuser = self.adapted.diffuser.as_deref().unwrap_or(&self.klein.transformer);
        Ok(self.pictures(self.klein.draw_by(diffuser, &jobs, &self.options(self.painting.guidance.into()))?))
    }
}

impl Editor for Painter {
    fn edit(&self, jobs: &[Edit]) -> Result<Vec<Picture>> {
        let sources: Vec<Tensor> = jobs.iter().map(|job| self.latents(job.picture)).collect::<Result<_>>()?;
        let method = match self.painting.editing {
            Editing::Reference => {
                let jobs: Vec<Job> = jobs
                    .iter()
                    .zip(sources)
                    .map(|(job, source)| {
                        let (_, h, w) = source.dims3()?;
                        let noise = self.klein.noise(job.seed, job.round as u64, (h, w))?;
                        Ok(Job { prompt: job.instruction, noise, references: vec![source] })
                    })
                    .collect::<Result<_>>()?;
                let editor = self.adapted.editor.as_deref().unwrap_or(&self.klein.transformer);
                let options = self.options(self.painting.edit_guidance);
                return Ok(self.pictures(self.klein.draw_by(editor, &jobs, &options)?));
            }
            Editing::Inversion(inversion) => Method::Inversion(inversion),
            Editing::FlowEdit => Method::FlowEdit(FlowEdit::for_steps(self.painting.steps), FLOWEDIT_SOURCE_GUIDANCE),
        };
        let shown: Vec<String> = jobs.iter().map(|job| shown(job.verdicts)).collect();
        let changes: Vec<Change> = jobs
            .iter()
            .zip(sources)
            .zip(&shown)
            .map(|((job, source), shown)| Change {
                source,
                source_prompt: shown,
                prompt: job.target.words(),
                // Another edit of the same picture takes other noise, and none of a neighbouring seed's.
                seed: seed_of_drawing(job.seed, job.round),
            })
            .collect();
        Ok(self.pictures(self.klein.change(&changes, method, &self.options(self.painting.guidance.into()))?))
    }
}

/// What the Checker saw, as a prompt without places: the claims that hold, and what was seen instead of the others.
fn shown(verdicts: &[Verdict]) -> String {
    let placeless = |phrase: &str| {
        let words = phrase.split_whitespace().filter(|word| !word.contains(|c: char| c.is_ascii_digit()));
        words.collect::<Vec<_>>().join(" ")
    };
    let said = verdicts.iter().map(|v| match (&v.claim, v.yes) {
        // That there is nothing else describes nothing.
        (Claim::Only(_), true) => String::new(),
        (claim, true) => claim.to_string(),
        (_, false) => joined(v.reflection.split(',').map(placeless), ", "),
    });
    joined(said, "; ")
}

fn joined(parts: impl Iterator<Item = String>, by: &str) -> String {
    parts.filter(|part| !part.is_empty()).collect::<Vec<_>>().join(by)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{flow::Unwatched, models::Folder, rig::roles::Target};
    use candle_core::{DType, Device};
    use std::path::Path;

    #[test]
    fn neighbouring_seeds_share_no_noise_of_their_edits() {
        let folder = Folder::from(Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/klein"));
        let klein = Arc::new(Klein::open(&folder, DType::F32, &Device::Cpu, Vec::new()).unwrap());
        let target = Target::words_alone("a ball");
        for editing in [Editing::FlowEdit, Editing::Inversion(Inversion::RfInversion)] {
            let (solver, guidance, size, batch) = (Solver::Euler, 1.0, (64, 64), 1);
            let edit_guidance = guidance.into();
            let painting = Painting { steps: 4, solver, guidance, edit_guidance, editing, size, batch };
            let painter = Painter::new(klein.clone(), painting, Box::new(Unwatched));
            let picture = Picture::from_latents(painter.noise(0).unwrap(), painter.decode.clone());
            let edited = |seed, round| -> Vec<f32> {
                let job = Edit { target: &target, picture: &picture, verdicts: &[], instruction: "", seed, round };
                let edited = painter.edit(&[job]).unwrap().remove(0);
                edited.latents().unwrap().flatten_all().unwrap().to_vec1().unwrap()
            };
            assert!(edited(7, 2) == edited(7, 2) && edited(7, 2) != edited(7, 1), "{editing:?}");
            assert!(edited(7, 2) != edited(8, 1), "{editing:?}");
        }
    }

    #[test]
    fn the_source_is_described_by_what_holds() {
        let verdict = |claim, yes, reflection: &str| Verdict {
            claim,
            yes,
            p_yes: f64::from(u8::from(yes)),
            reflection: reflection.into(),
        };
        let object = |text: &str| Claim::Object(text.into());
        let mut verdicts = vec![
            verdict(object("red ball"), true, ""),
            verdict(object("ring"), false, "blue ring 30 45"),
            verdict(object("star"), false, ""),
            verdict(Claim::Only(vec!["red ball".into()]), true, "red ball 70 45"),
        ];
        assert_eq!(shown(&verdicts), "red ball; blue ring");
        let both = "large red ball 70 45, small blue cube 25 40";
        verdicts[3] = verdict(Claim::Only(vec!["red ball".into()]), false, both);
        assert_eq!(shown(&verdicts), "red ball; blue ring; large red ball, small blue cube");
    }
}
