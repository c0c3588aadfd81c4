//! `rlrig train`.

use crate::cli::Train;
use anyhow::{Result, bail};

pub fn run(_command: &Train) -> Result<()> {
    bail!("training is not part of this build")
}
