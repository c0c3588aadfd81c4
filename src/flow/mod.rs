//! The rectified-flow engine: schedules, samplers, policies, inversions.
//!
//! Convention everywhere: sigma = t in `[0, 1]`, 1 is noise; `x_t = (1 - t) x0 + t x1`; a velocity predicts
//! `dx/dt = x1 - x0`, so the clean picture it implies is `x - t v` and the noise it implies is `x + (1 - t) v`. A step goes
//! from `sigma` to `next` and has the length `d = next - sigma`, negative while sampling. States and log-probabilities are
//! f32 whatever the network computes in; sigmas and coefficients are f64 on the host.

pub mod draw;
pub mod field;
pub mod inversion;
pub mod pipeline;
pub mod policy;
pub mod sampler;
pub mod schedule;
pub mod watch;

pub use draw::{Change, Job, Method, Options, Over};
pub use field::{Field, Guidance};
pub use inversion::{FlowEdit, Inversion, RfInversion};
pub use pipeline::{Klein, Parts, PromptEmbedding};
pub use policy::{KlForm, Policy};
pub use sampler::{Solver, Velocity, euler, fireflow, rf_solver};
pub use schedule::{Schedule, empirical_mu};
pub use watch::{Unwatched, Watch};
