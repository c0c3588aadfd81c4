//! The models in the binary: `weights/tabletop/`, laid out as diffusers and transformers save them.

use super::Folder;
use include_dir::{Dir, include_dir};
use sha2::{Digest, Sha256};
use std::sync::OnceLock;

static TABLETOP: Dir<'static> = include_dir!("$CARGO_MANIFEST_DIR/weights/tabletop");

/// The name under which they go.
pub const NAME: &str = "built-in";

/// Whether a flag, given or not, names them, of whatever revision.
pub fn are_named(given: Option<&str>) -> bool {
    given.is_none_or(|name| name.strip_prefix(NAME).is_some_and(|rest| rest.is_empty() || rest.starts_with('@')))
}

/// The folder of the pipeline, with the VLM in `vlm/`.
pub fn tabletop() -> Folder {
    Folder::Embedded(&TABLETOP)
}

/// The beginning of a digest of all files, which tells one version of the models from another. Texts for people are
/// left out: to change their words is no reason to refuse a replay.
pub fn revision() -> &'static str {
    static REVISION: OnceLock<String> = OnceLock::new();
    fn add(dir: &Dir, hash: &mut Sha256) {
        for file in dir.files().filter(|file| file.path().extension().is_none_or(|end| end != "md")) {
            hash.update(file.path().to_string_lossy().as_bytes());
            hash.update((file.contents().len() as u64).to_le_bytes());
            hash.update(file.contents());
        }
        dir.dirs().for_each(|dir| add(dir, hash));
    }
    REVISION.get_or_init(|| {
        let mut hash = Sha256::new();
        add(&TABLETOP, &mut hash);
        super::folder::revision(hash)
    })
}

/// The folders of trained adapters.
pub const ACTOR: &str = "actor";
pub const EDITOR: &str = "editor";
pub const DIFFUSER: &str = "diffuser";

/// The folder of trained adapters, one in a folder of each role that has one.
pub fn adapters() -> Option<Folder> {
    tabletop().sub("adapters")
}

/// The trained adapter of a role, if this binary has one.
pub fn adapter(role: &str) -> Option<Folder> {
    adapters()?.sub(role)
}

/// What a whole set of models has and this binary lacks.
pub fn missing(parts: &[&'static str]) -> Vec<&'static str> {
    let folder = tabletop();
    let there = |part: &str| match part.rsplit_once('/') {
        None => folder.has(part),
        Some((dir, file)) => folder.sub(dir).is_some_and(|sub| sub.has(file)),
    };
    parts.iter().copied().filter(|part| !there(part)).collect()
}

/// The files without which nothing is drawn.
pub const PIPELINE: &[&str] = &[
    "model_index.json",
    "transformer/diffusion_pytorch_model.safetensors",
    "vae/diffusion_pytorch_model.safetensors",
    "text_encoder/model.safetensors",
    "tokenizer/tokenizer.json",
    "scheduler/scheduler_config.json",
];

/// The files without which nothing is checked.
pub const VLM: &[&str] = &["vlm/model.safetensors", "vlm/tokenizer.json"];
