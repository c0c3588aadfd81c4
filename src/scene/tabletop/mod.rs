//! The tabletop world: a procedural world of plain objects whose pictures have exact truth.
//!
//! [`world`] says what a scene is, [`view`] what is true of one, [`sample`] and [`split`] draw scenes, [`render`] paints
//! them, [`caption`] describes them in words, [`tasks`] makes endless training samples, [`plan`] knows what would mend a picture,
//! and [`oracle`] reads any picture back into objects and relations.

pub mod caption;
pub mod edit;
mod fit;
pub mod oracle;
pub mod plan;
pub mod render;
pub mod sample;
mod segment;
pub mod shapes;
pub mod split;
pub mod tasks;
pub mod view;
pub mod world;
