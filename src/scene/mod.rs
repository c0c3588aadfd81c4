//! Scene graphs, their grammar and geometry, and the tabletop world.
