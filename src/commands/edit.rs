//! `rlrig edit`: one edit of one picture.

use super::{
    adapters::Adapters,
    fresh_seed,
    generate::flag,
    interrupt, open,
    output::{Output, is_png},
    show::Console,
};
use crate::{
    cli::{Edit, EditorKind},
    error::Cancelled,
    io::png,
    models::built_in,
    rig::{
        klein::Painter,
        roles::{self, Editor, Picture, Target},
        trajectory::Parameters,
    },
    scene::{parse::MAX_CHARS, tabletop::edit::Edit as Instruction},
    usage,
};
use anyhow::{Result, bail};
use image::{
    RgbImage,
    imageops::{self, FilterType},
};
use serde_json::json;

pub fn run(args: &Edit) -> Result<()> {
    open::check_sampling(&args.sampling)?;
    let instruction = args.instruction.trim();
    match instruction.chars().count() {
        0 => usage!("the instruction is empty"),
        n if n > MAX_CHARS => usage!("the instruction has {n} characters; at most {MAX_CHARS} are read"),
        _ => {}
    }
    let inversion = args.editor.inversion(args.inversion)?;
    if !is_png(&args.out) {
        usage!("--out {}: name one .png file", args.out.display());
    }
    let seed = args.seed.unwrap_or_else(fresh_seed);
    let mut picture = png::read(&args.image)?;
    let output = Output::new(Some(&args.out), &[seed], args.force, !args.no_metadata)?;
    let (device, dtype) = open::device(&args.models)?;
    let found = open::find_pipeline(&args.painter, args.print.quiet)?;
    let stop = interrupt()?;
    let console = Console::new(args.print.quiet, 1);
    let mut adapters = Adapters::open(&args.models)?;
    let mut words = instruction.to_owned();
    if found.is_built_in() && args.editor == EditorKind::Reference {
        // It knows few words, and carries out best what is said in the plainest.
        match Instruction::parse(instruction) {
            Ok(read) => words = read.plain(),
            Err(error) => {
                console
                    .say(&format!("the built-in Editor has learned no such instruction, and may do anything: {error}"));
            }
        }
    }
    let carried_out_as = (words != instruction).then_some(&words);
    if let Some(words) = carried_out_as {
        console.say(&format!("carried out as \"{words}\""));
    }
    let roles = open::adapted(&[built_in::EDITOR], args.editor);
    let (klein, adapted) = open::pipeline(&found, (&device, dtype), &roles, &mut adapters)?;
    adapters.finish()?;
    let painting = open::painting(&klein, &found, &args.sampling, (args.editor, inversion), 1);
    let (steps, solver) = (painting.steps, painting.solver);
    let by_reference = args.editor == EditorKind::Reference;
    let guidance = if by_reference { painting.edit_guidance } else { painting.guidance.into() };
    let side = klein.default_size();
    let scaled_from = Some(picture.dimensions()).filter(|given| found.is_built_in() && *given != side);
    if let Some((from_w, from_h)) = scaled_from {
        let (w, h) = side;
        console.say(&format!(
            "the built-in Editor knows pictures of {w}x{h} pixels alone: this one of {from_w}x{from_h} is scaled to that, and \
             cut where it is longer"
        ));
        picture = fitted(&picture, side);
    }
    let given = picture.dimensions();
    let picture = Picture::from_pixels(picture);
    let painter = Painter::new(klein, painting, console.watch(stop)).with_adapted(adapted);

    if args.seed.is_none() {
        console.say(&format!("seed {seed}"));
    }
    // The methods by noise know no instruction: they draw what the words describe.
    let target = Target::words_alone(instruction);
    let job = roles::Edit { target: &target, picture: &picture, verdicts: &[], instruction: &words, seed, round: 1 };
    let edited = match painter.edit(&[job]) {
        Err(error) if error.is::<Cancelled>() => bail!("interrupted; nothing was written"),
        edited => roles::expect_each("the Editor", 1, edited?)?,
    };
    let recipe = json!({
        "version": 1,
        "rlrig": env!("CARGO_PKG_VERSION"),
        "edit": {
            "instruction": instruction,
            "carried_out_as": carried_out_as,
            "image": args.image.file_name().and_then(|n| n.to_str()),
            "scaled_from": scaled_from,
            "seed": seed,
            "steps": steps,
            "solver": solver,
            "guidance": guidance.text,
            "image_guidance": by_reference.then_some(guidance.image),
            "editor": flag(args.editor),
            "inversion": (args.editor == EditorKind::Inversion).then(|| flag(inversion)),
            "model": found.source,
            "adapters": adapters.told(),
            "dtype": open::dtype_name(dtype),
        },
    });
    let pixels = edited[0].pixels()?;
    let (size, model) = (pixels.dimensions(), &found.source.name);
    if size != given {
        let ((w, h), (from_w, from_h)) = (size, given);
        let why = "pictures are cut to whole tokens, large ones scaled down first";
        console.say(&format!("the edited picture has {w}x{h} pixels, the given one {from_w}x{from_h}: {why}"));
    }
    let parameters =
        Parameters { prompt: instruction, steps, solver, guidance: guidance.text, seed, size, model, rounds: None };
    let file = output.write_with(0, pixels, &parameters, &recipe.to_string())?;
    console.done();
    if args.print.json {
        let told = json!({ "file": file, "seed": seed, "instruction": instruction, "carried_out_as": carried_out_as });
        console.result(&told.to_string())?;
    } else {
        console.result(&file.display().to_string())?;
    }
    Ok(())
}

/// A picture scaled to a size, the middle of it if it is of another shape.
fn fitted(picture: &RgbImage, (w, h): (u32, u32)) -> RgbImage {
    let (from_w, from_h) = picture.dimensions();
    // Cut first: of one that is very long most goes.
    let most = |a: u32, b: u32, of: u32| (u64::from(of) * u64::from(a) / u64::from(b)).max(1) as u32;
    let (cut_w, cut_h) = (from_w.min(most(w, h, from_h)), from_h.min(most(h, w, from_w)));
    let (x, y) = ((from_w - cut_w) / 2, (from_h - cut_h) / 2);
    imageops::resize(&*imageops::crop_imm(picture, x, y, cut_w, cut_h), w, h, FilterType::Triangle)
}
