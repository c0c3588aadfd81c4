//! Pictures as networks see them: `(3, H, W)` in `[-1, 1]`.

use anyhow::{Context, Result};
use candle_core::{DType, Device, Tensor};
use image::RgbImage;
use rayon::prelude::*;

/// A picture's numbers, a plane for each colour.
pub fn planes(picture: &RgbImage) -> Vec<f32> {
    let bytes = picture.as_raw();
    (0..3).flat_map(|c| bytes.iter().skip(c).step_by(3).map(|b| f32::from(*b) / 127.5 - 1.0)).collect()
}

/// Pictures of one size as `(B, 3, H, W)`.
pub fn to_tensor(pictures: &[RgbImage], device: &Device) -> Result<Tensor> {
    let (width, height) = pictures.first().map_or((0, 0), RgbImage::dimensions);
    let values: Vec<Vec<f32>> = pictures.par_iter().map(planes).collect();
    Ok(Tensor::from_vec(values.concat(), (pictures.len(), 3, height as usize, width as usize), device)?)
}

/// `(B, 3, H, W)` as pictures; what lies outside of the range is clipped.
pub fn to_pictures(x: &Tensor) -> Result<Vec<RgbImage>> {
    let x = x.clamp(-1f32, 1f32)?.affine(127.5, 127.5)?.round()?.to_dtype(DType::U8)?;
    let x = x.permute((0, 2, 3, 1))?.contiguous()?;
    let (pictures, height, width, _) = x.dims4()?;
    let picture = |i: usize| {
        let bytes = x.get(i)?.flatten_all()?.to_vec1()?;
        RgbImage::from_raw(width as u32, height as u32, bytes).context("a picture of three colours")
    };
    (0..pictures).map(picture).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use image::Rgb;

    #[test]
    fn pictures_come_back() {
        let picture = |first| RgbImage::from_fn(3, 2, |x, y| Rgb([first, 40 * x as u8, 100 + 50 * y as u8]));
        let pictures = [picture(0), picture(255)];
        let x = to_tensor(&pictures, &Device::Cpu).unwrap();
        assert_eq!(x.dims(), [2, 3, 2, 3]);
        assert_eq!(x.get(1).unwrap().get(0).unwrap().to_vec2::<f32>().unwrap(), [[1.0; 3]; 2]);
        assert_eq!(to_pictures(&x).unwrap(), pictures);
        assert_eq!(to_pictures(&(x * 9.0).unwrap()).unwrap()[0].get_pixel(0, 0), &Rgb([0, 0, 0]));
    }
}
