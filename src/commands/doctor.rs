//! `rlrig doctor`: what this machine has, and what would run on it.

use crate::{
    cli::Doctor,
    io::hub::Hub,
    models::built_in,
    tensor::device::{Accelerator, describe},
};
use anyhow::Result;
use serde::Serialize;
use std::{io::Write, path::Path};

#[derive(Serialize)]
struct Report {
    rlrig: &'static str,
    system: String,
    threads: usize,
    /// Instructions that the CPU has and this binary was built for.
    cpu: Vec<&'static str>,
    memory_gib: Option<f64>,
    memory_free_gib: Option<f64>,
    devices: Vec<Device>,
    cache: Option<String>,
    cache_writable: bool,
    offline: bool,
    built_in: Option<String>,
    /// What would not work, and why.
    problems: Vec<String>,
}

#[derive(Serialize)]
struct Device {
    name: &'static str,
    usable: bool,
    /// Whether `--device auto` takes it: the first that is usable.
    chosen: bool,
    /// What it is, or why it is not usable.
    note: Option<String>,
}

pub fn run(args: &Doctor) -> Result<()> {
    let report = examine();
    let out = &mut std::io::stdout();
    if args.json {
        writeln!(out, "{}", serde_json::to_string(&report)?)?;
        return Ok(());
    }
    let gib = |value: Option<f64>| value.map_or("unknown".to_owned(), |v| format!("{v:.1} GiB"));
    writeln!(out, "rlrig     {} on {}", report.rlrig, report.system)?;
    writeln!(out, "cpu       {} threads, built for {}", report.threads, report.cpu.join(" "))?;
    writeln!(out, "memory    {}, {} free", gib(report.memory_gib), gib(report.memory_free_gib))?;
    for device in &report.devices {
        let state = match device {
            Device { chosen: true, .. } => "usable, and what --device auto takes",
            Device { usable: true, .. } => "usable",
            _ => "not usable",
        };
        let note = device.note.as_ref().map_or(String::new(), |note| format!(" ({note})"));
        writeln!(out, "device    {}: {state}{note}", device.name)?;
    }
    if let Some(cache) = &report.cache {
        let offline = if report.offline { ", offline" } else { "" };
        writeln!(out, "cache     {cache}{offline}")?;
    }
    writeln!(out, "built in  {}", report.built_in.as_deref().unwrap_or("no trained models"))?;
    for problem in &report.problems {
        writeln!(out, "problem   {problem}")?;
    }
    if report.problems.is_empty() {
        writeln!(out, "all commands work")?;
    }
    Ok(())
}

fn examine() -> Report {
    let mut problems = Vec::new();
    let missing: Vec<&str> =
        built_in::missing(built_in::PIPELINE).into_iter().chain(built_in::missing(built_in::VLM)).collect();
    if !missing.is_empty() {
        problems.push(format!(
            "the built-in models are not whole ({}): generate, edit and check need --model and --vlm",
            missing.join(", ")
        ));
    }
    let hub = match Hub::from_env() {
        Ok(hub) => Some(hub),
        Err(error) => {
            problems.push(format!("{error:#}"));
            None
        }
    };
    let cache_writable = hub.as_ref().is_some_and(|hub| writable(&hub.cache));
    if let Some(hub) = hub.as_ref().filter(|_| !cache_writable) {
        problems.push(format!("the model cache {} cannot be written to: hub ids will not work", hub.cache.display()));
    }
    let (memory_gib, memory_free_gib) = memory();
    if memory_free_gib.is_some_and(|free| free < 1.0) {
        problems.push("less than 1 GiB of memory is free, which the built-in models may need".to_owned());
    }
    Report {
        rlrig: env!("CARGO_PKG_VERSION"),
        system: format!("{} {}", std::env::consts::OS, std::env::consts::ARCH),
        threads: rayon::current_num_threads(),
        cpu: instructions(),
        memory_gib,
        memory_free_gib,
        devices: devices(),
        cache: hub.as_ref().map(|hub| hub.cache.display().to_string()),
        cache_writable,
        offline: hub.is_some_and(|hub| hub.offline),
        built_in: missing.is_empty().then(|| "a FLUX.2-klein and a Qwen3-VL of the tabletop world".to_owned()),
        problems,
    }
}

/// All kinds in the order in which `--device auto` tries them.
fn devices() -> Vec<Device> {
    let mut all: Vec<Device> = Accelerator::PREFERRED
        .into_iter()
        .map(|kind| match kind.open() {
            Ok(device) => Device { name: kind.name(), usable: true, chosen: false, note: describe(&device) },
            Err(reason) => Device { name: kind.name(), usable: false, chosen: false, note: Some(reason) },
        })
        .collect();
    all.push(Device { name: "cpu", usable: true, chosen: false, note: None });
    if let Some(first) = all.iter_mut().find(|device| device.usable) {
        first.chosen = true;
    }
    all
}

fn instructions() -> Vec<&'static str> {
    let known = [
        ("avx2", cfg!(target_feature = "avx2")),
        ("fma", cfg!(target_feature = "fma")),
        ("avx512f", cfg!(target_feature = "avx512f")),
        ("avx512bf16", cfg!(target_feature = "avx512bf16")),
        ("neon", cfg!(target_feature = "neon")),
    ];
    let built: Vec<&str> = known.into_iter().filter(|(_, built)| *built).map(|(name, _)| name).collect();
    if built.is_empty() { vec!["the plainest CPU of its kind"] } else { built }
}

/// Memory in all and free, where the system tells it as Linux does.
fn memory() -> (Option<f64>, Option<f64>) {
    let text = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let gib = |name: &str| {
        let line = text.lines().find_map(|line| line.strip_prefix(name))?;
        let kib: f64 = line.trim_start_matches(':').split_whitespace().next()?.parse().ok()?;
        Some(kib / f64::from(1 << 20))
    };
    (gib("MemTotal"), gib("MemAvailable"))
}

/// Whether `folder`, or the nearest one above it that exists, can be written to.
fn writable(folder: &Path) -> bool {
    let there = folder.ancestors().find(|path| path.exists());
    there.is_some_and(|path| path.is_dir() && tempfile::tempfile_in(path).is_ok())
}
