//! Convolution and upsampling of `(B, C, H, W)`.

mod kernel;

use super::cpu::{self, Shared};
use candle_core::{CpuStorage, CustomOp1, CustomOp3, Layout, Result, Shape, Tensor, bail};
use kernel::{LANES, Padded, SEGMENTS, View, correlate, pack, products, store};
use rayon::prelude::*;

/// Floats of a task's buffer: what stays in the second-level cache.
const BUFFER: usize = 64 * 1024;
/// Tasks that the rows of few pictures are cut into, so that one alone does not run on one thread.
const TASKS: usize = 8;

/// Convolution with `weight` of `(out, in, k, k)` and `bias` of `(out)`. `padding` is (top and left, bottom and right),
/// which differ where a stride-2 convolution pads one side only.
pub fn conv2d(x: &Tensor, weight: &Tensor, bias: &Tensor, stride: usize, padding: (usize, usize)) -> Result<Tensor> {
    if cpu::fused(&[x, weight, bias]) {
        return x.contiguous()?.apply_op3(&weight.contiguous()?, &bias.contiguous()?, Conv2d { stride, padding });
    }
    composed_conv2d(x, weight, bias, stride, padding)
}

fn composed_conv2d(
    x: &Tensor,
    weight: &Tensor,
    bias: &Tensor,
    stride: usize,
    padding: (usize, usize),
) -> Result<Tensor> {
    let s = Sizes::new(x.shape(), weight.shape(), stride, padding)?;
    #[cfg(feature = "cuda")]
    if ![x, weight, bias].iter().any(|tensor| tensor.track_op())
        && let Some(y) = super::cuda::conv2d(x, weight, bias, stride, padding.0, s.output)?
    {
        return Ok(y);
    }
    let x = x.pad_with_zeros(2, padding.0, padding.1)?.pad_with_zeros(3, padding.0, padding.1)?;
    // What no output sees is cut off: candle's backward pass knows one excess for both sides only.
    let seen = |n: usize| (n - 1) * stride + s.kernel;
    let x = x.narrow(2, 0, seen(s.output.0))?.narrow(3, 0, seen(s.output.1))?;
    let y = x.conv2d(weight, 0, stride, 1, 1)?;
    y.broadcast_add(&bias.reshape((1, (), 1, 1))?)
}

/// The sizes of one convolution.
#[derive(Clone, Copy)]
struct Sizes {
    batch: usize,
    inner: usize,
    out: usize,
    kernel: usize,
    stride: usize,
    padding: (usize, usize),
    /// Height and width of the input.
    input: (usize, usize),
    output: (usize, usize),
}

impl Sizes {
    fn new(x: &Shape, weight: &Shape, stride: usize, padding: (usize, usize)) -> Result<Self> {
        let (batch, inner, h, w) = x.dims4()?;
        let (out, weight_inner, kernel, kernel_w) = weight.dims4()?;
        let side = |n: usize| (n + padding.0 + padding.1).checked_sub(kernel).map(|n| n / stride + 1);
        match (side(h), side(w)) {
            (Some(oh), Some(ow)) if inner == weight_inner && kernel == kernel_w => {
                Ok(Self { batch, inner, out, kernel, stride, padding, input: (h, w), output: (oh, ow) })
            }
            _ => bail!("conv2d: a kernel of {weight:?} does not fit a picture of {x:?} padded by {padding:?}"),
        }
    }

    fn input_len(&self) -> usize {
        self.inner * self.input.0 * self.input.1
    }

    fn output_len(&self) -> usize {
        self.out * self.output.0 * self.output.1
    }

    /// A buffer for rows of the padded input, columns split by the stride.
    fn input_buffer(&self) -> Padded {
        Padded::new(self.stride, self.output.1.next_multiple_of(LANES) + (self.kernel - 1) / self.stride)
    }

    /// Rows of the input that output rows `start..end` see.
    fn input_rows(&self, start: usize, end: usize) -> std::ops::Range<isize> {
        let first = (start * self.stride) as isize - self.padding.0 as isize;
        first..first + ((end - 1 - start) * self.stride + self.kernel) as isize
    }

    fn taps(&self, buffer: &Padded) -> Vec<usize> {
        (0..self.kernel * self.kernel).map(|t| buffer.offset(t / self.kernel, t % self.kernel)).collect()
    }
}

/// Rows of a task so that its buffer, `floats` for each row, stays in the cache.
fn tile_rows(floats: usize, rows: usize) -> usize {
    (BUFFER / floats.max(1)).clamp(1, rows.max(1))
}

/// The same where results do not depend on how rows are cut: for a batch of few pictures fewer rows, but as many as fill a
/// tile of registers.
fn task_rows(floats: usize, (rows, columns): (usize, usize), batch: usize) -> usize {
    let share = rows.div_ceil(TASKS / batch.clamp(1, TASKS));
    let least = SEGMENTS.div_ceil(columns.div_ceil(LANES).max(1));
    tile_rows(floats, rows).min(share.max(least))
}

fn forward(s: &Sizes, x: &[f32], weight: &[f32], bias: &[f32]) -> Vec<f32> {
    let taps = s.kernel * s.kernel;
    let packed = pack(s.out, s.inner, taps, |o, i, t| weight[(o * s.inner + i) * taps + t]);
    let (oh, ow) = s.output;
    let mut y = vec![0f32; s.batch * s.output_len()];
    let shared = Shared::new(&mut y);
    let tile = task_rows(s.inner * s.input_buffer().row() * s.stride, s.output, s.batch);
    let tiles = oh.div_ceil(tile);
    (0..s.batch * tiles).into_par_iter().for_each_init(
        || s.input_buffer(),
        |buffer, task| {
            let (image, start) = (task / tiles, task % tiles * tile);
            let end = (start + tile).min(oh);
            let picture = &x[image * s.input_len()..][..s.input_len()];
            buffer.fill(picture, s.input, s.input_rows(start, end), s.padding.0);
            let taps = s.taps(buffer);
            let view = View { source: buffer, taps: &taps, step: s.stride * buffer.row() };
            correlate(&view, &packed, s.out, (end - start, ow), |o, row, column, values, n| {
                let at = image * s.output_len() + (o * oh + start + row) * ow + column;
                // SAFETY: a task has its own image and rows.
                unsafe { store(shared.at(at), &values.map(|v| v + bias[o]), n) };
            });
        },
    );
    y
}

/// `dx(i) = sum of g(o) w(k)` over `o * stride + k - padding = i`. The inputs of one parity (for stride 2) see the same
/// taps, so each parity is a plain correlation with the gradient.
fn backward_input(s: &Sizes, grad: &[f32], weight: &[f32]) -> Vec<f32> {
    let (h, w) = s.input;
    let mut dx = vec![0f32; s.batch * s.input_len()];
    let shared = Shared::new(&mut dx);
    // Output row minus input row, in strides, and the tap, of input parity `r`.
    let reach = |r: usize| -> Vec<(isize, usize)> {
        (0..s.kernel)
            .map(|k| ((r + s.padding.0) as isize - k as isize, k))
            .filter(|(d, _)| d.rem_euclid(s.stride as isize) == 0)
            .map(|(d, k)| (d / s.stride as isize, k))
            .collect()
    };
    let parities: Vec<_> = (0..s.stride).map(reach).collect();
    let deltas = || parities.iter().flatten().map(|p| p.0);
    let (low, high) = (deltas().min().unwrap_or(0).min(0), deltas().max().unwrap_or(0).max(0));
    let phases: Vec<_> = (0..s.stride * s.stride)
        .map(|phase| {
            let (ry, rx) = (phase / s.stride, phase % s.stride);
            let pairs: Vec<_> = parities[ry]
                .iter()
                .flat_map(|&(dy, ky)| parities[rx].iter().map(move |&(dx, kx)| (dy, dx, ky, kx)))
                .collect();
            let packed = pack(s.inner, s.out, pairs.len(), |i, o, t| {
                weight[((o * s.inner + i) * s.kernel + pairs[t].2) * s.kernel + pairs[t].3]
            });
            (ry, rx, pairs, packed)
        })
        .collect();
    // Rows and columns of the first parity, which has the most.
    let (rows, columns) = (h.div_ceil(s.stride), w.div_ceil(s.stride));
    let new_buffer = || Padded::new(1, columns.next_multiple_of(LANES) + (high - low) as usize);
    let tile = task_rows(s.out * new_buffer().row(), (rows, columns), s.batch);
    let tiles = rows.div_ceil(tile);
    (0..s.batch * tiles).into_par_iter().for_each_init(new_buffer, |buffer, task| {
        let (image, start) = (task / tiles, task % tiles * tile);
        let end = (start + tile).min(rows);
        let picture = &grad[image * s.output_len()..][..s.output_len()];
        buffer.fill(picture, s.output, start as isize + low..end as isize + high, -low as usize);
        for (ry, rx, pairs, packed) in &phases {
            let taps: Vec<usize> =
                pairs.iter().map(|&(dy, dx, ..)| buffer.offset((dy - low) as usize, (dx - low) as usize)).collect();
            let view = View { source: buffer, taps: &taps, step: buffer.row() };
            // A later parity may have one row or column less.
            let count = |n: usize, r: usize| (n + s.stride - 1 - r) / s.stride;
            let size = (end.min(count(h, *ry)).saturating_sub(start), count(w, *rx));
            correlate(&view, packed, s.inner, size, |i, row, column, values, n| {
                let at = image * s.input_len() + (i * h + (start + row) * s.stride + ry) * w + column * s.stride + rx;
                if s.stride == 1 {
                    // SAFETY: a task has its own image and rows.
                    unsafe { store(shared.at(at), values, n) };
                } else {
                    for (k, value) in values.iter().enumerate().take(n) {
                        // SAFETY: as above, and a phase has its own rows and columns.
                        unsafe { shared.at(at + k * s.stride).write(*value) };
                    }
                }
            });
        }
    });
    dx
}

/// Gradients of the weight and the bias: of each picture alone, then added in the order of the batch, so that they do not
/// depend on the number of threads.
fn backward_weight(s: &Sizes, x: &[f32], grad: &[f32]) -> (Vec<f32>, Vec<f32>) {
    let (oh, ow) = s.output;
    let weights = s.out * s.inner * s.kernel * s.kernel;
    let width = ow.next_multiple_of(LANES);
    let tile = tile_rows(s.inner * s.input_buffer().row() * s.stride + s.out * width, oh);
    let partial: Vec<Vec<f32>> = (0..s.batch)
        .into_par_iter()
        .map_init(
            || (s.input_buffer(), Padded::new(1, width)),
            |(buffer, gradient), image| {
                let mut sums = vec![0f32; weights + s.out];
                let (weight, bias) = sums.split_at_mut(weights);
                let picture = &x[image * s.input_len()..][..s.input_len()];
                let grad = &grad[image * s.output_len()..][..s.output_len()];
                for start in (0..oh).step_by(tile) {
                    let end = (start + tile).min(oh);
                    buffer.fill(picture, s.input, s.input_rows(start, end), s.padding.0);
                    gradient.fill(grad, s.output, start as isize..end as isize, 0);
                    let taps = s.taps(buffer);
                    let offsets: Vec<usize> = (0..s.inner)
                        .flat_map(|i| taps.iter().map(move |t| (i, t)))
                        .map(|(i, t)| i * buffer.plane() + t)
                        .collect();
                    products(&buffer.data, &offsets, s.stride * buffer.row(), gradient, weight);
                }
                for (bias, plane) in bias.iter_mut().zip(grad.chunks_exact(oh * ow)) {
                    *bias = cpu::sum(plane);
                }
                sums
            },
        )
        .collect();
    let mut total = vec![0f32; weights + s.out];
    total.par_chunks_mut(4096).enumerate().for_each(|(chunk, total)| {
        for sums in &partial {
            for (total, value) in total.iter_mut().zip(&sums[chunk * 4096..]) {
                *total += value;
            }
        }
    });
    let bias = total.split_off(weights);
    (total, bias)
}

struct Conv2d {
    stride: usize,
    padding: (usize, usize),
}

impl CustomOp3 for Conv2d {
    fn name(&self) -> &'static str {
        "conv2d"
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        x_layout: &Layout,
        weight: &CpuStorage,
        weight_layout: &Layout,
        bias: &CpuStorage,
        bias_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let s = Sizes::new(x_layout.shape(), weight_layout.shape(), self.stride, self.padding)?;
        let bias = cpu::slice(bias, bias_layout)?;
        if bias.len() != s.out {
            bail!("conv2d: {} biases for {} channels", bias.len(), s.out);
        }
        let y = forward(&s, cpu::slice(x, x_layout)?, cpu::slice(weight, weight_layout)?, bias);
        Ok((CpuStorage::F32(y), (s.batch, s.out, s.output.0, s.output.1).into()))
    }

    fn bwd(
        &self,
        x: &Tensor,
        weight: &Tensor,
        bias: &Tensor,
        _y: &Tensor,
        grad: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let s = Sizes::new(x.shape(), weight.shape(), self.stride, self.padding)?;
        let grad = grad.contiguous()?;
        let dx = x.track_op().then(|| grad.apply_op2_no_bwd(weight, &InputGrad(s))).transpose()?;
        let (mut dw, mut db) = (None, None);
        if weight.track_op() || bias.track_op() {
            let both = x.apply_op2_no_bwd(&grad, &WeightGrad(s))?;
            let weights = weight.elem_count();
            dw = Some(both.narrow(0, 0, weights)?.reshape(weight.shape())?);
            db = Some(both.narrow(0, weights, s.out)?);
        }
        Ok((dx, dw, db))
    }
}

struct InputGrad(Sizes);

impl candle_core::CustomOp2 for InputGrad {
    fn name(&self) -> &'static str {
        "conv2d-input-grad"
    }

    fn cpu_fwd(
        &self,
        grad: &CpuStorage,
        grad_layout: &Layout,
        weight: &CpuStorage,
        weight_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let s = &self.0;
        let dx = backward_input(s, cpu::slice(grad, grad_layout)?, cpu::slice(weight, weight_layout)?);
        Ok((CpuStorage::F32(dx), (s.batch, s.inner, s.input.0, s.input.1).into()))
    }
}

/// The gradients of the weight and of the bias, one after the other.
struct WeightGrad(Sizes);

impl candle_core::CustomOp2 for WeightGrad {
    fn name(&self) -> &'static str {
        "conv2d-weight-grad"
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        x_layout: &Layout,
        grad: &CpuStorage,
        grad_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let (mut both, bias) = backward_weight(&self.0, cpu::slice(x, x_layout)?, cpu::slice(grad, grad_layout)?);
        both.extend(bias);
        let n = both.len();
        Ok((CpuStorage::F32(both), n.into()))
    }
}

/// Nearest-neighbour upsampling by two.
pub fn upsample2x(x: &Tensor) -> Result<Tensor> {
    if cpu::fused(&[x]) {
        return x.contiguous()?.apply_op1(Upsample2x);
    }
    composed_upsample2x(x)
}

fn composed_upsample2x(x: &Tensor) -> Result<Tensor> {
    let (b, c, h, w) = x.dims4()?;
    x.reshape((b, c, h, 1, w, 1))?.broadcast_as((b, c, h, 2, w, 2))?.reshape((b, c, 2 * h, 2 * w))
}

struct Upsample2x;

impl CustomOp1 for Upsample2x {
    fn name(&self) -> &'static str {
        "upsample2x"
    }

    fn cpu_fwd(&self, x: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let (b, c, h, w) = layout.shape().dims4()?;
        let x = cpu::slice(x, layout)?;
        let mut y = vec![0f32; 4 * x.len()];
        y.par_chunks_mut(4 * h * w).zip(x.par_chunks(h * w)).for_each(|(y, x)| {
            for (y, x) in y.chunks_exact_mut(4 * w).zip(x.chunks_exact(w)) {
                let (first, second) = y.split_at_mut(2 * w);
                for (pair, value) in first.chunks_exact_mut(2).zip(x) {
                    pair.fill(*value);
                }
                second.copy_from_slice(first);
            }
        });
        Ok((CpuStorage::F32(y), (b, c, 2 * h, 2 * w).into()))
    }

    fn bwd(&self, _x: &Tensor, _y: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
        Ok(Some(grad.contiguous()?.apply_op1_no_bwd(&Sum2x)?))
    }
}

/// The sum of every 2x2 block.
struct Sum2x;

impl CustomOp1 for Sum2x {
    fn name(&self) -> &'static str {
        "sum2x"
    }

    fn cpu_fwd(&self, x: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let (b, c, h, w) = layout.shape().dims4()?;
        let x = cpu::slice(x, layout)?;
        let mut y = vec![0f32; x.len() / 4];
        y.par_chunks_mut(h * w / 4).zip(x.par_chunks(h * w)).for_each(|(y, x)| {
            for (y, x) in y.chunks_exact_mut(w / 2).zip(x.chunks_exact(2 * w)) {
                let (first, second) = x.split_at(w);
                for ((y, a), b) in y.iter_mut().zip(first.chunks_exact(2)).zip(second.chunks_exact(2)) {
                    *y = a[0] + a[1] + b[0] + b[1];
                }
            }
        });
        Ok((CpuStorage::F32(y), (b, c, h / 2, w / 2).into()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tensor::tests::{agrees, draw};
    use candle_core::Var;

    #[test]
    fn convolution() {
        // (batch, in, out, height, width, kernel, stride, padding)
        for (b, inner, out, h, w, k, stride, padding) in [
            (2, 3, 5, 7, 9, 3, 1, (1, 1)),
            (1, 16, 16, 16, 16, 3, 1, (1, 1)),
            (2, 4, 6, 8, 8, 3, 2, (0, 1)),
            (1, 3, 7, 9, 11, 3, 2, (0, 1)),
            (2, 5, 4, 5, 70, 3, 2, (1, 1)),
            (3, 6, 9, 5, 4, 1, 1, (0, 0)),
            (1, 2, 3, 6, 6, 1, 2, (0, 0)),
            (1, 40, 8, 130, 33, 3, 1, (1, 1)),
        ] {
            let inputs = [draw("x", &[b, inner, h, w]), draw("weight", &[out, inner, k, k]), draw("bias", &[out])];
            let name = format!("conv2d of {b}x{inner}x{h}x{w} to {out}, kernel {k}, stride {stride}");
            agrees(&name, &inputs, |x| conv2d(&x[0], &x[1], &x[2], stride, padding));
        }
    }

    #[test]
    fn upsampling() {
        agrees("upsample2x", &[draw("x", &[2, 3, 5, 4])], |x| upsample2x(&x[0]));
    }

    #[test]
    fn sizes_that_do_not_fit_are_errors() {
        let conv =
            |x: &[usize], weight: &[usize]| conv2d(&draw("x", x), &draw("w", weight), &draw("b", &[2]), 1, (0, 0));
        assert!(conv(&[1, 3, 2, 8], &[2, 3, 3, 3]).is_err());
        assert!(conv(&[1, 4, 8, 8], &[2, 3, 3, 3]).is_err());
        assert!(conv(&[1, 3, 8, 8], &[4, 3, 3, 3]).is_err());
    }

    #[test]
    fn a_picture_alone_gives_the_same_as_in_a_batch() {
        let numbers = |x: &Tensor| x.flatten_all().unwrap().to_vec1::<f32>().unwrap();
        for (stride, padding) in [(1, (1, 1)), (2, (0, 1))] {
            let (weight, bias) = (draw("weight", &[12, 8, 3, 3]), draw("bias", &[12]));
            let run = |x: &Tensor| {
                let x = Var::from_tensor(x).unwrap();
                let y = conv2d(&x, &weight, &bias, stride, padding).unwrap();
                let grads = y.sqr().unwrap().sum_all().unwrap().backward().unwrap();
                [numbers(&y), numbers(grads.get(&x).unwrap())]
            };
            let x = draw("x", &[9, 8, 40, 23]);
            let together = run(&x);
            for i in [0, 8] {
                for (alone, together) in run(&x.narrow(0, i, 1).unwrap()).iter().zip(&together) {
                    assert_eq!(*alone, together[i * alone.len()..][..alone.len()]);
                }
            }
        }
    }

    #[test]
    fn few_pictures_are_cut_into_tasks() {
        for (size, batch, want) in [
            ((64, 64), 1, 8),
            ((64, 64), 3, 32),
            ((64, 64), 8, 64),
            ((64, 64), 100, 64),
            ((0, 0), 0, 1),
            ((5, 64), 1, 1),
        ] {
            assert_eq!(task_rows(1, size, batch), want, "{size:?} in a batch of {batch}");
        }
        // A row of one vector does not fill the registers.
        assert_eq!(task_rows(1, (64, 4), 4), 32);
        assert_eq!(task_rows(1, (8, 8), 1), SEGMENTS);
        assert_eq!(task_rows(BUFFER, (64, 64), 1), 1);
    }

    #[test]
    fn results_do_not_depend_on_the_number_of_threads() {
        let var = |name: &str, shape: &[usize]| Var::from_tensor(&draw(name, shape)).unwrap();
        let (x, weight, bias) = (var("x", &[5, 8, 40, 40]), var("weight", &[12, 8, 3, 3]), var("bias", &[12]));
        let run = |threads: usize| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            pool.install(|| {
                let y = conv2d(&x, &weight, &bias, 1, (1, 1)).unwrap();
                let grads = y.sqr().unwrap().sum_all().unwrap().backward().unwrap();
                [&x, &weight, &bias].map(|v| grads.get(v).unwrap().flatten_all().unwrap().to_vec1::<f32>().unwrap())
            })
        };
        assert_eq!(run(1), run(3));
    }
}
