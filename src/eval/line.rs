//! One line of `samples.jsonl`: one picture, what was asked, what the judges say, and what it cost.
//!
//! Every aggregate can be computed again from these lines. A mode's result after `r` rounds is the picture whose
//! `result_after` has `r`; its cost is that of all pictures of the same `id`, `mode` and `seed`.

use super::{
    dataset::{Sample, TABLETOP},
    edits::{Review, review},
    metrics::{self, Answer, Metrics, Oracle},
    modes::Mode,
};
use crate::{
    rig::{
        cycle::{Action, Outcome, Turn, best},
        roles::{Claim, Verdict},
    },
    scene::{
        graph::{Relation, SceneGraph},
        iou::{self, Lists},
        relation::Spatial,
        tabletop::view::Judgement,
    },
    tensor::rng::Stream,
};
use anyhow::{Result, ensure};
use serde::{Deserialize, Serialize};
use std::path::{Component, Path};

/// One picture of one prompt by one mode.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Line {
    pub id: String,
    pub dataset: String,
    pub split: String,
    pub mode: Mode,
    /// The evaluation's seed; `noise` is the picture's own, for `rlrig generate --seed`.
    pub seed: u64,
    pub noise: u64,
    /// From 1, of `rounds` that were made.
    pub round: usize,
    pub rounds: usize,
    /// The rounds after which this picture is the mode's result.
    pub result_after: Vec<usize>,
    pub prompt: String,
    /// What Diffuser and Actor read instead of the prompt.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub drawn_as: Option<String>,
    /// What made it from the picture of round `from`; absent for the drawing.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub edit: Option<Edited>,
    /// Under the run's folder.
    pub file: String,
    /// The graph that was asked for.
    pub reference: Lists,
    /// What the judge lists of the picture, or confirms of the reference.
    pub extracted: Lists,
    pub claims: Vec<Answer>,
    pub metrics: Metrics,
    pub cost: Cost,
    /// GenEval's keys.
    pub filename: String,
    pub tag: String,
    pub correct: bool,
    pub reason: String,
}

/// An edit as it was made.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Edited {
    /// The round whose picture was edited, from 1.
    pub from: usize,
    pub instruction: String,
    /// Of an edit of a picture that the pixel oracle finds wrong.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub review: Option<Review>,
}

/// What a picture cost, with its check.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Cost {
    /// Of the flow network, for one picture each.
    pub evaluations: u64,
    pub seconds: f64,
}

impl Cost {
    /// By name, for a prompt to be summed over its pictures, each of them a round.
    pub fn named(self) -> [(&'static str, f64); 3] {
        [("evaluations", self.evaluations as f64), ("seconds", self.seconds), ("rounds", 1.0)]
    }
}

/// What makes the pictures of one prompt one.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Key {
    pub mode: Mode,
    pub seed: u64,
    /// Ids are those of one split.
    pub split: String,
    pub id: String,
}

impl Line {
    pub fn key(&self) -> Key {
        Key { mode: self.mode, seed: self.seed, split: self.split.clone(), id: self.id.clone() }
    }

    /// An error if it is no line of a run of at most `most` rounds: a file may come from anywhere, its numbers are counted
    /// up to, and its path is read and written.
    pub fn check(&self, most: usize) -> Result<()> {
        let Self { round, rounds, result_after, file, .. } = self;
        ensure!((1..=most).contains(rounds), "it has {rounds} rounds, of 1 to {most}");
        ensure!((1..=*rounds).contains(round), "it is of round {round} of {rounds}");
        let beyond = result_after.iter().find(|after| !(1..=most).contains(*after));
        ensure!(beyond.is_none(), "its picture is the result after {result_after:?}, of rounds 1 to {most}");
        let path = Path::new(file);
        // Beside the lines themselves are the run's documents.
        let below = path.components().all(|part| matches!(part, Component::Normal(_))) && path.components().count() > 1;
        ensure!(below, "its picture {file:?} is not in a folder below the run's");
        Ok(())
    }
}

/// What one prompt's loop left.
pub struct Made<'a> {
    pub sample: &'a Sample,
    pub mode: Mode,
    pub seed: u64,
    pub noise: u64,
    pub outcome: &'a Outcome,
    /// The mode's rounds at most.
    pub rounds: usize,
    /// Network evaluations of each turn.
    pub evaluations: &'a [u64],
    /// The judge's verdicts on each turn, where they are others than the Checker's, or more.
    pub judged: Option<&'a [Vec<Verdict>]>,
    /// What the judge lists of each turn's picture, where it is asked to.
    pub listed: Option<&'a [Lists]>,
}

impl Made<'_> {
    /// A line for each turn.
    pub fn lines(&self) -> Result<Vec<Line>> {
        let turns = &self.outcome.turns;
        ensure!(self.evaluations.len() == turns.len(), "the evaluations of {} turns are known", self.evaluations.len());
        let result = |round: usize| best(&turns[..turns.len().min(round)]);
        let read = |turn: &Turn| Ok(Oracle::new(turn.picture.pixels()?, &self.sample.graph));
        let oracles: Vec<Oracle> = match self.sample.dataset {
            TABLETOP => turns.iter().map(read).collect::<Result<_>>()?,
            _ => Vec::new(),
        };
        let result_after = |i: usize| (1..=self.rounds).filter(|round| result(*round) == Some(i)).collect();
        Ok((0..turns.len()).map(|i| self.line(i, &oracles, result_after(i))).collect())
    }

    fn line(&self, i: usize, oracles: &[Oracle], result_after: Vec<usize>) -> Line {
        let Self { sample, mode, outcome, .. } = self;
        let (turn, graph, oracle) = (&outcome.turns[i], &sample.graph, oracles.get(i));
        let listed = self.listed.map(|listed| &listed[i]);
        let judge = self.judged.map_or(&turn.verdicts, |judged| &judged[i]);
        let p: Vec<f64> = judge.iter().map(|v| v.p_yes).collect();
        // In the order of a target's claims.
        let truths = oracle.map(|o| {
            let Judgement { objects, relations, extra } = &o.judgement;
            objects.iter().chain(relations).copied().chain([*extra == 0])
        });
        let mut truths = truths.into_iter().flatten();
        let answer = |(verdict, judge): (&Verdict, &f64)| Answer {
            claim: verdict.claim.clone(),
            checker: verdict.p_yes,
            judge: *judge,
            oracle: truths.next(),
        };
        let claims: Vec<Answer> = turn.verdicts.iter().zip(&p).map(answer).collect();
        let confirmed: Vec<bool> = p.iter().map(|p| *p >= 0.5).collect();
        let wrong = |a: &&Answer| !a.oracle.unwrap_or(a.judge >= 0.5);
        let miss = |a: &Answer| match (&a.claim, oracle) {
            (Claim::Only(_), Some(o)) => format!("{} more than asked for", o.judgement.extra),
            (claim, _) => claim.to_string(),
        };
        let missed: Vec<String> = claims.iter().filter(wrong).map(miss).collect();
        let (split, id) = (file_name(&sample.split), file_name(&sample.id));
        let file = format!("pictures/{}/{split}/{id}-{}-{}.png", mode.name(), self.seed, i + 1);
        Line {
            id: sample.id.clone(),
            dataset: sample.dataset.to_owned(),
            split: sample.split.clone(),
            mode: *mode,
            seed: self.seed,
            noise: self.noise,
            round: i + 1,
            rounds: outcome.turns.len(),
            result_after,
            prompt: sample.prompt.clone(),
            drawn_as: sample.drawn_as.clone(),
            edit: match &turn.action {
                Action::Draw => None,
                Action::Edit { source, instruction, .. } => {
                    let reviewed = oracle.zip(oracles.get(*source)).filter(|_| mode.edits());
                    let denied = outcome.turns[*source].verdicts.iter().filter(|v| !v.yes).map(|v| &v.claim);
                    let denied: Vec<&Claim> = denied.collect();
                    let review =
                        reviewed.and_then(|(after, before)| review(instruction, (before, after), graph, &denied));
                    Some(Edited { from: source + 1, instruction: instruction.clone(), review })
                }
            },
            filename: file.clone(),
            file,
            reference: Lists::of(graph, iou::label),
            extracted: listed.cloned().unwrap_or_else(|| metrics::extracted(graph, iou::label, &confirmed)),
            metrics: metrics::metrics(graph, &p, listed, oracle),
            claims,
            cost: Cost {
                evaluations: self.evaluations[i],
                seconds: turn.seconds.paint + turn.seconds.reflect + turn.seconds.check,
            },
            tag: tag(graph).to_owned(),
            correct: missed.is_empty(),
            reason: missed.join("; "),
        }
    }
}

/// What kind of prompt a graph is, in GenEval's words as far as the numbers of objects and the relations tell.
fn tag(graph: &SceneGraph) -> &'static str {
    let is_direction = |r: &Relation| Spatial::from_name(&r.predicate).is_some_and(Spatial::is_direction);
    match (graph.objects.len(), graph.relations.as_slice()) {
        (1, []) => "single_object",
        (2, []) => "two_object",
        (_, []) => "objects",
        (_, relations) if relations.iter().all(is_direction) => "position",
        _ => "relations",
    }
}

/// An id as a part of a file's name: another for every id.
fn file_name(id: &str) -> String {
    const LONGEST: usize = 80;
    let plain = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
    let is_plain = id.chars().all(plain) && !id.starts_with('.') && !id.is_empty();
    if is_plain && id.len() <= LONGEST {
        return id.to_owned();
    }
    let name: String = id.chars().map(|c| if plain(c) { c } else { '_' }).take(LONGEST).collect();
    format!("{}~{:016x}", name.trim_start_matches('.'), Stream::new(0, id, 0).next_u64())
}

#[cfg(test)]
pub mod tests {
    use super::*;
    use crate::{
        rig::{
            cycle::{Ending, Seconds},
            roles::{Picture, Target, score},
        },
        scene::{
            parse::parse,
            tabletop::{render::render, split::Split, tasks},
        },
    };
    use image::RgbImage;

    #[test]
    fn a_tag_tells_what_kind_of_prompt_it_is() {
        for (prompt, expected) in [
            ("a red ball", "single_object"),
            ("a red ball and a blue cube", "two_object"),
            ("a red ball, a blue cube, and a green ring", "objects"),
            ("a red ball left of a blue cube", "position"),
            ("a red ball in front of a blue cube", "relations"),
        ] {
            assert_eq!(tag(&parse(prompt).unwrap()), expected, "{prompt}");
        }
    }

    /// A turn whose claims have these probabilities: that of nothing else being there, and all others.
    fn turn(target: &Target, action: Action, picture: RgbImage, (only, p_yes): (f64, f64)) -> Turn {
        let verdict = |claim: &Claim| {
            let p_yes = if matches!(claim, Claim::Only(_)) { only } else { p_yes };
            Verdict { claim: claim.clone(), yes: p_yes >= 0.5, p_yes, reflection: String::new() }
        };
        let verdicts: Vec<Verdict> = target.claims.iter().map(verdict).collect();
        let seconds = Seconds { reflect: 0.25, paint: 0.5, check: 0.25 };
        Turn { action, picture: Picture::from_pixels(picture), score: score(&verdicts), verdicts, seconds }
    }

    /// A loop that draws nothing, is told so, and then paints the scene itself.
    pub fn mended(index: u64, mode: Mode) -> Vec<Line> {
        let drawn = tasks::text_to_image(1, Split::Test, index, 2, 3);
        let target = Target::new(drawn.prompt.clone(), &drawn.graph).and_nothing_else();
        let blank = RgbImage::from_pixel(128, 128, image::Rgb([225, 220, 210]));
        // Nothing too much is in either picture.
        let mut turns = vec![turn(&target, Action::Draw, blank, (1.0, 0.0))];
        if mode != Mode::Diffuser {
            let edit = Action::Edit { source: 0, instruction: "add all".into(), thought: String::new() };
            turns.push(turn(&target, edit, render(&drawn.scene), (1.0, 1.0)));
        }
        let (best, ending) = (turns.len() - 1, Ending::Spent);
        let sample = Sample {
            index,
            id: format!("test-{index}"),
            dataset: "tabletop",
            split: "test".into(),
            prompt: drawn.prompt,
            drawn_as: None,
            graph: drawn.graph,
        };
        let outcome = Outcome { turns, best, ending };
        let evaluations = vec![40; outcome.turns.len()];
        let made = Made {
            sample: &sample,
            mode,
            seed: 0,
            noise: index,
            outcome: &outcome,
            rounds: if mode == Mode::Diffuser { 1 } else { 3 },
            evaluations: &evaluations,
            judged: None,
            listed: None,
        };
        made.lines().unwrap()
    }

    #[test]
    fn each_picture_has_a_line_that_survives_json() {
        let lines = mended(3, Mode::Loop);
        let [drawn, mended] = lines.as_slice() else { panic!("two turns") };
        assert_eq!((&drawn.result_after[..], &mended.result_after[..]), (&[1][..], &[2, 3][..]));
        assert_eq!((drawn.round, mended.round, mended.rounds), (1, 2, 2));
        assert_eq!((drawn.metrics["sg_iou"], mended.metrics["sg_iou"]), (0.0, 1.0));
        assert_eq!((drawn.metrics["oracle_mean"], mended.metrics["oracle_mean"]), (0.0, 1.0));
        assert!(!drawn.correct && drawn.reason.contains(" "));
        assert!(mended.correct && mended.reason.is_empty(), "{}", mended.reason);
        let review = Review { mendable: true, addressed: false, helpful: false, better: true, worse: false };
        assert_eq!(mended.edit, Some(Edited { from: 1, instruction: "add all".into(), review: Some(review) }));
        assert_eq!(mended.cost, Cost { evaluations: 40, seconds: 1.0 });
        assert_eq!(mended.file, "pictures/loop/test/test-3-0-2.png");
        for line in &lines {
            let text = serde_json::to_string(line).unwrap();
            assert_eq!(&serde_json::from_str::<Line>(&text).unwrap(), line);
        }
    }

    #[test]
    fn more_than_asked_for_is_wrong_where_nothing_else_may_be_there() {
        let scene = tasks::text_to_image(1, Split::Test, 3, 2, 3);
        // Of its things only the first is asked for.
        let graph = SceneGraph { objects: scene.graph.objects[..1].to_vec(), relations: Vec::new() };
        let drawn = |dataset, only| {
            let prompt = graph.triple_text();
            let sample = Sample {
                index: 3,
                id: "3".into(),
                dataset,
                split: "test".into(),
                prompt,
                drawn_as: None,
                graph: graph.clone(),
            };
            let turns = vec![turn(&sample.target(only), Action::Draw, render(&scene.scene), (0.0, 1.0))];
            let outcome = Outcome { turns, best: 0, ending: Ending::Spent };
            let made = Made {
                sample: &sample,
                mode: Mode::Diffuser,
                seed: 0,
                noise: 0,
                outcome: &outcome,
                rounds: 1,
                evaluations: &[40],
                judged: None,
                listed: None,
            };
            let line = made.lines().unwrap().remove(0);
            (line.correct, line.reason)
        };
        let more = format!("{} more than asked for", scene.graph.objects.len() - 1);
        assert_eq!(drawn(TABLETOP, true), (false, more));
        assert_eq!(drawn("laion-sg", true), (false, format!("nothing but {}", graph.objects[0].phrase())));
        for dataset in [TABLETOP, "laion-sg"] {
            assert_eq!(drawn(dataset, false), (true, String::new()), "{dataset}");
        }
    }

    #[test]
    fn a_line_that_leads_out_of_its_run_is_told() {
        let lines = mended(3, Mode::Loop);
        assert!(lines.iter().all(|line| line.check(3).is_ok() && line.check(1).is_err()));
        let told = |bend: &dyn Fn(&mut Line), expected: &str| {
            let mut line = lines[1].clone();
            bend(&mut line);
            let error = line.check(3).unwrap_err().to_string();
            assert!(error.contains(expected), "{error}");
        };
        told(&|line| line.result_after = vec![usize::MAX, 0], "18446744073709551615");
        told(&|line| line.result_after = vec![0], "rounds 1 to 3");
        told(&|line| line.round = 3, "round 3 of 2");
        told(&|line| line.rounds = usize::MAX, "of 1 to 3");
        for file in ["/etc/passwd", "pictures/../../x.png", "../x.png", "results.json", ""] {
            told(&|line| line.file = file.into(), "is not in a folder below");
        }
    }

    #[test]
    fn ids_become_names_without_paths() {
        let name = file_name("../a b/ü.1");
        assert!(name.starts_with("_a_b__.1~") && name.len() == 25, "{name}");
        assert_ne!(file_name("a b"), file_name("a_b"));
        assert_ne!(file_name(&"x".repeat(100)), file_name(&"x".repeat(101)));
        assert_eq!(file_name("test-many-00001"), "test-many-00001");
        assert!(!file_name("..").starts_with('.') && !file_name("").is_empty());
    }
}
