//! Checker and Actor by one Qwen3-VL.
//!
//! A picture is read once: its keys and values are shared by the questions about all its claims. A verdict's P(yes) is
//! the share of "yes" among the words that the answer's schema allows there; only a "no" is asked for its reason.

use super::{
    prompts,
    roles::{Actor, Checker, Claim, Picture, Situation, Target, Verdict},
};
use crate::{
    models::{Folder, qwen3_vl::Qwen3VL},
    scene::graph::{Object, Relation, SceneGraph},
    tensor::rng::Stream,
    vlm::{
        chat::{Chat, Message, Rendering},
        constrain::{Grammar, Progress, Vocabulary},
        decode::{Constrained, Pictures, Sampling, Session, answer},
        image::ImageProcessor,
    },
};
use anyhow::{Context, Result, ensure};
use candle_core::Tensor;
use image::RgbImage;
use serde::{Deserialize, de::DeserializeOwned};
use std::{ops::Range, sync::Arc};

/// Questions that are answered together at most; it bounds the memory that their keys and values take.
const ROWS: usize = 64;
/// The temperature of an Actor whose first edit did not help: the same words again would not help either.
const TEMPERATURE: f64 = 0.7;

/// A vision-language model in the roles of Checker and Actor.
pub struct Critic {
    model: Qwen3VL,
    chat: Chat,
    images: ImageProcessor,
    check: Grammar,
    reflect: Grammar,
    parse: Grammar,
}

impl Critic {
    /// `folder` has the tokenizer, the chat template and the image processor of `model`.
    pub fn new(model: Qwen3VL, folder: &Folder) -> Result<Self> {
        let chat = Chat::open(folder)?;
        let vocabulary = Arc::new(Vocabulary::new(&chat));
        let grammar = |schema| Grammar::new(&schema, vocabulary.clone());
        Ok(Self {
            images: ImageProcessor::open(folder)?,
            check: grammar(prompts::check_schema())?,
            reflect: grammar(prompts::reflect_schema())?,
            parse: grammar(prompts::parse_schema())?,
            model,
            chat,
        })
    }

    /// The scene graph of a text, as the model reads it.
    pub fn parse(&self, text: &str) -> Result<SceneGraph> {
        let question = prompts::parse(text);
        let tokens = self.chat.encode(&self.chat.render(&[Message::user(&question)], Rendering::default())?)?;
        let (forced, progress) = self.parse.forced(self.parse.begin())?;
        let mut session = Session::new(&self.model, 1);
        let logits = session.extend(&[[tokens, forced.clone()].concat()], None)?;
        let sampling = Sampling { temperature: 0.0, max_tokens: 512 };
        let given = Constrained { grammar: &self.parse, progress };
        let answers = answer(session, logits, sampling, &[], Some(given), &mut [Stream::new(0, "parse", 0)])?;
        let read: Read = self.whole(&forced, answers.first().map_or(&[], |a| &a.ids))?;
        Ok(read.graph())
    }

    /// An answer's JSON, of the tokens that were forced and those that were chosen.
    fn whole<T: DeserializeOwned>(&self, forced: &[u32], chosen: &[u32]) -> Result<T> {
        let text = self.chat.decode(&[forced, chosen].concat())?;
        serde_json::from_str(&text).with_context(|| format!("the VLM's answer is not what was asked for: {text}"))
    }

    /// The tokens of a conversation about one picture of `patches`: up to the picture's end, and what follows.
    fn tokens(&self, text: &str, [rows, columns]: [usize; 2]) -> Result<(Vec<u32>, Vec<u32>)> {
        let config = self.model.config();
        let conversation = self.chat.render(&[Message::about_image(text)], Rendering::default())?;
        let ids = self.chat.encode(&conversation)?;
        let count = rows * columns / config.vision_config.spatial_merge_size.pow(2);
        let place = ids.iter().position(|id| *id == config.image_token_id);
        let place = place.context("the VLM's chat template has no place for a picture")?;
        let mut head = ids[..place].to_vec();
        head.extend(std::iter::repeat_n(config.image_token_id, count));
        let mut tail = ids[place + 1..].to_vec();
        if tail.first() == Some(&config.vision_end_token_id) {
            head.push(tail.remove(0));
        }
        ensure!(!tail.is_empty(), "the VLM's chat template ends with the picture");
        Ok((head, tail))
    }

    /// Sessions that have read the beginning `head(i)` of a conversation about picture `i`.
    fn read(
        &self,
        pictures: &[&RgbImage],
        head: impl Fn(usize, [usize; 2]) -> Result<Vec<u32>>,
    ) -> Result<(Session<'_>, Tensor)> {
        let patches = self.images.patches(pictures.iter().copied(), self.model.decoder.device())?;
        let features = self.model.vision.forward(&patches)?;
        let heads: Vec<Vec<u32>> =
            patches.grids.iter().enumerate().map(|(i, grid)| head(i, *grid)).collect::<Result<_>>()?;
        let mut session = Session::new(&self.model, heads.len());
        let logits = session.extend(&heads, Some(Pictures { features: &features, grids: &patches.grids }))?;
        Ok((session, logits))
    }

    /// Verdicts on some jobs whose claims fit into one batch.
    fn check_batch(&self, jobs: &[(&Picture, &Target)]) -> Result<Vec<Vec<Verdict>>> {
        let pictures: Vec<&RgbImage> = jobs.iter().map(|(picture, _)| picture.pixels()).collect::<Result<_>>()?;
        let grids = |i: usize| -> Result<[usize; 2]> {
            let (w, h) = pictures[i].dimensions();
            let (w, h) = self.images.target(w as usize, h as usize)?;
            Ok([h / self.images.patch_size, w / self.images.patch_size])
        };
        let asked: Vec<(usize, &Claim)> =
            jobs.iter().enumerate().flat_map(|(i, (_, target))| target.claims.iter().map(move |c| (i, c))).collect();
        let (forced, progress) = self.check.forced(self.check.begin())?;
        let tails: Vec<Vec<u32>> = asked
            .iter()
            .map(|(i, claim)| Ok([self.tokens(&prompts::check(claim), grids(*i)?)?.1, forced.clone()].concat()))
            .collect::<Result<_>>()?;
        // The beginning is the same for every question.
        let (session, _) = self.read(&pictures, |_, grid| Ok(self.tokens("", grid)?.0))?;
        let mut session = session.rows(&asked.iter().map(|(i, _)| *i).collect::<Vec<_>>())?;
        let logits = session.extend(&tails, None)?.to_vec2::<f32>()?;

        let choices: Vec<(u32, bool)> = self
            .check
            .allowed(progress)
            .iter()
            .map(|token| Ok((*token, self.chat.decode(&[*token])?.starts_with('y'))))
            .collect::<Result<_>>()?;
        let p_yes: Vec<f64> = logits.iter().map(|row| p_yes(row, &choices)).collect::<Result<_>>()?;
        let denied: Vec<usize> = (0..asked.len()).filter(|i| p_yes[*i] < 0.5).collect();
        let mut reasons = self.reasons(&session, &denied, progress, &forced)?.into_iter();
        let mut verdicts: Vec<Vec<Verdict>> = jobs.iter().map(|_| Vec::new()).collect();
        for ((i, claim), p_yes) in asked.iter().zip(p_yes) {
            let yes = p_yes >= 0.5;
            let reflection = if yes { String::new() } else { reasons.next().unwrap_or_default() };
            verdicts[*i].push(Verdict { claim: (*claim).clone(), yes, p_yes, reflection });
        }
        Ok(verdicts)
    }

    /// Why not: the reflections of the rows `denied`, which have read up to the word that decides.
    fn reasons(&self, session: &Session, denied: &[usize], at: Progress, forced: &[u32]) -> Result<Vec<String>> {
        if denied.is_empty() {
            return Ok(Vec::new());
        }
        #[derive(Deserialize)]
        struct Answer {
            reflection: String,
        }
        let no = self.chat.encode("no")?;
        let behind = no.iter().try_fold(at, |at, token| self.check.after(at, *token));
        let (more, progress) = self.check.forced(behind.context("the tokenizer cannot write \"no\"")?)?;
        let said = [no, more].concat();
        let mut session = session.rows(denied)?;
        let logits = session.extend(&vec![said.clone(); denied.len()], None)?;
        let mut streams: Vec<Stream> = denied.iter().map(|i| Stream::new(0, "check", *i as u64)).collect();
        let sampling = Sampling { temperature: 0.0, max_tokens: 48 };
        let given = Constrained { grammar: &self.check, progress };
        let begun = [forced, &said].concat();
        let answers = answer(session, logits, sampling, &[], Some(given), &mut streams)?;
        answers.iter().map(|a| Ok(self.whole::<Answer>(&begun, &a.ids)?.reflection)).collect()
    }
}

/// The share of "yes" among the words that may come next, to four digits: what is behind them differs between machines.
fn p_yes(logits: &[f32], choices: &[(u32, bool)]) -> Result<f64> {
    let at = |token: &u32| logits.get(*token as usize).map_or(f64::NEG_INFINITY, |x| f64::from(*x));
    let most = choices.iter().map(|(token, _)| at(token)).fold(f64::NEG_INFINITY, f64::max);
    ensure!(most.is_finite(), "the VLM gave numbers that are not finite: its weights are broken");
    let sum = |yes: bool| choices.iter().filter(|(_, y)| *y || !yes).map(|(token, _)| (at(token) - most).exp()).sum();
    let (yes, all): (f64, f64) = (sum(true), sum(false));
    Ok((yes / all * 1e4).round() / 1e4)
}

/// Jobs in runs of at most `ROWS` questions each, or of one job that has more.
fn batches(sizes: impl Iterator<Item = usize>) -> Vec<Range<usize>> {
    let (mut batches, mut rows): (Vec<Range<usize>>, usize) = (Vec::new(), 0);
    for (i, size) in sizes.enumerate() {
        match batches.last_mut() {
            Some(batch) if rows + size <= ROWS => batch.end = i + 1,
            _ => {
                batches.push(i..i + 1);
                rows = 0;
            }
        }
        rows += size;
    }
    batches
}

impl Checker for Critic {
    fn check(&self, jobs: &[(&Picture, &Target)]) -> Result<Vec<Vec<Verdict>>> {
        let asked: Vec<usize> = (0..jobs.len()).filter(|i| !jobs[*i].1.claims.is_empty()).collect();
        let mut verdicts: Vec<Vec<Verdict>> = jobs.iter().map(|_| Vec::new()).collect();
        for batch in batches(asked.iter().map(|i| jobs[*i].1.claims.len())) {
            let batch = &asked[batch];
            let some: Vec<(&Picture, &Target)> = batch.iter().map(|i| jobs[*i]).collect();
            for (i, found) in batch.iter().zip(self.check_batch(&some)?) {
                verdicts[*i] = found;
            }
        }
        Ok(verdicts)
    }
}

impl Actor for Critic {
    fn reflect(&self, jobs: &[Situation]) -> Result<Vec<String>> {
        #[derive(Deserialize)]
        struct Answer {
            edit: String,
        }
        let (forced, progress) = self.reflect.forced(self.reflect.begin())?;
        let mut edits = Vec::with_capacity(jobs.len());
        let warm = |job: &Situation| !job.earlier.is_empty();
        for batch in jobs.chunk_by(|a, b| warm(a) == warm(b)).flat_map(|same| same.chunks(ROWS / 4)) {
            let pictures: Vec<&RgbImage> = batch.iter().map(|job| job.picture.pixels()).collect::<Result<_>>()?;
            let (session, logits) = self.read(&pictures, |i, grid| {
                let job = &batch[i];
                let text = prompts::reflect(&job.target.prompt, job.verdicts, job.earlier);
                let (head, tail) = self.tokens(&text, grid)?;
                Ok([head, tail, forced.clone()].concat())
            })?;
            let stream = |job: &Situation| Stream::new(job.seed, "reflect", job.round as u64);
            let mut streams: Vec<Stream> = batch.iter().map(stream).collect();
            let temperature = if warm(&batch[0]) { TEMPERATURE } else { 0.0 };
            let sampling = Sampling { temperature, max_tokens: 64 };
            let given = Constrained { grammar: &self.reflect, progress };
            for written in answer(session, logits, sampling, &[], Some(given), &mut streams)? {
                edits.push(self.whole::<Answer>(&forced, &written.ids)?.edit);
            }
        }
        Ok(edits)
    }
}

/// An answer to [`prompts::parse`].
#[derive(Deserialize)]
struct Read {
    objects: Vec<String>,
    relations: Vec<(usize, String, usize)>,
}

impl Read {
    /// The last word of an object is its label. What names no object is left out.
    fn graph(self) -> SceneGraph {
        let object = |text: &String| {
            let mut words: Vec<String> = text.split_whitespace().map(str::to_owned).collect();
            let label = words.pop().unwrap_or_default();
            Object::new(label, words)
        };
        let objects: Vec<Object> = self.objects.iter().map(object).collect();
        let named = |i: usize| objects.get(i).is_some_and(|o| !o.label.is_empty());
        // Numbers of those that are kept.
        let number = |i: usize| (0..i).filter(|i| named(*i)).count();
        let relations = self.relations.into_iter().filter(|(s, r, o)| named(*s) && named(*o) && !r.trim().is_empty());
        let relations =
            relations.map(|(s, predicate, o)| Relation { subject: number(s), predicate, object: number(o) }).collect();
        let objects = objects.iter().filter(|o| !o.label.is_empty()).cloned().collect();
        SceneGraph { objects, relations }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn p_yes_is_the_share_among_the_words_allowed() {
        let logits = [0.0, 2.0, 0.0, 9.0];
        let p = p_yes(&logits, &[(1, true), (2, false)]).unwrap();
        assert!((p - 1.0 / (1.0 + (-2f64).exp())).abs() < 1e-4);
        assert_eq!(p_yes(&logits, &[(7, true), (2, false)]).unwrap(), 0.0);
        assert!(p_yes(&[f32::NAN], &[(0, true)]).is_err());
    }

    #[test]
    fn batches_are_full_but_not_overfull() {
        assert_eq!(batches([30, 30, 30, 100, 1].into_iter()), [0..2, 2..3, 3..4, 4..5]);
        assert_eq!(batches([0; 0].into_iter()), [0..0; 0]);
    }

    #[test]
    fn a_graph_that_was_read_names_only_what_is_there() {
        let read = Read {
            objects: vec!["old stone tower".into(), " ".into(), "cat".into()],
            relations: vec![(2, "near".into(), 0), (1, "on".into(), 0), (0, "by".into(), 9)],
        };
        let graph = read.graph();
        assert!(graph.validate().is_ok());
        assert_eq!(graph.triples(), ["cat near old stone tower"]);
        assert_eq!(graph.objects[0].attributes, ["old", "stone"]);
    }
}
