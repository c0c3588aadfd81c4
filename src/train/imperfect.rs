//! Pictures such as a network draws, made of renders: things between two sizes or at the edge of a relation, things that touch
//! or melt into one another, are bent, half gone or half something else. Renders are clear about everything, and pictures that
//! were drawn are few; of these there is no end, and the oracle reads them by the rules that it reads all pictures by.

use super::drawn::Drawn;
use crate::{
    scene::tabletop::{
        caption::{Style, caption},
        oracle,
        render::render,
        sample,
        split::Split,
        tasks,
        world::{Item, SIDE, Scene},
    },
    tensor::rng::Stream,
};
use image::{Rgb, RgbImage, imageops::interpolate_bilinear};

/// Share of the pictures in which two things touch: what a network is least clear about.
const TOUCHING: f64 = 0.6;

/// Picture `index`, with a prompt that it may not meet.
pub fn imperfect(seed: u64, index: u64, objects: usize) -> Drawn {
    let rng = &mut Stream::new(seed, "imperfect picture", index);
    // One thing alone teaches little.
    let edits = rng.below(3);
    let (scene, graph) = sample::draw_touching(rng, Split::Train, objects.min(2), objects, TOUCHING);
    let mut scene = tasks::disturbed(rng, Split::Train, scene, edits);
    jostle(rng, &mut scene);
    let mut picture = render(&scene);
    if rng.chance(0.5)
        && let Some((seam, other)) = melted(rng, &scene)
    {
        picture = mixed(rng, &picture, seam, &render(&other));
    }
    if rng.chance(0.4)
        && let Some(other) = tasks::neighbour(rng, &scene)
    {
        let centre = if scene.items.is_empty() { (0.0, 0.0) } else { place(rng.choose(&scene.items)) };
        let shift = rng.normals(2);
        let spot = (centre.0 + 8.0 * shift[0], centre.1 + 8.0 * shift[1]);
        picture = mixed(rng, &picture, spot, &render(&other));
    }
    if rng.chance(0.5) {
        picture = bent(rng, &picture);
    }
    let (prompt, reading) = (caption(rng, &graph, Style::Natural), oracle::read(&picture));
    Drawn { picture, prompt, graph, reading, scene: None }
}

/// Moves and scales things with no regard to what is clear.
fn jostle(rng: &mut Stream, scene: &mut Scene) {
    for item in &mut scene.items {
        if rng.chance(0.5) {
            let shift = rng.normals(2);
            let on_table = |at: f32| at.clamp(8.0, SIDE as f32 - 8.0);
            (item.x, item.y) = (on_table(item.x + 5.0 * shift[0]), on_table(item.y + 5.0 * shift[1]));
        }
        if rng.chance(0.4) {
            item.radius *= rng.range(0.8, 1.25) as f32;
        }
    }
}

fn place(item: &Item) -> (f32, f32) {
    (item.x, item.y)
}

/// Where two things of the scene meet, and the scene with the one in front that was behind, with one in the other's colour, or
/// with one of the two gone: shown around their seam, it makes them one.
fn melted(rng: &mut Stream, scene: &Scene) -> Option<((f32, f32), Scene)> {
    let n = scene.items.len();
    let meet = |&(a, b): &(usize, usize)| scene.items[a].bounding_box().gap(&scene.items[b].bounding_box()) < 0.0;
    let pairs: Vec<(usize, usize)> =
        (0..n).flat_map(|a| (0..n).map(move |b| (a, b))).filter(|(a, b)| a != b).filter(meet).collect();
    if pairs.is_empty() {
        return None;
    }
    let (a, b) = *rng.choose(&pairs);
    let (first, second) = (&scene.items[a], &scene.items[b]);
    // Nearer to the smaller one, as its outline is.
    let share = first.radius / (first.radius + second.radius);
    let seam = (first.x + share * (second.x - first.x), first.y + share * (second.y - first.y));
    let mut other = scene.clone();
    match rng.below(3) {
        0 => (other.items[a].depth, other.items[b].depth) = (second.depth, first.depth),
        1 => other.items[a].colour = second.colour,
        _ => drop(other.items.remove(a)),
    }
    sample::trainable(&other).then_some((seam, other))
}

/// The picture with a soft round spot about `(x, y)` in which `other` shows, or shines through.
fn mixed(rng: &mut Stream, picture: &RgbImage, (x, y): (f32, f32), other: &RgbImage) -> RgbImage {
    let (radius, softness) = (rng.range(5.0, 28.0) as f32, rng.range(1.0, 8.0) as f32);
    let strength = if rng.chance(0.6) { 1.0 } else { rng.range(0.3, 1.0) as f32 };
    RgbImage::from_fn(SIDE, SIDE, |column, row| {
        let distance = (column as f32 + 0.5 - x).hypot(row as f32 + 0.5 - y);
        let share = strength * ((radius - distance) / softness + 0.5).clamp(0.0, 1.0);
        let (a, b) = (picture.get_pixel(column, row), other.get_pixel(column, row));
        Rgb([0, 1, 2].map(|c| (f32::from(a[c]) + share * (f32::from(b[c]) - f32::from(a[c]))).round() as u8))
    })
}

/// The picture with its lines bent, by a wave along each axis.
fn bent(rng: &mut Stream, picture: &RgbImage) -> RgbImage {
    let mut wave = || {
        let (amplitude, length) = (rng.range(0.5, 2.5) as f32, rng.range(18.0, 70.0) as f32);
        let (angle, phase) = (rng.range(0.0, std::f64::consts::TAU) as f32, rng.range(0.0, 7.0) as f32);
        let (sin, cos) = angle.sin_cos();
        move |x: f32, y: f32| amplitude * ((x * cos + y * sin) * std::f32::consts::TAU / length + phase).sin()
    };
    let (right, down) = (wave(), wave());
    let last = SIDE as f32 - 1.0;
    RgbImage::from_fn(SIDE, SIDE, |column, row| {
        let (x, y) = (column as f32, row as f32);
        let from = [x + right(x, y), y + down(x, y)].map(|at| at.clamp(0.0, last));
        interpolate_bilinear(picture, from[0], from[1]).unwrap_or_else(|| *picture.get_pixel(column, row))
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::scene::parse::parse;

    #[test]
    fn they_are_unclear_in_every_way_and_are_what_the_oracle_reads() {
        let all: Vec<Drawn> = (0..200).map(|i| imperfect(0, i, 3)).collect();
        let share = |of: &dyn Fn(&Drawn) -> bool| all.iter().filter(|d| of(d)).count() as f64 / all.len() as f64;
        let (mut ambiguous, mut between) = (0, 0);
        for Drawn { reading, .. } in &all {
            let n = reading.view.objects.len();
            let unclear = |(a, b)| !reading.view.unambiguous(a, b, sample::MARGIN);
            ambiguous += usize::from((0..n).flat_map(|a| (0..a).map(move |b| (a, b))).any(unclear));
            between += usize::from(reading.scene.items.iter().any(|item| (13.5..18.5).contains(&item.radius)));
        }
        assert!(ambiguous >= 10 && between >= 30, "{ambiguous} {between}");
        let (broken, poor) =
            (share(&|d| d.reading.unclear > 0), share(&|d| d.reading.fit.iter().any(|fit| *fit < 0.85)));
        assert!((0.005..0.4).contains(&broken) && (0.1..0.8).contains(&poor), "{broken} {poor}");
        let right = share(&|d| d.reading.judge(&d.graph).perfect());
        assert!((0.1..0.5).contains(&right), "{right}");
        for drawn in &all {
            assert_eq!(parse(&drawn.prompt).unwrap().canonical(), drawn.graph.canonical());
            assert!(sample::admissible(Split::Train, &drawn.graph));
        }
        assert_eq!(imperfect(0, 7, 3).picture, all[7].picture);
        assert_eq!(imperfect(0, 7, 3).reading.judge(&all[7].graph), oracle::judge(&all[7].picture, &all[7].graph));
    }
}
