//! What the commands share: devices, model folders and adapters, opened as the flags say.

use crate::{
    cli::{DeviceKind, Dtype, EditorKind, Inversion, ModelArgs, Sampling},
    flow::{self, Klein},
    io::hub::{Hub, Local},
    models::{Adapter, Folder, Params, built_in, peft::Peft, qwen3_vl},
    rig::{
        klein::{Editing, Painting},
        trajectory::Source,
        vlm_roles::Critic,
    },
    usage,
    vlm::Vlm,
};
use anyhow::{Context, Result, bail, ensure};
use candle_core::{DType, Device};
use indicatif::{ProgressBar, ProgressStyle};
use std::{path::Path, sync::Arc};

/// The built-in model's sampling.
const BUILT_IN_STEPS: usize = 20;
const BUILT_IN_GUIDANCE: f64 = 3.0;

/// A model's folder, and where it came from.
pub struct Found {
    pub folder: Folder,
    pub source: Source,
}

impl Found {
    fn is_built_in(&self) -> bool {
        matches!(self.folder, Folder::Embedded(_))
    }
}

/// The folder of the pipeline, without reading it yet.
pub fn find_pipeline(args: &ModelArgs) -> Result<Found> {
    find(args.model.as_deref(), built_in::PIPELINE, "--model")
}

/// The folder of the VLM, without reading it yet.
pub fn find_vlm(args: &ModelArgs) -> Result<Found> {
    find_a_vlm(args.vlm.as_deref(), "--vlm")
}

/// The folder of a VLM that a flag names.
pub fn find_a_vlm(name: Option<&str>, flag: &str) -> Result<Found> {
    let mut found = find(name, built_in::VLM, flag)?;
    if found.is_built_in() {
        found.folder = found.folder.require("vlm")?;
    }
    Ok(found)
}

fn find(name: Option<&str>, parts: &[&'static str], flag: &str) -> Result<Found> {
    if let Some(name) = name.filter(|name| *name != built_in::NAME) {
        let bar = Download::default();
        let Local { path, revision } =
            Hub::from_env()?.locate(name, &|file, done, total| bar.show(file, done, total))?;
        return Ok(Found { folder: path.into(), source: Source { name: name.to_owned(), revision } });
    }
    let missing = built_in::missing(parts);
    ensure!(
        missing.is_empty(),
        "this rlrig was built without trained models: weights/tabletop lacks {}; train them (rlrig train pretrain), \
         or give {flag} a hub id or a folder",
        missing.join(", ")
    );
    Ok(Found { folder: built_in::tabletop(), source: Source { name: built_in::NAME.to_owned(), revision: None } })
}

/// The device and the number format.
pub fn device(args: &ModelArgs) -> Result<(Device, DType)> {
    use candle_core::utils::{cuda_is_available, metal_is_available};
    let device = match args.device {
        DeviceKind::Cpu => Device::Cpu,
        DeviceKind::Auto if cuda_is_available() => Device::new_cuda(0)?,
        DeviceKind::Auto if metal_is_available() => Device::new_metal(0)?,
        DeviceKind::Auto => Device::Cpu,
        DeviceKind::Cuda if !cuda_is_available() => usage!("this rlrig was built without CUDA: --device cpu works"),
        DeviceKind::Cuda => Device::new_cuda(0).context("cannot use the CUDA device")?,
        DeviceKind::Metal if !metal_is_available() => usage!("this rlrig was built without Metal: --device cpu works"),
        DeviceKind::Metal => Device::new_metal(0).context("cannot use the Metal device")?,
    };
    let dtype = match args.dtype {
        Some(Dtype::F32) => DType::F32,
        Some(Dtype::F16) => DType::F16,
        Some(Dtype::Bf16) => DType::BF16,
        None if device.is_cpu() => DType::F32,
        None => DType::BF16,
    };
    Ok((device, dtype))
}

/// The name of a number format in a recipe.
pub fn dtype_name(dtype: DType) -> &'static str {
    match dtype {
        DType::F16 => "f16",
        DType::BF16 => "bf16",
        _ => "f32",
    }
}

/// The adapters of `--adapter`, each with its strength.
pub struct Adapters(Vec<(Peft, f64)>);

impl Adapters {
    pub fn open(args: &ModelArgs) -> Result<Self> {
        let open = |text: &String| -> Result<(Peft, f64)> {
            let (path, strength) = match text.rsplit_once(':').map(|(path, s)| (path, s.parse::<f64>())) {
                Some((path, Ok(strength))) if strength.is_finite() => (path, strength),
                _ => (text.as_str(), 1.0),
            };
            if !Path::new(path).is_dir() {
                usage!("--adapter {text}: there is no folder {path}");
            }
            Ok((Peft::open(&Folder::from(path))?, strength))
        };
        Ok(Self(args.adapter.iter().map(open).collect::<Result<_>>()?))
    }

    /// None at all.
    pub fn none() -> Self {
        Self(Vec::new())
    }

    /// How many no model has taken yet.
    pub fn left(&self) -> usize {
        self.0.len()
    }

    /// Takes those whose layers the model of `params` has.
    fn take(&mut self, params: &Params) -> Vec<Adapter> {
        let fits = |peft: &Peft| peft.layers.iter().all(|layer| params.has(&format!("{layer}.weight")));
        let (taken, left) = std::mem::take(&mut self.0).into_iter().partition(|(peft, _)| fits(peft));
        self.0 = left;
        taken.into_iter().map(|(peft, strength)| peft.adapter(strength)).collect()
    }

    /// An error if some fit no model.
    pub fn finish(&self) -> Result<()> {
        match self.0.first() {
            None => Ok(()),
            Some((peft, _)) => bail!(
                "the adapter {} fits neither model: none has all its layers, such as {}",
                peft.name,
                peft.layers.first().map_or("", String::as_str)
            ),
        }
    }
}

/// Opens the pipeline.
pub fn pipeline(found: &Found, (device, dtype): (&Device, DType), adapters: &mut Adapters) -> Result<Arc<Klein>> {
    let params = Params::open(&found.folder.require("transformer")?, "diffusion_pytorch_model", dtype, device)?;
    let adapters = adapters.take(&params);
    Ok(Arc::new(Klein::open(&found.folder, dtype, device, adapters)?))
}

/// Opens the VLM.
pub fn critic(found: &Found, (device, dtype): (&Device, DType), adapters: &mut Adapters) -> Result<Critic> {
    let folder = &found.folder;
    let config: qwen3_vl::Config = folder.json("config.json")?;
    let params = Params::open(folder, "model", dtype, device)?;
    let taken = adapters.take(&params);
    let params = params.adapted(taken);
    let model = qwen3_vl::Qwen3VL::new(&config, &params)?;
    params.finish(|name| config.tie_word_embeddings && name == "lm_head.weight")?;
    Ok(Critic(Vlm::of(model, folder)?))
}

/// How the model paints: the flags, and its own defaults for the rest.
pub fn painting(
    klein: &Klein,
    found: &Found,
    sampling: &Sampling,
    (editor, inversion): (EditorKind, Inversion),
    batch: usize,
) -> Painting {
    let (steps, guidance) = match (found.is_built_in(), klein.distilled) {
        (true, _) => (BUILT_IN_STEPS, BUILT_IN_GUIDANCE),
        (false, true) => (4, 1.0),
        (false, false) => (50, 4.0),
    };
    let inversion = match inversion {
        Inversion::RfInversion => flow::Inversion::RfInversion,
        Inversion::RfSolver => flow::Inversion::RfSolver,
        Inversion::Fireflow => flow::Inversion::FireFlow,
    };
    Painting {
        steps: sampling.steps.unwrap_or(steps),
        guidance: sampling.guidance.unwrap_or(guidance),
        editing: match editor {
            EditorKind::Reference => Editing::Reference,
            EditorKind::Inversion => Editing::Inversion(inversion),
            EditorKind::Flowedit => Editing::FlowEdit,
        },
        size: klein.default_size(),
        batch,
    }
}

/// Checks the sampling flags before a model is opened.
pub fn check_sampling(sampling: &Sampling) -> Result<()> {
    if let Some(steps) = sampling.steps.filter(|steps| !(1..=1000).contains(steps)) {
        usage!("--steps is 1 to 1000, not {steps}");
    }
    if let Some(guidance) = sampling.guidance.filter(|g| !(0.0..=100.0).contains(g)) {
        usage!("--guidance is 0 to 100, not {guidance}");
    }
    Ok(())
}

/// Checks a probability given as a flag.
pub fn check_accept(accept: f64) -> Result<()> {
    if !(accept > 0.0 && accept <= 1.0) {
        usage!("--accept is a probability above 0 and at most 1, not {accept}");
    }
    Ok(())
}

/// A bar on stderr for each file that is fetched.
#[derive(Default)]
pub struct Download(std::cell::RefCell<Option<(String, ProgressBar)>>);

impl Download {
    pub fn show(&self, file: &str, done: u64, total: u64) {
        let mut shown = self.0.borrow_mut();
        if shown.as_ref().is_none_or(|(name, _)| name != file) {
            let bar = ProgressBar::new(total);
            if let Ok(style) =
                ProgressStyle::with_template("{msg} {bar:24} {bytes}/{total_bytes} {bytes_per_sec} {eta}")
            {
                bar.set_style(style);
            }
            bar.set_message(file.to_owned());
            *shown = Some((file.to_owned(), bar));
        }
        if let Some((_, bar)) = &*shown {
            bar.set_position(done);
        }
    }
}
