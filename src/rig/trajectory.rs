//! The document of one picture's making: what was asked, with which settings, and every turn.
//!
//! One type for all places: the `rlrig` chunk of a PNG, `trajectory.json`, `--json`, `--from`, the HTML page. The copy
//! inside a PNG leaves the timings out, so that the same recipe gives the same bytes.

use super::{
    cycle::{Action, Ending, Outcome, Seconds},
    roles::{Target, Verdict},
};
use crate::{
    flow::{Guidance, Solver},
    io::story::{Card, Finding, Story},
};
use anyhow::{Context, Result, ensure};
use image::RgbImage;
use serde::{Deserialize, Serialize};
use std::fmt;

/// The version of this document that is written; older ones are read.
pub const VERSION: u32 = 1;

/// What was asked for, how it was worked on, and what came of it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Trajectory {
    pub version: u32,
    /// The version of rlrig that wrote it.
    pub rlrig: String,
    pub target: Target,
    pub recipe: Recipe,
    pub turns: Vec<Turn>,
    /// The turn whose picture is the result.
    pub best: usize,
    pub ending: Ending,
}

/// Everything that decides the pictures beside the prompt.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Recipe {
    pub seed: u64,
    pub rounds: usize,
    #[serde(default = "one")]
    pub draws: usize,
    /// Recipes that do not say are of the time when an edit was always followed by another.
    #[serde(default)]
    pub redraw: bool,
    pub accept: f64,
    /// How many times the Checker looks at a picture.
    #[serde(default = "one")]
    pub looks: usize,
    pub steps: usize,
    /// Recipes that do not say are of the time when there was only Euler's rule.
    #[serde(default)]
    pub solver: Solver,
    pub guidance: f64,
    /// Of edits by reference; recipes that do not say are of the time when they were guided as drawings are.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub edit_guidance: Option<Guidance>,
    pub editor: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub inversion: Option<String>,
    pub model: Source,
    pub vlm: Source,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub adapters: Vec<String>,
    pub dtype: String,
    /// SHA-256 of the noise given by `--init-noise`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub init_noise: Option<String>,
    /// Which of that file's noises, counted from 0; older recipes do not say.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub noise_row: Option<usize>,
}

impl Recipe {
    /// How strongly pictures are guided, in words.
    pub fn guided(&self) -> String {
        let Self { guidance, edit_guidance, .. } = self;
        let edits = edit_guidance.filter(|edits| *edits != Guidance::from(*guidance));
        guidance.to_string() + &edits.map_or(String::new(), |edits| format!(", of edits {edits}"))
    }

    /// How the loop ran, in words.
    pub fn cycle(&self) -> String {
        let Self { rounds, draws, redraw, accept, looks, .. } = self;
        let drawings = if *draws == 1 { "drawing" } else { "drawings" };
        let after = if *redraw { "a new drawing" } else { "another edit" };
        format!(
            "at most {rounds} rounds, {draws} {drawings} first, {after} after an edit that did not help; accepted from {accept} \
             on in {looks} looks"
        )
    }
}

/// The drawings and looks of recipes that do not say how many.
fn one() -> usize {
    1
}

/// Where a model came from.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Source {
    /// A hub id, a folder, or `built-in`.
    pub name: String,
    /// The hub's commit, or [`crate::models::built_in::revision`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub revision: Option<String>,
}

/// One round: a picture, how it was made, and what the Checker says of it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Turn {
    pub action: Action,
    /// For each claim of the target, in its order.
    pub verdicts: Vec<Verdict>,
    /// The Checker's score, [`super::roles::score`]; `None` if there was nothing to check.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub score: Option<f64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub seconds: Option<Seconds>,
    /// The picture's file, beside the document.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub image: Option<String>,
}

impl Trajectory {
    pub fn new(target: Target, recipe: Recipe, outcome: &Outcome) -> Self {
        let turn = |turn: &super::cycle::Turn| Turn {
            action: turn.action.clone(),
            verdicts: turn.verdicts.clone(),
            score: turn.score,
            seconds: Some(turn.seconds),
            image: None,
        };
        Self {
            version: VERSION,
            rlrig: env!("CARGO_PKG_VERSION").to_owned(),
            target,
            recipe,
            turns: outcome.turns.iter().map(turn).collect(),
            best: outcome.best,
            ending: outcome.ending,
        }
    }

    /// What depends on the recipe alone: no timings, no file names.
    pub fn timeless(&self) -> Self {
        let mut copy = self.clone();
        for turn in &mut copy.turns {
            (turn.seconds, turn.image) = (None, None);
        }
        copy
    }

    pub fn to_json(&self) -> Result<String> {
        Ok(serde_json::to_string(self)?)
    }

    /// Reads a document that anybody may have written.
    pub fn from_json(text: &str) -> Result<Self> {
        #[derive(Deserialize)]
        struct Head {
            version: u32,
        }
        let head: Head = serde_json::from_str(text).context("this is no trajectory of rlrig")?;
        ensure!(
            head.version <= VERSION,
            "the trajectory has version {}, this rlrig reads up to {VERSION}: use a newer one",
            head.version
        );
        let trajectory: Self = serde_json::from_str(text).context("the trajectory is damaged")?;
        let n = trajectory.turns.len();
        ensure!(trajectory.best < n, "the trajectory is damaged: its best turn is missing");
        let backward = |(i, turn): (usize, &Turn)| match turn.action {
            Action::Draw => true,
            Action::Edit { source, .. } => source < i,
        };
        ensure!(
            trajectory.turns.iter().enumerate().all(backward),
            "the trajectory is damaged: a turn edits a later one"
        );
        Ok(trajectory)
    }

    /// What a contact sheet or a page shows of it; `pictures` are those of the turns.
    pub fn story(&self, pictures: &[&RgbImage]) -> Story {
        let r = &self.recipe;
        let fact = |name: &str, value: String| (name.to_owned(), value);
        let mut facts = vec![
            fact("result", self.ending.words().to_owned()),
            fact("loop", r.cycle()),
            fact("seed", r.seed.to_string()),
            fact("steps", r.steps.to_string()),
            fact("solver", r.solver.name().to_owned()),
            fact("guidance", r.guided()),
            fact("editor", r.editor.clone()),
            fact("model", r.model.name.clone()),
            fact("vlm", r.vlm.name.clone()),
        ];
        facts.extend(self.target.drawn_as.iter().map(|words| fact("drawn as", words.clone())));
        facts.extend(r.adapters.iter().map(|a| fact("adapter", a.clone())));
        facts.push(fact("rlrig", self.rlrig.clone()));
        let cards = self.turns.iter().zip(pictures).enumerate();
        Story {
            title: self.target.prompt.clone(),
            facts,
            cards: cards.map(|(i, (turn, image))| turn.card(i, i == self.best, image)).collect(),
        }
    }

    /// What other tools are told of its result.
    pub fn parameters(&self, size: (u32, u32)) -> Parameters<'_> {
        let r = &self.recipe;
        Parameters {
            prompt: self.target.words(),
            steps: r.steps,
            solver: r.solver,
            guidance: r.guidance,
            seed: r.seed,
            size,
            model: &r.model.name,
            rounds: Some(self.turns.len()),
        }
    }
}

/// Whether a document is the recipe of `rlrig edit`, which has no trajectory.
pub fn is_edit(document: &str) -> bool {
    serde_json::from_str::<serde_json::Value>(document).is_ok_and(|document| document.get("edit").is_some())
}

/// The `parameters` text of AUTOMATIC1111's web UI, which many tools read.
pub struct Parameters<'a> {
    pub prompt: &'a str,
    pub steps: usize,
    pub solver: Solver,
    pub guidance: f64,
    pub seed: u64,
    pub size: (u32, u32),
    pub model: &'a str,
    /// Of the loop, where one ran.
    pub rounds: Option<usize>,
}

impl fmt::Display for Parameters<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { steps, solver, guidance, seed, size: (width, height), .. } = self;
        // Lines and commas are what the text is taken apart by.
        let (prompt, model) = (self.prompt.replace(['\n', '\r'], " "), self.model.replace(',', " "));
        let rounds = self.rounds.map_or(String::new(), |rounds| format!(", Rounds: {rounds}"));
        write!(
            f,
            "{prompt}\nSteps: {steps}, Sampler: {}, CFG scale: {guidance}, Seed: {seed}, Size: {width}x{height}, \
             Model: {model}{rounds}, Version: rlrig {}",
            solver.name(),
            env!("CARGO_PKG_VERSION")
        )
    }
}

impl Turn {
    fn card(&self, index: usize, best: bool, image: &RgbImage) -> Card {
        let action = match &self.action {
            Action::Draw => "Drawn from the prompt".to_owned(),
            Action::Edit { source, instruction, thought } => {
                let thought = if thought.is_empty() { String::new() } else { format!(" ({thought})") };
                format!("Edit of round {}: {instruction}{thought}", source + 1)
            }
        };
        let findings = self.verdicts.iter().map(|v| Finding {
            text: v.claim.to_string(),
            yes: v.yes,
            p_yes: v.p_yes,
            note: v.reflection.clone(),
        });
        let mut footer = self.score.map_or("nothing to check".to_owned(), |score| format!("score {score:.3}"));
        if let Some(s) = self.seconds {
            footer += &format!(" \u{b7} paint {:.1} s \u{b7} check {:.1} s", s.paint, s.check);
            if s.reflect > 0.0 {
                footer += &format!(" \u{b7} reflect {:.1} s", s.reflect);
            }
        }
        Card {
            heading: format!("Round {}", index + 1),
            action,
            image: image.clone(),
            findings: findings.collect(),
            footer,
            best,
        }
    }
}

impl Ending {
    /// The ending in words.
    pub fn words(self) -> &'static str {
        match self {
            Self::Accepted => "accepted",
            Self::Spent => "not accepted: the best of all rounds",
            Self::Unchecked => "not checked: the prompt makes no claim",
            Self::Cancelled => "interrupted: the best so far",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rig::roles::Claim;

    fn example() -> Trajectory {
        let verdict = |yes: bool| Verdict {
            claim: Claim::Object("red ball".into()),
            yes,
            p_yes: if yes { 0.9 } else { 0.1 },
            reflection: if yes { String::new() } else { "there is no red ball".into() },
        };
        let source = |name: &str| Source { name: name.into(), revision: None };
        let turn = |action, yes| Turn {
            action,
            verdicts: vec![verdict(yes)],
            score: Some(if yes { 0.9 } else { 0.1 }),
            seconds: Some(Seconds { reflect: 0.1, paint: 1.5, check: 0.25 }),
            image: Some("turn-1.png".into()),
        };
        Trajectory {
            version: VERSION,
            rlrig: "0.1.0".into(),
            target: Target { claims: vec![Claim::Object("red ball".into())], ..Target::words_alone("a red ball") },
            recipe: Recipe {
                seed: u64::MAX,
                rounds: 4,
                draws: 1,
                redraw: false,
                accept: 0.5,
                looks: 3,
                steps: 20,
                solver: Solver::Euler,
                guidance: 3.0,
                edit_guidance: Some(Guidance { text: 5.0, image: 2.5 }),
                editor: "reference".into(),
                inversion: None,
                model: source("built-in"),
                vlm: source("built-in"),
                adapters: vec![],
                dtype: "f32".into(),
                init_noise: None,
                noise_row: None,
            },
            turns: vec![
                turn(Action::Draw, false),
                turn(
                    Action::Edit {
                        source: 0,
                        instruction: "add a red ball".into(),
                        thought: "missing red ball".into(),
                    },
                    true,
                ),
            ],
            best: 1,
            ending: Ending::Accepted,
        }
    }

    #[test]
    fn a_story_tells_how_the_loop_ran() {
        let picture = RgbImage::new(1, 1);
        let story = |redraw: bool| {
            let mut t = example();
            t.recipe.redraw = redraw;
            t.story(&[&picture, &picture])
        };
        let told = |redraw: bool| story(redraw).facts.into_iter().find(|(name, _)| name == "loop").unwrap().1;
        assert!(told(false).starts_with("at most 4 rounds, 1 drawing first, another edit after"), "{}", told(false));
        assert!(told(true).contains("a new drawing after an edit that did not help"), "{}", told(true));
    }

    #[test]
    fn it_survives_json() {
        let t = example();
        assert_eq!(Trajectory::from_json(&t.to_json().unwrap()).unwrap(), t);
        let json = t.timeless().to_json().unwrap();
        assert!(!json.contains("seconds") && !json.contains("turn-1.png"));
    }

    #[test]
    fn newer_foreign_and_damaged_documents_are_errors() {
        let message = |edit: &dyn Fn(&mut serde_json::Value)| {
            let mut value = serde_json::to_value(example()).unwrap();
            edit(&mut value);
            Trajectory::from_json(&value.to_string()).unwrap_err().to_string()
        };
        assert!(message(&|v| v["version"] = 9.into()).contains("use a newer one"));
        assert!(message(&|v| v["best"] = 2.into()).contains("damaged"));
        assert!(message(&|v| v["turns"][1]["action"]["edit"]["source"] = 1.into()).contains("later"));
        assert!(message(&|v| *v = 3.into()).contains("no trajectory"));
    }
}
