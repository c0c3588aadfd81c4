//! Spatial relations, when they hold, and when they contradict each other.
//!
//! A direction holds by GenEval's rule (arXiv 2310.11513): the offset between the two boxes' centres is shrunk on each
//! axis by a tenth of the boxes' summed extent there, then divided by the offset's length; a direction holds if its
//! component exceeds one half. So two directions may hold at once (left of and above), and none holds for boxes that
//! lie within one another. `inside` is containment of boxes; `in front of` and `behind` need the depth order, which
//! boxes do not carry, so they are asked of a view (`tabletop::view`).

use super::{graph::SceneGraph, tabletop::world::Size};

/// The relations that have a definition in code.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Spatial {
    LeftOf,
    RightOf,
    Above,
    Below,
    Inside,
    InFrontOf,
    Behind,
}

use Spatial::{Above, Behind, Below, InFrontOf, Inside, LeftOf, RightOf};

impl Spatial {
    pub const ALL: [Self; 7] = [LeftOf, RightOf, Above, Below, Inside, InFrontOf, Behind];
    pub const DIRECTIONS: [Self; 4] = [LeftOf, RightOf, Above, Below];

    /// The predicate as scene graphs write it.
    pub fn name(self) -> &'static str {
        match self {
            LeftOf => "left of",
            RightOf => "right of",
            Above => "above",
            Below => "below",
            Inside => "inside",
            InFrontOf => "in front of",
            Behind => "behind",
        }
    }

    /// The relation a graph's predicate means, if it has a definition here.
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|r| r.name() == name)
    }

    /// `a r b` holds exactly if `b r.inverse() a` does; `inside` has no inverse among the relations.
    pub fn inverse(self) -> Option<Self> {
        match self {
            LeftOf => Some(RightOf),
            RightOf => Some(LeftOf),
            Above => Some(Below),
            Below => Some(Above),
            InFrontOf => Some(Behind),
            Behind => Some(InFrontOf),
            Inside => None,
        }
    }

    pub fn is_direction(self) -> bool {
        Self::DIRECTIONS.contains(&self)
    }
}

/// An axis-aligned box in pixels, y downwards.
#[derive(Debug, Clone, Copy, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct BoundingBox {
    pub x0: f32,
    pub y0: f32,
    pub x1: f32,
    pub y1: f32,
}

impl BoundingBox {
    pub fn centre(&self) -> (f32, f32) {
        ((self.x0 + self.x1) / 2.0, (self.y0 + self.y1) / 2.0)
    }

    pub fn width(&self) -> f32 {
        self.x1 - self.x0
    }

    pub fn height(&self) -> f32 {
        self.y1 - self.y0
    }

    pub fn area(&self) -> f32 {
        self.width().max(0.0) * self.height().max(0.0)
    }

    /// The gap between two boxes along the axis that separates them most; negative when they overlap.
    pub fn gap(&self, other: &Self) -> f32 {
        let x = (other.x0 - self.x1).max(self.x0 - other.x1);
        let y = (other.y0 - self.y1).max(self.y0 - other.y1);
        x.max(y)
    }

    /// Whether `self` lies within `other`, up to `slack` pixels.
    pub fn within(&self, other: &Self, slack: f32) -> bool {
        self.x0 >= other.x0 - slack
            && self.y0 >= other.y0 - slack
            && self.x1 <= other.x1 + slack
            && self.y1 <= other.y1 + slack
    }
}

/// GenEval's revised offset of `a` from `b`, as components in -1..1 (x to the right, y downwards).
pub fn direction_components(a: &BoundingBox, b: &BoundingBox) -> (f32, f32) {
    const SHRINK: f32 = 0.1;
    let ((ax, ay), (bx, by)) = (a.centre(), b.centre());
    let (dx, dy) = (ax - bx, ay - by);
    let length = dx.hypot(dy);
    if length < 1e-3 {
        return (0.0, 0.0);
    }
    let shrink = |d: f32, extent: f32| (d.abs() - SHRINK * extent).max(0.0).copysign(d) / length;
    (shrink(dx, a.width() + b.width()), shrink(dy, a.height() + b.height()))
}

/// The component of `a`'s offset from `b` in the direction of `relation`; it holds above one half. None for relations
/// that are no direction.
pub fn direction_score(a: &BoundingBox, relation: Spatial, b: &BoundingBox) -> Option<f32> {
    let (x, y) = direction_components(a, b);
    match relation {
        LeftOf => Some(-x),
        RightOf => Some(x),
        Above => Some(-y),
        Below => Some(y),
        Inside | InFrontOf | Behind => None,
    }
}

/// Whether `a` lies inside `b`: its box within `b`'s and less than two thirds of its area.
pub fn inside(a: &BoundingBox, b: &BoundingBox) -> bool {
    a.within(b, 1.0) && a.area() < 0.67 * b.area()
}

/// Why no picture can satisfy all of a graph's relations, as sentences for the user; empty if nothing is wrong.
///
/// Each of the seven relations orders its two objects strictly along an axis (x, y, depth, containment), so a cycle
/// along one axis has no picture, and neither has `inside` together with another relation of the same pair.
pub fn contradictions(graph: &SceneGraph) -> Vec<String> {
    let mut found = Vec::new();
    // Edges (lower, higher, index of the relation) along each axis.
    let mut axes: [Vec<(usize, usize, usize)>; 4] = Default::default();
    for (i, r) in graph.relations.iter().enumerate() {
        let Some(relation) = Spatial::from_name(&r.predicate) else { continue };
        if r.subject == r.object {
            found.push(format!("\"{}\" relates an object to itself", graph.triple(r)));
            continue;
        }
        let (axis, forward) = match relation {
            LeftOf => (0, true),
            RightOf => (0, false),
            Above => (1, true),
            Below => (1, false),
            InFrontOf => (2, true),
            Behind => (2, false),
            Inside => (3, true),
        };
        let (low, high) = if forward { (r.subject, r.object) } else { (r.object, r.subject) };
        axes[axis].push((low, high, i));
    }
    for edges in &axes {
        if let Some(cycle) = shortest_cycle(edges) {
            let said: Vec<String> =
                cycle.iter().map(|&i| format!("\"{}\"", graph.triple(&graph.relations[i]))).collect();
            found.push(format!("{} contradict each other", join_and(&said)));
        }
    }
    for &(a, b, i) in &axes[3] {
        let other = axes[..3].iter().flatten().find(|&&(x, y, _)| (x, y) == (a, b) || (x, y) == (b, a));
        if let Some(&(_, _, j)) = other {
            let (first, second) = (graph.triple(&graph.relations[i]), graph.triple(&graph.relations[j]));
            found.push(format!("\"{first}\" and \"{second}\" contradict each other"));
        }
    }
    found
}

/// Why the tabletop world has no room for a graph, if it has none: its large things do not fit into its small ones.
pub fn too_large(graph: &SceneGraph) -> Option<String> {
    let is = |object: usize, size: Size| graph.objects[object].attributes.iter().any(|word| word == size.name());
    let mut inside = graph.relations.iter().filter(|r| Spatial::from_name(&r.predicate) == Some(Inside));
    let found = inside.find(|r| is(r.subject, Size::Large) && is(r.object, Size::Small))?;
    Some(format!("\"{}\": what is large does not fit into what is small", graph.triple(found)))
}

/// The relations along one shortest directed cycle, if there is one.
fn shortest_cycle(edges: &[(usize, usize, usize)]) -> Option<Vec<usize>> {
    let mut best: Option<Vec<usize>> = None;
    for &(start, next, first) in edges {
        // Breadth first from `next` back to `start`; the frontier carries the path of relations.
        let mut frontier = vec![(next, vec![first])];
        let mut seen = vec![next];
        while !frontier.is_empty() {
            let mut reached = Vec::new();
            for (node, path) in frontier {
                if node == start {
                    if best.as_ref().is_none_or(|b| path.len() < b.len()) {
                        best = Some(path);
                    }
                    continue;
                }
                for &(from, to, i) in edges {
                    if from == node && !seen.contains(&to) {
                        seen.push(to);
                        let mut path = path.clone();
                        path.push(i);
                        reached.push((to, path));
                    }
                }
            }
            frontier = reached;
        }
    }
    best
}

fn join_and(parts: &[String]) -> String {
    match parts {
        [] => String::new(),
        [one] => one.clone(),
        [rest @ .., last] => format!("{} and {last}", rest.join(", ")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::scene::graph::{Object, Relation};

    fn square(x: f32, y: f32, r: f32) -> BoundingBox {
        BoundingBox { x0: x - r, y0: y - r, x1: x + r, y1: y + r }
    }

    fn holds(a: &BoundingBox, relation: Spatial, b: &BoundingBox) -> bool {
        direction_score(a, relation, b).unwrap() > 0.5
    }

    #[test]
    fn directions_follow_genevals_rule() {
        let (a, b) = (square(20.0, 50.0, 10.0), square(80.0, 52.0, 10.0));
        assert!(holds(&a, LeftOf, &b) && holds(&b, RightOf, &a));
        assert!(!holds(&a, Above, &b) && !holds(&a, RightOf, &b));
        // On the diagonal both components are (60 - 4) / (60 sqrt 2) = 0.66: two directions hold.
        let c = square(80.0, 110.0, 10.0);
        assert!(holds(&a, LeftOf, &c) && holds(&a, Above, &c));
        // Offsets below a tenth of the summed extents count as none.
        assert_eq!(direction_components(&square(50.0, 50.0, 10.0), &square(53.0, 50.0, 20.0)), (0.0, 0.0));
    }

    #[test]
    fn inverse_directions_hold_together_on_a_grid_of_offsets() {
        let a = square(64.0, 64.0, 12.0);
        for i in 0..40 {
            for j in 0..40 {
                let b = square(4.0 + 3.0 * i as f32, 4.0 + 3.0 * j as f32, 6.0 + (i % 5) as f32);
                for r in Spatial::DIRECTIONS {
                    let inverse = r.inverse().unwrap();
                    assert_eq!(inverse.inverse(), Some(r));
                    assert_eq!(holds(&a, r, &b), holds(&b, inverse, &a));
                    assert!(!(holds(&a, r, &b) && holds(&a, inverse, &b)));
                }
            }
        }
    }

    #[test]
    fn names_round_trip() {
        for r in Spatial::ALL {
            assert_eq!(Spatial::from_name(r.name()), Some(r));
        }
        assert_eq!(Spatial::from_name("adorn"), None);
    }

    fn graph(relations: &[(usize, Spatial, usize)]) -> SceneGraph {
        SceneGraph {
            objects: ["ball", "cube", "star", "ring"].iter().map(|l| Object::new(*l, vec![])).collect(),
            relations: relations
                .iter()
                .map(|&(subject, r, object)| Relation { subject, predicate: r.name().into(), object })
                .collect(),
        }
    }

    #[test]
    fn contradictions_are_found_and_named() {
        let none = |relations: &[_]| contradictions(&graph(relations)).is_empty();
        assert!(none(&[(0, LeftOf, 1), (0, Above, 1), (1, RightOf, 0), (1, LeftOf, 2)]));
        assert!(none(&[(0, Inside, 3), (1, LeftOf, 3), (0, InFrontOf, 2)]));
        let both = contradictions(&graph(&[(0, LeftOf, 1), (1, LeftOf, 0)]));
        assert_eq!(both, ["\"ball left of cube\" and \"cube left of ball\" contradict each other"]);
        let cycle = contradictions(&graph(&[(0, Above, 1), (1, Above, 2), (0, Below, 2)]));
        assert!(cycle[0].contains("ball below star") && cycle[0].contains("cube above star"), "{cycle:?}");
        assert!(contradictions(&graph(&[(0, Behind, 0)]))[0].contains("itself"));
        assert!(!none(&[(0, Inside, 3), (3, Behind, 0)]) && !none(&[(0, Inside, 3), (3, Inside, 0)]));
        assert!(!none(&[(0, InFrontOf, 1), (0, Behind, 1)]));
    }
}
