//! The words of a prompt: those of its data set, or of its graph.

use crate::scene::{graph::SceneGraph, tabletop::caption::plain};
use clap::ValueEnum;
use serde::Serialize;

/// How a prompt is worded, by its name in flags and files.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Wording {
    /// The triples of the scene graph, joined by ";", as in the paper.
    Triples,
    /// The data set's caption.
    Caption,
    /// The caption, then the triples.
    Both,
    /// The caption, drawn as the scene graph in plain words, as `generate` gives the built-in Diffuser what it understands
    /// of a prompt: then no model sees the caption, not even a paraphrase.
    Plain,
}

impl Wording {
    /// A graph's prompt. Without a caption it is the triples.
    pub fn prompt(self, caption: &str, graph: &SceneGraph) -> String {
        match self {
            Self::Caption | Self::Plain if !caption.is_empty() => caption.to_owned(),
            Self::Both if !caption.is_empty() => format!("{caption}; {}", graph.triple_text()),
            _ => graph.triple_text(),
        }
    }

    /// What is drawn from instead of that prompt, if anything.
    pub fn drawn_as(self, graph: &SceneGraph) -> Option<String> {
        (self == Self::Plain).then(|| plain(graph))
    }
}
