//! `Flux2Transformer2DModel`.
