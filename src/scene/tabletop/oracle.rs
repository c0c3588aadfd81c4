//! The pixel oracle: reads any picture back into objects and relations, by its pixels alone.
//!
//! No learning and no randomness. Pixels are named by hue (black by darkness) against the fitted table
//! ([`super::segment`]); each patch of one colour is explained by the outline that fits it best ([`super::fit`]), where
//! pixels of other colours may hide a part; where two fitted outlines overlap, the colour seen there lies in front. It
//! shares with the renderer only the outlines and the colours, and with the scenes only the rules of a [`View`].

use super::{
    fit::{self, Fit},
    render::render,
    segment::{self, Patch, Segmentation},
    view::{Judgement, Seen, View},
    world::{Colour, Item, SIDE, Scene, Size},
};
use crate::scene::graph::SceneGraph;
use image::RgbImage;
use serde::Serialize;

/// A patch must fit an outline at least this well (intersection over union) to be an object.
const LEAST_FIT: f32 = 0.6;
/// Patches smaller than this, in pixels, that fit no outline are specks, not objects.
const SPECK: usize = 90;
/// Fitted outlines that share at least this many pixels overlap.
const OVERLAP: usize = 20;

/// What the oracle makes of a picture.
#[derive(Debug, Clone, Serialize)]
pub struct Reading {
    pub view: View,
    /// How well each object's outline fits its pixels: intersection over union.
    pub fit: Vec<f32>,
    /// Patches of colour that are no known shape.
    pub unclear: usize,
    /// The objects as fitted, on the table as fitted.
    #[serde(skip)]
    pub scene: Scene,
}

/// Reads a picture; one of another size is scaled first.
pub fn read(image: &RgbImage) -> Reading {
    let scaled;
    let image = if image.dimensions() == (SIDE, SIDE) {
        image
    } else {
        scaled = image::imageops::resize(image, SIDE, SIDE, image::imageops::FilterType::Triangle);
        &scaled
    };
    let segmentation = segment::segment(image);
    let patches = join_hidden(&segmentation);
    let mut found: Vec<(Colour, Fit)> = Vec::new();
    let mut unclear = 0;
    for (patch, fit) in patches {
        if fit.score >= LEAST_FIT {
            found.push((patch.colour, fit));
        } else if patch.pixels.len() >= SPECK {
            unclear += 1;
        }
    }
    // A fixed order: from left to right.
    found.sort_by(|a, b| a.1.x.total_cmp(&b.1.x));
    let objects = found.iter().map(|(colour, fit)| Seen {
        shape: fit.shape,
        colour: *colour,
        size: Size::of_radius(fit.radius),
        bounds: fit.bounding_box(),
    });
    let view = View { objects: objects.collect(), in_front: depth_order(&segmentation, &found) };
    // What hides more lies nearer; there is rarely more than one such pair.
    let depth = |i: usize| view.in_front.iter().filter(|(front, _)| *front == i).count() as i16;
    let item = |(i, (colour, fit)): (usize, &(Colour, Fit))| {
        let Fit { shape, x, y, radius, .. } = *fit;
        Item { shape, colour: *colour, size: Size::of_radius(radius), x, y, radius, depth: depth(i) }
    };
    let items = found.iter().enumerate().map(item).collect();
    let scene = Scene { background: segmentation.background, items };
    Reading { view, fit: found.iter().map(|(_, fit)| fit.score).collect(), unclear, scene }
}

/// Which of a graph's objects and relations a picture shows, and how many other things it shows.
pub fn judge(image: &RgbImage, graph: &SceneGraph) -> Judgement {
    read(image).judge(graph)
}

impl Reading {
    pub fn judge(&self, graph: &SceneGraph) -> Judgement {
        let mut judgement = self.view.judge(graph);
        judgement.extra += self.unclear;
        judgement
    }

    /// How far the picture that was read is from a render of what was read in it: the root mean square of the difference
    /// of their pixels, in 0..=1. Broken shapes, blur and stains all show in it.
    pub fn render_distance(&self, image: &RgbImage) -> f64 {
        let painted = render(&self.scene);
        let painted = match image.dimensions() {
            (SIDE, SIDE) => painted,
            (w, h) => image::imageops::resize(&painted, w, h, image::imageops::FilterType::Triangle),
        };
        let squares = image.as_raw().iter().zip(painted.as_raw()).map(|(a, b)| (f64::from(*a) - f64::from(*b)).powi(2));
        (squares.sum::<f64>() / image.as_raw().len().max(1) as f64).sqrt() / 255.0
    }
}

/// The patches with their fits; two patches of one colour become one where something in front cuts one thing in two.
fn join_hidden(segmentation: &Segmentation) -> Vec<(Patch, Fit)> {
    let fitted = |patch: Patch| {
        let fit = fit::fit(&patch, &segmentation.hiding(patch.colour));
        (patch, fit)
    };
    let mut all: Vec<(Patch, Fit)> = segmentation.patches.iter().cloned().map(fitted).collect();
    let mut i = 0;
    while i < all.len() {
        let partner = (i + 1..all.len()).find_map(|j| {
            let ((a, fit_a), (b, fit_b)) = (&all[i], &all[j]);
            if a.colour != b.colour || a.bounds.gap(&b.bounds) > 30.0 || fit_a.score.min(fit_b.score) > 0.9 {
                return None;
            }
            let joined = fitted(a.join(b));
            let (n, m) = (a.pixels.len() as f32, b.pixels.len() as f32);
            let apart = (fit_a.score * n + fit_b.score * m) / (n + m);
            (joined.1.score > LEAST_FIT && joined.1.score > apart).then_some((j, joined))
        });
        match partner {
            Some((j, joined)) => {
                all.remove(j);
                all[i] = joined;
            }
            None => i += 1,
        }
    }
    all
}

/// Pairs of which the first hides a part of the second: its colour is what is seen where both outlines are.
fn depth_order(segmentation: &Segmentation, found: &[(Colour, Fit)]) -> Vec<(usize, usize)> {
    let mut pairs = Vec::new();
    for (i, (colour_a, a)) in found.iter().enumerate() {
        for (j, (colour_b, b)) in found.iter().enumerate().skip(i + 1) {
            if a.bounding_box().gap(&b.bounding_box()) >= 0.0 || colour_a == colour_b {
                continue;
            }
            let (mut shared, mut seen_a, mut seen_b) = (0, 0, 0);
            for y in 0..SIDE {
                for x in 0..SIDE {
                    let (px, py) = (x as f32 + 0.5, y as f32 + 0.5);
                    if a.distance(px, py) < 0.0 && b.distance(px, py) < 0.0 {
                        shared += 1;
                        let label = segmentation.label(x, y);
                        seen_a += usize::from(label == Some(*colour_a));
                        seen_b += usize::from(label == Some(*colour_b));
                    }
                }
            }
            if shared >= OVERLAP {
                pairs.push(if seen_a >= seen_b { (i, j) } else { (j, i) });
            }
        }
    }
    pairs
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        scene::{
            relation::Spatial,
            tabletop::{render::render, sample, split::Split, world::Scene},
        },
        tensor::rng::Stream,
    };
    use rayon::prelude::*;

    /// Right and all, counted.
    #[derive(Default, Clone, Copy)]
    struct Count {
        right: usize,
        all: usize,
    }

    impl Count {
        fn add(&mut self, right: bool) {
            self.right += usize::from(right);
            self.all += 1;
        }

        fn rate(self) -> f64 {
            self.right as f64 / self.all as f64
        }
    }

    /// Objects (name, size, and place within 2.5 pixels), relations of every ordered pair (all seven must agree), and
    /// pictures with nothing read that is not there.
    fn compare(scene: &Scene, reading: &Reading) -> [Count; 3] {
        let truth = scene.view();
        let mut counts = [Count::default(); 3];
        let place = |i: &Seen| i.bounds.centre();
        let at: Vec<Option<usize>> = truth
            .objects
            .iter()
            .map(|t| {
                reading.view.objects.iter().position(|o| {
                    let ((x, y), (u, v)) = (place(t), place(o));
                    (o.shape, o.colour, o.size) == (t.shape, t.colour, t.size) && (x - u).hypot(y - v) < 2.5
                })
            })
            .collect();
        for found in &at {
            counts[0].add(found.is_some());
        }
        for a in 0..at.len() {
            for b in (0..at.len()).filter(|&b| b != a) {
                let agree = |(i, j): (usize, usize)| {
                    Spatial::ALL.iter().all(|&r| truth.holds(a, r, b) == reading.view.holds(i, r, j))
                };
                counts[1].add(at[a].zip(at[b]).is_some_and(agree));
            }
        }
        counts[2].add(reading.view.objects.len() == truth.objects.len() && reading.unclear == 0);
        counts
    }

    fn noisy(image: &RgbImage, sigma: f32, rng: &mut Stream) -> RgbImage {
        let mut out = image.clone();
        let noise = rng.normals(out.as_raw().len());
        for (v, n) in out.iter_mut().zip(noise) {
            *v = (f32::from(*v) + sigma * n).round().clamp(0.0, 255.0) as u8;
        }
        out
    }

    fn through_jpeg(image: &RgbImage, quality: u8) -> RgbImage {
        let mut bytes = Vec::new();
        let encoder = image::codecs::jpeg::JpegEncoder::new_with_quality(&mut bytes, quality);
        image.write_with_encoder(encoder).unwrap();
        image::load_from_memory(&bytes).unwrap().into_rgb8()
    }

    /// Rates over `n` scenes of one to five objects, each seen through `lens`.
    fn rates(n: u64, lens: impl Fn(RgbImage, &mut Stream) -> RgbImage + Sync) -> [f64; 3] {
        let one = |index: u64| {
            let rng = &mut Stream::new(17, "oracle", index);
            let split = if index.is_multiple_of(3) { Split::TestMany } else { Split::Train };
            let (scene, _) = sample::draw(rng, split, 1, 5);
            let picture = lens(render(&scene), rng);
            compare(&scene, &read(&picture))
        };
        let all: Vec<[Count; 3]> = (0..n).into_par_iter().map(one).collect();
        let sum = |k: usize| {
            all.iter().fold(Count::default(), |s, c| Count { right: s.right + c[k].right, all: s.all + c[k].all })
        };
        [sum(0).rate(), sum(1).rate(), sum(2).rate()]
    }

    fn assert_rates(what: &str, rates: [f64; 3], least: f64) {
        println!("{what}: objects {:.4}, relations {:.4}, nothing else {:.4}", rates[0], rates[1], rates[2]);
        assert!(rates.iter().all(|r| *r >= least), "{what}: {rates:?}");
    }

    #[test]
    fn clean_renders_are_read_right() {
        assert_rates("clean", rates(300, |image, _| image), 0.99);
    }

    #[test]
    fn noise_blur_and_jpeg_are_seen_through() {
        assert_rates("noise", rates(300, |image, rng| noisy(&image, 10.0, rng)), 0.97);
        assert_rates("blur", rates(300, |image, _| image::imageops::blur(&image, 1.5)), 0.97);
        assert_rates("jpeg", rates(300, |image, _| through_jpeg(&image, 50)), 0.97);
        let all =
            |image: RgbImage, rng: &mut Stream| through_jpeg(&noisy(&image::imageops::blur(&image, 1.0), 6.0, rng), 70);
        assert_rates("all three", rates(300, all), 0.97);
    }

    #[test]
    fn the_seam_between_two_colours_is_no_third_object() {
        use crate::scene::tabletop::world::{Background, Item, Shape};
        let item = |colour, size, x, y, radius, depth| Item { shape: Shape::Cube, colour, size, x, y, radius, depth };
        let scene = Scene {
            background: Background { rgb: [222.0, 222.0, 230.0], slope: [0.0, -5.0] },
            items: vec![
                item(Colour::Purple, Size::Large, 44.0, 96.0, 21.0, 0),
                item(Colour::Red, Size::Small, 39.0, 113.0, 11.5, 1),
            ],
        };
        for sigma in [0.5, 1.0, 1.5, 2.0] {
            let reading = read(&image::imageops::blur(&render(&scene), sigma));
            assert!(reading.view.objects.len() == 2 && reading.unclear == 0, "{sigma}: {reading:?}");
            let red = reading.view.objects.iter().position(|o| o.colour == Colour::Red).unwrap();
            assert_eq!(reading.view.in_front, [(red, 1 - red)]);
        }
    }

    #[test]
    fn other_pictures_and_sizes_are_read_without_fuss() {
        for (w, h) in [(1, 1), (3, 200), (256, 256), (500, 40)] {
            for value in [0, 90, 255] {
                let _ = read(&RgbImage::from_pixel(w, h, image::Rgb([value, 255 - value, value])));
            }
        }
        let rng = &mut Stream::new(1, "static", 0);
        let _ = read(&RgbImage::from_fn(128, 128, |_, _| image::Rgb(std::array::from_fn(|_| rng.below(256) as u8))));
        let (scene, graph) = sample::draw(&mut Stream::new(3, "doubled", 0), Split::Train, 2, 2);
        let doubled = image::imageops::resize(&render(&scene), 256, 256, image::imageops::FilterType::CatmullRom);
        assert!(judge(&doubled, &graph).perfect());
    }

    #[test]
    fn a_render_is_near_a_render_and_a_broken_picture_is_not() {
        let mut near: Vec<f64> = Vec::new();
        for index in 0..40 {
            let (scene, _) = sample::draw(&mut Stream::new(9, "distance", index), Split::Train, 1, 3);
            let image = render(&scene);
            let distance = read(&image).render_distance(&image);
            near.push(distance);
            // Holes all over the first object.
            let mut broken = image.clone();
            for (x, y, pixel) in broken.enumerate_pixels_mut() {
                let within = scene.items[0].distance(x as f32, y as f32) < 0.0;
                if within && (x / 3 + y / 3) % 2 == 0 {
                    *pixel = image::Rgb([230, 230, 230]);
                }
            }
            assert!(read(&broken).render_distance(&broken) > distance + 0.01, "scene {index}: {distance}");
        }
        near.sort_by(f64::total_cmp);
        assert!(near[20] < 0.02 && near[38] < 0.06, "median {}, 95% {}", near[20], near[38]);
    }
}
