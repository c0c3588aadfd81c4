//! Imports point one way; this test reads every `crate::` and `super::` path of the sources and holds the rule of `lib.rs`.

#![allow(clippy::unwrap_used)]

use std::{
    collections::BTreeSet,
    fs,
    path::{Path, PathBuf},
};

/// The modules that each module may name, itself apart.
fn allowed(module: &str) -> &'static [&'static str] {
    match module {
        "error" => &[],
        "tensor" | "scene" | "io" => &["error", "tensor"],
        "models" => &["error", "tensor", "scene", "io"],
        "vlm" => &["error", "tensor", "scene", "io", "models"],
        "flow" => &["error", "tensor", "scene", "io", "models", "vlm"],
        "rig" => &["error", "tensor", "scene", "io", "models", "flow", "vlm"],
        "rig/roles" => &["scene"],
        "rig/cycle" => &["error", "rig/roles"],
        "train" | "eval" => &["error", "tensor", "scene", "io", "models", "flow", "vlm", "rig", "config"],
        "config" => &["error"],
        "cli" => &["error", "eval", "flow"],
        "commands" => {
            &["error", "tensor", "scene", "io", "models", "flow", "vlm", "rig", "config", "train", "eval", "cli"]
        }
        other => panic!("src/{other} has no place in the import rule: give it one here and in lib.rs"),
    }
}

fn sources(folder: &Path, into: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            sources(&path, into);
        } else if path.extension().is_some_and(|e| e == "rs") {
            into.push(path);
        }
    }
}

/// The modules that the code of `module` names by `crate::` and `super::`, comments and tests apart: `top` for one at the
/// crate's root, `top/inner` for a neighbour within its own.
fn named(module: &[&str], text: &str) -> BTreeSet<String> {
    let tests =
        ["mod tests {", "pub mod tests {", "pub(super) mod tests {"].map(|head| format!("#[cfg(test)]\n{head}"));
    let code = tests.iter().find_map(|head| text.split_once(head)).map_or(text, |(code, _)| code);
    let code: String =
        code.lines().filter(|l| !l.trim_start().starts_with("//")).map(|l| l.to_owned() + "\n").collect();
    let mut names: BTreeSet<String> = code.split("crate::").skip(1).flat_map(heads).collect();
    for (i, _) in code.match_indices("super::").filter(|(i, _)| !code[..*i].ends_with("super::")) {
        let (mut above, mut rest) = (module, &code[i..]);
        while let Some(next) = rest.strip_prefix("super::") {
            (above, rest) = (&above[..above.len().saturating_sub(1)], next);
        }
        let place = |head: String| above.iter().map(|part| format!("{part}/")).collect::<String>() + &head;
        names.extend(heads(rest).into_iter().map(place));
    }
    names
}

/// The first words of a path: one, or those at depth 0 of a list such as `{a::b, c::{d, e}}`.
fn heads(path: &str) -> Vec<String> {
    let heads = path.strip_prefix('{').map_or_else(|| vec![word(path)], top_level);
    heads.into_iter().filter(|head| !head.is_empty()).collect()
}

fn word(text: &str) -> String {
    text.chars().take_while(|c| c.is_alphanumeric() || *c == '_').collect()
}

fn top_level(list: &str) -> Vec<String> {
    let (mut depth, mut names, mut start) = (0, Vec::new(), true);
    for (i, c) in list.char_indices() {
        match c {
            '{' => depth += 1,
            '}' if depth == 0 => break,
            '}' => depth -= 1,
            ',' if depth == 0 => start = true,
            c if depth == 0 && start && !c.is_whitespace() => {
                names.push(word(&list[i..]));
                start = false;
            }
            _ => {}
        }
    }
    names
}

#[test]
fn imports_point_one_way() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut files = Vec::new();
    sources(&root, &mut files);
    let mut wrong = Vec::new();
    for file in files {
        let inside = file.strip_prefix(&root).unwrap().with_extension("").to_string_lossy().replace('\\', "/");
        if matches!(inside.as_str(), "main" | "lib") {
            continue;
        }
        let module: Vec<&str> = inside.strip_suffix("/mod").unwrap_or(&inside).split('/').collect();
        let mut names = named(&module, &fs::read_to_string(&file).unwrap());
        let strict = matches!(inside.as_str(), "rig/roles" | "rig/cycle");
        let rule = allowed(if strict { &inside } else { module[0] });
        if !strict {
            // Neighbours may name each other.
            names.retain(|name| name.split('/').next() != Some(module[0]));
        }
        // `usage!` is exported at the crate's root and belongs to `error`.
        names.remove("usage");
        wrong.extend(
            names.into_iter().filter(|n| !rule.contains(&n.as_str())).map(|n| format!("src/{inside}.rs names {n}")),
        );
    }
    assert!(wrong.is_empty(), "against the import rule:\n{}", wrong.join("\n"));
}

#[test]
fn the_reader_of_imports_sees_nested_lists_and_modules_above() {
    let names = |module: &[&str], text: &str| named(module, text).into_iter().collect::<Vec<_>>();
    let text =
        "use crate::{\n    io::png,\n    rig::{cycle, roles::Picture},\n};\nlet x = crate::tensor::rng::Stream;\n";
    assert_eq!(names(&["eval", "line"], text), ["io", "rig", "tensor"]);
    let text = "use super::{cycle::run, roles::*};\nuse super::super::{train, vlm::Vlm};\npub(super) fn f() {}\n";
    assert_eq!(names(&["rig", "klein"], text), ["rig/cycle", "rig/roles", "train", "vlm"]);
    let text = "// crate::train\nuse super::io;\n#[cfg(test)]\npub mod tests {\n    use super::*;\n}\n";
    assert_eq!(names(&["config"], text), ["io"]);
}
