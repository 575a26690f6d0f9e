//! When and where cwkill ran.

use std::time::SystemTime;

/// When and on which host a run began, for documents that are kept or collected.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TimeAndPlace {
    pub time: SystemTime,
    /// The name of the host, or of the container.
    pub host: String,
    /// The kernel's id of this boot, with which numbers such as pids and cookies are unique. `None` if /proc does not show it.
    pub boot_id: Option<String>,
}
