//! A gigabyte of LAION-SG's JSON, made up as it is read, through the reader of records: the rate, and the memory at the
//! most (`VmHWM`, on Linux) before and after.

use rlrig::eval::records::Records;
use std::{
    io::{BufReader, Read},
    time::Instant,
};

const BYTES: usize = 1 << 30;

/// A list of records of six items and five relations, until `left` bytes are given.
struct Synthetic {
    left: usize,
    record: usize,
    ready: Vec<u8>,
    at: usize,
}

impl Synthetic {
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

/// The most memory this process has held, in MiB.
fn peak() -> Option<f64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"))?;
    Some(line.trim().strip_suffix(" kB")?.trim().parse::<f64>().ok()? / 1024.0)
}

fn main() -> anyhow::Result<()> {
    let before = peak();
    let start = Instant::now();
    let source = Synthetic { left: BYTES, record: 0, ready: Vec::new(), at: 0 };
    let mut records = Records::new(BufReader::with_capacity(1 << 16, source));
    let (mut n, mut relations) = (0, 0);
    while let Some(entry) = records.next_entry()? {
        n += 1;
        relations += entry.graph.relations.len();
    }
    let seconds = start.elapsed().as_secs_f64();
    println!("{n} records, {relations} relations, {:.0} MB/s", BYTES as f64 / 1e6 / seconds);
    if let Some((before, after)) = before.zip(peak()) {
        println!("memory at the most: {before:.0} MiB before, {after:.0} MiB after");
    }
    Ok(())
}
