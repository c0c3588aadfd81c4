//! Each fused operation against the composition of candle's own operations in f64, whose gradients candle computes, and
//! against finite differences.

use super::{rng::Stream, *};
use candle_core::{DType, Device, Result, Tensor, Var};

pub(super) fn draw(name: &str, shape: &[usize]) -> Tensor {
    Stream::new(1, name, 0).normal(shape, &Device::Cpu).unwrap()
}

/// Runs `f` in f32 (fused) and in f64 (composed of candle's operations), and compares values and all gradients of a
/// random projection of the result.
pub(super) fn agrees(name: &str, inputs: &[Tensor], f: impl Fn(&[Tensor]) -> Result<Tensor>) {
    let run = |dtype: DType| -> Result<(Tensor, Vec<Tensor>)> {
        let vars: Vec<Var> = inputs.iter().map(|x| Var::from_tensor(&x.to_dtype(dtype)?)).collect::<Result<_>>()?;
        let y = f(&vars.iter().map(|v| v.as_tensor().clone()).collect::<Vec<_>>())?;
        let grads = (&y * draw("projection", y.dims()).to_dtype(dtype)?)?.sum_all()?.backward()?;
        let grads = vars.iter().map(|v| grads.get(v).expect("every input has a gradient").clone()).collect();
        Ok((y, grads))
    };
    let (y, grads) = run(DType::F32).unwrap();
    let (want, want_grads) = run(DType::F64).unwrap();
    close(&format!("{name}: value"), &y, &want, 2e-6);
    for (i, (got, want)) in grads.iter().zip(&want_grads).enumerate() {
        close(&format!("{name}: gradient {i}"), got, want, 2e-5);
    }
    finite_differences(name, inputs, &want_grads, &f);
}

fn close(what: &str, got: &Tensor, want: &Tensor, tolerance: f64) {
    assert_eq!(got.dims(), want.dims(), "{what}");
    let want = want.to_dtype(DType::F64).unwrap();
    let norm = |x: &Tensor| x.sqr().unwrap().sum_all().unwrap().to_scalar::<f64>().unwrap().sqrt();
    let error = norm(&(got.to_dtype(DType::F64).unwrap() - &want).unwrap()) / (norm(&want) + 1e-12);
    assert!(error < tolerance, "{what} is off by {error:e}");
}

/// The directional derivative along a random direction, in f64 by central differences.
fn finite_differences(name: &str, inputs: &[Tensor], grads: &[Tensor], f: &impl Fn(&[Tensor]) -> Result<Tensor>) {
    let wide: Vec<Tensor> = inputs.iter().map(|x| x.to_dtype(DType::F64).unwrap()).collect();
    for i in 0..inputs.len() {
        let direction = draw("direction", inputs[i].dims()).to_dtype(DType::F64).unwrap();
        let at = |step: f64| {
            let mut moved = wide.clone();
            moved[i] = (&wide[i] + (&direction * step).unwrap()).unwrap();
            let y = f(&moved).unwrap();
            let weights = draw("projection", y.dims()).to_dtype(DType::F64).unwrap();
            (y * weights).unwrap().sum_all().unwrap().to_scalar::<f64>().unwrap()
        };
        let want = (at(1e-5) - at(-1e-5)) / 2e-5;
        let got = (&grads[i] * &direction).unwrap().sum_all().unwrap().to_scalar::<f64>().unwrap();
        assert!((got - want).abs() < 1e-5 * (1.0 + want.abs()), "{name}: input {i} moves by {want}, not {got}");
    }
}

fn angles(t: usize, half: usize) -> (Tensor, Tensor) {
    let angle = draw("angles", &[t, half]);
    (angle.cos().unwrap(), angle.sin().unwrap())
}

fn turned(x: &Tensor, cos: &Tensor, sin: &Tensor, rotation: Rotation, weight: Option<&Tensor>) -> Result<Tensor> {
    let (cos, sin) = (cos.to_dtype(x.dtype())?, sin.to_dtype(x.dtype())?);
    match weight {
        Some(weight) => norm_rope(x, weight, 1e-6, &cos, &sin, rotation),
        None => rope(x, &cos, &sin, rotation),
    }
}

#[test]
fn linear_agrees() {
    let (x, w, b) = (draw("x", &[2, 5, 7]), draw("w", &[3, 7]), draw("b", &[3]));
    agrees("linear", &[x.clone(), w.clone()], |i| linear(&i[0], &i[1], None));
    agrees("linear with bias", &[x, w, b], |i| linear(&i[0], &i[1], Some(&i[2])));
}

#[test]
fn an_adapter_on_a_linear_layer_agrees() {
    let (x, w, bias) = (draw("x", &[2, 5, 7]), draw("w", &[3, 7]), draw("b", &[3]));
    let (low_a, low_b) = (draw("low a", &[2, 7]), draw("low b", &[3, 2]));
    let adapted = |precision: Precision, i: &[Tensor]| {
        linear_low_rank(precision, &i[0], (&i[3], Some(&i[4])), (&i[1], &i[2], 0.7))
    };
    let all = [x, low_a, low_b, w, bias];
    agrees("adapter on a trained layer", &all, |i| adapted(Precision::F32, i));
    let frozen = |i: &[Tensor]| all[3..].iter().map(|x| x.to_dtype(i[0].dtype())).collect::<Result<Vec<_>>>();
    agrees("adapter on a frozen layer", &all[..3], |i| adapted(Precision::F32, &[i, &frozen(i)?].concat()));
    agrees("adapter on a part of a frozen layer", &all[..3], |i| {
        let part = |x: &Tensor| x.narrow(0, 1, 2);
        let rest = frozen(i)?;
        let base = (&part(&rest[0])?, Some(&part(&rest[1])?));
        linear_low_rank(Precision::F32, &i[0], base, (&i[1], &part(&i[2])?, 0.7))
    });

    // With the layer's product in half precision it is the same whether the layer is frozen.
    let trained: Vec<Var> = all.iter().map(|x| Var::from_tensor(x).unwrap()).collect();
    let run = |weights: &[Tensor]| {
        let adapter: Vec<Tensor> = trained[..3].iter().map(|v| v.as_tensor().clone()).collect();
        let y = adapted(Precision::Bf16, &[&adapter, weights].concat()).unwrap();
        let grads = (&y * draw("projection", y.dims())).unwrap().sum_all().unwrap().backward().unwrap();
        let grads: Vec<Tensor> = trained[..3].iter().map(|v| grads.get(v).unwrap().clone()).collect();
        [vec![y], grads].concat()
    };
    let weights: Vec<Tensor> = trained[3..].iter().map(|v| v.as_tensor().clone()).collect();
    for (got, want) in run(&all[3..]).iter().zip(run(&weights)) {
        close("adapter in half precision", got, &want, 2e-6);
    }
}

#[test]
fn norms_agree() {
    let (x, w, b) = (draw("x", &[3, 150, 40]), draw("w", &[40]), draw("b", &[40]));
    agrees("rms", &[x.clone(), w.clone()], |i| rms_norm(&i[0], &i[1], 1e-6));
    agrees("layer", &[x.clone(), w, b], |i| layer_norm(&i[0], &i[1], &i[2], 1e-6));
    let (shift, scale) = (draw("shift", &[3, 40]), draw("scale", &[3, 40]));
    agrees("modulate", &[x, shift, scale], |i| layer_norm_modulate(&i[0], &i[1], &i[2], 1e-6));
}

/// Of one row, parts of a tensor are contiguous where they lie: each operand is read from its own place.
#[test]
fn parts_of_one_row_agree() {
    let (x, all) = (draw("x", &[1, 5, 40]), draw("all", &[1, 120]));
    let part = |i: &Tensor, k: usize| i.narrow(1, 40 * k, 40);
    agrees("modulate by parts", &[x.clone(), all.clone()], |i| {
        layer_norm_modulate(&i[0], &part(&i[1], 1)?, &part(&i[1], 2)?, 1e-6)
    });
    agrees("gate by a part", &[x, all], |i| gate_residual(&i[0], &part(&i[1], 2)?, &i[0]));
    let all = draw("all", &[1, 80]);
    let weights = |i: &Tensor| Ok::<_, candle_core::Error>((part(i, 0)?.squeeze(0)?, part(i, 1)?.squeeze(0)?));
    agrees("layer norm by parts", &[draw("x", &[3, 40]), all], |i| {
        let (weight, bias) = weights(&i[1])?;
        layer_norm(&i[0], &weight, &bias, 1e-6)
    });
    let (cos, sin) = angles(6, 4);
    let both = draw("x", &[1, 6, 7, 8]);
    agrees("attention of parts", &[both], |i| {
        let head = |k: usize, n: usize| i[0].narrow(2, k, n);
        let (cos, sin) = (cos.to_dtype(i[0].dtype())?, sin.to_dtype(i[0].dtype())?);
        let q = rope(&head(0, 4)?, &cos, &sin, Rotation::Half)?;
        attention(&q, &head(4, 1)?, &head(5, 1)?, &Mask::causal())
    });
}

#[test]
fn element_wise_operations_agree() {
    let x = (draw("x", &[3, 5, 34]) * 3.0).unwrap();
    agrees("silu", std::slice::from_ref(&x), |i| silu(&i[0]));
    agrees("swiglu", std::slice::from_ref(&x), |i| swiglu(&i[0]));
    agrees("gelu", std::slice::from_ref(&x), |i| gelu(&i[0]));
    agrees("gelu tanh", std::slice::from_ref(&x), |i| gelu_tanh(&i[0]));
    let (gate, y) = (draw("gate", &[3, 34]), draw("y", &[3, 5, 34]));
    agrees("swiglu of two", &[x.clone(), y.clone()], |i| swiglu_of(&i[0], &i[1]));
    assert!(swiglu_of(&x, &gate).is_err());
    agrees("gate residual", &[x, gate, y], |i| gate_residual(&i[0], &i[1], &i[2]));
}

#[test]
fn rotations_agree() {
    let (x, w) = (draw("x", &[2, 6, 3, 8]), draw("w", &[8]));
    let (cos, sin) = angles(6, 4);
    for rotation in [Rotation::Interleaved, Rotation::Half] {
        agrees("rope", std::slice::from_ref(&x), |i| turned(&i[0], &cos, &sin, rotation, None));
        agrees("norm and rope", &[x.clone(), w.clone()], |i| turned(&i[0], &cos, &sin, rotation, Some(&i[1])));
    }
    // Positions that differ within the batch.
    let angle = draw("angles", &[2, 6, 4]);
    let (cos, sin) = (angle.cos().unwrap(), angle.sin().unwrap());
    agrees("rope by row", &[x], |i| turned(&i[0], &cos, &sin, Rotation::Half, None));
}

#[test]
fn attention_agrees() {
    let q = draw("q", &[2, 150, 4, 8]);
    for (keys, heads) in [(150, 4), (150, 2), (200, 1)] {
        let inputs = [q.clone(), draw("k", &[2, keys, heads, 8]), draw("v", &[2, keys, heads, 8])];
        for mask in [
            Mask::default(),
            Mask::causal(),
            Mask { causal: false, keys: Some(vec![0..keys, 7..keys - 20]) },
            Mask { causal: true, keys: Some(vec![0..100, 0..1]) },
        ] {
            agrees(&format!("{mask:?}"), &inputs, |i| attention(&i[0], &i[1], &i[2], &mask));
        }
    }
}

#[test]
fn single_stream_block_agrees() {
    let (heads, d, hidden, t) = (3, 8, 20, 140);
    let inputs = [draw("x", &[2, t, 3 * heads * d + 2 * hidden]), draw("q", &[d]), draw("k", &[d])];
    let (cos, sin) = angles(t, d / 2);
    agrees("attention and swiglu", &inputs, |i| {
        let (cos, sin) = (cos.to_dtype(i[0].dtype())?, sin.to_dtype(i[0].dtype())?);
        attention_swiglu(&i[0], &i[1], &i[2], 1e-6, heads, &cos, &sin, Rotation::Interleaved)
    });
}

#[test]
fn cross_entropy_agrees() {
    let targets = Tensor::new(&[0u32, 4, 2], &Device::Cpu).unwrap();
    agrees("cross entropy", &[draw("x", &[3, 5])], |i| cross_entropy(&i[0], &targets));
    assert!(cross_entropy(&draw("x", &[1, 5]), &Tensor::new(&[5u32], &Device::Cpu).unwrap()).is_err());
}

#[test]
fn results_do_not_depend_on_the_number_of_threads() {
    let (x, w) = (draw("x", &[4, 300, 96]), draw("w", &[96]));
    let (big, matrix) = (draw("big", &[600, 256]), draw("matrix", &[512, 256]));
    let run = |threads: usize| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        pool.install(|| {
            let vars = [&x, &w, &big, &matrix].map(|t| Var::from_tensor(t).unwrap());
            let q = rms_norm(&vars[0], &vars[1], 1e-6).unwrap().reshape((4, 300, 3, 32)).unwrap();
            let y = attention(&q, &q, &q, &Mask::causal()).unwrap().sqr().unwrap().sum_all().unwrap();
            let z = linear(&vars[2], &vars[3], None).unwrap().sqr().unwrap().sum_all().unwrap();
            let grads = (y + z).unwrap().backward().unwrap();
            vars.map(|v| grads.get(&v).unwrap().flatten_all().unwrap().to_vec1::<f32>().unwrap())
        })
    };
    assert_eq!(run(1), run(2));
    assert_eq!(run(1), run(3));
}
