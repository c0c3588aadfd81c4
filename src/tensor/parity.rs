//! The operations as other devices compute them, against the CPU's own kernels: values and all gradients, in f32 and in
//! half precision. On the CPU by way of [`composed`], and on a CUDA device where there is one.

use super::{device::Accelerator, rng::Stream, tests::draw, *};
use candle_core::{DType, Device, Result, Tensor, Var};
use std::{cell::Cell, io::Write};

/// What a difference may be, relative to the norm of what is right.
pub(crate) const F32: f64 = 1e-3;
/// Half precision keeps 8 (bf16) or 11 bits (f16); an operation rounds a few times.
pub(crate) const BF16: f64 = 2e-2;
const F16: f64 = 4e-3;
/// On the CPU both ways compute in f32, and differ by the order of sums.
const SAME_DEVICE: f64 = 1e-5;

thread_local! {
    static COMPOSING: Cell<bool> = const { Cell::new(false) };
}

/// Whether this thread computes on the CPU as other devices do.
pub(crate) fn composing() -> bool {
    COMPOSING.get()
}

/// Runs `f` on one thread that computes on the CPU as other devices do.
pub(crate) fn composed<R: Send>(f: impl FnOnce() -> R + Send) -> R {
    let pool = rayon::ThreadPoolBuilder::new().num_threads(1).build().unwrap();
    pool.install(|| {
        COMPOSING.set(true);
        f()
    })
}

/// The CUDA device; where there is none, `test` says so past the capture of test output.
pub(crate) fn cuda(test: &str) -> Option<Device> {
    let device = Accelerator::Cuda.open();
    if let Err(reason) = &device {
        // Where there must be one, a broken set-up is no reason to skip.
        assert!(std::env::var_os("RLRIG_CUDA").is_none_or(|value| value != "required"), "{test}: {reason}");
        writeln!(std::io::stderr(), "{test}: skipped: no CUDA device ({reason})").unwrap();
    }
    device.ok()
}

/// The difference of two tensors relative to the norm of the second.
pub(crate) fn difference(got: &Tensor, want: &Tensor) -> f64 {
    assert_eq!(got.dims(), want.dims());
    let wide = |x: &Tensor| x.to_device(&Device::Cpu).unwrap().to_dtype(DType::F64).unwrap();
    let norm = |x: &Tensor| x.sqr().unwrap().sum_all().unwrap().to_scalar::<f64>().unwrap().sqrt();
    let want = wide(want);
    norm(&(wide(got) - &want).unwrap()) / (norm(&want) + 1e-12)
}

type Operation = Box<dyn Fn(&[Tensor]) -> Result<Tensor> + Send + Sync>;

struct Case {
    name: String,
    inputs: Vec<Tensor>,
    operation: Operation,
    /// The CPU multiplies no bf16 matrices.
    matmul: bool,
}

/// The value, the value where nothing is trained, for which there may be another kernel, and the gradients of a random projection.
struct Outcome(Vec<Tensor>);

impl Case {
    fn run(&self, rounded: DType, dtype: DType, device: &Device) -> Result<Outcome> {
        let var = |x: &Tensor| Var::from_tensor(&x.to_dtype(rounded)?.to_dtype(dtype)?.to_device(device)?);
        let vars: Vec<Var> = self.inputs.iter().map(var).collect::<Result<_>>()?;
        let y = (self.operation)(&vars.iter().map(|v| v.as_tensor().clone()).collect::<Vec<_>>())?;
        let projection = draw("projection", y.dims()).to_device(device)?;
        let grads = (y.to_dtype(DType::F32)? * projection)?.sum_all()?.backward()?;
        let plain = (self.operation)(&vars.iter().map(Var::as_detached_tensor).collect::<Vec<_>>())?;
        let mut all = vec![y.detach(), plain];
        for (i, var) in vars.iter().enumerate() {
            let Some(grad) = grads.get(var) else { panic!("{}: input {i} has no gradient", self.name) };
            all.push(grad.clone());
        }
        Ok(Outcome(all))
    }

    /// Compares with the CPU's kernels on inputs rounded in the same way.
    fn agrees(&self, dtype: DType, device: &Device, bound: f64) {
        let want = self.run(dtype, DType::F32, &Device::Cpu).unwrap();
        let got =
            if device.is_cpu() { composed(|| self.run(dtype, dtype, device)) } else { self.run(dtype, dtype, device) };
        let got = got.unwrap_or_else(|e| panic!("{} in {dtype:?}: {e}", self.name));
        for (i, (got, want)) in got.0.iter().zip(&want.0).enumerate() {
            assert_eq!(got.dtype(), dtype, "{}: number format of result {i}", self.name);
            let off = difference(got, want);
            let what = match i {
                0 => "the value".to_owned(),
                1 => "the value where nothing is trained".to_owned(),
                _ => format!("gradient {}", i - 2),
            };
            assert!(off < bound, "{} in {dtype:?} on {device:?}: {what} is off by {off:.1e}", self.name);
        }
    }
}

fn cases() -> Vec<Case> {
    let mut all = Vec::new();
    let mut add = |name: &str, matmul: bool, inputs: &[Tensor], operation: Operation| {
        all.push(Case { name: name.to_owned(), inputs: inputs.to_vec(), operation, matmul });
    };
    let positive = |name: &str, n: usize| (draw(name, &[n]).abs().unwrap() + 0.5).unwrap();

    let (x, w, b) = (draw("x", &[2, 50, 24]), (draw("w", &[40, 24]) * 0.2).unwrap(), draw("b", &[40]));
    add("linear", true, &[x.clone(), w.clone()], Box::new(|i| linear(&i[0], &i[1], None)));
    add("linear with bias", true, &[x.clone(), w.clone(), b], Box::new(|i| linear(&i[0], &i[1], Some(&i[2]))));
    let low = [x, draw("low a", &[4, 24]), draw("low b", &[40, 4])].map(|x| (x * 0.2).unwrap());
    // No input, so rounded here, that every format has the same numbers.
    let frozen = w.to_dtype(DType::BF16).unwrap();
    let adapted: Operation = Box::new(move |i| {
        let frozen = frozen.to_dtype(i[0].dtype())?.to_device(i[0].device())?;
        linear_low_rank(Precision::F32, &i[0], (&frozen, None), (&i[1], &i[2], 0.7))
    });
    add("linear with an adapter", true, &low, adapted);

    let (x, w, b) = (draw("x", &[3, 50, 40]), positive("w", 40), draw("b", &[40]));
    add("rms norm", false, &[x.clone(), w.clone()], Box::new(|i| rms_norm(&i[0], &i[1], 1e-6)));
    add("layer norm", false, &[x.clone(), w, b], Box::new(|i| layer_norm(&i[0], &i[1], &i[2], 1e-6)));
    let (shift, scale) = (draw("shift", &[3, 40]), draw("scale", &[3, 40]));
    let modulate: Operation = Box::new(|i| layer_norm_modulate(&i[0], &i[1], &i[2], 1e-6));
    add("modulated layer norm", false, &[x.clone(), shift, scale], modulate);

    add("silu", false, std::slice::from_ref(&x), Box::new(|i| silu(&i[0])));
    add("gelu", false, std::slice::from_ref(&x), Box::new(|i| gelu(&i[0])));
    add("gelu tanh", false, std::slice::from_ref(&x), Box::new(|i| gelu_tanh(&i[0])));
    add("swiglu", false, std::slice::from_ref(&x), Box::new(|i| swiglu(&i[0])));
    let two = [x.clone(), draw("up", &[3, 50, 40])];
    add("swiglu of two", false, &two, Box::new(|i| swiglu_of(&i[0], &i[1])));
    let gated = [x.clone(), draw("gate", &[3, 40]), draw("y", &[3, 50, 40])];
    add("gated residual", false, &gated, Box::new(|i| gate_residual(&i[0], &i[1], &i[2])));

    let heads = draw("heads", &[2, 9, 3, 8]);
    for (name, angle) in [("", draw("angles", &[9, 4])), (" by row", draw("angles", &[2, 9, 4]))] {
        for rotation in [Rotation::Interleaved, Rotation::Half] {
            let (cos, sin) = (angle.cos().unwrap(), angle.sin().unwrap());
            let on = |x: &Tensor| x.device().clone();
            let (c, s) = (cos.clone(), sin.clone());
            let turn: Operation =
                Box::new(move |i| rope(&i[0], &c.to_device(&on(&i[0]))?, &s.to_device(&on(&i[0]))?, rotation));
            add(&format!("rope{name}, {rotation:?}"), false, std::slice::from_ref(&heads), turn);
            let turn: Operation = Box::new(move |i| {
                let (cos, sin) = (cos.to_device(i[0].device())?, sin.to_device(i[0].device())?);
                norm_rope(&i[0], &i[1], 1e-6, &cos, &sin, rotation)
            });
            add(&format!("norm and rope{name}, {rotation:?}"), false, &[heads.clone(), positive("w", 8)], turn);
        }
    }

    for (keys, heads) in [(30, 4), (30, 2), (50, 1)] {
        let inputs = [draw("q", &[2, 30, 4, 8]), draw("k", &[2, keys, heads, 8]), draw("v", &[2, keys, heads, 8])];
        for mask in [
            Mask::default(),
            Mask::causal(),
            Mask { causal: false, keys: Some(vec![0..keys, 7..keys - 5]) },
            Mask { causal: true, keys: Some(vec![0..keys, 0..keys - 9]) },
        ] {
            let name = format!("attention of {keys} keys, {heads} heads, {mask:?}");
            add(&name, true, &inputs, Box::new(move |i| attention(&i[0], &i[1], &i[2], &mask)));
        }
    }

    // Heads that the tensor cores' kernel knows, of more queries and keys than one block and one tile of it take.
    for (d, queries, keys) in [(32, 150, 150), (64, 150, 170), (128, 150, 170), (128, 1, 90)] {
        let inputs = [draw("q", &[2, queries, 4, d]), draw("k", &[2, keys, 2, d]), draw("v", &[2, keys, 2, d])];
        for mask in [
            Mask::default(),
            Mask { causal: true, keys: Some(vec![0..keys, 0..keys - 9]) },
            Mask { causal: false, keys: Some(vec![70..keys, 7..keys - 5]) },
        ] {
            let name = format!("attention of {queries} queries and {keys} keys of {d}, {mask:?}");
            add(&name, true, &inputs, Box::new(move |i| attention(&i[0], &i[1], &i[2], &mask)));
        }
    }
    let wide = [draw("x", &[2, 5, 300]), draw("shift", &[2, 300]), draw("scale", &[2, 300])];
    add("wide modulated layer norm", false, &wide, Box::new(|i| layer_norm_modulate(&i[0], &i[1], &i[2], 1e-6)));

    let (heads, d, hidden, t) = (3, 8, 20, 30);
    let inputs = [draw("x", &[2, t, 3 * heads * d + 2 * hidden]), positive("q", d), positive("k", d)];
    let angle = draw("angles", &[t, d / 2]);
    let block: Operation = Box::new(move |i| {
        let (cos, sin) = (angle.cos()?.to_device(i[0].device())?, angle.sin()?.to_device(i[0].device())?);
        attention_swiglu(&i[0], &i[1], &i[2], 1e-6, heads, &cos, &sin, Rotation::Interleaved)
    });
    add("attention and swiglu", true, &inputs, block);

    for (stride, padding) in [(1, (1, 1)), (2, (0, 1))] {
        let inputs = [draw("x", &[2, 4, 8, 10]), (draw("w", &[6, 4, 3, 3]) * 0.2).unwrap(), draw("b", &[6])];
        let conv: Operation = Box::new(move |i| conv2d(&i[0], &i[1], &i[2], stride, padding));
        add(&format!("convolution by steps of {stride}"), true, &inputs, conv);
    }
    add("upsampling", false, &[draw("x", &[2, 3, 5, 4])], Box::new(|i| upsample2x(&i[0])));
    let inputs = [draw("x", &[2, 6, 5, 7]), positive("w", 6), draw("b", &[6])];
    add("group norm", false, &inputs, Box::new(|i| group_norm(&i[0], 3, &i[1], &i[2], 1e-6, true)));
    all
}

#[test]
fn compositions_agree_with_the_kernels() {
    for case in cases() {
        case.agrees(DType::F32, &Device::Cpu, SAME_DEVICE);
    }
}

#[test]
fn compositions_agree_in_half_precision() {
    for case in cases() {
        case.agrees(DType::F16, &Device::Cpu, F16);
        if !case.matmul {
            case.agrees(DType::BF16, &Device::Cpu, BF16);
        }
    }
}

#[test]
fn cuda_agrees_with_the_cpu() {
    let Some(device) = cuda("operations on CUDA") else { return };
    for case in cases() {
        case.agrees(DType::F32, &device, F32);
        case.agrees(DType::BF16, &device, BF16);
    }
}

#[test]
fn mixed_precision_rounds_as_the_cpu_does() {
    let Some(device) = cuda("mixed precision on CUDA") else { return };
    let run = |device: &Device| -> Result<Vec<Tensor>> {
        let vars = [draw("x", &[64, 96]), (draw("w", &[80, 96]) * 0.1)?].map(|x| x.to_device(device));
        let [x, w] = vars.map(|x| Var::from_tensor(&x.unwrap()).unwrap());
        let y = linear_in(Precision::Bf16, &x, &w, None)?;
        let grads = (&y * draw("projection", y.dims()).to_device(device)?)?.sum_all()?.backward()?;
        Ok(vec![y.clone(), grads.get(&x).unwrap().clone(), grads.get(&w).unwrap().clone()])
    };
    for (got, want) in run(&device).unwrap().iter().zip(run(&Device::Cpu).unwrap()) {
        assert_eq!(got.dtype(), DType::F32);
        assert!(difference(got, &want) < BF16);
    }
}

#[test]
fn cross_entropy_agrees_wherever_it_is_computed() {
    let targets = Tensor::new(&[0u32, 4, 2], &Device::Cpu).unwrap();
    let logits = draw("x", &[3, 5]);
    let run = |device: &Device| -> Result<Vec<Tensor>> {
        let x = Var::from_tensor(&logits.to_device(device)?)?;
        let loss = cross_entropy(&x, &targets.to_device(device)?)?;
        let grads = loss.sum_all()?.backward()?;
        Ok(vec![loss.detach(), grads.get(&x).unwrap().clone()])
    };
    let want = run(&Device::Cpu).unwrap();
    let mut others = vec![composed(|| run(&Device::Cpu)).unwrap()];
    others.extend(cuda("cross entropy on CUDA").map(|device| run(&device).unwrap()));
    for got in others {
        assert!(got.iter().zip(&want).all(|(got, want)| difference(got, want) < SAME_DEVICE));
    }
}

#[test]
fn embeddings_agree_wherever_they_are_computed() {
    let (table, ids) = (draw("table", &[7, 5]), Tensor::new(&[3u32, 0, 3, 6], &Device::Cpu).unwrap());
    let run = |device: &Device, lookup: fn(&Tensor, &Tensor) -> Result<Tensor>| -> Result<Vec<Tensor>> {
        let table = Var::from_tensor(&table.to_device(device)?)?;
        let y = lookup(&table, &ids.to_device(device)?)?;
        let grads = (&y * draw("projection", y.dims()).to_device(device)?)?.sum_all()?.backward()?;
        Ok(vec![y.detach(), grads.get(&table).unwrap().clone()])
    };
    let mut others = vec![run(&Device::Cpu, super::composed::embedding)];
    others.extend(cuda("embeddings on CUDA").map(|device| run(&device, embedding)));
    all_agree(others, run(&Device::Cpu, embedding));
}

/// Whether a value and its gradient are the same wherever they were computed.
fn all_agree(others: Vec<Result<Vec<Tensor>>>, want: Result<Vec<Tensor>>) {
    let want = want.unwrap();
    for got in others {
        assert!(got.unwrap().iter().zip(&want).all(|(got, want)| difference(got, want) < SAME_DEVICE));
    }
}

#[test]
fn chosen_rows_agree_wherever_they_are_computed() {
    // Row 1 is taken never, others several times.
    let (x, rows) = (draw("states", &[5, 3, 4]), [3u32, 0, 3, 4, 2, 3]);
    let run = |device: &Device, select: fn(&Tensor, &[u32]) -> Result<Tensor>| -> Result<Vec<Tensor>> {
        let x = Var::from_tensor(&x.to_device(device)?)?;
        let y = select(&x, &rows)?;
        let grads = (&y * draw("projection", y.dims()).to_device(device)?)?.sum_all()?.backward()?;
        Ok(vec![y.detach(), grads.get(&x).unwrap().clone()])
    };
    let mut others = vec![run(&Device::Cpu, super::composed::select_rows)];
    others.extend(cuda("chosen rows on CUDA").map(|device| run(&device, select_rows)));
    all_agree(others, run(&Device::Cpu, select_rows));
}

#[test]
fn noise_is_the_same_on_every_device() {
    let Some(device) = cuda("noise on CUDA") else { return };
    let bits = |device: &Device| {
        let x = Stream::new(7, "noise", 3).normal(&[1000], device).unwrap();
        x.to_vec1::<f32>().unwrap().into_iter().map(f32::to_bits).collect::<Vec<_>>()
    };
    assert_eq!(bits(&device), bits(&Device::Cpu));
}
