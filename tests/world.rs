//! `rlrig world` from the outside: export writes what the oracle reads back.

#![allow(clippy::unwrap_used)]

use assert_cmd::Command;
use rlrig::{
    eval::{
        dataset::{self, Selection, Wording},
        flaws::Flaws,
    },
    scene::{laion_sg::Record, parse::parse, tabletop::oracle},
};

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
        spatial_only: false,
        limit: None,
        subset: None,
        shard: (1, 1),
    };
    let (samples, flaws) = dataset::laion_sg(&out, "test", &all).unwrap();
    assert_eq!(flaws, Flaws::default());
    let read: Vec<_> = samples.into_iter().map(|sample| (sample.id, sample.prompt, sample.graph)).collect();
    let exported = |r: &Record| (r.img_id.clone(), r.caption_ori.clone(), r.graph());
    assert_eq!(read, records.iter().map(exported).collect::<Vec<_>>());
    // The same seed writes the same bytes; a folder in use is left alone.
    let again = folder.path().join("again");
    export(&again, "test").success();
    for name in ["test.json", "images/000003.png"] {
        assert_eq!(std::fs::read(out.join(name)).unwrap(), std::fs::read(again.join(name)).unwrap());
    }
    export(&again, "test").code(2);
    export(&folder.path().join("new"), "exam").code(2);

    let picture = out.join("images").join(&records[0].name);
    let run = rlrig().args(["world", "oracle", "--json", "--image"]).arg(&picture).assert().success();
    let document: serde_json::Value = serde_json::from_slice(&run.get_output().stdout).unwrap();
    assert_eq!(document["objects"].as_array().unwrap().len(), records[0].items.len());
    assert_eq!(document["unclear"], 0);
    rlrig().args(["world", "oracle", "--image"]).arg(&picture).assert().success();
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
