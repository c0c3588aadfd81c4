//! Describing a scene graph in words: a grammar with variety, and phrasings kept from training.
//!
//! Whatever is written here parses back to the same graph ([`crate::scene::parse`]). Each relation becomes a clause in
//! the order of the graph; objects named before are referred back to by the shortest phrase that is theirs alone.

use crate::scene::{
    graph::{Object, Relation, SceneGraph},
    relation::Spatial,
};
use crate::tensor::rng::Stream;

/// Which phrasings to use.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Style {
    /// The paper's form: `large red ball left of small blue cube; ...`.
    Triples,
    /// The phrasings of training.
    Natural,
    /// At least one phrasing that training never uses.
    Paraphrase,
}

/// The most words of a caption of this graph.
pub fn word_limit(graph: &SceneGraph) -> usize {
    match (graph.objects.len(), graph.relations.len()) {
        (0..=3, 0..=2) => 26,
        (0..=3, _) => 33,
        _ => 45,
    }
}

/// Describes the graph. Predicates must be this world's ([`Spatial`]); others are written as they are.
pub fn caption(rng: &mut Stream, graph: &SceneGraph, style: Style) -> String {
    if style == Style::Triples {
        return graph.triple_text();
    }
    let limit = word_limit(graph);
    for _ in 0..12 {
        let mut writer = Writer::new(graph, style == Style::Paraphrase, false);
        let text = writer.write(rng);
        let novel = style == Style::Natural || writer.paraphrased;
        if novel && text.split(' ').count() <= limit {
            return text;
        }
    }
    Writer::new(graph, style == Style::Paraphrase, true).write(rng)
}

/// The graph in the plainest words that training uses, always the same: what the built-in Diffuser understands best. "Behind" is
/// said as "in front of", the other way round, which it draws right more often.
pub fn plain(graph: &SceneGraph) -> String {
    let mut graph = graph.clone();
    for relation in graph.relations.iter_mut().filter(|r| r.predicate == Spatial::Behind.name()) {
        let Relation { subject, object, .. } = *relation;
        *relation = Relation { subject: object, predicate: Spatial::InFrontOf.name().into(), object: subject };
    }
    // The shortest forms leave nothing to chance.
    Writer::new(&graph, false, true).write(&mut Stream::new(0, "plain words", 0))
}

/// A relation's words in training, the shortest first.
fn phrases(relation: Spatial) -> &'static [&'static str] {
    match relation {
        Spatial::LeftOf => &["left of", "to the left of", "on the left of"],
        Spatial::RightOf => &["right of", "to the right of", "on the right of"],
        Spatial::Above => &["above", "over"],
        Spatial::Below => &["below", "under"],
        Spatial::Inside => &["inside", "in"],
        Spatial::InFrontOf => &["in front of"],
        Spatial::Behind => &["behind"],
    }
}

/// Words for a relation that training never uses, the shortest first.
fn held_out_phrases(relation: Spatial) -> &'static [&'static str] {
    match relation {
        Spatial::LeftOf => &["on the left side of"],
        Spatial::RightOf => &["on the right side of"],
        Spatial::Above => &["higher than"],
        Spatial::Below => &["beneath", "underneath", "lower than"],
        Spatial::Inside => &["within"],
        Spatial::InFrontOf | Spatial::Behind => &[],
    }
}

/// A relation to "it", a form that training never uses.
fn phrase_to_it(relation: Spatial) -> &'static str {
    match relation {
        Spatial::LeftOf => "to its left",
        Spatial::RightOf => "to its right",
        Spatial::Above => "above it",
        Spatial::Below => "below it",
        Spatial::Inside => "inside it",
        Spatial::InFrontOf => "in front of it",
        Spatial::Behind => "behind it",
    }
}

const LEAD_IN: &[&str] = &["there is ", "a picture of "];
const HELD_OUT_LEAD_IN: &[&str] = &["draw ", "show me ", "an image of "];
const COPULA: &[&str] = &["is "];
const HELD_OUT_COPULA: &[&str] = &["sits ", "placed ", "that is ", "can be seen "];

fn pick(rng: &mut Stream, words: &[&'static str]) -> &'static str {
    words[rng.below(words.len())]
}

/// The article and phrase of something new: `a large red ball`.
pub fn indefinite(object: &Object) -> String {
    let phrase = object.phrase();
    let vowel = phrase.starts_with(['a', 'e', 'i', 'o', 'u']);
    format!("{} {phrase}", if vowel { "an" } else { "a" })
}

/// The shortest name that fits this one of `objects` alone, or with some chance a longer one.
pub fn reference(rng: &mut Stream, objects: &[Object], index: usize, shortest: bool) -> Object {
    let object = &objects[index];
    let n = object.attributes.len();
    // From the label alone to all attributes; attributes are dropped from the front, the size first.
    for skip in (1..=n).rev() {
        let name = Object::new(object.label.clone(), object.attributes[skip..].to_vec());
        let is_its_own = objects.iter().filter(|o| o.is_meant_by(&name)).count() == 1;
        if is_its_own && (shortest || rng.chance(0.55)) {
            return name;
        }
    }
    object.clone()
}

struct Writer<'a> {
    graph: &'a SceneGraph,
    text: String,
    named: Vec<bool>,
    /// Whether to use held-out phrasings, and whether one was used.
    paraphrase: bool,
    paraphrased: bool,
    /// Whether the text begins with "there is" or the like.
    lead_in: bool,
    /// Whether to keep to the shortest forms.
    short: bool,
    subject: Option<usize>,
    last: Option<usize>,
}

impl<'a> Writer<'a> {
    fn new(graph: &'a SceneGraph, paraphrase: bool, short: bool) -> Self {
        let named = vec![false; graph.objects.len()];
        Self {
            graph,
            text: String::new(),
            named,
            paraphrase,
            paraphrased: false,
            lead_in: false,
            short,
            subject: None,
            last: None,
        }
    }

    fn write(&mut self, rng: &mut Stream) -> String {
        if self.paraphrase {
            // The one place for a new word where nothing else can be said differently, or where words are short.
            if self.short || self.graph.objects.len() == 1 || rng.chance(0.3) {
                self.paraphrased = true;
                self.text += if self.short { HELD_OUT_LEAD_IN[0] } else { *rng.choose(HELD_OUT_LEAD_IN) };
            }
        } else if !self.short && rng.chance(0.15) {
            self.text += *rng.choose(LEAD_IN);
        }
        self.lead_in = !self.text.is_empty();
        for (k, relation) in self.graph.relations.iter().enumerate() {
            match Spatial::from_name(&relation.predicate) {
                Some(spatial) => self.clause(rng, k, relation, spatial),
                None => {
                    self.join(rng, k);
                    let (subject, object) = (self.mention(rng, relation.subject), self.mention(rng, relation.object));
                    self.text += &format!("{subject} {} {object}", relation.predicate);
                    self.subject = Some(relation.subject);
                }
            }
        }
        for i in (0..self.named.len()).filter(|&i| !self.named[i]).collect::<Vec<_>>() {
            let first = self.named.iter().all(|n| !n);
            if self.graph.relations.is_empty() {
                self.join(rng, usize::from(!first));
            } else {
                // A comma, so that it does not read as a further object of the relation before.
                self.text += ", and ";
            }
            let phrase = self.mention(rng, i);
            self.text += &phrase;
        }
        std::mem::take(&mut self.text)
    }

    fn join(&mut self, rng: &mut Stream, clause: usize) {
        if clause > 0 {
            self.text += if self.short { " and " } else { *rng.choose(&[", and ", " and ", ", "]) };
        }
    }

    /// The object as it is to be called here.
    fn mention(&mut self, rng: &mut Stream, index: usize) -> String {
        self.last = Some(index);
        if std::mem::replace(&mut self.named[index], true) {
            format!("the {}", reference(rng, &self.graph.objects, index, self.short).phrase())
        } else {
            indefinite(&self.graph.objects[index])
        }
    }

    fn relation(&mut self, rng: &mut Stream, relation: Spatial) -> &'static str {
        let held_out = held_out_phrases(relation);
        if self.paraphrase && !self.short && !held_out.is_empty() && rng.chance(0.7) {
            self.paraphrased = true;
            return pick(rng, held_out);
        }
        if self.short { phrases(relation)[0] } else { pick(rng, phrases(relation)) }
    }

    fn copula(&mut self, rng: &mut Stream) -> &'static str {
        // "there is a ball is" would be no English.
        if self.lead_in && self.named.iter().filter(|n| **n).count() == 1 {
            return "";
        }
        if self.paraphrase && !self.short && rng.chance(0.6) {
            self.paraphrased = true;
            return pick(rng, HELD_OUT_COPULA);
        }
        if !self.short && rng.chance(0.4) { pick(rng, COPULA) } else { "" }
    }

    fn clause(&mut self, rng: &mut Stream, k: usize, relation: &Relation, spatial: Spatial) {
        let (subject, object) = (relation.subject, relation.object);
        // "..., which is above a star": only right after the subject was named.
        if k > 0 && self.last == Some(subject) && self.subject != Some(subject) && !self.short && rng.chance(0.3) {
            let words = self.relation(rng, spatial);
            let object = self.mention(rng, object);
            self.text += &format!(", which is {words} {object}");
            self.subject = Some(subject);
            return;
        }
        let inverted = k > 0 && !self.short && rng.chance(0.12);
        if inverted {
            self.text += ", and ";
        } else {
            self.join(rng, k);
        }
        // "... and above a star": the same subject goes on.
        if k > 0 && !inverted && self.subject == Some(subject) && (self.short || rng.chance(0.4)) {
            let words = self.relation(rng, spatial);
            let object = self.mention(rng, object);
            self.text += &format!("{words} {object}");
            return;
        }
        if self.paraphrase
            && !inverted
            && !self.named[subject]
            && !self.named[object]
            && !self.short
            && rng.chance(0.35)
        {
            // "a blue cube with a red ball to its left"
            self.paraphrased = true;
            let object = self.mention(rng, object);
            let subject_phrase = self.mention(rng, subject);
            self.text += &format!("{object} with {subject_phrase} {}", phrase_to_it(spatial));
            (self.subject, self.last) = (None, None);
            return;
        }
        if inverted {
            // "above the cube is a star".
            let words = self.relation(rng, spatial);
            let object = self.mention(rng, object);
            let subject_phrase = self.mention(rng, subject);
            self.text += &format!("{words} {object} is {subject_phrase}");
        } else {
            let subject_phrase = self.mention(rng, subject);
            let copula = self.copula(rng);
            let words = self.relation(rng, spatial);
            let object = self.mention(rng, object);
            self.text += &format!("{subject_phrase} {copula}{words} {object}");
        }
        self.subject = Some(subject);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::scene::{
        parse::parse,
        tabletop::{sample, split::Split},
    };

    #[test]
    fn captions_parse_back_exactly_and_stay_short() {
        for index in 0..6000u64 {
            let split = Split::ALL[index as usize % Split::ALL.len()];
            let rng = &mut Stream::new(11, "captions", index);
            let (_, graph) = sample::draw(rng, split, 1, 5);
            for style in [Style::Triples, Style::Natural, Style::Paraphrase] {
                let text = caption(rng, &graph, style);
                let parsed = parse(&text).unwrap_or_else(|e| panic!("{text}: {e}"));
                assert_eq!(parsed, graph, "{style:?}: {text}");
                let words = text.split(' ').count();
                assert!(style == Style::Triples || words <= word_limit(&graph), "{words} words: {text}");
            }
            let behind = graph.relations.iter().any(|r| r.predicate == "behind");
            let read = parse(&plain(&graph)).unwrap();
            assert_eq!(read == graph, !behind, "{}", plain(&graph));
            assert_eq!((read.objects.len(), read.relations.len()), (graph.objects.len(), graph.relations.len()));
        }
    }

    #[test]
    fn plain_words_are_the_same_whatever_was_said() {
        let plainly = |text: &str| plain(&parse(text).unwrap());
        let plain = "a red ball left of a blue cube and a green ring above the cube";
        for text in [
            plain,
            "red ball left of blue cube; green ring above blue cube",
            "show me a blue cube with a red ball to its left and a green ring above it",
        ] {
            assert_eq!(plainly(text), plain, "{text}");
        }
        assert_eq!(plainly("draw a huge violet sphere"), "a large purple ball");
        let turned = "a red star in front of a blue cube and above a ring";
        assert_eq!(plainly("a blue cube behind a red star, the star above a ring"), turned);
    }

    #[test]
    fn paraphrases_use_words_or_forms_that_training_does_not() {
        for index in 0..500u64 {
            let rng = &mut Stream::new(5, "paraphrases", index);
            let (_, graph) = sample::draw(rng, Split::TestParaphrase, 1, 3);
            let text = caption(rng, &graph, Style::Paraphrase);
            let marks = [HELD_OUT_LEAD_IN, HELD_OUT_COPULA, &["on the left side of", "on the right side of"]].concat();
            let more = ["higher than", "beneath", "lower than", "underneath", "within", " it", "with "];
            let novel = |t: &str| marks.iter().chain(&more).any(|m| t.contains(m.trim_end()));
            assert!(novel(&text), "{text}");
            let trained = caption(rng, &graph, Style::Natural);
            assert!(!novel(&trained.replace("within", "")), "{trained}");
        }
    }
}
