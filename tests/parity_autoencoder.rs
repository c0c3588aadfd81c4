//! `AutoencoderKLFlux2` against diffusers: outputs, and the gradient of every parameter.
//! The references are made by `scripts/make_vae_fixtures.py`.

#![allow(clippy::unwrap_used)]

use candle_core::{DType, Device, Tensor, Var};
use rlrig::models::{
    Folder, Params,
    autoencoder::{Autoencoder, Config},
};
use std::collections::HashMap;

fn norm(x: &Tensor) -> f32 {
    x.sqr().unwrap().sum_all().unwrap().sqrt().unwrap().to_scalar().unwrap()
}

fn difference(got: &Tensor, want: &Tensor) -> f32 {
    assert_eq!(got.dims(), want.dims());
    norm(&(got - want).unwrap()) / (norm(want) + 1e-12)
}

fn folder(name: &str) -> Folder {
    Folder::Disk(format!("{}/tests/fixtures/vae/{name}", env!("CARGO_MANIFEST_DIR")).into())
}

fn open(folder: &Folder) -> (Config, Params) {
    let params = Params::open(folder, "diffusion_pytorch_model", DType::F32, &Device::Cpu).unwrap();
    (folder.json("config.json").unwrap(), params)
}

fn golden(folder: &Folder) -> HashMap<String, Tensor> {
    candle_core::safetensors::load_buffer(&folder.read("golden.safetensors").unwrap(), &Device::Cpu).unwrap()
}

#[test]
fn outputs_are_those_of_diffusers() {
    for name in ["plain", "bare"] {
        let folder = folder(name);
        let (config, params) = open(&folder);
        let model = Autoencoder::new(&config, &params).unwrap();
        let golden = golden(&folder);
        let (mean, logvar) = model.encode(&golden["x"]).unwrap();
        let outputs = [
            ("mean", mean),
            ("logvar", logvar),
            ("y", model.decode(&golden["z"]).unwrap()),
            ("latents", model.latents(&golden["x"]).unwrap()),
            ("pixels", model.pixels(&golden["tokens"]).unwrap()),
        ];
        for (what, got) in outputs {
            let error = difference(&got, &golden[what]);
            assert!(error < 1e-5, "{name}: {what} is off by {error:e}");
        }
        let z = &golden["z"];
        let back = model.unpatchify(&model.patchify(z).unwrap()).unwrap();
        assert_eq!(difference(&back, z), 0.0);
    }
}

#[test]
fn gradients_are_those_of_diffusers() {
    for name in ["plain", "bare"] {
        let folder = folder(name);
        let (config, params) = open(&folder);
        let params = params.trained();
        let model = Autoencoder::new(&config, &params).unwrap();
        let golden = golden(&folder);
        let (x, z) = (Var::from_tensor(&golden["x"]).unwrap(), Var::from_tensor(&golden["z"]).unwrap());
        let (mean, logvar) = model.encode(&x).unwrap();
        let along = |y: &Tensor, name: &str| (y * &golden[&format!("direction.{name}")]).unwrap().sum_all().unwrap();
        let sum = (along(&mean, "mean") + along(&logvar, "logvar")).unwrap();
        let sum = (sum + along(&model.decode(&z).unwrap(), "y")).unwrap();
        let grads = sum.backward().unwrap();
        let mut vars = params.vars();
        vars.insert("x".into(), x);
        vars.insert("z".into(), z);
        let wanted: Vec<f32> = golden.iter().filter(|(k, _)| k.starts_with("grad.")).map(|(_, g)| norm(g)).collect();
        assert_eq!(vars.len(), wanted.len());
        let largest = wanted.into_iter().fold(0.0, f32::max);
        for (parameter, var) in vars {
            let grad = grads.get(&var).unwrap_or_else(|| panic!("{name}: no gradient reaches {parameter}"));
            let want = &golden[&format!("grad.{parameter}")];
            // The bias of a key adds the same to every score, so its gradient is nothing but rounding: there are no digits
            // to compare, but it is small, some 1e-8 of the largest where that of a query's bias is 1e-3.
            let (error, most) = match parameter.ends_with("to_k.bias") {
                true => (norm(grad) / largest, 1e-5),
                false => (difference(grad, want), 1e-3),
            };
            assert_eq!(grad.dims(), want.dims());
            assert!(error < most, "{name}: gradient of {parameter} off by {error:e}");
        }
    }
}

#[test]
fn the_shipped_weights_decode_as_in_diffusers() {
    let folder = Folder::from(concat!(env!("CARGO_MANIFEST_DIR"), "/weights/tabletop/vae"));
    let (config, params) = open(&folder);
    let model = Autoencoder::new(&config, &params).unwrap();
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures/vae/shipped.safetensors");
    let golden = candle_core::safetensors::load(path, &Device::Cpu).unwrap();
    let error = difference(&model.decode(&golden["z"]).unwrap(), &golden["y"]);
    assert!(error < 1e-4, "pictures off by {error:e}");
}

#[test]
fn a_tensor_that_is_missing_extra_or_misshapen_is_named() {
    let folder = folder("plain");
    let load = |change: &dyn Fn(&mut Config)| {
        let (mut config, params) = open(&folder);
        change(&mut config);
        format!("{:#}", Autoencoder::new(&config, &params).err().expect("an error"))
    };
    let file = "plain/diffusion_pytorch_model.safetensors";
    let missing = load(&|c| c.layers_per_block = 2);
    assert!(missing.contains("encoder.down_blocks.0.resnets.1.norm1.weight") && missing.contains(file), "{missing}");
    let extra = load(&|c| c.mid_block_add_attention = false);
    assert!(extra.contains("decoder.mid_block.attentions.0") && extra.contains(file), "{extra}");
    let shape = load(&|c| c.latent_channels = 4);
    assert!(shape.contains("encoder.conv_out.weight") && shape.contains("[6, 16, 3, 3]"), "{shape}");
    let groups = load(&|c| c.norm_num_groups = 3);
    assert!(groups.contains("norm_num_groups"), "{groups}");
    let class = load(&|c| c.class_name = "AutoencoderKL".into());
    assert!(class.contains("AutoencoderKL,"), "{class}");
}
