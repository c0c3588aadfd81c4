//! Pictures to patches, as `Qwen2VLImageProcessor` of transformers prepares them for Qwen3-VL: resized so that both
//! sides are whole blocks and the area is in bounds, normalised, cut into patches, each repeated in time.

use crate::models::{Folder, qwen3_vl::Patches};
use anyhow::{Context, Result, bail, ensure};
use candle_core::{Device, Tensor};
use image::RgbImage;
use rayon::prelude::*;
use serde::Deserialize;

/// `preprocessor_config.json`, or the `image_processor` of `processor_config.json`.
#[derive(Clone, Debug, Deserialize)]
#[serde(default)]
pub struct ImageProcessor {
    /// The least and the largest area, under names that once meant sides.
    size: Option<Size>,
    min_pixels: Option<usize>,
    max_pixels: Option<usize>,
    pub patch_size: usize,
    pub temporal_patch_size: usize,
    pub merge_size: usize,
    image_mean: [f32; 3],
    image_std: [f32; 3],
    rescale_factor: f64,
    do_resize: bool,
    do_rescale: bool,
    do_normalize: bool,
    /// Pillow's number of the filter; 3 is bicubic.
    resample: u8,
}

#[derive(Clone, Copy, Debug, Deserialize)]
struct Size {
    shortest_edge: usize,
    longest_edge: usize,
}

impl Default for ImageProcessor {
    fn default() -> Self {
        Self {
            size: None,
            min_pixels: None,
            max_pixels: None,
            patch_size: 14,
            temporal_patch_size: 2,
            merge_size: 2,
            // Those of CLIP.
            image_mean: [0.481_454_66, 0.457_827_5, 0.408_210_73],
            image_std: [0.268_629_54, 0.261_302_6, 0.275_777_1],
            rescale_factor: 1.0 / 255.0,
            do_resize: true,
            do_rescale: true,
            do_normalize: true,
            resample: 3,
        }
    }
}

impl ImageProcessor {
    pub fn open(folder: &Folder) -> Result<Self> {
        #[derive(Deserialize)]
        struct Processor {
            image_processor: ImageProcessor,
        }
        let this = if folder.has("preprocessor_config.json") {
            folder.json::<Self>("preprocessor_config.json")?
        } else {
            folder.json::<Processor>("processor_config.json")?.image_processor
        };
        this.validate().with_context(|| format!("the image processor of {}", folder.name()))?;
        Ok(this)
    }

    /// Reads the text of a `preprocessor_config.json`.
    pub fn parse(json: &[u8]) -> Result<Self> {
        let this: Self = serde_json::from_slice(json).context("this is no preprocessor_config.json")?;
        this.validate()?;
        Ok(this)
    }

    fn validate(&self) -> Result<()> {
        ensure!(self.patch_size > 0 && self.merge_size > 0 && self.temporal_patch_size > 0, "patches of no size");
        ensure!(self.resample == 3, "only bicubic resampling is supported");
        let side = self.patch_size.saturating_mul(self.merge_size);
        let (least, most) = self.bounds();
        // Qwen3-VL's own looks at 16 million pixels at most.
        ensure!(
            side <= 1 << 12 && self.temporal_patch_size <= 64 && least <= 1 << 24 && least <= most,
            "impossible sizes: {self:?}"
        );
        Ok(())
    }

    fn bounds(&self) -> (usize, usize) {
        let size = self.size.unwrap_or(Size { shortest_edge: 56 * 56, longest_edge: 28 * 28 * 1280 });
        (self.min_pixels.unwrap_or(size.shortest_edge), self.max_pixels.unwrap_or(size.longest_edge))
    }

    /// The size at which a picture of `width` by `height` is looked at.
    pub fn target(&self, width: usize, height: usize) -> Result<(usize, usize)> {
        let (long, short) = (width.max(height), width.min(height));
        if short == 0 || long > 200 * short {
            bail!("a picture of {width} by {height} is too narrow to be looked at");
        }
        if !self.do_resize {
            return Ok((width, height));
        }
        let factor = self.patch_size * self.merge_size;
        let (least, most) = self.bounds();
        let area = (width * height) as f64;
        // Python rounds halves to even.
        let nearest = |side: usize| (side as f64 / factor as f64).round_ties_even() as usize * factor;
        let (w, h) = (nearest(width), nearest(height));
        Ok(if w * h > most {
            let beta = (area / most as f64).sqrt();
            let fit = |side: usize| ((side as f64 / beta / factor as f64).floor() as usize * factor).max(factor);
            (fit(width), fit(height))
        } else if w * h < least {
            let beta = (least as f64 / area).sqrt();
            let fit = |side: usize| (side as f64 * beta / factor as f64).ceil() as usize * factor;
            (fit(width), fit(height))
        } else {
            (w, h)
        })
    }

    /// The patches of `pictures`, one after the other.
    pub fn patches<'a>(&self, pictures: impl IntoIterator<Item = &'a RgbImage>, device: &Device) -> Result<Patches> {
        let pictures: Vec<&RgbImage> = pictures.into_iter().collect();
        let cut = |picture: &&RgbImage| -> Result<(Vec<f32>, [usize; 2])> {
            let (width, height) = (picture.width() as usize, picture.height() as usize);
            let target = self.target(width, height)?;
            self.cut(&resize(picture.as_raw(), (width, height), target), target)
        };
        let (values, grids): (Vec<_>, Vec<_>) =
            pictures.par_iter().map(cut).collect::<Result<Vec<_>>>()?.into_iter().unzip();
        let numbers = 3 * self.temporal_patch_size * self.patch_size.pow(2);
        let patches = grids.iter().map(|[r, c]| r * c).sum::<usize>();
        let values = Tensor::from_vec(values.concat(), (patches, numbers), device)?;
        Ok(Patches { values, grids })
    }

    /// The patches of one picture: block by block, in each patch channel, time, row, column; and their rows and columns.
    fn cut(&self, rgb: &[u8], (width, height): (usize, usize)) -> Result<(Vec<f32>, [usize; 2])> {
        let (p, m) = (self.patch_size, self.merge_size);
        let (rows, columns) = (height / p, width / p);
        ensure!(
            rows * p == height && columns * p == width && rows % m == 0 && columns % m == 0 && rows * columns > 0,
            "a picture of {width} by {height} does not split into blocks of {} pixels",
            p * m
        );
        let scale = if self.do_rescale { self.rescale_factor as f32 } else { 1.0 };
        let value = |channel: usize, x: usize, y: usize| {
            let value = f32::from(rgb[(y * width + x) * 3 + channel]) * scale;
            if self.do_normalize { (value - self.image_mean[channel]) / self.image_std[channel] } else { value }
        };
        let blocks = (0..rows / m).flat_map(|i| (0..columns / m).map(move |j| (i, j)));
        let mut out = Vec::with_capacity(3 * self.temporal_patch_size * width * height);
        for (i, j) in blocks {
            for k in 0..m * m {
                let (top, left) = ((i * m + k / m) * p, (j * m + k % m) * p);
                for channel in 0..3 {
                    let start = out.len();
                    out.extend((0..p * p).map(|q| value(channel, left + q % p, top + q / p)));
                    let end = out.len();
                    for _ in 1..self.temporal_patch_size {
                        out.extend_from_within(start..end);
                    }
                }
            }
        }
        Ok((out, [rows, columns]))
    }
}

/// Pillow's bicubic resampling of 8-bit RGB, bit for bit: the filter widens where the picture shrinks, weights are
/// fixed-point numbers, and each of the two passes rounds to 8 bits.
fn resize(rgb: &[u8], (width, height): (usize, usize), target: (usize, usize)) -> Vec<u8> {
    let across = if width == target.0 {
        rgb.to_vec()
    } else {
        let taps = taps(width, target.0);
        let mut out = vec![0; target.0 * height * 3];
        for (row, out) in rgb.chunks_exact(width * 3).zip(out.chunks_exact_mut(target.0 * 3)) {
            for ((from, weights), out) in taps.iter().zip(out.chunks_exact_mut(3)) {
                for (channel, out) in out.iter_mut().enumerate() {
                    *out = weigh(weights, |k| row[(from + k) * 3 + channel]);
                }
            }
        }
        out
    };
    if height == target.1 {
        return across;
    }
    let line = target.0 * 3;
    let mut out = vec![0; line * target.1];
    for ((from, weights), out) in taps(height, target.1).iter().zip(out.chunks_exact_mut(line)) {
        for (i, out) in out.iter_mut().enumerate() {
            *out = weigh(weights, |k| across[(from + k) * line + i]);
        }
    }
    out
}

/// The fraction bits of a weight: 32, less 8 of the pixel and 2 to spare.
const BITS: u32 = 22;

fn weigh(weights: &[i64], pixel: impl Fn(usize) -> u8) -> u8 {
    let sum: i64 = weights.iter().enumerate().map(|(k, w)| w * i64::from(pixel(k))).sum();
    ((sum + (1 << (BITS - 1))) >> BITS).clamp(0, 255) as u8
}

/// For each pixel of the result the first source pixel and the weights from there on.
fn taps(from: usize, to: usize) -> Vec<(usize, Vec<i64>)> {
    /// Keys' cubic with a = -0.5.
    fn cubic(x: f64) -> f64 {
        let x = x.abs();
        match x {
            ..1.0 => (1.5 * x - 2.5) * x * x + 1.0,
            ..2.0 => ((-0.5 * x + 2.5) * x - 4.0) * x + 2.0,
            _ => 0.0,
        }
    }
    let scale = from as f64 / to as f64;
    let stretch = scale.max(1.0);
    let support = 2.0 * stretch;
    (0..to)
        .map(|i| {
            let centre = (i as f64 + 0.5) * scale;
            let first = (centre - support + 0.5).max(0.0) as usize;
            let end = ((centre + support + 0.5) as usize).min(from);
            let weights: Vec<f64> = (first..end).map(|x| cubic((x as f64 - centre + 0.5) / stretch)).collect();
            let sum: f64 = weights.iter().sum();
            let fixed = |w: &f64| (w / sum * f64::from(1 << BITS)).round() as i64;
            (first, weights.iter().map(fixed).collect())
        })
        .collect()
}

/// A picture of the same size whose content is moved by so many pixels to the right and down; its edges are drawn on where
/// nothing is left.
pub fn moved(picture: &RgbImage, [right, down]: [i64; 2]) -> RgbImage {
    let from = |to: u32, by: i64, side: u32| (i64::from(to) - by).clamp(0, i64::from(side) - 1) as u32;
    let (width, height) = picture.dimensions();
    RgbImage::from_fn(width, height, |x, y| *picture.get_pixel(from(x, right, width), from(y, down, height)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use image::Rgb;

    #[test]
    fn a_moved_picture_goes_on_at_its_edges() {
        let picture = RgbImage::from_fn(4, 3, |x, y| Rgb([x as u8, y as u8, 9]));
        let right = moved(&picture, [1, -2]);
        assert_eq!(right.get_pixel(2, 0), picture.get_pixel(1, 2));
        assert_eq!(right.get_pixel(0, 2), picture.get_pixel(0, 2));
        assert_eq!(moved(&picture, [0, 0]), picture);
        assert_eq!(moved(&RgbImage::new(0, 0), [3, 3]).dimensions(), (0, 0));
    }
}
