//! A reader over the words of a prompt or an instruction: noun phrases, relations, and what says nothing.

use super::{
    graph::Object,
    parse::ParseError,
    relation::Spatial,
    tabletop::world::{Colour, Shape, Size},
    words::{self, COPULA, LEAD_IN, SEPARATORS},
};

/// Lower-case words, and the punctuation that separates clauses.
pub(super) fn tokens(text: &str) -> Vec<String> {
    let mut out = Vec::new();
    let mut word = String::new();
    for c in text.chars().flat_map(char::to_lowercase) {
        if c.is_alphanumeric() || c == '-' || c == '\'' {
            word.push(c);
            continue;
        }
        if !word.is_empty() {
            out.push(std::mem::take(&mut word));
        }
        match c {
            ',' | ';' => out.push(c.to_string()),
            '.' | '!' | '?' | ':' | '\n' => out.push(".".into()),
            _ => {}
        }
    }
    if !word.is_empty() {
        out.push(word);
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
    The,
}

/// A reader over tokens, shared by prompts and edit instructions.
#[derive(Clone)]
pub(super) struct Cursor {
    pub tokens: Vec<String>,
    pub at: usize,
}

impl Cursor {
    pub fn new(text: &str) -> Self {
        Self { tokens: tokens(text), at: 0 }
    }

    pub fn peek(&self) -> Option<&str> {
        self.tokens.get(self.at).map(String::as_str)
    }

    /// Takes the next token.
    pub fn next(&mut self) -> Option<String> {
        let token = self.tokens.get(self.at).cloned();
        self.at += 1;
        token
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
        self.skip(&["directly", "just", "exactly"]);
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

    pub fn is_article(&self) -> bool {
        matches!(self.peek(), Some("a" | "an" | "one" | "another" | "the"))
    }

    /// Whether nothing more belongs to a clause.
    pub fn ends_clause(&self) -> bool {
        self.peek().is_none_or(|w| SEPARATORS.contains(&w) || w == "which")
    }

    /// A side of the picture, where nothing follows that it would be a side of. Where it leads, its object may follow at once.
    pub fn eat_side(&mut self, leads: bool) -> Option<Spatial> {
        let start = self.at;
        for (phrase, side) in words::SIDES {
            let follows = |w: &str| {
                let object = leads && phrase.contains(' ') && (["a", "an", "the"].contains(&w) || LEAD_IN.contains(&w));
                object || SEPARATORS.contains(&w) || COPULA.contains(&w)
            };
            if self.eat(phrase) && self.peek().is_none_or(follows) {
                return Some(*side);
            }
            self.at = start;
        }
        None
    }

    /// A noun phrase: article, size and colour in any order, shape.
    pub fn mention(&mut self) -> Result<Mention, ParseError> {
        let article = match self.peek() {
            Some("a" | "an" | "one" | "another") => Article::A,
            Some("the") => Article::The,
            _ => Article::None,
        };
        if article != Article::None {
            self.at += 1;
        }
        let (mut size, mut colour) = (None::<Size>, None::<Colour>);
        loop {
            let Some(word) = self.peek().map(str::to_string) else {
                return Err(ParseError::Grammar("the prompt ends where an object should be named".into()));
            };
            self.at += 1;
            if let Some(shape) = words::shape(&word) {
                let attributes = size.map(|s| s.name().to_string()).into_iter();
                let attributes = attributes.chain(colour.map(|c| c.name().to_string())).collect();
                return Ok(Mention { article, object: Object::new(shape.name(), attributes) });
            }
            let clash = if let Some(s) = words::size(&word) {
                size.replace(s).filter(|old| *old != s).map(|old| (old.name(), s.name()))
            } else if let Some(c) = words::colour(&word) {
                colour.replace(c).filter(|old| *old != c).map(|old| (old.name(), c.name()))
            } else {
                return Err(self.unknown(word));
            };
            if let Some((old, new)) = clash {
                return Err(ParseError::Clash(old, new));
            }
        }
    }

    /// An unknown word: an attribute if a shape or another attribute follows, else a shape.
    fn unknown(&self, word: String) -> ParseError {
        if word.len() == 1 && !word.chars().all(char::is_alphanumeric) {
            return ParseError::Grammar(format!("\"{word}\" where an object should be named"));
        }
        let known = |w: &str| words::shape(w).is_some() || words::colour(w).is_some() || words::size(w).is_some();
        if self.peek().is_some_and(known) {
            let suggestion = words::nearest(&word, words::adjectives()).map(str::to_string);
            ParseError::UnknownAttribute { word, suggestion }
        } else {
            let suggestion = words::nearest(&word, Shape::ALL.iter().map(|s| s.name())).map(str::to_string);
            ParseError::UnknownShape { word, suggestion }
        }
    }
}
