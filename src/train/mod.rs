//! Training: pretraining and Reflection-GRPO.

pub mod grpo;
