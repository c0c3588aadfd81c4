//! Embeddings of tokens.

use super::composed;
use candle_core::{Result, Tensor};

/// The rows `ids (N)` of `table (V, D)`: `(N, D)`.
pub fn embedding(table: &Tensor, ids: &Tensor) -> Result<Tensor> {
    if table.device().is_cpu() { table.index_select(ids, 0) } else { composed::embedding(table, ids) }
}
