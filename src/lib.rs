//! rlrig: text-to-image generation that gets spatial relations right, and trains itself to do it better.
//!
//! Imports point one way; a test holds the rule:
//! `error <- tensor <- scene, io <- models <- vlm <- flow <- rig's implementations <- train, eval <- commands <- main`. Beside
//! it `config` imports only `error`, `cli` also `eval` and `flow`, for the names of modes and solvers, `rig::roles` only
//! `scene`, and `rig::cycle` only `error` and `rig::roles`.

pub mod cli;
pub mod commands;
pub mod config;
pub mod error;
pub mod eval;
pub mod flow;
pub mod io;
pub mod models;
pub mod rig;
pub mod scene;
pub mod tensor;
pub mod train;
pub mod vlm;
