//! CUDA kernels for what candle composes of many: f32, as training computes. Each returns nothing where it does not apply,
//! and the caller composes.

use super::linear::with_last;
use candle_core::{
    CudaDevice, CudaStorage, D, DType, Device, Result, Shape, Storage, Tensor,
    cuda_backend::{
        WrapErr,
        cudarc::driver::{LaunchConfig, PushKernelArg},
    },
    op::BackpropOp,
};

const KERNELS: &str = include_str!(concat!(env!("OUT_DIR"), "/kernels.ptx"));
const WARP: usize = 32;
/// Threads of a block.
const BLOCK: usize = 256;
/// The longest row that a warp holds.
const LONGEST: usize = 8 * WARP;
/// Blocks that rows are shared among, at most.
const BLOCKS: usize = 1024;

/// A kernel with its arguments, in this order: inputs, outputs, whole numbers, `eps`.
struct Kernel<'a> {
    name: &'static str,
    inputs: &'a [&'a Tensor],
    outputs: &'a [&'a [usize]],
    /// The number of elements, where it can be more than 32 bits tell.
    all: Option<u64>,
    numbers: &'a [usize],
    eps: Option<f64>,
    blocks: usize,
}

impl<'a> Kernel<'a> {
    fn new(name: &'static str, inputs: &'a [&'a Tensor], outputs: &'a [&'a [usize]], numbers: &'a [usize]) -> Self {
        Self { name, inputs, outputs, all: None, numbers, eps: None, blocks: 1 }
    }

    fn blocks(self, blocks: usize) -> Self {
        Self { blocks, ..self }
    }

    fn eps(self, eps: f64) -> Self {
        Self { eps: Some(eps), ..self }
    }

    /// A warp for each of so many rows, or for several of them.
    fn rows(self, rows: usize, eps: f64) -> Self {
        self.blocks(row_blocks(rows)).eps(eps)
    }

    /// A thread for each of so many elements.
    fn each(self, elements: usize) -> Self {
        self.blocks(elements.div_ceil(BLOCK))
    }

    /// The same of a kernel that is told their number.
    fn all(self, elements: usize) -> Self {
        Self { all: Some(elements as u64), ..self.each(elements) }
    }

    fn launch(&self, device: &CudaDevice) -> Result<Vec<Tensor>> {
        let kernel = device.get_or_load_custom_func(self.name, "rlrig", KERNELS)?;
        let inputs = self.inputs.iter().map(|x| x.contiguous()).collect::<Result<Vec<_>>>()?;
        let storages: Vec<_> = inputs.iter().map(|x| x.storage_and_layout()).collect();
        let mut views = Vec::with_capacity(storages.len());
        for (storage, layout) in &storages {
            let Storage::Cuda(storage) = &**storage else { candle_core::bail!("{} on another device", self.name) };
            let start = layout.start_offset();
            views.push(storage.as_cuda_slice::<f32>()?.slice(start..start + layout.shape().elem_count()));
        }
        let mut outputs = Vec::with_capacity(self.outputs.len());
        for shape in self.outputs {
            // SAFETY: every kernel writes all its outputs before they are read.
            outputs.push(unsafe { device.alloc::<f32>(shape.iter().product())? });
        }
        let number = |n: usize| u32::try_from(n).map_err(candle_core::Error::wrap);
        let numbers = self.numbers.iter().map(|n| number(*n)).collect::<Result<Vec<u32>>>()?;
        let eps = self.eps.unwrap_or_default() as f32;
        let all = self.all.unwrap_or_default();
        let mut arguments = kernel.builder();
        for view in &views {
            arguments.arg(view);
        }
        for output in &outputs {
            arguments.arg(output);
        }
        if self.all.is_some() {
            arguments.arg(&all);
        }
        for number in &numbers {
            arguments.arg(number);
        }
        if self.eps.is_some() {
            arguments.arg(&eps);
        }
        let blocks = number(self.blocks.max(1))?;
        let config = LaunchConfig { grid_dim: (blocks, 1, 1), block_dim: (BLOCK as u32, 1, 1), shared_mem_bytes: 0 };
        // SAFETY: the arguments are those of the kernel's signature, and inputs and outputs have the sizes that it is told.
        unsafe { arguments.launch(config) }.w()?;
        drop(storages);
        let made = outputs.into_iter().zip(self.outputs).map(|(slice, shape)| {
            let storage = Storage::Cuda(CudaStorage::wrap_cuda_slice(slice, device.clone()));
            Tensor::from_storage(storage, Shape::from(*shape), BackpropOp::none(), false)
        });
        Ok(made.collect())
    }

    fn one(&self, device: &CudaDevice) -> Result<Tensor> {
        Ok(self.launch(device)?.remove(0))
    }

    fn two(&self, device: &CudaDevice) -> Result<[Tensor; 2]> {
        self.launch(device)?.try_into().map_err(|_| candle_core::Error::Msg(format!("{} has two results", self.name)))
    }
}

/// The device, if all tensors are in f32 on it and none is empty.
fn device<'a>(tensors: &[&'a Tensor]) -> Option<&'a CudaDevice> {
    let first = tensors.first()?;
    match first.device() {
        Device::Cuda(device) if tensors.iter().all(|x| x.dtype() == DType::F32 && x.elem_count() > 0) => Some(device),
        _ => None,
    }
}

/// Blocks of warps, each of which takes some rows.
fn row_blocks(rows: usize) -> usize {
    rows.div_ceil(BLOCK / WARP).clamp(1, BLOCKS)
}

/// The gradients of `rms_norm(x) * weight`.
pub fn rms_backward(x: &Tensor, weight: &Tensor, eps: f64, grad: &Tensor) -> Result<Option<[Tensor; 2]>> {
    let d = weight.elem_count();
    let Some(device) = device(&[x, weight, grad]).filter(|_| d <= LONGEST) else { return Ok(None) };
    let rows = x.elem_count() / d;
    let warps = row_blocks(rows) * BLOCK / WARP;
    Kernel::new("rms_backward", &[x, weight, grad], &[x.dims(), &[warps, d]], &[rows, d])
        .rows(rows, eps)
        .two(device)
        .map(Some)
}

/// `norm(x) * (1 + scale) + shift`.
pub fn modulate(x: &Tensor, shift: &Tensor, scale: &Tensor, eps: f64) -> Result<Option<Tensor>> {
    let (b, t, d) = x.dims3()?;
    let Some(device) = device(&[x, shift, scale]).filter(|_| d <= LONGEST) else { return Ok(None) };
    Kernel::new("modulate_forward", &[x, shift, scale], &[x.dims()], &[b * t, t, d])
        .rows(b * t, eps)
        .one(device)
        .map(Some)
}

/// The gradient of its `x`, and what the scale's is the sum of over the tokens, both `(B, T, D)`.
pub fn modulate_backward(x: &Tensor, scale: &Tensor, eps: f64, grad: &Tensor) -> Result<Option<[Tensor; 2]>> {
    let (b, t, d) = x.dims3()?;
    let Some(device) = device(&[x, scale, grad]).filter(|_| d <= LONGEST) else { return Ok(None) };
    Kernel::new("modulate_backward", &[x, scale, grad], &[x.dims(), x.dims()], &[b * t, t, d])
        .rows(b * t, eps)
        .two(device)
        .map(Some)
}

/// `silu(gate) * up` of the last columns of `x`, from column `from` on.
pub fn swiglu(x: &Tensor, from: usize) -> Result<Option<Tensor>> {
    let Some(device) = device(&[x]) else { return Ok(None) };
    let width = x.dim(D::Minus1)?;
    let (rows, f) = (x.elem_count() / width, (width - from) / 2);
    let shape = with_last(x.dims(), f);
    Kernel::new("swiglu_forward", &[x], &[&shape], &[rows, f, width, from]).each(rows * f).one(device).map(Some)
}

/// The gradient of those columns, where `grad` has further ones before those of the result.
pub fn swiglu_backward(x: &Tensor, from: usize, grad: &Tensor) -> Result<Option<Tensor>> {
    let Some(device) = device(&[x, grad]) else { return Ok(None) };
    let width = x.dim(D::Minus1)?;
    let (rows, f) = (x.elem_count() / width, (width - from) / 2);
    let skip = grad.dim(D::Minus1)? - f;
    let shape = with_last(x.dims(), 2 * f);
    Kernel::new("swiglu_backward", &[x, grad], &[&shape], &[rows, f, width, from, skip])
        .each(rows * f)
        .one(device)
        .map(Some)
}

/// `x + gate * y`.
pub fn gate(x: &Tensor, gate: &Tensor, y: &Tensor) -> Result<Option<Tensor>> {
    let Some(device) = device(&[x, gate, y]) else { return Ok(None) };
    let (_, t, d) = x.dims3()?;
    let all = x.elem_count();
    Kernel::new("gate_forward", &[x, gate, y], &[x.dims()], &[t * d, d]).all(all).one(device).map(Some)
}

/// The gradient of its `y`, and what the gate's is the sum of over the tokens.
pub fn gate_backward(gate: &Tensor, y: &Tensor, grad: &Tensor) -> Result<Option<[Tensor; 2]>> {
    let Some(device) = device(&[gate, y, grad]) else { return Ok(None) };
    let (_, t, d) = y.dims3()?;
    let all = y.elem_count();
    Kernel::new("gate_backward", &[gate, y, grad], &[y.dims(), y.dims()], &[t * d, d]).all(all).two(device).map(Some)
}

/// `weights * (grad - level)`, where `level` has one number for each row.
pub fn scores_backward(weights: &Tensor, grad: &Tensor, level: &Tensor) -> Result<Option<Tensor>> {
    let Some(device) = device(&[weights, grad, level]) else { return Ok(None) };
    let all = weights.elem_count();
    Kernel::new("scores_backward", &[weights, grad, level], &[weights.dims()], &[all / level.elem_count().max(1)])
        .all(all)
        .one(device)
        .map(Some)
}

/// Group normalisation of `(B, C, H, W)`, without a graph.
pub fn group_norm(
    x: &Tensor,
    groups: usize,
    weight: &Tensor,
    bias: &Tensor,
    eps: f64,
    silu: bool,
) -> Result<Option<Tensor>> {
    let Some(device) = device(&[x, weight, bias]) else { return Ok(None) };
    let (b, c, h, w) = x.dims4()?;
    if groups == 0 || c % groups != 0 || c / groups * h * w >= 1 << 31 {
        return Ok(None);
    }
    Kernel::new("group_norm", &[x, weight, bias], &[x.dims()], &[groups, c / groups, h * w, usize::from(silu)])
        .blocks(b * groups)
        .eps(eps)
        .one(device)
        .map(Some)
}

/// The gradient of GELU by its tanh approximation.
pub fn gelu_tanh_backward(x: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
    let Some(device) = device(&[x, grad]) else { return Ok(None) };
    let all = x.elem_count();
    Kernel::new("gelu_tanh_backward", &[x, grad], &[x.dims()], &[]).all(all).one(device).map(Some)
}

/// Pixels along a side and channels that a block of the convolution computes.
const TILE: usize = 16;
const OUTS: usize = 16;

/// Convolution of `(B, C, H, W)` to `(B, out, h, w)`, without a graph; `padding` is that of the top and the left.
pub fn conv2d(
    x: &Tensor,
    weight: &Tensor,
    bias: &Tensor,
    stride: usize,
    padding: usize,
    (h, w): (usize, usize),
) -> Result<Option<Tensor>> {
    let (b, inner, in_h, in_w) = x.dims4()?;
    let (out, _, kernel, _) = weight.dims4()?;
    let Some(device) = device(&[x, weight, bias]).filter(|_| kernel <= 3 && (1..=2).contains(&stride)) else {
        return Ok(None);
    };
    Kernel::new(
        "conv2d",
        &[x, weight, bias],
        &[&[b, out, h, w]],
        &[inner, out, in_h, in_w, h, w, kernel, stride, padding],
    )
    .blocks(w.div_ceil(TILE) * h.div_ceil(TILE) * out.div_ceil(OUTS) * b)
    .one(device)
    .map(Some)
}
