//! Times the shipped models at work; `scripts/bench_models.py` runs this and the same in PyTorch, and prints the ratios.
//! `cargo bench --bench models`; RAYON_NUM_THREADS sets the threads. Each line: a name and the best seconds of some tries.

use anyhow::{Context, Result};
use candle_core::{DType, Device};
use image::RgbImage;
use rlrig::{
    flow::{Job, Klein, Options, Solver, Unwatched},
    models::{Folder, qwen3_vl::Qwen3VL},
    rig::prompts,
    tensor::rng::Stream,
    train::{
        pretrain::PretrainConfig,
        request::Request,
        run::{End, Event},
    },
    vlm::{
        Vlm,
        decode::{Sampling, answer},
        prefix::Question,
    },
};
use std::{path::Path, sync::Arc, sync::atomic::AtomicBool, time::Instant};

const WEIGHTS: &str = "weights/tabletop";
const PROMPT: &str = "a small red ball to the left of a large blue cube";
/// Those of `scripts/bench_models.py` too.
const STEPS: usize = 20;
const GUIDANCE: f64 = 3.0;
const BATCH: usize = 8;
const TOKENS: usize = 24;

fn main() -> Result<()> {
    let device = Device::Cpu;
    let klein = Klein::open(&Folder::from(Path::new(WEIGHTS)), DType::F32, &device, Vec::new())?;
    let (w, h) = klein.default_size();
    let size = klein.tokens(w, h)?;
    for (name, count) in [("generate 1", 1), ("generate 8", BATCH)] {
        best(name, 3, || {
            klein.forget();
            let job = |i| Ok(Job { prompt: PROMPT, noise: klein.noise(0, i as u64, size)?, references: Vec::new() });
            let jobs: Vec<Job> = (0..count).map(job).collect::<Result<_>>()?;
            let options = Options {
                steps: STEPS,
                solver: Solver::Euler,
                guidance: GUIDANCE.into(),
                batch: BATCH,
                watch: &Unwatched,
            };
            klein.decode(&klein.draw(&jobs, &options)?).map(drop)
        })?;
    }
    let latents = (0..BATCH).map(|i| klein.noise(1, i as u64, size)).collect::<candle_core::Result<Vec<_>>>()?;
    best("decode 8", 5, || klein.decode(&latents).map(drop))?;

    let folder = Folder::from(Path::new(WEIGHTS)).require("vlm")?;
    let vlm = Vlm::of(Qwen3VL::open(&folder, DType::F32, &device)?, &folder)?;
    let picture = RgbImage::from_fn(w, h, |x, y| image::Rgb([x as u8, y as u8, 128]));
    let text = prompts::edit("misplaced red ball", PROMPT);
    best("answer 24", 5, || {
        let looked = vlm.look(&[&picture])?;
        let (session, logits) = looked.ask(&[Question { picture: Some(0), text: &text }], &[])?;
        let sampling = Sampling { temperature: 0.0, max_tokens: TOKENS };
        answer(session, logits, sampling, &[], None, &mut [Stream::new(0, "bench", 0)]).map(drop)
    })?;

    let folder = tempfile::tempdir()?;
    // Prompts of two and three objects, all of them padded or cut to the script's 40 tokens.
    let set = [
        "train.steps=6",
        "train.evaluate_every=0",
        "train.samples_every=0",
        "train.log_every=1",
        "diffuser.max_length=40",
        "diffuser.stages=[{ steps = 0, min_objects = 2, max_objects = 3, edits = 0.0 }]",
    ];
    let request = Request {
        config: Some("configs/tabletop/diffuser.toml".into()),
        resume: None,
        out: Some(folder.path().join("run")),
        set: set.map(str::to_owned).to_vec(),
    };
    let mut seconds = f64::INFINITY;
    let end = request.prepare::<PretrainConfig>()?.train(&Arc::new(AtomicBool::new(false)), &mut |event| {
        if let Event::Step(_, metrics) = event {
            let time = metrics.iter().find(|(name, _)| name == "step_time").map_or(f64::INFINITY, |(_, time)| *time);
            seconds = seconds.min(time);
        }
    })?;
    matches!(end, End::Done).then_some(()).context("the training was stopped")?;
    println!("train 32: {seconds:.4}");
    Ok(())
}

fn best(name: &str, tries: usize, mut work: impl FnMut() -> Result<()>) -> Result<()> {
    let mut seconds = f64::INFINITY;
    for _ in 0..tries {
        let start = Instant::now();
        work()?;
        seconds = seconds.min(start.elapsed().as_secs_f64());
    }
    println!("{name}: {seconds:.4}");
    Ok(())
}
