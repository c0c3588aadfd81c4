//! Scene graphs: objects with attributes, and relations between them.
//!
//! General on purpose: labels, attributes and predicates are free text, so one type serves LAION-SG's records
//! (arXiv 2412.08580), prompts parsed from a user's words and the tabletop world alike.

use anyhow::{Result, bail, ensure};
use serde::{Deserialize, Serialize};

/// Characters of an object's phrase, and of a predicate, at most: every claim about it repeats them.
pub const LONGEST: usize = 200;
/// Objects, and relations, of a scene graph that is drawn at most: each is a question about every picture.
pub const LARGEST: usize = 200;

/// Whether a phrase or a predicate has more than [`LONGEST`] characters.
pub fn is_too_long(text: &str) -> bool {
    text.chars().nth(LONGEST).is_some()
}

/// One object: a label and its attributes in the order they are said (`large`, `red`).
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Object {
    pub label: String,
    #[serde(default)]
    pub attributes: Vec<String>,
}

impl Object {
    /// Whether `name` may stand for it: the same label, and no attribute that it has not.
    pub fn is_meant_by(&self, name: &Self) -> bool {
        self.label == name.label && name.attributes.iter().all(|a| self.attributes.contains(a))
    }

    pub fn new(label: impl Into<String>, attributes: Vec<String>) -> Self {
        Self { label: label.into(), attributes }
    }

    /// The object's phrase: attributes, then the label (`large red ball`).
    pub fn phrase(&self) -> String {
        let mut words: Vec<&str> = self.attributes.iter().map(String::as_str).collect();
        words.push(&self.label);
        words.join(" ")
    }
}

/// `subject predicate object`, by index into [`SceneGraph::objects`].
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Relation {
    pub subject: usize,
    pub predicate: String,
    pub object: usize,
}

/// What a picture should show, or does show.
#[derive(Debug, Clone, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct SceneGraph {
    pub objects: Vec<Object>,
    #[serde(default)]
    pub relations: Vec<Relation>,
}

impl SceneGraph {
    /// Whether some relation names object `i`, or there is none that could.
    pub fn is_related(&self, i: usize) -> bool {
        self.relations.is_empty() || self.relations.iter().any(|r| r.subject == i || r.object == i)
    }

    /// An error that names the first object or relation of which nothing can be asked, and says why: it has no text, one
    /// that is too long or is no line of text; or a relation is not one between two objects that are there.
    pub fn validate(&self) -> Result<()> {
        let line = |what: &str, text: &str| {
            ensure!(!is_too_long(text), "{what} has {} characters; at most {LONGEST} are read", text.chars().count());
            ensure!(!text.contains(char::is_control), "{what} has a control character in {text:?}");
            Ok(())
        };
        for (i, o) in self.objects.iter().enumerate() {
            if o.label.trim().is_empty() {
                bail!("object {i} of the scene graph has no label");
            }
            line(&format!("object {i} of the scene graph, with its attributes,"), &o.phrase())?;
        }
        for (i, r) in self.relations.iter().enumerate() {
            let n = self.objects.len();
            if r.predicate.trim().is_empty() {
                bail!("relation {i} of the scene graph has no predicate");
            }
            line(&format!("relation {i} of the scene graph"), &r.predicate)?;
            if r.subject >= n || r.object >= n {
                bail!("relation {i} ({:?}) names object {} of {n}", r.predicate, r.subject.max(r.object));
            }
            if r.subject == r.object {
                bail!("relation {i} ({:?}) relates object {} to itself", r.predicate, r.subject);
            }
        }
        Ok(())
    }

    /// One relation as text: `large red ball left of small blue cube`.
    pub fn triple(&self, relation: &Relation) -> String {
        let phrase = |i: usize| self.objects.get(i).map_or_else(|| format!("object {i}"), Object::phrase);
        format!("{} {} {}", phrase(relation.subject), relation.predicate, phrase(relation.object))
    }

    /// All relations as text, in order.
    pub fn triples(&self) -> Vec<String> {
        self.relations.iter().map(|r| self.triple(r)).collect()
    }

    /// Indices of the objects that no relation names.
    pub fn isolated(&self) -> Vec<usize> {
        (0..self.objects.len()).filter(|&i| !self.relations.iter().any(|r| r.subject == i || r.object == i)).collect()
    }

    /// The prompt form of the paper: triples joined by `; `, then the isolated objects' phrases.
    pub fn triple_text(&self) -> String {
        let mut parts = self.triples();
        parts.extend(self.isolated().into_iter().map(|i| self.objects[i].phrase()));
        parts.join("; ")
    }

    /// The same graph with its objects in the order of first mention: by the relations, then those without one.
    pub fn canonical(&self) -> Self {
        let mut order: Vec<usize> = Vec::with_capacity(self.objects.len());
        for i in self.relations.iter().flat_map(|r| [r.subject, r.object]).chain(0..self.objects.len()) {
            if i < self.objects.len() && !order.contains(&i) {
                order.push(i);
            }
        }
        let at = |i: usize| order.iter().position(|&o| o == i).unwrap_or(i);
        Self {
            objects: order.iter().map(|&i| self.objects[i].clone()).collect(),
            relations: self
                .relations
                .iter()
                .map(|r| Relation { subject: at(r.subject), predicate: r.predicate.clone(), object: at(r.object) })
                .collect(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn graph() -> SceneGraph {
        let object =
            |label: &str, attributes: &[&str]| Object::new(label, attributes.iter().map(ToString::to_string).collect());
        SceneGraph {
            objects: vec![object("ball", &["large", "red"]), object("cube", &["blue"]), object("star", &[])],
            relations: vec![Relation { subject: 0, predicate: "left of".into(), object: 1 }],
        }
    }

    #[test]
    fn triples_read_as_the_paper_writes_them() {
        assert_eq!(graph().triples(), ["large red ball left of blue cube"]);
        assert_eq!(graph().triple_text(), "large red ball left of blue cube; star");
        assert_eq!(graph().isolated(), [2]);
    }

    #[test]
    fn canonical_order_is_that_of_first_mention() {
        let mut g = graph();
        g.relations = vec![Relation { subject: 2, predicate: "above".into(), object: 0 }];
        let canonical = g.canonical();
        let labels: Vec<&str> = canonical.objects.iter().map(|o| o.label.as_str()).collect();
        assert_eq!(labels, ["star", "ball", "cube"]);
        assert_eq!(canonical.triple_text(), g.triple_text());
        assert_eq!(canonical.canonical(), canonical);
    }

    #[test]
    fn validation_names_what_is_wrong() {
        assert!(graph().validate().is_ok());
        let mut dangling = graph();
        dangling.relations[0].object = 9;
        assert!(dangling.validate().unwrap_err().to_string().contains("object 9 of 3"));
        let told = |bend: &dyn Fn(&mut SceneGraph), expected: &str| {
            let mut bent = graph();
            bend(&mut bent);
            let error = bent.validate().unwrap_err().to_string();
            assert!(error.contains(expected), "{error}");
        };
        told(&|g| g.objects[1].label = " ".into(), "object 1 of the scene graph has no label");
        told(&|g| g.objects[1].label = "é".repeat(196), "object 1 of the scene graph, with its attributes, has 201");
        told(&|g| g.objects[2].attributes = vec!["x".repeat(300_000)], "object 2");
        told(&|g| g.objects[0].label = "ba\nll".into(), "control character");
        told(&|g| g.relations[0].predicate = "\t".into(), "relation 0 of the scene graph has no predicate");
        told(&|g| g.relations[0].predicate = "x".repeat(201), "at most 200 are read");
        told(&|g| g.relations[0].object = 0, "relates object 0 to itself");
        let mut long = graph();
        long.objects[1].label = "é".repeat(195);
        assert!(long.validate().is_ok());
    }

    #[test]
    fn json_round_trips_and_may_leave_out_empty_lists() {
        let text = serde_json::to_string(&graph()).unwrap();
        assert_eq!(serde_json::from_str::<SceneGraph>(&text).unwrap(), graph());
        let bare: SceneGraph = serde_json::from_str(r#"{"objects": [{"label": "ball"}]}"#).unwrap();
        assert_eq!(bare.objects[0].phrase(), "ball");
    }
}
