//! LAION-SG's record: one picture's scene graph as the data set's JSON lists it (arXiv 2412.08580).
//!
//! A file is a list of records. `img_id` and `score` are strings there; `item1` is the subject's `item_id`.

use super::graph::{Object, Relation, SceneGraph};
use serde::{Deserialize, Serialize};

/// A picture with its scene graph.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Record {
    pub img_id: String,
    /// The picture's file.
    pub name: String,
    /// The caption that the picture came with.
    pub caption_ori: String,
    /// LAION's aesthetic score.
    pub score: String,
    pub url: String,
    pub items: Vec<Item>,
    pub relations: Vec<Triple>,
}

/// An object of a picture.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Item {
    /// Among the record's items.
    pub item_id: u64,
    pub label: String,
    pub attributes: Vec<String>,
    /// Among those of all records.
    pub global_item_id: u64,
}

/// A relation between two items of a record: `item1 relation item2`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Triple {
    /// Among the record's relations.
    pub triple_id: u64,
    pub item1: u64,
    pub relation: String,
    pub item2: u64,
    /// Among those of all records.
    pub global_relation_id: u64,
}

impl Record {
    /// The record of one picture. Global ids go on from `next_item` and `next_relation`, which are moved past them.
    pub fn new(
        id: &str,
        name: &str,
        caption: &str,
        graph: &SceneGraph,
        next_item: &mut u64,
        next_relation: &mut u64,
    ) -> Self {
        let take = |next: &mut u64| std::mem::replace(next, *next + 1);
        let items = graph.objects.iter().enumerate().map(|(i, o)| Item {
            item_id: i as u64,
            label: o.label.clone(),
            attributes: o.attributes.clone(),
            global_item_id: take(next_item),
        });
        let items = items.collect();
        let relations = graph.relations.iter().enumerate().map(|(i, r)| Triple {
            triple_id: i as u64,
            item1: r.subject as u64,
            relation: r.predicate.clone(),
            item2: r.object as u64,
            global_relation_id: take(next_relation),
        });
        Self {
            img_id: id.into(),
            name: name.into(),
            caption_ori: caption.into(),
            score: "10.0".into(),
            url: String::new(),
            items,
            relations: relations.collect(),
        }
    }

    /// The relations that name an item which is not there.
    pub fn dangling(&self) -> impl Iterator<Item = &Triple> {
        let there = move |id: u64| self.items.iter().any(|i| i.item_id == id);
        self.relations.iter().filter(move |t| !there(t.item1) || !there(t.item2))
    }

    /// The record's scene graph, without its [dangling](Self::dangling) relations.
    pub fn graph(&self) -> SceneGraph {
        let at = |id: u64| self.items.iter().position(|i| i.item_id == id);
        let relation =
            |t: &Triple| Some(Relation { subject: at(t.item1)?, predicate: t.relation.clone(), object: at(t.item2)? });
        SceneGraph {
            objects: self.items.iter().map(|i| Object::new(i.label.clone(), i.attributes.clone())).collect(),
            relations: self.relations.iter().filter_map(relation).collect(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_data_sets_own_record_reads_and_a_graph_survives() {
        let text = r#"{"img_id": "482027", "name": "8040361340228797010.jpg", "caption_ori": "Yosemite Falls reflection",
            "score": "6.669650077819824", "url": "http://example.org/1.jpg",
            "items": [{"item_id": 0, "label": "mountains", "attributes": ["rocky", "tall"], "global_item_id": 3201429},
                      {"item_id": 1, "label": "trees", "attributes": [], "global_item_id": 3201430}],
            "relations": [{"triple_id": 0, "item1": 1, "relation": "adorn", "item2": 0, "global_relation_id": 2118510},
                          {"triple_id": 1, "item1": 1, "relation": "near", "item2": 7, "global_relation_id": 2118511}]}"#;
        let record: Record = serde_json::from_str(text).unwrap();
        let graph = record.graph();
        assert_eq!(graph.triples(), ["trees adorn rocky tall mountains"]);
        assert_eq!(record.dangling().map(|t| t.triple_id).collect::<Vec<_>>(), [1]);
        let (mut items, mut relations) = (5, 9);
        let written = Record::new("1", "1.png", "trees", &graph, &mut items, &mut relations);
        assert_eq!((items, relations, written.items[1].global_item_id), (7, 10, 6));
        assert_eq!(written.graph(), graph);
    }
}
