//! What the commands share: devices and model folders, opened as the flags say.

use super::adapters::{Adapters, Who};
use crate::{
    cli::{CriticArgs, CycleArgs, DeviceKind, Dtype, EditorKind, ModelArgs, PainterArgs, Sampling},
    flow::{Guidance, Inversion, Klein},
    io::hub::{Hub, Local},
    models::{Adapter, Folder, Params, built_in, qwen3_vl},
    rig::{
        cycle,
        klein::{Adapted, Editing, Painting},
        trajectory::Source,
        vlm_roles::{Critic, LOOKS},
    },
    tensor::device::{Accelerator, best},
    usage,
    vlm::Vlm,
};
use anyhow::{Context, Result, bail, ensure};
use candle_core::{DType, Device};
use indicatif::{ProgressBar, ProgressStyle};
use std::{cell::RefCell, sync::Arc};

/// The built-in model's sampling.
const BUILT_IN_STEPS: usize = 20;
const BUILT_IN_GUIDANCE: f64 = 3.0;
const BUILT_IN_EDIT_GUIDANCE: Guidance = Guidance { text: 5.0, image: 2.5 };
/// How often the built-in Checker looks: it is small, and sure of little at one look.
const BUILT_IN_LOOKS: usize = 3;

/// A model's folder, and where it came from.
pub struct Found {
    pub folder: Folder,
    pub source: Source,
}

impl Found {
    pub fn is_built_in(&self) -> bool {
        matches!(self.folder, Folder::Embedded(_))
    }
}

/// The folder of the pipeline, without reading it yet.
pub fn find_pipeline(args: &PainterArgs, quiet: bool) -> Result<Found> {
    find(args.model.as_deref(), built_in::PIPELINE, "--model", quiet)
}

/// The folder of the VLM, without reading it yet.
pub fn find_vlm(args: &CriticArgs, quiet: bool) -> Result<Found> {
    find_a_vlm(args.vlm.as_deref(), "--vlm", quiet)
}

/// The folder of a VLM that a flag names.
pub fn find_a_vlm(name: Option<&str>, flag: &str, quiet: bool) -> Result<Found> {
    let mut found = find(name, built_in::VLM, flag, quiet)?;
    if found.is_built_in() {
        found.folder = found.folder.require("vlm")?;
    }
    Ok(found)
}

fn find(name: Option<&str>, parts: &[&'static str], flag: &str, quiet: bool) -> Result<Found> {
    let revision = name.and_then(|name| name.strip_prefix(built_in::NAME)?.strip_prefix('@'));
    if let Some(asked) = revision.filter(|asked| *asked != built_in::revision()) {
        usage!(
            "{flag} {}@{asked}: the models in this rlrig are others ({}); give {flag} {0} to use them all the same",
            built_in::NAME,
            built_in::revision()
        );
    }
    if let Some(name) = name.filter(|name| !built_in::are_named(Some(name))) {
        let bar = Download::new(quiet);
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
    let source = Source { name: built_in::NAME.to_owned(), revision: Some(built_in::revision().to_owned()) };
    Ok(Found { folder: built_in::tabletop(), source })
}

/// The device that a flag names; CUDA, then Metal, then the CPU if it leaves the choice.
pub fn device_of(kind: DeviceKind) -> Result<Device> {
    let accelerator = match kind {
        DeviceKind::Auto => return Ok(best()),
        DeviceKind::Cpu => return Ok(Device::Cpu),
        DeviceKind::Cuda => Accelerator::Cuda,
        DeviceKind::Metal => Accelerator::Metal,
    };
    accelerator.open().or_else(|reason| match accelerator.name() {
        name if accelerator.built() => bail!("--device {name}: {reason}"),
        name => usage!("--device {name} is {reason}; --device cpu works"),
    })
}

/// The device and the number format.
pub fn device(args: &ModelArgs) -> Result<(Device, DType)> {
    let device = device_of(args.device)?;
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

/// The name of a device in a run's configuration.
pub fn device_name(device: &Device) -> &'static str {
    match device {
        Device::Cpu => "cpu",
        Device::Cuda(_) => "cuda",
        Device::Metal(_) => "metal",
    }
}

/// Those of `roles` that may have adapters of their own: an Editor by noise is the pipeline's transformer as it is.
pub fn adapted(roles: &[&'static str], editor: EditorKind) -> Vec<&'static str> {
    let may = |role: &&str| *role != built_in::EDITOR || editor == EditorKind::Reference;
    roles.iter().copied().filter(may).collect()
}

/// Opens the pipeline: with the adapters that are for both its roles, and the transformers of those of `roles`,
/// the Diffuser's and the Editor's, that have more.
pub fn pipeline(
    found: &Found,
    (device, dtype): (&Device, DType),
    roles: &[&str],
    adapters: &mut Adapters,
) -> Result<(Arc<Klein>, Adapted)> {
    let params = Params::open(&found.folder.require("transformer")?, "diffusion_pytorch_model", dtype, device)?;
    let both = adapters.take(Who::Both, &params);
    let mut own = Vec::new();
    for role in roles {
        let adapters = of_role(found, role, &params, adapters)?;
        if !adapters.is_empty() {
            own.push((*role, [&*both, &*adapters].concat()));
        }
    }
    let (with_own, others): (Vec<&str>, _) = own.into_iter().unzip();
    let (klein, others) = Klein::open_with(&found.folder, dtype, device, both, others)?;
    let mut adapted = Adapted::default();
    for (role, transformer) in with_own.into_iter().zip(others) {
        let place = if role == built_in::DIFFUSER { &mut adapted.diffuser } else { &mut adapted.editor };
        *place = Some(Arc::new(transformer));
    }
    Ok((Arc::new(klein), adapted))
}

/// Opens the VLM as Checker alone.
pub fn checker(found: &Found, at: (&Device, DType), adapters: &mut Adapters) -> Result<Critic> {
    Ok(open_vlm(found, at, adapters)?.0)
}

/// Opens the VLM as Checker and Actor; the one that is Checker alone, and the Actor if it has more adapters.
pub fn critic(found: &Found, at: (&Device, DType), adapters: &mut Adapters) -> Result<(Critic, Option<Arc<Vlm>>)> {
    let (critic, params, both) = open_vlm(found, at, adapters)?;
    let mut actor = of_role(found, built_in::ACTOR, &params, adapters)?;
    if actor.is_empty() {
        return Ok((critic, None));
    }
    actor.splice(..0, both);
    let model = qwen3_vl::Qwen3VL::new(critic.checker.model.config(), &params.again(actor))?;
    Ok((critic, Some(Arc::new(Vlm::of(model, &found.folder)?))))
}

fn open_vlm(
    found: &Found,
    (device, dtype): (&Device, DType),
    adapters: &mut Adapters,
) -> Result<(Critic, Params, Vec<Adapter>)> {
    let folder = &found.folder;
    let config: qwen3_vl::Config = folder.json("config.json")?;
    let params = Params::open(folder, "model", dtype, device)?;
    let both = adapters.take(Who::Both, &params);
    let params = params.adapted(both.clone());
    let model = qwen3_vl::Qwen3VL::new(&config, &params).with_context(|| format!("the model in {}", folder.name()))?;
    params.finish(|name| config.tie_word_embeddings && name == "lm_head.weight")?;
    Ok((Critic::of(Vlm::of(model, folder)?, folder)?, params, both))
}

/// The adapters of one role alone.
fn of_role(found: &Found, role: &str, params: &Params, adapters: &mut Adapters) -> Result<Vec<Adapter>> {
    match found.is_built_in() {
        true => adapters.take_or_built_in(role, params),
        false => Ok(adapters.take(Who::of(role), params)),
    }
}

/// How the model paints: the flags, and its own defaults for the rest.
pub fn painting(
    klein: &Klein,
    found: &Found,
    sampling: &Sampling,
    (editor, inversion): (EditorKind, Inversion),
    batch: usize,
) -> Painting {
    let (steps, guidance, edit_guidance) = match (found.is_built_in(), klein.distilled) {
        (true, _) => (BUILT_IN_STEPS, BUILT_IN_GUIDANCE, BUILT_IN_EDIT_GUIDANCE),
        (false, true) => (4, 1.0, 1.0.into()),
        (false, false) => (50, 4.0, 4.0.into()),
    };
    Painting {
        steps: sampling.steps.unwrap_or(steps),
        solver: sampling.solver.unwrap_or_default(),
        guidance: sampling.guidance.unwrap_or(guidance),
        edit_guidance: Guidance {
            text: sampling.edit_guidance.or(sampling.guidance).unwrap_or(edit_guidance.text),
            image: sampling.image_guidance.unwrap_or(edit_guidance.image),
        },
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
    for (flag, strength) in [
        ("--guidance", sampling.guidance),
        ("--edit-guidance", sampling.edit_guidance),
        ("--image-guidance", sampling.image_guidance),
    ] {
        if let Some(strength) = strength.filter(|g| !(0.0..=100.0).contains(g)) {
            usage!("{flag} is 0 to 100, not {strength}");
        }
    }
    Ok(())
}

/// How the loop runs with `width` jobs at once: the flags, and its own defaults for the rest; checked before a model is
/// opened.
pub fn cycle(args: &CycleArgs, width: usize) -> Result<cycle::Options> {
    let usual = cycle::Options::default();
    let rounds = args.rounds.unwrap_or(usual.rounds);
    let options = cycle::Options {
        rounds,
        draws: args.draws.unwrap_or(usual.draws.min(rounds)),
        redraw: args.redraw.unwrap_or(usual.redraw),
        accept: args.accept.unwrap_or(usual.accept),
        width,
    };
    if !(1..=cycle::MOST_ROUNDS).contains(&options.rounds) || !(1..=4096).contains(&width) {
        usage!("--rounds is 1 to {}, and --batch 1 to 4096", cycle::MOST_ROUNDS);
    }
    if !(1..=options.rounds).contains(&options.draws) {
        usage!("--draws is 1 to the number of --rounds, which is {}, not {}", options.rounds, options.draws);
    }
    check_accept(options.accept)?;
    check_looks(args.looks)?;
    Ok(options)
}

/// Checks a probability given as a flag.
pub fn check_accept(accept: f64) -> Result<()> {
    if !(accept > 0.0 && accept <= 1.0) {
        usage!("--accept is a probability above 0 and at most 1, not {accept}");
    }
    Ok(())
}

/// How often the Checker looks at a picture: the flag, or what serves the VLM.
pub fn looks(given: Option<usize>, found: &Found) -> usize {
    given.unwrap_or(if found.is_built_in() { BUILT_IN_LOOKS } else { 1 })
}

/// Checks how often the Checker is to look.
pub fn check_looks(looks: Option<usize>) -> Result<()> {
    match looks {
        Some(looks) if !(1..=LOOKS).contains(&looks) => usage!("--looks is 1 to {LOOKS}, not {looks}"),
        _ => Ok(()),
    }
}

/// A bar on stderr for each file that is fetched.
pub struct Download {
    quiet: bool,
    shown: RefCell<Option<(String, ProgressBar)>>,
}

impl Download {
    pub fn new(quiet: bool) -> Self {
        Self { quiet, shown: RefCell::default() }
    }

    pub fn show(&self, file: &str, done: u64, total: u64) {
        if self.quiet {
            return;
        }
        let mut shown = self.shown.borrow_mut();
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_quiet_download_shows_no_bar() {
        for quiet in [true, false] {
            let download = Download::new(quiet);
            download.show("model.safetensors", 1, 2);
            assert_eq!(download.shown.borrow().is_none(), quiet);
        }
    }
}
