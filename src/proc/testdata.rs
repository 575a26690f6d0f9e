//! Processes for tests without a kernel.

use std::sync::Arc;

use super::{Process, ProcessId};

/// A process that belongs to no unit and no container.
pub(crate) fn process(pid: i32, comm: &str) -> Arc<Process> {
    Arc::new(Process {
        id: ProcessId { pid, start_time: 1 },
        comm: comm.into(),
        cgroup: Default::default(),
    })
}
