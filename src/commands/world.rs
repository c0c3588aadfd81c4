//! `rlrig world`: the tabletop world as a data set, and its pixel oracle.

use crate::{
    cli::{World, WorldExport, WorldOracle},
    scene::{
        laion_sg::Record,
        tabletop::{render, split::Split, tasks},
    },
    usage,
};
use anyhow::{Context, Result};
use rayon::prelude::*;

pub fn run(command: &World) -> Result<()> {
    match command {
        World::Export(args) => export(args),
        World::Oracle(args) => oracle(args),
    }
}

/// Writes `DIR/images/*.png` and `DIR/SPLIT.json`, a list of LAION-SG records.
fn export(args: &WorldExport) -> Result<()> {
    let Some(split) = Split::from_name(&args.split) else {
        let known: Vec<&str> = Split::ALL.iter().map(|s| s.name()).collect();
        usage!("unknown split \"{}\"; known are {}", args.split, known.join(", "));
    };
    if args.out.is_dir() && std::fs::read_dir(&args.out).context("reading the output folder")?.next().is_some() {
        usage!("{} is not empty; name a new folder", args.out.display());
    }
    let images = args.out.join("images");
    std::fs::create_dir_all(&images).with_context(|| format!("creating {}", images.display()))?;
    let (fewest, most) = split.objects();
    let samples: Vec<(String, tasks::TextToImage)> = (0..args.count as u64)
        .into_par_iter()
        .map(|index| {
            let sample = tasks::text_to_image(args.seed, split, index, fewest, most);
            let name = format!("{index:06}.png");
            let path = images.join(&name);
            render::render(&sample.scene).save(&path).with_context(|| format!("writing {}", path.display()))?;
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
    std::fs::write(&list, text).with_context(|| format!("writing {}", list.display()))?;
    println!("{}", list.display());
    Ok(())
}

fn oracle(_args: &WorldOracle) -> Result<()> {
    anyhow::bail!("the oracle comes next")
}
