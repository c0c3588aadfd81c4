//! What the pixel oracle finds right, too much and unclean.

use super::{Named, all, share, truth};
use crate::scene::tabletop::view::Judgement;

/// Of its judgement, and of the picture's distance from a render of what it reads.
pub(super) fn metrics(judgement: &Judgement, distance: f64) -> Named<6> {
    let (objects, relations) = (judgement.objects.iter().copied(), judgement.relations.iter().copied());
    [
        ("oracle_mean", share(relations.clone())),
        ("oracle_all", all(relations)),
        ("oracle_objects", share(objects)),
        ("no_others", Some(truth(judgement.extra == 0))),
        ("oracle_perfect", Some(truth(judgement.perfect()))),
        ("render_distance", Some(distance)),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The values in the order of their names.
    fn found(objects: &[bool], relations: &[bool], extra: usize, distance: f64) -> [Option<f64>; 6] {
        let judgement = Judgement { objects: objects.to_vec(), relations: relations.to_vec(), extra };
        let named = metrics(&judgement, distance);
        let names = ["oracle_mean", "oracle_all", "oracle_objects", "no_others", "oracle_perfect", "render_distance"];
        assert_eq!(named.map(|(name, _)| name), names);
        named.map(|(_, value)| value)
    }

    #[test]
    fn each_number_is_of_its_own_part_of_the_judgement() {
        let (yes, no) = (true, false);
        let some = |values: [f64; 6]| values.map(Some);
        assert_eq!(found(&[yes, yes, no], &[yes, no, no, no], 0, 0.125), some([0.25, 0.0, 2.0 / 3.0, 1.0, 0.0, 0.125]));
        assert_eq!(found(&[yes, no], &[yes, yes], 2, 0.75), some([1.0, 1.0, 0.5, 0.0, 0.0, 0.75]));
        assert_eq!(found(&[yes, yes], &[yes], 0, 0.0), some([1.0, 1.0, 1.0, 1.0, 1.0, 0.0]));
        // Without relations nothing can be said of them.
        assert_eq!(found(&[yes], &[], 1, 0.5), [None, None, Some(1.0), Some(0.0), Some(0.0), Some(0.5)]);
    }
}
