//! The transformer's velocity as a field that the samplers can follow: text, reference pictures and guidance bound to it.

use super::{sampler::Velocity, watch::Progress};
use crate::{
    models::flux2::{Angles, Conditioning, Flux2, image_positions, text_positions},
    usage,
};
use anyhow::{Result, ensure};
use candle_core::{DType, Device, Tensor};
use serde::{Deserialize, Serialize};
use std::{
    fmt,
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

/// Strengths of classifier-free guidance (arXiv 2207.12598): by the prompt, and, where there are reference pictures, by these
/// (arXiv 2211.09800, equation 3), which keeps more of them: `v = v(-, -) + image (v(-, I) - v(-, -)) + text (v(T, I) - v(-, I))`
/// for a prompt `T`, references `I` and the negative prompt or none in their place. 1 of each is none.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Guidance {
    pub text: f64,
    pub image: f64,
}

impl Guidance {
    pub fn check(self) -> Result<()> {
        let Self { text, image } = self;
        if ![text, image].iter().all(|strength| strength.is_finite() && *strength >= 0.0) {
            usage!("strengths of guidance are numbers from 0 on, not {text} and {image}");
        }
        Ok(())
    }
}

/// By the prompt alone.
impl From<f64> for Guidance {
    fn from(text: f64) -> Self {
        Self { text, image: 1.0 }
    }
}

impl fmt::Display for Guidance {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { text, image } = self;
        if *image == 1.0 { write!(f, "{text}") } else { write!(f, "{text} and by the picture {image}") }
    }
}

/// What the pictures of a batch are drawn from. All of a batch have one size, and references of the same sizes.
pub struct Given<'a> {
    /// The prompt embedding of each picture, `(L, D)`.
    pub text: &'a [Tensor],
    /// The embedding that guidance leads away from, and its strengths.
    pub guidance: Option<(&'a Tensor, Guidance)>,
    /// The reference pictures' latents, `(C, h, w)` each: for every picture of the batch the same number of them.
    pub references: &'a [Vec<Tensor>],
    /// Height and width of the pictures in tokens.
    pub size: (usize, usize),
}

/// A velocity field over states of `(B, h w, C)`.
///
/// The branches of guidance with and without the prompt run as one batch, or one after another ([`Field::apart`]); the one
/// without references is shorter and runs by itself. All but the first are detached, as reinforcement learning asks for. The
/// tokens of references follow those of the picture at every evaluation, with their own rotary positions; only the picture's
/// tokens of the output count.
pub struct Field<'a> {
    transformer: &'a Flux2,
    dtype: DType,
    /// `(R, L, D)` and `(R, M, C)`: the `B` rows with the prompt, then, if guided, as many with the negative one.
    text: Tensor,
    references: Option<Tensor>,
    angles: Angles,
    guidance: Option<Guidance>,
    /// The positions without references, if these guide, too.
    alone: Option<Angles>,
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
        let guidance = guidance.map(|(_, g)| if references.is_some() { g } else { g.text.into() });
        let guides = guidance.is_some_and(|guidance| guidance.image != 1.0);
        let own = &positions[..length + h * w];
        Ok(Self {
            transformer,
            dtype,
            text,
            references,
            alone: guides.then(|| transformer.angles(own, device)).transpose()?,
            angles: transformer.angles(&positions, device)?,
            guidance,
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

    /// The velocity of `image (rows, N, C)` under the texts of these rows and the references that are `seen`, if any are; the
    /// angles are those of all tokens.
    fn evaluate(
        &self,
        transformer: &Flux2,
        (image, sigma): (&Tensor, &Tensor),
        rows: Range<usize>,
        (seen, angles): (Option<&Tensor>, &Angles),
    ) -> candle_core::Result<Tensor> {
        let n = image.dim(1)?;
        let some = |all: &Tensor| all.narrow(0, rows.start, rows.len());
        let image = match seen {
            Some(references) => Tensor::cat(&[image, &some(references)?], 1)?, // (rows, N + M, C)
            None => image.clone(),
        };
        let given = Conditioning { text: &some(&self.text)?, sigma, guidance: None, angles };
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
        let given = (&image, &sigma);
        let all = (self.references.as_ref(), &self.angles);
        let v = match self.guidance {
            None => self.evaluate(self.transformer, given, 0..rows, all)?,
            Some(Guidance { text: by_text, image: by_image }) => {
                let still = self.apart.unwrap_or(self.transformer);
                let (text, negative) = if self.apart.is_some() {
                    let negative = self.evaluate(still, given, batch..rows, all)?.detach();
                    (self.evaluate(self.transformer, given, 0..batch, all)?, negative)
                } else {
                    let both = (&Tensor::cat(&[&image, &image], 0)?, &sigma);
                    let both = self.evaluate(self.transformer, both, 0..rows, all)?; // (R, N, C)
                    (both.narrow(0, 0, batch)?, both.narrow(0, batch, batch)?.detach())
                };
                let v = ((text * by_text)? + (negative * (by_image - by_text))?)?;
                match &self.alone {
                    Some(angles) => {
                        let nothing = self.evaluate(still, given, batch..rows, (None, angles))?.detach();
                        (v + (nothing * (1.0 - by_image))?)?
                    }
                    None => v,
                }
            }
        };
        if let Some(progress) = self.progress {
            progress.end();
        }
        Ok(v)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{flow::Klein, models::Folder};
    use std::path::Path;

    #[test]
    fn guidance_is_by_the_prompt_and_by_the_references() {
        let folder = Folder::from(Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/klein"));
        let klein = Klein::open(&folder, DType::F32, &Device::Cpu, Vec::new()).unwrap();
        let latents = |index: u64| klein.noise(0, index, (4, 4)).unwrap();
        let x = Tensor::stack(&[pack(&latents(0)).unwrap(), pack(&latents(1)).unwrap()], 0).unwrap();
        let none = vec![Vec::new(); 2];
        let both = vec![vec![latents(2)], vec![latents(3)]];
        let velocity = |prompts: [&str; 2], references: &[Vec<Tensor>], guidance: Guidance, apart: bool| {
            let field = klein.field(&prompts, references, (4, 4), guidance).unwrap();
            let field = if apart { field.apart(&klein.transformer) } else { field };
            field.velocity(&x, 0.8, 0).unwrap()
        };
        let gap =
            |a: &Tensor, b: &Tensor| (a - b).unwrap().abs().unwrap().max_all().unwrap().to_scalar::<f32>().unwrap();
        let (words, off) = (["a ball", "a ring"], Guidance::from(1.0));
        let [nothing, seen, told] =
            [([""; 2], &none), ([""; 2], &both), (words, &both)].map(|(p, r)| velocity(p, r, off, false));
        let guidance = Guidance { text: 5.0, image: 2.5 };
        let seen_gains = ((&seen - &nothing).unwrap() * 2.5).unwrap();
        let told_gains = ((&told - &seen).unwrap() * 5.0).unwrap();
        let expected = ((&nothing + seen_gains).unwrap() + told_gains).unwrap();
        for apart in [false, true] {
            let guided = velocity(words, &both, guidance, apart);
            assert!(gap(&guided, &expected) < 1e-4 && gap(&guided, &velocity(words, &both, 5.0.into(), apart)) > 1e-3);
        }
        // Without references there is nothing to be guided by but the prompt.
        let alike = velocity(words, &none, guidance, false);
        assert_eq!(gap(&alike, &velocity(words, &none, 5.0.into(), false)), 0.0);
    }
}
