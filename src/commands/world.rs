//! `rlrig world`.

use crate::cli::World;
use anyhow::{Result, bail};

pub fn run(_command: &World) -> Result<()> {
    bail!("the world is not part of this build")
}
