//! Pretraining of each model for a few steps: what is stopped and resumed ends bit for bit as what was not.

#![allow(clippy::unwrap_used)]

use candle_core::{DType, Device, Var};
use rlrig::{
    error::Usage,
    flow::{field::pack, pipeline::Klein, sampler::Velocity},
    models::{Folder, Params, flux2::Flux2, peft::Peft, qwen3_vl::Qwen3VL},
    scene::tabletop::{render::render, split::Split, tasks},
    train::{
        pretrain::PretrainConfig,
        request::Request,
        run::{End, Event},
    },
};
use serde_json::json;
use std::{
    collections::HashMap,
    fs,
    path::{Path, PathBuf},
    sync::atomic::{AtomicBool, Ordering},
};

#[test]
fn sizes_of_which_nothing_can_be_made_are_mistakes_of_the_config() {
    let dir = tempfile::tempdir().unwrap();
    let config = dir.path().join("config.toml");
    for (objective, set, named) in [
        ("diffuser", "heads=0", "heads"),
        ("diffuser", "head_dim=20", "head_dim is a multiple of 8"),
        ("diffuser", "text.layers=0", "text.layers"),
        ("diffuser", "text.heads=0", "text.heads"),
        ("diffuser", "text.heads=5", "text.hidden one of twice text.heads"),
        ("diffuser", "evaluation.steps=0", "evaluation.steps"),
        ("vlm", "shape.patch=0", "patch"),
        ("vlm", "shape.merge=0", "merge"),
        ("vlm", "shape.patch=12", "divide a picture's side"),
        ("vlm", "shape.vision_heads=0", "heads"),
        ("vlm", "shape.hidden=0", "hidden"),
        ("autoencoder", "statistics=0", "autoencoder.statistics"),
        ("autoencoder", "held_out=0", "autoencoder.held_out"),
    ] {
        fs::write(&config, format!("objective = '{objective}'")).unwrap();
        let set = vec![format!("{objective}.{set}")];
        let request = Request { config: Some(config.clone()), resume: None, out: Some(dir.path().join("no")), set };
        let Err(error) = request.prepare::<PretrainConfig>() else { panic!("{:?} was taken", request.set) };
        assert!(error.is::<Usage>() && error.to_string().contains(named), "{:?}: {error:#}", request.set);
    }
}

/// Twenty pictures of other prompts than theirs, as a Diffuser might have drawn them; at `known` ones it is told what they
/// should show.
fn draw(folder: &Path, known: bool) {
    fs::create_dir(folder).unwrap();
    let mut lines = String::new();
    for index in 0..20 {
        let [sample, other] = [0, 1].map(|seed| tasks::text_to_image(seed, Split::Train, index, 2, 3));
        let (id, file) = (format!("train-{index:02}"), format!("{index}.png"));
        render(&other.scene).save(folder.join(&file)).unwrap();
        let mut line = json!({ "id": id, "dataset": "tabletop", "prompt": sample.prompt, "file": file });
        if known {
            line["scene"] = json!(sample.scene);
        }
        lines += &format!("{line}\n");
    }
    fs::write(folder.join("samples.jsonl"), lines).unwrap();
}

/// Trains, at most until `stop_at`; what was measured.
fn train(request: &Request, stop_at: Option<u64>) -> (End, HashMap<String, f64>) {
    let (stop, mut measured) = (AtomicBool::new(false), HashMap::new());
    let prepared = request.prepare::<PretrainConfig>().unwrap();
    let end = prepared.train(&stop, &mut |event| match event {
        Event::Step(step, _) => stop.store(Some(step) == stop_at, Ordering::Relaxed),
        Event::Evaluated(_, metrics) => measured.extend(metrics.iter().cloned()),
        _ => {}
    });
    (end.unwrap(), measured)
}

/// Trains by a config straight through, and again with a stop after the first step; both must end in the same files. What
/// the first run measured.
fn resumes_exactly(dir: &Path, config: &str, files: &[&str]) -> HashMap<String, f64> {
    let file = dir.join("config.toml");
    fs::write(&file, config).unwrap();
    let run = |name: &str| {
        let (config, out) = (Some(file.clone()), Some(dir.join(name)));
        Request { config, resume: None, out, set: Vec::new() }
    };
    let (end, measured) = train(&run("straight"), None);
    assert_eq!(end, End::Done);
    assert_eq!(train(&run("stopped"), Some(1)).0, End::Stopped(1));
    let resume = Request { config: None, resume: Some(dir.join("stopped")), out: None, set: Vec::new() };
    assert_eq!(train(&resume, None).0, End::Done);
    for file in files {
        let bytes = |name: &str| fs::read(dir.join(name).join("model").join(file)).unwrap();
        assert!(bytes("straight") == bytes("stopped"), "the resumed run ends in another {file}");
    }
    measured
}

fn weights(folder: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("weights/tabletop").join(folder)
}

#[test]
fn the_vlm_goes_on_with_drawn_pictures_and_resumes() {
    let dir = tempfile::tempdir().unwrap();
    let (drawn, init) = (dir.path().join("drawn"), weights("vlm"));
    draw(&drawn, false);
    let config = format!(
        "objective = 'vlm'
         train = {{ steps = 2, batch = 4, micro_batch = 2, evaluate_every = 2, checkpoint_every = 1, samples_every = 2 }}
         vlm = {{ init = {init:?}, drawn = [{drawn:?}], drawn_share = 0.9, act = 1.0, evaluation = 2 }}"
    );
    let measured = resumes_exactly(dir.path(), &config, &["model.safetensors"]);
    assert!(["edits/mend", "drawn/mend", "drawn/verdicts"].iter().all(|name| (0.0..=1.0).contains(&measured[*name])));
    let samples = fs::read_dir(dir.path().join("straight/samples")).unwrap().next().unwrap().unwrap().path();
    let words = fs::read_to_string(samples.join("answers.txt")).unwrap();
    assert_eq!(words.matches("    edit: ").count(), 16);
    assert!(words.contains(" (yes) ") && words.contains(" (no) ") && samples.join("answers.png").is_file());
}

#[test]
fn an_adapter_for_the_actor_is_trained_on_edits_alone_and_resumes() {
    let dir = tempfile::tempdir().unwrap();
    let (drawn, init) = (dir.path().join("drawn"), weights("vlm"));
    draw(&drawn, false);
    let config = format!(
        "objective = 'vlm'
         train = {{ steps = 2, batch = 4, micro_batch = 2, evaluate_every = 2, checkpoint_every = 1, log_every = 1 }}
         optim = {{ muon = false, lr = 0.01 }}
         [vlm]
         init = {init:?}
         adapter = {{ rank = 2, alpha = 4.0 }}
         drawn = [{drawn:?}]
         drawn_share = 0.5
         act_objects = 5
         evaluation = 4"
    );
    let measured = resumes_exactly(dir.path(), &config, &["adapter_model.safetensors", "adapter_config.json"]);
    assert!((0.0..=1.0).contains(&measured["drawn/mend"]));
    let steps = fs::read_to_string(dir.path().join("straight/metrics.jsonl")).unwrap();
    assert!(steps.contains("loss/act") && !steps.contains("loss/verdict") && !steps.contains("loss/describe"));
    // It is an adapter of the VLM's decoder, and no longer the one that changes nothing.
    let adapter = Peft::open(&Folder::from(dir.path().join("straight/model").as_path())).unwrap().learned();
    let folder = Folder::from(init.as_path());
    let params = Params::open(&folder, "model", DType::F32, &Device::Cpu).unwrap().adapted(vec![adapter.clone()]);
    Qwen3VL::new(&folder.json("config.json").unwrap(), &params).unwrap();
    adapter.check().unwrap();
    let moved = |var: &Var| var.as_tensor().abs().unwrap().sum_all().unwrap().to_scalar::<f32>().unwrap() > 0.0;
    let vars = adapter.vars();
    let mut ups = vars.iter().filter(|(name, _)| name.contains("lora_B")).peekable();
    assert!(ups.peek().is_some() && ups.all(|(_, var)| moved(var)));
    let without = config.replace(&format!("init = {init:?}"), "");
    for (config, word) in
        [(without, "on the model of init"), (config + "\nparse = 0.5", "vlm.parse counts for nothing")]
    {
        fs::write(dir.path().join("config.toml"), config).unwrap();
        let (config, out) = (Some(dir.path().join("config.toml")), Some(dir.path().join("no")));
        let request = Request { config, resume: None, out, set: Vec::new() };
        let Err(error) = request.prepare::<PretrainConfig>() else { panic!("it was taken") };
        assert!(error.is::<Usage>() && error.to_string().contains(word), "{error:#}");
    }
}

#[test]
fn a_diffuser_learns_to_draw_and_edit_and_resumes() {
    let dir = tempfile::tempdir().unwrap();
    let (drawn, vae) = (dir.path().join("drawn"), weights("vae"));
    draw(&drawn, false);
    // The head that tells what lies where is part of the state, not of the model: a third step shows whether it came back.
    let config = format!(
        "objective = 'diffuser'
         train = {{ steps = 3, batch = 4, micro_batch = 2, evaluate_every = 3, checkpoint_every = 1, ema = 0.9 }}
         [diffuser]
         autoencoder = {vae:?}
         drawn = [{drawn:?}]
         heads = 2
         head_dim = 16
         double_blocks = 1
         single_blocks = 1
         text = {{ vocabulary = 320, hidden = 32, layers = 2, heads = 2 }}
         evaluation = {{ prompts = 1, steps = 2, guidance = 3.0 }}
         stages = [
             {{ steps = 1, min_objects = 1, max_objects = 1, edits = 0.5 }},
             {{ steps = 0, min_objects = 2, max_objects = 3, edits = 0.5, touching = 1.0 }},
         ]"
    );
    let files = ["transformer/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors"];
    let measured = resumes_exactly(dir.path(), &config, &files);
    assert!(["eval/perfect", "eval/edit_perfect"].iter().all(|name| (0.0..=1.0).contains(&measured[*name])));
}

#[test]
fn an_adapter_for_the_editor_is_trained_and_resumes() {
    let dir = tempfile::tempdir().unwrap();
    let (vae, init, redrawn) = (weights("vae"), weights(""), dir.path().join("redrawn"));
    draw(&redrawn, true);
    let config = format!(
        "objective = 'diffuser'
         train = {{ steps = 3, batch = 4, micro_batch = 2, evaluate_every = 3, checkpoint_every = 1, samples_every = 3 }}
         optim = {{ muon = false, lr = 1e-3 }}
         [diffuser]
         autoencoder = {vae:?}
         init = {init:?}
         drawn = [{redrawn:?}]
         adapter = {{ rank = 2, alpha = 4.0 }}
         evaluation = {{ prompts = 1, steps = 2, guidance = 3.0 }}
         stages = [{{ steps = 0, min_objects = 2, max_objects = 3, edits = 1.0, moves = 0.5 }}]"
    );
    let measured = resumes_exactly(dir.path(), &config, &["adapter_model.safetensors", "adapter_config.json"]);
    assert!(["eval/edit_perfect", "eval/mended"].iter().all(|name| (0.0..=1.0).contains(&measured[*name])));
    let others = ["eval/perfect", "eval/many_perfect", "eval/drawn_edit_perfect"];
    assert!(others.iter().all(|name| !measured.contains_key(*name)), "{measured:?}");
    let samples = fs::read_dir(dir.path().join("straight/samples")).unwrap().next().unwrap().unwrap().path();
    assert!(samples.join("edit.png").is_file() && !samples.join("draw.png").exists());

    // It is an adapter of the Editor's transformer, and no longer the one that changes nothing.
    let adapter = Peft::open(&Folder::from(dir.path().join("straight/model").as_path())).unwrap().adapter(1.0);
    let init = Folder::from(init.as_path());
    let noise = |klein: &Klein| klein.noise(0, 0, klein.tokens(128, 128).unwrap()).unwrap();
    let (klein, edited) =
        Klein::open_with(&init, DType::F32, &Device::Cpu, Vec::new(), vec![vec![adapter.clone()]]).unwrap();
    adapter.check().unwrap();
    let state = pack(&noise(&klein)).unwrap().unsqueeze(0).unwrap();
    let velocity = |transformer: &Flux2| {
        let references = [vec![noise(&klein)]];
        let field = klein.field_of(transformer, &["add a red ball"], &references, (8, 8), 1.0).unwrap();
        field.velocity(&state, 0.5, 0).unwrap().flatten_all().unwrap().to_vec1::<f32>().unwrap()
    };
    assert_ne!(velocity(&klein.transformer), velocity(&edited[0]));

    // It may be taught to draw as well.
    let drawing = config
        .replace("max_objects = 3, edits = 1.0", "max_objects = 4, edits = 0.5")
        .replace("steps = 3", "steps = 1");
    let file = dir.path().join("drawing.toml");
    fs::write(&file, &drawing).unwrap();
    let request =
        Request { config: Some(file.clone()), resume: None, out: Some(dir.path().join("draws")), set: Vec::new() };
    let measured = train(&request, None).1;
    let drawn = ["eval/perfect", "eval/many_perfect", "eval/edit_perfect"];
    assert!(drawn.iter().all(|name| (0.0..=1.0).contains(&measured[*name])), "{measured:?}");
    let sheets = dir.path().join("draws/samples").read_dir().unwrap().next().unwrap().unwrap().path();
    assert!(["draw.png", "draw_many.png", "edit.png"].iter().all(|name| sheets.join(name).is_file()));
    fs::write(&file, drawing.replace("init = ", "# ")).unwrap();
    let request = Request { out: Some(dir.path().join("no")), ..request };
    let Err(error) = request.prepare::<PretrainConfig>() else { panic!("an adapter of no model was taken") };
    assert!(error.is::<Usage>() && error.to_string().contains("init, which is missing"), "{error:#}");
}

#[test]
fn a_decoder_trained_alone_leaves_the_latents_as_they_are_and_resumes() {
    let dir = tempfile::tempdir().unwrap();
    let init = weights("vae");
    let config = format!(
        "objective = 'autoencoder'
         train = {{ steps = 3, batch = 2, evaluate_every = 3, checkpoint_every = 1, ema = 0.5, precision = 'f32' }}
         autoencoder = {{ init = {init:?}, decoder_only = true, touching = 1.0, crop = 32, crop_steps = 2, held_out = 2 }}"
    );
    const FILE: &str = "diffusion_pytorch_model.safetensors";
    let measured = resumes_exactly(dir.path(), &config, &[FILE]);
    assert!(measured["psnr"] > 25.0 && (0.0..=1.0).contains(&measured["perfect"]), "{measured:?}");
    let open = |path: PathBuf| candle_core::safetensors::load(path, &Device::Cpu).unwrap();
    let (before, after) = (open(init.join(FILE)), open(dir.path().join("straight/model").join(FILE)));
    // Nothing reads the count of batches.
    for (name, before) in before.iter().filter(|(name, _)| *name != "bn.num_batches_tracked") {
        let change = (before.to_dtype(DType::F32).unwrap() - after[name].to_dtype(DType::F32).unwrap()).unwrap();
        let change = change.abs().unwrap().max_all().unwrap().to_scalar::<f32>().unwrap();
        let is_decoder = name.starts_with("decoder.") || name.starts_with("post_quant_conv.");
        assert!(is_decoder || change == 0.0, "{name} changed by {change}");
        assert!(name != "decoder.conv_out.weight" || change > 0.0, "the decoder learned nothing");
    }
    let refused = config.replace("decoder_only = true", "decoder_only = true, coarse = 1.0");
    fs::write(dir.path().join("config.toml"), refused).unwrap();
    let request = Request {
        config: Some(dir.path().join("config.toml")),
        resume: None,
        out: Some(dir.path().join("no")),
        set: vec![],
    };
    let error = request.prepare::<PretrainConfig>().and_then(|run| run.train(&AtomicBool::new(false), &mut |_| {}));
    assert!(format!("{:#}", error.err().unwrap()).contains("decoder_only"));
}
