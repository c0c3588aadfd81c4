//! The transformer's velocity as a field that the samplers can follow: text, reference pictures and guidance bound to it.

use super::{sampler::Velocity, watch::Progress};
use crate::models::flux2::{Angles, Conditioning, Flux2, image_positions, text_positions};
use anyhow::{Result, ensure};
use candle_core::{DType, Device, Tensor};
use std::{
    ops::Range,
    sync::atomic::{AtomicU64, Ordering},
};

/// `(C, h, w)` latents as `(h w, C)` tokens, row by row.
pub fn pack(latents: &Tensor) -> candle_core::Result<Tensor> {
    latents.flatten_from(1)?.t()?.contiguous()
}

/// The inverse of [`pack`].
pub fn unpack(tokens: &Tensor, height: usize, width: usize) -> candle_core::Result<Tensor> {
    let channels = tokens.dim(1)?;
    tokens.t()?.contiguous()?.reshape((channels, height, width))
}

/// What the pictures of a batch are drawn from. All of a batch have one size, and references of the same sizes.
pub struct Given<'a> {
    /// The prompt embedding of each picture, `(L, D)`.
    pub text: &'a [Tensor],
    /// The embedding that guidance leads away from, and its strength `g`: `v = v_negative + g (v_text - v_negative)`.
    pub guidance: Option<(&'a Tensor, f64)>,
    /// The reference pictures' latents, `(C, h, w)` each: for every picture of the batch the same number of them.
    pub references: &'a [Vec<Tensor>],
    /// Height and width of the pictures in tokens.
    pub size: (usize, usize),
}

/// A velocity field over states of `(B, h w, C)`.
///
/// Both branches of guidance run as one batch, or one after another ([`Field::apart`]). The negative one is detached, as
/// reinforcement learning asks for. The tokens
/// of references follow those of the picture at every evaluation, with their own rotary positions; only the picture's tokens
/// of the output count.
pub struct Field<'a> {
    transformer: &'a Flux2,
    dtype: DType,
    /// `(R, L, D)` and `(R, M, C)`: the `B` rows with the prompt, then, if guided, as many with the negative one.
    text: Tensor,
    references: Option<Tensor>,
    angles: Angles,
    guidance: Option<f64>,
    /// Who evaluates the negative branch of guidance by itself.
    apart: Option<&'a Flux2>,
    /// Evaluations of the network, counted for each row.
    evaluations: &'a AtomicU64,
    progress: Option<&'a Progress<'a>>,
}

impl<'a> Field<'a> {
    /// `dtype` is what the network computes in.
    pub fn new(
        transformer: &'a Flux2,
        (dtype, device): (DType, &Device),
        given: &Given,
        evaluations: &'a AtomicU64,
    ) -> Result<Self> {
        let Given { text, guidance, references, size: (h, w) } = *given;
        ensure!(!text.is_empty() && text.len() == references.len(), "every picture has a prompt and its references");
        let mut rows: Vec<&Tensor> = text.iter().collect();
        if let Some((negative, _)) = guidance {
            rows.extend(std::iter::repeat_n(negative, text.len()));
        }
        let length = rows[0].dim(0)?;
        let text = Tensor::stack(&rows, 0)?.to_dtype(dtype)?; // (R, L, D)

        let mut positions = text_positions(length);
        positions.extend(image_positions(0, h, w));
        for (i, reference) in references[0].iter().enumerate() {
            let (_, h, w) = reference.dims3()?;
            positions.extend(image_positions(10 * (i as u32 + 1), h, w));
        }
        let packed: Vec<Tensor> = references
            .iter()
            .filter(|r| !r.is_empty())
            .map(|r| Tensor::cat(&r.iter().map(pack).collect::<candle_core::Result<Vec<_>>>()?, 0))
            .collect::<candle_core::Result<_>>()?;
        let references = match packed.as_slice() {
            [] => None,
            _ => {
                let copies = rows.len() / packed.len();
                let rows: Vec<&Tensor> = (0..copies).flat_map(|_| &packed).collect();
                Some(Tensor::stack(&rows, 0)?.to_dtype(dtype)?) // (R, M, C)
            }
        };
        Ok(Self {
            transformer,
            dtype,
            text,
            references,
            angles: transformer.angles(&positions, device)?,
            guidance: guidance.map(|(_, strength)| strength),
            apart: None,
            evaluations,
            progress: None,
        })
    }

    /// Lets `still`, the same network without gradients, evaluate the negative branch of guidance by itself: to the same
    /// numbers, and as that branch is detached, a backward pass needs nothing of it.
    pub fn apart(self, still: &'a Flux2) -> Self {
        Self { apart: Some(still), ..self }
    }

    /// Tells `progress` of every evaluation, and fails once it is cancelled.
    pub fn watched(self, progress: &'a Progress<'a>) -> Self {
        Self { progress: Some(progress), ..self }
    }

    /// The velocity of `image (rows, N, C)` under the texts and references of these rows.
    fn evaluate(
        &self,
        transformer: &Flux2,
        image: &Tensor,
        sigma: &Tensor,
        rows: Range<usize>,
    ) -> candle_core::Result<Tensor> {
        let n = image.dim(1)?;
        let some = |all: &Tensor| all.narrow(0, rows.start, rows.len());
        let image = match &self.references {
            Some(references) => Tensor::cat(&[image, &some(references)?], 1)?, // (rows, N + M, C)
            None => image.clone(),
        };
        let given = Conditioning { text: &some(&self.text)?, sigma, guidance: None, angles: &self.angles };
        let drawn = transformer.forward_drawn(&image, &given, n);
        let (v, _) = drawn.map_err(|e| candle_core::Error::wrap(format!("{e:#}")))?;
        self.evaluations.fetch_add(rows.len() as u64, Ordering::Relaxed);
        v.to_dtype(DType::F32)
    }
}

impl Velocity for Field<'_> {
    fn velocity(&self, x: &Tensor, sigma: f64, _: usize) -> candle_core::Result<Tensor> {
        if let Some(progress) = self.progress {
            progress.begin()?;
        }
        let (batch, rows) = (x.dim(0)?, self.text.dim(0)?);
        let image = x.to_dtype(self.dtype)?;
        // By way of the timestep, as the reference pipeline does: the network's angles show the rounding.
        let sigma = Tensor::full(sigma as f32 * 1000.0 / 1000.0, 1, x.device())?;
        let v = match self.guidance {
            None => self.evaluate(self.transformer, &image, &sigma, 0..rows)?,
            Some(strength) => {
                let (text, negative) = match self.apart {
                    Some(still) => {
                        let negative = self.evaluate(still, &image, &sigma, batch..rows)?.detach();
                        (self.evaluate(self.transformer, &image, &sigma, 0..batch)?, negative)
                    }
                    None => {
                        let both = Tensor::cat(&[&image, &image], 0)?;
                        let both = self.evaluate(self.transformer, &both, &sigma, 0..rows)?; // (R, N, C)
                        (both.narrow(0, 0, batch)?, both.narrow(0, batch, batch)?.detach())
                    }
                };
                ((text * strength)? + (negative * (1.0 - strength))?)?
            }
        };
        if let Some(progress) = self.progress {
            progress.end();
        }
        Ok(v)
    }
}
