//! `Flux2Transformer2DModel` against diffusers: outputs, and the gradient of every parameter.
//! The references are made by `scripts/make_flux2_fixtures.py`.

#![allow(clippy::unwrap_used)]

use candle_core::{DType, Device, Tensor, Var};
use rlrig::models::{
    Folder, Params,
    flux2::{Conditioning, Config, Flux2, image_positions, text_positions},
};

fn difference(got: &Tensor, want: &Tensor) -> f32 {
    let norm = |x: &Tensor| x.sqr().unwrap().sum_all().unwrap().sqrt().unwrap().to_scalar::<f32>().unwrap();
    norm(&(got - want).unwrap()) / (norm(want) + 1e-12)
}

fn folder(name: &str) -> Folder {
    Folder::Disk(format!("{}/tests/fixtures/flux2/{name}", env!("CARGO_MANIFEST_DIR")).into())
}

#[test]
fn outputs_and_gradients_are_those_of_diffusers() {
    for name in ["plain", "guided"] {
        let folder = folder(name);
        let config: Config = folder.json("config.json").unwrap();
        let params = Params::open(&folder, "diffusion_pytorch_model", DType::F32, &Device::Cpu).unwrap().trained();
        let model = Flux2::new(&config, &params).unwrap();
        params.finish(|_| false).unwrap();

        let golden = folder.read("golden.safetensors").unwrap();
        let golden = candle_core::safetensors::load_buffer(&golden, &Device::Cpu).unwrap();
        let image = Var::from_tensor(&golden["image"]).unwrap();
        let text = Var::from_tensor(&golden["text"]).unwrap();
        let mut positions = text_positions(5);
        positions.extend(image_positions(0, 3, 2));
        positions.extend(image_positions(10, 3, 2));
        let angles = model.angles(&positions, &Device::Cpu).unwrap();
        let given =
            Conditioning { text: &text, sigma: &golden["sigma"], guidance: golden.get("guidance"), angles: &angles };
        let out = model.forward(&image, &given).unwrap();
        let error = difference(&out, &golden["out"]);
        assert!(error < 1e-5, "{name}: output off by {error:e}");

        let grads = (out * &golden["direction"]).unwrap().sum_all().unwrap().backward().unwrap();
        let mut vars = params.vars();
        vars.insert("image".into(), image);
        vars.insert("text".into(), text);
        assert_eq!(vars.len(), golden.keys().filter(|k| k.starts_with("grad.")).count());
        for (parameter, var) in vars {
            let grad = grads.get(&var).unwrap_or_else(|| panic!("{name}: no gradient reaches {parameter}"));
            let error = difference(grad, &golden[&format!("grad.{parameter}")]);
            assert!(error < 1e-4, "{name}: gradient of {parameter} off by {error:e}");
        }
    }
}

#[test]
fn a_tensor_that_is_missing_extra_or_misshapen_is_named() {
    let folder = folder("plain");
    let load = |change: &dyn Fn(&mut Config)| {
        let mut config: Config = folder.json("config.json").unwrap();
        change(&mut config);
        let params = Params::open(&folder, "diffusion_pytorch_model", DType::F32, &Device::Cpu).unwrap();
        Flux2::new(&config, &params).and_then(|_| params.finish(|_| false)).unwrap_err().to_string()
    };
    let missing = load(&|c| c.num_single_layers = 3);
    let file = "plain/diffusion_pytorch_model";
    assert!(missing.contains("single_transformer_blocks.2.attn") && missing.contains(file), "{missing}");
    let extra = load(&|c| c.num_layers = 1);
    assert!(extra.contains("transformer_blocks.1.") && extra.contains(file), "{extra}");
    let shape = load(&|c| c.in_channels = 9);
    assert!(["x_embedder.weight", "[32, 8]", "[32, 9]", file].iter().all(|part| shape.contains(part)), "{shape}");
    let absurd = load(&|c| c.axes_dims_rope = vec![3, 5, 4, 4]);
    assert!(absurd.contains("axes_dims_rope"), "{absurd}");
}
