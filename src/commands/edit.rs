//! `rlrig edit`: one edit of one picture.

use super::{adapters::Adapters, fresh_seed, interrupt, open, output::Output, show::Console};
use crate::{
    cli::{Edit, EditorKind},
    io::png,
    rig::{
        klein::Painter,
        roles::{self, Editor, Picture, Target},
    },
    usage,
};
use anyhow::{Result, bail};
use clap::ValueEnum;
use serde_json::json;
use std::sync::atomic::Ordering;

pub fn run(args: &Edit) -> Result<()> {
    open::check_sampling(&args.sampling)?;
    let instruction = args.instruction.trim();
    match instruction.chars().count() {
        0 => usage!("the instruction is empty"),
        n if n > 4000 => usage!("the instruction has {n} characters; at most 4000 are read"),
        _ => {}
    }
    let seed = args.seed.unwrap_or_else(fresh_seed);
    let picture = Picture::from_pixels(png::read(&args.image)?);
    let output = Output::new(Some(&args.out), &[seed], args.force, !args.no_metadata)?;
    let (device, dtype) = open::device(&args.models)?;
    let found = open::find_pipeline(&args.painter)?;
    let stop = interrupt()?;
    let console = Console::new(args.print.quiet, 1);
    let mut adapters = Adapters::open(&args.models)?;
    let (klein, editor) = open::pipeline(&found, (&device, dtype), &mut adapters)?;
    adapters.finish()?;
    let painting = open::painting(&klein, &found, &args.sampling, (args.editor, args.inversion), 1);
    let (steps, solver, guidance) = (painting.steps, painting.solver, painting.guidance);
    let painter = Painter::new(klein, painting, console.watch(stop)).with_editor(editor);

    if args.seed.is_none() {
        console.say(&format!("seed {seed}"));
    }
    // The methods by noise know no instruction: they draw what the words describe.
    let target = Target { prompt: instruction.to_owned(), claims: Vec::new() };
    let job = roles::Edit { target: &target, picture: &picture, verdicts: &[], instruction, seed, round: 1 };
    let edited = match painter.edit(&[job]) {
        Err(_) if stop.load(Ordering::Relaxed) => bail!("interrupted; nothing was written"),
        edited => roles::expect_each("the Editor", 1, edited?)?,
    };
    let recipe = json!({
        "version": 1,
        "rlrig": env!("CARGO_PKG_VERSION"),
        "edit": {
            "instruction": instruction,
            "image": args.image.file_name().and_then(|n| n.to_str()),
            "seed": seed,
            "steps": steps,
            "solver": solver,
            "guidance": guidance,
            "editor": args.editor.to_possible_value().map(|v| v.get_name().to_owned()),
            "inversion": (args.editor == EditorKind::Inversion)
                .then(|| args.inversion.to_possible_value().map(|v| v.get_name().to_owned())),
            "model": found.source,
            "adapters": adapters.told(),
            "dtype": open::dtype_name(dtype),
        },
    });
    let pixels = edited[0].pixels()?;
    let parameters = format!(
        "{instruction}\nSteps: {steps}, Sampler: {}, CFG scale: {guidance}, Seed: {seed}, Size: {}x{}, Version: rlrig {}",
        solver.name(),
        pixels.width(),
        pixels.height(),
        env!("CARGO_PKG_VERSION")
    );
    let file = output.write_with(0, pixels, &parameters, &recipe.to_string())?;
    console.done();
    if args.print.json {
        console.result(&json!({ "file": file, "seed": seed, "instruction": instruction }).to_string())?;
    } else {
        console.result(&file.display().to_string())?;
    }
    Ok(())
}
