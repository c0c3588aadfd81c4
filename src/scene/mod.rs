//! Scene graphs, their grammar and geometry, and the tabletop world.
//!
//! A [`graph::SceneGraph`] is what a prompt asks for; [`relation`] says when a spatial relation holds between two
//! objects; [`parse`] turns text into a graph; [`tabletop`] is the world whose pictures have exact truth.

mod cursor;
pub mod graph;
pub mod iou;
pub mod laion_sg;
pub mod parse;
pub mod relation;
pub mod tabletop;
pub mod unusual;
pub mod words;
