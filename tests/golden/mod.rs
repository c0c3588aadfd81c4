//! Golden tensors of the reference implementations and how close we must come to them.

// Each test file is a crate of its own and uses a part of this.
#![allow(dead_code)]

use candle_core::{DType, Device, Tensor, backprop::GradStore};
use rlrig::models::Params;
use std::{collections::HashMap, path::PathBuf};

pub fn fixture(path: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures").join(path)
}

pub struct Golden(HashMap<String, Tensor>);

impl Golden {
    pub fn open(path: &str) -> Self {
        Self(candle_core::safetensors::load(fixture(path), &Device::Cpu).unwrap())
    }

    pub fn get(&self, name: &str) -> Tensor {
        self.0.get(name).unwrap_or_else(|| panic!("the golden file has no {name}")).clone()
    }

    /// Integers, which are stored as i32.
    pub fn ints(&self, name: &str) -> Vec<i64> {
        self.get(name).flatten_all().unwrap().to_dtype(DType::I64).unwrap().to_vec1().unwrap()
    }

    pub fn ids(&self, name: &str) -> Tensor {
        let ids: Vec<u32> = self.ints(name).into_iter().map(|i| i as u32).collect();
        Tensor::from_vec(ids, self.get(name).dims(), &Device::Cpu).unwrap()
    }
}

/// The largest difference, as a part of the largest value of `want`.
pub fn distance(got: &Tensor, want: &Tensor) -> f32 {
    assert_eq!(got.dims(), want.dims());
    let max = |t: Tensor| t.abs().unwrap().flatten_all().unwrap().max(0).unwrap().to_scalar::<f32>().unwrap();
    let difference = max((got - want).unwrap());
    assert!(difference.is_finite());
    difference / max(want.clone()).max(1e-6)
}

pub fn assert_close(what: &str, got: &Tensor, want: &Tensor, tolerance: f32) {
    let distance = distance(got, want);
    assert!(distance <= tolerance, "{what} is off by {distance:e} of its largest value");
}

/// Every tensor that the model trains has a gradient, and it is the reference's.
pub fn assert_gradients(params: &Params, gradients: &GradStore, golden: &Golden, tolerance: f32) {
    let vars = params.vars();
    assert!(!vars.is_empty());
    let stored = golden.0.keys().filter(|k| k.starts_with("grad.")).count();
    assert_eq!(stored, vars.len(), "the reference trains as many tensors as the model");
    for (name, var) in vars {
        let gradient = gradients.get(var.as_tensor()).unwrap_or_else(|| panic!("{name} gets no gradient"));
        assert_close(&format!("the gradient of {name}"), gradient, &golden.get(&format!("grad.{name}")), tolerance);
    }
}
