//! Which of a data set's relations say where things are.

use crate::scene::words;

/// Words of place that LAION-SG's relations use, beside those of the tabletop grammar.
const PLACES: &[&str] = &[
    "across from",
    "adjacent to",
    "against",
    "along",
    "alongside",
    "amid",
    "amidst",
    "among",
    "around",
    "at",
    "at the back of",
    "at the bottom of",
    "at the center of",
    "at the edge of",
    "at the end of",
    "at the foot of",
    "at the front of",
    "at the top of",
    "attached to",
    "behind",
    "below",
    "beside",
    "between",
    "beyond",
    "by",
    "close to",
    "covered by",
    "covered with",
    "covering",
    "encircling",
    "facing",
    "far from",
    "hanging from",
    "in the background of",
    "in the center of",
    "in the corner of",
    "in the foreground of",
    "next to",
    "near",
    "on the back of",
    "on the bottom of",
    "on the edge of",
    "on the front of",
    "on the left",
    "on the right",
    "on the side of",
    "on the top of",
    "opposite",
    "outside",
    "outside of",
    "overlapping",
    "overlooking",
    "surrounded by",
    "surrounding",
    "surrounds",
    "through",
    "touching",
    "up against",
    "upon",
];

/// Words that may stand before a word of place, and say nothing of it.
const BEFORE_PLACES: &[&str] = &[
    "is",
    "are",
    "attached",
    "directly",
    "displayed",
    "fixed",
    "floating",
    "flying",
    "growing",
    "hanging",
    "hovering",
    "just",
    "kneeling",
    "leaning",
    "located",
    "lying",
    "mounted",
    "parked",
    "partially",
    "partly",
    "perched",
    "placed",
    "planted",
    "positioned",
    "resting",
    "seated",
    "set",
    "sitting",
    "situated",
    "stacked",
    "standing",
    "suspended",
];

/// Whether a relation says where things are: a word of place, alone or behind a verb of posture ("standing next to").
pub fn is_spatial(predicate: &str) -> bool {
    let text = predicate.to_lowercase();
    let is_place = |text: &str| PLACES.contains(&text) || words::RELATIONS.iter().any(|(phrase, _)| *phrase == text);
    let mut rest = text.trim();
    while !is_place(rest) {
        match rest.split_once(' ') {
            Some((first, behind)) if BEFORE_PLACES.contains(&first) => rest = behind,
            _ => return false,
        }
    }
    true
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_of_place_are_known() {
        for yes in [
            "left of",
            "on the left of",
            "to the right of",
            "standing next to",
            "surrounded by",
            "On top of",
            "on the left side of",
            "in the middle of",
            "leaning against",
            "is parked on",
            "hanging from",
            "surrounds",
        ] {
            assert!(is_spatial(yes), "{yes}");
        }
        for no in ["wearing", "walking along", "adorn", "made of", "standing", "looking at", ""] {
            assert!(!is_spatial(no), "{no}");
        }
    }
}
