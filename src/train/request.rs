//! A run as asked for on the command line: its config resolved, its folder found, its objective built.

use super::{
    Objective,
    optim::OptimConfig,
    run::{self, End, Event, Hooks, Rehearsal},
    train_config::TrainConfig,
};
use crate::{
    config::{self, Layers},
    io, usage,
};
use anyhow::{Context, Result};
use candle_core::Device;
use serde::{Serialize, de::DeserializeOwned};
use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
    sync::atomic::AtomicBool,
};

/// The file in a run's folder that holds its resolved config.
pub const CONFIG: &str = "config.toml";
/// And the one that holds the revisions of what it builds on.
const BUILT_ON: &str = "built_on.json";
/// Its bytes at most.
const BUILT_ON_BYTES: u64 = 1 << 16;

/// The config of a kind of training.
pub trait RunConfig: Default + Serialize + DeserializeOwned {
    fn train(&self) -> &TrainConfig;
    fn optim(&self) -> &OptimConfig;
    /// The objective that it names.
    fn build(&self, device: &Device) -> Result<Box<dyn Objective>>;
    /// The revisions, by the config's keys, of what stays as it is while the run trains. With others it would not go on as it
    /// began.
    fn built_on(&self) -> Result<BTreeMap<String, String>> {
        Ok(BTreeMap::new())
    }
    /// The sections and keys, such as `editor.beta`, that count for nothing with what else is chosen, each with what it is for.
    fn unused(&self) -> Vec<(&'static str, &'static str)>;

    /// Refuses what of `concerned` is set, to another value than usual, and counts for nothing: who set it expects something
    /// of it.
    fn check_unused(&self, concerned: impl Fn(&str) -> bool) -> Result<()> {
        let table = |config: &Self| toml::Table::try_from(config).context("the config does not serialise");
        let (mut given, mut usual) = (table(self)?, table(&Self::default())?);
        for (key, purpose) in self.unused() {
            if take(&mut given, key) != take(&mut usual, key) && concerned(key) {
                usage!("{key} counts for nothing here: it is for {purpose}; leave it out");
            }
        }
        Ok(())
    }

    /// The resolved config as a file, without what counts for nothing.
    fn to_toml(&self) -> Result<String> {
        let mut table = toml::Table::try_from(self).context("the config does not serialise")?;
        for (key, _) in self.unused() {
            take(&mut table, key);
        }
        config::to_toml(&table)
    }
}

/// Takes a key, with dots where it is within another, out of a table.
fn take(table: &mut toml::Table, key: &str) -> Option<toml::Value> {
    match key.split_once('.') {
        Some((section, rest)) => take(table.get_mut(section)?.as_table_mut()?, rest),
        None => table.remove(key),
    }
}

/// A run as asked for: a new one from a config file, or one to go on with.
#[derive(Clone, Debug)]
pub struct Request {
    pub config: Option<PathBuf>,
    pub resume: Option<PathBuf>,
    pub out: Option<PathBuf>,
    /// `key=value` pairs.
    pub set: Vec<String>,
}

/// A checked request: its config and its folder.
pub struct Prepared<C> {
    pub config: C,
    pub folder: PathBuf,
    objective: Box<dyn Objective>,
}

impl Request {
    /// Resolves the config and builds the objective on the CPU; writes nothing.
    pub fn prepare<C: RunConfig>(&self) -> Result<Prepared<C>> {
        self.prepare_on(&Device::Cpu)
    }

    /// [`Request::prepare`] on a device of choice.
    pub fn prepare_on<C: RunConfig>(&self, device: &Device) -> Result<Prepared<C>> {
        let (file, folder) = match (&self.resume, &self.config) {
            (Some(folder), _) => (folder.join(CONFIG), folder.clone()),
            (None, Some(file)) => {
                let name = file.file_stem().unwrap_or(file.as_os_str());
                (file.clone(), self.out.clone().unwrap_or_else(|| Path::new("runs").join(name)))
            }
            (None, None) => usage!("give --config FILE, or --resume FOLDER"),
        };
        if self.resume.is_some() && !file.is_file() {
            usage!("{} is no run's folder: it has no {CONFIG}", folder.display());
        }
        if self.resume.is_none() && folder.join(CONFIG).exists() {
            usage!("{0} already holds a run; go on with --resume {0}, or choose another --out", folder.display());
        }
        if self.resume.is_none() && holds_other_things(&folder) {
            usage!("{} is not empty and holds no run; choose another --out", folder.display());
        }
        let config = Layers::<C>::defaults()?.file(&file)?.environment()?.set(&self.set)?.resolve()?;
        // Of a run that goes on, only what is set now: earlier versions took it.
        let set_now = |key: &str| {
            let within = |set: &str| set.strip_prefix(key).is_some_and(|rest| rest.is_empty() || rest.starts_with('.'));
            self.set.iter().filter_map(|pair| pair.split('=').next()).any(within)
        };
        config.check_unused(|key| self.resume.is_none() || set_now(key))?;
        let objective = config.build(device)?;
        Ok(Prepared { config, folder, objective })
    }
}

/// Whether there is anything in a folder but what a run that was killed at its beginning leaves: a run replaces files.
fn holds_other_things(folder: &Path) -> bool {
    let left = |name: &str| name == ".lock" || name == "checkpoints" || name.starts_with(".rlrig-");
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    entries.map(|entry| entry.file_name()).any(|name| !left(&name.to_string_lossy()))
}

/// Refuses to go on where what a run builds on is not what it was.
fn expect_built_on(folder: &Path, found: &BTreeMap<String, String>) -> Result<()> {
    let file = folder.join(BUILT_ON);
    if !file.is_file() {
        return Ok(());
    }
    let text = io::read_file(&file, BUILT_ON_BYTES)?;
    let began: BTreeMap<String, String> =
        serde_json::from_slice(&text).with_context(|| format!("{} is damaged", file.display()))?;
    if let Some(key) = began.iter().find_map(|(key, revision)| (found.get(key) != Some(revision)).then_some(key)) {
        usage!(
            "{key} is not what the run in {} began with: put that back, begin a new run, or remove {} to go on regardless",
            folder.display(),
            file.display()
        );
    }
    Ok(())
}

impl<C: RunConfig> Prepared<C> {
    /// Trains until the end or until `stop` is set.
    pub fn train(mut self, stop: &AtomicBool, report: &mut dyn FnMut(Event)) -> Result<End> {
        let folder = &self.folder;
        let text = self.config.to_toml()?;
        // Before the config is written: what is refused, or goes on elsewhere, keeps the one it has.
        let training = run::open(&mut *self.objective, self.config.train(), self.config.optim(), folder)?;
        let built_on = self.config.built_on()?;
        expect_built_on(folder, &built_on)?;
        io::write_file(&folder.join(CONFIG), text.as_bytes(), true)?;
        io::write_file(&folder.join(BUILT_ON), serde_json::to_string_pretty(&built_on)?.as_bytes(), true)?;
        training.train(Hooks { stop, report })
    }

    /// One pass forward and backward and one evaluation, without training.
    pub fn rehearse(mut self) -> Result<Rehearsal> {
        run::rehearse(&mut *self.objective, self.config.train(), self.config.optim(), &self.folder)
    }
}
