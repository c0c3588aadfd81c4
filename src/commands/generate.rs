//! `rlrig generate`: the Generate-Reflect-Edit loop over prompts and seeds.

use super::{
    adapters::Adapters,
    ask::{self, Ask},
    fresh_seed, interrupt,
    open::{self, Found},
    output::{Output, Turns, check_writable, is_png, lies_in},
    show::{Console, printable},
};
use crate::{
    cli::{EditorKind, Generate},
    flow::{Inversion, Watch},
    io::{self, png},
    models::built_in,
    rig::{
        cycle::{self, Cast, Ending, Event, Job, Outcome},
        klein::Painter,
        roles::Claim,
        trajectory::{Recipe, Source, Trajectory, is_edit},
        vlm_roles::Critic,
    },
    usage,
};
use anyhow::{Context, Result, bail, ensure};
use candle_core::{DType, Device, Tensor};
use clap::ValueEnum;
use image::RgbImage;
use serde::Serialize;
use sha2::{Digest, Sha256};
use std::{path::Path, sync::atomic::Ordering};

/// Noise files beyond this size are not read.
const MAX_NOISE: u64 = 1 << 30;
/// Pictures of one call at most: each has a name and a job before the first is drawn.
const MOST_PICTURES: usize = 1_000_000;

pub fn run(args: Generate) -> Result<()> {
    let from = args.from.as_deref().map(read_recipe).transpose()?;
    let args = with_recipe(args, from.as_ref())?;
    let plan = Plan::new(&args, from.as_ref())?;
    let stop = interrupt()?;
    let console = Console::new(args.print.quiet, plan.asks.len() * plan.seeds.len());
    if let Some(other) = from.as_ref().and_then(of_another_version) {
        console.say(&other);
    }
    let (painter, critic, recipe) = open_models(&args, &plan, console.watch(stop))?;
    let mut jobs = Vec::new();
    for ask in plan.asks {
        let mut target = ask::resolve(ask, &critic, plan.only, &|text| console.say(text))?;
        // Other Diffusers know more words, and the prompt's own say more to them.
        target.drawn_as = target.drawn_as.filter(|_| plan.pipeline.is_built_in());
        if let Some(words) = &target.drawn_as {
            console.say(&format!("drawn as \"{}\"", printable(words)));
        }
        // A large model's reading is cut as in Python; the built-in one has no room for a word too many, and no round would
        // mend it.
        if plan.pipeline.is_built_in() {
            check_length(target.words(), &painter)?;
        }
        jobs.extend(plan.seeds.iter().map(|seed| Job { target: target.clone(), seed: *seed }));
    }
    if let Some(path) = &args.save_noise {
        save_noise(path, &painter, &plan.seeds, args.force)?;
    }
    if args.seed.is_empty() {
        console.say(&format!("seed {}", plan.seeds.iter().map(u64::to_string).collect::<Vec<_>>().join(" ")));
    }

    let cast = Cast { diffuser: &painter, checker: &critic, actor: &critic, editor: &painter };
    let mut kept = 0;
    let finish = |job: usize, outcome: &Outcome| -> Result<()> {
        let seed = jobs[job].seed;
        let recipe = Recipe { seed, noise_row: painter.noise_row(seed), ..recipe.clone() };
        let trajectory = Trajectory::new(jobs[job].target.clone(), recipe, outcome);
        let file = plan.output.write(job, outcome.best().picture.pixels()?, &trajectory)?;
        let folder = match &plan.turns {
            None => None,
            Some(turns) => {
                let pictures: Vec<&RgbImage> =
                    outcome.turns.iter().map(|turn| turn.picture.pixels()).collect::<Result<_>>()?;
                Some(turns.write(job, &trajectory, &pictures)?)
            }
        };
        report(&console, args.print.json, file, folder, &trajectory)
    };
    cycle::run_observed(cast, &jobs, &plan.options, &|| stop.load(Ordering::Relaxed), &mut |event| {
        console.hear(&event);
        if let Event::Finished { job, outcome } = event {
            finish(job, outcome)?;
            kept += 1;
        }
        Ok(())
    })?;
    console.done();
    if stop.load(Ordering::Relaxed) {
        bail!("interrupted; {kept} of {} pictures are kept", jobs.len());
    }
    Ok(())
}

/// What a call asks for. All that can be wrong with it is found here, before a model is opened.
struct Plan {
    options: cycle::Options,
    asks: Vec<Ask>,
    /// Whether pictures may show nothing else.
    only: bool,
    /// Of each prompt.
    seeds: Vec<u64>,
    editing: (EditorKind, Inversion),
    /// What the first drawings begin with, and the hash of its file.
    noise: Option<(Tensor, String)>,
    /// Which of that file's noises a recipe began with.
    noise_row: Option<usize>,
    output: Output,
    turns: Option<Turns>,
    device: Device,
    dtype: DType,
    pipeline: Found,
    vlm: Found,
}

impl Plan {
    fn new(args: &Generate, from: Option<&Trajectory>) -> Result<Self> {
        open::check_sampling(&args.sampling)?;
        let options = open::cycle(&args.cycle, args.batch)?;
        let editor = args.editor.unwrap_or_default();
        let editing = (editor, editor.inversion(args.inversion)?);
        let strict = [&args.painter.model, &args.critic.vlm].iter().all(|m| built_in::are_named(m.as_deref()));
        let (asks, only) = match from {
            Some(Trajectory { target, .. }) if !args.asked.any() => {
                let only = target.claims.iter().any(|claim| matches!(claim, Claim::Only(_)));
                (vec![Ask::Target(target.clone())], only)
            }
            _ => (ask::read(&args.asked, strict)?, strict),
        };
        let only = args.only.only.unwrap_or(only);
        let seeds = seeds(args)?;
        let pictures = asks.len().saturating_mul(seeds.len());
        if pictures > MOST_PICTURES {
            usage!(
                "{} prompts with {} seeds each are {pictures} pictures; at most {MOST_PICTURES} are made in one call",
                asks.len(),
                seeds.len()
            );
        }
        let all_seeds: Vec<u64> = asks.iter().flat_map(|_| seeds.iter().copied()).collect();
        let noise = args.init_noise.as_deref().map(read_noise).transpose()?;
        let hash = noise.as_ref().map(|(_, hash)| hash);
        let noise_row =
            from.filter(|from| from.recipe.init_noise.as_ref() == hash).and_then(|from| from.recipe.noise_row);
        if let Some(path) = &args.save_noise {
            if path.exists() && !args.force {
                return Err(io::exists(path));
            }
            check_writable(path.parent().unwrap_or(Path::new(".")))?;
        }
        let output = Output::new(args.out.as_deref(), &all_seeds, args.force, !args.no_metadata)?;
        for (flag, path) in [("--trajectory", &args.trajectory), ("--save-noise", &args.save_noise)] {
            if let Some(path) = path.as_deref().filter(|path| output.writes(path)) {
                usage!("{flag} {} is where the picture goes: name another", path.display());
            }
        }
        // A trajectory overwrites the files that it has, whoever made them.
        if let Some(dir) = &args.trajectory {
            let out = args.out.as_deref().filter(|out| is_png(out));
            for (flag, path) in [("--out", out), ("--save-noise", args.save_noise.as_deref())] {
                if let Some(path) = path.filter(|path| lies_in(path, dir)) {
                    usage!("{flag} {} is in the folder of --trajectory: name another place", path.display());
                }
            }
        }
        let turns = args.trajectory.as_deref().map(|dir| Turns::new(dir, &all_seeds, args.force)).transpose()?;
        let (device, dtype) = open::device(&args.models)?;
        let (pipeline, vlm) =
            (open::find_pipeline(&args.painter, args.print.quiet)?, open::find_vlm(&args.critic, args.print.quiet)?);
        Ok(Self { options, asks, only, seeds, editing, noise, noise_row, output, turns, device, dtype, pipeline, vlm })
    }
}

/// Opens the models, and tells the recipe of what they make, but for each picture's own seed and noise.
fn open_models(args: &Generate, plan: &Plan, watch: Box<dyn Watch>) -> Result<(Painter, Critic, Recipe)> {
    let Plan { options, pipeline, vlm, .. } = plan;
    let at = (&plan.device, plan.dtype);
    let mut adapters = Adapters::open(&args.models)?;
    let roles = open::adapted(&[built_in::DIFFUSER, built_in::EDITOR], plan.editing.0);
    let (klein, adapted) = open::pipeline(pipeline, at, &roles, &mut adapters)?;
    let (critic, actor) = open::critic(vlm, at, &mut adapters)?;
    let critic = critic.with_actor(actor).with_looks(open::looks(args.cycle.looks, vlm));
    adapters.finish()?;
    let painting = open::painting(&klein, pipeline, &args.sampling, plan.editing, args.batch);
    let (editor, inversion) = plan.editing;
    let recipe = Recipe {
        seed: 0,
        rounds: options.rounds,
        draws: options.draws,
        redraw: options.redraw,
        accept: options.accept,
        looks: critic.looks,
        steps: painting.steps,
        solver: painting.solver,
        guidance: painting.guidance,
        edit_guidance: (editor == EditorKind::Reference).then_some(painting.edit_guidance),
        editor: flag(editor),
        inversion: (editor == EditorKind::Inversion).then(|| flag(inversion)),
        model: pipeline.source.clone(),
        vlm: vlm.source.clone(),
        adapters: adapters.told().to_vec(),
        dtype: open::dtype_name(plan.dtype).to_owned(),
        init_noise: plan.noise.as_ref().map(|(_, hash)| hash.clone()),
        noise_row: None,
    };
    let mut painter = Painter::new(klein, painting, watch).with_adapted(adapted);
    if let Some((noise, _)) = &plan.noise {
        painter = painter.with_noise(noise, plan.noise_row, &plan.seeds)?;
    }
    Ok((painter, critic, recipe))
}

/// Whether the built-in Diffuser reads all of a prompt.
fn check_length(prompt: &str, painter: &Painter) -> Result<()> {
    if let Some(most) = painter.is_too_long(prompt)? {
        let start: String = prompt.chars().take(60).collect();
        usage!("the prompt \"{start}...\" is too long: the built-in Diffuser reads {most} tokens, about as many words");
    }
    Ok(())
}

/// Tells of a finished picture: its file on stdout, in words on stderr.
fn report(console: &Console, json: bool, file: &Path, folder: Option<&Path>, trajectory: &Trajectory) -> Result<()> {
    #[derive(Serialize)]
    struct Line<'a> {
        file: &'a Path,
        #[serde(skip_serializing_if = "Option::is_none")]
        folder: Option<&'a Path>,
        #[serde(flatten)]
        trajectory: &'a Trajectory,
    }
    let rounds = trajectory.turns.len();
    let words = match trajectory.ending {
        Ending::Accepted if rounds == 1 => "accepted as drawn".to_owned(),
        ending => format!("{} (round {} of {rounds})", ending.words(), trajectory.best + 1),
    };
    console.say(&format!("{words}, seed {}", trajectory.recipe.seed));
    if let Some(folder) = folder {
        console.say(&format!("every turn: {}", folder.join("index.html").display()));
    }
    if json {
        console.result(&serde_json::to_string(&Line { file, folder, trajectory })?)?;
    } else {
        console.result(&file.display().to_string())?;
    }
    Ok(())
}

/// The trajectory in a PNG.
fn read_recipe(path: &Path) -> Result<Trajectory> {
    let texts = png::read_texts(path)?;
    let Some((_, text)) = texts.iter().find(|(keyword, _)| keyword == png::CHUNK) else {
        usage!("{} carries no recipe of rlrig", path.display());
    };
    if is_edit(text) {
        usage!(
            "{} was made by `rlrig edit`, not drawn from a prompt; `rlrig info` shows the instruction to give again",
            path.display()
        );
    }
    Trajectory::from_json(text).with_context(|| format!("the recipe in {}", path.display()))
}

/// What is to be said of a recipe by another version, which may draw or choose otherwise.
fn of_another_version(from: &Trajectory) -> Option<String> {
    const VERSION: &str = env!("CARGO_PKG_VERSION");
    let other = (from.rlrig != VERSION).then_some(&from.rlrig);
    other.map(|rlrig| format!("the recipe is of rlrig {rlrig}, this is {VERSION}: the picture may be another"))
}

/// The flags, and a recipe's values for those that were not given.
fn with_recipe(mut args: Generate, from: Option<&Trajectory>) -> Result<Generate> {
    let Some(Trajectory { recipe, .. }) = from else { return Ok(args) };
    if recipe.init_noise.is_some() && args.init_noise.is_none() {
        usage!("this picture began with noise from a file: give it with --init-noise");
    }
    let named = |source: &Source| match &source.revision {
        Some(revision) => format!("{}@{revision}", source.name.split('@').next().unwrap_or_default()),
        None => source.name.clone(),
    };
    if args.seed.is_empty() {
        args.seed = vec![recipe.seed];
    }
    let rounds = args.cycle.rounds.unwrap_or(recipe.rounds);
    args.cycle.rounds = Some(rounds);
    args.cycle.draws = args.cycle.draws.or(Some(recipe.draws.min(rounds)));
    args.cycle.redraw = args.cycle.redraw.or(Some(recipe.redraw));
    args.cycle.accept = args.cycle.accept.or(Some(recipe.accept));
    args.cycle.looks = args.cycle.looks.or(Some(recipe.looks));
    args.sampling.steps = args.sampling.steps.or(Some(recipe.steps));
    args.sampling.solver = args.sampling.solver.or(Some(recipe.solver));
    let edits = recipe.edit_guidance.unwrap_or(recipe.guidance.into());
    // As everywhere, --guidance is of edits, too.
    args.sampling.edit_guidance = args.sampling.edit_guidance.or(args.sampling.guidance).or(Some(edits.text));
    args.sampling.image_guidance = args.sampling.image_guidance.or(Some(edits.image));
    args.sampling.guidance = args.sampling.guidance.or(Some(recipe.guidance));
    args.editor = args.editor.or(value(&recipe.editor)?);
    // Another editor has no use for the recipe's.
    if args.editor == Some(EditorKind::Inversion) {
        args.inversion = args.inversion.or(recipe.inversion.as_deref().map(value).transpose()?.flatten());
    }
    args.painter.model = args.painter.model.or_else(|| Some(named(&recipe.model)));
    args.critic.vlm = args.critic.vlm.or_else(|| Some(named(&recipe.vlm)));
    args.models.dtype = args.models.dtype.or(value(&recipe.dtype)?);
    if args.models.adapter.is_empty() {
        args.models.adapter = recipe.adapters.clone();
    }
    Ok(args)
}

/// A flag's value by its name in a recipe.
fn value<T: ValueEnum>(name: &str) -> Result<Option<T>> {
    match T::from_str(name, true) {
        Ok(value) => Ok(Some(value)),
        Err(_) => bail!("the recipe names {name:?}, which this rlrig does not know"),
    }
}

/// A flag's value as it is typed.
pub fn flag<T: ValueEnum>(value: T) -> String {
    value.to_possible_value().map_or_else(String::new, |v| v.get_name().to_owned())
}

/// The seeds of each prompt: those given, counted up to `-n` of them.
fn seeds(args: &Generate) -> Result<Vec<u64>> {
    let mut seeds = args.seed.clone();
    let count = args.count.unwrap_or(seeds.len().max(1));
    if count == 0 || count > 100_000 {
        usage!("-n is 1 to 100000, not {count}");
    }
    if count < seeds.len() {
        usage!("{} seeds are given, but -n asks for {count} pictures", seeds.len());
    }
    if seeds.is_empty() {
        seeds.push(fresh_seed());
    }
    while seeds.len() < count {
        let Some(next) = seeds.last().and_then(|last| last.checked_add(1)) else {
            usage!("there are not {count} seeds from {} on", args.seed[0]);
        };
        seeds.push(next);
    }
    let mut sorted = seeds.clone();
    sorted.sort_unstable();
    if let Some(twice) = sorted.windows(2).find(|pair| pair[0] == pair[1]) {
        usage!("the seed {} is given twice", twice[0]);
    }
    Ok(seeds)
}

/// The tensor `noise` of a file, and the file's hash.
fn read_noise(path: &Path) -> Result<(Tensor, String)> {
    let bytes = io::read_file(path, MAX_NOISE)?;
    let shown = path.display();
    let mut tensors = candle_core::safetensors::load_buffer(&bytes, &Device::Cpu)
        .with_context(|| format!("{shown} is no whole safetensors file"))?;
    let noise = tensors.remove("noise").with_context(|| format!("{shown} has no tensor named noise"))?;
    ensure!(noise.elem_count() > 0, "{shown}: the noise is empty");
    Ok((noise, Sha256::digest(&bytes).iter().map(|b| format!("{b:02x}")).collect()))
}

/// Writes the noise of `seeds`, `(B, C, h, w)`, as the tensor `noise`.
fn save_noise(path: &Path, painter: &Painter, seeds: &[u64], overwrite: bool) -> Result<()> {
    let noise: Vec<Tensor> = seeds.iter().map(|seed| painter.noise(*seed)).collect::<Result<_>>()?;
    let noise = Tensor::stack(&noise, 0)?.to_device(&Device::Cpu)?;
    let bytes = safetensors::serialize([("noise", &noise)], None).context("cannot serialise the noise")?;
    io::write_file(path, &bytes, overwrite)
}
