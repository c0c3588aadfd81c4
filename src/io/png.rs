//! Pictures as files: PNG with text chunks out, PNG, JPEG and WebP in.
//!
//! A picture carries its recipe in two chunks: `parameters` in the words of AUTOMATIC1111's web UI, which many tools
//! read, and `rlrig`, our own JSON. Files come from anywhere, so what is read is bounded in every direction.

use super::{read_file, write_file};
use anyhow::{Context, Result, ensure};
use image::{ImageReader, Limits, RgbImage};
use std::{
    io::{BufReader, Cursor},
    path::Path,
};

/// The keyword of rlrig's own chunk.
pub const CHUNK: &str = "rlrig";

const FILE_LIMIT: u64 = 256 << 20;
const TEXT_LIMIT: usize = 16 << 20;
const SIDE_LIMIT: u32 = 16_384;
const PIXEL_LIMIT: u64 = 512 << 20;

/// A text chunk: keyword and text.
pub type Text = (String, String);

/// The bytes of a PNG with `texts`. The same picture and texts give the same bytes.
pub fn encode(image: &RgbImage, texts: &[Text]) -> Result<Vec<u8>> {
    let mut bytes = Vec::new();
    let mut encoder = png::Encoder::new(&mut bytes, image.width(), image.height());
    encoder.set_color(png::ColorType::Rgb);
    encoder.set_depth(png::BitDepth::Eight);
    for (keyword, text) in texts {
        // tEXt is Latin-1, and old readers know nothing else.
        if text.chars().all(|c| u32::from(c) < 256) && keyword != CHUNK {
            encoder.add_text_chunk(keyword.clone(), text.clone())?;
        } else {
            encoder.add_itxt_chunk(keyword.clone(), text.clone())?;
        }
    }
    let mut writer = encoder.write_header().context("cannot make the PNG")?;
    writer.write_image_data(image.as_raw()).context("cannot make the PNG")?;
    writer.finish()?;
    Ok(bytes)
}

/// Writes a PNG with `texts`, whole or not at all.
pub fn write(path: &Path, image: &RgbImage, texts: &[Text], overwrite: bool) -> Result<()> {
    write_file(path, &encode(image, texts)?, overwrite)
}

/// Reads a picture of any format rlrig knows. What is transparent is laid on white.
pub fn read(path: &Path) -> Result<RgbImage> {
    let bytes = read_file(path, FILE_LIMIT)?;
    let shown = path.display();
    let mut reader = ImageReader::new(Cursor::new(bytes)).with_guessed_format()?;
    ensure!(reader.format().is_some(), "{shown} is neither PNG nor JPEG nor WebP");
    let mut limits = Limits::default();
    limits.max_image_width = Some(SIDE_LIMIT);
    limits.max_image_height = Some(SIDE_LIMIT);
    limits.max_alloc = Some(PIXEL_LIMIT);
    reader.limits(limits);
    let image = reader.decode().with_context(|| format!("{shown} is no whole picture"))?;
    ensure!(image.width() > 0 && image.height() > 0, "{shown} has no pixels");
    if !image.color().has_alpha() {
        return Ok(image.into_rgb8());
    }
    let rgba = image.into_rgba8();
    Ok(RgbImage::from_fn(rgba.width(), rgba.height(), |x, y| {
        let [r, g, b, a] = rgba.get_pixel(x, y).0.map(u32::from);
        image::Rgb([r, g, b].map(|c| ((c * a + 255 * (255 - a) + 127) / 255) as u8))
    }))
}

/// The text chunks of a PNG, in their order.
pub fn read_texts(path: &Path) -> Result<Vec<Text>> {
    let shown = path.display();
    let bytes = read_file(path, FILE_LIMIT)?;
    ensure!(bytes.starts_with(b"\x89PNG\r\n\x1a\n"), "{shown} is no PNG");
    texts(&bytes).with_context(|| format!("{shown} is no whole PNG"))
}

fn texts(bytes: &[u8]) -> Result<Vec<Text>> {
    let limits = png::Limits { bytes: TEXT_LIMIT };
    let mut reader = png::Decoder::new_with_limits(BufReader::new(Cursor::new(bytes)), limits).read_info()?;
    reader.finish()?;
    let info = reader.info();
    let mut texts: Vec<Text> = Vec::new();
    texts.extend(info.uncompressed_latin1_text.iter().map(|c| (c.keyword.clone(), c.text.clone())));
    for chunk in &info.compressed_latin1_text {
        let mut chunk = chunk.clone();
        chunk.decompress_text_with_limit(TEXT_LIMIT)?;
        texts.push((chunk.keyword.clone(), chunk.get_text()?));
    }
    for chunk in &info.utf8_text {
        let mut chunk = chunk.clone();
        chunk.decompress_text_with_limit(TEXT_LIMIT)?;
        texts.push((chunk.keyword.clone(), chunk.get_text()?));
    }
    Ok(texts)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    fn picture() -> RgbImage {
        RgbImage::from_fn(5, 3, |x, y| image::Rgb([x as u8 * 50, y as u8 * 80, 7]))
    }

    fn recipe() -> Vec<Text> {
        vec![("parameters".into(), "é red ball\nSteps: 4".into()), (CHUNK.into(), "{\"ünicode\": \"→\"}".into())]
    }

    #[test]
    fn pixels_and_texts_survive_and_bytes_repeat() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.png");
        write(&path, &picture(), &recipe(), false).unwrap();
        assert_eq!(read(&path).unwrap(), picture());
        assert_eq!(read_texts(&path).unwrap(), recipe());
        assert_eq!(fs::read(&path).unwrap(), encode(&picture(), &recipe()).unwrap());
        let bytes = fs::read(&path).unwrap();
        let has = |needle: &[u8]| bytes.windows(needle.len()).any(|w| w == needle);
        assert!(has(b"tEXtparameters\0") && has(b"iTXtrlrig\0"));
        let wide = encode(&picture(), &[("parameters".into(), "→".into())]).unwrap();
        assert!(wide.windows(14).any(|w| w == b"iTXtparameters"), "what is not Latin-1 goes to iTXt");
    }

    #[test]
    fn a_cut_file_is_an_error_at_every_length() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("cut.png");
        let whole = encode(&picture(), &recipe()).unwrap();
        // The last 12 bytes are the end marker, which readers do not need.
        for n in 0..whole.len() - 12 {
            fs::write(&path, &whole[..n]).unwrap();
            assert!(read(&path).is_err(), "{n} of {} bytes were read as a picture", whole.len());
        }
        for n in (0..whole.len()).step_by(3) {
            let mut bent = whole.clone();
            bent[n] ^= 0x55;
            fs::write(&path, bent).unwrap();
            let _ = (read(&path), read_texts(&path)); // an error or a picture, never a panic
        }
    }

    #[test]
    fn absurd_sizes_are_refused_before_memory_is_taken() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("huge.png");
        let mut bytes = encode(&picture(), &[]).unwrap();
        bytes[16..24].copy_from_slice(&[0x7f, 0xff, 0xff, 0xff, 0x7f, 0xff, 0xff, 0xff]);
        let crc = crc32(&bytes[12..29]);
        bytes[29..33].copy_from_slice(&crc.to_be_bytes());
        fs::write(&path, bytes).unwrap();
        let error = format!("{:#}", read(&path).unwrap_err());
        assert!(error.contains("no whole picture"), "{error}");
        assert!(read_texts(&path).is_err());
    }

    fn crc32(bytes: &[u8]) -> u32 {
        !bytes.iter().fold(!0, |crc, b| {
            (0..8).fold(crc ^ u32::from(*b), |crc, _| if crc & 1 == 1 { (crc >> 1) ^ 0xedb8_8320 } else { crc >> 1 })
        })
    }

    #[test]
    fn other_formats_are_read_and_alpha_is_laid_on_white() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.png");
        image::RgbaImage::from_pixel(2, 2, image::Rgba([0, 0, 0, 0])).save(&path).unwrap();
        assert_eq!(read(&path).unwrap().get_pixel(0, 0).0, [255; 3]);
        let path = folder.path().join("named-wrongly.png");
        picture().save_with_format(&path, image::ImageFormat::Jpeg).unwrap();
        assert_eq!(read(&path).unwrap().dimensions(), (5, 3));
        fs::write(&path, "text").unwrap();
        assert!(read(&path).unwrap_err().to_string().contains("neither PNG"));
        assert!(read_texts(&path).unwrap_err().to_string().contains("is no PNG"));
    }
}
