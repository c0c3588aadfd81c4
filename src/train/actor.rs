//! Reflection-GRPO, stage 1: the Actor learns to write edits that the Checker, once they are carried out, likes.
//!
//! For each prompt and a picture that misses it:
//!
//! 1. the Checker says what is wrong;
//! 2. the Actor writes a group of edits at temperature 1;
//! 3. the Editor carries each out, from the same noise for the whole group;
//! 4. the Checker answers the prompt's claims again: the rewards;
//! 5. one update on the advantages within the group ([`super::grpo`]).
//!
//! Trained is a low-rank adapter on the VLM's decoder; Checker, Editor and Diffuser stay as they are. The picture is drawn
//! by the Diffuser, as in the loop, or rendered, which is cheaper. One update is made of each batch, so the old policy is
//! the present one, its log-probabilities those of the replay; they are held to those of the rollout at every step.
//! Answers are decoded under a schema, but the ratio is of the model's own probabilities, as is common.

use super::{
    Batch, Metrics, Objective, Step,
    grpo::{TokenBatch, TokenLoss, TokenLossKind, token_loss},
    grpo_config::{GroupConfig, GrpoConfig},
    objective_diffuser::tiled,
    replay::{Asked, drawn, replay},
    rollout::{self, Reward, TOKEN_RATIO, check_ratio, judge, through_latents},
};
use crate::{
    flow::{Klein, Unwatched},
    models::{Adapter, peft},
    rig::{
        klein::{Editing, Painter, Painting},
        prompts,
        roles::{Checker, Decode, Diffuser, Draw, Edit, Editor, Picture, Target, Verdict, score},
        vlm_roles::Critic,
    },
    scene::{
        graph::SceneGraph,
        tabletop::{edit, oracle, render::render, split::Split, tasks},
    },
    tensor::rng::Stream,
    usage,
    vlm::{
        Vlm,
        decode::{Answer, Sampling},
        prefix::Question,
    },
};
use anyhow::{Context, Result};
use candle_core::{DType, Device, Tensor, Var};
use image::RgbImage;
use rayon::prelude::*;
use serde::{Deserialize, Serialize};
use std::{collections::BTreeMap, fs, path::Path, sync::Arc};

/// Where the picture that misses its prompt comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Source {
    /// The Diffuser draws it; where it gets everything right, a render that does not stands in.
    Draw,
    Render,
}

/// The section `[actor]`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ActorConfig {
    pub source: Source,
    /// Objects of a prompt at least and at most.
    pub min_objects: usize,
    pub max_objects: usize,
    /// Steps and guidance of Diffuser and Editor.
    pub steps: usize,
    pub guidance: f64,
    pub loss: TokenLossKind,
    pub eps_low: f64,
    pub eps_high: f64,
    /// Weight of the divergence from the untrained Actor.
    pub kl: f64,
    /// Held-out prompts of an evaluation.
    pub evaluation: usize,
}

impl Default for ActorConfig {
    fn default() -> Self {
        Self {
            source: Source::Draw,
            min_objects: 2,
            max_objects: 3,
            steps: 8,
            guidance: 3.0,
            loss: TokenLossKind::Grpo,
            eps_low: 0.2,
            eps_high: 0.2,
            kl: 0.0,
            evaluation: 64,
        }
    }
}

/// The decoder's layers that get an adapter.
const TARGETS: &[&str] = &["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"];
/// Tokens of an edit at most.
const EDIT: usize = 64;
/// Pictures tried for a prompt until the Checker finds something wrong with one.
const ATTEMPTS: u64 = 4;
/// Pictures that run through a network together.
const TOGETHER: usize = 32;
/// Edits on a sample sheet.
const SHOWN: usize = 16;
/// The seed of held-out prompts.
const HELD_OUT: u64 = 1;

/// A prompt and a picture that misses it.
struct Problem {
    target: Target,
    graph: SceneGraph,
    picture: Picture,
    verdicts: Vec<Verdict>,
    /// Of all noise in its pictures.
    seed: u64,
}

/// An edit written for a problem, and what became of it.
struct Attempt {
    answer: Answer,
    instruction: String,
    picture: Picture,
    verdicts: Vec<Verdict>,
}

pub struct Actor {
    config: ActorConfig,
    group: GroupConfig,
    seed: u64,
    klein: Arc<Klein>,
    decode: Decode,
    critic: Critic,
    policy: Vlm,
    adapter: Adapter,
    held_out: Vec<Problem>,
}

impl Actor {
    pub fn new(config: &GrpoConfig, device: &Device) -> Result<Self> {
        let GrpoConfig { actor, group, seed, .. } = config;
        group.check(&["format", "brevity", "oracle"])?;
        if actor.min_objects == 0 || actor.min_objects > actor.max_objects || actor.steps == 0 {
            usage!("[actor] objects are from 1 on and in order, steps are 1 or more");
        }
        let adapter = config.adapter.fresh(TARGETS, *seed)?;
        let (critic, policy) = rollout::vlm(&config.models.vlm()?, device, Some(&adapter))?;
        let (klein, _) = rollout::pipeline(&config.models.pipeline()?, device, &[])?;
        Ok(Self {
            config: actor.clone(),
            group: group.clone(),
            seed: *seed,
            decode: rollout::decoder(&klein),
            klein,
            critic,
            policy: policy.context("the Actor has an adapter")?,
            adapter,
            held_out: Vec::new(),
        })
    }

    fn painter(&self) -> Painter {
        let ActorConfig { steps, guidance, .. } = self.config;
        let size = self.klein.default_size();
        let painting = Painting { steps, guidance, editing: Editing::Reference, size, batch: TOGETHER };
        Painter::new(self.klein.clone(), painting, Box::new(Unwatched))
    }

    /// Problems by number. What the Checker finds nothing wrong with is replaced as long as [`ATTEMPTS`] last.
    fn problems(&self, split: Split, seed: u64, indices: &[u64]) -> Result<Vec<Problem>> {
        let mut problems: Vec<Problem> = Vec::with_capacity(indices.len());
        for attempt in 0..ATTEMPTS {
            let solved = |i: &usize| problems.get(*i).is_none_or(|p| p.verdicts.iter().all(|v| v.yes));
            let open: Vec<usize> = (0..indices.len()).filter(solved).collect();
            if open.is_empty() {
                break;
            }
            let drawn = attempt == 0 && self.config.source == Source::Draw;
            let new = self.pose(split, seed, &open.iter().map(|i| indices[*i]).collect::<Vec<_>>(), attempt, drawn)?;
            for (i, problem) in open.into_iter().zip(new) {
                match problems.get_mut(i) {
                    Some(old) => *old = problem,
                    None => problems.push(problem),
                }
            }
        }
        Ok(problems)
    }

    fn pose(&self, split: Split, seed: u64, indices: &[u64], attempt: u64, drawn: bool) -> Result<Vec<Problem>> {
        let ActorConfig { min_objects, max_objects, .. } = self.config;
        let noise = |index: u64| Stream::new(seed, "actor pictures", index).next_u64();
        let (mut problems, mut pictures) = (Vec::with_capacity(indices.len()), Vec::with_capacity(indices.len()));
        for index in indices {
            let (prompt, graph) = if drawn {
                let sample = tasks::text_to_image(seed, split, *index, min_objects, max_objects);
                (sample.prompt, sample.graph)
            } else {
                let sample = tasks::act(seed, split, index * ATTEMPTS + attempt, max_objects);
                pictures.push(through_latents(&self.klein, &self.decode, &render(&sample.scene))?);
                (sample.prompt, sample.graph)
            };
            problems.push((Target::new(prompt, &graph), graph, noise(*index)));
        }
        if drawn {
            let jobs: Vec<Draw> = problems.iter().map(|(target, _, seed)| Draw { target, seed: *seed }).collect();
            pictures = self.painter().draw(&jobs)?;
        }
        Picture::develop(&pictures.iter().collect::<Vec<_>>())?;
        let asked: Vec<(&Picture, &Target)> = pictures.iter().zip(&problems).map(|(p, (t, ..))| (p, t)).collect();
        let verdicts = self.critic.check(&asked)?;
        let all = problems.into_iter().zip(pictures.iter().cloned()).zip(verdicts);
        Ok(all
            .map(|(((target, graph, seed), picture), verdicts)| Problem { target, graph, picture, verdicts, seed })
            .collect())
    }

    /// `size` edits for each problem, problem by problem, carried out and checked.
    fn attempts(&self, problems: &[Problem], size: usize, temperature: f64, first: u64) -> Result<Vec<Attempt>> {
        #[derive(Deserialize)]
        struct Written {
            edit: String,
        }
        let pictures: Vec<&RgbImage> = problems.iter().map(|p| p.picture.pixels()).collect::<Result<_>>()?;
        let texts: Vec<String> = problems.iter().map(question).collect();
        let rows = 0..problems.len() * size;
        let questions: Vec<Question> =
            rows.clone().map(|r| Question { picture: Some(r / size), text: &texts[r / size] }).collect();
        let mut streams: Vec<Stream> =
            rows.map(|r| Stream::new(self.seed, "actor edits", first * size as u64 + r as u64)).collect();
        let sampling = Sampling { temperature, max_tokens: EDIT };
        let looked = self.policy.look(&pictures)?;
        let answers = self.policy.answer(&looked, &questions, &prompts::reflect_schema(), sampling, &mut streams)?;
        let read = |answer: &Answer| -> Result<String> {
            let text = self.policy.chat.decode(&answer.ids)?;
            let written: Written =
                serde_json::from_str(&text).with_context(|| format!("the Actor's answer is no edit: {text}"))?;
            Ok(written.edit)
        };
        let instructions: Vec<String> = answers.iter().map(read).collect::<Result<_>>()?;

        // The same words in one group make the same picture: they are carried out once.
        let mut numbers: BTreeMap<(usize, &str), usize> = BTreeMap::new();
        let mut jobs: Vec<Edit> = Vec::new();
        let places: Vec<usize> = instructions
            .iter()
            .enumerate()
            .map(|(r, instruction)| {
                let Problem { target, picture, verdicts, seed, .. } = &problems[r / size];
                *numbers.entry((r / size, instruction)).or_insert_with(|| {
                    jobs.push(Edit { target, picture, verdicts, instruction, seed: *seed, round: 1 });
                    jobs.len() - 1
                })
            })
            .collect();
        let edited = self.painter().edit(&jobs)?;
        Picture::develop(&edited.iter().collect::<Vec<_>>())?;
        let asked: Vec<(&Picture, &Target)> = edited.iter().zip(&jobs).map(|(p, job)| (p, job.target)).collect();
        let verdicts = self.critic.check(&asked)?;
        let all = answers.into_iter().zip(instructions.iter().cloned()).zip(&places);
        Ok(all
            .map(|((answer, instruction), place)| Attempt {
                answer,
                instruction,
                picture: edited[*place].clone(),
                verdicts: verdicts[*place].clone(),
            })
            .collect())
    }

    fn rewards(&self, problems: &[Problem], attempts: &[Attempt]) -> Result<Vec<Reward>> {
        let before: Vec<&[Verdict]> = problems.iter().map(|p| p.verdicts.as_slice()).collect();
        let after: Vec<Vec<Verdict>> = attempts.iter().map(|a| a.verdicts.clone()).collect();
        let mut rewards = rollout::by_verdicts(&self.group, &before, &after)?;
        let mut add = |name: &str, value: &dyn Fn(&Attempt) -> f64| {
            if self.group.asks(name) {
                rewards.push((name.to_owned(), attempts.iter().map(value).collect()));
            }
        };
        add("format", &|a| well_formed(&a.instruction));
        // From 1 for no words down to 0 for as many as there may be.
        add("brevity", &|a| 1.0 - (a.answer.ids.len() as f64 / EDIT as f64).min(1.0));
        if self.group.asks("oracle") {
            let graphs: Vec<&SceneGraph> = (0..attempts.len()).map(|r| &problems[r / self.group.size].graph).collect();
            let judged = attempts.par_iter().zip(graphs);
            let judged = judged.map(|(a, graph)| Ok(oracle::judge(a.picture.pixels()?, graph).score()));
            rewards.push(("oracle".to_owned(), judged.collect::<Result<_>>()?));
        }
        Ok(rewards)
    }

    /// The first held-out problems' greedy edits. The problems do not depend on what is trained.
    fn held_out(&mut self, count: usize) -> Result<Vec<Attempt>> {
        if self.held_out.is_empty() {
            let indices: Vec<u64> = (0..self.config.evaluation as u64).collect();
            self.held_out = self.problems(Split::Val, HELD_OUT, &indices)?;
        }
        let some = &self.held_out[..count.min(self.held_out.len())];
        let parts = some.chunks(TOGETHER).map(|some| self.attempts(some, 1, 0.0, 0));
        Ok(parts.collect::<Result<Vec<_>>>()?.into_iter().flatten().collect())
    }
}

fn question(problem: &Problem) -> String {
    prompts::reflect(&problem.target.prompt, &problem.verdicts, &[])
}

fn well_formed(instruction: &str) -> f64 {
    f64::from(u8::from(edit::Edit::parse(instruction).is_ok()))
}

impl Objective for Actor {
    fn vars(&self) -> BTreeMap<String, Var> {
        self.adapter.vars()
    }

    fn loss(&self, batch: &Batch) -> Result<Step> {
        let size = self.group.size;
        let indices: Vec<u64> = batch.indices().collect();
        let problems = self.problems(Split::Train, self.seed, &indices)?;
        let attempts = self.attempts(&problems, size, 1.0, indices[0])?;
        let judged = judge(&self.group, &self.rewards(&problems, &attempts)?)?;

        let device = self.policy.model.decoder.device();
        let texts: Vec<String> = problems.iter().map(question).collect();
        let pictures: Vec<&RgbImage> = problems.iter().map(|p| p.picture.pixels()).collect::<Result<_>>()?;
        let asked: Vec<Asked> = attempts
            .iter()
            .enumerate()
            .map(|(r, a)| Asked { picture: r / size, question: &texts[r / size], answer: &a.answer })
            .collect();
        let replayed = replay(&self.policy, &pictures, &asked)?;
        let (drawn, mask) = drawn(&attempts.iter().map(|a| &a.answer).collect::<Vec<_>>(), device)?;
        let off = check_ratio(&replayed.log_probs, &drawn, &mask, TOKEN_RATIO)?;
        let reference = match self.config.kl {
            0.0 => None,
            _ => Some(replay(&self.critic.checker, &pictures, &asked)?.log_probs),
        };
        let counts = Tensor::from_slice(&judged.counts, (asked.len(), 1), device)?;
        let mask = mask.broadcast_mul(&counts)?;
        let ActorConfig { loss: kind, eps_low, eps_high, kl: beta, .. } = self.config;
        let tokens = TokenBatch {
            log_probs: &replayed.log_probs,
            old: &replayed.log_probs.detach(),
            reference: reference.as_ref(),
            mask: &mask,
            advantages: &Tensor::new(judged.advantages.as_slice(), device)?,
            active: None,
        };
        let loss = token_loss(&TokenLoss { kind, eps_low, eps_high, beta, max_length: EDIT }, &tokens)?;

        let mean = |value: &dyn Fn(&Attempt) -> f64| attempts.iter().map(value).sum::<f64>() / attempts.len() as f64;
        let mut metrics = judged.metrics;
        let more = [
            ("completions/mean_length", mean(&|a| a.answer.ids.len() as f64)),
            ("completions/clipped_ratio", mean(&|a| f64::from(u8::from(a.answer.ids.len() >= EDIT)))),
            ("entropy", replayed.entropy),
            ("kl", loss.kl),
            ("clip_ratio/low_mean", loss.clip_low),
            ("clip_ratio/high_mean", loss.clip_high),
            ("ratio_off", off),
        ];
        metrics.extend(more.map(|(name, value)| (name.to_owned(), value)));
        Ok(Step { loss: loss.loss, metrics })
    }

    fn evaluate(&mut self, _: u64) -> Result<Metrics> {
        let attempts = self.held_out(self.config.evaluation)?;
        let pairs: Vec<(&Problem, &Attempt)> = self.held_out.iter().zip(&attempts).collect();
        let judged = pairs.par_iter().map(|(problem, attempt)| {
            let of = |picture: &Picture| anyhow::Ok(oracle::judge(picture.pixels()?, &problem.graph));
            Ok((of(&problem.picture)?, of(&attempt.picture)?))
        });
        let judged: Vec<_> = judged.collect::<Result<_>>()?;
        let n = pairs.len().max(1) as f64;
        let mean = |values: &mut dyn Iterator<Item = f64>| values.sum::<f64>() / n;
        let share = |yes: bool| f64::from(u8::from(yes));
        let named = [
            ("eval/oracle_before", mean(&mut judged.iter().map(|(before, _)| before.score()))),
            ("eval/oracle", mean(&mut judged.iter().map(|(_, after)| after.score()))),
            ("eval/perfect_before", mean(&mut judged.iter().map(|(before, _)| share(before.perfect())))),
            ("eval/perfect", mean(&mut judged.iter().map(|(_, after)| share(after.perfect())))),
            ("eval/checker_before", mean(&mut pairs.iter().filter_map(|(p, _)| score(&p.verdicts)))),
            ("eval/checker", mean(&mut attempts.iter().filter_map(|a| score(&a.verdicts)))),
            ("eval/format", mean(&mut attempts.iter().map(|a| well_formed(&a.instruction)))),
        ];
        Ok(named.map(|(name, value)| (name.to_owned(), value)).into())
    }

    /// Pictures before and after the edits, side by side, with the prompts and the edits in words.
    fn samples(&mut self, _: u64, folder: &Path) -> Result<()> {
        let attempts = self.held_out(SHOWN)?;
        let (mut pictures, mut words) = (Vec::new(), String::new());
        for (problem, attempt) in self.held_out.iter().zip(&attempts) {
            pictures.extend([problem.picture.pixels()?.clone(), attempt.picture.pixels()?.clone()]);
            words += &format!("{} | {}\n", problem.target.prompt, attempt.instruction);
        }
        tiled(&pictures, 8).save(folder.join("edits.png"))?;
        Ok(fs::write(folder.join("edits.txt"), words)?)
    }

    fn save(&self, folder: &Path, dtype: DType) -> Result<()> {
        peft::write(&self.adapter, folder, dtype)
    }
}
