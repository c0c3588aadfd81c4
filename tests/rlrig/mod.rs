//! The binary as a user calls it, with untrained models small enough for tests.

// Each test file is a crate of its own and uses a part of this.
#![allow(dead_code)]

use assert_cmd::Command;
use candle_core::{DType, Device, Tensor};
use rlrig::{
    models::{Folder, Params, qwen3_vl},
    rig::prompts,
    vlm::{chat::Chat, vocabulary},
};
use serde_json::{Value, json};
use std::{
    fs,
    path::{Path, PathBuf},
    process::Output,
};
use tempfile::TempDir;

/// Trains an autoencoder of a few numbers for two steps.
pub const AUTOENCODER: &str = "
objective = 'autoencoder'
train = { steps = 2, batch = 1, evaluate_every = 0, samples_every = 0 }
[autoencoder]
block_out_channels = [4, 8]
latent_channels = 2
norm_num_groups = 2
crop = 32
statistics = 2
held_out = 1
";

pub const PROMPT: &str = "a small red ball to the left of a large blue cube";

/// A folder for one test, with a pipeline and a VLM in it.
pub struct Rig {
    pub dir: TempDir,
}

impl Rig {
    pub fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        copy(&Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/klein"), &dir.path().join("klein"));
        write_vlm(&dir.path().join("vlm"), 3);
        Self { dir }
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// `rlrig ARGS` in the folder, with no environment that could matter.
    pub fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(assert_cmd::cargo::cargo_bin!("rlrig"));
        command.current_dir(self.dir.path()).args(args);
        for name in ["HF_TOKEN", "HF_ENDPOINT", "HF_HUB_CACHE", "NO_COLOR", "RAYON_NUM_THREADS"] {
            command.env_remove(name);
        }
        // The small tokenizer cuts prompts, which is said as a warning.
        command.env("RLRIG_LOG", "error").env("HF_HOME", self.path("hf")).env("HF_HUB_OFFLINE", "1");
        command
    }

    /// `rlrig COMMAND ARGS` with the models of this folder and few steps.
    pub fn run(&self, command: &str, args: &[&str]) -> Output {
        let mut all = vec![command];
        if command != "check" {
            all.extend(["--model", "klein", "--steps", "2"]);
        }
        if command != "edit" {
            all.extend(["--vlm", "vlm"]);
        }
        all.extend(args);
        self.command(&all).output().unwrap()
    }

    /// As [`Rig::run`], which must succeed; what it wrote to stdout.
    pub fn good(&self, command: &str, args: &[&str]) -> String {
        let output = self.run(command, args);
        assert!(output.status.success(), "{command} {args:?}: {}", stderr(&output));
        String::from_utf8(output.stdout).unwrap()
    }

    /// As [`Rig::good`]: its stdout as JSON Lines.
    pub fn json(&self, command: &str, args: &[&str]) -> Vec<Value> {
        let mut all = args.to_vec();
        all.push("--json");
        self.good(command, &all).lines().map(|line| serde_json::from_str(line).unwrap()).collect()
    }

    /// As [`Rig::run`], which must fail with `code` and say `expected`, in one line without a panic.
    pub fn bad(&self, code: i32, expected: &str, command: &str, args: &[&str]) {
        let output = self.run(command, args);
        refuses(&output, code, expected, &format!("{command} {args:?}"));
    }

    /// The names in the folder that are no models.
    pub fn names(&self) -> Vec<String> {
        let entries = fs::read_dir(self.dir.path()).unwrap();
        let mut names: Vec<String> = entries.map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
        names.retain(|name| !["klein", "vlm"].contains(&name.as_str()));
        names.sort();
        names
    }
}

/// Holds a failed call to its exit code and to a clear error.
pub fn refuses(output: &Output, code: i32, expected: &str, what: &str) {
    let said = stderr(output);
    assert_eq!(output.status.code(), Some(code), "{what}: {said}");
    assert!(said.contains(expected), "{what} says\n{said}instead of {expected:?}");
    assert!(!said.contains("panicked") && output.stdout.is_empty(), "{what}: {said}");
}

pub fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

pub fn copy(from: &Path, to: &Path) {
    fs::create_dir_all(to).unwrap();
    for entry in fs::read_dir(from).unwrap() {
        let (path, to) = {
            let entry = entry.unwrap();
            (entry.path(), to.join(entry.file_name()))
        };
        if path.is_dir() {
            copy(&path, &to);
        } else {
            fs::copy(path, to).unwrap();
        }
    }
}

/// An untrained Qwen3-VL with a tokenizer of its own, as `save_pretrained` lays it out.
pub fn write_vlm(folder: &Path, seed: u64) {
    fs::create_dir_all(folder).unwrap();
    let texts = vec![prompts::verdict("red ball, blue cube", false), prompts::edit("misplaced ball", "move the ball")];
    vocabulary::train(texts, 400).unwrap().write(folder).unwrap();
    let chat = Chat::open(&Folder::from(folder)).unwrap();
    let token = |text: &str| chat.token(text).unwrap();
    let config = json!({
        "architectures": ["Qwen3VLForConditionalGeneration"],
        "image_token_id": token("<|image_pad|>"),
        "video_token_id": token("<|video_pad|>"),
        "vision_start_token_id": token("<|vision_start|>"),
        "vision_end_token_id": token("<|vision_end|>"),
        "tie_word_embeddings": true,
        "text_config": {
            "vocab_size": chat.tokenizer().get_vocab_size(true),
            "hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
            "num_key_value_heads": 1, "head_dim": 12, "tie_word_embeddings": true,
            "rope_parameters": {
                "rope_theta": 10000.0, "rope_type": "default", "mrope_interleaved": true, "mrope_section": [2, 2, 2]
            }
        },
        "vision_config": {
            "depth": 2, "hidden_size": 16, "intermediate_size": 24, "num_heads": 2, "in_channels": 3, "patch_size": 8,
            "spatial_merge_size": 2, "temporal_patch_size": 2, "out_hidden_size": 24, "num_position_embeddings": 16,
            "deepstack_visual_indexes": [0]
        }
    });
    let processor = json!({
        "image_processor_type": "Qwen2VLImageProcessor", "patch_size": 8, "merge_size": 2, "temporal_patch_size": 2,
        "size": { "shortest_edge": 1024, "longest_edge": 16384 },
        "image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5], "resample": 3
    });
    fs::write(folder.join("config.json"), config.to_string()).unwrap();
    fs::write(folder.join("preprocessor_config.json"), processor.to_string()).unwrap();
    let params = Params::fresh(seed, DType::F32, &Device::Cpu);
    let parsed: qwen3_vl::Config = serde_json::from_value(config).unwrap();
    qwen3_vl::Qwen3VL::new(&parsed, &params).unwrap();
    let tensors: std::collections::HashMap<_, _> = params.tensors().into_iter().collect();
    candle_core::safetensors::save(&tensors, folder.join("model.safetensors")).unwrap();
}

/// Writes an adapter that changes much of what a layer of so many numbers in and out gives.
pub fn write_adapter(folder: &Path, layer: &str, (inner, out): (usize, usize)) {
    fs::create_dir(folder).unwrap();
    fs::write(folder.join("adapter_config.json"), r#"{"r": 1, "lora_alpha": 1}"#).unwrap();
    let wave = |n: usize, m: usize| {
        let numbers: Vec<f32> = (0..n * m).map(|i| 0.3 * (i as f32).sin()).collect();
        Tensor::from_vec(numbers, (n, m), &Device::Cpu).unwrap()
    };
    let tensors = std::collections::HashMap::from([
        (format!("base_model.model.{layer}.lora_A.weight"), wave(1, inner)),
        (format!("base_model.model.{layer}.lora_B.weight"), wave(out, 1)),
    ]);
    candle_core::safetensors::save(&tensors, folder.join("adapter_model.safetensors")).unwrap();
}
