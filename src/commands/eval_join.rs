//! `rlrig eval compare`, `merge` and `calibrate`: runs that are already made.

use super::{eval::shard_numbers, show::Console};
use crate::{
    cli::{EvalCalibrate, EvalCompare, EvalMerge},
    eval::{
        compare::{self, Compared, Side},
        folder::{Folder, different},
        line::Line,
        metrics::Answer,
        modes::Mode,
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
use sha2::{Digest, Sha256};
use std::{
    collections::{BTreeMap, BTreeSet, HashSet},
    path::{Path, PathBuf},
};

/// Paired differences of the modes that both runs have, or of the two that are named.
pub fn compare(args: &EvalCompare) -> Result<()> {
    let console = Console::new(true, 0);
    let ((a, side_a), (b, side_b)) = (side(&args.a)?, side(&args.b)?);
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
    let both: Vec<(Side, Side)> = match (side_a, side_b) {
        (None, None) => {
            has(lines_a).intersection(&has(lines_b)).map(|mode| (Side::from(*mode), Side::from(*mode))).collect()
        }
        // The rounds of one are not those of the other.
        (a, b) => {
            let other = |one: Side| Side::from(one.mode);
            a.or(b).map(|one| (a.unwrap_or(other(one)), b.unwrap_or(other(one)))).into_iter().collect()
        }
    };
    for (side, lines) in both.iter().flat_map(|(a, b)| [(a, lines_a), (b, lines_b)]) {
        match (side.rounds, compare::most_rounds(side.mode, lines)) {
            (Some(rounds), most @ 1..) if rounds > most => {
                usage!("{side}: {} has results after 1 to {most} rounds", side.mode.name())
            }
            _ => {}
        }
    }
    let compared: Vec<Compared> =
        both.into_iter().flat_map(|(a, b)| compare::compare((a, lines_a), (b, lines_b))).collect();
    if compared.is_empty() {
        usage!("{} and {} have no prompt of the same seed in common, in the modes asked for", args.a, args.b);
    }
    let mut notes: Vec<String> = other_judge(&config_a, &config_b).into_iter().collect();
    for (name, _) in [(a, &folder_a), (b, &folder_b)].iter().filter(|(_, folder)| !folder.is_finished()) {
        notes.push(format!("{name} is not finished: prompts that are accepted early, the easier ones, are made first"));
    }
    if config_a["rlrig"] != config_b["rlrig"] {
        let version = |config: &Value| config["rlrig"].as_str().unwrap_or("an older version").to_owned();
        notes.push(format!("The runs are of rlrig {} and {}", version(&config_a), version(&config_b)));
    }
    if args.json {
        notes.iter().for_each(|note| note!("{note}"));
        console.result(&serde_json::to_string(&compared)?)?;
        return Ok(());
    }
    console.result("| A | B | metric | prompts | A | B | B - A | p |\n|---|---|---|---|---|---|---|---|")?;
    for Compared { a, b, metric, mean_a, mean_b, difference } in &compared {
        let (e, p) = (difference.estimate, difference.p);
        let [mean_a, mean_b] = [mean_a, mean_b].map(|e| format!("{:.3} ({:.3} to {:.3})", e.mean, e.lo, e.hi));
        console.result(&format!(
            "| {} | {} | {metric} | {} | {mean_a} | {mean_b} | {:+.3} ({:+.3} to {:+.3}) | {p:.4} |",
            a, b, e.n, e.mean, e.lo, e.hi
        ))?;
    }
    for note in notes {
        console.result(&format!("\n{note}"))?;
    }
    Ok(())
}

/// A warning if it is not the same who judges the pictures of two runs.
fn other_judge(a: &Value, b: &Value) -> Option<String> {
    // Without a judge apart the Checker judges. With one it is a part of the loop, and may be another.
    let settings: &[&str] = match [a, b].map(|run| run["judge"].is_null()) {
        [true, true] => &["vlm", "looks", "calibration"],
        [false, false] => &["judge", "judge_looks", "judge_calibration"],
        _ => &["judge"],
    };
    let others: Vec<&str> = settings.iter().copied().filter(|key| a[*key] != b[*key]).collect();
    (!others.is_empty()).then(|| {
        format!(
            "The runs differ in {}: judge_* and the IoUs without oracle_ are not measured alike, the oracle's metrics are",
            others.join(", ")
        )
    })
}

/// A folder, behind a colon a mode, and behind an `@` rounds.
fn side(text: &str) -> Result<(&str, Option<Side>)> {
    let Some((folder, of)) = text.rsplit_once(':').filter(|_| !Path::new(text).is_dir()) else {
        return Ok((text, None));
    };
    let (name, rounds) = match of.split_once('@') {
        Some((name, rounds)) => match rounds.parse() {
            Ok(rounds @ 1..) => (name, Some(rounds)),
            _ => usage!("{text}: behind the @ is how many rounds, from 1, not \"{rounds}\""),
        },
        None => (of, None),
    };
    match Mode::ALL.into_iter().find(|mode| mode.name() == name) {
        Some(mode) => Ok((folder, Some(Side { mode, rounds }))),
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
    let Some((first_part, first)) = parts.first() else { usage!("name the folders of the shards") };
    for ((_, config), path) in parts.iter().zip(&args.parts) {
        if let Some(key) = different(first, config, &["shard"]) {
            usage!("{} is no part of the same evaluation: its {key} is another", path.display());
        }
    }
    complete(&parts, &args.parts)?;
    let mut config = first.clone();
    config["shard"] = Value::Null;
    // Each part has read the whole data, so what the first found is what there is.
    let (versions, flaws) = first_part.versions_and_flaws()?;
    for ((part, _), path) in parts.iter().zip(&args.parts) {
        let (other, _) = part.versions_and_flaws()?;
        if other != versions {
            let first = args.parts[0].display();
            usage!("{} was made by other versions than {first}: {other} instead of {versions}", path.display());
        }
    }
    let results = Folder::join(&args.out, &parts, config, versions, flaws)?;
    Console::new(true, 0).result(table::markdown(&results).trim_end())?;
    Ok(())
}

/// A claim about a picture, told by the digest of its file.
type Asked = ([u8; 32], Claim);

/// What the Checker said of a run's claims before its calibration, and whether the oracle agrees; each claim about a picture
/// once, though modes and runs share drawings.
fn answers(folder: &Folder, calibration: &Calibration, seen: &mut HashSet<Asked>) -> Result<Vec<(Claim, f64, bool)>> {
    let mut said = Vec::new();
    for line in folder.lines() {
        let p_of = |object: &str| {
            let is = |a: &&Answer| matches!(&a.claim, Claim::Object(o) if o == object);
            line.claims.iter().find(is).map(|a| a.checker)
        };
        // A calibrated relation that is held to its object's probability does not tell its own.
        let capped = |answer: &Answer| match &answer.claim {
            Claim::Relation { subject, object, .. } if *calibration != Calibration::default() => {
                [subject, object].iter().any(|o| p_of(o) == Some(answer.checker))
            }
            _ => false,
        };
        let told = line.claims.iter().filter(|answer| !capped(answer));
        let told: Vec<(&Answer, bool)> = told.filter_map(|answer| Some((answer, answer.oracle?))).collect();
        if told.is_empty() {
            continue;
        }
        let picture: [u8; 32] = Sha256::digest(folder.picture(line)?).into();
        for (Answer { claim, checker, .. }, truth) in told {
            if seen.insert((picture, claim.clone())) {
                said.push((claim.clone(), calibration.of(claim).undo(*checker), truth));
            }
        }
    }
    Ok(said)
}

/// Fits the Checker's calibration to the oracle's truths in some runs.
pub fn calibrate(args: &EvalCalibrate) -> Result<()> {
    let (mut said, mut seen) = (Vec::new(), HashSet::new());
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
        said.extend(answers(&folder, &before, &mut seen)?);
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
    note!("expected calibration error of these {} claims: {raw:.3} before, {fitted:.3} after", said.len());
    let json = serde_json::to_string_pretty(&found)? + "\n";
    match &args.out {
        Some(path) => io::write_file(path, json.as_bytes(), args.force),
        None => Ok(console.result(json.trim_end())?),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::eval::line::tests::mended;
    use image::{Rgb, RgbImage};
    use std::ops::Range;

    #[test]
    fn a_claim_about_a_picture_counts_once_in_all_runs() {
        let dir = tempfile::tempdir().unwrap();
        let run = |name: &str, mode: Mode, prompts: Range<u8>| {
            let mut folder = Folder::create(&dir.path().join(name), &json!({})).unwrap();
            for i in prompts {
                // All modes begin with the same drawing.
                let pictures = [0, 1].map(|round| RgbImage::from_pixel(2, 2, Rgb([i, round, 0])));
                folder.keep(mended(i.into(), mode), &pictures.each_ref()).unwrap();
            }
            folder
        };
        let claims = |folder: &Folder| folder.lines().iter().map(|line| line.claims.len()).sum::<usize>();
        let (a, b, c) = (run("a", Mode::Loop, 0..3), run("b", Mode::Diffuser, 0..3), run("c", Mode::Loop, 2..5));
        let mut seen = HashSet::new();
        let mut said = |folder: &Folder| answers(folder, &Calibration::default(), &mut seen).unwrap().len();
        assert_eq!((said(&a), said(&b)), (claims(&a), 0));
        assert_eq!(said(&c), claims(&c) - claims(&run("shared", Mode::Loop, 2..3)));
    }

    #[test]
    fn a_judge_that_is_another_is_named() {
        let checked = json!({ "judge": null, "vlm": "a", "looks": 3, "calibration": {} });
        let judged = json!({ "judge": "j", "vlm": "a", "looks": 3, "judge_looks": 1, "judge_calibration": {} });
        let with = |config: &Value, key: &str, value: &str| {
            let mut config = config.clone();
            config[key] = value.into();
            config
        };
        assert_eq!(other_judge(&checked, &with(&checked, "rounds", "8")), None);
        assert!(other_judge(&checked, &with(&checked, "vlm", "b")).unwrap().contains("differ in vlm:"));
        assert_eq!(other_judge(&judged, &with(&with(&judged, "vlm", "b"), "looks", "1")), None, "it is no judge");
        assert!(other_judge(&judged, &with(&judged, "judge", "k")).unwrap().contains("differ in judge:"));
        assert!(other_judge(&checked, &judged).unwrap().contains("differ in judge:"));
    }
}
