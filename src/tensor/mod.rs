//! Differentiable operations. Everything that is trained stands on these, because several of candle's own fast paths
//! drop gradients without a word.
//!
//! Each operation has a fused CPU kernel with its own backward, and a composition of candle's kernels for every other
//! device and number format; on CUDA the costly parts of those are kernels of our own: in f32 with
//! their backward, and forward passes in bf16.

pub mod device;
pub mod recompute;
pub mod rng;

mod attention;
mod bf16;
mod composed;
mod conv;
pub(crate) mod cpu;
#[cfg(feature = "cuda")]
mod cuda;
mod embedding;
mod group_norm;
mod linear;
mod loss;
mod low_rank;
mod mlp;
mod norm;
mod parallel_block;
#[cfg(test)]
pub(crate) mod parity;
mod rope;
#[cfg(test)]
mod tests;

pub use attention::{Mask, attention};
pub use conv::{conv2d, upsample2x};
pub use embedding::{embedding, select_rows};
pub use group_norm::group_norm;
pub use linear::{Precision, linear, linear_in};
pub use loss::cross_entropy;
pub use low_rank::{linear_low_rank, low_rank};
pub use mlp::{gate_residual, gelu, gelu_tanh, silu, swiglu, swiglu_of};
pub use norm::{layer_norm, layer_norm_modulate, rms_norm};
pub use parallel_block::attention_swiglu;
pub use rope::{Rotation, norm_rope, rope};
