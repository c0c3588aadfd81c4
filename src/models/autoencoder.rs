//! `AutoencoderKLFlux2`.
