//! A model folder in the Hugging Face layout, on disk or in the binary: the one way by which rlrig reads model files.

use anyhow::{Context, Result, anyhow};
use include_dir::Dir;
use serde::de::DeserializeOwned;
use sha2::{Digest, Sha256};
use std::{
    borrow::Cow,
    io::{Read, Seek, SeekFrom},
    path::{Path, PathBuf},
};

/// The beginning of a digest, which tells one version of some files from another.
pub fn revision(digest: Sha256) -> String {
    digest.finalize().iter().take(6).map(|byte| format!("{byte:02x}")).collect()
}

/// A folder of model files.
#[derive(Clone, Debug)]
pub enum Folder {
    Disk(PathBuf),
    Embedded(&'static Dir<'static>),
}

impl Folder {
    /// The subfolder `name`, if there is one.
    pub fn sub(&self, name: &str) -> Option<Self> {
        match self {
            Self::Disk(path) => {
                let path = path.join(name);
                path.is_dir().then_some(Self::Disk(path))
            }
            Self::Embedded(dir) => dir.get_dir(dir.path().join(name)).map(Self::Embedded),
        }
    }

    /// The subfolder `name`, or an error that says what is missing.
    pub fn require(&self, name: &str) -> Result<Self> {
        self.sub(name).ok_or_else(|| anyhow!("{} has no folder {name}/", self.name()))
    }

    pub fn has(&self, file: &str) -> bool {
        match self {
            Self::Disk(path) => path.join(file).is_file(),
            Self::Embedded(dir) => dir.get_file(dir.path().join(file)).is_some(),
        }
    }

    /// The names of its files, in order; not those of folders in it.
    pub fn files(&self) -> Result<Vec<String>> {
        let paths: Vec<PathBuf> = match self {
            Self::Disk(path) => {
                let entries = std::fs::read_dir(path).with_context(|| format!("cannot list {}", path.display()))?;
                let files = entries.map(|entry| Ok(entry?.path())).collect::<std::io::Result<Vec<_>>>()?;
                files.into_iter().filter(|path| path.is_file()).collect()
            }
            Self::Embedded(dir) => dir.files().map(|file| file.path().to_owned()).collect(),
        };
        let mut names: Vec<String> =
            paths.iter().filter_map(|path| path.file_name()?.to_str().map(str::to_owned)).collect();
        names.sort();
        Ok(names)
    }

    /// The bytes of `file`.
    pub fn read(&self, file: &str) -> Result<Cow<'static, [u8]>> {
        match self {
            Self::Disk(path) => {
                let path = path.join(file);
                std::fs::read(&path).map(Cow::Owned).with_context(|| format!("cannot read {}", path.display()))
            }
            Self::Embedded(dir) => dir
                .get_file(dir.path().join(file))
                .map(|f| Cow::Borrowed(f.contents()))
                .ok_or_else(|| anyhow!("{} is not in the binary", self.file(file))),
        }
    }

    /// Tells its files, and those of its folders `parts`, from what they hold at another time: by names, sizes, and the first and
    /// last mebibyte of each, as checkpoints are large.
    pub fn fingerprint(&self, parts: &[&str]) -> Result<String> {
        let mut hash = Sha256::new();
        for folder in std::iter::once(self.clone()).chain(parts.iter().filter_map(|part| self.sub(part))) {
            for name in folder.files()? {
                let (size, ends) = folder.ends(&name).with_context(|| format!("cannot read {}", folder.file(&name)))?;
                hash.update(&name);
                hash.update(size.to_le_bytes());
                hash.update(ends);
            }
        }
        Ok(revision(hash))
    }

    /// The size of `file`, and its first and last bytes.
    fn ends(&self, file: &str) -> Result<(u64, Vec<u8>)> {
        const END: u64 = 1 << 20;
        let Self::Disk(path) = self else {
            let bytes = self.read(file)?;
            return Ok((bytes.len() as u64, bytes.into_owned()));
        };
        let mut opened = std::fs::File::open(path.join(file))?;
        let (size, mut ends) = (opened.metadata()?.len(), Vec::new());
        (&opened).take(END).read_to_end(&mut ends)?;
        opened.seek(SeekFrom::Start(size.saturating_sub(END).max(ends.len() as u64)))?;
        opened.take(END).read_to_end(&mut ends)?;
        Ok((size, ends))
    }

    /// `file`, parsed as JSON.
    pub fn json<T: DeserializeOwned>(&self, file: &str) -> Result<T> {
        let bytes = self.read(file)?;
        serde_json::from_slice(&bytes).with_context(|| format!("{} is not what it should be", self.file(file)))
    }

    /// The path on disk, for what must be mapped rather than read.
    pub fn disk(&self) -> Option<&Path> {
        match self {
            Self::Disk(path) => Some(path),
            Self::Embedded(_) => None,
        }
    }

    /// The folder as shown to people.
    pub fn name(&self) -> String {
        match self {
            Self::Disk(path) => path.display().to_string(),
            Self::Embedded(dir) => format!("built-in:{}", dir.path().display()),
        }
    }

    /// A file of it as shown to people.
    pub fn file(&self, file: &str) -> String {
        format!("{}/{file}", self.name())
    }
}

impl<P: Into<PathBuf>> From<P> for Folder {
    fn from(path: P) -> Self {
        Self::Disk(path.into())
    }
}
