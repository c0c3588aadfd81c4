//! What a sheet or a page shows: pictures in a row, each with what was done and what was found.

use image::RgbImage;

#[derive(Clone, Debug)]
pub struct Story {
    pub title: String,
    /// Name and value, for the small print.
    pub facts: Vec<(String, String)>,
    pub cards: Vec<Card>,
}

#[derive(Clone, Debug)]
pub struct Card {
    pub heading: String,
    /// What was done to get this picture.
    pub action: String,
    pub image: RgbImage,
    pub findings: Vec<Finding>,
    /// Score and times.
    pub footer: String,
    /// Whether this picture is the result.
    pub best: bool,
}

#[derive(Clone, Debug)]
pub struct Finding {
    pub text: String,
    pub yes: bool,
    pub p_yes: f64,
    /// What is wrong; may be empty.
    pub note: String,
}
