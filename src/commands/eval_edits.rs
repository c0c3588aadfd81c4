//! `rlrig eval --edits`: single edits of the tabletop world's renders, with a table in Markdown on stdout.

use super::{adapters::Adapters, eval::split_of, interrupt, open, output::Fresh, show::Console};
use crate::{
    cli::EvalRun,
    error::Cancelled,
    eval::{
        dataset, play,
        single_edits::{EditResults, edits},
        stats::Share,
    },
    models::built_in,
    rig::{
        klein::Painter,
        roles::{Edit, Editor, Picture, Target, expect_each},
    },
    scene::tabletop::{render::render, tasks::EditSample},
    usage,
};
use anyhow::{Result, bail};
use serde_json::json;
use std::time::Instant;

pub fn run(args: &EvalRun) -> Result<()> {
    let [name] = args.split.as_slice() else { usage!("--edits takes one --split") };
    let [seed] = args.seed.as_slice() else { usage!("--edits takes one --seed") };
    let split = split_of(name)?;
    let (subset_seed, limit) = (args.subset_seed.unwrap_or(0), args.limit.unwrap_or(dataset::LIMIT));
    let out = args.out.as_deref().map(Fresh::new).transpose()?;
    let editing = (args.editor, args.editor.inversion(args.inversion)?);
    let (device, dtype) = open::device(&args.models)?;
    let stop = interrupt()?;
    let console = Console::new(args.print.quiet, limit);
    let mut adapters = Adapters::open(&args.models)?;
    let found = open::find_pipeline(&args.painter, args.print.quiet)?;
    let roles = open::adapted(&[built_in::EDITOR], args.editor);
    let (klein, adapted) = open::pipeline(&found, (&device, dtype), &roles, &mut adapters)?;
    adapters.finish()?;
    let painting = open::painting(&klein, &found, &args.sampling, editing, args.batch);
    let settings = json!({
        "split": split.name(), "subset_seed": subset_seed, "limit": limit, "seed": seed, "objects": args.objects,
        "steps": painting.steps, "solver": painting.solver, "guidance": painting.guidance, "edit_guidance": painting.edit_guidance,
        "editor": format!("{:?}", painting.editing),
        "model": found.source, "adapter": adapters.told(), "dtype": open::dtype_name(dtype),
        "rlrig": env!("CARGO_PKG_VERSION"),
    });
    let painter = Painter::new(klein.clone(), painting, console.watch(stop)).with_adapted(adapted);
    let start = Instant::now();
    let samples = edits(split, subset_seed, limit, args.objects);
    let (results, lines) = edit_all(&samples, *seed, args.batch, &painter, &console)?;
    console.done();
    let document = json!({
        "settings": settings, "results": results, "seconds": start.elapsed().as_secs_f64(),
        "evaluations": klein.evaluations(),
    });
    if let Some(out) = out {
        out.write("edits", &document, &lines)?;
    }
    if args.print.json {
        console.result(&document.to_string())?;
        return Ok(());
    }
    console.result("| edit | n | done | others kept | both |")?;
    console.result("|---|---|---|---|---|")?;
    for (name, edited) in results.rows() {
        let cells = [edited.done, edited.kept, edited.success];
        console.result(&format!("| {name} | {} | {} |", edited.done.all, cells.map(Share::cell).join(" | ")))?;
    }
    Ok(())
}

/// Results of single edits of renders with noise of `seed`, and a line for each.
fn edit_all(
    samples: &[EditSample],
    seed: u64,
    batch: usize,
    painter: &Painter,
    console: &Console,
) -> Result<(EditResults, String)> {
    let (mut results, mut lines) = (EditResults::default(), String::new());
    for (start, batch) in (0..).step_by(batch).zip(samples.chunks(batch)) {
        let sources: Vec<(Picture, Target)> = batch
            .iter()
            .map(|sample| {
                // The methods by noise draw what the target shows.
                let target = Target::new(sample.after.triple_text(), &sample.after);
                (Picture::from_pixels(render(&sample.source)), target)
            })
            .collect();
        let jobs: Vec<Edit> = (0u64..)
            .zip(batch.iter().zip(&sources))
            .map(|(i, (sample, (picture, target)))| Edit {
                target,
                picture,
                verdicts: &[],
                instruction: &sample.instruction,
                seed: play::noise(seed, start as u64 + i),
                round: 1,
            })
            .collect();
        let edited = match painter.edit(&jobs) {
            Err(error) if error.is::<Cancelled>() => bail!("interrupted after {start} of {} edits", samples.len()),
            edited => expect_each("the Editor", jobs.len(), edited?)?,
        };
        Picture::develop(&edited.iter().collect::<Vec<_>>())?;
        for (sample, picture) in batch.iter().zip(&edited) {
            lines += &(serde_json::to_string(&results.count(sample, picture.pixels()?))? + "\n");
        }
        console.say(&format!("{} of {}", start + batch.len(), samples.len()));
    }
    Ok((results, lines))
}
