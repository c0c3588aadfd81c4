//! Configuration in layers: defaults < TOML file < environment < `--set key=value`.
//!
//! A config is a serde struct with `Default` and `deny_unknown_fields`. Every layer is checked as it is added, so that a
//! mistyped key or a value of the wrong type is reported with the place it came from and, for a key, the nearest right one.

use crate::{error::Usage, usage};
use anyhow::{Context, Result};
use serde::{Serialize, de::DeserializeOwned};
use std::{marker::PhantomData, path::Path};
use toml::{Table, Value};

/// An environment variable `RLRIG_CONFIG__OPTIM__LR` sets the key `optim.lr`.
pub const ENVIRONMENT_PREFIX: &str = "RLRIG_CONFIG__";

/// A config under construction: the defaults and what the layers so far changed.
pub struct Layers<T> {
    table: Table,
    kind: PhantomData<T>,
}

impl<T: Default + Serialize + DeserializeOwned> Layers<T> {
    /// Begins with the defaults of `T`.
    pub fn defaults() -> Result<Self> {
        let table = Table::try_from(T::default()).context("the defaults do not serialise")?;
        Ok(Self { table, kind: PhantomData })
    }

    /// Adds a TOML file.
    pub fn file(self, path: &Path) -> Result<Self> {
        let source = path.display().to_string();
        let text = std::fs::read_to_string(path).with_context(|| format!("cannot read the config {source}"))?;
        match text.parse::<Table>() {
            Ok(layer) => self.layer(layer, &source),
            Err(error) => usage!("{source} is not valid TOML: {error}"),
        }
    }

    /// Adds the process environment's variables that begin with [`ENVIRONMENT_PREFIX`].
    pub fn environment(self) -> Result<Self> {
        self.variables(std::env::vars_os().filter_map(|(k, v)| Some((k.into_string().ok()?, v.into_string().ok()?))))
    }

    fn variables(mut self, variables: impl Iterator<Item = (String, String)>) -> Result<Self> {
        let mut found: Vec<_> = variables.filter(|(name, _)| name.starts_with(ENVIRONMENT_PREFIX)).collect();
        found.sort();
        for (name, text) in found {
            let key = name[ENVIRONMENT_PREFIX.len()..].to_lowercase().replace("__", ".");
            self = self.text(&key, &text, &format!("environment variable {name}"))?;
        }
        Ok(self)
    }

    /// Adds `key=value` pairs as typed after `--set`.
    pub fn set(mut self, pairs: &[String]) -> Result<Self> {
        for pair in pairs {
            let Some((key, value)) = pair.split_once('=') else {
                usage!("--set {pair}: expected key=value, as in --set optim.lr=3e-4");
            };
            self = self.text(key.trim(), value.trim(), &format!("--set {pair}"))?;
        }
        Ok(self)
    }

    /// The config of all layers.
    pub fn resolve(&self) -> Result<T> {
        read(&self.table, "the config")
    }

    /// Adds `text`, read as TOML; where the key holds a string, quotes may be left out.
    fn text(self, key: &str, text: &str, source: &str) -> Result<Self> {
        if key.is_empty() || key.split('.').any(str::is_empty) {
            usage!("{source}: {key:?} is no key");
        }
        let current = key.split('.').try_fold(&self.table, |table, part| match table.get(part) {
            Some(Value::Table(inner)) => Ok(inner),
            other => Err(other),
        });
        let quoted = text.starts_with(['"', '\'']);
        let value = match (current, format!("v = {text}").parse::<Table>()) {
            (Err(Some(Value::String(_))), _) if !quoted => Value::String(text.to_owned()),
            (_, Ok(mut table)) => table.remove("v").unwrap_or_else(|| Value::String(text.to_owned())),
            (_, Err(_)) => Value::String(text.to_owned()),
        };
        self.layer(nested(key, value), source)
    }

    fn layer(mut self, layer: Table, source: &str) -> Result<Self> {
        merge(&mut self.table, layer);
        read::<T>(&self.table, source)?;
        Ok(self)
    }
}

/// Writes `config` as TOML.
pub fn to_toml<T: Serialize>(config: &T) -> Result<String> {
    toml::to_string(config).context("the config does not serialise")
}

/// `a.b = value` as nested tables.
fn nested(key: &str, value: Value) -> Table {
    let (first, rest) = key.split_once('.').map_or((key, None), |(first, rest)| (first, Some(rest)));
    let value = match rest {
        Some(rest) => Value::Table(nested(rest, value)),
        None => value,
    };
    Table::from_iter([(first.to_owned(), value)])
}

/// Values of `layer` win; tables are merged key by key.
fn merge(base: &mut Table, layer: Table) {
    for (key, value) in layer {
        match (base.get_mut(&key), value) {
            (Some(Value::Table(inner)), Value::Table(value)) => merge(inner, value),
            (_, value) => {
                base.insert(key, value);
            }
        }
    }
}

fn read<T: DeserializeOwned>(table: &Table, source: &str) -> Result<T> {
    serde_path_to_error::deserialize(table.clone()).map_err(|error| {
        let path = error.path().to_string();
        let message = error.inner().message().trim().to_owned();
        Usage(format!("{source}: {}", explain(&path, &message))).into()
    })
}

/// Serde names an unknown field and the known ones in one sentence; of the known, only the nearest helps a reader.
fn explain(path: &str, message: &str) -> String {
    let Some(rest) = message.strip_prefix("unknown field `") else {
        return if path == "." { message.to_owned() } else { format!("{path}: {message}") };
    };
    let mut names = rest.split('`').step_by(2);
    let unknown = names.next().unwrap_or_default();
    let parent = match path.strip_suffix(unknown).unwrap_or(path) {
        "." => "",
        parent => parent,
    };
    let parent = if parent.is_empty() || parent.ends_with('.') { parent.to_owned() } else { format!("{parent}.") };
    let nearest = names.max_by(|a, b| strsim::jaro_winkler(a, unknown).total_cmp(&strsim::jaro_winkler(b, unknown)));
    match nearest {
        Some(nearest) => format!("unknown key {parent}{unknown}; did you mean {parent}{nearest}?"),
        None => format!("unknown key {parent}{unknown}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde::Deserialize;

    #[derive(Serialize, Deserialize, Debug, PartialEq)]
    #[serde(deny_unknown_fields, default)]
    struct Example {
        name: String,
        steps: u64,
        limit: Option<f64>,
        optim: Optim,
    }

    #[derive(Serialize, Deserialize, Debug, PartialEq)]
    #[serde(deny_unknown_fields, default)]
    struct Optim {
        lr: f64,
        betas: (f64, f64),
        kind: Kind,
    }

    #[derive(Serialize, Deserialize, Debug, PartialEq)]
    #[serde(rename_all = "snake_case")]
    enum Kind {
        Adamw,
        Muon,
    }

    impl Default for Example {
        fn default() -> Self {
            Self { name: "base".into(), steps: 10, limit: None, optim: Optim::default() }
        }
    }

    impl Default for Optim {
        fn default() -> Self {
            Self { lr: 1e-3, betas: (0.9, 0.95), kind: Kind::Adamw }
        }
    }

    fn layers() -> Layers<Example> {
        Layers::defaults().unwrap()
    }

    fn file(text: &str) -> (tempfile::TempDir, std::path::PathBuf) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("example.toml");
        std::fs::write(&path, text).unwrap();
        (dir, path)
    }

    fn set(pairs: &[&str]) -> Result<Example> {
        layers().set(&pairs.iter().map(|p| (*p).to_string()).collect::<Vec<_>>())?.resolve()
    }

    fn error<U: std::fmt::Debug>(result: Result<U>) -> String {
        let error = result.unwrap_err();
        assert!(error.is::<Usage>(), "{error:?} is a mistake of the user");
        error.to_string()
    }

    #[test]
    fn later_layers_win() {
        let (_dir, path) = file("steps = 1\nname = 'file'\n[optim]\nlr = 1\nkind = 'muon'\n");
        let variables = [("RLRIG_CONFIG__NAME", "environment"), ("RLRIG_CONFIG__OPTIM__LR", "2"), ("HOME", "/")];
        let config = layers()
            .file(&path)
            .unwrap()
            .variables(variables.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())))
            .unwrap()
            .set(&["optim.lr=3".into(), "optim.betas=[0.9, 0.999]".into(), "limit=0.5".into()])
            .unwrap()
            .resolve()
            .unwrap();
        let optim = Optim { lr: 3.0, betas: (0.9, 0.999), kind: Kind::Muon };
        assert_eq!(config, Example { name: "environment".into(), steps: 1, limit: Some(0.5), optim });
        let saved = to_toml(&config).unwrap();
        let (_dir, path) = file(&saved);
        assert_eq!(layers().file(&path).unwrap().resolve().unwrap(), config);
    }

    #[test]
    fn strings_need_no_quotes() {
        assert_eq!(set(&["name=12"]).unwrap().name, "12");
        assert_eq!(set(&["name='a b'"]).unwrap().name, "a b");
        assert_eq!(set(&["name=a=b"]).unwrap().name, "a=b");
        assert_eq!(set(&["optim.kind=muon"]).unwrap().optim.kind, Kind::Muon);
    }

    #[test]
    fn an_unknown_key_is_answered_with_the_nearest() {
        assert_eq!(error(set(&["stesp=3"])), "--set stesp=3: unknown key stesp; did you mean steps?");
        assert_eq!(
            error(set(&["optim.betsa=3"])),
            "--set optim.betsa=3: unknown key optim.betsa; did you mean optim.betas?"
        );
        let (_dir, path) = file("[optm]\nlr = 1");
        let message = error(layers().file(&path).map(|_| ()));
        assert_eq!(message, format!("{}: unknown key optm; did you mean optim?", path.display()));
    }

    #[test]
    fn a_wrong_type_names_the_key_and_its_source() {
        let (_dir, path) = file("[optim]\nlr = 'fast'");
        let message = error(layers().file(&path).map(|_| ()));
        assert!(message.starts_with(&format!("{}: optim.lr: ", path.display())), "{message}");
        assert!(message.contains("expected f64"), "{message}");
        let message = error(set(&["steps=-1"]));
        assert!(message.starts_with("--set steps=-1: steps: "), "{message}");
        let message = error(set(&["optim.kind=sgd"]));
        assert!(message.contains("optim.kind: unknown variant `sgd`"), "{message}");
        let message = error(set(&["optim=3"]));
        assert!(message.starts_with("--set optim=3: optim: invalid type"), "{message}");
    }

    #[test]
    fn malformed_layers_are_usage_errors() {
        assert!(error(set(&["steps"])).contains("expected key=value"));
        assert!(error(set(&["=3"])).contains("is no key"));
        assert!(error(set(&["optim..lr=3"])).contains("is no key"));
        let (_dir, path) = file("steps = ");
        assert!(error(layers().file(&path).map(|_| ())).contains("is not valid TOML"));
    }
}
