//! Sentences that the grammar does not read: whether their words are known, and which things they name.

use super::{
    cursor::{Cursor, Mention, tokens},
    graph::Object,
    parse::{MAX_OBJECTS, ParseError, nouns_and_adjectives},
    words::{self, COPULA, LEAD_IN, OF_PICTURES, PICTURES, SEPARATORS, WISHES},
};

/// What is wrong with a text that the grammar cannot read: the error, or that nobody knows one of its words. Nothing where only
/// the sentence is unusual, while all that it names is known.
pub fn mistake(text: &str, error: ParseError) -> Option<ParseError> {
    let stumbled = match &error {
        ParseError::UnknownShape { word, .. } | ParseError::UnknownAttribute { word, .. } => Some(word),
        ParseError::Grammar(_) => None,
        _ => return Some(error),
    };
    if let Some(word) = tokens(text).into_iter().find(|word| words::is_plural(word)) {
        return Some(ParseError::Several(word));
    }
    match unknown_word(text) {
        Some(word) if stumbled == Some(&word) => Some(error),
        Some(word) => {
            let suggestion = words::nearest(&word, nouns_and_adjectives()).map(str::to_owned);
            Some(ParseError::UnknownWord { word, suggestion })
        }
        None => named(text).is_empty().then_some(error),
    }
}

/// The first word of a text that nobody knows.
fn unknown_word(text: &str) -> Option<String> {
    let phrases = [words::RELATIONS, words::RELATIONS_TO_IT, words::SIDES].concat();
    let lists = [COPULA, LEAD_IN, WISHES, SEPARATORS, PICTURES, OF_PICTURES, words::FILLERS].concat();
    let says = |phrase: &str, word: &str| phrase.split(' ').any(|part| part == word);
    let means = |word: &str| {
        word.len() == 1
            || words::shape(word).is_some()
            || words::colour(word).is_some()
            || words::size(word).is_some()
            || lists.iter().any(|phrase| says(phrase, word))
            || phrases.iter().any(|(phrase, _)| says(phrase, word))
    };
    tokens(text).into_iter().find(|word| !means(word))
}

/// The things that a text names, whatever is said of them. "The ball" is one that was named before, "a ball" is not. None
/// where a colour or a size is said apart from its thing, or where nobody knows what "another" or "one" stands for.
pub fn named(text: &str) -> Vec<Object> {
    let mut cursor = Cursor::new(text);
    if cursor.tokens.iter().any(|word| word == "other") {
        return Vec::new();
    }
    let mut found: Vec<Object> = Vec::new();
    while !cursor.done() && found.len() < MAX_OBJECTS {
        let start = cursor.at;
        let known = |m: &Mention| !m.article.is_new() && found.iter().any(|o| o.is_meant_by(&m.object));
        match cursor.mention() {
            Ok(mention) if known(&mention) => {}
            Ok(mention) => found.push(mention.object),
            Err(ParseError::Pronoun(_)) => return Vec::new(),
            Err(_) => cursor.at = start + 1,
        }
    }
    // "The ball is red": what is said elsewhere would be lost.
    let adjective = |word: &String| words::colour(word).map(|c| c.name()).or(words::size(word).map(|s| s.name()));
    let mut adjectives = cursor.tokens.iter().filter_map(adjective);
    let is_kept = |a: &str| found.iter().any(|o| o.attributes.iter().any(|b| a == b));
    if adjectives.all(is_kept) { found } else { Vec::new() }
}

#[cfg(test)]
mod tests {
    use super::{super::parse::parse, *};

    #[test]
    fn a_sentence_may_be_unusual_while_all_its_words_are_known() {
        let said =
            |text: &str| mistake(text, parse(text).unwrap_err()).map(|error| error.to_string()).unwrap_or_default();
        for unusual in ["a ball beside a cube", "in the background there is a red cube; the left one is near it"] {
            assert_eq!(said(unusual), "", "{unusual}");
        }
        assert_eq!(said("a red ball next to a blu cube"), "unknown word \"blu\"; did you mean \"blue\"?");
        assert!(said("a ball beside a giraffe").starts_with("unknown word \"giraffe\"; known are ball, "));
        assert!(said("a ball without a cube").contains("\"without\""));
        assert!(said("a giraffe left of a cube").starts_with("unknown shape \"giraffe\""));
        for several in ["two red balls left of a cube", "a cube beside 3 balls", "both balls", "three small boxes"] {
            assert!(said(several).contains("s\" asks for several things at once"), "{several}: {}", said(several));
        }
        assert!(said("two objects: a ball and a cube").starts_with("unknown shape \"two\""));
        let pronouns = ["a red ball and another one", "a red ball beside another", "a cube and a ball and a red one"];
        for unclear in pronouns {
            assert!(!said(unclear).is_empty(), "{unclear}");
        }
        assert!(said("a red ball left of the other red ball").contains("\"other\""));
        assert!(said("a red blue ball").contains("both red and blue"));
        assert!(said("there is one").contains("ends where an object"), "{}", said("there is one"));
    }

    #[test]
    fn what_is_named_is_found_in_any_sentence() {
        let names = |text: &str| named(text).iter().map(Object::phrase).collect::<Vec<_>>();
        assert_eq!(
            names("on the left you can see a red ball, the big blue box right"),
            ["red ball", "large blue cube"]
        );
        assert_eq!(names("a small red ball beside a ring, the ring by the ball"), ["small red ball", "ring"]);
        assert_eq!(names("a red ball next to another red ball, the ball"), ["red ball", "red ball"]);
        assert_eq!(names("a green can beside a can"), ["green cylinder", "cylinder"]);
        assert!(names("a ball that is red is left of a cube").is_empty(), "a red ball, or a red cube?");
        assert!(names("nothing to the left").is_empty() && names("").is_empty());
    }
}
