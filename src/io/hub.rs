//! A hub id or a folder to a local folder.
//!
//! Models are fetched into the cache that Python's `huggingface_hub` uses, so that both share what is there. The
//! environment is read here and nowhere else: `HF_HOME`, `HF_HUB_CACHE`, `HF_TOKEN`, `HF_TOKEN_PATH`, `HF_ENDPOINT`,
//! `HF_HUB_OFFLINE`. Downloads resume, and a file whose hash the hub names is held to it.

use crate::error::Usage;
use anyhow::{Context, Result, anyhow, ensure};
use hf_hub::{
    Cache, Repo, RepoType,
    api::{
        Progress, RepoInfo,
        sync::{ApiBuilder, ApiError, ApiRepo},
    },
};
use sha2::{Digest, Sha256};
use std::{
    fs,
    io::Read,
    path::{Path, PathBuf},
    time::Duration,
};

/// How long a connection may take.
const CONNECTING: Duration = Duration::from_secs(10);
/// How long the hub may take to say what a repository holds.
const ANSWERING: Duration = Duration::from_secs(60);

/// Where models come from and where they are kept.
#[derive(Clone, Debug)]
pub struct Hub {
    pub endpoint: String,
    pub cache: PathBuf,
    pub offline: bool,
    token: Option<String>,
    /// [`ANSWERING`], but for tests.
    patience: Duration,
}

/// A model folder on this machine.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Local {
    pub path: PathBuf,
    /// The hub's commit, for a hub id.
    pub revision: Option<String>,
}

/// Hears of downloads: the file, the bytes that are there, and the bytes in all.
pub type OnProgress<'a> = &'a dyn Fn(&str, u64, u64);

/// A repository of the hub, and the files in it.
type Remote = (ApiRepo, Vec<String>);

impl Hub {
    pub fn from_env() -> Result<Self> {
        Self::from_vars(|name| std::env::var(name).ok())
    }

    /// As [`Hub::from_env`], from variables given by name.
    pub fn from_vars(var: impl Fn(&str) -> Option<String>) -> Result<Self> {
        let var = |name: &str| var(name).map(|v| v.trim().to_owned()).filter(|v| !v.is_empty());
        let home = var("HOME").or_else(|| var("USERPROFILE"));
        let path = |text: String| match (text.strip_prefix("~/"), &home) {
            (Some(rest), Some(home)) => Path::new(home).join(rest),
            _ => PathBuf::from(text),
        };
        let hf_home = var("HF_HOME")
            .map(path)
            .or_else(|| Some(path(var("XDG_CACHE_HOME")?).join("huggingface")))
            .or_else(|| Some(Path::new(home.as_ref()?).join(".cache/huggingface")));
        let cache = var("HF_HUB_CACHE").or_else(|| var("HUGGINGFACE_HUB_CACHE")).map(path);
        let cache = cache
            .or_else(|| Some(hf_home.as_ref()?.join("hub")))
            .context("there is no place for a model cache: set HF_HOME or HOME")?;
        let token_path = var("HF_TOKEN_PATH").map(path).or_else(|| Some(hf_home?.join("token")));
        let token = var("HF_TOKEN").or_else(|| fs::read_to_string(token_path?).ok());
        let flag = |v: String| matches!(v.to_ascii_uppercase().as_str(), "1" | "ON" | "YES" | "TRUE");
        Ok(Self {
            endpoint: var("HF_ENDPOINT")
                .map_or_else(|| "https://huggingface.co".into(), |e| e.trim_end_matches('/').to_owned()),
            cache: std::path::absolute(cache)?,
            offline: var("HF_HUB_OFFLINE").is_some_and(flag),
            token: token.map(|t| t.trim().to_owned()).filter(|t| !t.is_empty()),
            patience: ANSWERING,
        })
    }

    /// The folder of `name`: a folder that exists, or a hub id `org/model[@revision]`, fetched if it is not in the cache.
    pub fn locate(&self, name: &str, on_progress: OnProgress) -> Result<Local> {
        if Path::new(name).is_dir() {
            return Ok(Local { path: name.into(), revision: None });
        }
        let (id, revision) = name.split_once('@').unwrap_or((name, "main"));
        if !is_id(id) || revision.is_empty() || revision.contains("..") {
            return Err(Usage(format!("{name:?} is neither a folder nor a hub id such as org/model")).into());
        }
        let repo = Repo::with_revision(id.to_owned(), RepoType::Model, revision.to_owned());
        let (local, online) = self.look(&repo, name)?;
        let Some((api, files)) = online else { return Ok(local) };
        let files: Vec<&str> = files.iter().map(String::as_str).collect();
        for file in wanted(&files) {
            self.fetch_missing(&api, (name, file), &local, on_progress)?;
        }
        ensure!(local.path.is_dir(), "{name} has no model files");
        Ok(local)
    }

    /// One file of the data set `org/name[@revision]`: `choose` names it among those there are, or says why none will
    /// do. It is fetched if it is not in the cache.
    pub fn data_file(
        &self,
        name: &str,
        choose: &dyn Fn(&[&str]) -> Result<String>,
        on_progress: OnProgress,
    ) -> Result<PathBuf> {
        let (id, revision) = name.split_once('@').unwrap_or((name, "main"));
        if !is_id(id) || revision.is_empty() || revision.contains("..") {
            return Err(Usage(format!("{name:?} is no hub id such as org/data-set")).into());
        }
        let repo = Repo::with_revision(id.to_owned(), RepoType::Dataset, revision.to_owned());
        let (local, online) = self.look(&repo, name)?;
        let in_cache = || super::files_under(&local.path).unwrap_or_default();
        let files = online.as_ref().map_or_else(in_cache, |(_, files)| files.clone());
        let file = choose(&files.iter().map(String::as_str).collect::<Vec<_>>())?;
        if let Some((api, _)) = &online {
            self.fetch_missing(api, (name, &file), &local, on_progress)?;
        }
        Ok(local.path.join(file))
    }

    /// Where a repository's files lie in the cache; and, unless the cache has to do, the way to fetch them and their
    /// names.
    fn look(&self, repo: &Repo, name: &str) -> Result<(Local, Option<Remote>)> {
        if self.offline {
            let cached = self.cached(repo).ok_or_else(|| {
                anyhow!("{name} is not in the cache {}, and HF_HUB_OFFLINE forbids to fetch it", self.cache.display())
            });
            return Ok((cached?, None));
        }
        let api = ApiBuilder::from_cache(Cache::new(self.cache.clone()))
            .with_endpoint(self.endpoint.clone())
            .with_token(self.token.clone())
            .with_retries(3)
            .with_progress(false)
            .with_user_agent("rlrig", env!("CARGO_PKG_VERSION"))
            .build()
            .context("cannot set up the connection to the hub")?;
        let api = api.repo(repo.clone());
        let info = match self.info(&api) {
            Ok(info) => info,
            Err(error) => {
                // Without a network, what the cache has is good enough; a clear "no" of the hub is not passed over.
                if status(&error).is_none()
                    && let Some(local) = self.cached(repo)
                {
                    tracing::warn!("the hub cannot be reached ({error}); using {name} from the cache");
                    return Ok((local, None));
                }
                return Err(self.explain(error, name));
            }
        };
        ensure!(is_plain(&info.sha), "the hub names a strange commit for {name}: {:?}", info.sha);
        let files = info.siblings.into_iter().map(|sibling| sibling.rfilename).collect();
        Ok((Local { path: self.snapshot(repo, &info.sha), revision: Some(info.sha) }, Some((api, files))))
    }

    /// What a repository holds. As [`ApiRepo::info`], but a hub that never answers is given up on; hf-hub itself waits
    /// for ever, and lets no limit be set on its downloads.
    fn info(&self, api: &ApiRepo) -> Result<RepoInfo, ApiError> {
        let request = api.info_request().config();
        let request = request.timeout_connect(Some(CONNECTING)).timeout_global(Some(self.patience)).build();
        let mut response = request.call().map_err(Box::new)?;
        Ok(response.body_mut().read_json().map_err(Box::new)?)
    }

    fn fetch_missing(
        &self,
        api: &ApiRepo,
        (name, file): (&str, &str),
        local: &Local,
        on_progress: OnProgress,
    ) -> Result<()> {
        ensure!(file.split('/').all(is_plain), "{name} has a file with a strange name: {file:?}");
        if !local.path.join(file).is_file() {
            self.fetch(api, name, file, on_progress)?;
        }
        Ok(())
    }

    fn fetch(&self, api: &ApiRepo, name: &str, file: &str, on_progress: OnProgress) -> Result<()> {
        let report = Report { file, done: 0, total: 0, on: on_progress };
        let path = api.download_with_progress(file, report).map_err(|error| self.explain(error, name))?;
        // Large files are stored under their SHA-256; a broken download must not stay in the cache.
        let blob = fs::canonicalize(&path)?;
        let expected = blob.file_name().and_then(|n| n.to_str()).unwrap_or_default().to_owned();
        if expected.len() == 64 && expected.bytes().all(|b| b.is_ascii_hexdigit()) {
            let found = sha256(&blob).with_context(|| format!("cannot read {}", blob.display()))?;
            if found != expected {
                fs::remove_file(&path)?;
                fs::remove_file(&blob)?;
                return Err(anyhow!("{name}: {file} arrived damaged (SHA-256 {found}); try again"));
            }
        }
        Ok(())
    }

    /// What the cache has of `repo`.
    fn cached(&self, repo: &Repo) -> Option<Local> {
        let refs = self.cache.join(repo.folder_name()).join("refs").join(repo.revision());
        let sha = match fs::read_to_string(refs) {
            Ok(sha) => sha.trim().to_owned(),
            Err(_) => repo.revision().to_owned(), // a commit may be named outright
        };
        let path = self.snapshot(repo, &sha);
        (is_plain(&sha) && path.is_dir()).then_some(Local { path, revision: Some(sha) })
    }

    fn snapshot(&self, repo: &Repo, sha: &str) -> PathBuf {
        self.cache.join(repo.folder_name()).join("snapshots").join(sha)
    }

    /// The hub ids in the cache.
    pub fn list(&self) -> Vec<String> {
        let entries = fs::read_dir(&self.cache).into_iter().flatten().flatten();
        let name =
            |entry: fs::DirEntry| Some(entry.file_name().to_str()?.strip_prefix("models--")?.replacen("--", "/", 1));
        let mut names: Vec<String> = entries.filter_map(name).collect();
        names.sort();
        names
    }

    fn explain(&self, error: ApiError, name: &str) -> anyhow::Error {
        let id = name.split('@').next().unwrap_or(name);
        let place = &self.endpoint;
        let hint = match (status(&error), &self.token) {
            (Some(401), None) => format!("{name} is private, gated or does not exist: set HF_TOKEN if you have access"),
            (Some(401), Some(_)) => format!("the hub does not accept the token for {name}: check HF_TOKEN"),
            (Some(403), _) => format!("{name} is gated: accept its terms at {place}/{id}, and set HF_TOKEN"),
            (Some(404), _) => format!("the hub {place} has no {name}"),
            (Some(code), _) => format!("the hub {place} answers {code} for {name}"),
            (None, _) => format!("cannot fetch {name} from {place}; set HF_HUB_OFFLINE=1 to use the cache alone"),
        };
        anyhow::Error::new(error).context(hint)
    }
}

fn sha256(path: &Path) -> std::io::Result<String> {
    let (mut file, mut hash, mut buffer) = (fs::File::open(path)?, Sha256::new(), vec![0; 1 << 20]);
    loop {
        match file.read(&mut buffer)? {
            0 => return Ok(hash.finalize().iter().map(|b| format!("{b:02x}")).collect()),
            n => hash.update(&buffer[..n]),
        }
    }
}

/// The HTTP status of an error, if the hub answered at all.
fn status(error: &ApiError) -> Option<u16> {
    match error {
        ApiError::RequestError(error) => match **error {
            ureq::Error::StatusCode(code) => Some(code),
            _ => None,
        },
        ApiError::TooManyRetries(error) => status(error),
        _ => None,
    }
}

/// Whether `name` is `org/model` or `model`, as the hub allows it.
fn is_id(name: &str) -> bool {
    let parts: Vec<&str> = name.split('/').collect();
    parts.len() <= 2 && parts.iter().all(|p| is_plain(p)) && !name.contains("--") && !name.contains("..")
}

/// Whether `name` is one plain part of a path.
fn is_plain(name: &str) -> bool {
    !name.is_empty()
        && !name.starts_with('.')
        && name.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.'))
}

/// Of a repository's files, those of a model in the layout of diffusers or transformers: configs, tokenizers, templates,
/// safetensors. In a pipeline's top folder, weights are single-file copies of what the subfolders hold.
fn wanted<'a>(files: &[&'a str]) -> Vec<&'a str> {
    let pipeline = files.contains(&"model_index.json");
    let keep = |file: &&&str| {
        let (top, name) = (!file.contains('/'), file.rsplit('/').next().unwrap_or(file));
        let variant = [".fp16.", ".fp32.", ".bf16.", ".non_ema."].iter().any(|v| name.contains(v));
        let extension = name.rsplit('.').next().unwrap_or_default();
        match extension {
            "json" | "jinja" => true,
            "txt" => name == "merges.txt" || name == "vocab.txt",
            "safetensors" => !(variant || pipeline && top),
            _ => false,
        }
    };
    files.iter().filter(keep).copied().collect()
}

struct Report<'a> {
    file: &'a str,
    done: u64,
    total: u64,
    on: OnProgress<'a>,
}

impl Progress for Report<'_> {
    fn init(&mut self, size: usize, _: &str) {
        (self.done, self.total) = (0, size as u64);
    }

    fn update(&mut self, size: usize) {
        self.done += size as u64;
        (self.on)(self.file, self.done, self.total);
    }

    fn finish(&mut self) {}
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashMap;

    fn hub(vars: &[(&str, &str)]) -> Hub {
        let vars: HashMap<&str, &str> = vars.iter().copied().collect();
        Hub::from_vars(|name| vars.get(name).map(|v| (*v).to_owned())).unwrap()
    }

    #[test]
    fn the_environment_is_read_as_python_reads_it() {
        let cache = |vars: &[(&str, &str)]| hub(vars).cache;
        let home = ("HOME", "/home/me");
        assert_eq!(cache(&[home]), Path::new("/home/me/.cache/huggingface/hub"));
        assert_eq!(cache(&[home, ("XDG_CACHE_HOME", "/x")]), Path::new("/x/huggingface/hub"));
        assert_eq!(cache(&[home, ("XDG_CACHE_HOME", "/x"), ("HF_HOME", "~/hf")]), Path::new("/home/me/hf/hub"));
        assert_eq!(cache(&[home, ("HF_HOME", "/hf"), ("HF_HUB_CACHE", "/c")]), Path::new("/c"));
        assert!(Hub::from_vars(|_| None).is_err());
        let set = hub(&[home, ("HF_ENDPOINT", "http://mirror/"), ("HF_HUB_OFFLINE", "yes"), ("HF_TOKEN", " t\n")]);
        assert_eq!((set.endpoint.as_str(), set.offline, set.token.as_deref()), ("http://mirror", true, Some("t")));
        assert!(!hub(&[home, ("HF_HUB_OFFLINE", "0")]).offline);
    }

    #[test]
    fn only_model_files_are_wanted() {
        let files = [
            "README.md",
            "model_index.json",
            "flux.safetensors",
            "transformer/config.json",
            "transformer/diffusion_pytorch_model-00001-of-00002.safetensors",
            "transformer/diffusion_pytorch_model.fp16.safetensors",
            "tokenizer/merges.txt",
            "tokenizer/chat_template.jinja",
            "vae/model.bin",
        ];
        assert_eq!(wanted(&files), [files[1], files[3], files[4], files[6], files[7]]);
        assert_eq!(wanted(&["config.json", "model.safetensors"]).len(), 2);
    }

    #[test]
    fn what_is_no_id_is_a_mistake_of_the_user() {
        let hub = hub(&[("HOME", "/nowhere"), ("HF_HUB_OFFLINE", "1")]);
        for name in ["", "a/b/c", "../x", "/no/such", "a b", "org/", "org/model@", "org/..", "~/m"] {
            let error = hub.locate(name, &|_, _, _| ()).unwrap_err();
            assert!(error.is::<Usage>(), "{name}: {error}");
        }
        let error = hub.locate("org/model", &|_, _, _| ()).unwrap_err().to_string();
        assert!(error.contains("HF_HUB_OFFLINE"), "{error}");
    }

    #[test]
    fn a_hub_that_never_answers_is_given_up_on() {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let cache = tempfile::tempdir().unwrap();
        let mut hub = hub(&[("HF_HOME", &cache.path().display().to_string()), ("HF_ENDPOINT", &url)]);
        hub.patience = Duration::from_millis(100);
        let error = format!("{:#}", hub.locate("org/model", &|_, _, _| ()).unwrap_err());
        assert!(error.contains(&url) && error.contains("timeout"), "{error}");
    }
}
