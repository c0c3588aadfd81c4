//! Files in and out, in the formats other tools read.

pub mod html;
pub mod hub;
pub mod png;
pub mod sheet;
pub mod story;
pub mod tensorboard;

use crate::usage;
use anyhow::{Context, Result, ensure};
use std::{
    collections::HashMap,
    fmt::Display,
    fs,
    io::{ErrorKind, Read, Write},
    path::Path,
};

/// Writes a whole file or none: to a temporary name in the same folder, synced, then renamed. Without `overwrite` a file
/// that exists is an error and stays as it is.
pub fn write_file(path: &Path, bytes: &[u8], overwrite: bool) -> Result<()> {
    let write = || -> std::io::Result<()> {
        let folder = path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
        if !overwrite && path.exists() {
            return Err(ErrorKind::AlreadyExists.into());
        }
        let mut builder = tempfile::Builder::new();
        builder.prefix(".rlrig-");
        #[cfg(unix)]
        builder.permissions(std::os::unix::fs::PermissionsExt::from_mode(0o666)); // less the umask, as for any file
        let mut file = builder.tempfile_in(folder)?;
        file.write_all(bytes)?;
        file.as_file().sync_all()?;
        if overwrite {
            file.persist(path)?
        } else {
            file.persist_noclobber(path)?
        };
        // The name itself is only safe once the folder is synced; not every file system can do that.
        if let Ok(folder) = fs::File::open(folder) {
            let _ = folder.sync_all();
        }
        Ok(())
    };
    write().map_err(|error| match error.kind() {
        ErrorKind::AlreadyExists => exists(path),
        _ => anyhow::Error::new(error).context(format!("cannot write {}", path.display())),
    })
}

/// Writes a safetensors file, as a whole or not at all, that whoever may read other new files may read. It is not held in
/// memory.
pub fn write_safetensors<S, V>(
    path: &Path,
    tensors: impl IntoIterator<Item = (S, V)>,
    metadata: HashMap<String, String>,
) -> Result<()>
where
    S: AsRef<str> + Ord + Display,
    V: safetensors::View,
{
    let temporary = path.with_extension("tmp");
    let write = || -> Result<()> {
        // The library makes files for their owner alone.
        let permissions = fs::File::create(&temporary)?.metadata()?.permissions();
        safetensors::serialize_to_file(tensors, Some(metadata), &temporary)?;
        fs::set_permissions(&temporary, permissions)?;
        fs::File::open(&temporary)?.sync_all()?;
        fs::rename(&temporary, path)?;
        // The new name is on the disk only once the folder is.
        if let Some(folder) = path.parent() {
            fs::File::open(folder)?.sync_all()?;
        }
        Ok(())
    };
    write()
        .inspect_err(|_| drop(fs::remove_file(&temporary)))
        .with_context(|| format!("cannot write {}", path.display()))
}

/// The lock of a run's folder, which is held for as long as a process `works` in it: "trains", "evaluates".
pub fn lock(folder: &Path, works: &str) -> Result<fs::File> {
    let path = folder.join(".lock");
    let lock = fs::File::create(&path).with_context(|| format!("cannot create {}", path.display()))?;
    ensure!(lock.try_lock().is_ok(), "another process {works} in {}", folder.display());
    Ok(lock)
}

/// The error for a file that is in the way.
pub fn exists(path: &Path) -> anyhow::Error {
    anyhow::Error::new(crate::error::Usage(format!(
        "{} exists; choose another name or give --force to overwrite it",
        path.display()
    )))
}

/// An error if the folder of what is to be written is a file, or has something in it; `instead` says what to do then.
pub fn expect_empty(folder: &Path, instead: &str) -> Result<()> {
    if folder.exists() && !folder.is_dir() {
        usage!("{} is a file, not a folder", folder.display());
    }
    if fs::read_dir(folder).is_ok_and(|mut entries| entries.next().is_some()) {
        usage!("{} is not empty; {instead}", folder.display());
    }
    Ok(())
}

/// Reads a file of at most `limit` bytes.
pub fn read_file(path: &Path, limit: u64) -> Result<Vec<u8>> {
    let shown = path.display();
    let size = fs::metadata(path).with_context(|| format!("cannot read {shown}"))?.len();
    anyhow::ensure!(size <= limit, "{shown} has {size} bytes, more than the {limit} that are read");
    let file = fs::File::open(path).with_context(|| format!("cannot read {shown}"))?;
    // What is no plain file tells no true size.
    read_whole(file, &shown.to_string(), limit)
}

/// Reads all of `input`, which messages call `name`: at most `limit` bytes.
pub fn read_whole(input: impl Read, name: &str, limit: u64) -> Result<Vec<u8>> {
    let mut bytes = Vec::new();
    input.take(limit.saturating_add(1)).read_to_end(&mut bytes).with_context(|| format!("cannot read {name}"))?;
    anyhow::ensure!(bytes.len() as u64 <= limit, "{name} has more than the {limit} bytes that are read");
    Ok(bytes)
}

/// The names of the files under a folder, with `/` between those of folders; those of a folder before those below it. A
/// folder below that cannot be read is passed over, and so is a link to one.
pub fn files_under(folder: &Path) -> Result<Vec<String>> {
    const DEEPEST: usize = 8;
    fn add(path: &Path, prefix: &str, depth: usize, names: &mut Vec<(usize, String)>) -> std::io::Result<()> {
        for entry in fs::read_dir(path)? {
            let entry = entry?;
            // A name that is no text is none that is looked for.
            let Ok(name) = entry.file_name().into_string() else { continue };
            if !entry.path().is_dir() {
                names.push((depth, format!("{prefix}{name}")));
            } else if depth < DEEPEST && entry.file_type()?.is_dir() {
                let _ = add(&entry.path(), &format!("{prefix}{name}/"), depth + 1, names);
            }
        }
        Ok(())
    }
    let mut names = Vec::new();
    add(folder, "", 0, &mut names).with_context(|| format!("cannot read {}", folder.display()))?;
    names.sort();
    Ok(names.into_iter().map(|(_, name)| name).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[cfg(unix)]
    #[test]
    fn others_may_read_tensors_as_they_may_read_other_files() {
        let folder = tempfile::tempdir().unwrap();
        let [tensors, text] = ["a.safetensors", "a.txt"].map(|name| folder.path().join(name));
        let values = safetensors::tensor::TensorView::new(safetensors::Dtype::U8, vec![1], &[7]).unwrap();
        write_safetensors(&tensors, [("x", values)], HashMap::new()).unwrap();
        fs::write(&text, "").unwrap();
        let mode = |path: &Path| fs::metadata(path).unwrap().permissions();
        assert_eq!(mode(&tensors), mode(&text));
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 2, "no temporary file stays");
    }

    #[test]
    fn a_file_is_written_whole_and_never_over_another_by_accident() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.txt");
        write_file(&path, b"one", false).unwrap();
        let error = write_file(&path, b"two", false).unwrap_err();
        assert!(error.is::<crate::error::Usage>() && error.to_string().contains("--force"), "{error}");
        assert_eq!(fs::read(&path).unwrap(), b"one");
        write_file(&path, b"two", true).unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"two");
        let error = write_file(&folder.path().join("no/such/b.txt"), b"x", false).unwrap_err();
        assert!(error.to_string().starts_with("cannot write"), "{error}");
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1, "no temporary file stays");
    }

    #[test]
    fn reading_stops_at_its_limit() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a");
        fs::write(&path, [0; 10]).unwrap();
        assert_eq!(read_file(&path, 10).unwrap().len(), 10);
        assert!(read_file(&path, 9).is_err());
    }
}
