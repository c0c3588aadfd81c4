//! Who takes part in the loop: a Diffuser draws, a Checker judges, an Actor writes what to change, an Editor changes it.
//!
//! The paper's Inverse Diffuser is the [`Editor`]. All roles work on many pictures at once: slices in, one result for
//! each element out, in order. What a role returns for an element must not depend on the others beside it.

use crate::scene::{graph::SceneGraph, iou::Lists};
use anyhow::{Context, Result, anyhow, ensure};
use candle_core::Tensor;
use image::RgbImage;
use serde::{Deserialize, Serialize};
use std::{
    collections::HashSet,
    fmt,
    sync::{Arc, OnceLock},
};

/// One thing that a picture is asked to show, and that the Checker can deny.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Claim {
    /// An object with its attributes: "large red ball".
    Object(String),
    /// A relation between two of them, as the paper's triples have it: "large red ball" "left of" "small blue cube".
    Relation { subject: String, relation: String, object: String },
    /// Nothing else than these objects: what a prompt that tells all of a picture claims without saying it.
    Only(Vec<String>),
}

impl fmt::Display for Claim {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Object(object) => f.write_str(object),
            Self::Relation { subject, relation, object } => write!(f, "{subject} {relation} {object}"),
            Self::Only(objects) => write!(f, "nothing but {}", objects.join(", ")),
        }
    }
}

/// What a picture is asked to show: the words for those who draw, the claims for the one who checks.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Target {
    pub prompt: String,
    /// What Diffuser and Actor read instead of the prompt: models that know few words do best with these.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub drawn_as: Option<String>,
    pub claims: Vec<Claim>,
}

impl Target {
    /// Claims each object of `graph`, then each relation. A relation with a missing end is left out.
    pub fn new(prompt: impl Into<String>, graph: &SceneGraph) -> Self {
        let phrases: Vec<String> = graph.objects.iter().map(|o| o.phrase()).collect();
        let mut claims: Vec<Claim> = phrases.iter().cloned().map(Claim::Object).collect();
        claims.extend(graph.relations.iter().filter_map(|r| {
            let (subject, object) = (phrases.get(r.subject)?.clone(), phrases.get(r.object)?.clone());
            Some(Claim::Relation { subject, relation: r.predicate.clone(), object })
        }));
        Self { claims, ..Self::words_alone(prompt) }
    }

    /// Nothing that could be checked.
    pub fn words_alone(prompt: impl Into<String>) -> Self {
        Self { prompt: prompt.into(), drawn_as: None, claims: Vec::new() }
    }

    /// To be drawn from these words.
    pub fn drawn_as(self, words: String) -> Self {
        Self { drawn_as: (words != self.prompt).then_some(words), ..self }
    }

    /// What Diffuser and Actor read.
    pub fn words(&self) -> &str {
        self.drawn_as.as_deref().unwrap_or(&self.prompt)
    }

    /// The objects that are claimed.
    fn objects(&self) -> impl Iterator<Item = &str> {
        self.claims.iter().filter_map(|claim| match claim {
            Claim::Object(object) => Some(object.as_str()),
            Claim::Relation { .. } | Claim::Only(_) => None,
        })
    }

    /// An object that is claimed twice in the same words, if there is one.
    pub fn said_twice(&self) -> Option<&str> {
        let mut seen = HashSet::new();
        self.objects().find(|object| !seen.insert(*object))
    }

    /// Claims besides that nothing else is in the picture, where there is any object at all. Says so once.
    pub fn and_nothing_else(mut self) -> Self {
        self.claims.retain(|claim| !matches!(claim, Claim::Only(_)));
        let objects: Vec<String> = self.objects().map(str::to_owned).collect();
        if !objects.is_empty() {
            self.claims.push(Claim::Only(objects));
        }
        self
    }
}

/// The Checker's answer to one claim.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Verdict {
    pub claim: Claim,
    pub yes: bool,
    /// The probability of "yes" by the Checker's logits.
    pub p_yes: f64,
    /// What was seen of it and where, in a few words.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub reflection: String,
}

impl Verdict {
    /// That there is nothing of it.
    pub fn denied(claim: &Claim) -> Self {
        Self { claim: claim.clone(), yes: false, p_yes: 0.0, reflection: String::new() }
    }
}

/// Lists what pictures show, in the words of a graph: its labels and predicates.
pub trait Lister {
    /// What each of the pictures shows.
    fn list(&self, pictures: &[&Picture], graph: &SceneGraph) -> Result<Vec<Lists>>;
}

/// Turns latents into pixels, many at once.
pub type Decode = Arc<dyn Fn(&[Tensor]) -> Result<Vec<RgbImage>> + Send + Sync>;

/// A picture that keeps its latents, so that an edit of it needs no encoding; its pixels are made when someone looks.
/// Cheap to clone.
#[derive(Clone)]
pub struct Picture(Arc<Inner>);

struct Inner {
    latents: Option<(Tensor, Decode)>,
    pixels: OnceLock<RgbImage>,
}

impl Picture {
    pub fn from_latents(latents: Tensor, decode: Decode) -> Self {
        Self(Arc::new(Inner { latents: Some((latents, decode)), pixels: OnceLock::new() }))
    }

    pub fn from_pixels(pixels: RgbImage) -> Self {
        Self(Arc::new(Inner { latents: None, pixels: OnceLock::from(pixels) }))
    }

    /// The latents it was made from; `None` for a picture that came as pixels.
    pub fn latents(&self) -> Option<&Tensor> {
        self.0.latents.as_ref().map(|(latents, _)| latents)
    }

    /// The pixels, decoded at the first look.
    pub fn pixels(&self) -> Result<&RgbImage> {
        Self::develop(&[self])?;
        self.0.pixels.get().context("a picture without pixels and latents")
    }

    /// Decodes those that have no pixels yet, all of one decoder in one batch.
    pub fn develop(pictures: &[&Self]) -> Result<()> {
        let mut todo: Vec<&Inner> = Vec::new();
        for picture in pictures {
            let inner = &*picture.0;
            if inner.pixels.get().is_none() && !todo.iter().any(|t| std::ptr::eq(*t, inner)) {
                todo.push(inner);
            }
        }
        while let Some(decode) = todo.first().and_then(|inner| inner.latents.as_ref()).map(|(_, decode)| decode.clone())
        {
            let same = |inner: &&Inner| inner.latents.as_ref().is_some_and(|(_, d)| Arc::ptr_eq(d, &decode));
            let (batch, rest): (Vec<&Inner>, Vec<&Inner>) = todo.into_iter().partition(same);
            let latents: Vec<Tensor> = batch.iter().filter_map(|i| Some(i.latents.as_ref()?.0.clone())).collect();
            let pixels = decode(&latents)?;
            ensure!(pixels.len() == batch.len(), "the decoder made {} of {} pictures", pixels.len(), batch.len());
            for (inner, pixels) in batch.into_iter().zip(pixels) {
                // Another thread may have been faster; both made the same pixels.
                let _ = inner.pixels.set(pixels);
            }
            todo = rest;
        }
        Ok(())
    }
}

impl fmt::Debug for Picture {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let latents = self.latents().map(Tensor::dims);
        f.debug_struct("Picture").field("latents", &latents).field("developed", &self.0.pixels.get().is_some()).finish()
    }
}

/// A picture to draw.
#[derive(Clone, Copy, Debug)]
pub struct Draw<'a> {
    pub target: &'a Target,
    pub seed: u64,
}

/// What the Actor knows when it writes an edit.
#[derive(Clone, Copy, Debug)]
pub struct Situation<'a> {
    pub target: &'a Target,
    pub picture: &'a Picture,
    pub verdicts: &'a [Verdict],
    /// The edits of this picture that were made and did not help, oldest first.
    pub earlier: &'a [&'a str],
    pub seed: u64,
    pub round: usize,
}

/// What the Actor writes.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Reflection {
    /// All that is wrong, in its words; it may be silent about it.
    pub thought: String,
    /// The edit that mends some of it.
    pub edit: String,
}

/// A picture to edit.
#[derive(Clone, Copy, Debug)]
pub struct Edit<'a> {
    pub target: &'a Target,
    pub picture: &'a Picture,
    /// What the Checker found in it; nothing if it was not asked.
    pub verdicts: &'a [Verdict],
    pub instruction: &'a str,
    pub seed: u64,
    pub round: usize,
}

/// Draws pictures of prompts.
pub trait Diffuser {
    fn draw(&self, jobs: &[Draw]) -> Result<Vec<Picture>>;
}

/// Says of each claim whether a picture shows it.
pub trait Checker {
    /// For each job one verdict for each of its claims, in their order.
    fn check(&self, jobs: &[(&Picture, &Target)]) -> Result<Vec<Vec<Verdict>>>;
}

/// Reflects on what is wrong and writes the next edit.
pub trait Actor {
    fn reflect(&self, jobs: &[Situation]) -> Result<Vec<Reflection>>;
}

/// Carries an edit out.
pub trait Editor {
    fn edit(&self, jobs: &[Edit]) -> Result<Vec<Picture>>;
}

/// The Checker's score of a picture, by which it is better than another: the geometric mean of its claims' P(yes). By the
/// arithmetic mean claims that are surer than need be would outweigh one that is doubtful. `None` if there is nothing to check.
pub fn score(verdicts: &[Verdict]) -> Option<f64> {
    /// A claim counts as no less probable: one that cannot hold does not hide all others.
    const LEAST: f64 = 1e-6;
    let logarithms = verdicts.iter().map(|v| if v.p_yes < LEAST { LEAST.ln() } else { v.p_yes.ln() });
    (!verdicts.is_empty()).then(|| (logarithms.sum::<f64>() / verdicts.len() as f64).exp())
}

/// The expected share of a picture's claims that hold. `None` if there is nothing to check.
pub fn mean_probability(verdicts: &[Verdict]) -> Option<f64> {
    (!verdicts.is_empty()).then(|| verdicts.iter().map(|v| v.p_yes).sum::<f64>() / verdicts.len() as f64)
}

/// Holds a role to its promise of one result for each job.
pub fn expect_each<T>(role: &str, asked: usize, got: Vec<T>) -> Result<Vec<T>> {
    if got.len() == asked { Ok(got) } else { Err(anyhow!("{role} answered {} of {asked} jobs", got.len())) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::Device;
    use std::sync::atomic::{AtomicUsize, Ordering};

    #[test]
    fn a_target_claims_objects_first_and_relations_in_their_order() {
        let graph = crate::scene::parse::parse("a large red ball is left of a blue cube").unwrap();
        let claims: Vec<String> = Target::new("p", &graph).claims.iter().map(Claim::to_string).collect();
        assert_eq!(claims, ["large red ball", "blue cube", "large red ball left of blue cube"]);
        let closed = Target::new("p", &graph).and_nothing_else();
        assert_eq!(closed.claims[..3].iter().map(Claim::to_string).collect::<Vec<_>>(), claims);
        assert_eq!(closed.claims[3].to_string(), "nothing but large red ball, blue cube");
        assert!(Target::new("p", &SceneGraph::default()).and_nothing_else().claims.is_empty());
    }

    #[test]
    fn pixels_are_decoded_once_and_in_one_batch() {
        static CALLS: AtomicUsize = AtomicUsize::new(0);
        let decode: Decode = Arc::new(|latents: &[Tensor]| {
            CALLS.fetch_add(1, Ordering::Relaxed);
            let grey = |t: &Tensor| -> Result<RgbImage> {
                Ok(RgbImage::from_pixel(1, 1, image::Rgb([t.to_scalar::<u8>()?; 3])))
            };
            latents.iter().map(grey).collect()
        });
        let make = |n: u8| Picture::from_latents(Tensor::new(n, &Device::Cpu).unwrap(), decode.clone());
        let (a, b, c) = (make(1), make(2), Picture::from_pixels(RgbImage::new(1, 1)));
        Picture::develop(&[&a, &b, &c, &a.clone()]).unwrap();
        assert_eq!(CALLS.load(Ordering::Relaxed), 1);
        assert_eq!(a.pixels().unwrap().get_pixel(0, 0).0, [1; 3]);
        assert_eq!(b.pixels().unwrap().get_pixel(0, 0).0, [2; 3]);
        assert_eq!(CALLS.load(Ordering::Relaxed), 1);
        assert!(c.latents().is_none() && a.latents().is_some());
    }
}
