//! The commands from end to end, with untrained models: the pictures are noise, everything else is as with trained ones.

#![allow(clippy::unwrap_used)]

mod rlrig;

use self::rlrig::{PROMPT, Rig, stderr, write_adapter};
use ::rlrig::{io::png, rig::trajectory::Trajectory};
use candle_core::{Device, Tensor};
use serde_json::{Value, json};
use std::{collections::HashMap, fs};

fn recipe(rig: &Rig, file: &str) -> Trajectory {
    let texts = png::read_texts(&rig.path(file)).unwrap();
    let (_, text) = texts.iter().find(|(keyword, _)| keyword == "rlrig").unwrap();
    Trajectory::from_json(text).unwrap()
}

#[test]
fn a_recipe_of_another_version_is_replayed_with_a_word_of_warning() {
    let rig = Rig::new();
    rig.good("generate", &["--prompt", PROMPT, "--seed", "7", "--rounds", "1", "--out", "a.png"]);
    let older = Trajectory { rlrig: "0.0.1".to_owned(), ..recipe(&rig, "a.png") };
    let texts = [(png::CHUNK.to_owned(), serde_json::to_string(&older).unwrap())];
    png::write(&rig.path("older.png"), &png::read(&rig.path("a.png")).unwrap(), &texts, false).unwrap();
    for (file, warned) in [("older.png", true), ("a.png", false)] {
        let said = rig.run("generate", &["--from", file, "--out", "again.png", "--force"]);
        assert!(said.status.success(), "{}", stderr(&said));
        assert_eq!(stderr(&said).contains("the recipe is of rlrig 0.0.1"), warned, "{}", stderr(&said));
        assert!(png::read(&rig.path("again.png")).unwrap() == png::read(&rig.path("a.png")).unwrap());
    }
}

#[test]
fn generate_writes_a_picture_with_its_recipe_that_replays_to_the_same_bytes() {
    let rig = Rig::new();
    let more = ["--only", "--accept", "1", "--looks", "2", "--out", "a.png"];
    let args = [&["--prompt", PROMPT, "--seed", "7", "--rounds", "3"], &more[..]].concat();
    let said = rig.run("generate", &[&args[..], &["--trajectory", "turns"]].concat());
    assert!(said.status.success(), "{}", stderr(&said));
    assert_eq!(String::from_utf8_lossy(&said.stdout), "a.png\n");
    for part in ["round 1: score", "small red ball left of large blue cube", "edit: ", "round 3", "index.html"] {
        assert!(stderr(&said).contains(part), "{part:?} is not in {}", stderr(&said));
    }
    let trajectory = recipe(&rig, "a.png");
    assert_eq!((trajectory.recipe.seed, trajectory.recipe.steps, trajectory.turns.len()), (7, 2, 3));
    assert_eq!(trajectory.target.claims.len(), 4);

    // The same call, one thread, and a replay give the same file.
    let bytes = fs::read(rig.path("a.png")).unwrap();
    let mut alone = rig.command(&["generate", "--model", "klein", "--vlm", "vlm", "--steps", "2"]);
    alone.args(&args[..args.len() - 1]).arg("b.png").env("RAYON_NUM_THREADS", "1");
    assert!(alone.output().unwrap().status.success());
    assert_eq!(fs::read(rig.path("b.png")).unwrap(), bytes, "one thread");
    let replay = rig.command(&["generate", "--from", "a.png", "--out", "c.png", "-q"]).output().unwrap();
    assert!(replay.status.success() && replay.stderr.is_empty(), "{}", stderr(&replay));
    assert_eq!(fs::read(rig.path("c.png")).unwrap(), bytes, "replay");
    // A flag beside --from wins, and fewer rounds take the recipe's drawings along.
    let flags = ["--seed", "8", "--rounds", "1", "--only=false", "--out", "d.png"];
    let other = rig.command(&[&["generate", "--from", "a.png"], &flags[..]].concat()).output().unwrap();
    assert!(other.status.success(), "{}", stderr(&other));
    let other = recipe(&rig, "d.png");
    assert_eq!((other.recipe.seed, other.recipe.rounds, other.recipe.draws), (8, 1, 1));
    assert_eq!(other.target.claims, trajectory.target.claims[..3]);

    // The folder of turns.
    let document: Value = serde_json::from_slice(&fs::read(rig.path("turns/trajectory.json")).unwrap()).unwrap();
    assert_eq!(document["turns"][2]["image"], "turn-3.png");
    assert!(document["turns"][0]["seconds"]["paint"].as_f64().unwrap() > 0.0);
    let best = png::read(&rig.path(&format!("turns/turn-{}.png", trajectory.best + 1))).unwrap();
    assert_eq!(png::read(&rig.path("a.png")).unwrap(), best);
    assert!(png::read(&rig.path("turns/sheet.png")).unwrap().width() > 800);
    assert!(fs::read_to_string(rig.path("turns/index.html")).unwrap().contains(PROMPT));

    let info = rig.command(&["info", "a.png"]).output().unwrap();
    let info = String::from_utf8(info.stdout).unwrap();
    for part in [PROMPT, "seed      7", "2 drawings first, a new drawing after", "round 3", "left of large blue cube"] {
        assert!(info.contains(part), "{part:?} is not in {info}");
    }
    let info = rig.command(&["info", "a.png", "--json"]).output().unwrap();
    assert_eq!(serde_json::from_slice::<Value>(&info.stdout).unwrap()["recipe"]["seed"], 7);
}

#[test]
fn many_prompts_give_one_line_each_and_the_same_pictures_in_any_batch() {
    let rig = Rig::new();
    let prompts = "a red ball above a blue cube\n\n  a green ring\n";
    let many = |out: &str, batch: &str| {
        let mut command =
            rig.command(&["generate", "--model", "klein", "--vlm", "vlm", "--steps", "2", "--json", "-q"]);
        command.args([
            "--prompt", "-", "--seed", "5", "-n", "2", "--rounds", "2", "--draws", "1", "--out", out, "--batch", batch,
        ]);
        let output = command.write_stdin(prompts).output().unwrap();
        assert!(output.status.success() && output.stderr.is_empty(), "{}", stderr(&output));
        let text = String::from_utf8(output.stdout).unwrap();
        let mut lines: Vec<Value> = text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
        lines.sort_by_key(|line| line["file"].as_str().unwrap().to_owned());
        lines
    };
    let (wide, narrow) = (many("wide", "8"), many("narrow", "1"));
    let files: Vec<&str> = wide.iter().map(|line| line["file"].as_str().unwrap()).collect();
    let names = ["out-0000-5.png", "out-0001-6.png", "out-0002-5.png", "out-0003-6.png"];
    assert_eq!(files, names.map(|name| format!("wide/{name}")));
    assert_eq!(wide[2]["target"]["prompt"], "a green ring");
    for (wide, narrow) in wide.iter().zip(&narrow) {
        let read = |line: &Value| fs::read(rig.path(line["file"].as_str().unwrap())).unwrap();
        assert!(read(wide) == read(narrow), "{} and {} differ", wide["file"], narrow["file"]);
    }
    fs::write(rig.path("prompts.txt"), prompts).unwrap();
    let lines =
        rig.json("generate", &["--prompt-file", "prompts.txt", "--rounds", "1", "--seed", "5", "--out", "more"]);
    assert_eq!(lines.len(), 2);
    // Names go on from those that are there.
    rig.good("generate", &["--prompt", "a green ring", "--rounds", "1", "--seed", "5", "--out", "more"]);
    assert!(rig.path("more/out-0002-5.png").exists());
}

#[test]
fn noise_is_saved_and_begun_with() {
    let rig = Rig::new();
    let args = ["--prompt", "a green ring", "--rounds", "1"];
    let with = |more: &[&str]| drop(rig.good("generate", &[&args[..], more].concat()));
    with(&["--seed", "3", "--out", "a.png", "--save-noise", "noise.safetensors"]);
    with(&["--seed", "4", "--out", "b.png", "--init-noise", "noise.safetensors"]);
    with(&["--seed", "4", "--out", "c.png"]);
    let pixels = |name: &str| png::read(&rig.path(name)).unwrap();
    assert!(pixels("a.png") == pixels("b.png") && pixels("b.png") != pixels("c.png"));
    assert_eq!(recipe(&rig, "b.png").recipe.init_noise.unwrap().len(), 64);
    let output = rig.command(&["generate", "--from", "b.png", "--out", "d.png"]).output().unwrap();
    rlrig::refuses(&output, 2, "give it with --init-noise", "a replay without its noise");

    // Of a file with several, a replay takes the one it was.
    let numbers: Vec<f32> = (0..2 * 16 * 4 * 4).map(|i| (i as f32).sin()).collect();
    let two = Tensor::from_vec(numbers, (2, 16, 4, 4), &Device::Cpu).unwrap();
    candle_core::safetensors::save(&HashMap::from([("noise", two)]), rig.path("two.safetensors")).unwrap();
    with(&["--seed", "5", "6", "--out", "two", "--init-noise", "two.safetensors"]);
    assert_eq!(recipe(&rig, "two/out-0001-6.png").recipe.noise_row, Some(1));
    let replay = ["--from", "two/out-0001-6.png", "--init-noise", "two.safetensors", "--out", "e.png"];
    let output = rig.command(&[&["generate"], &replay[..]].concat()).output().unwrap();
    assert!(output.status.success(), "{}", stderr(&output));
    assert!(fs::read(rig.path("e.png")).unwrap() == fs::read(rig.path("two/out-0001-6.png")).unwrap());
}

#[test]
fn scene_graphs_and_free_words_are_drawn() {
    let rig = Rig::new();
    let mut record = serde_json::json!([{
        "img_id": "1", "name": "1.jpg", "caption_ori": "x", "score": "6.5", "url": "",
        "items": [{ "item_id": 4, "label": "ball", "attributes": ["red"], "global_item_id": 1 },
                  { "item_id": 9, "label": "giraffe", "attributes": [], "global_item_id": 2 }],
        "relations": [{ "triple_id": 0, "item1": 9, "relation": "chasing", "item2": 4, "global_relation_id": 3 }]
    }]);
    fs::write(rig.path("graph.json"), record.to_string()).unwrap();
    let line = rig.json("generate", &["--graph", "graph.json", "--rounds", "1", "--out", "a.png"]).remove(0);
    assert_eq!(line["target"]["prompt"], "giraffe chasing red ball");
    assert_eq!(line["turns"][0]["verdicts"].as_array().unwrap().len(), 3);
    // The built-in models know neither, as in a prompt.
    let strict = rig.command(&["generate", "--graph", "graph.json"]).output().unwrap();
    rlrig::refuses(&strict, 2, "graph.json: unknown shape \"giraffe\"", "a graph in unknown words");
    record[0]["relations"][0]["item2"] = 7.into();
    fs::write(rig.path("graph.json"), record.to_string()).unwrap();
    rig.bad(2, "item which is not there: 9 \"chasing\" 7", "generate", &["--graph", "graph.json"]);

    // A terminal would obey what comes after the escape.
    let words = "misty\u{1b}[2J morning, melancholy";
    let output = rig.run("generate", &["--prompt", words, "--rounds", "1", "--out", "b.png"]);
    assert!(output.status.success(), "{}", stderr(&output));
    let said = stderr(&output);
    assert!(said.contains("misty\u{fffd}[2J morning, melancholy") && !said.contains('\u{1b}'), "{said:?}");
}

#[test]
fn a_shorter_run_leaves_no_turns_of_a_longer_one() {
    let rig = Rig::new();
    let run = |rounds: &str| {
        let args = ["--prompt", PROMPT, "--seed", "7", "--accept", "1", "--out", "a.png", "--trajectory", "turns"];
        rig.good("generate", &[&args[..], &["--rounds", rounds, "--force"]].concat());
        let entries = fs::read_dir(rig.path("turns")).unwrap();
        let mut names: Vec<String> = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    };
    let files = ["index.html", "sheet.png", "trajectory.json", "turn-1.png", "turn-2.png", "turn-3.png"];
    assert_eq!(run("3"), files);
    assert_eq!(run("1"), files[..4]);
}

#[test]
fn half_precision_serves_on_the_cpu_too() {
    let rig = Rig::new();
    let loops = ["--rounds", "2", "--draws", "1", "--accept", "1", "--device", "cpu", "--dtype", "bf16"];
    let args = ["--prompt", PROMPT, "--seed", "1", "--out", "a.png"];
    let line = rig.json("generate", &[&args[..], &loops].concat()).remove(0);
    assert_eq!((line["recipe"]["dtype"].as_str(), line["turns"].as_array().map(Vec::len)), (Some("bf16"), Some(2)));
    let replay = rig.command(&["generate", "--from", "a.png", "--device", "cpu", "--out", "b.png"]).output().unwrap();
    assert!(replay.status.success(), "{}", stderr(&replay));
    assert!(fs::read(rig.path("a.png")).unwrap() == fs::read(rig.path("b.png")).unwrap());
}

#[test]
fn every_editor_edits() {
    let rig = Rig::new();
    rig.good("generate", &["--prompt", PROMPT, "--seed", "1", "--rounds", "1", "--out", "source.png"]);
    let source = png::read(&rig.path("source.png")).unwrap();
    let methods: [&[&str]; 5] = [
        &["--editor", "reference"],
        &["--editor", "inversion"],
        &["--editor", "inversion", "--inversion", "rf-solver"],
        &["--editor", "inversion", "--inversion", "fireflow"],
        &["--editor", "flowedit"],
    ];
    let mut edited = vec![source];
    for (i, method) in methods.into_iter().enumerate() {
        let out = format!("{i}.png");
        let args = ["--image", "source.png", "--instruction", "move the\nred ball", "--seed", "1", "--out", &out];
        let line = rig.json("edit", &[&args[..], method].concat()).remove(0);
        assert_eq!((line["file"].as_str(), line["seed"].as_u64()), (Some(out.as_str()), Some(1)));
        let picture = png::read(&rig.path(&out)).unwrap();
        assert!(edited.iter().all(|other| *other != picture), "{method:?} changes nothing of its own");
        edited.push(picture);
        let looped = format!("loop-{i}.png");
        let args =
            ["--prompt", PROMPT, "--seed", "1", "--rounds", "2", "--draws", "1", "--accept", "1", "--out", &looped];
        rig.good("generate", &[&args[..], method].concat());
        assert_eq!(recipe(&rig, &looped).turns.len(), 2);
    }
    let info = rig.command(&["info", "0.png"]).output().unwrap();
    let info = String::from_utf8(info.stdout).unwrap();
    assert!(info.starts_with("parameters: move the red ball\nSteps: 2, ") && info.contains(", Model: klein, Version"));
    let bad = |expected: &str, command: &str, args: &[&str]| rig.bad(2, expected, command, args);
    let args = ["--image", "source.png", "--instruction", "move the red ball", "--out"];
    bad("--out edited: name one .png file", "edit", &[&args[..], &["edited"]].concat());
    assert!(!rig.path("edited").exists());
    // A method of inversion is for the editor that inverts; a replay by another editor forgets the recipe's.
    let fireflow = ["again.png", "--editor", "flowedit", "--inversion", "fireflow"];
    bad("--inversion goes with --editor inversion", "edit", &[&args[..], &fireflow].concat());
    bad("--inversion goes with", "generate", &[&["--prompt", PROMPT, "--out"], &fireflow[..]].concat());
    bad("--inversion goes with", "eval", &["--inversion", "fireflow"]);
    let replay = ["generate", "--from", "loop-3.png", "--rounds", "1", "--editor", "reference", "--out", "other.png"];
    let replay = rig.command(&replay).output().unwrap();
    assert!(replay.status.success(), "{}", stderr(&replay));
    assert_eq!(recipe(&rig, "other.png").recipe.inversion, None);
    // What was edited by hand has no prompt to draw again.
    let replay = rig.command(&["generate", "--from", "0.png", "--out", "again.png"]).output().unwrap();
    assert_eq!(replay.status.code(), Some(2), "{}", stderr(&replay));
    assert!(stderr(&replay).contains("0.png") && stderr(&replay).contains("rlrig edit"), "{}", stderr(&replay));
    assert!(!rig.path("again.png").exists());
}

#[test]
fn an_edit_says_what_the_built_in_editor_never_learned() {
    let rig = Rig::new();
    image::RgbImage::new(128, 128).save(rig.path("in.png")).unwrap();
    let said = |instruction: &str| {
        let files = ["edit", "--image", "in.png", "--out", "out.png", "--force"];
        let how = ["--instruction", instruction, "--seed", "1", "--steps", "1"];
        let output = rig.command(&[&files[..], &how].concat()).output().unwrap();
        assert!(output.status.success());
        (stderr(&output), png::read(&rig.path("out.png")).unwrap())
    };
    assert!(said("make the giraffe blue").0.contains("learned no such instruction, and may do anything"));
    let (plainly, plain) = said("make the red ball blue");
    assert!(!plainly.contains("learned no such") && !plainly.contains("carried out as"), "{plainly}");
    let (otherwise, other) = said("please turn the red sphere blue");
    assert!(otherwise.contains("carried out as \"make the red ball blue\""), "{otherwise}");
    assert!(plain == other);
    let info = rig.command(&["info", "out.png"]).output().unwrap();
    let info = String::from_utf8(info.stdout).unwrap();
    assert!(info.contains("carried out as: make the red ball blue") && info.contains("turn the red sphere"), "{info}");
}

#[test]
fn what_the_grammar_cannot_read_is_read_between_what_it_names() {
    let rig = Rig::new();
    let said = |prompt: &str| {
        let how = ["--seed", "1", "--steps", "1", "--rounds", "1", "--out", "out.png", "--force"];
        let output = rig.command(&[&["generate", "--prompt", prompt], &how[..]].concat()).output().unwrap();
        assert!(output.status.success(), "{prompt}: {}", stderr(&output));
        (stderr(&output), recipe(&rig, "out.png").target)
    };
    let (told, target) = said("a tiny red sphere near the table");
    assert!(told.contains("no relation was found") && told.contains("drawn as \"a small red ball\""), "{told}");
    assert_eq!(target.claims.len(), 2);
    let (told, target) = said("a red ball and a large blue cube are next to a green ring");
    assert!(told.contains("red ball; large blue cube; green ring"), "{told}");
    let claims: Vec<String> = target.claims.iter().map(ToString::to_string).collect();
    assert_eq!(claims[..3], ["red ball", "large blue cube", "green ring"]);
}

#[test]
fn the_built_in_diffuser_is_told_in_plain_words_what_is_understood() {
    let rig = Rig::new();
    let drawn = |prompt: &str, out: &str| {
        let how = ["--seed", "1", "--steps", "2", "--rounds", "1", "--out", out];
        let output = rig.command(&[&["generate", "--prompt", prompt], &how[..]].concat()).output().unwrap();
        assert!(output.status.success(), "{}", stderr(&output));
        (stderr(&output), png::read(&rig.path(out)).unwrap(), recipe(&rig, out).target)
    };
    let words = "a red ball left of a blue cube";
    let (plainly, plain, target) = drawn(words, "plain.png");
    assert!(!plainly.contains("drawn as") && target.drawn_as.is_none(), "{plainly}");
    let asked = "a picture where there is a blue cube with a red sphere to its left, please";
    let (otherwise, other, target) = drawn(asked, "other.png");
    assert!(otherwise.contains(&format!("drawn as \"{words}\"")), "{otherwise}");
    assert_eq!((target.prompt.as_str(), target.words()), (asked, words));
    assert!(plain == other);
    // The recipe says both, and draws the same again.
    let info = rig.command(&["info", "other.png"]).output().unwrap();
    let info = String::from_utf8(info.stdout).unwrap();
    assert!(info.contains(asked) && info.contains(&format!("drawn as  {words}")), "{info}");
    let again = rig.command(&["generate", "--from", "other.png", "--out", "again.png"]).output().unwrap();
    assert!(again.status.success(), "{}", stderr(&again));
    assert!(other == png::read(&rig.path("again.png")).unwrap());
}

#[test]
fn an_edit_says_when_it_cuts_the_picture() {
    let rig = Rig::new();
    // A token of this model is 16 pixels wide and high.
    for (given, size) in [((70, 65), (64, 64)), ((80, 64), (80, 64))] {
        let source = image::RgbImage::from_fn(given.0, given.1, |x, y| image::Rgb([200, (3 * x) as u8, (3 * y) as u8]));
        png::write(&rig.path("a.png"), &source, &[], true).unwrap();
        let args = ["--image", "a.png", "--instruction", "move the ball", "--seed", "1", "--out", "b.png", "--force"];
        let output = rig.run("edit", &args);
        let said = stderr(&output);
        assert!(output.status.success(), "{said}");
        assert_eq!(png::read(&rig.path("b.png")).unwrap().dimensions(), size);
        let cut = "the edited picture has 64x64 pixels, the given one 70x65: pictures are cut to whole tokens";
        assert_eq!((said.contains(cut), said.contains("cut to")), (size != given, size != given), "{said}");
    }
}

#[test]
fn the_built_in_editor_edits_pictures_of_any_size_in_its_own() {
    let rig = Rig::new();
    let edit = |image: &str| {
        let args = ["edit", "--image", image, "--instruction", "make the red ball green", "--seed", "1"];
        let output =
            rig.command(&[&args[..], &["--steps", "4", "--out", "b.png", "--force"]].concat()).output().unwrap();
        assert!(output.status.success(), "{}", stderr(&output));
        (png::read(&rig.path("b.png")).unwrap(), stderr(&output))
    };
    let source = image::RgbImage::from_fn(128, 128, |x, y| image::Rgb([200, x as u8, y as u8]));
    png::write(&rig.path("a.png"), &source, &[], true).unwrap();
    let large = image::RgbImage::from_fn(300, 256, |x, y| *source.get_pixel((x.clamp(22, 277) - 22) / 2, y / 2));
    png::write(&rig.path("large.png"), &large, &[], true).unwrap();
    let ((own, quiet), (scaled, told)) = (edit("a.png"), edit("large.png"));
    assert!(
        told.contains("128x128 pixels alone: this one of 300x256 is scaled to that, and cut where it is longer")
            && !quiet.contains("scaled")
    );
    let off = own.iter().zip(scaled.iter()).map(|(a, b)| f64::from(a.abs_diff(*b))).sum::<f64>() / own.len() as f64;
    assert!(scaled.dimensions() == (128, 128) && off < 4.0, "off by {off}");
}

#[test]
fn things_that_cannot_be_told_apart_are_told_of() {
    let rig = Rig::new();
    let said = |prompt: &str| {
        let output =
            rig.run("generate", &["--prompt", prompt, "--seed", "1", "--rounds", "1", "--out", "a.png", "--force"]);
        assert!(output.status.success(), "{}", stderr(&output));
        stderr(&output).contains("are called \"red ball\": the Checker")
    };
    assert!(said("a red ball above another red ball") && !said("a red ball above another blue ball"));
}

#[test]
fn check_gives_a_verdict_for_every_claim() {
    let rig = Rig::new();
    let stripes = image::RgbImage::from_fn(50, 40, |x, y| image::Rgb([200, (5 * x) as u8, (6 * y) as u8]));
    stripes.save(rig.path("photo.jpg")).unwrap();
    let mut seen = Vec::new();
    for looks in ["1", "4"] {
        let result = rig.json("check", &["--image", "photo.jpg", "--prompt", PROMPT, "--looks", looks]).remove(0);
        assert_eq!(result["looks"].to_string(), looks);
        seen.push(result["score"].as_f64());
        let verdicts = result["verdicts"].as_array().unwrap();
        assert_eq!(verdicts.len(), 3);
        for verdict in verdicts {
            let p = verdict["p_yes"].as_f64().unwrap();
            assert!((0.0..=1.0).contains(&p) && verdict["yes"].as_bool() == Some(p >= 0.5));
        }
    }
    assert_ne!(seen[0], seen[1]);
    let wrapped = PROMPT.replacen(' ', "\n  ", 3);
    let result = rig.json("check", &["--image", "photo.jpg", "--prompt", &wrapped]).remove(0);
    assert_eq!((result["prompt"].as_str(), result["verdicts"].as_array().unwrap().len()), (Some(PROMPT), 3));
    let text = rig.good("check", &["--image", "photo.jpg", "--prompt", PROMPT, "--accept", "1"]);
    assert_eq!(text.lines().count(), 4);
    assert!(text.contains("small red ball left of large blue cube") && text.ends_with("does not pass\n"));
}

#[test]
fn a_picture_by_fireflow_is_another_and_its_recipe_says_so() {
    let rig = Rig::new();
    let draw = |out: &str, more: &[&str]| {
        rig.good("generate", &[&["--prompt", PROMPT, "--seed", "1", "--rounds", "1", "--out", out], more].concat());
        fs::read(rig.path(out)).unwrap()
    };
    let (plain, euler) = (draw("a.png", &[]), draw("b.png", &["--solver", "euler"]));
    let fireflow = draw("c.png", &["--solver", "fireflow"]);
    assert!(plain == euler && plain != fireflow);
    let call = |args: &[&str]| String::from_utf8(rig.command(args).output().unwrap().stdout).unwrap();
    assert!(call(&["info", "c.png"]).contains("steps by FireFlow"));
    assert!(png::read_texts(&rig.path("c.png")).unwrap().iter().any(|(_, t)| t.contains("Sampler: FireFlow")));
    assert_eq!(call(&["generate", "--from", "c.png", "--out", "d.png"]), "d.png\n");
    assert!(fs::read(rig.path("d.png")).unwrap() == fireflow);
}

#[test]
fn an_adapter_changes_the_picture_by_its_strength() {
    let rig = Rig::new();
    write_adapter(&rig.path("lora"), "transformer_blocks.0.attn.to_q", (32, 32));
    let draw = |out: &str, more: &[&str]| {
        let args = ["--prompt", "a green ring", "--seed", "1", "--rounds", "1", "--out", out];
        rig.good("generate", &[&args[..], more].concat());
        png::read(&rig.path(out)).unwrap()
    };
    let (plain, full) = (draw("a.png", &[]), draw("b.png", &["--adapter", "all=lora"]));
    assert!(plain != full);
    assert!(draw("c.png", &["--adapter", "all=lora:0"]) == plain);
    assert!(draw("d.png", &["--adapter", "all=lora:1.0"]) == full);
    assert!(draw("e.png", &["--adapter", "lora"]) == plain, "the Editor's adapter draws");
}

#[test]
fn adapters_change_the_roles_that_they_are_for_and_no_others() {
    let rig = Rig::new();
    write_adapter(&rig.path("editor"), "transformer_blocks.0.attn.to_q", (32, 32));
    write_adapter(&rig.path("actor"), "model.language_model.layers.1.mlp.down_proj", (32, 24));

    let turns = |out: &str, more: &[&str]| {
        let args = ["--prompt", PROMPT, "--seed", "1", "--rounds", "2", "--draws", "1", "--accept", "1", "--out", out];
        let line = rig.json("generate", &[&args[..], more].concat()).remove(0);
        (line["turns"].clone(), line["recipe"]["adapters"].clone(), png::read(&rig.path(out)).unwrap())
    };
    let (plain, none, _) = turns("a.png", &[]);
    assert!(none.is_null());
    let (acted, told, _) = turns("b.png", &["--adapter", "actor:40"]);
    assert_eq!(told, json!(["actor:40"]));
    assert_eq!(acted[0]["verdicts"], plain[0]["verdicts"]);
    assert_ne!(acted[1]["action"], plain[1]["action"]);
    let (edited, ..) = turns("c.png", &["--adapter", "none", "--adapter", "editor:40"]);
    assert_eq!((&edited[0]["verdicts"], &edited[1]["action"]), (&plain[0]["verdicts"], &plain[1]["action"]));
    assert_ne!(edited[1]["verdicts"], plain[1]["verdicts"]);

    // The Diffuser's draws, and edits nothing; its recipe draws the same again.
    let of_diffuser = ["--adapter", "diffuser=editor:40", "--adapter", "editor:40"];
    let (drawn, _, picture) = turns("d.png", &of_diffuser);
    assert_ne!(drawn[0]["verdicts"], plain[0]["verdicts"]);
    rig.good("generate", &["--from", "d.png", "--out", "again.png"]);
    assert!(png::read(&rig.path("again.png")).unwrap() == picture);
    let alone =
        ["--image", "a.png", "--instruction", "remove the ball", "--out", "e.png", "--adapter", "diffuser=editor"];
    rig.bad(1, "fits no model that is asked here", "edit", &alone);
    // Nor has an Editor by noise one of its own.
    let by_noise = ["--prompt", PROMPT, "--out", "f.png", "--editor", "flowedit", "--adapter", "editor"];
    rig.bad(1, "flowedit take none for the Editor", "generate", &by_noise);

    // A command that asks only the Checker has no place for the Actor's.
    let check = |adapter: &str| ["--image", "a.png", "--prompt", PROMPT, "--adapter", adapter].map(str::to_owned);
    let (of_actor, of_both) = (check("actor"), check("all=actor"));
    rig.bad(1, "all=DIR is for Diffuser and Checker too", "check", &of_actor.each_ref().map(String::as_str));
    rig.good("check", &of_both.each_ref().map(String::as_str));
}

#[test]
fn the_small_commands_answer_without_models() {
    let rig = Rig::new();
    let run = |args: &[&str]| {
        let output = rig.command(args).output().unwrap();
        assert!(output.status.success(), "{args:?}: {}", stderr(&output));
        String::from_utf8(output.stdout).unwrap()
    };
    for shell in ["bash", "zsh", "fish", "elvish", "powershell"] {
        assert!(run(&["completions", shell]).contains("rlrig"), "{shell}");
    }
    // Words for other tools do not hide a recipe that cannot be read.
    for (own, expected) in
        [(r#"{"version": 99}"#, "use a newer one"), ("{", "the recipe of a.png: this is no trajectory")]
    {
        let texts = [("parameters", "a ball"), ("rlrig", own)].map(|(keyword, text)| (keyword.into(), text.into()));
        png::write(&rig.path("a.png"), &image::RgbImage::new(8, 8), &texts, true).unwrap();
        rlrig::refuses(&rig.command(&["info", "a.png"]).output().unwrap(), 1, expected, own);
    }
    let doctor: Value = serde_json::from_str(&run(&["doctor", "--json"])).unwrap();
    let devices = doctor["devices"].as_array().unwrap();
    let names: Vec<&str> = devices.iter().filter_map(|device| device["name"].as_str()).collect();
    assert_eq!(names, ["cuda", "metal", "cpu"]);
    let first = devices.iter().find(|device| device["usable"] == true);
    assert!(first.is_some_and(|device| device["chosen"] == true), "{devices:?}");
    // What cannot be used says why.
    assert!(devices.iter().all(|device| device["usable"] == true || device["note"].is_string()));
    assert_eq!(doctor["cache"].as_str(), rig.path("hf/hub").to_str());
    assert!(doctor["offline"].as_bool().unwrap() && doctor["threads"].as_u64().unwrap() > 0);
    assert!(run(&["doctor"]).contains("rlrig "));
    fs::create_dir_all(rig.path("hf/hub/models--org--tiny")).unwrap();
    let models: Value = serde_json::from_str(&run(&["models", "--json"])).unwrap();
    assert_eq!(models["cache"]["models"][0], "org/tiny");
    assert!(run(&["models"]).contains("org/tiny"));
    for command in ["generate", "edit", "check"] {
        assert!(run(&[command, "--help"]).contains("Example"), "{command}");
    }
}
