//! Two steps of Reflection-GRPO on the built-in models: they run, resume bit for bit, and write adapters.

#![allow(clippy::unwrap_used)]

use candle_core::{Device, Tensor};
use rlrig::{
    error::Usage,
    models::{Folder, peft::Peft},
    train::{
        grpo_config::GrpoConfig,
        request::Request,
        run::{End, Event},
    },
};
use std::{
    collections::HashMap,
    fs,
    path::{Path, PathBuf},
    sync::atomic::{AtomicBool, Ordering},
};

const COMMON: &str = "
adapter = { rank = 4, alpha = 8.0 }
train = { steps = 2, batch = 2, micro_batch = 1, log_every = 1, checkpoint_every = 1, precision = 'f32' }
optim = { lr = 1e-3, schedule = { warmup = 0 } }
";
const ACTOR: &str = "
objective = 'actor'
group = { size = 2, rewards = { gain = 1.0, kept = 0.5, format = 0.2, brevity = 1.0, oracle = 0.0 } }
actor = { source = 'render', max_objects = 2, steps = 1, guidance = 1.0, kl = 0.1, evaluation = 1 }
";
const EDITOR: &str = "
objective = 'editor'
group = { size = 2, rewards = { probability = 1.0, preserve = 1.0, oracle = 0.0 } }
editor = { loss = 'LOSS', max_objects = 2, steps = 4, window = 1, guidance = 1.0, kl = 0.1, evaluation = 1, \
           evaluation_steps = 2 }
";

fn request(dir: &Path, name: &str, config: &str) -> Request {
    let path = dir.join(format!("{name}.toml"));
    fs::write(&path, format!("{config}{COMMON}")).unwrap();
    Request { config: Some(path), resume: None, out: Some(dir.join(name)), set: Vec::new() }
}

/// Trains, at most until `stop_at`; the metrics of each step.
fn train(request: &Request, stop_at: Option<u64>) -> (End, Vec<HashMap<String, f64>>) {
    let stop = AtomicBool::new(false);
    let mut steps = Vec::new();
    let prepared = request.prepare::<GrpoConfig>().unwrap();
    let end = prepared.train(&stop, &mut |event| {
        if let Event::Step(step, metrics) = event {
            steps.push(metrics.iter().cloned().collect());
            stop.store(Some(step) == stop_at, Ordering::Relaxed);
        }
    });
    (end.unwrap(), steps)
}

fn adapter(folder: &Path) -> HashMap<String, Tensor> {
    candle_core::safetensors::load(folder.join("model/adapter_model.safetensors"), &Device::Cpu).unwrap()
}

/// Trains straight through and with a stop in between: both end in the same adapter. Returns the straight run.
fn two_steps(config: &str) -> (tempfile::TempDir, PathBuf, Vec<HashMap<String, f64>>) {
    let dir = tempfile::tempdir().unwrap();
    let straight = request(dir.path(), "straight", config);
    let (end, steps) = train(&straight, None);
    assert_eq!((end, steps.len()), (End::Done, 2));
    let stopped = request(dir.path(), "stopped", config);
    assert_eq!(train(&stopped, Some(1)).0, End::Stopped(1));
    let resumed = Request { config: None, resume: stopped.out.clone(), out: None, set: Vec::new() };
    assert_eq!(train(&resumed, None).0, End::Done);
    let bytes =
        |request: &Request| fs::read(request.out.as_ref().unwrap().join("model/adapter_model.safetensors")).unwrap();
    assert!(bytes(&straight) == bytes(&stopped), "the resumed run ends in other weights");
    let folder = straight.out.unwrap();
    (dir, folder, steps)
}

/// The adapter has learned something, and reads back.
fn check(folder: &Path, steps: &[HashMap<String, f64>], names: &[&str]) {
    for metrics in steps {
        for name in ["reward", "reward_std", "frac_reward_zero_std", "rewards/oracle/mean", "kl", "grad_norm"] {
            assert!(metrics[name].is_finite(), "{name}");
        }
        for name in names {
            assert!(metrics[*name].is_finite(), "{name}");
        }
    }
    let tensors = adapter(folder);
    let largest = |t: &Tensor| t.abs().unwrap().flatten_all().unwrap().max(0).unwrap().to_scalar::<f32>().unwrap();
    assert!(tensors.iter().all(|(name, _)| name.starts_with("base_model.model.")));
    assert!(tensors.iter().any(|(name, t)| name.ends_with("lora_B.weight") && largest(t) > 0.0));
    let read = Peft::open(&Folder::from(folder.join("model"))).unwrap();
    assert_eq!(2 * read.layers.len(), tensors.len());
    let log = fs::read_to_string(folder.join("metrics.jsonl")).unwrap();
    assert!(log.contains("eval/oracle"));
    let samples = fs::read_dir(folder.join("samples")).unwrap().count();
    assert!(samples > 0);
}

#[test]
fn the_actor_trains_and_resumes() {
    let (_dir, folder, steps) = two_steps(ACTOR);
    check(&folder, &steps, &["completions/mean_length", "entropy", "rewards/format/mean", "ratio_off"]);
}

#[test]
fn the_editor_trains_and_resumes_by_stochastic_steps() {
    let (_dir, folder, steps) = two_steps(&EDITOR.replace("LOSS", "grpo"));
    check(&folder, &steps, &["rewards/preserve/mean", "clip_ratio/low_mean", "ratio_off"]);
}

#[test]
fn the_editor_trains_by_grpo_guard() {
    let dir = tempfile::tempdir().unwrap();
    let request = request(dir.path(), "guard", &EDITOR.replace("LOSS", "grpo-guard"));
    let (end, steps) = train(&request, None);
    assert_eq!(end, End::Done);
    check(&dir.path().join("guard"), &steps, &["clip_ratio/low_mean", "ratio_off"]);
}

#[test]
fn the_editor_trains_and_resumes_by_diffusion_nft() {
    let (_dir, folder, steps) = two_steps(&EDITOR.replace("LOSS", "diffusion-nft"));
    check(&folder, &steps, &["rewards/probability/mean"]);
}

#[test]
fn groups_of_one_and_unknown_rewards_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    for (key, word) in [("group.size=1", "at least 2"), ("group.rewards.beauty=1.0", "no reward \"beauty\"")] {
        let request = Request { set: vec![key.into()], ..request(dir.path(), "refused", ACTOR) };
        let error = request.prepare::<GrpoConfig>().err().unwrap();
        assert!(error.is::<Usage>() && error.to_string().contains(word), "{error}");
    }
    assert!(!dir.path().join("refused").exists());
}

#[test]
fn the_configs_that_are_shipped_load() {
    for name in ["grpo-actor", "grpo-editor"] {
        let dir = tempfile::tempdir().unwrap();
        let file = Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("configs/tabletop/{name}.toml"));
        let request = Request { config: Some(file), resume: None, out: Some(dir.path().join("run")), set: Vec::new() };
        let prepared = request.prepare::<GrpoConfig>().unwrap();
        assert!(prepared.config.group.size >= 8 && prepared.config.train.best.as_deref() == Some("eval/oracle"));
    }
}
