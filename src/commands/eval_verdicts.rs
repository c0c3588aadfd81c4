//! `rlrig eval --verdicts`: the Checker, the Actor and the reading of captions by themselves, with a table in Markdown
//! on stdout.

use super::{adapters::Adapters, eval::split_of, interrupt, open, output::Fresh, show::Console};
use crate::{
    cli::EvalRun,
    eval::{
        agreement::Agreement,
        dataset,
        single_verdicts::{Acted, Asked, Caption, Checked, VerdictLine, VerdictResults},
        table::markdown_cell,
    },
    models::built_in,
    rig::{
        roles::{Actor, Checker, Picture, Situation, expect_each},
        vlm_roles::Critic,
    },
    scene::{tabletop::render::render, unusual::named},
    usage,
};
use anyhow::{Result, bail};
use serde_json::json;
use std::{
    ops::Range,
    sync::atomic::{AtomicBool, Ordering},
    time::Instant,
};

pub fn run(args: &EvalRun) -> Result<()> {
    let [name] = args.split.as_slice() else { usage!("--verdicts takes one --split") };
    let asked = Asked { split: split_of(name)?, seed: args.subset_seed.unwrap_or(0), objects: args.objects };
    let limit = args.limit.unwrap_or(dataset::LIMIT);
    let out = args.out.as_deref().map(Fresh::new).transpose()?;
    let (device, dtype) = open::device(&args.models)?;
    let stop = interrupt()?;
    let console = Console::new(args.print.quiet, limit);
    let mut adapters = Adapters::open(&args.models)?;
    let found = open::find_vlm(&args.critic, args.print.quiet)?;
    let (critic, actor) = open::critic(&found, (&device, dtype), &mut adapters)?;
    adapters.finish()?;
    let critic = critic.with_looks(open::looks(args.cycle.looks, &found)).with_actor(actor);
    let settings = json!({
        "split": name, "subset_seed": asked.seed, "limit": limit, "objects": asked.objects, "looks": critic.looks,
        "calibration": critic.calibration, "vlm": found.source, "adapter": adapters.told(),
        "dtype": open::dtype_name(dtype), "rlrig": env!("CARGO_PKG_VERSION"),
    });
    let start = Instant::now();
    let is_built_in = built_in::are_named(args.critic.vlm.as_deref());
    let work = Work { asked, limit, batch: args.batch, critic: &critic, is_built_in, console: &console, stop };
    let mut results = VerdictResults::default();
    let lines = work.check(&mut results)? + &work.act(&mut results)? + &work.read(&mut results)?;
    console.done();
    let document =
        json!({ "settings": settings, "results": results.document(), "seconds": start.elapsed().as_secs_f64() });
    if let Some(out) = out {
        out.write("verdicts", &document, &lines)?;
    }
    if args.print.json {
        console.result(&document.to_string())?;
        return Ok(());
    }
    console.result("| answers | n | right | kappa | calibration error |")?;
    console.result("|---|---|---|---|---|")?;
    for (name, Agreement { accuracy, kappa, calibration_error, claims }) in results.verdicts() {
        let [right, error] = [accuracy, calibration_error].map(|e| markdown_cell(Some(&e.percent()), 1));
        let kappa = markdown_cell(kappa.as_ref(), 2);
        console.result(&format!("| verdicts: {name} | {claims} | {right} | {kappa} | {error} |"))?;
    }
    for (of, name, share) in results.shares() {
        console.result(&format!("| {of}: {name} | {} | {} | | |", share.all, share.cell()))?;
    }
    Ok(())
}

/// What is asked, and of whom.
struct Work<'a> {
    asked: Asked,
    limit: usize,
    batch: usize,
    critic: &'a Critic,
    is_built_in: bool,
    console: &'a Console,
    stop: &'static AtomicBool,
}

impl Work<'_> {
    /// Verdicts on pictures, and a line for each picture.
    fn check(&self, results: &mut VerdictResults) -> Result<String> {
        self.in_batches("pictures checked", &mut |indices| {
            let checked: Vec<Checked> = indices.map(|index| self.asked.check(index)).collect();
            let pictures: Vec<Picture> =
                checked.iter().map(|checked| Picture::from_pixels(render(&checked.sample.scene))).collect();
            let jobs: Vec<_> = pictures.iter().zip(checked.iter().map(|checked| &checked.target)).collect();
            let heard = expect_each("the Checker", jobs.len(), self.critic.check(&jobs)?)?;
            Ok(checked.iter().zip(&heard).map(|(checked, heard)| results.check(checked, heard)).collect())
        })
    }

    /// Edits of pictures that miss something, by the true verdicts on them, and a line for each.
    fn act(&self, results: &mut VerdictResults) -> Result<String> {
        self.in_batches("pictures reflected on", &mut |indices| {
            let acted: Vec<Acted> = indices.map(|index| self.asked.act(index)).collect();
            let pictures: Vec<Picture> =
                acted.iter().map(|acted| Picture::from_pixels(render(&acted.sample.scene))).collect();
            let situation = |(acted, picture)| {
                let Acted { target, truths, .. }: &Acted = acted;
                Situation { target, picture, verdicts: truths, earlier: &[], seed: 0, round: 1 }
            };
            let jobs: Vec<Situation> = acted.iter().zip(&pictures).map(situation).collect();
            let written = expect_each("the Actor", jobs.len(), self.critic.reflect(&jobs)?)?;
            Ok(acted.iter().zip(&written).map(|(acted, written)| results.act(acted, written)).collect())
        })
    }

    /// Scene graphs of captions, and a line for each. The built-in VLM is told what they name, as where a prompt is drawn.
    fn read(&self, results: &mut VerdictResults) -> Result<String> {
        self.in_batches("captions read", &mut |indices| {
            let captions: Vec<Caption> = indices.map(|index| self.asked.caption(index)).collect();
            let texts: Vec<&str> = captions.iter().map(|caption| caption.text.as_str()).collect();
            let graphs = match self.is_built_in {
                true => texts.iter().map(|text| self.critic.parse(text, &named(text))).collect::<Result<_>>()?,
                false => expect_each("the VLM", texts.len(), self.critic.parse_each(&texts)?)?,
            };
            Ok(captions.iter().zip(&graphs).map(|(caption, graph)| results.read(caption, graph)).collect())
        })
    }

    /// The lines of all batches, which `answer` gives for the numbers of each.
    fn in_batches(&self, what: &str, answer: &mut dyn FnMut(Range<u64>) -> Result<Vec<VerdictLine>>) -> Result<String> {
        let mut lines = String::new();
        for start in (0..self.limit).step_by(self.batch) {
            if self.stop.load(Ordering::Relaxed) {
                bail!("interrupted after {start} of {} {what}", self.limit);
            }
            let end = (start + self.batch).min(self.limit);
            for line in answer(start as u64..end as u64)? {
                lines += &(serde_json::to_string(&line)? + "\n");
            }
            self.console.say(&format!("{end} of {} {what}", self.limit));
        }
        Ok(lines)
    }
}
