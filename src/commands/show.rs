//! Progress and verdicts on stderr, results on stdout.

use crate::{
    flow::Watch,
    rig::{
        cycle::{Action, Event, Stage, Turn},
        roles::Verdict,
    },
};
use indicatif::{ProgressBar, ProgressStyle};
use std::{
    io::{IsTerminal, Write},
    sync::atomic::{AtomicBool, Ordering},
};

/// Where people look.
#[derive(Clone)]
pub struct Console {
    quiet: bool,
    colour: bool,
    bar: ProgressBar,
    /// How many pictures are made, for the line heads.
    jobs: usize,
}

impl Console {
    pub fn new(quiet: bool, jobs: usize) -> Self {
        let bar = if quiet { ProgressBar::hidden() } else { ProgressBar::no_length() };
        if let Ok(style) = ProgressStyle::with_template("{msg} {bar:24} {pos}/{len} {per_sec} {eta} left") {
            bar.set_style(style);
        }
        let plain = std::env::var_os("NO_COLOR").is_some_and(|v| !v.is_empty());
        Self { quiet, colour: std::io::stderr().is_terminal() && !plain, bar, jobs }
    }

    /// A line for people.
    pub fn say(&self, text: &str) {
        if !self.quiet {
            self.bar.suspend(|| note!("{text}"));
        }
    }

    /// What happens in the loop.
    pub fn hear(&self, event: &Event) {
        match event {
            Event::Stage { stage, jobs } => {
                let what = match stage {
                    Stage::Draw => "draw",
                    Stage::Check => "check",
                    Stage::Reflect => "reflect",
                    Stage::Edit => "edit",
                };
                self.bar.reset();
                self.bar.set_length(0);
                self.bar.set_message(if jobs.len() > 1 { format!("{what} {}", jobs.len()) } else { what.to_owned() });
            }
            Event::Reflected { job, reflection, .. } => {
                let head = self.head(*job);
                if !reflection.thought.is_empty() {
                    self.say(&format!("{head}  reflection: {}", printable(&reflection.thought)));
                }
                self.say(&format!("{head}  edit: {}", printable(&reflection.edit)));
            }
            Event::Turn { job, round, turn } => self.turn(*job, *round, turn),
            Event::Finished { .. } => {}
        }
    }

    fn turn(&self, job: usize, round: usize, turn: &Turn) {
        let head = self.head(job);
        let from = match turn.action {
            Action::Edit { source, .. } if source + 2 != round => format!(", from round {}", source + 1),
            _ => String::new(),
        };
        let score = turn.score.map_or("not checked".to_owned(), |score| format!("score {score:.3}"));
        self.say(&format!("{head}round {round}{from}: {score}"));
        self.verdicts(&head, &turn.verdicts);
    }

    /// One line for each verdict.
    pub fn verdicts(&self, head: &str, verdicts: &[Verdict]) {
        for verdict in verdicts {
            let (word, code) = if verdict.yes { ("yes", "32") } else { ("no ", "31") };
            let word = if self.colour { format!("\u{1b}[{code}m{word}\u{1b}[0m") } else { word.to_owned() };
            self.say(&format!("{head}  {word} {:.2}  {}", verdict.p_yes, claim(verdict)));
        }
    }

    fn head(&self, job: usize) -> String {
        if self.jobs > 1 { format!("[{}/{}] ", job + 1, self.jobs) } else { String::new() }
    }

    /// A result: one line on stdout.
    pub fn result(&self, line: &str) -> std::io::Result<()> {
        self.bar.suspend(|| writeln!(std::io::stdout(), "{line}"))
    }

    pub fn done(&self) {
        self.bar.finish_and_clear();
    }

    /// Shows the sampler's steps, and stops it once `stop` is set.
    pub fn watch(&self, stop: &'static AtomicBool) -> Box<dyn Watch> {
        Box::new(Steps { bar: self.bar.clone(), stop })
    }
}

/// A verdict's claim, and what was seen instead if it does not hold.
pub fn claim(verdict: &Verdict) -> String {
    let told = !verdict.yes && !verdict.reflection.is_empty();
    let why = if told { format!(" (seen: {})", verdict.reflection) } else { String::new() };
    printable(&format!("{}{why}", verdict.claim))
}

/// Files and models' answers come from anywhere, and a terminal obeys control characters.
pub fn printable(text: &str) -> String {
    text.chars().map(|c| if c.is_control() && c != '\n' && c != '\t' { '\u{fffd}' } else { c }).collect()
}

struct Steps {
    bar: ProgressBar,
    stop: &'static AtomicBool,
}

impl Watch for Steps {
    fn progress(&self, done: usize, total: usize) {
        self.bar.set_length(total as u64);
        self.bar.set_position(done as u64);
    }

    fn cancelled(&self) -> bool {
        self.stop.load(Ordering::Relaxed)
    }
}
