//! `rlrig world`: the tabletop world as a data set, and its pixel oracle.

use super::{eval::split_of, interrupt, print, redraw};
use crate::{
    cli::{World, WorldExport, WorldOracle},
    io::{expect_empty, png, write_file},
    scene::{
        laion_sg::Record,
        tabletop::{oracle, render, tasks},
    },
    usage,
};
use anyhow::{Context, Result, ensure};
use image::RgbImage;
use rayon::prelude::*;
use std::{path::Path, sync::atomic::Ordering};

pub fn run(command: &World) -> Result<()> {
    match command {
        World::Export(args) => export(args),
        World::Redraw(args) => redraw::run(args),
        World::Oracle(args) => oracle(args),
    }
}

/// Writes `DIR/images/*.png` and `DIR/SPLIT.json`, a list of LAION-SG records.
fn export(args: &WorldExport) -> Result<()> {
    let split = split_of(&args.split)?;
    if args.count == 0 {
        usage!("--count is 1 or more, not 0");
    }
    expect_empty(&args.out, "name a new folder")?;
    let images = args.out.join("images");
    std::fs::create_dir_all(&images).with_context(|| format!("creating {}", images.display()))?;
    let stop = interrupt()?;
    let (fewest, most) = split.objects();
    let samples: Vec<(String, tasks::TextToImage)> = (0..args.count as u64)
        .into_par_iter()
        .map(|index| {
            ensure!(!stop.load(Ordering::Relaxed), "interrupted; {} holds a part of the pictures", images.display());
            let sample = tasks::text_to_image(args.seed, split, index, fewest, most);
            let name = format!("{index:06}.png");
            write_picture(&images, &name, &render::render(&sample.scene))?;
            Ok((name, sample))
        })
        .collect::<Result<_>>()?;
    let (mut items, mut relations) = (0, 0);
    let record = |(i, (name, sample)): (usize, &(String, tasks::TextToImage))| {
        Record::new(&i.to_string(), name, &sample.prompt, &sample.graph, &mut items, &mut relations)
    };
    let records: Vec<Record> = samples.iter().enumerate().map(record).collect();
    let list = args.out.join(format!("{}.json", split.name()));
    let text = serde_json::to_string_pretty(&records)?;
    write_file(&list, text.as_bytes(), true)?;
    print(&list.display().to_string())
}

/// Writes one of many pictures: too many to sync each, but none has its name before it is whole.
pub(super) fn write_picture(folder: &Path, name: &str, picture: &RgbImage) -> Result<()> {
    let (path, partial) = (folder.join(name), folder.join(format!(".{name}")));
    std::fs::write(&partial, png::encode(picture, &[])?)
        .and_then(|()| std::fs::rename(&partial, &path))
        .inspect_err(|_| {
            // There may be nothing to remove; what went wrong is the first error.
            let _ = std::fs::remove_file(&partial);
        })
        .with_context(|| format!("cannot write {}", path.display()))
}

/// Prints what the oracle reads: as JSON, or as sentences.
fn oracle(args: &WorldOracle) -> Result<()> {
    let reading = oracle::read(&png::read(&args.image)?);
    let graph = reading.view.graph();
    if args.json {
        let objects = reading.view.objects.iter().zip(&reading.fit);
        let objects: Vec<serde_json::Value> = objects
            .map(|(o, fit)| {
                serde_json::json!({
                    "label": o.shape, "colour": o.colour, "size": o.size, "box": o.bounds, "fit": fit,
                })
            })
            .collect();
        let document = serde_json::json!({
            "objects": objects, "relations": graph.relations, "triples": graph.triples(), "unclear": reading.unclear,
        });
        return print(&serde_json::to_string_pretty(&document)?);
    }
    for (o, fit) in reading.view.objects.iter().zip(&reading.fit) {
        let (x, y) = o.bounds.centre();
        print(&format!("{} at ({x:.0}, {y:.0}), fit {:.0}%", o.object().phrase(), 100.0 * fit))?;
    }
    for triple in graph.triples() {
        print(&triple)?;
    }
    if reading.unclear > 0 {
        print(&format!("and {} patches of colour that are no known shape", reading.unclear))?;
    }
    Ok(())
}
