//! Measuring: held-out scenes in, shares with their uncertainty out.
//!
//! The judge is the world's pixel oracle, which is part of neither the loop nor, unless a config says so, a reward.

pub mod stats;
pub mod tabletop;
