//! The paper: roles, the Generate-Reflect-Edit cycle, prompts, trajectories, rewards.
