//! The tabletop world.
