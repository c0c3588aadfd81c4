//! Drawing scenes: distinct objects, placed so that every relation clearly holds or clearly does not.
//!
//! Objects keep apart, except for at most one pair that lies one inside the other or one in front of the other. A graph
//! describes the scene: each further object is related to one named before, by a relation that truly holds.

use super::{
    shapes,
    split::{self, Part, Split},
    view::View,
    world::{Background, Colour, Item, SIDE, Scene, Shape, Size},
};
use crate::scene::{
    graph::{Object, Relation, SceneGraph},
    relation::Spatial,
};
use crate::tensor::rng::Stream;

/// Pixels two outlines must share for one to lie in front of the other.
pub const MIN_OVERLAP: f32 = 20.0;
/// Directions of drawn scenes stay this far from GenEval's threshold.
pub const MARGIN: f32 = 0.04;
/// Of the scenes with several objects, the share in which two touch: one lies in front of the other, or inside it.
pub const TOUCHING: f64 = 0.38;
/// Of those, the share of the latter.
const INSIDE: f64 = 0.14 / TOUCHING;
/// Of the edits that bring two things into a relation, the share of those that make them touch, where [`TOUCHING`] is the share
/// of scenes.
pub const BROUGHT_TOGETHER: f64 = 0.24;
const EDGE: f32 = 3.0;
const GAP: f32 = 3.0;

/// How many pixels two outlines share.
pub fn overlap(a: &Item, b: &Item) -> f32 {
    let (p, q) = (a.bounding_box(), b.bounding_box());
    if p.gap(&q) >= 0.0 {
        return 0.0;
    }
    let (x0, x1) = (p.x0.max(q.x0).floor() as i32, p.x1.min(q.x1).ceil() as i32);
    let (y0, y1) = (p.y0.max(q.y0).floor() as i32, p.y1.min(q.y1).ceil() as i32);
    let shared = |x: i32, y: i32| {
        let (x, y) = (x as f32 + 0.5, y as f32 + 0.5);
        a.distance(x, y) < 0.0 && b.distance(x, y) < 0.0
    };
    (y0..y1).map(|y| (x0..x1).filter(|&x| shared(x, y)).count()).sum::<usize>() as f32
}

/// Pixels within the outline.
fn area(item: &Item) -> f32 {
    overlap(item, item)
}

/// Whether the two keep a clear distance from each other.
pub fn apart(a: &Item, b: &Item) -> bool {
    let gap = if a.colour == b.colour { 2.0 * GAP } else { GAP };
    let reach = shapes::reach(a.shape) * a.radius + shapes::reach(b.shape) * b.radius;
    a.bounding_box().gap(&b.bounding_box()) >= gap || (a.x - b.x).hypot(a.y - b.y) >= reach + gap
}

/// Whether the small one lies in the ring's hole with a little room around it.
pub fn in_hole(small: &Item, ring: &Item) -> bool {
    let offset = (small.x - ring.x).hypot(small.y - ring.y);
    ring.shape == Shape::Ring
        && offset + shapes::reach(small.shape) * small.radius < shapes::RING_HOLE * ring.radius - 0.4
}

/// Whether one covers enough of the other to lie in front of it, and leaves enough of it to be seen.
fn covers(front: &Item, back: &Item) -> bool {
    let shared = overlap(front, back);
    front.colour != back.colour
        && front.depth > back.depth
        && shared >= 2.5 * MIN_OVERLAP
        && shared <= 0.33 * area(back)
        && !front.bounding_box().within(&back.bounding_box(), 0.0)
}

/// Whether these two may share a picture: apart, inside, or one clearly in front.
fn compatible(a: &Item, b: &Item) -> bool {
    apart(a, b) || in_hole(a, b) || in_hole(b, a) || covers(a, b) || covers(b, a)
}

/// Whether the item lies on the table with a margin to its edge.
fn on_table(item: &Item) -> bool {
    let b = item.bounding_box();
    let side = SIDE as f32 - EDGE;
    b.x0 >= EDGE && b.y0 >= EDGE && b.x1 <= side && b.y1 <= side
}

/// Every two of so many numbers once.
fn pairs(n: usize) -> impl Iterator<Item = (usize, usize)> {
    (0..n).flat_map(|a| (0..a).map(move |b| (a, b)))
}

/// Whether the `changed` items of a scene lie as this world could have drawn them: on the table, compatible and unambiguous
/// with every other, and touching none where others touch already. How the others lie is not asked: a picture that a network
/// drew is what it is.
pub fn valid(scene: &Scene, changed: &[usize]) -> bool {
    let items = &scene.items;
    let all = || pairs(items.len());
    let is_new = |&(a, b): &(usize, usize)| changed.contains(&a) || changed.contains(&b);
    let touch = |&(a, b): &(usize, usize)| !apart(&items[a], &items[b]);
    let lies_well = changed.iter().all(|&i| on_table(&items[i]))
        && all().filter(is_new).all(|(a, b)| compatible(&items[a], &items[b]))
        && (!all().filter(is_new).any(|pair| touch(&pair)) || all().filter(touch).count() <= 1);
    if !lies_well {
        return false;
    }
    let view = scene.view();
    all().filter(is_new).all(|(a, b)| view.unambiguous(a, b, MARGIN))
}

/// Whether no other item has the shape and the colour of this one.
pub fn distinct(scene: &Scene, i: usize) -> bool {
    let name = |item: &Item| (item.shape, item.colour);
    scene.items.iter().enumerate().all(|(j, other)| j == i || name(other) != name(&scene.items[i]))
}

pub fn radius(rng: &mut Stream, size: Size) -> f32 {
    let (low, high) = size.radii();
    rng.range(f64::from(low), f64::from(high)) as f32
}

pub fn background(rng: &mut Stream) -> Background {
    let level = rng.range(224.0, 240.0) as f32;
    let warmth = rng.range(-4.0, 7.0) as f32;
    let slope = [rng.range(-5.0, 5.0) as f32, rng.range(-12.0, -3.0) as f32];
    Background { rgb: [level + warmth * 0.5, level, level - warmth], slope }
}

/// A position on the table for an item of this shape and radius.
pub fn position(rng: &mut Stream, shape: Shape, radius: f32) -> (f32, f32) {
    let (w, h) = shapes::half_extent(shape);
    let mut along = |half: f32| {
        let low = f64::from(EDGE + half * radius);
        rng.range(low, f64::from(SIDE as f32) - low) as f32
    };
    (along(w), along(h))
}

/// A kind of pair that does not keep apart.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Close {
    Inside,
    InFront,
}

/// Distinct objects without a place: radii and depths drawn, all at the origin.
fn objects(rng: &mut Stream, n: usize, close: Option<Close>) -> Vec<Item> {
    let mut items: Vec<Item> = Vec::with_capacity(n);
    while items.len() < n {
        let mut shape = *rng.choose(Shape::ALL);
        let mut size = *rng.choose(Size::ALL);
        let mut r = radius(rng, size);
        if close == Some(Close::Inside) && items.len() < 2 {
            // First what lies inside, then the ring that holds it.
            let range = if items.is_empty() { (9.4, 10.2) } else { (21.0, 22.0) };
            r = rng.range(range.0, range.1) as f32;
            size = Size::of_radius(r);
            shape = if items.is_empty() { shape } else { Shape::Ring };
        }
        let colour = *rng.choose(Colour::ALL);
        let crowded = n > 3 && size == Size::Large && items.iter().filter(|i| i.size == Size::Large).count() >= 2;
        let same = |i: &Item| (i.shape, i.colour) == (shape, colour);
        let close_colours = close.is_some() && items.len() == 1 && items[0].colour == colour;
        if !crowded && !close_colours && !items.iter().any(same) {
            items.push(Item { shape, colour, size, x: 0.0, y: 0.0, radius: r, depth: 0 });
        }
    }
    // The first of a close pair lies in front; all else lies in any order.
    let mut depths: Vec<i16> = (0..n as i16).collect();
    rng.shuffle(&mut depths);
    if close.is_some() && depths[0] < depths[1] {
        depths.swap(0, 1);
    }
    for (item, depth) in items.iter_mut().zip(depths) {
        item.depth = depth;
    }
    items
}

/// Finds places for the objects; None if these do not fit after a few tries.
fn place(rng: &mut Stream, mut items: Vec<Item>, close: Option<Close>) -> Option<Scene> {
    let background = background(rng);
    // The second item is placed first: in a close pair it is the one that the first is placed by.
    let mut order: Vec<usize> = (0..items.len()).collect();
    if items.len() > 1 {
        order.swap(0, 1);
    }
    let mut placed: Vec<usize> = Vec::new();
    for i in order {
        let found = (0..40).any(|_| {
            let (x, y) = match close {
                Some(kind) if i == 0 => beside(rng, kind, &items[0], &items[1]),
                _ => position(rng, items[i].shape, items[i].radius),
            };
            (items[i].x, items[i].y) = (x, y);
            let item = &items[i];
            on_table(item)
                && placed.iter().all(|&j| match close {
                    Some(Close::Inside) if i == 0 && j == 1 => in_hole(item, &items[1]),
                    Some(Close::InFront) if i == 0 && j == 1 => covers(item, &items[1]),
                    _ => apart(item, &items[j]),
                })
        });
        if !found {
            return None;
        }
        placed.push(i);
    }
    let scene = Scene { background, items };
    let view = scene.view();
    pairs(scene.items.len()).all(|(a, b)| view.unambiguous(a, b, MARGIN)).then_some(scene)
}

/// A place for `item` in or in front of `other`.
fn beside(rng: &mut Stream, kind: Close, item: &Item, other: &Item) -> (f32, f32) {
    let angle = rng.range(0.0, std::f64::consts::TAU);
    let distance = match kind {
        Close::Inside => rng.range(0.0, 1.5),
        Close::InFront => rng.range(0.55, 0.95) * f64::from(item.radius + other.radius),
    };
    (other.x + (distance * angle.cos()) as f32, other.y + (distance * angle.sin()) as f32)
}

/// Draws a scene of this split with `min..=max` objects (within what the split has) and a graph that describes it.
pub fn draw(rng: &mut Stream, split: Split, min: usize, max: usize) -> (Scene, SceneGraph) {
    draw_touching(rng, split, min, max, TOUCHING)
}

/// [`draw`] with this share of scenes in which two objects touch.
pub fn draw_touching(rng: &mut Stream, split: Split, min: usize, max: usize, touching: f64) -> (Scene, SceneGraph) {
    let ((fewest, _), most) = (split.objects(), split.most());
    let min = min.clamp(fewest, most);
    let max = max.clamp(min, most);
    loop {
        let n = min + rng.below(max - min + 1);
        let close = match rng.uniform() {
            u if n < 2 || u > touching => None,
            u if u < touching * INSIDE => Some(Close::Inside),
            _ => Some(Close::InFront),
        };
        let items = objects(rng, n, close);
        // The part of two or more objects does not depend on their places: reject early.
        if n > 1 && split::part(&items) != split.part() {
            continue;
        }
        let Some(scene) = place(rng, items, close) else { continue };
        if split::part(&scene.items) != split.part() {
            continue;
        }
        let described = describe(rng, scene);
        if admissible(split, &described.1) {
            return described;
        }
    }
}

/// Whether this split may name these relations.
pub fn admissible(split: Split, graph: &SceneGraph) -> bool {
    let held = split::held_out_relations(graph);
    match split {
        Split::TestUnseen => held > 0,
        _ => held == 0,
    }
}

/// Whether training may show this scene.
pub fn trainable(scene: &Scene) -> bool {
    split::part(&scene.items) == Part::Train
}

/// Describes a scene by a graph that holds: objects in the order of mention (the scene's items are put in the same
/// order), sizes said or not, and a relation for each object after the first, now and then one more or fewer.
pub fn describe(rng: &mut Stream, mut scene: Scene) -> (Scene, SceneGraph) {
    let n = scene.items.len();
    let view = scene.view();
    let mut order: Vec<usize> = (0..n).collect();
    rng.shuffle(&mut order);
    // The close pair, if any, is named first, so that its relation is.
    if let Some((a, b)) = close_pair(&view) {
        order.retain(|&i| i != a && i != b);
        order.splice(0..0, [a, b]);
    }
    let mut triples: Vec<(usize, Spatial, usize)> = Vec::new();
    let unrelated = if n == 2 { 0.06 } else { 0.08 };
    for k in 1..n {
        let mut earlier: Vec<usize> = order[..k].to_vec();
        rng.shuffle(&mut earlier);
        if rng.chance(unrelated) {
            continue;
        }
        let found = earlier.into_iter().find_map(|j| Some((j, choose_relation(rng, &view, order[k], j)?)));
        triples.extend(found.map(|(j, (r, forward))| if forward { (order[k], r, j) } else { (j, r, order[k]) }));
    }
    if n == 3 && triples.len() == 2 && rng.chance(0.12) {
        let named = |a: usize, b: usize| triples.iter().any(|t| (t.0, t.2) == (a, b) || (t.0, t.2) == (b, a));
        let pair = (0..n).flat_map(|a| (0..a).map(move |b| (a, b))).find(|&(a, b)| !named(a, b));
        let more = pair.and_then(|(a, b)| choose_relation(rng, &view, a, b).map(|(r, f)| (a, b, r, f)));
        triples.extend(more.map(|(a, b, r, forward)| if forward { (a, r, b) } else { (b, r, a) }));
    }
    // Objects and items in the order of first mention, those without a relation last.
    let mut mention: Vec<usize> = Vec::new();
    for i in triples.iter().flat_map(|t| [t.0, t.2]).chain(order) {
        if !mention.contains(&i) {
            mention.push(i);
        }
    }
    scene.items = mention.iter().map(|&i| scene.items[i]).collect();
    let at = |i: usize| mention.iter().position(|&m| m == i).unwrap_or(i);
    let relations = triples
        .iter()
        .map(|&(s, r, o)| Relation { subject: at(s), predicate: r.name().into(), object: at(o) })
        .collect();
    let graph = SceneGraph { objects: name_objects(rng, &scene.items), relations };
    (scene, graph)
}

/// The pair of which one lies inside or in front of the other.
fn close_pair(view: &View) -> Option<(usize, usize)> {
    let n = view.objects.len();
    let pairs = (0..n).flat_map(|a| (0..n).map(move |b| (a, b)));
    pairs.into_iter().find(|&(a, b)| view.holds(a, Spatial::Inside, b) || view.in_front.contains(&(a, b)))
}

/// A relation that clearly holds between the two, and whether it reads from `a` to `b`.
fn choose_relation(rng: &mut Stream, view: &View, a: usize, b: usize) -> Option<(Spatial, bool)> {
    let forward = rng.chance(0.5);
    let clear = |x: usize, y: usize, r: Spatial| view.certainty(x, r, y) >= MARGIN;
    for forward in [forward, !forward] {
        let (x, y) = if forward { (a, b) } else { (b, a) };
        let close = Spatial::ALL.into_iter().find(|&r| !r.is_direction() && clear(x, y, r));
        if let Some(r) = close.filter(|_| rng.chance(0.9)) {
            return Some((r, forward));
        }
        let held: Vec<Spatial> = Spatial::DIRECTIONS.into_iter().filter(|&r| clear(x, y, r)).collect();
        if !held.is_empty() {
            return Some((*rng.choose(&held), forward));
        }
    }
    None
}

/// What the objects are called: always the shape, nearly always the colour, often the size.
fn name_objects(rng: &mut Stream, items: &[Item]) -> Vec<Object> {
    // All sizes said, none, or each by chance.
    let sizes = match rng.uniform() {
        u if u < 0.45 => 1.0,
        u if u < 0.75 => 0.0,
        _ => 0.5,
    };
    let colourless = rng.chance(0.03);
    let mut objects = Vec::with_capacity(items.len());
    for item in items {
        let mut attributes = Vec::new();
        if rng.chance(sizes) {
            attributes.push(item.size.name().to_string());
        }
        let alone = items.iter().filter(|i| i.shape == item.shape).count() == 1;
        if !(colourless && alone) {
            attributes.push(item.colour.name().to_string());
        }
        objects.push(Object::new(item.shape.name(), attributes));
    }
    objects
}
