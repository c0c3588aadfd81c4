//! The inner loops of the convolution on the CPU.
//!
//! Pictures are not unfolded. A task copies the rows it needs, padded, into a scratch buffer; every tap of the kernel is
//! then an offset into that buffer, and a tile of output channels x pixels stays in registers while the input channels
//! and taps go by. Stride 2 splits the columns of the buffer by parity, so its loads are contiguous too.

use crate::tensor::cpu::fma;
use std::ops::Range;

/// Pixels of one vector.
pub const LANES: usize = 8;
/// Output channels of one tile of [`correlate`].
pub const BLOCK: usize = 4;
/// Vectors of pixels of one tile of [`correlate`]: with [`BLOCK`] channels they fill most of the registers.
pub const SEGMENTS: usize = if cfg!(any(target_feature = "avx512vl", target_arch = "aarch64")) { 6 } else { 3 };
/// Tile of [`products`]: output channels by (input channel, tap) pairs.
const GRAD_BLOCK: usize = if cfg!(any(target_feature = "avx512vl", target_arch = "aarch64")) { 3 } else { 2 };
const GRAD_TAPS: usize = if cfg!(any(target_feature = "avx512vl", target_arch = "aarch64")) { 9 } else { 5 };

pub type Vector = [f32; LANES];

/// # Safety
/// `x[at..at + LANES]` must exist.
#[inline(always)]
unsafe fn load(x: &[f32], at: usize) -> Vector {
    debug_assert!(at + LANES <= x.len());
    // SAFETY: the caller's promise.
    unsafe { x.as_ptr().add(at).cast::<Vector>().read_unaligned() }
}

/// Writes the first `n` of `values`.
///
/// # Safety
/// `n` is at most [`LANES`], and as many elements from `to` on may be written by no other task.
#[inline(always)]
pub unsafe fn store(to: *mut f32, values: &Vector, n: usize) {
    // SAFETY: the caller's promise.
    unsafe {
        if n == LANES {
            to.cast::<Vector>().write_unaligned(*values); // of a known size: no call of memcpy
        } else {
            std::ptr::copy_nonoverlapping(values.as_ptr(), to, n);
        }
    }
}

/// Rows of one picture in a padded buffer: `channels` planes of `rows` rows, each row split into `phases` interleaved sets
/// of columns.
pub struct Padded {
    pub data: Vec<f32>,
    pub rows: usize,
    phases: usize,
    /// Columns of one phase.
    columns: usize,
}

impl Padded {
    pub fn new(phases: usize, columns: usize) -> Self {
        Self { data: Vec::new(), rows: 0, phases, columns }
    }

    pub fn row(&self) -> usize {
        self.phases * self.columns
    }

    pub fn plane(&self) -> usize {
        self.rows * self.row()
    }

    /// Offset of row `y` and column `x` from the start of a plane.
    pub fn offset(&self, y: usize, x: usize) -> usize {
        y * self.row() + (x % self.phases) * self.columns + x / self.phases
    }

    /// Copies rows `rows` (which may lie outside) of `picture`, planes of `h` by `w`, with `left` columns of zeros before
    /// them and zeros wherever there is no picture.
    pub fn fill(&mut self, picture: &[f32], (h, w): (usize, usize), rows: Range<isize>, left: usize) {
        self.rows = (rows.end - rows.start).max(0) as usize;
        let (row, plane) = (self.row(), self.plane());
        self.data.resize(picture.len() / (h * w) * plane, 0.0);
        for (planes, source) in self.data.chunks_exact_mut(plane).zip(picture.chunks_exact(h * w)) {
            for (line, y) in planes.chunks_exact_mut(row).zip(rows.clone()) {
                if y < 0 || y >= h as isize {
                    line.fill(0.0);
                    continue;
                }
                let source = &source[y as usize * w..(y as usize + 1) * w];
                for (phase, line) in line.chunks_exact_mut(self.columns).enumerate() {
                    if self.phases == 1 {
                        let n = w.min(self.columns - left);
                        line[..left].fill(0.0);
                        line[left..left + n].copy_from_slice(&source[..n]);
                        line[left + n..].fill(0.0);
                    } else {
                        for (i, value) in line.iter_mut().enumerate() {
                            let x = (i * self.phases + phase).wrapping_sub(left);
                            *value = source.get(x).copied().unwrap_or(0.0);
                        }
                    }
                }
            }
        }
    }
}

/// Arranges weights for [`correlate`]: `weight(o, i, t)` becomes blocks of `(i, t, BLOCK)`, the last filled with zeros.
pub fn pack(out: usize, inner: usize, taps: usize, weight: impl Fn(usize, usize, usize) -> f32) -> Vec<f32> {
    let mut packed = vec![0.0; out.div_ceil(BLOCK) * inner * taps * BLOCK];
    for o in 0..out {
        for i in 0..inner {
            for t in 0..taps {
                packed[((o / BLOCK * inner + i) * taps + t) * BLOCK + o % BLOCK] = weight(o, i, t);
            }
        }
    }
    packed
}

/// Where [`correlate`] reads: output row `y` and column `x` sees offsets `y * step + x + tap` of every plane.
pub struct View<'a> {
    pub source: &'a Padded,
    pub taps: &'a [usize],
    pub step: usize,
}

/// `out(o, y, x) = sum over i, t of weight(o, i, t) * source(i, y * step + x + taps[t])` for `rows` rows of `width`;
/// `put(o, y, x, values, n)` takes neighbouring results, of which the first `n` exist, for `o < out` only.
pub fn correlate(
    view: &View,
    packed: &[f32],
    out: usize,
    (rows, width): (usize, usize),
    mut put: impl FnMut(usize, usize, usize, &Vector, usize),
) {
    let (plane, per_row) = (view.source.plane(), width.div_ceil(LANES));
    let inner = view.source.data.len().checked_div(plane).unwrap_or(0);
    let block = inner * view.taps.len() * BLOCK;
    let total = rows * per_row;
    if total == 0 {
        return;
    }
    let base = |segment: usize| segment / per_row * view.step + segment % per_row * LANES;
    // The one check for all the loads below.
    let reach = base(total - 1) + view.taps.iter().max().unwrap_or(&0) + LANES;
    assert!((inner == 0 || reach <= plane) && packed.len() >= out.div_ceil(BLOCK) * block);
    for block_index in 0..out.div_ceil(BLOCK) {
        let weights = &packed[block_index * block..][..block];
        for first in (0..total).step_by(SEGMENTS) {
            // A last tile that is not full computes its last segment again.
            let bases: [usize; SEGMENTS] = std::array::from_fn(|s| base((first + s).min(total - 1)));
            // SAFETY: `reach`, checked above, bounds base + tap + LANES within each of the `inner` planes.
            let tile = unsafe { tile(&view.source.data, plane, view.taps, weights, bases) };
            for (o, segments) in tile.iter().enumerate().take(out - (block_index * BLOCK).min(out)) {
                for (s, values) in segments.iter().enumerate().take(total - first) {
                    let (y, x) = ((first + s) / per_row, (first + s) % per_row * LANES);
                    put(block_index * BLOCK + o, y, x, values, LANES.min(width - x));
                }
            }
        }
    }
}

/// # Safety
/// For each base and tap, `base + tap + LANES <= plane`, and `data` is whole planes, one for each `taps.len() * BLOCK`
/// weights.
#[inline]
unsafe fn tile(
    data: &[f32],
    plane: usize,
    taps: &[usize],
    weights: &[f32],
    bases: [usize; SEGMENTS],
) -> [[Vector; SEGMENTS]; BLOCK] {
    let mut sums = [[[0f32; LANES]; SEGMENTS]; BLOCK];
    if taps.is_empty() {
        return sums;
    }
    for (i, weights) in weights.chunks_exact(taps.len() * BLOCK).enumerate() {
        let start = i * plane;
        for (&tap, weights) in taps.iter().zip(weights.chunks_exact(BLOCK)) {
            // SAFETY: the caller's promise.
            let x: [Vector; SEGMENTS] = std::array::from_fn(|s| unsafe { load(data, start + bases[s] + tap) });
            for (sums, &weight) in sums.iter_mut().zip(weights) {
                for (sum, x) in sums.iter_mut().zip(&x) {
                    for (sum, &x) in sum.iter_mut().zip(x) {
                        *sum = fma(x, weight, *sum);
                    }
                }
            }
        }
    }
    sums
}

/// Adds to `sums(o, j)` the sum over rows and columns of `grad(o, y, x) * source(y * step + x + offsets[j])`: the gradient
/// of the weights, where an offset stands for an input channel and a tap. `grad` is planes of `rows` rows, their width a
/// multiple of [`LANES`] and padded with zeros.
pub fn products(source: &[f32], offsets: &[usize], step: usize, grad: &Padded, sums: &mut [f32]) {
    let (rows, width, plane) = (grad.rows, grad.row(), grad.plane());
    if plane == 0 || offsets.is_empty() {
        return;
    }
    let out = grad.data.len() / plane;
    let reach = (rows - 1) * step + width + offsets.iter().max().unwrap_or(&0);
    assert!(width % LANES == 0 && reach <= source.len() && sums.len() == out * offsets.len());
    for o in (0..out).step_by(GRAD_BLOCK) {
        let planes: [usize; GRAD_BLOCK] = std::array::from_fn(|k| (o + k).min(out - 1) * plane);
        for j in (0..offsets.len()).step_by(GRAD_TAPS) {
            let taps: [usize; GRAD_TAPS] = std::array::from_fn(|k| offsets[(j + k).min(offsets.len() - 1)]);
            // SAFETY: `reach`, checked above, bounds the reads of `source`; those of `grad` lie within its planes.
            let tile = unsafe { product_tile(source, taps, step, &grad.data, planes, (rows, width)) };
            for (k, row) in tile.iter().enumerate().take(out - o) {
                for (t, sum) in row.iter().enumerate().take(offsets.len() - j) {
                    sums[(o + k) * offsets.len() + j + t] += across(sum);
                }
            }
        }
    }
}

/// # Safety
/// For each tap, row and column, `row * step + column + tap` lies within `source`; each of `planes` starts `rows * width`
/// elements of `grad`; `width` is a multiple of [`LANES`].
#[inline(never)] // inlined, the sums would be kept in memory
unsafe fn product_tile(
    source: &[f32],
    taps: [usize; GRAD_TAPS],
    step: usize,
    grad: &[f32],
    planes: [usize; GRAD_BLOCK],
    (rows, width): (usize, usize),
) -> [[Vector; GRAD_TAPS]; GRAD_BLOCK] {
    let mut tile = [[[0f32; LANES]; GRAD_TAPS]; GRAD_BLOCK];
    for y in 0..rows {
        for x in (0..width).step_by(LANES) {
            // SAFETY: the caller's promise.
            let g: [Vector; GRAD_BLOCK] = std::array::from_fn(|k| unsafe { load(grad, planes[k] + y * width + x) });
            for t in 0..GRAD_TAPS {
                // SAFETY: the caller's promise.
                let v = unsafe { load(source, y * step + x + taps[t]) };
                for (sums, g) in tile.iter_mut().zip(&g) {
                    for ((sum, &g), &v) in sums[t].iter_mut().zip(g).zip(&v) {
                        *sum = fma(g, v, *sum);
                    }
                }
            }
        }
    }
    tile
}

/// The sum of a vector's lanes.
#[inline(always)]
fn across(x: &Vector) -> f32 {
    let [a, b, c, d, e, f, g, h] = *x;
    ((a + e) + (c + g)) + ((b + f) + (d + h))
}
