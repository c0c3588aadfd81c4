//! Progress of a run and its end before time.

use crate::error::Cancelled;
use anyhow::Result;
use std::cell::Cell;

/// Who waits for a run: told after every evaluation of the network, asked before it.
pub trait Watch {
    /// `done` of `total` evaluations are done.
    fn progress(&self, _done: usize, _total: usize) {}

    /// Whether to end now, with [`Cancelled`].
    fn cancelled(&self) -> bool {
        false
    }
}

/// Nobody waits.
pub struct Unwatched;

impl Watch for Unwatched {}

/// A run under way.
pub struct Progress<'a> {
    watch: &'a dyn Watch,
    done: Cell<usize>,
    total: usize,
    stopped: Cell<bool>,
}

impl<'a> Progress<'a> {
    pub fn new(watch: &'a dyn Watch, total: usize) -> Self {
        Self { watch, done: Cell::new(0), total, stopped: Cell::new(false) }
    }

    /// Before an evaluation.
    pub fn begin(&self) -> candle_core::Result<()> {
        if self.watch.cancelled() {
            self.stopped.set(true);
            candle_core::bail!("cancelled");
        }
        Ok(())
    }

    /// After an evaluation.
    pub fn end(&self) {
        self.done.set(self.done.get() + 1);
        self.watch.progress(self.done.get(), self.total);
    }

    /// The result of a run, or [`Cancelled`] if that is why it failed.
    pub fn finish<T>(&self, result: candle_core::Result<T>) -> Result<T> {
        match result {
            Err(_) if self.stopped.get() => Err(Cancelled.into()),
            other => Ok(other?),
        }
    }
}
