//! `rlrig world` from the outside: export writes what the oracle reads back.

#![allow(clippy::unwrap_used)]

use assert_cmd::Command;
use rlrig::{
    eval::{
        dataset::{self, Selection},
        flaws::Flaws,
        wording::Wording,
    },
    io::png,
    scene::{
        laion_sg::Record,
        parse::parse,
        tabletop::{oracle, render::render, world::Scene},
    },
};
use std::{process::Stdio, time::Duration};

fn rlrig() -> Command {
    Command::cargo_bin("rlrig").unwrap()
}

#[test]
fn export_writes_records_that_the_oracle_confirms() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("export");
    let export = |out: &std::path::Path, split: &str| {
        let args = ["world", "export", "--split", split, "--count", "12", "--seed", "5", "--out"];
        rlrig().args(args).arg(out).assert()
    };
    export(&out, "test").success();
    let text = std::fs::read_to_string(out.join("test.json")).unwrap();
    let records: Vec<Record> = serde_json::from_str(&text).unwrap();
    assert_eq!(records.len(), 12);
    for record in &records {
        let image = image::open(out.join("images").join(&record.name)).unwrap().into_rgb8();
        assert_eq!(image.dimensions(), (128, 128));
        assert_eq!(parse(&record.caption_ori).unwrap(), record.graph());
        let judgement = oracle::judge(&image, &record.graph());
        assert!(judgement.perfect(), "{}: {judgement:?}", record.caption_ori);
    }
    // `rlrig eval` reads the same.
    let all = Selection {
        wording: Wording::Caption,
        min_relations: 0,
        min_objects: 0,
        predicates: Vec::new(),
        spatial_only: false,
        limit: None,
        subset: None,
        shard: (1, 1),
    };
    let (samples, flaws) = dataset::laion_sg(&out, "test", &all).unwrap();
    assert_eq!(flaws, Flaws::default());
    let read: Vec<_> =
        samples.iter().map(Result::unwrap).map(|sample| (sample.id, sample.prompt, sample.graph)).collect();
    let exported = |r: &Record| (r.img_id.clone(), r.caption_ori.clone(), r.graph());
    assert_eq!(read, records.iter().map(exported).collect::<Vec<_>>());
    // The same seed writes the same bytes; a folder in use is left alone.
    let again = folder.path().join("again");
    export(&again, "test").success();
    for name in ["test.json", "images/000003.png"] {
        assert_eq!(std::fs::read(out.join(name)).unwrap(), std::fs::read(again.join(name)).unwrap());
    }
    let new = folder.path().join("new");
    let none = rlrig().args(["world", "export", "--count", "0", "--out"]).arg(&new).assert();
    for (call, expected) in [
        (export(&again, "test"), "again is not empty; name a new folder"),
        (export(&again.join("test.json"), "test"), "test.json is a file, not a folder"),
        (export(&new, "exam"), "unknown split \"exam\"; known are train"),
        (none, "--count is 1 or more"),
    ] {
        let said = String::from_utf8_lossy(&call.code(2).get_output().stderr).into_owned();
        assert!(said.contains(expected), "{said}");
    }
    assert!(!new.exists());

    let picture = out.join("images").join(&records[0].name);
    let run = rlrig().args(["world", "oracle", "--json", "--image"]).arg(&picture).assert().success();
    let document: serde_json::Value = serde_json::from_slice(&run.get_output().stdout).unwrap();
    assert_eq!(document["objects"].as_array().unwrap().len(), records[0].items.len());
    assert_eq!(document["unclear"], 0);
    rlrig().args(["world", "oracle", "--image"]).arg(&picture).assert().success();
}

#[cfg(unix)]
#[test]
fn an_export_that_is_interrupted_leaves_whole_pictures() {
    let folder = tempfile::tempdir().unwrap();
    let images = folder.path().join("export/images");
    let mut child = std::process::Command::new(assert_cmd::cargo::cargo_bin!("rlrig"))
        .args(["world", "export", "--count", "1000000", "--out"])
        .arg(folder.path().join("export"))
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    while std::fs::read_dir(&images).map_or(0, Iterator::count) < 20 {
        assert!(child.try_wait().unwrap().is_none(), "it ended early");
        std::thread::sleep(Duration::from_millis(5));
    }
    let kill = std::process::Command::new("kill").args(["-INT", &child.id().to_string()]).status();
    assert!(kill.unwrap().success());
    let output = child.wait_with_output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.code() == Some(1) && said.contains("interrupted"), "{said}");
    for file in std::fs::read_dir(&images).unwrap().map(|entry| entry.unwrap().path()) {
        assert!(!file.file_name().unwrap().to_string_lossy().starts_with('.'), "{}", file.display());
        png::read(&file).unwrap();
    }
}

#[test]
fn what_is_drawn_over_comes_with_the_scene_that_it_should_show() {
    let folder = tempfile::tempdir().unwrap();
    let redraw = |name: &str, more: &[&str]| {
        let args = ["world", "redraw", "--count", "3", "--seed", "5", "--quiet", "--out"];
        rlrig().args(args).arg(folder.path().join(name)).args(more).assert()
    };
    redraw("redrawn", &[]).success();
    let out = folder.path().join("redrawn");
    let lines = std::fs::read_to_string(out.join("samples.jsonl")).unwrap();
    let lines: Vec<serde_json::Value> = lines.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!(lines.len(), 3);
    for line in &lines {
        let scene: Scene = serde_json::from_value(line["scene"].clone()).unwrap();
        let graph = parse(line["prompt"].as_str().unwrap()).unwrap();
        assert!(oracle::judge(&render(&scene), &graph).objects.iter().all(|there| *there));
        // Noised and drawn anew, it is another picture, of the same things mostly in the same places.
        let picture = png::read(&out.join(line["file"].as_str().unwrap())).unwrap();
        assert!((0.001..0.2).contains(&distance(&picture, &render(&scene))));
    }
    // The same seed draws the same bytes; a folder in use is left alone, and a count of none and an unknown split are refused.
    redraw("again", &[]).success();
    for name in ["samples.jsonl", lines[2]["file"].as_str().unwrap()] {
        assert_eq!(
            std::fs::read(out.join(name)).unwrap(),
            std::fs::read(folder.path().join("again").join(name)).unwrap()
        );
    }
    redraw("redrawn", &[]).code(2);
    redraw("none", &["--split", "none"]).code(2);
    assert!(!folder.path().join("none").exists());
}

/// The root mean square of the difference of two pictures' pixels, in 0..=1.
fn distance(a: &image::RgbImage, b: &image::RgbImage) -> f64 {
    let squares = a.as_raw().iter().zip(b.as_raw()).map(|(a, b)| (f64::from(*a) - f64::from(*b)).powi(2));
    (squares.sum::<f64>() / a.as_raw().len() as f64).sqrt() / 255.0
}

#[test]
fn the_oracle_refuses_what_is_no_picture() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("text.png");
    std::fs::write(&file, "not a picture").unwrap();
    for path in [file, folder.path().join("missing.png")] {
        let run = rlrig().args(["world", "oracle", "--image"]).arg(&path).assert().code(1);
        let stderr = String::from_utf8_lossy(&run.get_output().stderr).to_string();
        assert!(stderr.contains(&*path.to_string_lossy()), "{stderr}");
    }
}
