//! Matrix products of a layer.

use super::{node1, node2};
use crate::tensor::{Precision, linear::with_last};
use candle_core::{D, DType, Result, Tensor};

/// `x W^T`; of the gradients only those that are asked for are computed.
pub fn linear(precision: Precision, x: &Tensor, weight: &Tensor) -> Result<Tensor> {
    let product = Product { half: precision == Precision::Bf16 && x.dtype() == DType::F32 };
    let value = product.value(&x.detach(), &weight.detach())?;
    match (x.track_op(), weight.track_op()) {
        (_, false) => {
            let weight = weight.detach();
            node1(x, value, move |[x], _, grad| Ok([product.to_x(x, &weight, grad)?]))
        }
        (false, true) => {
            let x = x.detach();
            node1(weight, value, move |_, _, grad| Ok([product.to_weight(&x, grad)?]))
        }
        (true, true) => node2([x, weight], value, move |[x, weight], _, grad| {
            Ok([product.to_x(x, weight, grad)?, product.to_weight(x, grad)?])
        }),
    }
}

/// The rows of `x (.., D)`.
pub(super) fn rows(x: &Tensor) -> Result<Tensor> {
    x.reshape(((), x.dim(D::Minus1)?))
}

/// The sum of the rows of `x (N, D)`, `(D)`: a product with ones, as candle's sums over columns are slow.
pub(super) fn sum_rows(x: &Tensor) -> Result<Tensor> {
    Tensor::ones((1, x.dim(0)?), x.dtype(), x.device())?.matmul(x)?.squeeze(0)
}

#[derive(Clone, Copy)]
struct Product {
    /// Whether factors are rounded to bfloat16.
    half: bool,
}

impl Product {
    fn factor(self, x: &Tensor) -> Result<Tensor> {
        if self.half { x.to_dtype(DType::BF16) } else { Ok(x.clone()) }
    }

    fn value(self, x: &Tensor, weight: &Tensor) -> Result<Tensor> {
        let y = self.factor(&rows(x)?)?.matmul(&self.factor(weight)?.t()?)?;
        y.to_dtype(x.dtype())?.reshape(with_last(x.dims(), weight.dim(0)?))
    }

    fn to_x(self, x: &Tensor, weight: &Tensor, grad: &Tensor) -> Result<Tensor> {
        let y = self.factor(&rows(grad)?)?.matmul(&self.factor(weight)?)?;
        y.to_dtype(x.dtype())?.reshape(x.shape())
    }

    fn to_weight(self, x: &Tensor, grad: &Tensor) -> Result<Tensor> {
        self.factor(&rows(grad)?)?.t()?.matmul(&self.factor(&rows(x)?)?)?.to_dtype(x.dtype())
    }
}
