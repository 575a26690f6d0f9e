//! The injector: closes sockets. One file for each method, [`plan`] that chooses among them, the [`engine`] that runs a plan
//! and verifies it, and the [`workers`] that share the targets of a scan.
//!
//! A new method is a variant of [`Method`], a module with an [`Executor`], and a line in [`executors`].

pub mod destroy;
mod duplicate;
pub mod engine;
pub mod plan;
pub mod probe;
pub mod rst;
pub mod shutdown;
pub mod workers;

use std::io;

use crate::model::{Method, Target};
use crate::proc::ProcFs;
use engine::Batch;

/// One method at work in one network namespace.
pub trait Executor {
    /// The method.
    fn method(&self) -> Method;

    /// How many sockets it takes at once. Every socket is looked up right before [`Executor::act`], so more sockets mean more time
    /// between that recheck and the act. A method that gains by more, because it waits for answers, checks again with
    /// [`Batch::recheck`] before it does what cannot be undone.
    fn batch_size(&self) -> usize {
        64
    }

    /// Acts on every target, each just rechecked, and records an attempt for each ([`Target::record`]). Success means that
    /// the kernel took the order, not that the socket is closed. A target that is not reached before Ctrl-C gets no attempt.
    fn act(&mut self, targets: Vec<&mut Target>, batch: &mut Batch<'_>);
}

/// The executors of `methods`, in that order, for the network namespace of the calling thread.
///
/// # Errors
/// The netlink socket cannot be opened.
pub fn executors(methods: &[Method], proc: &ProcFs) -> io::Result<Vec<Box<dyn Executor>>> {
    let build = |method: &Method| -> io::Result<Box<dyn Executor>> {
        Ok(match method {
            Method::Probe => Box::new(probe::Probe::new(proc.clone())),
            Method::Rst => Box::new(rst::Rst::new(proc.clone())),
            Method::Shutdown => Box::new(shutdown::Shutdown::new(proc.clone())),
            Method::Destroy => Box::new(destroy::Destroy::open()?),
        })
    };
    methods.iter().map(build).collect()
}
