//! LAION-SG's JSON, made up as it is read: a gigabyte through the reader of records, and a file through the choice of
//! samples and their reading in turn; the rate, and the memory at the most before and after, which grows
//! by no more than a hash for each record.

use rlrig::{
    eval::{
        dataset::{self, Selection},
        records::Records,
        wording::Wording,
    },
    train::log::peak_memory,
};
use std::{
    io::{BufReader, Read},
    time::Instant,
};

const BYTES: usize = 1 << 30;
const BYTES_OF_FILE: usize = 1 << 28;

/// A list of records of six items and five relations, until `left` bytes are given.
struct Synthetic {
    left: usize,
    record: usize,
    ready: Vec<u8>,
    at: usize,
}

impl Synthetic {
    fn new(bytes: usize) -> Self {
        Self { left: bytes, record: 0, ready: Vec::new(), at: 0 }
    }

    fn next_record(&mut self) {
        let item = |i: usize| {
            format!(
                "{{\"item_id\": {i}, \"label\": \"thing {i}\", \"attributes\": [\"small\", \"red\"], \"global_item_id\": {}}}",
                self.record * 6 + i
            )
        };
        let relation = |i: usize| {
            format!(
                "{{\"triple_id\": {i}, \"item1\": {i}, \"relation\": \"left of\", \"item2\": {}, \"global_relation_id\": {}}}",
                i + 1,
                self.record * 5 + i
            )
        };
        let items: Vec<String> = (0..6).map(item).collect();
        let relations: Vec<String> = (0..5).map(relation).collect();
        let comma = if self.record == 0 { "[" } else { "," };
        self.ready = format!(
            "{comma}\n{{\"img_id\": \"{0}\", \"name\": \"{0}.jpg\", \"caption_ori\": \"picture {0}\", \"score\": \"6.5\", \
             \"url\": \"\", \"items\": [{1}], \"relations\": [{2}]}}",
            self.record,
            items.join(", "),
            relations.join(", ")
        )
        .into_bytes();
        self.record += 1;
    }
}

impl Read for Synthetic {
    fn read(&mut self, into: &mut [u8]) -> std::io::Result<usize> {
        if self.at == self.ready.len() {
            if self.left == 0 {
                return Ok(0);
            }
            self.next_record();
            self.at = 0;
            self.left = self.left.saturating_sub(self.ready.len());
            if self.left == 0 {
                self.ready.extend_from_slice(b"\n]\n");
            }
        }
        let n = into.len().min(self.ready.len() - self.at);
        into[..n].copy_from_slice(&self.ready[self.at..self.at + n]);
        self.at += n;
        Ok(n)
    }
}

/// What reading may need beyond what the process held before.
const ALLOWED: u64 = 12 << 20;
/// And for each record that is read: the hash of its id, by which a second one is known, in a table that doubles.
const ALLOWED_READ: u64 = 32;
/// And for each sample that is chosen: its place, in a vector that doubles.
const ALLOWED_EACH: u64 = 64;

/// An error if the process has held more than is allowed with `read` records and `chosen` samples since it held `before`.
fn hold(before: Option<u64>, read: usize, chosen: usize) -> anyhow::Result<()> {
    if let Some((before, after)) = before.zip(peak_memory()) {
        let mib = |bytes: u64| bytes as f64 / f64::from(1 << 20);
        println!("memory at the most: {:.1} MiB before, {:.1} MiB after", mib(before), mib(after));
        anyhow::ensure!(
            after - before <= ALLOWED + ALLOWED_READ * read as u64 + ALLOWED_EACH * chosen as u64,
            "memory grows with the file"
        );
    }
    Ok(())
}

fn main() -> anyhow::Result<()> {
    let before = peak_memory();
    let start = Instant::now();
    let mut records = Records::new(BufReader::with_capacity(1 << 16, Synthetic::new(BYTES)));
    let (mut n, mut relations) = (0, 0);
    while let Some(entry) = records.next_entry()? {
        n += 1;
        relations += entry.graph.relations.len();
    }
    let seconds = start.elapsed().as_secs_f64();
    println!("{n} records, {relations} relations, {:.0} MB/s", BYTES as f64 / 1e6 / seconds);
    drop(records);
    hold(before, n, 0)?;

    let mut file = tempfile::NamedTempFile::new()?;
    std::io::copy(&mut Synthetic::new(BYTES_OF_FILE), &mut file)?;
    let subset = Selection {
        wording: Wording::Triples,
        min_relations: 1,
        min_objects: 1,
        predicates: Vec::new(),
        spatial_only: false,
        limit: Some(500),
        subset: Some(1),
        shard: (1, 1),
    };
    let shard = Selection { limit: None, subset: None, shard: (1, 1000), ..subset.clone() };
    // All there are.
    let unlimited = Selection { shard: (1, 1), ..shard.clone() };
    for selection in [subset, shard, unlimited] {
        let (samples, _) = dataset::laion_sg(file.path(), "test", &selection)?;
        let start = Instant::now();
        let relations =
            samples.iter().map(|sample| Ok(sample?.graph.relations.len())).sum::<anyhow::Result<usize>>()?;
        let seconds = start.elapsed().as_secs_f64();
        println!("{} samples, {relations} relations, read in {seconds:.2} s, by {selection:?}", samples.len());
        hold(before, n, samples.len())?;
    }
    Ok(())
}
