//! `rlrig eval` end to end with untrained models: both data sets, every mode, resuming, shards, and the files' schemas.

#![allow(clippy::unwrap_used)]

mod rlrig;

use self::rlrig::{Rig, stderr, write_adapter, write_vlm};
use ::rlrig::eval::modes::Mode;
use serde_json::{Value, json};
use std::{
    collections::BTreeSet,
    fs,
    path::Path,
    process::Stdio,
    time::{Duration, Instant},
};

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

/// A document of the folder.
fn document(rig: &Rig, name: &str) -> Value {
    serde_json::from_slice(&fs::read(rig.path(name)).unwrap()).unwrap()
}

fn hold_to_schemas(rig: &Rig, out: &str) {
    let hold = |name: &str, documents: &[Value]| {
        let schema: Value = serde_json::from_slice(&file(name)).unwrap();
        let validator = jsonschema::validator_for(&schema).unwrap();
        for document in documents {
            let errors = validator.iter_errors(document);
            let wrong: Vec<String> = errors.map(|error| format!("{}: {error}", error.instance_path())).collect();
            assert!(wrong.is_empty(), "{name}: {wrong:#?}");
        }
    };
    hold("schemas/eval-samples.json", &lines(rig, out));
    hold("schemas/eval-results.json", &[document(rig, &format!("{out}/results.json"))]);
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
    assert!(!stderr(&compared).contains("is not finished"));
    let compared: Value = serde_json::from_slice(&compared.stdout).unwrap();
    assert!(compared.as_array().unwrap().iter().any(|c| c["metric"] == "sg_iou" && c["difference"]["n"] == 3));
    let beyond = rig.command(&["eval", "compare", "run:loop@1", "run:loop@9"]).output().unwrap();
    rlrig::refuses(&beyond, 2, "loop@9: loop has results after 1 to 2 rounds", "compare");
    // What is not finished lacks the prompts that take longest.
    fs::remove_file(rig.path("run/results.json")).unwrap();
    let compared = rig.command(&["eval", "compare", "run:diffuser", "run:loop"]).output().unwrap();
    assert!(String::from_utf8_lossy(&compared.stdout).contains("run is not finished: prompts that are accepted early"));
}

/// What a mode did in each round: the words of the edit, what is said of the picture, and the picture.
fn deeds(rig: &Rig, out: &str, mode: &str) -> Vec<(Value, Value, Vec<u8>)> {
    let deed = |line: &Value| {
        let picture = fs::read(rig.path(out).join(line["file"].as_str().unwrap())).unwrap();
        (line["edit"]["instruction"].clone(), line["claims"].clone(), picture)
    };
    lines(rig, out).iter().filter(|line| line["mode"] == mode).map(deed).collect()
}

#[test]
fn each_loop_of_the_suite_has_the_adapters_of_its_roles() {
    let rig = Rig::new();
    write_adapter(&rig.path("actor"), "model.language_model.layers.1.mlp.down_proj", (32, 24));
    write_adapter(&rig.path("editor"), "transformer_blocks.0.attn.to_q", (32, 32));
    let (draw, actor, editor) = (["--draws", "1"], ["--adapter", "actor:100"], ["--adapter", "editor:100"]);
    eval(&rig, "suite", &[&draw[..], &["--suite"], &actor, &editor].concat());
    hold_to_schemas(&rig, "suite");
    let results = document(&rig, "suite/results.json");
    let modes: Vec<&String> = results["modes"].as_object().unwrap().keys().collect();
    assert_eq!(modes, Mode::ALL.map(Mode::name));

    // Each is the loop of a run with these adapters alone. Without any, the untrained loop is there if asked for.
    let asked = ["--mode", "loop", "loop-untrained"];
    for (mode, more) in [("loop-untrained", &asked[..]), ("loop-actor", &actor), ("loop-editor", &editor)] {
        eval(&rig, mode, &[&draw[..], more].concat());
        assert!(deeds(&rig, "suite", mode) == deeds(&rig, mode, "loop"), "{mode} is another loop");
    }
    assert!(deeds(&rig, "loop-untrained", "loop-untrained") == deeds(&rig, "loop-untrained", "loop"));

    // The Actor's adapter is in the words, the Editor's in the pictures made of the same words.
    let of = |mode: &'static str| deeds(&rig, "suite", mode);
    let [bare, acted, edited, both] = ["loop-untrained", "loop-actor", "loop-editor", "loop"].map(of);
    let words = |deeds: &[(Value, Value, Vec<u8>)]| deeds.iter().map(|deed| deed.0.clone()).collect::<Vec<_>>();
    assert_eq!((words(&edited), words(&both)), (words(&bare), words(&acted)));
    assert_ne!(words(&acted), words(&bare));
    assert!(edited != bare && both != acted, "the Editor's adapter changes nothing");
    // Neither is the Diffuser's or the Checker's: all begin with the same picture, and the same is said of it.
    let first = |mode: &'static str| {
        let deeds = of(mode);
        let rounds = deeds.len() / 3;
        deeds.into_iter().step_by(rounds).collect::<Vec<_>>()
    };
    for mode in Mode::ALL.map(Mode::name) {
        assert!(first(mode) == first("loop-untrained"), "{mode} begins with another picture");
    }
}

/// It draws for the rivals of the loop too, so that what the loop gains is not what it draws.
#[test]
fn the_diffusers_adapter_is_on_in_all_modes_but_the_untrained_loop() {
    let rig = Rig::new();
    write_adapter(&rig.path("lora"), "transformer_blocks.0.attn.to_q", (32, 32));
    let modes = ["--mode", "diffuser", "best-of-n", "loop", "loop-untrained"];
    eval(&rig, "plain", &["--mode", "diffuser"]);
    eval(&rig, "run", &[&modes[..], &["--adapter", "diffuser=lora:100"]].concat());
    let first = |out: &str, mode: &str| -> Vec<Vec<u8>> {
        let of_mode = |line: &&Value| line["mode"] == mode && line["round"] == 1;
        let picture = |line: &Value| fs::read(rig.path(out).join(line["file"].as_str().unwrap())).unwrap();
        lines(&rig, out).iter().filter(of_mode).map(picture).collect()
    };
    let (plain, drawn) = (first("plain", "diffuser"), first("run", "diffuser"));
    assert!(plain != drawn && plain.len() == drawn.len());
    assert!(drawn == first("run", "best-of-n") && drawn == first("run", "loop"));
    assert!(plain == first("run", "loop-untrained"));
}

#[test]
fn seeds_of_a_prompt_count_as_one_and_splits_are_told_apart() {
    let rig = Rig::new();
    let (seeds, splits) = (["--seed", "0", "1"], ["--split", "test", "test-4-5"]);
    eval(&rig, "run", &[&seeds[..], &splits, &["--mode", "diffuser", "loop"]].concat());
    hold_to_schemas(&rig, "run");
    // Three prompts of each split with two seeds: one drawing by the Diffuser, two by the loop.
    let lines = lines(&rig, "run");
    let files: BTreeSet<&str> = lines.iter().map(|line| line["file"].as_str().unwrap()).collect();
    assert_eq!((lines.len(), files.len()), (36, 36));
    assert!(files.iter().all(|file| rig.path("run").join(file).is_file()));
    let results = document(&rig, "run/results.json");
    for mode in ["diffuser", "loop"] {
        let found = &results["modes"][mode];
        assert_eq!((&found["metrics"]["sg_iou"]["n"], &found["cost"]["evaluations"]["n"]), (&json!(6), &json!(6)));
        let by_split = found["by_split"].as_object().unwrap();
        let prompts: Vec<(&str, &Value)> =
            by_split.iter().map(|(name, e)| (name.as_str(), &e["sg_iou"]["n"])).collect();
        assert_eq!(prompts, [("test", &json!(3)), ("test-4-5", &json!(3))]);
    }
    let drawn: Vec<&Value> = lines.iter().filter(|line| line["mode"] == "diffuser").collect();
    let mean = drawn.iter().map(|line| line["metrics"]["ent_iou"].as_f64().unwrap()).sum::<f64>() / drawn.len() as f64;
    assert!((results["modes"]["diffuser"]["metrics"]["ent_iou"]["mean"].as_f64().unwrap() - mean).abs() < 1e-9);
    assert!(fs::read_to_string(rig.path("run/report.html")).unwrap().contains("<h2>By split</h2>"));
    let compared = rig.command(&["eval", "compare", "run:diffuser", "run:loop", "--json"]).output().unwrap();
    let compared: Value = serde_json::from_slice(&compared.stdout).unwrap();
    let sg_iou = compared.as_array().unwrap().iter().find(|found| found["metric"] == "sg_iou").unwrap();
    assert_eq!(sg_iou["difference"]["n"], 6);
}

#[test]
fn an_edit_that_costs_more_than_a_drawing_is_warned_about_beside_the_rivals() {
    let rig = Rig::new();
    let run = |editor: &str| {
        let modes = ["--mode", "best-of-n", "loop", "--draws", "1", "--out", editor, "--editor", editor];
        let models = ["--model", "klein", "--vlm", "vlm", "--steps", "2"];
        let mut command = rig.command(&[&["eval"], &FEW[..], &modes, &models].concat());
        let output = command.env("RLRIG_LOG", "warn").output().unwrap();
        assert!(output.status.success(), "{}", stderr(&output));
        let lines = lines(&rig, editor);
        let cost = |edited: bool| {
            let line = lines.iter().find(|line| line.get("edit").is_some() == edited).unwrap();
            line["cost"]["evaluations"].as_u64().unwrap()
        };
        (stderr(&output).contains("best-of-n and rewrite cost less"), cost(true) > cost(false))
    };
    assert_eq!(run("reference"), (false, false));
    assert_eq!(run("flowedit"), (true, true));
}

/// Two drawings and two edits that the picture guides, too, cost five drawings.
#[test]
fn the_rivals_of_the_loop_may_spend_what_it_may() {
    let rig = Rig::new();
    let rounds = |out: &str, guided: &[&str]| {
        let most =
            ["--mode", "best-of-n", "loop", "--rounds", "4", "--redraw=false", "--accept", "0.99", "--limit", "1"];
        rig.good("eval", &[&most[..], &["--guidance", "3", "--out", out], guided].concat());
        let of = |mode: &str| lines(&rig, out).iter().filter(|line| line["mode"] == mode).count();
        let spent = |mode: &str| {
            let cost = |line: &Value| line["cost"]["evaluations"].as_u64().unwrap();
            lines(&rig, out).iter().filter(|line| line["mode"] == mode).map(cost).sum::<u64>()
        };
        assert_eq!(spent("best-of-n"), spent("loop"));
        (of("best-of-n"), of("loop"))
    };
    assert_eq!(rounds("by-text", &[]), (4, 4));
    assert_eq!(rounds("by-both", &["--image-guidance", "2"]), (5, 4));
}

#[test]
fn the_claim_of_nothing_else_can_be_left_out() {
    let rig = Rig::new();
    let claims = |out: &str, more: &[&str]| {
        eval(&rig, out, &[&["--mode", "diffuser"], more].concat());
        let config = document(&rig, &format!("{out}/config.json"));
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
    let said = stderr(&output);
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
        assert!(line["metrics"].get("sg_iou_attributes").is_some() && line["metrics"].get("sg_iou").is_some());
    }
    eval(&rig, "confirmed", &[&data[..], &["--mode", "diffuser", "--graph", "confirmed"]].concat());
    assert!(lines(&rig, "confirmed").iter().all(|line| line["metrics"].get("sg_iou_attributes").is_some()));
    // The file's first record is in its second line.
    let flaws = json!([{
        "malformed": { "count": 1, "lines": [11], "records": [10] },
        "broken_utf8": { "count": 1, "lines": [10], "records": [9] },
        "missing_key": { "count": 2, "lines": [8, 9], "records": [7, 8] },
        "wrong_type": { "count": 2, "lines": [7], "records": [6] },
        "number_as_string": { "count": 2, "lines": [6], "records": [5] },
        "empty_text": { "count": 2, "lines": [5], "records": [4] },
        "repeated_id": { "count": 2, "lines": [4, 12], "records": [3, 11] },
        "dangling_id": { "count": 1, "lines": [3], "records": [2] },
    }]);
    assert_eq!(document(&rig, "run/results.json")["flaws"], flaws);
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
        let mut results = document(&rig, &format!("{out}/results.json"));
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
    // Nor does a part pass for the whole whose lines are lost at the end.
    let first = text.lines().next().unwrap();
    for (cut, expected) in [
        (&text[..text.len() - 9], "its last line is torn"),
        (first, "lacks lines"),
        ("", "b/samples.jsonl: it has 0 of 1 prompts (loop)"),
    ] {
        fs::write(&samples, cut).unwrap();
        broken(expected, &["a", "b"]);
        broken("--out b --resume makes it whole again", &["a", "b"]);
    }
    fs::write(&samples, text.clone() + &text).unwrap();
    rig.bad(1, "delete one of them", "eval", &[&FEW[..], &["--out", "b", "--shard", "2/2", "--resume"]].concat());
    fs::write(&samples, text).unwrap();
    fs::remove_file(rig.path("b/results.json")).unwrap();
    refused("is not finished", &["a", "b"]);
    assert!(!rig.path("half").exists());
}

#[test]
fn a_run_that_is_killed_while_it_draws_ends_as_one_that_was_not() {
    let rig = Rig::new();
    let args = ["--limit", "4", "--rounds", "2", "--accept", "0.99", "--batch", "1", "--seed", "0", "7", "--suite"];
    let evaluate = |out: &str, more: &[&str]| rig.good("eval", &[&args[..], &["--out", out], more].concat());
    evaluate("whole", &[]);

    let models = ["eval", "--model", "klein", "--steps", "2", "--vlm", "vlm"];
    let mut command = std::process::Command::new(assert_cmd::cargo::cargo_bin!("rlrig"));
    command.current_dir(rig.dir.path()).args([&models[..], &args[..], &["--out", "killed"]].concat());
    command.env_remove("RAYON_NUM_THREADS").env("RLRIG_LOG", "error");
    let mut child = command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
    let (samples, start) = (rig.path("killed/samples.jsonl"), Instant::now());
    while !fs::read_to_string(&samples).is_ok_and(|text| text.contains('\n')) {
        assert!(start.elapsed() < Duration::from_secs(60), "nothing is drawn");
        std::thread::sleep(Duration::from_millis(1));
    }
    child.kill().unwrap();
    child.wait().unwrap();
    assert!(!rig.path("killed/results.json").exists(), "it was done before it was killed");
    let made = fs::read_to_string(&samples).unwrap().lines().count();
    // In other batches and on another number of threads.
    let resumed = ["--resume", "--batch", "5"];
    let output = rig
        .command(&[&models[..], &args[..6], &args[8..], &["--out", "killed"], &resumed].concat())
        .env("RAYON_NUM_THREADS", "1")
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", stderr(&output));
    let wanted = lines(&rig, "whole");
    assert!(made < wanted.len(), "{made} of {}", wanted.len());
    assert_eq!(lines(&rig, "killed"), wanted);
}

#[test]
fn words_that_are_written_as_special_tokens_are_words() {
    let rig = Rig::new();
    let graph = r#"{"objects": [{"label": "<|image_pad|>"}, {"label": "<|im_end|>"}],
        "relations": [{"subject": 0, "predicate": "<|vision_start|>", "object": 1}]}"#;
    fs::write(rig.path("graph.json"), graph).unwrap();
    rig.good("generate", &["--graph", "graph.json", "--seed", "1", "--rounds", "2", "--out", "a.png"]);
    let item = |id: usize| json!({ "item_id": id, "label": "<|image_pad|>", "attributes": [] });
    let record = json!([{
        "img_id": "1", "score": "1", "caption_ori": "<|image_pad|>", "items": [item(0), item(1)],
        "relations": [{ "item1": 0, "relation": "<|im_end|>", "item2": 1 }],
    }]);
    fs::write(rig.path("data.json"), record.to_string()).unwrap();
    eval(&rig, "run", &["--dataset", "laion-sg", "--data", "data.json"]);
    assert!(!lines(&rig, "run").is_empty());
}

#[test]
fn a_judge_apart_is_another_than_the_checker_and_sg_iou_is_what_it_says() {
    let rig = Rig::new();
    write_vlm(&rig.path("judge"), 4);
    // The share of a picture's distinct triples that one of them confirms.
    let confirmed = |line: &Value, who: &str| {
        let triples = line["reference"]["triples"].as_array().unwrap();
        let relations = line["claims"].as_array().unwrap().iter().filter(|a| a["claim"].get("relation").is_some());
        let held = triples.iter().zip(relations).filter(|(_, answer)| answer[who].as_f64().unwrap() >= 0.5);
        let distinct = |triples: &mut dyn Iterator<Item = &Value>| {
            triples.map(Value::to_string).collect::<BTreeSet<_>>().len() as f64
        };
        distinct(&mut held.map(|(triple, _)| triple)) / distinct(&mut triples.iter())
    };
    let judged = |out: &str| {
        eval(&rig, out, &["--judge", "judge", "--mode", "diffuser"]);
        hold_to_schemas(&rig, out);
        let lines = lines(&rig, out);
        assert_eq!(lines.len(), 3);
        assert!(lines.iter().all(|line| line["metrics"]["sg_iou"] == confirmed(line, "judge")));
        lines
    };
    let claims = |line: &Value| line["claims"].as_array().unwrap().clone();
    assert!(judged("run").iter().flat_map(claims).any(|answer| answer["judge"] != answer["checker"]));
    // One who believes everything judges what one who believes nothing has checked.
    for (folder, bias) in [("judge", 20.0), ("vlm", -20.0)] {
        let scaling = json!({ "scale": 1.0, "bias": bias });
        let calibration = json!({ "object": scaling, "relation": scaling, "only": scaling });
        fs::write(rig.path(folder).join("calibration.json"), calibration.to_string()).unwrap();
    }
    let lines = judged("apart");
    assert!(lines.iter().all(|line| (confirmed(line, "judge"), confirmed(line, "checker")) == (1.0, 0.0)));
    let agreement = &document(&rig, "apart/results.json")["agreement"];
    assert_eq!(agreement["checker_judge"]["accuracy"]["mean"], 0.0);
}

#[test]
fn batches_and_threads_change_nothing() {
    let rig = Rig::new();
    write_vlm(&rig.path("judge"), 4);
    let same = |name: &str, arguments: &[&str]| {
        let run = |batch: &str, threads: &str| {
            let out = format!("{name}-{batch}");
            let all = [&["eval", "--draws", "1", "--batch", batch, "--out", &out][..], arguments].concat();
            let output = rig.command(&all).env("RAYON_NUM_THREADS", threads).output().unwrap();
            assert!(output.status.success(), "{}", stderr(&output));
            lines(&rig, &out)
        };
        let (narrow, wide) = (run("1", "1"), run("32", "2"));
        assert!(narrow.iter().any(|line| line.get("edit").is_some()), "{name}: nothing is edited");
        assert_eq!(narrow, wide, "{name}");
    };
    // Some edits are of a picture that was edited before.
    let edits = ["--limit", "3", "--mode", "diffuser", "loop", "--rounds", "4", "--redraw=false", "--accept", "0.99"];
    let models = ["--model", "klein", "--vlm", "vlm", "--judge", "judge", "--steps", "2"];
    same("small", &[&edits[..], &models].concat());
    // The built-in models.
    same("built-in", &["--limit", "2", "--rounds", "2", "--accept", "1", "--looks", "1", "--steps", "4"]);
}

#[test]
fn what_the_checker_says_is_fitted_to_the_oracle() {
    let rig = Rig::new();
    eval(&rig, "raw", &["--mode", "diffuser"]);
    let calibrate = |arguments: &[&str]| rig.command(&[&["eval", "calibrate"], arguments].concat()).output().unwrap();
    let output = calibrate(&["raw", "--out", "vlm/calibration.json"]);
    assert!(output.status.success(), "{}", stderr(&output));
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
fn what_cannot_be_evaluated_is_refused() {
    let rig = Rig::new();
    for mode in ["loop-actor", "loop-editor"] {
        rig.bad(2, "adapter", "eval", &["--mode", mode]);
    }
    rig.bad(2, "names a seed twice", "eval", &["--seed", "1", "1"]);
    rig.bad(2, "too few scenes", "eval", &["--relation", "no such", "--limit", "1"]);
    rig.bad(2, "by --limit", "eval", &["--dataset", "laion-sg", "--data", "x.json", "--subset-seed", "1"]);
    rig.bad(2, "or --oracle", "eval", &["--dataset", "laion-sg", "--data", "x.json", "--oracle", "actor"]);
    rig.bad(2, "cannot be used with", "eval", &["--edits", "--oracle", "actor"]);
}

#[test]
fn the_oracle_plays_the_roles_that_it_is_given() {
    let rig = Rig::new();
    // Whether the Checker said of every claim what the oracle does, and was sure of it.
    let is_true = |line: &Value| {
        let claims = line["claims"].as_array().unwrap();
        claims.iter().all(|claim| claim["checker"] == f64::from(u8::from(claim["oracle"].as_bool().unwrap())))
    };
    let edits = |out: &str| -> Vec<String> {
        let lines = lines(&rig, out);
        lines.iter().filter_map(|l| Some(l["edit"]["instruction"].as_str()?.to_owned())).collect()
    };
    // The built-in models, which are often wrong about four and five objects, and seldom about all of them.
    let run = |out: &str, more: &[&str]| {
        let few = [
            "eval", "--split", "val-4-5", "--limit", "3", "--rounds", "2", "--draws", "1", "--accept", "0.99",
            "--steps", "8",
        ];
        let output = rig.command(&[&few[..], &["--out", out], more].concat()).output().unwrap();
        assert!(output.status.success(), "{}", stderr(&output));
    };
    run("plain", &[]);
    run("checks", &["--oracle", "checker"]);
    run("both", &["--oracle", "checker", "actor"]);
    for out in ["checks", "both"] {
        assert!(lines(&rig, out).iter().all(is_true), "{out}");
    }
    assert!(!lines(&rig, "plain").iter().all(is_true));
    let helpful = |out: &str| -> Vec<bool> {
        let lines = lines(&rig, out);
        lines.iter().filter_map(|line| line["edit"]["review"]["helpful"].as_bool()).collect()
    };
    assert!(!helpful("both").is_empty() && helpful("both").iter().all(|yes| *yes), "{:?}", edits("both"));
    assert_ne!(edits("checks"), edits("both"));
    assert_eq!(document(&rig, "both/results.json")["config"]["oracle"], json!(["checker", "actor"]));
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
    assert!(output.status.success() && table.contains("| all | 3 |"), "{table}{}", stderr(&output));
    let results = document(&rig, "run/edits.json");
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

#[test]
fn the_built_in_diffuser_reads_plain_words_and_captions_where_asked() {
    let rig = Rig::new();
    let run = |out: &str, more: &[&str]| -> (Value, Vec<Value>) {
        let few = [
            "eval",
            "--split",
            "test-paraphrase",
            "--limit",
            "2",
            "--mode",
            "diffuser",
            "--steps",
            "1",
            "--looks",
            "1",
        ];
        let output = rig.command(&[&few[..], &["--out", out], more].concat()).output().unwrap();
        assert!(output.status.success(), "{more:?}: {}", stderr(&output));
        let text = fs::read_to_string(rig.path(out).join("samples.jsonl")).unwrap();
        let lines = text.lines().map(|line| serde_json::from_str::<Value>(line).unwrap()).collect();
        (document(&rig, &format!("{out}/config.json"))["wording"].clone(), lines)
    };
    let ((plainly, plain), (as_said, captions)) = (run("plain", &[]), run("captions", &["--wording", "caption"]));
    assert_eq!((plainly, as_said), ("plain".into(), "caption".into()));
    assert!(plain.len() == 2 && captions.len() == 2);
    for (plain, caption) in plain.iter().zip(&captions) {
        assert_eq!(plain["prompt"], caption["prompt"]);
        assert!(caption["drawn_as"].is_null());
        let words = plain["drawn_as"].as_str().unwrap();
        assert!(plain["prompt"] != *words && words.starts_with("a "), "{words}");
    }
}

#[test]
fn verdicts_are_measured_by_themselves_and_what_they_do_not_heed_is_refused() {
    let rig = Rig::new();
    let verdicts = |more: &[&str]| {
        let few = ["eval", "--verdicts", "--limit", "6", "--vlm", "vlm"];
        rig.command(&[&few[..], more].concat()).output().unwrap()
    };
    let good = |more: &[&str]| {
        let output = verdicts(more);
        assert!(output.status.success(), "{more:?}: {}", stderr(&output));
        String::from_utf8(output.stdout).unwrap()
    };
    let table = good(&["--out", "run", "--split", "val", "--subset-seed", "7"]);
    let row = |name: &str| table.lines().find(|line| line.starts_with(&format!("| {name} |")));
    for name in ["all", "objects", "relations", "nothing else"] {
        assert!(row(&format!("verdicts: {name}")).is_some(), "{name}: {table}");
    }
    for name in ["edits: well formed", "edits: about what fails", "edits: mend", "captions: read exactly"] {
        assert!(row(name).is_some_and(|row| row.starts_with(&format!("| {name} | 6 |"))), "{name}: {table}");
    }
    let written = document(&rig, "run/verdicts.json");
    let settings = ["subset_seed", "limit", "objects", "looks"].map(|name| written["settings"][name].as_u64());
    assert_eq!(settings, [Some(7), Some(6), Some(1), Some(1)]);
    let tasks = |out: &str, task: &str| -> Vec<Value> {
        let text = fs::read_to_string(rig.path(out).join("verdicts.jsonl")).unwrap();
        let lines = text.lines().map(|line| serde_json::from_str::<Value>(line).unwrap());
        lines.filter(|line| line["task"] == task).collect()
    };
    assert_eq!(["check", "act", "read"].map(|task| tasks("run", task).len()), [6; 3]);

    // One document, and the same whatever is asked together.
    let asked = ["--json", "--split", "val", "--subset-seed", "7", "--batch", "4"];
    let printed: Value = serde_json::from_str(&good(&asked)).unwrap();
    assert_eq!(printed["results"], written["results"]);
    let results = &printed["results"];
    let inside = |value: &Value| (0.0..=1.0).contains(&value.as_f64().unwrap());
    for of in ["edits", "captions"] {
        for (name, share) in results[of].as_object().unwrap() {
            assert!(["share", "low", "high"].iter().all(|key| inside(&share[*key])), "{of}: {name} {share}");
        }
    }
    for (name, agreement) in results["verdicts"].as_object().unwrap() {
        let kappa = &agreement["kappa"];
        let is_between = |key: &str| (-1.0..=1.0).contains(&kappa[key].as_f64().unwrap());
        assert!(kappa.is_null() || ["mean", "lo", "hi"].into_iter().all(is_between), "{name}: {kappa}");
        for of in ["accuracy", "calibration_error"] {
            let estimate = &agreement[of];
            assert!(["mean", "lo", "hi"].iter().all(|key| inside(&estimate[*key])), "{name}: {of} {estimate}");
            assert!((1..=6).contains(&estimate["n"].as_u64().unwrap()), "{name}: {of} {estimate}");
        }
    }

    // The Actor's adapter is in its edits alone.
    write_adapter(&rig.path("actor"), "model.language_model.layers.1.mlp.down_proj", (32, 24));
    good(&["--out", "acted", "--split", "val", "--subset-seed", "7", "--adapter", "actor:100"]);
    let same = ["check", "act", "read"].map(|task| tasks("acted", task) == tasks("run", task));
    assert_eq!(same, [true, false, true]);

    for (expected, more) in [
        ("takes one --split", &["--split", "val", "test"][..]),
        ("unknown split", &["--split", "no-such"]),
        ("leave out --dataset", &["--dataset", "laion-sg"]),
        ("--looks is 1 to 5", &["--looks", "6"]),
        ("run is not empty", &["--out", "run"]),
        ("cannot be used with '--edits", &["--edits"]),
        ("cannot be used with '--judge", &["--judge", "vlm"]),
        ("cannot be used with '--model", &["--model", "klein"]),
        ("cannot be used with '--steps", &["--steps", "2"]),
        ("cannot be used with '--seed", &["--seed", "1"]),
        ("cannot be used with '--rounds", &["--rounds", "2"]),
    ] {
        rlrig::refuses(&verdicts(more), 2, expected, &format!("{more:?}"));
    }
}
