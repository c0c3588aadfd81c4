//! The six outlines as signed distances, and how light falls on each.
//!
//! All in units of the object's radius, x to the right and y downwards, the outline's box centred on the origin. The
//! distances are exact near straight and round edges and slightly short at corners, which anti-aliasing does not
//! notice. Objects are seen a little from above: cubes, cones and cylinders show their round or square ends.

use super::world::Shape;

const CUBE: f32 = 0.88;
const CUBE_LID: f32 = 0.42;
const CONE_WIDTH: f32 = 0.98;
const RING_OUTER: f32 = 1.08;
const RING_INNER: f32 = 0.66;
const STAR_OUTER: f32 = 1.18;
const STAR_INNER: f32 = 0.56;
const CYLINDER_WIDTH: f32 = 0.64;
const CYLINDER_HEIGHT: f32 = 1.06;
const CYLINDER_CAP: f32 = 0.2;
const CONE_CAP: f32 = 0.17;
const ROUNDING: f32 = 0.05;
/// cos 36 degrees: a star's lower points lie this much nearer to its centre's height than its upper one.
const COS_36: f32 = 0.809_017;
const SIN_72: f32 = 0.951_056_5;
/// Towards the light: above, to the left, and in front.
const LIGHT: [f32; 3] = [-0.42, -0.56, 0.714];

/// Half the width and half the height of the outline's box.
pub fn half_extent(shape: Shape) -> (f32, f32) {
    match shape {
        Shape::Ball => (1.0, 1.0),
        Shape::Cube => (CUBE, CUBE),
        Shape::Cone => (CONE_WIDTH, 1.0),
        Shape::Ring => (RING_OUTER, RING_OUTER),
        Shape::Star => (STAR_OUTER * SIN_72, STAR_OUTER * (1.0 + COS_36) / 2.0),
        Shape::Cylinder => (CYLINDER_WIDTH, CYLINDER_HEIGHT),
    }
}

/// Distance of the outline's farthest point from the centre of its box.
pub fn reach(shape: Shape) -> f32 {
    match shape {
        Shape::Ball => 1.0,
        Shape::Cube => CUBE * std::f32::consts::SQRT_2 - 0.4 * ROUNDING,
        Shape::Cone => 1.29,
        Shape::Ring => RING_OUTER,
        Shape::Star => 1.28,
        Shape::Cylinder => 1.1,
    }
}

/// The hole of a ring, as a radius: what fits in there is inside.
pub const RING_HOLE: f32 = RING_INNER;

/// Signed distance from the outline, negative within.
pub fn distance(shape: Shape, x: f32, y: f32) -> f32 {
    match shape {
        Shape::Ball => x.hypot(y) - 1.0,
        Shape::Ring => (x.hypot(y) - (RING_OUTER + RING_INNER) / 2.0).abs() - (RING_OUTER - RING_INNER) / 2.0,
        Shape::Cube => {
            let (qx, qy) = (x.abs() - CUBE + ROUNDING, y.abs() - CUBE + ROUNDING);
            let square = qx.max(0.0).hypot(qy.max(0.0)) + qx.max(qy).min(0.0) - ROUNDING;
            // The lid narrows towards the back: a slanted cut off both upper corners.
            let cut = (x.abs() - CUBE) * 0.87 - (y + CUBE - CUBE_LID) * 0.36;
            square.max(cut)
        }
        Shape::Cone => {
            let base = 1.0 - CONE_CAP;
            let slant = CONE_WIDTH.hypot(1.0 + base);
            let side = (x.abs() * (1.0 + base) - (y + 1.0) * CONE_WIDTH) / slant;
            side.max(y - base - cap(x, CONE_WIDTH, CONE_CAP))
        }
        Shape::Cylinder => {
            let flat = CYLINDER_HEIGHT - CYLINDER_CAP;
            (x.abs() - CYLINDER_WIDTH).max(y.abs() - flat - cap(x, CYLINDER_WIDTH, CYLINDER_CAP))
        }
        Shape::Star => {
            let (a, r, _) = star_sector(x, y);
            star_edge(a, r) - ROUNDING * 0.6
        }
    }
}

/// Height of a flattened half circle of half-width `width` and height `height` above `x`.
fn cap(x: f32, width: f32, height: f32) -> f32 {
    height * (1.0 - (x / width).powi(2)).max(0.0).sqrt()
}

/// Folds a position onto half a point of the star: angle from the point's axis in 0..36 degrees, radius, and whether it
/// lay on the clockwise half.
fn star_sector(x: f32, y: f32) -> (f32, f32, bool) {
    const SECTOR: f32 = std::f32::consts::TAU / 5.0;
    // The box's centre lies above the star's own.
    let y = y - STAR_OUTER * (1.0 - COS_36) / 2.0;
    let angle = x.atan2(-y);
    let folded = angle - (angle / SECTOR).round() * SECTOR;
    (folded.abs(), x.hypot(y), folded > 0.0)
}

/// Signed distance from the line through a point of the star and the notch beside it.
fn star_edge(angle: f32, r: f32) -> f32 {
    const SIN_36: f32 = 0.587_785_25;
    let (px, py) = (r * angle.cos(), r * angle.sin());
    let (outer, inner) = (STAR_OUTER - ROUNDING, STAR_INNER - ROUNDING * 0.4);
    let (ex, ey) = (inner * COS_36 - outer, inner * SIN_36);
    ((px - outer) * ey - py * ex) / ex.hypot(ey)
}

/// How light falls on a position within the outline: a factor for the colour, and an amount of white to mix in. Edges
/// between faces are softened over one `pixel`.
pub fn shade(shape: Shape, x: f32, y: f32, pixel: f32) -> (f32, f32) {
    match shape {
        Shape::Ball => lit([x, y, (1.0 - x * x - y * y).max(0.0).sqrt()], 0.45),
        Shape::Ring => {
            let r = x.hypot(y).max(1e-3);
            let t = (r - (RING_OUTER + RING_INNER) / 2.0) / ((RING_OUTER - RING_INNER) / 2.0);
            let t = t.clamp(-1.0, 1.0);
            lit([x / r * t, y / r * t, (1.0 - t * t).sqrt()], 0.35)
        }
        Shape::Cube => {
            // The front is a little darker to the right and towards the table.
            let front = (0.93 - 0.07 * x - 0.06 * y, 0.0);
            blend(front, (1.1, 0.16), (CUBE_LID - CUBE - y) / pixel)
        }
        Shape::Cone => {
            let half = ((y + 1.0) / (2.0 - CONE_CAP) * CONE_WIDTH).max(0.05);
            let t = (x / half).clamp(-1.0, 1.0);
            lit([0.9 * t, -0.1, (1.0 - 0.81 * t * t).sqrt()], 0.14)
        }
        Shape::Cylinder => {
            let t = (x / CYLINDER_WIDTH).clamp(-1.0, 1.0);
            let side = lit([t, 0.0, (1.0 - t * t).max(0.0).sqrt()], 0.22);
            let lid = cap(x, CYLINDER_WIDTH, CYLINDER_CAP) - (y + CYLINDER_HEIGHT - CYLINDER_CAP).abs();
            blend(side, (1.1, 0.2), lid / pixel)
        }
        Shape::Star => {
            // Ten facets that rise to the centre, each as bright as it faces the light.
            let (_, _, clockwise) = star_sector(x, y);
            const SECTOR: f32 = std::f32::consts::TAU / 5.0;
            let cy = y - STAR_OUTER * (1.0 - COS_36) / 2.0;
            let point = (x.atan2(-cy) / SECTOR).round() * SECTOR;
            let facing = point + if clockwise { 0.9 } else { -0.9 };
            lit([0.5 * facing.sin(), -0.5 * facing.cos(), 0.866], 0.12)
        }
    }
}

/// Goes from `a` to `b` as `t`, in pixels past the edge between them, goes from -1/2 to 1/2.
fn blend(a: (f32, f32), b: (f32, f32), t: f32) -> (f32, f32) {
    let t = (t + 0.5).clamp(0.0, 1.0);
    (a.0 + (b.0 - a.0) * t, a.1 + (b.1 - a.1) * t)
}

/// Soft diffuse light with a highlight of the given strength, for a surface with this normal.
fn lit(normal: [f32; 3], gloss: f32) -> (f32, f32) {
    let diffuse = (normal[0] * LIGHT[0] + normal[1] * LIGHT[1] + normal[2] * LIGHT[2]).max(0.0);
    // The half vector between the light and the viewer.
    const HALF: [f32; 3] = [-0.227, -0.302, 0.926];
    let shine = (normal[0] * HALF[0] + normal[1] * HALF[1] + normal[2] * HALF[2]).max(0.0);
    let shine = shine * shine * shine * shine;
    let shine = shine * shine * shine * shine;
    (0.62 + 0.46 * diffuse, gloss * shine)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn outlines_fill_their_boxes() {
        for &shape in Shape::ALL {
            let (w, h) = half_extent(shape);
            let (mut x0, mut x1, mut y0, mut y1) = (9.0f32, -9.0f32, 9.0f32, -9.0f32);
            for i in -150..=150 {
                for j in -150..=150 {
                    let (x, y) = (i as f32 / 100.0, j as f32 / 100.0);
                    if distance(shape, x, y) < 0.0 {
                        (x0, x1, y0, y1) = (x0.min(x), x1.max(x), y0.min(y), y1.max(y));
                    }
                }
            }
            let error = (x0 + w).abs().max((x1 - w).abs()).max((y0 + h).abs()).max((y1 - h).abs());
            assert!(error < 0.04, "{shape:?}: {x0} {x1} {y0} {y1} against {w} {h}");
        }
    }
}
