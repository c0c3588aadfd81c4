//! What the host makes of batches to come, while a device computes.

use super::Batch;
use parking_lot::Mutex;
use std::collections::HashMap;

/// Values by the batch that they are for.
pub struct Ahead<T>(Mutex<HashMap<(u64, usize), T>>);

impl<T> Default for Ahead<T> {
    fn default() -> Self {
        Self(Mutex::default())
    }
}

impl<T> Ahead<T> {
    pub fn put(&self, batch: &Batch, value: T) {
        self.0.lock().insert((batch.step, batch.rows.start), value);
    }

    pub fn take(&self, batch: &Batch) -> Option<T> {
        self.0.lock().remove(&(batch.step, batch.rows.start))
    }
}
