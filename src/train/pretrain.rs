//! Pretraining: the config of a run, and the objectives it can name.

use super::{
    Objective,
    objective_diffuser::{Diffuser, DiffuserConfig},
    objective_vae::{VaeConfig, VaeObjective},
    objective_vlm::{VlmConfig, VlmObjective},
    optim::OptimConfig,
    run::{self, End, Event, Hooks, Rehearsal, TrainConfig},
};
use crate::{
    config::{self, Layers},
    usage,
};
use anyhow::{Context, Result};
use candle_core::Device;
use serde::{Deserialize, Serialize};
use std::{
    fs,
    path::{Path, PathBuf},
    sync::atomic::AtomicBool,
};

/// What is pretrained; each has a section of the config by its name.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Kind {
    Autoencoder,
    Diffuser,
    Vlm,
}

impl Kind {
    const ALL: [Self; 3] = [Self::Autoencoder, Self::Diffuser, Self::Vlm];

    /// Its section of the config.
    fn section(self) -> &'static str {
        match self {
            Self::Autoencoder => "autoencoder",
            Self::Diffuser => "diffuser",
            Self::Vlm => "vlm",
        }
    }
}

#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct PretrainConfig {
    pub objective: Kind,
    pub seed: u64,
    pub train: TrainConfig,
    pub optim: OptimConfig,
    pub diffuser: DiffuserConfig,
    pub autoencoder: VaeConfig,
    pub vlm: VlmConfig,
}

impl Default for PretrainConfig {
    fn default() -> Self {
        Self {
            objective: Kind::Diffuser,
            seed: 0,
            train: TrainConfig::default(),
            optim: OptimConfig::default(),
            diffuser: DiffuserConfig::default(),
            autoencoder: VaeConfig::default(),
            vlm: VlmConfig::default(),
        }
    }
}

impl PretrainConfig {
    /// The resolved config as a file, without the sections of other objectives.
    fn to_toml(&self) -> Result<String> {
        let mut table = toml::Table::try_from(self).context("the config does not serialise")?;
        for other in Kind::ALL.into_iter().filter(|kind| *kind != self.objective) {
            table.remove(other.section());
        }
        config::to_toml(&table)
    }
}

/// The file in a run's folder that holds its resolved config.
pub const CONFIG: &str = "config.toml";

/// A run as asked for: a new one from a config file, or one to go on with.
pub struct Request {
    pub config: Option<PathBuf>,
    pub resume: Option<PathBuf>,
    pub out: Option<PathBuf>,
    /// `key=value` pairs.
    pub set: Vec<String>,
}

/// A checked request: its config and its folder.
pub struct Prepared {
    pub config: PretrainConfig,
    pub folder: PathBuf,
    objective: Box<dyn Objective>,
}

impl Request {
    /// Resolves the config and builds the objective; writes nothing.
    pub fn prepare(&self) -> Result<Prepared> {
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
        let config = Layers::<PretrainConfig>::defaults()?.file(&file)?.environment()?.set(&self.set)?.resolve()?;
        let objective = build(&config, &Device::Cpu)?;
        Ok(Prepared { config, folder, objective })
    }
}

impl Prepared {
    /// Trains until the end or until `stop` is set.
    pub fn train(mut self, stop: &AtomicBool, report: &mut dyn FnMut(Event)) -> Result<End> {
        let folder = &self.folder;
        fs::create_dir_all(folder).with_context(|| format!("cannot create {}", folder.display()))?;
        let (path, new) = (folder.join(CONFIG), folder.join("config.new"));
        let text = self.config.to_toml()?;
        // Renamed into place: a run that is killed here still has its config.
        fs::write(&new, text)
            .and_then(|()| fs::rename(&new, &path))
            .with_context(|| format!("cannot write {}", path.display()))?;
        let hooks = Hooks { stop, report };
        run::train(&mut *self.objective, &self.config.train, &self.config.optim, folder, hooks)
    }

    /// One pass forward and backward and one evaluation, without training.
    pub fn rehearse(mut self) -> Result<Rehearsal> {
        run::rehearse(&mut *self.objective, &self.config.train, &self.config.optim)
    }
}

/// The objective that `config` names, on `device`.
fn build(config: &PretrainConfig, device: &Device) -> Result<Box<dyn Objective>> {
    match config.objective {
        Kind::Autoencoder => Ok(Box::new(VaeObjective::new(&config.autoencoder, config.seed, device)?)),
        Kind::Diffuser => Ok(Box::new(Diffuser::new(&config.diffuser, config.seed, device)?)),
        Kind::Vlm => Ok(Box::new(VlmObjective::new(&config.vlm, config.seed, device)?)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::Usage;

    fn request(dir: &Path, config: &str) -> Request {
        let path = dir.join("example.toml");
        fs::write(&path, config).unwrap();
        Request { config: Some(path), resume: None, out: Some(dir.join("run")), set: Vec::new() }
    }

    fn mistake(request: &Request) -> String {
        let error = request.prepare().err().unwrap();
        assert!(error.is::<Usage>(), "{error:?}");
        error.to_string()
    }

    #[test]
    fn mistakes_are_told_before_anything_is_written() {
        let dir = tempfile::tempdir().unwrap();
        let good = request(dir.path(), "objective = 'vlm'\n[optim]\nlr = 1e-3\n");
        let message = mistake(&Request { set: vec!["optim.lrr=3".into()], ..request(dir.path(), "") });
        assert_eq!(message, "--set optim.lrr=3: unknown key optim.lrr; did you mean optim.lr?");
        let message = mistake(&request(dir.path(), "objective = 'vln'"));
        assert!(message.contains("example.toml: objective: unknown variant `vln`, expected one of `autoencoder`"));
        let message = mistake(&Request { config: None, ..request(dir.path(), "") });
        assert!(message.contains("--config FILE, or --resume FOLDER"), "{message}");
        assert!(!dir.path().join("run").exists());

        let nothing = Request { resume: Some(dir.path().join("run")), ..request(dir.path(), "") };
        assert!(mistake(&nothing).contains("no run's folder"));
        fs::create_dir(dir.path().join("run")).unwrap();
        fs::write(dir.path().join("run").join(CONFIG), "").unwrap();
        assert!(mistake(&good).contains("already holds a run"));
    }

    #[test]
    fn a_saved_config_has_its_own_objectives_section_only() {
        let config = PretrainConfig { seed: 7, ..PretrainConfig::default() };
        let text = config.to_toml().unwrap();
        assert!(text.contains("[diffuser]") && !text.contains("[vlm]") && !text.contains("[autoencoder]"));
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(CONFIG);
        fs::write(&path, &text).unwrap();
        let read = Layers::<PretrainConfig>::defaults().unwrap().file(&path).unwrap().resolve().unwrap();
        assert_eq!(read.to_toml().unwrap(), text);
    }
}
