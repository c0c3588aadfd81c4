//! A whole training run on a tiny model: exact resume, logs, checkpoints, guards.

#![allow(clippy::unwrap_used)]

#[path = "rlrig/mod.rs"]
mod small;

use anyhow::Result;
use candle_core::{DType, Device, Tensor, Var};
use rlrig::{
    models::{Init, Linear, Params},
    tensor::{Mask, attention, layer_norm, rng::Stream},
    train::{
        Batch, Metrics, Objective, Step, checkpoint,
        checkpoint::Checkpoint,
        optim::OptimConfig,
        run::{self, End, Event, Hooks, Rehearsal},
        schedule::Schedule,
        train_config::TrainConfig,
    },
};
use std::{
    collections::{BTreeMap, HashMap},
    fs,
    path::Path,
    process::{Command, Stdio},
    sync::atomic::{AtomicBool, Ordering},
    time::{Duration, Instant},
};

const TOKENS: usize = 6;
const WIDTH: usize = 16;

/// One block of attention that learns the mean of its sequence.
struct Mean {
    params: Params,
    qkv: Linear,
    out: Linear,
    norm: (Tensor, Tensor),
    /// State that is no variable: the sum of all losses so far.
    total: f64,
}

impl Mean {
    fn new() -> Result<Self> {
        let params = Params::fresh(1, DType::F32, &Device::Cpu);
        let norm = params.at("norm");
        let norm = (norm.get("weight", &[WIDTH], Init::Ones)?, norm.get("bias", &[WIDTH], Init::Zeros)?);
        let qkv = Linear::new(WIDTH, 3 * WIDTH, &params.at("qkv"))?;
        let out = Linear::biased(WIDTH, WIDTH, &params.at("out"))?;
        Ok(Self { params, qkv, out, norm, total: 0.0 })
    }

    fn error(&self, x: &Tensor) -> Result<Tensor> {
        let b = x.dim(0)?;
        let h = layer_norm(x, &self.norm.0, &self.norm.1, 1e-5)?;
        let qkv = self.qkv.forward(&h)?.reshape((b, TOKENS, 3, 2, WIDTH / 2))?;
        let part = |i| qkv.narrow(2, i, 1).and_then(|x| x.squeeze(2));
        let y = attention(&part(0)?, &part(1)?, &part(2)?, &Mask::default())?.reshape((b, TOKENS, WIDTH))?;
        let target = (x.mean_keepdim(1)? * 3.0)?;
        Ok(self.out.forward(&y)?.broadcast_sub(&target)?.sqr()?.mean_all()?)
    }

    fn draw(indices: impl Iterator<Item = u64>) -> Result<Tensor> {
        let rows = indices.map(|index| Stream::new(3, "mean", index).normal(&[TOKENS, WIDTH], &Device::Cpu));
        Ok(Tensor::stack(&rows.collect::<candle_core::Result<Vec<_>>>()?, 0)?)
    }
}

impl Objective for Mean {
    fn vars(&self) -> BTreeMap<String, Var> {
        self.params.vars()
    }

    fn loss(&self, batch: &Batch) -> Result<Step> {
        let loss = self.error(&Self::draw(batch.indices())?)?;
        Ok(Step { loss, metrics: vec![("total".into(), self.total)] })
    }

    fn observe(&mut self, metrics: &Metrics) -> Result<()> {
        self.total += metrics[0].1;
        Ok(())
    }

    fn evaluate(&mut self, _step: u64) -> Result<Metrics> {
        let error = self.error(&Self::draw(1 << 40..(1 << 40) + 8)?)?.to_scalar::<f32>()?;
        Ok(vec![("eval/error".into(), f64::from(error))])
    }

    fn samples(&mut self, _step: u64, folder: &Path) -> Result<()> {
        Ok(image::RgbImage::new(4, 4).save(folder.join("blank.png"))?)
    }

    fn save(&self, folder: &Path, dtype: DType) -> Result<()> {
        checkpoint::write_model(&folder.join("model.safetensors"), &self.params.tensors(), dtype)
    }

    fn state(&self) -> Result<HashMap<String, Tensor>> {
        Ok(HashMap::from([("total".into(), Tensor::new(self.total, &Device::Cpu)?)]))
    }

    fn restore(&mut self, state: HashMap<String, Tensor>) -> Result<()> {
        self.total = state["total"].to_scalar::<f64>()?;
        Ok(())
    }
}

fn config() -> TrainConfig {
    TrainConfig {
        steps: 14,
        batch: 6,
        micro_batch: 4,
        evaluate_every: 3,
        samples_every: 7,
        checkpoint_every: 4,
        best: Some("eval/error".into()),
        best_is_lowest: true,
        ..TrainConfig::default()
    }
}

fn train(folder: &Path, config: &TrainConfig, report: &mut dyn FnMut(&AtomicBool, Event)) -> Result<End> {
    let stop = AtomicBool::new(false);
    let schedule = Schedule { warmup: 2, ..Schedule::default() };
    let optim = OptimConfig { lr: 3e-2, schedule, ..OptimConfig::default() };
    let hooks = Hooks { stop: &stop, report: &mut |event| report(&stop, event) };
    run::open(&mut Mean::new()?, config, &optim, folder)?.train(hooks)
}

fn whole(folder: &Path) {
    assert_eq!(train(folder, &config(), &mut |_, _| ()).unwrap(), End::Done);
}

/// The last checkpoint and the log without its times.
type Outcome = (u64, serde_json::Value, BTreeMap<String, Vec<u8>>, Vec<serde_json::Value>);

fn outcome(folder: &Path) -> Outcome {
    let path = checkpoint::last(&folder.join("checkpoints")).unwrap().unwrap();
    let Checkpoint { step, state, tensors } = Checkpoint::read(&path).unwrap();
    let bytes = |tensor: &Tensor| safetensors::View::data(&tensor).into_owned();
    let tensors = tensors.iter().map(|(name, tensor)| (name.clone(), bytes(tensor))).collect();
    let lines = fs::read_to_string(folder.join("metrics.jsonl")).unwrap();
    let lines = lines.lines().map(|line| {
        let mut line: serde_json::Value = serde_json::from_str(line).unwrap();
        line.as_object_mut().unwrap().remove("step_time");
        line
    });
    (step, state, tensors, lines.collect())
}

#[test]
fn a_stopped_run_goes_on_bit_for_bit() {
    let dir = tempfile::tempdir().unwrap();
    let (straight, stopped) = (dir.path().join("straight"), dir.path().join("stopped"));
    whole(&straight);
    for at in [1, 6, 13] {
        let end = train(&stopped, &config(), &mut |stop, event| {
            if matches!(event, Event::Step(step, _) if step == at) {
                stop.store(true, Ordering::Relaxed);
            }
        });
        assert_eq!(end.unwrap(), End::Stopped(at));
        assert_eq!(outcome(&stopped).0, at);
    }
    whole(&stopped);
    assert_eq!(outcome(&straight), outcome(&stopped));
    assert_eq!(outcome(&straight).0, 14);
}

const KILLED: &str = "RLRIG_TEST_KILLED_RUN";

/// Trains in the folder that the environment names and hangs at step 7, three steps after its last checkpoint.
#[test]
fn child_of_the_next_test() {
    let Some(folder) = std::env::var_os(KILLED) else { return };
    let _ = train(Path::new(&folder), &config(), &mut |_, event| {
        if matches!(event, Event::Step(7, _)) {
            fs::write(Path::new(&folder).join("hangs"), "").unwrap();
            std::thread::sleep(Duration::from_secs(600));
        }
    });
}

#[test]
fn a_killed_run_goes_on_bit_for_bit() {
    let dir = tempfile::tempdir().unwrap();
    let (straight, killed) = (dir.path().join("straight"), dir.path().join("killed"));
    whole(&straight);
    let mut child = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "child_of_the_next_test"])
        .env(KILLED, &killed)
        .stdout(Stdio::null())
        .spawn()
        .unwrap();
    let start = Instant::now();
    while !killed.join("hangs").exists() {
        assert!(start.elapsed() < Duration::from_secs(60), "the run does not get to its seventh step");
        std::thread::sleep(Duration::from_millis(10));
    }
    let busy = train(&killed, &config(), &mut |_, _| ()).unwrap_err().to_string();
    assert!(busy.contains("another process trains"), "{busy}");
    child.kill().unwrap();
    child.wait().unwrap();
    let log = fs::read_to_string(killed.join("metrics.jsonl")).unwrap();
    assert!(log.contains("\"step\":7"), "the log is ahead of the checkpoint");
    whole(&killed);
    assert_eq!(outcome(&straight), outcome(&killed));
}

#[test]
fn threads_do_not_change_a_run() {
    let run = |threads| {
        let dir = tempfile::tempdir().unwrap();
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        pool.install(|| whole(dir.path()));
        outcome(dir.path())
    };
    assert_eq!(run(1), run(3));
}

#[test]
fn micro_batches_add_up_to_the_batch() {
    let losses = |micro_batch| {
        let dir = tempfile::tempdir().unwrap();
        let config = TrainConfig { micro_batch, ..config() };
        train(dir.path(), &config, &mut |_, _| ()).unwrap();
        outcome(dir.path()).3.iter().filter_map(|line| line["loss"].as_f64()).collect::<Vec<_>>()
    };
    let batch = losses(0);
    assert_eq!(batch.len(), 14);
    assert!(batch[13] < 0.9 * batch[0], "{batch:?}");
    for micro in [1, 4] {
        for (a, b) in batch.iter().zip(losses(micro)) {
            assert!((a - b).abs() < 1e-4 * a, "micro-batches of {micro}: {a} and {b}");
        }
    }
}

#[test]
fn a_run_folder_holds_what_it_says() {
    let dir = tempfile::tempdir().unwrap();
    let mut saved = Vec::new();
    let end = train(dir.path(), &config(), &mut |_, event| match event {
        Event::Plan(plan) => {
            // qkv is a Muon matrix with one moment, the rest is AdamW's with two.
            let (qkv, rest) = (3 * WIDTH * WIDTH, WIDTH * WIDTH + 3 * WIDTH);
            assert_eq!((plan.parameters, plan.muon), (qkv + rest, qkv + WIDTH * WIDTH));
            assert_eq!((plan.done, plan.steps, plan.micro_batch), (0, 14, 4));
        }
        Event::Saved(step) => saved.push(step),
        _ => (),
    });
    assert_eq!(end.unwrap(), End::Done);
    // The error falls at every evaluation, so each of them is saved beside the regular checkpoints.
    assert_eq!(saved, [0, 3, 4, 6, 8, 9, 12, 14]);
    assert_eq!(checkpoint::steps(&dir.path().join("checkpoints")).unwrap(), [12, 14]);
    for file in ["samples/00000000/blank.png", "samples/00000014/blank.png", "model/model.safetensors"] {
        assert!(dir.path().join(file).is_file(), "{file}");
    }
    let events = fs::read_dir(dir.path()).unwrap().filter_map(|e| e.unwrap().file_name().into_string().ok());
    assert_eq!(events.filter(|name| name.starts_with("events.out.tfevents")).count(), 1);
    let (_, _, tensors, lines) = outcome(dir.path());
    let evaluations: Vec<_> =
        lines.iter().filter(|l| l["eval/error"].is_number()).map(|l| l["step"].as_u64()).collect();
    assert_eq!(evaluations, [0, 3, 6, 9, 12, 14].map(Some));
    let model = candle_core::safetensors::load(dir.path().join("model/model.safetensors"), &Device::Cpu).unwrap();
    assert_eq!(model["out.bias"].dtype(), DType::F16);
    // The model is the moving average, not the last variables.
    let half = |name: &str| -> Vec<half::f16> {
        let numbers = tensors[name].chunks(4).map(|b| f32::from_le_bytes(b.try_into().unwrap()));
        numbers.map(half::f16::from_f32).collect()
    };
    let model = model["out.bias"].to_vec1::<half::f16>().unwrap();
    assert_eq!(model, half("ema/out.bias"));
    assert_ne!(model, half("vars/out.bias"));
}

#[test]
fn a_run_that_gets_no_better_ends_and_keeps_its_best() {
    let dir = tempfile::tempdir().unwrap();
    // By this measure what the run starts from is the best.
    let config = TrainConfig { best_is_lowest: false, patience: 2, ..config() };
    let model = |name: &str| fs::read(dir.path().join(name).join("model.safetensors")).unwrap();
    for _ in 0..2 {
        assert_eq!(train(dir.path(), &config, &mut |_, _| ()).unwrap(), End::NoBetter(6));
        assert_ne!(model("best"), model("model"));
    }
    assert_eq!(checkpoint::steps(&dir.path().join("checkpoints")).unwrap(), [0, 4, 6]);
}

#[test]
fn a_best_metric_that_does_not_exist_loses_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let early = TrainConfig { best: Some("eval/none".into()), checkpoint_every: 0, ..config() };
    let before = dir.path().join("early");
    let error = train(&before, &early, &mut |_, event| assert!(!matches!(event, Event::Step(..)))).unwrap_err();
    assert!(format!("{error:#}").contains("eval/none"), "{error:#}");
    // Where the first evaluation is the last.
    let config = TrainConfig { evaluate_every: 0, ..early };
    let error = train(dir.path(), &config, &mut |_, _| {}).unwrap_err();
    assert!(format!("{error:#}").contains("eval/none"), "{error:#}");
    let kept = fs::read_dir(dir.path().join("checkpoints")).unwrap().count();
    assert!(kept == 1 && dir.path().join("model").is_dir());
}

#[test]
fn a_torn_checkpoint_stops_the_resume() {
    let dir = tempfile::tempdir().unwrap();
    whole(dir.path());
    let path = checkpoint::last(&dir.path().join("checkpoints")).unwrap().unwrap();
    let bytes = fs::read(&path).unwrap();
    fs::write(&path, &bytes[..bytes.len() - 10]).unwrap();
    let error = format!("{:#}", train(dir.path(), &config(), &mut |_, _| ()).unwrap_err());
    assert!(error.contains("step-00000014.safetensors is torn"), "{error}");
}

#[test]
fn a_dry_run_tells_the_time_of_the_steps_that_are_left() {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("small.toml"), small::AUTOENCODER).unwrap();
    let pretrain = |args: &[&str]| {
        let mut command = Command::new(assert_cmd::cargo::cargo_bin!("rlrig"));
        let output = command.current_dir(dir.path()).args(["train", "pretrain"]).args(args).output().unwrap();
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(output.status.success(), "{said}");
        said
    };
    assert!(pretrain(&["--config", "small.toml", "--out", "run", "--dry-run"]).contains(" s, 2 take about"));
    pretrain(&["--config", "small.toml", "--out", "run"]);
    let resume = ["--resume", "run", "--dry-run", "--set", "train.steps=5"];
    assert!(pretrain(&resume).contains(" s, 3 take about"));
}

/// A loss that does not reach one of its variables.
struct Deaf(Mean);

impl Objective for Deaf {
    fn vars(&self) -> BTreeMap<String, Var> {
        let mut vars = self.0.vars();
        vars.insert("unheard".into(), Var::zeros(3, DType::F32, &Device::Cpu).unwrap());
        vars
    }

    fn loss(&self, batch: &Batch) -> Result<Step> {
        self.0.loss(batch)
    }

    fn save(&self, folder: &Path, dtype: DType) -> Result<()> {
        self.0.save(folder, dtype)
    }
}

#[test]
fn mistakes_are_found_before_the_first_step() {
    let optim = OptimConfig::default();
    let dir = tempfile::tempdir().unwrap();
    let rehearse =
        |objective: &mut dyn Objective, config: &TrainConfig| run::rehearse(objective, config, &optim, dir.path());
    let error = rehearse(&mut Deaf(Mean::new().unwrap()), &config()).unwrap_err().to_string();
    assert!(error.contains("no gradient, the first is unheard"), "{error}");
    let mut mean = Mean::new().unwrap();
    let Rehearsal { plan, metrics, .. } = rehearse(&mut mean, &config()).unwrap();
    assert_eq!(plan.tensors, 5);
    assert!(metrics.iter().any(|(name, value)| name == "eval/error" && value.is_finite()));
    let impatient = TrainConfig { patience: 1, best: None, ..config() };
    for bad in [TrainConfig { batch: 0, ..config() }, TrainConfig { ema: 1.0, ..config() }, impatient] {
        assert!(rehearse(&mut mean, &bad).unwrap_err().is::<rlrig::error::Usage>());
    }
    assert!(dir.path().read_dir().unwrap().next().is_none(), "a rehearsal writes nothing");
    let wrong = TrainConfig { best: Some("eval/psnr".into()), ..config() };
    let error = train(dir.path(), &wrong, &mut |_, _| ()).unwrap_err().to_string();
    assert!(error.contains("it has eval/error"), "{error}");
}
