//! The words of a prompt: those of its data set, or of its graph.

use crate::scene::{graph::SceneGraph, tabletop::caption::plain};

/// How a prompt is worded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wording {
    /// The triples of the graph, joined by ";", as in the paper.
    Triples,
    /// The caption of the data set.
    Caption,
    /// The caption, then the triples.
    Both,
    /// The caption, drawn as the graph in plain words.
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
