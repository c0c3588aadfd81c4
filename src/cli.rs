//! The command line as typed: clap types only.
