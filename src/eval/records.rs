//! LAION-SG's files record by record (arXiv 2412.08580): a JSON list of hundreds of megabytes, in the memory of one record.
//!
//! The real files have flaws. A record is cut out by its brackets, and ends at the latest where the next one begins, so that
//! one that is no JSON costs only itself; what is wrong inside is counted with its place ([`Flaws`]), left out, and the
//! rest is used. Where a record is ([`Spot`]) is little, and enough to read it again.

use super::{
    flaws::{At, Flaw, Flaws},
    record::{Entry, read},
};
use anyhow::{Context, Result, bail};
use serde_json::Value;
use std::{collections::HashSet, io::BufRead};

/// A record of more bytes than this is none: its brackets do not close.
const LONGEST: usize = 8 << 20;
/// The keys of LAION-SG's records; by the first of them one is known wherever it begins.
const KEYS: [&[u8]; 7] = [b"img_id", b"name", b"caption_ori", b"score", b"url", b"items", b"relations"];
/// Those of the items and relations inside.
const INNER_KEYS: [&[u8]; 9] = [
    b"item_id",
    b"label",
    b"attributes",
    b"global_item_id",
    b"triple_id",
    b"item1",
    b"relation",
    b"item2",
    b"global_relation_id",
];
/// Records after which a file without one of LAION-SG's is another.
const ENOUGH: usize = 100;

/// The records of a file, in order.
pub struct Records<R> {
    reader: R,
    /// The line being read, from 1.
    line: u64,
    /// The bytes that are read.
    offset: u64,
    state: Place,
    /// What was read of the next record: its first key, or nothing.
    begun: Vec<u8>,
    /// The line at which that is.
    begun_at: u64,
    pub flaws: Flaws,
    /// Hashes of the ids seen, which is all that grows with the file: up to 31 bytes for a record, while the table doubles.
    seen: HashSet<u64>,
    /// Records cut out, those among them that look like LAION-SG's, and those that were given.
    all: usize,
    alike: usize,
    used: u32,
    /// The first keys of the first record.
    keys: Option<Vec<String>>,
    spot: Spot,
}

/// Where a record is that can be used.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Spot {
    /// Its number among those that can be used, from 0.
    pub index: u32,
    /// Its number among all, from 1.
    record: u32,
    pub offset: u64,
    pub bytes: u32,
    /// Half a hash of its bytes: a file may change while a run goes on.
    sum: u32,
}

impl Spot {
    /// The record of the bytes that are there; `None` if they are others by now.
    pub(super) fn entry(&self, bytes: &[u8]) -> Option<Entry> {
        let Value::Object(record) = json(bytes).0.filter(|_| hash(bytes) as u32 == self.sum)? else { return None };
        // Its flaws were counted when it was found.
        read(&record, At { line: 0, record: self.record as usize }, &mut Flaws::default())
    }
}

/// The bytes of an element of the list, the line it begins at, and how many bytes are before it.
struct Cut {
    line: u64,
    offset: u64,
    bytes: Vec<u8>,
}

#[derive(PartialEq, Eq)]
enum Place {
    Before,
    Inside,
    After,
}

impl<R: BufRead> Records<R> {
    pub fn new(reader: R) -> Self {
        Self {
            reader,
            line: 1,
            offset: 0,
            state: Place::Before,
            begun: Vec::new(),
            begun_at: 1,
            flaws: Flaws::default(),
            seen: HashSet::new(),
            all: 0,
            alike: 0,
            used: 0,
            keys: None,
            spot: Spot::default(),
        }
    }

    /// Where the record is that was given last.
    pub(super) fn spot(&self) -> Spot {
        self.spot
    }

    /// What there is in a file in which nothing can be used.
    pub(super) fn found(&self) -> String {
        let keys = match &self.keys {
            Some(keys) => format!("the first record has the keys {}", keys.join(", ")),
            None => "no record is a JSON object".to_owned(),
        };
        std::iter::once(keys).chain(self.flaws.sentences()).collect::<Vec<_>>().join("; ")
    }

    /// The next record that can be used. A file that is not LAION-SG's is an error that says what was found.
    pub fn next_entry(&mut self) -> Result<Option<Entry>> {
        while let Some(cut) = self.next_record()? {
            self.all += 1;
            let at = At { line: cut.line, record: self.all };
            let (value, broken) = json(&cut.bytes);
            if broken {
                self.flaws.add(Flaw::BrokenUtf8, at);
            }
            let Some(Value::Object(record)) = &value else {
                self.flaws.add(Flaw::Malformed, at);
                self.check_kind(ENOUGH)?;
                continue;
            };
            let short = |key: &String| key.chars().take(40).collect();
            self.keys.get_or_insert_with(|| record.keys().take(8).map(short).collect());
            self.alike += usize::from(record.contains_key("items") && record.contains_key("relations"));
            self.check_kind(ENOUGH)?;
            if let Some(entry) = read(record, at, &mut self.flaws) {
                if self.seen.insert(hash(entry.id.as_bytes())) {
                    let record = u32::try_from(self.all).context("the file has too many records")?;
                    // No record is longer than `LONGEST` and a chunk.
                    let (bytes, sum) = (cut.bytes.len() as u32, hash(&cut.bytes) as u32);
                    self.spot = Spot { index: self.used, record, offset: cut.offset, bytes, sum };
                    self.used += 1;
                    return Ok(Some(entry));
                }
                self.flaws.add(Flaw::RepeatedId, at);
            }
        }
        self.check_kind(0)?;
        Ok(None)
    }

    /// After so many records without one of LAION-SG's, the file is another.
    fn check_kind(&self, enough: usize) -> Result<()> {
        if self.alike > 0 || self.all < enough {
            return Ok(());
        }
        bail!(
            "this is not LAION-SG's JSON: {} records were read, and none has both \"items\" and \"relations\"; {}",
            self.all,
            self.found()
        )
    }

    /// The next element of the list.
    fn next_record(&mut self) -> Result<Option<Cut>> {
        if self.state == Place::Before {
            self.open()?;
        }
        let mut record = std::mem::take(&mut self.begun);
        let mut first_line = if record.is_empty() { self.line } else { self.begun_at };
        let (mut depth, mut quoted, mut escaped) = (usize::from(!record.is_empty()), false, false);
        loop {
            let chunk = self.reader.fill_buf().context("cannot read on")?;
            if chunk.is_empty() {
                let at = At { line: if record.is_empty() { self.line } else { first_line }, record: self.all + 1 };
                if self.state == Place::Inside {
                    self.flaws.add(Flaw::Truncated, at);
                }
                self.state = Place::After;
                // All that lacks may be the list's last bracket.
                let whole = depth == 0 && record.trim_ascii_end().ends_with(b"}");
                let offset = self.offset - record.len() as u64;
                return Ok(whole.then_some(Cut { line: first_line, offset, bytes: record }));
            }
            let (mut used, mut ended, mut closed, mut next) = (chunk.len(), false, false, None);
            for (i, byte) in chunk.iter().enumerate() {
                self.line += u64::from(*byte == b'\n');
                if self.state == Place::After && !byte.is_ascii_whitespace() {
                    self.flaws.add(Flaw::StrayBracket, At { line: self.line, record: self.all + 1 });
                    self.state = Place::Inside;
                }
                if quoted {
                    quoted = escaped || *byte != b'"';
                    escaped = !escaped && *byte == b'\\';
                } else {
                    match byte {
                        b',' | b']' if depth == 0 => {
                            (used, ended, closed) = (i + 1, true, *byte == b']');
                            break;
                        }
                        b'"' => quoted = true,
                        b'{' | b'[' => depth += 1,
                        b'}' | b']' => depth = depth.saturating_sub(1),
                        _ => {}
                    }
                }
                if record.is_empty() && byte.is_ascii_whitespace() {
                    continue;
                }
                if record.is_empty() {
                    first_line = self.line;
                }
                record.push(*byte);
                if let Some(start) = begins(&record, depth, quoted).filter(|start| *start > 0) {
                    (used, next) = (i + 1, Some(start));
                    break;
                }
            }
            self.reader.consume(used);
            self.offset += used as u64;
            if let Some(start) = next {
                let offset = self.offset - record.len() as u64;
                self.begun = record.split_off(start);
                self.begun_at = self.line - self.begun.iter().filter(|byte| **byte == b'\n').count() as u64;
                return Ok(Some(Cut { line: first_line, offset, bytes: record }));
            }
            if record.len() > LONGEST {
                bail!("the record that begins at line {first_line} does not end: its brackets or quotes do not close");
            }
            if closed {
                self.state = Place::After;
            }
            if ended && !record.is_empty() {
                // What ends it is read too.
                let offset = self.offset - 1 - record.len() as u64;
                return Ok(Some(Cut { line: first_line, offset, bytes: record }));
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
                self.offset += 1;
                continue;
            }
            if byte == b'[' {
                self.reader.consume(1);
                self.offset += 1;
                self.state = Place::Inside;
                return Ok(());
            }
            let begin = String::from_utf8_lossy(&chunk[..chunk.len().min(40)]).into_owned();
            bail!("this is not LAION-SG's JSON, which is a list of records: it begins with {begin:?}");
        }
    }
}

/// Where in `record`, which is read to this depth of brackets and within quotes or not, the next one begins, its first
/// key just read.
///
/// In JSON an object is the value of a key or stands in a list, and a string has no line break. So one that stands in
/// the record without a key is the next record, and so is one at the beginning of a line "within quotes". Deeper, where
/// the lists of items and relations are, it is the next one only if it begins as the record did.
fn begins(record: &[u8], depth: usize, quoted: bool) -> Option<usize> {
    let before = record.strip_suffix(b"\"")?;
    let quote = before.iter().rposition(|byte| *byte == b'"')?;
    let key = &before[quote + 1..];
    let start = before[..quote].trim_ascii_end().strip_suffix(b"{")?.len();
    let before = before[..start].trim_ascii_end();
    if before.ends_with(b":") {
        return None; // the value of a key
    }
    if key == KEYS[0] {
        return Some(start);
    }
    if INNER_KEYS.contains(&key) || !record.starts_with(b"{") {
        return None;
    }
    let line_begins =
        before.strip_suffix(b",").is_some_and(|rest| record[rest.trim_ascii_end().len()..start].contains(&b'\n'));
    let known = || KEYS.contains(&key) && first_key(record) == Some(key);
    // The depth is that inside of what begins.
    ((!quoted && depth <= 2) || (line_begins && (quoted || known()))).then_some(start)
}

/// The key that an object begins with.
fn first_key(object: &[u8]) -> Option<&[u8]> {
    let key = object.strip_prefix(b"{")?.trim_ascii_start().strip_prefix(b"\"")?;
    key.split(|byte| *byte == b'"').next()
}

/// A record as JSON, if it is any, and whether its UTF-8 is broken.
fn json(bytes: &[u8]) -> (Option<Value>, bool) {
    let text = String::from_utf8_lossy(bytes);
    let mut broken = matches!(text, std::borrow::Cow::Owned(_));
    let mut value = serde_json::from_str(&text).ok();
    if value.is_none() {
        let (mended, half) = mended(&text);
        value = serde_json::from_str(&mended).ok();
        broken |= half && value.is_some();
    }
    (value, broken)
}

/// What Python's `json` writes and JSON does not know, in words of JSON's: numbers that are none as null, halves of a
/// surrogate pair as the character for what cannot be read; and whether there was such a half.
fn mended(text: &str) -> (String, bool) {
    let (mut mended, mut broken, mut rest) = (String::with_capacity(text.len()), false, text);
    let mut quoted = false;
    while let Some(c) = rest.chars().next() {
        let mut taken = c.len_utf8();
        let unit = |at: usize| {
            let digits = rest.get(at..)?.strip_prefix("\\u")?.get(..4)?;
            u32::from_str_radix(digits, 16).ok()
        };
        let number = ["NaN", "Infinity", "-Infinity"].into_iter().find(|word| !quoted && rest.starts_with(word));
        match (c, unit(0), unit(6)) {
            ('\\', Some(0xd800..=0xdbff), Some(0xdc00..=0xdfff)) => taken = 12,
            ('\\', Some(0xd800..=0xdfff), _) => {
                mended.push(char::REPLACEMENT_CHARACTER);
                (broken, rest) = (true, &rest[6..]);
                continue;
            }
            ('\\', ..) if rest.len() > 1 => taken += rest[1..].chars().next().map_or(0, char::len_utf8),
            ('"', ..) => quoted = !quoted,
            _ => {}
        }
        if let Some(word) = number {
            mended.push_str("null");
            rest = &rest[word.len()..];
            continue;
        }
        mended.push_str(&rest[..taken]);
        rest = &rest[taken..];
    }
    (mended, broken)
}

/// A hash of an id, or of a record. Two ids of half a million share one with a chance below 1e-8; the second record
/// would then be left out as one with a repeated id.
fn hash(bytes: &[u8]) -> u64 {
    use std::hash::{DefaultHasher, Hasher};
    let mut hasher = DefaultHasher::new();
    hasher.write(bytes);
    hasher.finish()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::scene::{graph::LARGEST, parse::MAX_CHARS};

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
        assert!(flaws.sentences()[0].contains("(record "), "{:?}", flaws.sentences());
    }

    /// A record of one relation.
    fn record(id: usize) -> String {
        format!(
            r#"{{"img_id": "{id}", "score": "1", "caption_ori": "c", "items": [{{"item_id": 0, "label": "a", "attributes": []}},
            {{"item_id": 1, "label": "b", "attributes": []}}], "relations": [{{"item1": 0, "relation": "on", "item2": 1}}]}}"#
        )
    }

    /// The ids that are found, and how often which flaw.
    fn found(text: &str) -> (Vec<String>, Vec<(Flaw, usize)>) {
        let whole = all(text.as_bytes(), 1 << 16).unwrap();
        assert!([1, 7].into_iter().all(|buffer| all(text.as_bytes(), buffer).unwrap() == whole));
        let (entries, flaws) = whole;
        assert!(entries.iter().all(|e| e.graph.relations.len() == 1), "{entries:?}");
        (entries.into_iter().map(|e| e.id).collect(), flaws.0.into_iter().map(|(f, c)| (f, c.count)).collect())
    }

    #[test]
    fn a_record_that_does_not_end_costs_itself_alone() {
        let [a, b, c] = [1, 2, 3].map(record);
        let joined = |b: &str| format!("[{a},\n{b},\n{c}]");
        assert_eq!(found(&joined(&b)), (vec!["1".into(), "2".into(), "3".into()], vec![]));
        for broken in [&b[..b.len() - 1], &b[..b.len() / 2], &b.replace("caption_ori\"", "caption_ori"), "{"] {
            assert_eq!(found(&joined(broken)), (vec!["1".into(), "3".into()], vec![(Flaw::Malformed, 1)]), "{broken}");
        }
        // Without a comma between them, both are whole.
        assert_eq!(found(&format!("[{a} {b}]")).0, ["1", "2"]);
        let stray = found(&format!("[{a}], {b}]\n ]\n"));
        assert_eq!(stray, (vec!["1".into(), "2".into()], vec![(Flaw::StrayBracket, 2)]));
    }

    /// The same with another key first.
    fn reordered(id: usize) -> String {
        let (first, record) = (format!(r#""img_id": "{id}""#), record(id));
        record.replace(&(first.clone() + ", "), "").trim_end_matches('}').to_owned() + ", " + &first + "}"
    }

    #[test]
    fn a_record_that_is_cut_anywhere_costs_itself_alone() {
        for made in [record, reordered] {
            let [a, b, c] = [1, 2, 3].map(made);
            assert_eq!(found(&format!("[{a},\n{b},\n{c}]")), (vec!["1".into(), "2".into(), "3".into()], vec![]));
            for cut in 1..b.len() {
                let text = format!("[{a},\n{},\n{c}\n]", &b[..cut]);
                let expected = (vec!["1".into(), "3".into()], vec![(Flaw::Malformed, 1)]);
                assert_eq!(found(&text), expected, "{text}");
            }
        }
        let [a, b, c] = [1, 2, 3].map(reordered);
        // Without its last bracket, also if all is in one line; without a quote; without a comma behind it.
        for broken in [
            format!("[{a},\n{},\n{c}]", &b[..b.len() - 1]),
            format!("[{a}, {}, {c}]", &b[..b.len() - 1]),
            format!("[{a},\n{},\n{c}]", b.replace("caption_ori\"", "caption_ori")),
            format!("[{a}, {} {c}]", &b[..b.len() - 1]),
        ] {
            assert_eq!(found(&broken), (vec!["1".into(), "3".into()], vec![(Flaw::Malformed, 1)]), "{broken}");
        }
        // What looks like the beginning of a record within a string, or is one of another kind of object, begins none.
        let like =
            reordered(2).replace(r#""c""#, r#""x}, {\"score\": 1}, {""#).replace(": []", r#": [], "of": {"name": 1}"#);
        assert_eq!(found(&format!("[{a},\n{like},\n{c}]")).0, ["1", "2", "3"]);
    }

    #[test]
    fn a_record_that_can_be_used_is_found_again_at_its_spot() {
        let [a, b, c] = [1, 2, 3].map(reordered);
        let broken = format!("\u{feff} [{a},\n{},\n{b} , {c}], \n{}]", &c[..c.len() - 1], record(4));
        let cut = format!("[{a},{b}\n");
        for text in [FIXTURE, broken.as_bytes(), cut.as_bytes()] {
            let mut records = Records::new(std::io::BufReader::with_capacity(7, text));
            let mut index = 0;
            while let Some(entry) = records.next_entry().unwrap() {
                let spot = records.spot();
                let bytes = &text[spot.offset as usize..][..spot.bytes as usize];
                assert_eq!((spot.entry(bytes), spot.index), (Some(entry), index));
                assert_eq!(spot.entry(&bytes[1..]), None);
                index += 1;
            }
            assert!(index > 1);
        }
    }

    #[test]
    fn what_no_question_can_be_made_of_is_left_out() {
        let long = format!(
            r#"{{"item_id": 7, "label": "x", "attributes": ["{}"]}}, {{"item_id": 0, "label": "a""#,
            "y".repeat(300_000)
        );
        let items = record(1).replace(r#"{"item_id": 0, "label": "a""#, &long);
        let relations = |more: &str| record(2).replace(r#""relations": ["#, &format!(r#""relations": [{more}, "#));
        let endless = relations(&format!(r#"{{"item1": 0, "relation": "{}", "item2": 1}}"#, "on".repeat(101)));
        let itself =
            relations(r#"{"item1": 1, "relation": "on", "item2": 1}"#).replace(r#""img_id": "2""#, r#""img_id": "3""#);
        let broken = record(4).replace(r#""label": "b""#, r#""label": "b\u0000\nc""#);
        let bare = record(5).replacen(r#""attributes": []"#, r#""attributes": ["", "red", " "]"#, 1);
        let text = format!("[{items}, {endless}, {itself}, {broken}, {bare}]");
        let wrong =
            [(Flaw::EmptyText, 2), (Flaw::LongText, 2), (Flaw::ControlCharacter, 1), (Flaw::SelfRelation, 1)].to_vec();
        assert_eq!(found(&text), (["1", "2", "3", "4", "5"].map(String::from).to_vec(), wrong));
        let (entries, flaws) = all(text.as_bytes(), 64).unwrap();
        assert_eq!([3, 4].map(|i: usize| entries[i].graph.triple_text()), ["a on b  c", "red a on b"]);
        assert!(entries.iter().all(|entry| entry.graph.validate().is_ok()));
        assert!(flaws.sentences()[1].contains("text is too long"), "{:?}", flaws.sentences());
    }

    #[test]
    fn what_is_too_large_to_be_drawn_is_left_out() {
        let more = |id, head: &str, one: &dyn Fn(usize) -> String, n: usize| {
            let many: String = (0..n).map(|i| one(i) + ", ").collect();
            record(id).replace(head, &format!("{head}{many}"))
        };
        let item = |i: usize| format!(r#"{{"item_id": {}, "label": "x", "attributes": []}}"#, i + 2);
        let relation = |_: usize| r#"{"item1": 1, "relation": "under", "item2": 0}"#.to_owned();
        let items = |id, n: usize| more(id, r#""items": ["#, &item, n - 2);
        let relations = |id, n: usize| more(id, r#""relations": ["#, &relation, n - 1);
        let caption = |id, n| record(id).replace(r#""c""#, &format!("\"{}\"", "é".repeat(n)));
        let records = [
            items(1, LARGEST),
            items(2, LARGEST + 1),
            relations(3, LARGEST),
            relations(4, LARGEST + 1),
            caption(5, MAX_CHARS),
            caption(6, MAX_CHARS + 1),
        ];
        let (entries, flaws) = all(format!("[{}]", records.join(",\n")).as_bytes(), 64).unwrap();
        let ids: Vec<&str> = entries.iter().map(|entry| entry.id.as_str()).collect();
        assert_eq!(ids, ["1", "3", "5", "6"]);
        // A prompt without a caption is made of the graph.
        assert_eq!([2, 3].map(|i: usize| entries[i].caption.chars().count()), [MAX_CHARS, 0]);
        let count = |flaw| flaws.0.get(&flaw).map(|c| (c.count, c.records.as_slice()));
        assert_eq!(count(Flaw::LargeGraph), Some((2, [2, 4].as_slice())));
        assert_eq!(count(Flaw::LongText), Some((1, [6].as_slice())));
        assert_eq!(flaws.0.len(), 2);
        assert!(flaws.sentences()[1].contains("(record 2 at line "), "{:?}", flaws.sentences());
    }

    #[test]
    fn what_python_writes_is_read() {
        let one =
            record(1).replace("\"item_id\": 0", "\"item_id\": 0.0").replace("\"c\"", "\"\\ud83d x \\ud83d\\ude00\"");
        let two = record(2).replace("\"score\": \"1\"", "\"score\": NaN");
        // Records without an id, all in one line.
        let bare = record(0).replace("\"img_id\": \"0\", ", "").replace('\n', "");
        let (ids, flaws) = found(&format!("[{one}, {two}, {bare}, {bare}]"));
        assert_eq!(ids, ["1", "2", "record-3", "record-4"]);
        let wrong = [(Flaw::BrokenUtf8, 1), (Flaw::MissingKey, 2), (Flaw::WrongType, 2)];
        assert_eq!(flaws, wrong);
        assert_eq!(
            mended(r#""\ud83d x \ud83d\ude00 \\ud83d" -Infinity"#).0,
            "\"\u{fffd} x \\ud83d\\ude00 \\\\ud83d\" null"
        );
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
    fn the_last_record_of_a_list_that_does_not_end_is_used_if_it_is_whole() {
        let [a, b] = [1, 2].map(record);
        let cut = vec![(Flaw::Truncated, 1)];
        for end in ["", "\n", ",", ",\n"] {
            assert_eq!(found(&format!("[{a},\n{b}{end}")), (vec!["1".into(), "2".into()], cut.clone()), "{end:?}");
        }
        assert_eq!(found(&format!("[{a},\n{}", &b[..b.len() - 1])), (vec!["1".into()], cut));
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
        // One of the two keys makes no record of LAION-SG's.
        let items = error(b"[{\"items\": [], \"name\": \"x\"}]");
        assert!(items.contains("1 records") && items.contains("the keys items, name"), "{items}");
        assert!(items.contains("4 missing keys (record 1 at line 1"), "{items}");
        let open = format!("[{{\"items\": \"{}", "x".repeat(LONGEST + 100));
        assert!(error(open.as_bytes()).contains("line 1 does not end"));
    }
}
