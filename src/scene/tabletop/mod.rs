//! The tabletop world: a procedural world of plain objects whose pictures have exact truth.
//!
//! [`world`] says what a scene is, [`view`] what is true of one, [`sample`] and [`split`] draw scenes, [`render`] paints
//! them, [`caption`] describes them in words, [`tasks`] makes endless training samples.

pub mod caption;
pub mod edit;
pub mod plan;
pub mod render;
pub mod sample;
pub mod shapes;
pub mod split;
pub mod tasks;
pub mod view;
pub mod world;
