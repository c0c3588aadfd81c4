//! The commands: the only code that prints.

use crate::cli::{Cli, Command};
use anyhow::Result;

mod completions;
mod train;
mod world;

/// Runs the command that was asked for.
pub fn run(cli: Cli) -> Result<()> {
    match cli.command {
        Command::Train(command) => train::run(&command),
        Command::World(command) => world::run(&command),
        Command::Completions(args) => completions::run(&args),
        _ => anyhow::bail!("not there yet"),
    }
}
