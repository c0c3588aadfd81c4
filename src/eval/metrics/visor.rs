//! VISOR (arXiv 2212.10015): whether the objects of each direction are there, and whether they stand as asked.

use super::{Direction, Named, share};

pub(super) fn metrics(directions: &[Direction]) -> Named<3> {
    [
        ("visor_oa", share(directions.iter().map(|d| d.present))),
        ("visor_unconditional", share(directions.iter().map(|d| d.present && d.held))),
        ("visor_conditional", share(directions.iter().filter(|d| d.present).map(|d| d.held))),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Object accuracy, unconditional and conditional VISOR of directions as `(present, held)`.
    fn found(directions: &[(bool, bool)]) -> [Option<f64>; 3] {
        let direction = |&(present, held): &(bool, bool)| Direction { present, held };
        let named = metrics(&directions.iter().map(direction).collect::<Vec<_>>());
        assert_eq!(named.map(|(name, _)| name), ["visor_oa", "visor_unconditional", "visor_conditional"]);
        named.map(|(_, value)| value)
    }

    #[test]
    fn objects_and_directions_count_apart() {
        let [held, wrong, missing] = [(true, true), (true, false), (false, false)];
        assert_eq!(found(&[wrong, missing]), [0.5, 0.0, 0.0].map(Some));
        assert_eq!(found(&[held, wrong, wrong, missing]), [0.75, 0.25, 1.0 / 3.0].map(Some));
        // Without its objects a direction counts for nothing.
        assert_eq!(found(&[(false, true), held]), [0.5, 0.5, 1.0].map(Some));
        assert_eq!(found(&[missing]), [Some(0.0), Some(0.0), None]);
        assert_eq!(found(&[]), [None; 3]);
    }
}
