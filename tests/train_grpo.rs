//! Two steps of Reflection-GRPO on the built-in models: they run, resume bit for bit, and write adapters.

#![allow(clippy::unwrap_used)]

#[path = "rlrig/mod.rs"]
mod small;

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
group = { size = 8, rewards = { gain = 1.0, kept = 0.5, format = 0.2, brevity = 1.0, oracle = 0.0 } }
actor = { source = 'render', max_objects = 3, steps = 1, guidance = 1.0, kl = 0.1, evaluation = 1 }
";
const EDITOR: &str = "
objective = 'editor'
group = { size = 2, rewards = { probability = 1.0, preserve = 1.0, oracle = 0.0 } }
editor = { loss = 'LOSS', max_objects = 2, steps = 4, window = 1, guidance = 1.0, kl = 0.1, evaluation = 1, \
           evaluation_steps = 2 }
";

const JOINT: &str = "
objective = 'joint'
group = { size = 2, rewards = { gain = 1.0, kept = 0.5, format = 0.2, preserve = 0.1, oracle = 0.0 } }
actor = { source = 'render', max_objects = 2, steps = 1, guidance = 1.0, kl = 0.1 }
editor = { steps = 4, window = 1, guidance = 2.0, kl = 0.1 }
joint = { rounds = 3, evaluation = 1 }
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

/// The tensors of an adapter's folder.
fn adapter(folder: &Path) -> HashMap<String, Tensor> {
    candle_core::safetensors::load(folder.join("adapter_model.safetensors"), &Device::Cpu).unwrap()
}

/// The folders of the adapters that a run has trained.
fn adapters(run: &Path) -> Vec<PathBuf> {
    let parts = ["", "actor", "editor"].map(|part| run.join("model").join(part));
    parts.into_iter().filter(|part| part.join("adapter_config.json").is_file()).collect()
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
    let (one, other) = (adapters(straight.out.as_ref().unwrap()), adapters(stopped.out.as_ref().unwrap()));
    assert_eq!(one.len(), other.len());
    for (one, other) in one.iter().zip(&other) {
        let bytes = |folder: &Path| fs::read(folder.join("adapter_model.safetensors")).unwrap();
        assert!(bytes(one) == bytes(other), "the resumed run ends in other weights");
    }
    let folder = straight.out.unwrap();
    (dir, folder, steps)
}

/// The adapter has learned something, and reads back.
fn check(folder: &Path, steps: &[HashMap<String, f64>], names: &[&str]) {
    for metrics in steps {
        for name in ["reward", "reward_std", "frac_reward_zero_std", "rewards/oracle/mean", "grad_norm"] {
            assert!(metrics[name].is_finite(), "{name}");
        }
        for name in names {
            assert!(metrics[*name].is_finite(), "{name}");
        }
    }
    let largest = |t: &Tensor| t.abs().unwrap().flatten_all().unwrap().max(0).unwrap().to_scalar::<f32>().unwrap();
    for folder in adapters(folder) {
        let tensors = adapter(&folder);
        assert!(tensors.iter().all(|(name, _)| name.starts_with("base_model.model.")));
        assert!(tensors.iter().any(|(name, t)| name.ends_with("lora_B.weight") && largest(t) > 0.0));
        let read = Peft::open(&Folder::from(folder)).unwrap();
        assert_eq!(2 * read.layers.len(), tensors.len());
    }
    let log = fs::read_to_string(folder.join("metrics.jsonl")).unwrap();
    assert_eq!(log.matches("eval/oracle\"").count(), 2, "of what it starts from, and at the end");
    assert_eq!(fs::read_dir(folder.join("samples")).unwrap().count(), 2);
}

#[test]
fn the_actor_trains_and_resumes() {
    let (_dir, folder, steps) = two_steps(ACTOR);
    check(&folder, &steps, &["kl", "completions/mean_length", "entropy", "rewards/format/mean", "ratio_off"]);
}

#[test]
fn the_editor_trains_and_resumes_by_stochastic_steps() {
    let (_dir, folder, steps) = two_steps(&EDITOR.replace("LOSS", "grpo"));
    check(&folder, &steps, &["kl", "rewards/preserve/mean", "clip_ratio/low_mean", "ratio_off"]);
}

#[test]
fn both_train_over_whole_trajectories_and_resume() {
    let (_dir, folder, steps) = two_steps(JOINT);
    assert_eq!(adapters(&folder).len(), 2);
    let names =
        ["trajectory/reward", "trajectory/idle", "actor/kl", "editor/kl", "actor/ratio_off", "editor/ratio_off"];
    check(&folder, &steps, &names);
}

/// The clipped shares of one step with several updates, and the adapter that comes of it.
fn several_updates(config: &str, set: &[&str]) -> (f64, HashMap<String, Tensor>) {
    let dir = tempfile::tempdir().unwrap();
    let mut request = request(dir.path(), "several", config);
    request.set =
        ["train.steps=1", "train.evaluate_every=0", "optim.lr=2e-2", "group.size=4"].map(str::to_owned).into();
    request.set.extend(set.iter().map(|key| (*key).to_owned()));
    let (end, steps) = train(&request, None);
    assert_eq!((end, steps.len()), (End::Done, 1));
    let clipped = steps[0]["clip_ratio/low_mean"] + steps[0]["clip_ratio/high_mean"];
    (clipped, adapter(&adapters(request.out.as_ref().unwrap())[0]))
}

fn differ(a: &HashMap<String, Tensor>, b: &HashMap<String, Tensor>) -> bool {
    let same = |(name, t): (&String, &Tensor)| {
        let numbers = |t: &Tensor| t.flatten_all().unwrap().to_vec1::<f32>().unwrap();
        numbers(t) == numbers(&b[name])
    };
    !a.iter().all(same)
}

#[test]
fn the_ratio_is_clipped_from_the_second_update_of_a_batch_on() {
    let (narrow, wide) = (["actor.eps_low=1e-4", "actor.eps_high=1e-4"], ["actor.eps_low=0.99", "actor.eps_high=99.0"]);
    // Enough prompts with enough in them that the Actor is not of one mind about all.
    let asked = ["train.batch=4", "group.size=8", "actor.max_objects=3"];
    let run = |more: &[&str], range: &[&str]| several_updates(ACTOR, &[&asked, more, range].concat());
    // One update: the ratio is 1, and no range clips it.
    let ((clipped, one), (free, other)) = (run(&[], &narrow), run(&[], &wide));
    assert_eq!((clipped, free, differ(&one, &other)), (0.0, 0.0, false));
    // Several: it is not 1 any more, and what is clipped moves nothing.
    let more = ["group.epochs=2", "group.minibatches=2"];
    let ((clipped, many), (free, other)) = (run(&more, &narrow), run(&more, &wide));
    assert!(clipped > 0.01 && free < clipped, "{clipped} {free}");
    assert!(differ(&many, &other) && differ(&many, &one));
    // The same for a flow.
    let flow = EDITOR.replace("LOSS", "grpo");
    let run = |eps: &str| several_updates(&flow, &["group.epochs=2", eps]);
    let ((clipped, narrow), (free, wide)) = (run("editor.eps=1e-9"), run("editor.eps=0.9"));
    assert!(clipped > 0.05 && free == 0.0 && differ(&narrow, &wide), "{clipped} {free}");
}

#[test]
fn fewer_rows_at_once_give_the_same_gradients() {
    let flow = EDITOR.replace("LOSS", "grpo").replace("window = 1", "window = 2");
    let run = |rows: &str| several_updates(&flow, &[rows, "group.epochs=1", "train.micro_batch=2"]).1;
    let (all, three) = (run("group.rows=0"), run("group.rows=3"));
    for (name, all) in &all {
        let gap = (all - &three[name]).unwrap().abs().unwrap().flatten_all().unwrap().max(0).unwrap();
        // An update of AdamW has the size of the learning rate where a gradient is next to nothing, whatever its sign.
        assert!(gap.to_scalar::<f32>().unwrap() < 5e-2, "{name}");
    }
    let mean = |a: &HashMap<String, Tensor>, b: &HashMap<String, Tensor>| -> f32 {
        let of = |(name, t): (&String, &Tensor)| (t - &b[name]).unwrap().abs().unwrap().mean_all().unwrap();
        a.iter().map(|pair| of(pair).to_scalar::<f32>().unwrap()).sum()
    };
    assert!(mean(&all, &three) < 1e-3, "{}", mean(&all, &three));
}

#[test]
fn training_goes_on_from_adapters() {
    let dir = tempfile::tempdir().unwrap();
    let first = request(dir.path(), "first", ACTOR);
    train(&first, Some(1));
    let start = dir.path().join("first/model");
    let mut second = request(dir.path(), "second", ACTOR);
    second.set = vec![format!("models.actor={}", start.display()), "train.steps=1".into(), "optim.lr=0.0".into()];
    assert_eq!(train(&second, None).0, End::Done);
    assert!(!differ(&adapter(&start), &adapter(&dir.path().join("second/model"))));
    // As the other's adapter it has the wrong layers.
    let wrong = Request {
        set: vec![format!("models.editor={}", start.display())],
        ..request(dir.path(), "third", &EDITOR.replace("LOSS", "grpo"))
    };
    assert!(wrong.prepare::<GrpoConfig>().is_err());
}

#[test]
fn the_editor_trains_by_grpo_guard() {
    let dir = tempfile::tempdir().unwrap();
    // On edits that the Actor asks for.
    let config = EDITOR.replace("LOSS", "grpo-guard").replace("max_objects = 2", "drawn = 1.0, max_objects = 2");
    let request = request(dir.path(), "guard", &config);
    let (end, steps) = train(&request, None);
    assert_eq!(end, End::Done);
    check(&dir.path().join("guard"), &steps, &["kl", "clip_ratio/low_mean", "ratio_off"]);
}

#[test]
fn the_editor_trains_and_resumes_by_diffusion_nft() {
    let (_dir, folder, steps) = two_steps(&EDITOR.replace("LOSS", "diffusion-nft"));
    check(&folder, &steps, &["kl", "rewards/probability/mean"]);
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
    for name in ["grpo-actor", "grpo-editor", "grpo-joint"] {
        let dir = tempfile::tempdir().unwrap();
        let file = Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("configs/tabletop/{name}.toml"));
        let request = Request { config: Some(file), resume: None, out: Some(dir.path().join("run")), set: Vec::new() };
        let prepared = request.prepare::<GrpoConfig>().unwrap();
        assert!(prepared.config.group.size >= 8 && prepared.config.train.best.as_deref() == Some("eval/oracle"));
    }
}

#[test]
fn the_configs_for_real_checkpoints_load_and_train_on_small_ones_of_their_kind() {
    let rig = small::Rig::new();
    for name in ["grpo-actor", "grpo-editor", "grpo-joint"] {
        let file = Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("configs/flux2-klein/{name}.toml"));
        let mut set: Vec<String> = [
            "models.size=64",
            "adapter.rank=2",
            "group.size=2",
            "train.batch=1",
            "train.steps=1",
            "train.best=\"eval/checker\"",
            "actor.max_objects=2",
            "editor.max_objects=2",
        ]
        .map(str::to_owned)
        .into();
        set.push(format!("models.model={}", rig.path("klein").display()));
        set.push(format!("models.vlm={}", rig.path("vlm").display()));
        for learner in ["actor", "editor", "joint"] {
            set.push(format!("{learner}.evaluation=1"));
        }
        let request = Request { config: Some(file), resume: None, out: Some(rig.path(name)), set };
        let (end, steps) = train(&request, None);
        assert_eq!((end, steps.len()), (End::Done, 1), "{name}");
        assert!(steps[0]["loss"].is_finite() && !adapters(&rig.path(name)).is_empty(), "{name}");
    }
}

#[test]
fn a_judge_of_its_own_gives_rewards() {
    let rig = small::Rig::new();
    let config = EDITOR.replace("LOSS", "grpo").replace("probability = 1.0", "judge = 1.0");
    let mut asked = request(rig.dir.path(), "judged", &config);
    let error = asked.prepare::<GrpoConfig>().err().unwrap();
    assert!(error.is::<Usage>() && error.to_string().contains("set models.judge"), "{error:#}");
    asked.set.push(format!("models.judge={}", rig.path("vlm").display()));
    let (end, steps) = train(&asked, None);
    assert_eq!(end, End::Done);
    // The untrained judge is not sure of anything, and is not the Checker, which is trained.
    assert!(steps.iter().all(|m| (0.2..0.8).contains(&m["rewards/judge/mean"])), "{steps:?}");
}
