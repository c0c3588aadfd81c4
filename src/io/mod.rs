//! Files in and out, in the formats other tools read.
pub mod tensorboard;
