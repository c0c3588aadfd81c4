//! Endless training samples with exact truth, each a function of (seed, split, index) alone.
//!
//! [`text_to_image`] and [`edit`] teach the Diffuser and the Editor, [`check`] the Checker (a picture and a graph that
//! may be wrong about it), [`act`] the Actor (a picture that misses something, and an edit that mends it).

use super::{
    caption::{self, Style, caption, reference},
    edit::{Edit, Kind},
    plan,
    sample::{self, BROUGHT_TOGETHER, MARGIN, TOUCHING},
    split::{self, Part, Split},
    view::{Judgement, View},
    world::{Colour, Scene, Shape, Size},
};
use crate::scene::{
    graph::{Object, Relation, SceneGraph},
    relation::Spatial,
};
use crate::tensor::rng::Stream;

/// A prompt and a scene it describes.
#[derive(Debug, Clone)]
pub struct TextToImage {
    pub prompt: String,
    pub scene: Scene,
    pub graph: SceneGraph,
}

/// A scene, an instruction, and the scene after it.
#[derive(Debug, Clone)]
pub struct EditSample {
    pub source: Scene,
    pub target: Scene,
    pub edit: Edit,
    pub instruction: String,
    pub kind: Kind,
    /// Describes the source.
    pub before: SceneGraph,
    /// Describes the target.
    pub after: SceneGraph,
}

/// What there is more of among the edits than an even draw gives.
#[derive(Debug, Clone, Copy)]
pub struct Emphasis {
    /// Share of the scenes in which two objects touch, and in proportion that of the edits that bring two together.
    pub touching: f64,
    /// Share of the edits that move something, whatever an even draw of the others adds.
    pub moves: f64,
    /// Share of what is added somewhere or moved whose words name several places, where there are several.
    pub several_places: f64,
}

impl Default for Emphasis {
    fn default() -> Self {
        Self { touching: TOUCHING, moves: 0.0, several_places: 0.0 }
    }
}

/// A picture, and a graph that may be wrong about it.
#[derive(Debug, Clone)]
pub struct CheckSample {
    pub scene: Scene,
    pub graph: SceneGraph,
    pub truth: Judgement,
}

/// One thing a graph says of a picture.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Claim {
    Object(Object),
    Relation { subject: Object, predicate: String, object: Object },
}

/// A picture that does not meet its prompt, and an edit that brings it nearer.
#[derive(Debug, Clone)]
pub struct ActSample {
    pub scene: Scene,
    pub prompt: String,
    pub graph: SceneGraph,
    pub truth: Judgement,
    pub edit: Edit,
    pub instruction: String,
    /// The scene after the edit.
    pub target: Scene,
}

impl CheckSample {
    /// All that the graph says, and whether it is true.
    pub fn claims(&self) -> Vec<(Claim, bool)> {
        let objects = self.graph.objects.iter().cloned().map(Claim::Object).zip(self.truth.objects.iter().copied());
        let relation = |r: &Relation| Claim::Relation {
            subject: self.graph.objects[r.subject].clone(),
            predicate: r.predicate.clone(),
            object: self.graph.objects[r.object].clone(),
        };
        let relations = self.graph.relations.iter().map(relation).zip(self.truth.relations.iter().copied());
        objects.chain(relations).collect()
    }
}

fn stream(task: &str, seed: u64, split: Split, index: u64) -> Stream {
    Stream::new(seed, &format!("tabletop {task} {}", split.name()), index)
}

/// The share of prompts that are triples.
const TRIPLES: f64 = 0.25;

/// Natural language, or with the chance `triples` those; the paraphrase split has its own phrasings.
pub fn style(rng: &mut Stream, split: Split, triples: f64) -> Style {
    match split {
        Split::TestParaphrase => Style::Paraphrase,
        _ if rng.chance(triples) => Style::Triples,
        _ => Style::Natural,
    }
}

/// A scene of `min..=max` objects (within what the split has) and a prompt for it.
pub fn text_to_image(seed: u64, split: Split, index: u64, min: usize, max: usize) -> TextToImage {
    text_to_image_touching(seed, split, index, min, max, TOUCHING)
}

/// [`text_to_image`] with this share of scenes in which two objects touch.
pub fn text_to_image_touching(
    seed: u64,
    split: Split,
    index: u64,
    min: usize,
    max: usize,
    touching: f64,
) -> TextToImage {
    let rng = &mut stream("text to image", seed, split, index);
    let (scene, graph) = sample::draw_touching(rng, split, min, max, touching);
    let style = style(rng, split, TRIPLES);
    TextToImage { prompt: caption(rng, &graph, style), scene, graph }
}

/// Scene `index` of those that are drawn over (`rlrig world redraw`), and a prompt for it: of two or three things two touch,
/// and nine in ten prompts say which one is in front. Nothing where this index makes none such.
pub fn to_redraw(seed: u64, split: Split, index: u64) -> Option<TextToImage> {
    let rng = &mut Stream::new(seed, "redrawn", index);
    let (scene, graph) = sample::draw_touching(rng, split, 2, 3, 1.0);
    let is_depth =
        |r: &Relation| matches!(Spatial::from_name(&r.predicate), Some(Spatial::InFrontOf | Spatial::Behind));
    let wanted = graph.relations.iter().any(is_depth) || rng.chance(0.1);
    wanted.then(|| TextToImage { prompt: caption(rng, &graph, Style::Natural), scene, graph })
}

/// A scene of `min..=max` objects and an edit of it, of a kind drawn evenly. Often what is removed is there once more.
pub fn edit(seed: u64, split: Split, index: u64, min: usize, max: usize) -> EditSample {
    edit_with(seed, split, index, min, max, Emphasis::default())
}

/// [`edit`] with more of what is hard.
pub fn edit_with(seed: u64, split: Split, index: u64, min: usize, max: usize, emphasis: Emphasis) -> EditSample {
    let Emphasis { touching, moves, several_places } = emphasis;
    let rng = &mut stream("edit", seed, split, index);
    loop {
        let moved = rng.share(moves);
        let kind = if moved { Kind::Move } else { *rng.choose(&Kind::ALL) };
        let least = if matches!(kind, Kind::Move | Kind::Swap) { min.max(2) } else { min };
        let (mut source, mut before) = sample::draw_touching(rng, split, least, max, touching);
        if kind == Kind::Remove && rng.chance(0.5) {
            let twice = super::edit::doubled(rng, &source).filter(|s| split::part(&s.items) == split.part());
            let Some(twice) = twice else { continue };
            before.objects.extend(twice.items.last().map(|item| item.object()));
            source = twice;
        }
        for _ in 0..8 {
            let Some(edit) = propose(rng, &source, kind, touching) else { break };
            let Some(target) = edit.apply(rng, &source) else { continue };
            let edit = if rng.share(several_places) { edit.with_more_places(rng, &source, &target) } else { edit };
            let after = described_after(&before, &edit, &source, &target);
            let allowed = match split {
                Split::Train | Split::TrainMany => {
                    sample::trainable(&target) && sample::admissible(split, &after) && !novel(&edit)
                }
                Split::TestUnseen => sample::admissible(split, &after),
                _ => !novel(&edit),
            };
            if allowed {
                let instruction = edit.instruction(rng);
                return EditSample { source, target, edit, instruction, kind, before, after };
            }
        }
    }
}

/// An edit of a scene that is at hand, for training: often one that brings it nearer to what `graph` asks for, else any. Its
/// instruction, and the scene after it; nothing if no edit was found.
/// `several_places` is [`Emphasis::several_places`].
pub fn edit_of(
    seed: u64,
    index: u64,
    scene: &Scene,
    graph: &SceneGraph,
    several_places: f64,
) -> Option<(String, Scene)> {
    let rng = &mut stream("edit of", seed, Split::Train, index);
    let view = scene.view();
    for _ in 0..16 {
        let helpful = rng.chance(0.7).then(|| plan::edits(&view, graph, 1)).filter(|edits| !edits.is_empty());
        let edit = match helpful {
            Some(edits) => Some(rng.choose(&edits).clone()),
            None => {
                let kind = *rng.choose(&Kind::ALL);
                propose(rng, scene, kind, TOUCHING)
            }
        };
        let Some(edit) = edit.filter(|edit| !novel(edit)) else { continue };
        if let Some(target) = edit.apply(rng, scene).filter(sample::trainable) {
            let edit = if rng.share(several_places) { edit.with_more_places(rng, scene, &target) } else { edit };
            return Some((edit.instruction(rng), target));
        }
    }
    None
}

/// An instruction, for training, that asks for something which a picture lacks of its graph, in up to `places`; nothing if
/// there is none.
pub fn mending(seed: u64, index: u64, view: &View, graph: &SceneGraph, places: usize) -> Option<String> {
    let rng = &mut stream("mending", seed, Split::Train, index);
    let edits: Vec<Edit> = plan::edits(view, graph, places).into_iter().filter(|edit| !novel(edit)).collect();
    (!edits.is_empty()).then(|| rng.choose(&edits).instruction(rng))
}

/// What a scene should show after an instruction: its things, what the words ask for, and what they leave alone where
/// it was. Nothing where the words cannot be read or carried out.
pub fn after(seed: u64, index: u64, scene: &Scene, instruction: &str) -> Option<SceneGraph> {
    let edit = Edit::parse(instruction).ok()?;
    let target = edit.apply(&mut stream("after", seed, Split::Train, index), scene)?;
    let before = SceneGraph { objects: scene.objects(), relations: left_alone(scene, &edit) };
    Some(described_after(&before, &edit, scene, &target))
}

/// For each two things that an edit does not touch, and that can be told from all others, the relation that holds most
/// clearly, of those that training names.
fn left_alone(scene: &Scene, edit: &Edit) -> Vec<Relation> {
    let touched = match edit {
        Edit::Add { .. } => Vec::new(),
        Edit::Swap { first, second } => vec![first, second],
        Edit::Move { what, .. }
        | Edit::Remove { what }
        | Edit::Recolour { what, .. }
        | Edit::Resize { what, .. }
        | Edit::Replace { what, .. } => vec![what],
    };
    let touched: Vec<usize> = touched.into_iter().filter_map(|what| super::edit::find(scene, what)).collect();
    let (view, objects) = (scene.view(), scene.objects());
    let stays = |i: usize| !touched.contains(&i) && sample::distinct(scene, i);
    let clearest = |(a, b): (usize, usize)| {
        let both_ways = Spatial::ALL.into_iter().flat_map(|r| [(a, r, b), (b, r, a)]);
        let certain = both_ways.map(|(s, r, o)| (view.certainty(s, r, o), s, r, o));
        let named = certain.filter(|(c, s, r, o)| *c >= MARGIN && !split::held_out(&objects[*s], *r, &objects[*o]));
        let (_, subject, relation, object) = named.max_by(|a, b| a.0.total_cmp(&b.0))?;
        Some(Relation { subject, predicate: relation.name().into(), object })
    };
    let pairs = (0..objects.len()).flat_map(|b| (0..b).map(move |a| (a, b)));
    pairs.filter(|(a, b)| stays(*a) && stays(*b)).filter_map(clearest).collect()
}

/// Whether the instruction itself names a relation that training never names.
pub fn novel(edit: &Edit) -> bool {
    match edit {
        Edit::Move { what, places } | Edit::Add { what, places } => {
            places.iter().any(|(relation, anchor)| split::held_out(what, *relation, anchor))
        }
        _ => false,
    }
}

/// A random edit of this kind that the scene's objects allow; whether there is room for it is found by applying it.
fn propose(rng: &mut Stream, scene: &Scene, kind: Kind, touching: f64) -> Option<Edit> {
    let objects = scene.objects();
    let n = objects.len();
    if n == 0 || (n == 1 && matches!(kind, Kind::Move | Kind::Swap | Kind::Remove)) {
        return None;
    }
    let i = rng.below(n);
    let j = (i + 1 + rng.below((n - 1).max(1))) % n;
    let item = scene.items[i];
    let what = reference(rng, &objects, i, false);
    Some(match kind {
        Kind::Move => {
            let anchor = reference(rng, &objects, j, false);
            Edit::Move { what, places: vec![(relation_to(rng, scene.items[j].shape, touching), anchor)] }
        }
        Kind::Swap => Edit::Swap { first: what, second: reference(rng, &objects, j, false) },
        Kind::Add => {
            let what = new_object(rng, scene, None)?;
            let places = rng.chance(0.8).then(|| {
                let anchor = reference(rng, &objects, i, false);
                (relation_to(rng, item.shape, touching), anchor)
            });
            Edit::Add { what, places: places.into_iter().collect() }
        }
        Kind::Remove => {
            // What is there more than once, if anything is.
            let alike: Vec<usize> = (0..n).filter(|i| !sample::distinct(scene, *i)).collect();
            let again = (!alike.is_empty()).then(|| *rng.choose(&alike));
            let what = again.map_or(Some(what), |i| super::edit::name(&scene.view(), i))?;
            Edit::Remove { what }
        }
        Kind::Recolour => {
            let colour = *rng.choose(Colour::ALL);
            Edit::Recolour { what, colour }
        }
        Kind::Resize => Edit::Resize { what, size: item.size.other() },
        Kind::Replace => Edit::Replace { what, by: new_object(rng, scene, Some(i))? },
    })
}

/// A relation to something of this shape: a direction mostly, or one of two that touch; inside only of rings.
fn relation_to(rng: &mut Stream, anchor: Shape, touching: f64) -> Spatial {
    let close = touching * BROUGHT_TOGETHER / TOUCHING;
    match rng.uniform() {
        u if u < 1.0 - close => *rng.choose(&Spatial::DIRECTIONS),
        u if u < 1.0 - close / 2.0 || anchor != Shape::Ring => *rng.choose(&[Spatial::InFrontOf, Spatial::Behind]),
        _ => Spatial::Inside,
    }
}

/// Something that is not in the scene; in place of item `instead` it has another shape.
fn new_object(rng: &mut Stream, scene: &Scene, instead: Option<usize>) -> Option<Object> {
    for _ in 0..20 {
        let (shape, colour) = (*rng.choose(Shape::ALL), *rng.choose(Colour::ALL));
        let taken = scene.items.iter().any(|i| (i.shape, i.colour) == (shape, colour));
        if taken || instead.is_some_and(|i| scene.items[i].shape == shape) {
            continue;
        }
        let mut attributes = Vec::new();
        if rng.chance(0.5) {
            let size = *rng.choose(Size::ALL);
            // A replacement keeps its size unless another is said.
            attributes.push(instead.map_or(size, |i| scene.items[i].size).name().to_string());
        }
        attributes.push(colour.name().to_string());
        return Some(Object::new(shape.name(), attributes));
    }
    None
}

/// The description after an edit: objects renamed, added or removed, and of the relations those that still hold, with
/// the one that the edit asked for.
fn described_after(before: &SceneGraph, edit: &Edit, source: &Scene, target: &Scene) -> SceneGraph {
    let mut graph = before.clone();
    let find = |scene: &Scene, reference: &Object| super::edit::find(scene, reference);
    let add = |graph: &mut SceneGraph, subject: usize, relation: Spatial, anchor: &Object| {
        if let Some(object) = find(source, anchor) {
            graph.relations.push(Relation { subject, predicate: relation.name().into(), object });
        }
    };
    match edit {
        Edit::Add { what, places } => {
            graph.objects.push(what.clone());
            for (relation, anchor) in places {
                add(&mut graph, before.objects.len(), *relation, anchor);
            }
        }
        Edit::Remove { what } => {
            if let Some(gone) = find(source, what) {
                graph.objects.remove(gone);
                graph.relations.retain(|r| r.subject != gone && r.object != gone);
                for r in &mut graph.relations {
                    r.subject -= usize::from(r.subject > gone);
                    r.object -= usize::from(r.object > gone);
                }
            }
        }
        Edit::Move { what, places } => {
            if let Some(subject) = find(source, what) {
                places.iter().for_each(|(relation, anchor)| add(&mut graph, subject, *relation, anchor));
            }
        }
        Edit::Recolour { what, .. } | Edit::Resize { what, .. } | Edit::Replace { what, .. } => {
            if let Some(i) = find(source, what) {
                let object = target.items[i].object();
                let sized = before.objects[i].attributes.iter().any(|a| Size::from_name(a).is_some());
                let kept = if sized { 0 } else { 1 };
                graph.objects[i] = Object::new(object.label, object.attributes[kept..].to_vec());
            }
        }
        Edit::Swap { first, second } => {
            if let Some((i, j)) = find(source, first).zip(find(source, second)) {
                let (was, is) = (source.view(), target.view());
                let new = Spatial::ALL.into_iter().filter(|r| is.holds(i, *r, j) && !was.holds(i, *r, j));
                graph.relations.extend(new.map(|r| Relation { subject: i, predicate: r.name().into(), object: j }));
            }
        }
    }
    let view = target.view();
    graph
        .relations
        .retain(|r| Spatial::from_name(&r.predicate).is_some_and(|s| view.certainty(r.subject, s, r.object) >= MARGIN));
    let mut seen = Vec::new();
    graph.relations.retain(|r| !seen.contains(r) && (seen.push(r.clone()), true).1);
    graph
}

/// A prompt that a scene at hand misses by an edit or two, for training, and its graph; nothing if none was found.
pub fn wish(rng: &mut Stream, scene: &Scene) -> Option<(String, SceneGraph)> {
    for _ in 0..8 {
        let mut target = scene.clone();
        for _ in 0..1 + rng.below(2) {
            let kind = *rng.choose(&Kind::ALL);
            target = changed(rng, &target, kind).unwrap_or(target);
        }
        let named = (0..target.items.len()).all(|i| sample::distinct(&target, i));
        if !(1..=split::MOST).contains(&target.items.len()) || !named || !sample::trainable(&target) {
            continue;
        }
        let (_, graph) = sample::describe(rng, target);
        if sample::admissible(Split::Train, &graph) && !scene.view().judge(&graph).perfect() {
            let style = style(rng, Split::Train, TRIPLES);
            return Some((caption(rng, &graph, style), graph));
        }
    }
    None
}

/// The scene changed by up to `most` edits, so that it may no longer be what a graph says of it.
pub fn disturbed(rng: &mut Stream, split: Split, mut scene: Scene, most: usize) -> Scene {
    for _ in 0..most {
        let kind = *rng.choose(&[
            Kind::Move,
            Kind::Move,
            Kind::Swap,
            Kind::Swap,
            Kind::Add,
            Kind::Add,
            Kind::Add,
            Kind::Remove,
            Kind::Recolour,
            Kind::Recolour,
            Kind::Resize,
            Kind::Replace,
        ]);
        let edited = match kind {
            // As a Diffuser does: what is asked for, once more.
            Kind::Add if rng.chance(0.7) => super::edit::doubled(rng, &scene),
            _ => changed(rng, &scene, kind),
        };
        // Where the split belongs to training, so must whatever is shown.
        if let Some(edited) = edited.filter(|s| split.part() != Part::Train || sample::trainable(s)) {
            scene = edited;
        }
    }
    scene
}

/// A scene one edit away that training may show; nothing if none was found.
pub fn neighbour(rng: &mut Stream, scene: &Scene) -> Option<Scene> {
    let kind = *rng.choose(&Kind::ALL);
    changed(rng, scene, kind).filter(sample::trainable)
}

/// The scene after a random edit of this kind, if there is one.
fn changed(rng: &mut Stream, scene: &Scene, kind: Kind) -> Option<Scene> {
    propose(rng, scene, kind, TOUCHING).and_then(|edit| edit.apply(rng, scene))
}

/// A picture and a graph about it, of `min..=max` objects: right, or made wrong by changing the picture or the graph;
/// about half of all claims are false, and the false ones are near misses.
pub fn check(seed: u64, split: Split, index: u64, min: usize, max: usize) -> CheckSample {
    let rng = &mut stream("check", seed, split, index);
    loop {
        let (scene, graph) = match rng.uniform() {
            u if u < 0.15 => sample::draw(rng, split, min, max),
            u if u < 0.55 => {
                let most = 1 + rng.below(3);
                let (scene, graph) = sample::draw(rng, split, min, max);
                (disturbed(rng, split, scene, most), graph)
            }
            _ => {
                let (scene, graph) = sample::draw(rng, split, min, max);
                let graph = corrupted(rng, &scene.view(), graph);
                (scene, graph)
            }
        };
        if split.part() != Part::Train || sample::admissible(split, &graph) {
            let truth = scene.view().judge(&graph);
            return CheckSample { scene, graph, truth };
        }
    }
}

/// The object with its shape, its colour or its size said wrong.
fn near_miss(rng: &mut Stream, view: &View, object: &Object) -> Object {
    let mut wrong = object.clone();
    let what = rng.below(3);
    for a in &mut wrong.attributes {
        if what == 0 && Colour::from_name(a).is_some() {
            // Often the colour of something else in the picture.
            let seen = view.objects[rng.below(view.objects.len())].colour;
            let other = if rng.chance(0.5) { seen } else { *rng.choose(Colour::ALL) };
            *a = other.name().into();
        }
        if let (1, Some(size)) = (what, Size::from_name(a)) {
            *a = size.other().name().into();
        }
    }
    if wrong == *object {
        wrong.label = rng.choose(Shape::ALL).name().into();
    }
    wrong
}

/// The graph with some of its claims turned into near misses.
fn corrupted(rng: &mut Stream, view: &View, mut graph: SceneGraph) -> SceneGraph {
    for i in 0..graph.objects.len() {
        if rng.chance(0.6) {
            let wrong = near_miss(rng, view, &graph.objects[i]);
            let name = |o: &Object| {
                let colour = o.attributes.iter().find(|a| Colour::from_name(a).is_some()).cloned();
                (o.label.clone(), colour)
            };
            let taken = |(j, o): (usize, &Object)| j != i && name(o) == name(&wrong);
            if !graph.objects.iter().enumerate().any(taken) {
                graph.objects[i] = wrong;
            }
        }
    }
    for r in &mut graph.relations {
        if rng.chance(0.5) {
            let Some(spatial) = Spatial::from_name(&r.predicate) else { continue };
            let inverse = spatial.inverse().filter(|_| rng.chance(0.4));
            let other = inverse.unwrap_or(*rng.choose(&Spatial::ALL));
            if view.certainty(r.subject, other, r.object) <= -MARGIN {
                r.predicate = other.name().into();
            }
        }
    }
    graph
}

/// A picture that misses something of its prompt, which names `min..=max` objects, what is missed, and an edit that mends one
/// of these things.
pub fn act(seed: u64, split: Split, index: u64, min: usize, max: usize) -> ActSample {
    act_by(seed, split, index, min, max, 1, |_| true)
}

/// [`act`], of samples whose edit is `wanted`, and names so many places at most.
pub fn act_by(
    seed: u64,
    split: Split,
    index: u64,
    min: usize,
    max: usize,
    places: usize,
    wanted: impl Fn(&Edit) -> bool,
) -> ActSample {
    let rng = &mut stream("act", seed, split, index);
    loop {
        let most = 1 + rng.below(2);
        let (scene, graph) = sample::draw(rng, split, min, max);
        let scene = disturbed(rng, split, scene, most);
        let view = scene.view();
        let truth = view.judge(&graph);
        if truth.perfect() {
            continue;
        }
        for edit in plan::edits(&view, &graph, places) {
            let Some(target) = edit.apply(rng, &scene) else { continue };
            let better = target.view().judge(&graph).better_than(&truth);
            if better && !(split.part() == Part::Train && novel(&edit)) {
                // The first that helps is the rule to learn, so it is this one or another scene.
                if !wanted(&edit) {
                    break;
                }
                let style = style(rng, split, TRIPLES);
                let prompt = caption::caption(rng, &graph, style);
                let instruction = edit.plain();
                return ActSample { scene, prompt, graph, truth, edit, instruction, target };
            }
        }
    }
}

#[cfg(test)]
mod tests;
