//! Pictures as files: PNG with text chunks out, PNG, JPEG and WebP in.
//!
//! A picture carries its recipe in two chunks: `parameters` in the words of AUTOMATIC1111's web UI, which many tools
//! read, and `rlrig`, our own JSON. Files come from anywhere, so what is read is bounded in every direction.

use super::{read_file, write_file};
use anyhow::{Context, Result, ensure};
use image::{
    DynamicImage, ImageDecoder, ImageFormat, ImageReader, ImageResult, Limits, RgbImage, metadata::Orientation,
};
use std::{
    io::{BufReader, Cursor},
    path::Path,
};

/// The keyword of rlrig's own chunk.
pub const CHUNK: &str = "rlrig";

const FILE_LIMIT: u64 = 256 << 20;
/// Of all text chunks together, unpacked.
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

/// Reads a picture of any format rlrig knows, upright. What is transparent is laid on white.
pub fn read(path: &Path) -> Result<RgbImage> {
    let bytes = read_file(path, FILE_LIMIT)?;
    let shown = path.display();
    let reader = ImageReader::new(Cursor::new(bytes.as_slice())).with_guessed_format()?;
    let format = reader.format();
    ensure!(
        matches!(format, Some(ImageFormat::Png | ImageFormat::Jpeg | ImageFormat::WebP)),
        "{shown} is neither PNG nor JPEG nor WebP, which are the formats that are read"
    );
    let image = decode(reader).with_context(|| format!("{shown} is no whole picture"))?;
    ensure!(
        format != Some(ImageFormat::Jpeg) || has_end(&bytes),
        "{shown} is no whole picture: it ends before its end marker"
    );
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

/// Decodes within the limits, and turns the picture as its camera was held.
fn decode(mut reader: ImageReader<Cursor<&[u8]>>) -> ImageResult<DynamicImage> {
    let mut limits = Limits::default();
    limits.max_image_width = Some(SIDE_LIMIT);
    limits.max_image_height = Some(SIDE_LIMIT);
    limits.max_alloc = Some(PIXEL_LIMIT);
    reader.limits(limits.clone());
    let mut decoder = reader.into_decoder()?;
    limits.reserve(decoder.total_bytes())?;
    decoder.set_limits(limits)?;
    // A picture is whole without what is told beside it.
    let orientation = decoder.orientation().unwrap_or(Orientation::NoTransforms);
    let mut image = DynamicImage::from_decoder(decoder)?;
    image.apply_orientation(orientation);
    Ok(image)
}

/// Whether a JPEG goes on to its end marker: its decoder makes up for what is missing and says nothing. What follows the
/// marker, as the film of a moving picture, is not looked at.
fn has_end(jpeg: &[u8]) -> bool {
    let mut rest = jpeg.get(2..).unwrap_or_default(); // behind the start marker
    // In a scan, FF is followed by 0 where it is data, and by D0 to D7 where the scan restarts; FF FF is filling.
    while let Some(at) = rest.windows(2).position(|w| w[0] == 0xff && !matches!(w[1], 0 | 0xd0..=0xd7 | 0xff)) {
        match rest[at..] {
            [_, 0xd9, ..] => return true,
            // A segment counts the two bytes of its length.
            [_, _, high, low, ..] => {
                let length = usize::from(u16::from_be_bytes([high, low]));
                rest = rest.get(at + 2 + length..).unwrap_or_default();
            }
            _ => return false,
        }
    }
    false
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
    // A kilobyte unpacks to a megabyte, and a file may have many chunks.
    let mut left = TEXT_LIMIT;
    for chunk in &info.compressed_latin1_text {
        let mut chunk = chunk.clone();
        chunk.decompress_text_with_limit(left)?;
        let text = chunk.get_text()?;
        left = left.saturating_sub(text.len());
        texts.push((chunk.keyword, text));
    }
    for chunk in &info.utf8_text {
        let mut chunk = chunk.clone();
        chunk.decompress_text_with_limit(left)?;
        let text = chunk.get_text()?;
        left = left.saturating_sub(text.len());
        texts.push((chunk.keyword, text));
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

    #[test]
    fn a_cut_jpeg_is_an_error_whatever_its_decoder_makes_of_it() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.jpg");
        let noise = RgbImage::from_fn(64, 64, |x, y| image::Rgb([(x * 37) as u8, (y * 91) as u8, (x * y) as u8]));
        noise.save(&path).unwrap();
        let whole = fs::read(&path).unwrap();
        for n in (0..whole.len() - 1).rev().step_by(7) {
            fs::write(&path, &whole[..n]).unwrap();
            assert!(read(&path).is_err(), "{n} of {} bytes were read as a picture", whole.len());
        }
        fs::write(&path, [whole.as_slice(), b"film \xff\xda".as_slice()].concat()).unwrap();
        assert_eq!(read(&path).unwrap().dimensions(), (64, 64));
    }

    #[test]
    fn a_picture_is_turned_as_its_camera_was_held() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.jpg");
        let mut halves = RgbImage::new(32, 16);
        halves.enumerate_pixels_mut().filter(|(x, _, _)| *x < 16).for_each(|(_, _, p)| p.0 = [255; 3]);
        halves.save(&path).unwrap();
        let plain = fs::read(&path).unwrap();
        // One entry: orientation (274), a short, 6: turned a quarter to the right.
        let exif = b"\xff\xe1\0\x22Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01\x03\0\x01\0\0\0\x06\0\0\0\0\0\0\0";
        fs::write(&path, [&plain[..2], exif.as_slice(), &plain[2..]].concat()).unwrap();
        let image = read(&path).unwrap();
        assert_eq!(image.dimensions(), (16, 32));
        assert!(image.get_pixel(8, 4).0[0] > 200 && image.get_pixel(8, 28).0[0] < 50, "what was left is above");
    }

    #[test]
    fn texts_are_bounded_together() {
        let mut bytes = Vec::new();
        let mut encoder = png::Encoder::new(&mut bytes, 1, 1);
        for _ in 0..9 {
            encoder.add_ztxt_chunk("many".into(), "a".repeat(2 << 20)).unwrap();
        }
        encoder.write_header().unwrap().write_image_data(&[0]).unwrap();
        assert!(bytes.len() < 1 << 20 && texts(&bytes).is_err());
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
        for other in ["text", "GIF89a\x01\0\x01\0\0\0\0"] {
            fs::write(&path, other).unwrap();
            assert!(read(&path).unwrap_err().to_string().contains("neither PNG"));
        }
        assert!(read_texts(&path).unwrap_err().to_string().contains("is no PNG"));
    }
}
