//! Edits of a scene: what an Actor may ask for, in words and carried out.
//!
//! An edit names objects as one would say them ("the red ball", and of two alike "the left red ball"); it can be written as
//! an instruction, parsed back, and applied to a scene. Applying leaves the background and every object that the edit does
//! not name as they are.

use super::{
    caption::indefinite,
    sample,
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

/// One edit. Objects are references: a label and as many attributes as it takes to tell them apart, of which the first may be
/// a [`Side`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Edit {
    Move { what: Object, relation: Spatial, anchor: Object },
    Swap { first: Object, second: Object },
    Add { what: Object, place: Option<(Spatial, Object)> },
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
            Self::Move { what, anchor, .. } | Self::Add { what, place: Some((_, anchor)) } => vec![what, anchor],
            Self::Swap { first, second } => vec![first, second],
            Self::Replace { what, by } => vec![what, by],
            Self::Add { what, place: None } | Self::Remove { what } => vec![what],
            Self::Recolour { what, .. } | Self::Resize { what, .. } => vec![what],
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
        match self {
            Self::Move { what, relation, anchor } => {
                let verb = choose(&["move", "move", "put"]);
                format!("{verb} {} {} {}", the(what), where_to(*relation), the(anchor))
            }
            Self::Swap { first, second } => {
                let verb = choose(&["swap", "exchange"]);
                format!("{verb} {} and {}", the(first), the(second))
            }
            Self::Add { what, place: Some((relation, anchor)) } => {
                format!("add {} {} {}", indefinite(what), where_to(*relation), the(anchor))
            }
            Self::Add { what, place: None } => format!("add {}", indefinite(what)),
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
            let (relation, anchor) = place(cursor)?.ok_or_else(|| missing(cursor, "a relation"))?;
            return Ok(Self::Move { what, relation, anchor });
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
            return Ok(Self::Add { what, place: place(cursor)? });
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
            Self::Move { what, relation, anchor } => {
                let (i, j) = (find(scene, what)?, find(scene, anchor)?);
                if i == j || scene.view().holds(i, *relation, j) {
                    return None;
                }
                return put(rng, edited, i, Some((*relation, j)));
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
            Self::Add { what, place } => {
                let (shape, size, colour) = attributes(what)?;
                let size = size.unwrap_or(*rng.choose(Size::ALL));
                let (colour, radius) = (colour?, sample::radius(rng, size));
                let anchor = match place {
                    Some((relation, anchor)) => Some((*relation, find(scene, anchor)?)),
                    None => None,
                };
                let (i, depth) = (scene.items.len(), scene.top_depth());
                edited.items.push(Item { shape, colour, size, x: 0.0, y: 0.0, radius, depth });
                return if sample::distinct(&edited, i) { put(rng, edited, i, anchor) } else { None };
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
}

/// The scene with a second one of its things, which is what a Diffuser often draws.
pub fn doubled(rng: &mut Stream, scene: &Scene) -> Option<Scene> {
    scene.items.first()?;
    let mut doubled = scene.clone();
    let item = *rng.choose(&scene.items);
    let radius = sample::radius(rng, item.size);
    doubled.items.push(Item { radius, depth: scene.top_depth(), ..item });
    put(rng, doubled, scene.items.len(), None)
}

fn place(cursor: &mut Cursor) -> Result<Option<(Spatial, Object)>, ParseError> {
    match cursor.eat_relation() {
        Some(relation) => Ok(Some((relation, known(cursor)?))),
        None => Ok(None),
    }
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

/// Finds a valid place for item `i`, with the relation to another item if one is asked for.
fn put(rng: &mut Stream, mut scene: Scene, i: usize, anchor: Option<(Spatial, usize)>) -> Option<Scene> {
    match anchor {
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
    for _ in 0..60 {
        let item = &scene.items[i];
        let (x, y) = match anchor {
            Some((Spatial::Inside, j)) => near(rng, &scene.items[j], (0.0, 1.5)),
            Some((Spatial::InFrontOf | Spatial::Behind, j)) => {
                let reach = item.radius + scene.items[j].radius;
                near(rng, &scene.items[j], (0.55 * reach, 0.95 * reach))
            }
            _ => sample::position(rng, item.shape, item.radius),
        };
        (scene.items[i].x, scene.items[i].y) = (x, y);
        let holds = |(r, j): (Spatial, usize)| scene.view().certainty(i, r, j) >= sample::MARGIN;
        // A direction is asked for beside the other thing, not within or over it.
        let apart = match anchor {
            Some((r, j)) if r.is_direction() => sample::apart(&scene.items[i], &scene.items[j]),
            _ => true,
        };
        if apart && anchor.is_none_or(holds) && sample::valid(&scene, &[i]) {
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
mod tests {
    use super::*;
    use crate::scene::tabletop::world::Background;

    fn item(shape: Shape, colour: Colour, size: Size, x: f32, y: f32) -> Item {
        Item { shape, colour, size, x, y, radius: size.radii().0, depth: x as i16 }
    }

    fn table() -> Scene {
        Scene {
            background: Background { rgb: [230.0; 3], slope: [0.0; 2] },
            items: vec![
                item(Shape::Ball, Colour::Red, Size::Small, 30.0, 30.0),
                item(Shape::Cube, Colour::Blue, Size::Large, 90.0, 36.0),
                item(Shape::Ball, Colour::Green, Size::Small, 64.0, 100.0),
            ],
        }
    }

    fn apply(text: &str) -> Option<Scene> {
        Edit::parse(text).unwrap().apply(&mut Stream::new(1, "edit", 0), &table())
    }

    #[test]
    fn instructions_in_an_actors_words_are_carried_out() {
        let moved = apply("Move the red ball to the right of the blue cube.").is_none();
        assert!(moved, "there is no room to the right of the cube");
        let moved = apply("move the red ball below the cube").unwrap();
        assert!(moved.view().holds(0, Spatial::Below, 1));
        let swapped = apply("swap the red ball and the cube").unwrap();
        assert_eq!((swapped.items[0].x, swapped.items[1].x), (90.0, 30.0));
        let added = apply("add a small yellow ring left of the green ball").unwrap();
        assert!(added.items.len() == 4 && added.view().holds(3, Spatial::LeftOf, 2));
        assert_eq!(apply("remove the green ball").unwrap().items.len(), 2);
        assert_eq!(apply("make the cube yellow").unwrap().items[1].colour, Colour::Yellow);
        assert_eq!(apply("change the colour of the red ball to pink").unwrap().items[0].colour, Colour::Pink);
        assert_eq!(apply("make the cube smaller").unwrap().items[1].size, Size::Small);
        let replaced = apply("replace the cube with a small black star").unwrap().items[1];
        assert_eq!((replaced.shape, replaced.colour, replaced.size), (Shape::Star, Colour::Black, Size::Small));
        for (said, plain) in [
            ("Please turn the cube yellow.", "make the cube yellow"),
            ("get rid of the green ball, please", "remove the green ball"),
            ("shrink the sphere", "make the ball smaller"),
            ("put a green ring over the cube", "add a green ring above the cube"),
            ("place the ball on the left side of the box", "move the ball to the left of the cube"),
        ] {
            assert_eq!(Edit::parse(said).unwrap().plain(), plain);
        }
    }

    #[test]
    fn what_cannot_be_done_is_not_done() {
        // Two balls, no star, nothing to change, nothing that fits.
        assert!(apply("remove the ball").is_none());
        assert!(apply("remove the star").is_none());
        assert!(apply("make the cube blue").is_none() && apply("make the cube larger").is_none());
        assert!(apply("move the red ball to the left of the cube").is_none());
        assert!(apply("swap the cube and the cube").is_none());
        assert!(apply("move the red ball inside the cube").is_none());
    }

    #[test]
    fn of_two_alike_things_the_side_says_which() {
        let mut two = table();
        two.items.push(item(Shape::Ball, Colour::Red, Size::Small, 36.0, 110.0));
        let left = |text: &str| {
            let edited = Edit::parse(text).unwrap().apply(&mut Stream::new(1, "edit", 0), &two);
            edited.map(|edited| edited.items.iter().map(|i| i.y).collect::<Vec<_>>())
        };
        assert_eq!(left("remove the red ball"), None);
        assert_eq!(left("remove the upper red ball"), Some(vec![36.0, 100.0, 110.0]));
        assert_eq!(left("remove the lower red ball"), Some(vec![30.0, 36.0, 100.0]));
        // The first lies to the left of the second, but above it much more.
        let names: Vec<_> = (0..4).map(|i| name(&two.view(), i).unwrap().phrase()).collect();
        assert_eq!(
            names,
            ["upper red ball", "blue cube", "green ball", "lower red ball"].map(|n| n.replace("red", "small red"))
        );
        let edit = Edit::parse("move the left small red ball below the right red ball").unwrap();
        assert_eq!(Edit::parse(&edit.plain()), Ok(edit));
    }

    #[test]
    fn what_lies_as_no_world_would_have_it_can_be_edited_elsewhere() {
        let mut odd = table();
        // One ball twice, over the edge and across the cube.
        odd.items.push(item(Shape::Ball, Colour::Red, Size::Small, 2.0, 64.0));
        odd.items.push(item(Shape::Cone, Colour::Blue, Size::Small, 84.0, 40.0));
        let apply = |text: &str| Edit::parse(text).unwrap().apply(&mut Stream::new(1, "edit", 0), &odd);
        assert_eq!(apply("remove the left red ball").unwrap().items.len(), 4);
        assert_eq!(apply("make the green ball yellow").unwrap().items[2].colour, Colour::Yellow);
        assert!(apply("make the green ball red").is_none(), "there would be three red balls");
        assert!(apply("add a small pink star above the green ball").is_some());
    }

    #[test]
    fn a_doubled_scene_has_one_thing_twice() {
        let twice = (0..20).filter_map(|i| doubled(&mut Stream::new(3, "double", i), &table()));
        let twice: Vec<Scene> = twice.collect();
        assert!(twice.len() > 10);
        for scene in twice {
            let alike: Vec<usize> = (0..4).filter(|i| !sample::distinct(&scene, *i)).collect();
            assert_eq!((alike.len(), alike[1]), (2, 3));
            for i in alike {
                assert_eq!(find(&scene, &name(&scene.view(), i).unwrap()), Some(i));
            }
        }
    }

    #[test]
    fn other_texts_are_refused_with_a_reason() {
        let error = |text: &str| Edit::parse(text).unwrap_err().to_string();
        assert!(error("fly to the moon").contains("begins with one of move"));
        assert!(error("move the ball").contains("a relation"));
        assert!(error("change the colour of the ball to orange").contains("\"orange\" where a colour"));
        assert!(error("make the ball").contains("\"the end\" where a colour or a size"));
        assert!(error("make the ball sparkling").contains("\"sparkling\" where a colour or a size"));
        assert!(error("replace the ball").contains("\"with\""));
        assert!(error("remove the bal").contains("did you mean \"ball\""));
        assert!(error("remove the ball quickly").contains("after the end"));
        assert!(error("add the ball").contains("nothing new"));
        assert!(error("").contains("begins"));
    }
}
