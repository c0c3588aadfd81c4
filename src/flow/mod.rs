//! The rectified-flow engine: schedules, samplers, policies, inversions.
