//! Two steps of Reflection-GRPO on the built-in models: they run, resume bit for bit, and write adapters.

#![allow(clippy::unwrap_used)]

#[path = "rlrig/mod.rs"]
mod small;

use candle_core::{DType, Device, Tensor};
use rlrig::{
    error::Usage,
    models::{Folder, peft::Peft},
    train::{
        Batch,
        grpo_config::GrpoConfig,
        request::{Request, RunConfig},
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
const DIFFUSER: &str = "
objective = 'diffuser'
group = { size = 2, rewards = { probability = 1.0, oracle = 0.0 } }
editor = { loss = 'diffusion-nft', min_objects = 2, steps = 4, window = 2, guidance = 2.0, kl = 0.1, evaluation = 2, \
           evaluation_steps = 2 }
";
const JOINT: &str = "
objective = 'joint'
group = { size = 2, rewards = { gain = 1.0, kept = 0.5, format = 0.2, preserve = 0.1, oracle = 0.0 } }
actor = { source = 'render', max_objects = 2, guidance = 1.0, kl = 0.1 }
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

/// An adapter that the Actor has trained for a step, in a run `first` in `dir`.
fn of_the_actor(dir: &Path) -> PathBuf {
    train(&request(dir, "first", ACTOR), Some(1));
    dir.join("first/model")
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

/// Two steps, see [`steps`].
fn two_steps(config: &str) -> (tempfile::TempDir, PathBuf, Vec<HashMap<String, f64>>) {
    steps(config, 2)
}

/// Trains `count` steps straight through and with a stop after the first: both end in the same adapter. Returns the straight
/// run.
fn steps(config: &str, count: usize) -> (tempfile::TempDir, PathBuf, Vec<HashMap<String, f64>>) {
    let dir = tempfile::tempdir().unwrap();
    let asked = |name: &str| {
        let set = vec![format!("train.steps={count}")];
        Request { set, ..request(dir.path(), name, config) }
    };
    let straight = asked("straight");
    let (end, steps) = train(&straight, None);
    assert_eq!((end, steps.len()), (End::Done, count));
    let stopped = asked("stopped");
    assert_eq!(train(&stopped, Some(1)).0, End::Stopped(1));
    let resumed = Request { config: None, resume: stopped.out.clone(), out: None, set: Vec::new() };
    let (end, rest) = train(&resumed, None);
    assert_eq!(end, End::Done);
    let tokens = |steps: &[HashMap<String, f64>]| steps.last().unwrap().get("num_tokens").copied();
    assert_eq!(tokens(&steps), tokens(&rest), "tokens are counted over all steps");
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
        assert_eq!(["skipped", "spikes", "rewards/missing"].map(|name| metrics[name]), [0.0; 3]);
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
    let sheets: Vec<PathBuf> = fs::read_dir(folder.join("samples")).unwrap().map(|e| e.unwrap().path()).collect();
    assert_eq!(sheets.len(), 2);
    for sheet in sheets {
        let is_sheet = |file: &Path| file.extension().is_some_and(|end| end == "png") && image::open(file).is_ok();
        let found = fs::read_dir(&sheet).unwrap().any(|file| is_sheet(&file.unwrap().path()));
        assert!(found, "{} has no pictures", sheet.display());
    }
}

#[test]
fn the_actor_trains_and_resumes() {
    let (_dir, folder, steps) = two_steps(ACTOR);
    let names = ["kl", "completions/mean_length", "entropy", "rewards/format/mean", "ratio_off", "num_tokens"];
    check(&folder, &steps, &names);
    assert!(steps[1]["num_tokens"] > 1.5 * steps[0]["num_tokens"]);
    // What has learned is no longer its reference.
    assert!(steps[1]["kl"] > steps[0]["kl"] && steps[0]["kl"] < 1e-6, "{steps:?}");
}

/// With a pool of one problem every step is about the same prompt; what is kept with it, all tries of an edit, does not
/// change what is learned.
#[test]
fn a_pool_poses_its_problems_again_and_resumes() {
    let config = ACTOR.replace("source = 'render'", "pool = 1, tries = 2, source = 'render'");
    let (_dir, folder, steps) = two_steps(&config);
    check(&folder, &steps, &["problems/rendered", "edits/distinct"]);
    assert_eq!(steps[0]["problems/rendered"], 1.0);
    // All but the answers are questions, and those of one problem.
    let tokens = |i: usize| {
        steps[i]["num_tokens"] - 16.0 * steps[..=i].iter().map(|s| s["completions/mean_length"]).sum::<f64>()
    };
    assert_eq!(tokens(1), 2.0 * tokens(0));
}

#[test]
fn the_editor_trains_and_resumes_by_stochastic_steps() {
    let (_dir, folder, steps) = two_steps(&EDITOR.replace("LOSS", "grpo"));
    check(&folder, &steps, &["kl", "rewards/preserve/mean", "clip_ratio/low_mean", "ratio_off"]);
    assert!(steps[1]["kl"] > 0.0 && steps[0]["kl"] == 0.0, "{steps:?}");
}

#[test]
fn both_train_over_whole_trajectories_and_resume() {
    let (_dir, folder, steps) = two_steps(JOINT);
    assert_eq!(adapters(&folder).len(), 2);
    let names = ["trajectory/reward", "trajectory/idle", "trajectory/broken", "actor/kl", "editor/kl"];
    check(&folder, &steps, &names);
    check(&folder, &steps, &["actor/ratio_off", "editor/ratio_off", "completions/clipped_ratio", "num_tokens"]);
    check(&folder, &steps, &["actor/grad_norm", "editor/grad_norm", "actor/entropy"]);
    // Not all edits come out right at once, and what follows is a second round.
    assert!(steps.iter().any(|metrics| metrics["trajectory/turns"] > 1.0), "{steps:?}");
}

/// The metrics of one step, which may have several updates, and the adapter that comes of it.
fn one_step(config: &str, set: &[&str]) -> (HashMap<String, f64>, HashMap<String, Tensor>) {
    let dir = tempfile::tempdir().unwrap();
    let mut request = request(dir.path(), "several", config);
    request.set =
        ["train.steps=1", "train.evaluate_every=0", "optim.lr=2e-2", "group.size=4"].map(str::to_owned).into();
    request.set.extend(set.iter().map(|key| (*key).to_owned()));
    let (end, mut steps) = train(&request, None);
    assert_eq!((end, steps.len()), (End::Done, 1));
    (steps.remove(0), adapter(&adapters(request.out.as_ref().unwrap())[0]))
}

/// The clipped shares of one step, and the adapter that comes of it.
fn several_updates(config: &str, set: &[&str]) -> (f64, HashMap<String, Tensor>) {
    let (metrics, adapter) = one_step(config, set);
    (metrics["clip_ratio/low_mean"] + metrics["clip_ratio/high_mean"], adapter)
}

/// Whether two steps have the same loss and gradient but for rounding.
fn alike([one, other]: [HashMap<String, f64>; 2]) -> bool {
    let norms = one["grad_norm"] / other["grad_norm"] - 1.0;
    (one["loss"] - other["loss"]).abs() < 1e-5 && one["grad_norm"] > 0.0 && norms.abs() < 1e-3
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
    let run = |rows: &str| one_step(&flow, &[rows, "train.micro_batch=2"]).0;
    assert!(alike(["group.rows=0", "group.rows=3"].map(run)));
}

#[test]
fn a_mean_over_tokens_is_the_same_in_any_micro_batches() {
    // Rewards that rounding does not move.
    let actor =
        ACTOR.replace("gain = 1.0, kept = 0.5, format = 0.2", "checker = 1.0").replace("kl = 0.1", "loss = 'dapo'");
    let run = |micro: &str| one_step(&actor, &["train.batch=4", "group.size=8", micro]).0;
    assert!(alike(["train.micro_batch=1", "train.micro_batch=4"].map(run)));
}

#[test]
fn training_goes_on_from_adapters() {
    let dir = tempfile::tempdir().unwrap();
    let start = of_the_actor(dir.path());
    let mut second = request(dir.path(), "second", ACTOR);
    second.set = vec![format!("models.actor={}", start.display()), "train.steps=1".into(), "optim.lr=0.0".into()];
    assert_eq!(train(&second, None).0, End::Done);
    assert!(!differ(&adapter(&start), &adapter(&dir.path().join("second/model"))));
    // From twice the same, which are of one rank together.
    let mut third = request(dir.path(), "twice", ACTOR);
    let twice = format!("models.actor=['{0}', '{0}']", start.display());
    third.set = vec![twice, "train.steps=1".into(), "optim.lr=0.0".into()];
    assert_eq!(train(&third, None).0, End::Done);
    let (one, two) = (adapter(&start), adapter(&dir.path().join("twice/model")));
    for (name, factor) in &one {
        let dim = usize::from(name.contains("lora_B"));
        let twice = Tensor::cat(&[factor, factor], dim).unwrap();
        let numbers = |t: &Tensor| t.flatten_all().unwrap().to_vec1::<f32>().unwrap();
        assert_eq!(numbers(&twice), numbers(&two[name]));
    }
    let none = Request { set: vec!["models.actor=[]".into()], ..request(dir.path(), "none", ACTOR) };
    let error = none.prepare::<GrpoConfig>().err().unwrap();
    assert!(error.is::<Usage>() && error.to_string().contains("models.actor names no adapter"), "{error:#}");
    // As the other's adapter it has the wrong layers.
    let wrong = Request {
        set: vec![format!("models.editor={}", start.display())],
        ..request(dir.path(), "third", &EDITOR.replace("LOSS", "grpo"))
    };
    assert!(wrong.prepare::<GrpoConfig>().is_err());
}

#[test]
fn a_run_goes_on_with_the_models_that_it_began_with() {
    let dir = tempfile::tempdir().unwrap();
    let lent = of_the_actor(dir.path());
    let editor = EDITOR.replace("LOSS", "grpo");
    let second =
        Request { set: vec![format!("models.actor={}", lent.display())], ..request(dir.path(), "second", &editor) };
    assert_eq!(train(&second, Some(1)).0, End::Stopped(1));
    // Another adapter, by the last bits of a number.
    let file = lent.join("adapter_model.safetensors");
    let mut bytes = fs::read(&file).unwrap();
    let place = bytes.len() - 4;
    bytes[place] ^= 1;
    fs::write(&file, &bytes).unwrap();
    let resumed = Request { config: None, resume: second.out.clone(), out: None, set: Vec::new() };
    let go_on = || resumed.prepare::<GrpoConfig>().unwrap().train(&AtomicBool::new(false), &mut |_| ());
    let error = go_on().unwrap_err();
    assert!(error.is::<Usage>() && error.to_string().contains("models.actor is not what the run in"), "{error}");
    bytes[place] ^= 1;
    fs::write(&file, &bytes).unwrap();
    assert_eq!(go_on().unwrap(), End::Done);
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
    // The third step is the first to show how the old policy followed after the stop.
    let (_dir, folder, steps) = steps(&EDITOR.replace("LOSS", "diffusion-nft"), 3);
    check(&folder, &steps, &["kl", "rewards/probability/mean"]);
    assert!(steps[2]["kl"] > 0.0);
    // Of the old policy the third step kept 0.002; the rest is what was learned.
    let mut checkpoints: Vec<PathBuf> =
        fs::read_dir(folder.join("checkpoints")).unwrap().map(|entry| entry.unwrap().path()).collect();
    checkpoints.sort();
    let [before, after] = <[_; 2]>::try_from(checkpoints).unwrap().map(|path| {
        assert!(path.extension().is_some_and(|extension| extension == "safetensors"));
        candle_core::safetensors::load(path, &Device::Cpu).unwrap()
    });
    let of = |tensors: &HashMap<String, Tensor>, name: &str| -> Vec<f32> {
        tensors[name].flatten_all().unwrap().to_vec1().unwrap()
    };
    let names: Vec<&str> = after.keys().filter_map(|name| name.strip_prefix("objective/old.")).collect();
    assert!(!names.is_empty());
    let mut lagged = false;
    for name in names {
        let (own, new) = (format!("objective/old.{name}"), of(&after, &format!("vars/{name}")));
        for ((old, new), was) in of(&after, &own).iter().zip(&new).zip(of(&before, &own)) {
            assert!((old - (0.002 * was + 0.998 * new)).abs() < 1e-7, "{name}: {old} of {was} and {new}");
            lagged |= old != new;
        }
    }
    assert!(lagged);
}

#[test]
fn without_a_rank_all_weights_are_trained() {
    let rig = small::Rig::new();
    let (klein, vlm) = (rig.path("klein"), rig.path("vlm"));
    let flow = |loss: &str| (EDITOR.replace("LOSS", loss), klein.join("transformer"), "diffusion_pytorch_model");
    let parts = [(ACTOR.to_owned(), vlm.clone(), "model"), flow("grpo"), flow("diffusion-nft")];
    for (number, (config, from, stem)) in parts.into_iter().enumerate() {
        let mut asked = request(rig.dir.path(), &format!("whole{number}"), &config);
        asked.set = [
            "models.size=64",
            "adapter.rank=0",
            "group.size=2",
            "train.steps=1",
            "optim.muon=false",
            "optim.weight_decay=0",
        ]
        .map(str::to_owned)
        .into();
        asked.set.push(format!("models.model={}", klein.display()));
        asked.set.push(format!("models.vlm={}", vlm.display()));
        let (end, steps) = train(&asked, None);
        // The reference is the model as it was.
        assert!(end == End::Done && steps[0]["kl"].abs() < 1e-6, "{steps:?}");
        let saved = asked.out.as_ref().unwrap().join("model");
        assert!(saved.join("config.json").is_file());
        let load = |folder: &Path| -> HashMap<String, Tensor> {
            let read =
                candle_core::safetensors::load(folder.join(format!("{stem}.safetensors")), &Device::Cpu).unwrap();
            read.into_iter().map(|(name, tensor)| (name, tensor.to_dtype(DType::F32).unwrap())).collect()
        };
        let (before, after) = (load(&from), load(&saved));
        assert!(after.len() == before.len() && steps[0]["grad_norm"] > 0.0, "{steps:?}");
        assert!(after.iter().all(|(name, tensor)| before[name].dims() == tensor.dims()));
        assert!(differ(&after, &before));
    }
    let coarse = Request {
        set: vec!["adapter.rank=0".to_owned(), "models.dtype=bf16".to_owned()],
        ..request(rig.dir.path(), "coarse", ACTOR)
    };
    let error = coarse.prepare::<GrpoConfig>().err().unwrap();
    assert!(error.is::<Usage>() && error.to_string().contains("in f32"), "{error:#}");
}

/// It draws prompts: what it makes is worth what it shows, and held-out pictures are compared with those of the Diffuser as
/// it was, which at first are the same.
#[test]
fn two_steps_of_the_diffuser_resume_bit_for_bit() {
    let (_dir, run, steps) = two_steps(DIFFUSER);
    assert!(steps.iter().all(|m| (0.0..=1.0).contains(&m["rewards/probability/mean"]) && m["loss"].is_finite()));
    let lines = fs::read_to_string(run.join("metrics.jsonl")).unwrap();
    let evaluation = lines.lines().find(|line| line.contains("eval/oracle")).unwrap();
    let metrics: HashMap<String, f64> = serde_json::from_str(evaluation).unwrap();
    assert_eq!((metrics["step"], metrics["eval/preserve"]), (0.0, 1.0));
    assert_eq!(metrics["eval/oracle"], metrics["eval/oracle_before"]);
    // Its edits are none, so that there is nothing to preserve.
    let error = request(run.parent().unwrap(), "preserves", &DIFFUSER.replace("oracle", "preserve"));
    let error = error.prepare::<GrpoConfig>().err().unwrap();
    assert!(error.is::<Usage>() && error.to_string().contains("no reward \"preserve\""), "{error:#}");
}

#[test]
fn a_policy_that_is_not_the_one_that_drew_is_refused() {
    let whole = Batch { step: 0, rows: 0..1, size: 1, together: 0..1, update: 0, piece: 0 };
    let by_steps = [&EDITOR.replace("LOSS", "grpo"), &DIFFUSER.replace("diffusion-nft", "grpo")];
    for (config, learner) in [(ACTOR, "actor"), (by_steps[0], "editor"), (by_steps[1], "diffuser"), (JOINT, "joint")] {
        let config: GrpoConfig = toml::from_str(&format!("{config}{COMMON}")).unwrap();
        let objective = config.build(&Device::Cpu).unwrap();
        objective.collect(&whole).unwrap();
        assert!(objective.loss(&whole).is_ok(), "{learner}");
        for var in objective.vars().values() {
            var.set(&(var.as_tensor() + 0.05).unwrap().detach()).unwrap();
        }
        let error = format!("{:#}", objective.loss(&whole).err().unwrap());
        assert!(error.contains("must be 1, but it is off by"), "{learner}: {error}");
    }
}

#[test]
fn groups_of_one_and_unknown_rewards_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    for (key, word) in [
        ("group.size=1", "at least 2"),
        ("group.rewards.beauty=1.0", "no reward \"beauty\""),
        ("group.minibatches=3", "= 3 is more than the 2 micro-batches"),
        ("actor.edit_guidance={ text = 3.0, image = -1.0 }", "from 0 on, not 3 and -1"),
        ("actor.guidance=-2.0", "from 0 on, not -2"),
        ("actor.eps_high=nan", "[actor] eps_high is 0 or more, not NaN"),
        ("group.rewards.gain=-1.0", "more is better of each"),
        ("joint.rounds=4", "joint counts for nothing here"),
        ("actor.edit_guidance={ text = 3.0, picture = 2.0 }", "did you mean actor.edit_guidance.image?"),
    ] {
        let request = Request { set: vec![key.into()], ..request(dir.path(), "refused", ACTOR) };
        let error = request.prepare::<GrpoConfig>().err().unwrap();
        assert!(error.is::<Usage>() && error.to_string().contains(word), "{error}");
    }
    assert!(!dir.path().join("refused").exists());
}

#[test]
fn the_configs_that_are_shipped_load() {
    for name in ["grpo-actor", "grpo-editor", "grpo-joint", "grpo-diffuser"] {
        let dir = tempfile::tempdir().unwrap();
        let file = Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("configs/tabletop/{name}.toml"));
        let request = Request { config: Some(file), resume: None, out: Some(dir.path().join("run")), set: Vec::new() };
        let prepared = request.prepare::<GrpoConfig>().unwrap();
        let best = prepared.config.train.best.as_deref();
        assert!(prepared.config.group.size >= 8 && matches!(best, Some("eval/perfect" | "eval/oracle")), "{name}");
    }
}

#[test]
fn the_configs_for_real_checkpoints_load_and_train_on_small_ones_of_their_kind() {
    let rig = small::Rig::new();
    for name in ["grpo-actor", "grpo-editor", "grpo-joint", "grpo-diffuser"] {
        let file = Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("configs/flux2-klein/{name}.toml"));
        let mut set: Vec<String> = [
            "models.size=64",
            "adapter.rank=2",
            "group.size=2",
            "train.batch=1",
            "train.steps=1",
            "train.best=\"eval/checker\"",
        ]
        .map(str::to_owned)
        .into();
        set.push(format!("models.model={}", rig.path("klein").display()));
        set.push(format!("models.vlm={}", rig.path("vlm").display()));
        let section = if name == "grpo-diffuser" { "editor" } else { &name["grpo-".len()..] };
        set.push(format!("{section}.evaluation=1"));
        let request = Request { config: Some(file), resume: None, out: Some(rig.path(name)), set };
        let (mut plans, mut losses) = (Vec::new(), Vec::new());
        let prepared = request.prepare::<GrpoConfig>().unwrap();
        let end = prepared.train(&AtomicBool::new(false), &mut |event| match event {
            Event::Plan(plan) => plans.push(plan.clone()),
            Event::Step(_, metrics) => {
                losses.extend(metrics.iter().filter(|(name, _)| name == "loss").map(|(_, l)| *l))
            }
            _ => {}
        });
        assert_eq!((end.unwrap(), losses.len()), (End::Done, 1), "{name}");
        assert!(losses[0].is_finite() && !adapters(&rig.path(name)).is_empty(), "{name}");
        // What is planned before the first step: an adapter beside frozen models, blocks computed again.
        let trained: usize =
            adapters(&rig.path(name)).iter().flat_map(|a| adapter(a).into_values()).map(|t| t.elem_count()).sum();
        let plan = &plans[0];
        assert_eq!((plans.len(), plan.parameters, plan.recompute), (1, trained, true), "{name}");
        // Variables, gradients, two moments and an average, in f32.
        assert!(plan.frozen > 0 && plan.memory >= plan.frozen + 5 * 4 * trained, "{name}: {plan:?}");
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
