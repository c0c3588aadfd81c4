//! Imports point one way; this test reads every `crate::` path of the sources and holds the rule of `lib.rs`.

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
        "rig/cycle" => &["scene", "rig/roles"],
        "config" => &["error", "tensor", "scene", "io", "models", "flow", "vlm", "rig"],
        "train" | "eval" => &["error", "tensor", "scene", "io", "models", "flow", "vlm", "rig", "config"],
        "cli" => &["error"],
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

/// What follows every `crate::` (and `super::` from a file of a folder's top) in code, comments and tests apart.
fn named(text: &str) -> BTreeSet<String> {
    let code = text.split("#[cfg(test)]\nmod tests").next().unwrap_or_default();
    let code: String =
        code.lines().filter(|l| !l.trim_start().starts_with("//")).map(|l| l.to_owned() + "\n").collect();
    let mut names = BTreeSet::new();
    for rest in code.split("crate::").skip(1) {
        // `use crate::{a::b, c::{d, e}}` names what is at depth 0 of the list.
        match rest.strip_prefix('{') {
            Some(list) => names.extend(top_level(list)),
            None => drop(names.insert(word(rest))),
        }
    }
    names.remove("");
    names
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
        let top = inside.split('/').next().unwrap().to_owned();
        let strict = matches!(inside.as_str(), "rig/roles" | "rig/cycle");
        let rule = allowed(if strict { &inside } else { &top });
        let text = fs::read_to_string(&file).unwrap();
        let mut names = named(&text);
        if strict {
            // Their neighbours count as imports too.
            let supers = text.split("super::").skip(1).map(word).filter(|w| !w.is_empty());
            names.extend(supers.filter(|w| !text.contains("mod tests") || w != "*").map(|w| format!("rig/{w}")));
        } else {
            names.remove(&top);
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
fn the_reader_of_imports_sees_nested_lists() {
    let text =
        "use crate::{\n    io::png,\n    rig::{cycle, roles::Picture},\n};\nlet x = crate::tensor::rng::Stream;\n";
    assert_eq!(named(text).into_iter().collect::<Vec<_>>(), ["io", "rig", "tensor"]);
}
