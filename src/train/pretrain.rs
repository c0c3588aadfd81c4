//! Pretraining: the config of a run, and the objectives it can name.

use super::{
    Objective,
    diffuser_config::DiffuserConfig,
    objective_diffuser::Diffuser,
    objective_vae::{VaeConfig, VaeObjective},
    objective_vlm::VlmObjective,
    optim::OptimConfig,
    request::RunConfig,
    train_config::TrainConfig,
    vlm_config::VlmConfig,
};
use crate::models::Folder;
use anyhow::Result;
use candle_core::Device;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

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

/// A config of `rlrig train pretrain`. Of the models' sections that of the objective counts.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct PretrainConfig {
    pub objective: Kind,
    /// Of the first weights, and of all that is drawn.
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

impl RunConfig for PretrainConfig {
    fn train(&self) -> &TrainConfig {
        &self.train
    }

    fn optim(&self) -> &OptimConfig {
        &self.optim
    }

    fn build(&self, device: &Device) -> Result<Box<dyn Objective>> {
        match self.objective {
            Kind::Autoencoder => Ok(Box::new(VaeObjective::new(&self.autoencoder, self.seed, device)?)),
            Kind::Diffuser => Ok(Box::new(Diffuser::new(&self.diffuser, self.seed, device)?)),
            Kind::Vlm => Ok(Box::new(VlmObjective::new(&self.vlm, self.seed, device)?)),
        }
    }

    /// The model that an adapter is trained on.
    fn built_on(&self) -> Result<BTreeMap<String, String>> {
        let (key, init, parts): (_, _, &[&str]) = match self.objective {
            Kind::Vlm if self.vlm.adapter.is_some() => ("vlm.init", &self.vlm.init, &[]),
            Kind::Diffuser if self.diffuser.adapter.is_some() => {
                ("diffuser.init", &self.diffuser.init, &["transformer", "text_encoder", "tokenizer"])
            }
            _ => return Ok(BTreeMap::new()),
        };
        let revision = init.clone().map(|init| Folder::from(init).fingerprint(parts)).transpose()?;
        Ok(revision.into_iter().map(|revision| (key.to_owned(), revision)).collect())
    }

    fn unused(&self) -> Vec<(&'static str, &'static str)> {
        let others = Kind::ALL.into_iter().filter(|kind| *kind != self.objective);
        let others = others.map(|kind| (kind.section(), "another objective"));
        let of_all = ["vlm.claims", "vlm.probes", "vlm.act", "vlm.parse"].into_iter();
        let of_all = of_all.filter(|_| self.objective == Kind::Vlm && self.vlm.adapter.is_some());
        others.chain(of_all.map(|key| (key, "a whole VLM; the Actor's adapter learns edits alone"))).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        config::Layers,
        error::Usage,
        io,
        train::request::{CONFIG, Request},
    };
    use std::{fs, path::Path, sync::atomic::AtomicBool};

    fn request(dir: &Path, config: &str) -> Request {
        let path = dir.join("example.toml");
        fs::write(&path, config).unwrap();
        Request { config: Some(path), resume: None, out: Some(dir.join("run")), set: Vec::new() }
    }

    fn mistake(request: &Request) -> String {
        let error = request.prepare::<PretrainConfig>().err().unwrap();
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

        let taken = dir.path().join("thesis");
        fs::create_dir_all(taken.join("model")).unwrap();
        let message = mistake(&Request { out: Some(taken), ..request(dir.path(), "objective = 'vlm'") });
        assert!(message.contains("thesis is not empty and holds no run"), "{message}");

        let nothing = Request { resume: Some(dir.path().join("run")), ..request(dir.path(), "") };
        assert!(mistake(&nothing).contains("no run's folder"));
        fs::create_dir(dir.path().join("run")).unwrap();
        fs::write(dir.path().join("run").join(CONFIG), "").unwrap();
        assert!(mistake(&good).contains("already holds a run"));
    }

    #[test]
    fn the_config_of_a_run_that_goes_on_stays() {
        let dir = tempfile::tempdir().unwrap();
        let small = "objective = 'autoencoder'\n[autoencoder]\nblock_out_channels = [4, 8, 8, 8]\nheld_out = 1\n";
        let request = request(dir.path(), small);
        let run = dir.path().join("run");
        fs::create_dir(&run).unwrap();
        let _lock = io::lock(&run, "trains").unwrap();
        let train = |request: &Request| {
            request.prepare::<PretrainConfig>().unwrap().train(&AtomicBool::new(true), &mut |_| ()).unwrap_err()
        };
        assert!(train(&request).to_string().contains("another process trains"));
        let wrong = Request { set: vec!["train.batch=0".into()], ..request.clone() };
        assert!(train(&wrong).to_string().contains("train.batch"));
        assert!(!run.join(CONFIG).exists(), "what was refused can be tried again");
        fs::write(run.join(CONFIG), small).unwrap();
        let resumed = Request { resume: Some(run.clone()), set: vec!["optim.lr=3".into()], ..request };
        assert!(train(&resumed).to_string().contains("another process trains"));
        assert_eq!(fs::read_to_string(run.join(CONFIG)).unwrap(), small);
    }

    #[test]
    fn the_configs_of_the_shipped_models_are_read() {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("configs/tabletop");
        let mut read = 0;
        for file in fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()) {
            if !file.file_name().unwrap().to_str().unwrap().starts_with("grpo") {
                let config = Layers::<PretrainConfig>::defaults().unwrap().file(&file).unwrap().resolve().unwrap();
                config.diffuser.check().unwrap();
                read += 1;
            }
        }
        assert!(read >= 15, "{read}");
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
