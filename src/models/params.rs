//! The named tensors of one model: read from safetensors or freshly drawn, frozen or trained.
//!
//! A model asks for each of its tensors by name and shape while it is built. What it asks for and does not find, or
//! finds in another shape, is an error; so is, in [`Params::finish`], a tensor of the file that it never asked for.

use super::{Adapter, Folder};
use crate::tensor::{Precision, rng::Stream};
use anyhow::{Context, Result, bail};
use candle_core::{DType, Device, Tensor, Var, safetensors::MmapedSafetensors};
use std::{
    collections::{BTreeMap, HashMap},
    path::PathBuf,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

/// How a tensor begins when a model is trained from nothing.
#[derive(Clone, Copy, Debug)]
pub enum Init {
    Zeros,
    Ones,
    /// Normal with this standard deviation.
    Normal(f64),
    /// Normal with variance `1 / fan_in`, for a matrix or kernel whose first dimension is its output.
    FanIn,
}

enum Source {
    Mapped { files: MmapedSafetensors, names: Vec<String> },
    Loaded(HashMap<String, Tensor>),
    Fresh { seed: u64 },
    Made(Box<Maker>),
}

/// Makes a tensor of its name and shape.
type Maker = dyn Fn(&str, &[usize]) -> candle_core::Result<Tensor> + Send + Sync;

struct Shared {
    source: Source,
    /// Where the tensors come from, for messages.
    origin: String,
    dtype: DType,
    device: Device,
    trained: bool,
    precision: Precision,
    taken: Mutex<BTreeMap<String, Tensor>>,
    vars: Mutex<BTreeMap<String, Var>>,
    adapters: Vec<Adapter>,
}

/// A place in the tree of a model's tensors; cheap to clone.
#[derive(Clone)]
pub struct Params {
    shared: Arc<Shared>,
    prefix: String,
}

impl Params {
    fn with(source: Source, origin: String, dtype: DType, device: &Device, trained: bool) -> Self {
        let shared = Shared {
            source,
            origin,
            dtype,
            device: device.clone(),
            trained,
            precision: Precision::F32,
            taken: Mutex::default(),
            vars: Mutex::default(),
            adapters: Vec::new(),
        };
        Self { shared: Arc::new(shared), prefix: String::new() }
    }

    /// Opens `<stem>.safetensors`, or the shards that `<stem>.safetensors.index.json` lists, of a model folder. Files on
    /// disk are mapped, so a tensor is read when it is asked for.
    pub fn open(folder: &Folder, stem: &str, dtype: DType, device: &Device) -> Result<Self> {
        let single = format!("{stem}.safetensors");
        let index = format!("{stem}.safetensors.index.json");
        // Which tensors an index says that a shard has.
        let mut shards: BTreeMap<String, Vec<String>> = BTreeMap::new();
        if folder.has(&single) {
            shards.insert(single, Vec::new());
        } else if folder.has(&index) {
            #[derive(serde::Deserialize)]
            struct Index {
                weight_map: BTreeMap<String, String>,
            }
            let index: Index = folder.json(&index)?;
            for (tensor, shard) in index.weight_map {
                shards.entry(shard).or_default().push(tensor);
            }
            // A shard name is only ever a file of this folder.
            if let Some(bad) = shards.keys().find(|s| s.contains(['/', '\\'])) {
                bail!("{}: the index names {bad:?}, which is no file of the folder", folder.name());
            }
            if let Some(missing) = shards.keys().find(|shard| !folder.has(shard)) {
                bail!("{} is missing, a part of the weights (interrupted download?)", folder.file(missing));
            }
        } else {
            bail!("{} has neither {single} nor {index}", folder.name());
        }
        let origin = folder.file(shards.keys().next().filter(|_| shards.len() == 1).unwrap_or(&index));
        let whole =
            |shard: &str| format!("{} is no whole safetensors file (interrupted download?)", folder.file(shard));
        let check = |shard: &str, tensors: &[String], has: &dyn Fn(&str) -> bool| {
            let lacking = tensors.iter().find(|name| !has(name));
            lacking.map_or(Ok(()), |name| {
                bail!("{} lacks the tensor {name}, which {index} says it has", folder.file(shard))
            })
        };
        let source = match folder.disk() {
            Some(path) => {
                // SAFETY: as with every memory-mapped checkpoint, the files must not be changed while they are in use.
                let map = |paths: &[PathBuf]| unsafe { MmapedSafetensors::multi(paths) };
                let paths: Vec<PathBuf> = shards.keys().map(|shard| path.join(shard)).collect();
                // Each by itself first, so that an error names the file.
                for (path, (shard, tensors)) in paths.iter().zip(&shards) {
                    let file = map(std::slice::from_ref(path)).with_context(|| whole(shard))?;
                    check(shard, tensors, &|name| file.get(name).is_ok())?;
                }
                let files = map(&paths).with_context(|| whole(&index))?;
                let names = files.tensors().into_iter().map(|(name, _)| name).collect();
                Source::Mapped { files, names }
            }
            None => {
                let mut tensors = HashMap::new();
                for (shard, named) in &shards {
                    let bytes = folder.read(shard)?;
                    let loaded = candle_core::safetensors::load_buffer(&bytes, &Device::Cpu);
                    let loaded = loaded.with_context(|| whole(shard))?;
                    check(shard, named, &|name| loaded.contains_key(name))?;
                    tensors.extend(loaded);
                }
                Source::Loaded(tensors)
            }
        };
        Ok(Self::with(source, origin, dtype, device, false))
    }

    /// Tensors already in memory.
    pub fn loaded(tensors: HashMap<String, Tensor>, origin: &str, dtype: DType, device: &Device) -> Self {
        Self::with(Source::Loaded(tensors), origin.to_owned(), dtype, device, false)
    }

    /// The tensors that a model took, for another model that shares them and has `adapters` beside them.
    pub fn again(&self, adapters: Vec<Adapter>) -> Self {
        let Shared { origin, dtype, device, precision, .. } = &*self.shared;
        let tensors = self.tensors().into_iter().collect();
        Self::loaded(tensors, origin, *dtype, device).multiplied_in(*precision).adapted(adapters)
    }

    /// Fresh tensors, each drawn from its own stream of `seed` and its name.
    pub fn fresh(seed: u64, dtype: DType, device: &Device) -> Self {
        Self::with(Source::Fresh { seed }, "fresh".to_owned(), dtype, device, true)
    }

    /// Frozen tensors that `make` makes of their names and shapes, such as weights of no meaning for a benchmark.
    pub fn made(
        dtype: DType,
        device: &Device,
        make: impl Fn(&str, &[usize]) -> candle_core::Result<Tensor> + Send + Sync + 'static,
    ) -> Self {
        Self::with(Source::Made(Box::new(make)), "made".to_owned(), dtype, device, false)
    }

    /// Makes every tensor a variable that gradients reach. Call before the model is built.
    pub fn trained(mut self) -> Self {
        self.unique("trained").trained = true;
        self
    }

    /// Adds adapters to the linear layers they name. Call before the model is built.
    pub fn adapted(mut self, adapters: Vec<Adapter>) -> Self {
        self.unique("adapted").adapters.extend(adapters);
        self
    }

    /// Lets the model's linear layers multiply in `precision`. Call before the model is built.
    pub fn multiplied_in(mut self, precision: Precision) -> Self {
        self.unique("multiplied_in").precision = precision;
        self
    }

    fn unique(&mut self, what: &str) -> &mut Shared {
        match Arc::get_mut(&mut self.shared) {
            Some(shared) => shared,
            None => unreachable!("Params::{what} is called before the model is built"),
        }
    }

    /// The place `name` below this one.
    pub fn at(&self, name: impl std::fmt::Display) -> Self {
        let prefix = if self.prefix.is_empty() { name.to_string() } else { format!("{}.{name}", self.prefix) };
        Self { shared: self.shared.clone(), prefix }
    }

    pub fn path(&self) -> &str {
        &self.prefix
    }

    pub fn device(&self) -> &Device {
        &self.shared.device
    }

    pub fn dtype(&self) -> DType {
        self.shared.dtype
    }

    pub fn precision(&self) -> Precision {
        self.shared.precision
    }

    pub fn adapters(&self) -> &[Adapter] {
        &self.shared.adapters
    }

    /// Whether the source has `name` below this place; a fresh model has what is asked for.
    pub fn has(&self, name: &str) -> bool {
        let name = self.at(name).prefix;
        match &self.shared.source {
            Source::Mapped { files, .. } => files.get(&name).is_ok(),
            Source::Loaded(tensors) => tensors.contains_key(&name),
            Source::Fresh { .. } | Source::Made(_) => true,
        }
    }

    /// The tensor `name` of `shape`; asking twice for one name gives the same tensor (tied weights).
    pub fn get(&self, name: &str, shape: &[usize], init: Init) -> Result<Tensor> {
        self.take(name, shape, init, self.shared.trained)
    }

    /// A tensor that is stored with the model but never trained (running statistics).
    pub fn buffer(&self, name: &str, shape: &[usize], init: Init) -> Result<Tensor> {
        self.take(name, shape, init, false)
    }

    fn take(&self, name: &str, shape: &[usize], init: Init, trained: bool) -> Result<Tensor> {
        let name = self.at(name).prefix;
        if let Some(tensor) = lock(&self.shared.taken).get(&name) {
            return Ok(tensor.clone());
        }
        let Shared { source, origin, dtype, device, .. } = &*self.shared;
        let tensor = match source {
            Source::Fresh { seed } => fresh(*seed, &name, shape, init)?,
            Source::Made(make) => make(&name, shape)?,
            Source::Mapped { files, .. } => {
                let view =
                    files.get(&name).map_err(|_| anyhow::anyhow!("{origin} lacks the tensor {name} {shape:?}"))?;
                if view.shape() != shape {
                    bail!("{origin}: {name} is {:?}, but the config asks for {shape:?}", view.shape());
                }
                files.load(&name, &Device::Cpu).with_context(|| format!("{origin}: cannot read {name}"))?
            }
            Source::Loaded(tensors) => match tensors.get(&name) {
                Some(tensor) if tensor.dims() == shape => tensor.clone(),
                Some(tensor) => {
                    bail!("{origin}: {name} is {:?}, but the config asks for {shape:?}", tensor.dims())
                }
                None => bail!("{origin} lacks the tensor {name} {shape:?}"),
            },
        };
        let tensor = tensor.to_dtype(*dtype)?.to_device(device)?;
        let tensor = if trained {
            let var = Var::from_tensor(&tensor)?;
            let tensor = var.as_tensor().clone();
            lock(&self.shared.vars).insert(name.clone(), var);
            tensor
        } else {
            tensor
        };
        lock(&self.shared.taken).insert(name, tensor.clone());
        Ok(tensor)
    }

    /// Ends the building of a model: an error if the file has tensors that no part of it asked for. `ignored` says
    /// which names may stay unread (buffers that the architecture recomputes).
    pub fn finish(&self, ignored: impl Fn(&str) -> bool) -> Result<()> {
        let names: Vec<&String> = match &self.shared.source {
            Source::Mapped { names, .. } => names.iter().collect(),
            Source::Loaded(tensors) => tensors.keys().collect(),
            Source::Fresh { .. } | Source::Made(_) => return Ok(()),
        };
        let taken = lock(&self.shared.taken);
        let mut extra: Vec<&String> = names.into_iter().filter(|n| !taken.contains_key(*n) && !ignored(n)).collect();
        extra.sort();
        match extra.as_slice() {
            [] => Ok(()),
            [first, ..] => bail!(
                "{} holds {} tensor(s) that the architecture has no place for, the first is {first}",
                self.shared.origin,
                extra.len()
            ),
        }
    }

    /// The trained variables by name, in order of their names.
    pub fn vars(&self) -> BTreeMap<String, Var> {
        lock(&self.shared.vars).clone()
    }

    /// Every tensor that the model took, by name.
    pub fn tensors(&self) -> BTreeMap<String, Tensor> {
        lock(&self.shared.taken).clone()
    }
}

/// A panic while the lock was held leaves a collection that is still whole.
pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn fresh(seed: u64, name: &str, shape: &[usize], init: Init) -> Result<Tensor> {
    let cpu = Device::Cpu;
    let normal = |std: f64| -> Result<Tensor> { Ok((Stream::new(seed, name, 0).normal(shape, &cpu)? * std)?) };
    match init {
        Init::Zeros => Ok(Tensor::zeros(shape, DType::F32, &cpu)?),
        Init::Ones => Ok(Tensor::ones(shape, DType::F32, &cpu)?),
        Init::Normal(std) => normal(std),
        Init::FanIn => normal((shape.iter().skip(1).product::<usize>() as f64).powf(-0.5)),
    }
}
