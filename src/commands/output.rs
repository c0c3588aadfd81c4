//! Where pictures go: names that can be foreseen, and nothing overwritten by accident.

use crate::{
    io,
    rig::trajectory::{Parameters, Trajectory},
    usage,
};
use anyhow::{Context, Result};
use image::RgbImage;
use serde_json::Value;
use std::{
    fs,
    path::{Path, PathBuf},
};

/// The files of a run, checked before anything is computed.
pub struct Output {
    files: Vec<PathBuf>,
    overwrite: bool,
    metadata: bool,
}

impl Output {
    /// A name for each of `seeds`: `out` itself if it is a PNG, else `out-NNNN-SEED.png` in the folder `out`, numbered on
    /// from those that are there.
    pub fn new(out: Option<&Path>, seeds: &[u64], overwrite: bool, metadata: bool) -> Result<Self> {
        let files = match out {
            Some(file) if is_png(file) => {
                if seeds.len() != 1 {
                    usage!(
                        "--out {} is one file, but {} pictures are made: name a folder",
                        file.display(),
                        seeds.len()
                    );
                }
                vec![file.to_owned()]
            }
            Some(file) if file.extension().is_some() && !is_folder(file) => {
                usage!("--out {}: pictures are written as .png", file.display())
            }
            folder => {
                let folder = folder.unwrap_or(Path::new("."));
                make_folder(folder)?;
                let first = if overwrite { 0 } else { next_number(folder) };
                let name = |(i, seed): (usize, &u64)| format!("out-{:04}-{seed}.png", first + i);
                seeds.iter().enumerate().map(name).map(|name| folder.join(name).components().collect()).collect()
            }
        };
        for file in &files {
            // A name that is too long, or a link to nothing, is found now too.
            match fs::symlink_metadata(file) {
                Ok(found) if found.is_symlink() && !file.exists() => usage!("{} is a link to nothing", file.display()),
                Ok(_) if !overwrite => return Err(io::exists(file)),
                Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                    usage!("{} cannot be written: {error}", file.display())
                }
                _ => {}
            }
        }
        if let Some(folder) = files.first().and_then(|file| file.parent()) {
            check_writable(folder)?;
        }
        Ok(Self { files, overwrite, metadata })
    }

    /// Whether `path` is one of the files.
    pub fn writes(&self, path: &Path) -> bool {
        let whole = |path: &Path| std::path::absolute(path).ok();
        self.files.iter().any(|file| whole(file) == whole(path))
    }

    /// Writes picture `i` with its recipe.
    pub fn write(&self, i: usize, image: &RgbImage, trajectory: &Trajectory) -> Result<&Path> {
        let timeless = trajectory.timeless();
        self.write_with(i, image, &timeless.parameters(image.dimensions()), &timeless.to_json()?)
    }

    /// Writes picture `i` with the texts for others and for rlrig.
    pub fn write_with(&self, i: usize, image: &RgbImage, parameters: &Parameters, own: &str) -> Result<&Path> {
        let texts = [("parameters".to_owned(), parameters.to_string()), (io::png::CHUNK.to_owned(), own.to_owned())];
        io::png::write(&self.files[i], image, if self.metadata { &texts } else { &[] }, self.overwrite)?;
        Ok(&self.files[i])
    }
}

/// Folders that keep every turn.
pub struct Turns {
    folders: Vec<PathBuf>,
}

impl Turns {
    /// `folder` for one picture, a folder in it for each of several.
    pub fn new(folder: &Path, seeds: &[u64], overwrite: bool) -> Result<Self> {
        let full = fs::read_dir(folder).is_ok_and(|mut entries| entries.next().is_some());
        if full && !overwrite {
            usage!("--trajectory {} is not empty; choose another folder or give --force", folder.display());
        }
        let name = |(i, seed): (usize, &u64)| folder.join(format!("{i:04}-{seed}"));
        let folders: Vec<PathBuf> = match seeds {
            [_] => vec![folder.to_owned()],
            _ => seeds.iter().enumerate().map(name).collect(),
        };
        make_folder(folder)?;
        check_writable(folder)?;
        Ok(Self { folders })
    }

    /// Writes the turns of picture `i`: pictures, `trajectory.json`, `sheet.png` and `index.html`.
    pub fn write(&self, i: usize, trajectory: &Trajectory, pictures: &[&RgbImage]) -> Result<&Path> {
        let folder = &self.folders[i];
        make_folder(folder)?;
        let mut document = trajectory.clone();
        for (i, (turn, picture)) in document.turns.iter_mut().zip(pictures).enumerate() {
            let name = turn_name(i + 1);
            io::png::write(&folder.join(&name), picture, &[], true)?;
            turn.image = Some(name);
        }
        remove_turns_beyond(folder, pictures.len())?;
        let mut json = serde_json::to_vec_pretty(&document)?;
        json.push(b'\n');
        io::write_file(&folder.join("trajectory.json"), &json, true)?;
        let story = document.story(pictures);
        io::png::write(&folder.join("sheet.png"), &io::sheet::sheet(&story), &[], true)?;
        io::write_file(&folder.join("index.html"), io::html::page(&story)?.as_bytes(), true)?;
        Ok(folder)
    }
}

/// Removes the pictures of later turns than `last`, which a longer run left in `folder`.
fn remove_turns_beyond(folder: &Path, last: usize) -> Result<()> {
    for entry in fs::read_dir(folder).with_context(|| format!("cannot read {}", folder.display()))?.flatten() {
        let name = entry.file_name();
        let Some(name) = name.to_str() else { continue };
        let number = name.strip_prefix("turn-").and_then(|rest| rest.strip_suffix(".png")?.parse::<usize>().ok());
        // Only a name as it is written here: not turn-07.png.
        let surplus = number.is_some_and(|number| number > last && name == turn_name(number));
        if surplus && entry.file_type().is_ok_and(|kind| kind.is_file()) {
            fs::remove_file(entry.path()).with_context(|| format!("cannot remove {}", entry.path().display()))?;
        }
    }
    Ok(())
}

/// The picture of turn `number`, counted from 1.
fn turn_name(number: usize) -> String {
    format!("turn-{number}.png")
}

/// A new or empty folder for results.
pub struct Fresh(PathBuf);

impl Fresh {
    pub fn new(folder: &Path) -> Result<Self> {
        if fs::read_dir(folder).is_ok_and(|mut entries| entries.next().is_some()) {
            usage!("{} is not empty; name a new folder", folder.display());
        }
        make_folder(folder)?;
        check_writable(folder)?;
        Ok(Self(folder.to_owned()))
    }

    /// Writes what was measured as `NAME.json`, and each single case as a line of `NAME.jsonl`.
    pub fn write(&self, name: &str, document: &Value, lines: &str) -> Result<()> {
        let write = |file: String, text: &str| io::write_file(&self.0.join(file), text.as_bytes(), false);
        write(format!("{name}.json"), &serde_json::to_string_pretty(document)?)?;
        write(format!("{name}.jsonl"), lines)
    }
}

/// Whether the folder of the file `path` is `folder`, by whatever names.
pub fn lies_in(path: &Path, folder: &Path) -> bool {
    let real = |path: &Path| fs::canonicalize(path).ok();
    let parent = path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
    real(folder).is_some_and(|folder| real(parent) == Some(folder))
}

/// Whether a picture can be written as `path` itself.
pub fn is_png(path: &Path) -> bool {
    path.extension().is_some_and(|e| e.eq_ignore_ascii_case("png")) && !is_folder(path)
}

/// Whether `path` is a folder, or is said to be one by a separator at its end.
fn is_folder(path: &Path) -> bool {
    path.is_dir() || path.to_string_lossy().ends_with(std::path::is_separator)
}

fn make_folder(folder: &Path) -> Result<()> {
    if folder.exists() && !folder.is_dir() {
        usage!("{} is a file, not a folder", folder.display());
    }
    fs::create_dir_all(folder).with_context(|| format!("cannot make the folder {}", folder.display()))
}

/// Finds out now rather than after the work whether `folder` can be written to.
pub fn check_writable(folder: &Path) -> Result<()> {
    let folder = if folder.as_os_str().is_empty() { Path::new(".") } else { folder };
    if !folder.is_dir() {
        usage!("there is no folder {}", folder.display());
    }
    tempfile::Builder::new()
        .prefix(".rlrig-")
        .tempfile_in(folder)
        .map(drop)
        .with_context(|| format!("cannot write to {}", folder.display()))
}

/// One more than the highest number of an `out-NNNN-..png` in `folder`.
fn next_number(folder: &Path) -> usize {
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    let number = |entry: fs::DirEntry| {
        let name = entry.file_name().into_string().ok()?;
        name.strip_prefix("out-")?.strip_suffix(".png")?.split('-').next()?.parse::<usize>().ok()
    };
    entries.filter_map(number).max().map_or(0, |n| n.saturating_add(1))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_go_on_from_those_that_are_there() {
        let dir = tempfile::tempdir().unwrap();
        let output = Output::new(Some(dir.path()), &[7, 8], false, true).unwrap();
        assert!(output.files[0].ends_with("out-0000-7.png") && output.files[1].ends_with("out-0001-8.png"));
        fs::write(dir.path().join("out-0004-3.png"), "").unwrap();
        fs::write(dir.path().join("out-x-3.png"), "").unwrap();
        assert!(Output::new(Some(dir.path()), &[7], false, true).unwrap().files[0].ends_with("out-0005-7.png"));
        assert!(Output::new(Some(dir.path()), &[7], true, true).unwrap().files[0].ends_with("out-0000-7.png"));
        // A folder's name may have a dot.
        let dotted = Output::new(Some(&dir.path().join("v1.2/")), &[7], false, true).unwrap();
        assert!(dotted.files[0].ends_with("v1.2/out-0000-7.png"));
        assert!(is_png(&dir.path().join("a.PNG")) && !is_png(&dir.path().join("a.png/")));
    }

    #[test]
    fn only_pictures_of_later_turns_are_removed() {
        let dir = tempfile::tempdir().unwrap();
        let kept =
            ["turn-1.png", "turn-2.png", "turn-03.png", "turn-+3.png", "turn-3.png.bak", "turn-x.png", "out-3.png"];
        for name in kept.iter().chain(&["turn-3.png", "turn-10.png"]) {
            fs::write(dir.path().join(name), "").unwrap();
        }
        fs::create_dir(dir.path().join("turn-4.png")).unwrap();
        remove_turns_beyond(dir.path(), 2).unwrap();
        assert!(kept.iter().chain(&["turn-4.png"]).all(|name| dir.path().join(name).exists()));
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), kept.len() + 1);
    }

    #[test]
    fn a_file_lies_in_a_folder_by_any_name_of_it() {
        let dir = tempfile::tempdir().unwrap();
        let path = |name: &str| dir.path().join(name);
        fs::create_dir_all(path("a/b")).unwrap();
        assert!(lies_in(&path("a/new.png"), &path("a/b/..")) && lies_in(&path("a/b/../new.png"), &path("a/")));
        assert!(!lies_in(&path("a/b/new.png"), &path("a")) && !lies_in(&path("no/new.png"), &path("no")));
        assert!(lies_in(Path::new("new.png"), Path::new(".")));
    }

    #[test]
    fn what_cannot_be_written_is_known_before_the_work() {
        let dir = tempfile::tempdir().unwrap();
        let error = |out: &str, seeds: &[u64]| {
            Output::new(Some(&dir.path().join(out)), seeds, false, true).err().unwrap().to_string()
        };
        fs::write(dir.path().join("there.png"), "").unwrap();
        assert!(error("there.png", &[1]).contains("--force"));
        assert!(error("new.png", &[1, 2]).contains("name a folder"));
        assert!(error("new.jpg", &[1]).contains(".png"));
        assert!(error("no/such/new.png", &[1]).contains("there is no folder"));
        assert!(error("there.png/x", &[1]).contains("cannot make the folder"));
    }
}
