//! Pictures of a run of `rlrig eval`: drawn and edited, right and wrong, and read by the pixel oracle. The Checker and the
//! Actor meet such pictures in use, and renders alone do not prepare them for a shape that is not quite one. Those of `rlrig
//! world redraw` are such, too, and what they should show is known to the pixel: an Editor learns from them to mend.
//!
//! There are few of them, and they are learned by heart, unless they are shown a little otherwise each time
//! ([`Drawn::varied`]): since the oracle reads any picture, what is taught stays true.

use crate::{
    io,
    scene::{
        graph::{Relation, SceneGraph},
        parse::parse,
        relation::Spatial,
        tabletop::{
            caption::{Style, caption},
            oracle::{self, Reading},
            sample,
            split::Split,
            world::{SIDE, Scene},
        },
    },
    tensor::rng::Stream,
    usage,
    vlm::image::moved,
};
use anyhow::{Context, Result, bail};
use image::{RgbImage, imageops::flip_horizontal_in_place};
use rayon::prelude::*;
use serde::Deserialize;
use std::path::{Path, PathBuf};

/// Bytes of a `samples.jsonl` at most.
const LONGEST: u64 = 8 << 30;

/// What is read of a line of `samples.jsonl`.
#[derive(Deserialize)]
struct Line {
    id: String,
    dataset: String,
    prompt: String,
    file: String,
    #[serde(default)]
    scene: Option<Scene>,
}

pub struct Drawn {
    pub picture: RgbImage,
    pub prompt: String,
    pub graph: SceneGraph,
    pub reading: Reading,
    /// What it should show, and where, if it was drawn over a render of that (`rlrig world redraw`).
    pub scene: Option<Scene>,
}

/// Pixels by which a picture is moved at most, along either side.
const MOVED: usize = 6;
/// How often a picture is mirrored: the light then comes from the wrong side.
const MIRRORED: f64 = 0.3;

impl Drawn {
    /// The picture moved a little and at times mirrored, with a prompt that says the same of it, read anew. It is not mirrored
    /// where the prompt would then name what training never names.
    pub fn varied(&self, rng: &mut Stream) -> Self {
        let mut offset = || rng.below(2 * MOVED + 1) as i64 - MOVED as i64;
        let mut picture = moved(&self.picture, [offset(), offset()]);
        let (mut prompt, mut graph) = (self.prompt.clone(), self.graph.clone());
        let mut mirrored = graph.clone();
        mirrored.relations.iter_mut().for_each(mirror);
        if rng.chance(MIRRORED) && sample::admissible(Split::Train, &mirrored) {
            flip_horizontal_in_place(&mut picture);
            prompt = caption(rng, &mirrored, Style::Natural);
            graph = mirrored;
        }
        let reading = oracle::read(&picture);
        Self { picture, prompt, graph, reading, scene: None }
    }
}

fn mirror(relation: &mut Relation) {
    let sides = [Spatial::LeftOf, Spatial::RightOf];
    if let Some(spatial) = Spatial::from_name(&relation.predicate).filter(|spatial| sides.contains(spatial)) {
        relation.predicate = spatial.inverse().unwrap_or(spatial).name().to_owned();
    }
}

/// The pictures of runs on the tabletop world, in the order of their lines: those to learn from, and those of every tenth
/// prompt, which are held out.
pub fn open(runs: &[PathBuf]) -> Result<(Vec<Drawn>, Vec<Drawn>)> {
    let (mut learned, mut held_out) = (Vec::new(), Vec::new());
    for run in runs {
        for (is_held_out, drawn) in pictures(run)? {
            if is_held_out { &mut held_out } else { &mut learned }.push(drawn);
        }
    }
    Ok((learned, held_out))
}

/// Those of one run, and whether each is held out.
fn pictures(path: &Path) -> Result<Vec<(bool, Drawn)>> {
    let file = path.join("samples.jsonl");
    let text = io::read_file(&file, LONGEST)?;
    let lines = serde_json::Deserializer::from_slice(&text).into_iter::<Line>().collect::<Result<Vec<Line>, _>>();
    let lines = lines.with_context(|| format!("{} is damaged", file.display()))?;
    if lines.is_empty() || lines.iter().any(|line| line.dataset != "tabletop") {
        usage!("{} is no run of rlrig eval on the tabletop world with pictures in it", path.display());
    }
    let mut ids: Vec<&str> = lines.iter().map(|line| line.id.as_str()).collect();
    ids.sort_unstable();
    ids.dedup();
    lines
        .par_iter()
        .map(|line| {
            let file = path.join(&line.file);
            let picture = io::png::read(&file)?;
            if picture.dimensions() != (SIDE, SIDE) {
                bail!(
                    "{} is {} x {} pixels; those of the tabletop world are {SIDE} x {SIDE}",
                    file.display(),
                    picture.width(),
                    picture.height()
                );
            }
            let graph = parse(&line.prompt).map_err(|error| anyhow::anyhow!("{}: {error}", line.prompt))?;
            let held_out = ids.binary_search(&line.id.as_str()).is_ok_and(|place| place % 10 == 9);
            let reading = oracle::read(&picture);
            Ok((held_out, Drawn { picture, prompt: line.prompt.clone(), graph, reading, scene: line.scene.clone() }))
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::scene::tabletop::{render::render, tasks};
    use std::fs;

    #[test]
    fn a_varied_picture_shows_what_its_prompt_says_as_well_as_before() {
        let (mut mirrored, mut alike) = (0, 0);
        for i in 0..40 {
            let sample = tasks::text_to_image(0, Split::Train, i, 2, 3);
            let picture = render(&sample.scene);
            let reading = oracle::read(&picture);
            let drawn = Drawn { picture, prompt: sample.prompt, graph: sample.graph, reading, scene: None };
            let varied = drawn.varied(&mut Stream::new(0, "varied", i));
            assert_eq!(parse(&varied.prompt).unwrap().canonical(), varied.graph.canonical());
            assert!(sample::admissible(Split::Train, &varied.graph));
            mirrored += usize::from(varied.graph != drawn.graph);
            alike += usize::from(varied.reading.judge(&varied.graph) == drawn.reading.judge(&drawn.graph));
        }
        // Where nothing is left or right of another thing, the graph stays.
        assert!((4..20).contains(&mirrored), "{mirrored}");
        assert!(alike >= 38, "{alike}");
    }

    #[test]
    fn every_tenth_prompt_is_held_out_and_what_is_wrong_is_said() {
        let dir = tempfile::tempdir().unwrap();
        let error = |text: &str| {
            fs::write(dir.path().join("samples.jsonl"), text).unwrap();
            format!("{:#}", open(&[dir.path().to_owned()]).err().unwrap())
        };
        let mut text = String::new();
        for i in 0..20 {
            let sample = tasks::text_to_image(0, Split::Train, i, 1, 3);
            render(&sample.scene).save(dir.path().join(format!("{i}.png"))).unwrap();
            let line = serde_json::json!({
                "id": format!("train-{i:02}"), "dataset": "tabletop", "prompt": sample.prompt, "file": format!("{i}.png"),
                "seed": 0,
            });
            text += &format!("{line}\n");
        }
        fs::write(dir.path().join("samples.jsonl"), &text).unwrap();
        let run = dir.path().to_owned();
        assert!(matches!(open(&[]), Ok((learned, held_out)) if learned.is_empty() && held_out.is_empty()));
        let (learned, held_out) = open(&[run.clone(), run]).unwrap();
        assert_eq!((learned.len(), held_out.len()), (36, 4));
        let sample = tasks::text_to_image(0, Split::Train, 9, 1, 3);
        assert_eq!((&held_out[0].prompt, &held_out[0].graph), (&sample.prompt, &sample.graph.canonical()));
        assert_eq!(held_out[0].reading.view.objects.len(), sample.scene.items.len());

        assert!(error("").contains("no run of rlrig eval"));
        assert!(error(&text.replace("tabletop", "laion-sg")).contains("no run of rlrig eval"));
        assert!(error(&text[..text.len() - 5]).contains("samples.jsonl is damaged"));
        assert!(error(&text.replace("\"3.png", "\"none.png")).contains("none.png"));
        RgbImage::new(40, 30).save(dir.path().join("3.png")).unwrap();
        assert!(error(&text).contains("40 x 30"));
        RgbImage::new(20_000, 1).save(dir.path().join("3.png")).unwrap();
        assert!(error(&text).contains("3.png is no whole picture"), "it is not even read");
    }
}
