//! The vision-language engine: chat templates, image preprocessing, constrained decoding.
