//! The words of the tabletop grammar: what they mean, and which is nearest to a word that means nothing.

use super::{
    relation::Spatial::{self, Above, Behind, Below, InFrontOf, Inside, LeftOf, RightOf},
    tabletop::world::{Colour, Shape, Size},
};

/// Every phrase that means a relation, the longest first where one begins another.
pub const RELATIONS: &[(&str, Spatial)] = &[
    ("to the left hand side of", LeftOf),
    ("on the left hand side of", LeftOf),
    ("to the right hand side of", RightOf),
    ("on the right hand side of", RightOf),
    ("to the left side of", LeftOf),
    ("on the left side of", LeftOf),
    ("to the right side of", RightOf),
    ("on the right side of", RightOf),
    ("to the left of", LeftOf),
    ("on the left of", LeftOf),
    ("to the right of", RightOf),
    ("on the right of", RightOf),
    ("in the middle of", Inside),
    ("left of", LeftOf),
    ("right of", RightOf),
    ("left to", LeftOf),
    ("right to", RightOf),
    ("in front of", InFrontOf),
    ("on top of", Above),
    ("atop", Above),
    ("higher than", Above),
    ("lower than", Below),
    ("inside of", Inside),
    ("inside", Inside),
    ("within", Inside),
    ("in", Inside),
    ("above", Above),
    ("over", Above),
    ("below", Below),
    ("beneath", Below),
    ("underneath", Below),
    ("under", Below),
    ("behind", Behind),
    ("on", Above),
];

/// Phrases that relate something to what "it" stands for.
pub const RELATIONS_TO_IT: &[(&str, Spatial)] = &[
    ("to the left of it", LeftOf),
    ("to the right of it", RightOf),
    ("left of it", LeftOf),
    ("right of it", RightOf),
    ("on its left side", LeftOf),
    ("to its left", LeftOf),
    ("on its left", LeftOf),
    ("on its right side", RightOf),
    ("to its right", RightOf),
    ("on its right", RightOf),
    ("on top of it", Above),
    ("on it", Above),
    ("in front of it", InFrontOf),
    ("inside it", Inside),
    ("within it", Inside),
    ("in it", Inside),
    ("above it", Above),
    ("over it", Above),
    ("below it", Below),
    ("beneath it", Below),
    ("under it", Below),
    ("underneath it", Below),
    ("behind it", Behind),
];

/// Phrases that say on which side of the picture something is: of what is on the other side it is this.
pub const SIDES: &[(&str, Spatial)] = &[
    ("on the left side", LeftOf),
    ("on the left", LeftOf),
    ("to the left", LeftOf),
    ("at the left", LeftOf),
    ("on the right side", RightOf),
    ("on the right", RightOf),
    ("to the right", RightOf),
    ("at the right", RightOf),
    ("at the top", Above),
    ("on top", Above),
    ("above", Above),
    ("at the bottom", Below),
    ("below", Below),
    ("underneath", Below),
    ("in front", InFrontOf),
    ("in the foreground", InFrontOf),
    ("in the background", Behind),
    ("in the back", Behind),
    ("behind", Behind),
];

/// Words between a subject and its relation.
pub const COPULA: &[&str] = &[
    "is",
    "are",
    "sits",
    "stands",
    "lies",
    "rests",
    "sitting",
    "standing",
    "lying",
    "resting",
    "placed",
    "positioned",
    "located",
    "shown",
    "visible",
    "appears",
    "should",
    "must",
    "will",
    "be",
    "seen",
    "that",
];
/// Words before a clause that say nothing about it.
pub const LEAD_IN: &[&str] = &[
    "there", "is", "are", "show", "me", "draw", "paint", "make", "give", "put", "place", "generate", "create",
    "please", "imagine", "i", "i'd", "we", "you", "see", "have", "would", "could",
];
/// And phrases that say nothing either.
pub const WISHES: &[&str] = &["like to", "want to", "like", "want"];
pub const SEPARATORS: &[&str] = &[",", ";", ".", "and", "while", "also", "then", "but", "please"];
pub const PICTURES: &[&str] = &["picture", "image", "photo", "photograph", "drawing", "painting", "scene", "rendering"];
/// Words between "a picture" and what it shows.
pub const OF_PICTURES: &[&str] =
    &["of", "with", "showing", "shows", "where", "in", "which", "that", "containing", "contains"];

/// Words that name nothing which could be drawn.
pub const FILLERS: &[&str] = &[
    "an", "they", "them", "their", "this", "these", "those", "here", "who", "whose", "by", "from", "for", "so", "as",
    "or", "next", "near", "both", "each", "other", "another", "one", "let", "may", "has", "having", "being", "was",
    "were", "directly", "just", "exactly", "hand", "object", "objects", "thing", "things", "shape", "shapes",
    "coloured", "colored", "sized", "table", "beside", "between", "among", "around", "close", "far", "away",
    "touching", "against", "along", "together", "opposite", "facing", "corner", "centre", "center", "ground", "floor",
    "very", "slightly", "bit",
];

const SHAPES: &[(&str, Shape)] = &[
    ("sphere", Shape::Ball),
    ("block", Shape::Cube),
    ("box", Shape::Cube),
    ("pyramid", Shape::Cone),
    ("hoop", Shape::Ring),
    ("donut", Shape::Ring),
    ("torus", Shape::Ring),
    ("tube", Shape::Cylinder),
    ("can", Shape::Cylinder),
];

const COLOURS: &[(&str, Colour)] =
    &[("violet", Colour::Purple), ("magenta", Colour::Pink), ("turquoise", Colour::Cyan), ("golden", Colour::Yellow)];

const SIZES: &[(&str, Size)] =
    &[("big", Size::Large), ("huge", Size::Large), ("little", Size::Small), ("tiny", Size::Small)];

/// Whether a word is the plural of a shape's.
pub fn is_plural(word: &str) -> bool {
    let singular = word.strip_suffix('s');
    singular
        .is_some_and(|word| shape(word).is_some() || word.strip_suffix('e').is_some_and(|word| shape(word).is_some()))
}

fn lookup<T: Copy>(word: &str, synonyms: &[(&str, T)]) -> Option<T> {
    synonyms.iter().find(|(s, _)| *s == word).map(|(_, t)| *t)
}

pub fn shape(word: &str) -> Option<Shape> {
    Shape::from_name(word).or_else(|| lookup(word, SHAPES))
}

pub fn colour(word: &str) -> Option<Colour> {
    Colour::from_name(word).or_else(|| lookup(word, COLOURS))
}

pub fn size(word: &str) -> Option<Size> {
    Size::from_name(word).or_else(|| lookup(word, SIZES))
}

/// All words of size and colour.
pub fn adjectives() -> impl Iterator<Item = &'static str> {
    Size::ALL.iter().map(|s| s.name()).chain(Colour::ALL.iter().map(|c| c.name()))
}

/// The nearest of `known` to `word` by edit distance, if it is near enough to be a slip.
pub fn nearest<'a>(word: &str, known: impl Iterator<Item = &'a str>) -> Option<&'a str> {
    let limit = if word.chars().count() <= 4 { 1 } else { 2 };
    let length = word.chars().count();
    let near = known.filter(|k| k.len().abs_diff(length) <= limit);
    near.map(|k| (edit_distance(word, k), k)).filter(|(d, _)| *d <= limit).min().map(|(_, k)| k)
}

/// Levenshtein's distance, with the swap of two neighbours counted as one slip.
fn edit_distance(a: &str, b: &str) -> usize {
    let (a, b): (Vec<char>, Vec<char>) = (a.chars().collect(), b.chars().collect());
    let mut rows = vec![vec![0; b.len() + 1]; a.len() + 1];
    for i in 0..=a.len() {
        for j in 0..=b.len() {
            rows[i][j] = if i == 0 || j == 0 {
                i + j
            } else {
                let replaced = rows[i - 1][j - 1] + usize::from(a[i - 1] != b[j - 1]);
                let mut best = replaced.min(rows[i - 1][j] + 1).min(rows[i][j - 1] + 1);
                if i > 1 && j > 1 && a[i - 1] == b[j - 2] && a[i - 2] == b[j - 1] {
                    best = best.min(rows[i - 2][j - 2] + 1);
                }
                best
            };
        }
    }
    rows[a.len()][b.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nearest_forgives_slips_only() {
        let shapes = || Shape::ALL.iter().map(|s| s.name());
        assert_eq!(nearest("bal", shapes()), Some("ball"));
        assert_eq!(nearest("cilinder", shapes()), Some("cylinder"));
        assert_eq!(nearest("giraffe", shapes()), None);
        assert_eq!((edit_distance("kitten", "sitting"), edit_distance("bleu", "blue")), (3, 1));
    }

    #[test]
    fn no_phrase_hides_a_longer_one() {
        for table in [RELATIONS, RELATIONS_TO_IT, SIDES] {
            for (i, (phrase, _)) in table.iter().enumerate() {
                let hidden = table[i + 1..].iter().find(|(later, _)| later.starts_with(&format!("{phrase} ")));
                assert!(hidden.is_none(), "{phrase} hides {hidden:?}");
            }
        }
    }
}
