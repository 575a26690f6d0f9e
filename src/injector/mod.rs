//! The injector: closes sockets. Each method has its own file. [`plan`] chooses among the methods, [`engine`] runs a plan and
//! verifies the result, and [`workers`] distributes the targets of a scan over threads. [`canary`] looks whether an owner spins after
//! the close of its first socket. [`way`] chooses how `destroy` works. `revive` sends a keepalive probe before an act, for NAT.
//! [`gateway`] ends connections of other hosts, which have no socket here.
//!
//! To add a method: add a variant of [`Method`], a module with an [`Executor`], and a line in [`executors`].

mod by_iterator;
pub mod canary;
pub mod destroy;
pub mod duplicate;
pub mod engine;
pub mod gateway;
mod keepalive;
pub mod plan;
pub mod probe;
mod revive;
pub mod rst;
pub mod shutdown;
mod thread_usage;
pub mod way;
pub mod workers;

use std::io;

use crate::model::{Method, Target};
use crate::proc::ProcFs;
use engine::MethodRun;

/// Executes one method in one network namespace.
pub trait Executor {
    fn method(&self) -> Method;

    /// The number of sockets per call of [`Executor::act`]. The engine rechecks all of them before the call, so a larger batch
    /// means more time between the recheck and the act. A method that needs larger batches, because it waits for answers,
    /// calls [`MethodRun::recheck`] again before its irreversible step.
    fn batch_size(&self) -> usize {
        64
    }

    /// Acts on those of `targets` that it can judge and act on at one instant, and returns the others. The engine rechecks these, and then
    /// calls [`Executor::act`]. The engine has not rechecked `targets`. It calls this once for all of them.
    fn act_at_one_instant<'t>(
        &mut self,
        targets: Vec<&'t mut Target>,
        _run: &mut MethodRun<'_>,
    ) -> Vec<&'t mut Target> {
        targets
    }

    /// Acts on `targets`, which have just been rechecked, and records an attempt for each ([`Target::record`]). Success means
    /// that the kernel accepted the request, not that the socket is closed. After Ctrl-C the remaining targets get no attempt.
    fn act(&mut self, targets: Vec<&mut Target>, run: &mut MethodRun<'_>);
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
            Method::Destroy => Box::new(destroy::Destroy::open(proc.clone())?),
        })
    };
    methods.iter().map(build).collect()
}
