//! `rlrig eval` on a file: a run is tied to its file's name and size, not to its folder, and its shards to one version.

#![allow(clippy::unwrap_used)]

mod rlrig;

use rlrig::Rig;
use std::{fs, path::Path, process::Output};

/// Evaluates the Diffuser on LAION-SG's flawed file of a folder into `out`, with more arguments.
fn eval(rig: &Rig, folder: &str, out: &str, more: &[&str]) -> Output {
    let data = format!("{folder}/flawed.json");
    let on = ["--dataset", "laion-sg", "--data", &data, "--limit", "4", "--mode", "diffuser", "--out", out];
    rig.run("eval", &[&on[..], more].concat())
}

fn merge(rig: &Rig, parts: [&str; 2], out: &str) -> Output {
    rig.command(&["eval", "merge", parts[0], parts[1], "--out", out]).output().unwrap()
}

fn succeeds(output: &Output) {
    assert!(output.status.success(), "{}", rlrig::stderr(output));
}

#[test]
fn data_is_known_by_its_name_and_size() {
    let rig = Rig::new();
    let flawed = fs::read(Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/laion_sg/flawed.json")).unwrap();
    for (folder, more) in [("here", ""), ("there", ""), ("longer", "\n")] {
        fs::create_dir(rig.path(folder)).unwrap();
        fs::write(rig.path(folder).join("flawed.json"), [&flawed[..], more.as_bytes()].concat()).unwrap();
    }
    succeeds(&eval(&rig, "here", "a", &["--shard", "1/2"]));
    succeeds(&eval(&rig, "there", "b", &["--shard", "2/2"]));
    succeeds(&merge(&rig, ["a", "b"], "joined"));
    succeeds(&eval(&rig, "here", "b", &["--shard", "2/2", "--resume"]));
    let longer = eval(&rig, "longer", "b", &["--shard", "2/2", "--resume"]);
    rlrig::refuses(&longer, 2, "begun with another data", "another file");
    succeeds(&eval(&rig, "longer", "c", &["--shard", "2/2"]));
    rlrig::refuses(&merge(&rig, ["a", "c"], "half"), 2, "its data is another", "another file");
}

#[test]
fn shards_of_other_versions_are_refused() {
    let rig = Rig::new();
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/laion_sg");
    let folder = folder.to_str().unwrap();
    succeeds(&eval(&rig, folder, "a", &["--shard", "1/2"]));
    succeeds(&eval(&rig, folder, "b", &["--shard", "2/2"]));
    let results = rig.path("b/results.json");
    let text = fs::read_to_string(&results).unwrap();
    let older = text.replace(concat!("\"rlrig\": \"", env!("CARGO_PKG_VERSION"), "\""), "\"rlrig\": \"0.0.0\"");
    assert_ne!(older, text);
    fs::write(&results, older).unwrap();
    rlrig::refuses(&merge(&rig, ["a", "b"], "half"), 2, "b was made by other versions than a", "another version");
    assert!(!rig.path("half").exists());
}
