//! A record of LAION-SG as a caption and a scene graph; what is wrong in it is counted and left out, and the rest is used.
//!
//! Looked at are `img_id`, `caption_ori`, `score` (its type alone), `items` with their `item_id`, `label` and
//! `attributes`, and `relations` with their `item1`, `relation` and `item2`: each counts as missing where it is absent.
//! Not used, and not missed, are `name`, `url`, `triple_id`, `global_item_id` and `global_relation_id`.

use super::flaws::{At, Flaw, Flaws};
use crate::scene::{
    graph::{LARGEST, Object, Relation, SceneGraph, is_too_long},
    parse::MAX_CHARS,
};
use serde_json::{Map, Value};
use std::collections::{HashMap, HashSet, hash_map};

/// What is used of a record.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    pub id: String,
    pub caption: String,
    pub graph: SceneGraph,
}

/// A record's graph; `None` if it has no items or relations at all, or more than are drawn.
pub(super) fn read(record: &Map<String, Value>, at: At, flaws: &mut Flaws) -> Option<Entry> {
    let mut flaw = |flaw| flaws.add(flaw, at);
    let id = match record.get("img_id") {
        Some(Value::String(id)) if !id.trim().is_empty() => id.trim().to_owned(),
        Some(Value::Number(id)) => {
            flaw(Flaw::WrongType);
            id.to_string()
        }
        _ => {
            flaw(Flaw::MissingKey);
            format!("record-{}", at.record)
        }
    };
    match record.get("score") {
        Some(Value::String(_)) => {}
        None => flaw(Flaw::MissingKey),
        Some(_) => flaw(Flaw::WrongType),
    }
    let mut caption = text(record, "caption_ori", &mut flaw).unwrap_or_default();
    if caption.chars().nth(MAX_CHARS).is_some() {
        flaw(Flaw::LongText);
        caption.clear();
    }
    let items = list(record, "items", &mut flaw)?;
    let relations = list(record, "relations", &mut flaw)?;

    let (mut places, mut known, mut graph) = (HashMap::new(), HashSet::new(), SceneGraph::default());
    for item in items {
        let Some(item) = object(item, &mut flaw) else { continue };
        let id = number(item, "item_id", &mut flaw);
        // What is left out is there all the same: a relation that names it is left out with it, and is no flaw of its own.
        known.extend(id);
        let (Some(id), Some(label)) = (id, text(item, "label", &mut flaw)) else { continue };
        let label = printable(&label, &mut flaw);
        if label.is_empty() {
            flaw(Flaw::EmptyText);
        } else if let hash_map::Entry::Vacant(place) = places.entry(id) {
            let object = Object::new(label, attributes(item, &mut flaw));
            if is_too_long(&object.phrase()) {
                flaw(Flaw::LongText);
                continue;
            }
            place.insert(graph.objects.len());
            graph.objects.push(object);
        } else {
            flaw(Flaw::RepeatedId);
        }
    }
    for relation in relations {
        let Some(relation) = object(relation, &mut flaw) else { continue };
        let (Some(subject), Some(predicate), Some(object)) = (
            number(relation, "item1", &mut flaw),
            text(relation, "relation", &mut flaw),
            number(relation, "item2", &mut flaw),
        ) else {
            continue;
        };
        let predicate = printable(&predicate, &mut flaw);
        match (places.get(&subject), places.get(&object)) {
            _ if predicate.is_empty() => flaw(Flaw::EmptyText),
            _ if is_too_long(&predicate) => flaw(Flaw::LongText),
            (Some(subject), Some(object)) if subject == object => flaw(Flaw::SelfRelation),
            (Some(&subject), Some(&object)) => graph.relations.push(Relation { subject, predicate, object }),
            _ if known.contains(&subject) && known.contains(&object) => {}
            _ => flaw(Flaw::DanglingId),
        }
    }
    if graph.objects.len().max(graph.relations.len()) > LARGEST {
        flaw(Flaw::LargeGraph);
        return None;
    }
    Some(Entry { id, caption, graph })
}

fn object<'a>(value: &'a Value, flaw: &mut impl FnMut(Flaw)) -> Option<&'a Map<String, Value>> {
    let object = value.as_object();
    if object.is_none() {
        flaw(Flaw::WrongType);
    }
    object
}

fn list<'a>(record: &'a Map<String, Value>, key: &str, flaw: &mut impl FnMut(Flaw)) -> Option<&'a Vec<Value>> {
    match record.get(key) {
        Some(Value::Array(list)) => return Some(list),
        Some(_) => flaw(Flaw::WrongType),
        None => flaw(Flaw::MissingKey),
    }
    None
}

/// A text without space around it.
fn text(record: &Map<String, Value>, key: &str, flaw: &mut impl FnMut(Flaw)) -> Option<String> {
    match record.get(key) {
        Some(Value::String(text)) => return Some(text.trim().to_owned()),
        Some(_) => flaw(Flaw::WrongType),
        None => flaw(Flaw::MissingKey),
    }
    None
}

/// A text on one line, which is what questions are made of.
fn printable(text: &str, flaw: &mut impl FnMut(Flaw)) -> String {
    if !text.contains(char::is_control) {
        return text.to_owned();
    }
    flaw(Flaw::ControlCharacter);
    text.replace(char::is_control, " ").trim().to_owned()
}

/// A whole number that was written with a point.
fn whole(x: f64) -> Option<i64> {
    (x.fract() == 0.0 && x.abs() < 1e15).then_some(x as i64)
}

fn number(record: &Map<String, Value>, key: &str, flaw: &mut impl FnMut(Flaw)) -> Option<i64> {
    let value = record.get(key);
    let found = match value {
        Some(Value::Number(number)) => number.as_i64().or_else(|| {
            let whole = whole(number.as_f64()?)?;
            flaw(Flaw::WrongType);
            Some(whole)
        }),
        Some(Value::String(text)) => {
            let found = text.trim().parse().ok().or_else(|| whole(text.trim().parse().ok()?));
            if found.is_some() {
                flaw(Flaw::NumberAsString);
            }
            found
        }
        _ => None,
    };
    if found.is_none() {
        flaw(if value.is_none() { Flaw::MissingKey } else { Flaw::WrongType });
    }
    found
}

/// Attributes as they are said; a single text stands for a list of one.
fn attributes(item: &Map<String, Value>, flaw: &mut impl FnMut(Flaw)) -> Vec<String> {
    let texts: Vec<&str> = match item.get("attributes") {
        Some(Value::Array(list)) => {
            if list.iter().any(|a| !a.is_string()) {
                flaw(Flaw::WrongType);
            }
            list.iter().filter_map(Value::as_str).collect()
        }
        Some(Value::String(one)) => {
            flaw(Flaw::WrongType);
            vec![one]
        }
        Some(_) => {
            flaw(Flaw::WrongType);
            Vec::new()
        }
        None => {
            flaw(Flaw::MissingKey);
            Vec::new()
        }
    };
    let mut said = Vec::new();
    for text in texts {
        match printable(text.trim(), flaw) {
            text if text.is_empty() => flaw(Flaw::EmptyText),
            text => said.push(text),
        }
    }
    said
}
