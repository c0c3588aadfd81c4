//! Painting a scene: 128 x 128 pixels, anti-aliased, lightly shaded, with soft shadows.
//!
//! Objects are painted from the farthest to the nearest, each within its own box: first its shadow (the outline, shifted
//! away from the light and softened), then its body. All in sRGB, in f32, with no randomness and no threads.

use super::{
    shapes,
    world::{Background, Item, SIDE, Scene},
};
use image::RgbImage;

/// The shadow's offset from its object, in pixels.
const SHADOW_OFFSET: (f32, f32) = (2.2, 3.6);
/// How far the shadow's edge is softened to either side, in pixels.
const SHADOW_SOFTNESS: f32 = 5.0;
const SHADOW_STRENGTH: f32 = 0.24;

/// Paints the scene.
pub fn render(scene: &Scene) -> RgbImage {
    let side = SIDE as usize;
    let mut canvas = table(&scene.background);
    for i in scene.painting_order() {
        paint_shadow(&mut canvas, &scene.items[i]);
        paint_body(&mut canvas, &scene.items[i]);
    }
    let mut image = RgbImage::new(SIDE, SIDE);
    for (pixel, rgb) in image.as_mut().chunks_exact_mut(3).zip(&canvas[..side * side]) {
        for (out, value) in pixel.iter_mut().zip(rgb) {
            *out = (value + 0.5) as u8;
        }
    }
    image
}

fn table(background: &Background) -> Vec<[f32; 3]> {
    let side = SIDE as usize;
    let mut canvas = Vec::with_capacity(side * side);
    let at = |i: usize| (2.0 * i as f32 + 1.0) / SIDE as f32 - 1.0;
    for y in 0..side {
        for x in 0..side {
            let light = background.slope[0] * at(x) + background.slope[1] * at(y);
            canvas.push(background.rgb.map(|c| (c + light).clamp(0.0, 255.0)));
        }
    }
    canvas
}

/// Calls `paint` for each pixel whose centre lies within `reach` of the item's box, shifted by `shift`.
fn for_pixels(item: &Item, shift: (f32, f32), reach: f32, mut paint: impl FnMut(usize, f32, f32)) {
    let b = item.bounding_box();
    let clip = |v: f32| v.clamp(0.0, SIDE as f32) as usize;
    let (x0, x1) = (clip((b.x0 + shift.0 - reach).floor()), clip((b.x1 + shift.0 + reach).ceil()));
    let (y0, y1) = (clip((b.y0 + shift.1 - reach).floor()), clip((b.y1 + shift.1 + reach).ceil()));
    for y in y0..y1 {
        for x in x0..x1 {
            paint(y * SIDE as usize + x, x as f32 + 0.5 - shift.0, y as f32 + 0.5 - shift.1);
        }
    }
}

fn paint_shadow(canvas: &mut [[f32; 3]], item: &Item) {
    for_pixels(item, SHADOW_OFFSET, SHADOW_SOFTNESS, |i, x, y| {
        let t = (0.5 - item.distance(x, y) / (2.0 * SHADOW_SOFTNESS)).clamp(0.0, 1.0);
        let shade = SHADOW_STRENGTH * t * t * (3.0 - 2.0 * t);
        for value in &mut canvas[i] {
            *value *= 1.0 - shade;
        }
    });
}

fn paint_body(canvas: &mut [[f32; 3]], item: &Item) {
    let base = item.colour.rgb();
    for_pixels(item, (0.0, 0.0), 1.0, |i, x, y| {
        let coverage = (0.5 - item.distance(x, y)).clamp(0.0, 1.0);
        if coverage > 0.0 {
            let unit = 1.0 / item.radius;
            let (light, white) = shapes::shade(item.shape, (x - item.x) * unit, (y - item.y) * unit, unit);
            for (value, base) in canvas[i].iter_mut().zip(base) {
                let lit = (base * light).min(255.0);
                let colour = lit + (255.0 - lit) * white;
                *value += coverage * (colour - *value);
            }
        }
    });
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        scene::tabletop::{sample, split::Split},
        tensor::rng::Stream,
    };

    #[test]
    fn colours_show_at_the_centres_of_solid_objects() {
        for index in 0..50 {
            let (scene, _) = sample::draw(&mut Stream::new(3, "render", index), Split::Train, 1, 1);
            let item = scene.items[0];
            if item.shape == super::super::world::Shape::Ring {
                continue;
            }
            let seen = render(&scene).get_pixel(item.x as u32, item.y as u32).0;
            let base = item.colour.rgb();
            let error: f32 = seen.iter().zip(base).map(|(s, b)| (f32::from(*s) - b).abs()).sum();
            assert!(error < 120.0, "{item:?}: {seen:?} against {base:?}");
        }
    }

    #[test]
    fn the_table_is_plain_away_from_objects() {
        let (mut scene, _) = sample::draw(&mut Stream::new(3, "table", 0), Split::Train, 1, 1);
        scene.items.clear();
        let image = render(&scene);
        let level = |p: &image::Rgb<u8>| p.0.iter().map(|v| i32::from(*v)).sum::<i32>() / 3;
        let (low, high) = image.pixels().fold((255, 0), |(l, h), p| (l.min(level(p)), h.max(level(p))));
        assert!(low > 195 && high - low < 45, "{low} {high}");
    }
}
