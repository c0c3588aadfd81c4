//! The adapters of `--adapter`, and the built-in ones that are on where the flag names none.
//!
//! One pair of models plays four roles: an adapter is the Editor's or the Actor's, who mend pictures, whichever its layers fit.
//! The Diffuser draws and the Checker judges without it, unless `diffuser=` or `all=` says otherwise.

use crate::{
    cli::ModelArgs,
    models::{Adapter, Folder, Params, built_in, peft::Peft},
    usage,
};
use anyhow::{Result, bail};
use std::path::Path;

/// Before a folder: for both roles of its model.
const ALL: &str = "all=";
/// Before a folder: for the Diffuser alone.
const DIFFUSER: &str = "diffuser=";
/// Instead of a folder: no built-in adapters.
const NONE: &str = "none";

/// Who has an adapter.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Who {
    /// Both roles of a model: Diffuser and Editor, or Checker and Actor.
    Both,
    Diffuser,
    /// Editor or Actor.
    Mender,
}

impl Who {
    /// Whose role it is, by the name of its built-in adapter.
    pub fn of(role: &str) -> Self {
        if role == built_in::DIFFUSER { Self::Diffuser } else { Self::Mender }
    }
}

/// The adapters that are on; by default none.
#[derive(Default)]
pub struct Adapters {
    /// Those that no model has taken yet.
    left: Vec<(Who, Peft, f64)>,
    /// Those that a model has.
    taken: Vec<Adapter>,
    /// The folder of the built-in ones, where they are on.
    built_in: Option<Folder>,
    told: Vec<String>,
    /// Of each that a model has taken.
    revisions: Vec<String>,
}

impl Adapters {
    pub fn open(args: &ModelArgs) -> Result<Self> {
        Self::named(&args.adapter, built_in::adapters())
    }

    /// Those that `--adapter` names, with the folder of the built-in ones.
    fn named(texts: &[String], built_in: Option<Folder>) -> Result<Self> {
        let mut this = Self { built_in, told: texts.to_vec(), ..Self::default() };
        for text in texts {
            match text.as_str() {
                NONE => this.built_in = None,
                built_in::NAME => {}
                _ => this.left.push(read(text)?),
            }
        }
        Ok(this)
    }

    /// Takes those whose layers the model of `params` has.
    pub fn take(&mut self, who: Who, params: &Params) -> Vec<Adapter> {
        let fits = |peft: &Peft| peft.layers.iter().all(|layer| params.has(&format!("{layer}.weight")));
        let (taken, left): (Vec<_>, _) =
            std::mem::take(&mut self.left).into_iter().partition(|(w, peft, _)| *w == who && fits(peft));
        self.left = left;
        self.revisions.extend(taken.iter().map(|(_, peft, _)| peft.revision.clone()));
        let taken: Vec<Adapter> = taken.into_iter().map(|(_, peft, strength)| peft.adapter(strength)).collect();
        self.taken.extend_from_slice(&taken);
        taken
    }

    /// Those of a built-in model's Diffuser, Editor or Actor, by the name of their folder: the given ones, or the built-in one.
    pub fn take_or_built_in(&mut self, role: &str, params: &Params) -> Result<Vec<Adapter>> {
        let mut taken = self.take(Who::of(role), params);
        let built_in = self.built_in.as_ref().and_then(|folder| folder.sub(role));
        if let Some(folder) = built_in.filter(|_| taken.is_empty()) {
            let peft = Peft::open(&folder)?;
            self.revisions.push(peft.revision.clone());
            taken.push(peft.adapter(1.0));
            if !self.told.iter().any(|told| told == built_in::NAME) {
                self.told.push(built_in::NAME.to_owned());
            }
        }
        Ok(taken)
    }

    /// All that are on, in words that `--adapter` takes.
    pub fn told(&self) -> &[String] {
        &self.told
    }

    /// Which versions of them: a folder may hold another one later.
    pub fn revisions(&self) -> &[String] {
        &self.revisions
    }

    /// An error if some fit no model. Call when the models are built.
    pub fn finish(&self) -> Result<()> {
        match self.left.first() {
            // A tensor of its name is not yet a linear layer.
            None => self.taken.iter().try_for_each(Adapter::check),
            Some((who, Peft { name, layers, .. }, _)) => {
                let hint = match who {
                    Who::Mender => {
                        " (all=DIR is for Diffuser and Checker too; --editor inversion and flowedit take none for the Editor)"
                    }
                    Who::Diffuser | Who::Both => "",
                };
                let layer = layers.first().map_or("", String::as_str);
                bail!(
                    "the adapter {name} fits no model that is asked here: none has all its layers, such as {layer}{hint}"
                )
            }
        }
    }
}

/// `[all=|diffuser=]DIR[:SCALE]`.
fn read(text: &str) -> Result<(Who, Peft, f64)> {
    let of = |head: &str, who: Who| text.strip_prefix(head).map(|place| (who, place));
    let (who, place) = of(ALL, Who::Both).or(of(DIFFUSER, Who::Diffuser)).unwrap_or((Who::Mender, text));
    let (path, strength) = match place.rsplit_once(':').map(|(path, s)| (path, s.parse::<f64>())) {
        Some((path, Ok(strength))) if strength.is_finite() => (path, strength),
        _ => (place, 1.0),
    };
    if !Path::new(path).is_dir() {
        usage!("--adapter {text}: there is no folder {path}");
    }
    Ok((who, Peft::open(&Folder::from(path))?, strength))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::models::Linear;
    use candle_core::{DType, Device, Tensor};

    /// An adapter of rank 1 for the layer `layer`.
    fn write(folder: &Path, layer: &str) {
        std::fs::create_dir_all(folder).unwrap();
        std::fs::write(folder.join("adapter_config.json"), r#"{"r": 1, "lora_alpha": 1}"#).unwrap();
        let one = Tensor::ones((1, 1), DType::F32, &Device::Cpu).unwrap();
        let tensors = ["lora_A", "lora_B"].map(|factor| (format!("{layer}.{factor}.weight"), one.clone()));
        candle_core::safetensors::save(&tensors.into(), folder.join("adapter_model.safetensors")).unwrap();
    }

    #[test]
    fn a_role_has_its_built_in_adapter_unless_the_flag_says_otherwise() {
        let dir = tempfile::tempdir().unwrap();
        write(&dir.path().join("shipped").join(built_in::ACTOR), "x");
        write(&dir.path().join("other"), "x");
        let (shipped, other) = (dir.path().join("shipped"), dir.path().join("other").display().to_string());
        let weight = ("x.weight".to_owned(), Tensor::zeros((1, 1), DType::F32, &Device::Cpu).unwrap());
        let params = Params::loaded([weight].into(), "test", DType::F32, &Device::Cpu);
        let taken = |texts: &[&str], role: &str| {
            let texts: Vec<String> = texts.iter().map(ToString::to_string).collect();
            let mut adapters = Adapters::named(&texts, Some(shipped.clone().into())).unwrap();
            let taken = adapters.take_or_built_in(role, &params).unwrap();
            let count = taken.len();
            Linear::new(1, 1, &params.at("x")).unwrap();
            Linear::new(1, 1, &params.again(taken).at("x")).unwrap();
            adapters.finish().unwrap();
            assert_eq!(adapters.revisions().len(), count);
            (count, adapters.told().join(" "))
        };
        let built_in = (1, built_in::NAME.to_owned());
        assert_eq!(taken(&[], built_in::ACTOR), built_in);
        assert_eq!(taken(&[built_in::NAME], built_in::ACTOR), built_in);
        assert_eq!(taken(&[], built_in::EDITOR), (0, String::new()), "it has none");
        assert_eq!(taken(&[&other], built_in::ACTOR), (1, other.clone()), "instead of the built-in one");
        assert_eq!(taken(&[NONE], built_in::ACTOR), (0, NONE.to_owned()));
    }

    #[test]
    fn an_adapter_for_what_is_no_linear_layer_is_an_error() {
        let dir = tempfile::tempdir().unwrap();
        write(dir.path(), "norm");
        let weight = ("norm.weight".to_owned(), Tensor::zeros(1, DType::F32, &Device::Cpu).unwrap());
        let params = Params::loaded([weight].into(), "test", DType::F32, &Device::Cpu);
        let path = dir.path().display().to_string();
        let mut adapters = Adapters::named(std::slice::from_ref(&path), None).unwrap();
        assert_eq!(adapters.take(Who::Mender, &params).len(), 1);
        let error = adapters.finish().unwrap_err().to_string();
        assert!(error.contains(&path) && error.contains("norm is no linear layer"), "{error}");
    }

    #[test]
    fn built_in_adapters_fit_the_built_in_models() {
        const PART: &str = "diffusion_pytorch_model";
        let folder = built_in::tabletop();
        for (role, part, stem) in [
            (built_in::ACTOR, "vlm", "model"),
            (built_in::EDITOR, "transformer", PART),
            (built_in::DIFFUSER, "transformer", PART),
        ] {
            let there = built_in::adapter(role).is_some();
            let params = Params::open(&folder.sub(part).unwrap(), stem, DType::F32, &Device::Cpu).unwrap();
            let mut adapters = Adapters::open(&ModelArgs::default()).unwrap();
            assert_eq!(adapters.take_or_built_in(role, &params).unwrap().len(), usize::from(there));
            assert_eq!(adapters.told().len(), usize::from(there));
            if let Some(folder) = built_in::adapter(role) {
                let layers = Peft::open(&folder).unwrap().layers;
                assert!(layers.iter().all(|layer| params.has(&format!("{layer}.weight"))), "{role}");
            }
        }
    }

    #[test]
    fn a_flag_names_who_has_the_adapter_the_folder_and_its_strength() {
        let dir = tempfile::tempdir().unwrap();
        let missing = read("all=nowhere:0.5").err().unwrap().to_string();
        assert!(missing.contains("there is no folder nowhere"), "{missing}");
        write(dir.path(), "x");
        let path = dir.path().display();
        for (text, expected) in [
            (format!("{path}"), (Who::Mender, 1.0)),
            (format!("{path}:0.5"), (Who::Mender, 0.5)),
            (format!("all={path}:-2"), (Who::Both, -2.0)),
            (format!("diffuser={path}:2"), (Who::Diffuser, 2.0)),
        ] {
            let (who, _, strength) = read(&text).unwrap();
            assert_eq!((who, strength), expected, "{text}");
        }
    }
}
