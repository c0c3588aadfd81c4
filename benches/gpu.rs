//! Times rlrig on an accelerator; `scripts/bench_gpu.py` runs this and the same in PyTorch, and prints tables.
//!
//!     cargo bench --features cuda --bench gpu -- PART [DEVICE]
//!
//! PART is `tabletop` (the shipped models at work and in training), `klein` (FLUX.2-klein-4B's shape), `profile` (where a
//! step of it goes) or `vlm` (Qwen3-VL-4B's shape); the large ones have weights of no meaning in bf16. DEVICE is `cuda`,
//! `metal` or `cpu`, where the large ones are small: only to see that this works. Each line: a name, and seconds or a number.

use anyhow::{Context, Result, bail};
use candle_core::{DType, Device, Tensor};
use rlrig::{
    flow::{Job, Klein, Options, Solver, Unwatched, euler},
    models::{
        Params, built_in,
        flux2::{Conditioning, Config, Flux2, image_positions, text_positions},
        qwen3_vl::{self, Patches, Qwen3VL},
    },
    tensor::{
        Mask, Rotation, attention, attention_swiglu, device::Accelerator, gate_residual, layer_norm_modulate, linear,
        norm_rope, rng::Stream, swiglu,
    },
    train::{
        grpo_config::GrpoConfig,
        pretrain::PretrainConfig,
        request::{Request, RunConfig},
        run::{End, Event},
    },
    vlm::decode::{Pictures, Session},
};
use std::{sync::atomic::AtomicBool, time::Instant};

const PROMPT: &str = "a small red ball to the left of a large blue cube";
/// Those of `scripts/bench_gpu.py` too.
const PICTURES: usize = 64;
const TRAINED: usize = 256;
const STEPS: usize = 20;
const GUIDANCE: f64 = 3.0;
const DENOISING: usize = 8;
const DECODED: usize = 64;

fn main() -> Result<()> {
    // `cargo bench` adds a flag of its own.
    let arguments: Vec<String> = std::env::args().skip(1).filter(|a| !a.starts_with("--")).collect();
    let device = match arguments.get(1).map_or("cuda", String::as_str) {
        "cuda" => Accelerator::Cuda.open().map_err(anyhow::Error::msg)?,
        "metal" => Accelerator::Metal.open().map_err(anyhow::Error::msg)?,
        "cpu" => Device::Cpu,
        other => bail!("no device {other}"),
    };
    match arguments.first().map(String::as_str) {
        Some("tabletop") => tabletop(&device),
        Some("klein") => klein(&device),
        Some("profile") => profile(&device),
        Some("vlm") => vlm(&device),
        _ => bail!("which part: tabletop, klein, profile or vlm?"),
    }
}

/// The best seconds of some tries, the device waited for.
fn best(device: &Device, tries: usize, mut work: impl FnMut() -> Result<()>) -> Result<f64> {
    let mut seconds = f64::INFINITY;
    for _ in 0..=tries {
        device.synchronize()?;
        let start = Instant::now();
        work()?;
        device.synchronize()?;
        seconds = seconds.min(start.elapsed().as_secs_f64());
    }
    Ok(seconds)
}

fn tabletop(device: &Device) -> Result<()> {
    let small = device.is_cpu();
    let (count, batch) = if small { (2, 8) } else { (PICTURES, TRAINED) };
    for (name, dtype) in [("f32", DType::F32), ("bf16", DType::BF16)] {
        if small && dtype == DType::BF16 {
            continue; // the CPU multiplies no bf16 matrices
        }
        let klein = Klein::open(&built_in::tabletop(), dtype, device, Vec::new())?;
        let (w, h) = klein.default_size();
        let size = klein.tokens(w, h)?;
        let seconds = best(device, 3, || {
            klein.forget();
            let job = |i| Ok(Job { prompt: PROMPT, noise: klein.noise(0, i as u64, size)?, references: Vec::new() });
            let jobs: Vec<Job> = (0..count).map(job).collect::<Result<_>>()?;
            let options = Options {
                steps: STEPS,
                solver: Solver::Euler,
                guidance: GUIDANCE.into(),
                batch: count,
                watch: &Unwatched,
            };
            klein.decode(&klein.draw(&jobs, &options)?).map(drop)
        })?;
        println!("pictures {name}: {}", seconds / count as f64);
    }
    let set = |more: &[&str]| -> Vec<String> {
        let common = ["train.steps=6", "train.evaluate_every=0", "train.samples_every=0", "train.log_every=1"];
        common.iter().chain(more).map(|s| (*s).to_owned()).collect()
    };
    for precision in ["f32", "bf16"] {
        let (batch, precision) = (format!("train.batch={batch}"), format!("diffuser.precision={precision}"));
        let more = set(&[&batch, "train.micro_batch=0", &precision]);
        let seconds = train::<PretrainConfig>("configs/tabletop/diffuser.toml", more, device)?;
        println!("pretraining {}: {seconds}", precision.rsplit('=').next().unwrap_or_default());
    }
    for learner in ["editor", "actor"] {
        let config = format!("configs/tabletop/grpo-{learner}.toml");
        let seconds = train::<GrpoConfig>(&config, set(&["editor.drawn=0"]), device)?;
        println!("grpo {learner}: {seconds}");
    }
    Ok(())
}

/// The seconds of the fastest step of a short run.
fn train<C: RunConfig>(config: &str, set: Vec<String>, device: &Device) -> Result<f64> {
    let folder = tempfile::tempdir()?;
    let request = Request { config: Some(config.into()), resume: None, out: Some(folder.path().join("run")), set };
    let mut seconds = f64::INFINITY;
    let end = request.prepare_on::<C>(device)?.train(&AtomicBool::new(false), &mut |event| {
        if let Event::Step(_, metrics) = event {
            let time = metrics.iter().find(|(name, _)| name == "step_time").map_or(f64::INFINITY, |(_, time)| *time);
            seconds = seconds.min(time);
        }
    })?;
    matches!(end, End::Done).then_some(seconds).context("the training was stopped")
}

/// Numbers of no meaning, made on the device.
fn made(shape: &[usize], dtype: DType, device: &Device) -> candle_core::Result<Tensor> {
    let (n, inner) = (shape.iter().product::<usize>(), shape.iter().skip(1).product::<usize>().max(1));
    let row = Tensor::arange(0f32, n.min(1 << 20) as f32, device)?;
    let row = ((row * 12.9898)?.sin()? * (3.0 / inner as f64).sqrt())?.to_dtype(dtype)?;
    if row.elem_count() == n {
        return row.reshape(shape);
    }
    let copies = n.div_ceil(row.elem_count());
    row.unsqueeze(0)?.broadcast_as((copies, row.elem_count()))?.flatten_all()?.narrow(0, 0, n)?.reshape(shape)
}

/// FLUX.2-klein-4B's shape; on the CPU a small one.
fn shape(device: &Device) -> Config {
    let small = device.is_cpu();
    Config {
        num_layers: if small { 1 } else { 5 },
        num_single_layers: if small { 1 } else { 20 },
        num_attention_heads: if small { 2 } else { 24 },
        joint_attention_dim: if small { 96 } else { 7680 },
        guidance_embeds: false,
        ..Config::default()
    }
}

/// Side of a picture in tokens, tokens of a prompt, and the number format.
fn sizes(device: &Device) -> (usize, usize, DType) {
    if device.is_cpu() { (8, 16, DType::F32) } else { (64, 512, DType::BF16) }
}

fn klein(device: &Device) -> Result<()> {
    let (config, (side, length, dtype)) = (shape(device), sizes(device));
    let device_of = device.clone();
    let params = Params::made(dtype, device, move |_, shape| made(shape, dtype, &device_of));
    let model = Flux2::new(&config, &params)?;
    let mut positions = text_positions(length);
    positions.extend(image_positions(0, side, side));
    let angles = model.angles(&positions, device)?;
    let sigmas: Vec<f64> = (0..=DENOISING).map(|i| 1.0 - i as f64 / DENOISING as f64).collect();
    for batch in [1, 4] {
        let text = made(&[batch, length, config.joint_attention_dim], dtype, device)?;
        let noise = Stream::new(0, "noise", 0).normal(&[batch, side * side, config.in_channels], device)?;
        let field = |x: &Tensor, sigma: f64, _: usize| {
            let sigma = Tensor::full(sigma as f32, 1, device)?;
            let given = Conditioning { text: &text, sigma: &sigma, guidance: None, angles: &angles };
            model.forward(&x.to_dtype(dtype)?, &given).map_err(|e| candle_core::Error::wrap(format!("{e:#}")))
        };
        let seconds = best(device, 2, || euler(&field, &noise, &sigmas).map(drop).map_err(Into::into))?;
        println!("step {batch}: {}", seconds / DENOISING as f64);
    }
    Ok(())
}

/// Every operation of a step of klein's shape by itself, and how often it occurs: seconds of all occurrences together.
fn profile(device: &Device) -> Result<()> {
    let (config, (side, length, dtype)) = (shape(device), sizes(device));
    let (heads, d, dim) = (config.num_attention_heads, config.attention_head_dim, config.dim());
    let (hidden, image) = (3 * dim, side * side);
    let all = image + length;
    let (double, single) = (config.num_layers, config.num_single_layers);
    let x = |shape: &[usize]| made(shape, dtype, device);
    let angle = made(&[all, d / 2], DType::F32, device)?;
    let (cos, sin, norm) = (angle.cos()?, angle.sin()?, x(&[d])?);
    let (tokens, vector) = (x(&[1, all, dim])?, x(&[1, dim])?);
    let time = |name: &str, count: usize, work: &dyn Fn() -> candle_core::Result<Tensor>| -> Result<()> {
        let tries = 10;
        let seconds = best(device, 3, || (0..tries).try_for_each(|_| work().map(drop)).map_err(Into::into))?;
        println!("{name}: {}", seconds / tries as f64 * count as f64);
        Ok(())
    };
    let weights = [x(&[dim, dim])?, x(&[2 * hidden, dim])?, x(&[dim, hidden])?];
    let [square, wide, narrow] = &weights;
    let middle = x(&[1, all, hidden])?;
    time("double: projections", 4 * double, &|| linear(&tokens, square, None))?;
    time("double: MLP up", double, &|| linear(&tokens, wide, None))?;
    time("double: MLP down", double, &|| linear(&middle, narrow, None))?;
    let both = x(&[1, all, 2 * hidden])?;
    time("double: SwiGLU", double, &|| swiglu(&both))?;
    time("double: modulated norms", 2 * double, &|| layer_norm_modulate(&tokens, &vector, &vector, 1e-6))?;
    time("double: gates", 2 * double, &|| gate_residual(&tokens, &vector, &tokens))?;
    let q = x(&[1, all, heads, d])?;
    let turned = || norm_rope(&q, &norm, 1e-6, &cos, &sin, Rotation::Interleaved);
    time("double: norms and rotations", 2 * double, &turned)?;
    time("double: attention", double, &|| attention(&q, &q, &q, &Mask::default()))?;
    let (project, out) = (x(&[3 * dim + 2 * hidden, dim])?, x(&[dim, dim + hidden])?);
    let (projected, joined) = (x(&[1, all, 3 * dim + 2 * hidden])?, x(&[1, all, dim + hidden])?);
    time("single: projection", single, &|| linear(&tokens, &project, None))?;
    time("single: attention and SwiGLU", single, &|| {
        attention_swiglu(&projected, &norm, &norm, 1e-6, heads, &cos, &sin, Rotation::Interleaved)
    })?;
    time("single: of which attention", single, &|| attention(&q, &q, &q, &Mask::default()))?;
    time("single: output", single, &|| linear(&joined, &out, None))?;
    time("single: modulated norms", single, &|| layer_norm_modulate(&tokens, &vector, &vector, 1e-6))?;
    time("single: gates", single, &|| gate_residual(&tokens, &vector, &tokens))
}

fn vlm(device: &Device) -> Result<()> {
    let small = device.is_cpu();
    let dtype = if small { DType::F32 } else { DType::BF16 };
    let pick = |large: usize, little: usize| if small { little } else { large };
    let config = serde_json::json!({
        "text_config": {
            "vocab_size": pick(151_936, 512), "hidden_size": pick(2560, 64), "intermediate_size": pick(9728, 128),
            "num_hidden_layers": pick(36, 3), "num_attention_heads": pick(32, 4), "num_key_value_heads": pick(8, 2),
            "head_dim": 128, "max_position_embeddings": 262_144,
            "rope_parameters": {
                "rope_theta": 5e6, "rope_type": "default", "mrope_section": [24, 20, 20], "mrope_interleaved": true
            },
        },
        "vision_config": {
            "depth": pick(24, 3), "hidden_size": pick(1024, 64), "intermediate_size": pick(4096, 128),
            "num_heads": pick(16, 4), "patch_size": 16, "spatial_merge_size": 2, "temporal_patch_size": 2,
            "out_hidden_size": pick(2560, 64), "num_position_embeddings": 2304,
            "deepstack_visual_indexes": if small { vec![0, 1, 2] } else { vec![5, 11, 17] },
        },
        "image_token_id": 5, "video_token_id": 6, "vision_start_token_id": 7, "vision_end_token_id": 8,
        "tie_word_embeddings": true,
    });
    let config: qwen3_vl::Config = serde_json::from_value(config)?;
    let device_of = device.clone();
    let params = Params::made(dtype, device, move |_, shape| made(shape, dtype, &device_of));
    let model = Qwen3VL::new(&config, &params)?;
    let side = if small { 4 } else { 64 };
    let grids = vec![[side, side]];
    let values = made(&[side * side, config.vision_config.patch_numbers()], dtype, device)?;
    let patches = Patches { values, grids: grids.clone() };
    let seen = side * side / 4;
    println!("tower: {}", best(device, 2, || model.vision.forward(&patches).map(drop))?);
    let features = model.vision.forward(&patches)?;
    let row: Vec<u32> = [7].into_iter().chain(vec![5; seen]).chain([8]).chain(10..74).collect();
    let prefill = || -> Result<(Session<'_>, Tensor)> {
        let mut session = Session::new(&model, 1);
        let logits =
            session.extend(std::slice::from_ref(&row), Some(Pictures { features: &features, grids: &grids }))?;
        Ok((session, logits))
    };
    println!("prefill tokens: {}", row.len());
    println!("prefill: {}", best(device, 2, || prefill().map(drop))?);
    let mut seconds = f64::INFINITY;
    for _ in 0..3 {
        let (mut session, mut logits) = prefill()?;
        device.synchronize()?;
        let start = Instant::now();
        for _ in 0..DECODED {
            let token = logits.argmax(1)?.to_vec1::<u32>()?;
            logits = session.extend(&[token.iter().map(|t| t % 4).collect()], None)?;
        }
        device.synchronize()?;
        seconds = seconds.min(start.elapsed().as_secs_f64());
    }
    println!("token: {}", seconds / DECODED as f64);
    Ok(())
}
