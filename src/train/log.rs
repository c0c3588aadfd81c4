//! The logs of a run: `metrics.jsonl`, which is the truth, and TensorBoard event files beside it.

use super::Metrics;
use crate::io::tensorboard::EventWriter;
use anyhow::{Context, Result, bail};
use serde_json::{Map, Value};
use std::{
    fs::{self, File, OpenOptions},
    io::Write,
    path::{Path, PathBuf},
};

pub const METRICS: &str = "metrics.jsonl";

/// Writes both logs of one run folder.
pub struct Log {
    metrics: File,
    /// Where they are, for messages.
    path: PathBuf,
    events: EventWriter,
}

impl Log {
    /// Opens the logs in `folder` for a run that has done `step` steps, or that begins: what they hold of later steps is
    /// dropped.
    pub fn open(folder: &Path, step: Option<u64>) -> Result<Self> {
        let path = folder.join(METRICS);
        truncate(&path, step).with_context(|| format!("cannot cut {} back", path.display()))?;
        let metrics = OpenOptions::new().create(true).append(true).open(&path);
        let metrics = metrics.with_context(|| format!("cannot open {}", path.display()))?;
        Ok(Self { metrics, path, events: EventWriter::create(folder, step.map_or(0, |step| step + 1))? })
    }

    /// Appends one line to `metrics.jsonl` and its numbers to the event file. JSON has no NaN: such a value is `null`.
    pub fn metrics(&mut self, step: u64, metrics: &Metrics) -> Result<()> {
        let mut line = Map::from_iter([("step".to_owned(), Value::from(step))]);
        line.extend(metrics.iter().map(|(name, value)| (name.clone(), Value::from(*value))));
        writeln!(self.metrics, "{}", Value::Object(line)).with_context(|| cannot_write(&self.path))?;
        self.events.scalars(step, metrics.iter().map(|(name, value)| (name.as_str(), *value)))
    }

    /// Shows every `*.png` of `folder` in TensorBoard.
    pub fn pictures(&mut self, step: u64, folder: &Path) -> Result<()> {
        let mut paths: Vec<_> = fs::read_dir(folder)?.map(|e| Ok(e?.path())).collect::<std::io::Result<_>>()?;
        paths.sort();
        for path in paths.iter().filter(|path| path.extension().is_some_and(|e| e == "png")) {
            let stem = path.file_stem().unwrap_or_default().to_string_lossy();
            self.events.png(step, &format!("samples/{stem}"), &fs::read(path)?)?;
        }
        Ok(())
    }

    /// Puts `metrics.jsonl` on the disk, so that a checkpoint never knows steps that the log lost.
    pub fn sync(&self) -> Result<()> {
        self.metrics.sync_all().with_context(|| cannot_write(&self.path))
    }
}

fn cannot_write(path: &Path) -> String {
    format!("cannot write {}", path.display())
}

/// Keeps the whole lines of steps up to `step`, or none. What comes after them may be torn; between them nothing may.
fn truncate(path: &Path, step: Option<u64>) -> Result<()> {
    if !path.exists() {
        return Ok(());
    }
    let text = fs::read_to_string(path)?;
    let (mut length, mut end, mut damaged) = (0, 0, None);
    for (number, line) in (1..).zip(text.split_inclusive('\n')) {
        end += line.len() as u64;
        let parsed: Option<Value> = line.strip_suffix('\n').and_then(|line| serde_json::from_str(line).ok());
        match (parsed.and_then(|line| line.get("step")?.as_u64()), damaged) {
            (None, _) => damaged = damaged.or(Some(number)),
            (at, _) if at > step => break,
            (_, Some(number)) => bail!("line {number} is not what a training writes: take it out"),
            (_, None) => length = end,
        }
    }
    let file = OpenOptions::new().write(true).open(path)?;
    file.set_len(length)?;
    Ok(file.sync_all()?)
}

/// The most memory that this process has held so far, in bytes, where the system tells.
pub fn peak_memory() -> Option<u64> {
    let status = fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"))?;
    line.trim().strip_suffix(" kB")?.parse::<u64>().ok().map(|kib| kib * 1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_resumed_log_forgets_later_steps_and_torn_lines() {
        let dir = tempfile::tempdir().unwrap();
        let mut log = Log::open(dir.path(), None).unwrap();
        for step in 1..=5 {
            log.metrics(step, &vec![("loss".into(), 1.0 / step as f64), ("bad".into(), f64::NAN)]).unwrap();
        }
        let path = dir.path().join(METRICS);
        let whole = fs::read_to_string(&path).unwrap();
        let lines: Vec<_> = whole.split_inclusive('\n').collect();
        assert_eq!(lines[1], "{\"step\":2,\"loss\":0.5,\"bad\":null}\n");
        fs::write(&path, format!("{whole}{{\"step\":6,\"lo")).unwrap();
        Log::open(dir.path(), Some(7)).unwrap();
        assert_eq!(fs::read_to_string(&path).unwrap(), whole);
        let mut log = Log::open(dir.path(), Some(3)).unwrap();
        assert_eq!(fs::read_to_string(&path).unwrap(), lines[..3].concat());
        log.metrics(4, &vec![("loss".into(), 0.25), ("bad".into(), f64::INFINITY)]).unwrap();
        assert_eq!(fs::read_to_string(&path).unwrap(), lines[..4].concat());
    }

    #[test]
    fn damage_between_the_lines_is_an_error_that_cuts_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(METRICS);
        let damaged = "{\"step\":1}\n\0\0\0\n{\"step\":3}\n";
        fs::write(&path, damaged).unwrap();
        let error = format!("{:#}", Log::open(dir.path(), Some(3)).err().unwrap());
        assert!(error.contains("metrics.jsonl") && error.contains("line 2"), "{error}");
        assert_eq!(fs::read_to_string(&path).unwrap(), damaged);
        Log::open(dir.path(), Some(2)).unwrap();
        assert_eq!(fs::read_to_string(&path).unwrap(), "{\"step\":1}\n");
    }
}
