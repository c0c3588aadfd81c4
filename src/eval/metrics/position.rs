//! GenEval's position (arXiv 2310.11513): whether a picture has all the directions that were asked for.

use super::{Direction, Named, all};

pub(super) fn metrics(directions: &[Direction]) -> Named<1> {
    [("position", all(directions.iter().map(|d| d.held)))]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_wrong_direction_is_one_too_many() {
        let found = |held: &[bool]| {
            let direction = |&held: &bool| Direction { present: true, held };
            metrics(&held.iter().map(direction).collect::<Vec<_>>())
        };
        assert_eq!(found(&[true, true]), [("position", Some(1.0))]);
        assert_eq!(found(&[true, false]), [("position", Some(0.0))]);
        assert_eq!(found(&[]), [("position", None)]);
    }
}
