//! `rlrig world redraw`: renders, noised and drawn on from there by the Diffuser. It spoils them as it spoils its own pictures,
//! most of all where two things touch, while what they should show is known to the pixel.

use super::{adapters::Adapters, eval::split_of, interrupt, open, print, show::Console, world::write_picture};
use crate::{
    cli::{EditorKind, Sampling, WorldRedraw},
    error::Cancelled,
    flow::{Options, Over},
    io::expect_empty,
    models::{built_in, pixels::to_tensor},
    scene::tabletop::{
        render::render,
        tasks::{TextToImage, to_redraw},
        world::SIDE,
    },
    usage,
};
use anyhow::{Context, Result, bail};
use image::RgbImage;
use serde_json::json;
use std::{fs, io::Write};

/// Noise levels, and steps down from each. Drawn on from these, 0.6, 0.4 and 0.35 of scenes in which two things touch are all
/// right; drawn from noise alone, 0.3.
const LEVELS: [(f64, usize); 3] = [(0.73, 6), (0.81, 8), (0.86, 10)];
/// Pictures that are drawn together, from one of the levels in turn.
const BATCH: usize = 16;

/// Writes `DIR/pictures/*.png` and `DIR/samples.jsonl`, whose lines begin as those of `rlrig eval` and have the scene besides.
pub fn run(args: &WorldRedraw) -> Result<()> {
    let split = split_of(&args.split)?;
    if args.count == 0 {
        usage!("--count is 1 or more, not 0");
    }
    expect_empty(&args.out, "name a new folder")?;
    let (device, dtype) = open::device(&args.models)?;
    let stop = interrupt()?;
    let console = Console::new(args.quiet, args.count);
    let mut adapters = Adapters::open(&args.models)?;
    let found = open::find_pipeline(&args.painter, args.quiet)?;
    let (klein, adapted) = open::pipeline(&found, (&device, dtype), &[built_in::DIFFUSER], &mut adapters)?;
    adapters.finish()?;
    let transformer = adapted.diffuser.as_deref().unwrap_or(&klein.transformer);
    let editing = (EditorKind::Reference, EditorKind::Reference.inversion(None)?);
    let painting = open::painting(&klein, &found, &Sampling::default(), editing, BATCH);
    let watch = console.watch(stop);
    let size = klein.tokens(SIDE, SIDE)?;
    let pictures = args.out.join("pictures");
    fs::create_dir_all(&pictures).with_context(|| format!("creating {}", pictures.display()))?;
    let lines = args.out.join("samples.jsonl");
    let mut file = fs::File::create(&lines).with_context(|| format!("creating {}", lines.display()))?;

    let mut scenes = (0..).filter_map(|index| Some((index, to_redraw(args.seed, split, index)?)));
    for (start, (level, steps)) in (0..args.count).step_by(BATCH).zip(LEVELS.into_iter().cycle()) {
        let batch: Vec<(u64, TextToImage)> = scenes.by_ref().take(BATCH.min(args.count - start)).collect();
        let renders: Vec<RgbImage> = batch.iter().map(|(_, sample)| render(&sample.scene)).collect();
        let latents = klein.autoencoder.latents(&to_tensor(&renders, &device)?)?.detach();
        let jobs: Vec<Over> = batch
            .iter()
            .enumerate()
            .map(|(row, (index, sample))| {
                let noise = klein.noise(args.seed, *index, size)?;
                Ok(Over { prompt: &sample.prompt, source: latents.get(row)?, noise })
            })
            .collect::<Result<_>>()?;
        let options = Options {
            steps,
            solver: painting.solver,
            guidance: painting.guidance.into(),
            batch: BATCH,
            watch: &*watch,
        };
        let drawn = match klein.draw_over(transformer, &jobs, level, &options) {
            Err(error) if error.is::<Cancelled>() => {
                bail!("interrupted; {} tells of {start} of {} pictures", lines.display(), args.count)
            }
            drawn => klein.decode(&drawn?)?,
        };
        for ((index, sample), picture) in batch.iter().zip(&drawn) {
            let name = format!("{index:06}.png");
            write_picture(&pictures, &name, picture)?;
            let line = json!({
                "id": format!("{}-{index:06}", split.name()), "dataset": "tabletop", "split": split.name(),
                "prompt": sample.prompt, "file": format!("pictures/{name}"), "level": level, "scene": sample.scene,
            });
            writeln!(file, "{line}").with_context(|| format!("cannot write {}", lines.display()))?;
        }
        console.say(&format!("{} of {}", start + batch.len(), args.count));
    }
    console.done();
    print(&lines.display().to_string())
}
