//! The ways to make a picture that are compared, and who plays the roles in each.
//!
//! All of them are the same loop with the same Checker and the same stop: the Diffuser alone is one round of it, and the
//! two rivals of editing draw anew where it would edit, for as many network evaluations at most as the loop takes where it
//! edits by reference ([`rival_rounds`]), though such an edit is of a sequence that the source picture makes longer. By
//! inversion or FlowEdit an edit takes more, and the rivals have the loop's rounds.

use crate::rig::{
    cycle::{Cast, Options, seed_of_drawing},
    roles::{Actor, Checker, Claim, Diffuser, Draw, Edit, Editor, Picture, Reflection, Situation, Target, Verdict},
};
use anyhow::Result;
use clap::ValueEnum;
use serde::{Deserialize, Serialize};

/// A way to make a picture of a prompt, by its name in flags and files.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum Mode {
    /// One drawing.
    Diffuser,
    /// Drawings of other noise until the Checker accepts one; the best by the Checker's score. As many at most as cost
    /// what the loop may with `--editor reference`; with another editor as many as it has rounds.
    BestOfN,
    /// As best-of-n, and at its cost, of a prompt that says first what the Checker misses.
    Rewrite,
    /// The loop without adapters.
    LoopUntrained,
    /// The loop without the Editor's adapters.
    LoopActor,
    /// The loop without the Actor's adapters.
    LoopEditor,
    /// The loop as `rlrig generate` runs it.
    Loop,
}

/// Which roles have the adapters that there are for them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct On {
    pub diffuser: bool,
    pub editor: bool,
    pub actor: bool,
}

impl Mode {
    pub const ALL: [Self; 7] = [
        Self::Diffuser,
        Self::BestOfN,
        Self::Rewrite,
        Self::LoopUntrained,
        Self::LoopActor,
        Self::LoopEditor,
        Self::Loop,
    ];

    pub fn name(self) -> &'static str {
        match self {
            Self::Diffuser => "diffuser",
            Self::BestOfN => "best-of-n",
            Self::Rewrite => "rewrite",
            Self::LoopUntrained => "loop-untrained",
            Self::LoopActor => "loop-actor",
            Self::LoopEditor => "loop-editor",
            Self::Loop => "loop",
        }
    }

    /// Whose adapters are on. The Diffuser's are in all modes but the untrained loop: what the loop gains over its rivals is
    /// what mending gains.
    pub fn adapters(self) -> On {
        On {
            diffuser: self != Self::LoopUntrained,
            editor: matches!(self, Self::Loop | Self::LoopEditor),
            actor: matches!(self, Self::Loop | Self::LoopActor),
        }
    }

    /// Whether the mode edits pictures; its rivals draw anew instead.
    pub fn edits(self) -> bool {
        matches!(self, Self::LoopUntrained | Self::LoopActor | Self::LoopEditor | Self::Loop)
    }

    /// Whether it draws where the loop edits.
    pub fn is_rival(self) -> bool {
        matches!(self, Self::BestOfN | Self::Rewrite)
    }

    /// How the mode runs where the loop has these options, and its rivals so many rounds.
    pub fn options(self, of_loop: Options, rival_rounds: usize) -> Options {
        match self {
            Self::Diffuser => Options { rounds: 1, ..of_loop },
            Self::BestOfN => Options { rounds: rival_rounds, draws: rival_rounds, ..of_loop },
            Self::Rewrite => Options { rounds: rival_rounds, draws: 1, redraw: false, ..of_loop },
            Self::LoopUntrained | Self::LoopActor | Self::LoopEditor | Self::Loop => of_loop,
        }
    }
}

/// As many drawings as cost what the loop costs at most, rounded up, where an edit costs `edit` drawings. It may draw where it
/// could edit.
pub fn rival_rounds(of_loop: &Options, edit: f64) -> usize {
    let draws = of_loop.draws.min(of_loop.rounds);
    draws + ((of_loop.rounds - draws) as f64 * edit.max(1.0)).ceil() as usize
}

/// One that draws and edits.
pub trait DiffuserEditor: Diffuser + Editor {}
impl<T: Diffuser + Editor> DiffuserEditor for T {}

/// One that checks and writes edits.
pub trait CheckerActor: Checker + Actor {}
impl<T: Checker + Actor> CheckerActor for T {}

/// Gives `play` the cast of a mode.
pub fn cast<T>(mode: Mode, painter: &dyn DiffuserEditor, critic: &dyn CheckerActor, play: impl FnOnce(Cast) -> T) -> T {
    let anew = Anew(painter);
    let (actor, editor): (&dyn Actor, &dyn Editor) = match mode {
        Mode::Rewrite => (&Rewriter, &anew),
        _ => (critic, painter),
    };
    play(Cast { diffuser: painter, checker: critic, actor, editor })
}

/// An "edit" that draws the instruction as a prompt of its own, from other noise in each round: that of best-of-n.
struct Anew<'a>(&'a dyn DiffuserEditor);

impl Editor for Anew<'_> {
    fn edit(&self, jobs: &[Edit]) -> Result<Vec<Picture>> {
        let target = |job: &Edit| Target::words_alone(job.instruction);
        let targets: Vec<Target> = jobs.iter().map(target).collect();
        let seed = |job: &Edit| seed_of_drawing(job.seed, job.round);
        let draws: Vec<Draw> =
            jobs.iter().zip(&targets).map(|(job, target)| Draw { target, seed: seed(job) }).collect();
        self.0.draw(&draws)
    }
}

/// Says the claims that do not hold, the least probable first, and then the prompt. That nothing else is asked for cannot be
/// drawn by saying so.
struct Rewriter;

impl Actor for Rewriter {
    fn reflect(&self, jobs: &[Situation]) -> Result<Vec<Reflection>> {
        let rewrite = |job: &Situation| {
            let said = |v: &&Verdict| !v.yes && !matches!(v.claim, Claim::Only(_));
            let mut missed: Vec<_> = job.verdicts.iter().filter(said).collect();
            missed.sort_by(|a, b| a.p_yes.total_cmp(&b.p_yes));
            let parts = missed.iter().map(|v| v.claim.to_string()).chain([job.target.words().to_owned()]);
            Reflection { thought: String::new(), edit: parts.collect::<Vec<_>>().join("; ") }
        };
        Ok(jobs.iter().map(rewrite).collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use image::RgbImage;
    use std::cell::RefCell;

    /// Remembers what it is asked to draw.
    #[derive(Default)]
    struct Memory(RefCell<Vec<(String, u64)>>);

    impl Diffuser for Memory {
        fn draw(&self, jobs: &[Draw]) -> Result<Vec<Picture>> {
            self.0.borrow_mut().extend(jobs.iter().map(|job| (job.target.words().to_owned(), job.seed)));
            Ok(jobs.iter().map(|_| Picture::from_pixels(RgbImage::new(1, 1))).collect())
        }
    }

    impl Editor for Memory {
        fn edit(&self, _: &[Edit]) -> Result<Vec<Picture>> {
            anyhow::bail!("nothing is edited here")
        }
    }

    #[test]
    fn names_are_those_of_the_files() {
        for mode in Mode::ALL {
            assert_eq!(serde_json::to_value(mode).unwrap(), mode.name());
        }
        let of_loop = Options { rounds: 4, draws: 2, ..Options::default() };
        let shape = |mode: Mode| {
            let options = mode.options(of_loop, rival_rounds(&of_loop, 1.5));
            (options.rounds, options.draws)
        };
        let shapes = [Mode::Diffuser, Mode::BestOfN, Mode::Rewrite, Mode::Loop].map(shape);
        assert_eq!(shapes, [(1, 2), (5, 5), (5, 1), (4, 2)]);
        let rounds = |rounds, draws, edit| rival_rounds(&Options { rounds, draws, ..of_loop }, edit);
        assert_eq!([rounds(4, 2, 1.0), rounds(4, 1, 1.5), rounds(1, 2, 1.5), rounds(3, 5, 1.5)], [4, 6, 1, 3]);
    }

    #[test]
    fn a_loop_has_the_adapters_of_its_name_and_its_rivals_those_that_draw() {
        let none = On { diffuser: false, editor: false, actor: false };
        let draws = On { diffuser: true, ..none };
        let table = [
            (Mode::Diffuser, draws),
            (Mode::BestOfN, draws),
            (Mode::Rewrite, draws),
            (Mode::LoopUntrained, none),
            (Mode::LoopActor, On { actor: true, ..draws }),
            (Mode::LoopEditor, On { editor: true, ..draws }),
            (Mode::Loop, On { diffuser: true, editor: true, actor: true }),
        ];
        assert_eq!(Mode::ALL.map(|mode| (mode, mode.adapters())), table);
    }

    #[test]
    fn the_rivals_draw_anew_from_other_noise() {
        let picture = Picture::from_pixels(RgbImage::new(1, 1));
        let verdict = |claim: Claim, p_yes: f64| Verdict { claim, yes: p_yes >= 0.5, p_yes, reflection: String::new() };
        let object = |name: &str| Claim::Object(name.into());
        let verdicts = [
            verdict(object("red ball"), 0.4),
            verdict(object("star"), 0.9),
            verdict(object("blue cube"), 0.1),
            verdict(Claim::Only(vec!["red ball".into()]), 0.0),
        ];
        let target = Target::words_alone("a scene");
        let situation =
            Situation { target: &target, picture: &picture, verdicts: &verdicts, earlier: &[], seed: 5, round: 1 };
        let written = Rewriter.reflect(&[situation]).unwrap();
        assert_eq!(written[0].edit, "blue cube; red ball; a scene");

        let memory = Memory::default();
        let edit = |round| Edit {
            target: &target,
            picture: &picture,
            verdicts: &verdicts,
            instruction: &written[0].edit,
            seed: 5,
            round,
        };
        Anew(&memory).edit(&[edit(1), edit(2), edit(1)]).unwrap();
        let asked = memory.0.borrow();
        assert!(asked.iter().all(|(prompt, seed)| prompt == &written[0].edit && *seed != 5));
        assert!(asked[0].1 != asked[1].1 && asked[0].1 == asked[2].1);
    }
}
