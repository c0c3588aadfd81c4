//! The operations on devices other than the CPU: composed of candle's kernels.
//!
//! Candle's fused kernels (softmax, norms) have no backward pass, and its plain operations keep every intermediate result
//! for theirs. So what is costly here is a [`node`]: its value is computed without a graph, by fused kernels where there
//! are any, and its gradients by a formula, from the inputs alone.
//!
//! All of it runs on the CPU too, in any number format: so the tests hold it to the CPU's own kernels where no other
//! device is at hand.

mod attention;
mod block;
mod embedding;
mod linear;
mod mlp;
mod norm;
mod rope;

pub(super) use attention::attention;
pub(super) use block::attention_swiglu;
pub(super) use embedding::{embedding, select_rows};
pub(super) use linear::linear;
pub(super) use mlp::{gate_residual, gelu_tanh, swiglu};
pub(super) use norm::{layer_norm, layer_norm_modulate, rms_norm, widen};
pub(super) use rope::{norm_rope, rope};

use candle_core::{
    CpuStorage, CudaStorage, CustomOp1, CustomOp2, CustomOp3, Layout, MetalStorage, Result, Shape, Storage, Tensor,
    backend::BackendStorage,
};

/// The gradients of a [`node`] with respect to its inputs, given these, its value and the gradient of that.
trait Backward<const N: usize>: Fn([&Tensor; N], &Tensor, &Tensor) -> Result<[Tensor; N]> + Send + Sync + 'static {}

impl<const N: usize, F> Backward<N> for F where
    F: Fn([&Tensor; N], &Tensor, &Tensor) -> Result<[Tensor; N]> + Send + Sync + 'static
{
}

/// `value`, computed of `x` without a graph, as a node of the graph.
fn node1(x: &Tensor, value: Tensor, backward: impl Backward<1>) -> Result<Tensor> {
    if x.track_op() { x.apply_op1(Node::new(value, backward)?) } else { Ok(value) }
}

/// The same of two inputs.
fn node2([x, y]: [&Tensor; 2], value: Tensor, backward: impl Backward<2>) -> Result<Tensor> {
    if x.track_op() || y.track_op() { x.apply_op2(y, Node::new(value, backward)?) } else { Ok(value) }
}

/// The same of three inputs.
fn node3([x, y, z]: [&Tensor; 3], value: Tensor, backward: impl Backward<3>) -> Result<Tensor> {
    if x.track_op() || y.track_op() || z.track_op() {
        x.apply_op3(y, z, Node::new(value, backward)?)
    } else {
        Ok(value)
    }
}

/// A value that is at hand, and the way back.
struct Node<F> {
    value: Tensor,
    backward: F,
}

impl<F> Node<F> {
    fn new(value: Tensor, backward: F) -> Result<Self> {
        // A result of its own begins at the start of its memory, as the clone below assumes.
        let value = value.contiguous()?;
        let starts = value.storage_and_layout().1.start_offset() == 0;
        let value = if starts { value } else { value.force_contiguous()? };
        Ok(Self { value, backward })
    }

    fn cpu(&self) -> Result<(CpuStorage, Shape)> {
        let (storage, layout) = self.value.storage_and_layout();
        match &*storage {
            Storage::Cpu(storage) => Ok((storage.try_clone(layout)?, layout.shape().clone())),
            _ => candle_core::bail!("an operation on the CPU has a value elsewhere"),
        }
    }

    fn cuda(&self) -> Result<(CudaStorage, Shape)> {
        let (storage, layout) = self.value.storage_and_layout();
        match &*storage {
            Storage::Cuda(storage) => Ok((storage.try_clone(layout)?, layout.shape().clone())),
            _ => candle_core::bail!("an operation on a CUDA device has a value elsewhere"),
        }
    }

    fn metal(&self) -> Result<(MetalStorage, Shape)> {
        let (storage, layout) = self.value.storage_and_layout();
        match &*storage {
            Storage::Metal(storage) => Ok((storage.try_clone(layout)?, layout.shape().clone())),
            _ => candle_core::bail!("an operation on a Metal device has a value elsewhere"),
        }
    }
}

/// The `bwd` of a custom operation of so many inputs.
macro_rules! custom {
    ($op:ident, $n:literal, [$($input:ident),*], [$($some:ty),*]) => {
        impl<F: Backward<$n>> $op for Node<F> {
            fn name(&self) -> &'static str {
                "composed"
            }

            fn cpu_fwd(&self, $(_: custom!(@as $input &CpuStorage), _: &Layout),*) -> Result<(CpuStorage, Shape)> {
                self.cpu()
            }

            fn cuda_fwd(&self, $(_: custom!(@as $input &CudaStorage), _: &Layout),*) -> Result<(CudaStorage, Shape)> {
                self.cuda()
            }

            fn metal_fwd(&self, $(_: custom!(@as $input &MetalStorage), _: &Layout),*) -> Result<(MetalStorage, Shape)> {
                self.metal()
            }

            fn bwd(&self, $($input: &Tensor,)* value: &Tensor, grad: &Tensor) -> Result<custom!(@out $($some),*)> {
                // Detached, so that nothing here becomes part of a graph.
                let inputs = [$($input),*].map(Tensor::detach);
                let grads = (self.backward)(inputs.each_ref(), &value.detach(), &grad.contiguous()?)?;
                let [$($input),*] = grads;
                Ok(custom!(@some $($input),*))
            }
        }
    };
    (@as $input:ident $type:ty) => { $type };
    (@out $one:ty) => { Option<Tensor> };
    (@out $($some:ty),*) => { ($($some),*) };
    (@some $one:ident) => { Some($one) };
    (@some $($many:ident),*) => { ($(Some($many)),*) };
}

custom!(CustomOp1, 1, [x], [Option<Tensor>]);
custom!(CustomOp2, 2, [x, y], [Option<Tensor>, Option<Tensor>]);
custom!(CustomOp3, 3, [x, y, z], [Option<Tensor>, Option<Tensor>, Option<Tensor>]);
