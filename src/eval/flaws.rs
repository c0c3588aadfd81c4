//! What is wrong with a LAION-SG file, counted with its places: an evaluation goes on, and says so.

use serde::Serialize;
use std::collections::BTreeMap;

/// What can be wrong with a record.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Flaw {
    /// The record is no JSON, or no object.
    Malformed,
    /// The list is closed, and goes on.
    StrayBracket,
    /// The file ends before its list does, mostly within a record.
    Truncated,
    /// Bytes that are no UTF-8; each is replaced.
    BrokenUtf8,
    MissingKey,
    WrongType,
    /// A number written as a string.
    NumberAsString,
    /// A label, an attribute or a relation without text.
    EmptyText,
    /// An item, with its attributes, or a relation of more characters than a scene graph may have, or a caption of more than
    /// a prompt may have.
    LongText,
    /// More items or relations than are drawn.
    LargeGraph,
    /// Control characters in a label, an attribute or a relation; each is read as a blank.
    ControlCharacter,
    /// An item's id, or a picture's, a second time.
    RepeatedId,
    /// A relation that names an item which is not there.
    DanglingId,
    /// A relation of an item to itself.
    SelfRelation,
}

/// Flaws by kind: how many, and where the first few are.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(transparent)]
pub struct Flaws(pub BTreeMap<Flaw, Count>);

/// Those of one kind.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Count {
    pub count: usize,
    /// The lines at which the first records with this flaw begin, and their numbers: a file may have but one line.
    pub lines: Vec<u64>,
    pub records: Vec<usize>,
}

/// Where a record is: the line it begins at and its number, both from 1.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct At {
    pub line: u64,
    pub record: usize,
}

/// Places that are kept of each kind.
const KEPT: usize = 5;

impl Flaws {
    pub(super) fn add(&mut self, flaw: Flaw, At { line, record }: At) {
        let count = self.0.entry(flaw).or_default();
        count.count += 1;
        if count.records.len() < KEPT && count.records.last() != Some(&record) {
            count.lines.push(line);
            count.records.push(record);
        }
    }

    /// One line for each kind, for people.
    pub fn sentences(&self) -> Vec<String> {
        let say = |(flaw, count): (&Flaw, &Count)| {
            let what = match flaw {
                Flaw::Malformed => "records that are no JSON objects, left out",
                Flaw::StrayBracket => "brackets that would end the list before its records do, passed over",
                Flaw::Truncated => "list cut off by the end of the file, its last record left out unless it is whole",
                Flaw::BrokenUtf8 => "records with broken UTF-8, replaced",
                Flaw::MissingKey => "missing keys",
                Flaw::WrongType => "values of a wrong type",
                Flaw::NumberAsString => "numbers written as strings, read as numbers",
                Flaw::EmptyText => "empty labels, attributes or relations, left out",
                Flaw::LongText => "items, relations or captions whose text is too long, left out",
                Flaw::LargeGraph => "records of more items or relations than are drawn, left out",
                Flaw::ControlCharacter => "texts with control characters, read as blanks",
                Flaw::RepeatedId => "repeated ids, of which the first counts",
                Flaw::DanglingId => "relations with an item that is not there, left out",
                Flaw::SelfRelation => "relations of an item to itself, left out",
            };
            let places = count.lines.iter().zip(&count.records);
            let places: Vec<String> = places.map(|(line, record)| format!("{record} at line {line}")).collect();
            let more = if count.count > places.len() { ", .." } else { "" };
            format!("{} {what} (record {}{more})", count.count, places.join(", "))
        };
        self.0.iter().map(say).collect()
    }
}
