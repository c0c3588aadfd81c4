//! What the small VLM is taught: questions and answers about pictures of the tabletop world, in the words of
//! [`crate::rig::prompts`], each with the exact truth.
//!
//! | task | question | answer |
//! |---|---|---|
//! | check | a claim, true or nearly so | what is seen of it and where, and the verdict |
//! | act | the prompt, the claims that failed and why | an edit that mends one of them |
//! | parse (no picture) | a caption | its scene graph |
//! | describe | what is in the picture | the objects and where they are, from left to right |
//!
//! Nobody asks for the last one later: it is taught because one answer says as much about a picture as dozens of
//! verdicts, and teaches the vision tower to see.

use super::{drawn::Drawn, vlm_config::VlmConfig};
use crate::{
    rig::{
        prompts,
        roles::{Claim, Verdict},
        truth::{drawn_verdicts, inventory, stated, verdicts},
    },
    scene::{
        graph::{Object, Relation, SceneGraph},
        relation::Spatial,
        tabletop::{
            caption::{caption, plain},
            edit::Edit,
            oracle::Reading,
            plan,
            render::render,
            sample,
            split::{self, Part, Split},
            tasks,
            view::{Seen, View},
            world::{Colour, Scene, Shape},
        },
    },
    tensor::rng::Stream,
};
use image::RgbImage;
use serde_json::{Value, json};

/// The kinds of rows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Task {
    Check,
    Act,
    Parse,
    Describe,
}

/// A question and its answer.
#[derive(Clone, Debug)]
pub struct Row {
    pub task: Task,
    pub question: String,
    pub answer: String,
}

/// A scene and what is asked about it.
pub struct Lesson {
    pub scene: Scene,
    pub rows: Vec<Row>,
}

/// What is taught at a step of a training.
#[derive(Clone, Copy)]
pub struct Mix<'a> {
    /// The shares of what is taught.
    pub config: &'a VlmConfig,
    /// Objects in a picture at most.
    pub objects: usize,
}

const DESCRIBE: &str = "List what the picture shows.";

/// What questions and answers repeat word for word, each a single token of the small model's vocabulary.
pub fn phrases() -> Vec<String> {
    const MARK: &str = "\u{1}";
    let object = || Claim::Object(MARK.into());
    let failed = Verdict { claim: object(), yes: false, p_yes: 0.0, reflection: String::new() };
    let reflect = |earlier: &[&str]| prompts::reflect(MARK, &[failed.clone(), failed.clone()], earlier);
    let texts = [
        prompts::check(&object()),
        prompts::verdict(MARK, true).replace("yes", MARK),
        reflect(&[]),
        reflect(&[MARK, MARK]),
        prompts::edit(MARK, MARK),
        prompts::parse(MARK),
        spaced(&json!({ "objects": [MARK, MARK] })),
        DESCRIBE.to_owned(),
    ];
    // In JSON the mark is escaped.
    let pieces = texts.iter().flat_map(|text| text.split("\\u0001").flat_map(|part| part.split(MARK)));
    let mut phrases: Vec<String> = pieces.filter(|piece| piece.len() > 1).map(str::to_owned).collect();
    phrases.extend((0..100).step_by(5).map(|percent| format!(" {percent}")));
    phrases.sort();
    phrases.dedup();
    phrases
}

/// JSON as the prompts write it: a blank behind commas and colons. No text of the tabletop world holds either.
fn spaced(value: &Value) -> String {
    value.to_string().replace(':', ": ").replace(',', ", ")
}

/// The question of a claim, and its verdict as the answer.
pub fn check_row(verdict: &Verdict) -> Row {
    Row {
        task: Task::Check,
        question: prompts::check(&verdict.claim),
        answer: prompts::verdict(&verdict.reflection, verdict.yes),
    }
}

/// All objects of a picture with their places, from left to right.
fn describe_row(view: &View) -> Row {
    let answer = spaced(&json!({ "objects": inventory(view) }));
    Row { task: Task::Describe, question: DESCRIBE.to_owned(), answer }
}

/// An object of the picture, its size said or not.
fn seen(rng: &mut Stream, view: &View) -> Object {
    let object = view.objects[rng.below(view.objects.len())].object();
    let skip = rng.below(2);
    Object::new(object.label, object.attributes[skip..].to_vec())
}

/// What differs from something of the picture in one thing, often taken from another one there.
fn unlike(rng: &mut Stream, view: &View) -> Object {
    let near = view.objects[rng.below(view.objects.len())];
    let object = match rng.below(5) {
        0 => Seen { size: near.size.other(), ..near }.object(),
        _ => mistaken(rng, view, near),
    };
    let skip = rng.below(2);
    Object::new(object.label, object.attributes[skip..].to_vec())
}

/// `near` with another shape or colour.
fn mistaken(rng: &mut Stream, view: &View, mut near: Seen) -> Object {
    let other = view.objects[rng.below(view.objects.len())];
    let borrowed = rng.chance(0.5);
    if rng.chance(0.5) {
        near.shape = if borrowed { other.shape } else { *rng.choose(Shape::ALL) };
    } else {
        near.colour = if borrowed { other.colour } else { *rng.choose(Colour::ALL) };
    }
    near.object()
}

/// Pixels between two things that seem to touch. Which one is in front is then what is hard to see, and most asked.
const TOUCH: f32 = 3.0;

/// Claims of single objects and of relations between two that are this far from being undecided, about half of them true.
fn probe(rng: &mut Stream, split: Split, view: &View, margin: f32) -> Option<Verdict> {
    if view.objects.is_empty() {
        return None;
    }
    let relation = rng.chance(0.6) && view.objects.len() > 1;
    let wanted = rng.chance(0.5);
    for _ in 0..20 {
        let graph = if relation {
            let a = rng.below(view.objects.len());
            let b = (a + 1 + rng.below(view.objects.len() - 1)) % view.objects.len();
            let touch = view.objects[a].bounds.gap(&view.objects[b].bounds) < TOUCH;
            let spatial = match rng.uniform() {
                u if touch && u < 0.5 => *rng.choose(&[Spatial::InFrontOf, Spatial::Behind]),
                u if u < 0.8 => *rng.choose(&Spatial::DIRECTIONS),
                _ => *rng.choose(&Spatial::ALL),
            };
            let mut objects: Vec<Object> = [a, b].iter().map(|i| view.objects[*i].object()).collect();
            // A relation is false too where something else is in the place of one of its two.
            if !wanted && rng.chance(0.5) {
                if !view.holds(a, spatial, b) {
                    continue;
                }
                let which = rng.below(2);
                objects[which] = mistaken(rng, view, view.objects[[a, b][which]]);
            }
            if view.certainty(a, spatial, b).abs() < margin
                || (split.part() == Part::Train && split::held_out(&objects[0], spatial, &objects[1]))
            {
                continue;
            }
            let skip = [rng.below(2), rng.below(2)];
            let short = |(o, skip): (&Object, usize)| Object::new(o.label.clone(), o.attributes[skip..].to_vec());
            let relations = vec![Relation { subject: 0, predicate: spatial.name().into(), object: 1 }];
            SceneGraph { objects: objects.iter().zip(skip).map(short).collect(), relations }
        } else {
            let object = if wanted { seen(rng, view) } else { unlike(rng, view) };
            SceneGraph { objects: vec![object], relations: Vec::new() }
        };
        let verdict = stated(view, &graph).pop()?;
        if verdict.yes == wanted {
            return Some(verdict);
        }
    }
    None
}

/// A caption and its graph, objects in the order of their mention.
fn parse_row(rng: &mut Stream, split: Split, objects: usize) -> Row {
    let (_, graph) = sample::draw(rng, split, 1, objects);
    let graph = graph.canonical();
    let style = tasks::style(rng, split, 0.2);
    let answer = json!({
        "objects": graph.objects.iter().map(Object::phrase).collect::<Vec<_>>(),
        "relations": graph.relations.iter().map(|r| json!([r.subject, r.predicate, r.object])).collect::<Vec<_>>(),
    });
    Row { task: Task::Parse, question: prompts::parse(&caption(rng, &graph, style)), answer: spaced(&answer) }
}

/// A picture that misses something of its prompt, asked what would mend it.
pub struct Repair {
    pub sample: tasks::ActSample,
    pub verdicts: Vec<Verdict>,
    pub question: String,
}

/// The repair number `index`. At least a share `moves` of the edits move something, and they name up to `places`.
pub fn repair(
    seed: u64,
    split: Split,
    index: u64,
    objects: usize,
    in_plain: bool,
    moves: f64,
    places: usize,
) -> Repair {
    let mut rng = Stream::new(seed, "vlm repair", index);
    let moved = objects > 1 && rng.share(moves);
    let wanted = |edit: &Edit| !moved || matches!(edit, Edit::Move { .. });
    let mut sample = tasks::act_by(seed, split, index, 1, objects, places, wanted);
    if in_plain {
        sample.prompt = plain(&sample.graph);
    }
    let mut verdicts = verdicts(&sample.scene.view(), &sample.graph);
    if rng.chance(0.2) {
        verdicts.iter_mut().for_each(|v| v.reflection.clear());
    }
    // Later rounds know of earlier edits.
    let earlier: Vec<String> = (0..rng.below(5).saturating_sub(2))
        .map(|i| tasks::edit(seed ^ 0xed17, Split::Train, index * 2 + i as u64, 2, 3).instruction)
        .collect();
    let earlier: Vec<&str> = earlier.iter().map(String::as_str).collect();
    let question = prompts::reflect(&sample.prompt, &verdicts, &earlier);
    Repair { sample, verdicts, question }
}

/// Whether an instruction is one that can be read, and whether it then mends more than it breaks.
pub fn mends(instruction: &str, scene: &Scene, graph: &SceneGraph) -> (bool, bool) {
    Edit::parse(instruction).map_or((false, false), |edit| (true, plan::mends(&edit, scene, graph)))
}

/// The lesson number `index` of a split.
pub fn lesson(seed: u64, split: Split, index: u64, mix: Mix) -> Lesson {
    let mut rng = Stream::new(seed, &format!("vlm lesson {}", split.name()), index);
    let config = mix.config;
    let objects = mix.objects.min(config.act_objects);
    let repair = rng
        .chance(config.act())
        .then(|| repair(seed, split, index, objects, config.plain(), config.moves, config.places));
    let (scene, mut checks, mut rows) = match repair {
        Some(Repair { sample, verdicts, question }) => {
            let reflection = plan::faults(&sample.scene.view(), &sample.graph);
            let row = Row { task: Task::Act, question, answer: prompts::edit(&reflection, &sample.instruction) };
            let describe = describe_row(&sample.scene.view());
            (sample.scene, verdicts, vec![row, describe])
        }
        None => {
            let sample = tasks::check(seed, split, index, 1, mix.objects);
            let view = sample.scene.view();
            let verdicts = verdicts(&view, &sample.graph);
            (sample.scene, verdicts, vec![describe_row(&view)])
        }
    };
    rng.shuffle(&mut checks);
    checks.truncate(config.claims);
    let view = scene.view();
    checks.extend((0..config.probes).filter_map(|_| probe(&mut rng, split, &view, sample::MARGIN)));
    rows.extend(checks.iter().map(check_row));
    if rng.chance(config.parse) {
        rows.push(parse_row(&mut rng, split, mix.objects));
    }
    Lesson { scene, rows }
}

/// Prompts that are tried for one that asks to move something.
const WISHES: usize = 8;

/// What is taught of a picture that was drawn: as of a scene, by what the oracle reads in it. Half of the time it is asked
/// about with another prompt than its own, one that an edit of it would meet; more often where a share of edits is to be moves.
pub fn drawn_rows(seed: u64, index: u64, drawn: &Drawn, mix: Mix) -> Vec<Row> {
    let mut rng = Stream::new(seed, "vlm drawn", index);
    let config = mix.config;
    let Drawn { prompt, graph, reading, .. } = drawn;
    let mut other = if rng.chance(0.5) { tasks::wish(&mut rng, &reading.scene) } else { None };
    let asked = rng.chance(config.act());
    if asked && rng.share(config.moves) {
        let moves = |graph: &SceneGraph| {
            graph.objects.len() <= config.act_objects
                && matches!(mending(reading, graph, config.places).first(), Some(Edit::Move { .. }))
        };
        if !moves(other.as_ref().map_or(graph, |(_, graph)| graph)) {
            let mut wishes = (0..WISHES).filter_map(|_| tasks::wish(&mut rng, &reading.scene));
            other = wishes.find(|(_, graph)| moves(graph)).or(other);
        }
    }
    let (prompt, graph) = other.as_ref().map_or((prompt, graph), |(prompt, graph)| (prompt, graph));
    let mut checks = drawn_verdicts(reading, graph);
    let act = asked && graph.objects.len() <= config.act_objects;
    let helpful = if act { mending(reading, graph, config.places) } else { Vec::new() };
    let helpful: Vec<String> = helpful.iter().map(Edit::plain).collect();
    // Later rounds know of an edit that did not help.
    let tried = (helpful.len() > 1 && rng.chance(0.25)).then(|| rng.choose(&helpful).as_str());
    let mut rows = vec![describe_row(&reading.view)];
    rows.extend(helpful.iter().find(|edit| Some(edit.as_str()) != tried).map(|edit| {
        let words = if config.plain() { plain(graph) } else { prompt.clone() };
        let question = prompts::reflect(&words, &checks, tried.as_slice());
        let reflection = plan::faults(&reading.view, graph);
        Row { task: Task::Act, question, answer: prompts::edit(&reflection, edit) }
    }));
    rng.shuffle(&mut checks);
    checks.truncate(config.claims);
    checks.extend((0..config.probes).filter_map(|_| probe(&mut rng, Split::Train, &reading.view, 0.0)));
    rows.extend(checks.iter().map(check_row));
    rows
}

/// The edits each of which would mend something of the graph, as far as the picture can be read, and which training may name;
/// the surest first, and up to `places` in each.
pub fn mending(reading: &Reading, graph: &SceneGraph, places: usize) -> Vec<Edit> {
    let mut edits = plan::edits(&reading.view, graph, places);
    edits.retain(|edit| !tasks::novel(edit) && plan::mends(edit, &reading.scene, graph));
    edits
}

/// The picture of a scene, often a little spoilt as drawn pictures are: noise, blur, other light.
pub fn picture(rng: &mut Stream, scene: &Scene) -> RgbImage {
    let mut picture = render(scene);
    if rng.chance(0.3) {
        picture = blurred(&picture, rng.range(0.2, 1.0) as f32);
    }
    if rng.chance(0.4) {
        let (noise, light) = (rng.range(1.0, 12.0) as f32, rng.range(-12.0, 12.0) as f32);
        let values = rng.normals(picture.as_raw().len());
        for (pixel, value) in picture.iter_mut().zip(values) {
            *pixel = (f32::from(*pixel) + noise * value + light).round().clamp(0.0, 255.0) as u8;
        }
    }
    picture
}

/// The mean of each pixel and its neighbours in both directions, mixed in by `share`.
fn blurred(picture: &RgbImage, share: f32) -> RgbImage {
    let (w, h) = (picture.width() as usize, picture.height() as usize);
    let pixels = picture.as_raw();
    let mut out = picture.clone();
    for (i, value) in out.iter_mut().enumerate() {
        let (x, y, c) = (i / 3 % w, i / 3 / w, i % 3);
        let at = |x: usize, y: usize| f32::from(pixels[(y * w + x) * 3 + c]);
        let (left, right) = (x.saturating_sub(1), (x + 1).min(w - 1));
        let (up, down) = (y.saturating_sub(1), (y + 1).min(h - 1));
        let mean = (at(x, y) + at(left, y) + at(right, y) + at(x, up) + at(x, down)) / 5.0;
        *value = (at(x, y) + share * (mean - at(x, y))).round() as u8;
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        rig::truth::UNCLEAR,
        scene::tabletop::{caption::Style, oracle, world::SIDE},
    };

    fn config() -> VlmConfig {
        VlmConfig { claims: 2, probes: 4, act: 0.4, parse: 0.2, ..VlmConfig::default() }
    }

    #[test]
    fn what_is_taught_mends_the_picture() {
        let repairs: Vec<Repair> = (0..100).map(|i| repair(5, Split::Train, i, 3, i % 2 == 0, 0.0, 1)).collect();
        assert!(repairs.iter().all(|r| r.verdicts.iter().any(|v| !v.yes)));
        for Repair { sample, .. } in &repairs {
            assert!(mends(&sample.instruction, &sample.scene, &sample.graph).0, "{}", sample.instruction);
        }
        let helped = repairs.iter().filter(|r| mends(&r.sample.instruction, &r.sample.scene, &r.sample.graph).1);
        assert!(helped.count() * 10 >= repairs.len() * 8);
    }

    #[test]
    fn all_tasks_are_taught_and_about_half_of_the_claims_hold() {
        let mix = Mix { config: &config(), objects: 3 };
        let lessons: Vec<Lesson> = (0..400).map(|i| lesson(5, Split::Train, i, mix)).collect();
        let rows = |task| lessons.iter().flat_map(|l| &l.rows).filter(move |r| r.task == task);
        let (act, describe) = (rows(Task::Act).count(), rows(Task::Describe).count());
        assert!(act > 80 && describe > 200 && rows(Task::Parse).count() > 40, "{act} {describe}");
        let yes = rows(Task::Check).filter(|r| r.answer.contains("\"yes\"")).count() as f64;
        let share = yes / rows(Task::Check).count() as f64;
        assert!((0.4..0.6).contains(&share), "{share} of the claims hold");
        for row in lessons.iter().flat_map(|l| &l.rows) {
            assert!(serde_json::from_str::<Value>(&row.answer).is_ok(), "{}", row.answer);
        }
    }

    #[test]
    fn drawn_pictures_are_taught_as_the_oracle_reads_them() {
        let mix = Mix { config: &VlmConfig { act: 1.0, ..config() }, objects: 3 };
        let (mut acted, mut own) = (0, 0);
        for index in 0..40 {
            let sample = tasks::check(5, Split::Train, index, 1, 3);
            let picture = render(&sample.scene);
            let reading = oracle::read(&picture);
            let prompt = caption(&mut Stream::new(0, "prompt", index), &sample.graph, Style::Natural);
            let drawn = Drawn { picture, prompt, graph: sample.graph, reading, scene: None };
            let rows = drawn_rows(5, index, &drawn, mix);
            let truths = verdicts(&drawn.reading.view, &drawn.graph);
            let claimed = truths.iter().map(check_row).filter(|row| rows.iter().any(|r| r.question == row.question));
            own += usize::from(claimed.count() >= 2.min(truths.len()));
            for row in rows.iter().filter(|row| row.task == Task::Act) {
                let answer: Value = serde_json::from_str(&row.answer).unwrap();
                let edit = Edit::parse(answer["edit"].as_str().unwrap()).unwrap();
                let own = row.question.contains(&drawn.prompt);
                assert!(!own || plan::mends(&edit, &drawn.reading.scene, &drawn.graph), "{row:?}");
                acted += 1;
            }
        }
        // Of its own prompt, or of another that it misses.
        assert!(acted > 25 && (15..35).contains(&own), "{acted} {own}");

        // A blot is something else than what is asked for.
        let sample = tasks::text_to_image(5, Split::Train, 0, 2, 2);
        let mut reading = oracle::read(&render(&sample.scene));
        let last = |reading: &Reading| drawn_verdicts(reading, &sample.graph).pop().unwrap();
        assert!(last(&reading).yes);
        reading.unclear = 1;
        assert!(!last(&reading).yes && last(&reading).reflection.ends_with(UNCLEAR));

        let blank = RgbImage::from_pixel(SIDE, SIDE, image::Rgb([230, 230, 230]));
        let (reading, graph) =
            (oracle::read(&blank), crate::scene::parse::parse("red ball left of blue cube").unwrap());
        let prompt = "red ball left of blue cube".to_owned();
        let drawn = Drawn { picture: blank, prompt, graph, reading, scene: None };
        let rows = drawn_rows(5, 0, &drawn, Mix { config: &VlmConfig { act: 0.0, ..config() }, objects: 3 });
        // All is missing, and nothing too much.
        let mut checks = rows.iter().filter(|r| r.task == Task::Check);
        assert!(checks.all(|r| r.answer.ends_with("\"yes\"}") == r.question.contains("nothing but")));
    }

    #[test]
    fn edits_are_taught_for_no_more_objects_than_the_mix_says() {
        let mix = Mix { config: &VlmConfig { act: 0.7, ..config() }, objects: 5 };
        let lessons: Vec<Lesson> = (0..100).map(|i| lesson(5, Split::Train, i, mix)).collect();
        assert!(lessons.iter().any(|l| l.scene.items.len() == 5));
        let drawn = (0..60).map(|i| crate::train::imperfect::imperfect(5, i, 5));
        let drawn: Vec<Row> = drawn.zip(0..).flat_map(|(d, i)| drawn_rows(5, i, &d, mix)).collect();
        let rows = lessons.into_iter().flat_map(|l| l.rows).chain(drawn);
        let asked = rows.filter(|row| row.task == Task::Act).map(|row| {
            let prompt = row.question.lines().next().unwrap().strip_prefix("The picture should show: ").unwrap();
            crate::scene::parse::parse(prompt).unwrap().objects.len()
        });
        let asked: Vec<usize> = asked.collect();
        assert!(asked.len() > 60 && asked.iter().all(|objects| *objects <= 3), "{asked:?}");
    }

    #[test]
    fn edits_name_as_many_places_as_the_mix_says() {
        let named = |places| {
            let mix = Mix { config: &VlmConfig { act: 1.0, act_objects: 5, places, ..config() }, objects: 5 };
            let lessons = (0..60).flat_map(|i| lesson(5, Split::Train, i, mix).rows);
            let drawn = (0..60).flat_map(|i| drawn_rows(5, i, &crate::train::imperfect::imperfect(5, i, 5), mix));
            [lessons.collect::<Vec<_>>(), drawn.collect()].map(|rows| {
                let edits = rows.iter().filter(|row| row.task == Task::Act).map(|row| {
                    let answer: serde_json::Value = serde_json::from_str(&row.answer).unwrap();
                    match Edit::parse(answer["edit"].as_str().unwrap()).unwrap() {
                        Edit::Add { places, .. } | Edit::Move { places, .. } => places.len(),
                        _ => 0,
                    }
                });
                edits.max()
            })
        };
        assert_eq!(named(1), [Some(1); 2]);
        assert_eq!(named(2), [Some(2); 2]);
        for places in [0, 4] {
            let error = VlmConfig { places, ..config() }.check().unwrap_err().to_string();
            assert!(error.contains("places is 1 to 3"), "{error}");
        }
    }

    #[test]
    fn edits_are_moves_where_the_mix_says_so() {
        // Edits, and moves among them.
        let count = |moves: f64| {
            let mix = Mix { config: &VlmConfig { act: 1.0, moves, ..config() }, objects: 5 };
            let lessons = (0..40).flat_map(|i| lesson(5, Split::Train, i, mix).rows);
            let drawn = (0..40).flat_map(|i| drawn_rows(5, i, &crate::train::imperfect::imperfect(5, i, 5), mix));
            [lessons.collect::<Vec<_>>(), drawn.collect()].map(|rows| {
                let edits: Vec<&Row> = rows.iter().filter(|row| row.task == Task::Act).collect();
                let moved = edits.iter().filter(|row| row.answer.contains("\"edit\": \"move "));
                (edits.len(), moved.count())
            })
        };
        let ([lessons, drawn], [few, fewer]) = (count(1.0), count(0.0));
        assert_eq!(lessons, (40, 40));
        assert!(few.1 < 20 && fewer.1 * 3 < fewer.0, "{few:?} {fewer:?}");
        // Not every picture has what a move could mend, and none has fewer edits for it.
        assert!(drawn.1 * 2 > drawn.0 && drawn.0 >= fewer.0, "{drawn:?} {fewer:?}");
    }

    #[test]
    fn questions_and_answers_are_made_of_phrases_and_words() {
        let phrases = phrases();
        let left = |text: &str| phrases.iter().fold(text.to_owned(), |text, p| text.replace(p.as_str(), "|"));
        for row in lesson(5, Split::Train, 1, Mix { config: &config(), objects: 3 })
            .rows
            .iter()
            .filter(|r| r.task == Task::Check)
        {
            assert!(!left(&row.question).contains(['"', '{', '?']), "{}", left(&row.question));
        }
    }
}
