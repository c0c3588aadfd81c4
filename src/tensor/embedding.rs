//! Rows of tables: embeddings of tokens, and states of chosen ones.

use super::composed;
use candle_core::{Result, Tensor};

/// The rows `ids (N)` of `table (V, D)`: `(N, D)`.
pub fn embedding(table: &Tensor, ids: &Tensor) -> Result<Tensor> {
    if table.device().is_cpu() { table.index_select(ids, 0) } else { composed::embedding(table, ids) }
}

/// The rows `rows` of `x (N, ..)`, any of them any number of times.
pub fn select_rows(x: &Tensor, rows: &[u32]) -> Result<Tensor> {
    if x.device().is_cpu() {
        x.index_select(&Tensor::new(rows, x.device())?, 0)
    } else {
        composed::select_rows(x, rows)
    }
}
