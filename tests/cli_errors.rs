//! What is wrong with a call or a file is said in one line, with exit code 2 for the one and 1 for the other; nothing
//! panics, and nothing half-written stays.

#![allow(clippy::unwrap_used)]

mod rlrig;

use self::rlrig::{AUTOENCODER, PROMPT, Rig, refuses, stderr};
use ::rlrig::{
    io::{self, png},
    rig::{cycle::Ending, trajectory::Trajectory},
};
use candle_core::{Device, Tensor};
use std::{
    fs,
    io::{BufRead, BufReader, Read, Write},
    path::Path,
    process::{Command, Stdio},
};

#[test]
fn prompts_that_nothing_can_be_drawn_of() {
    let rig = Rig::new();
    // The built-in models know the tabletop world alone, so these calls name no model.
    let refused = |expected: &str, args: &[&str]| {
        let output = rig.command(&[&["generate"], args].concat()).output().unwrap();
        refuses(&output, 2, expected, &format!("{args:?}"));
    };
    refused("the prompt is empty", &["--prompt", ""]);
    refused("the prompt is empty", &["--prompt", " \t "]);
    refused("the prompt has 100001 characters", &["--prompt", &"a".repeat(100_001)]);
    refused("unknown shape \"giraffe\"", &["--prompt", "a red giraffe left of a blue cube"]);
    refused("did you mean \"cube\"?", &["--prompt", "a red cubbe"]);
    refused("both red and blue", &["--prompt", "a red blue ball left of a cube"]);
    refused("does not fit", &["--prompt", "a large ball inside a small ring"]);
    let colours = ["red", "yellow", "green", "cyan", "blue", "purple", "pink", "black"];
    let long = colours.map(|c| format!("a small {c} ball left of a large {c} cube")).join("; ");
    refused("is too long: the built-in Diffuser reads 64 tokens", &["--prompt", &long]);
    refused(
        "no picture can show this",
        &["--prompt", "a red ball is left of a blue cube; the blue cube is left of the red ball"],
    );
    refused(
        "no picture can show this",
        &["--prompt", "a red ball left of a blue cube, and a blue cube left of a red ball"],
    );
    refused("\"balls\" asks for several things at once", &["--prompt", "two red balls left of a cube"]);
    refused("say what to draw", &[]);
    refused("cannot be used with", &["--prompt", "a red ball", "--prompt-file", "x"]);
    fs::write(rig.path("empty.txt"), "\n \n").unwrap();
    refused("there are no prompts", &["--prompt-file", "empty.txt"]);
    fs::write(rig.path("graph.json"), r#"{"objects": [], "relations": []}"#).unwrap();
    refused("nothing to draw", &["--graph", "graph.json"]);
    fs::write(
        rig.path("graph.json"),
        r#"{"objects": [{"label": "x"}], "relations": [{"subject": 0, "predicate": "on", "object": 7}]}"#,
    )
    .unwrap();
    refused("object 7 of 1", &["--graph", "graph.json"]);
    let crowd = serde_json::json!({ "objects": vec![serde_json::json!({ "label": "ball" }); 5000], "relations": [] });
    fs::write(rig.path("graph.json"), crowd.to_string()).unwrap();
    refused("at most 200", &["--graph", "graph.json"]);
    let graph = |expected: &str, text: &str| {
        fs::write(rig.path("graph.json"), text).unwrap();
        refused(expected, &["--graph", "graph.json"]);
    };
    graph("graph.json is neither a LAION-SG record", "[[[[");
    graph("line 1 column 4", "[[[[");
    graph("missing field `objects` at line 2", "{\n}");
    graph("missing field `name` at line 1", r#"{"img_id": "1", "items": []}"#);
    let related = |subject: &str, predicate: &str, object: &str| {
        let relation = format!(r#"{{"subject": {subject}, "predicate": "{predicate}", "object": {object}}}"#);
        format!(r#"{{"objects": [{{"label": "a"}}, {{"label": "b"}}], "relations": [{relation}]}}"#)
    };
    graph("invalid value: integer `-1`, expected usize at line 1", &related("0", "on", "-1"));
    graph("graph.json: relation 0 (\"on\") relates object 1 to itself", &related("1", "on", "1"));
    graph("has no predicate", &related("0", " ", "1"));
    graph("relation 0 of the scene graph has 300000 characters", &related("0", &"x".repeat(300_000), "1"));
    graph("control character", r#"{"objects": [{"label": "a\nb"}]}"#);
    graph("graph.json, graph 2 of 2: object 0", r#"[{"objects": [{"label": "ball"}]}, {"objects": [{"label": ""}]}]"#);
    graph("nothing to draw", "\u{feff}{\"objects\": []}");
    fs::write(rig.path("bytes.txt"), b"\xff\xfe\x00").unwrap();
    let output = rig.command(&["generate", "--prompt-file", "bytes.txt"]).output().unwrap();
    refuses(&output, 1, "no UTF-8", "bytes");
    let third = "\u{feff}a red ball\n\na red giraffe left of a blue cube\n";
    fs::write(rig.path("third.txt"), third).unwrap();
    refused("third.txt, line 3: unknown shape", &["--prompt-file", "third.txt"]);
    let output = rig.command(&["generate", "--prompt", "-"]).write_stdin(third).output().unwrap();
    refuses(&output, 2, "stdin, line 3: unknown shape", "stdin");
    fs::write(rig.path("many.txt"), "a red ball\n".repeat(11)).unwrap();
    let many = ["--prompt-file", "many.txt", "--seed", "1", "-n", "100000", "--out", "many"];
    refused("1100000 pictures; at most 1000000 are made in one call", &many);
    assert_eq!(rig.names(), ["bytes.txt", "empty.txt", "graph.json", "many.txt", "third.txt"]);
}

#[test]
fn numbers_out_of_range() {
    let rig = Rig::new();
    let bad = |expected: &str, args: &[&str]| rig.bad(2, expected, "generate", &[&["--prompt", PROMPT], args].concat());
    bad("18446744073709551616", &["--seed", "18446744073709551616"]);
    bad("invalid value", &["--seed=-1"]);
    bad("invalid value", &["--seed", "seven"]);
    bad("there are not 2 seeds", &["--seed", "18446744073709551615", "-n", "2"]);
    bad("given twice", &["--seed", "1", "1"]);
    bad("-n asks for 1", &["--seed", "1", "2", "-n", "1"]);
    bad("-n is 1 to", &["-n", "0"]);
    bad("--rounds is 1 to 100", &["--rounds", "0"]);
    bad("--accept is a probability", &["--accept", "1.5"]);
    bad("--accept is a probability", &["--accept", "nan"]);
    bad("--looks is 1 to 5", &["--looks", "0"]);
    bad("--looks is 1 to 5", &["--looks", "6"]);
    bad("--guidance is 0 to 100", &["--guidance", "nan"]);
    bad("--guidance is 0 to 100", &["--guidance=-3"]);
    bad("--edit-guidance is 0 to 100", &["--edit-guidance", "inf"]);
    bad("--image-guidance is 0 to 100", &["--image-guidance", "101"]);
    let output = rig.command(&["generate", "--prompt", PROMPT, "--steps", "0"]).output().unwrap();
    refuses(&output, 2, "--steps is 1 to 1000", "no steps");
    for limit in ["1000000000", "18446744073709551615"] {
        rig.bad(2, &format!("--limit {limit}: at most 100000"), "eval", &["--limit", limit]);
        let edits = rig.command(&["eval", "--edits", "--limit", limit]).output().unwrap();
        refuses(&edits, 2, "at most 100000", "edits");
    }
    let output = rig.command(&["generate", "--prompt", PROMPT, "--device", "abacus"]).output().unwrap();
    refuses(&output, 2, "invalid value 'abacus'", "no such device");
}

#[test]
fn outputs_that_cannot_be_written() {
    let rig = Rig::new();
    let bad = |code: i32, expected: &str, args: &[&str]| {
        rig.bad(code, expected, "generate", &[&["--prompt", PROMPT, "--seed", "1", "--rounds", "1"], args].concat());
    };
    fs::write(rig.path("there.png"), "mine").unwrap();
    bad(2, "there.png exists", &["--out", "there.png"]);
    assert_eq!(fs::read(rig.path("there.png")).unwrap(), b"mine");
    bad(2, "--save-noise a.png is where the picture goes", &["--out", "a.png", "--save-noise", "a.png"]);
    bad(2, "--trajectory ./a.png is where the picture goes", &["--out", "a.png", "--trajectory", "./a.png"]);
    bad(2, "cannot be written", &["--out", &format!("{}.png", "x".repeat(300))]);
    #[cfg(unix)]
    {
        std::os::unix::fs::symlink(rig.path("nowhere.png"), rig.path("link.png")).unwrap();
        bad(2, "link.png is a link to nothing", &["--out", "link.png"]);
        fs::remove_file(rig.path("link.png")).unwrap();
    }
    assert!(!rig.path("a.png").exists());
    bad(2, "there is no folder", &["--out", "no/such/a.png"]);
    bad(2, "pictures are written as .png", &["--out", "a.jpg"]);
    bad(2, "name a folder", &["--out", "a.png", "-n", "2"]);
    bad(1, "cannot make the folder", &["--out", "there.png/below"]);
    if Path::new("/proc/version").exists() {
        bad(1, "cannot write to /proc", &["--out", "/proc/a.png"]);
    }
    image::RgbImage::new(64, 64).save(rig.path("source.png")).unwrap();
    let edit = |code: i32, expected: &str, out: &str| {
        let args = ["--image", "source.png", "--instruction", "move the ball", "--seed", "1", "--out", out];
        rig.bad(code, expected, "edit", &args);
    };
    edit(2, "there.png exists", "there.png");
    edit(2, "there is no folder", "no/such/a.png");
    fs::remove_file(rig.path("source.png")).unwrap();
    fs::create_dir(rig.path("turns")).unwrap();
    fs::write(rig.path("turns/mine.txt"), "mine").unwrap();
    bad(2, "is not empty", &["--out", "a.png", "--trajectory", "turns"]);
    bad(2, "there.png exists", &["--out", "a.png", "--save-noise", "there.png"]);
    // The trajectory would write over them.
    let inside = |flag: &str, path: &str, more: &[&str]| {
        let expected = format!("{flag} {path} is in the folder of --trajectory");
        bad(2, &expected, &[&[flag, path, "--trajectory", "turns/", "--force"], more].concat());
    };
    inside("--out", "turns/sheet.png", &[]);
    inside("--save-noise", "./turns/index.html", &["--out", "a.png"]);
    inside("--save-noise", "turns/noise", &["-n", "2", "--out", "pictures"]);
    fs::remove_dir(rig.path("pictures")).unwrap();
    assert_eq!(fs::read_dir(rig.path("turns")).unwrap().count(), 1);
    assert_eq!(rig.names(), ["there.png", "turns"]);
    rig.good("generate", &["--prompt", PROMPT, "--seed", "1", "--rounds", "1", "--out", "there.png", "--force"]);
    assert!(png::read(&rig.path("there.png")).is_ok());
}

#[test]
fn an_evaluation_knows_its_folder_before_it_opens_a_model() {
    let rig = Rig::new();
    fs::remove_dir_all(rig.path("klein")).unwrap();
    fs::write(rig.path("file"), "").unwrap();
    fs::create_dir(rig.path("full")).unwrap();
    fs::write(rig.path("full/mine.txt"), "mine").unwrap();
    let bad = |code: i32, expected: &str, args: &[&str]| rig.bad(code, expected, "eval", args);
    bad(2, "full is not empty; name a new folder, or go on with it by --resume", &["--out", "full"]);
    bad(2, "file is a file, not a folder", &["--out", "file"]);
    bad(2, "full is no run of rlrig eval", &["--out", "full", "--resume"]);
    if Path::new("/proc/version").exists() {
        bad(1, "cannot make the folder /proc/run", &["--out", "/proc/run"]);
    }
    bad(1, "klein is not in the cache", &["--out", "new"]);
}

#[test]
fn pictures_that_are_none() {
    let rig = Rig::new();
    let whole = png::encode(&image::RgbImage::new(64, 64), &[]).unwrap();
    fs::write(rig.path("cut.png"), &whole[..whole.len() / 2]).unwrap();
    fs::write(rig.path("text.png"), "not a picture").unwrap();
    fs::write(rig.path("empty.png"), "").unwrap();
    png::write(&rig.path("plain.png"), &image::RgbImage::new(64, 64), &[], false).unwrap();
    png::write(&rig.path("sliver.png"), &image::RgbImage::new(1, 4000), &[], false).unwrap();
    for (expected, name) in [
        ("cut.png is no whole picture", "cut.png"),
        ("neither PNG nor JPEG nor WebP", "text.png"),
        ("neither PNG nor JPEG nor WebP", "empty.png"),
        ("cannot read none.png", "none.png"),
        ("too narrow", "sliver.png"),
    ] {
        rig.bad(1, expected, "check", &["--image", name, "--prompt", PROMPT]);
    }
    rig.bad(1, "cut.png is no whole picture", "edit", &["--image", "cut.png", "--instruction", "x", "--out", "e.png"]);
    rig.bad(
        2,
        "a picture of this model has sides",
        "edit",
        &["--image", "sliver.png", "--instruction", "x", "--out", "e.png"],
    );
    rig.bad(2, "the instruction is empty", "edit", &["--image", "plain.png", "--instruction", " ", "--out", "e.png"]);
    let small = |args: &[&str], code: i32, expected: &str| {
        refuses(&rig.command(args).output().unwrap(), code, expected, &format!("{args:?}"));
    };
    small(&["info", "plain.png"], 2, "carries no text");
    small(&["info", "plain.png", "--json"], 2, "carries no recipe");
    small(&["info", "cut.png"], 1, "is no whole PNG");
    small(&["info", "text.png"], 1, "is no PNG");
    small(&["generate", "--from", "plain.png"], 2, "carries no recipe");
    let texts = [("rlrig".to_owned(), r#"{"version": 99}"#.to_owned())];
    png::write(&rig.path("newer.png"), &image::RgbImage::new(8, 8), &texts, false).unwrap();
    small(&["generate", "--from", "newer.png"], 1, "use a newer one");
    small(&["info", "newer.png"], 1, "use a newer one");
}

/// Rewrites the JSON file `name` of a model.
fn bend(rig: &Rig, name: &str, edit: impl Fn(&mut serde_json::Value)) {
    let mut value = serde_json::from_slice(&fs::read(rig.path(name)).unwrap()).unwrap();
    edit(&mut value);
    fs::write(rig.path(name), value.to_string()).unwrap();
}

const DRAW: [&str; 8] = ["--prompt", PROMPT, "--seed", "1", "--rounds", "1", "--out", "a.png"];

#[test]
fn model_folders_that_are_broken() {
    let weights = "klein/transformer/diffusion_pytorch_model.safetensors";
    let [transformer, vae, text, vlm] =
        ["klein/transformer/config.json", "klein/vae/config.json", "klein/text_encoder/config.json", "vlm/config.json"];
    let processor = "vlm/preprocessor_config.json";
    type Break = Box<dyn Fn(&Rig)>;
    let write = |name: &'static str, bytes: Vec<u8>| -> Break {
        Box::new(move |rig| fs::write(rig.path(name), &bytes).unwrap())
    };
    let remove = |name: &'static str| -> Break { Box::new(move |rig| fs::remove_file(rig.path(name)).unwrap()) };
    let set = |name: &'static str, path: &'static str, to: serde_json::Value| -> Break {
        Box::new(move |rig| bend(rig, name, |v| *v.pointer_mut(path).unwrap() = to.clone()))
    };
    let header = |length: u64, json: &str| [&length.to_le_bytes()[..], json.as_bytes()].concat();
    let huge = r#"{"x": {"dtype": "F32", "shape": [1099511627776, 4096], "data_offsets": [0, 18014398509481984]}}"#;
    let cases: Vec<(&str, Break)> = vec![
        ("klein/transformer has neither", remove(weights)),
        (
            "file not fully covered",
            Box::new(move |rig| {
                let bytes = fs::read(rig.path(weights)).unwrap();
                fs::write(rig.path(weights), &bytes[..bytes.len() - 100]).unwrap();
            }),
        ),
        ("header too large", write(weights, header(1 << 60, "{}"))),
        ("file not fully covered", write(weights, header(huge.len() as u64, huge))),
        ("header too small", write(weights, Vec::new())),
        ("cannot read klein/model_index.json", remove("klein/model_index.json")),
        ("model_index.json is not what it should be", write("klein/model_index.json", b"{".to_vec())),
        ("only Flux2KleinPipeline", set("klein/model_index.json", "/_class_name", "OtherPipeline".into())),
        ("num_layers: 1000000000000", set(transformer, "/num_layers", 1_000_000_000_000u64.into())),
        ("num_attention_heads: 1000000000", set(transformer, "/num_attention_heads", 1_000_000_000u64.into())),
        ("in_channels: 0", set(transformer, "/in_channels", 0.into())),
        ("channels: 9223372036854775808", set(transformer, "/timestep_guidance_channels", (1u64 << 63).into())),
        ("asks for [1000000000]", set(vae, "/block_out_channels/0", 1_000_000_000u64.into())),
        ("norm_num_groups 0", set(vae, "/norm_num_groups", 0.into())),
        ("levels must be 1 to 10, not 66", set(vae, "/block_out_channels", vec![8; 66].into())),
        ("patch_size must be 1 to 16", set(vae, "/patch_size", vec![1u64 << 40; 2].into())),
        ("sample_size must be 1 to 4096, not 4294967424", set(vae, "/sample_size", 4_294_967_424u64.into())),
        (
            "axes_dims_rope [9223372036854775808, 9223372036854775808, ",
            Box::new(move |rig| {
                bend(rig, transformer, |v| {
                    v["axes_dims_rope"][0] = (1u64 << 63).into();
                    v["axes_dims_rope"][1] = (1u64 << 63).into();
                });
            }),
        ),
        ("latent_channels must be 1 to 65536", set(vae, "/latent_channels", (1u64 << 63).into())),
        ("embed_tokens.weight is", set(text, "/hidden_size", 32.into())),
        ("hidden_size must be 1 to 1048576, not 1000000000", set(text, "/hidden_size", 1_000_000_000u64.into())),
        ("intermediate_size must be 1 to", set(text, "/intermediate_size", 0.into())),
        (
            "num_hidden_layers must be 1 to 4096, not 0",
            Box::new(move |rig| {
                bend(rig, text, |v| {
                    v["num_hidden_layers"] = 0.into();
                    v["head_dim"] = (1u64 << 62).into();
                });
            }),
        ),
        ("head_dim must be 1 to 1048576", set(text, "/head_dim", (1u64 << 62).into())),
        ("num_key_value_heads must be 1 to", set(text, "/num_key_value_heads", 0.into())),
        ("vocab_size must be 1 to", set(text, "/vocab_size", (1u64 << 40).into())),
        ("max_length: 1000000000000", set(text, "/prompt_embedding/max_length", 1_000_000_000_000u64.into())),
        (
            "prompts of 1000000000000 tokens: ",
            Box::new(move |rig| {
                bend(rig, text, |v| {
                    v["max_position_embeddings"] = (1u64 << 62).into();
                    v["prompt_embedding"]["max_length"] = 1_000_000_000_000u64.into();
                });
            }),
        ),
        ("layers: [99, ", set(text, "/prompt_embedding/layers/0", 99.into())),
        ("tokenizer.json is no tokenizer", write("klein/tokenizer/tokenizer.json", b"{}".to_vec())),
        ("cannot read vlm/config.json", remove("vlm/config.json")),
        ("language_model.layers.2.", set(vlm, "/text_config/num_hidden_layers", 3.into())),
        ("num_hidden_layers must be 1 to", set(vlm, "/text_config/num_hidden_layers", 1_000_000_000_000u64.into())),
        ("mrope_section must be", set(vlm, "/text_config/rope_parameters/mrope_section/0", (1u64 << 63).into())),
        ("vision_config.patch_size must be 1 to", set(vlm, "/vision_config/patch_size", 0.into())),
        ("vision_config.num_heads must be 1 to", set(vlm, "/vision_config/num_heads", 0.into())),
        ("vision_config.temporal_patch_size must", set(vlm, "/vision_config/temporal_patch_size", (1u64 << 62).into())),
        ("vision_config.in_channels must", set(vlm, "/vision_config/in_channels", (1u64 << 62).into())),
        ("vision_config.depth must be 1 to 4096", set(vlm, "/vision_config/depth", (1u64 << 62).into())),
        ("patches of no size", set(processor, "/patch_size", 0.into())),
        ("shortest_edge: 1000000000000", set(processor, "/size/shortest_edge", 1_000_000_000_000u64.into())),
        ("merge_size: 4611686018427387904", set(processor, "/merge_size", (1u64 << 62).into())),
        ("vlm/model.safetensors is no whole", write("vlm/model.safetensors", header(8, "{\"a\": 1}"))),
    ];
    for (i, (expected, break_it)) in cases.into_iter().enumerate() {
        let rig = Rig::new();
        break_it(&rig);
        let output = rig.run("generate", &DRAW);
        assert!(matches!(output.status.code(), Some(1 | 2)), "case {i}: {:?} {}", output.status, stderr(&output));
        let said = stderr(&output);
        assert!(said.contains("error: ") && said.contains(expected) && !said.contains("panicked"), "case {i}: {said}");
        assert!(rig.names().is_empty(), "case {i} leaves {:?}", rig.names());
    }
}

#[test]
fn names_of_models_that_are_none() {
    let rig = Rig::new();
    let bad = |code: i32, expected: &str, model: &str| {
        let args = ["generate", "--prompt", PROMPT, "--model", model, "--vlm", "vlm", "--out", "a.png"];
        refuses(&rig.command(&args).output().unwrap(), code, expected, model);
    };
    bad(2, "neither a folder nor a hub id", "./none");
    bad(2, "neither a folder nor a hub id", "a/b/c");
    bad(1, "HF_HUB_OFFLINE", "org/model");
    bad(1, "vlm has no folder transformer/", "vlm");
    rig.bad(2, "there is no folder none", "generate", &[&DRAW[..], &["--adapter", "none:0.5"]].concat());
    fs::create_dir(rig.path("lora")).unwrap();
    rig.bad(1, "adapter_config.json", "generate", &[&DRAW[..], &["--adapter", "lora"]].concat());
}

#[test]
fn weights_that_are_no_numbers() {
    for (file, expected) in [
        ("klein/transformer/diffusion_pytorch_model.safetensors", "not finite"),
        ("klein/text_encoder/model.safetensors", "not finite"),
        ("klein/vae/diffusion_pytorch_model.safetensors", "not finite"),
        ("vlm/model.safetensors", "not finite"),
    ] {
        let rig = Rig::new();
        let tensors = candle_core::safetensors::load(rig.path(file), &Device::Cpu).unwrap();
        let broken: std::collections::HashMap<String, Tensor> = tensors
            .into_iter()
            .map(|(name, t)| {
                let nan = if t.dtype().is_float() && t.rank() > 1 { t.affine(f64::NAN, 0.0).unwrap() } else { t };
                (name, nan)
            })
            .collect();
        candle_core::safetensors::save(&broken, rig.path(file)).unwrap();
        rig.bad(1, expected, "generate", &DRAW);
        assert!(rig.names().is_empty(), "{file} leaves {:?}", rig.names());
    }
}

#[test]
fn noise_that_does_not_fit() {
    let rig = Rig::new();
    let bad = |code: i32, expected: &str| {
        rig.bad(code, expected, "generate", &[&DRAW[..], &["--init-noise", "n.safetensors"]].concat());
    };
    bad(1, "cannot read n.safetensors");
    fs::write(rig.path("n.safetensors"), (1u64 << 60).to_le_bytes()).unwrap();
    bad(1, "no whole safetensors file");
    let save = |name: &str, tensor: Tensor| {
        let tensors = std::collections::HashMap::from([(name.to_owned(), tensor)]);
        candle_core::safetensors::save(&tensors, rig.path("n.safetensors")).unwrap();
    };
    let zeros = |shape: &[usize]| Tensor::zeros(shape, candle_core::DType::F32, &Device::Cpu).unwrap();
    save("latents", zeros(&[1]));
    bad(1, "no tensor named noise");
    save("noise", zeros(&[1, 3, 2, 2]));
    bad(2, "noise for pictures");
    save("noise", zeros(&[3, 16, 4, 4]));
    bad(2, "noise for 3 pictures");
    save("noise", zeros(&[1, 16, 4, 4]).affine(f64::NAN, f64::NAN).unwrap());
    bad(2, "not finite");
}

/// Lets a call run out of room for `file`, which its error must name. A limit on the size of files, in blocks of 512
/// bytes, stands in for a full disk: writes fail in the middle in the same way.
#[cfg(unix)]
fn no_room_for(rig: &Rig, file: &str, blocks: usize, args: &[&str]) {
    let limited = format!("trap '' XFSZ; ulimit -f {blocks}; exec \"$0\" \"$@\"");
    let mut call = vec!["-c", &limited, env!("CARGO_BIN_EXE_rlrig")];
    call.extend(args);
    let output = Command::new("sh").args(call).current_dir(rig.dir.path()).env("RLRIG_LOG", "error").output().unwrap();
    refuses(&output, 1, &format!("cannot write {file}: "), file);
    assert!(stderr(&output).contains("File too large"), "{}", stderr(&output));
    let names = io::files_under(rig.dir.path()).unwrap();
    let temporary = |name: &&String| name.contains(".rlrig-") || name.contains(".tmp");
    assert_eq!(names.iter().find(temporary), None, "{file}");
}

#[cfg(unix)]
#[test]
fn a_disk_without_room_leaves_nothing_half_written() {
    let rig = Rig::new();
    let models = ["--model", "klein", "--vlm", "vlm", "--steps", "2", "--rounds", "1"];
    let draw = [&["generate", "--prompt", PROMPT, "--out", "picture.png"], &models[..]].concat();
    no_room_for(&rig, "picture.png", 1, &draw);
    assert!(rig.names().is_empty(), "{:?}", rig.names());
    // The picture has room, but not the sheet, which is larger.
    no_room_for(&rig, "turns/sheet.png", 40, &[&draw[..], &["--trajectory", "turns"]].concat());
    assert_eq!(rig.names(), ["picture.png", "turns"]);
    assert_eq!(io::files_under(&rig.path("turns")).unwrap(), ["trajectory.json", "turn-1.png"]);
    assert!(png::read(&rig.path("picture.png")).unwrap() == png::read(&rig.path("turns/turn-1.png")).unwrap());
    let export = ["world", "export", "--split", "val", "--count", "1", "--out", "world"];
    no_room_for(&rig, "world/images/000000.png", 1, &export);
    assert!(io::files_under(&rig.path("world")).unwrap().is_empty());
}

#[cfg(unix)]
#[test]
fn an_evaluation_without_room_goes_on_when_there_is_some() {
    let rig = Rig::new();
    let few = ["--limit", "12", "--rounds", "2", "--accept", "1", "--out", "run"];
    let eval = [&["eval", "--model", "klein", "--vlm", "vlm", "--steps", "2"], &few[..]].concat();
    let resume = [&eval[..], &["--resume"]].concat();
    let whole_lines = || fs::read(rig.path("run/samples.jsonl")).unwrap().iter().filter(|byte| **byte == b'\n').count();
    let documents = || {
        let mut names = io::files_under(&rig.path("run")).unwrap();
        names.retain(|name| !name.contains('/'));
        names
    };
    // Pictures have room, but not so many lines. The file of lines grows, so its last one may be torn.
    no_room_for(&rig, "run/samples.jsonl", 32, &eval);
    assert!((1..24).contains(&whole_lines()));
    assert_eq!(documents(), [".lock", "config.json", "samples.jsonl"]);
    // All lines have room, but not the page with the pictures. The results would follow it.
    no_room_for(&rig, "run/report.html", 300, &resume);
    assert_eq!(whole_lines(), 24);
    assert_eq!(documents(), [".lock", "config.json", "samples.jsonl", "table.md", "table.tex"]);
    rig.good("eval", &[&few[..], &["--resume"]].concat());
    assert_eq!(whole_lines(), 24);
    assert!(documents().contains(&"results.json".to_owned()));
}

#[cfg(unix)]
#[test]
fn a_training_without_room_goes_on_when_there_is_some() {
    let rig = Rig::new();
    fs::write(rig.path("small.toml"), AUTOENCODER).unwrap();
    let begin = ["train", "pretrain", "--device", "cpu", "--config", "small.toml", "--out", "run"];
    let begin = [&begin[..], &["--set", "train.checkpoint_every=1"]].concat();
    let resume = ["train", "pretrain", "--device", "cpu", "--resume", "run"];
    let checkpoints = || io::files_under(&rig.path("run/checkpoints")).unwrap();
    no_room_for(&rig, "run/checkpoints/step-00000001.safetensors", 40, &begin);
    assert!(checkpoints().is_empty() && !rig.path("run/model").exists());
    // The checkpoint has room, but not the sample pictures of the last step.
    no_room_for(&rig, "run/samples/00000002/reconstructions.png", 420, &resume);
    assert_eq!(checkpoints(), ["step-00000001.safetensors"]);
    let resumed = rig.command(&resume).output().unwrap();
    assert!(resumed.status.success(), "{}", stderr(&resumed));
    assert_eq!(resumed.stdout, b"run/model\n");
}

/// Starts a loop of many rounds, interrupts it as soon as stderr says `when`, and gives its exit code and last words.
#[cfg(unix)]
fn interrupted(rig: &Rig, more: &[&str], when: &str) -> (Option<i32>, String) {
    let asked =
        ["generate", "--model", "klein", "--vlm", "vlm", "--prompt", PROMPT, "--rounds", "100", "--accept", "1"];
    let args = [&asked[..], &["--out", "a.png", "--trajectory", "turns"], more].concat();
    interrupted_call(rig, &args, when)
}

/// The same of any call.
#[cfg(unix)]
fn interrupted_call(rig: &Rig, args: &[&str], when: &str) -> (Option<i32>, String) {
    let mut child = Command::new(assert_cmd::cargo::cargo_bin!("rlrig"))
        .current_dir(rig.dir.path())
        .args(args)
        .stderr(Stdio::piped())
        .stdout(Stdio::null())
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(child.stderr.take().unwrap());
    let mut said = String::new();
    while !said.contains(when) {
        assert!(lines.read_line(&mut said).unwrap() > 0, "it ended early: {said}");
    }
    assert!(Command::new("kill").args(["-INT", &child.id().to_string()]).status().unwrap().success());
    lines.read_to_string(&mut said).unwrap();
    (child.wait().unwrap().code(), said)
}

#[cfg(unix)]
#[test]
fn ctrl_c_keeps_the_best_so_far() {
    let rig = Rig::new();
    let (code, said) = interrupted(&rig, &["--seed", "1", "--draws", "1", "--steps", "2"], "round 2");
    assert_eq!(code, Some(1), "{said}");
    assert!(said.contains("interrupted; 1 of 1 pictures are kept"), "{said}");
    let texts = png::read_texts(&rig.path("a.png")).unwrap();
    let trajectory = Trajectory::from_json(&texts[1].1).unwrap();
    assert_eq!(trajectory.ending, Ending::Cancelled);
    assert!((2..100).contains(&trajectory.turns.len()));
    assert!(rig.path("turns/index.html").exists());
}

#[cfg(unix)]
#[test]
fn ctrl_c_in_any_round_keeps_the_rounds_before_it() {
    // Two rounds draw and the third edits; each of them takes far longer than the signal.
    for (when, rounds) in [("seed ", 0), ("round 1: ", 1), ("edit: ", 2)] {
        let rig = Rig::new();
        bend(&rig, "klein/vae/config.json", |config| config["sample_size"] = 128.into());
        let (code, said) = interrupted(&rig, &["--draws", "2", "--steps", "1000"], when);
        assert_eq!(code, Some(1), "{said}");
        let kept = usize::from(rounds > 0);
        assert!(said.contains(&format!("interrupted; {kept} of 1 pictures are kept")), "{said}");
        // No temporary file stays either.
        let turns = io::files_under(&rig.path("turns")).unwrap();
        if rounds == 0 {
            assert!(rig.names() == ["turns"] && turns.is_empty(), "{:?} {turns:?}", rig.names());
            continue;
        }
        assert_eq!(rig.names(), ["a.png", "turns"]);
        let documents = ["index.html", "sheet.png", "trajectory.json"];
        assert_eq!(turns, [&documents[..], &["turn-1.png", "turn-2.png"][..rounds]].concat());
        let texts = png::read_texts(&rig.path("a.png")).unwrap();
        let trajectory = Trajectory::from_json(&texts[1].1).unwrap();
        assert_eq!((trajectory.ending, trajectory.turns.len()), (Ending::Cancelled, rounds), "{said}");
        let best = png::read(&rig.path(&format!("turns/turn-{}.png", trajectory.best + 1))).unwrap();
        assert!(png::read(&rig.path("a.png")).unwrap() == best);
    }
}

#[cfg(unix)]
#[test]
fn ctrl_c_in_the_middle_of_a_single_edit_writes_nothing() {
    let rig = Rig::new();
    png::write(&rig.path("plain.png"), &image::RgbImage::new(64, 64), &[], false).unwrap();
    let args = ["edit", "--image", "plain.png", "--instruction", "x", "--steps", "1000", "--out", "e.png"];
    let (code, said) = interrupted_call(&rig, &[&args[..], &["--model", "klein"]].concat(), "seed ");
    assert_eq!(code, Some(1), "{said}");
    assert!(said.contains("interrupted; nothing was written"), "{said}");
    assert_eq!(rig.names(), ["plain.png"]);
}

#[cfg(unix)]
#[test]
fn ctrl_c_in_the_middle_of_a_training_keeps_a_checkpoint_to_go_on_from() {
    let rig = Rig::new();
    fs::write(rig.path("small.toml"), AUTOENCODER).unwrap();
    let endless = ["--config", "small.toml", "--out", "run", "--set", "train.steps=1000000"];
    let args = [&["train", "pretrain", "--device", "cpu"][..], &endless].concat();
    let (code, said) = interrupted_call(&rig, &args, "one step took");
    assert_eq!(code, Some(1), "{said}");
    let (_, told) = said.split_once("error: stopped after step ").unwrap();
    let (step, told) = told.split_once("; ").unwrap();
    assert!(told.starts_with("go on with: rlrig train pretrain --resume run\n"), "{said}");
    let step: u64 = step.parse().unwrap();
    assert!(rig.path(&format!("run/checkpoints/step-{step:08}.safetensors")).is_file());
    let steps = format!("train.steps={}", step + 1);
    let args = ["train", "pretrain", "--device", "cpu", "--resume", "run", "--set", &steps];
    let resumed = rig.command(&args).output().unwrap();
    assert!(resumed.status.success(), "{}", stderr(&resumed));
    assert_eq!(resumed.stdout, b"run/model\n");
}

#[cfg(unix)]
#[test]
fn a_reader_that_has_seen_enough_is_no_error() {
    let rig = Rig::new();
    let mut child = Command::new(assert_cmd::cargo::cargo_bin!("rlrig"))
        .current_dir(rig.dir.path())
        .args(["completions", "bash"])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    drop(child.stdout.take());
    let output = child.wait_with_output().unwrap();
    assert!(output.status.success() && output.stderr.is_empty(), "{}", stderr(&output));
    std::io::stdout().flush().unwrap();
}
