//! Whether what the Checker says with some probability comes true as often, and how to make it so.

use super::roles::Claim;
use crate::models::Folder;
use anyhow::{Result, ensure};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// What makes a Checker's probabilities come true as often as they say: of each kind of claim a [`Scaling`]. A VLM's folder
/// may have one in `calibration.json`; `rlrig eval calibrate` fits it.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Calibration {
    pub object: Scaling,
    /// Of relations whose predicate has none of its own.
    pub relation: Scaling,
    /// Of nothing else being there.
    pub only: Scaling,
    /// Of relations by their predicate: a VLM that can tell left from right may take anything for being behind.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub predicates: BTreeMap<String, Scaling>,
}

/// The file of a [`Calibration`] in a VLM's folder.
pub const FILE: &str = "calibration.json";

impl Calibration {
    /// That of a VLM's folder; without a file nothing is changed.
    pub fn open(folder: &Folder) -> Result<Self> {
        if !folder.has(FILE) {
            return Ok(Self::default());
        }
        let found: Self = folder.json(FILE)?;
        let sound = |s: &Scaling| s.scale.is_finite() && s.scale > 0.0 && s.bias.is_finite();
        let good =
            [&found.object, &found.relation, &found.only].into_iter().chain(found.predicates.values()).all(sound);
        ensure!(good, "{}: a scale is above 0, and a bias is a number", folder.file(FILE));
        Ok(found)
    }

    pub fn of(&self, claim: &Claim) -> Scaling {
        match claim {
            Claim::Object(_) => self.object,
            Claim::Relation { relation, .. } => *self.predicates.get(relation).unwrap_or(&self.relation),
            Claim::Only(_) => self.only,
        }
    }

    /// The best for claims with the probabilities that were said of them, and whether they were true.
    pub fn fit<'a>(said: impl Iterator<Item = (&'a Claim, f64, bool)>) -> Self {
        let (mut objects, mut relations, mut only) = (Vec::new(), Vec::new(), Vec::new());
        let mut by_predicate: BTreeMap<&str, Vec<(f64, bool)>> = BTreeMap::new();
        for (claim, p, truth) in said {
            let of_kind = match claim {
                Claim::Object(_) => &mut objects,
                Claim::Relation { relation, .. } => {
                    by_predicate.entry(relation).or_default().push((p, truth));
                    &mut relations
                }
                Claim::Only(_) => &mut only,
            };
            of_kind.push((p, truth));
        }
        let none = Scaling::default();
        let relation = Scaling::fit(&relations, none);
        let fit = |(name, said): (&str, Vec<_>)| (name.to_owned(), Scaling::fit(&said, relation));
        Self {
            object: Scaling::fit(&objects, none),
            relation,
            only: Scaling::fit(&only, none),
            predicates: by_predicate.into_iter().map(fit).collect(),
        }
    }
}

/// Platt's scaling (1999): the log odds of a probability, times `scale`, plus `bias`.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Scaling {
    pub scale: f64,
    pub bias: f64,
}

impl Default for Scaling {
    fn default() -> Self {
        Self { scale: 1.0, bias: 0.0 }
    }
}

impl Scaling {
    pub fn apply(self, p: f64) -> f64 {
        if self == Self::default() { p } else { probability(self.scale * log_odds(p) + self.bias) }
    }

    /// What was scaled to `p`.
    pub fn undo(self, p: f64) -> f64 {
        if self == Self::default() { p } else { probability((log_odds(p) - self.bias) / self.scale) }
    }

    /// The most probable scaling, with a prior that is worth a claim or so: that `usual` will do. Newton's method, with
    /// steps halved until they lead down. What says the opposite of the truth is not turned over, but hardly believed.
    fn fit(said: &[(f64, bool)], usual: Self) -> Self {
        const STEPS: usize = 100;
        const LEAST: f64 = 1e-3;
        let claims: Vec<(f64, f64)> =
            said.iter().map(|(p, truth)| (log_odds(*p), f64::from(u8::from(*truth)))).collect();
        // The negative log likelihood, and the prior's.
        let cost = |a: f64, b: f64| {
            let of = |(x, truth): &(f64, f64)| {
                let z = a * x + b;
                z.max(0.0) + (-z.abs()).exp().ln_1p() - truth * z
            };
            claims.iter().map(of).sum::<f64>() + 0.5 * ((a - usual.scale).powi(2) + (b - usual.bias).powi(2))
        };
        let (mut a, mut b) = (usual.scale, usual.bias);
        let mut least = cost(a, b);
        for _ in 0..STEPS {
            let (mut ga, mut gb, mut aa, mut ab, mut bb) = (a - usual.scale, b - usual.bias, 1.0, 0.0, 1.0);
            for (x, truth) in &claims {
                let q = probability(a * x + b);
                let (off, w) = (q - truth, q * (1.0 - q));
                (ga, gb) = (ga + off * x, gb + off);
                (aa, ab, bb) = (aa + w * x * x, ab + w * x, bb + w);
            }
            let determinant = aa * bb - ab * ab;
            let (mut da, mut db) = ((bb * ga - ab * gb) / determinant, (aa * gb - ab * ga) / determinant);
            if a - da < LEAST {
                // Along the bound the bias alone moves.
                (da, db) = (a - LEAST, if a > LEAST { db } else { gb / bb });
            }
            let mut share = 1.0;
            while share > 1e-9 && cost(a - share * da, b - share * db) > least {
                share /= 2.0;
            }
            let (next_a, next_b) = (a - share * da, b - share * db);
            let found = cost(next_a, next_b);
            if found >= least {
                break;
            }
            (a, b, least) = (next_a, next_b, found);
        }
        Self { scale: a, bias: b }
    }
}

/// Bounded, since a VLM is sometimes sure to the last bit.
fn log_odds(p: f64) -> f64 {
    let p = p.clamp(1e-4, 1.0 - 1e-4);
    (p / (1.0 - p)).ln()
}

fn probability(log_odds: f64) -> f64 {
    1.0 / (1.0 + (-log_odds).exp())
}

/// Ten bins of probability: what was said in sum, how much of it came true, and how often something was said.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Bins([(f64, usize, usize); 10]);

impl Bins {
    pub fn count(&mut self, p: f64, truth: bool) {
        let (said, truths, n) = &mut self.0[((p * 10.0) as usize).min(9)];
        (*said, *truths, *n) = (*said + p, *truths + usize::from(truth), *n + 1);
    }

    pub fn join(&mut self, other: &Self) {
        for ((said, truths, n), more) in self.0.iter_mut().zip(&other.0) {
            (*said, *truths, *n) = (*said + more.0, *truths + more.1, *n + more.2);
        }
    }

    /// Expected calibration error: the mean distance between what was said and what came true, over the bins weighted by
    /// their size (Guo et al., arXiv 1706.04599).
    pub fn error(&self) -> f64 {
        let gaps = self.0.iter().map(|(said, truths, _)| (said - *truths as f64).abs());
        gaps.sum::<f64>() / self.0.iter().map(|bin| bin.2).sum::<usize>().max(1) as f64
    }
}

/// [`Bins::error`] of some claims.
pub fn calibration_error(said: &[(f64, bool)]) -> f64 {
    let mut bins = Bins::default();
    said.iter().for_each(|(p, truth)| bins.count(*p, *truth));
    bins.error()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_too_sure_is_made_as_sure_as_it_is_right() {
        // Three of four come true, whatever is said with 0.99; of other claims one of four.
        let said: Vec<(f64, bool)> =
            (0..400).map(|i| (if i < 200 { 0.99 } else { 0.01 }, (i % 4 != 0) == (i < 200))).collect();
        let scaling = Scaling::fit(&said, Scaling::default());
        let scaled: Vec<(f64, bool)> = said.iter().map(|(p, truth)| (scaling.apply(*p), *truth)).collect();
        assert!((scaled[0].0 - 0.75).abs() < 0.01 && (scaled[300].0 - 0.25).abs() < 0.01, "{scaling:?}");
        assert!(calibration_error(&said) > 0.2 && calibration_error(&scaled) < 0.02);
        assert!((scaling.undo(scaling.apply(0.3)) - 0.3).abs() < 1e-9);
        assert!(scaling.apply(f64::NAN).is_nan());
        // Nothing known, nothing changed.
        assert_eq!(Scaling::fit(&[], Scaling::default()), Scaling::default());
        // Never turned over, and always found.
        let liar: Vec<(f64, bool)> = said.iter().map(|(p, truth)| (*p, !truth)).collect();
        let hardly = Scaling::fit(&liar, Scaling::default());
        assert!(hardly.scale > 0.0 && (hardly.apply(0.99) - 0.5).abs() < 0.05, "{hardly:?}");
        // Sure to the last bit, and wrong in a tenth: where an undamped step would lead far away.
        let often: Vec<(f64, bool)> =
            (0..2000).map(|i| (if i % 2 == 0 { 1.0 } else { 0.0 }, (i / 2 % 10 == 0) != (i % 2 == 0))).collect();
        let found = Scaling::fit(&often, Scaling::default());
        assert!((found.apply(1.0) - 0.9).abs() < 0.01 && (found.apply(0.0) - 0.1).abs() < 0.01, "{found:?}");
        let sure = Scaling::fit(&vec![(1.0, true); 50], Scaling::default());
        assert!(sure.scale.is_finite() && sure.apply(1.0) > 0.9, "{sure:?}");
    }

    #[test]
    fn each_kind_of_claim_has_its_own_and_a_broken_file_is_named() {
        let (object, only) = (Claim::Object("ball".into()), Claim::Only(vec!["ball".into()]));
        let said: Vec<(&Claim, f64, bool)> = (0..100).map(|i| (&object, 0.9, i % 2 == 0)).collect();
        let found = Calibration::fit(said.into_iter());
        assert!((found.of(&object).apply(0.9) - 0.5).abs() < 0.02 && found.of(&only) == Scaling::default());
        // One predicate is told well, of another anything is believed, and of a third little is known.
        let relation = |name: &str| {
            let (subject, object) = ("ball".to_owned(), "cube".to_owned());
            Claim::Relation { subject, relation: name.to_owned(), object }
        };
        let [left, behind, inside, above] = ["left of", "behind", "inside", "above"].map(relation);
        let told = (0..200).map(|i| if i % 2 == 0 { (&left, 0.8, i % 10 != 0) } else { (&behind, 0.8, i % 10 == 1) });
        let found = Calibration::fit(told.chain([(&inside, 0.8, true)]));
        let said = [&left, &behind, &inside, &above].map(|claim| found.of(claim).apply(0.8));
        assert!((said[0] - 0.8).abs() < 0.03 && (said[1] - 0.2).abs() < 0.03, "{said:?}");
        assert!((said[3] - 0.5).abs() < 0.03 && (said[3] + 0.01..0.75).contains(&said[2]), "{said:?}");
        let dir = tempfile::tempdir().unwrap();
        let folder = Folder::from(dir.path());
        assert_eq!(Calibration::open(&folder).unwrap(), Calibration::default());
        let write = |text: &str| std::fs::write(dir.path().join(FILE), text).unwrap();
        write(&serde_json::to_string(&found).unwrap());
        assert_eq!(Calibration::open(&folder).unwrap(), found);
        write(&serde_json::to_string(&found).unwrap().replace("\"scale\":1.0", "\"scale\":-1.0"));
        assert!(Calibration::open(&folder).unwrap_err().to_string().contains("calibration.json: a scale"));
        write("{");
        assert!(format!("{:#}", Calibration::open(&folder).unwrap_err()).contains("calibration.json"));
    }

    #[test]
    fn calibration_is_perfect_when_what_is_said_comes_true() {
        let said: Vec<(f64, bool)> = (0..100).map(|i| (0.75, i % 4 != 0)).collect();
        assert!(calibration_error(&said) < 1e-12);
        let sure: Vec<(f64, bool)> = (0..100).map(|i| (1.0, i % 4 != 0)).collect();
        assert!((calibration_error(&sure) - 0.25).abs() < 1e-12);
    }
}
