//! Times the convolution on the shapes of the shipped autoencoder; `scripts/bench_conv.py` times PyTorch's on the same.
//! `cargo bench --bench conv`; set RAYON_NUM_THREADS and CANDLE_NUM_THREADS to compare thread by thread.

use candle_core::{DType, Device, Result, Var};
use rlrig::tensor::{conv2d, rng::Stream};
use std::time::Instant;

/// Batch, channels in and out, side, kernel, stride.
const SHAPES: [[usize; 6]; 6] = [
    [4, 64, 64, 64, 3, 1],
    [16, 12, 12, 128, 3, 1],
    [16, 24, 24, 64, 3, 1],
    [16, 64, 64, 16, 3, 1],
    [16, 16, 16, 128, 3, 2],
    [16, 24, 12, 128, 1, 1],
];

fn main() -> Result<()> {
    for [batch, inner, out, side, kernel, stride] in SHAPES {
        let normal =
            |name: &str, shape: &[usize]| Var::from_tensor(&Stream::new(0, name, 0).normal(shape, &Device::Cpu)?);
        let x = normal("x", &[batch, inner, side, side])?;
        let weight = normal("weight", &[out, inner, kernel, kernel])?;
        let bias = Var::zeros(out, DType::F32, &Device::Cpu)?;
        let (mut forward, mut backward) = (f64::INFINITY, f64::INFINITY);
        for _ in 0..10 {
            let start = Instant::now();
            let y = conv2d(&x, &weight, &bias, stride, (kernel / 2, kernel / 2))?;
            forward = forward.min(start.elapsed().as_secs_f64());
            let start = Instant::now();
            y.backward()?;
            backward = backward.min(start.elapsed().as_secs_f64());
        }
        let work = 2e-9 * (batch * inner * out * (side / stride).pow(2) * kernel.pow(2)) as f64;
        println!(
            "{batch}x{inner}->{out}, {side}x{side}, kernel {kernel}, stride {stride}: \
             forward {:.2} ms ({:.0} GF/s), backward {:.2} ms ({:.0} GF/s)",
            forward * 1e3,
            work / forward,
            backward * 1e3,
            2.0 * work / backward
        );
    }
    Ok(())
}
