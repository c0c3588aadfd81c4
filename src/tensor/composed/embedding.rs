//! Rows of a table.

use super::node1;
#[cfg(feature = "cuda")]
use crate::tensor::cuda;
use candle_core::{Result, Tensor};

/// Numbers of the matrix that says which row belongs to which token, at most.
const ONE_HOT: usize = 1 << 28;

pub fn embedding(table: &Tensor, ids: &Tensor) -> Result<Tensor> {
    let value = table.detach().index_select(ids, 0)?;
    let ids = ids.clone();
    node1(table, value, move |[table], _, grad| {
        let rows = table.dim(0)?;
        if rows * ids.elem_count() > ONE_HOT {
            return Ok([table.zeros_like()?.index_add(&ids.contiguous()?, grad, 0)?]);
        }
        // As a product of matrices: candle's index_add walks through all tokens one by one.
        let all = Tensor::arange(0, rows as u32, table.device())?.unsqueeze(1)?;
        let belongs = all.broadcast_eq(&ids.unsqueeze(0)?)?.to_dtype(grad.dtype())?; // (rows, tokens)
        Ok([belongs.matmul(grad)?])
    })
}

pub fn select_rows(x: &Tensor, rows: &[u32]) -> Result<Tensor> {
    let places = Tensor::new(rows, x.device())?;
    let value = x.detach().contiguous()?.index_select(&places, 0)?;
    #[cfg(feature = "cuda")]
    let rows = rows.to_vec();
    node1(x, value, move |[x], _, grad| {
        #[cfg(feature = "cuda")]
        if let Some(gradient) = cuda::select_backward(grad, &rows, x.dim(0)?)? {
            return Ok([gradient.reshape(x.shape())?]);
        }
        Ok([x.zeros_like()?.contiguous()?.index_add(&places, grad, 0)?])
    })
}
