//! Attention and SwiGLU side by side, cut out of one projection and joined again; so are the gradients, once.

use super::{attention, mlp, node3, norm, rope::Turn};
use crate::tensor::{Mask, Rotation};
use candle_core::{D, Result, Tensor};

#[allow(clippy::too_many_arguments)]
pub fn attention_swiglu(
    x: &Tensor,
    q_norm: &Tensor,
    k_norm: &Tensor,
    eps: f64,
    heads: usize,
    cos: &Tensor,
    sin: &Tensor,
    rotation: Rotation,
) -> Result<Tensor> {
    let (b, t, width) = x.dims3()?;
    let d = q_norm.dim(0)?;
    let inner = heads * d;
    if width < 3 * inner || !(width - 3 * inner).is_multiple_of(2) {
        candle_core::bail!("{heads} heads of {d} do not fit into {:?}", x.dims());
    }
    let cut = Cut { b, t, heads, d, eps, turn: Turn::new(cos, sin, rotation) };
    let value = {
        let x = x.detach();
        let [q, k] = [(0, q_norm), (1, k_norm)].map(|(i, weight)| cut.turned(&cut.part(&x, i)?, &weight.detach()));
        let y = attention::value(&q?, &k?, &cut.part(&x, 2)?, &Mask::default())?.reshape((b, t, inner))?;
        Tensor::cat(&[y, mlp::value(&x, 3 * inner)?], D::Minus1)?
    };
    node3([x, q_norm, k_norm], value, move |inputs, value, grad| cut.gradients(inputs, value, grad))
}

struct Cut {
    b: usize,
    t: usize,
    heads: usize,
    d: usize,
    eps: f64,
    turn: Turn,
}

impl Cut {
    /// Queries (0), keys (1) or values (2), or the attention part of a result (0): `(B, T, H, D)`.
    fn part(&self, x: &Tensor, i: usize) -> Result<Tensor> {
        let inner = self.heads * self.d;
        x.narrow(2, i * inner, inner)?.contiguous()?.reshape((self.b, self.t, self.heads, self.d))
    }

    fn turned(&self, x: &Tensor, weight: &Tensor) -> Result<Tensor> {
        self.turn.of_norm(x, weight, self.eps)
    }

    fn gradients(&self, [x, q_norm, k_norm]: [&Tensor; 3], value: &Tensor, grad: &Tensor) -> Result<[Tensor; 3]> {
        let inner = self.heads * self.d;
        let (q, k, v) = (self.part(x, 0)?, self.part(x, 1)?, self.part(x, 2)?);
        let (turned_q, turned_k) = (self.turned(&q, q_norm)?, self.turned(&k, k_norm)?);
        let (y, to_y) = (self.part(value, 0)?, self.part(grad, 0)?);
        let [to_q, to_k, to_v] = attention::gradients([&turned_q, &turned_k, &v], &y, &to_y, &Mask::default())?;
        let back = |x: &Tensor, weight: &Tensor, grad: &Tensor| {
            norm::rms_gradients(x, weight, self.eps, &self.turn.back(grad)?)
        };
        let ([to_q, to_q_norm], [to_k, to_k_norm]) = (back(&q, q_norm, &to_q)?, back(&k, k_norm, &to_k)?);
        let to_rest = mlp::gradient(x, 3 * inner, grad)?;
        let flat = |x: Tensor| x.reshape((self.b, self.t, inner));
        Ok([Tensor::cat(&[flat(to_q)?, flat(to_k)?, flat(to_v)?, to_rest], D::Minus1)?, to_q_norm, to_k_norm])
    }
}
