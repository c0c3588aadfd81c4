//! Splits that never share a scene.
//!
//! A scene belongs to train, validation or test by a hash of its set of (shape, colour) pairs: an object set seen in
//! testing is never seen in training, wherever its objects lie. (A single object is hashed with its size and place:
//! all single objects should be learnt.) Three further test splits ask for more than new scenes: a named relation
//! whose (shape, colour, relation) training never names, more objects than the Diffuser is trained to draw, and phrasings
//! kept from training.

use super::world::{Colour, Item, Shape};
use crate::scene::{
    graph::{Object, SceneGraph},
    relation::Spatial,
};

/// A split of the tabletop world.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Split {
    Train,
    /// Four or five objects, for models that are to see so many.
    TrainMany,
    Val,
    ValMany,
    Test,
    /// At least one named relation is a held-out (shape, colour, relation).
    TestUnseen,
    /// Four or five objects, where the Diffuser is trained to draw one to three.
    TestMany,
    /// Phrasings that training never uses.
    TestParaphrase,
}

/// Objects of a scene at most.
pub const MOST: usize = 5;

/// Which part of the hash space a scene falls in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Part {
    Train,
    Val,
    Test,
}

impl Split {
    pub const ALL: [Self; 8] = [
        Self::Train,
        Self::TrainMany,
        Self::Val,
        Self::ValMany,
        Self::Test,
        Self::TestUnseen,
        Self::TestMany,
        Self::TestParaphrase,
    ];

    pub fn name(self) -> &'static str {
        match self {
            Self::Train => "train",
            Self::TrainMany => "train-4-5",
            Self::Val => "val",
            Self::ValMany => "val-4-5",
            Self::Test => "test",
            Self::TestUnseen => "test-unseen",
            Self::TestMany => "test-4-5",
            Self::TestParaphrase => "test-paraphrase",
        }
    }

    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|s| s.name() == name)
    }

    /// The part of the hash space whose scenes this split draws.
    pub fn part(self) -> Part {
        match self {
            Self::Train | Self::TrainMany => Part::Train,
            Self::Val | Self::ValMany => Part::Val,
            Self::Test | Self::TestUnseen | Self::TestMany | Self::TestParaphrase => Part::Test,
        }
    }

    /// The fewest and most objects of this split's scenes, if nothing else is asked for.
    pub fn objects(self) -> (usize, usize) {
        match self {
            Self::TrainMany | Self::ValMany | Self::TestMany => (4, MOST),
            Self::TestUnseen => (2, 3),
            Self::Train | Self::Val | Self::Test | Self::TestParaphrase => (1, 3),
        }
    }

    /// The most that may be asked for: outside of tests as many as there ever are.
    pub fn most(self) -> usize {
        if self.part() == Part::Test { self.objects().1 } else { MOST }
    }
}

/// The part a scene belongs to; 90% of the object sets are for training, 5% each for validation and testing.
pub fn part(items: &[Item]) -> Part {
    let mut codes: Vec<u64> = items.iter().map(|i| i.shape as u64 * 8 + i.colour as u64).collect();
    codes.sort_unstable();
    if let [item] = items {
        codes.extend([item.size as u64, (item.x / 8.0) as u64, (item.y / 8.0) as u64]);
    }
    match hash(&codes) % 20 {
        0 => Part::Val,
        1 => Part::Test,
        _ => Part::Train,
    }
}

/// Splitmix64 over the codes.
fn hash(codes: &[u64]) -> u64 {
    let mut h = 0x9e37_79b9_7f4a_7c15u64;
    for &code in codes {
        h = h.wrapping_add(code.wrapping_mul(0xbf58_476d_1ce4_e5b9)).wrapping_add(0x9e37_79b9_7f4a_7c15);
        h = (h ^ (h >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        h = (h ^ (h >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        h ^= h >> 31;
    }
    h
}

/// Whether training never names `relation` with this subject: one colour for every other (shape, relation) pair.
fn held_out_subject(shape: Shape, colour: Colour, relation: Spatial) -> bool {
    let (s, r) = (shape as usize, relation as usize);
    (s + r).is_multiple_of(2) && colour as usize == (3 * s + 5 * r + 2) % Colour::ALL.len()
}

/// Whether training never names this relation between these objects, read either way round.
pub fn held_out(subject: &Object, relation: Spatial, object: &Object) -> bool {
    let held = |o: &Object, r: Spatial| {
        let shape = Shape::from_name(&o.label);
        let colour = o.attributes.iter().find_map(|a| Colour::from_name(a));
        shape.zip(colour).is_some_and(|(s, c)| held_out_subject(s, c, r))
    };
    held(subject, relation) || relation.inverse().is_some_and(|r| held(object, r))
}

/// How many of a graph's relations training never names.
pub fn held_out_relations(graph: &SceneGraph) -> usize {
    let relations = graph.relations.iter();
    relations
        .filter(|r| {
            let spatial = Spatial::from_name(&r.predicate);
            let (a, b) = (graph.objects.get(r.subject), graph.objects.get(r.object));
            spatial.zip(a.zip(b)).is_some_and(|(s, (a, b))| held_out(a, s, b))
        })
        .count()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn held_out_relations_read_the_same_both_ways() {
        let mut held = 0;
        for &shape in Shape::ALL {
            for &colour in Colour::ALL {
                let a = Object::new(shape.name(), vec![colour.name().into()]);
                let b = Object::new("cube", vec!["large".into(), "red".into()]);
                for r in Spatial::ALL {
                    held += usize::from(held_out_subject(shape, colour, r));
                    if let Some(inverse) = r.inverse() {
                        assert_eq!(held_out(&a, r, &b), held_out(&b, inverse, &a));
                    }
                }
            }
        }
        assert_eq!(held, 21);
    }

    #[test]
    fn names_round_trip() {
        assert!(Split::ALL.into_iter().all(|s| Split::from_name(s.name()) == Some(s)));
        assert_eq!(Split::from_name("validation"), None);
    }
}
