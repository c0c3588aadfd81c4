//! Element-wise parts of a transformer block.

use super::{composed, cpu};
use candle_core::{CpuStorage, CustomOp1, CustomOp2, CustomOp3, D, Layout, Result, Shape, Tensor};

/// `x * sigmoid(x)`.
pub fn silu(x: &Tensor) -> Result<Tensor> {
    if cpu::fused(&[x]) { x.contiguous()?.apply_op1(Unary::Silu) } else { x.silu() }
}

/// The exact Gaussian error linear unit.
pub fn gelu(x: &Tensor) -> Result<Tensor> {
    if cpu::fused(&[x]) { x.contiguous()?.apply_op1(Unary::Gelu) } else { x.gelu_erf() }
}

/// GELU by its tanh approximation (`gelu_pytorch_tanh`).
pub fn gelu_tanh(x: &Tensor) -> Result<Tensor> {
    if cpu::fused(&[x]) { x.contiguous()?.apply_op1(Unary::GeluTanh) } else { composed::gelu_tanh(x) }
}

/// `silu(gate) * up`, where `x` holds `gate` then `up` along its last dimension: `(.., 2F)` to `(.., F)`.
pub fn swiglu(x: &Tensor) -> Result<Tensor> {
    if cpu::fused(&[x]) {
        return x.contiguous()?.apply_op1(Swiglu);
    }
    composed::swiglu(x)
}

/// `silu(gate) * up` of two tensors of one shape.
pub fn swiglu_of(gate: &Tensor, up: &Tensor) -> Result<Tensor> {
    if cpu::fused(&[gate, up]) {
        return gate.contiguous()?.apply_op2(&up.contiguous()?, SwigluOf);
    }
    silu(gate)? * up
}

/// `x + gate * y`: `x` and `y` are `(B, T, D)`, `gate` is `(B, D)`.
pub fn gate_residual(x: &Tensor, gate: &Tensor, y: &Tensor) -> Result<Tensor> {
    if cpu::fused(&[x, gate, y]) {
        return x.contiguous()?.apply_op3(&gate.contiguous()?, &y.contiguous()?, GateResidual);
    }
    composed::gate_residual(x, gate, y)
}

/// `silu(gate) * up` of one row.
#[inline]
pub(super) fn swiglu_row(gate: &[f32], up: &[f32], out: &mut [f32]) {
    for ((o, &g), &u) in out.iter_mut().zip(gate).zip(up) {
        *o = g * cpu::sigmoid(g) * u;
    }
}

/// The gradients of [`swiglu_row`] with respect to `gate` and `up`.
#[inline]
pub(super) fn swiglu_row_backward(gate: &[f32], up: &[f32], grad: &[f32], grad_gate: &mut [f32], grad_up: &mut [f32]) {
    for i in 0..gate.len().min(up.len()).min(grad.len()).min(grad_gate.len()).min(grad_up.len()) {
        let s = cpu::sigmoid(gate[i]);
        let silu = gate[i] * s;
        grad_up[i] = grad[i] * silu;
        grad_gate[i] = grad[i] * up[i] * (s + silu * (1.0 - s));
    }
}

enum Unary {
    Silu,
    Gelu,
    GeluTanh,
}

/// `sqrt(2 / pi)` and the cubic coefficient of the tanh approximation of GELU.
const GELU: (f32, f32) = (0.797_884_6, 0.044_715);

/// `1 / sqrt(2 pi)`, by which `e^(-x^2 / 2)` is the density of the normal distribution.
const DENSITY: f32 = 0.398_942_3;

/// The distribution function of the normal distribution, to within 2e-7, and `e^(-x^2 / 2)`, in a form that compilers
/// vectorise.
#[inline(always)]
fn normal(x: f32) -> (f32, f32) {
    /// What lies beyond `|x|`, over that exponential, as a polynomial in `1 / (1 + 0.3 |x|)` without a constant term, highest
    /// power first: the minimax fit of its relative error (5e-8) up to 9.
    const TAIL: [f32; 8] = [
        0.037_535_697,
        -0.165_019_59,
        0.219_971_09,
        -0.066_402_435,
        0.135_420_08,
        0.097_783_98,
        0.121_105_69,
        0.119_605_5,
    ];
    let bell = cpu::exp(-0.5 * x * x);
    let t = 1.0 / cpu::fma(0.3, x.abs(), 1.0);
    let tail = bell * t * TAIL.iter().fold(0.0, |sum, c| cpu::fma(sum, t, *c));
    (if x < 0.0 { tail } else { 1.0 - tail }, bell)
}

impl CustomOp1 for Unary {
    fn name(&self) -> &'static str {
        match self {
            Self::Silu => "silu",
            Self::Gelu => "gelu",
            Self::GeluTanh => "gelu-tanh",
        }
    }

    fn cpu_fwd(&self, x: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let x = cpu::slice(x, layout)?;
        let y = match self {
            Self::Silu => cpu::map(x, |x| x * cpu::sigmoid(x)),
            Self::Gelu => cpu::map(x, |x| x * normal(x).0),
            // (1 + tanh(u)) / 2 = sigmoid(2u)
            Self::GeluTanh => cpu::map(x, |x| x * cpu::sigmoid(2.0 * GELU.0 * (x + GELU.1 * x * x * x))),
        };
        Ok((CpuStorage::F32(y), layout.shape().clone()))
    }

    fn bwd(&self, x: &Tensor, _: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
        let grad = grad.contiguous()?;
        let (values, g) = (cpu::floats(x)?, cpu::floats(&grad)?);
        let out = match self {
            Self::Silu => cpu::map2(&values, &g, |x, g| {
                let s = cpu::sigmoid(x);
                g * (s + x * s * (1.0 - s))
            }),
            Self::Gelu => cpu::map2(&values, &g, |x, g| {
                let (below, bell) = normal(x);
                g * cpu::fma(x * bell, DENSITY, below)
            }),
            Self::GeluTanh => cpu::map2(&values, &g, |x, g| {
                let s = cpu::sigmoid(2.0 * GELU.0 * (x + GELU.1 * x * x * x));
                g * (s + x * s * (1.0 - s) * 2.0 * GELU.0 * (1.0 + 3.0 * GELU.1 * x * x))
            }),
        };
        Ok(Some(Tensor::from_vec(out, x.shape(), x.device())?))
    }
}

struct Swiglu;

impl CustomOp1 for Swiglu {
    fn name(&self) -> &'static str {
        "swiglu"
    }

    fn cpu_fwd(&self, x: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let mut dims = layout.dims().to_vec();
        let Some(last) = dims.last_mut().filter(|d| **d % 2 == 0 && **d > 0) else {
            candle_core::bail!("swiglu needs an even last dimension, not {:?}", layout.shape())
        };
        *last /= 2;
        let half = *last;
        let x = cpu::slice(x, layout)?;
        let mut y = vec![0.0; x.len() / 2];
        cpu::rows(&mut y, half, |row, out| {
            let (gate, up) = x[2 * half * row..][..2 * half].split_at(half);
            swiglu_row(gate, up, out);
        });
        Ok((CpuStorage::F32(y), Shape::from(dims)))
    }

    fn bwd(&self, x: &Tensor, _: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
        let grad = grad.contiguous()?;
        let (values, g) = (cpu::floats(x)?, cpu::floats(&grad)?);
        let half = x.dim(D::Minus1)? / 2;
        let mut out = vec![0.0; values.len()];
        cpu::rows(&mut out, 2 * half, |row, out| {
            let (gate, up) = values[2 * half * row..][..2 * half].split_at(half);
            let (grad_gate, grad_up) = out.split_at_mut(half);
            swiglu_row_backward(gate, up, &g[half * row..][..half], grad_gate, grad_up);
        });
        Ok(Some(Tensor::from_vec(out, x.shape(), x.device())?))
    }
}

struct SwigluOf;

impl CustomOp2 for SwigluOf {
    fn name(&self) -> &'static str {
        "swiglu-of"
    }

    fn cpu_fwd(&self, gate: &CpuStorage, gl: &Layout, up: &CpuStorage, ul: &Layout) -> Result<(CpuStorage, Shape)> {
        if gl.shape() != ul.shape() {
            candle_core::bail!("swiglu of {:?} and {:?}", gl.shape(), ul.shape());
        }
        let y = cpu::map2(cpu::slice(gate, gl)?, cpu::slice(up, ul)?, |gate, up| gate * cpu::sigmoid(gate) * up);
        Ok((CpuStorage::F32(y), gl.shape().clone()))
    }

    fn bwd(&self, gate: &Tensor, up: &Tensor, _: &Tensor, grad: &Tensor) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let grad = grad.contiguous()?;
        let (gates, ups, g) = (cpu::floats(gate)?, cpu::floats(up)?, cpu::floats(&grad)?);
        let width = gate.dim(D::Minus1)?;
        let (mut grad_gate, mut grad_up) = (vec![0.0; g.len()], vec![0.0; g.len()]);
        let shared = cpu::Shared::new(&mut grad_up);
        cpu::rows(&mut grad_gate, width, |row, grad_gate| {
            let at = row * width..(row + 1) * width;
            // SAFETY: each row is written once.
            let grad_up = unsafe { shared.slice(at.start, width) };
            swiglu_row_backward(&gates[at.clone()], &ups[at.clone()], &g[at], grad_gate, grad_up);
        });
        let tensor = |values, like: &Tensor| Tensor::from_vec(values, like.shape(), like.device()).map(Some);
        Ok((tensor(grad_gate, gate)?, tensor(grad_up, up)?))
    }
}

struct GateResidual;

impl CustomOp3 for GateResidual {
    fn name(&self) -> &'static str {
        "gate-residual"
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        xl: &Layout,
        gate: &CpuStorage,
        gl: &Layout,
        y: &CpuStorage,
        yl: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let (b, t, d) = xl.shape().dims3()?;
        if gl.dims() != [b, d] || yl.dims() != xl.dims() {
            candle_core::bail!("gate-residual got {:?}, {:?} and {:?}", xl.shape(), gl.shape(), yl.shape());
        }
        let (x, gate, y) = (cpu::slice(x, xl)?, cpu::slice(gate, gl)?, cpu::slice(y, yl)?);
        let mut out = vec![0.0; x.len()];
        cpu::rows(&mut out, d, |row, out| {
            let gate = &gate[row / t * d..][..d];
            for (((o, &x), &g), &y) in out.iter_mut().zip(&x[row * d..]).zip(gate).zip(&y[row * d..]) {
                *o = cpu::fma(g, y, x);
            }
        });
        Ok((CpuStorage::F32(out), xl.shape().clone()))
    }

    fn bwd(
        &self,
        x: &Tensor,
        gate: &Tensor,
        y: &Tensor,
        _: &Tensor,
        grad: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let (b, t, d) = x.dims3()?;
        let grad = grad.contiguous()?;
        let (grad_gate, grad_y) = {
            let (g, gate, y) = (cpu::floats(&grad)?, cpu::floats(gate)?, cpu::floats(y)?);
            let mut grad_y = vec![0.0; g.len()];
            cpu::rows(&mut grad_y, d, |row, out| {
                for ((o, &g), &gate) in out.iter_mut().zip(&g[row * d..]).zip(&gate[row / t * d..][..d]) {
                    *o = g * gate;
                }
            });
            let mut grad_gate = vec![0.0; b * d];
            cpu::rows(&mut grad_gate, d, |b, sum| {
                for row in b * t..(b + 1) * t {
                    for ((s, &g), &y) in sum.iter_mut().zip(&g[row * d..]).zip(&y[row * d..]) {
                        *s = cpu::fma(g, y, *s);
                    }
                }
            });
            (Tensor::from_vec(grad_gate, (b, d), x.device())?, Tensor::from_vec(grad_y, (b, t, d), x.device())?)
        };
        Ok((Some(grad), Some(grad_gate), Some(grad_y)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::{DType, Device, Var};

    #[test]
    fn gelu_is_that_of_the_error_function() {
        let points: Vec<f32> = (-14_000..=14_000).map(|i| i as f32 / 1000.0).collect();
        let run = |dtype: DType| -> Result<(Vec<f64>, Vec<f64>)> {
            let x = Var::from_tensor(&Tensor::new(points.as_slice(), &Device::Cpu)?.to_dtype(dtype)?)?;
            let y = gelu(&x)?;
            let grads = y.sum_all()?.backward()?;
            let wide = |x: &Tensor| x.to_dtype(DType::F64)?.to_vec1::<f64>();
            Ok((wide(&y)?, wide(grads.get(&x).expect("a gradient"))?))
        };
        let ((y, slope), (want_y, want_slope)) = (run(DType::F32).unwrap(), run(DType::F64).unwrap());
        for (i, x) in points.iter().enumerate() {
            let scale = f64::from(x.abs().max(1.0));
            assert!((y[i] - want_y[i]).abs() < 2e-7 * scale, "gelu({x}) = {}, not {}", y[i], want_y[i]);
            // candle's own slope has a density of six digits.
            let off = (slope[i] - want_slope[i]).abs();
            assert!(off < 6e-7, "the slope at {x} is {}, not {}", slope[i], want_slope[i]);
        }
    }

    #[test]
    fn gelu_far_from_zero_is_the_positive_part() {
        let x = Tensor::new(&[-1e30f32, -100.0, -0.0, 0.0, 100.0, 1e30, f32::NAN], &Device::Cpu).unwrap();
        let y = gelu(&x).unwrap().to_vec1::<f32>().unwrap();
        assert!(y[0].abs() < 1e-7 && y[1].abs() < 1e-30 && y[6].is_nan(), "{y:?}");
        assert_eq!(y[2..6], [0.0, 0.0, 100.0, 1e30]);
    }
}
