//! The tabletop world's pixel oracle as Checker, as Actor, or as both: what the loop would be worth if one of them were never
//! wrong, and so which of them keeps it from more. For evaluation alone.

use super::{
    roles::{Actor, Checker, Claim, Picture, Reflection, Situation, Target, Verdict},
    truth,
};
use crate::scene::{
    graph::{Object, Relation, SceneGraph},
    tabletop::{oracle, plan},
};
use anyhow::Result;

/// Places that an edit names at most: what the built-in Editor was taught.
const TAUGHT_PLACES: usize = 1;

/// Checker and Actor, of whom the oracle may play one or both.
#[derive(Clone, Copy)]
pub struct Advised<'a> {
    /// The oracle if there is none.
    pub checker: Option<&'a dyn Checker>,
    /// Writes the edits, of which the oracle leaves it those of pictures that it finds right.
    pub actor: &'a dyn Actor,
    pub oracle_acts: bool,
}

/// The graph that a target's claims are about. Of two objects of one description a relation is about the first.
fn graph(target: &Target) -> SceneGraph {
    let mut graph = SceneGraph::default();
    let object = |phrase: &str| {
        let mut words: Vec<String> = phrase.split(' ').map(str::to_owned).collect();
        Object::new(words.pop().unwrap_or_default(), words)
    };
    for claim in &target.claims {
        let at = |phrase: &str| graph.objects.iter().position(|o| o.phrase() == phrase);
        match claim {
            Claim::Object(phrase) => graph.objects.push(object(phrase)),
            Claim::Relation { subject, relation, object } => {
                if let (Some(subject), Some(object)) = (at(subject), at(object)) {
                    graph.relations.push(Relation { subject, predicate: relation.clone(), object });
                }
            }
            Claim::Only(_) => {}
        }
    }
    graph
}

/// The truth about each of a target's claims, in their order.
fn verdicts(picture: &Picture, target: &Target) -> Result<Vec<Verdict>> {
    let mut true_ones = truth::drawn_verdicts(&oracle::read(picture.pixels()?), &graph(target));
    let mut of = |claim: &Claim| {
        // Each is taken once, so that what is claimed twice is answered twice.
        let known = true_ones.iter().position(|verdict| verdict.claim == *claim);
        known.map_or_else(|| Verdict::denied(claim), |i| true_ones.remove(i))
    };
    Ok(target.claims.iter().map(&mut of).collect())
}

/// The first edit that mends something and was not tried in vain.
fn edit(job: &Situation) -> Result<Option<Reflection>> {
    let (reading, graph) = (oracle::read(job.picture.pixels()?), graph(job.target));
    let mending = plan::edits(&reading.view, &graph, TAUGHT_PLACES)
        .into_iter()
        .filter(|edit| plan::mends(edit, &reading.scene, &graph));
    let new = mending.map(|edit| edit.plain()).find(|edit| !job.earlier.contains(&edit.as_str()));
    Ok(new.map(|edit| Reflection { thought: plan::faults(&reading.view, &graph), edit }))
}

impl Checker for Advised<'_> {
    fn check(&self, jobs: &[(&Picture, &Target)]) -> Result<Vec<Vec<Verdict>>> {
        match self.checker {
            Some(checker) => checker.check(jobs),
            None => jobs.iter().map(|(picture, target)| verdicts(picture, target)).collect(),
        }
    }
}

impl Actor for Advised<'_> {
    fn reflect(&self, jobs: &[Situation]) -> Result<Vec<Reflection>> {
        if !self.oracle_acts {
            return self.actor.reflect(jobs);
        }
        let known: Vec<Option<Reflection>> = jobs.iter().map(edit).collect::<Result<_>>()?;
        let left: Vec<Situation> = jobs.iter().zip(&known).filter(|(_, k)| k.is_none()).map(|(job, _)| *job).collect();
        let mut others = self.actor.reflect(&left)?.into_iter();
        Ok(known.into_iter().filter_map(|known| known.or_else(|| others.next())).collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::scene::tabletop::{edit::Edit, render::render, split::Split, tasks};

    /// As Actor one who has to be asked, and as Checker one who must not be.
    struct Nobody;

    impl Actor for Nobody {
        fn reflect(&self, jobs: &[Situation]) -> Result<Vec<Reflection>> {
            Ok(jobs.iter().map(|_| Reflection { thought: String::new(), edit: "nothing".into() }).collect())
        }
    }

    impl Checker for Nobody {
        fn check(&self, _: &[(&Picture, &Target)]) -> Result<Vec<Vec<Verdict>>> {
            anyhow::bail!("the oracle was to check")
        }
    }

    #[test]
    fn it_checks_by_the_truth_and_asks_for_what_mends() {
        let advised = Advised { checker: None, actor: &Nobody, oracle_acts: true };
        let (mut wrong, mut yes) = (0, 0);
        for index in 0..60 {
            let sample = tasks::check(5, Split::Val, index, 2, 4);
            let (target, reading) = (Target::new("", &sample.graph).and_nothing_else(), sample.scene.view());
            let picture = Picture::from_pixels(render(&sample.scene));
            let found = advised.check(&[(&picture, &target)]).unwrap().remove(0);
            assert!(found.iter().map(|v| &v.claim).eq(&target.claims));
            yes += found.iter().filter(|v| v.yes).count();
            let situation = |earlier| Situation {
                target: &target,
                picture: &picture,
                verdicts: &found,
                earlier,
                seed: 0,
                round: 1,
            };
            let asked = advised.reflect(&[situation(&[])]).unwrap().remove(0);
            if sample.truth.perfect() && reading.judge(&sample.graph).perfect() {
                assert_eq!(asked.edit, "nothing");
            } else if let Ok(edit) = Edit::parse(&asked.edit) {
                wrong += 1;
                let scene = oracle::read(picture.pixels().unwrap()).scene;
                assert!(plan::mends(&edit, &scene, &sample.graph), "{}", asked.edit);
                // Not again what was tried in vain.
                let again = advised.reflect(&[situation(&[&asked.edit])]).unwrap().remove(0);
                assert_ne!(again.edit, asked.edit);
            }
        }
        assert!(wrong > 20 && yes > 100, "{wrong} {yes}");
        let picture = Picture::from_pixels(render(&tasks::check(5, Split::Val, 0, 2, 4).scene));
        let plain = Advised { checker: Some(&Nobody), actor: &Nobody, oracle_acts: false };
        assert!(plain.check(&[(&picture, &Target::words_alone(""))]).is_err());
    }
}
