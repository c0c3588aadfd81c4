//! Checkpoints: everything a run needs to go on as if it had never stopped, in one safetensors file.
//!
//! The file's metadata holds the JSON part and a digest of the tensors. It is written to a temporary name, synced and
//! renamed, so a file with a checkpoint's name is whole; one that is not (a bad disk, a stray file) is refused by name.

use crate::io::write_safetensors;
use anyhow::{Context, Result, anyhow, bail};
use candle_core::{DType, Device, Tensor};
use safetensors::{SafeTensors, View};
use serde_json::Value;
use sha2::{Digest, Sha256};
use std::{
    collections::{BTreeMap, HashMap},
    fs,
    path::{Path, PathBuf},
};

const FORMAT: &str = "rlrig-checkpoint-1";
const SUFFIX: &str = ".safetensors";

/// What a checkpoint holds.
pub struct Checkpoint {
    /// Steps done.
    pub step: u64,
    /// Numbers and names.
    pub state: Value,
    /// Variables, moments, averages, each under a prefix of its own.
    pub tensors: BTreeMap<String, Tensor>,
}

impl Checkpoint {
    /// Writes the checkpoint into `folder` and returns its path.
    pub fn write(&self, folder: &Path) -> Result<PathBuf> {
        let path = path(folder, self.step);
        let metadata = HashMap::from([
            ("format".to_owned(), FORMAT.to_owned()),
            ("step".to_owned(), self.step.to_string()),
            ("state".to_owned(), self.state.to_string()),
            ("sha256".to_owned(), digest(self.tensors.iter().map(|(name, tensor)| (name.as_str(), tensor)))),
        ]);
        write_safetensors(&path, &self.tensors, metadata)?;
        Ok(path)
    }

    /// Reads `path`; an error names it if it is torn, changed or no checkpoint.
    pub fn read(path: &Path) -> Result<Self> {
        let name = path.display();
        let bytes = fs::read(path).with_context(|| format!("cannot read the checkpoint {name}"))?;
        let torn = |why: &dyn std::fmt::Display| {
            anyhow!("the checkpoint {name} is torn ({why}); delete it to resume from the one before")
        };
        let (_, header) = SafeTensors::read_metadata(&bytes).map_err(|e| torn(&e))?;
        let file = SafeTensors::deserialize(&bytes).map_err(|e| torn(&e))?;
        let entry = |key: &str| header.metadata().as_ref().and_then(|m| m.get(key));
        if entry("format").is_none_or(|format| format != FORMAT) {
            bail!("{name} is a safetensors file, but no checkpoint of this version of rlrig");
        }
        let views: BTreeMap<&str, _> = file.iter().collect();
        if entry("sha256") != Some(&digest(views.iter().map(|(name, view)| (*name, view)))) {
            return Err(torn(&"its digest does not match"));
        }
        let step = entry("step").and_then(|step| step.parse().ok()).ok_or_else(|| torn(&"it has no step"))?;
        let state = entry("state").and_then(|state| serde_json::from_str(state).ok());
        let state = state.ok_or_else(|| torn(&"it has no state"))?;
        let mut tensors = BTreeMap::new();
        for (key, view) in views {
            let tensor =
                Tensor::from_raw_buffer(view.data(), DType::try_from(view.dtype())?, view.shape(), &Device::Cpu)?;
            tensors.insert(key.to_owned(), tensor);
        }
        Ok(Self { step, state, tensors })
    }

    /// Takes out the tensor `key` of `shape`.
    pub fn take(&mut self, key: &str, shape: &[usize]) -> Result<Tensor> {
        let step = self.step;
        match self.tensors.remove(key) {
            Some(tensor) if tensor.dims() == shape => Ok(tensor),
            Some(tensor) => {
                bail!("the checkpoint of step {step} has {key} as {:?}, the model as {shape:?}", tensor.dims())
            }
            None => bail!("the checkpoint of step {step} has no {key}: it is of another model or optimiser"),
        }
    }
}

fn path(folder: &Path, step: u64) -> PathBuf {
    folder.join(format!("step-{step:08}{SUFFIX}"))
}

/// The steps that `folder` has checkpoints of, in order.
pub fn steps(folder: &Path) -> Result<Vec<u64>> {
    let mut steps = Vec::new();
    for entry in fs::read_dir(folder).with_context(|| format!("cannot list {}", folder.display()))? {
        let name = entry?.file_name();
        let step = name.to_str().and_then(|n| n.strip_prefix("step-")?.strip_suffix(SUFFIX)?.parse::<u64>().ok());
        steps.extend(step);
    }
    steps.sort_unstable();
    Ok(steps)
}

/// The last checkpoint in `folder`.
pub fn last(folder: &Path) -> Result<Option<PathBuf>> {
    Ok(steps(folder)?.last().map(|step| path(folder, *step)))
}

/// Deletes all but the last `keep` checkpoints and the one of step `best`.
pub fn prune(folder: &Path, keep: usize, best: Option<u64>) -> Result<()> {
    let steps = steps(folder)?;
    for step in &steps[..steps.len().saturating_sub(keep.max(1))] {
        if Some(*step) != best {
            let path = path(folder, *step);
            fs::remove_file(&path).with_context(|| format!("cannot delete {}", path.display()))?;
        }
    }
    Ok(())
}

/// Writes a model's tensors in `dtype` as transformers and diffusers expect them.
pub fn write_model(path: &Path, tensors: &BTreeMap<String, Tensor>, dtype: DType) -> Result<()> {
    let cast = tensors.iter().map(|(name, tensor)| Ok((name.clone(), tensor.detach().to_dtype(dtype)?)));
    let metadata = HashMap::from([("format".to_owned(), "pt".to_owned())]);
    write_safetensors(path, &cast.collect::<Result<BTreeMap<_, _>>>()?, metadata)
}

fn digest<'a, V: View + 'a>(tensors: impl Iterator<Item = (&'a str, V)>) -> String {
    let mut hash = Sha256::new();
    for (name, view) in tensors {
        hash.update(format!("{name} {:?} {:?};", view.dtype(), view.shape()));
        hash.update(view.data());
    }
    hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn checkpoint(step: u64) -> Checkpoint {
        let tensor = |values: &[f32]| Tensor::new(values, &Device::Cpu).unwrap();
        let tensors = BTreeMap::from([
            ("vars/w".to_owned(), tensor(&[1.5, -0.1, 3e-9])),
            ("ema/w".to_owned(), tensor(&[0.1, 0.2, f32::MIN_POSITIVE])),
        ]);
        Checkpoint { step, state: serde_json::json!({ "mean_norm": 0.1 + 0.2, "bad": 3 }), tensors }
    }

    #[test]
    fn what_is_written_is_read_back() {
        let dir = tempfile::tempdir().unwrap();
        let written = checkpoint(12);
        let path = written.write(dir.path()).unwrap();
        assert_eq!(last(dir.path()).unwrap(), Some(path.clone()));
        let mut read = Checkpoint::read(&path).unwrap();
        assert_eq!((read.step, &read.state), (12, &written.state));
        for (name, tensor) in &written.tensors {
            let got = read.take(name, &[3]).unwrap().to_vec1::<f32>().unwrap();
            assert_eq!(got, tensor.to_vec1::<f32>().unwrap());
        }
        assert!(read.take("vars/w", &[3]).unwrap_err().to_string().contains("no vars/w"));
    }

    #[test]
    fn a_torn_or_foreign_file_is_refused_by_name() {
        let dir = tempfile::tempdir().unwrap();
        let path = checkpoint(1).write(dir.path()).unwrap();
        let whole = fs::read(&path).unwrap();
        let refused = |bytes: &[u8], why: &str| {
            fs::write(&path, bytes).unwrap();
            let error = Checkpoint::read(&path).err().unwrap().to_string();
            assert!(error.contains("step-00000001.safetensors") && error.contains(why), "{error}");
        };
        for cut in [0, 4, 20, whole.len() / 2, whole.len() - 1] {
            refused(&whole[..cut], "torn");
        }
        let mut flipped = whole.clone();
        *flipped.last_mut().unwrap() ^= 1;
        refused(&flipped, "digest");
        let mut huge = whole.clone();
        huge[..8].copy_from_slice(&u64::MAX.to_le_bytes());
        refused(&huge, "torn");
        let foreign = dir.path().join("foreign.safetensors");
        write_model(&foreign, &checkpoint(1).tensors, DType::F16).unwrap();
        refused(&fs::read(foreign).unwrap(), "no checkpoint");
    }

    #[test]
    fn the_last_and_the_best_are_kept() {
        let dir = tempfile::tempdir().unwrap();
        for step in 1..=6 {
            checkpoint(step).write(dir.path()).unwrap();
        }
        fs::write(dir.path().join("notes.txt"), "").unwrap();
        prune(dir.path(), 2, Some(3)).unwrap();
        assert_eq!(steps(dir.path()).unwrap(), [3, 5, 6]);
        prune(dir.path(), 0, None).unwrap();
        assert_eq!(steps(dir.path()).unwrap(), [6]);
    }

    #[test]
    fn a_failed_write_leaves_nothing() {
        let dir = tempfile::tempdir().unwrap();
        assert!(checkpoint(1).write(&dir.path().join("missing")).is_err());
        fs::create_dir(dir.path().join("step-00000001.safetensors")).unwrap();
        assert!(checkpoint(1).write(dir.path()).is_err());
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
    }
}
