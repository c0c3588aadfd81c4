//! TensorBoard event files: scalars and pictures.
//!
//! A file is a sequence of TFRecords (length, its masked CRC-32C, bytes, their masked CRC-32C), each one an `Event`
//! message of TensorFlow's `event.proto`. The few messages needed are encoded by hand.

use anyhow::{Context, Result, ensure};
use std::{
    fs::{File, OpenOptions},
    io::Write,
    path::{Path, PathBuf},
    time::{SystemTime, UNIX_EPOCH},
};

/// An event file that grows by appending.
pub struct EventWriter {
    file: File,
    /// Where it is, for messages.
    path: PathBuf,
}

impl EventWriter {
    /// Creates a new event file in `folder`. Of older files, TensorBoard then forgets what lies at or after `step`: a
    /// resumed run repeats it.
    pub fn create(folder: &Path, step: u64) -> Result<Self> {
        let now = wall_time();
        // TensorBoard reads the files of a folder in the order of their names.
        let name = format!("events.out.tfevents.{:010}.{}.{step}", now as u64, std::process::id());
        let path = folder.join(name);
        let file = OpenOptions::new().create_new(true).write(true).open(&path);
        let file = file.with_context(|| format!("cannot create {}", path.display()))?;
        let mut writer = Self { file, path };
        writer.event(&Message::default().double(1, now).bytes(3, b"brain.Event:2"))?;
        let start = Message::default().int(1, 1);
        writer.event(&Message::default().double(1, now).int(2, step).bytes(7, &start.0))?;
        Ok(writer)
    }

    /// Appends one value for each name.
    pub fn scalars<'a>(&mut self, step: u64, values: impl Iterator<Item = (&'a str, f64)>) -> Result<()> {
        let summary = values.fold(Message::default(), |summary, (tag, value)| {
            summary.bytes(1, &Message::default().bytes(1, tag.as_bytes()).float(2, value as f32).0)
        });
        self.summary(step, &summary)
    }

    /// Appends a picture, given as the bytes of a PNG file.
    pub fn png(&mut self, step: u64, tag: &str, png: &[u8]) -> Result<()> {
        // Signature, length and type of the header chunk take 16 bytes; width and height follow.
        ensure!(png.len() > 24 && png.starts_with(b"\x89PNG"), "{tag}: not a PNG file");
        let size = |at: usize| u64::from(u32::from_be_bytes([png[at], png[at + 1], png[at + 2], png[at + 3]]));
        let image = Message::default().int(1, size(20)).int(2, size(16)).int(3, 3).bytes(4, png);
        let value = Message::default().bytes(1, tag.as_bytes()).bytes(4, &image.0);
        self.summary(step, &Message::default().bytes(1, &value.0))
    }

    fn summary(&mut self, step: u64, summary: &Message) -> Result<()> {
        self.event(&Message::default().double(1, wall_time()).int(2, step).bytes(5, &summary.0))
    }

    fn event(&mut self, event: &Message) -> Result<()> {
        let length = (event.0.len() as u64).to_le_bytes();
        let mut record = Vec::with_capacity(event.0.len() + 16);
        record.extend(length);
        record.extend(masked_crc(&length).to_le_bytes());
        record.extend(&event.0);
        record.extend(masked_crc(&event.0).to_le_bytes());
        // One write for each record: a reader never sees half of one for long.
        self.file.write_all(&record).with_context(|| format!("cannot write {}", self.path.display()))
    }
}

fn wall_time() -> f64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0.0, |d| d.as_secs_f64())
}

/// A protocol buffers message under construction.
#[derive(Default)]
struct Message(Vec<u8>);

impl Message {
    fn key(mut self, field: u64, wire: u64) -> Self {
        self.varint(field << 3 | wire);
        self
    }

    fn varint(&mut self, mut value: u64) {
        while value >= 0x80 {
            self.0.push(value as u8 | 0x80);
            value >>= 7;
        }
        self.0.push(value as u8);
    }

    fn int(self, field: u64, value: u64) -> Self {
        let mut message = self.key(field, 0);
        message.varint(value);
        message
    }

    fn double(self, field: u64, value: f64) -> Self {
        let mut message = self.key(field, 1);
        message.0.extend(value.to_le_bytes());
        message
    }

    fn float(self, field: u64, value: f32) -> Self {
        let mut message = self.key(field, 5);
        message.0.extend(value.to_le_bytes());
        message
    }

    fn bytes(self, field: u64, value: &[u8]) -> Self {
        let mut message = self.key(field, 2);
        message.varint(value.len() as u64);
        message.0.extend(value);
        message
    }
}

/// CRC-32C (Castagnoli), rotated and offset as TFRecord wants it.
fn masked_crc(bytes: &[u8]) -> u32 {
    const TABLE: [u32; 256] = {
        let mut table = [0; 256];
        let mut i = 0;
        while i < 256 {
            let mut crc = i as u32;
            let mut bit = 0;
            while bit < 8 {
                crc = crc >> 1 ^ (0x82f6_3b78 * (crc & 1));
                bit += 1;
            }
            table[i] = crc;
            i += 1;
        }
        table
    };
    let crc = !bytes.iter().fold(!0u32, |crc, byte| crc >> 8 ^ TABLE[(crc as u8 ^ byte) as usize]);
    crc.rotate_right(15).wrapping_add(0xa282_ead8)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Bit by bit, with the polynomial in its usual order: shares no line with the writer.
    fn crc32c(bytes: &[u8]) -> u32 {
        let mut register = u32::MAX;
        for byte in bytes {
            for bit in 0..8 {
                let feedback = (register >> 31) ^ u32::from(byte >> bit & 1);
                register = register << 1 ^ if feedback == 1 { 0x1edc_6f41 } else { 0 };
            }
        }
        !register.reverse_bits()
    }

    #[derive(Debug, PartialEq)]
    enum Field {
        Int(u64),
        Bytes(Vec<u8>),
        Fixed64(u64),
        Fixed32(u32),
    }

    fn decode(mut data: &[u8]) -> Vec<(u64, Field)> {
        fn varint(data: &mut &[u8]) -> u64 {
            let end = data.iter().position(|b| b & 0x80 == 0).unwrap();
            let value = data[..=end].iter().rev().fold(0, |acc, b| acc << 7 | u64::from(b & 0x7f));
            *data = &data[end + 1..];
            value
        }
        let mut fields = Vec::new();
        while !data.is_empty() {
            let key = varint(&mut data);
            let field = match key & 7 {
                0 => Field::Int(varint(&mut data)),
                wire => {
                    let length = match wire {
                        1 => 8,
                        5 => 4,
                        2 => varint(&mut data) as usize,
                        _ => panic!("wire type {wire}"),
                    };
                    let (value, rest) = data.split_at(length);
                    data = rest;
                    match wire {
                        1 => Field::Fixed64(u64::from_le_bytes(value.try_into().unwrap())),
                        5 => Field::Fixed32(u32::from_le_bytes(value.try_into().unwrap())),
                        _ => Field::Bytes(value.to_vec()),
                    }
                }
            };
            fields.push((key >> 3, field));
        }
        fields
    }

    fn records(path: &Path) -> Vec<Vec<(u64, Field)>> {
        let bytes = std::fs::read(path).unwrap();
        let (mut rest, mut events) = (bytes.as_slice(), Vec::new());
        let check = |data: &[u8], stored: &[u8]| {
            let crc = crc32c(data);
            let masked = crc.rotate_right(15).wrapping_add(0xa282_ead8);
            assert_eq!(masked.to_le_bytes(), stored);
        };
        while !rest.is_empty() {
            let length = u64::from_le_bytes(rest[..8].try_into().unwrap()) as usize;
            check(&rest[..8], &rest[8..12]);
            check(&rest[12..12 + length], &rest[12 + length..16 + length]);
            events.push(decode(&rest[12..12 + length]));
            rest = &rest[16 + length..];
        }
        events
    }

    fn bytes(fields: &[(u64, Field)], number: u64) -> &[u8] {
        match fields.iter().find(|(n, _)| *n == number) {
            Some((_, Field::Bytes(bytes))) => bytes,
            other => panic!("field {number} is {other:?}"),
        }
    }

    #[test]
    fn the_checksum_is_crc32c() {
        // The check value of the CRC catalogue.
        assert_eq!(crc32c(b"123456789"), 0xe306_9283);
        assert_eq!(masked_crc(b"123456789"), 0xe306_9283u32.rotate_right(15).wrapping_add(0xa282_ead8));
    }

    #[test]
    fn scalars_and_pictures_are_read_back() {
        let dir = tempfile::tempdir().unwrap();
        let mut writer = EventWriter::create(dir.path(), 300).unwrap();
        writer.scalars(301, [("loss", 0.25), ("eval/psnr", 31.5)].into_iter()).unwrap();
        let mut png = std::io::Cursor::new(Vec::new());
        image::RgbImage::new(7, 5).write_to(&mut png, image::ImageFormat::Png).unwrap();
        writer.png(301, "samples/a", png.get_ref()).unwrap();
        assert!(writer.png(301, "samples/b", b"GIF89a").is_err());

        let path = std::fs::read_dir(dir.path()).unwrap().next().unwrap().unwrap().path();
        assert!(path.file_name().unwrap().to_str().unwrap().contains("tfevents"));
        let events = records(&path);
        assert_eq!(events.len(), 4);
        assert_eq!(bytes(&events[0], 3), b"brain.Event:2");
        assert!(events[1].contains(&(2, Field::Int(300))));
        assert_eq!(decode(bytes(&events[1], 7)), [(1, Field::Int(1))]);

        assert!(events[2].contains(&(2, Field::Int(301))));
        assert!(matches!(events[2][0], (1, Field::Fixed64(_))));
        let summary = decode(bytes(&events[2], 5));
        let values: Vec<_> = summary.iter().map(|(_, value)| value).collect();
        for (value, (tag, number)) in values.iter().zip([("loss", 0.25f32), ("eval/psnr", 31.5)]) {
            let Field::Bytes(value) = value else { panic!("{value:?}") };
            let value = decode(value);
            assert_eq!(bytes(&value, 1), tag.as_bytes());
            assert!(value.contains(&(2, Field::Fixed32(number.to_bits()))));
        }
        let summary = decode(bytes(&events[3], 5));
        let value = decode(bytes(&summary, 1));
        assert_eq!(bytes(&value, 1), b"samples/a");
        let image = decode(bytes(&value, 4));
        assert_eq!(image[..3], [(1, Field::Int(5)), (2, Field::Int(7)), (3, Field::Int(3))]);
        assert_eq!(bytes(&image, 4), png.get_ref());
    }
}
