//! `rlrig eval`: the loop and its rivals on one set of prompts, with a table in Markdown on stdout and a run's folder.

use super::{adapters::Adapters, eval_edits, eval_join, eval_verdicts, interrupt, open, show::Console};
use crate::{
    cli::{self, Dataset, EditorKind, Eval, EvalCommand, EvalRun, OracleRole},
    eval::{
        dataset::{self, DataFile, Sample, Samples, Selection},
        flaws::Flaws,
        folder::Folder,
        line::{Key, Line},
        modes::{self, Mode},
        play::Play,
        results::results,
        table,
        wording::Wording,
    },
    flow::Klein,
    io::hub::Hub,
    models::built_in,
    rig::{
        cycle::Options,
        klein::{Adapted, Editing, Painter, Painting},
        oracle_roles::Advised,
        trajectory::Source,
        vlm_roles::Critic,
    },
    scene::tabletop::split::Split,
    usage,
};
use anyhow::{Context, Result, bail};
use serde_json::{Value, json};
use std::{
    collections::HashSet,
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};

pub fn run(args: &Eval) -> Result<()> {
    match &args.command {
        Some(EvalCommand::Compare(args)) => eval_join::compare(args),
        Some(EvalCommand::Merge(args)) => eval_join::merge(args),
        Some(EvalCommand::Calibrate(args)) => eval_join::calibrate(args),
        None => evaluate(&args.run),
    }
}

fn evaluate(args: &EvalRun) -> Result<()> {
    open::check_sampling(&args.sampling)?;
    let options = open::cycle(&args.cycle, args.batch)?;
    if args.limit == Some(0) {
        usage!("--limit is 1 or more, not 0");
    }
    if let Some(limit) = args.limit.filter(|limit| args.dataset == Dataset::Tabletop && *limit > dataset::MOST) {
        usage!("--limit {limit}: at most {} of the tabletop world are evaluated", dataset::MOST);
    }
    if args.edits || args.verdicts {
        if args.dataset != Dataset::Tabletop {
            let flag = if args.edits { "--edits" } else { "--verdicts" };
            usage!("{flag} is of the tabletop world, whose truth is known; leave out --dataset");
        }
        return if args.edits { eval_edits::run(args) } else { eval_verdicts::run(args) };
    }
    if !args.oracle.is_empty() && args.dataset != Dataset::Tabletop {
        usage!("--oracle reads pictures of the tabletop world alone; leave out --dataset, or --oracle");
    }
    let console = Console::new(args.print.quiet, 0);
    // Before data or models are fetched.
    if let Some(out) = &args.out {
        Folder::check(out, args.resume)?;
    }
    let (samples, flaws, files) = samples(args)?;
    flaws.iter().flat_map(Flaws::sentences).for_each(|flaw| console.say(&format!("the data has {flaw}")));
    let stop = interrupt()?;
    let models = Models::open(args, options, &console)?;
    let modes = models.modes(args, &console)?;
    let config = models.config(args, &modes, &files);
    let mut kept = match &args.out {
        Some(out) if args.resume => {
            let (folder, lost) = Folder::resume(out, &config)?;
            if lost > 0 {
                console.say(&format!("{lost} prompts have lost a picture and are made again"));
            }
            Kept::Folder(folder)
        }
        Some(out) => Kept::Folder(Folder::create(out, &config)?),
        None => Kept::Memory(Vec::new()),
    };
    for mode in modes {
        for seed in &args.seed {
            models.play(args, (mode, *seed), &samples, &mut kept, &console, stop)?;
        }
    }
    console.done();
    let versions = json!({ "rlrig": env!("CARGO_PKG_VERSION") });
    let flaws = serde_json::to_value(&flaws)?;
    let results = match kept {
        Kept::Folder(mut folder) => folder.finish(config, versions, flaws)?,
        Kept::Memory(lines) => results(config, versions, flaws, &lines),
    };
    if args.print.json {
        console.result(&serde_json::to_string(&results)?)?;
    } else {
        console.result(table::markdown(&results).trim_end())?;
    }
    Ok(())
}

/// How prompts are worded: for the built-in Diffuser as `generate` words what it understands.
fn wording(args: &EvalRun) -> Wording {
    args.wording.unwrap_or(match args.dataset {
        Dataset::Tabletop if built_in::are_named(args.painter.model.as_deref()) => Wording::Plain,
        Dataset::Tabletop => Wording::Caption,
        Dataset::LaionSg => Wording::Triples,
    })
}

/// The prompts of all splits, the flaws of each file, and the files.
fn samples(args: &EvalRun) -> Result<(Samples, Vec<Flaws>, Vec<DataFile>)> {
    let selection = Selection {
        wording: wording(args),
        min_relations: args.min_relations,
        min_objects: args.objects,
        predicates: args.relation.clone(),
        spatial_only: args.spatial_only,
        limit: args.limit,
        subset: args.subset_seed,
        shard: shard(args.shard.as_deref())?,
    };
    if args.split.iter().collect::<HashSet<_>>().len() < args.split.len() {
        usage!("--split names a split twice");
    }
    if args.seed.iter().collect::<HashSet<_>>().len() < args.seed.len() {
        usage!("--seed names a seed twice");
    }
    if args.dataset == Dataset::LaionSg && args.subset_seed.is_some() && args.limit.is_none() {
        usage!("--subset-seed draws a subset of a file: say how many records by --limit");
    }
    let (mut samples, mut flaws, mut files) = (Samples::default(), Vec::new(), Vec::new());
    for split in &args.split {
        match (args.dataset, &args.data) {
            (Dataset::Tabletop, None) => {
                let drawn = dataset::tabletop(split_of(split)?, args.subset_seed.unwrap_or(0), &selection)?;
                samples.append(drawn.into());
            }
            (Dataset::Tabletop, Some(_)) => usage!("--data is for --dataset laion-sg"),
            (Dataset::LaionSg, data) => {
                let data = laion_sg_file(data.as_deref(), split, args.print.quiet)?;
                if args.split.len() > 1 && args.data.as_deref().is_some_and(Path::is_file) {
                    usage!("--data is one file: give its --split, or a folder with a file for each");
                }
                files.push(dataset::data_file(&data, split)?);
                let (more, found) = dataset::laion_sg(&data, split, &selection)?;
                samples.append(more);
                flaws.push(found);
            }
        }
    }
    Ok((samples, flaws, files))
}

/// LAION-SG's file or folder: what is given, or its file of the split on the hub.
fn laion_sg_file(given: Option<&Path>, split: &str, quiet: bool) -> Result<PathBuf> {
    const ON_THE_HUB: &str = "mengcy/LAION-SG";
    let name = match given {
        Some(path) if path.exists() => return Ok(path.to_owned()),
        Some(path) => path.to_string_lossy().into_owned(),
        None => ON_THE_HUB.to_owned(),
    };
    let (bar, choose) = (open::Download::new(quiet), |files: &[&str]| dataset::choose_file(files, split));
    Hub::from_env()?
        .data_file(&name, &choose, &|file, done, all| bar.show(file, done, all))
        .with_context(|| format!("--data {name} is no file or folder here, so the hub was asked"))
}

/// The split of the world that is named.
pub fn split_of(name: &str) -> Result<Split> {
    match Split::from_name(name) {
        Some(split) => Ok(split),
        None => {
            let known: Vec<&str> = Split::ALL.iter().map(|s| s.name()).collect();
            usage!("unknown split \"{name}\"; known are {}", known.join(", "))
        }
    }
}

/// `I/N`, or all as the only part.
fn shard(text: Option<&str>) -> Result<(usize, usize)> {
    let Some(text) = text else { return Ok((1, 1)) };
    match shard_numbers(text) {
        Some(numbers) => Ok(numbers),
        None => usage!("--shard {text}: give I/N, with I from 1 to N"),
    }
}

/// `I/N` as numbers.
pub fn shard_numbers(text: &str) -> Option<(usize, usize)> {
    let (i, n) = text.split_once('/')?;
    Some((i.parse().ok()?, n.parse().ok()?)).filter(|(i, n)| (1..=*n).contains(i))
}

/// Where lines are kept.
enum Kept {
    Folder(Folder),
    Memory(Vec<Line>),
}

/// The models, with the adapters of their roles and without.
struct Models {
    klein: Arc<Klein>,
    painting: Painting,
    adapted: Adapted,
    critic: Critic,
    bare_critic: Option<Critic>,
    judge: Option<Critic>,
    /// How the loop runs with them.
    options: Options,
    /// What a configuration tells of them.
    told: Value,
}

impl Models {
    fn open(args: &EvalRun, options: Options, console: &Console) -> Result<Self> {
        let editing = (args.editor, args.editor.inversion(args.inversion)?);
        let (device, dtype) = open::device(&args.models)?;
        let at = (&device, dtype);
        let mut adapters = Adapters::open(&args.models)?;
        let (pipeline, vlm) =
            (open::find_pipeline(&args.painter, args.print.quiet)?, open::find_vlm(&args.critic, args.print.quiet)?);
        let roles = open::adapted(&[built_in::DIFFUSER, built_in::EDITOR], args.editor);
        let (klein, adapted) = open::pipeline(&pipeline, at, &roles, &mut adapters)?;
        let (critic, actor) = open::critic(&vlm, at, &mut adapters)?;
        let critic = critic.with_looks(open::looks(args.cycle.looks, &vlm));
        adapters.finish()?;
        let painting = open::painting(&klein, &pipeline, &args.sampling, editing, args.batch);
        let bare_critic = actor.is_some().then(|| critic.clone());
        let judge =
            args.judge.as_deref().map(|name| open::find_a_vlm(Some(name), "--judge", args.print.quiet)).transpose()?;
        let source: Option<&Source> = judge.as_ref().map(|found| &found.source);
        let mut told = json!({
            "steps": painting.steps, "solver": painting.solver, "guidance": painting.guidance, "edit_guidance": painting.edit_guidance, "looks": critic.looks, "calibration": critic.calibration, "editor": format!("{:?}", painting.editing),
        });
        told["model"] = serde_json::to_value(&pipeline.source)?;
        told["vlm"] = serde_json::to_value(&vlm.source)?;
        told["judge"] = serde_json::to_value(source)?;
        if lists(args) && judge.as_ref().unwrap_or(&vlm).is_built_in() {
            console.say(
                "the built-in VLM has not learned to list what a picture shows: take SG-IoU by --graph confirmed, or \
                 another --judge",
            );
        }
        told["adapter"] = adapters.told().into();
        told["adapter_revisions"] = adapters.revisions().into();
        told["device"] = open::device_name(&device).into();
        told["dtype"] = open::dtype_name(dtype).into();
        let judge = judge.map(|found| -> Result<Critic> {
            let critic = open::checker(&found, at, &mut Adapters::default())?;
            Ok(critic.with_looks(open::looks(args.cycle.looks, &found)))
        });
        let judge = judge.transpose()?;
        told["judge_calibration"] = serde_json::to_value(judge.as_ref().map(|judge| &judge.calibration))?;
        if let Some(judge) = &judge {
            told["judge_looks"] = judge.looks.into();
        }
        let critic = critic.with_actor(actor);
        Ok(Self { klein, painting, adapted, critic, bare_critic, judge, options, told })
    }

    /// The modes that are asked for.
    fn modes(&self, args: &EvalRun, console: &Console) -> Result<Vec<Mode>> {
        let mut modes: Vec<Mode> = args.mode.clone();
        let (editor, actor) = (self.adapted.editor.is_some(), self.bare_critic.is_some());
        let any = editor || actor || self.adapted.diffuser.is_some();
        let lacks = |mode: &&Mode| match mode {
            Mode::LoopActor => !actor,
            Mode::LoopEditor => !editor,
            _ => false,
        };
        if let Some(mode) = modes.iter().find(lacks) {
            usage!("--mode {} is about an adapter that is not on: name it by --adapter", mode.name());
        }
        if args.suite {
            modes = Mode::ALL.to_vec();
            // A loop that is the same as another is not run twice.
            modes.retain(|mode| match mode {
                Mode::LoopUntrained => any,
                Mode::LoopActor | Mode::LoopEditor => editor && actor,
                _ => true,
            });
            if !any {
                console.say("no adapter is on: loop-untrained, loop-actor and loop-editor are the loop itself");
            }
        }
        if modes.is_empty() {
            modes.push(Mode::Loop);
        }
        modes.sort();
        modes.dedup();
        let rivals = modes.iter().any(|mode| mode.is_rival());
        if args.editor != EditorKind::Reference && rivals && modes.iter().any(|mode| mode.edits()) {
            tracing::warn!(
                "with this --editor an edit takes more network evaluations than a drawing: best-of-n and rewrite cost less \
                 than the loop in as many rounds"
            );
        }
        Ok(modes)
    }

    /// The rounds of the loop's rivals at its cost: a step takes two evaluations with guidance by the prompt, and three with that
    /// by the picture. An edit that is not by reference counts as a drawing.
    fn rival_rounds(&self) -> usize {
        let Painting { editing, guidance, edit_guidance, .. } = &self.painting;
        let (drawing, by_text, by_image) = (*guidance > 1.0, edit_guidance.text > 1.0, edit_guidance.image != 1.0);
        let edit = if by_image { 3.0 } else { 1.0 + f64::from(u8::from(by_text)) };
        let by_reference = *editing == Editing::Reference && !self.klein.distilled;
        let relative = if by_reference { edit / (1.0 + f64::from(u8::from(drawing))) } else { 1.0 };
        modes::rival_rounds(&self.options, relative)
    }

    /// All that the results depend on.
    fn config(&self, args: &EvalRun, modes: &[Mode], files: &[DataFile]) -> Value {
        let Options { rounds, draws, redraw, accept, .. } = self.options;
        let mut config = json!({
            // Another version may choose and measure otherwise.
            "rlrig": env!("CARGO_PKG_VERSION"),
            "dataset": match args.dataset { Dataset::Tabletop => "tabletop", Dataset::LaionSg => "laion-sg" },
            "data": files, "split": args.split, "limit": args.limit, "subset_seed": args.subset_seed,
            "objects": args.objects, "min_relations": args.min_relations, "relation": args.relation,
            "spatial_only": args.spatial_only,
            "shard": args.shard, "wording": wording(args),
            "mode": modes, "seed": args.seed, "rounds": rounds, "draws": draws, "redraw": redraw, "accept": accept,
            "only": only(args), "oracle": args.oracle, "graph": if lists(args) { "listed" } else { "confirmed" },
        });
        if modes.iter().any(|mode| mode.is_rival()) {
            config["rival_rounds"] = self.rival_rounds().into();
        }
        if let (Some(config), Some(told)) = (config.as_object_mut(), self.told.as_object()) {
            config.extend(told.clone());
        }
        config
    }

    /// Plays one mode with one seed over the samples that are not made yet.
    fn play(
        &self,
        args: &EvalRun,
        (mode, seed): (Mode, u64),
        samples: &Samples,
        kept: &mut Kept,
        console: &Console,
        stop: &'static AtomicBool,
    ) -> Result<()> {
        let done = match kept {
            Kept::Folder(folder) => folder.done(),
            Kept::Memory(_) => HashSet::new(),
        };
        let key = |sample: &Sample| Key { mode, seed, split: sample.split.clone(), id: sample.id.clone() };
        // What cannot be read is left to fail.
        let is_left = |sample: &Result<Sample>| sample.as_ref().map_or(true, |sample| !done.contains(&key(sample)));
        let on = mode.adapters();
        let Adapted { diffuser, editor } = self.adapted.clone();
        let adapted = Adapted { diffuser: diffuser.filter(|_| on.diffuser), editor: editor.filter(|_| on.editor) };
        let painter =
            Painter::new(self.klein.clone(), self.painting.clone(), console.watch(stop)).with_adapted(adapted);
        let critic = self.bare_critic.as_ref().filter(|_| !on.actor).unwrap_or(&self.critic);
        let plays = |role: OracleRole| args.oracle.contains(&role);
        let advised = Advised {
            checker: (!plays(OracleRole::Checker)).then_some(critic),
            actor: critic,
            oracle_acts: plays(OracleRole::Actor),
        };
        let play = Play {
            mode,
            painter: &painter,
            critic: &advised,
            judge: self.judge.as_ref().map(|judge| judge as _),
            lister: lists(args).then(|| self.judge.as_ref().unwrap_or(critic) as _),
            evaluations: &|| self.klein.evaluations(),
            cancelled: &|| stop.load(Ordering::Relaxed),
            options: self.options,
            rival_rounds: self.rival_rounds(),
            seed,
            only: only(args),
        };
        // What is done is of these samples: a run goes on with the configuration it was begun with.
        let made_before = done.iter().filter(|key| (key.mode, key.seed) == (mode, seed)).count();
        let (mut made, all) = (made_before, samples.len());
        play.run(samples.iter().filter(is_left), &mut |lines, pictures| {
            match kept {
                Kept::Folder(folder) => folder.keep(lines, &pictures)?,
                Kept::Memory(all) => all.extend(lines),
            }
            made += 1;
            if made.is_multiple_of(50) {
                console.say(&format!("{}: {made} of {all}", mode.name()));
            }
            Ok(())
        })?;
        if stop.load(Ordering::Relaxed) {
            let hint = args
                .out
                .as_deref()
                .map_or(String::new(), |out: &Path| format!("; go on with --out {} --resume", out.display()));
            bail!("interrupted after {made} of {all} prompts of {}{hint}", mode.name());
        }
        Ok(())
    }
}

/// Whether pictures are held to show nothing else. A prompt of the tabletop world tells all of its scene.
fn only(args: &EvalRun) -> bool {
    args.only.only.unwrap_or(args.dataset == Dataset::Tabletop)
}

/// Whether the judge lists what pictures show.
fn lists(args: &EvalRun) -> bool {
    match args.graph {
        Some(graph) => graph == cli::PictureGraph::Listed,
        None => args.dataset == Dataset::LaionSg,
    }
}
