//! `rlrig eval compare`, `merge` and `calibrate`: runs that are already made.

use super::{eval::shard_numbers, show::Console};
use crate::{
    cli::{EvalCalibrate, EvalCompare, EvalMerge},
    eval::{
        compare::{self, Compared},
        folder::{Folder, different},
        line::Line,
        metrics::Answer,
        modes::Mode,
        results::distinct,
        table,
    },
    io,
    rig::{
        calibration::{Calibration, calibration_error},
        roles::Claim,
    },
    usage,
};
use anyhow::{Context, Result};
use serde_json::{Value, json};
use std::{
    collections::{BTreeMap, BTreeSet},
    path::{Path, PathBuf},
};

/// Paired differences of the modes that both runs have, or of the two that are named.
pub fn compare(args: &EvalCompare) -> Result<()> {
    let console = Console::new(true, 0);
    let ((a, mode_a), (b, mode_b)) = (side(&args.a)?, side(&args.b)?);
    let ((folder_a, config_a), (folder_b, config_b)) = (Folder::open(Path::new(a))?, Folder::open(Path::new(b))?);
    // Older runs say nothing of it: theirs were confirmed.
    let graph = |config: &Value| config["graph"].as_str().unwrap_or("confirmed").to_owned();
    if graph(&config_a) != graph(&config_b) {
        usage!(
            "{a} and {b} measure another SG-IoU: that of a {} graph, and of a {} one",
            graph(&config_a),
            graph(&config_b)
        );
    }
    let (lines_a, lines_b) = (folder_a.lines(), folder_b.lines());
    let has = |lines: &[Line]| lines.iter().map(|line| line.mode).collect::<BTreeSet<Mode>>();
    let both: Vec<(Mode, Mode)> = match (mode_a, mode_b) {
        (None, None) => has(lines_a).intersection(&has(lines_b)).map(|mode| (*mode, *mode)).collect(),
        (a, b) => a.or(b).map(|either| (a.unwrap_or(either), b.unwrap_or(either))).into_iter().collect(),
    };
    let compared: Vec<Compared> =
        both.into_iter().flat_map(|(a, b)| compare::compare((a, lines_a), (b, lines_b))).collect();
    if compared.is_empty() {
        usage!("{} and {} have no prompt in common in the modes asked for", args.a, args.b);
    }
    if args.json {
        console.result(&serde_json::to_string(&compared)?)?;
        return Ok(());
    }
    console.result("| A | B | metric | prompts | A | B | B - A | p |\n|---|---|---|---|---|---|---|---|")?;
    for Compared { a, b, metric, mean_a, mean_b, difference } in &compared {
        let (e, p) = (difference.estimate, difference.p);
        console.result(&format!(
            "| {} | {} | {metric} | {} | {mean_a:.3} | {mean_b:.3} | {:+.3} ({:+.3} to {:+.3}) | {p:.4} |",
            a.name(),
            b.name(),
            e.n,
            e.mean,
            e.lo,
            e.hi
        ))?;
    }
    Ok(())
}

/// A folder, and a mode behind a colon.
fn side(text: &str) -> Result<(&str, Option<Mode>)> {
    let Some((folder, name)) = text.rsplit_once(':').filter(|_| !Path::new(text).is_dir()) else {
        return Ok((text, None));
    };
    match Mode::ALL.into_iter().find(|mode| mode.name() == name) {
        Some(mode) => Ok((folder, Some(mode))),
        None => {
            let known = Mode::ALL.map(Mode::name).join(", ");
            usage!("{text}: there is no folder of this name, and \"{name}\" is no mode; known are {known}")
        }
    }
}

/// Whether all shards of one number are there, each of them finished.
fn complete(parts: &[(Folder, Value)], paths: &[PathBuf]) -> Result<()> {
    let mut found: BTreeMap<usize, &Path> = BTreeMap::new();
    let mut of = 0;
    for ((folder, config), path) in parts.iter().zip(paths) {
        let Some((i, n)) = config["shard"].as_str().and_then(shard_numbers) else {
            usage!("{} is no shard: it was made without --shard", path.display());
        };
        if !folder.is_finished() {
            usage!("{} is not finished; go on with it by rlrig eval .. --out {0} --resume", path.display());
        }
        if of != 0 && of != n {
            usage!("{} is one of {n} shards, and {} one of {of}", path.display(), paths[0].display());
        }
        of = n;
        if let Some(other) = found.insert(i, path) {
            usage!("{} and {} are both shard {i}/{n}", other.display(), path.display());
        }
    }
    if found.len() < of {
        let missing = (1..=of).filter(|i| !found.contains_key(i)).map(|i| format!("{i}/{of}"));
        let first: Vec<String> = missing.take(8).collect();
        let more = if of - found.len() > first.len() { ", .." } else { "" };
        usage!("shards {}{more} are missing: a part would pass for the whole", first.join(", "));
    }
    Ok(())
}

/// Joins shards into one run, with the documents of the whole.
pub fn merge(args: &EvalMerge) -> Result<()> {
    let mut parts = Vec::new();
    for path in &args.parts {
        parts.push(Folder::open(path)?);
    }
    let Some((_, first)) = parts.first() else { usage!("name the folders of the shards") };
    for ((_, config), path) in parts.iter().zip(&args.parts) {
        if let Some(key) = different(first, config, &["shard"]) {
            usage!("{} is no part of the same evaluation: its {key} is another", path.display());
        }
    }
    complete(&parts, &args.parts)?;
    let mut config = first.clone();
    config["shard"] = Value::Null;
    let mut whole = Folder::create(&args.out, &config)?;
    for (part, _) in &parts {
        whole.take(part)?;
    }
    let versions = json!({ "rlrig": env!("CARGO_PKG_VERSION") });
    // Each part has read the whole data, so what the first found is what there is.
    let flaws = parts.first().map_or(Ok(Value::Null), |(part, _)| part.flaws())?;
    let results = whole.finish(config, versions, flaws)?;
    Console::new(true, 0).result(table::markdown(&results).trim_end())?;
    Ok(())
}

/// Fits the Checker's calibration to the oracle's truths in some runs.
pub fn calibrate(args: &EvalCalibrate) -> Result<()> {
    let mut said: Vec<(Claim, f64, bool)> = Vec::new();
    let mut first: Option<Value> = None;
    for path in &args.runs {
        let (folder, config) = Folder::open(path)?;
        let whose = |config: &Value| ["vlm", "looks", "dtype"].map(|key| config[key].clone());
        if let Some(first) = first.as_ref().filter(|first| whose(first) != whose(&config)) {
            let (a, b) = (json!(whose(first)), json!(whose(&config)));
            usage!("{}: its Checker (VLM, looks, dtype) is another: {b} instead of {a}", path.display());
        }
        // Runs are fitted to what the VLM itself said in them.
        let before: Calibration = match &config["calibration"] {
            Value::Null => Calibration::default(),
            told => {
                serde_json::from_value(told.clone()).with_context(|| format!("the config of {}", path.display()))?
            }
        };
        for line in distinct(folder.lines()) {
            let p_of = |object: &str| {
                let is = |a: &&Answer| matches!(&a.claim, Claim::Object(o) if o == object);
                line.claims.iter().find(is).map(|a| a.checker)
            };
            for answer in &line.claims {
                // A calibrated relation that is held to its object's probability does not tell its own.
                let capped = match &answer.claim {
                    Claim::Relation { subject, object, .. } if before != Calibration::default() => {
                        [subject, object].iter().any(|o| p_of(o) == Some(answer.checker))
                    }
                    _ => false,
                };
                let p = before.of(&answer.claim).undo(answer.checker);
                said.extend(answer.oracle.filter(|_| !capped).map(|truth| (answer.claim.clone(), p, truth)));
            }
        }
        first.get_or_insert(config);
    }
    if said.is_empty() {
        usage!("there is no claim in these runs of which the pixel oracle tells the truth");
    }
    let found = Calibration::fit(said.iter().map(|(claim, p, truth)| (claim, *p, *truth)));
    let console = Console::new(true, 0);
    let error = |of: &dyn Fn(&Claim, f64) -> f64| {
        calibration_error(&said.iter().map(|(claim, p, truth)| (of(claim, *p), *truth)).collect::<Vec<_>>())
    };
    let (raw, fitted) = (error(&|_, p| p), error(&|claim, p| found.of(claim).apply(p)));
    eprintln!("expected calibration error of these {} claims: {raw:.3} before, {fitted:.3} after", said.len());
    let json = serde_json::to_string_pretty(&found)? + "\n";
    match &args.out {
        Some(path) => io::write_file(path, json.as_bytes(), args.force),
        None => Ok(console.result(json.trim_end())?),
    }
}
