//! The commands: the only code that prints.

use crate::cli::{Cli, Command};
use anyhow::{Context, Result};
use std::{
    hash::{BuildHasher, Hasher},
    sync::{
        OnceLock,
        atomic::{AtomicBool, Ordering},
    },
};

/// A line on stderr. Whether anyone can read it is nothing to the work, so it never fails, as `eprintln!` does.
macro_rules! note {
    ($($text:tt)*) => {{
        let _ = std::io::Write::write_fmt(&mut std::io::stderr(), format_args!("{}\n", format_args!($($text)*)));
    }};
}

mod adapters;
mod ask;
mod check;
mod completions;
mod doctor;
mod edit;
mod eval;
mod eval_edits;
mod eval_join;
mod eval_verdicts;
mod generate;
mod info;
mod models;
mod open;
mod output;
mod redraw;
mod show;
mod train;
mod world;

/// Runs the command that was asked for.
pub fn run(cli: Cli) -> Result<()> {
    match cli.command {
        Command::Generate(args) => generate::run(*args),
        Command::Edit(args) => edit::run(&args),
        Command::Check(args) => check::run(&args),
        Command::Eval(args) => eval::run(&args),
        Command::Train(command) => train::run(&command),
        Command::World(command) => world::run(&command),
        Command::Models(args) => models::run(&args),
        Command::Info(args) => info::run(&args),
        Command::Doctor(args) => doctor::run(&args),
        Command::Completions(args) => completions::run(&args),
    }
}

/// A flag that the first Ctrl-C sets; the second ends the process.
fn interrupt() -> Result<&'static AtomicBool> {
    static STOP: AtomicBool = AtomicBool::new(false);
    static SET: OnceLock<()> = OnceLock::new();
    if SET.set(()).is_ok() {
        ctrlc::set_handler(|| {
            if STOP.swap(true, Ordering::Relaxed) {
                std::process::exit(130);
            }
            note!("stopping; what is finished is kept (once more to quit at once)");
        })
        .context("cannot watch for Ctrl-C")?;
    }
    Ok(&STOP)
}

/// A line on stdout.
fn print(line: &str) -> Result<()> {
    use std::io::Write;
    writeln!(std::io::stdout(), "{line}").context("cannot write to stdout")
}

/// A seed for those who gave none; short enough to be typed.
fn fresh_seed() -> u64 {
    // The standard library's hasher is keyed by the system's randomness.
    std::hash::RandomState::new().build_hasher().finish() >> 32
}
