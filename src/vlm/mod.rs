//! A vision-language decoder: chat templates, images, batched and constrained generation.

pub mod chat;
pub mod constrain;
pub mod decode;
pub mod image;
pub mod text_encoder;
pub mod vocabulary;
