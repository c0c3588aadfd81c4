//! Explaining a patch by an outline: shape, place and radius of greatest overlap.
//!
//! The score is intersection over union of outline and patch; outline pixels where another colour is seen count little
//! either way, since something may lie in front there. Each shape is started from the patch's box (pushed against its
//! sides if the box is too small in one direction, as it is when a part is hidden) and refined by coordinate descent.

use super::{
    segment::Patch,
    shapes,
    world::{SIDE, Shape},
};
use crate::scene::relation::BoundingBox;

const N: i32 = SIDE as i32;
/// What a hidden pixel of the outline adds to the union.
const HIDDEN: f32 = 0.15;
/// Radii that are tried, in pixels.
const RADII: (f32, f32) = (6.0, 30.0);

/// An outline and how well it explains a patch.
#[derive(Debug, Clone, Copy)]
pub struct Fit {
    pub shape: Shape,
    pub x: f32,
    pub y: f32,
    pub radius: f32,
    pub score: f32,
}

impl Fit {
    pub fn bounding_box(&self) -> BoundingBox {
        let (w, h) = shapes::half_extent(self.shape);
        let (w, h) = (w * self.radius, h * self.radius);
        BoundingBox { x0: self.x - w, y0: self.y - h, x1: self.x + w, y1: self.y + h }
    }

    pub fn distance(&self, x: f32, y: f32) -> f32 {
        self.radius * shapes::distance(self.shape, (x - self.x) / self.radius, (y - self.y) / self.radius)
    }
}

/// What the outlines are compared with.
struct Target<'a> {
    own: Vec<bool>,
    area: [f32; 2],
    hiding: &'a [bool],
}

impl Target<'_> {
    /// Scores an outline on every pixel, or on every second one along both axes.
    fn score(&self, fit: &Fit, coarse: bool) -> f32 {
        let step = if coarse { 2 } else { 1 };
        let b = fit.bounding_box();
        let start = |v: f32| (v.floor() as i32).max(0) / step * step;
        let (mut within, mut hit, mut hidden) = (0u32, 0u32, 0u32);
        let mut y = start(b.y0);
        while y < (b.y1.ceil() as i32).min(N) {
            let mut x = start(b.x0);
            while x < (b.x1.ceil() as i32).min(N) {
                if fit.distance(x as f32 + 0.5, y as f32 + 0.5) < 0.0 {
                    let i = (y * N + x) as usize;
                    within += 1;
                    hit += u32::from(self.own[i]);
                    hidden += u32::from(self.hiding[i]);
                }
                x += step;
            }
            y += step;
        }
        let (within, hit, hidden) = (within as f32, hit as f32, hidden as f32);
        if hidden > 0.6 * within {
            return 0.0;
        }
        hit / (within - (1.0 - HIDDEN) * hidden + self.area[usize::from(coarse)] - hit).max(1.0)
    }

    /// Coordinate descent from `fit`, with steps of these sizes in pixels.
    fn refine(&self, mut fit: Fit, steps: &[f32], coarse: bool) -> Fit {
        fit.score = self.score(&fit, coarse);
        for &step in steps {
            for _ in 0..6 {
                let before = fit.score;
                for (dx, dy, dr) in [
                    (step, 0.0, 0.0),
                    (-step, 0.0, 0.0),
                    (0.0, step, 0.0),
                    (0.0, -step, 0.0),
                    (0.0, 0.0, step),
                    (0.0, 0.0, -step),
                ] {
                    let mut moved = Fit { x: fit.x + dx, y: fit.y + dy, radius: fit.radius + dr, ..fit };
                    if moved.radius >= RADII.0 && moved.radius <= RADII.1 {
                        moved.score = self.score(&moved, coarse);
                        if moved.score > fit.score {
                            fit = moved;
                        }
                    }
                }
                if fit.score <= before {
                    break;
                }
            }
        }
        fit
    }
}

/// The outline that explains the patch best, where `hiding` tells the pixels of other colours.
pub fn fit(patch: &Patch, hiding: &[bool]) -> Fit {
    let mut own = vec![false; (N * N) as usize];
    for &p in &patch.pixels {
        own[p as usize] = true;
    }
    let even = patch.pixels.iter().filter(|&&p| p.is_multiple_of(2) && (p / SIDE).is_multiple_of(2)).count();
    let target = Target { own, area: [patch.pixels.len() as f32, even as f32], hiding };
    let mut shapes: Vec<Fit> = Shape::ALL
        .iter()
        .filter_map(|&shape| {
            let started = starts(shape, &patch.bounds).into_iter().map(|mut fit| {
                fit.score = target.score(&fit, true);
                fit
            });
            let mut started: Vec<Fit> = started.collect();
            started.sort_by(|a, b| b.score.total_cmp(&a.score));
            started.truncate(2);
            let refined = started.into_iter().map(|fit| target.refine(fit, &[2.0, 1.0], true));
            refined.max_by(|a, b| a.score.total_cmp(&b.score))
        })
        .collect();
    shapes.sort_by(|a, b| b.score.total_cmp(&a.score));
    let enough = shapes[0].score - 0.15;
    let fine = shapes.into_iter().filter(|f| f.score >= enough).map(|f| target.refine(f, &[1.0, 0.5], false));
    let nothing = Fit { shape: Shape::Ball, x: 0.0, y: 0.0, radius: RADII.0, score: 0.0 };
    fine.fold(nothing, |best, fit| if fit.score > best.score { fit } else { best })
}

/// Where to start: the outline at the larger of the two sizes the box allows, centred or against the box's sides.
fn starts(shape: Shape, b: &BoundingBox) -> Vec<Fit> {
    let (w, h) = shapes::half_extent(shape);
    let (across, down) = (b.width() / (2.0 * w), b.height() / (2.0 * h));
    let (cx, cy) = b.centre();
    let mut out = Vec::new();
    for radius in [across.max(down), across.min(down), (across + down) / 2.0] {
        let radius = radius.clamp(RADII.0, RADII.1);
        let spare = |half: f32, extent: f32| (half * radius - extent / 2.0).abs();
        let (sx, sy) = (spare(w, b.width()), spare(h, b.height()));
        for dx in if sx > 1.5 { vec![-sx, 0.0, sx] } else { vec![0.0] } {
            for dy in if sy > 1.5 { vec![-sy, 0.0, sy] } else { vec![0.0] } {
                out.push(Fit { shape, x: cx + dx, y: cy + dy, radius, score: 0.0 });
            }
        }
    }
    out
}
