//! `rlrig completions SHELL`.

use crate::cli::{Cli, Completions};
use anyhow::Result;
use clap::CommandFactory;
use std::io::Write;

pub fn run(args: &Completions) -> Result<()> {
    // Through a buffer: clap_complete panics when stdout is closed early.
    let mut script = Vec::new();
    clap_complete::generate(args.shell, &mut Cli::command(), "rlrig", &mut script);
    std::io::stdout().write_all(&script)?;
    Ok(())
}
