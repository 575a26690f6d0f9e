//! Closes TCP sockets stuck in CLOSE-WAIT without killing the process that leaks them.
//!
//! Data flows one way: **select → find → diagnose → plan → inject → verify → report**.
//!
//! - [`jobs`]: what each command does, from its arguments to its exit status; `terminal`: what is written, progress and Ctrl-C
//! - [`cli`]: what the operator typed; [`config`]: what it means
//! - [`selectors`]: which sockets are meant (pure)
//! - [`expression`]: selectors in the filter syntax of ss(8) (pure)
//! - [`finder`]: which sockets match, and whose they are
//! - [`diagnosis`]: why a socket is stuck, and for how long (pure)
//! - [`plan`]: what to try on each socket, or why it is left alone (pure)
//! - [`privileges`]: what this process may do, and giving up what it need not; [`kernel`]: the version it runs on
//! - [`injector`]: the methods, and the ladder that runs a plan and verifies it
//! - [`reclaim`]: closing the descriptors of dead sockets inside their owners
//! - [`pipeline`]: all of the above as two calls
//! - [`audit`]: the log of what was done
//! - [`refill`]: whether new stuck sockets come after a kill
//! - [`diagnose`]: who leaks, why, and what to look at next; [`check`]: thresholds for monitoring
//! - [`report`]: table, JSON and exit status, from a finished run
//! - [`doctor`]: what works here
//! - [`tcp`]: states and address pairs
//! - [`threads`]: several of them, or none; `sys`: every `unsafe`

pub mod audit;
pub mod check;
pub mod cli;
pub mod commands;
pub mod config;
pub mod control;
pub mod diagnose;
pub mod doctor;
pub mod filter;
pub mod finder;
pub mod injector;
pub mod kernel;
pub mod model;
pub mod packet;
pub mod parallel;
pub mod privileges;
pub mod proc;
pub mod reclaim;
pub mod report;
pub mod sock_diag;
mod sys;
pub mod tcp;
mod terminal;
pub mod text;
pub mod watch;
