//! What comes from outside, and is not what it should be, from the outside.

#![allow(clippy::unwrap_used)]

use assert_cmd::Command;
use rlrig::io::png;

fn rlrig(args: &[&str]) -> Command {
    let mut command = Command::cargo_bin("rlrig").unwrap();
    command.args(args);
    command
}

fn stderr(command: &mut Command) -> String {
    String::from_utf8(command.output().unwrap().stderr).unwrap()
}

#[test]
fn a_log_filter_that_is_none_is_told_and_passed_over() {
    let run = |filter: &str| stderr(rlrig(&["completions", "bash"]).env("RLRIG_LOG", filter));
    assert!(run("rlrig=loud").contains("RLRIG_LOG"));
    assert_eq!(run("rlrig=debug"), "");
}

#[test]
fn a_bad_recipe_is_named_by_its_file() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("bad.png");
    png::write(&path, &image::RgbImage::new(8, 8), &[(png::CHUNK.to_owned(), "{".to_owned())], false).unwrap();
    let path = path.to_str().unwrap();
    for args in [&["info", path][..], &["info", "--json", path]] {
        let told = stderr(&mut rlrig(args));
        assert!(told.contains("bad.png"), "{told}");
    }
}

#[test]
fn control_characters_of_a_model_do_not_reach_the_terminal() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a\u{1b}[2J.png");
    let told = stderr(&mut rlrig(&["info", path.to_str().unwrap()]));
    assert!(told.contains("\\u{1b}") && !told.contains('\u{1b}'), "{told}");
}

/// A device on which nothing can be written.
#[cfg(target_os = "linux")]
#[test]
fn a_full_stdout_is_an_error_and_no_panic() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.png");
    png::write(&path, &image::RgbImage::new(64, 64), &[], false).unwrap();
    let full = std::fs::OpenOptions::new().write(true).open("/dev/full").unwrap();
    let mut command = std::process::Command::new(assert_cmd::cargo::cargo_bin("rlrig"));
    let output = command.args(["world", "oracle", "--json", "--image"]).arg(&path).stdout(full).output().unwrap();
    let told = String::from_utf8(output.stderr).unwrap();
    assert!(output.status.code() == Some(1) && told.contains("cannot write to stdout"), "{told}");
}

/// Progress is for people; the picture is made all the same.
#[cfg(target_os = "linux")]
#[test]
fn a_full_stderr_stops_no_work() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.png");
    let full = std::fs::OpenOptions::new().write(true).open("/dev/full").unwrap();
    let mut command = std::process::Command::new(assert_cmd::cargo::cargo_bin("rlrig"));
    let args = ["generate", "--prompt", "a red ball", "--steps", "1", "--rounds", "1", "--seed", "1", "--out"];
    let status = command.args(args).arg(&path).stderr(full).stdout(std::process::Stdio::null()).status().unwrap();
    assert!(status.success() && path.is_file(), "{status}");
}
