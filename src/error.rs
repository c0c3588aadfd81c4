//! The one distinction the exit code makes: a mistake in how rlrig was called, or a failure while it ran. And the one error
//! that is none: that someone ended the work.

/// A mistake in the command line, a config or a prompt: exit code 2. Everything else exits with 1.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct Usage(pub String);

/// Work was ended before its time by the one who watched it.
#[derive(Debug, thiserror::Error)]
#[error("cancelled")]
pub struct Cancelled;

/// Returns early with a [`Usage`] error, formatted like `format!`.
#[macro_export]
macro_rules! usage {
    ($($arg:tt)*) => { return Err(anyhow::Error::new($crate::error::Usage(format!($($arg)*)))) };
}
