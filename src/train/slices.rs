//! Tensors of the CPU as slices to be changed in place: the optimiser's loops write variables and moments.

use candle_core::{CpuStorage, InplaceOp1, Layout, Result, Tensor, bail};
use std::cell::Cell;

/// Numbers that one task of a parallel loop works on. Fixed, so that sums come out the same for any number of threads.
pub const CHUNK: usize = 1 << 14;

/// Calls `f` with the elements of `tensor`, which must be contiguous, f32 and on the CPU.
pub fn edit<F: FnOnce(&mut [f32]) -> Result<()>>(tensor: &Tensor, f: F) -> Result<()> {
    struct Edit<F>(Cell<Option<F>>);
    impl<F: FnOnce(&mut [f32]) -> Result<()>> InplaceOp1 for Edit<F> {
        fn name(&self) -> &'static str {
            "edit"
        }

        fn cpu_fwd(&self, storage: &mut CpuStorage, layout: &Layout) -> Result<()> {
            match (storage, layout.contiguous_offsets(), self.0.take()) {
                (CpuStorage::F32(data), Some((start, end)), Some(f)) => f(&mut data[start..end]),
                _ => bail!("expected a contiguous f32 tensor"),
            }
        }
    }
    tensor.inplace_op1(&Edit(Cell::new(Some(f))))
}
