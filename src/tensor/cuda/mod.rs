//! CUDA kernels for what candle composes of many: f32, as training computes, and forward passes in bf16 too. Each returns
//! nothing where it does not apply, and the caller composes.

use super::{Mask, Rotation, linear::with_last};
use candle_core::{
    CudaDevice, CudaStorage, D, DType, Device, Result, Shape, Storage, Tensor, bail,
    cuda_backend::{
        CudaStorageSlice, WrapErr,
        cudarc::driver::{CudaView, LaunchConfig, PushKernelArg},
    },
    op::BackpropOp,
};
use half::bf16;

/// Modules of kernels: their names and what the driver compiles.
const BLOCKWISE: Module = ("rlrig", include_str!(concat!(env!("OUT_DIR"), "/kernels.ptx")));
const ATTENTION: Module = ("rlrig attention", include_str!(concat!(env!("OUT_DIR"), "/attention.ptx")));

type Module = (&'static str, &'static str);

const WARP: usize = 32;
/// Threads of a block.
const BLOCK: usize = 256;
/// The longest row that a warp holds, and a block.
const LONGEST: usize = 8 * WARP;
const WIDEST: usize = 16 * BLOCK;
/// Blocks that rows are shared among, at most.
const BLOCKS: usize = 1024;
/// Numbers that are read at once.
const FOUR: usize = 4;

/// A kernel with its arguments, in this order: inputs, outputs, whole numbers, a factor or a small number.
struct Kernel<'a> {
    module: Module,
    name: String,
    inputs: &'a [&'a Tensor],
    outputs: &'a [&'a [usize]],
    /// The number format of the outputs.
    dtype: DType,
    /// The number of elements, where it can be more than 32 bits tell.
    all: Option<u64>,
    numbers: &'a [usize],
    real: Option<f64>,
    blocks: usize,
}

/// An input on the device.
enum View<'a> {
    F32(CudaView<'a, f32>),
    Bf16(CudaView<'a, bf16>),
    U32(CudaView<'a, u32>),
}

impl<'a> Kernel<'a> {
    fn new(name: &str, inputs: &'a [&'a Tensor], outputs: &'a [&'a [usize]], numbers: &'a [usize]) -> Self {
        let (name, dtype) = (name.to_owned(), DType::F32);
        Self { module: BLOCKWISE, name, inputs, outputs, dtype, all: None, numbers, real: None, blocks: 1 }
    }

    /// The kernel of this name for the number format of its first input, which its outputs have too.
    fn typed(name: &str, inputs: &'a [&'a Tensor], outputs: &'a [&'a [usize]], numbers: &'a [usize]) -> Self {
        let dtype = inputs[0].dtype();
        let name = format!("{name}_{}", if dtype == DType::BF16 { "bf16" } else { "f32" });
        Self { dtype, ..Self::new(&name, inputs, outputs, numbers) }
    }

    fn blocks(self, blocks: usize) -> Self {
        Self { blocks, ..self }
    }

    fn real(self, real: f64) -> Self {
        Self { real: Some(real), ..self }
    }

    /// A warp for each of so many rows, or for several of them.
    fn rows(self, rows: usize, eps: f64) -> Self {
        self.blocks(row_blocks(rows)).real(eps)
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
        let kernel = device.get_or_load_custom_func(&self.name, self.module.0, self.module.1)?;
        let inputs = self.inputs.iter().map(|x| aligned(x)).collect::<Result<Vec<_>>>()?;
        let storages: Vec<_> = inputs.iter().map(|x| x.storage_and_layout()).collect();
        let mut views = Vec::with_capacity(storages.len());
        for (storage, layout) in &storages {
            let Storage::Cuda(storage) = &**storage else { bail!("{} on another device", self.name) };
            let range = layout.start_offset()..layout.start_offset() + layout.shape().elem_count();
            views.push(match &storage.slice {
                CudaStorageSlice::F32(slice) => View::F32(slice.slice(range)),
                CudaStorageSlice::BF16(slice) => View::Bf16(slice.slice(range)),
                CudaStorageSlice::U32(slice) => View::U32(slice.slice(range)),
                _ => bail!("{} of another number format", self.name),
            });
        }
        let mut outputs = Vec::with_capacity(self.outputs.len());
        for shape in self.outputs {
            let n = shape.iter().product();
            // SAFETY: every kernel writes all its outputs before they are read.
            let storage = unsafe {
                match self.dtype {
                    DType::BF16 => CudaStorage::wrap_cuda_slice(device.alloc::<bf16>(n)?, device.clone()),
                    _ => CudaStorage::wrap_cuda_slice(device.alloc::<f32>(n)?, device.clone()),
                }
            };
            outputs.push(storage);
        }
        let number = |n: usize| u32::try_from(n).map_err(candle_core::Error::wrap);
        let numbers = self.numbers.iter().map(|n| number(*n)).collect::<Result<Vec<u32>>>()?;
        let real = self.real.unwrap_or_default() as f32;
        let all = self.all.unwrap_or_default();
        let mut arguments = kernel.builder();
        for view in &views {
            match view {
                View::F32(view) => arguments.arg(view),
                View::Bf16(view) => arguments.arg(view),
                View::U32(view) => arguments.arg(view),
            };
        }
        for output in &outputs {
            match &output.slice {
                CudaStorageSlice::BF16(slice) => arguments.arg(slice),
                CudaStorageSlice::F32(slice) => arguments.arg(slice),
                _ => bail!("{} has an output of another number format", self.name),
            };
        }
        if self.all.is_some() {
            arguments.arg(&all);
        }
        for number in &numbers {
            arguments.arg(number);
        }
        if self.real.is_some() {
            arguments.arg(&real);
        }
        let blocks = number(self.blocks.max(1))?;
        let config = LaunchConfig { grid_dim: (blocks, 1, 1), block_dim: (BLOCK as u32, 1, 1), shared_mem_bytes: 0 };
        // SAFETY: the arguments are those of the kernel's signature, and inputs and outputs have the sizes that it is told.
        unsafe { arguments.launch(config) }.w()?;
        drop(storages);
        let made = outputs.into_iter().zip(self.outputs).map(|(storage, shape)| {
            Tensor::from_storage(Storage::Cuda(storage), Shape::from(*shape), BackpropOp::none(), false)
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

/// `x` without gaps, from where four numbers can be read at once.
fn aligned(x: &Tensor) -> Result<Tensor> {
    let x = x.contiguous()?;
    let begins = x.storage_and_layout().1.start_offset();
    if begins.is_multiple_of(FOUR) { Ok(x) } else { x.force_contiguous() }
}

/// Whether all are multiples of four.
fn by_four(sizes: &[usize]) -> bool {
    sizes.iter().all(|n| n.is_multiple_of(FOUR))
}

/// The device, if all tensors are in f32 on it and none is empty.
fn device<'a>(tensors: &[&'a Tensor]) -> Option<&'a CudaDevice> {
    forward_device(tensors).filter(|_| tensors[0].dtype() == DType::F32)
}

/// The device, if all tensors are in f32 or all in bf16 on it, and none is empty.
fn forward_device<'a>(tensors: &[&'a Tensor]) -> Option<&'a CudaDevice> {
    let first = tensors.first()?;
    let dtype = first.dtype();
    match first.device() {
        Device::Cuda(device)
            if matches!(dtype, DType::F32 | DType::BF16)
                && tensors.iter().all(|x| x.dtype() == dtype && x.elem_count() > 0) =>
        {
            Some(device)
        }
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
    let Some(device) = forward_device(&[x, shift, scale]) else { return Ok(None) };
    let inputs = [x, shift, scale];
    if d <= LONGEST {
        let kernel =
            Kernel::typed("modulate_forward", &inputs, &[x.dims()], &[b * t, t, d]).rows(b * t, eps).one(device);
        return kernel.map(Some);
    }
    if d > WIDEST || !by_four(&[d]) {
        return Ok(None);
    }
    Kernel::typed("modulate_wide", &inputs, &[x.dims()], &[t, d]).blocks(b * t).real(eps).one(device).map(Some)
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
    let width = x.dim(D::Minus1)?;
    let f = (width - from) / 2;
    let Some(device) = forward_device(&[x]).filter(|_| by_four(&[width, from, f])) else { return Ok(None) };
    let rows = x.elem_count() / width;
    let shape = with_last(x.dims(), f);
    Kernel::typed("swiglu_forward", &[x], &[&shape], &[rows, f, width, from])
        .each(rows * f / FOUR)
        .one(device)
        .map(Some)
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
    let (_, t, d) = x.dims3()?;
    let Some(device) = forward_device(&[x, gate, y]).filter(|_| by_four(&[d])) else { return Ok(None) };
    let all = x.elem_count();
    Kernel::typed("gate_forward", &[x, gate, y], &[x.dims()], &[t * d, d])
        .all(all)
        .each(all / FOUR)
        .one(device)
        .map(Some)
}

/// The gradient of its `y`, and what the gate's is the sum of over the tokens.
pub fn gate_backward(gate: &Tensor, y: &Tensor, grad: &Tensor) -> Result<Option<[Tensor; 2]>> {
    let Some(device) = device(&[gate, y, grad]) else { return Ok(None) };
    let (_, t, d) = y.dims3()?;
    let all = y.elem_count();
    Kernel::new("gate_backward", &[gate, y, grad], &[y.dims(), y.dims()], &[t * d, d]).all(all).two(device).map(Some)
}

/// Turns the heads of `x (B, T, H, D)` by the angles `(T, D/2)` or `(B, T, D/2)`, or `back`; before that normalises them by
/// their root mean square, where there is a weight.
pub fn rotate(
    x: &Tensor,
    norm: Option<(&Tensor, f64)>,
    [cos, sin]: [&Tensor; 2],
    rotation: Rotation,
    back: bool,
) -> Result<Option<Tensor>> {
    let (b, t, h, d) = x.dims4()?;
    let (weight, eps) = norm.unwrap_or((x, 0.0));
    let fits = d <= LONGEST && d.is_multiple_of(2) && [t, b * t].map(|n| n * (d / 2)).contains(&cos.elem_count());
    let Some(device) = forward_device(&[x, weight]).filter(|_| fits) else { return Ok(None) };
    let [cos, sin] = [cos.to_dtype(DType::F32)?, sin.to_dtype(DType::F32)?];
    let (rows, n) = (x.elem_count() / d, cos.elem_count() / (d / 2));
    let [half, normed, back] = [rotation == Rotation::Half, norm.is_some(), back].map(usize::from);
    Kernel::typed("rotate", &[x, weight, &cos, &sin], &[x.dims()], &[rows, h, n, d, half, normed, back])
        .rows(rows, eps)
        .one(device)
        .map(Some)
}

/// Attention in bf16, without a graph: see [`super::attention`].
pub fn attention(q: &Tensor, k: &Tensor, v: &Tensor, mask: &Mask) -> Result<Option<Tensor>> {
    let ((b, tq, h, d), (_, tk, hkv, _)) = (q.dims4()?, k.dims4()?);
    let Some(device) = forward_device(&[q, k, v]) else { return Ok(None) };
    if q.dtype() != DType::BF16 || ![32, 64, 128].contains(&d) {
        return Ok(None);
    }
    let seen = |row: usize| mask.keys.as_ref().map_or(0..tk, |keys| keys[row].clone());
    let column = |end: &dyn Fn(usize) -> usize| -> Result<Tensor> {
        let ends: Vec<u32> = (0..b).map(|row| end(row).min(tk) as u32).collect();
        Tensor::from_vec(ends, b, q.device())
    };
    let (first, last) = (column(&|row| seen(row).start)?, column(&|row| seen(row).end)?);
    let inputs = [q, k, v, &first, &last];
    let shape = [q.dims()];
    let numbers = [h, hkv, tq, tk, usize::from(mask.causal)];
    let kernel = Kernel::new(&format!("attention_{d}"), &inputs, &shape, &numbers);
    let kernel = Kernel { module: ATTENTION, dtype: DType::BF16, ..kernel };
    kernel.blocks(tq.div_ceil(QUERIES) * h * b).real((d as f64).powf(-0.5)).one(device).map(Some)
}

/// Queries of a block.
const QUERIES: usize = 128;

/// The gradient of a table `(N, D)` of which the rows `rows` were taken.
pub fn select_backward(grad: &Tensor, rows: &[u32], n: usize) -> Result<Option<Tensor>> {
    let Some(device) = device(&[grad]) else { return Ok(None) };
    let d = grad.elem_count() / rows.len();
    // The places of each row, by a counting sort.
    let mut starts = vec![0u32; n + 1];
    rows.iter().for_each(|row| starts[*row as usize + 1] += 1);
    (0..n).for_each(|i| starts[i + 1] += starts[i]);
    let mut next = starts.clone();
    let mut order = vec![0u32; rows.len()];
    for (place, row) in rows.iter().enumerate() {
        order[next[*row as usize] as usize] = place as u32;
        next[*row as usize] += 1;
    }
    let (starts, order) = (Tensor::new(starts, grad.device())?, Tensor::new(order, grad.device())?);
    let shape = [n, d];
    Kernel::new("select_backward", &[grad, &starts, &order], &[&shape], &[d]).all(n * d).one(device).map(Some)
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
        .real(eps)
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
