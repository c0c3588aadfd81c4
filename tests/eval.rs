//! `rlrig eval` end to end with untrained models: both data sets, every mode, resuming, shards, and the files' schemas.

#![allow(clippy::unwrap_used)]

mod rlrig;

use rlrig::Rig;
use serde_json::Value;
use std::{fs, path::Path};

const FEW: [&str; 6] = ["--limit", "3", "--rounds", "2", "--accept", "0.99"];

fn file(name: &str) -> Vec<u8> {
    fs::read(Path::new(env!("CARGO_MANIFEST_DIR")).join(name)).unwrap()
}

/// Evaluates into `out` with a few prompts and more arguments.
fn eval(rig: &Rig, out: &str, more: &[&str]) -> String {
    rig.good("eval", &[&FEW[..], &["--out", out], more].concat())
}

/// Lines of a run without what a clock says.
fn lines(rig: &Rig, out: &str) -> Vec<Value> {
    let text = fs::read_to_string(rig.path(out).join("samples.jsonl")).unwrap();
    let timeless = |line: &str| {
        let mut line: Value = serde_json::from_str(line).unwrap();
        line["cost"]["seconds"] = 0.0.into();
        line
    };
    text.lines().map(timeless).collect()
}

/// Whether `value` is as `schema` says: the keywords that the committed schemas use.
fn check(schema: &Value, value: &Value, root: &Value, at: &str) {
    if let Some(name) = schema["$ref"].as_str() {
        return check(root.pointer(&name[1..]).unwrap(), value, root, at);
    }
    if let Some(kinds) = schema.get("type") {
        let is = |kind: &Value| match kind.as_str().unwrap() {
            "object" => value.is_object(),
            "array" => value.is_array(),
            "string" => value.is_string(),
            "integer" => value.is_u64(),
            "number" => value.is_number(),
            "boolean" => value.is_boolean(),
            "null" => value.is_null(),
            other => panic!("the schema has the unknown type {other}"),
        };
        let good = kinds.as_array().map_or_else(|| is(kinds), |kinds| kinds.iter().any(is));
        assert!(good, "{at} is {value}, not {kinds}");
    }
    if let Some(known) = schema["enum"].as_array() {
        assert!(known.contains(value), "{at} is {value}, none of {known:?}");
    }
    if let Some(number) = value.as_f64() {
        let low = schema["minimum"].as_f64().is_none_or(|least| number >= least);
        assert!(low && schema["maximum"].as_f64().is_none_or(|most| number <= most), "{at} is {number}");
    }
    for name in schema["required"].as_array().into_iter().flatten() {
        assert!(value.get(name.as_str().unwrap()).is_some(), "{at} lacks {name}");
    }
    for (name, inner) in value.as_object().into_iter().flatten() {
        let rule = schema["properties"].get(name).or(schema.get("additionalProperties"));
        match rule {
            Some(Value::Bool(false)) => panic!("{at} has {name}, which the schema does not know"),
            Some(rule) => check(rule, inner, root, &format!("{at}.{name}")),
            None => {}
        }
    }
    for (i, inner) in value.as_array().into_iter().flatten().enumerate() {
        if let Some(rule) = schema.get("items") {
            check(rule, inner, root, &format!("{at}[{i}]"));
        }
    }
}

fn hold_to_schemas(rig: &Rig, out: &str) {
    let schema: Value = serde_json::from_slice(&file("schemas/eval-samples.json")).unwrap();
    lines(rig, out).iter().for_each(|line| check(&schema, line, &schema, "line"));
    let schema: Value = serde_json::from_slice(&file("schemas/eval-results.json")).unwrap();
    let results: Value = serde_json::from_slice(&fs::read(rig.path(out).join("results.json")).unwrap()).unwrap();
    check(&schema, &results, &schema, "results");
}

#[test]
fn the_suite_writes_every_mode_and_every_picture() {
    let rig = Rig::new();
    let table = eval(&rig, "run", &["--suite"]);
    for mode in ["diffuser", "best-of-n", "rewrite", "loop"] {
        assert!(table.contains(&format!("| {mode} |")), "{table}");
    }
    let lines = lines(&rig, "run");
    assert!(lines.iter().all(|line| rig.path("run").join(line["file"].as_str().unwrap()).is_file()));
    // No untrained Checker is sure of anything: one drawing, and two rounds of all the others.
    assert_eq!(lines.len(), 3 * (1 + 2 + 2 + 2));
    let drawn: Vec<&Value> = lines.iter().filter(|line| line["round"] == 1).collect();
    let same = |a: &Value, b: &Value| a["id"] != b["id"] || (a["noise"] == b["noise"] && a["metrics"] == b["metrics"]);
    assert!(drawn.iter().all(|a| drawn.iter().all(|b| same(a, b))), "every mode begins with the same picture");
    // Two steps, with and without the prompt.
    assert!(lines.iter().all(|line| line["cost"]["evaluations"] == lines[0]["cost"]["evaluations"]));
    hold_to_schemas(&rig, "run");
    for name in ["table.md", "table.tex", "config.json", "report.html"] {
        assert!(rig.path("run").join(name).is_file());
    }
    let compared = rig.command(&["eval", "compare", "run:diffuser", "run:loop", "--json"]).output().unwrap();
    let compared: Value = serde_json::from_slice(&compared.stdout).unwrap();
    assert!(compared.as_array().unwrap().iter().any(|c| c["metric"] == "sg_iou" && c["difference"]["n"] == 3));
}

#[test]
fn the_claim_of_nothing_else_can_be_left_out() {
    let rig = Rig::new();
    let claims = |out: &str, more: &[&str]| {
        eval(&rig, out, &[&["--mode", "diffuser"], more].concat());
        let config: Value = serde_json::from_slice(&fs::read(rig.path(out).join("config.json")).unwrap()).unwrap();
        let counts: Vec<usize> = lines(&rig, out).iter().map(|l| l["claims"].as_array().unwrap().len()).collect();
        (config["only"].as_bool().unwrap(), counts)
    };
    let ((with, all), (without, fewer)) = (claims("with", &[]), claims("without", &["--only=false"]));
    assert!(with && !without);
    assert!(!all.is_empty() && all.iter().zip(&fewer).all(|(all, fewer)| *all == fewer + 1), "{all:?}, {fewer:?}");
}

#[test]
fn a_file_with_every_flaw_is_evaluated_end_to_end() {
    let rig = Rig::new();
    fs::write(rig.path("flawed.json"), file("tests/fixtures/laion_sg/flawed.json")).unwrap();
    let data = ["--dataset", "laion-sg", "--data", "flawed.json"];
    let more = [&data[..], &["--mode", "diffuser", "--limit", "100", "--out", "run"]].concat();
    let output = rig.run("eval", &more);
    let said = rlrig::stderr(&output);
    assert!(output.status.success() && said.contains("1 relations with an item that is not there"), "{said}");
    assert_eq!(lines(&rig, "run").len(), 8);
    assert!(lines(&rig, "run").iter().all(|line| line["metrics"].get("oracle_mean").is_none()));
    hold_to_schemas(&rig, "run");
    // The judge, which knows nothing, lists some of the words that were asked for, and no others.
    for line in lines(&rig, "run") {
        let words = |part: &str, of: &str| -> Vec<String> {
            line[part][of].as_array().unwrap().iter().map(|word| word.as_str().unwrap().to_owned()).collect()
        };
        for of in ["objects", "predicates"] {
            let known = words("reference", of);
            assert!(words("extracted", of).iter().all(|word| known.contains(word)), "{line}");
        }
        assert!(line["metrics"].get("sg_iou_attributes").is_none() && line["metrics"].get("sg_iou").is_some());
    }
    eval(&rig, "confirmed", &[&data[..], &["--mode", "diffuser", "--graph", "confirmed"]].concat());
    assert!(lines(&rig, "confirmed").iter().all(|line| line["metrics"].get("sg_iou_attributes").is_some()));
    let results: Value = serde_json::from_slice(&fs::read(rig.path("run/results.json")).unwrap()).unwrap();
    assert_eq!(results["flaws"][0]["dangling_id"]["lines"], serde_json::json!([3]));
    fs::write(rig.path("other.json"), "{\"images\": []}").unwrap();
    rig.bad(1, "begins with", "eval", &["--dataset", "laion-sg", "--data", "other.json"]);
    rig.bad(1, "mengcy/LAION-SG is not in the cache", "eval", &["--dataset", "laion-sg"]);
}

#[test]
fn a_killed_run_goes_on_and_shards_join_to_the_same_result() {
    let rig = Rig::new();
    eval(&rig, "whole", &[]);
    let wanted = lines(&rig, "whole");
    assert_eq!(wanted.len(), 6);

    eval(&rig, "killed", &["--batch", "1"]);
    let samples = rig.path("killed").join("samples.jsonl");
    let text = fs::read_to_string(&samples).unwrap();
    fs::write(&samples, &text[..text.len() / 2]).unwrap();
    rig.bad(2, "--resume", "eval", &[&FEW[..], &["--out", "killed"]].concat());
    rig.bad(2, "another seed", "eval", &[&FEW[..], &["--out", "killed", "--resume", "--seed", "4"]].concat());
    eval(&rig, "killed", &["--resume"]);
    assert_eq!(lines(&rig, "killed"), wanted);

    eval(&rig, "a", &["--shard", "1/2"]);
    eval(&rig, "b", &["--shard", "2/2"]);
    let merge = rig.command(&["eval", "merge", "b", "a", "--out", "joined"]).output().unwrap();
    assert!(merge.status.success(), "{}", rlrig::stderr(&merge));
    assert_eq!(lines(&rig, "joined"), wanted);
    hold_to_schemas(&rig, "joined");
    let results = |out: &str| -> Value {
        let mut results: Value =
            serde_json::from_slice(&fs::read(rig.path(out).join("results.json")).unwrap()).unwrap();
        // What a clock says.
        results["modes"]["loop"]["cost"].as_object_mut().unwrap().remove("seconds");
        results
    };
    assert_eq!(results("joined"), results("whole"));
    rig.bad(2, "--shard 3/2", "eval", &["--shard", "3/2"]);
    let refused = |expected: &str, parts: &[&str]| {
        let output = rig.command(&[&["eval", "merge"], parts, &["--out", "half"]].concat()).output().unwrap();
        rlrig::refuses(&output, 2, expected, "merge");
    };
    refused("shards 1/2 are missing", &["b"]);
    refused("is no shard", &["whole"]);
    refused("are both shard 1/2", &["a", "a"]);
    // A shard that is damaged is named, and leaves nothing behind.
    let kept = lines(&rig, "b");
    let broken = |expected: &str, parts: &[&str]| {
        let before = rig.names();
        let output = rig.command(&[&["eval", "merge"], parts, &["--out", "half"]].concat()).output().unwrap();
        rlrig::refuses(&output, 1, expected, "merge");
        assert_eq!(rig.names(), before);
    };
    let picture = rig.path("b").join(kept[0]["file"].as_str().unwrap());
    fs::remove_file(&picture).unwrap();
    broken("--out b --resume makes it again", &["a", "b"]);
    let resumed = rig.run("eval", &[&FEW[..], &["--out", "b", "--shard", "2/2", "--resume"]].concat());
    assert!(rlrig::stderr(&resumed).contains("1 prompts have lost a picture"), "{}", rlrig::stderr(&resumed));
    assert!(picture.is_file() && lines(&rig, "b") == kept);
    let samples = rig.path("b/samples.jsonl");
    let text = fs::read_to_string(&samples).unwrap();
    fs::write(&samples, text.replace("pictures/", "../a/")).unwrap();
    broken("b/samples.jsonl: line 1 is damaged", &["a", "b"]);
    fs::write(&samples, text.clone() + &text).unwrap();
    broken("is of the same picture as line 1", &["a", "b"]);
    rig.bad(1, "delete one of them", "eval", &[&FEW[..], &["--out", "b", "--shard", "2/2", "--resume"]].concat());
    fs::write(&samples, text).unwrap();
    fs::remove_file(rig.path("b/results.json")).unwrap();
    refused("is not finished", &["a", "b"]);
    assert!(!rig.path("half").exists());
}

#[test]
fn words_that_are_written_as_special_tokens_are_words() {
    let rig = Rig::new();
    let graph = r#"{"objects": [{"label": "<|image_pad|>"}, {"label": "<|im_end|>"}],
        "relations": [{"subject": 0, "predicate": "<|vision_start|>", "object": 1}]}"#;
    fs::write(rig.path("graph.json"), graph).unwrap();
    rig.good("generate", &["--graph", "graph.json", "--seed", "1", "--rounds", "2", "--out", "a.png"]);
    let item = |id: usize| serde_json::json!({ "item_id": id, "label": "<|image_pad|>", "attributes": [] });
    let record = serde_json::json!([{
        "img_id": "1", "score": "1", "caption_ori": "<|image_pad|>", "items": [item(0), item(1)],
        "relations": [{ "item1": 0, "relation": "<|im_end|>", "item2": 1 }],
    }]);
    fs::write(rig.path("data.json"), record.to_string()).unwrap();
    eval(&rig, "run", &["--dataset", "laion-sg", "--data", "data.json"]);
    assert!(!lines(&rig, "run").is_empty());
}

#[test]
fn a_judge_apart_answers_too_and_threads_change_nothing() {
    let rig = Rig::new();
    let judged = ["--judge", "vlm", "--mode", "diffuser"];
    let judged = |out: &str, threads: &str| {
        let arguments =
            [&["eval"], &FEW[..], &judged, &["--model", "klein", "--vlm", "vlm", "--steps", "2", "--out", out]];
        let output = rig.command(&arguments.concat()).env("RAYON_NUM_THREADS", threads).output().unwrap();
        assert!(output.status.success(), "{}", rlrig::stderr(&output));
        lines(&rig, out)
    };
    assert_eq!(judged("one", "1"), judged("two", "2"));
    hold_to_schemas(&rig, "one");
    let results: Value = serde_json::from_slice(&fs::read(rig.path("one/results.json")).unwrap()).unwrap();
    let agreement = results["agreement"].as_object().unwrap();
    // The judge is the same model, and says the same.
    assert_eq!(agreement["checker_judge"]["accuracy"]["mean"], 1.0);
    assert_eq!(agreement["judge_oracle"], agreement["checker_oracle"]);
}

#[test]
fn what_the_checker_says_is_fitted_to_the_oracle() {
    let rig = Rig::new();
    eval(&rig, "raw", &["--mode", "diffuser"]);
    let calibrate = |arguments: &[&str]| rig.command(&[&["eval", "calibrate"], arguments].concat()).output().unwrap();
    let output = calibrate(&["raw", "--out", "vlm/calibration.json"]);
    assert!(output.status.success(), "{}", rlrig::stderr(&output));
    rlrig::refuses(&calibrate(&["raw", "--out", "vlm/calibration.json"]), 2, "--force", "an existing file");
    // The same pictures by the calibrated Checker, whose calibration is that of what it says behind it.
    eval(&rig, "fitted", &["--mode", "diffuser"]);
    let said = |out: &str| -> Vec<f64> {
        let lines = lines(&rig, out);
        lines.iter().flat_map(|l| l["claims"].as_array().unwrap()).map(|c| c["checker"].as_f64().unwrap()).collect()
    };
    assert_ne!(said("raw"), said("fitted"));
    let numbers = |runs: &[&str]| -> Vec<f64> {
        let fitted: Value = serde_json::from_slice(&calibrate(runs).stdout).unwrap();
        // Of relations some say only that an object is not there.
        let of = |kind: &str| ["scale", "bias"].map(|name| fitted[kind][name].as_f64().unwrap());
        ["object", "only"].into_iter().flat_map(of).collect()
    };
    let (raw, fitted) = (numbers(&["raw"]), numbers(&["fitted"]));
    assert!(raw.iter().zip(&fitted).all(|(a, b)| (a - b).abs() < 0.02), "{raw:?} {fitted:?}");
    let [once, twice] = [&["raw"][..], &["raw", "fitted"]].map(calibrate);
    assert_eq!(once.stdout, twice.stdout, "pictures that runs share count once");
    assert!(raw[1].abs() > 0.1 && raw[3].abs() > 0.1, "an untrained Checker is mostly wrong: {raw:?}");
    rlrig::refuses(&calibrate(&["vlm"]), 2, "no claim in these runs", "a folder that is no run");
}

#[test]
fn a_mode_with_an_adapter_that_is_not_on_is_refused() {
    let rig = Rig::new();
    for mode in ["loop-actor", "loop-editor", "loop-untrained"] {
        rig.bad(2, "adapter", "eval", &["--mode", mode]);
    }
    rig.bad(2, "names a seed twice", "eval", &["--seed", "1", "1"]);
}

#[test]
fn single_edits_are_measured_and_what_they_do_not_heed_is_refused() {
    let rig = Rig::new();
    let edits = |more: &[&str]| {
        let few = ["eval", "--edits", "--count", "3", "--model", "klein", "--steps", "2"];
        rig.command(&[&few[..], more].concat()).output().unwrap()
    };
    let output = edits(&["--seed", "7", "--out", "run"]);
    let table = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success() && table.contains("| all | 3 |"), "{table}{}", rlrig::stderr(&output));
    let results: Value = serde_json::from_slice(&fs::read(rig.path("run/results.json")).unwrap()).unwrap();
    let settings = ["seed", "subset_seed", "limit"].map(|name| results["settings"][name].as_u64());
    assert_eq!(settings, [Some(7), Some(0), Some(3)]);
    for (expected, more) in [
        ("leave out --dataset", &["--dataset", "laion-sg"][..]),
        ("takes one --seed", &["--seed", "1", "2"]),
        ("cannot be used with '--vlm", &["--vlm", "vlm"]),
        ("cannot be used with '--rounds", &["--rounds", "2"]),
        ("cannot be used with '--redraw", &["--redraw=false"]),
        ("cannot be used with '--min-relations", &["--min-relations", "2"]),
    ] {
        rlrig::refuses(&edits(more), 2, expected, &format!("{more:?}"));
    }
}
