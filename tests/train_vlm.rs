//! The VLM's pretraining goes on from the built-in one with drawn pictures.

#![allow(clippy::unwrap_used)]

use rlrig::{
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
    path::Path,
    sync::atomic::{AtomicBool, Ordering},
};

/// Twenty pictures of other prompts than theirs, as a Diffuser might have drawn them.
fn draw(folder: &Path) {
    let mut lines = String::new();
    for index in 0..20 {
        let [sample, other] = [0, 1].map(|seed| tasks::text_to_image(seed, Split::Train, index, 2, 3));
        let (id, file) = (format!("train-{index:02}"), format!("{index}.png"));
        render(&other.scene).save(folder.join(&file)).unwrap();
        let line = json!({ "id": id, "dataset": "tabletop", "prompt": sample.prompt, "file": file });
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

#[test]
fn the_vlm_goes_on_with_drawn_pictures_and_resumes() {
    let dir = tempfile::tempdir().unwrap();
    let drawn = dir.path().join("drawn");
    fs::create_dir(&drawn).unwrap();
    draw(&drawn);
    let start = Path::new(env!("CARGO_MANIFEST_DIR")).join("weights/tabletop/vlm");
    let config = dir.path().join("vlm.toml");
    let text = format!(
        "objective = 'vlm'
         train = {{ steps = 2, batch = 4, micro_batch = 2, evaluate_every = 2, checkpoint_every = 1 }}
         vlm = {{ start = {start:?}, drawn = {drawn:?}, drawn_share = 0.9, act = 1.0, evaluation = 2 }}"
    );
    fs::write(&config, text).unwrap();
    let run = |name: &str| Request {
        config: Some(config.clone()),
        resume: None,
        out: Some(dir.path().join(name)),
        set: Vec::new(),
    };
    let (end, measured) = train(&run("straight"), None);
    assert_eq!(end, End::Done);
    assert!(["edits/mend", "drawn/mend", "drawn/verdicts"].iter().all(|name| (0.0..=1.0).contains(&measured[*name])));
    assert_eq!(train(&run("stopped"), Some(1)).0, End::Stopped(1));
    let resume = Request { config: None, resume: Some(dir.path().join("stopped")), out: None, set: Vec::new() };
    assert_eq!(train(&resume, None).0, End::Done);
    let bytes = |name: &str| fs::read(dir.path().join(name).join("model/model.safetensors")).unwrap();
    assert!(bytes("straight") == bytes("stopped"), "the resumed run ends in other weights");
}
