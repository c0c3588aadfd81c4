//! Pictures read once and asked many questions: the vision tower's features and the decoder's keys and values of a
//! picture, and of the words before the question, are computed once and shared.

use super::{
    Vlm,
    constrain::{Grammar, Progress},
    decode::{Answer, Constrained, Pictures, Sampling, Session, answer},
};
use crate::{models::qwen3_vl::Patches, tensor::rng::Stream};
use anyhow::{Context, Result, ensure};
use candle_core::Tensor;
use serde_json::Value;

/// Pictures that were read.
pub struct Looked<'m> {
    vlm: &'m Vlm,
    /// A row for each picture.
    session: Session<'m>,
    grids: Vec<[usize; 2]>,
    /// The ids that each row has read.
    read: Vec<Vec<u32>>,
}

/// A question about the picture `picture`, or about none.
#[derive(Clone, Copy, Debug)]
pub struct Question<'a> {
    pub picture: Option<usize>,
    pub text: &'a str,
}

/// Which of two words an answer takes at its first choice, and how.
#[derive(Clone, Debug)]
pub struct Decision {
    /// The probability of the first word against the second.
    pub probability: f64,
    /// The whole answer, with the likelier of the words.
    pub text: String,
}

impl<'m> Looked<'m> {
    pub(super) fn new(vlm: &'m Vlm, patches: &Patches) -> Result<Self> {
        let mut session = Session::new(&vlm.model, patches.grids.len());
        let read: Vec<Vec<u32>> = patches.grids.iter().map(|grid| vlm.prefix(*grid)).collect::<Result<_>>()?;
        if !read.is_empty() {
            let features = vlm.model.vision.forward(patches)?;
            session.extend(&read, Some(Pictures { features: &features, grids: &patches.grids }))?;
        }
        Ok(Self { vlm, session, grids: patches.grids.clone(), read })
    }

    /// Asks the questions: a session with a row for each, which has read `head` behind it, and the logits there.
    pub fn ask(&self, questions: &[Question], head: &[u32]) -> Result<(Session<'m>, Tensor)> {
        let tail = |question: &Question| {
            let grid = question.picture.map(|i| self.grids.get(i).copied().context("no such picture was read"));
            let ids = self.vlm.question(question.text, grid.transpose()?)?;
            let read = question.picture.map_or(&[][..], |i| &self.read[i]);
            let rest = ids.strip_prefix(read).context("the chat template writes text before the picture")?;
            Ok([rest, head].concat())
        };
        let tails: Vec<Vec<u32>> = questions.iter().map(tail).collect::<Result<_>>()?;
        let pictures: Option<Vec<usize>> = questions.iter().map(|q| q.picture).collect();
        let mut session = match pictures {
            Some(pictures) => self.session.rows(&pictures)?,
            None => {
                ensure!(
                    questions.iter().all(|q| q.picture.is_none()),
                    "questions with and without a picture are not asked together"
                );
                Session::new(&self.vlm.model, questions.len())
            }
        };
        let logits = session.extend(&tails, None)?;
        Ok((session, logits))
    }
}

impl Vlm {
    /// The ids that are read of a picture before it is known what will be asked.
    pub fn prefix(&self, grid: [usize; 2]) -> Result<Vec<u32>> {
        let config = self.model.config();
        let mut ids = self.question("", Some(grid))?;
        let last = ids.iter().rposition(|id| *id == config.image_token_id);
        let last = last.context("the chat template shows no picture")?;
        let end = if ids.get(last + 1) == Some(&config.vision_end_token_id) { last + 2 } else { last + 1 };
        ids.truncate(end);
        Ok(ids)
    }

    /// For every question the probability that its answer in JSON of `schema`, whose first choice is between two words,
    /// takes the first of them.
    pub fn odds(&self, looked: &Looked, questions: &[Question], schema: &Value, words: [&str; 2]) -> Result<Vec<f64>> {
        if questions.is_empty() {
            return Ok(Vec::new());
        }
        let grammar = self.grammar(schema)?;
        let (head, progress) = grammar.forced(grammar.begin())?;
        let (_, logits) = looked.ask(questions, &head)?;
        logits.to_vec2::<f32>()?.iter().map(|logits| odds(logits, &grammar, progress, words)).collect()
    }

    /// Answers every question in JSON of `schema`; question `i` draws from `streams[i]`.
    pub fn answer(
        &self,
        looked: &Looked,
        questions: &[Question],
        schema: &Value,
        sampling: Sampling,
        streams: &mut [Stream],
    ) -> Result<Vec<Answer>> {
        if questions.is_empty() {
            return Ok(Vec::new());
        }
        let grammar = self.grammar(schema)?;
        let (head, progress) = grammar.forced(grammar.begin())?;
        let (session, logits) = looked.ask(questions, &head)?;
        let constrained = Some(Constrained { grammar: &grammar, progress });
        let mut answers = answer(session, logits, sampling, &self.ends, constrained, streams)?;
        for answer in &mut answers {
            answer.precede(&head);
        }
        Ok(answers)
    }

    /// Answers every question in JSON of `schema`, whose first choice is between the words `first` and `second`: the
    /// likelier one is taken, then the answer goes on greedily.
    pub fn decide(
        &self,
        looked: &Looked,
        questions: &[Question],
        schema: &Value,
        [first, second]: [&str; 2],
        max_tokens: usize,
    ) -> Result<Vec<Decision>> {
        if questions.is_empty() {
            return Ok(Vec::new());
        }
        let grammar = self.grammar(schema)?;
        let (head, progress) = grammar.forced(grammar.begin())?;
        let (mut session, logits) = looked.ask(questions, &head)?;
        let probability: Vec<f64> = logits
            .to_vec2::<f32>()?
            .iter()
            .map(|logits| odds(logits, &grammar, progress, [first, second]))
            .collect::<Result<_>>()?;

        let (mut texts, mut tails, mut at) = (Vec::new(), Vec::new(), Vec::new());
        for p in &probability {
            let word = if *p >= 0.5 { first } else { second };
            let mut ids = self.chat.encode(word)?;
            let behind = ids.iter().try_fold(progress, |at, id| grammar.after(at, *id));
            let (forced, next) =
                grammar.forced(behind.context("the schema does not offer the words to choose from")?)?;
            ids.extend(forced);
            texts.push([head.as_slice(), &ids].concat());
            tails.push(ids);
            at.push(next);
        }
        let logits = session.extend(&tails, None)?;
        // After either word the grammar may stand elsewhere: the rows go on in two groups.
        let mut decisions: Vec<Decision> =
            probability.iter().map(|p| Decision { probability: *p, text: String::new() }).collect();
        while let Some(progress) = at.iter().zip(&decisions).find(|(_, d)| d.text.is_empty()).map(|(at, _)| *at) {
            let rows: Vec<usize> =
                (0..at.len()).filter(|i| at[*i] == progress && decisions[*i].text.is_empty()).collect();
            let index: Vec<u32> = rows.iter().map(|i| *i as u32).collect();
            let rest = if grammar.is_done(progress) {
                vec![Answer::default(); rows.len()]
            } else {
                let logits = logits.index_select(&Tensor::new(index, logits.device())?, 0)?;
                let constrained = Some(Constrained { grammar: &grammar, progress });
                let sampling = Sampling { temperature: 0.0, max_tokens };
                let mut unused: Vec<Stream> = rows.iter().map(|i| Stream::new(0, "greedy", *i as u64)).collect();
                answer(session.rows(&rows)?, logits, sampling, &self.ends, constrained, &mut unused)?
            };
            for (row, rest) in rows.iter().zip(rest) {
                decisions[*row].text = self.chat.decode(&[texts[*row].as_slice(), &rest.ids].concat())?;
                ensure!(!decisions[*row].text.is_empty(), "an answer without text");
            }
        }
        Ok(decisions)
    }
}

/// The probability that the text goes on with the first word rather than the second: tokens that begin either count.
fn odds(logits: &[f32], grammar: &Grammar, at: Progress, words: [&str; 2]) -> Result<f64> {
    let allowed = grammar.allowed(at);
    let logit = |token: &u32| logits.get(*token as usize).copied().unwrap_or(f32::NEG_INFINITY);
    let best = allowed.iter().map(logit).fold(f32::NEG_INFINITY, f32::max);
    ensure!(best.is_finite(), "the model's logits are not finite");
    let mut mass = [0.0; 2];
    for token in allowed.iter() {
        for (mass, word) in mass.iter_mut().zip(words) {
            if grammar.begins(*token, word) {
                *mass += f64::from(logit(token) - best).exp();
            }
        }
    }
    ensure!(mass[0] + mass[1] > 0.0, "the schema does not offer the words to choose from");
    Ok(mass[0] / (mass[0] + mass[1]))
}
