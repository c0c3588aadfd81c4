//! How much memory the weights of a model take that is used but not trained.

use crate::models::Folder;
use anyhow::{Context, Result};
use candle_core::DType;
use serde::Deserialize;
use std::{
    collections::BTreeMap,
    fs::File,
    io::{Cursor, Read},
};

/// Bytes that the weights of a model's folder take in `dtype`, by the headers of its safetensors files.
pub fn bytes(folder: &Folder, dtype: DType) -> Result<usize> {
    let mut all = 0usize;
    for name in folder.files()?.into_iter().filter(|name| name.ends_with(".safetensors")) {
        let shown = folder.file(&name);
        // Of a file on disk the header alone is read.
        let mut file: Box<dyn Read> = match folder.disk() {
            Some(path) => Box::new(File::open(path.join(&name)).with_context(|| format!("cannot read {shown}"))?),
            None => Box::new(Cursor::new(folder.read(&name)?)),
        };
        let found = numbers(&mut file).with_context(|| format!("{shown} is no safetensors file"))?;
        all = all.saturating_add(found);
    }
    Ok(all.saturating_mul(dtype.size_in_bytes()))
}

/// Bytes of a safetensors header at most, as the format has it.
const LONGEST: u64 = 100_000_000;

/// Numbers in a safetensors file.
fn numbers(file: &mut dyn Read) -> Result<usize> {
    /// A tensor, or the metadata, which have no shape.
    #[derive(Deserialize)]
    struct Entry {
        #[serde(default)]
        shape: Vec<usize>,
        data_offsets: Option<[u64; 2]>,
    }
    let mut length = [0; 8];
    file.read_exact(&mut length)?;
    let mut header = Vec::new();
    file.take(u64::from_le_bytes(length).min(LONGEST)).read_to_end(&mut header)?;
    let entries: BTreeMap<String, Entry> = serde_json::from_slice(&header)?;
    let count = |entry: &Entry| entry.shape.iter().fold(1usize, |count, side| count.saturating_mul(*side));
    Ok(entries.values().filter(|e| e.data_offsets.is_some()).map(count).fold(0, usize::saturating_add))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::train::checkpoint::write_model;
    use candle_core::{Device, Tensor};
    use std::fs;

    #[test]
    fn weights_are_counted_by_their_headers() {
        let dir = tempfile::tempdir().unwrap();
        for (name, sides) in [("model-1", (3, 4)), ("model-2", (5, 1))] {
            let tensor = Tensor::zeros(sides, DType::F32, &Device::Cpu).unwrap();
            let path = dir.path().join(format!("{name}.safetensors"));
            write_model(&path, &BTreeMap::from([("w".to_owned(), tensor)]), DType::F16).unwrap();
        }
        fs::write(dir.path().join("config.json"), "{}").unwrap();
        assert_eq!(bytes(&Folder::from(dir.path()), DType::F32).unwrap(), 4 * (12 + 5));
        fs::write(dir.path().join("torn.safetensors"), [9, 0, 0]).unwrap();
        assert!(bytes(&Folder::from(dir.path()), DType::F32).unwrap_err().to_string().contains("torn"));
    }
}
