//! Edits of a scene: what an Actor may ask for, in words and carried out.
//!
//! An edit names objects as one would say them ("the red ball", and of two alike "the left red ball"); it can be written as
//! an instruction, parsed back, and applied to a scene. Applying leaves the background and every object that the edit does
//! not name as they are.

use super::{
    caption::{indefinite, reference},
    sample, split,
    view::View,
    world::{Colour, Item, Scene, Shape, Size},
};
use crate::scene::{
    cursor::{Article, Cursor, Mention},
    graph::Object,
    parse::ParseError,
    relation::Spatial,
    words,
};
use crate::tensor::rng::Stream;
use serde::{Deserialize, Serialize};

/// The seven kinds of edits.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Kind {
    Move,
    Swap,
    Add,
    Remove,
    Recolour,
    Resize,
    Replace,
}

impl Kind {
    pub const ALL: [Self; 7] =
        [Self::Move, Self::Swap, Self::Add, Self::Remove, Self::Recolour, Self::Resize, Self::Replace];

    pub fn name(self) -> &'static str {
        match self {
            Self::Move => "move",
            Self::Swap => "swap",
            Self::Add => "add",
            Self::Remove => "remove",
            Self::Recolour => "recolour",
            Self::Resize => "resize",
            Self::Replace => "replace",
        }
    }
}

/// Which of several alike things is meant: the one that lies farthest to this side.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Side {
    Left,
    Right,
    Upper,
    Lower,
}

impl Side {
    pub const ALL: [Self; 4] = [Self::Left, Self::Right, Self::Upper, Self::Lower];

    pub fn name(self) -> &'static str {
        match self {
            Self::Left => "left",
            Self::Right => "right",
            Self::Upper => "upper",
            Self::Lower => "lower",
        }
    }

    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|side| side.name() == name)
    }

    /// How far object `i` of `view` lies to this side.
    fn reach(self, view: &View, i: usize) -> f32 {
        let (x, y) = view.objects[i].bounds.centre();
        match self {
            Self::Left => -x,
            Self::Right => x,
            Self::Upper => -y,
            Self::Lower => y,
        }
    }

    /// The side to which `i` lies farthest from the others of `alike`, if it is the first of them in any.
    fn of(view: &View, alike: &[usize], i: usize) -> Option<Self> {
        let lead = |side: Self| {
            let others = alike.iter().filter(|&&j| j != i).map(|&j| side.reach(view, j));
            side.reach(view, i) - others.fold(f32::NEG_INFINITY, f32::max)
        };
        Self::ALL.into_iter().filter(|side| lead(*side) > 0.0).max_by(|a, b| lead(*a).total_cmp(&lead(*b)))
    }
}

/// A name for object `i` of `view`: colour and shape, the size where another one has both, and where others are the same in
/// all, the side to which it lies. `None` for what lies in the middle of these.
pub fn name(view: &View, i: usize) -> Option<Object> {
    let seen = &view.objects[i];
    let alike = |j: &usize| (view.objects[*j].shape, view.objects[*j].colour) == (seen.shape, seen.colour);
    let alike: Vec<usize> = (0..view.objects.len()).filter(alike).collect();
    let same: Vec<usize> = alike.iter().copied().filter(|j| view.objects[*j].size == seen.size).collect();
    let mut name = seen.object();
    if alike.len() == 1 {
        name.attributes.retain(|a| Size::from_name(a).is_none());
    } else if same.len() > 1 {
        name.attributes.insert(0, Side::of(view, &same, i)?.name().to_owned());
    }
    Some(name)
}

/// Where something goes: a relation to a thing of the picture.
pub type Place = (Spatial, Object);

/// Places of one edit at most.
pub const PLACES: usize = 3;

/// One edit. Objects are references: a label and as many attributes as it takes to tell them apart, of which the first may be
/// a [`Side`]. What moves has one place or more, which are to hold together, and what is added may have some.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Edit {
    Move { what: Object, places: Vec<Place> },
    Swap { first: Object, second: Object },
    Add { what: Object, places: Vec<Place> },
    Remove { what: Object },
    Recolour { what: Object, colour: Colour },
    Resize { what: Object, size: Size },
    Replace { what: Object, by: Object },
}

impl Edit {
    pub fn kind(&self) -> Kind {
        match self {
            Self::Move { .. } => Kind::Move,
            Self::Swap { .. } => Kind::Swap,
            Self::Add { .. } => Kind::Add,
            Self::Remove { .. } => Kind::Remove,
            Self::Recolour { .. } => Kind::Recolour,
            Self::Resize { .. } => Kind::Resize,
            Self::Replace { .. } => Kind::Replace,
        }
    }

    /// The things that it names.
    pub fn named(&self) -> Vec<&Object> {
        match self {
            Self::Move { what, places } | Self::Add { what, places } => {
                std::iter::once(what).chain(places.iter().map(|(_, anchor)| anchor)).collect()
            }
            Self::Swap { first, second } => vec![first, second],
            Self::Replace { what, by } => vec![what, by],
            Self::Remove { what } | Self::Recolour { what, .. } | Self::Resize { what, .. } => vec![what],
        }
    }

    /// The edit in words, of which there are some to choose from.
    pub fn instruction(&self, rng: &mut Stream) -> String {
        self.words(&mut |choices| *rng.choose(choices))
    }

    /// The edit in the plainest words: the first of every choice.
    pub fn plain(&self) -> String {
        self.words(&mut |choices| choices[0])
    }

    fn words(&self, choose: &mut dyn FnMut(&[&'static str]) -> &'static str) -> String {
        let the = |o: &Object| format!("the {}", o.phrase());
        let at = |places: &[Place]| {
            let each = places.iter().map(|(relation, anchor)| format!("{} {}", where_to(*relation), the(anchor)));
            each.collect::<Vec<_>>().join(" and ")
        };
        match self {
            Self::Move { what, places } => {
                let verb = choose(&["move", "move", "put"]);
                format!("{verb} {} {}", the(what), at(places))
            }
            Self::Swap { first, second } => {
                let verb = choose(&["swap", "exchange"]);
                format!("{verb} {} and {}", the(first), the(second))
            }
            Self::Add { what, places } if places.is_empty() => format!("add {}", indefinite(what)),
            Self::Add { what, places } => format!("add {} {}", indefinite(what), at(places)),
            Self::Remove { what } => format!("{} {}", choose(&["remove", "remove", "delete"]), the(what)),
            Self::Recolour { what, colour } => match choose(&["make", "make", "change"]) {
                "make" => format!("make {} {}", the(what), colour.name()),
                _ => format!("change the colour of {} to {}", the(what), colour.name()),
            },
            Self::Resize { what, size: Size::Large } => format!("make {} {}", the(what), choose(&["larger", "large"])),
            Self::Resize { what, size: Size::Small } => {
                format!("make {} {}", the(what), choose(&["smaller", "small"]))
            }
            Self::Replace { what, by } => format!("replace {} with {}", the(what), indefinite(by)),
        }
    }

    /// Reads an instruction back.
    pub fn parse(text: &str) -> Result<Self, ParseError> {
        let mut cursor = Cursor::new(text);
        cursor.skip(&["please", "now", "then"]);
        let edit = Self::parse_verb(&mut cursor)?;
        cursor.skip(&[",", "please", "."]);
        match cursor.peek() {
            None => Ok(edit),
            Some(word) => Err(ParseError::Grammar(format!("\"{word}\" after the end of the edit"))),
        }
    }

    fn parse_verb(cursor: &mut Cursor) -> Result<Self, ParseError> {
        // "put a ring above the cube" adds one, "put the ring above the cube" moves it.
        let mut ahead = cursor.clone();
        let adds = ahead.skip(&["put", "place"]) && ahead.mention().is_ok_and(|m| m.article.is_new());
        if !adds && cursor.skip(&["move", "put", "place", "shift"]) {
            let what = known(cursor)?;
            let places = places(cursor)?;
            return if places.is_empty() {
                Err(missing(cursor, "a relation"))
            } else {
                Ok(Self::Move { what, places })
            };
        }
        if cursor.skip(&["swap", "exchange", "switch"]) {
            let first = known(cursor)?;
            if !cursor.skip(&["and", "with"]) {
                return Err(missing(cursor, "\"and\""));
            }
            return Ok(Self::Swap { first, second: known(cursor)? });
        }
        if cursor.skip(&["add", "draw", "put", "place"]) {
            let Mention { article, object: what } = cursor.mention()?;
            if article == Article::The {
                return Err(ParseError::Grammar(format!("\"add the {}\" adds nothing new", what.phrase())));
            }
            return Ok(Self::Add { what, places: places(cursor)? });
        }
        if cursor.skip(&["remove", "delete", "erase"]) || cursor.eat("take away") || cursor.eat("get rid of") {
            return Ok(Self::Remove { what: known(cursor)? });
        }
        if cursor.skip(&["replace"]) {
            let what = known(cursor)?;
            if !cursor.skip(&["with", "by"]) {
                return Err(missing(cursor, "\"with\""));
            }
            return Ok(Self::Replace { what, by: cursor.mention()?.object });
        }
        if cursor.eat("change the colour of") || cursor.eat("change the color of") {
            let what = known(cursor)?;
            let colour = cursor.eat("to").then(|| cursor.peek().and_then(words::colour)).flatten();
            let colour = colour.ok_or_else(|| missing(cursor, "a colour"))?;
            cursor.next();
            return Ok(Self::Recolour { what, colour });
        }
        if cursor.skip(&["enlarge"]) {
            return Ok(Self::Resize { what: known(cursor)?, size: Size::Large });
        }
        if cursor.skip(&["shrink"]) {
            return Ok(Self::Resize { what: known(cursor)?, size: Size::Small });
        }
        if cursor.skip(&["make", "paint", "colour", "color", "recolour", "recolor", "turn"]) {
            let what = known(cursor)?;
            let Some(word) = cursor.next() else { return Err(missing(cursor, "a colour or a size")) };
            let size = match word.as_str() {
                "larger" | "bigger" => Some(Size::Large),
                "smaller" => Some(Size::Small),
                other => words::size(other),
            };
            return match (size, words::colour(&word)) {
                (Some(size), _) => Ok(Self::Resize { what, size }),
                (None, Some(colour)) => Ok(Self::Recolour { what, colour }),
                (None, None) => Err(ParseError::Grammar(format!("\"{word}\" where a colour or a size should be"))),
            };
        }
        let known: Vec<&str> = vec!["move", "swap", "add", "remove", "make", "replace"];
        Err(ParseError::Grammar(format!("an edit begins with one of {}", known.join(", "))))
    }

    /// Carries the edit out, or None if an object it names is not there (or is not the only one), nothing would change,
    /// or no place is found. Where the words leave something open it is drawn from `rng`.
    pub fn apply(&self, rng: &mut Stream, scene: &Scene) -> Option<Scene> {
        let mut edited = scene.clone();
        // What has another outline where it is.
        let mut reshaped = None;
        let changed = match self {
            Self::Move { what, places } => {
                let (i, anchors, view) = (find(scene, what)?, anchors(scene, places)?, scene.view());
                if anchors.iter().any(|(_, j)| *j == i) || anchors.iter().all(|(r, j)| view.holds(i, *r, *j)) {
                    return None;
                }
                return put(rng, edited, i, &anchors);
            }
            Self::Swap { first, second } => {
                let (i, j) = (find(scene, first)?, find(scene, second)?);
                if i == j {
                    return None;
                }
                let (a, b) = (scene.items[i], scene.items[j]);
                (edited.items[i].x, edited.items[i].y) = (b.x, b.y);
                (edited.items[j].x, edited.items[j].y) = (a.x, a.y);
                vec![i, j]
            }
            Self::Add { what, places } => {
                let (shape, size, colour) = attributes(what)?;
                let size = size.unwrap_or(*rng.choose(Size::ALL));
                let (colour, radius) = (colour?, sample::radius(rng, size));
                let anchors = anchors(scene, places)?;
                let (i, depth) = (scene.items.len(), scene.top_depth());
                edited.items.push(Item { shape, colour, size, x: 0.0, y: 0.0, radius, depth });
                return if sample::distinct(&edited, i) { put(rng, edited, i, &anchors) } else { None };
            }
            Self::Remove { what } => {
                edited.items.remove(find(scene, what)?);
                return Some(edited);
            }
            Self::Recolour { what, colour } => {
                let i = find(scene, what)?;
                if edited.items[i].colour == *colour {
                    return None;
                }
                edited.items[i].colour = *colour;
                if !sample::distinct(&edited, i) {
                    return None;
                }
                vec![i]
            }
            Self::Resize { what, size } => {
                let i = find(scene, what)?;
                reshaped = Some(i);
                let item = &mut edited.items[i];
                if item.size == *size {
                    return None;
                }
                (item.size, item.radius) = (*size, sample::radius(rng, *size));
                vec![i]
            }
            Self::Replace { what, by } => {
                let i = find(scene, what)?;
                reshaped = Some(i);
                let item = &mut edited.items[i];
                let (shape, size, colour) = attributes(by)?;
                if (shape, colour?) == (item.shape, item.colour) && size.is_none_or(|s| s == item.size) {
                    return None;
                }
                if let Some(size) = size.filter(|s| *s != item.size) {
                    (item.size, item.radius) = (size, sample::radius(rng, size));
                }
                (item.shape, item.colour) = (shape, colour?);
                if !sample::distinct(&edited, i) {
                    return None;
                }
                vec![i]
            }
        };
        if sample::valid(&edited, &changed) {
            return Some(edited);
        }
        // Another outline may need a little more room: nudge it.
        let i = reshaped?;
        let (x, y) = (edited.items[i].x, edited.items[i].y);
        for _ in 0..24 {
            edited.items[i].x = x + rng.range(-4.0, 4.0) as f32;
            edited.items[i].y = y + rng.range(-4.0, 4.0) as f32;
            if sample::valid(&edited, &changed) {
                return Some(edited);
            }
        }
        None
    }

    /// The edit with more of the places that its target has, if it names one: directions from what it adds or moves to other
    /// things, none of which is held out from training.
    pub fn with_more_places(mut self, rng: &mut Stream, source: &Scene, target: &Scene) -> Self {
        let (i, places) = match &mut self {
            Self::Move { what, places } => (find(source, what), places),
            Self::Add { places, .. } if !places.is_empty() => (Some(source.items.len()), places),
            _ => return self,
        };
        let Some(i) = i else { return self };
        let (view, objects, what) = (target.view(), source.objects(), target.items[i].object());
        let mut others: Vec<usize> = (0..source.items.len()).filter(|j| *j != i).collect();
        rng.shuffle(&mut others);
        let most = 2 + rng.below(PLACES - 1);
        for j in others {
            let there = |(_, anchor): &Place| find(source, anchor) == Some(j);
            let apart = sample::apart(&target.items[i], &target.items[j]) && sample::distinct(source, j);
            if places.len() >= most || places.iter().any(there) || !apart {
                continue;
            }
            let clear =
                |r: &Spatial| view.certainty(i, *r, j) >= sample::MARGIN && !split::held_out(&what, *r, &objects[j]);
            let clear: Vec<Spatial> = Spatial::DIRECTIONS.into_iter().filter(clear).collect();
            if !clear.is_empty() {
                places.push((*rng.choose(&clear), reference(rng, &objects, j, false)));
            }
        }
        self
    }
}

/// The scene with a second one of its things, which is what a Diffuser often draws.
pub fn doubled(rng: &mut Stream, scene: &Scene) -> Option<Scene> {
    scene.items.first()?;
    let mut doubled = scene.clone();
    let item = *rng.choose(&scene.items);
    let radius = sample::radius(rng, item.size);
    doubled.items.push(Item { radius, depth: scene.top_depth(), ..item });
    put(rng, doubled, scene.items.len(), &[])
}

/// Places up to [`PLACES`], with "and" or a comma between them.
fn places(cursor: &mut Cursor) -> Result<Vec<Place>, ParseError> {
    let mut places = Vec::new();
    let mut ahead = cursor.clone();
    while let Some(relation) = ahead.eat_relation().filter(|_| places.len() < PLACES) {
        places.push((relation, known(&mut ahead)?));
        *cursor = ahead.clone();
        if !ahead.skip(&[",", "and"]) {
            break;
        }
    }
    Ok(places)
}

/// The items that places are at.
fn anchors(scene: &Scene, places: &[Place]) -> Option<Vec<(Spatial, usize)>> {
    places.iter().map(|(relation, anchor)| Some((*relation, find(scene, anchor)?))).collect()
}

/// Something that is in the picture.
fn known(cursor: &mut Cursor) -> Result<Object, ParseError> {
    cursor.skip(&["the"]);
    let side = cursor.peek().and_then(Side::from_name);
    if side.is_some() {
        cursor.next();
    }
    let mut object = cursor.mention()?.object;
    object.attributes.splice(0..0, side.map(|side| side.name().to_owned()));
    Ok(object)
}

fn missing(cursor: &Cursor, what: &str) -> ParseError {
    ParseError::Grammar(format!("\"{}\" where {what} should be", cursor.peek().unwrap_or("the end")))
}

fn where_to(relation: Spatial) -> &'static str {
    match relation {
        Spatial::LeftOf => "to the left of",
        Spatial::RightOf => "to the right of",
        other => other.name(),
    }
}

/// The one item that the reference fits; of several, the one that lies farthest to the side it says.
pub fn find(scene: &Scene, reference: &Object) -> Option<usize> {
    let (sides, attributes): (Vec<&String>, Vec<&String>) =
        reference.attributes.iter().partition(|a| Side::from_name(a).is_some());
    let name = Object::new(reference.label.clone(), attributes.into_iter().cloned().collect());
    let fits = |i: &usize| scene.items[*i].object().is_meant_by(&name);
    let found: Vec<usize> = (0..scene.items.len()).filter(fits).collect();
    match (found.as_slice(), sides.first().and_then(|name| Side::from_name(name))) {
        ([one], _) => Some(*one),
        (several, Some(side)) => {
            let view = scene.view();
            several.iter().copied().max_by(|a, b| side.reach(&view, *a).total_cmp(&side.reach(&view, *b)))
        }
        _ => None,
    }
}

fn attributes(object: &Object) -> Option<(Shape, Option<Size>, Option<Colour>)> {
    let size = object.attributes.iter().find_map(|a| Size::from_name(a));
    let colour = object.attributes.iter().find_map(|a| Colour::from_name(a));
    Some((Shape::from_name(&object.label)?, size, colour))
}

/// Finds a valid place for item `i`, with all of these relations to other items.
fn put(rng: &mut Stream, mut scene: Scene, i: usize, anchors: &[(Spatial, usize)]) -> Option<Scene> {
    // What touches or holds it decides where to look for a place.
    let close = anchors.iter().find(|(relation, _)| !relation.is_direction()).copied();
    match close {
        Some((Spatial::Inside, j)) => {
            let free = scene.items[j].shape == Shape::Ring && scene.items[j].size == Size::Large;
            if !free || scene.items[i].size == Size::Large {
                return None;
            }
            // Only the smallest of the small fit into a ring.
            scene.items[i].radius = rng.range(9.4, 10.2) as f32;
        }
        Some((Spatial::InFrontOf, _)) => scene.items[i].depth = scene.top_depth(),
        Some((Spatial::Behind, _)) => scene.items[i].depth = scene.bottom_depth(),
        _ => {}
    }
    for _ in 0..60 * anchors.len().max(1) {
        let item = &scene.items[i];
        let (x, y) = match close {
            Some((Spatial::Inside, j)) => near(rng, &scene.items[j], (0.0, 1.5)),
            Some((_, j)) => {
                let reach = item.radius + scene.items[j].radius;
                near(rng, &scene.items[j], (0.55 * reach, 0.95 * reach))
            }
            None => sample::position(rng, item.shape, item.radius),
        };
        (scene.items[i].x, scene.items[i].y) = (x, y);
        // A direction is asked for beside the other thing, not within or over it.
        let apart = |(r, j): &(Spatial, usize)| !r.is_direction() || sample::apart(&scene.items[i], &scene.items[*j]);
        let all_hold = || {
            let view = scene.view();
            anchors.iter().all(|(relation, j)| view.certainty(i, *relation, *j) >= sample::MARGIN)
        };
        if anchors.iter().all(apart) && (anchors.is_empty() || all_hold()) && sample::valid(&scene, &[i]) {
            return Some(scene);
        }
    }
    None
}

fn near(rng: &mut Stream, item: &Item, distance: (f32, f32)) -> (f32, f32) {
    let angle = rng.range(0.0, std::f64::consts::TAU) as f32;
    let distance = rng.range(f64::from(distance.0), f64::from(distance.1)) as f32;
    (item.x + distance * angle.cos(), item.y + distance * angle.sin())
}

#[cfg(test)]
mod tests;
