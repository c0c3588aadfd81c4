//! A run's folder: `config.json`, `samples.jsonl` as it grows, pictures; and the documents made of them at the end.
//!
//! A prompt's lines are written in one piece when all its pictures are there. After a kill, a prompt whose lines are not
//! whole is made again, and so is one whose pictures are lost. A lock keeps others from writing at the same time.

use super::{
    line::{Key, Line},
    report,
    results::{Results, results},
    table,
};
use crate::{io, rig::cycle, usage};
use anyhow::{Context, Result, bail, ensure};
use image::RgbImage;
use serde_json::Value;
use std::{
    collections::{BTreeMap, HashMap, HashSet},
    fs::{self, File, OpenOptions},
    io::Write,
    path::{Path, PathBuf},
};

/// Of any mode: the loop's rivals have up to three times its own.
const MOST_ROUNDS: usize = 3 * cycle::MOST_ROUNDS;
const SAMPLES: &str = "samples.jsonl";
const CONFIG: &str = "config.json";
const RESULTS: &str = "results.json";
/// A file of lines that is larger than this is none of ours.
const LONGEST: u64 = 8 << 30;

/// A run's folder on disk, with its lines in memory.
pub struct Folder {
    path: PathBuf,
    lines: Vec<Line>,
    /// Of one that is written to.
    _lock: Option<File>,
}

impl Folder {
    /// Finds out before models are opened whether `path` can take a new run, or has one to go on with.
    pub fn check(path: &Path, resume: bool) -> Result<()> {
        if resume {
            return read_config(path).map(drop);
        }
        make(path)?;
        tempfile::tempfile_in(path).map(drop).with_context(|| format!("cannot write to {}", path.display()))
    }

    /// A new run. A folder that has something in it is an error.
    pub fn create(path: &Path, config: &Value) -> Result<Self> {
        make(path)?;
        let lock = io::lock(path, "evaluates")?;
        io::write_file(&path.join(CONFIG), &pretty(config)?, false)?;
        Ok(Self { path: path.to_owned(), lines: Vec::new(), _lock: Some(lock) })
    }

    /// Goes on with a run of the same configuration; and how many of its prompts have lost a picture, and are to be made
    /// again.
    pub fn resume(path: &Path, config: &Value) -> Result<(Self, usize)> {
        let begun = read_config(path)?;
        if let Some(key) = different(&begun, config, &[]) {
            usage!("{} was begun with another {key}: {} instead of {}", path.display(), begun[&key], config[&key]);
        }
        let lock = io::lock(path, "evaluates")?;
        let (mut lines, _) = whole(read_lines(path, &begun)?.0);
        let missing = |line: &&Line| !path.join(&line.file).is_file();
        let lost: HashSet<Key> = lines.iter().filter(missing).map(Line::key).collect();
        lines.retain(|line| !lost.contains(&line.key()));
        let folder = Self { path: path.to_owned(), lines, _lock: Some(lock) };
        if folder.is_finished() {
            // Until it is again: a kill may come first.
            fs::remove_file(path.join(RESULTS)).with_context(|| format!("cannot renew {}", path.display()))?;
        }
        folder.write_lines()?;
        Ok((folder, lost.len()))
    }

    /// A run as it is, to be read. One that is finished must have all its lines: what is left would pass for the whole.
    pub fn open(path: &Path) -> Result<(Self, Value)> {
        let config = read_config(path)?;
        let (lines, torn) = read_lines(path, &config)?;
        let (lines, partial) = whole(lines);
        let folder = Self { path: path.to_owned(), lines, _lock: None };
        if folder.is_finished() {
            let lost = match partial.first() {
                _ if torn => Some("its last line is torn".to_owned()),
                Some(line) => Some(format!("{} ({}) lacks lines", line.id, line.mode.name())),
                None => folder.lost(&config)?,
            };
            if let Some(lost) = lost {
                bail!(
                    "{}: {lost}, though the run was finished; rlrig eval .. --out {} --resume makes it whole again",
                    path.join(SAMPLES).display(),
                    path.display()
                );
            }
        }
        Ok((folder, config))
    }

    /// How the prompts of a finished run are other than its documents say.
    fn lost(&self, config: &Value) -> Result<Option<String>> {
        // Each prompt is made with each seed, and counted once there.
        let seeds = config["seed"].as_array().map_or(1, |seeds| seeds.len() as u64);
        let (results, done) = (self.results()?, self.done());
        for (mode, found) in results["modes"].as_object().into_iter().flatten() {
            let Some(prompts) = found["cost"]["rounds"]["n"].as_u64() else { continue };
            let told = prompts.saturating_mul(seeds);
            let made = done.iter().filter(|key| key.mode.name() == mode).count();
            if made as u64 != told {
                return Ok(Some(format!("it has {made} of {told} prompts ({mode})")));
            }
        }
        Ok(None)
    }

    /// Joins parts of one run into the new folder `path`: all of them with the documents of the whole, or none.
    pub fn join(path: &Path, parts: &[(Self, Value)], config: Value, versions: Value, flaws: Value) -> Result<Results> {
        io::expect_empty(path, "name a new folder")?;
        let cannot = || format!("cannot make the folder {}", path.display());
        let out = std::path::absolute(path).with_context(cannot)?;
        let beside = out.parent().with_context(cannot)?;
        fs::create_dir_all(beside).with_context(cannot)?;
        let mut builder = tempfile::Builder::new();
        builder.prefix(".rlrig-");
        #[cfg(unix)]
        builder.permissions(std::os::unix::fs::PermissionsExt::from_mode(0o777)); // less the umask, as for any folder
        // It goes away by itself unless it gets the name.
        let made = builder.tempdir_in(beside).with_context(cannot)?;
        let mut whole = Self::create(made.path(), &config)?;
        parts.iter().try_for_each(|(part, _)| whole.take(part))?;
        let results = whole.finish(config, versions, flaws)?;
        drop(whole);
        fs::rename(made.path(), &out).with_context(cannot)?;
        let _ = made.keep();
        Ok(results)
    }

    pub fn lines(&self) -> &[Line] {
        &self.lines
    }

    /// The picture file of a line.
    pub fn picture(&self, line: &Line) -> Result<Vec<u8>> {
        io::read_file(&self.path.join(&line.file), report::LARGEST)
    }

    /// Whether its documents are written, which is done when all prompts are made.
    pub fn is_finished(&self) -> bool {
        self.path.join(RESULTS).is_file()
    }

    /// The versions that made a finished run, and what was wrong with its data.
    pub fn versions_and_flaws(&self) -> Result<(Value, Value)> {
        let results = self.results()?;
        Ok((results["versions"].clone(), results["flaws"].clone()))
    }

    fn results(&self) -> Result<Value> {
        let file = self.path.join(RESULTS);
        serde_json::from_slice(&io::read_file(&file, LONGEST)?)
            .with_context(|| format!("{} is damaged", file.display()))
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
        let append = || -> std::io::Result<()> {
            OpenOptions::new().create(true).append(true).open(&path)?.write_all(text.as_bytes())
        };
        append().with_context(|| format!("cannot write {}", path.display()))?;
        self.lines.extend(lines);
        Ok(())
    }

    /// Takes the lines and pictures of another part of the same run.
    fn take(&mut self, part: &Self) -> Result<()> {
        let (done, shown) = (self.done(), part.path.display());
        for line in part.lines() {
            let (id, mode) = (&line.id, line.mode.name());
            ensure!(!done.contains(&line.key()), "{id} ({mode}) of {shown} is in another part too");
            let (from, to) = (part.path.join(&line.file), self.path.join(&line.file));
            if let Some(parent) = to.parent() {
                fs::create_dir_all(parent).with_context(|| format!("cannot make {}", parent.display()))?;
            }
            fs::copy(&from, &to).with_context(|| {
                format!(
                    "cannot copy {}; if it is lost, rlrig eval .. --out {shown} --resume makes it again",
                    from.display()
                )
            })?;
        }
        self.lines.extend_from_slice(part.lines());
        Ok(())
    }

    /// Puts the lines in their final order and writes the documents.
    pub fn finish(&mut self, config: Value, versions: Value, flaws: Value) -> Result<Results> {
        self.lines.sort_by_cached_key(|line| (line.key(), line.round));
        self.write_lines()?;
        let results = results(config, versions, flaws, &self.lines);
        self.write("table.md", table::markdown(&results).as_bytes())?;
        self.write("table.tex", table::latex(&results).as_bytes())?;
        self.write("report.html", report::page(&results, &self.lines, &self.path)?.as_bytes())?;
        // By this file the run counts as finished.
        self.write(RESULTS, &pretty(&results)?)?;
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

/// Makes the folder of a new run, unless that would mix with what is there.
fn make(path: &Path) -> Result<()> {
    io::expect_empty(path, "name a new folder, or go on with it by --resume")?;
    fs::create_dir_all(path).with_context(|| format!("cannot make the folder {}", path.display()))
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

/// The lines of a run of this configuration, each of another picture; and whether there is one more that is torn, as a killed
/// run leaves the last.
fn read_lines(path: &Path, config: &Value) -> Result<(Vec<Line>, bool)> {
    let file = path.join(SAMPLES);
    if !file.is_file() {
        return Ok((Vec::new(), false));
    }
    let bytes = io::read_file(&file, LONGEST)?;
    let rows: Vec<&[u8]> = bytes.split(|b| *b == b'\n').filter(|row| !row.is_empty()).collect();
    let most = ["rounds", "rival_rounds"].iter().filter_map(|key| config[key].as_u64()).max();
    let most = most.map_or(MOST_ROUNDS, |rounds| (rounds as usize).min(MOST_ROUNDS));
    let (mut lines, mut seen): (Vec<Line>, HashMap<(Key, usize), usize>) = Default::default();
    for (number, row) in (1..).zip(&rows) {
        let damaged =
            || format!("{}: line {number} is damaged; delete it, and --resume makes its prompt again", file.display());
        let line = match serde_json::from_slice::<Line>(row) {
            Err(_) if number == rows.len() => return Ok((lines, true)),
            line => line.with_context(damaged)?,
        };
        line.check(most).with_context(damaged)?;
        // With both of them the prompt would not be whole.
        if let Some(first) = seen.insert((line.key(), line.round), number) {
            bail!("{}: line {number} is of the same picture as line {first}; delete one of them", file.display());
        }
        lines.push(line);
    }
    Ok((lines, false))
}

/// The lines of prompts that have all of theirs, and the other lines.
fn whole(lines: Vec<Line>) -> (Vec<Line>, Vec<Line>) {
    let mut seen: BTreeMap<Key, usize> = BTreeMap::new();
    lines.iter().for_each(|line| *seen.entry(line.key()).or_default() += 1);
    lines.into_iter().partition(|line| seen[&line.key()] == line.rounds)
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

    fn written(path: &Path) -> String {
        [SAMPLES, RESULTS].map(|name| fs::read_to_string(path.join(name)).unwrap()).concat()
    }

    fn finish(folder: &mut Folder) -> String {
        folder.finish(Value::Null, Value::Null, Value::Null).unwrap();
        written(&folder.path)
    }

    fn join(path: &Path, parts: &[(Folder, Value)]) -> Result<Results> {
        Folder::join(path, parts, Value::Null, Value::Null, Value::Null)
    }

    #[test]
    fn a_killed_run_goes_on_from_its_whole_prompts() {
        let dir = tempfile::tempdir().unwrap();
        let (config, path) = (json!({ "seed": 1 }), dir.path().join("run"));
        let mut folder = Folder::create(&path, &config).unwrap();
        (0..4).for_each(|i| keep(&mut folder, i));
        let wanted = finish(&mut folder);
        let busy = Folder::resume(&path, &config).err().unwrap().to_string();
        assert!(busy.contains("another process evaluates in"), "{busy}");
        drop(folder);
        assert!(Folder::create(&path, &config).err().unwrap().to_string().contains("--resume"));

        // Killed within the third prompt's second line.
        let text = fs::read_to_string(path.join(SAMPLES)).unwrap();
        let cut = text.match_indices('\n').nth(4).unwrap().0 + 100;
        fs::write(path.join(SAMPLES), &text[..cut]).unwrap();
        let (mut folder, lost) = Folder::resume(&path, &config).unwrap();
        assert_eq!((folder.lines().len(), folder.done().len(), lost), (4, 2, 0));
        assert!(!folder.is_finished(), "it is to be made on");
        (2..4).for_each(|i| keep(&mut folder, i));
        assert_eq!(finish(&mut folder), wanted);

        // A picture that is lost costs its prompt.
        fs::remove_file(path.join(&folder.lines()[1].file)).unwrap();
        drop(folder);
        let (mut folder, lost) = Folder::resume(&path, &config).unwrap();
        assert_eq!((folder.lines().len(), lost), (6, 1));
        keep(&mut folder, 0);
        assert_eq!(finish(&mut folder), wanted);
        let other = Folder::resume(&path, &json!({ "seed": 2 })).err().unwrap().to_string();
        assert!(other.contains("another seed"), "{other}");
        assert!(Folder::resume(dir.path(), &config).err().unwrap().to_string().contains("no run"));
    }

    #[test]
    fn parts_join_to_the_whole() {
        let dir = tempfile::tempdir().unwrap();
        let new = |name: &str| Folder::create(&dir.path().join(name), &json!({})).unwrap();
        let (mut whole, mut even, mut odd) = (new("whole"), new("even"), new("odd"));
        for i in 0..4 {
            keep(&mut whole, i);
            keep(if i % 2 == 0 { &mut even } else { &mut odd }, i);
        }
        let open = |name: &str| Folder::open(&dir.path().join(name)).unwrap();
        let joined = dir.path().join("joined");
        join(&joined, &[open("odd"), open("even")]).unwrap();
        assert_eq!(written(&joined), finish(&mut whole));
        assert!(join(&joined, &[open("odd")]).err().unwrap().to_string().contains("not empty"));

        // Nothing is left of what fails.
        let fails = |parts: &[(Folder, Value)], expected: &str| {
            let error = join(&dir.path().join("half"), parts).err().unwrap().to_string();
            assert!(error.contains(expected), "{error}");
            assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 4);
        };
        fails(&[open("odd"), open("odd")], "odd is in another part too");
        let lost = dir.path().join("even").join(&even.lines()[0].file);
        fs::remove_file(&lost).unwrap();
        fails(&[open("odd"), open("even")], &format!("cannot copy {}", lost.display()));
    }

    #[test]
    fn a_finished_run_that_has_lost_lines_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        // Its prompts are made with two seeds, and have two lines each.
        let config = json!({ "seed": [0, 1] });
        let mut folder = Folder::create(dir.path(), &config).unwrap();
        let picture = RgbImage::new(2, 2);
        for seed in [0, 1] {
            let lines = mended(0, Mode::Loop).into_iter();
            let lines = lines.map(|line| Line { seed, file: format!("pictures/{seed}-{}.png", line.round), ..line });
            folder.keep(lines.collect(), &[&picture, &picture]).unwrap();
        }
        finish(&mut folder);
        let text = fs::read_to_string(dir.path().join(SAMPLES)).unwrap();
        let rows: Vec<&str> = text.split_inclusive('\n').collect();
        let open = |text: &str| {
            fs::write(dir.path().join(SAMPLES), text).unwrap();
            Folder::open(dir.path()).map(|(folder, _)| folder.lines().len()).map_err(|error| error.to_string())
        };
        assert_eq!((rows.len(), open(&text)), (4, Ok(4)));
        for (cut, expected) in [
            (text[..text.len() - 9].to_owned(), "its last line is torn"),
            (text.clone() + "{\"id\"", "its last line is torn"),
            (rows[..3].concat(), "test-0 (loop) lacks lines"),
            (rows[..2].concat(), "it has 1 of 2 prompts (loop)"),
            (String::new(), "it has 0 of 2 prompts (loop)"),
        ] {
            let error = open(&cut).unwrap_err();
            assert!(error.contains(expected) && error.contains("--resume makes it whole again"), "{error}");
        }
        // A run that goes on has not all of them yet.
        fs::remove_file(dir.path().join(RESULTS)).unwrap();
        assert_eq!(open(&rows[..3].concat()), Ok(2));
    }

    #[test]
    fn a_damaged_line_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let text = |line: &Line| serde_json::to_string(line).unwrap() + "\n";
        let error = |text: &str| {
            fs::write(dir.path().join(SAMPLES), text).unwrap();
            format!("{:#}", read_lines(dir.path(), &json!({ "rounds": 3 })).unwrap_err())
        };
        assert!(error("{\"id\": \"torn\n{}\n").contains("line 1 is damaged"));
        let lines = mended(0, Mode::Loop);
        let [first, second] = [text(&lines[0]), text(&lines[1])];
        let twice = error(&[&*first, &*second, &*first].concat());
        assert!(twice.contains("line 3 is of the same picture as line 1"), "{twice}");
        let outside = error(&text(&Line { file: "/etc/passwd".into(), ..lines[0].clone() }));
        assert!(outside.contains("line 1 is damaged") && outside.contains("/etc/passwd"), "{outside}");
        let endless = error(&text(&Line { result_after: vec![usize::MAX, 0], ..lines[0].clone() }));
        assert!(endless.contains("line 1 is damaged") && endless.contains("rounds 1 to 3"), "{endless}");
    }
}
