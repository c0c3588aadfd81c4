//! From words to a scene graph: the paper's triples and plain English alike.
//!
//! The grammar: clauses joined by commas, semicolons, full stops and "and". A clause is a noun phrase; or one related to
//! another ("a red ball is left of a blue cube"); or the same with the relation first ("above the cube is a ring"), with
//! "which" for the object named last, with "with ... to its left", or with a further relation of the same subject. "The"
//! refers back to an object already named, "a" names a new one; without an article (as in triples) equal phrases are
//! equal objects. "It" is the subject of the clause before ("it is left of a cube", "to its left is a cube"). What is on one
//! side of the picture is beside what is on the other ("a ball on the left and a cube on the right").

use super::{
    cursor::{Article, Cursor, Mention, tokens},
    graph::{Object, Relation, SceneGraph},
    relation::{Spatial, contradictions},
    tabletop::world::Shape,
    words::{self, COPULA, LEAD_IN, OF_PICTURES, PICTURES, SEPARATORS, WISHES},
};

/// Why a text has no scene graph.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ParseError {
    #[error("the prompt is empty")]
    Empty,
    #[error("unknown shape \"{word}\"{}", hint(.suggestion.as_deref(), Shape::ALL.iter().map(|s| s.name())))]
    UnknownShape { word: String, suggestion: Option<String> },
    #[error("unknown colour or size \"{word}\"{}", hint(.suggestion.as_deref(), words::adjectives()))]
    UnknownAttribute { word: String, suggestion: Option<String> },
    #[error("one object cannot be both {0} and {1}")]
    Clash(&'static str, &'static str),
    #[error("\"the {phrase}\" may mean more than one of the objects named before")]
    Ambiguous { phrase: String },
    #[error("no picture can show this: {0}")]
    Contradiction(String),
    #[error("more than {MAX_OBJECTS} objects")]
    TooMany,
    /// The words are known or not, but the sentence is not one of this grammar.
    #[error("{0}")]
    Grammar(String),
}

/// More objects than any table holds.
pub const MAX_OBJECTS: usize = 24;
/// Characters of a prompt at most: a longer one is no prompt.
pub const MAX_CHARS: usize = 4000;

fn hint(suggestion: Option<&str>, known: impl Iterator<Item = &'static str>) -> String {
    match suggestion {
        Some(word) => format!("; did you mean \"{word}\"?"),
        None => format!("; known are {}", known.collect::<Vec<_>>().join(", ")),
    }
}

/// Parses a prompt into a scene graph in canonical order, or says why there is none.
pub fn parse(text: &str) -> Result<SceneGraph, ParseError> {
    let mut parser = Parser::new(text);
    parser.prompt()?;
    let graph = parser.graph.canonical();
    match contradictions(&graph).into_iter().next() {
        Some(why) => Err(ParseError::Contradiction(why)),
        None => Ok(graph),
    }
}

/// Whether an error about a word nobody knows is about one that names nothing, in a text of which everything else is known, a
/// shape among it: then the sentence is not one of this grammar, and all that it names may be drawn.
pub fn only_unusual(text: &str, error: &ParseError) -> bool {
    let is_of_words = matches!(error, ParseError::UnknownShape { .. } | ParseError::UnknownAttribute { .. });
    let tokens = tokens(text);
    let means = |word: &String| {
        word.len() == 1
            || words::shape(word).is_some()
            || words::colour(word).is_some()
            || words::size(word).is_some()
            || [COPULA, LEAD_IN, SEPARATORS, PICTURES, words::FILLERS].iter().any(|list| list.contains(&word.as_str()))
            || words::RELATIONS.iter().any(|(phrase, _)| phrase.split(' ').any(|part| part == word))
    };
    is_of_words && tokens.iter().any(|word| words::shape(word).is_some()) && tokens.iter().all(means)
}

/// The things that a text names, each once and by its fullest name, whatever is said of them.
pub fn named(text: &str) -> Vec<Object> {
    let mut cursor = Cursor::new(text);
    let mut found: Vec<Object> = Vec::new();
    while !cursor.done() {
        let start = cursor.at;
        // "can" is a cylinder elsewhere.
        if cursor.eat("can be") {
            continue;
        }
        match cursor.mention() {
            Ok(Mention { object, .. }) => found.push(object),
            Err(_) => cursor.at = start + 1,
        }
    }
    let is_part = |a: &Object, b: &Object| a.label == b.label && a.attributes.iter().all(|x| b.attributes.contains(x));
    let again = |i: usize| {
        let others = found.iter().enumerate().filter(|(j, _)| *j != i);
        others.into_iter().any(|(j, other)| is_part(&found[i], other) && (found[i] != *other || j < i))
    };
    (0..found.len()).filter(|i| !again(*i)).take(MAX_OBJECTS).map(|i| found[i].clone()).collect()
}

struct Parser {
    cursor: Cursor,
    graph: SceneGraph,
    /// Whether the text is in triple form: then equal phrases are equal objects, whatever their article.
    triples: bool,
    /// What a further relation without a subject belongs to.
    subject: Option<usize>,
    /// What "which" stands for.
    last: Option<usize>,
    /// What "it" stands for.
    owner: Option<usize>,
    /// What is on some side of the picture.
    sides: Vec<(usize, Spatial)>,
}

impl Parser {
    fn new(text: &str) -> Self {
        let cursor = Cursor::new(text);
        let triples = cursor.tokens.iter().any(|t| t == ";");
        Self {
            cursor,
            graph: SceneGraph::default(),
            triples,
            subject: None,
            last: None,
            owner: None,
            sides: Vec::new(),
        }
    }

    fn prompt(&mut self) -> Result<(), ParseError> {
        loop {
            self.cursor.skip(SEPARATORS);
            if self.cursor.done() {
                break;
            }
            self.lead_in();
            if self.cursor.done() {
                return Err(ParseError::Grammar("the prompt names no object".into()));
            }
            self.clause()?;
        }
        self.relate_sides()?;
        if self.graph.objects.is_empty() { Err(ParseError::Empty) } else { Ok(()) }
    }

    /// Skips "there is", "show me", "a picture of" and the like.
    fn lead_in(&mut self) {
        while self.cursor.skip(LEAD_IN) || WISHES.iter().any(|wish| self.cursor.eat(wish)) {}
        let start = self.cursor.at;
        self.cursor.skip(&["a", "an", "the"]);
        if self.cursor.skip(PICTURES) && self.cursor.skip(OF_PICTURES) {
            self.cursor.skip(LEAD_IN);
            return;
        }
        self.cursor.at = start;
    }

    fn clause(&mut self) -> Result<(), ParseError> {
        if self.cursor.eat("which") {
            self.cursor.skip(COPULA);
            let Some(relation) = self.cursor.eat_relation() else { return Err(self.unexpected()) };
            let Some(subject) = self.last else {
                return Err(ParseError::Grammar("\"which\" has nothing to refer to".into()));
            };
            let object = self.object()?;
            self.subject = Some(subject);
            self.relate(subject, relation, object);
            return Ok(());
        }
        // "to its left is a cube"
        let relation = self.subject.and_then(|owner| Some((owner, self.cursor.eat_relation_to_it()?)));
        if let Some((owner, relation)) = relation {
            self.cursor.skip(&[","]);
            self.cursor.skip(COPULA);
            self.cursor.skip(LEAD_IN);
            let other = self.object()?;
            self.relate(other, relation, owner);
            return Ok(());
        }
        if let Some(side) = self.cursor.eat_side(true) {
            // "on the left is a ball"
            self.cursor.skip(&[","]);
            self.cursor.skip(COPULA);
            self.cursor.skip(LEAD_IN);
            let subject = self.object()?;
            self.subject = Some(subject);
            self.sides.push((subject, side));
            return Ok(());
        }
        if let Some(relation) = self.cursor.eat_relation() {
            let object = self.object()?;
            let inverted = self.cursor.skip(COPULA) | self.cursor.skip(LEAD_IN);
            match self.subject {
                Some(subject) if !inverted => self.relate(subject, relation, object),
                _ => {
                    self.cursor.skip(&[","]);
                    let subject = self.object()?;
                    self.subject = Some(subject);
                    self.relate(subject, relation, object);
                }
            }
            return Ok(());
        }
        let subject = match self.subject {
            Some(subject) if self.cursor.eat("it") => subject,
            _ => self.object()?,
        };
        if let (Some(owner), Some(relation)) = (self.owner, self.cursor.eat_relation_to_it()) {
            self.relate(subject, relation, owner);
            return Ok(());
        }
        self.subject = Some(subject);
        if self.cursor.skip(&["with", "has", "having"]) {
            self.owner = Some(subject);
            let other = self.object()?;
            let Some(relation) = self.cursor.eat_relation_to_it() else { return Err(self.unexpected()) };
            self.relate(other, relation, subject);
            return Ok(());
        }
        let copula = self.cursor.skip(COPULA);
        if let Some(side) = self.cursor.eat_side(false) {
            self.sides.push((subject, side));
            return Ok(());
        }
        match self.cursor.eat_relation() {
            Some(relation) => {
                let object = self.object()?;
                self.relate(subject, relation, object);
            }
            None if copula => return Err(self.unexpected()),
            None => {}
        }
        if self.cursor.done() || self.cursor.peek().is_some_and(|w| SEPARATORS.contains(&w) || w == "which") {
            Ok(())
        } else {
            Err(self.unexpected())
        }
    }

    /// Relates what is on one side to what is on the other, or else to all that is on neither.
    fn relate_sides(&mut self) -> Result<(), ParseError> {
        let on =
            |this: &Self, i: usize, side: Option<Spatial>| this.sides.iter().any(|(j, s)| *j == i && Some(*s) == side);
        for (object, side) in self.sides.clone() {
            let all = 0..self.graph.objects.len();
            let mut others: Vec<usize> = all.clone().filter(|i| on(self, *i, side.inverse())).collect();
            if others.is_empty() {
                others = all.filter(|i| !on(self, *i, Some(side))).collect();
            }
            if others.is_empty() {
                return Err(ParseError::Grammar(format!("nothing that something is {} of the picture", side.name())));
            }
            for other in others {
                let said = |r: &Relation| {
                    (r.subject, r.object) == (other, object) && side.inverse().is_some_and(|s| s.name() == r.predicate)
                };
                if !self.graph.relations.iter().any(said) {
                    self.relate(object, side, other);
                }
            }
        }
        Ok(())
    }

    fn unexpected(&self) -> ParseError {
        let what = self.cursor.peek().unwrap_or("the end");
        ParseError::Grammar(format!(
            "\"{what}\" where a relation (such as \"left of\", \"above\", \"inside\") should be"
        ))
    }

    fn relate(&mut self, subject: usize, relation: Spatial, object: usize) {
        self.last = Some(object);
        let relation = Relation { subject, predicate: relation.name().into(), object };
        if !self.graph.relations.contains(&relation) {
            self.graph.relations.push(relation);
        }
    }

    /// A noun phrase, as the object it names: a new one, or one named before.
    fn object(&mut self) -> Result<usize, ParseError> {
        let Mention { article, object } = self.cursor.mention()?;
        let objects = &self.graph.objects;
        let equal = objects.iter().position(|o| *o == object);
        let index = match article {
            Article::A if !self.triples => None,
            Article::A | Article::None => equal,
            Article::The => {
                let means =
                    |o: &Object| o.label == object.label && object.attributes.iter().all(|a| o.attributes.contains(a));
                let mut candidates = (0..objects.len()).filter(|&i| means(&objects[i]));
                match (candidates.next(), candidates.next()) {
                    (Some(_), Some(_)) if objects.iter().filter(|o| **o == object).count() != 1 => {
                        return Err(ParseError::Ambiguous { phrase: object.phrase() });
                    }
                    (Some(_), Some(_)) => equal,
                    (only, _) => only,
                }
            }
        };
        let index = match index {
            Some(index) => index,
            None if objects.len() >= MAX_OBJECTS => return Err(ParseError::TooMany),
            None => {
                self.graph.objects.push(object);
                self.graph.objects.len() - 1
            }
        };
        self.last = Some(index);
        Ok(index)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn triples(text: &str) -> String {
        parse(text).unwrap().triple_text()
    }

    #[test]
    fn the_readme_prompt_parses() {
        assert_eq!(
            triples("a small red ball to the left of a large blue cube, and a green ring above the cube"),
            "small red ball left of large blue cube; green ring above large blue cube"
        );
    }

    #[test]
    fn a_sentence_may_be_unusual_while_all_that_it_names_is_known() {
        let unusual = |text: &str| only_unusual(text, &parse(text).unwrap_err());
        assert!(unusual("There is a red ball. A blue cube has it to its left."));
        assert!(unusual("a red ball, with both a blue cube and a star next to it"));
        for named in
            ["a giraffe left of a cube", "a picture where a giraffe is left of a cube", "two red balls", "to the left"]
        {
            assert!(!unusual(named), "{named}");
        }
        assert!(!unusual("a red blue ball"), "no word of it is unknown");
    }

    #[test]
    fn what_is_named_is_found_in_any_sentence() {
        let names = |text: &str| named(text).iter().map(Object::phrase).collect::<Vec<_>>();
        assert_eq!(
            names("on the left a red ball can be seen, the big blue box right"),
            ["red ball", "large blue cube"]
        );
        assert_eq!(names("the ball beside a small red ball, a ring by the ball"), ["small red ball", "ring"]);
        assert!(names("nothing to the left").is_empty() && names("").is_empty());
    }

    #[test]
    fn forms_of_one_scene_parse_alike() {
        let want = "red ball left of blue cube; green ring above blue cube";
        for text in [
            want,
            "Red ball left of blue cube; green ring above blue cube.",
            "There is a red ball on the left of a blue cube and a green ring over the blue cube",
            "A red ball is to the left of a blue cube. Above the cube is a green ring.",
            "a blue cube with a red ball to its left and a green ring above it",
            "show me a red ball placed left of a blue cube, and above the cube there is a green ring",
            "a picture of a red ball and a blue cube, the ball is left of the cube and a green ring above the blue cube",
            "please draw the red ball left of the blue cube, and the green ring higher than the cube",
            "a picture where a red ball should be left of a blue cube, and the green ring above the cube, please",
            "I would like to see an image in which there is a red ball. It is left of a blue cube. Over the cube is a green ring.",
            "There is a blue cube. To its left is a red ball, and, above it, a green ring.",
            "a blue cube has a red ball on its left side and a green ring on top of it",
            "put a red ball to the left of a blue cube and a green ring above the cube",
        ] {
            assert_eq!(triples(text), want, "{text}");
        }
        assert_eq!(
            triples("a red ball left of a blue cube and above a star, which is inside a large ring"),
            "red ball left of blue cube; red ball above star; star inside large ring"
        );
        assert_eq!(triples("a tiny violet sphere"), "small purple ball");
        assert_eq!(triples("a red ball on the left and a blue cube on the right"), "red ball left of blue cube");
        assert_eq!(triples("On the left is a red ball; the blue cube is to the right"), "red ball left of blue cube");
        assert_eq!(triples("a blue cube, and to the left a red ball"), "red ball left of blue cube");
        assert_eq!(triples("a ring at the top, a star and a cone at the bottom"), "ring above cone; star");
        assert!(parse("a red ball on the left").is_err(), "of what?");
        assert_eq!(triples("a red ball and a red ball"), "red ball; red ball");
        assert_eq!(triples("a yellow star, a black cone and a pink cube"), "yellow star; black cone; pink cube");
    }

    #[test]
    fn errors_help() {
        let error = |text: &str| parse(text).unwrap_err().to_string();
        assert_eq!(error("a red bal left of a cube"), "unknown shape \"bal\"; did you mean \"ball\"?");
        assert!(error("a giraffe").contains("known are ball, cube"));
        assert_eq!(error("a bleu cube"), "unknown colour or size \"bleu\"; did you mean \"blue\"?");
        assert!(error("a crimson ball").contains("\"crimson\""));
        assert!(error("a red blue ball").contains("both red and blue"));
        assert!(error("a red ball left of").contains("ends"));
        assert!(error("a red ball beside a cube").contains("\"beside\" where a relation"));
        assert!(error("a red ball and a red ball, the red ball is above a cube").contains("more than one"));
        assert_eq!(parse(" \n"), Err(ParseError::Empty));
        assert_eq!(parse("there is"), Err(ParseError::Grammar("the prompt names no object".into())));
        assert!(matches!(
            parse("a red ball left of a blue cube, and the blue cube left of the red ball"),
            Err(ParseError::Contradiction(_))
        ));
        assert_eq!(parse(&"a ball, ".repeat(1000)), Err(ParseError::TooMany));
    }

    proptest::proptest! {
        #[test]
        fn no_text_makes_the_parser_panic(text in "[a-z,;. ]{0,60}|.{0,40}") {
            let _ = parse(&text);
        }

        #[test]
        fn no_jumble_of_known_words_makes_the_parser_panic(
            words in proptest::collection::vec(proptest::sample::select(vec![
                "a", "the", "red", "small", "ball", "ring", "left of", "above it", "with", "which", "is", "and", ",", ";", "in",
            ]), 0..20)
        ) {
            let _ = parse(&words.join(" "));
        }
    }
}
