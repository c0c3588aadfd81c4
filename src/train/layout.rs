//! Where each object lies, told to the Diffuser's middle while it learns.
//!
//! The velocity's error is mostly that of noise, and objects cover a tenth of the picture: which object lies where is a
//! faint signal in it. So a linear head reads from the transformer's hidden image tokens what lies in each cell of the
//! *clean* picture. It is dropped from the saved model. In the spirit of REPA (arXiv 2410.06940), which aligns hidden
//! tokens with the features of a pretrained encoder; the features here are the world's own labels.

use crate::{
    models::{Init, Linear, Params},
    scene::tabletop::world::{Colour, SIDE, Scene, Shape, Size},
    tensor::{cross_entropy, rms_norm},
};
use anyhow::{Result, bail};
use candle_core::Tensor;
use rayon::prelude::*;

/// Width and height of a cell in pixels.
const CELL: usize = 4;
/// For each cell: a shape, a colour and a size, or none of each.
const CLASSES: [usize; 3] = [Shape::ALL.len() + 1, Colour::ALL.len() + 1, Size::ALL.len() + 1];

/// Shapes, colours and sizes, each of every cell of some pictures.
pub struct Labels([Vec<u32>; 3]);

pub struct LayoutHead {
    norm: Tensor,
    out: Linear,
    /// Cells along a token's side.
    cells: usize,
}

impl LayoutHead {
    /// A head over tokens of width `dim`, each of which stands for `token x token` pixels.
    pub fn new(dim: usize, token: usize, params: &Params) -> Result<Self> {
        if !token.is_multiple_of(CELL) {
            bail!("a token of this autoencoder is {token} pixels wide, and the layout loss needs a multiple of {CELL}");
        }
        let cells = token / CELL;
        let outputs = cells * cells * CLASSES.iter().sum::<usize>();
        Ok(Self {
            norm: params.at("norm").get("weight", &[dim], Init::Ones)?,
            out: Linear::with(dim, outputs, true, Init::Zeros, &params.at("proj_out"))?,
            cells,
        })
    }

    /// The cross entropy of what lies in the cells of each token, summed over the three labels, `(B, N)`, given hidden
    /// image tokens `(B, N, D)` in rows.
    pub fn losses(&self, tokens: &Tensor, labels: &Labels) -> Result<Tensor> {
        let (b, n, _) = tokens.dims3()?;
        let logits = self.out.forward(&rms_norm(tokens, &self.norm, 1e-6)?)?;
        let logits = logits.reshape(((), CLASSES.iter().sum::<usize>()))?;
        let (mut start, mut total) = (0, Tensor::zeros(logits.dim(0)?, logits.dtype(), tokens.device())?);
        for (classes, labels) in CLASSES.into_iter().zip(&labels.0) {
            let targets = Tensor::from_slice(labels, labels.len(), tokens.device())?;
            total = (total + cross_entropy(&logits.narrow(1, start, classes)?, &targets)?)?;
            start += classes;
        }
        Ok(total.reshape((b, n, ()))?.mean(2)?)
    }

    /// For each token of each scene 1 if two things overlap in it, else 0.
    pub fn overlaps(&self, scenes: &[&Scene]) -> Vec<f32> {
        let cells = self.cells * self.cells;
        let of = |scene: &&Scene| {
            let covered: Vec<bool> = self
                .centres()
                .map(|(x, y)| scene.items.iter().filter(|i| i.distance(x, y) < 0.0).count() > 1)
                .collect();
            let token = |cells: &[bool]| f32::from(u8::from(cells.contains(&true)));
            covered.chunks(cells).map(token).collect::<Vec<_>>()
        };
        scenes.par_iter().flat_map_iter(of).collect()
    }

    /// The centres of all cells, token by token.
    fn centres(&self) -> impl Iterator<Item = (f32, f32)> + '_ {
        let (cells, tokens) = (self.cells, SIDE as usize / (self.cells * CELL));
        let at = move |token: usize, cell: usize| ((token * cells + cell) * CELL) as f32 + CELL as f32 / 2.0;
        let places = (0..tokens * tokens).flat_map(move |token| (0..cells * cells).map(move |cell| (token, cell)));
        places.map(move |(token, cell)| (at(token % tokens, cell % cells), at(token / tokens, cell / cells)))
    }

    /// What lies in the cells of each scene.
    pub fn labels(&self, scenes: &[&Scene]) -> Labels {
        let all: Vec<[u32; 3]> = scenes.par_iter().flat_map_iter(|scene| self.labels_of(scene)).collect();
        Labels([0, 1, 2].map(|i| all.iter().map(|labels| labels[i]).collect()))
    }

    /// Shape, colour and size at the centre of each cell, token by token; 0 is none.
    fn labels_of(&self, scene: &Scene) -> Vec<[u32; 3]> {
        let order = scene.painting_order();
        let seen = |(x, y): (f32, f32)| {
            let front = order.iter().rev().map(|&i| &scene.items[i]).find(|item| item.distance(x, y) < 0.0);
            front.map_or([0; 3], |i| [i.shape as u32 + 1, i.colour as u32 + 1, i.size as u32 + 1])
        };
        self.centres().map(seen).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        scene::tabletop::{sample, split::Split, world::Item},
        tensor::rng::Stream,
    };
    use candle_core::{DType, Device};

    #[test]
    fn labels_are_those_of_the_pixels_below() {
        let head = LayoutHead::new(8, 16, &Params::fresh(0, DType::F32, &Device::Cpu)).unwrap();
        let (scene, _) = sample::draw(&mut Stream::new(1, "layout", 0), Split::Train, 3, 3);
        let labels = head.labels_of(&scene);
        assert_eq!(labels.len(), 32 * 32);
        for item in &scene.items {
            // Solid somewhere: the share of cells with its colour is about its area.
            let own = [item.shape as u32 + 1, item.colour as u32 + 1, item.size as u32 + 1];
            let area = labels.iter().filter(|l| **l == own).count() * CELL * CELL;
            let visible = (0..SIDE * SIDE).filter(|p| {
                let (x, y) = ((p % SIDE) as f32 + 0.5, (p / SIDE) as f32 + 0.5);
                let hidden = scene.items.iter().any(|o| o.depth > item.depth && o.distance(x, y) < 0.0);
                item.distance(x, y) < 0.0 && !hidden
            });
            let visible = visible.count();
            assert!(
                (area as f64 - visible as f64).abs() < 0.25 * visible as f64 + 48.0,
                "{area} of {visible}: {item:?}"
            );
        }
        // The first token's cells come first, row by row: a cell's label is that of its own place.
        let (token, cell) = (19, 6); // x 3, y 2; x 2, y 1
        let (x, y) = ((3 * 4 + 2) as f32 * 4.0 + 2.0, (2 * 4 + 1) as f32 * 4.0 + 2.0);
        let covered = scene.items.iter().any(|i| i.distance(x, y) < 0.0);
        assert_eq!(labels[token * 16 + cell] != [0; 3], covered);
    }

    #[test]
    fn tokens_that_cut_cells_are_an_error() {
        let head = |token| LayoutHead::new(8, token, &Params::fresh(0, DType::F32, &Device::Cpu));
        assert!(head(2).is_err() && head(6).is_err() && head(8).is_ok());
    }

    #[test]
    fn an_untrained_head_knows_nothing() {
        let head = LayoutHead::new(8, 16, &Params::fresh(0, DType::F32, &Device::Cpu)).unwrap();
        let (scene, _) = sample::draw(&mut Stream::new(1, "layout", 0), Split::Train, 2, 2);
        let tokens = Tensor::randn(0f32, 1.0, (1, 64, 8), &Device::Cpu).unwrap();
        let loss = head.losses(&tokens, &head.labels(&[&scene])).unwrap();
        assert_eq!(loss.dims(), [1, 64]);
        let expected: f64 = CLASSES.iter().map(|c| (*c as f64).ln()).sum();
        assert!(loss.to_vec2::<f32>().unwrap()[0].iter().all(|l| (f64::from(*l) - expected).abs() < 1e-4));
    }

    #[test]
    fn things_overlap_where_one_hides_the_other() {
        let head = LayoutHead::new(8, 16, &Params::fresh(0, DType::F32, &Device::Cpu)).unwrap();
        let item = |x: f32, depth| Item {
            shape: Shape::Ball,
            colour: if depth == 0 { Colour::Red } else { Colour::Blue },
            size: Size::Large,
            x,
            y: 40.0,
            radius: 20.0,
            depth,
        };
        let (mut scene, _) = sample::draw(&mut Stream::new(1, "layout", 0), Split::Train, 1, 1);
        scene.items = vec![item(40.0, 0), item(60.0, 1)];
        let overlaps = head.overlaps(&[&scene]);
        // Both cover (50, 40) in the token of column 3, row 2, and nothing is at (10, 10).
        assert_eq!((overlaps.len(), overlaps[2 * 8 + 3], overlaps[0]), (64, 1.0, 0.0));
        scene.items[1].x = 100.0;
        assert!(head.overlaps(&[&scene]).iter().all(|o| *o == 0.0));
    }
}
