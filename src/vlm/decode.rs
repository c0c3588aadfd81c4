//! Batched decoding over a key-value cache: rows of different lengths, forked and dropped at any time, greedy or
//! sampled, under a constraint where there is one.

use super::constrain::{Grammar, Progress};
use crate::{
    models::{
        qwen3::Cache,
        qwen3_vl::{Features, Qwen3VL, rope_positions},
    },
    tensor::{Mask, rng::Stream},
};
use anyhow::{Context, Result, ensure};
use candle_core::{DType, Tensor};

/// Pictures that new tokens refer to, in order.
pub struct Pictures<'a> {
    pub features: &'a Features,
    /// In patches.
    pub grids: &'a [[usize; 2]],
}

/// The state of a batch of conversations.
pub struct Session<'m> {
    model: &'m Qwen3VL,
    cache: Cache,
    /// The padding in front of each row of the cache.
    starts: Vec<usize>,
    /// The rotary position of each row's next token.
    next: Vec<u32>,
}

impl<'m> Session<'m> {
    /// `rows` conversations that have not begun.
    pub fn new(model: &'m Qwen3VL, rows: usize) -> Self {
        Self { model, cache: model.decoder.cache(), starts: vec![0; rows], next: vec![0; rows] }
    }

    /// The number of rows.
    pub fn len(&self) -> usize {
        self.next.len()
    }

    pub fn is_empty(&self) -> bool {
        self.next.is_empty()
    }

    /// Copies of the rows `rows`: fewer where some are done, more where one beginning has several continuations.
    pub fn rows(&self, rows: &[usize]) -> Result<Self> {
        let index: Vec<u32> = rows.iter().map(|r| *r as u32).collect();
        Ok(Self {
            model: self.model,
            cache: self.cache.rows(&index)?,
            starts: rows.iter().map(|r| self.starts[*r]).collect(),
            next: rows.iter().map(|r| self.next[*r]).collect(),
        })
    }

    /// Reads on in every row by at least one token, and returns the logits `(rows, vocabulary)` behind its last, in f32.
    pub fn extend(&mut self, tokens: &[Vec<u32>], pictures: Option<Pictures>) -> Result<Tensor> {
        let model = self.model;
        ensure!(tokens.len() == self.len(), "{} rows were to be read on by {} texts", self.len(), tokens.len());
        ensure!(tokens.iter().all(|row| !row.is_empty()), "nothing to read on by");
        let config = model.config();
        let longest = tokens.iter().map(Vec::len).max().unwrap_or(0);
        let mut grids = pictures.iter().flat_map(|p| p.grids.iter().copied());
        let (mut rows, mut positions) = (tokens.to_vec(), Vec::with_capacity(tokens.len()));
        for (row, next) in rows.iter_mut().zip(&mut self.next) {
            let merge = config.vision_config.spatial_merge_size;
            let (mut places, after) = rope_positions(row, config.image_token_id, merge, *next, &mut grids)?;
            *next = after;
            // Padding that no token sees; any id but that of a picture will do.
            places.resize(longest, [0; 3]);
            row.resize(longest, config.vision_end_token_id);
            positions.push(places);
        }
        ensure!(grids.next().is_none(), "more pictures were given than the text has places for");

        let past = self.cache.len();
        let ends: Vec<usize> = tokens.iter().map(|row| past + row.len()).collect();
        let keys = self.starts.iter().zip(&ends).map(|(start, end)| *start..*end).collect();
        let mask = Mask { causal: true, keys: Some(keys) };
        let angles = model.decoder.angles(&positions)?;
        let features = pictures.map(|p| p.features);
        let states = model.forward(&rows, features, &angles, &mask, Some(&mut self.cache))?; // (rows, longest, hidden)
        // Without its graph: no conversation needs gradients, and with them it would keep the activations of every token.
        self.cache = self.cache.align_right(&ends)?.detach();
        for (start, end) in self.starts.iter_mut().zip(&ends) {
            *start += past + longest - end;
        }
        let last: Vec<u32> = tokens.iter().enumerate().map(|(i, row)| (i * longest + row.len() - 1) as u32).collect();
        let last = states.flatten(0, 1)?.index_select(&Tensor::new(last, states.device())?, 0)?;
        Ok(model.head.forward(&last)?.to_dtype(DType::F32)?)
    }
}

/// How the next token is chosen.
#[derive(Clone, Copy, Debug)]
pub struct Sampling {
    /// 0 takes the likeliest token.
    pub temperature: f64,
    /// Tokens of an answer at most; one under a constraint goes on until it is whole.
    pub max_tokens: usize,
}

/// One answer.
#[derive(Clone, Debug, Default)]
pub struct Answer {
    pub ids: Vec<u32>,
    /// The log-probability of each token under the model's own distribution, without temperature or constraint; 0 where
    /// the model had no choice, and in a greedy answer, of which it is not computed: it takes a sum over the vocabulary.
    pub logprobs: Vec<f32>,
    /// Whether each token was chosen among several; a constraint leaves no choice in many places.
    pub chosen: Vec<bool>,
    /// Where the constraint left only the choice between [`Constrained::words`]: the probability of the first.
    pub odds: Option<f64>,
}

impl Answer {
    fn force(&mut self, tokens: &[u32]) {
        self.ids.extend(tokens);
        self.logprobs.resize(self.ids.len(), 0.0);
        self.chosen.resize(self.ids.len(), false);
    }

    /// Puts tokens in front that the model had no choice about.
    pub fn precede(&mut self, tokens: &[u32]) {
        self.ids.splice(..0, tokens.iter().copied());
        self.logprobs.splice(..0, tokens.iter().map(|_| 0.0));
        self.chosen.splice(..0, tokens.iter().map(|_| false));
    }
}

/// Where an answer under a grammar stands when the rows of a session are about to give it.
#[derive(Clone, Copy)]
pub struct Constrained<'g> {
    pub grammar: &'g Grammar,
    /// Behind what the rows of the session have read of the answer so far.
    pub progress: Progress,
    /// Two words between which an answer decides.
    pub words: Option<[&'g str; 2]>,
}

/// Answers every row of `session` behind which the logits are `logits (rows, vocabulary)`. Row `i` draws from
/// `streams[i]`, so its answer does not depend on the others. Rows that are done leave the batch.
///
/// Without a constraint an answer ends before one of the tokens `ends`; with one, when the grammar is satisfied.
pub fn answer(
    mut session: Session,
    mut logits: Tensor,
    sampling: Sampling,
    ends: &[u32],
    constrained: Option<Constrained>,
    streams: &mut [Stream],
) -> Result<Vec<Answer>> {
    let count = session.len();
    ensure!(streams.len() == count, "{count} answers need as many random streams");
    let mut answers = vec![Answer::default(); count];
    let mut progress = vec![constrained.map(|c| c.progress); count];
    let mut open: Vec<usize> = (0..count).collect();
    let greedy = sampling.temperature <= 0.0;
    let said = |logits: &[f32], token: u32| if greedy { 0.0 } else { log_probability(logits, token) };
    loop {
        let (mut tokens, mut kept) = (Vec::with_capacity(open.len()), Vec::with_capacity(open.len()));
        for (place, logits) in logits.to_vec2::<f32>()?.iter_mut().enumerate() {
            let row = open[place];
            let answer = &mut answers[row];
            let full = answer.ids.len() >= sampling.max_tokens;
            let begun = answer.ids.len();
            let done = match (constrained, &mut progress[row]) {
                (Some(Constrained { grammar, words, .. }), Some(at)) => {
                    if let (Some(words), None) = (words, answer.odds) {
                        answer.odds = odds(logits, grammar, *at, words)?;
                    }
                    let allowed = if full { grammar.closing(*at).into() } else { grammar.allowed(*at) };
                    let token = choose(logits, Some(&allowed), sampling.temperature, &mut streams[row])?;
                    answer.ids.push(token);
                    answer.logprobs.push(said(logits, token));
                    answer.chosen.push(allowed.len() > 1);
                    *at = grammar.after(*at, token).context("a token that is not allowed was chosen")?;
                    let (forced, next) = grammar.forced(*at)?;
                    answer.force(&forced);
                    *at = next;
                    grammar.is_done(next)
                }
                _ if full => true,
                _ => {
                    // A picture cannot be an answer.
                    let config = session.model.config();
                    for id in [config.image_token_id, config.video_token_id] {
                        if let Some(logit) = logits.get_mut(id as usize) {
                            *logit = f32::NEG_INFINITY;
                        }
                    }
                    let token = choose(logits, None, sampling.temperature, &mut streams[row])?;
                    let end = ends.contains(&token);
                    if !end {
                        answer.ids.push(token);
                        answer.logprobs.push(said(logits, token));
                        answer.chosen.push(true);
                    }
                    end || answer.ids.len() >= sampling.max_tokens
                }
            };
            if !done {
                tokens.push(answer.ids[begun..].to_vec());
                kept.push(place);
            }
        }
        if kept.is_empty() {
            return Ok(answers);
        }
        if kept.len() < open.len() {
            session = session.rows(&kept)?;
            open = kept.iter().map(|place| open[*place]).collect();
        }
        logits = session.extend(&tokens, None)?;
    }
}

/// The probability that the text goes on with the first word rather than the second, if it can only go on with these:
/// every token that begins one counts for it.
fn odds(logits: &[f32], grammar: &Grammar, at: Progress, words: [&str; 2]) -> Result<Option<f64>> {
    let allowed = grammar.allowed(at);
    // Nearly everywhere the first token already is none of these.
    let begun = |token: &u32| words.iter().position(|word| grammar.begins(*token, word));
    let Some(begun) = allowed.iter().map(begun).collect::<Option<Vec<usize>>>() else { return Ok(None) };
    let logit = |token: &u32| logits.get(*token as usize).copied().unwrap_or(f32::NEG_INFINITY);
    let best = allowed.iter().map(logit).fold(f32::NEG_INFINITY, f32::max);
    let mut mass = [0.0; 2];
    for (token, word) in allowed.iter().zip(begun) {
        mass[word] += f64::from(logit(token) - best).exp();
    }
    let odds = mass[0] / (mass[0] + mass[1]);
    ensure!(odds.is_finite(), "the model's logits are not finite: its weights are broken");
    Ok(Some(odds))
}

/// The natural logarithm of the softmax of `logits` at `token`.
pub fn log_probability(logits: &[f32], token: u32) -> f32 {
    logits[token as usize] - log_sum(logits.iter().copied())
}

fn log_sum(logits: impl Iterator<Item = f32> + Clone) -> f32 {
    let max = logits.clone().fold(f32::NEG_INFINITY, f32::max);
    max + logits.map(|x| f64::from(x - max).exp()).sum::<f64>().ln() as f32
}

/// The likeliest of the allowed tokens (the first of equals), or one drawn by its probability at `temperature`.
fn choose(logits: &[f32], allowed: Option<&[u32]>, temperature: f64, stream: &mut Stream) -> Result<u32> {
    let all: Vec<u32>;
    let allowed = match allowed {
        Some(allowed) => allowed,
        None => {
            all = (0..logits.len() as u32).collect();
            &all
        }
    };
    // A tokenizer may have more tokens than its model.
    let at = |token: &u32| logits.get(*token as usize).map_or(f64::NEG_INFINITY, |x| f64::from(*x));
    let mut best = *allowed.first().context("the constraint allows no token of this vocabulary")?;
    for token in allowed {
        if at(token) > at(&best) {
            best = *token;
        }
    }
    ensure!(at(&best).is_finite(), "the model's logits are not finite");
    if temperature <= 0.0 {
        return Ok(best);
    }
    let weight = |token: &u32| ((at(token) - at(&best)) / temperature).exp();
    let mut left = stream.uniform() * allowed.iter().map(weight).sum::<f64>();
    for token in allowed {
        left -= weight(token);
        if left < 0.0 {
            return Ok(*token);
        }
    }
    Ok(best) // by rounding alone
}
