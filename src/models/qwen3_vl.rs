//! `Qwen3VLForConditionalGeneration`.
