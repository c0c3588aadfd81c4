//! `models::qwen3_vl`, `vlm::image` and `vlm::decode` against transformers: the golden files are made by
//! `scripts/make_qwen3_vl_fixtures.py`.

#![allow(clippy::unwrap_used)]

mod golden;

use candle_core::{DType, Device};
use golden::{Golden, assert_close, assert_gradients, fixture};
use image::RgbImage;
use rlrig::{
    models::{
        Folder, Params,
        qwen3_vl::{Config, Patches, Qwen3VL, rope_positions},
    },
    tensor::{Mask, rng::Stream},
    vlm::{
        decode::{Pictures, Sampling, Session, answer},
        image::ImageProcessor,
    },
};

const CASES: [&str; 2] = ["plain", "grouped"];

struct Case {
    model: Qwen3VL,
    params: Params,
    golden: Golden,
    patches: Patches,
    /// Without padding.
    rows: Vec<Vec<u32>>,
}

fn picture(path: &str) -> RgbImage {
    image::open(fixture(path)).unwrap().into_rgb8()
}

fn open(case: &str) -> Case {
    let folder = Folder::from(fixture(&format!("qwen3_vl/{case}")));
    let config: Config = folder.json("config.json").unwrap();
    let params = Params::open(&folder, "model", DType::F32, &Device::Cpu).unwrap().trained();
    let model = Qwen3VL::new(&config, &params).unwrap();
    params.finish(|_| false).unwrap();
    let golden = Golden::open(&format!("qwen3_vl/{case}/golden.safetensors"));
    let pictures: Vec<RgbImage> = (0..3).map(|i| picture(&format!("qwen3_vl/{case}/{i}.png"))).collect();
    let patches = ImageProcessor::open(&folder).unwrap().patches(&pictures, &Device::Cpu).unwrap();
    let padded: Vec<Vec<u32>> = golden.ids("ids").to_vec2().unwrap();
    let rows = padded.into_iter().zip(golden.ints("lengths")).map(|(row, n)| row[row.len() - n as usize..].to_vec());
    Case { model, params, patches, rows: rows.collect(), golden }
}

#[test]
fn pictures_become_the_patches_of_the_image_processor() {
    for case in CASES {
        let Case { patches, golden, .. } = open(case);
        assert_close(case, &patches.values, &golden.get("pixels"), 1e-6);
        let grids: Vec<i64> = patches.grids.iter().flat_map(|[r, c]| [1, *r as i64, *c as i64]).collect();
        assert_eq!(grids, golden.ints("grids"));
    }
}

#[test]
fn sizes_are_chosen_and_pictures_resampled_as_by_the_image_processor() {
    let golden = Golden::open("qwen3_vl/sizes/golden.safetensors");
    let processor = ImageProcessor::open(&Folder::from(fixture("qwen3_vl/sizes"))).unwrap();
    for (size, grid) in golden.ints("sizes").chunks(2).zip(golden.ints("grids").chunks(2)) {
        let (width, height) = processor.target(size[0] as usize, size[1] as usize).unwrap();
        assert_eq!([height as i64, width as i64], [grid[0] * 16, grid[1] * 16], "{size:?}");
    }
    assert!(processor.target(3, 1000).is_err());
    for i in 0..2 {
        let picture = picture(&format!("qwen3_vl/sizes/{i}.png"));
        let patches = processor.patches([&picture], &Device::Cpu).unwrap();
        let want = golden.get(&format!("pixels.{i}")).to_dtype(DType::F32).unwrap();
        assert_close("the resized picture", &patches.values, &want, 6e-4); // f16 holds 11 bits
    }
}

#[test]
fn features_and_logits_are_those_of_transformers() {
    for case in CASES {
        let Case { model, params, golden, patches, rows } = open(case);
        let features = model.vision.forward(&patches).unwrap();
        assert_close(case, &features.tokens, &golden.get("features"), 1e-4);
        for (i, deep) in features.deep.iter().enumerate() {
            assert_close(case, deep, &golden.get(&format!("deep.{i}")), 1e-4);
        }

        // The reference's rows are padded on the left, and so are these.
        let width = golden.get("ids").dims()[1];
        let mut grids = patches.grids.iter().copied();
        let (mut padded, mut positions, mut keys) = (Vec::new(), Vec::new(), Vec::new());
        for row in &rows {
            let pad = width - row.len();
            let (places, _) = rope_positions(row, model.config().image_token_id, 2, 0, &mut grids).unwrap();
            padded.push([vec![0; pad], row.clone()].concat());
            positions.push([vec![[0; 3]; pad], places].concat());
            keys.push(pad..width);
        }
        let want = golden.ints("positions"); // (3, B, T)
        for (i, position) in positions.iter().flatten().enumerate() {
            for (axis, place) in position.iter().enumerate() {
                assert_eq!(i64::from(*place), want[axis * width * rows.len() + i], "axis {axis} of token {i}");
            }
        }
        let angles = model.decoder.angles(&positions).unwrap();
        let mask = Mask { causal: true, keys: Some(keys) };
        let states = model.forward(&padded, Some(&features), &angles, &mask, None).unwrap();
        let logits = model.head.forward(&states).unwrap();
        for (row, ids) in rows.iter().enumerate() {
            let part = |x: &candle_core::Tensor| x.get(row).unwrap().narrow(0, width - ids.len(), ids.len()).unwrap();
            assert_close(case, &part(&logits), &part(&golden.get("logits")), 1e-4);
        }
        // The reference weighs padding by 0.
        let gradients = (logits * golden.get("weight")).unwrap().mean_all().unwrap().backward().unwrap();
        assert_gradients(&params, &gradients, &golden, 1e-3);
    }
}

#[test]
fn greedy_decoding_gives_the_same_tokens() {
    for case in CASES {
        let Case { model, golden, patches, rows, .. } = open(case);
        let features = model.vision.forward(&patches).unwrap();
        let mut session = Session::new(&model, rows.len());
        let pictures = Pictures { features: &features, grids: &patches.grids };
        let logits = session.extend(&rows, Some(pictures)).unwrap();
        let mut streams: Vec<Stream> = (0..3).map(|i| Stream::new(0, "unused", i)).collect();
        let sampling = Sampling { temperature: 0.0, max_tokens: 64 };
        let answers = answer(session, logits, sampling, &[], None, &mut streams).unwrap();
        let got: Vec<Vec<u32>> = answers.into_iter().map(|a| a.ids).collect();
        assert_eq!(got, golden.ids("generated").to_vec2::<u32>().unwrap(), "{case}");
    }
}

#[test]
fn a_beginning_read_once_serves_several_continuations() {
    let Case { model, patches, rows, .. } = open("plain");
    let features = model.vision.forward(&patches).unwrap();
    // The third picture and what is said about it, in one go and in parts.
    let last = features.tokens.dims()[0] - 16 * 32 / 64;
    let part = |x: &candle_core::Tensor| x.narrow(0, last, 8).unwrap();
    let own = rlrig::models::qwen3_vl::Features {
        tokens: part(&features.tokens),
        deep: features.deep.iter().map(part).collect(),
    };
    let pictures = || Some(Pictures { features: &own, grids: &patches.grids[2..] });
    let (beginning, end) = rows[1].split_at(10);
    let other = vec![5, 6, 7, 8, 9, 10, 11];
    let mut prefix = Session::new(&model, 1);
    prefix.extend(&[beginning.to_vec()], pictures()).unwrap();
    let mut session = prefix.rows(&[0, 0, 0]).unwrap();
    let logits = session.extend(&[end.to_vec(), other.clone(), end[..2].to_vec()], None).unwrap();
    for (row, text) in [end, &other, &end[..2]].into_iter().enumerate() {
        let whole = Session::new(&model, 1).extend(&[[beginning, text].concat()], pictures()).unwrap();
        assert_close("the shared prefix", &logits.get(row).unwrap(), &whole.get(0).unwrap(), 1e-4);
    }
    // Rows of different lengths go on together.
    let logits = session.extend(&[vec![1, 2], vec![3], vec![4, 5, 6]], None).unwrap();
    let whole = [beginning, &other, &[3]].concat();
    let whole = Session::new(&model, 1).extend(&[whole], pictures()).unwrap();
    assert_close("a ragged continuation", &logits.get(1).unwrap(), &whole.get(0).unwrap(), 1e-4);
}

#[test]
fn pictures_and_their_places_must_agree() {
    let Case { model, patches, rows, .. } = open("plain");
    let features = model.vision.forward(&patches).unwrap();
    let with = |rows: &[Vec<u32>], grids: &[[usize; 2]]| {
        let pictures = Pictures { features: &features, grids };
        format!("{:#}", Session::new(&model, rows.len()).extend(rows, Some(pictures)).unwrap_err())
    };
    assert!(with(&rows, &patches.grids[..2]).contains("more pictures"));
    assert!(with(&rows[..1], &patches.grids).contains("more pictures were given"));
    assert!(with(&rows, &[[2, 2], [4, 4], [8, 4]]).contains("place"));
}

#[test]
fn a_tensor_that_is_missing_extra_or_misshapen_is_named() {
    let folder = Folder::from(fixture("qwen3_vl/plain"));
    let load = |change: &dyn Fn(&mut Config)| {
        let mut config: Config = folder.json("config.json").unwrap();
        change(&mut config);
        let params = Params::open(&folder, "model", DType::F32, &Device::Cpu).unwrap();
        let error = Qwen3VL::new(&config, &params).and_then(|_| params.finish(|_| false)).err().unwrap().to_string();
        assert!(error.contains("plain/model.safetensors"), "{error}");
        error
    };
    let missing = load(&|c| c.text_config.num_hidden_layers += 1);
    assert!(missing.contains("lacks the tensor model.language_model.layers."), "{missing}");
    let extra = load(&|c| c.text_config.num_hidden_layers -= 1);
    assert!(extra.contains("model.language_model.layers."), "{extra}");
    let shape = load(&|c| c.vision_config.intermediate_size += 8);
    assert!(shape.contains("model.visual.blocks.0.mlp.linear_fc1") && shape.contains("the config asks for"), "{shape}");
}
