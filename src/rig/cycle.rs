//! Generate, Reflect, Edit: the loop of the paper over many prompts at once.
//!
//! The first rounds draw, as many as [`Options::draws`] says, each from other noise (in the paper it is one; after two an edit
//! more often begins with something that is nearly right). After every round the Checker answers each claim; a picture is
//! accepted when every claim has at least the probability [`Options::accept`]. Otherwise the Actor reads what is wrong and
//! writes an edit, the Editor carries it out, and the round ends with the next check. Those that are accepted leave the batch,
//! and waiting prompts take their places.
//!
//! Two choices where the paper is silent: an edit starts from the best picture so far, so that a failed edit is not
//! built upon, and the result is the best picture by the Checker's [`score`], not the last.

use super::roles::{
    Actor, Checker, Diffuser, Draw, Edit, Editor, Picture, Reflection, Situation, Target, Verdict, expect_each, score,
};
use crate::error::Cancelled;
use anyhow::{Result, ensure};
use serde::{Deserialize, Serialize};
use std::time::Instant;

/// The seed of a job's drawing after `turns` turns: the job's own first, then such as are far from each other and from those
/// that count up.
pub fn seed_of_drawing(seed: u64, turns: usize) -> u64 {
    const GOLDEN: u64 = 0x9e37_79b9_7f4a_7c15; // 2^64 over the golden ratio
    seed.wrapping_add(GOLDEN.wrapping_mul(turns as u64))
}

/// The roles, by whoever plays them.
#[derive(Clone, Copy)]
pub struct Cast<'a> {
    pub diffuser: &'a dyn Diffuser,
    pub checker: &'a dyn Checker,
    pub actor: &'a dyn Actor,
    pub editor: &'a dyn Editor,
}

/// Rounds of a job at most.
pub const MOST_ROUNDS: usize = 100;

/// How the loop runs. The default is that of `rlrig generate` and, but for the width, of `rlrig eval`.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    /// Rounds at most, the drawing included.
    pub rounds: usize,
    /// The rounds of these that draw before one edits. As many as there are rounds make it best-of-n.
    pub draws: usize,
    /// Whether an edit that did not help is followed by a new drawing rather than, as in the paper, by another edit.
    pub redraw: bool,
    /// The probability from which on a claim counts as held.
    pub accept: f64,
    /// Jobs worked on at once.
    pub width: usize,
}

impl Default for Options {
    fn default() -> Self {
        Self { rounds: 4, draws: 2, redraw: true, accept: 0.5, width: 8 }
    }
}

/// One picture to make.
#[derive(Clone, Debug)]
pub struct Job {
    pub target: Target,
    pub seed: u64,
}

/// What was done to make a turn's picture.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Action {
    Draw,
    /// An edit of the picture of turn `source`, counted from 0.
    Edit {
        source: usize,
        instruction: String,
        /// What the Actor found wrong.
        #[serde(default, skip_serializing_if = "String::is_empty")]
        thought: String,
    },
}

/// A job's share of the time its batch took, by stage.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Seconds {
    pub reflect: f64,
    /// Drawing or editing.
    pub paint: f64,
    pub check: f64,
}

/// One round of one job.
#[derive(Clone, Debug)]
pub struct Turn {
    pub action: Action,
    pub picture: Picture,
    pub verdicts: Vec<Verdict>,
    /// The Checker's score; `None` if there was nothing to check.
    pub score: Option<f64>,
    pub seconds: Seconds,
}

/// Why a job ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Ending {
    /// The best picture passes.
    Accepted,
    /// The rounds are spent, and no picture passes.
    Spent,
    /// The prompt makes no claim that could be checked.
    Unchecked,
    /// Cancelled; the turns so far are whole.
    Cancelled,
}

/// All that happened to one job.
#[derive(Clone, Debug)]
pub struct Outcome {
    pub turns: Vec<Turn>,
    /// The turn with the best picture.
    pub best: usize,
    pub ending: Ending,
}

impl Turn {
    /// Whether every claim holds; not so where there was nothing to check.
    pub fn passes(&self) -> bool {
        rank(&self.verdicts).0
    }
}

/// How good a picture is: one that passes before one that does not, then by score.
pub fn rank(verdicts: &[Verdict]) -> (bool, Option<f64>) {
    (!verdicts.is_empty() && verdicts.iter().all(|v| v.yes), score(verdicts))
}

/// The turn with the best picture, by [`rank`], then the earliest.
pub fn best(turns: &[Turn]) -> Option<usize> {
    let rank = |i: usize| rank(&turns[i].verdicts);
    (0..turns.len()).reduce(|best, i| if rank(i) > rank(best) { i } else { best })
}

impl Outcome {
    pub fn best(&self) -> &Turn {
        &self.turns[self.best]
    }
}

/// A part of a round, in which one role works on a batch of jobs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stage {
    Draw,
    Check,
    Reflect,
    Edit,
}

/// What the observer hears, in order.
#[derive(Debug)]
pub enum Event<'a> {
    /// A stage begins for these jobs.
    Stage { stage: Stage, jobs: &'a [usize] },
    /// The Actor has written an edit for round `round`.
    Reflected { job: usize, round: usize, reflection: &'a Reflection },
    /// A round is complete.
    Turn { job: usize, round: usize, turn: &'a Turn },
    /// A job is done. One that is cancelled before its first picture gets no such event.
    Finished { job: usize, outcome: &'a Outcome },
}

/// Runs the loop over `jobs`; one outcome for each, `None` if it was cancelled before its first picture was checked.
///
/// `cancelled` is asked before every stage; a role may ask it more often and fail with [`Cancelled`]. Any other error, and one
/// of `observe`, ends the run.
pub fn run(
    cast: Cast,
    jobs: &[Job],
    options: &Options,
    cancelled: &dyn Fn() -> bool,
    observe: &mut dyn FnMut(Event) -> Result<()>,
) -> Result<Vec<Option<Outcome>>> {
    let mut outcomes: Vec<Option<Outcome>> = jobs.iter().map(|_| None).collect();
    run_observed(cast, jobs, options, cancelled, &mut |event| {
        if let Event::Finished { job, outcome } = &event {
            outcomes[*job] = Some((*outcome).clone());
        }
        observe(event)
    })?;
    Ok(outcomes)
}

/// [`run`] for whom the events tell enough: an outcome is dropped when `observe` has heard of it, so that the memory of
/// many thousand jobs is that of those at work.
pub fn run_observed(
    cast: Cast,
    jobs: &[Job],
    options: &Options,
    cancelled: &dyn Fn() -> bool,
    observe: &mut dyn FnMut(Event) -> Result<()>,
) -> Result<()> {
    let some = options.rounds > 0 && options.draws > 0 && options.width > 0;
    ensure!(some, "the loop needs at least one round, one drawing and one place");
    let mut cycle = Cycle { cast, jobs, options, cancelled, observe };
    let mut waiting = 0..jobs.len();
    let mut active: Vec<State> = Vec::new();
    loop {
        active.extend(waiting.by_ref().take(options.width - active.len()).map(State::new));
        if active.is_empty() {
            return Ok(());
        }
        let stopped = match cycle.round(&mut active) {
            Ok(whole) => !whole,
            Err(error) if error.is::<Cancelled>() => true, // a role that was stopped in the middle of its work
            Err(error) => return Err(error),
        };
        let mut left = Vec::new();
        for state in active {
            match state.ending(options, stopped) {
                None => left.push(state),
                Some(ending) => cycle.finish(state, ending)?,
            }
        }
        active = left;
        if stopped {
            return Ok(());
        }
    }
}

/// A job in the batch.
struct State {
    job: usize,
    turns: Vec<Turn>,
}

impl State {
    fn new(job: usize) -> Self {
        Self { job, turns: Vec::new() }
    }

    /// Whether the next round draws.
    fn draws(&self, options: &Options) -> bool {
        let failed = |(source, _): (usize, &Turn)| {
            source + 1 < self.turns.len() && self.turns.last().is_some_and(|turn| turn.action != Action::Draw)
        };
        self.turns.len() < options.draws || options.redraw && self.source().is_some_and(failed)
    }

    /// The turn to build on.
    fn source(&self) -> Option<(usize, &Turn)> {
        best(&self.turns).map(|best| (best, &self.turns[best]))
    }

    /// The edits of turn `turn` that were made, none of which became a better picture if it still is the best.
    fn edits_of(&self, turn: usize) -> Vec<&str> {
        let of = |made| match made {
            &Action::Edit { source, ref instruction, .. } if source == turn => Some(instruction.as_str()),
            _ => None,
        };
        self.turns.iter().filter_map(|turn| of(&turn.action)).collect()
    }

    fn ending(&self, options: &Options, stopped: bool) -> Option<Ending> {
        match self.source() {
            Some((_, best)) if best.verdicts.is_empty() => Some(Ending::Unchecked),
            Some((_, best)) if best.passes() => Some(Ending::Accepted),
            _ if self.turns.len() >= options.rounds => Some(Ending::Spent),
            _ => stopped.then_some(Ending::Cancelled),
        }
    }
}

/// A round's picture before it is checked.
struct Made {
    action: Action,
    picture: Picture,
    seconds: Seconds,
}

struct Cycle<'a> {
    cast: Cast<'a>,
    jobs: &'a [Job],
    options: &'a Options,
    cancelled: &'a dyn Fn() -> bool,
    observe: &'a mut dyn FnMut(Event) -> Result<()>,
}

impl Cycle<'_> {
    /// One round of every active job. `false` if it was cancelled on the way, which leaves the jobs as they were.
    fn round(&mut self, active: &mut [State]) -> Result<bool> {
        let (new, old): (Vec<&State>, Vec<&State>) = active.iter().partition(|s| s.draws(self.options));
        let Some(drawn) = self.draw(&new)? else { return Ok(false) };
        let Some(edited) = self.edit(&old)? else { return Ok(false) };
        // Back into the order of `active`.
        let (mut drawn, mut edited) = (drawn.into_iter(), edited.into_iter());
        let next = |s: &State| if s.draws(self.options) { drawn.next() } else { edited.next() };
        let made: Vec<Made> = active.iter().filter_map(next).collect();
        let Some(turns) = self.check(active, made)? else { return Ok(false) };
        for (state, turn) in active.iter_mut().zip(turns) {
            (self.observe)(Event::Turn { job: state.job, round: state.turns.len() + 1, turn: &turn })?;
            state.turns.push(turn);
        }
        Ok(true)
    }

    /// Begins a stage, unless it is cancelled.
    fn begin(&mut self, stage: Stage, states: &[&State]) -> Result<bool> {
        if (self.cancelled)() {
            return Ok(false);
        }
        let jobs: Vec<usize> = states.iter().map(|s| s.job).collect();
        (self.observe)(Event::Stage { stage, jobs: &jobs })?;
        Ok(true)
    }

    /// Generate.
    fn draw(&mut self, states: &[&State]) -> Result<Option<Vec<Made>>> {
        if states.is_empty() {
            return Ok(Some(Vec::new()));
        }
        if !self.begin(Stage::Draw, states)? {
            return Ok(None);
        }
        let start = Instant::now();
        let draw = |s: &&State| {
            let Job { target, seed } = &self.jobs[s.job];
            Draw { target, seed: seed_of_drawing(*seed, s.turns.len()) }
        };
        let jobs: Vec<Draw> = states.iter().map(draw).collect();
        let pictures = expect_each("the Diffuser", jobs.len(), self.cast.diffuser.draw(&jobs)?)?;
        let seconds = Seconds { paint: share(start, jobs.len()), ..Seconds::default() };
        Ok(Some(pictures.into_iter().map(|picture| Made { action: Action::Draw, picture, seconds }).collect()))
    }

    /// Reflect, and edit the best picture so far.
    fn edit(&mut self, states: &[&State]) -> Result<Option<Vec<Made>>> {
        if states.is_empty() {
            return Ok(Some(Vec::new()));
        }
        if !self.begin(Stage::Reflect, states)? {
            return Ok(None);
        }
        let start = Instant::now();
        let sources: Vec<(usize, &Turn)> = states.iter().filter_map(|s| s.source()).collect();
        let earlier: Vec<Vec<&str>> = states.iter().zip(&sources).map(|(s, (source, _))| s.edits_of(*source)).collect();
        let situations: Vec<Situation> = states
            .iter()
            .zip(&sources)
            .zip(&earlier)
            .map(|((s, (_, turn)), earlier)| Situation {
                target: &self.jobs[s.job].target,
                picture: &turn.picture,
                verdicts: &turn.verdicts,
                earlier,
                seed: self.jobs[s.job].seed,
                round: s.turns.len(),
            })
            .collect();
        let reflections = expect_each("the Actor", situations.len(), self.cast.actor.reflect(&situations)?)?;
        let reflect = share(start, states.len());
        for (state, reflection) in states.iter().zip(&reflections) {
            (self.observe)(Event::Reflected { job: state.job, round: state.turns.len() + 1, reflection })?;
        }

        if !self.begin(Stage::Edit, states)? {
            return Ok(None);
        }
        let start = Instant::now();
        let edits: Vec<Edit> = situations
            .iter()
            .zip(&reflections)
            .map(|(s, reflection)| Edit {
                target: s.target,
                picture: s.picture,
                verdicts: s.verdicts,
                instruction: &reflection.edit,
                seed: s.seed,
                round: s.round,
            })
            .collect();
        let pictures = expect_each("the Editor", edits.len(), self.cast.editor.edit(&edits)?)?;
        let seconds = Seconds { reflect, paint: share(start, states.len()), ..Seconds::default() };
        let made = sources.iter().zip(reflections).zip(pictures).map(|(((source, _), reflection), picture)| Made {
            action: Action::Edit { source: *source, instruction: reflection.edit, thought: reflection.thought },
            picture,
            seconds,
        });
        Ok(Some(made.collect()))
    }

    /// Check every new picture against its claims.
    fn check(&mut self, states: &[State], made: Vec<Made>) -> Result<Option<Vec<Turn>>> {
        if !self.begin(Stage::Check, &states.iter().collect::<Vec<_>>())? {
            return Ok(None);
        }
        let start = Instant::now();
        Picture::develop(&made.iter().map(|m| &m.picture).collect::<Vec<_>>())?;
        let checks: Vec<(&Picture, &Target)> =
            made.iter().zip(states).map(|(m, s)| (&m.picture, &self.jobs[s.job].target)).collect();
        let verdicts = expect_each("the Checker", states.len(), self.cast.checker.check(&checks)?)?;
        for ((_, target), verdicts) in checks.iter().zip(&verdicts) {
            let whole = verdicts.len() == target.claims.len() && verdicts.iter().all(|v| v.p_yes.is_finite());
            ensure!(whole, "the Checker left a claim without an answer");
        }
        let check = share(start, states.len());
        let turns = made.into_iter().zip(verdicts).map(|(Made { action, picture, seconds }, mut verdicts)| {
            verdicts.iter_mut().for_each(|v| v.yes = v.p_yes >= self.options.accept);
            Turn { action, picture, score: score(&verdicts), verdicts, seconds: Seconds { check, ..seconds } }
        });
        Ok(Some(turns.collect()))
    }

    fn finish(&mut self, state: State, ending: Ending) -> Result<()> {
        let State { job, turns } = state;
        let Some(best) = best(&turns) else { return Ok(()) };
        (self.observe)(Event::Finished { job, outcome: &Outcome { turns, best, ending } })
    }
}

/// The share of one job in a stage that `n` jobs took part in.
fn share(start: Instant, n: usize) -> f64 {
    start.elapsed().as_secs_f64() / n.max(1) as f64
}
