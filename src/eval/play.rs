//! Plays one mode over samples: the loop runs, and each prompt that ends becomes its lines and pictures.

use super::{
    dataset::Sample,
    line::{Line, Made},
    modes::{CheckerActor, DiffuserEditor, Mode, cast},
};
use crate::{
    rig::{
        cycle::{self, Event, Job, Options, Outcome, Stage},
        roles::{Checker, Lister, Picture, Target, Verdict},
    },
    tensor::rng::Stream,
};
use anyhow::Result;
use image::RgbImage;

/// What is played, and how.
pub struct Play<'a> {
    pub mode: Mode,
    pub painter: &'a dyn DiffuserEditor,
    pub critic: &'a dyn CheckerActor,
    /// Whether pictures may show nothing else than what is asked.
    pub only: bool,
    /// Judges the pictures where it is another than the loop's Checker.
    pub judge: Option<&'a dyn Checker>,
    /// Lists what the pictures show, if that is to be.
    pub lister: Option<&'a dyn Lister>,
    /// Counts the painter's network evaluations.
    pub evaluations: &'a dyn Fn() -> u64,
    pub cancelled: &'a dyn Fn() -> bool,
    /// The loop's, also for other modes.
    pub options: Options,
    pub rival_rounds: usize,
    pub seed: u64,
}

/// Samples that are held in memory at once, and played together: so many that the last of them, which leave places
/// empty, do not count.
const BATCH: usize = 1000;

/// Takes a prompt's lines and their pictures.
pub type Keep<'a> = dyn FnMut(Vec<Line>, Vec<&RgbImage>) -> Result<()> + 'a;

/// The seed of a sample's first drawing, which `rlrig generate --seed` takes: short, so that it can be typed. Samples of the
/// same index in two splits share it, and of 10,000 indices two share it by chance once in a hundred seeds; as their prompts
/// differ, so do their pictures.
pub fn noise(seed: u64, index: u64) -> u64 {
    Stream::new(seed, "eval", index).next_u64() >> 32
}

impl Play<'_> {
    /// Plays over `samples`; `keep` gets each prompt's lines and pictures as it ends. What is cancelled is not kept.
    pub fn run(&self, samples: impl Iterator<Item = Result<Sample>>, keep: &mut Keep) -> Result<()> {
        let mut samples = samples.fuse();
        loop {
            let batch: Vec<Sample> = samples.by_ref().take(BATCH).collect::<Result<_>>()?;
            if batch.is_empty() || (self.cancelled)() {
                return Ok(());
            }
            self.batch(&batch, keep)?;
        }
    }

    fn batch(&self, samples: &[Sample], keep: &mut Keep) -> Result<()> {
        let job = |sample: &Sample| Job { target: sample.target(self.only), seed: noise(self.seed, sample.index) };
        let jobs: Vec<Job> = samples.iter().map(job).collect();
        let options = self.mode.options(self.options, self.rival_rounds);
        let mut meter = Meter { spent: vec![Vec::new(); jobs.len()], open: None };
        cast(self.mode, self.painter, self.critic, |cast| {
            cycle::run_observed(cast, &jobs, &options, self.cancelled, &mut |event| {
                match event {
                    Event::Stage { stage, jobs } => meter.stage(stage, jobs, (self.evaluations)()),
                    Event::Finished { job, outcome } if outcome.ending != cycle::Ending::Cancelled => {
                        let judged = self.judge(&jobs[job].target, outcome)?;
                        let listed = self.lister.map(|lister| {
                            let pictures: Vec<&Picture> = outcome.turns.iter().map(|turn| &turn.picture).collect();
                            lister.list(&pictures, &samples[job].graph)
                        });
                        let listed = listed.transpose()?;
                        let made = Made {
                            sample: &samples[job],
                            mode: self.mode,
                            seed: self.seed,
                            noise: jobs[job].seed,
                            outcome,
                            rounds: options.rounds,
                            evaluations: &meter.spent[job],
                            judged: judged.as_deref(),
                            listed: listed.as_deref(),
                        };
                        let pictures = outcome.turns.iter().map(|turn| turn.picture.pixels()).collect::<Result<_>>()?;
                        keep(made.lines()?, pictures)?;
                    }
                    _ => {}
                }
                Ok(())
            })
        })?;
        Ok(())
    }

    /// The judge's verdicts on each turn, `None` where they are the Checker's. Whether there is anything else in a picture is
    /// asked in any case; where the loop does not ask, nothing but the metrics hears of the answer.
    fn judge(&self, target: &Target, outcome: &Outcome) -> Result<Option<Vec<Vec<Verdict>>>> {
        let closed = if self.only { target.clone() } else { target.clone().and_nothing_else() };
        let ask = |judge: &dyn Checker, target: &Target| {
            judge.check(&outcome.turns.iter().map(|turn| (&turn.picture, target)).collect::<Vec<_>>())
        };
        match self.judge {
            Some(judge) => ask(judge, &closed).map(Some),
            None if self.only => Ok(None),
            None => {
                let others = Target { claims: closed.claims[target.claims.len()..].to_vec(), ..closed };
                let others = ask(self.critic, &others)?;
                let both = outcome.turns.iter().zip(others).map(|(turn, others)| [&*turn.verdicts, &others].concat());
                Ok(Some(both.collect()))
            }
        }
    }
}

/// Shares the evaluations of a stage among its jobs, which all cost the same.
struct Meter {
    /// For each job those of each of its turns.
    spent: Vec<Vec<u64>>,
    /// The jobs that are being painted, and the count when that began.
    open: Option<(Vec<usize>, u64)>,
}

impl Meter {
    fn stage(&mut self, stage: Stage, jobs: &[usize], count: u64) {
        if let Some((painted, before)) = self.open.take() {
            let share = (count - before) / painted.len().max(1) as u64;
            painted.into_iter().for_each(|job| self.spent[job].push(share));
        }
        if matches!(stage, Stage::Draw | Stage::Edit) {
            self.open = Some((jobs.to_vec(), count));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        rig::roles::{Actor, Claim, Diffuser, Draw, Edit, Editor, Reflection, Situation},
        scene::{
            graph::SceneGraph,
            iou::{Lists, label},
            parse::parse,
        },
    };

    /// Plays all roles: it draws nothing, believes everything, and lists besides what is asked for that a cube is left of a
    /// ball.
    struct Company;

    impl Diffuser for Company {
        fn draw(&self, jobs: &[Draw]) -> Result<Vec<Picture>> {
            Ok(jobs.iter().map(|_| Picture::from_pixels(RgbImage::new(1, 1))).collect())
        }
    }

    impl Checker for Company {
        fn check(&self, jobs: &[(&Picture, &Target)]) -> Result<Vec<Vec<Verdict>>> {
            let verdict =
                |claim: &Claim| Verdict { claim: claim.clone(), yes: true, p_yes: 1.0, reflection: String::new() };
            Ok(jobs.iter().map(|(_, target)| target.claims.iter().map(verdict).collect()).collect())
        }
    }

    impl Lister for Company {
        fn list(&self, pictures: &[&Picture], graph: &SceneGraph) -> Result<Vec<Lists>> {
            let mut seen = Lists::of(graph, label);
            seen.triples.push(("cube".into(), "left of".into(), "ball".into()));
            Ok(vec![seen; pictures.len()])
        }
    }

    impl Actor for Company {
        fn reflect(&self, _: &[Situation]) -> Result<Vec<Reflection>> {
            anyhow::bail!("there is nothing to reflect on")
        }
    }

    impl Editor for Company {
        fn edit(&self, _: &[Edit]) -> Result<Vec<Picture>> {
            anyhow::bail!("there is nothing to edit")
        }
    }

    fn sample(index: usize) -> Sample {
        let prompt = "red ball left of blue cube";
        Sample {
            index: index as u64,
            id: index.to_string(),
            dataset: "laion-sg",
            split: "test".into(),
            prompt: prompt.into(),
            drawn_as: None,
            graph: parse(prompt).unwrap(),
        }
    }

    #[test]
    fn a_triple_that_is_listed_and_not_asked_for_costs_something() {
        let lines = |lister: Option<&dyn Lister>| {
            let play = Play {
                mode: Mode::Diffuser,
                painter: &Company,
                critic: &Company,
                only: false,
                judge: None,
                lister,
                evaluations: &|| 0,
                cancelled: &|| false,
                options: Options::default(),
                rival_rounds: 4,
                seed: 0,
            };
            let mut all = Vec::new();
            play.run(std::iter::once(Ok(sample(0))), &mut |lines, _| {
                all.extend(lines);
                Ok(())
            })
            .unwrap();
            all
        };
        let (listed, confirmed) = (lines(Some(&Company)), lines(None));
        let [line] = listed.as_slice() else { panic!("{} lines", listed.len()) };
        assert_eq!(line.extracted.triples.len(), 2);
        assert_eq!(line.extracted.triples[1], ("cube".into(), "left of".into(), "ball".into()));
        assert_eq!((line.metrics["sg_iou"], line.metrics["ent_iou"]), (0.5, 1.0));
        assert_eq!((&confirmed[0].extracted, confirmed[0].metrics["sg_iou"]), (&line.reference, 1.0));
        // What else there is was no claim of the loop's.
        assert!(line.claims.len() == 3 && line.metrics["judge_no_others"] == 1.0 && line.metrics["judge_mean"] == 1.0);
    }

    #[test]
    fn batch_after_batch_all_samples_are_played_until_one_cannot_be_read_or_it_is_cancelled() {
        // How many are kept of those before the first that cannot be read, and whether that is an error.
        let kept = |readable: usize, most: usize| {
            let made = std::cell::RefCell::new(Vec::new());
            let play = Play {
                mode: Mode::Diffuser,
                painter: &Company,
                critic: &Company,
                only: false,
                judge: None,
                lister: None,
                evaluations: &|| 0,
                cancelled: &|| made.borrow().len() >= most,
                options: Options::default(),
                rival_rounds: 4,
                seed: 3,
            };
            let samples =
                (0..=BATCH + 1).map(|i| if i < readable { Ok(sample(i)) } else { anyhow::bail!("cannot be read") });
            let run = play.run(samples.take(BATCH + 2), &mut |lines, _| {
                made.borrow_mut().extend(lines.into_iter().map(|line| (line.id, line.noise)));
                Ok(())
            });
            let expected = |i: usize| (i.to_string(), noise(3, i as u64));
            assert!(made.borrow().iter().cloned().eq((0..made.borrow().len()).map(expected)));
            (made.into_inner().len(), run.is_ok())
        };
        assert_eq!(kept(usize::MAX, usize::MAX), (BATCH + 2, true));
        assert_eq!(kept(BATCH + 1, usize::MAX), (BATCH, false));
        assert_eq!(kept(usize::MAX, BATCH), (BATCH, true));
    }

    #[test]
    fn evaluations_go_to_those_who_were_painted() {
        let mut meter = Meter { spent: vec![Vec::new(); 3], open: None };
        let stages = [
            (Stage::Draw, vec![0, 1], 0),
            (Stage::Check, vec![0, 1], 80),
            (Stage::Draw, vec![2], 80),
            (Stage::Reflect, vec![1], 120),
            (Stage::Edit, vec![1], 120),
            (Stage::Check, vec![1, 2], 130),
        ];
        stages.into_iter().for_each(|(stage, jobs, count)| meter.stage(stage, &jobs, count));
        assert_eq!(meter.spent, [vec![40], vec![40, 10], vec![40]]);
    }

    #[test]
    fn noise_differs_between_samples_and_seeds() {
        let all: std::collections::BTreeSet<u64> = (0..4).flat_map(|s| (0..50).map(move |i| noise(s, i))).collect();
        assert_eq!(all.len(), 200);
    }
}
