//! `models::qwen3` against transformers: the golden files are made by `scripts/make_qwen3_fixtures.py`.

#![allow(clippy::unwrap_used)]

mod golden;

use candle_core::{D, DType, Device, Tensor};
use golden::{Golden, assert_close, assert_gradients, fixture};
use rlrig::{
    models::{
        Folder, Params,
        qwen3::{Config, Qwen3},
    },
    tensor::Mask,
};

const CASES: [&str; 3] = ["plain", "grouped", "biased"];

fn open(case: &str) -> (Qwen3, Params, Golden) {
    let folder = Folder::from(fixture(&format!("qwen3/{case}")));
    let config: Config = folder.json("config.json").unwrap();
    let params = Params::open(&folder, "model", DType::F32, &Device::Cpu).unwrap().trained();
    let model = Qwen3::new(&config, &params).unwrap();
    params.finish(|_| false).unwrap();
    (model, params, Golden::open(&format!("qwen3/{case}/golden.safetensors")))
}

fn right_padded(golden: &Golden) -> (Tensor, Mask, Vec<usize>) {
    let lengths: Vec<usize> = golden.ints("lengths").iter().map(|n| *n as usize).collect();
    let keys = lengths.iter().map(|n| 0..*n).collect();
    (golden.ids("ids"), Mask { causal: true, keys: Some(keys) }, lengths)
}

#[test]
fn hidden_states_and_logits_are_those_of_transformers() {
    for case in CASES {
        let (model, _, golden) = open(case);
        let (ids, mask, _) = right_padded(&golden);
        let states = model.hidden_states(&ids, &mask).unwrap();
        assert_eq!(states.len(), model.decoder.config().num_hidden_layers + 1);
        for (i, state) in states.iter().enumerate() {
            assert_close(&format!("{case}: state {i}"), state, &golden.get(&format!("hidden.{i}")), 1e-4);
        }
        let some = model.decoder.hidden_states_at(&ids, &mask, &[2, 1]).unwrap();
        assert_close(case, &some[0], &golden.get("hidden.2"), 1e-4);
        assert_close(case, &some[1], &golden.get("hidden.1"), 1e-4);
        let angles = model.decoder.text_angles(0, ids.dims()[1]).unwrap();
        let logits = model.logits(&ids, &angles, &mask, None).unwrap();
        assert_close(case, &logits, &golden.get("logits"), 1e-4);
    }
}

#[test]
fn every_parameter_gets_the_gradient_of_torch() {
    for case in CASES {
        let (model, params, golden) = open(case);
        let (ids, mask, _) = right_padded(&golden);
        let angles = model.decoder.text_angles(0, ids.dims()[1]).unwrap();
        let logits = model.logits(&ids, &angles, &mask, None).unwrap();
        let gradients = (logits * golden.get("weight")).unwrap().mean_all().unwrap().backward().unwrap();
        assert_gradients(&params, &gradients, &golden, 1e-3);
    }
}

#[test]
fn greedy_decoding_with_a_cache_gives_the_same_tokens() {
    for case in CASES {
        let (model, _, golden) = open(case);
        let (ids, mask, lengths) = right_padded(&golden);
        let (decoder, width) = (&model.decoder, ids.dims()[1]);
        let mut cache = decoder.cache();
        let angles = decoder.text_angles(0, width).unwrap();
        let logits = model.logits(&ids, &angles, &mask, Some(&mut cache)).unwrap();
        let last: Vec<Tensor> =
            lengths.iter().enumerate().map(|(row, n)| logits.get(row).unwrap().get(n - 1).unwrap()).collect();
        let mut logits = Tensor::stack(&last, 0).unwrap();
        cache = cache.align_right(&lengths).unwrap();
        let mut tokens: Vec<Tensor> = Vec::new();
        for step in 0..64 {
            let next = logits.argmax_keepdim(D::Minus1).unwrap(); // (B, 1)
            tokens.push(next.clone());
            let positions: Vec<_> = lengths.iter().map(|n| vec![[(n + step) as u32; 3]]).collect();
            let keys = lengths.iter().map(|n| width - n..width + step + 1).collect();
            let angles = decoder.angles(&positions).unwrap();
            let mask = Mask { causal: true, keys: Some(keys) };
            logits = model.logits(&next, &angles, &mask, Some(&mut cache)).unwrap().squeeze(1).unwrap();
        }
        let got: Vec<Vec<u32>> = Tensor::cat(&tokens, 1).unwrap().to_vec2().unwrap();
        assert_eq!(got, golden.ids("generated").to_vec2::<u32>().unwrap(), "{case}");
    }
}

#[test]
fn older_checkpoints_write_the_rotary_positions_otherwise() {
    let new: Config = Folder::from(fixture("qwen3/grouped")).json("config.json").unwrap();
    let mut old = serde_json::to_value(&new).unwrap();
    let map = old.as_object_mut().unwrap();
    map.remove("rope_parameters");
    map.insert("rope_scaling".into(), serde_json::Value::Null);
    map.insert("rope_theta".into(), 1e6.into());
    let old: Config = serde_json::from_value(old).unwrap();
    let params = Params::fresh(0, DType::F32, &Device::Cpu);
    let angles = |c: &Config| Qwen3::new(c, &params).unwrap().decoder.text_angles(0, 9).unwrap().cos;
    assert_eq!(angles(&new).to_vec2::<f32>().unwrap(), angles(&old).to_vec2::<f32>().unwrap());
    let mut yarn = new.clone();
    yarn.rope_parameters.as_mut().unwrap().rope_type = Some("yarn".into());
    let error = Qwen3::new(&yarn, &params).err().unwrap().to_string();
    assert!(error.contains("yarn"), "{error}");
}

#[test]
fn errors_of_a_folder_name_the_tensor_and_the_file() {
    let source = fixture("qwen3/plain");
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("model.safetensors");
    std::fs::copy(source.join("config.json"), folder.path().join("config.json")).unwrap();
    let whole = candle_core::safetensors::load(source.join("model.safetensors"), &Device::Cpu).unwrap();
    let name = "model.layers.1.mlp.up_proj.weight";
    let error_with = |tensors: &std::collections::HashMap<String, Tensor>| {
        candle_core::safetensors::save(tensors, &file).unwrap();
        format!("{:#}", Qwen3::open(&Folder::from(folder.path()), DType::F32, &Device::Cpu).err().unwrap())
    };

    let mut missing = whole.clone();
    missing.remove(name);
    let mut misshapen = whole.clone();
    misshapen.insert(name.to_owned(), Tensor::zeros((3, 5), DType::F32, &Device::Cpu).unwrap());
    let mut extra = whole.clone();
    extra.insert("model.layers.7.surprise".to_owned(), Tensor::zeros(1, DType::F32, &Device::Cpu).unwrap());

    for (tensors, culprit) in [(missing, name), (misshapen, name), (extra, "model.layers.7.surprise")] {
        let error = error_with(&tensors);
        assert!(error.contains(culprit) && error.contains("model.safetensors"), "{error}");
    }
}
