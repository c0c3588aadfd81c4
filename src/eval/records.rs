//! LAION-SG's files record by record (arXiv 2412.08580): a JSON list of hundreds of megabytes, in the memory of one record.
//!
//! The real files have flaws. A record is cut out by its brackets alone, so that one that is no JSON costs only itself;
//! what is wrong inside is counted with its line ([`Flaws`]), left out, and the rest is used.

use crate::scene::graph::{Object, Relation, SceneGraph};
use anyhow::{Context, Result, bail};
use serde::Serialize;
use serde_json::{Map, Value};
use std::{
    collections::{BTreeMap, HashMap, HashSet, hash_map},
    io::BufRead,
};

/// What can be wrong with a record.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Flaw {
    /// The record is no JSON, or no object.
    Malformed,
    /// The file ends within a record.
    Truncated,
    /// Bytes that are no UTF-8; each is replaced.
    BrokenUtf8,
    MissingKey,
    WrongType,
    /// A number written as a string.
    NumberAsString,
    /// A label or a relation without text.
    EmptyText,
    /// An item's id, or a picture's, a second time.
    RepeatedId,
    /// A relation that names an item which is not there.
    DanglingId,
}

/// Flaws by kind: how many, and the lines of the first few.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(transparent)]
pub struct Flaws(pub BTreeMap<Flaw, Count>);

#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Count {
    pub count: usize,
    /// The lines at which the first records with this flaw begin.
    pub lines: Vec<u64>,
}

/// Lines that are kept of each kind.
const KEPT_LINES: usize = 5;

impl Flaws {
    fn add(&mut self, flaw: Flaw, line: u64) {
        let count = self.0.entry(flaw).or_default();
        count.count += 1;
        if count.lines.len() < KEPT_LINES && count.lines.last() != Some(&line) {
            count.lines.push(line);
        }
    }

    /// One line for each kind, for people.
    pub fn sentences(&self) -> Vec<String> {
        let say = |(flaw, count): (&Flaw, &Count)| {
            let what = match flaw {
                Flaw::Malformed => "records that are no JSON objects, left out",
                Flaw::Truncated => "record cut off by the end of the file, left out",
                Flaw::BrokenUtf8 => "records with broken UTF-8, replaced",
                Flaw::MissingKey => "missing keys",
                Flaw::WrongType => "values of a wrong type",
                Flaw::NumberAsString => "numbers written as strings, read as numbers",
                Flaw::EmptyText => "empty labels or relations, left out",
                Flaw::RepeatedId => "repeated ids, of which the first counts",
                Flaw::DanglingId => "relations with an item that is not there, left out",
            };
            let lines: Vec<String> = count.lines.iter().map(u64::to_string).collect();
            let more = if count.count > count.lines.len() { ", .." } else { "" };
            format!("{} {what} (lines {}{more})", count.count, lines.join(", "))
        };
        self.0.iter().map(say).collect()
    }
}

/// What is used of a record.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    pub id: String,
    pub caption: String,
    pub graph: SceneGraph,
}

/// A record of more bytes than this is none: its brackets do not close.
const LONGEST: usize = 8 << 20;

/// The records of a file, in order.
pub struct Records<R> {
    reader: R,
    /// The line being read, from 1.
    line: u64,
    state: Place,
    pub flaws: Flaws,
    /// Hashes of the ids seen, which is all that grows with the file.
    seen: HashSet<u64>,
    /// Records cut out, and those among them that look like LAION-SG's.
    all: usize,
    alike: usize,
}

#[derive(PartialEq, Eq)]
enum Place {
    Before,
    Inside,
    After,
}

impl<R: BufRead> Records<R> {
    pub fn new(reader: R) -> Self {
        Self { reader, line: 1, state: Place::Before, flaws: Flaws::default(), seen: HashSet::new(), all: 0, alike: 0 }
    }

    /// The next record that can be used. A file that is not LAION-SG's is an error that says what was found.
    pub fn next_entry(&mut self) -> Result<Option<Entry>> {
        while let Some((line, bytes)) = self.next_record()? {
            self.all += 1;
            let text = String::from_utf8_lossy(&bytes);
            if matches!(text, std::borrow::Cow::Owned(_)) {
                self.flaws.add(Flaw::BrokenUtf8, line);
            }
            let value: Option<Value> = serde_json::from_str(&text).ok();
            let Some(Value::Object(record)) = &value else {
                self.flaws.add(Flaw::Malformed, line);
                self.check_kind(value.as_ref())?;
                continue;
            };
            self.alike += usize::from(record.contains_key("items") || record.contains_key("relations"));
            self.check_kind(value.as_ref())?;
            if let Some(entry) = read(record, line, &mut self.flaws) {
                let id = &entry.id;
                if self.seen.insert(hash(id)) {
                    return Ok(Some(entry));
                }
                self.flaws.add(Flaw::RepeatedId, line);
            }
        }
        if self.alike == 0 {
            bail!("this is not LAION-SG's JSON: a list of {} records, none with \"items\" and \"relations\"", self.all);
        }
        Ok(None)
    }

    /// After some records without one of LAION-SG's, the file is another.
    fn check_kind(&self, found: Option<&Value>) -> Result<()> {
        if self.alike > 0 || self.all < 100 {
            return Ok(());
        }
        match found {
            Some(Value::Object(record)) => {
                let keys: Vec<&str> = record.keys().take(8).map(String::as_str).collect();
                bail!("this is not LAION-SG's JSON: its records have the keys {}", keys.join(", "))
            }
            _ => bail!("this is not LAION-SG's JSON: its first {} elements are no records", self.all),
        }
    }

    /// The bytes of the next element of the list, and the line it begins at.
    fn next_record(&mut self) -> Result<Option<(u64, Vec<u8>)>> {
        if self.state == Place::Before {
            self.open()?;
        }
        if self.state == Place::After {
            return Ok(None);
        }
        let (mut record, mut first_line) = (Vec::new(), 0);
        let (mut depth, mut quoted, mut escaped) = (0usize, false, false);
        loop {
            let chunk = self.reader.fill_buf().context("cannot read on")?;
            if chunk.is_empty() {
                self.state = Place::After;
                self.flaws.add(Flaw::Truncated, if record.is_empty() { self.line } else { first_line });
                return Ok(None);
            }
            let mut end = None;
            for (i, byte) in chunk.iter().enumerate() {
                self.line += u64::from(*byte == b'\n');
                if quoted {
                    quoted = escaped || *byte != b'"';
                    escaped = !escaped && *byte == b'\\';
                } else {
                    match byte {
                        b',' | b']' if depth == 0 => {
                            end = Some(i);
                            break;
                        }
                        b'"' => quoted = true,
                        b'{' | b'[' => depth += 1,
                        b'}' | b']' => depth = depth.saturating_sub(1),
                        _ => {}
                    }
                }
                if !record.is_empty() || !byte.is_ascii_whitespace() {
                    if record.is_empty() {
                        first_line = self.line;
                    }
                    record.push(*byte);
                }
            }
            if record.len() > LONGEST {
                bail!("the record that begins at line {first_line} does not end: its brackets or quotes do not close");
            }
            let used = end.map_or(chunk.len(), |i| i + 1);
            let closed = end.is_some_and(|i| chunk[i] == b']');
            self.reader.consume(used);
            if closed {
                self.state = Place::After;
            }
            if end.is_some() && (!record.is_empty() || closed) {
                return Ok((!record.is_empty()).then_some((first_line, record)));
            }
        }
    }

    /// Goes behind the list's first bracket.
    fn open(&mut self) -> Result<()> {
        let mut start: Vec<u8> = Vec::new();
        loop {
            let chunk = self.reader.fill_buf().context("cannot read the file")?;
            let Some(byte) = chunk.first().copied() else { bail!("this is not LAION-SG's JSON: the file is empty") };
            // A byte order mark is no harm.
            if byte.is_ascii_whitespace() || (start.len() < 3 && [0xef, 0xbb, 0xbf].contains(&byte)) {
                if !byte.is_ascii_whitespace() {
                    start.push(byte);
                }
                self.line += u64::from(byte == b'\n');
                self.reader.consume(1);
                continue;
            }
            if byte == b'[' {
                self.reader.consume(1);
                self.state = Place::Inside;
                return Ok(());
            }
            let begin = String::from_utf8_lossy(&chunk[..chunk.len().min(40)]).into_owned();
            bail!("this is not LAION-SG's JSON, which is a list of records: it begins with {begin:?}");
        }
    }
}

/// A hash of an id; two ids of half a million share one with a chance below 1e-8.
fn hash(id: &str) -> u64 {
    use std::hash::{DefaultHasher, Hasher};
    let mut hasher = DefaultHasher::new();
    hasher.write(id.as_bytes());
    hasher.finish()
}

/// A record's graph; `None` if it has no items or relations at all.
fn read(record: &Map<String, Value>, line: u64, flaws: &mut Flaws) -> Option<Entry> {
    let mut flaw = |flaw| flaws.add(flaw, line);
    let id = match record.get("img_id") {
        Some(Value::String(id)) if !id.trim().is_empty() => id.trim().to_owned(),
        Some(Value::Number(id)) => {
            flaw(Flaw::WrongType);
            id.to_string()
        }
        _ => {
            flaw(Flaw::MissingKey);
            format!("line-{line}")
        }
    };
    match record.get("score") {
        Some(Value::String(_)) => {}
        None => flaw(Flaw::MissingKey),
        Some(_) => flaw(Flaw::WrongType),
    }
    let caption = text(record, "caption_ori", &mut flaw).unwrap_or_default();
    let items = list(record, "items", &mut flaw)?;
    let relations = list(record, "relations", &mut flaw)?;

    let (mut at, mut graph) = (HashMap::new(), SceneGraph::default());
    for item in items {
        let Some(item) = object(item, &mut flaw) else { continue };
        let (Some(id), Some(label)) = (number(item, "item_id", &mut flaw), text(item, "label", &mut flaw)) else {
            continue;
        };
        if label.is_empty() {
            flaw(Flaw::EmptyText);
        } else if let hash_map::Entry::Vacant(place) = at.entry(id) {
            place.insert(graph.objects.len());
            graph.objects.push(Object::new(label, attributes(item, &mut flaw)));
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
        match (at.get(&subject), at.get(&object)) {
            _ if predicate.is_empty() => flaw(Flaw::EmptyText),
            (Some(&subject), Some(&object)) => graph.relations.push(Relation { subject, predicate, object }),
            _ => flaw(Flaw::DanglingId),
        }
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

fn number(record: &Map<String, Value>, key: &str, flaw: &mut impl FnMut(Flaw)) -> Option<i64> {
    let value = record.get(key);
    let found = match value {
        Some(Value::Number(number)) => number.as_i64(),
        Some(Value::String(text)) => {
            let found = text.trim().parse().ok();
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
    texts.into_iter().map(str::trim).filter(|text| !text.is_empty()).map(str::to_owned).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Records in a reader whose buffer holds only `buffer` bytes.
    fn all(bytes: &[u8], buffer: usize) -> Result<(Vec<Entry>, Flaws)> {
        let mut records = Records::new(std::io::BufReader::with_capacity(buffer, bytes));
        let mut entries = Vec::new();
        while let Some(entry) = records.next_entry()? {
            entries.push(entry);
        }
        Ok((entries, records.flaws))
    }

    const FIXTURE: &[u8] = include_bytes!("../../tests/fixtures/laion_sg/flawed.json");

    #[test]
    fn each_flaw_is_counted_at_its_line_and_the_rest_is_used() {
        let (entries, flaws) = all(FIXTURE, 8192).unwrap();
        let count = |flaw| flaws.0.get(&flaw).map(|c| (c.count, c.lines.as_slice()));
        assert_eq!(count(Flaw::DanglingId), Some((1, [3].as_slice())));
        assert_eq!(count(Flaw::RepeatedId), Some((2, [4, 12].as_slice())));
        assert_eq!(count(Flaw::EmptyText), Some((2, [5].as_slice())));
        assert_eq!(count(Flaw::NumberAsString), Some((2, [6].as_slice())));
        assert_eq!(count(Flaw::WrongType), Some((2, [7].as_slice())));
        assert_eq!(count(Flaw::MissingKey), Some((2, [8, 9].as_slice())));
        assert_eq!(count(Flaw::BrokenUtf8), Some((1, [10].as_slice())));
        assert_eq!(count(Flaw::Malformed), Some((1, [11].as_slice())));
        assert_eq!(count(Flaw::Truncated), None);
        let ids: Vec<&str> = entries.iter().map(|e| e.id.as_str()).collect();
        assert_eq!(ids, ["1", "2", "3", "4", "5", "6", "8", "9"]);
        assert!(entries.iter().all(|e| e.graph.validate().is_ok() && !e.graph.relations.is_empty()));
        assert_eq!(entries[0].graph.triples(), ["tall stone tower attached to arched stone bridge"]);
        assert_eq!(flaws.sentences().len(), 8);
    }

    #[test]
    fn the_size_of_the_buffer_changes_nothing() {
        let whole = all(FIXTURE, 1 << 20).unwrap();
        assert!([1, 7, 64].into_iter().all(|size| all(FIXTURE, size).unwrap() == whole));
    }

    #[test]
    fn a_cut_file_gives_what_is_whole() {
        let (entries, flaws) = all(&FIXTURE[..FIXTURE.len() / 2], 64).unwrap();
        assert!(!entries.is_empty());
        assert_eq!(flaws.0[&Flaw::Truncated].count, 1);
    }

    #[test]
    fn another_file_is_an_error_that_says_what_was_found() {
        let error = |bytes: &[u8]| all(bytes, 64).unwrap_err().to_string();
        assert!(error(b"").contains("empty"));
        assert!(error(b" {\"a\": 1}").contains("begins with"), "{}", error(b" {\"a\": 1}"));
        assert!(error(b"\x89PNG\r\n").contains("PNG"));
        assert!(error(b"[]").contains("0 records"));
        assert!(error(b"[1, 2, \"x\"]").contains("3 records"));
        let other = format!("[{}]", vec!["{\"image\": 1, \"text\": \"x\"}"; 150].join(","));
        assert!(error(other.as_bytes()).contains("the keys image, text"));
        let open = format!("[{{\"items\": \"{}", "x".repeat(LONGEST + 100));
        assert!(error(open.as_bytes()).contains("line 1 does not end"));
    }
}
