//! From words to a scene graph: the paper's triples and plain English alike.
//!
//! The grammar: clauses joined by commas, semicolons, full stops and "and". A clause is a noun phrase; or one related to
//! another ("a red ball is left of a blue cube"); or the same with the relation first ("above the cube is a ring"), with
//! "which" for the object named last, with "with ... to its left", or with a further relation of the same subject. "The"
//! refers back to an object already named, "a" names a new one; without an article (as in triples) equal phrases are
//! equal objects. "It is left of a cube" goes on with the subject before, "to its left is a cube" with the only thing named
//! before. "The blue one" is the only blue thing named, "a blue one" of the only shape. What is on one side of the picture lies so to what is on the other ("a ball on the left and a cube on the right").

use super::{
    cursor::{Article, Cursor, Mention},
    graph::{Relation, SceneGraph},
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
    #[error("unknown word \"{word}\"{}", hint(.suggestion.as_deref(), nouns_and_adjectives()))]
    UnknownWord { word: String, suggestion: Option<String> },
    #[error("\"{0}\" asks for several things at once; name each by itself, as in \"a red ball and a blue ball\"")]
    Several(String),
    #[error("it is not clear what \"{0}\" stands for; name the thing itself")]
    Pronoun(&'static str),
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

pub(super) fn nouns_and_adjectives() -> impl Iterator<Item = &'static str> {
    Shape::ALL.iter().map(|s| s.name()).chain(words::adjectives())
}

fn hint(suggestion: Option<&str>, known: impl Iterator<Item = &'static str>) -> String {
    match suggestion {
        Some(word) => format!("; did you mean \"{word}\"?"),
        None => format!("; known are {}", known.collect::<Vec<_>>().join(", ")),
    }
}

/// Parses a prompt into a scene graph in canonical order, or says why there is none.
pub fn parse(text: &str) -> Result<SceneGraph, ParseError> {
    let mut parser = Parser::new(text);
    parser.prompt(text)?;
    let graph = parser.graph.canonical();
    if let Some(why) = contradictions(&graph).into_iter().next() {
        return Err(ParseError::Contradiction(why));
    }
    match contradictions(&parser.merged()).into_iter().next() {
        Some(why) => Err(ParseError::Contradiction(format!("{why}; if two of a kind are meant, say \"another\""))),
        None => Ok(graph),
    }
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
    /// What "its left" is the left of: the only thing that the last clause named, or what "it" stood for there.
    owner: Option<usize>,
    /// What is on some side of the picture.
    sides: Vec<(usize, Spatial)>,
    /// What was named as "another" of its kind.
    others: Vec<usize>,
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
            others: Vec::new(),
        }
    }

    fn prompt(&mut self, text: &str) -> Result<(), ParseError> {
        if text.trim().is_empty() {
            return Err(ParseError::Empty);
        }
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
        if self.graph.objects.is_empty() { Err(ParseError::Grammar("the prompt has no words".into())) } else { Ok(()) }
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
            (self.subject, self.owner) = (Some(subject), None);
            self.relate(subject, relation, object);
            return self.ends_with(object);
        }
        // "to its left is a cube"
        let relation = self.owner.and_then(|owner| Some((owner, self.cursor.eat_relation_to_it()?)));
        if let Some((owner, relation)) = relation {
            self.cursor.skip(&[","]);
            self.cursor.skip_verbs();
            let other = self.object()?;
            self.subject = Some(other);
            self.relate(other, relation, owner);
            return self.goes_on(other);
        }
        // "on the left is a ball"
        let begins = self.cursor.begins_sentence();
        if let Some(side) = self.cursor.eat_side(true) {
            self.cursor.skip_pause(begins);
            self.cursor.skip_verbs();
            let subject = self.object()?;
            (self.subject, self.owner) = (Some(subject), Some(subject));
            self.sides.push((subject, side));
            return self.goes_on(subject);
        }
        if let Some(relation) = self.cursor.eat_relation() {
            let object = self.object()?;
            let inverted = self.is_inverted(begins);
            self.owner = None;
            if let Some(subject) = self.subject.filter(|_| !inverted) {
                self.relate(subject, relation, object);
                return self.ends_with(object);
            }
            self.cursor.skip_pause(begins);
            self.cursor.skip_verbs();
            let subject = self.object()?;
            self.subject = Some(subject);
            self.relate(subject, relation, object);
            return self.goes_on(subject);
        }
        let subject = match self.subject {
            Some(subject) if self.cursor.eat("it") => subject,
            _ => self.object()?,
        };
        // "a cube is to its left"
        if let Some(owner) = self.owner.filter(|owner| *owner != subject) {
            let start = self.cursor.at;
            self.cursor.skip(COPULA);
            if let Some(relation) = self.cursor.eat_relation_to_it() {
                self.relate(subject, relation, owner);
                (self.subject, self.last) = (Some(subject), Some(subject));
                return self.ends();
            }
            self.cursor.at = start;
        }
        (self.subject, self.owner) = (Some(subject), Some(subject));
        if self.cursor.skip(&["with", "has", "having"]) {
            let other = self.object()?;
            let Some(relation) = self.cursor.eat_relation_to_it() else { return Err(self.unexpected()) };
            self.relate(other, relation, subject);
            self.last = Some(other);
            return Ok(());
        }
        // Of several things: which are they?
        if self.cursor.peek() == Some("are") {
            return Err(self.unexpected());
        }
        let copula = self.cursor.skip(COPULA);
        if copula && self.describes(subject)? {
            return Ok(());
        }
        if let Some(side) = self.cursor.eat_side(false) {
            // "above and to the left of a cube"
            let mut ahead = self.cursor.clone();
            ahead.skip(&["and"]);
            if ahead.eat_relation().is_some() && ahead.mention().is_ok() && ahead.ends_clause() {
                self.cursor.skip(&["and"]);
                let (relation, object) = (self.cursor.eat_relation(), self.object()?);
                self.relate(subject, side, object);
                relation.into_iter().for_each(|relation| self.relate(subject, relation, object));
                self.owner = None;
            } else {
                self.sides.push((subject, side));
            }
            return self.ends();
        }
        match self.cursor.eat_relation() {
            Some(relation) => {
                let mut object = self.object()?;
                self.relate(subject, relation, object);
                self.owner = None;
                // "a ball above a cube above a ring"
                while let Some(relation) = self.cursor.eat_relation() {
                    let next = self.object()?;
                    self.relate(object, relation, next);
                    object = next;
                }
                return self.ends_with(object);
            }
            None if copula => return Err(self.unexpected()),
            None => {}
        }
        self.ends()
    }

    /// The end of a clause whose object may have a relation of its own: "to its left is a cube above a ring".
    fn goes_on(&mut self, subject: usize) -> Result<(), ParseError> {
        self.last = Some(subject);
        // "... is a ring that is green"
        let start = self.cursor.at;
        if self.cursor.skip(COPULA) && self.describes(subject)? {
            return Ok(());
        }
        self.cursor.at = start;
        if let Some(relation) = self.cursor.eat_relation() {
            let object = self.object()?;
            self.relate(subject, relation, object);
            self.owner = None;
        }
        self.ends_with(self.last.unwrap_or(subject))
    }

    /// Whether the subject of a relation that came first follows: after a verb or at once, or after a comma.
    fn is_inverted(&mut self, begins: bool) -> bool {
        if self.cursor.skip_verbs() || self.cursor.is_article() {
            return true;
        }
        let mut ahead = self.cursor.clone();
        if !ahead.skip_pause(begins) {
            return false;
        }
        let verbs = ahead.skip_verbs();
        ahead.is_article() && ahead.mention().is_ok() && (verbs || ahead.ends_clause())
    }

    /// The adjectives after "the ball is", if nothing else follows.
    fn describes(&mut self, subject: usize) -> Result<bool, ParseError> {
        let mut ahead = self.cursor.clone();
        let Some(said) = ahead.adjectives()?.filter(|_| ahead.ends_clause()) else { return Ok(false) };
        let object = &mut self.graph.objects[subject];
        object.attributes = said.joined(&object.attributes)?;
        self.cursor = ahead;
        Ok(true)
    }

    /// The end of a clause whose last word is `object`: "... a cube and a ring" may be about both or about the first.
    fn ends_with(&self, object: usize) -> Result<(), ParseError> {
        let mut ahead = self.cursor.clone();
        if ahead.eat("and") && ahead.mention().is_ok() && ahead.ends_clause() {
            let phrase = self.graph.objects[object].phrase();
            return Err(ParseError::Grammar(format!("it is not clear what stands with \"{phrase}\" behind \"and\"")));
        }
        self.ends()
    }

    fn ends(&self) -> Result<(), ParseError> {
        if self.cursor.ends_clause() { Ok(()) } else { Err(self.unexpected()) }
    }

    /// Relates what is on one side of the picture to what is on the other, or to the only other thing there is.
    fn relate_sides(&mut self) -> Result<(), ParseError> {
        let unclear = || Err(ParseError::Grammar("it is not clear what is on which side of what".into()));
        let said = self.graph.relations.clone();
        for (object, side) in self.sides.clone() {
            let opposite = |i: &usize| self.sides.iter().any(|(j, s)| j == i && Some(*s) == side.inverse());
            let all = 0..self.graph.objects.len();
            let mut others: Vec<usize> = all.clone().filter(opposite).collect();
            let is_only = others.is_empty() && all.len() == 2;
            if is_only {
                others.push(1 - object);
            }
            if others.is_empty() || others.contains(&object) {
                return unclear();
            }
            let axis = [Some(side), side.inverse(), Some(Spatial::Inside)].map(|r| r.map(Spatial::name));
            for other in others {
                let between = |r: &&Relation| [(object, other), (other, object)].contains(&(r.subject, r.object));
                let known = is_only && said.iter().any(|r| between(&r));
                let mut so_far = self.graph.relations.iter().filter(between);
                if !known && !so_far.any(|r| axis.contains(&Some(r.predicate.as_str()))) {
                    self.relate(object, side, other);
                }
            }
        }
        let lies = |i: usize| self.graph.relations.iter().any(|r| r.subject == i || r.object == i);
        if self.sides.is_empty() || (0..self.graph.objects.len()).all(lies) { Ok(()) } else { unclear() }
    }

    /// The graph as it is where a statement repeats: "a ball left of a cube, a cube left of a ball" is about two things, not
    /// four, unless "another" is said. What a statement relates to anything new, or to "the" thing of before, is its own.
    fn merged(&self) -> SceneGraph {
        let mut graph = self.graph.clone();
        // Things that are related belong to one statement, which has the number of its first thing.
        let mut statement: Vec<usize> = (0..graph.objects.len()).collect();
        for relation in &graph.relations {
            let [a, b] = [relation.subject, relation.object].map(|i| statement[i]);
            statement.iter_mut().filter(|s| **s == a.max(b)).for_each(|s| *s = a.min(b));
        }
        let all = || 0..statement.len();
        let earlier = |i: usize| {
            let is_same = |j: &usize| self.graph.objects[*j] == self.graph.objects[i] && statement[*j] != statement[i];
            (0..i).find(is_same).filter(|_| !self.others.contains(&i))
        };
        let repeats = |s: usize| all().filter(|i| statement[*i] == s).all(|i| earlier(i).is_some());
        let same = |i: usize| earlier(i).filter(|_| repeats(statement[i])).unwrap_or(i);
        for relation in &mut graph.relations {
            (relation.subject, relation.object) = (same(relation.subject), same(relation.object));
        }
        graph
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
            Article::Another => None,
            Article::A if !self.triples => None,
            Article::A | Article::None => equal,
            Article::The => {
                let mut candidates = (0..objects.len()).filter(|&i| objects[i].is_meant_by(&object));
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
                let index = self.graph.objects.len() - 1;
                self.others.extend((article == Article::Another).then_some(index));
                index
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

    /// No sentence of this grammar, though there is nothing else wrong with it.
    fn unclear(texts: &[&str]) {
        for text in texts {
            assert!(matches!(parse(text), Err(ParseError::Grammar(_))), "{text}");
        }
    }

    #[test]
    fn the_readme_prompt_parses() {
        assert_eq!(
            triples("a small red ball to the left of a large blue cube, and a green ring above the cube"),
            "small red ball left of large blue cube; green ring above large blue cube"
        );
    }

    #[test]
    fn what_is_on_one_side_lies_so_to_what_is_on_the_other() {
        for text in [
            "a red ball on the left and a blue cube on the right",
            "On the left there is a red ball; the blue cube is to the right",
            "On the left: a red ball. On the right: a blue cube.",
            "a blue cube, and to the left a red ball",
        ] {
            assert_eq!(parse(text).unwrap().relations.len(), 1, "{text}");
            assert_eq!(triples(text), "red ball left of blue cube", "{text}");
        }
        assert_eq!(
            triples("a red ball above and to the left of a blue cube, and a green ring right of the cube"),
            "red ball above blue cube; red ball left of blue cube; green ring right of blue cube"
        );
        assert_eq!(triples("a red ball on the left, a blue cube left of the ball"), "blue cube left of red ball");
        unclear(&[
            "a red ball on the left",
            "a red ball on the left; a red ball on the right",
            "a large red ring on the left, a small ball inside the ring and a green cube",
            "a red ball and a blue ring on the left and a cube on the right",
        ]);
    }

    #[test]
    fn it_is_what_there_is_no_doubt_about() {
        assert_eq!(triples("a cube. A star is above it."), "star above cube");
        assert_eq!(triples("a ball above a cube, it is left of a star"), "ball above cube; ball left of star");
        let chain = "cube left of ball; cube above star";
        assert_eq!(triples("There is a ball. To its left is a cube above a star."), chain);
        assert_eq!(triples("There is a ball. To its left is a cube, which is above a star."), chain);
        assert_eq!(triples("above the cube is a ring, which is left of a star"), "ring above cube; ring left of star");
        assert_eq!(triples("a ball above a cube above a ring"), "ball above cube; cube above ring");
        let with = "a cube with a ball to its left, and a ring is below it";
        assert_eq!(triples(with), "ball left of cube; ring below cube");
        // The cube or the ball?
        assert!(parse("a ball is left of a cube, above it is a ring").is_err());
    }

    #[test]
    fn relations_that_come_first_are_those_of_what_follows() {
        let want = "red ball left of blue cube; green ring above blue cube";
        for text in [
            "A red ball is left of a blue cube. Above the cube, a green ring.",
            "A red ball is left of a blue cube. Above the cube you can see a green ring.",
            "To the left of a blue cube, a red ball. Above the cube, there is a green ring.",
            "a red ball left of a blue cube, above the cube a green ring",
            "There's a blue cube. To its left is a red ball, and above the blue cube is a ring that's green.",
            "A ball is left of a cube. A green ring is above the cube. The ball is red and the cube is blue.",
            "a red ball that's left of a blue cube, and atop the cube is a green ring",
        ] {
            assert_eq!(triples(text), want, "{text}");
        }
        assert_eq!(triples("A large ring. Inside the ring, a small star."), "small star inside large ring");
        assert_eq!(triples("A cube. A ball is to its left and above a star."), "ball left of cube; ball above star");
        assert_eq!(triples("a small, red ball above a large, blue can"), "small red ball above large blue cylinder");
        assert_eq!(triples("red ball above can; cube left of can"), "red ball above cylinder; cube left of cylinder");
        let another = "There is one red ball; above it is another red ball";
        assert_eq!(triples(another), "red ball above red ball");
        assert_eq!(triples("1 red ball above a blue one"), "red ball above blue ball");
        assert_eq!(triples("a large red ball above a small one"), "large red ball above small red ball");
        assert_eq!(triples("a red ball and a blue cube, the red one is above the cube"), "red ball above blue cube");
        assert_eq!(
            triples("a red ball and a blue ball, the blue one is above the red one"),
            "blue ball above red ball"
        );
    }

    #[test]
    fn what_may_be_about_one_thing_or_two_is_not_guessed() {
        unclear(&[
            "a red ball and a blue cube are left of a green ring",
            "a red ball is above a blue cube and a green ring",
            "Above the ring is a red ball and a blue cube.",
            "a ball above a cube and left of a ring right of a star",
        ]);
        // With a comma it is a list.
        assert_eq!(triples("a ball above a cube, and a ring"), "ball above cube; ring");
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
        for unclear in [
            "a red ball above a blue cube, and a green one",
            "a red one",
            "a ball and another",
            "a ball and another one",
        ] {
            assert!(error(unclear).contains("is not clear what"), "{unclear}: {}", error(unclear));
        }
        assert!(error("a ball is red and one is blue").starts_with("\"is\" where an object"));
        assert!(error("a red ball beside a cube").contains("\"beside\" where a relation"));
        assert!(error("a red ball and a red ball, the red ball is above a cube").contains("more than one"));
        assert_eq!(parse(" \n"), Err(ParseError::Empty));
        assert_eq!(parse("there is"), Err(ParseError::Grammar("the prompt names no object".into())));
        for impossible in [
            "a red ball left of a blue cube, and the blue cube left of the red ball",
            "a red ball left of a blue cube, and a blue cube left of a red ball",
            "a ball above a cube, and a ball below a cube",
        ] {
            assert!(matches!(parse(impossible), Err(ParseError::Contradiction(_))), "{impossible}");
        }
        for possible in [
            "a red ball left of a blue cube, and another blue cube left of the red ball",
            "a red ball left of a blue cube, and another blue cube left of another red ball",
            "a red ball left of a blue cube, and a red ball right of the blue cube",
            "a blue cube with a red ball to its left and a red ball to its right",
            "a red ball left of a blue cube and right of a blue cube",
            "a red ball above a blue cube above a red ball",
            "a red ball left of a red ball",
        ] {
            assert!(parse(possible).is_ok(), "{possible}");
        }
        assert_eq!(parse("\u{1f34e}"), Err(ParseError::Grammar("the prompt has no words".into())));
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
                "it", "to its left", "on the left", "at the top", "above", "on", "can", "there", "another", "one",
            ]), 0..20)
        ) {
            let _ = parse(&words.join(" "));
        }
    }
}
