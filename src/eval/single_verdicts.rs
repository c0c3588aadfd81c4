//! The Checker, the Actor and the reading of texts, each by itself: on renders and captions of the tabletop world, of
//! which the truth is known.

use super::{
    agreement::{Agreement, Tally, agreement},
    edits::is_about,
    stats::Share,
};
use crate::{
    rig::{
        roles::{Claim, Reflection, Target, Verdict},
        truth::{KINDS, verdicts},
    },
    scene::{
        graph::SceneGraph,
        relation::Spatial,
        tabletop::{
            caption::caption,
            edit::Edit,
            plan, sample,
            split::Split,
            tasks::{self, ActSample, CheckSample},
        },
    },
    tensor::rng::Stream,
};
use serde::Serialize;
use serde_json::{Value, json};

/// Which pictures and captions: each is a function of these and of its number.
#[derive(Clone, Copy, Debug)]
pub struct Asked {
    pub split: Split,
    pub seed: u64,
    /// The fewest objects that are asked for.
    pub objects: usize,
}

/// A picture of which claims are checked, all that its graph makes and that there is nothing else.
pub struct Checked {
    pub sample: CheckSample,
    pub target: Target,
    pub truths: Vec<Verdict>,
}

/// A picture that misses something of its prompt, and the true verdicts, from which the Actor is to mend it.
pub struct Acted {
    pub sample: ActSample,
    pub target: Target,
    pub truths: Vec<Verdict>,
}

/// A caption and its graph.
pub struct Caption {
    pub text: String,
    pub graph: SceneGraph,
}

impl Asked {
    /// The fewest and most objects.
    fn range(&self) -> (usize, usize) {
        let (fewest, most) = self.split.objects();
        (fewest.max(self.objects).min(most), most)
    }

    /// A picture, and a graph that is often wrong about it.
    pub fn check(&self, index: u64) -> Checked {
        let (fewest, most) = self.range();
        let sample = tasks::check(self.seed, self.split, index, fewest, most);
        let target = Target::new(sample.graph.triple_text(), &sample.graph).and_nothing_else();
        Checked { truths: verdicts(&sample.scene.view(), &sample.graph), target, sample }
    }

    /// A picture that misses something, and its prompt.
    pub fn act(&self, index: u64) -> Acted {
        let (fewest, most) = self.range();
        let sample = tasks::act(self.seed, self.split, index, fewest, most);
        let target = Target::new(&sample.prompt, &sample.graph).and_nothing_else();
        Acted { truths: verdicts(&sample.scene.view(), &sample.graph), target, sample }
    }

    /// A caption in natural language, by the split's own phrasings where it has some.
    pub fn caption(&self, index: u64) -> Caption {
        let (fewest, most) = self.range();
        let rng = &mut Stream::new(self.seed, &format!("single captions {}", self.split.name()), index);
        let (_, graph) = sample::draw(rng, self.split, fewest, most);
        let style = tasks::style(rng, self.split, 0.0);
        Caption { text: caption(rng, &graph, style), graph }
    }
}

/// How verdicts, edits and readings went.
#[derive(Debug, Default)]
pub struct VerdictResults {
    /// What was said of each picture's claims.
    checked: Vec<Vec<Said>>,
    /// Edits that can be read.
    well_formed: Share,
    /// Edits that are about a claim which fails.
    addressed: Share,
    /// Edits that would bring the picture nearer to its prompt.
    mend: Share,
    /// Captions whose graph was read.
    exact: Share,
}

/// What was said of one picture or caption.
#[derive(Debug, Serialize)]
#[serde(tag = "task", rename_all = "snake_case")]
pub enum VerdictLine {
    Check { graph: String, claims: Vec<Said> },
    Act { prompt: String, edit: String, well_formed: bool, addressed: bool, mends: bool },
    Read { caption: String, graph: String, exact: bool },
}

/// What was said of one claim.
#[derive(Clone, Debug, Serialize)]
pub struct Said {
    pub claim: Claim,
    /// P(yes).
    pub checker: f64,
    pub truth: bool,
}

impl VerdictResults {
    /// Counts the verdicts on one picture.
    pub fn check(&mut self, asked: &Checked, heard: &[Verdict]) -> VerdictLine {
        let said = |(truth, heard): (&Verdict, &Verdict)| Said {
            claim: truth.claim.clone(),
            checker: heard.p_yes,
            truth: truth.yes,
        };
        let claims: Vec<Said> = asked.truths.iter().zip(heard).map(said).collect();
        self.checked.push(claims.clone());
        VerdictLine::Check { graph: asked.sample.graph.triple_text(), claims }
    }

    /// Counts the edit that was asked for to mend one picture.
    pub fn act(&mut self, asked: &Acted, reflection: &Reflection) -> VerdictLine {
        let Acted { sample, truths, .. } = asked;
        let edit = Edit::parse(&reflection.edit).ok();
        let about = |edit: &Edit| truths.iter().any(|truth| !truth.yes && is_about(edit, &truth.claim));
        let well_formed = edit.is_some();
        let addressed = edit.as_ref().is_some_and(about);
        let mends = edit.is_some_and(|edit| plan::mends(&edit, &sample.scene, &sample.graph));
        self.well_formed.count(well_formed);
        self.addressed.count(addressed);
        self.mend.count(mends);
        let (prompt, edit) = (sample.prompt.clone(), reflection.edit.clone());
        VerdictLine::Act { prompt, edit, well_formed, addressed, mends }
    }

    /// Counts the graph that was read in one caption, whatever the order of its objects.
    pub fn read(&mut self, asked: &Caption, graph: &SceneGraph) -> VerdictLine {
        let exact = graph.canonical() == asked.graph.canonical();
        self.exact.count(exact);
        VerdictLine::Read { caption: asked.text.clone(), graph: graph.triple_text(), exact }
    }

    /// How the verdicts on all claims agree with the truth, then on those of each kind and of each relation that was claimed.
    pub fn verdicts(&self) -> Vec<(&'static str, Agreement)> {
        let on = |of_kind: &dyn Fn(&Claim) -> bool| {
            let tally = |picture: &Vec<Said>| {
                let mut tally = Tally::default();
                picture.iter().filter(|s| of_kind(&s.claim)).for_each(|s| tally.count(s.checker, s.truth));
                tally
            };
            agreement(&self.checked.iter().map(tally).collect::<Vec<_>>())
        };
        let kinds = KINDS.map(|(name, of_kind)| (name, on(&of_kind)));
        let relations = Spatial::ALL.map(Spatial::name).map(|name| {
            let says = |claim: &Claim| matches!(claim, Claim::Relation { relation, .. } if relation == name);
            (name, on(&says))
        });
        let all = [("all", on(&|_| true))].into_iter().chain(kinds).chain(relations);
        all.filter_map(|(name, agreement)| Some((name, agreement?))).collect()
    }

    /// How edits and readings went.
    pub fn shares(&self) -> [(&'static str, &'static str, Share); 4] {
        [
            ("edits", "well formed", self.well_formed),
            ("edits", "about what fails", self.addressed),
            ("edits", "mend", self.mend),
            ("captions", "read exactly", self.exact),
        ]
    }

    /// As one document.
    pub fn document(&self) -> Value {
        let mut document = json!({});
        for (name, agreement) in self.verdicts() {
            document["verdicts"][name] = json!(agreement);
        }
        for (of, name, share) in self.shares() {
            document[of][name] = json!(share);
        }
        document
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::scene::{parse::parse, tabletop::world::Shape};

    fn asked(split: Split) -> Asked {
        Asked { split, seed: 3, objects: 1 }
    }

    fn edit(words: &str) -> Reflection {
        Reflection { thought: String::new(), edit: words.to_owned() }
    }

    #[test]
    fn perfect_answers_are_all_right_and_inverted_ones_all_wrong() {
        let asked = asked(Split::Test);
        let (mut good, mut bad) = (VerdictResults::default(), VerdictResults::default());
        for index in 0..300 {
            let checked = asked.check(index);
            assert!(checked.truths.iter().map(|truth| &truth.claim).eq(&checked.target.claims));
            let denied = |v: &Verdict| Verdict { yes: !v.yes, p_yes: 1.0 - v.p_yes, ..v.clone() };
            good.check(&checked, &checked.truths);
            bad.check(&checked, &checked.truths.iter().map(denied).collect::<Vec<_>>());

            let acted = asked.act(index);
            assert!(acted.truths.iter().any(|truth| !truth.yes));
            bad.act(&acted, &edit("paint it nicer"));
            // Where what was planned is carried out elsewhere, it may not help.
            if plan::mends(&acted.sample.edit, &acted.sample.scene, &acted.sample.graph) {
                good.act(&acted, &edit(&acted.sample.instruction));
            }

            let caption = asked.caption(index);
            good.read(&caption, &caption.graph);
            bad.read(&caption, &SceneGraph::default());
        }
        let (right, wrong) = (good.verdicts(), bad.verdicts());
        let names = |rows: &[(&'static str, Agreement)]| rows.iter().map(|(name, _)| *name).collect::<Vec<_>>();
        assert_eq!(names(&right), names(&wrong));
        assert_eq!(right.len(), 4 + Spatial::ALL.len(), "{right:?}");
        for (name, Agreement { accuracy, kappa, calibration_error, claims }) in &right {
            assert!(accuracy.mean == 1.0 && calibration_error.hi == 0.0 && accuracy.n <= 300, "{name}");
            assert!(kappa.is_some_and(|kappa| kappa.mean == 1.0) && *claims >= accuracy.n, "{name}");
        }
        for (name, Agreement { accuracy, kappa, calibration_error, .. }) in &wrong {
            assert!(accuracy.mean == 0.0 && calibration_error.lo == 1.0, "{name}");
            assert!(kappa.is_some_and(|kappa| kappa.mean < 0.0), "{name}");
        }
        assert!(good.shares().iter().all(|(.., share)| share.good == share.all && share.all >= 200));
        assert!(bad.shares().iter().all(|(.., share)| share.good == 0 && share.all == 300));
        let document = good.document();
        assert_eq!(document["verdicts"]["in front of"]["accuracy"]["mean"], 1.0);
        assert_eq!(document["edits"]["mend"]["share"], 1.0);
    }

    #[test]
    fn an_edit_may_be_well_formed_and_help_nothing() {
        let acted = asked(Split::Test).act(0);
        let mut results = VerdictResults::default();
        let there = |shape: &Shape| acted.sample.scene.items.iter().any(|item| item.shape == *shape);
        let missing = Shape::ALL.iter().find(|shape| !there(shape)).unwrap();
        results.act(&acted, &edit(&format!("remove the red {}", missing.name())));
        assert_eq!((results.well_formed.good, results.mend.good), (1, 0));
    }

    #[test]
    fn captions_are_those_of_the_split_with_as_many_objects() {
        for split in Split::ALL {
            let asked = Asked { objects: 2, ..asked(split) };
            for index in 0..20 {
                let Caption { text, graph } = asked.caption(index);
                assert_eq!(parse(&text).unwrap().canonical(), graph.canonical(), "{text}");
                assert!(text.split(' ').any(|word| matches!(word, "a" | "an")), "no triples: {text}");
                let counts = [&graph, &asked.check(index).sample.graph, &asked.act(index).sample.graph];
                assert!(counts.iter().all(|graph| graph.objects.len() >= 2));
            }
        }
    }
}
