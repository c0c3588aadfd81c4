//! Measuring: held-out scenes in, shares with their uncertainty out.
//!
//! The judge is the world's pixel oracle, which is part of neither the loop nor, unless a config says so, a reward.

pub mod agreement;
pub mod bootstrap;
pub mod compare;
pub mod dataset;
pub mod folder;
pub mod line;
pub mod metrics;
pub mod modes;
pub mod play;
pub mod records;
pub mod results;
pub mod stats;
pub mod table;
pub mod tabletop;
