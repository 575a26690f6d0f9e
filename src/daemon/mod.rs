//! `cwkill daemon`: sweeps at intervals, exports what it saw, and closes by policy.
//!
//! [`config`]: the files of the configuration.

pub mod config;
