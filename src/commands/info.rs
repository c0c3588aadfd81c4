//! `rlrig info`: what a PNG says of itself.

use super::show::{claim, printable};
use crate::{
    cli::Info,
    io::png,
    rig::{
        cycle::Action,
        trajectory::{Source, Trajectory, is_edit},
    },
    usage,
};
use anyhow::{Context, Result};
use serde_json::Value;
use std::io::Write;

pub fn run(args: &Info) -> Result<()> {
    let texts = png::read_texts(&args.file)?;
    let out = &mut std::io::stdout();
    let chunk = texts.iter().find(|(keyword, _)| keyword == png::CHUNK).map(|(_, text)| text);
    if args.json {
        let Some(text) = chunk else { usage!("{} carries no recipe of rlrig", args.file.display()) };
        let value: Value =
            serde_json::from_str(text).with_context(|| format!("the recipe of {} is damaged", args.file.display()))?;
        writeln!(out, "{}", serde_json::to_string_pretty(&value)?)?;
        return Ok(());
    }
    // Of an edit, the words for other tools say what there is to say.
    if let Some(text) = chunk.filter(|text| !is_edit(text)) {
        let trajectory =
            Trajectory::from_json(text).with_context(|| format!("the recipe of {}", args.file.display()))?;
        return show(out, &trajectory);
    }
    if texts.is_empty() {
        usage!("{} carries no text at all", args.file.display());
    }
    let edit = chunk.and_then(|text| serde_json::from_str::<Value>(text).ok());
    if let Some(words) = edit.as_ref().and_then(|edit| edit["edit"]["carried_out_as"].as_str()) {
        writeln!(out, "carried out as: {}", printable(words))?;
    }
    for (keyword, text) in texts.iter().filter(|(keyword, _)| keyword != png::CHUNK) {
        writeln!(out, "{}: {}", printable(keyword), printable(text))?;
    }
    Ok(())
}

fn show(out: &mut impl Write, t: &Trajectory) -> Result<()> {
    let r = &t.recipe;
    let source = |s: &Source| match &s.revision {
        Some(revision) => format!("{} at {revision}", s.name),
        None => s.name.clone(),
    };
    let editor = r.inversion.as_ref().map_or(r.editor.clone(), |inversion| format!("{} ({inversion})", r.editor));
    let mut lines = vec![
        ("prompt", t.target.prompt.clone()),
        ("result", format!("{}, round {} of {}", t.ending.words(), t.best + 1, t.turns.len())),
        ("seed", r.seed.to_string()),
        ("sampling", format!("{} steps by {}, guidance {}, {}", r.steps, r.solver.name(), r.guided(), r.dtype)),
        ("editor", editor),
        ("loop", r.cycle()),
        ("model", source(&r.model)),
        ("vlm", source(&r.vlm)),
        ("made by", format!("rlrig {}", t.rlrig)),
    ];
    lines.splice(1..1, t.target.drawn_as.iter().map(|words| ("drawn as", words.clone())));
    lines.extend(r.adapters.iter().map(|adapter| ("adapter", adapter.clone())));
    lines.extend(r.init_noise.iter().map(|hash| ("noise", format!("from a file, SHA-256 {hash}"))));
    for (name, value) in lines {
        writeln!(out, "{name:<9} {}", printable(&value))?;
    }
    for (i, turn) in t.turns.iter().enumerate() {
        let score = turn.score.map_or(String::new(), |score| format!(", score {score:.3}"));
        let best = if i == t.best { ", the result" } else { "" };
        writeln!(out, "\nround {}{score}{best}", i + 1)?;
        if let Action::Edit { source, instruction, thought } = &turn.action {
            if !thought.is_empty() {
                writeln!(out, "  reflection: {}", printable(thought))?;
            }
            writeln!(out, "  edit of round {}: {}", source + 1, printable(instruction))?;
        }
        for v in &turn.verdicts {
            let word = if v.yes { "yes" } else { "no " };
            writeln!(out, "  {word} {:.2}  {}", v.p_yes, claim(v))?;
        }
    }
    Ok(())
}
