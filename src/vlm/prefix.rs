//! Pictures read once and asked many questions: the vision tower's features and the decoder's keys and values of a
//! picture, and of the words before the question, are computed once and shared.

use super::{
    Vlm,
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

/// An answer that decides between two words.
#[derive(Clone, Debug)]
pub struct Decision {
    /// The probability of the first word against the second.
    pub probability: f64,
    /// The whole answer.
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

    /// Answers every question in JSON of `schema`; question `i` draws from `streams[i]`.
    pub fn answer(
        &self,
        looked: &Looked,
        questions: &[Question],
        schema: &Value,
        sampling: Sampling,
        streams: &[Stream],
    ) -> Result<Vec<Answer>> {
        self.fill(looked, questions, (schema, None), sampling, streams)
    }

    /// Answers every question greedily in JSON of `schema`, which has a choice between two words in it.
    pub fn decide(
        &self,
        looked: &Looked,
        questions: &[Question],
        schema: &Value,
        words: [&str; 2],
        max_tokens: usize,
    ) -> Result<Vec<Decision>> {
        let sampling = Sampling { temperature: 0.0, max_tokens };
        let unused: Vec<Stream> = (0..questions.len()).map(|i| Stream::new(0, "greedy", i as u64)).collect();
        let answers = self.fill(looked, questions, (schema, Some(words)), sampling, &unused)?;
        let decision = |answer: Answer| {
            let probability = answer.odds.context("the schema does not offer the words to choose from")?;
            Ok(Decision { probability, text: self.chat.decode(&answer.ids)? })
        };
        answers.into_iter().map(decision).collect()
    }

    fn fill(
        &self,
        looked: &Looked,
        questions: &[Question],
        (schema, words): (&Value, Option<[&str; 2]>),
        sampling: Sampling,
        streams: &[Stream],
    ) -> Result<Vec<Answer>> {
        if questions.is_empty() {
            return Ok(Vec::new());
        }
        let grammar = self.grammar(schema)?;
        let (head, progress) = grammar.forced(grammar.begin())?;
        let constrained = Some(Constrained { grammar: &grammar, progress, words });
        let (session, logits) = looked.ask(questions, &head)?;
        let mut answers = answer(session, logits, sampling, &self.ends, constrained, &mut streams.to_vec())?;
        answers.iter_mut().for_each(|answer| answer.precede(&head));
        Ok(answers)
    }
}
