//! Adapters in PEFT's format: `adapter_config.json` and `adapter_model.safetensors`, with the names of PEFT
//! (`base_model.model.<layer>.lora_A.weight`) or of diffusers (`transformer.<layer>.lora_A.weight`).

use super::{Adapter, Folder};
use anyhow::{Context, Result, bail, ensure};
use candle_core::{Device, Tensor};
use serde::Deserialize;
use std::collections::{BTreeSet, HashMap};

#[derive(Deserialize)]
struct Config {
    r: usize,
    lora_alpha: f64,
    #[serde(default)]
    use_dora: bool,
    #[serde(default)]
    use_rslora: bool,
    #[serde(default)]
    bias: Option<String>,
}

/// An adapter as read, before it is known for which model it is.
pub struct Peft {
    /// Where it is from, for messages.
    pub name: String,
    /// The layers it changes.
    pub layers: BTreeSet<String>,
    config: Config,
    tensors: HashMap<String, Tensor>,
}

impl Peft {
    pub fn open(folder: &Folder) -> Result<Self> {
        let config: Config = folder.json("adapter_config.json")?;
        let name = folder.name();
        ensure!(config.r > 0 && config.r <= 4096, "{name}: an adapter of rank {}", config.r);
        ensure!(config.lora_alpha.is_finite(), "{name}: its lora_alpha is not a number");
        ensure!(!config.use_dora, "{name} is a DoRA adapter, which is not supported");
        ensure!(config.bias.as_deref().is_none_or(|b| b == "none"), "{name} trains biases, which is not supported");
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
            layers.insert(layer.to_owned());
            tensors.insert(plain, tensor);
        }
        ensure!(!layers.is_empty(), "{file} holds no tensors");
        Ok(Self { name, layers, config, tensors })
    }

    /// The adapter at a strength beside its own, frozen.
    pub fn adapter(self, strength: f64) -> Adapter {
        let Config { r, lora_alpha, use_rslora, .. } = self.config;
        // rsLoRA scales by alpha / sqrt(r).
        let strength = if use_rslora { strength * (r as f64).sqrt() } else { strength };
        Adapter::loaded(r, lora_alpha, self.layers.into_iter().collect(), self.tensors, strength, false)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::models::{Linear, Params};
    use candle_core::DType;

    fn write(config: &str, names: &[&str]) -> tempfile::TempDir {
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
                let dir = write(&config, &names.each_ref().map(String::as_str));
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
    fn what_is_no_plain_lora_is_an_error() {
        let error = |config: &str, names: &[&str]| {
            let dir = write(config, names);
            format!("{:#}", Peft::open(&Folder::from(dir.path())).err().unwrap())
        };
        let fine = "{\"r\": 2, \"lora_alpha\": 8}";
        assert!(error(fine, &["x.lora_magnitude_vector"]).contains("no factor of a LoRA"));
        assert!(error(fine, &[]).contains("no tensors"));
        assert!(error("{\"r\": 0, \"lora_alpha\": 8}", &[]).contains("rank 0"));
        assert!(error("{\"r\": 2, \"lora_alpha\": 8, \"use_dora\": true}", &[]).contains("DoRA"));
        assert!(error("{", &[]).contains("adapter_config.json"));
    }
}
