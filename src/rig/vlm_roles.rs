//! Checker and Actor by one Qwen3-VL. The Actor may have adapters of its own on the Checker's weights: what is trained to write
//! edits must not change what is thought of them.
//!
//! A picture is read once: its keys and values are shared by the questions about all its claims. A verdict's P(yes) is
//! the share of "yes" where the answer's schema leaves only the two words, behind what the Checker says to have seen.
//!
//! A vision tower cuts a picture into patches, and what it makes of a shape depends on where the cuts fall. The Checker may
//! therefore look several times, at the picture moved by a few pixels; a verdict is then the mean of what it says.

use super::{
    calibration::Calibration,
    prompts,
    roles::{Actor, Checker, Claim, Lister, Picture, Reflection, Situation, Target, Verdict},
};
use crate::{
    models::Folder,
    scene::{
        graph::{Object, Relation, SceneGraph},
        iou::Lists,
    },
    tensor::rng::Stream,
    vlm::{
        Vlm,
        decode::{self, Sampling},
        image::moved,
        prefix::Question,
    },
};
use anyhow::{Context, Result};
use image::RgbImage;
use serde::{Deserialize, de::DeserializeOwned};
use serde_json::Value;
use std::{borrow::Cow, collections::BTreeSet, ops::Range, sync::Arc};

/// Questions that are answered together at most; it bounds the memory that their keys and values take.
const ROWS: usize = 64;
/// An Actor whose edit did not help writes so many others at this temperature: the same words again would not help either.
const CANDIDATES: usize = 8;
const TEMPERATURE: f64 = 0.7;
/// By how much the picture is moved for each look of the Checker, to the right and down, in 128ths of its sides.
const MOVES: [[i64; 2]; 5] = [[0, 0], [3, 3], [-3, -2], [3, -3], [-2, 3]];
/// The most looks.
pub const LOOKS: usize = MOVES.len();
/// Tokens at most of a verdict with its reflection.
pub const VERDICT: usize = 56;
/// Tokens at most of an edit with its reflection.
pub const EDIT: usize = 128;
/// Tokens at most of a scene graph.
const GRAPH: usize = 512;
/// Triples at most that are listed of a picture.
const MOST: usize = 64;

/// A vision-language model in the roles of Checker and Actor.
#[derive(Clone)]
pub struct Critic {
    pub checker: Arc<Vlm>,
    pub actor: Arc<Vlm>,
    /// How many times the Checker looks at a picture, up to [`LOOKS`].
    pub looks: usize,
    /// Of the Checker's probabilities.
    pub calibration: Calibration,
}

impl Critic {
    /// One model in both roles; it looks at a picture once, and what it says is taken as it is.
    pub fn new(vlm: Arc<Vlm>) -> Self {
        Self { checker: vlm.clone(), actor: vlm, looks: 1, calibration: Calibration::default() }
    }

    /// The model of a folder, with the calibration that is there.
    pub fn of(vlm: Vlm, folder: &Folder) -> Result<Self> {
        Ok(Self { calibration: Calibration::open(folder)?, ..Self::new(Arc::new(vlm)) })
    }

    /// Lets the Checker look so many times.
    pub fn with_looks(self, looks: usize) -> Self {
        Self { looks: looks.clamp(1, LOOKS), ..self }
    }

    /// The same Checker, and as Actor another model, if there is one.
    pub fn with_actor(self, actor: Option<Arc<Vlm>>) -> Self {
        Self { actor: actor.unwrap_or(self.actor), ..self }
    }

    /// The scene graph of a text, as the model reads it; between the objects that are named, if any are.
    pub fn parse(&self, text: &str, named: &[Object]) -> Result<SceneGraph> {
        // One thing lies nowhere: there is nothing to ask.
        if let [only] = named {
            return Ok(SceneGraph { objects: vec![only.clone()], relations: Vec::new() });
        }
        let named: Vec<String> = named.iter().map(Object::phrase).collect();
        self.parse_by(&[text], &prompts::parse_schema(&named))?.pop().context("the VLM gave no answer")
    }

    /// The scene graphs of some texts.
    pub fn parse_each(&self, texts: &[&str]) -> Result<Vec<SceneGraph>> {
        self.parse_by(texts, &prompts::parse_schema(&[]))
    }

    fn parse_by(&self, texts: &[&str], schema: &Value) -> Result<Vec<SceneGraph>> {
        let sampling = Sampling { temperature: 0.0, max_tokens: GRAPH };
        let looked = self.checker.look(&[])?;
        let mut graphs = Vec::with_capacity(texts.len());
        for batch in texts.chunks(ROWS) {
            let asked: Vec<String> = batch.iter().map(|text| prompts::parse(text)).collect();
            let questions: Vec<Question> = asked.iter().map(|text| Question { picture: None, text }).collect();
            let unused: Vec<Stream> = (0..batch.len()).map(|i| Stream::new(0, "parse", i as u64)).collect();
            for answer in self.checker.answer(&looked, &questions, schema, sampling, &unused)? {
                graphs.push(read::<Read>(&self.checker.chat.decode(&answer.ids)?)?.graph());
            }
        }
        Ok(graphs)
    }

    /// Verdicts by one look at each of some pictures, whose claims fit into one batch.
    fn check_batch(&self, looks: &[(Cow<RgbImage>, &Target)]) -> Result<Vec<Vec<Verdict>>> {
        #[derive(Deserialize)]
        struct Answer {
            reflection: String,
        }
        let pictures: Vec<&RgbImage> = looks.iter().map(|(picture, _)| picture.as_ref()).collect();
        let asked: Vec<(usize, &Claim)> =
            looks.iter().enumerate().flat_map(|(i, (_, target))| target.claims.iter().map(move |c| (i, c))).collect();
        let texts: Vec<String> = asked.iter().map(|(_, claim)| prompts::check(claim)).collect();
        let questions: Vec<Question> =
            asked.iter().zip(&texts).map(|((i, _), text)| Question { picture: Some(*i), text }).collect();
        let looked = self.checker.look(&pictures)?;
        let schema = prompts::check_schema();
        let decisions = self.checker.decide(&looked, &questions, &schema, prompts::VERDICTS, VERDICT)?;
        let mut verdicts: Vec<Vec<Verdict>> = looks.iter().map(|_| Vec::new()).collect();
        for ((i, claim), decision) in asked.iter().zip(decisions) {
            let p_yes = decision.probability;
            let Answer { reflection } = read(&decision.text)?;
            verdicts[*i].push(Verdict { claim: (*claim).clone(), yes: p_yes >= 0.5, p_yes, reflection });
        }
        verdicts.iter_mut().for_each(|verdicts| agree(verdicts));
        Ok(verdicts)
    }
}

/// What is seen of a picture at a look.
fn view(picture: &RgbImage, look: usize) -> Cow<'_, RgbImage> {
    match MOVES[look] {
        [0, 0] => Cow::Borrowed(picture),
        by => Cow::Owned(moved(picture, pixels(by, picture))),
    }
}

/// A move in pixels.
fn pixels(by: [i64; 2], picture: &RgbImage) -> [i64; 2] {
    let scaled = |by: i64, side: u32| (by as f64 * f64::from(side) / 128.0).round() as i64;
    [scaled(by[0], picture.width()), scaled(by[1], picture.height())]
}

/// The calibrated mean of what the looks at one picture say of its claims, with the words of the first look that decided
/// alike.
fn mean(looks: &[Vec<Verdict>], calibration: &Calibration) -> Vec<Verdict> {
    let claims = looks.first().map_or(0, |verdicts| verdicts.len());
    let of_claim = |c: usize| {
        let p_yes = looks.iter().map(|verdicts| verdicts[c].p_yes).sum::<f64>() / looks.len() as f64;
        let p_yes = calibration.of(&looks[0][c].claim).apply(p_yes);
        // To four digits: what is behind them differs between machines.
        let p_yes = (p_yes * 1e4).round() / 1e4;
        let yes = p_yes >= 0.5;
        let told = looks.iter().map(|verdicts| &verdicts[c]).find(|v| v.yes == yes).unwrap_or(&looks[0][c]);
        Verdict { yes, p_yes, ..told.clone() }
    };
    let mut verdicts: Vec<Verdict> = (0..claims).map(of_claim).collect();
    agree(&mut verdicts);
    verdicts
}

/// Makes the verdicts on one picture consistent: a relation is at most as probable as the objects it is between, which a
/// VLM that looks at places alone forgets.
fn agree(verdicts: &mut [Verdict]) {
    let there: Vec<(String, f64)> = verdicts
        .iter()
        .filter_map(|v| match &v.claim {
            Claim::Object(object) => Some((object.clone(), v.p_yes)),
            Claim::Relation { .. } | Claim::Only(_) => None,
        })
        .collect();
    for verdict in verdicts {
        if let Claim::Relation { subject, object, .. } = &verdict.claim {
            let ends = there.iter().filter(|(name, _)| name == subject || name == object);
            // What is not known stays so, which `f64::min` would hide.
            let least = |a: f64, b: f64| if a.is_nan() || b.is_nan() { f64::NAN } else { a.min(b) };
            verdict.p_yes = ends.map(|(_, p)| *p).fold(verdict.p_yes, least);
            verdict.yes = verdict.p_yes >= 0.5;
        }
    }
}

/// The reflection whose edit was written most often of those that are not among `earlier`, or of all if none is new; the
/// first of equals.
fn most_wanted(written: Vec<Reflection>, earlier: &[&str]) -> Option<Reflection> {
    let rank = |i: usize| {
        let edit = &written[i].edit;
        (!earlier.contains(&edit.as_str()), written.iter().filter(|other| other.edit == *edit).count())
    };
    let best = (0..written.len()).reduce(|best, i| if rank(i) > rank(best) { i } else { best })?;
    written.into_iter().nth(best)
}

fn read<T: DeserializeOwned>(answer: &str) -> Result<T> {
    serde_json::from_str(answer).with_context(|| format!("the VLM's answer is not what was asked for: {answer}"))
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

/// The jobs that edits are asked for together, with the number of candidates of each and their temperature: those that are
/// asked `again`, after an edit that did not help, and the others, in batches of at most `ROWS` candidates.
fn together(again: &[bool]) -> Vec<(Vec<usize>, usize, f64)> {
    let (again, first): (Vec<usize>, Vec<usize>) = (0..again.len()).partition(|job| again[*job]);
    let batches = |jobs: &[usize], candidates: usize, temperature: f64| -> Vec<_> {
        jobs.chunks(ROWS / candidates).map(|batch| (batch.to_vec(), candidates, temperature)).collect()
    };
    [batches(&first, 1, 0.0), batches(&again, CANDIDATES, TEMPERATURE)].concat()
}

impl Checker for Critic {
    fn check(&self, jobs: &[(&Picture, &Target)]) -> Result<Vec<Vec<Verdict>>> {
        let asked = (0..jobs.len()).filter(|job| !jobs[*job].1.claims.is_empty());
        let looks: Vec<(usize, usize)> = asked.flat_map(|job| (0..self.looks).map(move |look| (job, look))).collect();
        let mut verdicts: Vec<Vec<Vec<Verdict>>> = jobs.iter().map(|_| Vec::new()).collect();
        for batch in batches(looks.iter().map(|(job, _)| jobs[*job].1.claims.len())) {
            let batch = &looks[batch];
            let seen = |(job, look): &(usize, usize)| Ok((view(jobs[*job].0.pixels()?, *look), jobs[*job].1));
            let seen = batch.iter().map(seen).collect::<Result<Vec<_>>>()?;
            for ((job, _), found) in batch.iter().zip(self.check_batch(&seen)?) {
                verdicts[*job].push(found);
            }
        }
        Ok(verdicts.iter().map(|looks| mean(looks, &self.calibration)).collect())
    }
}

impl Actor for Critic {
    fn reflect(&self, jobs: &[Situation]) -> Result<Vec<Reflection>> {
        #[derive(Deserialize)]
        struct Answer {
            reflection: String,
            edit: String,
        }
        let schema = prompts::reflect_schema();
        let mut edits = vec![None; jobs.len()];
        let again: Vec<bool> = jobs.iter().map(|job| !job.earlier.is_empty()).collect();
        for (numbers, candidates, temperature) in together(&again) {
            let batch: Vec<&Situation> = numbers.iter().map(|i| &jobs[*i]).collect();
            let pictures: Vec<&RgbImage> = batch.iter().map(|job| job.picture.pixels()).collect::<Result<_>>()?;
            let text = |job: &&Situation| prompts::reflect(job.target.words(), job.verdicts, job.earlier);
            let texts: Vec<String> = batch.iter().map(text).collect();
            let all = || (0..batch.len()).flat_map(|i| (0..candidates).map(move |k| (i, k)));
            let questions: Vec<Question> = all().map(|(i, _)| Question { picture: Some(i), text: &texts[i] }).collect();
            let stream = |(i, k): (usize, usize)| {
                let job = batch[i];
                Stream::new(job.seed, &format!("reflect {k}"), job.round as u64)
            };
            let streams: Vec<Stream> = all().map(stream).collect();
            let sampling = Sampling { temperature, max_tokens: EDIT };
            let looked = self.actor.look(&pictures)?;
            let written = self.actor.answer(&looked, &questions, &schema, sampling, &streams)?;
            for (i, written) in numbers.into_iter().zip(written.chunks(candidates)) {
                let reflection = |answer: &decode::Answer| -> Result<Reflection> {
                    let Answer { reflection: thought, edit } = read(&self.actor.chat.decode(&answer.ids)?)?;
                    Ok(Reflection { thought, edit })
                };
                let written = written.iter().map(reflection).collect::<Result<Vec<_>>>()?;
                edits[i] = most_wanted(written, jobs[i].earlier);
            }
        }
        Ok(edits.into_iter().flatten().collect())
    }
}

impl Lister for Critic {
    fn list(&self, pictures: &[&Picture], graph: &SceneGraph) -> Result<Vec<Lists>> {
        #[derive(Deserialize)]
        struct Answer {
            scene_graph: Vec<(String, String, String)>,
            object_list: Vec<String>,
            predicate_list: Vec<String>,
        }
        let distinct = |words: &mut dyn Iterator<Item = &String>| words.cloned().collect::<BTreeSet<_>>();
        // As in the authors' code, what no triple names is not offered.
        let related = graph.objects.iter().enumerate().filter(|(i, _)| graph.is_related(*i));
        let objects = Vec::from_iter(distinct(&mut related.map(|(_, object)| &object.label)));
        let predicates = Vec::from_iter(distinct(&mut graph.relations.iter().map(|relation| &relation.predicate)));
        let most = (2 * graph.relations.len()).min(MOST);
        let (text, schema) = (prompts::list(&objects, &predicates), prompts::list_schema(&objects, &predicates, most));
        let longest = |words: &[String]| words.iter().map(String::len).max().unwrap_or(0);
        let (object, predicate) = (longest(&objects), longest(&predicates));
        // A token is a byte at least; brackets, quotes and commas are a few more.
        let max_tokens = 64
            + most * (2 * object + predicate + 12)
            + objects.len() * (object + 4)
            + predicates.len() * (predicate + 4);
        let sampling = Sampling { temperature: 0.0, max_tokens };
        let mut lists = Vec::with_capacity(pictures.len());
        for batch in pictures.chunks(ROWS / 4) {
            let seen: Vec<&RgbImage> = batch.iter().map(|picture| picture.pixels()).collect::<Result<_>>()?;
            let questions: Vec<Question> =
                (0..batch.len()).map(|i| Question { picture: Some(i), text: &text }).collect();
            let unused: Vec<Stream> = (0..batch.len()).map(|i| Stream::new(0, "list", i as u64)).collect();
            let looked = self.checker.look(&seen)?;
            for answer in self.checker.answer(&looked, &questions, &schema, sampling, &unused)? {
                let Answer { scene_graph, object_list, predicate_list } =
                    read(&self.checker.chat.decode(&answer.ids)?)?;
                lists.push(Lists { triples: scene_graph, objects: object_list, predicates: predicate_list });
            }
        }
        Ok(lists)
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
        // What is said of a thing and itself means nothing.
        let means = |(s, r, o): &(usize, String, usize)| named(*s) && named(*o) && s != o && !r.trim().is_empty();
        let relations = self.relations.into_iter().filter(means);
        let relations =
            relations.map(|(s, predicate, o)| Relation { subject: number(s), predicate, object: number(o) }).collect();
        let objects = objects.iter().filter(|o| !o.label.is_empty()).cloned().collect();
        SceneGraph { objects, relations }
    }
}

#[cfg(test)]
mod tests {
    use super::{super::calibration::Scaling, *};

    #[test]
    fn a_relation_is_at_most_as_probable_as_its_objects() {
        let verdict = |claim: Claim, p_yes| Verdict { claim, yes: p_yes >= 0.5, p_yes, reflection: String::new() };
        let relation = |subject: &str, object: &str| Claim::Relation {
            subject: subject.into(),
            relation: "left of".into(),
            object: object.into(),
        };
        let mut verdicts = [
            verdict(Claim::Object("ball".into()), 0.9),
            verdict(Claim::Object("cube".into()), 0.2),
            verdict(relation("ball", "cube"), 0.8),
            verdict(relation("ball", "star"), 0.8),
        ];
        agree(&mut verdicts);
        assert_eq!(verdicts.each_ref().map(|v| (v.p_yes, v.yes))[2..], [(0.2, false), (0.8, true)]);
    }

    #[test]
    fn several_looks_are_one_verdict() {
        let verdict = |p_yes: f64, reflection: &str| Verdict {
            claim: Claim::Object("ball".into()),
            yes: p_yes >= 0.5,
            p_yes,
            reflection: reflection.into(),
        };
        let (yes, no) = (vec![verdict(0.6, "ball")], vec![verdict(0.1, "cube")]);
        let mean = |looks: &[Vec<Verdict>]| mean(looks, &Calibration::default());
        assert_eq!(mean(&[yes.clone(), no.clone()]), [verdict(0.35, "cube")]);
        assert_eq!(mean(std::slice::from_ref(&yes)), yes);
        assert_eq!(mean(&[]), []);
        // None says what the mean is.
        assert_eq!(mean(&[vec![verdict(0.49996, "cone")]]), [verdict(0.5, "cone")]);
        let trusting = Calibration { object: Scaling { scale: 1.0, bias: 3.0 }, ..Calibration::default() };
        assert_eq!(super::mean(&[no], &trusting), [verdict(0.6906, "cube")]);
        assert_eq!(pixels([3, -2], &RgbImage::new(256, 64)), [6, -1]);
    }

    #[test]
    fn an_edit_that_did_not_help_is_not_asked_for_again() {
        let wanted = |edits: &[&str], earlier: &[&str]| {
            let written = edits.iter().map(|edit| Reflection { thought: String::new(), edit: (*edit).into() });
            most_wanted(written.collect(), earlier).map(|reflection| reflection.edit)
        };
        assert_eq!(wanted(&["a", "b", "c", "b", "a", "a"], &["a"]), Some("b".into()));
        assert_eq!(wanted(&["a", "c", "b"], &["a"]), Some("c".into()));
        assert_eq!(wanted(&["a", "b", "b"], &["a", "b"]), Some("b".into()));
        assert_eq!(wanted(&["a"], &[]), Some("a".into()));
        assert_eq!(wanted(&[], &["a"]), None);
    }

    #[test]
    fn batches_are_full_but_not_overfull() {
        assert_eq!(batches([30, 30, 30, 100, 1].into_iter()), [0..2, 2..3, 3..4, 4..5]);
        assert_eq!(batches([0; 0].into_iter()), [0..0; 0]);
    }

    #[test]
    fn edits_of_as_many_candidates_are_asked_for_together() {
        assert!(together(&[]).is_empty());
        let alternating: Vec<bool> = (0..140).map(|i| i % 2 == 1).collect();
        let batches = together(&alternating);
        let sizes = batches.iter().map(|(jobs, candidates, _)| (jobs.len(), *candidates)).collect::<Vec<_>>();
        let again = std::iter::repeat_n((8, CANDIDATES), 8).chain([(6, CANDIDATES)]);
        assert_eq!(sizes, [(64, 1), (6, 1)].into_iter().chain(again).collect::<Vec<_>>());
        for (jobs, candidates, temperature) in &batches {
            assert!(jobs.iter().all(|job| alternating[*job] == (*candidates > 1)));
            assert_eq!(*temperature > 0.0, *candidates > 1);
        }
        let mut all: Vec<usize> = batches.into_iter().flat_map(|(jobs, ..)| jobs).collect();
        all.sort_unstable();
        assert_eq!(all, Vec::from_iter(0..140));
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
