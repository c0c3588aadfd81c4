//! A reader over the words of a prompt or an instruction: noun phrases, relations, and what says nothing.

use super::{
    graph::Object,
    parse::ParseError,
    relation::Spatial,
    tabletop::world::{Colour, Shape, Size},
    words::{self, COPULA, LEAD_IN, SEPARATORS},
};

/// Whether a word is one of shape, colour or size.
pub(super) fn is_of_things(word: &str) -> bool {
    words::shape(word).is_some() || words::colour(word).is_some() || words::size(word).is_some()
}

/// Lower-case words, and the punctuation that separates clauses. A "can" that is a verb is left out: elsewhere it is a cylinder.
pub(super) fn tokens(text: &str) -> Vec<String> {
    let mut out: Vec<String> = Vec::new();
    let mut word = String::new();
    let mut push = |word: String| {
        let is_verb = matches!(word.as_str(), "be" | "see" | "you" | "we" | "i");
        if is_verb && out.last().is_some_and(|last| last == "can") {
            out.pop();
        }
        match word.strip_suffix("'s") {
            Some(stem @ ("it" | "that" | "there")) => out.extend([stem.to_owned(), "is".to_owned()]),
            Some(stem) => out.push(stem.to_owned()),
            None => out.push(word),
        }
    };
    for c in text.chars().flat_map(char::to_lowercase).chain([' ']) {
        if c.is_alphanumeric() || c == '\'' {
            word.push(c);
            continue;
        }
        if !word.is_empty() {
            push(std::mem::take(&mut word));
        }
        match c {
            ',' | ';' => push(c.to_string()),
            '.' | '!' | '?' | ':' | '\n' => push(".".into()),
            _ => {}
        }
    }
    out
}

/// How an object was named in one place.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Mention {
    pub article: Article,
    pub object: Object,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Article {
    None,
    A,
    Another,
    The,
}

impl Article {
    /// Whether it says that the thing was not named before.
    pub fn is_new(self) -> bool {
        matches!(self, Self::A | Self::Another)
    }
}

/// Colour and size as they were said.
#[derive(Debug, Default, Clone, Copy)]
pub(super) struct Adjectives {
    size: Option<Size>,
    colour: Option<Colour>,
}

impl Adjectives {
    /// Takes a word, if it is one of size or colour.
    fn take(&mut self, word: &str) -> Result<bool, ParseError> {
        let clash = if let Some(s) = words::size(word) {
            self.size.replace(s).filter(|old| *old != s).map(|old| (old.name(), s.name()))
        } else if let Some(c) = words::colour(word) {
            self.colour.replace(c).filter(|old| *old != c).map(|old| (old.name(), c.name()))
        } else {
            return Ok(false);
        };
        clash.map_or(Ok(true), |(old, new)| Err(ParseError::Clash(old, new)))
    }

    fn any(self) -> bool {
        self.size.is_some() || self.colour.is_some()
    }

    /// An object's attributes: the size first.
    fn attributes(self) -> Vec<String> {
        let size = self.size.map(|s| s.name().to_string()).into_iter();
        size.chain(self.colour.map(|c| c.name().to_string())).collect()
    }

    /// Those with the attributes that an object has already.
    pub fn joined(mut self, attributes: &[String]) -> Result<Vec<String>, ParseError> {
        attributes.iter().try_for_each(|word| self.take(word).map(|_| ()))?;
        Ok(self.attributes())
    }
}

/// A reader over tokens, shared by prompts and edit instructions.
#[derive(Clone)]
pub(super) struct Cursor {
    pub tokens: Vec<String>,
    pub at: usize,
    /// What was named so far, each of them once.
    named: Vec<Object>,
}

impl Cursor {
    pub fn new(text: &str) -> Self {
        Self { tokens: tokens(text), at: 0, named: Vec::new() }
    }

    pub fn peek(&self) -> Option<&str> {
        self.tokens.get(self.at).map(String::as_str)
    }

    /// Takes the next token.
    pub fn next(&mut self) -> Option<String> {
        let token = self.tokens.get(self.at)?.clone();
        self.at += 1;
        Some(token)
    }

    pub fn done(&self) -> bool {
        self.at >= self.tokens.len()
    }

    /// Skips `phrase` (words separated by blanks) if it is next.
    pub fn eat(&mut self, phrase: &str) -> bool {
        let mut end = self.at;
        for word in phrase.split(' ') {
            if self.tokens.get(end).map(String::as_str) != Some(word) {
                return false;
            }
            end += 1;
        }
        self.at = end;
        true
    }

    /// Skips as many of these words as follow.
    pub fn skip(&mut self, words: &[&str]) -> bool {
        let start = self.at;
        while self.peek().is_some_and(|w| words.contains(&w)) {
            self.at += 1;
        }
        self.at > start
    }

    pub fn eat_relation(&mut self) -> Option<Spatial> {
        let start = self.at;
        self.skip(&["directly", "just", "exactly", "partly", "partially", "slightly"]);
        let found = words::RELATIONS.iter().find(|(phrase, _)| self.eat(phrase));
        // Much is on something that is no object: a table, a background.
        let is_vague = found.is_some_and(|(phrase, _)| *phrase == "on") && self.clone().mention().is_err();
        if found.is_none() || is_vague {
            self.at = start;
            return None;
        }
        found.map(|(_, relation)| *relation)
    }

    pub fn eat_relation_to_it(&mut self) -> Option<Spatial> {
        words::RELATIONS_TO_IT.iter().find(|(phrase, _)| self.eat(phrase)).map(|(_, r)| *r)
    }

    /// Skips verbs and what else says nothing before a thing: "is", "there is", "you see".
    pub fn skip_verbs(&mut self) -> bool {
        let start = self.at;
        while self.skip(COPULA) || self.skip(LEAD_IN) {}
        self.at > start
    }

    /// Whether a sentence begins here.
    pub fn begins_sentence(&self) -> bool {
        self.at == 0 || self.tokens[self.at - 1] == "."
    }

    /// Adjectives, if any follow, also with "and" between them.
    pub fn adjectives(&mut self) -> Result<Option<Adjectives>, ParseError> {
        let (mut said, mut any) = (Adjectives::default(), false);
        loop {
            let start = self.at;
            if any {
                self.skip(&["and", ","]);
            }
            if !self.peek().map_or(Ok(false), |word| said.take(word))? {
                self.at = start;
                return Ok(any.then_some(said));
            }
            (self.at, any) = (self.at + 1, true);
        }
    }

    fn article(&self) -> Article {
        match self.peek() {
            Some("a" | "an" | "one" | "1") => Article::A,
            Some("another") => Article::Another,
            Some("the") => Article::The,
            _ => Article::None,
        }
    }

    pub fn is_article(&self) -> bool {
        self.article() != Article::None
    }

    /// Skips what may stand between what leads and its object: a comma, and after what `begins` a sentence a colon.
    pub fn skip_pause(&mut self, begins: bool) -> bool {
        self.skip(if begins { &[",", "."] } else { &[","] })
    }

    /// Whether nothing more belongs to a clause.
    pub fn ends_clause(&self) -> bool {
        self.peek().is_none_or(|w| SEPARATORS.contains(&w) || w == "which")
    }

    /// A side of the picture, where nothing follows that it would be a side of. Where it leads, its object may follow at once.
    pub fn eat_side(&mut self, leads: bool) -> Option<Spatial> {
        let start = self.at;
        for (phrase, side) in words::SIDES {
            if self.eat(phrase) {
                let object = |w: &str| leads && phrase.contains(' ') && (self.is_article() || LEAD_IN.contains(&w));
                if self.peek().is_none_or(|w| object(w) || SEPARATORS.contains(&w) || COPULA.contains(&w)) {
                    return Some(*side);
                }
            }
            self.at = start;
        }
        None
    }

    /// A noun phrase: article, size and colour in any order, shape or "one".
    pub fn mention(&mut self) -> Result<Mention, ParseError> {
        let mention = self.noun_phrase()?;
        if !self.named.contains(&mention.object) {
            self.named.push(mention.object.clone());
        }
        Ok(mention)
    }

    fn noun_phrase(&mut self) -> Result<Mention, ParseError> {
        let article = self.article();
        if article != Article::None {
            self.at += 1;
        }
        let mut adjectives = Adjectives::default();
        loop {
            let word = self.peek().unwrap_or_default().to_owned();
            let is_of_thing = is_of_things(&word);
            if article == Article::Another && !adjectives.any() && !is_of_thing {
                return Err(ParseError::Pronoun("another"));
            }
            if word.is_empty() {
                return Err(ParseError::Grammar("the prompt ends where an object should be named".into()));
            }
            self.at += 1;
            if let Some(shape) = words::shape(&word) {
                return Ok(Mention { article, object: Object::new(shape.name(), adjectives.attributes()) });
            }
            if word == "one" && adjectives.any() {
                return Ok(Mention { article, object: self.one(article, adjectives)? });
            }
            if !adjectives.take(&word)? {
                return Err(self.unknown(word));
            }
            // "a small, red ball"
            if self.peek() == Some(",") && self.tokens.get(self.at + 1).is_some_and(|word| is_of_things(word)) {
                self.at += 1;
            }
        }
    }

    /// What "the red one" is: the only thing so far that is red, or as "a red one" a thing of the only shape so far. "A small
    /// one" has the colour of the only thing so far as well.
    fn one(&self, article: Article, said: Adjectives) -> Result<Object, ParseError> {
        let attributes = said.attributes();
        let is_so = |object: &&Object| attributes.iter().all(|said| object.attributes.contains(said));
        let mut meant = self.named.iter().filter(is_so);
        if let (Article::The, Some(only), None) = (article, meant.next(), meant.next()) {
            return Ok(only.clone());
        }
        let Some(first) = self.named.first().filter(|first| self.named.iter().all(|o| o.label == first.label)) else {
            return Err(ParseError::Pronoun("one"));
        };
        let colour = first.attributes.iter().find_map(|word| words::colour(word));
        let inherited = colour.filter(|_| said.colour.is_none() && self.named.len() == 1);
        let said = Adjectives { colour: said.colour.or(inherited), ..said };
        Ok(Object::new(first.label.clone(), said.attributes()))
    }

    /// An unknown word: an attribute if a shape or another attribute follows, else a shape.
    fn unknown(&self, word: String) -> ParseError {
        let is_noun = word.chars().all(char::is_alphanumeric) && !COPULA.contains(&word.as_str());
        if !is_noun {
            return ParseError::Grammar(format!("\"{word}\" where an object should be named"));
        }
        if self.peek().is_some_and(is_of_things) {
            let suggestion = words::nearest(&word, words::adjectives()).map(str::to_string);
            ParseError::UnknownAttribute { word, suggestion }
        } else {
            let suggestion = words::nearest(&word, Shape::ALL.iter().map(|s| s.name())).map(str::to_string);
            ParseError::UnknownShape { word, suggestion }
        }
    }
}
