//! Tensors of the CPU as slices: the optimiser's loops read gradients and write variables and moments in place.

use candle_core::{CpuStorage, InplaceOp1, Layout, Result, Storage, Tensor, bail};
use std::cell::Cell;

/// Numbers that one task of a parallel loop works on. Fixed, so that sums come out the same for any number of threads.
pub const CHUNK: usize = 1 << 14;

/// Calls `f` with the numbers of `tensor`, a contiguous f32 tensor of the CPU.
pub fn read<R>(tensor: &Tensor, f: impl FnOnce(&[f32]) -> R) -> Result<R> {
    let (storage, layout) = tensor.storage_and_layout();
    match (&*storage, layout.contiguous_offsets()) {
        (Storage::Cpu(CpuStorage::F32(data)), Some((start, end))) => Ok(f(&data[start..end])),
        _ => bail!("expected a contiguous f32 tensor of the CPU, got {tensor:?}"),
    }
}

/// Calls `f` with the numbers of `tensor`, a contiguous f32 tensor of the CPU, to be changed in place.
pub fn edit<R>(tensor: &Tensor, f: impl FnOnce(&mut [f32]) -> Result<R>) -> Result<R> {
    struct Edit<F, R> {
        f: Cell<Option<F>>,
        result: Cell<Option<R>>,
    }
    impl<R, F: FnOnce(&mut [f32]) -> Result<R>> InplaceOp1 for Edit<F, R> {
        fn name(&self) -> &'static str {
            "edit"
        }

        fn cpu_fwd(&self, storage: &mut CpuStorage, layout: &Layout) -> Result<()> {
            match (storage, layout.contiguous_offsets(), self.f.take()) {
                (CpuStorage::F32(data), Some((start, end)), Some(f)) => {
                    self.result.set(Some(f(&mut data[start..end])?));
                    Ok(())
                }
                _ => bail!("expected a contiguous f32 tensor"),
            }
        }
    }
    let op = Edit { f: Cell::new(Some(f)), result: Cell::new(None) };
    tensor.inplace_op1(&op)?;
    match op.result.take() {
        Some(result) => Ok(result),
        None => bail!("the tensor was not edited"),
    }
}
