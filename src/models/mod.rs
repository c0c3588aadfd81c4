//! Model architectures, one file each, loading unmodified Hugging Face folders.

pub mod autoencoder;
pub mod built_in;
pub mod flux2;
pub mod folder;
pub mod linear;
pub mod params;
pub mod peft;
pub mod pixels;
pub mod qwen3;
pub mod qwen3_vl;

pub use folder::Folder;
pub use linear::{Adapter, Linear};
pub use params::{Init, Params};
