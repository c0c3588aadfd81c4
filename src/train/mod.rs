//! Training: pretraining and Reflection-GRPO.
