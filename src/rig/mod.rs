//! The paper: Generate, Reflect, Edit (RL-RIG, arXiv 2602.19974).
//!
//! [`roles`] names who takes part, [`cycle`] is the loop. Both know no model; read them first.

pub mod calibration;
pub mod cycle;
pub mod klein;
pub mod oracle_roles;
pub mod prompts;
pub mod reward;
pub mod roles;
pub mod trajectory;
pub mod truth;
pub mod vlm_roles;
