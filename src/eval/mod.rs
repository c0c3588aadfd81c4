//! Measuring: prompts with their scene graphs in, means with their uncertainty out.
//!
//! [`dataset`] gives the prompts, [`modes`] the ways to make a picture, [`play`] runs them; a picture becomes a
//! [`line::Line`] with its [`metrics`], lines become [`results`], and these the tables and the [`report`]. On the tabletop
//! world the pixel oracle judges too, which is part of neither the loop nor, unless a config says so, a reward.

pub mod agreement;
pub mod bootstrap;
pub mod compare;
pub mod dataset;
pub mod edits;
pub mod flaws;
pub mod folder;
pub mod line;
pub mod metrics;
pub mod modes;
pub mod places;
pub mod play;
pub mod plot;
pub mod record;
pub mod records;
pub mod report;
pub mod results;
pub mod single_edits;
pub mod single_verdicts;
pub mod stats;
pub mod table;
pub mod wording;
