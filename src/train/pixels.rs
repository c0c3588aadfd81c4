//! Sheets of pictures, and what an edit did to a picture's pixels.

use crate::io;
use anyhow::Result;
use image::RgbImage;
use std::path::Path;

/// Writes `NAME.png`, pictures in rows of eight, and `NAME.txt`, what is said of them.
pub fn write_sheet(folder: &Path, name: &str, pictures: &[RgbImage], words: &str) -> Result<()> {
    io::png::write(&folder.join(format!("{name}.png")), &tiled(pictures, 8), &[], true)?;
    io::write_file(&folder.join(format!("{name}.txt")), words.as_bytes(), true)
}

/// Pictures of one size in rows of `columns`.
pub fn tiled(pictures: &[RgbImage], columns: usize) -> RgbImage {
    let (width, height) = pictures.first().map_or((0, 0), RgbImage::dimensions);
    let rows = pictures.len().div_ceil(columns);
    let mut sheet = RgbImage::new(columns as u32 * width, rows as u32 * height);
    for (i, picture) in pictures.iter().enumerate() {
        let (x, y) = ((i % columns) as i64, (i / columns) as i64);
        image::imageops::replace(&mut sheet, picture, x * i64::from(width), y * i64::from(height));
    }
    sheet
}

/// In levels of 255.
const STILL: f64 = 2.0;

/// How well an edit left alone what it could: 1 where the four fifths of the pixels that changed least did not change
/// at all, `1/e` where they changed by 8 of 255 on the average. The largest things cover a tenth each, and what moves
/// changes its old place and its new one.
pub fn preserved(before: &RgbImage, after: &RgbImage) -> f64 {
    let change = |(a, b): (&[u8], &[u8])| a.iter().zip(b).map(|(a, b)| u32::from(a.abs_diff(*b))).sum::<u32>();
    let mut changes: Vec<u32> =
        before.as_raw().chunks_exact(3).zip(after.as_raw().chunks_exact(3)).map(change).collect();
    changes.sort_unstable();
    let least = &changes[..changes.len() * 4 / 5];
    let mean = least.iter().map(|c| f64::from(*c) / 3.0).sum::<f64>() / least.len().max(1) as f64;
    (-mean / 8.0).exp()
}

/// Whether an edit left a picture as it was: its pixels changed by no more than [`STILL`] on the average.
pub fn still(before: &RgbImage, after: &RgbImage) -> bool {
    let sum: u64 = before.as_raw().iter().zip(after.as_raw()).map(|(a, b)| u64::from(a.abs_diff(*b))).sum();
    sum as f64 <= STILL * before.as_raw().len() as f64
}

#[cfg(test)]
mod tests {
    use super::*;
    use image::Rgb;

    #[test]
    fn an_edit_may_change_a_fifth_of_the_picture() {
        let before = RgbImage::from_pixel(10, 10, Rgb([100; 3]));
        let changed = |columns: u32| RgbImage::from_fn(10, 10, |x, _| Rgb([if x < columns { 0 } else { 100 }; 3]));
        let all = RgbImage::from_pixel(10, 10, Rgb([108; 3]));
        assert_eq!((preserved(&before, &before), preserved(&before, &changed(2))), (1.0, 1.0));
        assert!((preserved(&before, &all) - (-1f64).exp()).abs() < 1e-12);
        // Another tenth is an eighth of what should have stayed.
        assert!((preserved(&before, &changed(3)) - (-100f64 / 64.0).exp()).abs() < 1e-12);
    }

    #[test]
    fn a_picture_that_is_hardly_touched_is_left_as_it_was() {
        let before = RgbImage::from_pixel(8, 8, Rgb([100; 3]));
        let spot = RgbImage::from_fn(8, 8, |x, y| Rgb([if (x, y) == (0, 0) { 180 } else { 100 }; 3]));
        let moved = RgbImage::from_fn(8, 8, |x, _| Rgb([if x == 0 { 180 } else { 100 }; 3]));
        assert!(still(&before, &spot) && !still(&before, &moved));
    }
}
