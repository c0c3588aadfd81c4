//! Adapters in PEFT's format: `adapter_config.json` and `adapter_model.safetensors`, with the names of PEFT
//! (`base_model.model.<layer>.lora_A.weight`) or of diffusers (`transformer.<layer>.lora_A.weight`).

use super::{Adapter, Folder, folder::revision};
use crate::io::write_safetensors;
use anyhow::{Context, Result, bail, ensure};
use candle_core::{DType, Device, Tensor};
use serde::Deserialize;
use serde_json::{Map, Value, json};
use sha2::{Digest, Sha256};
use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    path::Path,
};

#[derive(Deserialize)]
struct Config {
    r: usize,
    lora_alpha: f64,
    #[serde(default)]
    use_rslora: bool,
    #[serde(flatten)]
    others: Map<String, Value>,
}

/// What makes an adapter more than a plain LoRA, or another one layer by layer: passed over, it would not do what it does in
/// Python. `fan_in_fan_out` is not among them: PEFT itself passes it over for linear layers.
const UNKNOWN: [&str; 10] = [
    "use_dora",
    "bias",
    "lora_bias",
    "alpha_pattern",
    "rank_pattern",
    "modules_to_save",
    "layer_replication",
    "target_parameters",
    "trainable_token_indices",
    "alora_invocation_tokens",
];

impl Config {
    /// The alpha of a plain LoRA that does the same: rsLoRA scales by alpha / sqrt(r).
    fn alpha(&self) -> f64 {
        if self.use_rslora { self.lora_alpha * (self.r as f64).sqrt() } else { self.lora_alpha }
    }

    /// What the product of the factors is multiplied by.
    fn strength(&self) -> f64 {
        self.alpha() / self.r as f64
    }

    fn check(&self, file: &str) -> Result<()> {
        ensure!(self.r > 0 && self.r <= 4096, "{file}: an adapter of rank {}", self.r);
        ensure!(self.lora_alpha.is_finite(), "{file}: lora_alpha is not a number");
        if let Some(kind) = self.others.get("peft_type").filter(|kind| *kind != "LORA") {
            bail!("{file}: peft_type is {kind}; only LORA is supported");
        }
        let says_nothing = |value: &Value| match value {
            Value::Null | Value::Bool(false) => true,
            Value::String(text) => text == "none",
            Value::Array(list) => list.is_empty(),
            Value::Object(map) => map.is_empty(),
            _ => false,
        };
        match UNKNOWN.iter().find(|key| self.others.get(**key).is_some_and(|value| !says_nothing(value))) {
            Some(key) => bail!("{file}: {key} is not supported; train a plain LoRA, without it"),
            None => Ok(()),
        }
    }
}

/// An adapter as read, before it is known for which model it is.
pub struct Peft {
    /// Where it is from, for messages.
    pub name: String,
    /// Tells it from what the same folder holds at another time.
    pub revision: String,
    /// The layers it changes.
    pub layers: BTreeSet<String>,
    config: Config,
    tensors: HashMap<String, Tensor>,
}

impl Peft {
    pub fn open(folder: &Folder) -> Result<Self> {
        let config: Config = folder.json("adapter_config.json")?;
        config.check(&folder.file("adapter_config.json"))?;
        let file = folder.file("adapter_model.safetensors");
        let bytes = folder.read("adapter_model.safetensors")?;
        let read = candle_core::safetensors::load_buffer(&bytes, &Device::Cpu)
            .with_context(|| format!("{file} is no whole safetensors file"))?;
        let (mut layers, mut tensors) = (BTreeSet::new(), HashMap::new());
        for (key, tensor) in read {
            let plain = ["base_model.model.", "transformer."].iter().find_map(|head| key.strip_prefix(head));
            let plain = plain.unwrap_or(&key).to_owned();
            let Some(layer) = plain.strip_suffix(".lora_A.weight").or_else(|| plain.strip_suffix(".lora_B.weight"))
            else {
                bail!("{file} holds {key}, which is no factor of a LoRA");
            };
            // Else the model that has it would be blamed.
            let sum = tensor.to_dtype(DType::F64)?.abs()?.sum_all()?.to_scalar::<f64>()?;
            ensure!(sum.is_finite(), "{file}: {key} has numbers that are not finite");
            layers.insert(layer.to_owned());
            tensors.insert(plain, tensor);
        }
        ensure!(!layers.is_empty(), "{file} holds no tensors");
        let revision = revision(Sha256::new().chain_update(&bytes));
        Ok(Self { name: folder.name(), revision, layers, config, tensors })
    }

    /// One adapter that does what these do together: the factors of each layer side by side, of the sum of their ranks, at
    /// the strength of the first.
    pub fn sum(mut all: Vec<Self>) -> Result<Self> {
        let first = all.first().context("a sum of no adapters")?;
        if all.len() == 1 {
            return Ok(all.remove(0));
        }
        let (strength, layers) = (first.config.strength(), first.layers.clone());
        ensure!(strength != 0.0, "{}: an adapter of strength 0 has nothing to go on from", first.name);
        for other in &all {
            ensure!(other.layers == layers, "{} and {} change different layers", first.name, other.name);
        }
        let side_by_side = |key: &str, dim: usize, times: &dyn Fn(&Config) -> f64| -> Result<Tensor> {
            let each = all.iter().map(|one| {
                let factor = one.tensors.get(key).with_context(|| format!("{} has no {key}", one.name))?;
                anyhow::Ok((factor.to_dtype(DType::F32)? * times(&one.config))?)
            });
            let all = each.collect::<Result<Vec<_>>>()?;
            Tensor::cat(&all, dim).with_context(|| format!("{key} differs in shape from adapter to adapter"))
        };
        let mut tensors = HashMap::new();
        for layer in &layers {
            let [a, b] = ["lora_A", "lora_B"].map(|factor| format!("{layer}.{factor}.weight"));
            let down = side_by_side(&a, 0, &|_| 1.0)?;
            let up = side_by_side(&b, 1, &|config| config.strength() / strength)?;
            tensors.extend([(a, down), (b, up)]);
        }
        let r = all.iter().map(|one| one.config.r).sum();
        let config = Config { r, lora_alpha: strength * r as f64, use_rslora: false, others: Map::new() };
        config.check("the sum of the adapters")?;
        let joined = |of: fn(&Self) -> &str| all.iter().map(of).collect::<Vec<_>>().join(" and ");
        let (name, revision) = (joined(|one| &one.name), joined(|one| &one.revision));
        Ok(Self { name, revision, layers, config, tensors })
    }

    /// The adapter at a strength beside its own, frozen.
    pub fn adapter(self, strength: f64) -> Adapter {
        self.loaded(strength, false)
    }

    /// The adapter, to be trained on.
    pub fn learned(self) -> Adapter {
        self.loaded(1.0, true)
    }

    fn loaded(self, strength: f64, trained: bool) -> Adapter {
        let Self { name, layers, config, tensors, .. } = self;
        let layers = layers.into_iter().collect();
        Adapter::loaded(config.r, config.alpha(), layers, tensors, strength, trained).named(&name)
    }
}

/// Writes a trained adapter so that PEFT loads it onto the model of the same layer names.
pub fn write(adapter: &Adapter, folder: &Path, dtype: DType) -> Result<()> {
    let (mut layers, mut tensors) = (BTreeSet::new(), BTreeMap::new());
    for (name, var) in adapter.vars() {
        layers.extend(name.strip_suffix(".lora_A.weight").map(str::to_owned));
        tensors.insert(format!("base_model.model.{name}"), var.detach().to_dtype(dtype)?);
    }
    let config = json!({
        "peft_type": "LORA",
        "r": adapter.rank(),
        "lora_alpha": adapter.alpha(),
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": false,
        "inference_mode": true,
        "init_lora_weights": true,
        "use_dora": false,
        "use_rslora": false,
        "target_modules": layers,
    });
    let path = folder.join("adapter_config.json");
    std::fs::write(&path, serde_json::to_string_pretty(&config)? + "\n")
        .with_context(|| format!("cannot write {}", path.display()))?;
    let path = folder.join("adapter_model.safetensors");
    let metadata = HashMap::from([("format".to_owned(), "pt".to_owned())]);
    write_safetensors(&path, &tensors, metadata)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::models::{Linear, Params};

    fn folder(config: &str, names: &[&str]) -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("adapter_config.json"), config).unwrap();
        let ones = |name: &&str| {
            let shape = if name.contains("lora_A") { (2, 3) } else { (4, 2) };
            ((*name).to_owned(), Tensor::ones(shape, DType::F32, &Device::Cpu).unwrap())
        };
        let tensors: HashMap<String, Tensor> = names.iter().map(ones).collect();
        candle_core::safetensors::save(&tensors, dir.path().join("adapter_model.safetensors")).unwrap();
        dir
    }

    #[test]
    fn both_styles_of_names_are_read_and_the_scale_is_pefts() {
        for head in ["base_model.model.", "transformer.", ""] {
            for (rslora, scale) in [(false, 8.0 / 2.0), (true, 8.0 / 2f64.sqrt())] {
                let names = [format!("{head}block.lin.lora_A.weight"), format!("{head}block.lin.lora_B.weight")];
                let config =
                    format!("{{\"r\": 2, \"lora_alpha\": 8, \"use_rslora\": {rslora}, \"peft_type\": \"LORA\"}}");
                let dir = folder(&config, &names.each_ref().map(String::as_str));
                let adapter = Peft::open(&Folder::from(dir.path())).unwrap().adapter(0.5);
                let weight = HashMap::from([(
                    "block.lin.weight".to_owned(),
                    Tensor::zeros((4, 3), DType::F32, &Device::Cpu).unwrap(),
                )]);
                let params = Params::loaded(weight, "test", DType::F32, &Device::Cpu).adapted(vec![adapter]);
                let linear = Linear::new(3, 4, &params.at("block.lin")).unwrap();
                let x = Tensor::ones((1, 3), DType::F32, &Device::Cpu).unwrap();
                let y = linear.forward(&x).unwrap().to_vec2::<f32>().unwrap();
                let want = (0.5 * scale * 6.0) as f32;
                assert!(y[0].iter().all(|v| (v - want).abs() < 1e-4), "{y:?} where {want} is due");
            }
        }
    }

    #[test]
    fn a_sum_does_what_its_parts_do_together() {
        let names = ["lin.lora_A.weight", "lin.lora_B.weight"];
        let one = folder(r#"{"r": 2, "lora_alpha": 8}"#, &names);
        let other = folder(r#"{"r": 2, "lora_alpha": 6, "use_rslora": true}"#, &names);
        for (dir, first) in [(&one, 1.0f32), (&other, -20.0)] {
            let up = |n: f32, shape: (usize, usize)| {
                Tensor::arange(n, n + (shape.0 * shape.1) as f32, &Device::Cpu).unwrap().reshape(shape).unwrap()
            };
            let tensors = [(names[0].to_owned(), up(first, (2, 3))), (names[1].to_owned(), up(-first, (4, 2)))];
            let tensors: HashMap<String, Tensor> = tensors.into();
            candle_core::safetensors::save(&tensors, dir.path().join("adapter_model.safetensors")).unwrap();
        }
        let read = |dir: &tempfile::TempDir| Peft::open(&Folder::from(dir.path())).unwrap();
        let y = |adapters: Vec<Adapter>| {
            let weight = Tensor::zeros((4, 3), DType::F32, &Device::Cpu).unwrap();
            let params = Params::loaded([("lin.weight".to_owned(), weight)].into(), "test", DType::F32, &Device::Cpu);
            let linear = Linear::new(3, 4, &params.adapted(adapters).at("lin")).unwrap();
            let x = Tensor::ones((1, 3), DType::F32, &Device::Cpu).unwrap();
            linear.forward(&x).unwrap().to_vec2::<f32>().unwrap()
        };
        let sum = Peft::sum(vec![read(&one), read(&other)]).unwrap();
        assert_eq!((sum.config.r, sum.config.strength()), (4, 4.0));
        let (together, both) = (y(vec![sum.learned()]), y(vec![read(&one).adapter(1.0), read(&other).adapter(1.0)]));
        let near = together[0].iter().zip(&both[0]).all(|(a, b)| (a - b).abs() < 1e-4 * b.abs());
        assert!(near && both[0].iter().all(|y| y.abs() > 30.0), "{together:?} {both:?}");

        let elsewhere = folder(r#"{"r": 2, "lora_alpha": 8}"#, &["else.lora_A.weight", "else.lora_B.weight"]);
        let error = |all: Vec<Peft>| Peft::sum(all).err().unwrap().to_string();
        assert!(error(vec![read(&one), read(&elsewhere)]).contains("change different layers"));
        assert!(error(Vec::new()).contains("no adapters"));
    }

    #[test]
    fn what_is_written_reads_back() {
        let adapter = Adapter::fresh(2, 8.0, vec!["lin".into()], 3);
        let weight = Tensor::zeros((4, 3), DType::F32, &Device::Cpu).unwrap();
        let params = || {
            let weight = HashMap::from([("block.lin.weight".to_owned(), weight.clone())]);
            Params::loaded(weight, "test", DType::F32, &Device::Cpu)
        };
        let linear = Linear::new(3, 4, &params().adapted(vec![adapter.clone()]).at("block.lin")).unwrap();
        let x = Tensor::ones((1, 3), DType::F32, &Device::Cpu).unwrap();
        let y = |linear: &Linear| linear.forward(&x).unwrap().to_vec2::<f32>().unwrap();
        assert_eq!(y(&linear), [[0.0; 4]]);
        adapter.vars()["block.lin.lora_B.weight"]
            .set(&Tensor::ones((4, 2), DType::F32, &Device::Cpu).unwrap())
            .unwrap();
        let dir = tempfile::tempdir().unwrap();
        write(&adapter, dir.path(), DType::F32).unwrap();
        let read = Peft::open(&Folder::from(dir.path())).unwrap();
        assert_eq!(read.layers, BTreeSet::from(["block.lin".to_owned()]));
        let again = Linear::new(3, 4, &params().adapted(vec![read.adapter(1.0)]).at("block.lin")).unwrap();
        assert_ne!(y(&again), [[0.0; 4]]);
        assert_eq!(y(&again), y(&linear));
    }

    #[test]
    fn what_is_no_plain_lora_is_an_error() {
        let error = |config: &str, names: &[&str]| {
            let dir = folder(config, names);
            format!("{:#}", Peft::open(&Folder::from(dir.path())).err().unwrap())
        };
        let fine = "{\"r\": 2, \"lora_alpha\": 8}";
        assert!(error(fine, &["x.lora_magnitude_vector"]).contains("no factor of a LoRA"));
        assert!(error(fine, &[]).contains("no tensors"));
        assert!(error("{\"r\": 0, \"lora_alpha\": 8}", &[]).contains("rank 0"));
        assert!(error("{", &[]).contains("adapter_config.json"));
        for (key, value) in [
            ("peft_type", "\"LOHA\""),
            ("use_dora", "true"),
            ("bias", "\"all\""),
            ("lora_bias", "true"),
            ("alpha_pattern", "{\"x\": 3}"),
            ("rank_pattern", "{\"x\": 1}"),
            ("modules_to_save", "[\"x\"]"),
        ] {
            let error = error(&format!("{{\"r\": 2, \"lora_alpha\": 8, \"{key}\": {value}}}"), &["x.lora_A.weight"]);
            assert!(error.contains(&format!("adapter_config.json: {key}")), "{error}");
        }
        let idle = r#"{"r": 2, "lora_alpha": 8, "bias": "none", "alpha_pattern": {}, "modules_to_save": null}"#;
        let dir = folder(idle, &["x.lora_A.weight", "x.lora_B.weight"]);
        assert!(Peft::open(&Folder::from(dir.path())).is_ok());
        let broken = Tensor::full(f32::NAN, (2, 3), &Device::Cpu).unwrap();
        let broken = HashMap::from([("x.lora_A.weight".to_owned(), broken)]);
        candle_core::safetensors::save(&broken, dir.path().join("adapter_model.safetensors")).unwrap();
        let error = Peft::open(&Folder::from(dir.path())).err().unwrap().to_string();
        assert!(error.contains("x.lora_A.weight has numbers that are not finite"), "{error}");
    }
}
