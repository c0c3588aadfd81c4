//! Configuration in layers: defaults, file, environment, `--set`, flags.
