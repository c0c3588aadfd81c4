//! Whole models and trainings as other devices compute them, against the CPU's own kernels: by compositions on the CPU,
//! and on a CUDA device where there is one.

use super::{
    Batch,
    grpo_config::GrpoConfig,
    pretrain::PretrainConfig,
    request::{Request, RunConfig},
    run::{End, Event},
};
use crate::{
    flow::{Change, FlowEdit, Inversion, Job, Klein, Method, Options, Solver, Unwatched},
    models::{built_in, qwen3_vl::Qwen3VL},
    rig::{
        roles::{Checker, Picture, Target},
        vlm_roles::Critic,
    },
    scene::tabletop::{render, split::Split, tasks},
    tensor::parity::{BF16, F32, composed, cuda, difference},
    vlm::Vlm,
};
use candle_core::{DType, Device, Tensor};
use std::{
    collections::HashMap,
    fs,
    sync::{Arc, atomic::AtomicBool},
};

/// A picture in bf16 after a few steps of a network in bf16.
const PICTURE_BF16: f64 = 0.1;
/// The same by RF-Solver, which divides the difference of two velocities by the length of half a step.
const SOLVED_BF16: f64 = 0.4;
const COMMON: &str = "
[train]
steps = 2
batch = 4
micro_batch = 2
evaluate_every = 0
samples_every = 0
checkpoint_every = 0
precision = 'f32'
[optim]
lr = 1e-3
schedule = { warmup = 0 }
";
const DIFFUSER: &str = "
objective = 'diffuser'
[diffuser]
heads = 2
head_dim = 16
double_blocks = 1
single_blocks = 2
text = { vocabulary = 300, hidden = 32, layers = 2, heads = 2 }
evaluation = { prompts = 1, steps = 1 }
";
const VAE: &str = "
objective = 'autoencoder'
[autoencoder]
block_out_channels = [4, 8, 8, 8]
crop = 32
statistics = 2
held_out = 1
";
const VLM: &str = "
objective = 'vlm'
[vlm]
curriculum = [[0, 1]]
evaluation = 1
[vlm.shape]
vision_hidden = 32
vision_layers = 2
vision_heads = 2
vision_mlp = 64
deepstack = [0]
hidden = 32
layers = 2
heads = 2
key_value_heads = 1
head_dim = 16
mlp = 64
vocabulary = 300
";

const GRPO: &str = "
[adapter]
rank = 4
alpha = 8.0
[train]
steps = 2
batch = 2
micro_batch = 1
evaluate_every = 0
samples_every = 0
checkpoint_every = 0
precision = 'f32'
[optim]
muon = false
lr = 1e-3
schedule = { warmup = 0 }
";
const ACTOR: &str = "
objective = 'actor'
group = { size = 2, rewards = { gain = 1.0, brevity = 0.5 } }
actor = { source = 'render', max_objects = 2, steps = 1, guidance = 1.0, evaluation = 1 }
";
const EDITOR: &str = "
objective = 'editor'
group = { size = 2, rewards = { probability = 1.0 } }
editor = { max_objects = 2, steps = 4, window = 1, guidance = 1.0, evaluation = 1, evaluation_steps = 2 }
";

/// Trains as `config` says; the metrics of each step.
fn train<C: RunConfig>(config: &str, device: &Device) -> Vec<HashMap<String, f64>> {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("config.toml");
    fs::write(&file, config).unwrap();
    let out = Some(folder.path().join("run"));
    let request = Request { config: Some(file), resume: None, out, set: Vec::new() };
    let mut steps = Vec::new();
    let end = request.prepare_on::<C>(device).unwrap().train(&AtomicBool::new(false), &mut |event| {
        if let Event::Step(_, metrics) = event {
            steps.push(metrics.iter().cloned().collect());
        }
    });
    assert!(matches!(end.unwrap(), End::Done));
    steps
}

fn same(what: &str, got: &[HashMap<String, f64>], want: &[HashMap<String, f64>], bound: f64) {
    assert_eq!((got.len(), want.len()), (2, 2), "{what}");
    for (step, (got, want)) in got.iter().zip(want).enumerate() {
        for name in ["loss", "grad_norm"] {
            let (got, want) = (got[name], want[name]);
            assert!((got - want).abs() <= bound * want.abs(), "{what}, step {step}: {name} is {got}, not {want}");
        }
    }
}

/// The second step's loss is that of the variables after the optimiser's first update.
#[test]
fn pretraining_takes_the_same_steps() {
    let device = cuda("pretraining on CUDA");
    for (section, precision) in [(DIFFUSER, "precision"), (VAE, ""), (VLM, "precision")] {
        let config = |format: &str| match precision {
            "" => format!("{section}{COMMON}"),
            // The key belongs to the first section.
            key => format!("{}{COMMON}", section.replacen("]\n", &format!("]\n{key} = '{format}'\n"), 1)),
        };
        let name = section.lines().nth(1).unwrap();
        let want = train::<PretrainConfig>(&config("f32"), &Device::Cpu);
        let got = composed(|| train::<PretrainConfig>(&config("f32"), &Device::Cpu));
        same(name, &got, &want, F32);
        if let Some(device) = &device {
            same(name, &train::<PretrainConfig>(&config("f32"), device), &want, F32);
            let want = train::<PretrainConfig>(&config("bf16"), &Device::Cpu);
            same(name, &train::<PretrainConfig>(&config("bf16"), device), &want, BF16);
        }
    }
}

/// Only where another device computes does the driver prepare a step ahead.
#[test]
fn what_is_prepared_ahead_is_what_the_loss_makes_itself() {
    for section in [DIFFUSER, VLM] {
        let config: PretrainConfig = toml::from_str(&format!("{section}{COMMON}")).unwrap();
        let objective = config.build(&Device::Cpu).unwrap();
        let batch = Batch { step: 3, rows: 2..4, size: 4, together: 0..4, update: 0, piece: 0 };
        let other = Batch { step: 4, ..batch.clone() };
        let loss = |batch: &Batch| objective.loss(batch).unwrap().loss.to_scalar::<f32>().unwrap();
        let want = [loss(&batch), loss(&other)];
        objective.prepare(&other).unwrap();
        objective.prepare(&batch).unwrap();
        assert!(want[0] != want[1]);
        assert_eq!([loss(&batch), loss(&other)], want, "{section}");
    }
}

/// Of the first update no more than sums in another order differ; the second one's loss is that of the updated variables.
#[test]
fn recomputed_blocks_take_the_same_steps() {
    let twice = |config: &str| [config.to_owned(), config.replace("[train]", "[train]\nrecompute = true")];
    for section in [DIFFUSER, VLM] {
        let [want, got] = twice(&format!("{section}{COMMON}")).map(|c| train::<PretrainConfig>(&c, &Device::Cpu));
        same(section.lines().nth(1).unwrap(), &got, &want, F32);
    }
    for section in [ACTOR, EDITOR] {
        let [want, got] = twice(&format!("{section}{GRPO}")).map(|c| train::<GrpoConfig>(&c, &Device::Cpu));
        same(section.lines().nth(1).unwrap(), &got, &want, F32);
    }
}

#[test]
fn grpo_runs_on_cuda() {
    let Some(device) = cuda("Reflection-GRPO on CUDA") else { return };
    for config in [ACTOR, EDITOR] {
        let steps = train::<GrpoConfig>(&format!("{config}{GRPO}"), &device);
        assert!(steps.len() == 2 && steps[0]["loss"].is_finite() && steps[0]["grad_norm"].is_finite());
    }
}

/// Which of [`pictures`] is RF-Solver's.
const SOLVED: usize = 3;

/// Latents of pictures drawn, edited by reference, and changed by every method.
fn pictures(device: &Device, dtype: DType) -> Vec<Tensor> {
    let klein = Klein::open(&built_in::tabletop(), dtype, device, Vec::new()).unwrap();
    let (w, h) = klein.default_size();
    let size = klein.tokens(w, h).unwrap();
    let options = Options { steps: 3, solver: Solver::Euler, guidance: 2.0.into(), batch: 2, watch: &Unwatched };
    let sample = tasks::text_to_image(0, Split::Train, 0, 2, 2);
    let source = klein.encode(&render::render(&sample.scene)).unwrap();
    let noise = |i| klein.noise(0, i, size).unwrap();
    let prompt = sample.prompt.as_str();
    let jobs = [
        Job { prompt, noise: noise(0), references: Vec::new() },
        Job { prompt: "move the ball to the left", noise: noise(1), references: vec![source.clone()] },
    ];
    let mut all = klein.draw(&jobs, &options).unwrap();
    let change = [Change { source, source_prompt: prompt, prompt: "a red cube", seed: 3 }];
    for method in [
        Method::Inversion(Inversion::RfInversion),
        Method::Inversion(Inversion::RfSolver),
        Method::Inversion(Inversion::FireFlow),
        Method::FlowEdit(FlowEdit::for_steps(3), 1.5),
    ] {
        all.extend(klein.change(&change, method, &options).unwrap());
    }
    let decoded = klein.decode(&all[..1]).unwrap();
    let pixels: Vec<f32> = decoded[0].as_raw().iter().map(|p| f32::from(*p)).collect();
    all.push(Tensor::new(pixels, &Device::Cpu).unwrap());
    all
}

#[test]
fn pictures_are_the_same() {
    let want = pictures(&Device::Cpu, DType::F32);
    let compare = |what: &str, got: &[Tensor], bound: f64, solved: f64| {
        for (i, (got, want)) in got.iter().zip(&want).enumerate() {
            let (off, bound) = (difference(got, want), if i == SOLVED { solved } else { bound });
            assert!(off < bound, "{what}: picture {i} is off by {off:.1e}");
        }
    };
    compare("by compositions", &composed(|| pictures(&Device::Cpu, DType::F32)), F32, F32);
    let Some(device) = cuda("pictures on CUDA") else { return };
    compare("on CUDA", &pictures(&device, DType::F32), F32, F32);
    compare("on CUDA in bf16", &pictures(&device, DType::BF16), PICTURE_BF16, SOLVED_BF16);
}

/// P(yes) of the claims about a picture.
fn verdicts(device: &Device, dtype: DType) -> Vec<f64> {
    let folder = built_in::tabletop().require("vlm").unwrap();
    let critic = Critic::new(Arc::new(Vlm::of(Qwen3VL::open(&folder, dtype, device).unwrap(), &folder).unwrap()));
    let sample = tasks::text_to_image(0, Split::Train, 3, 3, 3);
    let target = Target::new(sample.prompt, &sample.graph);
    let picture = Picture::from_pixels(render::render(&sample.scene));
    let answers = critic.check(&[(&picture, &target)]).unwrap();
    answers[0].iter().map(|verdict| verdict.p_yes).collect()
}

#[test]
fn verdicts_are_the_same() {
    let want = verdicts(&Device::Cpu, DType::F32);
    assert!(!want.is_empty());
    let compare = |what: &str, got: &[f64], bound: f64| {
        assert_eq!(got.len(), want.len());
        for (got, want) in got.iter().zip(&want) {
            assert!((got - want).abs() < bound, "{what}: P(yes) is {got}, not {want}");
        }
    };
    compare("by compositions", &composed(|| verdicts(&Device::Cpu, DType::F32)), F32);
    let Some(device) = cuda("verdicts on CUDA") else { return };
    compare("on CUDA", &verdicts(&device, DType::F32), F32);
}
