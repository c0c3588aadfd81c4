//! Naming pixels: the table, or one of the eight colours.
//!
//! The table is a plane of light fitted to the picture's pale pixels. Against it a pixel has a tint: its hue names the
//! colour, and its chroma, as a part of that colour's own, says whether the object covers most of the pixel. Black is
//! what is dark and has no tint. Shading and highlights change neither hue nor, by much, that part.

use super::world::{Background, Colour, SIDE};
use crate::scene::relation::BoundingBox;
use image::RgbImage;

const N: usize = SIDE as usize;
/// The part of a colour's chroma from which on a pixel belongs to the object.
const COVERED: f32 = 0.4;
/// The part of the table's light below which an untinted pixel is black; the darkest shadow stays above.
const DARK: f32 = 0.56;
/// Patches with fewer pixels are not looked at.
const SMALLEST: usize = 30;

/// Connected pixels of one colour.
#[derive(Debug, Clone)]
pub struct Patch {
    pub colour: Colour,
    /// Indices `y * 128 + x`.
    pub pixels: Vec<u32>,
    pub bounds: BoundingBox,
}

impl Patch {
    fn new(colour: Colour, pixels: Vec<u32>) -> Self {
        let mut bounds = BoundingBox { x0: f32::MAX, y0: f32::MAX, x1: 0.0, y1: 0.0 };
        for &p in &pixels {
            let (x, y) = ((p as usize % N) as f32, (p as usize / N) as f32);
            bounds.x0 = bounds.x0.min(x);
            bounds.y0 = bounds.y0.min(y);
            bounds.x1 = bounds.x1.max(x + 1.0);
            bounds.y1 = bounds.y1.max(y + 1.0);
        }
        Self { colour, pixels, bounds }
    }

    pub fn join(&self, other: &Self) -> Self {
        Self::new(self.colour, [self.pixels.as_slice(), &other.pixels].concat())
    }
}

/// Every pixel's name, and the patches they form.
pub struct Segmentation {
    labels: Vec<Option<Colour>>,
    pub patches: Vec<Patch>,
    pub background: Background,
}

impl Segmentation {
    pub fn label(&self, x: u32, y: u32) -> Option<Colour> {
        self.labels[y as usize * N + x as usize]
    }

    /// Pixels of other colours than this one: there, something else may hide a part of an object.
    pub fn hiding(&self, colour: Colour) -> Vec<bool> {
        self.labels.iter().map(|l| l.is_some_and(|l| l != colour)).collect()
    }
}

/// Names the pixels of a 128 x 128 picture and gathers its patches.
pub fn segment(image: &RgbImage) -> Segmentation {
    let pixels = smooth(image);
    let table = fit_table(&pixels);
    let named: Vec<Option<Colour>> =
        pixels.iter().enumerate().map(|(i, p)| name(*p, at_table(&table, i % N, i / N))).collect();
    let mut labels = majority(&named);
    let mut patches = patches(&labels);
    // Where one thing lies over another, blur mixes their colours into the hue of a third.
    let halos: Vec<&Patch> = patches.iter().filter(|p| is_halo(p, &labels)).collect();
    if !halos.is_empty() {
        labels = without(&halos, &labels);
        patches = self::patches(&labels);
    }
    for patch in patches.iter().filter(|p| p.pixels.len() < SMALLEST) {
        for &p in &patch.pixels {
            labels[p as usize] = None;
        }
    }
    patches.retain(|p| p.pixels.len() >= SMALLEST);
    let slope = |axis: usize| table.iter().map(|channel| channel[axis]).sum::<f32>() / 3.0;
    let background = Background { rgb: table.map(|channel| channel[0]), slope: [slope(1), slope(2)] };
    Segmentation { labels, patches, background }
}

/// A light blur against noise: 1 2 1 along both axes.
fn smooth(image: &RgbImage) -> Vec<[f32; 3]> {
    let raw: Vec<[f32; 3]> = image.pixels().map(|p| p.0.map(f32::from)).collect();
    let pass = |source: &[[f32; 3]], dx: usize, dy: usize| -> Vec<[f32; 3]> {
        let at = |x: usize, y: usize| source[y.min(N - 1) * N + x.min(N - 1)];
        let mix = |i: usize| {
            let (x, y) = (i % N, i / N);
            let (a, b, c) = (at(x.saturating_sub(dx), y.saturating_sub(dy)), at(x, y), at(x + dx, y + dy));
            std::array::from_fn(|k| (a[k] + 2.0 * b[k] + c[k]) / 4.0)
        };
        (0..N * N).map(mix).collect()
    };
    pass(&pass(&raw, 1, 0), 0, 1)
}

/// For each channel: light at the centre, slope to the right, slope downwards.
type Table = [[f32; 3]; 3];

fn centred(i: usize) -> f32 {
    (2.0 * i as f32 + 1.0) / N as f32 - 1.0
}

fn at_table(table: &Table, x: usize, y: usize) -> [f32; 3] {
    table.map(|[c, sx, sy]| (c + sx * centred(x) + sy * centred(y)).clamp(96.0, 255.0))
}

/// Least squares over pale pixels, then again over those near the first fit (without shadows).
fn fit_table(pixels: &[[f32; 3]]) -> Table {
    let pale = |p: &[f32; 3]| {
        let (high, low) = (p[0].max(p[1]).max(p[2]), p[0].min(p[1]).min(p[2]));
        high - low < 40.0 && high > 150.0
    };
    let mut table = least_squares(pixels, |_, p| pale(p)).unwrap_or([[232.0, 0.0, 0.0]; 3]);
    for bound in [24.0, 10.0] {
        let near = |i: usize, p: &[f32; 3]| {
            let expected = at_table(&table, i % N, i / N);
            pale(p) && p.iter().zip(expected).all(|(v, e)| (v - e).abs() < bound)
        };
        if let Some(better) = least_squares(pixels, near) {
            table = better;
        }
    }
    table
}

fn least_squares(pixels: &[[f32; 3]], keep: impl Fn(usize, &[f32; 3]) -> bool) -> Option<Table> {
    let (mut a, mut b) = ([[0f64; 3]; 3], [[0f64; 3]; 3]);
    let mut count = 0;
    for (i, p) in pixels.iter().enumerate().filter(|(i, p)| keep(*i, p)) {
        let basis = [1.0, f64::from(centred(i % N)), f64::from(centred(i / N))];
        for r in 0..3 {
            for c in 0..3 {
                a[r][c] += basis[r] * basis[c];
                // One right-hand side for each channel.
                b[r][c] += basis[r] * f64::from(p[c]);
            }
        }
        count += 1;
    }
    if count < N {
        return None;
    }
    // Gauss-Jordan; the matrix is positive definite.
    for k in 0..3 {
        let pivot = a[k][k];
        if pivot.abs() < 1e-9 {
            return None;
        }
        for c in 0..3 {
            a[k][c] /= pivot;
            b[k][c] /= pivot;
        }
        for r in (0..3).filter(|&r| r != k) {
            let factor = a[r][k];
            for c in 0..3 {
                a[r][c] -= factor * a[k][c];
                b[r][c] -= factor * b[k][c];
            }
        }
    }
    Some(std::array::from_fn(|channel| std::array::from_fn(|r| b[r][channel] as f32)))
}

/// Hue in degrees and chroma (largest less smallest channel).
fn hue_chroma([r, g, b]: [f32; 3]) -> (f32, f32) {
    let (high, low) = (r.max(g).max(b), r.min(g).min(b));
    let chroma = high - low;
    if chroma < 1e-3 {
        return (0.0, 0.0);
    }
    let sixth = if high == r {
        (g - b) / chroma
    } else if high == g {
        2.0 + (b - r) / chroma
    } else {
        4.0 + (r - g) / chroma
    };
    ((sixth * 60.0).rem_euclid(360.0), chroma)
}

fn name(pixel: [f32; 3], table: [f32; 3]) -> Option<Colour> {
    let light = (table[0] + table[1] + table[2]) / 3.0;
    // Without the table's own tint.
    let pixel: [f32; 3] = std::array::from_fn(|k| pixel[k] * light / table[k]);
    let (hue, chroma) = hue_chroma(pixel);
    let distance = |c: Colour| {
        let d = (hue_chroma(c.rgb()).0 - hue).abs();
        d.min(360.0 - d)
    };
    let hued = Colour::ALL.iter().copied().filter(|c| *c != Colour::Black);
    let nearest = hued.min_by(|a, b| distance(*a).total_cmp(&distance(*b)))?;
    let high = pixel[0].max(pixel[1]).max(pixel[2]);
    if high < DARK * light && chroma < 0.38 * high.max(40.0) {
        return Some(Colour::Black);
    }
    (chroma > COVERED * hue_chroma(nearest.rgb()).1).then_some(nearest)
}

/// Each pixel takes the name that most of its 3 x 3 neighbours share, if more than half do.
fn majority(labels: &[Option<Colour>]) -> Vec<Option<Colour>> {
    let mut out = labels.to_vec();
    for y in 1..N - 1 {
        for x in 1..N - 1 {
            let around = (0..9).map(|k| labels[(y + k / 3 - 1) * N + x + k % 3 - 1]);
            let mut counts = [0u8; 9];
            for label in around {
                counts[label.map_or(8, |c| c as usize)] += 1;
            }
            if let Some(most) = (0..9).find(|&k| counts[k] >= 6) {
                out[y * N + x] = Colour::ALL.get(most).copied();
            }
        }
    }
    out
}

/// The labels within `reach` of pixel `i`, along both axes.
fn around(labels: &[Option<Colour>], i: usize, reach: usize) -> impl Iterator<Item = Option<Colour>> + Clone {
    let (x, y) = (i % N, i / N);
    let (xs, ys) = (x.saturating_sub(reach)..=(x + reach).min(N - 1), y.saturating_sub(reach)..=(y + reach).min(N - 1));
    ys.flat_map(move |y| xs.clone().map(move |x| labels[y * N + x]))
}

/// Whether a patch is a mere seam: hardly a pixel of it is surrounded by its own, and much of it borders other colours.
fn is_halo(patch: &Patch, labels: &[Option<Colour>]) -> bool {
    let own = Some(patch.colour);
    let (mut inner, mut bordering) = (0, 0);
    for &p in &patch.pixels {
        let mut near = around(labels, p as usize, 1);
        inner += usize::from(near.clone().all(|l| l == own));
        bordering += usize::from(near.any(|l| l.is_some() && l != own));
    }
    let n = patch.pixels.len();
    4 * inner < n && 5 * bordering > 2 * n
}

/// The labels with each seam's pixels given to the colour most common around them.
fn without(halos: &[&Patch], labels: &[Option<Colour>]) -> Vec<Option<Colour>> {
    let mut cleared = labels.to_vec();
    let seams = || halos.iter().flat_map(|h| &h.pixels).map(|&p| p as usize);
    for p in seams() {
        cleared[p] = None;
    }
    let mut out = cleared.clone();
    for p in seams() {
        let mut counts = [0usize; 8];
        for colour in around(&cleared, p, 2).flatten() {
            counts[colour as usize] += 1;
        }
        out[p] = (0..8).filter(|&c| counts[c] > 0).max_by_key(|&c| counts[c]).map(|c| Colour::ALL[c]);
    }
    out
}

/// Connected pixels of one colour, diagonals included.
fn patches(labels: &[Option<Colour>]) -> Vec<Patch> {
    let mut seen = vec![false; N * N];
    let mut found = Vec::new();
    for start in 0..N * N {
        let Some(colour) = labels[start].filter(|_| !seen[start]) else { continue };
        let mut pixels = Vec::new();
        let mut stack = vec![start];
        seen[start] = true;
        while let Some(i) = stack.pop() {
            pixels.push(i as u32);
            let (x, y) = (i % N, i / N);
            for ny in y.saturating_sub(1)..=(y + 1).min(N - 1) {
                for nx in x.saturating_sub(1)..=(x + 1).min(N - 1) {
                    let j = ny * N + nx;
                    if !seen[j] && labels[j] == Some(colour) {
                        seen[j] = true;
                        stack.push(j);
                    }
                }
            }
        }
        found.push(Patch::new(colour, pixels));
    }
    found
}
