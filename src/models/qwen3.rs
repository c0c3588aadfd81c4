//! `Qwen3ForCausalLM`: the text encoder of FLUX.2-klein and the decoder of Qwen3-VL.
