//! What the CPU kernels share: access to tensors as slices, vectorisable arithmetic, and rows in parallel.
//!
//! Sums run over a fixed number of lanes and rows are cut into fixed pieces, so a result never depends on how many
//! threads there are.

use candle_core::{CpuStorage, DType, Layout, Result, Storage, Tensor};
use parking_lot::RwLockReadGuard;
use rayon::prelude::*;
use std::ops::{Deref, Range};

/// Numbers added side by side in a sum.
const LANES: usize = 16;
/// Elements that one task works on at least, so that small tensors stay on one thread.
const GRAIN: usize = 16 * 1024;

/// Whether the fused kernels can serve these tensors: on the CPU and in f32.
pub fn fused(tensors: &[&Tensor]) -> bool {
    #[cfg(test)]
    if super::parity::composing() {
        return false;
    }
    tensors.iter().all(|t| t.device().is_cpu() && t.dtype() == DType::F32)
}

/// The elements of a contiguous operand of a `CustomOp`.
pub fn slice<'a>(storage: &'a CpuStorage, layout: &Layout) -> Result<&'a [f32]> {
    match layout.contiguous_offsets() {
        Some((start, end)) => Ok(&storage.as_slice::<f32>()?[start..end]),
        None => candle_core::bail!("a fused operation got a strided tensor"),
    }
}

/// The elements of a contiguous f32 tensor on the CPU, for as long as this lives.
pub struct Floats<'a> {
    storage: RwLockReadGuard<'a, Storage>,
    range: Range<usize>,
}

/// Borrows the elements of `tensor`, which must be contiguous, f32 and on the CPU.
pub fn floats(tensor: &Tensor) -> Result<Floats<'_>> {
    let (storage, layout) = tensor.storage_and_layout();
    let Some((start, end)) = layout.contiguous_offsets() else {
        candle_core::bail!("a fused operation got a strided tensor")
    };
    match &*storage {
        Storage::Cpu(CpuStorage::F32(_)) => Ok(Floats { range: start..end, storage }),
        _ => candle_core::bail!("a fused operation got a tensor that is not f32 on the CPU"),
    }
}

impl Deref for Floats<'_> {
    type Target = [f32];

    fn deref(&self) -> &[f32] {
        match &*self.storage {
            Storage::Cpu(CpuStorage::F32(values)) => &values[self.range.clone()],
            _ => &[],
        }
    }
}

/// A pointer that tasks may write through at places that no two of them share.
#[derive(Clone, Copy)]
pub struct Shared(*mut f32);

// SAFETY: whoever uses it promises disjoint writes, see `Shared::at`.
unsafe impl Send for Shared {}
unsafe impl Sync for Shared {}

impl Shared {
    pub fn new(values: &mut [f32]) -> Self {
        Self(values.as_mut_ptr())
    }

    /// The pointer `offset` elements on.
    ///
    /// # Safety
    /// The offset lies within the slice, the slice outlives the use, and no other task touches what is written.
    pub unsafe fn at(self, offset: usize) -> *mut f32 {
        unsafe { self.0.add(offset) }
    }

    /// `len` elements from `offset` on.
    ///
    /// # Safety
    /// As for [`Shared::at`], for every element of the range.
    pub unsafe fn slice<'a>(self, offset: usize, len: usize) -> &'a mut [f32] {
        unsafe { std::slice::from_raw_parts_mut(self.0.add(offset), len) }
    }
}

/// Calls `f(row, out_row)` for every `width` elements of `out`, in parallel.
pub fn rows(out: &mut [f32], width: usize, f: impl Fn(usize, &mut [f32]) + Sync) {
    if width == 0 {
        return;
    }
    let block = GRAIN.div_ceil(width);
    out.par_chunks_mut(width * block).enumerate().for_each(|(chunk, out)| {
        for (i, row) in out.chunks_exact_mut(width).enumerate() {
            f(chunk * block + i, row);
        }
    });
}

/// `out[i] = f(x[i])` in parallel.
pub fn map(x: &[f32], f: impl Fn(f32) -> f32 + Sync) -> Vec<f32> {
    let mut out = vec![0.0; x.len()];
    out.par_chunks_mut(GRAIN).zip(x.par_chunks(GRAIN)).for_each(|(out, x)| {
        for (o, &x) in out.iter_mut().zip(x) {
            *o = f(x);
        }
    });
    out
}

/// `out[i] = f(x[i], y[i])` in parallel.
pub fn map2(x: &[f32], y: &[f32], f: impl Fn(f32, f32) -> f32 + Sync) -> Vec<f32> {
    let mut out = vec![0.0; x.len()];
    out.par_chunks_mut(GRAIN).zip(x.par_chunks(GRAIN).zip(y.par_chunks(GRAIN))).for_each(|(out, (x, y))| {
        for ((o, &x), &y) in out.iter_mut().zip(x).zip(y) {
            *o = f(x, y);
        }
    });
    out
}

/// Adds up `f(row)`, each of `width`, over rows `0..n`: in blocks whose sums are then added in order.
pub fn sum_rows(n: usize, width: usize, block: usize, f: impl Fn(usize, &mut [f32]) + Sync) -> Vec<f32> {
    let partial: Vec<Vec<f32>> = (0..n.div_ceil(block))
        .into_par_iter()
        .map(|chunk| {
            let mut sum = vec![0.0; width];
            for row in chunk * block..((chunk + 1) * block).min(n) {
                f(row, &mut sum);
            }
            sum
        })
        .collect();
    let mut total = vec![0.0; width];
    for sum in partial {
        add(&mut total, &sum);
    }
    total
}

/// `a * b + c`, in one instruction where the machine has it.
#[inline(always)]
pub fn fma(a: f32, b: f32, c: f32) -> f32 {
    if cfg!(any(target_feature = "fma", target_arch = "aarch64")) { a.mul_add(b, c) } else { a * b + c }
}

/// `e^x` to within two units in the last place, in a form that compilers vectorise. Below -87 it is `e^-87`, about 1e-38.
#[inline(always)]
pub fn exp(x: f32) -> f32 {
    const LN2_HIGH: f32 = 0.693_359_4;
    const LN2_LOW: f32 = -2.121_944_4e-4;
    /// `1.5 * 2^23`, where numbers lie 1 apart: adding it rounds to whole numbers, ties to even, which are then the last bits.
    const ROUND: f32 = 12_582_912.0;
    let x = x.clamp(-87.0, 88.0);
    let t = x * std::f32::consts::LOG2_E + ROUND;
    let n = t - ROUND;
    let r = fma(n, -LN2_LOW, fma(n, -LN2_HIGH, x));
    // The minimax polynomial of Cephes' expf.
    let p = fma(1.987_569_1e-4, r, 1.398_199_9e-3);
    let p = fma(p, r, 8.333_452e-3);
    let p = fma(p, r, 4.166_579_6e-2);
    let p = fma(p, r, 0.166_666_66);
    let p = fma(p, r, 0.5);
    let p = fma(p * r, r, r + 1.0);
    p * f32::from_bits(t.to_bits().wrapping_add(127) << 23)
}

/// `1 / (1 + e^-x)`.
#[inline(always)]
pub fn sigmoid(x: f32) -> f32 {
    1.0 / (1.0 + exp(-x))
}

/// Adds up pairs of `x` and `y` with `add(sum, x, y)`: each lane by itself, then the lanes in their order.
#[inline(always)]
pub fn lanes(x: &[[f32; LANES]], y: &[[f32; LANES]], add: impl Fn(f32, f32, f32) -> f32) -> f32 {
    let mut sums = [0f32; LANES];
    for (x, y) in x.iter().zip(y) {
        for ((sum, &x), &y) in sums.iter_mut().zip(x).zip(y) {
            *sum = add(*sum, x, y);
        }
    }
    sums.iter().fold(0.0, |total, sum| total + sum)
}

pub fn sum(x: &[f32]) -> f32 {
    let (x, rest) = x.as_chunks();
    rest.iter().fold(lanes(x, x, |sum, x, _| sum + x), |total, x| total + x)
}

pub fn dot(x: &[f32], y: &[f32]) -> f32 {
    let ((x, rest_x), (y, rest_y)) = (x.as_chunks(), y[..x.len()].as_chunks());
    rest_x.iter().zip(rest_y).fold(lanes(x, y, |sum, x, y| sum + x * y), |total, (x, y)| total + x * y)
}

/// `out += x`.
pub fn add(out: &mut [f32], x: &[f32]) {
    for (o, x) in out.iter_mut().zip(x) {
        *o += x;
    }
}

/// A matrix by its first element and the distance between neighbours in a row and in a column.
#[derive(Clone, Copy)]
pub struct View<'a> {
    pub values: &'a [f32],
    pub col: usize,
    pub row: usize,
}

impl View<'_> {
    /// Checks that an `rows x cols` matrix lies within the slice.
    pub fn holds(&self, rows: usize, cols: usize) -> bool {
        rows == 0 || cols == 0 || (rows - 1) * self.row + (cols - 1) * self.col < self.values.len()
    }
}

/// `lhs (m, k) * rhs (k, n)` as a dense `(m, n)`.
pub fn product([m, n, k]: [usize; 3], lhs: View, rhs: View) -> Vec<f32> {
    let mut out = vec![0.0; m * n];
    multiply(&mut out, 0.0, [m, n, k], lhs, rhs, 1.0);
    out
}

/// `out += factor * lhs (m, k) * rhs (k, n)`, dense.
pub fn add_product(out: &mut [f32], shape: [usize; 3], lhs: View, rhs: View, factor: f32) {
    multiply(out, 1.0, shape, lhs, rhs, factor);
}

/// `out = kept * out + factor * lhs (m, k) * rhs (k, n)`, dense; with `kept` of 0 what `out` holds does not matter.
fn multiply(out: &mut [f32], kept: f32, [m, n, k]: [usize; 3], lhs: View, rhs: View, factor: f32) {
    assert!(lhs.holds(m, k) && rhs.holds(k, n) && out.len() == m * n, "a matrix reaches beyond its memory");
    let (a, b) = (lhs.values.as_ptr(), rhs.values.as_ptr());
    // SAFETY: all three were checked, and `out` is borrowed by us alone.
    unsafe {
        let out = out.as_mut_ptr();
        gemm([m, n, k], out, [1, n], a, [lhs.col, lhs.row], b, [rhs.col, rhs.row], kept, factor, true);
    }
}

/// `dst = alpha * dst + beta * lhs * rhs` for matrices given by pointer and (column, row) strides.
///
/// # Safety
/// The pointers reach `m x n`, `m x k` and `k x n` elements under their strides, and nobody else writes `dst`.
#[allow(clippy::too_many_arguments)]
pub unsafe fn gemm(
    [m, n, k]: [usize; 3],
    dst: *mut f32,
    [dst_cs, dst_rs]: [usize; 2],
    lhs: *const f32,
    [lhs_cs, lhs_rs]: [usize; 2],
    rhs: *const f32,
    [rhs_cs, rhs_rs]: [usize; 2],
    alpha: f32,
    beta: f32,
    parallel: bool,
) {
    let parallelism =
        if parallel { gemm::Parallelism::Rayon(rayon::current_num_threads()) } else { gemm::Parallelism::None };
    let s = |x: usize| x as isize;
    // SAFETY: promised by the caller.
    unsafe {
        gemm::gemm(
            m,
            n,
            k,
            dst,
            s(dst_cs),
            s(dst_rs),
            alpha != 0.0,
            lhs,
            s(lhs_cs),
            s(lhs_rs),
            rhs,
            s(rhs_cs),
            s(rhs_rs),
            alpha,
            beta,
            false,
            false,
            false,
            parallelism,
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exp_is_exact_to_rounding() {
        for i in -8700..=8800 {
            let x = i as f32 / 100.0;
            let (got, want) = (f64::from(exp(x)), f64::from(x).exp());
            assert!((got / want - 1.0).abs() < 2.5e-7, "exp({x}) = {got}, not {want}");
        }
        assert!(exp(f32::NEG_INFINITY) < 1e-37 && exp(f32::NAN).is_nan());
    }

    #[test]
    fn exp_rounds_to_whole_numbers_as_the_standard_library_does() {
        let by_rounding = |x: f32| {
            let x = x.clamp(-87.0, 88.0);
            let n = (x * std::f32::consts::LOG2_E).round_ties_even();
            let r = fma(n, 2.121_944_4e-4, fma(n, -0.693_359_4, x));
            let p = fma(1.987_569_1e-4, r, 1.398_199_9e-3);
            let p = fma(fma(fma(fma(p, r, 8.333_452e-3), r, 4.166_579_6e-2), r, 0.166_666_66), r, 0.5);
            fma(p * r, r, r + 1.0) * f32::from_bits(((n as i32 + 127) as u32) << 23)
        };
        let same = |x: f32| assert_eq!(exp(x).to_bits(), by_rounding(x).to_bits(), "exp({x:e})");
        // Every 997th number there is, of both signs, and where the rounding changes.
        for bits in (0..=f32::INFINITY.to_bits()).step_by(997) {
            same(f32::from_bits(bits));
            same(-f32::from_bits(bits));
        }
        for half in -252..=254 {
            let x = half as f32 / 2.0 / std::f32::consts::LOG2_E;
            for x in [x.next_down().next_down(), x.next_down(), x, x.next_up(), x.next_up().next_up()] {
                same(x);
            }
        }
        [0.0, -0.0, f32::INFINITY, f32::NEG_INFINITY].into_iter().for_each(same);
    }

    #[test]
    fn sums_cover_every_element() {
        for n in [0, 1, 15, 16, 17, 100] {
            let x: Vec<f32> = (0..n).map(|i| i as f32).collect();
            let want: f32 = x.iter().sum();
            assert_eq!(sum(&x), want);
            assert_eq!(dot(&x, &vec![1.0; n]), want);
            let by_rows = sum_rows(n, 1, 4, |row, out| out[0] += x[row]);
            assert_eq!(by_rows[0], want);
        }
    }

    #[test]
    fn sums_add_in_a_fixed_order() {
        for n in [5, 16, 100, 1000] {
            let mut rng = crate::tensor::rng::Stream::new(0, "lanes", n as u64);
            let (x, y) = (rng.normals(n), rng.normals(n + 3));
            let in_order = |f: &dyn Fn(usize) -> f32| {
                let (mut sums, whole) = ([0f32; LANES], n - n % LANES);
                (0..whole).for_each(|i| sums[i % LANES] += f(i));
                let total = sums.iter().fold(0.0, |total, sum| total + sum);
                (whole..n).fold(total, |total, i| total + f(i))
            };
            assert_eq!(sum(&x).to_bits(), in_order(&|i| x[i]).to_bits());
            assert_eq!(dot(&x, &y).to_bits(), in_order(&|i| x[i] * y[i]).to_bits());
        }
    }
}
