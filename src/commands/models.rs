//! `rlrig models`: what is built in, and what the hub's cache holds.

use crate::{
    cli::Models,
    io::hub::Hub,
    models::{Folder, built_in},
};
use anyhow::Result;
use serde::Serialize;
use std::io::Write;

#[derive(Serialize)]
struct Listing {
    built_in: Vec<Part>,
    missing: Vec<&'static str>,
    cache: Option<Cache>,
}

#[derive(Serialize)]
struct Part {
    name: String,
    class: String,
    megabytes: f64,
}

#[derive(Serialize)]
struct Cache {
    folder: String,
    models: Vec<String>,
}

pub fn run(args: &Models) -> Result<()> {
    let listing = listing();
    let out = &mut std::io::stdout();
    if args.json {
        writeln!(out, "{}", serde_json::to_string(&listing)?)?;
        return Ok(());
    }
    writeln!(out, "built in")?;
    for part in &listing.built_in {
        writeln!(out, "  {:<15} {:<34} {:.1} MB", part.name, part.class, part.megabytes)?;
    }
    if !listing.missing.is_empty() {
        writeln!(out, "  not in this build: {}", listing.missing.join(", "))?;
    }
    if let Some(cache) = &listing.cache {
        writeln!(out, "in the cache {}", cache.folder)?;
        for name in &cache.models {
            writeln!(out, "  {name}")?;
        }
        if cache.models.is_empty() {
            writeln!(out, "  nothing")?;
        }
    }
    Ok(())
}

fn listing() -> Listing {
    let folder = built_in::tabletop();
    let part = |name: &str| {
        let sub = folder.sub(name)?;
        let config: serde_json::Value = sub.json("config.json").ok()?;
        let class = config["_class_name"].as_str().or_else(|| config["architectures"][0].as_str()).unwrap_or("unknown");
        let megabytes = bytes(&sub) as f64 / 1e6;
        Some(Part { name: name.to_owned(), class: class.to_owned(), megabytes })
    };
    let adapter = |role: &str| {
        let sub = built_in::adapter(role)?;
        let config: serde_json::Value = sub.json("adapter_config.json").ok()?;
        let class = format!("LoRA of rank {}", config["r"]);
        Some(Part { name: format!("adapters/{role}"), class, megabytes: bytes(&sub) as f64 / 1e6 })
    };
    let parts = ["transformer", "vae", "text_encoder", "vlm"].into_iter().filter_map(part);
    let cache = Hub::from_env().ok().map(|hub| Cache { folder: hub.cache.display().to_string(), models: hub.list() });
    Listing {
        built_in: parts
            .chain([built_in::ACTOR, built_in::EDITOR, built_in::DIFFUSER].into_iter().filter_map(adapter))
            .collect(),
        missing: built_in::missing(built_in::PIPELINE).into_iter().chain(built_in::missing(built_in::VLM)).collect(),
        cache,
    }
}

fn bytes(folder: &Folder) -> usize {
    let names = ["model.safetensors", "diffusion_pytorch_model.safetensors", "adapter_model.safetensors"];
    names.iter().filter(|name| folder.has(name)).filter_map(|name| Some(folder.read(name).ok()?.len())).sum()
}
