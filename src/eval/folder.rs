//! A run's folder: `config.json`, `samples.jsonl` as it grows, pictures; and the documents made of them at the end.
//!
//! A prompt's lines are written in one piece when all its pictures are there. After a kill, a prompt whose lines are not
//! whole is made again.

use super::{
    line::{Key, Line},
    report,
    results::{Results, results},
    table,
};
use crate::{io, usage};
use anyhow::{Context, Result, ensure};
use image::RgbImage;
use serde_json::Value;
use std::{
    collections::{BTreeMap, HashSet},
    fs::{self, OpenOptions},
    io::Write,
    path::{Path, PathBuf},
};

const SAMPLES: &str = "samples.jsonl";
const CONFIG: &str = "config.json";
const RESULTS: &str = "results.json";
/// A file of lines that is larger than this is none of ours.
const LONGEST: u64 = 8 << 30;

pub struct Folder {
    path: PathBuf,
    lines: Vec<Line>,
}

impl Folder {
    /// A new run. A folder that has something in it is an error.
    pub fn create(path: &Path, config: &Value) -> Result<Self> {
        if fs::read_dir(path).is_ok_and(|mut entries| entries.next().is_some()) {
            usage!("{} is not empty; name a new folder, or go on with it by --resume", path.display());
        }
        fs::create_dir_all(path).with_context(|| format!("cannot make the folder {}", path.display()))?;
        io::write_file(&path.join(CONFIG), &pretty(config)?, false)?;
        Ok(Self { path: path.to_owned(), lines: Vec::new() })
    }

    /// Goes on with a run of the same configuration.
    pub fn resume(path: &Path, config: &Value) -> Result<Self> {
        let begun = read_config(path)?;
        if let Some(key) = different(&begun, config, &[]) {
            usage!("{} was begun with another {key}: {} instead of {}", path.display(), begun[&key], config[&key]);
        }
        let folder = Self { path: path.to_owned(), lines: whole(read_lines(path)?) };
        folder.write_lines()?;
        Ok(folder)
    }

    /// A run as it is, to be read.
    pub fn open(path: &Path) -> Result<(Self, Value)> {
        Ok((Self { path: path.to_owned(), lines: whole(read_lines(path)?) }, read_config(path)?))
    }

    pub fn lines(&self) -> &[Line] {
        &self.lines
    }

    /// Whether its documents are written, which is done when all prompts are made.
    pub fn is_finished(&self) -> bool {
        self.path.join(RESULTS).is_file()
    }

    /// What was wrong with the data, of a run that is finished.
    pub fn flaws(&self) -> Result<Value> {
        if !self.is_finished() {
            return Ok(Value::Null);
        }
        let file = self.path.join(RESULTS);
        let mut results: Value = serde_json::from_slice(&io::read_file(&file, LONGEST)?)
            .with_context(|| format!("{} is damaged", file.display()))?;
        Ok(results["flaws"].take())
    }

    /// The prompts that are made.
    pub fn done(&self) -> HashSet<Key> {
        self.lines.iter().map(Line::key).collect()
    }

    /// Keeps one prompt's pictures, then its lines.
    pub fn keep(&mut self, lines: Vec<Line>, pictures: &[&RgbImage]) -> Result<()> {
        let mut text = String::new();
        for (line, picture) in lines.iter().zip(pictures) {
            let file = self.path.join(&line.file);
            if let Some(parent) = file.parent() {
                fs::create_dir_all(parent).with_context(|| format!("cannot make {}", parent.display()))?;
            }
            io::png::write(&file, picture, &[], true)?;
            text += &(serde_json::to_string(line)? + "\n");
        }
        let path = self.path.join(SAMPLES);
        let mut file = OpenOptions::new().create(true).append(true).open(&path)?;
        file.write_all(text.as_bytes()).with_context(|| format!("cannot write {}", path.display()))?;
        self.lines.extend(lines);
        Ok(())
    }

    /// Takes the lines and pictures of another part of the same run.
    pub fn take(&mut self, part: &Self) -> Result<()> {
        let done = self.done();
        for line in part.lines() {
            ensure!(!done.contains(&line.key()), "{} is in two parts ({})", line.id, line.mode.name());
            let file = self.path.join(&line.file);
            if let Some(parent) = file.parent() {
                fs::create_dir_all(parent)?;
            }
            fs::copy(part.path.join(&line.file), &file).with_context(|| format!("cannot copy {}", line.file))?;
        }
        self.lines.extend_from_slice(part.lines());
        Ok(())
    }

    /// Puts the lines in their final order and writes the documents.
    pub fn finish(&mut self, config: Value, versions: Value, flaws: Value) -> Result<Results> {
        self.lines.sort_by_cached_key(|line| (line.key(), line.round));
        self.write_lines()?;
        let results = results(config, versions, flaws, &self.lines);
        self.write(RESULTS, &pretty(&results)?)?;
        self.write("table.md", table::markdown(&results).as_bytes())?;
        self.write("table.tex", table::latex(&results).as_bytes())?;
        self.write("report.html", report::page(&results, &self.lines, &self.path)?.as_bytes())?;
        Ok(results)
    }

    pub fn write(&self, name: &str, bytes: &[u8]) -> Result<()> {
        io::write_file(&self.path.join(name), bytes, true)
    }

    fn write_lines(&self) -> Result<()> {
        let mut text = String::new();
        for line in &self.lines {
            text += &(serde_json::to_string(line)? + "\n");
        }
        self.write(SAMPLES, text.as_bytes())
    }
}

fn pretty(value: &impl serde::Serialize) -> Result<Vec<u8>> {
    let mut json = serde_json::to_vec_pretty(value)?;
    json.push(b'\n');
    Ok(json)
}

fn read_config(path: &Path) -> Result<Value> {
    let file = path.join(CONFIG);
    if !file.is_file() {
        usage!("{} is no run of rlrig eval: it has no {CONFIG}", path.display());
    }
    let bytes = io::read_file(&file, 1 << 20)?;
    serde_json::from_slice(&bytes).with_context(|| format!("{} is damaged", file.display()))
}

/// The first key whose value differs, `apart` from some.
pub fn different(a: &Value, b: &Value, apart: &[&str]) -> Option<String> {
    let keys = a.as_object().into_iter().chain(b.as_object()).flat_map(|object| object.keys());
    keys.filter(|key| !apart.contains(&key.as_str())).find(|key| a.get(*key) != b.get(*key)).cloned()
}

/// Lines up to the first that is torn, as the end of a killed run may be.
fn read_lines(path: &Path) -> Result<Vec<Line>> {
    let file = path.join(SAMPLES);
    if !file.is_file() {
        return Ok(Vec::new());
    }
    let bytes = io::read_file(&file, LONGEST)?;
    let rows: Vec<&[u8]> = bytes.split(|b| *b == b'\n').filter(|row| !row.is_empty()).collect();
    let mut lines = Vec::new();
    for (i, row) in rows.iter().enumerate() {
        match serde_json::from_slice(row) {
            Ok(line) => lines.push(line),
            Err(_) if i + 1 == rows.len() => {}
            Err(error) => {
                return Err(error).with_context(|| format!("{}: line {} is damaged", file.display(), i + 1));
            }
        }
    }
    Ok(lines)
}

/// The lines of prompts that have all of theirs.
fn whole(lines: Vec<Line>) -> Vec<Line> {
    let mut seen: BTreeMap<Key, usize> = BTreeMap::new();
    lines.iter().for_each(|line| *seen.entry(line.key()).or_default() += 1);
    lines.into_iter().filter(|line| seen[&line.key()] == line.rounds).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::eval::{line::tests::mended, modes::Mode};
    use serde_json::json;

    fn keep(folder: &mut Folder, index: u64) {
        let picture = RgbImage::new(2, 2);
        folder.keep(mended(index, Mode::Loop), &[&picture, &picture]).unwrap();
    }

    fn finish(folder: &mut Folder) -> String {
        folder.finish(Value::Null, Value::Null, Value::Null).unwrap();
        fs::read_to_string(folder.path.join(SAMPLES)).unwrap()
            + &fs::read_to_string(folder.path.join("results.json")).unwrap()
    }

    #[test]
    fn a_killed_run_goes_on_from_its_whole_prompts() {
        let dir = tempfile::tempdir().unwrap();
        let (config, path) = (json!({ "seed": 1 }), dir.path().join("run"));
        let mut folder = Folder::create(&path, &config).unwrap();
        (0..4).for_each(|i| keep(&mut folder, i));
        let wanted = finish(&mut folder);
        assert!(Folder::create(&path, &config).err().unwrap().to_string().contains("--resume"));

        // Killed within the third prompt's second line.
        let text = fs::read_to_string(path.join(SAMPLES)).unwrap();
        let cut = text.match_indices('\n').nth(4).unwrap().0 + 100;
        fs::write(path.join(SAMPLES), &text[..cut]).unwrap();
        let mut folder = Folder::resume(&path, &config).unwrap();
        assert_eq!((folder.lines().len(), folder.done().len()), (4, 2));
        (2..4).for_each(|i| keep(&mut folder, i));
        assert_eq!(finish(&mut folder), wanted);
        let other = Folder::resume(&path, &json!({ "seed": 2 })).err().unwrap().to_string();
        assert!(other.contains("another seed"), "{other}");
        assert!(Folder::resume(dir.path(), &config).err().unwrap().to_string().contains("no run"));
    }

    #[test]
    fn parts_join_to_the_whole() {
        let dir = tempfile::tempdir().unwrap();
        let new = |name: &str| Folder::create(&dir.path().join(name), &json!({})).unwrap();
        let (mut whole, mut even, mut odd, mut joined) = (new("whole"), new("even"), new("odd"), new("joined"));
        for i in 0..4 {
            keep(&mut whole, i);
            keep(if i % 2 == 0 { &mut even } else { &mut odd }, i);
        }
        joined.take(&odd).unwrap();
        joined.take(&even).unwrap();
        assert_eq!(finish(&mut joined), finish(&mut whole));
        assert!(joined.take(&odd).is_err());
    }

    #[test]
    fn a_damaged_line_is_named() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join(SAMPLES), "{\"id\": \"torn\n{}\n").unwrap();
        assert!(read_lines(dir.path()).unwrap_err().to_string().contains("line 1 is damaged"));
    }
}
