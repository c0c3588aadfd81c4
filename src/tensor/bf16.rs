//! Matrix products whose factors are rounded to bfloat16 and whose sums stay in f32: what mixed-precision training does
//! on accelerators, and twice as fast as f32 on processors with AVX512-BF16.
//!
//! Both factors are packed into panels of pairs along the summed dimension, which the instruction `vdpbf16ps` multiplies
//! and adds in one step. Other processors round the factors and multiply in f32, to the same result but for the order
//! of sums.

use super::cpu::{Shared, View};
use rayon::prelude::*;

/// Rows and columns of the block of the result that is held in registers.
const MR: usize = 12;
const NR: usize = 32;
/// Rows of the left factor that one task packs, and summed numbers that it packs at a time: a packed block of
/// 144 x 512 pairs stays in the second-level cache.
const MC: usize = 12 * MR;
const KC: usize = 512;

/// `lhs (m, k) * rhs (k, n)` as a dense `(m, n)`, with factors rounded to bfloat16.
pub fn product([m, n, k]: [usize; 3], lhs: View, rhs: View) -> Vec<f32> {
    assert!(lhs.holds(m, k) && rhs.holds(k, n), "a matrix reaches beyond its memory");
    #[cfg(target_arch = "x86_64")]
    if is_x86_feature_detected!("avx512f") && is_x86_feature_detected!("avx512bf16") {
        return packed([m, n, k], lhs, rhs);
    }
    rounded([m, n, k], lhs, rhs)
}

/// The product by f32 arithmetic on rounded factors.
fn rounded(shape: [usize; 3], lhs: View, rhs: View) -> Vec<f32> {
    let round = |x: &f32| f32::from_bits(u32::from(bf16(*x)) << 16);
    let lhs_values: Vec<f32> = lhs.values.iter().map(round).collect();
    let rhs_values: Vec<f32> = rhs.values.iter().map(round).collect();
    super::cpu::product(shape, View { values: &lhs_values, ..lhs }, View { values: &rhs_values, ..rhs })
}

/// The nearest bfloat16, ties to even; NaN stays NaN.
#[inline(always)]
fn bf16(x: f32) -> u16 {
    let bits = x.to_bits();
    let rounded = (bits.wrapping_add(0x7fff + ((bits >> 16) & 1)) >> 16) as u16;
    if x.is_nan() { (bits >> 16) as u16 | 0x40 } else { rounded }
}

/// Two neighbours along the summed dimension in one word, the first in its low half.
#[inline(always)]
fn pair(first: f32, second: f32) -> u32 {
    u32::from(bf16(first)) | u32::from(bf16(second)) << 16
}

/// Packs `width <= W` vectors of `x` and summed numbers `from..from + k` into `out`, `[pair][vector]`. A vector is a row of
/// the left or a column of the right factor; neighbours are `vector` apart, its own numbers `along`. What is not there is 0.
fn pack<const W: usize>(
    x: &[f32],
    (vector, along): (usize, usize),
    (first, width): (usize, usize),
    (from, k): (usize, usize),
    out: &mut [u32],
) {
    let pairs = k.div_ceil(2);
    if width < W {
        out[..pairs * W].fill(0);
    }
    if along == 1 {
        for i in 0..width {
            let x = &x[(first + i) * vector + from..][..k];
            let chunks = x.chunks_exact(2);
            let rest = chunks.remainder();
            for (p, c) in chunks.enumerate() {
                out[p * W + i] = pair(c[0], c[1]);
            }
            if let [last] = rest {
                out[(pairs - 1) * W + i] = pair(*last, 0.0);
            }
        }
        return;
    }
    for (p, out) in out[..pairs * W].chunks_exact_mut(W).enumerate() {
        let at = (from + 2 * p) * along + first * vector;
        if 2 * p + 1 == k {
            for (i, o) in out[..width].iter_mut().enumerate() {
                *o = pair(x[at + i * vector], 0.0);
            }
        } else if vector == 1 && width == W {
            let (a, b) = (&x[at..][..W], &x[at + along..][..W]);
            for ((o, &a), &b) in out.iter_mut().zip(a).zip(b) {
                *o = pair(a, b);
            }
        } else {
            for (i, o) in out[..width].iter_mut().enumerate() {
                *o = pair(x[at + i * vector], x[at + along + i * vector]);
            }
        }
    }
}

/// The product by AVX512-BF16.
#[cfg(target_arch = "x86_64")]
fn packed([m, n, k]: [usize; 3], lhs: View, rhs: View) -> Vec<f32> {
    let pairs = k.div_ceil(2);
    let panels = n.div_ceil(NR);
    let mut right = vec![0u32; panels * pairs * NR];
    right.par_chunks_mut((pairs * NR).max(1)).enumerate().for_each(|(panel, out)| {
        let first = panel * NR;
        pack::<NR>(rhs.values, (rhs.col, rhs.row), (first, NR.min(n - first)), (0, k), out);
    });
    let mut out = vec![0.0; m * n];
    let shared = Shared::new(&mut out);
    (0..m.div_ceil(MC)).into_par_iter().for_each(|block| {
        let rows = block * MC..((block + 1) * MC).min(m);
        let mut left = vec![0u32; MC * KC / 2];
        for from in (0..k).step_by(KC) {
            let depth = KC.min(k - from);
            let depth_pairs = depth.div_ceil(2);
            for (strip, out) in rows.clone().step_by(MR).zip(left.chunks_exact_mut(depth_pairs * MR)) {
                pack::<MR>(lhs.values, (lhs.row, lhs.col), (strip, MR.min(rows.end - strip)), (from, depth), out);
            }
            for panel in 0..panels {
                let right = &right[(panel * pairs + from / 2) * NR..][..depth_pairs * NR];
                let first = panel * NR;
                let cols = NR.min(n - first);
                for (strip, left) in rows.clone().step_by(MR).zip(left.chunks_exact(depth_pairs * MR)) {
                    // SAFETY: the processor has the instructions; blocks of different tasks have different rows.
                    unsafe {
                        let out = shared.at(strip * n + first);
                        multiply_add(left, right, out, n, MR.min(rows.end - strip), cols);
                    }
                }
            }
        }
    });
    out
}

/// Adds a packed `MR x depth` times a packed `depth x NR` to `rows x cols` of `out`, whose rows are `stride` apart.
///
/// # Safety
/// The processor has AVX512-BF16, and `out` has the block to itself.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bf16")]
unsafe fn multiply_add(left: &[u32], right: &[u32], out: *mut f32, stride: usize, rows: usize, cols: usize) {
    use std::arch::x86_64::*;
    let mut sums = [[_mm512_setzero_ps(); 2]; MR];
    for (a, b) in left.chunks_exact(MR).zip(right.chunks_exact(NR)) {
        // SAFETY: `b` holds two registers; the casts keep the bits.
        unsafe {
            let b0 = std::mem::transmute::<__m512i, __m512bh>(_mm512_loadu_si512(b.as_ptr().cast()));
            let b1 = std::mem::transmute::<__m512i, __m512bh>(_mm512_loadu_si512(b[16..].as_ptr().cast()));
            for (sum, &a) in sums.iter_mut().zip(a) {
                let a = std::mem::transmute::<__m512i, __m512bh>(_mm512_set1_epi32(a as i32));
                sum[0] = _mm512_dpbf16_ps(sum[0], a, b0);
                sum[1] = _mm512_dpbf16_ps(sum[1], a, b1);
            }
        }
    }
    let mask = |lanes: usize| -> __mmask16 { ((1u32 << lanes.min(16)) - 1) as __mmask16 };
    let (low, high) = (mask(cols), mask(cols.saturating_sub(16)));
    for (i, sum) in sums.iter().enumerate().take(rows) {
        // SAFETY: the masks keep within the block.
        unsafe {
            let row = out.add(i * stride);
            let first = _mm512_add_ps(_mm512_maskz_loadu_ps(low, row), sum[0]);
            _mm512_mask_storeu_ps(row, low, first);
            if high != 0 {
                let second = _mm512_add_ps(_mm512_maskz_loadu_ps(high, row.add(16)), sum[1]);
                _mm512_mask_storeu_ps(row.add(16), high, second);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tensor::rng::Stream;

    #[test]
    fn every_shape_and_layout_multiplies_rounded_factors() {
        for (i, [m, n, k]) in
            [[1, 1, 1], [12, 32, 2], [13, 33, 3], [5, 70, 513], [150, 31, 1025], [300, 16, 40], [7, 100, 1024]]
                .into_iter()
                .enumerate()
        {
            let mut rng = Stream::new(0, "bf16", i as u64);
            let (a, b) = (rng.normals(m * k), rng.normals(k * n));
            for (lhs, rhs) in [((1, k), (1, n)), ((m, 1), (1, n)), ((1, k), (k, 1)), ((m, 1), (k, 1))] {
                let lhs = View { values: &a, col: lhs.0, row: lhs.1 };
                let rhs = View { values: &b, col: rhs.0, row: rhs.1 };
                let got = product([m, n, k], lhs, rhs);
                let want = rounded([m, n, k], lhs, rhs);
                for (got, want) in got.iter().zip(&want) {
                    assert!((got - want).abs() < 1e-3, "{m} x {n} x {k}: {got}, not {want}");
                }
            }
        }
    }

    #[test]
    fn rounding_is_to_the_nearest_even() {
        assert_eq!(bf16(1.0), 0x3f80);
        assert_eq!(bf16(f32::from_bits(0x3f80_8000)), 0x3f80);
        assert_eq!(bf16(f32::from_bits(0x3f81_8000)), 0x3f82);
        assert_eq!(bf16(f32::INFINITY), 0x7f80);
        assert!(f32::from_bits(u32::from(bf16(f32::NAN)) << 16).is_nan());
    }
}
