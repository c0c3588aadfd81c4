//! Fetching models, against a hub on this machine.

#![allow(clippy::unwrap_used)]

mod rlrig;

use self::rlrig::{PROMPT, Rig, stderr};
use ::rlrig::{
    error::Usage,
    eval::dataset::choose_file,
    io::{
        files_under,
        hub::{Hub, Local},
        png,
    },
};
use sha2::{Digest, Sha256};
use std::{
    fs,
    path::Path,
    sync::{Arc, Mutex},
    thread,
};
use tiny_http::{Header, Request, Response, Server};

const SHA: &str = "0123456789abcdef0123456789abcdef01234567";

/// A hub with `org/tiny`, a gated and a broken model, and each folder of a shelf as `shelf/NAME`. It keeps the log of what was
/// asked.
struct FakeHub {
    url: String,
    log: Arc<Mutex<Vec<String>>>,
    server: Arc<Server>,
}

fn weights() -> Vec<u8> {
    (0..5000u32).map(|i| (i * 7 % 251) as u8).collect()
}

fn hex(bytes: &[u8]) -> String {
    Sha256::digest(bytes).iter().map(|b| format!("{b:02x}")).collect()
}

fn header(name: &str, value: &str) -> Header {
    Header::from_bytes(name, value).unwrap()
}

impl FakeHub {
    fn start() -> Self {
        Self::with_shelf(Path::new("nowhere"))
    }

    fn with_shelf(shelf: &Path) -> Self {
        let shelf = shelf.to_owned();
        let server = Arc::new(Server::http("127.0.0.1:0").unwrap());
        let url = format!("http://{}", server.server_addr().to_ip().unwrap());
        let log = Arc::new(Mutex::new(Vec::new()));
        let (served, logged) = (server.clone(), log.clone());
        thread::spawn(move || {
            for request in served.incoming_requests() {
                let token = find(&request, "authorization").unwrap_or_default();
                let range = find(&request, "range").unwrap_or_default();
                logged.lock().unwrap().push(format!("{} {range} {token}", request.url()));
                answer(request, &range, &token, &shelf);
            }
        });
        Self { url, log, server }
    }

    fn locate(&self, cache: &Path, name: &str, vars: &[(&str, &str)]) -> anyhow::Result<Local> {
        let var = |asked: &str| match asked {
            "HF_HOME" => Some(cache.display().to_string()),
            "HF_ENDPOINT" => Some(self.url.clone()),
            other => vars.iter().find(|(name, _)| *name == other).map(|(_, value)| (*value).to_owned()),
        };
        Hub::from_vars(var).unwrap().locate(name, &|_, _, _| ())
    }

    fn asked(&self) -> Vec<String> {
        std::mem::take(&mut *self.log.lock().unwrap())
    }
}

impl Drop for FakeHub {
    fn drop(&mut self) {
        self.server.unblock();
    }
}

fn find(request: &Request, name: &str) -> Option<String> {
    request.headers().iter().find(|h| h.field.to_string().eq_ignore_ascii_case(name)).map(|h| h.value.to_string())
}

fn answer(request: Request, range: &str, token: &str, shelf: &Path) {
    let url = request.url().to_owned();
    let json = |files: &[&str]| {
        let siblings: Vec<_> = files.iter().map(|f| serde_json::json!({ "rfilename": f })).collect();
        Response::from_string(serde_json::json!({ "sha": SHA, "siblings": siblings }).to_string())
    };
    let answered = match url.as_str() {
        "/api/models/org/tiny/revision/main" => {
            request.respond(json(&["README.md", "config.json", "sub/model.safetensors"]))
        }
        "/api/models/org/broken/revision/main" => request.respond(json(&["model.safetensors"])),
        "/api/datasets/org/graphs/revision/main" => {
            request.respond(json(&["README.md", "dataset/a_test.json", "dataset/a_train.json"]))
        }
        "/datasets/org/graphs/resolve/main/dataset/a_test.json" => file(request, range, b"[]", "def"),
        "/api/models/org/hostile/revision/main" => request.respond(json(&["../../../../escaped.json"])),
        "/api/models/org/gated/revision/main" => {
            request.respond(Response::empty(if token == "Bearer good" { 403 } else { 401 }))
        }
        "/org/tiny/resolve/main/config.json" => file(request, range, b"{\"a\": 1}", "abc"),
        "/org/tiny/resolve/main/sub/model.safetensors" => file(request, range, &weights(), &hex(&weights())),
        "/org/broken/resolve/main/model.safetensors" => file(request, range, &weights(), &hex(b"other")),
        other => match other.strip_prefix("/api/models/shelf/").and_then(|rest| rest.strip_suffix("/revision/main")) {
            Some(name) => {
                let files = files_under(&shelf.join(name)).unwrap();
                request.respond(json(&files.iter().map(String::as_str).collect::<Vec<_>>()))
            }
            None => {
                let found = other.strip_prefix("/shelf/").and_then(|rest| rest.split_once("/resolve/main/"));
                match found.and_then(|(name, path)| fs::read(shelf.join(name).join(path)).ok()) {
                    Some(bytes) => file(request, range, &bytes, &hex(&bytes)),
                    None => request.respond(Response::empty(404)),
                }
            }
        },
    };
    answered.unwrap();
}

fn file(request: Request, range: &str, content: &[u8], etag: &str) -> std::io::Result<()> {
    let range = range.strip_prefix("bytes=").unwrap_or("0-");
    let (from, to) = range.split_once('-').unwrap();
    let from: usize = from.parse().unwrap();
    let to = to.parse().map_or(content.len(), |to: usize| to + 1);
    let part = content[from..to].to_vec();
    request.respond(
        Response::from_data(part)
            .with_status_code(206)
            .with_header(header("etag", &format!("\"{etag}\"")))
            .with_header(header("x-repo-commit", SHA))
            .with_header(header("content-range", &format!("bytes {from}-{}/{}", to - 1, content.len()))),
    )
}

#[test]
fn models_of_a_hub_draw_and_judge_as_folders_do() {
    let rig = Rig::new();
    let hub = FakeHub::with_shelf(rig.dir.path());
    let args = ["generate", "--prompt", PROMPT, "--seed", "1", "--rounds", "2", "--steps", "2"];
    let draw = |models: &[&str], offline: &str| {
        let mut command = rig.command(&[&args[..], models].concat());
        let output = command.env("HF_ENDPOINT", &hub.url).env("HF_HUB_OFFLINE", offline).output().unwrap();
        assert!(output.status.success(), "{}", stderr(&output));
    };
    draw(&["--model", "klein", "--vlm", "vlm", "--out", "folders.png"], "1");
    assert!(hub.asked().is_empty());
    let named = ["--model", "shelf/klein", "--vlm", "shelf/vlm", "--out"];
    draw(&[&named[..], &["hub.png"]].concat(), "0");
    assert!(hub.asked().iter().any(|asked| asked.starts_with("/shelf/klein/resolve/main/transformer/")));
    draw(&[&named[..], &["again.png"]].concat(), "1");
    assert!(hub.asked().is_empty(), "offline nothing is asked for");
    let [folders, hub, again] = ["folders.png", "hub.png", "again.png"].map(|name| png::read(&rig.path(name)).unwrap());
    assert!(folders == hub && hub == again);
}

#[test]
fn a_model_is_fetched_once_into_pythons_layout() {
    let (hub, cache) = (FakeHub::start(), tempfile::tempdir().unwrap());
    let local = hub.locate(cache.path(), "org/tiny", &[]).unwrap();
    let repo = cache.path().join("hub/models--org--tiny");
    assert_eq!(local, Local { path: repo.join("snapshots").join(SHA), revision: Some(SHA.into()) });
    assert_eq!(fs::read(local.path.join("config.json")).unwrap(), b"{\"a\": 1}");
    assert_eq!(fs::read(local.path.join("sub/model.safetensors")).unwrap(), weights());
    assert_eq!(fs::read_to_string(repo.join("refs/main")).unwrap(), SHA);
    assert_eq!(fs::read(repo.join("blobs").join(hex(&weights()))).unwrap(), weights());
    assert!(!local.path.join("README.md").exists());
    assert!(hub.asked().len() > 2);

    assert_eq!(hub.locate(cache.path(), "org/tiny", &[]).unwrap(), local);
    assert_eq!(hub.asked(), ["/api/models/org/tiny/revision/main  "], "the second time only the commit is asked for");

    assert_eq!(hub.locate(cache.path(), "org/tiny", &[("HF_HUB_OFFLINE", "1")]).unwrap(), local);
    assert_eq!(hub.asked(), [""; 0], "offline nothing is asked for");

    let url = "http://127.0.0.1:9"; // nobody listens at the discard port
    let var = |name: &str| match name {
        "HF_HOME" => Some(cache.path().display().to_string()),
        "HF_ENDPOINT" => Some(url.to_owned()),
        _ => None,
    };
    assert_eq!(Hub::from_vars(var).unwrap().locate("org/tiny", &|_, _, _| ()).unwrap(), local);
    let error = Hub::from_vars(var).unwrap().locate("org/other", &|_, _, _| ()).unwrap_err();
    assert!(error.to_string().starts_with("cannot fetch org/other from http://127.0.0.1:9"), "{error}");
}

#[test]
fn an_interrupted_download_goes_on_where_it_stopped() {
    let (hub, cache) = (FakeHub::start(), tempfile::tempdir().unwrap());
    let blobs = cache.path().join("hub/models--org--tiny/blobs");
    fs::create_dir_all(&blobs).unwrap();
    fs::write(blobs.join(format!("{}.part", hex(&weights()))), &weights()[..3000]).unwrap();
    let local = hub.locate(cache.path(), "org/tiny", &[]).unwrap();
    assert_eq!(fs::read(local.path.join("sub/model.safetensors")).unwrap(), weights());
    assert!(hub.asked().iter().any(|line| line.contains("bytes=3000-")));
}

#[test]
fn a_damaged_download_is_refused_and_not_kept() {
    let (hub, cache) = (FakeHub::start(), tempfile::tempdir().unwrap());
    let error = hub.locate(cache.path(), "org/broken", &[]).unwrap_err();
    assert!(error.to_string().contains("arrived damaged"), "{error}");
    let blobs = cache.path().join("hub/models--org--broken/blobs");
    let left: Vec<_> = fs::read_dir(blobs).unwrap().map(|e| e.unwrap().file_name()).collect();
    assert!(left.iter().all(|name| name.to_str().unwrap().ends_with(".lock")), "{left:?}");
}

#[test]
fn what_the_hub_refuses_is_said_with_what_to_do() {
    let (hub, cache) = (FakeHub::start(), tempfile::tempdir().unwrap());
    let message = |name: &str, vars: &[(&str, &str)]| hub.locate(cache.path(), name, vars).unwrap_err().to_string();
    assert!(message("org/gated", &[]).contains("set HF_TOKEN"));
    assert!(message("org/gated", &[("HF_TOKEN", "bad")]).contains("does not accept the token"));
    let gated = message("org/gated", &[("HF_TOKEN", "good")]);
    assert!(gated.contains("accept its terms at http://127.0.0.1") && gated.contains("/org/gated"), "{gated}");
    assert!(message("org/none", &[]).contains("has no org/none"));
    assert!(message("org/hostile", &[]).contains("strange name"));
    assert!(hub.locate(cache.path(), "./none", &[]).unwrap_err().is::<Usage>());
}

#[test]
fn a_folder_is_used_as_it_is() {
    let (hub, cache) = (FakeHub::start(), tempfile::tempdir().unwrap());
    let name = cache.path().display().to_string();
    assert_eq!(hub.locate(cache.path(), &name, &[]).unwrap(), Local { path: name.into(), revision: None });
    assert_eq!(hub.asked(), [""; 0]);
}

#[test]
fn of_a_data_set_one_file_is_fetched() {
    let (hub, cache) = (FakeHub::start(), tempfile::tempdir().unwrap());
    let get = |vars: &[(&str, &str)], part: &str| {
        let var = |asked: &str| match asked {
            "HF_HOME" => Some(cache.path().display().to_string()),
            "HF_ENDPOINT" => Some(hub.url.clone()),
            other => vars.iter().find(|(name, _)| *name == other).map(|(_, value)| (*value).to_owned()),
        };
        let choose = |files: &[&str]| choose_file(files, part);
        Hub::from_vars(var).unwrap().data_file("org/graphs", &choose, &|_, _, _| ())
    };
    let path = get(&[], "test").unwrap();
    assert_eq!(path, cache.path().join("hub/datasets--org--graphs/snapshots").join(SHA).join("dataset/a_test.json"));
    assert_eq!(fs::read(&path).unwrap(), b"[]");
    assert!(!path.with_file_name("a_train.json").exists());
    hub.asked();
    assert_eq!(get(&[("HF_HUB_OFFLINE", "1")], "test").unwrap(), path);
    assert_eq!(hub.asked(), [""; 0], "offline nothing is asked for");
    assert!(get(&[("HF_HUB_OFFLINE", "1")], "train").unwrap_err().to_string().contains("a_test.json"));
    assert!(get(&[], "none").unwrap_err().to_string().contains("a_train.json"));
}
