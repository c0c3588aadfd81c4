//! `rlrig eval`: the loop or single edits on held-out scenes, with a table in Markdown on stdout.

use super::{interrupt, open, output::Fresh, show::Console};
use crate::{
    cli::Eval,
    eval::{
        stats::Share,
        tabletop::{EditResults, LoopResults, edits, questions},
    },
    rig::{
        cycle::{self, Cast, Event, Job},
        klein::Painter,
        roles::{Edit, Editor, Picture, Target, expect_each},
    },
    scene::tabletop::{render::render, split::Split},
    usage,
};
use anyhow::{Result, bail};
use candle_core::{DType, Device};
use serde_json::json;
use std::{
    sync::atomic::{AtomicBool, Ordering},
    time::Instant,
};

pub fn run(args: &Eval) -> Result<()> {
    open::check_sampling(&args.sampling)?;
    open::check_accept(args.accept)?;
    let Some(split) = Split::from_name(&args.split) else {
        let known: Vec<&str> = Split::ALL.iter().map(|s| s.name()).collect();
        usage!("unknown split \"{}\"; known are {}", args.split, known.join(", "));
    };
    if args.count == 0 || !(1..=100).contains(&args.rounds) || !(1..=4096).contains(&args.batch) {
        usage!("--count is 1 or more, --rounds 1 to 100, --batch 1 to 4096");
    }
    let out = args.out.as_deref().map(Fresh::new).transpose()?;
    let (device, dtype) = open::device(&args.models)?;
    let stop = interrupt()?;
    let console = Console::new(args.print.quiet, args.count);
    let mut adapters = open::Adapters::open(&args.models)?;
    let found = open::find_pipeline(&args.models)?;
    let klein = open::pipeline(&found, (&device, dtype), &mut adapters)?;
    let painting = open::painting(&klein, &found, &args.sampling, (args.editor, args.inversion), args.batch);
    let settings = json!({
        "split": split.name(), "count": args.count, "seed": args.seed, "objects": args.objects, "rounds": args.rounds,
        "accept": args.accept, "steps": painting.steps, "guidance": painting.guidance,
        "editor": format!("{:?}", painting.editing), "model": found.source, "dtype": open::dtype_name(dtype),
        "rlrig": env!("CARGO_PKG_VERSION"),
    });
    let painter = Painter::new(klein.clone(), painting, console.watch(stop));
    let start = Instant::now();
    let (results, samples) = if args.edits {
        adapters.finish()?;
        single_edits(args, split, &painter, stop, &console)?
    } else {
        the_loop(args, split, &painter, (&device, dtype), adapters, stop, &console)?
    };
    console.done();
    let document = json!({
        "settings": settings, "results": results, "seconds": start.elapsed().as_secs_f64(),
        "evaluations": klein.evaluations(),
    });
    if let Some(out) = out {
        out.write("results.json", &serde_json::to_string_pretty(&document)?)?;
        out.write("samples.jsonl", &samples)?;
    }
    if args.print.json {
        console.result(&document.to_string())?;
    }
    Ok(())
}

/// The loop's results and a line for each prompt.
fn the_loop(
    args: &Eval,
    split: Split,
    painter: &Painter,
    (device, dtype): (&Device, DType),
    mut adapters: open::Adapters,
    stop: &'static AtomicBool,
    console: &Console,
) -> Result<(serde_json::Value, String)> {
    let found = open::find_vlm(&args.models)?;
    let critic = open::critic(&found, (device, dtype), &mut adapters)?;
    adapters.finish()?;
    let questions = questions(split, args.seed, args.count, args.objects);
    let jobs: Vec<Job> = questions.iter().map(|q| q.job.clone()).collect();
    let cast = Cast { diffuser: painter, checker: &critic, actor: &critic, editor: painter };
    let options = cycle::Options { rounds: args.rounds, accept: args.accept, width: args.batch };
    let (mut results, mut samples) = (LoopResults::new(args.rounds), Vec::new());
    cycle::run(cast, &jobs, &options, &|| stop.load(Ordering::Relaxed), &mut |event| {
        if let Event::Finished { job, outcome } = event {
            samples.push((job, serde_json::to_string(&results.count(&questions[job], outcome)?)?));
            if samples.len().is_multiple_of(50) {
                console.say(&format!("{} of {}", samples.len(), jobs.len()));
            }
        }
        Ok(())
    })?;
    if stop.load(Ordering::Relaxed) {
        bail!("interrupted after {} of {} prompts", samples.len(), jobs.len());
    }
    if !args.print.json {
        console.result("| after round | objects | shape and colour | relations | no others | all right |")?;
        console.result("|---|---|---|---|---|---|")?;
        for (i, shown) in results.by_round.iter().enumerate() {
            let cells = [shown.objects, shown.shapes_and_colours, shown.relations, shown.no_extra, shown.perfect];
            console.result(&format!("| {} | {} |", i + 1, cells.map(cell).join(" | ")))?;
        }
        console.result(&format!(
            "\nChecker right: {} of all answers, {} on edited pictures; calibration error {:.3}. Accepted: {}, {:.2} rounds.",
            cell(results.checker),
            cell(results.checker_on_edits),
            results.checker_calibration_error,
            cell(results.accepted),
            results.mean_rounds
        ))?;
    }
    samples.sort_by_key(|(job, _)| *job);
    let lines = samples.into_iter().map(|(_, line)| line + "\n").collect();
    let mut value = serde_json::to_value(&results)?;
    value["vlm"] = serde_json::to_value(&found.source)?;
    Ok((value, lines))
}

/// Results of single edits of renders, and a line for each.
fn single_edits(
    args: &Eval,
    split: Split,
    painter: &Painter,
    stop: &'static AtomicBool,
    console: &Console,
) -> Result<(serde_json::Value, String)> {
    let samples = edits(split, args.seed, args.count, args.objects);
    let (mut results, mut lines) = (EditResults::default(), String::new());
    for (start, batch) in (0..).step_by(args.batch).zip(samples.chunks(args.batch)) {
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
                seed: args.seed.wrapping_add(start as u64 + i),
                round: 1,
            })
            .collect();
        let edited = match painter.edit(&jobs) {
            Err(_) if stop.load(Ordering::Relaxed) => bail!("interrupted after {start} of {} edits", samples.len()),
            edited => expect_each("the Editor", jobs.len(), edited?)?,
        };
        Picture::develop(&edited.iter().collect::<Vec<_>>())?;
        for (sample, picture) in batch.iter().zip(&edited) {
            lines += &(serde_json::to_string(&results.count(sample, picture.pixels()?))? + "\n");
        }
        console.say(&format!("{} of {}", start + batch.len(), samples.len()));
    }
    if !args.print.json {
        console.result("| edit | n | done | others kept | both |")?;
        console.result("|---|---|---|---|---|")?;
        for (name, edited) in results.rows() {
            let cells = [edited.done, edited.kept, edited.success];
            console.result(&format!("| {name} | {} | {} |", edited.done.all, cells.map(cell).join(" | ")))?;
        }
    }
    Ok((serde_json::to_value(&results)?, lines))
}

/// A share in percent with its 95% interval.
fn cell(share: Share) -> String {
    let (low, high) = share.interval();
    format!("{:.1} ({:.1} to {:.1})", 100.0 * share.value(), 100.0 * low, 100.0 * high)
}
