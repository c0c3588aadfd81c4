//! What Reflection-GRPO trains of a model: a low-rank adapter on it, or all of its weights.

use super::checkpoint::write_model;
use crate::{
    models::{Adapter, Folder, Params, peft},
    rig::calibration,
};
use anyhow::{Context, Result};
use candle_core::{DType, Device, Var};
use std::{collections::BTreeMap, fs, path::Path};

pub enum Trained {
    Adapter(Adapter),
    Whole(Whole),
}

/// All weights of a model, in f32.
pub struct Whole {
    pub params: Params,
    /// Where they are from, and the name of their file without its ending.
    folder: Folder,
    stem: &'static str,
}

impl Whole {
    /// A trained copy of the weights in `folder`. Build the model with [`Whole::params`].
    pub fn open(folder: &Folder, stem: &'static str, device: &Device) -> Result<Self> {
        let params = Params::open(folder, stem, DType::F32, device)?.trained();
        Ok(Self { params, folder: folder.clone(), stem })
    }

    /// The same weights, as they are at each moment, without gradients. Call once the model is built.
    pub fn still(&self) -> Params {
        // Of the same storage, which updates write into.
        let tensors = self.params.tensors().into_iter().map(|(name, tensor)| (name, tensor.detach()));
        Params::loaded(tensors.collect(), "the trained model", DType::F32, self.params.device())
    }

    /// Writes the weights, with the other files of the folder that they are from.
    fn save(&self, folder: &Path, dtype: DType) -> Result<()> {
        for name in described(&self.folder)? {
            let path = folder.join(&name);
            fs::write(&path, self.folder.read(&name)?).with_context(|| format!("cannot write {}", path.display()))?;
        }
        write_model(&folder.join(format!("{}.safetensors", self.stem)), &self.params.tensors(), dtype)
    }
}

/// The files of a model's folder that say what its weights are: its configs and its tokenizer.
fn described(folder: &Folder) -> Result<Vec<String>> {
    // The index is of shards, which the one new file replaces.
    let wanted = |name: &String| {
        let ending = name.rsplit_once('.').map_or("", |(_, ending)| ending);
        // And a calibration is of another model now.
        let stale = name.ends_with(".safetensors.index.json") || name == calibration::FILE;
        ["json", "jinja", "txt"].contains(&ending) && !stale
    };
    Ok(folder.files()?.into_iter().filter(wanted).collect())
}

impl Trained {
    /// The variables by their names in what is saved.
    pub fn vars(&self) -> BTreeMap<String, Var> {
        match self {
            Self::Adapter(adapter) => adapter.vars(),
            Self::Whole(whole) => whole.params.vars(),
        }
    }

    /// Writes the adapter as PEFT does, or the model's whole folder.
    pub fn save(&self, folder: &Path, dtype: DType) -> Result<()> {
        match self {
            Self::Adapter(adapter) => peft::write(adapter, folder, dtype),
            Self::Whole(whole) => whole.save(folder, dtype),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::models::Linear;
    use candle_core::Tensor;

    #[test]
    fn a_whole_model_is_trained_watched_and_saved_with_its_configs() {
        let (dir, out) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let weight = Tensor::ones((2, 3), DType::F32, &Device::Cpu).unwrap();
        let tensors = BTreeMap::from([("lin.weight".to_owned(), weight)]);
        write_model(&dir.path().join("model.safetensors"), &tensors, DType::F32).unwrap();
        for name in ["config.json", "model.safetensors.index.json", "notes.bin"] {
            fs::write(dir.path().join(name), "{}").unwrap();
        }
        let whole = Whole::open(&Folder::from(dir.path()), "model", &Device::Cpu).unwrap();
        let trained = Linear::new(3, 2, &whole.params.at("lin")).unwrap();
        let still = Linear::new(3, 2, &whole.still().at("lin")).unwrap();
        let frozen = Params::open(&Folder::from(dir.path()), "model", DType::F32, &Device::Cpu).unwrap();
        let frozen = Linear::new(3, 2, &frozen.at("lin")).unwrap();

        let x = Tensor::ones((1, 3), DType::F32, &Device::Cpu).unwrap();
        let of = |layer: &Linear| layer.forward(&x).unwrap().flatten_all().unwrap().to_vec1::<f32>().unwrap();
        let vars = Trained::Whole(whole).vars();
        let grads = trained.forward(&x).unwrap().sum_all().unwrap().backward().unwrap();
        assert!(grads.get(&vars["lin.weight"]).is_some());
        vars["lin.weight"].set(&Tensor::zeros((2, 3), DType::F32, &Device::Cpu).unwrap()).unwrap();
        assert_eq!((of(&trained), of(&still), of(&frozen)), (vec![0.0; 2], vec![0.0; 2], vec![3.0; 2]));

        let whole = Whole::open(&Folder::from(dir.path()), "model", &Device::Cpu).unwrap();
        Linear::new(3, 2, &whole.params.at("lin")).unwrap();
        Trained::Whole(whole).save(out.path(), DType::F16).unwrap();
        let mut names: Vec<_> = fs::read_dir(out.path()).unwrap().map(|e| e.unwrap().file_name()).collect();
        names.sort();
        assert_eq!(names, ["config.json", "model.safetensors"]);
    }
}
