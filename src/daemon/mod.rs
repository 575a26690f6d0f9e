//! `cwkill daemon`: sweeps at intervals, exports what it saw, and closes by policy.
//!
//! [`config`]: the files of the configuration; [`policy`]: what each policy would close, and whether it may.

pub mod config;
pub mod policy;
